//! Launches on CUDA streams.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use cudarc::driver::sys::{
    CUdevice_attribute, CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID,
    CUlaunchAttributeValue, CUlaunchAttributeValue_union__bindgen_ty_1, CUlaunchConfig, CUresult,
    CUstream, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle, cuDriverGetVersion, cuLaunchKernelEx,
    cuOccupancyMaxActiveClusters, cuTensorMapEncodeTiled,
};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, DevicePtr, DevicePtrMut, DriverError, result,
};
use cudarc::nvrtc::Ptx;

use super::images::{self, Image, Origin};
use super::launch::{Arg, Launch, Launcher, MAX_ARGS, MAX_MAPS, TensorMap};
use super::memory::{Home, Input, Output, Type};
use super::{Error, Result};

/// Fails where there is no NVIDIA driver. Everything in cudarc panics there, so this comes first.
pub fn require_driver() -> Result<()> {
    driver().map(drop)
}

/// The driver's library, which is loaded once and stays.
pub(crate) fn driver() -> Result<&'static libloading::Library> {
    const NAME: &str = if cfg!(windows) {
        "nvcuda.dll"
    } else {
        "libcuda.so.1"
    };
    static LIBRARY: OnceLock<std::result::Result<libloading::Library, String>> = OnceLock::new();
    // SAFETY: the driver's library may be loaded at any time.
    let library = LIBRARY.get_or_init(|| {
        unsafe { libloading::Library::new(NAME) }.map_err(|error| {
            let cause = std::error::Error::source(&error);
            cause.map_or_else(|| error.to_string(), ToString::to_string)
        })
    });
    library.as_ref().map_err(|reason| Error::NoDriver {
        name: NAME,
        reason: reason.clone(),
    })
}

/// How many GPUs there are. Errors: no driver.
pub fn count() -> Result<usize> {
    require_driver()?;
    match CudaContext::device_count() {
        Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// A CUDA context and those kernels that have been launched in it.
///
/// The first launch of a kernel loads it, together with its family if that was not done, which waits and allocates.
/// Later launches do neither. So run a sequence once before a CUDA graph captures it.
#[derive(Debug)]
pub struct Gpu {
    context: Arc<CudaContext>,
    kernels: RwLock<HashMap<&'static str, CudaFunction>>,
    families: Mutex<HashMap<&'static str, Arc<CudaModule>>>,
    possible: Mutex<HashMap<Needs, bool>>,
}

/// What decides whether a GPU can run a kernel that not all can: its name, blocks of a cluster, bytes of dynamic shared
/// memory.
type Needs = (&'static str, u32, u32);

impl Drop for Gpu {
    /// What was launched is done before the kernels' code goes.
    fn drop(&mut self) {
        self.context.record_err(self.context.synchronize());
    }
}

impl Gpu {
    /// The primary context of a GPU, which other libraries use as well. Errors: no driver, no such GPU, one that another
    /// process has for itself.
    pub fn new(ordinal: usize) -> Result<Self> {
        let count = count()?;
        if ordinal >= count {
            return Err(Error::NoGpu { ordinal, count });
        }
        match CudaContext::new(ordinal) {
            Ok(context) => Ok(Self::from_context(context)),
            Err(DriverError(CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE)) => {
                Err(Error::Taken { ordinal })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The caller's own context.
    pub fn from_context(context: Arc<CudaContext>) -> Self {
        Self {
            context,
            kernels: RwLock::default(),
            families: Mutex::default(),
            possible: Mutex::default(),
        }
    }

    /// The context, to make streams and allocate with.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Launches on a stream of this context. Errors: a stream of another one.
    pub fn on<'a>(&'a self, stream: &'a CudaStream) -> Result<OnStream<'a>> {
        if stream.context().cu_ctx() != self.context.cu_ctx() {
            return Err(Error::ForeignMemory { argument: "stream" });
        }
        Ok(OnStream { gpu: self, stream })
    }

    fn kernel(&self, family: &'static str, name: &'static str) -> Result<CudaFunction> {
        let known = self.kernels.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = known.get(name) {
            return Ok(kernel.clone());
        }
        drop(known);
        let kernel =
            self.family(family)?
                .load_function(name)
                .map_err(|source| Error::MissingKernel {
                    family,
                    kernel: name,
                    source,
                })?;
        self.allow_shared_memory(&kernel)?;
        let mut known = self.kernels.write().unwrap_or_else(PoisonError::into_inner);
        Ok(known.entry(name).or_insert(kernel).clone())
    }

    /// Lets a kernel have all dynamic shared memory that its static one leaves: without this, 48 KiB.
    fn allow_shared_memory(&self, kernel: &CudaFunction) -> Result<()> {
        let limit = self
            .context
            .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let own =
            kernel.get_attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let dynamic = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        Ok(kernel.set_attribute(dynamic, limit - own)?)
    }

    /// Whether this GPU can do a launch that not all can; asked once for each kernel and shape.
    fn can_launch(&self, launch: &Launch<'_>) -> Result<bool> {
        let needs = (launch.kernel(), launch.cluster(), launch.shared_bytes());
        let lock = || self.possible.lock().unwrap_or_else(PoisonError::into_inner);
        let known = lock().get(&needs).copied();
        if let Some(possible) = known {
            return Ok(possible);
        }
        let kernel = self.kernel(launch.family(), launch.kernel())?;
        let attribute = |attribute| kernel.get_attribute(attribute);
        // For another target, and so in PTX for such a one, the kernel does nothing.
        let target = attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)?;
        let compiled = target == 90 || target > 90 && !launch.is_for_hopper();
        let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let room = i64::from(attribute(most)?) >= i64::from(launch.shared_bytes());
        let has_maps = launch.args().iter().any(|arg| matches!(arg, Arg::Map(_)));
        let possible = compiled
            && room
            && (!has_maps || encodes_tensor_maps()?)
            && (launch.cluster() == 1 || self.has_clusters(launch, &kernel)?);
        lock().insert(needs, possible);
        Ok(possible)
    }

    /// Whether clusters of this launch fit into the GPU.
    fn has_clusters(&self, launch: &Launch<'_>, kernel: &CudaFunction) -> Result<bool> {
        let large = CUfunction_attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
        kernel.set_attribute(large, 1)?;
        self.context.bind_to_thread()?;
        let mut attributes = [cluster_attribute(launch)];
        let config = config(launch, ptr::null_mut(), &mut attributes);
        let mut clusters = 0;
        // SAFETY: a number to write to, a kernel of this context, and a configuration that is alive.
        let asked = unsafe {
            cuOccupancyMaxActiveClusters(&raw mut clusters, kernel.cu_function(), &raw const config)
        };
        Ok(asked.result().is_ok() && clusters > 0)
    }

    /// Fails early where the driver does not take this binary's images: all are made alike.
    pub fn check_images(&self) -> Result<()> {
        self.family("activation").map(drop)
    }

    fn family(&self, family: &'static str) -> Result<Arc<CudaModule>> {
        let mut loaded = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = loaded.get(family) {
            return Ok(Arc::clone(module));
        }
        let image = images::find(family)?;
        let module = self
            .context
            .load_module(Ptx::from_binary(image.bytes.to_vec()))
            .map_err(|source| not_loaded(image, source))?;
        loaded.insert(family, Arc::clone(&module));
        Ok(module)
    }
}

fn cluster_attribute(launch: &Launch<'_>) -> CUlaunchAttribute {
    CUlaunchAttribute {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: CUlaunchAttributeValue {
            clusterDim: CUlaunchAttributeValue_union__bindgen_ty_1 {
                x: launch.cluster(),
                y: 1,
                z: 1,
            },
        },
    }
}

/// It is valid as long as the attributes are.
fn config(
    launch: &Launch<'_>,
    stream: CUstream,
    attributes: &mut [CUlaunchAttribute; 1],
) -> CUlaunchConfig {
    let ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]) = (launch.grid(), launch.block());
    CUlaunchConfig {
        gridDimX: grid_x,
        gridDimY: grid_y,
        gridDimZ: grid_z,
        blockDimX: block_x,
        blockDimY: block_y,
        blockDimZ: block_z,
        sharedMemBytes: launch.shared_bytes(),
        hStream: stream,
        attrs: attributes.as_mut_ptr(),
        numAttrs: 1,
    }
}

fn not_loaded(image: &Image, source: DriverError) -> Error {
    let (Origin::Nvcc { version, .. } | Origin::CommittedPtx { version, .. }) = image.origin;
    // Of the compiler; a driver is for all releases of these two numbers.
    let release = version.match_indices('.').nth(1);
    let cuda = release.map_or(version, |(end, _)| &version[..end]);
    let mut driver = 0;
    // SAFETY: the address of a number to write to.
    let known = unsafe { cuDriverGetVersion(&raw mut driver) }
        .result()
        .is_ok();
    Error::Image {
        family: image.family,
        cuda,
        driver: match known {
            true => format!("{}.{}", driver / 1000, driver % 1000 / 10),
            false => "an unknown version".to_owned(),
        },
        source,
    }
}

/// Launches kernels on one stream.
///
/// Memory comes from the caller's cudarc slices and views by [`input`](Self::input) and [`output`](Self::output),
/// which wait (on the GPU) for what other streams do to them, as cudarc's own launches do.
#[derive(Debug, Clone, Copy)]
pub struct OnStream<'a> {
    gpu: &'a Gpu,
    stream: &'a CudaStream,
}

impl<'a> OnStream<'a> {
    /// A slice or view to read.
    pub fn input<'b, T>(&self, memory: &'b impl DevicePtr<T>) -> Input<'b, T>
    where
        'a: 'b,
    {
        let (home, len) = (Home::context(memory.stream().context()), memory.len());
        let (address, guard) = memory.device_ptr(self.stream);
        Input::new(home, address, len, Some(guard))
    }

    /// A slice or view to write.
    pub fn output<'b, T>(&self, memory: &'b mut impl DevicePtrMut<T>) -> Output<'b, T>
    where
        'a: 'b,
    {
        let (home, len) = (Home::context(memory.stream().context()), memory.len());
        let (address, guard) = memory.device_ptr_mut(self.stream);
        Output::new(home, address, len, Some(guard))
    }
}

impl Launcher for OnStream<'_> {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        launch.check_home(Home::context(&self.gpu.context))?;
        if launch.is_empty() {
            return Ok(());
        }
        if !self.can_launch(launch)? {
            // Compiled for another target, the kernel would do nothing and call that success.
            return Err(Error::CannotLaunch {
                kernel: launch.kernel(),
            });
        }
        let kernel = self.gpu.kernel(launch.family(), launch.kernel())?;
        let mut values = [ptr::null_mut::<c_void>(); MAX_ARGS];
        let mut maps = [CUtensorMap { opaque: [0; 16] }; MAX_MAPS];
        let mut places = maps.iter_mut();
        self.gpu.context.bind_to_thread()?;
        for (value, arg) in values.iter_mut().zip(launch.args()) {
            *value = match arg {
                Arg::Input(span) | Arg::Output(span) => ptr::from_ref(&span.address).cast(),
                Arg::Map(map) => match places.next() {
                    Some(place) => encode(map, place)?,
                    None => {
                        return Err(Error::CannotLaunch {
                            kernel: launch.kernel(),
                        });
                    }
                },
                Arg::I32(number) => ptr::from_ref(number).cast(),
                Arg::U32(number) => ptr::from_ref(number).cast(),
                Arg::I64(number) => ptr::from_ref(number).cast(),
                Arg::U64(number) => ptr::from_ref(number).cast(),
                Arg::F32(number) => ptr::from_ref(number).cast(),
            }
            .cast_mut();
        }
        // SAFETY: kernel, stream and memory are of this context and alive; an operation of this crate has checked the
        // arguments against what the kernel takes, in number, type and size. The driver copies them, and the
        // configuration, before it returns.
        let launched = unsafe {
            if launch.cluster() > 1 {
                let mut attributes = [cluster_attribute(launch)];
                let config = config(launch, self.stream.cu_stream(), &mut attributes);
                cuLaunchKernelEx(
                    &raw const config,
                    kernel.cu_function(),
                    values.as_mut_ptr(),
                    ptr::null_mut(),
                )
                .result()
            } else {
                result::launch_kernel(
                    kernel.cu_function(),
                    launch.grid().into(),
                    launch.block().into(),
                    launch.shared_bytes(),
                    self.stream.cu_stream(),
                    &mut values,
                )
            }
        };
        launched.map_err(|source| Error::Launch {
            kernel: launch.kernel(),
            source: source.into(),
        })
    }

    fn can_launch(&self, launch: &Launch<'_>) -> Result<bool> {
        let every_gpu_can = launch.cluster() == 1 && !launch.is_for_hopper();
        Ok(every_gpu_can || self.gpu.can_launch(launch)?)
    }
}

/// Whether the driver makes tensor maps: from CUDA 12.0 on.
fn encodes_tensor_maps() -> Result<bool> {
    // SAFETY: nobody calls it by this type.
    Ok(unsafe { driver()?.get::<*const c_void>(b"cuTensorMapEncodeTiled\0") }.is_ok())
}

/// Makes a tensor's map, and gives its address. Of a matrix without elements there is none, and none is used.
fn encode(map: &TensorMap, place: &mut CUtensorMap) -> Result<*const c_void> {
    if map.span.bytes > 0 {
        let element = match map.element {
            Type::F32 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            Type::Bf16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Type::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let extents = [map.columns, map.rows];
        let of_box = [map.box_columns(), map.box_rows];
        // SAFETY: two dimensions: two extents, one stride, two extents of the box and two steps in it. The driver keeps
        // the address, and does not read from it.
        unsafe {
            cuTensorMapEncodeTiled(
                place,
                element,
                2,
                map.span.address as *mut c_void,
                extents.as_ptr(),
                &raw const map.stride,
                of_box.as_ptr(),
                [1, 1].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()?;
    }
    Ok(ptr::from_ref(place).cast())
}
