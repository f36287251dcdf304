//! The GPU backend: the kernels of [`crate::ops`] and a library's matrix products.
//!
//! Everything happens in the order of the calls; nothing waits but [`Buffers::download`](super::Buffers::download), and
//! [`Buffers::stage`](super::Buffers::stage) for the batch before last. What changes from step to step lies in the staged
//! batch, in the device's memory.

mod acting;
mod attention;
mod batch;
#[allow(unsafe_code)] // the boundary to cuBLASLt
mod blas;
mod buffers;
mod chain;
#[allow(unsafe_code)] // the boundary to the CUDA driver
mod cuda;
mod device;
mod elementwise;
mod embeddings;
#[cfg(feature = "host")]
mod host;
mod layer_norm;
mod linear;
mod losses;
mod memory;
#[cfg(feature = "nccl")]
#[allow(unsafe_code)] // the boundary to NCCL
mod nccl;
mod optimiser;
mod recall;
mod recordings;
mod scratch;
mod tokens;

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use attention::AttentionState;
pub use batch::Batch;
pub use blas::Multiply;
pub use buffers::Buffer;
pub use cuda::CudaDevice;
pub use device::{Compute, Device, Element, Factor, Product};
#[cfg(feature = "host")]
pub use host::{Graphs, HostDevice};
pub use memory::MemoryState;
pub use recordings::Repeated;

use embeddings::Known;
use scratch::Scratch;

use super::{Backend, BackendError, Bytes, Limits, Rank, Result, is_heard};
use crate::ops::{self, Version};

/// Most episodes that act at once.
const MOST_EPISODES: usize = 4096;
/// Free memory where a device does not say.
const UNKNOWN_BYTES: usize = 1 << 30;

/// Computes with the kernels on a device, in `T`: sums, parameters and their gradients in f32.
#[derive(Debug)]
pub struct Gpu<D: Device, T: Compute> {
    device: D,
    version: Version,
    /// For partial sums.
    floats: Scratch<D, f32>,
    /// For packed keys and values.
    activations: Scratch<D, T>,
    /// For dropout masks as bits.
    bits: Scratch<D, u32>,
    /// First inputs of the fields of every one-hot map so far.
    offsets: Mutex<Known<D>>,
    /// How often a buffer that models keep has grown.
    grown: AtomicU32,
    /// Bytes asked for so far, while they are only counted.
    counted: Mutex<Option<usize>>,
}

impl<D: Device, T: Compute> Gpu<D, T> {
    /// A backend on this device.
    pub fn new(device: D) -> Self {
        Self {
            device,
            version: Version::default(),
            floats: Scratch::default(),
            activations: Scratch::default(),
            bits: Scratch::default(),
            offsets: Mutex::default(),
            grown: AtomicU32::default(),
            counted: Mutex::default(),
        }
    }

    /// The same with operations by this version, where there is one for the shape. Attention to a cache, in acting, stays
    /// with the portable one: a query or two of each episode fill no tile.
    pub fn with_version(self, version: Version) -> Self {
        Self { version, ..self }
    }

    fn counted(&self) -> MutexGuard<'_, Option<usize>> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory of a buffer, or of nothing while bytes are only counted.
    fn allocate<E: Element>(&self, len: usize) -> ops::Result<D::Memory<E>> {
        match &mut *self.counted() {
            Some(bytes) => {
                *bytes += len * size_of::<E>();
                self.device.allocate(0)
            }
            None => self.device.allocate(len),
        }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }
}

impl<D: Device, T: Compute> Backend for Gpu<D, T> {
    type Recording = Repeated<D>;

    fn name(&self) -> &'static str {
        self.device.name()
    }

    fn limits(&self) -> Limits {
        Limits {
            head_widths: Some(&ops::attention::WIDTHS),
            width: ops::layer_norm::MAX_WIDTH,
            memory_width: ops::content_memory::MAX_KEY_WIDTH,
            slots: ops::content_memory::MAX_SLOTS,
            rank: ops::lora_linear::MAX_RANK,
        }
    }

    fn rank(&self) -> Rank {
        self.device.rank()
    }

    fn sum_over_ranks(&self, buffer: &mut Self::Buffer, len: usize) -> Result<()> {
        let memory = buffer.exact.as_mut().ok_or(BackendError::Kind)?;
        Ok(self.device.sum_over_ranks(memory, len)?)
    }

    /// In at most half of the free memory: activations come on top.
    fn episodes_at_once(&self, numbers: usize) -> usize {
        let bytes = numbers.saturating_mul(size_of::<T>());
        let room = self.device.room();
        let free = room.map_or(UNKNOWN_BYTES, |room| room.free.0);
        (free / 2 / bytes.max(1)).clamp(1, MOST_EPISODES)
    }

    fn needed_for(&self, work: impl FnOnce()) -> Bytes {
        *self.counted() = Some(0);
        work();
        Bytes(self.counted().take().unwrap_or(0))
    }

    fn shards(&self, _for_threads: usize) -> usize {
        1
    }

    fn for_each<S: Send, E: Send>(
        &self,
        items: &mut [S],
        work: impl Fn(&mut S) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<(), E> {
        items.iter_mut().try_for_each(work)
    }

    fn wants_one_size(&self) -> bool {
        true
    }

    fn shape(&self, batch: &Self::Batch) -> u64 {
        let mut hash = DefaultHasher::new();
        batch.shape().hash(&mut hash);
        batch.recalled.columns.hash(&mut hash);
        let of_scratch = [
            self.grown.load(Ordering::Relaxed),
            self.floats.grown(),
            self.activations.grown(),
            self.bits.grown(),
        ];
        of_scratch.hash(&mut hash);
        hash.finish()
    }

    fn repeat<E: From<BackendError>>(
        &self,
        repeated: &mut Repeated<D>,
        shape: u64,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        // A graph has none of the ranges.
        if is_heard() {
            return work();
        }
        repeated.repeat(&self.device, shape, work)
    }
}
