//! The functions of the driver.

use std::ffi::{CStr, c_char, c_void};
use std::ptr;

use cudarc::driver::sys::{
    CUevent_flags, CUfunction_attribute as Attribute, CUlaunchAttributeID, CUlaunchConfig,
    CUpointer_attribute, CUresult as Code, CUstream_flags, CUstreamCaptureMode,
    CUtensorMapDataType as Element, CUtensorMapSwizzle,
};
use dtmem_host::{Boxes, Launch, TensorMap};

use crate::device::fault;
use crate::image::Image;
use crate::machine::{CONTEXT, Machine, Mode, Result, call};
use crate::work::{Address, Bits, Handle, Work};

fn invalid<T>(message: impl Into<String>) -> Result<T> {
    fault(Code::CUDA_ERROR_INVALID_VALUE, message.into())
}

/// Writes to where the caller wants it.
///
/// # Safety
/// Null, or a place for a `T`.
unsafe fn put<T>(to: *mut T, value: T) -> Result<()> {
    if to.is_null() {
        return invalid("a null pointer");
    }
    // SAFETY: the caller's.
    unsafe { to.write(value) };
    Ok(())
}

/// The arguments of a launch, from an array of pointers to them.
///
/// # Safety
/// As many as the kernel declares, each as large.
unsafe fn launch(
    machine: &mut Machine,
    stream: Handle,
    function: Handle,
    launch: Launch,
    arguments: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Result<()> {
    if !extra.is_null() {
        return invalid("arguments in a buffer, which this model does not know");
    }
    let bits = |index: usize, bytes: usize| {
        if arguments.is_null() {
            return None;
        }
        let mut words: Bits = [0; 16];
        // SAFETY: the caller's.
        unsafe {
            let argument = *arguments.add(index);
            if argument.is_null() || bytes > size_of::<Bits>() {
                return None;
            }
            ptr::copy_nonoverlapping(argument.cast::<u8>(), words.as_mut_ptr().cast(), bytes);
        }
        Some(words)
    };
    machine.launch(stream, function, launch, bits)
}

/// # Safety
/// The attributes are there.
unsafe fn of_config(config: *const CUlaunchConfig) -> Result<(Launch, Handle)> {
    // SAFETY: the caller's.
    let Some(config) = (unsafe { config.as_ref() }) else {
        return invalid("a null pointer");
    };
    let mut launch = Launch::new(
        [config.gridDimX, config.gridDimY, config.gridDimZ],
        [config.blockDimX, config.blockDimY, config.blockDimZ],
    );
    launch.shared_bytes = config.sharedMemBytes;
    for index in 0..config.numAttrs as usize {
        // SAFETY: the caller's.
        let attribute = unsafe { &*config.attrs.add(index) };
        if attribute.id != CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION {
            return invalid(format!("a launch with {:?}", attribute.id));
        }
        // SAFETY: this attribute's value is of this type.
        let cluster = unsafe { attribute.value.clusterDim };
        if cluster.x == 0 || cluster.y != 1 || cluster.z != 1 {
            return invalid(format!("a cluster of {cluster:?}"));
        }
        launch.cluster = cluster.x;
    }
    Ok((launch, config.hStream.addr() as Handle))
}

/// Names of the codes that this model returns.
fn name_of(code: u32) -> &'static CStr {
    macro_rules! names {
        ($($name:ident)*) => {
            [$((Code::$name as u32, concat!(stringify!($name), "\0"))),*]
        };
    }
    let names = names! {
        CUDA_SUCCESS CUDA_ERROR_INVALID_VALUE CUDA_ERROR_OUT_OF_MEMORY CUDA_ERROR_NOT_INITIALIZED
        CUDA_ERROR_NO_DEVICE CUDA_ERROR_INVALID_DEVICE CUDA_ERROR_INVALID_IMAGE CUDA_ERROR_INVALID_CONTEXT
        CUDA_ERROR_NO_BINARY_FOR_GPU
        CUDA_ERROR_INVALID_HANDLE CUDA_ERROR_ILLEGAL_STATE CUDA_ERROR_NOT_FOUND CUDA_ERROR_NOT_READY
        CUDA_ERROR_ILLEGAL_ADDRESS CUDA_ERROR_LAUNCH_FAILED CUDA_ERROR_INVALID_CLUSTER_SIZE
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        CUDA_ERROR_STREAM_CAPTURE_MERGE CUDA_ERROR_STREAM_CAPTURE_ISOLATION
        CUDA_ERROR_STREAM_CAPTURE_IMPLICIT CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD
        CUDA_ERROR_CAPTURED_EVENT CUDA_ERROR_UNSUPPORTED_PTX_VERSION CUDA_ERROR_UNKNOWN
    };
    let found = names.into_iter().find(|(known, _)| *known == code);
    let found = found.and_then(|(_, name)| CStr::from_bytes_until_nul(name.as_bytes()).ok());
    found.unwrap_or(c"an unknown code")
}

macro_rules! functions {
    ($(fn $name:ident(|$machine:ident| $($argument:ident: $type:ty),*) $body:block)*) => {$(
        /// # Safety
        /// As the driver's manual says.
        #[allow(non_snake_case, unused_unsafe)]
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: $type),*) -> Code {
            call(stringify!($name), Code::CUDA_SUCCESS, |$machine: &mut Machine| {
                // SAFETY: the caller's.
                unsafe { $body }
            })
        }
    )*};
}

functions! {
    fn cuInit(|machine| flags: u32) {
        if flags != 0 {
            return invalid(format!("flags {flags}"));
        }
        machine.is_initialised = true;
        Ok(())
    }

    fn cuDriverGetVersion(|machine| to: *mut i32) {
        put(to, machine.version())
    }

    fn cuGetErrorName(|_machine| code: u32, to: *mut *const c_char) {
        put(to, name_of(code).as_ptr())
    }

    fn cuGetErrorString(|_machine| code: u32, to: *mut *const c_char) {
        put(to, name_of(code).as_ptr())
    }

    // --- device and context ---

    fn cuDeviceGetCount(|machine| to: *mut i32) {
        check_initialised(machine)?;
        put(to, machine.gpus())
    }

    fn cuDeviceGet(|machine| to: *mut i32, ordinal: i32) {
        check_initialised(machine)?;
        machine.check_gpu(ordinal)?;
        put(to, ordinal)
    }

    fn cuDeviceGetName(|machine| to: *mut c_char, bytes: i32, device: i32) {
        machine.check_gpu(device)?;
        let name = machine.chip.name.bytes().chain([0]);
        for (index, byte) in name.take(bytes.max(0) as usize).enumerate() {
            put(to.add(index), byte as c_char)?;
        }
        Ok(())
    }

    fn cuDeviceGetAttribute(|machine| to: *mut i32, attribute: u32, device: i32) {
        machine.check_gpu(device)?;
        match machine.chip.attribute(attribute) {
            Some(value) => put(to, value),
            None => invalid(format!("attribute {attribute}, which this model does not know")),
        }
    }

    fn cuDeviceTotalMem_v2(|machine| to: *mut usize, device: i32) {
        machine.check_gpu(device)?;
        put(to, machine.memory.capacity() as usize)
    }

    fn cuDevicePrimaryCtxRetain(|machine| to: *mut Handle, device: i32) {
        check_initialised(machine)?;
        machine.check_gpu(device)?;
        put(to, machine.retain(device)?)
    }

    fn cuDevicePrimaryCtxRelease_v2(|machine| device: i32) {
        machine.check_gpu(device)?;
        machine.release()
    }

    fn cuDevicePrimaryCtxSetFlags_v2(|machine| device: i32, _flags: u32) {
        machine.check_gpu(device)
    }

    fn cuCtxGetCurrent(|machine| to: *mut Handle) {
        check_initialised(machine)?;
        put(to, machine.current())
    }

    fn cuCtxSetCurrent(|machine| context: Handle) {
        check_initialised(machine)?;
        machine.set_current(context)
    }

    fn cuCtxSynchronize(|machine| ) {
        machine.ready()?;
        machine.synchronise_all()
    }

    // --- streams, events, graphs ---

    fn cuStreamCreate(|machine| to: *mut Handle, flags: u32) {
        machine.ready()?;
        put(to, machine.create_stream(flags != CUstream_flags::CU_STREAM_NON_BLOCKING as u32))
    }

    fn cuStreamCreateWithPriority(|machine| to: *mut Handle, flags: u32, _priority: i32) {
        machine.ready()?;
        put(to, machine.create_stream(flags != CUstream_flags::CU_STREAM_NON_BLOCKING as u32))
    }

    fn cuStreamDestroy_v2(|machine| stream: Handle) {
        machine.ready()?;
        machine.destroy_stream(stream)
    }

    fn cuStreamGetCtx(|machine| stream: Handle, to: *mut Handle) {
        machine.ready()?;
        machine.check_stream(stream)?;
        put(to, CONTEXT)
    }

    fn cuStreamSynchronize(|machine| stream: Handle) {
        machine.ready()?;
        machine.synchronise(stream)
    }

    fn cuStreamWaitEvent(|machine| stream: Handle, event: Handle, flags: u32) {
        machine.ready()?;
        if flags != 0 {
            return invalid(format!("flags {flags}"));
        }
        machine.wait(stream, event)
    }

    fn cuStreamBeginCapture_v2(|machine| stream: Handle, mode: u32) {
        const GLOBAL: u32 = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL as u32;
        const THREAD: u32 = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as u32;
        const RELAXED: u32 = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as u32;
        machine.ready()?;
        let mode = match mode {
            GLOBAL => Mode::Global,
            THREAD => Mode::ThreadLocal,
            RELAXED => Mode::Relaxed,
            other => return invalid(format!("mode {other}")),
        };
        machine.begin_capture(stream, mode)
    }

    fn cuStreamEndCapture(|machine| stream: Handle, to: *mut Handle) {
        machine.ready()?;
        put(to, 0)?;
        put(to, machine.end_capture(stream)?)
    }

    fn cuGraphInstantiateWithFlags(|machine| to: *mut Handle, graph: Handle, flags: u64) {
        machine.ready()?;
        if flags != 0 {
            return invalid(format!("flags {flags}"));
        }
        put(to, machine.instantiate(graph)?)
    }

    fn cuGraphLaunch(|machine| executable: Handle, stream: Handle) {
        machine.ready()?;
        machine.launch_graph(executable, stream)
    }

    fn cuGraphDestroy(|machine| graph: Handle) {
        machine.destroy_graph(graph)
    }

    fn cuGraphExecDestroy(|machine| executable: Handle) {
        machine.destroy_executable(executable)
    }

    fn cuEventCreate(|machine| to: *mut Handle, flags: u32) {
        machine.ready()?;
        let has_time = flags & CUevent_flags::CU_EVENT_DISABLE_TIMING as u32 == 0;
        put(to, machine.create_event(has_time))
    }

    fn cuEventDestroy_v2(|machine| event: Handle) {
        machine.ready()?;
        machine.destroy_event(event)
    }

    fn cuEventRecord(|machine| event: Handle, stream: Handle) {
        machine.ready()?;
        machine.record(event, stream)
    }

    fn cuEventSynchronize(|machine| event: Handle) {
        machine.ready()?;
        machine.await_event(event)
    }

    fn cuEventElapsedTime_v2(|machine| to: *mut f32, start: Handle, end: Handle) {
        machine.ready()?;
        put(to, machine.elapsed([start, end])?)
    }

    // --- memory ---

    fn cuMemGetInfo_v2(|machine| free: *mut usize, total: *mut usize) {
        machine.ready()?;
        put(free, machine.memory.free_bytes() as usize)?;
        put(total, machine.memory.capacity() as usize)
    }

    fn cuMemAlloc_v2(|machine| to: *mut Address, bytes: usize) {
        machine.ready()?;
        put(to, machine.allocate(bytes as u64, None)?)
    }

    fn cuMemAllocAsync(|machine| to: *mut Address, bytes: usize, stream: Handle) {
        machine.ready()?;
        put(to, machine.allocate(bytes as u64, Some(stream))?)
    }

    fn cuMemFree_v2(|machine| address: Address) {
        machine.ready()?;
        machine.free(address, None)
    }

    fn cuMemFreeAsync(|machine| address: Address, stream: Handle) {
        machine.ready()?;
        machine.free(address, Some(stream))
    }

    fn cuMemHostAlloc(|machine| to: *mut usize, bytes: usize, _flags: u32) {
        machine.ready()?;
        put(to, machine.allocate_pinned(bytes)?)
    }

    fn cuMemFreeHost(|machine| address: usize) {
        machine.ready()?;
        machine.free_pinned(address)
    }

    fn cuPointerGetAttribute(|machine| to: *mut Handle, attribute: u32, address: Address) {
        machine.ready()?;
        if attribute != CUpointer_attribute::CU_POINTER_ATTRIBUTE_CONTEXT as u32 {
            return invalid(format!("attribute {attribute}"));
        }
        machine.memory.check(&(address..address + 1))?;
        put(to, CONTEXT)
    }

    fn cuMemcpyHtoDAsync_v2(|machine| to: Address, from: usize, bytes: usize, stream: Handle) {
        machine.ready()?;
        machine.copy_to_device(stream, from, to, bytes)
    }

    fn cuMemcpyDtoHAsync_v2(|machine| to: usize, from: Address, bytes: usize, stream: Handle) {
        machine.ready()?;
        machine.copy_to_host(stream, from, to, bytes)
    }

    fn cuMemcpyDtoDAsync_v2(|machine| to: Address, from: Address, bytes: usize, stream: Handle) {
        machine.ready()?;
        let bytes = bytes as u64;
        machine.submit(stream, Work::Copy { from, to, bytes })
    }

    fn cuMemcpyHtoD_v2(|machine| to: Address, from: usize, bytes: usize) {
        machine.ready()?;
        machine.forbid_in_capture("a copy that waits")?;
        machine.copy_to_device(0, from, to, bytes)?;
        machine.synchronise(0)
    }

    fn cuMemcpyDtoH_v2(|machine| to: usize, from: Address, bytes: usize) {
        machine.ready()?;
        machine.forbid_in_capture("a copy that waits")?;
        machine.copy_to_host(0, from, to, bytes)?;
        machine.synchronise(0)
    }

    fn cuMemsetD8Async(|machine| to: Address, byte: u8, bytes: usize, stream: Handle) {
        machine.ready()?;
        let bytes = bytes as u64;
        machine.submit(stream, Work::Fill { to, bytes, byte })
    }

    // --- modules and launches ---

    fn cuModuleLoadData(|machine| to: *mut Handle, image: *const u8) {
        machine.ready()?;
        machine.forbid_in_capture("to load a module")?;
        if image.is_null() {
            return invalid("a null pointer");
        }
        let start = &*image.cast::<[u8; 16]>();
        let end = || CStr::from_ptr(image.cast()).to_bytes_with_nul().len();
        if !image.addr().is_multiple_of(8) {
            return invalid("an image that is not aligned to 8 bytes");
        }
        let bytes = Image::len(start, end).map(|len| std::slice::from_raw_parts(image, len));
        let Some(image) = bytes.and_then(Image::new) else {
            let message = "the image is neither a fat binary nor PTX";
            return fault(Code::CUDA_ERROR_INVALID_IMAGE, message);
        };
        put(to, machine.load(image)?)
    }

    fn cuModuleUnload(|machine| module: Handle) {
        machine.ready()?;
        machine.forbid_in_capture("to unload a module")?;
        machine.unload(module)
    }

    fn cuModuleGetFunction(|machine| to: *mut Handle, module: Handle, name: *const c_char) {
        machine.ready()?;
        let name = CStr::from_ptr(name).to_string_lossy().into_owned();
        put(to, machine.find_function(module, &name)?)
    }

    fn cuFuncGetAttribute(|machine| to: *mut i32, attribute: u32, function: Handle) {
        const THREADS: u32 = Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK as u32;
        const STATIC: u32 = Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES as u32;
        const DYNAMIC: u32 = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as u32;
        const PTX: u32 = Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION as u32;
        const BINARY: u32 = Attribute::CU_FUNC_ATTRIBUTE_BINARY_VERSION as u32;
        machine.ready()?;
        let chip = machine.chip;
        let own = machine.function(function)?;
        let value = match attribute {
            THREADS => own.max_threads as i32,
            STATIC => own.static_bytes as i32,
            DYNAMIC => own.dynamic_bytes as i32,
            PTX => own.target,
            BINARY => chip.target(),
            other => return invalid(format!("attribute {other}")),
        };
        put(to, value)
    }

    fn cuFuncSetAttribute(|machine| function: Handle, attribute: u32, value: i32) {
        const DYNAMIC: u32 = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as u32;
        const LARGE: u32 = Attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED as u32;
        machine.ready()?;
        let limit = machine.chip.shared_bytes;
        let own = machine.function(function)?;
        match (attribute, u32::try_from(value)) {
            (DYNAMIC, Ok(bytes)) if bytes <= limit - own.static_bytes => own.dynamic_bytes = bytes,
            (LARGE, Ok(value @ 0..=1)) => own.large_clusters = value == 1,
            _ => return invalid(format!("attribute {attribute} = {value}")),
        }
        Ok(())
    }

    fn cuOccupancyMaxActiveClusters(
        |machine| to: *mut i32, function: Handle, config: *const CUlaunchConfig
    ) {
        machine.ready()?;
        let (launch, _) = of_config(config)?;
        machine.check_launch(function, &launch)?;
        put(to, machine.chip.multiprocessors / launch.cluster as i32)
    }

    fn cuTensorMapEncodeTiled(
        |_machine| to: *mut TensorMap, element: u32, rank: u32, address: Address, extents: *const u64,
        strides: *const u64, of_box: *const u32, steps: *const u32, interleave: u32, swizzle: u32,
        _promotion: u32, fill: u32
    ) {
        const BF16: u32 = Element::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 as u32;
        const F16: u32 = Element::CU_TENSOR_MAP_DATA_TYPE_FLOAT16 as u32;
        const F32: u32 = Element::CU_TENSOR_MAP_DATA_TYPE_FLOAT32 as u32;
        const SWIZZLE: u32 = CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B as u32;
        let element = match element {
            BF16 | F16 => 2,
            F32 => 4,
            other => return invalid(format!("elements of type {other}, which this model does not know")),
        };
        if (rank, interleave, swizzle, fill) != (2, 0, SWIZZLE, 0) {
            return invalid("a tensor's map other than of a matrix, with the swizzle of 128 bytes");
        }
        if !to.addr().is_multiple_of(64) {
            return invalid("a tensor's map that does not begin at a multiple of 64");
        }
        if [extents.addr(), strides.addr(), of_box.addr(), steps.addr()].contains(&0) {
            return invalid("a null pointer");
        }
        if [steps.read(), steps.add(1).read()] != [1, 1] {
            return invalid("a tensor's map that leaves out elements, which this model does not know");
        }
        let map = TensorMap::new(Boxes {
            address,
            element,
            columns: extents.read(),
            rows: extents.add(1).read(),
            stride: strides.read(),
            box_columns: of_box.read(),
            box_rows: of_box.add(1).read(),
        });
        match map {
            Ok(map) => put(to, map),
            Err(error) => invalid(error.to_string()),
        }
    }

    fn cuLaunchKernel(
        |machine| function: Handle, grid_x: u32, grid_y: u32, grid_z: u32, block_x: u32, block_y: u32,
        block_z: u32, shared_bytes: u32, stream: Handle, arguments: *mut *mut c_void,
        extra: *mut *mut c_void
    ) {
        machine.ready()?;
        let mut own = Launch::new([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        own.shared_bytes = shared_bytes;
        launch(machine, stream, function, own, arguments, extra)
    }

    fn cuLaunchKernelEx(
        |machine| config: *const CUlaunchConfig, function: Handle, arguments: *mut *mut c_void,
        extra: *mut *mut c_void
    ) {
        machine.ready()?;
        let (own, stream) = of_config(config)?;
        launch(machine, stream, function, own, arguments, extra)
    }
}

fn check_initialised(machine: &Machine) -> Result<()> {
    match machine.is_initialised {
        true => Ok(()),
        false => fault(Code::CUDA_ERROR_NOT_INITIALIZED, "cuInit was not called"),
    }
}
