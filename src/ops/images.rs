//! The kernels that this binary holds: one image per family (`kernels/<family>.cu`), put here by
//! `build.rs`.

use thiserror::Error;

/// The compiled kernels of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Image {
    /// Name of the source file, without `.cu`.
    pub family: &'static str,
    /// What `cuModuleLoadData` takes: a fat binary, or PTX with its closing 0. Aligned to 16 bytes.
    pub bytes: &'static [u8],
    /// How it was made.
    pub origin: Origin,
}

/// How an image was made, which also says what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A fat binary that nvcc made when this binary was built.
    Nvcc {
        /// Of nvcc, such as `13.0.88`.
        version: &'static str,
        /// `sm_…`: machine code; `compute_…`: PTX, which the driver compiles for chips that no
        /// machine code fits.
        architectures: &'static [&'static str],
    },
    /// PTX out of the repository: there was no nvcc. The driver compiles it when it is loaded.
    CommittedPtx {
        /// Of the nvcc that made it.
        version: &'static str,
        /// `compute_80`: for that compute capability and above.
        architecture: &'static str,
        /// Whether it was made from the very sources that lay beside it.
        current: bool,
    },
}

/// No image of that name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("this binary holds no kernels of family `{family}`; it holds: {}", names().join(", "))]
pub struct MissingImage {
    /// What was asked for.
    pub family: String,
}

/// Gives the bytes of a file the alignment of what a C compiler would have embedded.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

macro_rules! aligned {
    ($path:literal) => {{
        const BYTES: &Aligned<[u8]> = &Aligned(*include_bytes!($path));
        &BYTES.0
    }};
}

static IMAGES: &[Image] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Every image of this binary, by name of the family.
pub fn all() -> &'static [Image] {
    IMAGES
}

/// The image of a family.
pub fn find(family: &str) -> Result<&'static Image, MissingImage> {
    let found = IMAGES.iter().find(|image| image.family == family);
    found.ok_or_else(|| MissingImage {
        family: family.to_owned(),
    })
}

/// One line per image, for people: family, how it was made, size.
pub fn describe() -> Vec<String> {
    let line = |image: &Image| {
        let origin = match image.origin {
            Origin::Nvcc {
                version,
                architectures,
            } => {
                format!("nvcc {version} for {}", architectures.join(", "))
            }
            Origin::CommittedPtx {
                version,
                architecture,
                current,
            } => {
                let note = if current {
                    ""
                } else {
                    ", older than its source"
                };
                format!("committed PTX of nvcc {version} for {architecture}{note}")
            }
        };
        format!(
            "{}: {origin}, {} KiB",
            image.family,
            image.bytes.len().div_ceil(1024)
        )
    };
    IMAGES.iter().map(line).collect()
}

fn names() -> Vec<&'static str> {
    IMAGES.iter().map(|image| image.family).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_is_found_by_its_name_and_can_be_loaded_as_it_is() {
        assert!(!all().is_empty());
        for image in all() {
            assert_eq!(find(image.family), Ok(image));
            assert_eq!(image.bytes.as_ptr().addr() % 16, 0, "{}", image.family);
            match image.origin {
                Origin::Nvcc { architectures, .. } => {
                    assert!(architectures.contains(&"compute_80"));
                    assert_eq!(
                        image.bytes[..4],
                        [0x50, 0xed, 0x55, 0xba],
                        "{}",
                        image.family
                    );
                }
                Origin::CommittedPtx { .. } => {
                    let text = std::ffi::CStr::from_bytes_with_nul(image.bytes).unwrap();
                    assert!(text.to_str().unwrap().contains(".target sm_80"));
                }
            }
        }
    }

    #[test]
    fn a_family_that_is_not_here_is_named_with_those_that_are() {
        let message = find("nonsense").unwrap_err().to_string();
        assert!(message.contains("`nonsense`"), "{message}");
        assert!(message.contains(all()[0].family), "{message}");
    }

    #[test]
    fn each_image_has_a_line() {
        let lines = describe();
        assert_eq!(lines.len(), all().len());
        for (line, image) in lines.iter().zip(all()) {
            assert!(line.starts_with(image.family), "{line}");
        }
    }
}
