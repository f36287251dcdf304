//! What is known of a module's image without understanding it.

use std::ops::RangeInclusive;

/// Begins a fat binary.
const FAT: u32 = 0xba55_ed50;
/// Kinds of its entries.
const PTX: u16 = 1;
const MACHINE_CODE: u16 = 2;

/// A fat binary, of which the entries' targets are known and no more, as they are compressed; or PTX.
#[derive(Debug)]
pub enum Image {
    Fat {
        /// Targets of machine code, such as 90.
        machine_code: Vec<i32>,
        /// Targets of PTX.
        ptx: Vec<i32>,
    },
    Ptx(String),
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    number(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    number(bytes, at).map(u32::from_le_bytes)
}

fn size_at(bytes: &[u8], at: usize) -> Option<usize> {
    let size = number(bytes, at).map(u64::from_le_bytes)?;
    usize::try_from(size).ok()
}

impl Image {
    /// Bytes of the image that begins so; nothing where it is neither a fat binary nor text. `end`
    /// looks for the 0 that closes a text.
    pub fn len(start: &[u8; 16], end: impl FnOnce() -> usize) -> Option<usize> {
        if u32_at(start, 0)? == FAT {
            return usize::from(u16_at(start, 6)?).checked_add(size_at(start, 8)?);
        }
        let is_text = start.iter().all(|&byte| byte == b'\n' || byte >= b' ');
        is_text.then(end)
    }

    /// Nothing where the bytes are no image.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        if u32_at(bytes, 0)? != FAT {
            let text = std::str::from_utf8(bytes.strip_suffix(&[0])?).ok()?;
            return Some(Self::Ptx(text.to_owned()));
        }
        let (mut machine_code, mut ptx) = (Vec::new(), Vec::new());
        let mut at = usize::from(u16_at(bytes, 6)?);
        while at < bytes.len() {
            let target = i32::try_from(u32_at(bytes, at + 28)?).ok()?;
            match u16_at(bytes, at)? {
                PTX => ptx.push(target),
                MACHINE_CODE => machine_code.push(target),
                _ => {}
            }
            let header = usize::try_from(u32_at(bytes, at + 4)?).ok()?;
            at += header + size_at(bytes, at + 8)?;
        }
        Some(Self::Fat { machine_code, ptx })
    }

    /// The target of the code that a chip of target `chip` runs; nothing where there is none for it.
    pub fn target(&self, chip: i32) -> Option<i32> {
        // Machine code is for one generation, PTX for all that come later.
        let same_generation: RangeInclusive<i32> = chip / 10 * 10..=chip;
        let best = |targets: &[i32], range: RangeInclusive<i32>| {
            let fitting = targets.iter().filter(|target| range.contains(target));
            fitting.max().copied()
        };
        match self {
            Self::Fat { machine_code, ptx } => {
                best(machine_code, same_generation).or_else(|| best(ptx, 0..=chip))
            }
            Self::Ptx(text) => {
                let mut lines = text.lines();
                let line = lines.find_map(|line| line.strip_prefix(".target sm_"))?;
                let digits = line.split(|c: char| !c.is_ascii_digit()).next()?;
                best(&[digits.parse().ok()?], 0..=chip)
            }
        }
    }

    /// Whether there is a kernel of this name, as far as that can be known.
    pub fn has(&self, name: &str) -> bool {
        match self {
            Self::Fat { .. } => true,
            Self::Ptx(text) => text.contains(&format!(".entry {name}(")),
        }
    }

    /// Bytes of a kernel's static shared memory, where the image says it in words.
    pub fn shared_bytes(&self, name: &str) -> u32 {
        let Self::Ptx(text) = self else { return 0 };
        let kernel = text.split_once(&format!(".entry {name}("));
        let body = kernel.and_then(|(_, rest)| rest.split("\n}").next());
        let of_line = |line: &str| -> Option<u32> {
            let line = line.trim().strip_prefix(".shared ")?;
            line.split_once('[')?.1.split(']').next()?.parse().ok()
        };
        body.unwrap_or_default().lines().filter_map(of_line).sum()
    }
}
