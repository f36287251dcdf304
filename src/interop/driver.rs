//! The driver's functions that `cust` is linked to, each of which looks its namesake up in the driver's library when it
//! is called. So a binary with the feature `cust` starts on a machine without a driver, and `cust` has errors there.
//!
//! `cust` 0.3.2 names 105 functions. All of them take numbers and pointers of at most 64 bits and no floats, so that
//! 64-bit calling conventions pass them on as words, whatever their types.

use std::ffi::{CStr, c_char, c_int};

use crate::ops::gpu::driver;

#[cfg(not(target_pointer_width = "64"))]
compile_error!("the feature `cust` needs a 64-bit target");

const SUCCESS: c_int = 0;
const SYMBOL_NOT_FOUND: c_int = 302;
const NO_LIBRARY: c_int = 303;

/// A function of the driver, or the code that says what is missing.
///
/// # Safety
/// `F` is a pointer to functions like the one of this name.
unsafe fn find<F: Copy>(name: &CStr) -> Result<F, c_int> {
    let library = driver().map_err(|_| NO_LIBRARY)?;
    // SAFETY: the caller's.
    let function = unsafe { library.get::<F>(name.to_bytes_with_nul()) };
    function
        .map(|function| *function)
        .map_err(|_| SYMBOL_NOT_FOUND)
}

/// Functions by their number of arguments.
macro_rules! forward {
    ($(($($argument:ident),*): $($name:ident)+;)*) => {
        $(forward!(@each ($($argument),*) $($name)+);)*
    };
    (@each $arguments:tt $($name:ident)+) => {
        $(forward!(@one $arguments $name);)+
    };
    (@one ($($argument:ident),*) $name:ident) => {
        // SAFETY: nothing else defines the name; only `cust` calls it, with what the driver's function takes.
        #[allow(non_snake_case)]
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: u64),*) -> c_int {
            type Function = unsafe extern "C" fn($(forward!(@word $argument)),*) -> c_int;
            const NAME: &str = concat!(stringify!($name), "\0");
            let name = CStr::from_bytes_until_nul(NAME.as_bytes()).unwrap_or_default();
            // SAFETY: it takes as many words.
            match unsafe { find::<Function>(name) } {
                // SAFETY: the arguments are passed on as they came.
                Ok(function) => unsafe { function($($argument),*) },
                Err(code) => code,
            }
        }
    };
    (@word $argument:ident) => { u64 };
}

forward! {
    ():
        cuCtxSynchronize;
    (a):
        cuArrayDestroy cuCtxDestroy_v2 cuCtxGetCacheConfig cuCtxGetCurrent cuCtxGetDevice cuCtxGetFlags
        cuCtxGetSharedMemConfig cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuCtxSetCacheConfig cuCtxSetCurrent
        cuCtxSetSharedMemConfig cuDestroyExternalMemory cuDeviceGetCount cuDevicePrimaryCtxRelease_v2
        cuDevicePrimaryCtxReset_v2 cuDriverGetVersion cuEventDestroy_v2 cuEventQuery cuEventSynchronize
        cuGraphDestroy cuInit cuLinkDestroy cuMemFreeHost cuMemFree_v2 cuMemcpy2D_v2 cuModuleUnload
        cuStreamDestroy_v2 cuStreamSynchronize cuSurfObjectDestroy cuTexObjectDestroy;
    (a, b):
        cuArray3DCreate_v2 cuArray3DGetDescriptor_v2 cuCtxGetApiVersion cuCtxGetLimit cuCtxGetStreamPriorityRange
        cuCtxSetLimit cuDeviceGet cuDevicePrimaryCtxRetain cuDevicePrimaryCtxSetFlags_v2 cuDeviceTotalMem_v2
        cuEventCreate cuEventRecord cuFuncSetCacheConfig cuFuncSetSharedMemConfig cuGraphCreate
        cuGraphKernelNodeGetParams cuGraphNodeGetType cuImportExternalMemory cuMemAllocHost_v2 cuMemAlloc_v2
        cuMemFreeAsync cuMemGetInfo_v2 cuModuleLoad cuModuleLoadData cuStreamGetFlags cuStreamGetPriority
        cuSurfObjectCreate cuSurfObjectGetResourceDesc cuTexObjectGetResourceDesc cuTexObjectGetResourceViewDesc;
    (a, b, c):
        cuCtxCreate_v2 cuDeviceGetAttribute cuDeviceGetName cuEventElapsedTime cuExternalMemoryGetMappedBuffer
        cuFuncGetAttribute cuGraphDebugDotPrint cuGraphGetNodes cuLaunchHostFunc cuLinkComplete cuMemAllocAsync
        cuMemAllocManaged cuMemcpyDtoD_v2 cuMemcpyDtoH_v2 cuMemcpyHtoD_v2 cuMemsetD16_v2 cuMemsetD32_v2 cuMemsetD8_v2
        cuModuleGetFunction cuStreamCreateWithPriority cuStreamWaitEvent;
    (a, b, c, d):
        cuGraphGetEdges cuLinkCreate_v2 cuMemAdvise cuMemPrefetchAsync cuMemcpyAtoH_v2 cuMemcpyDtoDAsync_v2
        cuMemcpyDtoHAsync_v2 cuMemcpyHtoA_v2 cuMemcpyHtoDAsync_v2 cuMemsetD16Async cuMemsetD32Async cuMemsetD8Async
        cuModuleGetGlobal_v2 cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveBlocksPerMultiprocessor
        cuTexObjectCreate;
    (a, b, c, d, e):
        cuGraphAddKernelNode cuModuleLoadDataEx;
    (a, b, c, d, e, f):
        cuOccupancyMaxPotentialBlockSize;
    (a, b, c, d, e, f, g, h):
        cuLinkAddData_v2;
    (a, b, c, d, e, f, g, h, i, j, k):
        cuLaunchKernel;
}

/// Without a driver there is still a text: `cust` asks for it to print its errors.
///
/// # Safety
/// `text` may be written to.
#[allow(non_snake_case)]
#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(error: c_int, text: *mut *const c_char) -> c_int {
    type Function = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;
    // SAFETY: these are its arguments.
    match unsafe { find::<Function>(c"cuGetErrorString") } {
        // SAFETY: the arguments are passed on as they came.
        Ok(function) => unsafe { function(error, text) },
        Err(_) => {
            // SAFETY: the caller's.
            unsafe { text.write(c"no NVIDIA driver".as_ptr()) };
            SUCCESS
        }
    }
}
