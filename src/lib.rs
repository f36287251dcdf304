//! Memory for agents: AttentionTuner and DT-Mem as CUDA kernels, as models with their training step, and as a trainer.
//!
//! | you want to | see |
//! |---|---|
//! | call the CUDA kernels from your own model code | [`ops`]; `examples/attention.rs` and its neighbours |
//! | train or use one of the models in your own program | [`model`], over a [`backend`], on batches of [`batch`]; `examples/model.rs` |
//! | run a configuration, an experiment, an evaluation, as the command does | [`train`], [`experiment`], [`inspect`] |
//! | generate, read or write demonstrations | [`tasks`] |
//! | know what is computed | the crate [`dtmem_reference`], the definition of all of it |
//!
//! Each layer uses those below it and knows none above: `train` → `model` → `backend` → `ops` or `dtmem_reference`.
//!
//! | feature | |
//! |---|---|
//! | `cuda` (default) | the kernels and what launches them: [`ops`], `backend::gpu`. Nothing of CUDA is needed to build it, and no GPU or driver to start it |
//! | `trainer` (default) | the command and its modules: [`bench`](mod@bench), [`experiment`], [`inspect`], [`tasks`], [`train`], [`verify`] |
//! | `host` | `ops::host`: the kernels run on the CPU, every memory access and barrier checked. Needs a C++ compiler |
//! | `cust` | `interop::cust`: views from and to `cust`'s buffers |
//! | `nccl` | several GPUs |
//! | `nvtx` | ranges in Nsight Systems |
//!
//! With `default-features = false` there are the models on the CPU, and what they need.

pub mod backend;
pub mod batch;
#[cfg(feature = "trainer")]
pub mod bench;
#[cfg(feature = "trainer")]
pub mod experiment;
#[cfg(feature = "trainer")]
pub mod inspect;
#[cfg(feature = "cust")]
pub mod interop;
pub mod model;
#[cfg(feature = "cuda")]
pub mod ops;
pub mod spaces;
#[cfg(feature = "trainer")]
pub mod tasks;
#[cfg(feature = "trainer")]
pub mod train;
#[cfg(feature = "trainer")]
pub mod verify;
