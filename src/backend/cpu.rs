//! The CPU backend: the reference, threaded.
pub struct Cpu;
