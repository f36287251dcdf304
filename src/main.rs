//! The `dtmem` command.
fn main() {}
