//! A GPU: cudarc's memory on one stream, products by cuBLASLt.

use std::ops::Range;
use std::sync::Arc;

use std::fmt;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaSlice, CudaStream};

use super::blas::{Blas, Multiply};
use super::device::{Compute, Device, Element, Product, check_range};
use crate::ops::{Error, Gpu, Input, Launch, Launcher, Output, Result};

/// One GPU and one stream on it.
#[derive(Debug)]
pub struct CudaDevice {
    gpu: Gpu,
    stream: Arc<CudaStream>,
    blas: Blas,
}

impl CudaDevice {
    /// GPU number `ordinal`. Errors: no driver, no such GPU, no cuBLASLt.
    pub fn new(ordinal: usize, multiply: Multiply) -> Result<Self> {
        let gpu = Gpu::new(ordinal)?;
        // SAFETY: all memory of this device is used on its one stream, so that its order is enough.
        unsafe { gpu.context().disable_event_tracking() };
        let stream = gpu.context().new_stream()?;
        let blas = Blas::new(&stream, multiply)?;
        Ok(Self { gpu, stream, blas })
    }

    /// The GPU's name.
    pub fn describe(&self) -> Result<String> {
        Ok(self.gpu.context().name()?)
    }

    /// The stream that everything happens on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

/// A CUDA graph.
pub struct Recording(CudaGraph);

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a CUDA graph")
    }
}

impl Launcher for CudaDevice {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.gpu.on(&self.stream)?.launch(launch)
    }

    fn can_launch(&self, launch: &Launch<'_>) -> Result<bool> {
        self.gpu.on(&self.stream)?.can_launch(launch)
    }
}

impl Device for CudaDevice {
    type Memory<T: Element> = CudaSlice<T>;

    type Recording = Recording;

    fn record<E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Recording, E> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(Error::from)?;
        let done = work();
        // Also after a failure: the stream must not stay in capture.
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        done?;
        match graph.map_err(Error::from)? {
            Some(graph) => Ok(Recording(graph)),
            None => Err(Error::NoGraph.into()),
        }
    }

    fn replay(&self, recording: &Recording) -> Result<()> {
        Ok(recording.0.launch()?)
    }

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn allocate<T: Element>(&self, len: usize) -> Result<CudaSlice<T>> {
        // SAFETY: every pattern of bits is an element, and operations write before they read.
        Ok(unsafe { self.stream.alloc(len.max(1)) }?)
    }

    fn len<T: Element>(&self, memory: &CudaSlice<T>) -> usize {
        memory.len()
    }

    fn upload<T: Element>(&self, from: &[T], to: &mut CudaSlice<T>, offset: usize) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        let range = offset..offset + from.len();
        check_range(&range, to.len())?;
        Ok(self.stream.memcpy_htod(from, &mut to.slice_mut(range))?)
    }

    fn download<T: Element>(&self, from: &CudaSlice<T>, offset: usize, to: &mut [T]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        let range = offset..offset + to.len();
        check_range(&range, from.len())?;
        self.stream.memcpy_dtoh(&from.slice(range), to)?;
        Ok(self.stream.synchronize()?)
    }

    fn zero<T: Element>(&self, memory: &mut CudaSlice<T>, range: Range<usize>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        check_range(&range, memory.len())?;
        Ok(self.stream.memset_zeros(&mut memory.slice_mut(range))?)
    }

    fn copy<T: Element>(
        &self,
        from: &CudaSlice<T>,
        to: &mut CudaSlice<T>,
        len: usize,
    ) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        check_range(&(0..len), from.len().min(to.len()))?;
        let mut to = to.slice_mut(..len);
        Ok(self.stream.memcpy_dtod(&from.slice(..len), &mut to)?)
    }

    fn input<'a, T: Element>(
        &'a self,
        memory: &'a CudaSlice<T>,
        range: Range<usize>,
    ) -> Result<Input<'a, T>> {
        self.gpu.on(&self.stream)?.input(memory).slice(range)
    }

    fn output<'a, T: Element>(
        &'a self,
        memory: &'a mut CudaSlice<T>,
        range: Range<usize>,
    ) -> Result<Output<'a, T>> {
        self.gpu.on(&self.stream)?.output(memory).slice(range)
    }

    fn multiply<T: Compute, U: Compute>(&self, product: Product<'_, T, U>) -> Result<()> {
        self.gpu.context().bind_to_thread()?;
        self.blas.multiply(&self.stream, &product)
    }
}
