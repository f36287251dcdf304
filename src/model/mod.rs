//! The models: parameters in one arena, blocks, forward and backward over the [`crate::backend`].
//!
//! API skeleton; bodies follow.

mod config;
pub use config::*;
