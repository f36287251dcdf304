//! The GPU that is pretended to be there.

use std::fmt;

use cudarc::driver::sys::CUdevice_attribute as Attribute;

/// What `DTMEM_DRIVER` says.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    pub a100: bool,
    pub gpus: Option<u64>,
    pub memory: Option<u64>,
    pub order: Option<u64>,
    pub lost: Option<u64>,
    pub old: bool,
    pub taken: bool,
    pub idle: bool,
    pub trace: bool,
}

impl Options {
    /// Ends the program for what is no option: a test must not run without what it asks for.
    pub fn of_environment() -> Self {
        let text = std::env::var("DTMEM_DRIVER").unwrap_or_default();
        let mut options = Self::default();
        for word in text.split(',').filter(|word| !word.is_empty()) {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = value.parse::<u64>().ok();
            match (name, number) {
                ("a100", _) => options.a100 = true,
                ("old", _) => options.old = true,
                ("taken", _) => options.taken = true,
                ("idle", _) => options.idle = true,
                ("trace", _) => options.trace = true,
                ("gpus", Some(count)) => options.gpus = Some(count),
                ("lost", Some(works)) => options.lost = Some(works),
                ("memory", Some(mib)) => options.memory = Some(mib << 20),
                ("order", Some(seed)) => options.order = Some(seed),
                _ => {
                    eprintln!("CUDA model: DTMEM_DRIVER has `{word}`, which is no option");
                    std::process::exit(2);
                }
            }
        }
        options
    }
}

/// A chip's numbers.
#[derive(Debug, Clone, Copy)]
pub struct Chip {
    pub name: &'static str,
    pub capability: [i32; 2],
    pub multiprocessors: i32,
    /// Of a block, static and dynamic.
    pub shared_bytes: u32,
    pub memory: u64,
    /// Blocks of a cluster at most; 0 where there are none.
    pub cluster: u32,
}

/// Shared memory of a block that needs no permission.
pub const SHARED_BYTES: u32 = 48 << 10;
/// The version of CUDA that the driver is for: 13.0.
pub const VERSION: i32 = 13_000;
/// That of an old one: 12.4.
pub const OLD_VERSION: i32 = 12_040;

impl Chip {
    pub fn new(options: &Options) -> Self {
        let mut chip = match options.a100 {
            true => Self {
                name: "NVIDIA A100-SXM4-80GB (model)",
                capability: [8, 0],
                multiprocessors: 108,
                shared_bytes: 163 << 10,
                memory: 81_920 << 20,
                cluster: 0,
            },
            false => Self {
                name: "NVIDIA H100 80GB HBM3 (model)",
                capability: [9, 0],
                multiprocessors: 132,
                shared_bytes: 227 << 10,
                memory: 81_559 << 20,
                cluster: 16,
            },
        };
        chip.memory = options.memory.unwrap_or(chip.memory);
        chip
    }

    /// Two digits, as images and functions have it.
    pub fn target(&self) -> i32 {
        10 * self.capability[0] + self.capability[1]
    }

    pub fn attribute(&self, attribute: u32) -> Option<i32> {
        let known = [
            (
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                self.capability[0],
            ),
            (
                Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                self.capability[1],
            ),
            (
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
                self.shared_bytes as i32,
            ),
            (
                Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                self.multiprocessors,
            ),
            (Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, 1),
        ];
        let mut found = known.into_iter();
        found.find_map(|(known, value)| (known as u32 == attribute).then_some(value))
    }
}

/// Why a call fails: the code that it returns, and what stderr is told.
#[derive(Debug)]
pub struct Fault<C> {
    pub code: C,
    pub message: String,
}

impl<C: fmt::Debug> Fault<C> {
    /// As a library on top tells of it, by a code of its own.
    pub fn with_code<D>(self, code: D) -> Fault<D> {
        Fault {
            code,
            message: format!("{} ({:?})", self.message, self.code),
        }
    }
}

/// A [`Fault`], as an error.
pub fn fault<T, C>(code: C, message: impl fmt::Display) -> Result<T, Fault<C>> {
    Err(Fault {
        code,
        message: message.to_string(),
    })
}
