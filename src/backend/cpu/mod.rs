//! The CPU backend: the reference, threaded.
//!
//! Bits do not depend on the number of threads: what is split by it has independent results (rows
//! and columns of a product, each summed in one order), and sums over rows are split by shape alone
//! and added in a fixed order.

mod adapters;
mod attention;
mod buffers;
mod convolutions;
mod elementwise;
mod embeddings;
mod layer_norm;
mod linear;
mod losses;
mod memory;
mod optimiser;
mod partials;
mod tokens;
mod views;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use dtmem_reference::Scalar;
use rayon::prelude::*;

use super::{Backend, BackendError, Bytes, Limits, Rank, Result};
use crate::batch::PackedBatch;

/// Numbers that one task of an element-wise operation touches.
const ELEMENTS: usize = 1 << 14;
/// Most episodes that act at once, and memory for what they keep.
const MOST_EPISODES: usize = 256;
const ACTING_BYTES: usize = 1 << 30;

/// Computes with the reference on all threads of the current rayon pool, in `T`.
#[derive(Debug)]
pub struct Cpu<T> {
    /// One scratch buffer per thread; it grows to what the largest shape needs and stays.
    scratch: Vec<Mutex<Vec<T>>>,
    /// Memory for partial sums that is not in use.
    partials: Mutex<Vec<Vec<T>>>,
    /// Items of the running [`Backend::for_each`]: threads that are busy anyway.
    items: AtomicUsize,
}

impl<T: Scalar> Default for Cpu<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Scalar> Cpu<T> {
    /// A backend for the current rayon pool (it works in any other, too).
    pub fn new() -> Self {
        let threads = rayon::current_num_threads().max(1);
        Self {
            scratch: (0..threads).map(|_| Mutex::default()).collect(),
            partials: Mutex::default(),
            items: AtomicUsize::new(1),
        }
    }

    /// The current thread's scratch. Not to be held while waiting for other tasks.
    fn scratch(&self) -> MutexGuard<'_, Vec<T>> {
        let thread = rayon::current_thread_index().unwrap_or(0) % self.scratch.len();
        self.scratch[thread]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Rows (or columns) of one task of an operation whose results do not depend on how it is
    /// split. An item of [`Backend::for_each`] that has one thread to itself is not split at all.
    fn piece(&self, len: usize) -> usize {
        let threads = rayon::current_num_threads() / self.items.load(Ordering::Relaxed).max(1);
        match threads {
            0 | 1 => len.max(1),
            threads => len.div_ceil(2 * threads).next_multiple_of(16).max(64),
        }
    }
}

impl<T: Scalar> Backend for Cpu<T> {
    type Recording = ();

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn limits(&self) -> Limits {
        Limits::NONE
    }

    fn rank(&self) -> Rank {
        Rank::ALONE
    }

    fn sum_over_ranks(&self, _: &mut Vec<T>, _: usize) -> Result<()> {
        Ok(())
    }

    fn episodes_at_once(&self, numbers: usize) -> usize {
        let bytes = numbers.saturating_mul(size_of::<T>());
        (ACTING_BYTES / bytes.max(1)).clamp(1, MOST_EPISODES)
    }

    fn needed_for(&self, _: impl FnOnce()) -> Bytes {
        Bytes(0)
    }

    fn shards(&self, for_threads: usize) -> usize {
        for_threads
    }

    fn for_each<S: Send, E: Send>(
        &self,
        items: &mut [S],
        work: impl Fn(&mut S) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<(), E> {
        self.items.store(items.len(), Ordering::Relaxed);
        let result = items.par_iter_mut().with_max_len(1).try_for_each(&work);
        self.items.store(1, Ordering::Relaxed);
        result
    }

    fn wants_one_size(&self) -> bool {
        false
    }

    fn shape(&self, _batch: &PackedBatch) -> u64 {
        0
    }

    fn repeat<E: From<BackendError>>(
        &self,
        _recording: &mut (),
        _shape: u64,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        work()
    }
}
