//! The operations on CUDA devices, for model code.
//!
//! Each operation has a module with a `Shape`, and for each pass a struct that names the tensors. Model code brings its
//! own context, stream and memory, all of them those of [`cudarc`]:
//!
//! ```no_run
//! use dtmem::ops::{Gpu, Result, layer_norm};
//!
//! # fn main() -> Result<()> {
//! let gpu = Gpu::new(0)?; // or Gpu::from_context(yours); one for each context: it keeps the loaded kernels
//! let stream = gpu.context().new_stream()?;
//! let shape = layer_norm::Shape { rows: 64, width: 512 };
//! let mut x = stream.alloc_zeros::<half::bf16>(64 * 512)?;
//! let weight = stream.alloc_zeros(512)?;
//! let bias = stream.alloc_zeros(512)?;
//! let [mut mean, mut rstd] = [stream.alloc_zeros(64)?, stream.alloc_zeros(64)?];
//!
//! let on = gpu.on(&stream)?;
//! let y = on.output(&mut x); // in place
//! shape.forward(&on, layer_norm::Forward {
//!     x: y.as_input(),
//!     residual: None,
//!     weight: on.input(&weight),
//!     bias: on.input(&bias),
//!     y,
//!     mean: on.output(&mut mean),
//!     rstd: on.output(&mut rstd),
//!     epsilon: 1e-5,
//! })?;
//! # Ok(())
//! # }
//! ```
//!
//! * Whatever is wrong with sizes, alignment, overlaps or contexts is an [`Error`] before anything is launched.
//!   Tensors are contiguous, and a part of a buffer is passed as a cudarc view; where an operation takes [`Rows`], they
//!   may be columns of a larger matrix.
//! * A launch does not wait, allocate or panic; only the first one of each kernel loads it. Operations that need
//!   scratch memory take a workspace, which begins at a multiple of 16 bytes; their shape says how large it is. So a
//!   sequence that has run once can be captured in a CUDA graph (on a stream of its own, and with cudarc's event
//!   tracking switched off before anything is allocated).
//! * What would be launched can be looked at without a GPU: `Shape::plan_…`.
//! * The same calls run on a CPU, through any other [`Launcher`]: the feature `host` has one that checks each access of
//!   the kernels.
//!
//! A new operation is one file here (see `activation.rs`), beside its kernels in `kernels/`.

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod content_memory;
pub mod convolutions;
pub mod cross_entropy;
pub mod elementwise;
mod error;
#[allow(unsafe_code)] // the boundary to the CUDA driver
pub mod gpu;
#[cfg(feature = "host")]
pub mod host;
pub mod images;
pub mod launch;
pub mod layer_norm;
pub mod lora_linear;
pub mod memory;
pub mod one_hot;
pub mod recall;
pub mod squared_error;
pub mod tokens;

pub use cudarc; // streams and memory are this version's
pub use error::{Error, Result};
pub use gpu::{Gpu, OnStream};
pub use launch::{Arg, Launch, Launcher, TensorMap, Version};
pub use memory::{Input, Output, Rows, Span, Storage, Type};
