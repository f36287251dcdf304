//! Buffers and batches in the memory of the host.

use dtmem_reference::Scalar;
use rayon::prelude::*;

use super::views::{front, part, part_mut};
use super::{Cpu, ELEMENTS};
use crate::backend::{Buffers, Kind, Result, Span};
use crate::batch::PackedBatch;

impl<T: Scalar> Buffers for Cpu<T> {
    type Element = T;
    type Buffer = Vec<T>;
    type Batch = PackedBatch;

    fn buffer(&self, len: usize, _kind: Kind) -> Result<Vec<T>> {
        Ok(vec![T::nan(); len])
    }

    fn upload(&self, from: &[T], to: &mut Vec<T>, offset: usize) -> Result<()> {
        let span = Span {
            offset,
            len: from.len(),
        };
        part_mut("upload", to, span)?.copy_from_slice(from);
        Ok(())
    }

    fn download(&self, from: &Vec<T>, offset: usize, to: &mut [T]) -> Result<()> {
        let span = Span {
            offset,
            len: to.len(),
        };
        to.copy_from_slice(part("download", from, span)?);
        Ok(())
    }

    fn stage(&self, batch: &PackedBatch, to: &mut PackedBatch) -> Result<()> {
        to.clone_from(batch);
        Ok(())
    }

    fn zero(&self, buffer: &mut Vec<T>, span: Span) -> Result<()> {
        part_mut("zero", buffer, span)?
            .par_chunks_mut(ELEMENTS)
            .for_each(|x| x.fill(T::zero()));
        Ok(())
    }

    fn copy(&self, from: &Vec<T>, to: &mut Vec<T>, offset: usize, len: usize) -> Result<()> {
        part_mut("copy", to, Span { offset, len })?
            .par_chunks_mut(ELEMENTS)
            .zip(front("copy", from, len)?.par_chunks(ELEMENTS))
            .for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    }
}
