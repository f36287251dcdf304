//! The GPU backend: the kernels of [`crate::ops`] and a library's matrix products.

#[allow(unsafe_code)] // the boundary to cuBLASLt
mod blas;
#[allow(unsafe_code)] // the boundary to the CUDA driver
mod cuda;
mod device;
#[cfg(feature = "host")]
mod host;

pub use blas::Multiply;
pub use cuda::CudaDevice;
pub use device::{Compute, Device, Element, Factor, Product};
#[cfg(feature = "host")]
pub use host::HostDevice;
