//! Kernels, a reference model and a trainer for agents that remember.

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
