//! Runs the kernels of `kernels/*.cu` on a CPU, and checks them while they run.
//!
//! The files are the very ones that nvcc compiles. Blocks run one after another; the threads of a block are fibers that
//! switch only where they wait for each other (barriers, shuffles, matrix instructions). The compiler announces every
//! access to memory, and the executor answers with what a GPU would not tell: see [`Check`] for what it finds. The
//! first defect ends the launch and is returned as a [`Finding`] with thread, memory and source line.
//!
//! ```
//! use dtmem_host::{Arg, Executor, Launch};
//!
//! let executor = Executor::new();
//! let x = executor.upload(&[1.0_f32, 2.0, 3.0]);
//! let y = executor.scratch::<f32>(3); // poisoned: reading it before it is written is a finding
//! let launch = Launch::new([1, 1, 1], [32, 1, 1]);
//! executor
//!     .launch("test_scale_f32", launch, &[Arg::Input(x.view()), Arg::Output(y.view()), Arg::I32(3), Arg::F32(2.0)])
//!     .unwrap();
//! assert_eq!(y.download(), [2.0, 4.0, 6.0]);
//! ```
#![cfg(any(doc, feature = "kernels"))]

mod error;
#[allow(unsafe_code)] // the boundary to the runtime in C++
mod executor;
#[allow(unsafe_code)]
mod ffi;
#[allow(unsafe_code)]
mod finding;
mod map;

pub use error::{Error, Result};
pub use executor::{
    Arg, Buffer, Element, Executor, Launch, Order, Parameter, View, kernels, signature,
};
pub use finding::{Access, Check, Finding, Location, Memory, Place};
pub use map::{Boxes, TensorMap};
