//! A model of the CUDA driver, of cuBLASLt and of NCCL, for tests of the code that calls them.
//!
//! The library exports those functions of them that dtmem calls, under their own names: in a folder
//! that `LD_LIBRARY_PATH` names, as `libcuda.so`, `libcuda.so.1`, `libcublasLt.so` and
//! `libnccl.so.2`, it runs a binary that was built for GPUs, unchanged, on the CPU. Kernels run on the
//! executor (`dtmem_host`), which checks every access of theirs. A function that is missing here ends
//! the program with its name.
//!
//! It is stricter than a GPU. What is queued on a stream runs when somebody waits for it and not
//! before, other streams only as far as events ask for it; so what was not waited for has not
//! happened. Memory that nothing was written to holds nonsense, and addresses are not used again
//! soon. A capture takes only what a graph can repeat, and nothing of it runs before the graph.
//! Every error is told on stderr, on a line that begins with `CUDA model:`; so is what was not
//! given back when the context is released.
//!
//! `DTMEM_DRIVER` has options, with commas between them:
//!
//! * `a100`: an A100 instead of an H100.
//! * `gpus=N`: so many of them. A process has the context of one.
//! * `memory=MIB`: so much memory instead of the chip's.
//! * `order=N`: streams make progress by chance, from this seed, as far as events allow.
//! * `old`: the driver is for CUDA 12.4, and takes no image.
//! * `taken`: another process has the GPU for itself.
//! * `lost=N`: the GPU is gone when it comes to the work of that number.
//! * `idle`: nothing is computed or stored, memory reads as zeros. Everything else is checked, so
//!   that what takes a GPU hours is checked in seconds. Work takes a pretended 10 µs.
//! * `trace`: every call on stderr.

#[allow(unsafe_code)] // C functions
mod blas;
#[allow(unsafe_code)] // C functions
mod cuda;
mod device;
mod image;
#[allow(unsafe_code)] // copies from and to the host's memory
mod machine;
mod memory;
#[allow(unsafe_code)] // C functions
mod nccl;
mod work;
