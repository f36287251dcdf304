//! How kernels become images: shared by build.rs, by `scripts/kernels` and by tests. No dependencies.

pub mod compile;
pub mod manifest;
pub mod nvcc;
pub mod sources;

/// A message for whoever runs the build.
pub type Result<T> = std::result::Result<T, String>;

/// `map_err(context(…))`: says what was being done.
pub fn context<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {error}")
}
