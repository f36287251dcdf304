use std::fmt::Display;

use thiserror::Error;

use super::images::MissingImage;

/// Why an operation was not launched.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A number that the operation cannot work with.
    #[error("{argument} is {found}, expected {expected}")]
    Value {
        /// Name of the argument.
        argument: &'static str,
        /// What it was.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// Numbers on the host that must not be uploaded as they are.
    #[error(transparent)]
    Content(#[from] dtmem_reference::Error),
    /// A tensor of another size than the shape says.
    #[error("{argument} has {found} elements, expected {expected}")]
    Length {
        /// Name of the argument.
        argument: &'static str,
        /// Elements that it has.
        found: usize,
        /// Elements that the shape asks for.
        expected: usize,
    },
    /// A part that a tensor does not have.
    #[error("elements {found:?} of a tensor of {expected}")]
    Range {
        /// What was asked for.
        found: std::ops::Range<usize>,
        /// Elements that there are.
        expected: usize,
    },
    /// A workspace below what the shape's size function gives.
    #[error("{argument} has {found} elements, expected at least {expected}")]
    TooSmall {
        /// Name of the argument.
        argument: &'static str,
        /// Elements that it has.
        found: usize,
        /// Elements that are needed.
        expected: usize,
    },
    /// A tensor that does not begin where the kernel can read it.
    #[error(
        "{argument} begins at address {address:#x}, expected a multiple of {expected} bytes: pass a view that begins \
         there"
    )]
    Misaligned {
        /// Name of the argument.
        argument: &'static str,
        /// Where it begins.
        address: u64,
        /// Bytes.
        expected: usize,
    },
    /// Two tensors that share memory, of which at least one is written.
    #[error("{first} and {second} overlap, expected separate memory")]
    Overlap {
        /// Name of an argument.
        first: &'static str,
        /// Name of the other.
        second: &'static str,
    },
    /// Memory of another CUDA context, or of the host where a GPU runs the kernel, or the other way round.
    #[error(
        "{argument} lies in other memory than what it is used with: expected one CUDA context for all"
    )]
    ForeignMemory {
        /// Name of the argument, or of the kernel that was to run elsewhere.
        argument: &'static str,
    },
    /// The machine has no NVIDIA driver.
    #[error(
        "no NVIDIA driver: {name} cannot be loaded ({reason}); install it, or set LD_LIBRARY_PATH to its folder"
    )]
    NoDriver {
        /// Of the library.
        name: &'static str,
        /// What the loader said.
        reason: String,
    },
    /// The driver is there, and this GPU is not.
    #[error("no GPU {ordinal}: the driver knows {count}")]
    NoGpu {
        /// Number of the GPU that was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The GPU is another process's alone.
    #[error(
        "GPU {ordinal} is another process's alone: wait until that ends, or let processes share the GPU with \
         `nvidia-smi --id={ordinal} --compute-mode=DEFAULT`"
    )]
    Taken {
        /// Number of the GPU.
        ordinal: usize,
    },
    /// This binary holds no kernels of that family.
    #[error(transparent)]
    MissingImage(#[from] MissingImage),
    /// The driver does not take a family's image.
    #[error(
        "the driver does not load the kernels of `{family}` ({source}): they need a GPU of compute capability 8.0 or \
         above and a driver for CUDA {cuda} or above; this one is for CUDA {driver}"
    )]
    Image {
        /// Name of the family.
        family: &'static str,
        /// The version of CUDA that the image was made with.
        cuda: &'static str,
        /// The version of CUDA that the driver is for.
        driver: String,
        /// What the driver said.
        source: cudarc::driver::DriverError,
    },
    /// A family's image has no kernel of that name.
    #[error(
        "the image of `{family}` has no kernel `{kernel}` ({source}): was it built from other sources?"
    )]
    MissingKernel {
        /// Name of the family.
        family: &'static str,
        /// Name of the kernel.
        kernel: &'static str,
        /// What the driver said.
        source: cudarc::driver::DriverError,
    },
    /// A kernel for other GPUs, or one that this build has no machine code of.
    #[error(
        "{kernel} cannot run on this GPU: it needs compute capability 9.0 (with clusters: or above), the shared memory \
         that it asks for, and a build with nvcc; `Version::Portable` does the same on every GPU"
    )]
    CannotLaunch {
        /// Name of the kernel.
        kernel: &'static str,
    },
    /// There is no cuBLASLt.
    #[error(
        "the library cublasLt cannot be loaded: install CUDA's libraries (PyTorch's packages have it), or set \
         LD_LIBRARY_PATH to its folder"
    )]
    NoBlas,
    /// cuBLASLt failed.
    #[error("cublasLt, {what}: {source}")]
    Blas {
        /// What it was asked for.
        what: String,
        /// What it said.
        source: cudarc::cublaslt::result::CublasError,
    },
    /// There is no NCCL.
    #[error(
        "the library nccl cannot be loaded, which several ranks need: install it (PyTorch's packages have it), or set \
         LD_LIBRARY_PATH to its folder; or train with WORLD_SIZE=1"
    )]
    NoNccl,
    /// NCCL failed.
    #[error("NCCL, {what}: {code}; NCCL_DEBUG=INFO makes it say why")]
    Nccl {
        /// What it was asked for.
        what: &'static str,
        /// What it said.
        code: String,
    },
    /// The device's memory is full.
    #[error("out of device memory: {needed} bytes are needed at once, {free} of {total} are free")]
    OutOfMemory {
        /// Bytes that were asked for.
        needed: usize,
        /// Bytes that nobody uses.
        free: usize,
        /// Bytes that the device has.
        total: usize,
    },
    /// A capture that gave nothing.
    #[error("the CUDA stream gave no graph of what it was asked for")]
    NoGraph,
    /// The driver failed at something else.
    #[error("CUDA driver: {0}")]
    Driver(#[from] cudarc::driver::DriverError),
    /// A launcher did not run a kernel to its end.
    #[error("{kernel}: {source}")]
    Launch {
        /// Name of the kernel.
        kernel: &'static str,
        /// What the launcher said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The result of an operation.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(super) fn value(
        argument: &'static str,
        found: impl Display,
        expected: impl Display,
    ) -> Self {
        Self::Value {
            argument,
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }
}
