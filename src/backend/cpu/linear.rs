//! Linear maps.

use dtmem_reference::{Scalar, linear, lora_linear};
use ndarray::{ArrayView1, ArrayViewMut1, Axis, s};
use rayon::prelude::*;

use super::Cpu;
use super::adapters::{adapter, dropped, weight};
use super::views::{columns, columns_mut, matrix_mut, named, part, part_mut};
use crate::backend::{Dropped, In, Linear, LinearOps, Out, Result};
use crate::batch::PackedBatch;

impl<T: Scalar> LinearOps for Cpu<T> {
    fn linear(
        &self,
        rows: usize,
        map: &Linear,
        parameters: &Vec<T>,
        x: In<Vec<T>>,
        adapted: &mut Vec<T>,
        dropout: Option<Dropped<PackedBatch>>,
        y: Out<Vec<T>>,
    ) -> Result<()> {
        const NAME: &str = "linear";
        let x = columns(NAME, x, rows, map.inputs)?;
        let mut y = columns_mut(NAME, y, rows, map.outputs)?;
        let weight = weight(NAME, map, parameters)?;
        let bias = match map.bias {
            Some(span) => Some(ArrayView1::from(part(NAME, parameters, span)?)),
            None => None,
        };
        if rows >= map.outputs {
            let piece = self.piece(rows);
            y.axis_chunks_iter_mut(Axis(0), piece)
                .into_par_iter()
                .zip(x.axis_chunks_iter(Axis(0), piece))
                .try_for_each(|(y, x)| {
                    named(NAME, linear::forward(x, weight, bias, T::zero(), y))
                })?;
        } else {
            let piece = self.piece(map.outputs);
            y.axis_chunks_iter_mut(Axis(1), piece)
                .into_par_iter()
                .zip(weight.axis_chunks_iter(Axis(0), piece))
                .enumerate()
                .try_for_each(|(index, (y, weight))| {
                    let start = index * piece;
                    let bias = bias.map(|bias| bias.slice_move(s![start..start + y.ncols()]));
                    named(NAME, linear::forward(x, weight, bias, T::zero(), y))
                })?;
        }
        if map.adapters.is_empty() {
            return Ok(());
        }
        let mut adapted = matrix_mut(NAME, adapted, rows, map.ranks())?;
        let piece = self.piece(rows);
        y.axis_chunks_iter_mut(Axis(0), piece)
            .into_par_iter()
            .zip(adapted.axis_chunks_iter_mut(Axis(0), piece))
            .zip(x.axis_chunks_iter(Axis(0), piece))
            .enumerate()
            .try_for_each(|(index, ((mut y, adapted), x))| {
                let mut scratch = self.scratch();
                if dropout.is_some() && scratch.len() < x.len() {
                    scratch.resize(x.len(), T::zero());
                }
                let x = dropped(NAME, dropout, index * piece, x, &mut scratch)?;
                let mut adapted = adapted;
                for lora in &map.adapters {
                    let (xa, rest) = adapted.split_at(Axis(1), lora.rank);
                    adapted = rest;
                    let y = y.slice_mut(s![.., lora.output..lora.output + lora.outputs]);
                    let lora = adapter(NAME, map, lora, parameters)?;
                    named(NAME, lora_linear::forward_adapter(x, lora, xa, y))?;
                }
                Ok(())
            })
    }

    fn linear_backward(
        &self,
        rows: usize,
        map: &Linear,
        parameters: &Vec<T>,
        x: In<Vec<T>>,
        adapted: &Vec<T>,
        dropout: Option<Dropped<PackedBatch>>,
        grad_y: In<Vec<T>>,
        grad_x: Option<Out<Vec<T>>>,
        accumulate: bool,
        gradients: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "linear_backward";
        let x = columns(NAME, x, rows, map.inputs)?;
        let grad_y = columns(NAME, grad_y, rows, map.outputs)?;
        let mut grad_x = match grad_x {
            Some(out) => Some(columns_mut(NAME, out, rows, map.inputs)?),
            None => None,
        };
        let weight = weight(NAME, map, parameters)?;
        let beta = if accumulate { T::one() } else { T::zero() };
        if let Some(grad_x) = &mut grad_x {
            if rows >= map.inputs {
                let piece = self.piece(rows);
                grad_x
                    .axis_chunks_iter_mut(Axis(0), piece)
                    .into_par_iter()
                    .zip(grad_y.axis_chunks_iter(Axis(0), piece))
                    .try_for_each(|(dx, dy)| {
                        named(NAME, linear::backward_input(dy, weight, beta, dx))
                    })?;
            } else {
                let piece = self.piece(map.inputs);
                grad_x
                    .axis_chunks_iter_mut(Axis(1), piece)
                    .into_par_iter()
                    .zip(weight.axis_chunks_iter(Axis(1), piece))
                    .try_for_each(|(dx, weight)| {
                        named(NAME, linear::backward_input(grad_y, weight, beta, dx))
                    })?;
            }
        }
        if map.trainable {
            // The gradient of a transposed weight [inputs, outputs] is xᵀ·dy.
            let (left, right) = if map.transposed {
                (x, grad_y)
            } else {
                (grad_y, x)
            };
            let stored = part_mut(NAME, gradients, map.weight)?;
            let mut stored = matrix_mut(NAME, stored, left.ncols(), right.ncols())?;
            let piece = self.piece(left.ncols());
            stored
                .axis_chunks_iter_mut(Axis(0), piece)
                .into_par_iter()
                .zip(left.axis_chunks_iter(Axis(1), piece))
                .try_for_each(|(dweight, left)| {
                    named(NAME, linear::backward_weight(left, right, dweight))
                })?;
            if let Some(span) = map.bias {
                let bias = ArrayViewMut1::from(part_mut(NAME, gradients, span)?);
                named(NAME, linear::backward_bias(grad_y, bias))?;
            }
        }
        if map.adapters.is_empty() {
            return Ok(());
        }
        self.adapters_backward(
            map, parameters, x, adapted, dropout, grad_y, grad_x, gradients,
        )
    }
}
