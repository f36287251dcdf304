//! The C interface of runtime/: structures with the layout of runtime/machine.h and runtime/finding.h.

use std::ffi::{c_char, c_int, c_void};

/// The executor's state. Only the runtime looks inside.
#[repr(C)]
pub struct Machine {
    _opaque: [u8; 0],
}

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Parameter {
    pub kind: u32,
    pub bytes: u32,
}
pub const VALUE: u32 = 0;
pub const INPUT: u32 = 1;
pub const OUTPUT: u32 = 2;
pub const MAP: u32 = 3;

#[repr(C)]
pub struct Kernel {
    pub name: *const c_char,
    pub max_threads: c_int,
    pub parameters: *const Parameter,
    pub parameter_count: usize,
    pub invoke: *const c_void,
    pub function: *const c_void,
    pub next: *const Kernel,
}

#[repr(C)]
pub struct Argument {
    pub value: *const c_void,
    pub address: u64,
    pub bytes: u64,
    pub kind: u32,
}

#[repr(C)]
pub struct LaunchShape {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub cluster: u32,
    pub order: u32,
    pub seed: u64,
    pub budget: u64,
    pub omitted_file: *const c_char,
    pub omitted_line: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Location {
    pub file: *const c_char,
    pub line: u32,
    pub column: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Where {
    pub block: [u32; 3],
    pub thread: [u32; 3],
    pub location: Location,
}

#[repr(C)]
pub struct Finding {
    pub check: u32,
    pub space: u32,
    pub address: u64,
    pub bytes: u64,
    pub offset: u64,
    pub extent: u64,
    pub argument: i32,
    pub is_write: u8,
    pub other_is_write: u8,
    pub has_other: u8,
    pub has_address: u8,
    pub place: Where,
    pub other: Where,
    pub variable: [c_char; 48],
    pub detail: [c_char; 512],
}
pub const GLOBAL: u32 = 1;
pub const SHARED: u32 = 2;

unsafe extern "C" {
    pub fn dtmem_host_new() -> *mut Machine;
    /// # Safety
    /// `machine` is from [`dtmem_host_new`] and not used again.
    pub fn dtmem_host_delete(machine: *mut Machine);
    /// # Safety
    /// `machine` is alive and used by nobody else; `content` is null or has `bytes` readable bytes.
    pub fn dtmem_host_allocate(
        machine: *mut Machine,
        bytes: usize,
        content: *const c_void,
    ) -> *mut u8;
    /// # Safety
    /// `machine` is alive, used by nobody else and holds `bytes` bytes from `address` on; `content` has as many
    /// readable bytes.
    pub fn dtmem_host_write(
        machine: *mut Machine,
        address: u64,
        content: *const c_void,
        bytes: usize,
    );
    /// # Safety
    /// `machine` is alive and used by nobody else; `data` is from [`dtmem_host_allocate`] and not used again.
    pub fn dtmem_host_release(machine: *mut Machine, data: *mut u8);
    /// # Safety
    /// `machine` is alive and used by nobody else.
    pub fn dtmem_host_holds(machine: *mut Machine, address: u64, bytes: u64) -> bool;
    pub fn dtmem_host_kernels() -> *const Kernel;
    /// # Safety
    /// `machine` is alive and used by nobody else. There are `count` arguments of the kernel's kinds and sizes; values
    /// are readable, the file is null or a string, views lie in memory that the machine holds. The grid has blocks, the
    /// block has 1 to 1024 threads.
    pub fn dtmem_host_launch(
        machine: *mut Machine,
        kernel: *const Kernel,
        shape: *const LaunchShape,
        arguments: *const Argument,
        count: usize,
        finding: *mut Finding,
    ) -> bool;
}
