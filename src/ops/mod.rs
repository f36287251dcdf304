//! The operations on CUDA devices.

pub mod images;
