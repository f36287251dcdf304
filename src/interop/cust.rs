//! Borrowed views in both directions for callers who hold memory and streams of the crate `cust`: [`OnCust`] runs the
//! operations of [`crate::ops`] on them, and [`view`] shows cudarc's memory to `cust`. Nothing is copied.
//!
//! Both crates use the primary context of a GPU, so that their addresses mean the same; see `examples/cust.rs`.
//!
//! `cust` has no `bf16` and `f16` of the crate `half` 2: it holds their bits as `u16`, see [`Holds`].

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{CUcontext, CUpointer_attribute, cuPointerGetAttribute, cuStreamGetCtx};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
use cust::memory::{DeviceCopy, DevicePointer, DeviceSlice};
use cust::stream::Stream;
use half::{bf16, f16};

use crate::ops::memory::Home;
use crate::ops::{Error, Gpu, Input, Launch, Launcher, Output, Result};

/// An element of `cust`'s memory whose bits are a `T`.
///
/// # Safety
/// Both types have the same size and alignment, and every pattern of bits is a value of both.
pub unsafe trait Holds<T>: DeviceCopy {}

macro_rules! holds {
    ($($element:ty: $number:ty),*) => {$(
        // SAFETY: numbers of the same size and alignment.
        unsafe impl Holds<$number> for $element {}
    )*};
}
holds!(f32: f32, u16: bf16, u16: f16, i32: i32, u8: u8);

/// Launches on a stream of `cust`, with its memory.
#[derive(Debug)]
pub struct OnCust<'a> {
    gpu: &'a Gpu,
    stream: Arc<CudaStream>,
    owner: PhantomData<&'a Stream>,
}

impl<'a> OnCust<'a> {
    /// Errors: a stream of another context than the GPU's, which is the primary one where both crates were asked for
    /// the same device.
    pub fn new(gpu: &'a Gpu, stream: &'a Stream) -> Result<Self> {
        let context = gpu.context();
        context.bind_to_thread()?;
        let raw = stream.as_inner().cast();
        let mut of_stream: CUcontext = ptr::null_mut();
        // SAFETY: the stream is alive, and the context may be written to.
        unsafe { cuStreamGetCtx(raw, &raw mut of_stream) }.result()?;
        if of_stream != context.cu_ctx() {
            return Err(Error::ForeignMemory { argument: "stream" });
        }
        Ok(Self {
            gpu,
            // SAFETY: a stream of this context; its owner is borrowed for as long as this lives, and all that goes to
            // it goes there in the order of the calls, by whichever crate.
            stream: unsafe { context.wrap_borrowed_stream(raw) },
            owner: PhantomData,
        })
    }

    /// Memory to read. Errors: an address that the driver does not know.
    pub fn input<'b, T, U: Holds<T>>(&self, memory: &'b DeviceSlice<U>) -> Result<Input<'b, T>> {
        let (home, address) = self.locate(memory)?;
        Ok(Input::new(home, address, memory.len(), None))
    }

    /// Memory to write. Errors: an address that the driver does not know.
    pub fn output<'b, T, U: Holds<T>>(
        &self,
        memory: &'b mut DeviceSlice<U>,
    ) -> Result<Output<'b, T>> {
        let (home, address) = self.locate(memory)?;
        Ok(Output::new(home, address, memory.len(), None))
    }

    /// Where the memory lies; the driver knows no context of what comes from a pool, or of nothing.
    fn locate<U: DeviceCopy>(&self, memory: &DeviceSlice<U>) -> Result<(Home, u64)> {
        let own = self.gpu.context();
        let address = memory.as_device_ptr().as_raw();
        let mut context: CUcontext = ptr::null_mut();
        if !memory.is_empty() {
            own.bind_to_thread()?;
            let attribute = CUpointer_attribute::CU_POINTER_ATTRIBUTE_CONTEXT;
            // SAFETY: the attribute is a context, which may be written to.
            unsafe { cuPointerGetAttribute((&raw mut context).cast(), attribute, address) }
                .result()?;
        }
        let home = match context.is_null() {
            true => Home::context(own),
            false => Home::raw(context),
        };
        Ok((home, address))
    }
}

impl Launcher for OnCust<'_> {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.gpu.on(&self.stream)?.launch(launch)
    }

    fn can_launch(&self, launch: &Launch<'_>) -> Result<bool> {
        self.gpu.on(&self.stream)?.can_launch(launch)
    }
}

/// Memory of cudarc, as a slice of `cust`. It is freed by its owner, not by this.
#[derive(Debug)]
pub struct View<'a, U: DeviceCopy> {
    slice: DeviceSlice<U>,
    /// Keeps cudarc's other streams from the memory for as long as the view lives.
    _guard: SyncOnDrop<'a>,
}

/// As [`View`], to write to.
#[derive(Debug)]
pub struct ViewMut<'a, U: DeviceCopy>(View<'a, U>);

/// Shows memory of cudarc to `cust`, which uses it on `stream` or after that has been waited for.
pub fn view<'a, T, U: Holds<T>>(
    memory: &'a impl DevicePtr<T>,
    stream: &'a CudaStream,
) -> View<'a, U> {
    let len = memory.len();
    let (address, guard) = memory.device_ptr(stream);
    // SAFETY: the memory is there for 'a, and holds as many elements of the same size.
    let slice = unsafe { DeviceSlice::from_raw_parts(DevicePointer::from_raw(address), len) };
    View {
        slice,
        _guard: guard,
    }
}

/// As [`view`], to write to.
pub fn view_mut<'a, T, U: Holds<T>>(
    memory: &'a mut impl DevicePtrMut<T>,
    stream: &'a CudaStream,
) -> ViewMut<'a, U> {
    let len = memory.len();
    let (address, guard) = memory.device_ptr_mut(stream);
    // SAFETY: the memory is there for 'a and for nobody else, and holds as many elements of the same size.
    let slice = unsafe { DeviceSlice::from_raw_parts_mut(DevicePointer::from_raw(address), len) };
    ViewMut(View {
        slice,
        _guard: guard,
    })
}

impl<U: DeviceCopy> Deref for View<'_, U> {
    type Target = DeviceSlice<U>;

    fn deref(&self) -> &DeviceSlice<U> {
        &self.slice
    }
}

impl<U: DeviceCopy> Deref for ViewMut<'_, U> {
    type Target = DeviceSlice<U>;

    fn deref(&self) -> &DeviceSlice<U> {
        &self.0.slice
    }
}

impl<U: DeviceCopy> DerefMut for ViewMut<'_, U> {
    fn deref_mut(&mut self) -> &mut DeviceSlice<U> {
        &mut self.0.slice
    }
}
