//! The mathematics of dtmem: every operation forward and backward, one file per operation.
//!
//! This crate is the definition. Each function names its equation, is generic over `f32` and
//! `f64`, and works on [`ndarray`] views, so strided inputs (a fused q-k-v buffer, a transposed
//! weight) need no copy. Everything faster, on the CPU or a GPU, is checked against it.
//!
//! Conventions:
//! * arrays are row-major; shapes stand in the documentation as `[rows, width]`;
//! * gradients of *inputs* are overwritten, gradients of *parameters* are added to;
//! * functions that need scratch space take it as an argument and allocate nothing else, so a
//!   caller can run them in a loop without touching the allocator;
//! * wrong shapes and values are an [`Error`] that names the argument, never a panic.

pub mod activation;
pub mod attention;
pub mod content_memory;
pub mod convolution;
pub mod cross_entropy;
pub mod dropout;
mod error;
mod lanes;
pub mod layer_norm;
pub mod linear;
pub mod lora_linear;
pub mod one_hot;
pub mod optimiser;
pub mod recall;
mod scalar;
pub mod squared_error;

pub use error::{Error, Result};
pub use scalar::Scalar;
