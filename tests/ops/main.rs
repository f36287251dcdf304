//! The operations of `dtmem::ops`: plans and errors without a GPU, whole launches through the host executor against the
//! reference, and the same on a GPU where there is one. One module for each operation.

mod activation;
mod adamw;
mod attention;
mod common;
mod content_memory;
mod convolutions;
mod cross_entropy;
mod elementwise;
mod layer_norm;
mod lora_linear;
mod machines;
mod one_hot;
mod recall;
mod refusals;
mod squared_error;
mod tokens;
