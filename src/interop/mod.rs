//! Views for other crates' device memory.

#[allow(unsafe_code)] // the boundary to `cust` and to the CUDA driver
pub mod cust;
#[allow(unsafe_code)] // the boundary to the CUDA driver
mod driver;
