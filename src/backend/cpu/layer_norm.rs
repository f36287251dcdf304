//! Layer normalisation, with the residual sum before it.

use std::ops::Range;

use dtmem_reference::{Scalar, layer_norm};
use ndarray::{ArrayView1, ArrayViewMut1, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::Cpu;
use super::views::{front, front_mut, matrix, matrix_mut, named, part};
use crate::backend::{ElementwiseOps, LayerNorm, LayerNormOps, Residual, Result, SummandGradient};

impl<T: Scalar> LayerNormOps for Cpu<T> {
    fn layer_norm(
        &self,
        rows: usize,
        norm: &LayerNorm,
        parameters: &Vec<T>,
        x: &Vec<T>,
        residual: Option<Residual<Self>>,
        y: &mut Vec<T>,
        statistics: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "layer_norm";
        let x = match residual {
            Some(Residual {
                summand,
                dropout,
                sum,
            }) => {
                self.add(rows, norm.width, x, summand, dropout, sum)?;
                sum
            }
            None => x,
        };
        let weight = ArrayView1::from(part(NAME, parameters, norm.weight)?);
        let bias = ArrayView1::from(part(NAME, parameters, norm.bias)?);
        let (mean, rstd) = front_mut(NAME, statistics, 2 * rows)?.split_at_mut(rows);
        let piece = self.piece(rows);
        matrix_mut(NAME, y, rows, norm.width)?
            .axis_chunks_iter_mut(Axis(0), piece)
            .into_par_iter()
            .zip(matrix(NAME, x, rows, norm.width)?.axis_chunks_iter(Axis(0), piece))
            .zip(mean.par_chunks_mut(piece))
            .zip(rstd.par_chunks_mut(piece))
            .try_for_each(|(((y, x), mean), rstd)| {
                let (mean, rstd) = (ArrayViewMut1::from(mean), ArrayViewMut1::from(rstd));
                let forward = layer_norm::forward(x, weight, bias, norm.epsilon, y, mean, rstd);
                named(NAME, forward)
            })
    }

    fn layer_norm_backward(
        &self,
        rows: usize,
        norm: &LayerNorm,
        parameters: &Vec<T>,
        x: &Vec<T>,
        statistics: &Vec<T>,
        grad_y: &Vec<T>,
        grad_x: &mut Vec<T>,
        accumulate: bool,
        summand: Option<SummandGradient<Self>>,
        gradients: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "layer_norm_backward";
        let width = norm.width;
        let weight = ArrayView1::from(part(NAME, parameters, norm.weight)?);
        let (mean, rstd) = front(NAME, statistics, 2 * rows)?.split_at(rows);
        // The third part is a row's gradient before it is added.
        let mut partials = self.partials(3 * width);
        let piece = partials.piece(rows);
        partials
            .pieces()
            .zip(matrix_mut(NAME, grad_x, rows, width)?.axis_chunks_iter_mut(Axis(0), piece))
            .zip(matrix(NAME, x, rows, width)?.axis_chunks_iter(Axis(0), piece))
            .zip(matrix(NAME, grad_y, rows, width)?.axis_chunks_iter(Axis(0), piece))
            .zip(mean.par_chunks(piece))
            .zip(rstd.par_chunks(piece))
            .try_for_each(|(((((partial, mut dx), x), dy), mean), rstd)| {
                let (dweight, rest) = partial.split_at_mut(width);
                let (dbias, scratch) = rest.split_at_mut(width);
                let mut backward = |rows: Range<usize>, dx: ArrayViewMut2<T>| {
                    let [mean, rstd] = [mean, rstd].map(|x| ArrayView1::from(&x[rows.clone()]));
                    let [x, dy] = [x, dy].map(|x| x.slice_move(s![rows.clone(), ..]));
                    let [dweight, dbias] = [&mut *dweight, &mut *dbias].map(ArrayViewMut1::from);
                    named(
                        NAME,
                        layer_norm::backward(x, weight, mean, rstd, dy, dx, dweight, dbias),
                    )
                };
                if !accumulate {
                    return backward(0..mean.len(), dx);
                }
                for (row, mut dx) in dx.rows_mut().into_iter().enumerate() {
                    backward(row..row + 1, matrix_mut(NAME, scratch, 1, width)?)?;
                    dx += &ArrayView1::from(&*scratch);
                }
                Ok(())
            })?;
        if let Some(SummandGradient { dropout, gradient }) = summand {
            self.dropout(dropout, width, Some(grad_x), gradient)?;
        }
        if norm.trainable {
            partials.add_to(NAME, gradients, &[norm.weight, norm.bias])?;
        }
        Ok(())
    }
}
