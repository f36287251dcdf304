//! Sums over rows, in an order that the shape alone decides.

use std::sync::{MutexGuard, PoisonError};

use dtmem_reference::Scalar;
use rayon::prelude::*;

use super::Cpu;
use super::views::part_mut;
use crate::backend::{Result, Span};

/// Partial parameter gradients of an operation that adds over rows.
pub(super) const PARTIALS: usize = 8;

impl<T: Scalar> Cpu<T> {
    /// Zeroed partial sums of `width` parameter gradients, one for each piece of the rows.
    pub(super) fn partials(&self, width: usize) -> Partials<'_, T> {
        let mut sums = self.spare_partials().pop().unwrap_or_default();
        sums.clear();
        sums.resize(PARTIALS * width, T::zero());
        Partials {
            backend: self,
            sums,
            width,
        }
    }

    fn spare_partials(&self) -> MutexGuard<'_, Vec<Vec<T>>> {
        self.partials.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Partial sums of parameter gradients: each piece of the rows has its own, so that threads do not
/// meet and the order of the additions is fixed.
pub(super) struct Partials<'a, T: Scalar> {
    backend: &'a Cpu<T>,
    sums: Vec<T>,
    width: usize,
}

impl<T: Scalar> Drop for Partials<'_, T> {
    fn drop(&mut self) {
        let sums = std::mem::take(&mut self.sums);
        self.backend.spare_partials().push(sums);
    }
}

impl<T: Scalar> Partials<'_, T> {
    /// Rows of one piece.
    pub(super) fn piece(&self, rows: usize) -> usize {
        rows.div_ceil(PARTIALS).max(1)
    }

    pub(super) fn pieces(&mut self) -> rayon::slice::ChunksMut<'_, T> {
        let width = self.width.max(1);
        self.sums.par_chunks_mut(width)
    }

    /// Adds all pieces to the spans, which stand next to each other in a piece.
    pub(super) fn add_to(
        &self,
        operation: &'static str,
        gradients: &mut [T],
        spans: &[Span],
    ) -> Result<()> {
        for piece in self.sums.chunks(self.width.max(1)) {
            let mut rest = piece;
            for &span in spans {
                let (of_span, after) = rest.split_at(span.len.min(rest.len()));
                rest = after;
                for (sum, &x) in part_mut(operation, gradients, span)?
                    .iter_mut()
                    .zip(of_span)
                {
                    *sum += x;
                }
            }
        }
        Ok(())
    }
}
