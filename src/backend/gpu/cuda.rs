//! A GPU: cudarc's memory on one stream, products by cuBLASLt.

use std::ops::Range;
use std::sync::Arc;

use std::fmt;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{CudaEvent, CudaGraph, CudaSlice, CudaStream, PinnedHostSlice};

use super::blas::{Blas, Multiply};
use super::device::{Compute, Device, Element, Product, check_range};
#[cfg(feature = "nccl")]
use super::nccl::Nccl;
use crate::backend::{Bytes, Rank, Room};
use crate::ops::images::{self, Origin};
use crate::ops::{Error, Gpu, Input, Launch, Launcher, Output, Result};

/// One GPU, one stream on it for all that is computed, and one for what is on its way to it.
#[derive(Debug)]
pub struct CudaDevice {
    gpu: Gpu,
    stream: Arc<CudaStream>,
    way: Arc<CudaStream>,
    blas: Blas,
    #[cfg(feature = "nccl")]
    nccl: Option<Nccl>,
}

impl CudaDevice {
    /// GPU number `ordinal`. Errors: no driver, no such GPU, a driver that is too old for this
    /// binary's kernels, no cuBLASLt.
    pub fn new(ordinal: usize, multiply: Multiply) -> Result<Self> {
        let gpu = Gpu::new(ordinal)?;
        gpu.check_images()?;
        // SAFETY: all memory of this device is used on its one stream, so that its order is enough;
        // what two streams use has events of its own.
        unsafe { gpu.context().disable_event_tracking() };
        let stream = gpu.context().new_stream()?;
        let way = gpu.context().new_stream()?;
        let blas = Blas::new(&stream, multiply)?;
        Ok(Self {
            gpu,
            stream,
            way,
            blas,
            #[cfg(feature = "nccl")]
            nccl: None,
        })
    }

    /// The same as one of several ranks, which wait for each other here. `id` is what the first of
    /// them has from [`Self::rank_id`]. Errors: no NCCL, or what it says.
    #[cfg(feature = "nccl")]
    pub fn with_rank(self, rank: Rank, id: &[u8; 128]) -> Result<Self> {
        let nccl = Nccl::new(&self.stream, rank, id)?;
        Ok(Self {
            nccl: Some(nccl),
            ..self
        })
    }

    /// What the first of several ranks gives to all others. Errors: no NCCL.
    #[cfg(feature = "nccl")]
    pub fn rank_id() -> Result<[u8; 128]> {
        super::nccl::id()
    }

    /// The GPU's name.
    pub fn describe(&self) -> Result<String> {
        Ok(self.gpu.context().name()?)
    }

    /// Whether it runs the kernels for Hopper: compute capability 9.0, and machine code for it in this binary.
    pub fn runs_hopper_kernels(&self) -> Result<bool> {
        let compiled = images::all().iter().all(|image| match image.origin {
            Origin::Nvcc { architectures, .. } => architectures.contains(&"sm_90a"),
            Origin::CommittedPtx { .. } => false,
        });
        Ok(compiled && self.gpu.context().compute_capability()? == (9, 0))
    }

    /// The stream that everything happens on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

/// Two stations on the way to the device, of which one is filled while the other is emptied.
#[derive(Debug)]
pub struct Staging<E: Element> {
    stations: [Option<Station<E>>; 2],
    next: usize,
}

impl<E: Element> Default for Staging<E> {
    fn default() -> Self {
        Self {
            stations: [None, None],
            next: 0,
        }
    }
}

/// Pinned memory, and the memory on the device that a copy of it goes to while the device computes.
#[derive(Debug)]
struct Station<E: Element> {
    pinned: PinnedHostSlice<E>,
    arrived: CudaSlice<E>,
    /// When the pinned memory may be written again.
    sent: CudaEvent,
    /// When what arrived may be overwritten.
    taken: CudaEvent,
}

impl<E: Element> Station<E> {
    fn new(device: &CudaDevice, len: usize) -> Result<Self> {
        let context = device.gpu.context();
        let station = Self {
            // SAFETY: written before it is read.
            pinned: unsafe { context.alloc_pinned(len) }?,
            arrived: device.allocate(len)?,
            sent: context.new_event(None)?,
            taken: context.new_event(None)?,
        };
        // The other stream must not write before there is memory.
        device.stream.synchronize()?;
        Ok(station)
    }

    fn send(&mut self, device: &CudaDevice, from: &[E], to: &mut CudaSlice<E>) -> Result<()> {
        self.sent.synchronize()?;
        let pinned = &mut self.pinned.as_mut_slice()?[..from.len()];
        pinned.copy_from_slice(from);
        device.way.wait(&self.taken)?;
        let mut arrived = self.arrived.slice_mut(..from.len());
        device.way.memcpy_htod(&*pinned, &mut arrived)?;
        self.sent.record(&device.way)?;
        device.stream.wait(&self.sent)?;
        device.copy(&self.arrived, to, 0, from.len())?;
        Ok(self.taken.record(&device.stream)?)
    }
}

impl<E: Element> Drop for Station<E> {
    /// Both memories are freed after this.
    fn drop(&mut self) {
        for event in [&self.sent, &self.taken] {
            self.pinned.context().record_err(event.synchronize());
        }
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

    type Staging<E: Element> = Staging<E>;

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

    #[cfg(feature = "nccl")]
    fn rank(&self) -> Rank {
        self.nccl.as_ref().map_or(Rank::ALONE, Nccl::rank)
    }

    #[cfg(not(feature = "nccl"))]
    fn rank(&self) -> Rank {
        Rank::ALONE
    }

    #[cfg(feature = "nccl")]
    fn sum_over_ranks(&self, memory: &mut CudaSlice<f32>, len: usize) -> Result<()> {
        check_range(&(0..len), memory.len())?;
        match &self.nccl {
            Some(nccl) => nccl.sum(memory, len),
            None => Ok(()),
        }
    }

    #[cfg(not(feature = "nccl"))]
    fn sum_over_ranks(&self, _: &mut CudaSlice<f32>, _: usize) -> Result<()> {
        Ok(())
    }

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn room(&self) -> Option<Room> {
        // What was freed is there once the stream has come so far.
        self.stream.synchronize().ok()?;
        let (free, total) = self.gpu.context().mem_get_info().ok()?;
        Some(Room {
            free: Bytes(free),
            total: Bytes(total),
        })
    }

    fn allocate<T: Element>(&self, len: usize) -> Result<CudaSlice<T>> {
        // SAFETY: every pattern of bits is an element, and operations write before they read.
        let memory = unsafe { self.stream.alloc(len.max(1)) };
        memory.map_err(|error| match (error.0, self.room()) {
            (CUresult::CUDA_ERROR_OUT_OF_MEMORY, Some(room)) => Error::OutOfMemory {
                needed: len * size_of::<T>(),
                free: room.free.0,
                total: room.total.0,
            },
            _ => error.into(),
        })
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

    fn send<E: Element>(
        &self,
        from: &[E],
        staging: &mut Staging<E>,
        to: &mut CudaSlice<E>,
    ) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        check_range(&(0..from.len()), to.len())?;
        let station = &mut staging.stations[staging.next];
        staging.next = 1 - staging.next;
        if station
            .as_ref()
            .is_none_or(|station| station.pinned.len() < from.len())
        {
            *station = None; // not both at once
            *station = Some(Station::new(self, from.len().next_power_of_two())?);
        }
        match station {
            Some(station) => station.send(self, from, to),
            None => Ok(()),
        }
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
        offset: usize,
        len: usize,
    ) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        check_range(&(0..len), from.len())?;
        check_range(&(offset..offset + len), to.len())?;
        let mut to = to.slice_mut(offset..offset + len);
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
