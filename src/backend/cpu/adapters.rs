//! Low-rank adapters of a linear map, and dropout in front of them.

use dtmem_reference::{Scalar, dropout, lora_linear};
use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};

use super::Cpu;
use super::views::{front_mut, matrix, matrix_mut, named, part, two_parts};
use crate::backend::{Adapter, Dropped, Linear, Result};
use crate::batch::PackedBatch;

impl<T: Scalar> Cpu<T> {
    pub(super) fn adapters_backward(
        &self,
        map: &Linear,
        parameters: &[T],
        x: ArrayView2<T>,
        adapted: &[T],
        dropout: Option<Dropped<PackedBatch>>,
        grad_y: ArrayView2<T>,
        mut grad_x: Option<ArrayViewMut2<T>>,
        gradients: &mut [T],
    ) -> Result<()> {
        const NAME: &str = "adapters_backward";
        let (rows, inputs) = x.dim();
        let dropped_len = if dropout.is_some() { rows * inputs } else { 0 };
        let mut scratch = self.scratch();
        let len = rows * map.ranks() + 2 * dropped_len;
        if scratch.len() < len {
            scratch.resize(len, T::zero());
        }
        let (grad_adapted, rest) = scratch.split_at_mut(rows * map.ranks());
        let (x_dropped, rest) = rest.split_at_mut(dropped_len);
        let x = dropped(NAME, dropout, 0, x, x_dropped)?;
        // Gradient of the dropped x, which the mask is still to be applied to.
        let mut grad_dropped = match dropout {
            Some(_) => Some(matrix_mut(NAME, rest, rows, inputs)?),
            None => None,
        };
        if let Some(grad) = &mut grad_dropped {
            grad.fill(T::zero());
        }
        let mut adapted = matrix(NAME, adapted, rows, map.ranks())?;
        let mut grad_adapted = matrix_mut(NAME, grad_adapted, rows, map.ranks())?;
        for lora in &map.adapters {
            let (xa, rest) = adapted.split_at(Axis(1), lora.rank);
            adapted = rest;
            let (dxa, rest) = grad_adapted.split_at(Axis(1), lora.rank);
            grad_adapted = rest;
            let dy = grad_y.slice(s![.., lora.output..lora.output + lora.outputs]);
            let dx = match &mut grad_dropped {
                Some(grad) => Some(grad.view_mut()),
                None => grad_x.as_mut().map(|grad| grad.view_mut()),
            };
            let (a, b) = two_parts(NAME, gradients, lora.a, lora.b)?;
            let lora_view = adapter(NAME, map, lora, parameters)?;
            let (da, db) = if map.transposed {
                let da = matrix_mut(NAME, a, lora.rank, lora.outputs)?;
                let db = matrix_mut(NAME, b, map.inputs, lora.rank)?;
                (db.reversed_axes(), da.reversed_axes())
            } else {
                (
                    matrix_mut(NAME, a, lora.rank, map.inputs)?,
                    matrix_mut(NAME, b, lora.outputs, lora.rank)?,
                )
            };
            named(
                NAME,
                lora_linear::backward_adapter(x, xa, lora_view, dy, dxa, dx, da, db),
            )?;
        }
        if let (Some(dropout), Some(mut grad), Some(grad_x)) =
            (dropout, grad_dropped, grad_x.as_mut())
        {
            if let Some(grad) = grad.as_slice_mut() {
                draw(NAME, dropout, 0, x.ncols(), grad)?;
            }
            *grad_x += &grad;
        }
        Ok(())
    }
}

/// Drops elements of rows `first ..` of a batch's tokens.
pub(super) fn draw<T: Scalar>(
    operation: &'static str,
    dropout: Dropped<PackedBatch>,
    first: usize,
    width: usize,
    rows: &mut [T],
) -> Result<()> {
    let batch = dropout.batch;
    let mut token = first;
    let mut sequence = batch
        .cu_seqlens
        .partition_point(|&start| start as usize <= token)
        - 1;
    let mut rest = rows;
    while !rest.is_empty() {
        let tokens = batch.tokens_of(sequence);
        let len = ((tokens.end - token) * width).min(rest.len());
        let (here, after) = rest.split_at_mut(len);
        let index = (batch.origins[sequence] as usize + token - tokens.start) * width;
        named(operation, dropout::apply(dropout.mask, index as u64, here))?;
        rest = after;
        token = tokens.end;
        sequence += 1;
    }
    Ok(())
}

/// x after the dropout of an adapter's input, in `memory`: x itself without dropout. `first` is the
/// number of x's first row.
pub(super) fn dropped<'a, T: Scalar>(
    operation: &'static str,
    dropout: Option<Dropped<PackedBatch>>,
    first: usize,
    x: ArrayView2<'a, T>,
    memory: &'a mut [T],
) -> Result<ArrayView2<'a, T>> {
    let Some(dropout) = dropout else {
        return Ok(x);
    };
    let memory = front_mut(operation, memory, x.len())?;
    for (to, &from) in memory.iter_mut().zip(x) {
        *to = from;
    }
    draw(operation, dropout, first, x.ncols(), memory)?;
    matrix(operation, memory, x.nrows(), x.ncols())
}

/// A linear map's weight as the reference reads it, [outputs, inputs].
pub(super) fn weight<'a, T>(
    operation: &'static str,
    map: &Linear,
    parameters: &'a [T],
) -> Result<ArrayView2<'a, T>> {
    let stored = part(operation, parameters, map.weight)?;
    Ok(if map.transposed {
        matrix(operation, stored, map.inputs, map.outputs)?.reversed_axes()
    } else {
        matrix(operation, stored, map.outputs, map.inputs)?
    })
}

/// An adapter as the reference reads it: for a transposed map, Bᵀ takes A's place and Aᵀ that of B.
pub(super) fn adapter<'a, T: Scalar>(
    operation: &'static str,
    map: &Linear,
    adapter: &Adapter,
    parameters: &'a [T],
) -> Result<lora_linear::Adapter<'a, T>> {
    let a = part(operation, parameters, adapter.a)?;
    let b = part(operation, parameters, adapter.b)?;
    let (a, b) = if map.transposed {
        let a = matrix(operation, a, adapter.rank, adapter.outputs)?;
        let b = matrix(operation, b, map.inputs, adapter.rank)?;
        (b.reversed_axes(), a.reversed_axes())
    } else {
        (
            matrix(operation, a, adapter.rank, map.inputs)?,
            matrix(operation, b, adapter.outputs, adapter.rank)?,
        )
    };
    Ok(lora_linear::Adapter {
        a,
        b,
        scaling: T::from_f64(adapter.scaling),
    })
}
