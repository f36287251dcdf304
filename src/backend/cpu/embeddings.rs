//! What becomes the rows of tokens: codes by maps of one-hot inputs or by convolutions, and real numbers.

use dtmem_reference::{Scalar, activation, convolution, one_hot};
use ndarray::{ArrayView1, ArrayViewMut1, ArrayViewMut2, Axis};
use rayon::prelude::*;

use super::Cpu;
use super::convolutions::ConvolutionShapes;
use super::views::{
    code_matrix, front_mut, matrix, matrix_mut, named, part, part_mut, rows_from, rows_of, span,
    two_parts,
};
use crate::backend::{Activation, Codes, Convolutions, EmbeddingOps, OneHot, Reals, Result};
use crate::batch::PackedBatch;

impl<T: Scalar> EmbeddingOps for Cpu<T> {
    fn one_hot(
        &self,
        batch: &PackedBatch,
        codes: Codes,
        map: &OneHot,
        parameters: &Vec<T>,
        out: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "one_hot";
        let (codes, rows) = code_matrix(batch, codes, map)?;
        let weight = matrix(
            NAME,
            part(NAME, parameters, map.weight)?,
            map.inputs,
            map.width,
        )?;
        let bias = ArrayView1::from(part(NAME, parameters, map.bias)?);
        let out = part_mut(NAME, out, rows_from(rows.offset, rows.len, map.width))?;
        let mut out = matrix_mut(NAME, out, rows.len, map.width)?;
        let piece = self.piece(rows.len);
        out.axis_chunks_iter_mut(Axis(0), piece)
            .into_par_iter()
            .zip(codes.axis_chunks_iter(Axis(0), piece))
            .try_for_each(|(y, codes)| {
                named(
                    NAME,
                    one_hot::forward(codes, &map.offsets, weight, Some(bias), y),
                )
            })
    }

    fn one_hot_backward(
        &self,
        batch: &PackedBatch,
        codes: Codes,
        map: &OneHot,
        grad_out: &Vec<T>,
        gradients: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "one_hot_backward";
        if !map.trainable {
            return Ok(());
        }
        let (codes, rows) = code_matrix(batch, codes, map)?;
        let grad_out = part(NAME, grad_out, rows_from(rows.offset, rows.len, map.width))?;
        let grad_out = matrix(NAME, grad_out, rows.len, map.width)?;
        let (weight, bias) = two_parts(NAME, gradients, map.weight, map.bias)?;
        let mut weight = matrix_mut(NAME, weight, map.inputs, map.width)?;
        let mut bias = ArrayViewMut1::from(bias);
        let columns = self.piece(map.width);
        weight
            .axis_chunks_iter_mut(Axis(1), columns)
            .into_par_iter()
            .zip(bias.axis_chunks_iter_mut(Axis(0), columns))
            .zip(grad_out.axis_chunks_iter(Axis(1), columns))
            .try_for_each(|((weight, bias), grad_out)| {
                named(
                    NAME,
                    one_hot::backward(codes, &map.offsets, grad_out, weight, Some(bias)),
                )
            })
    }

    fn convolutions(
        &self,
        batch: &PackedBatch,
        family: usize,
        front_end: &Convolutions,
        parameters: &Vec<T>,
        middle: &mut Vec<T>,
        out: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "convolutions";
        let shapes = ConvolutionShapes::new(batch, family, front_end)?;
        let weights = shapes.weights(NAME, front_end, parameters)?;
        let bias1 = ArrayView1::from(part(NAME, parameters, front_end.bias1)?);
        let bias2 = ArrayView1::from(part(NAME, parameters, front_end.bias2)?);
        let mut middle = matrix_mut(NAME, middle, shapes.rows, shapes.middle)?;
        let mut out = matrix_mut(NAME, out, shapes.rows, shapes.out)?;
        let piece = shapes.piece();
        middle
            .axis_chunks_iter_mut(Axis(0), piece)
            .into_par_iter()
            .zip(out.axis_chunks_iter_mut(Axis(0), piece))
            .zip(shapes.codes.axis_chunks_iter(Axis(0), piece))
            .try_for_each(|((mut middle, mut out), codes)| {
                let grid = &front_end.grid;
                let mut scratch = self.scratch();
                let relu = |x: &mut ArrayViewMut2<T>| x.mapv_inplace(|x| x.max(T::zero()));
                let forward = (|| {
                    convolution::one_hot_forward(
                        grid,
                        codes,
                        weights[0],
                        bias1,
                        middle.view_mut(),
                        &mut scratch,
                    )?;
                    relu(&mut middle);
                    let x = middle.view();
                    convolution::forward(grid, x, weights[1], bias2, out.view_mut(), &mut scratch)
                })();
                relu(&mut out);
                named(NAME, forward)
            })
    }

    fn convolutions_backward(
        &self,
        batch: &PackedBatch,
        family: usize,
        front_end: &Convolutions,
        parameters: &Vec<T>,
        middle: &Vec<T>,
        out: &Vec<T>,
        grad_out: &mut Vec<T>,
        grad_middle: &mut Vec<T>,
        gradients: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "convolutions_backward";
        if !front_end.trainable {
            return Ok(());
        }
        let shapes = ConvolutionShapes::new(batch, family, front_end)?;
        let weights = shapes.weights(NAME, front_end, parameters)?;
        let middle = matrix(NAME, middle, shapes.rows, shapes.middle)?;
        let out = matrix(NAME, out, shapes.rows, shapes.out)?;
        let mut grad_out = matrix_mut(NAME, grad_out, shapes.rows, shapes.out)?;
        let mut grad_middle = matrix_mut(NAME, grad_middle, shapes.rows, shapes.middle)?;
        let spans = [
            front_end.weight1,
            front_end.bias1,
            front_end.weight2,
            front_end.bias2,
        ];
        let mut partials = self.partials(spans.iter().map(|span| span.len).sum());
        let rows = partials.piece(shapes.rows);
        partials
            .pieces()
            .zip(grad_out.axis_chunks_iter_mut(Axis(0), rows))
            .zip(grad_middle.axis_chunks_iter_mut(Axis(0), rows))
            .zip(out.axis_chunks_iter(Axis(0), rows))
            .zip(middle.axis_chunks_iter(Axis(0), rows))
            .zip(shapes.codes.axis_chunks_iter(Axis(0), rows))
            .try_for_each(
                |(((((partial, mut grad_out), mut grad_middle), out), middle), codes)| {
                    let (weight1, rest) = partial.split_at_mut(front_end.weight1.len);
                    let (bias1, rest) = rest.split_at_mut(front_end.bias1.len);
                    let (weight2, bias2) = rest.split_at_mut(front_end.weight2.len);
                    let channels = front_end.grid.channels();
                    let weight1 = matrix_mut(NAME, weight1, channels * 9, front_end.middle)?;
                    let weight2 = matrix_mut(NAME, weight2, front_end.out, front_end.middle * 9)?;
                    let (bias1, bias2) = (ArrayViewMut1::from(bias1), ArrayViewMut1::from(bias2));
                    let grid = &front_end.grid;
                    let mut scratch = self.scratch();
                    let gradient = grad_out.view_mut();
                    named(
                        NAME,
                        activation::backward_in_place(Activation::Relu, out, out, gradient),
                    )?;
                    let (y, x) = (grad_out.view(), grad_middle.view_mut());
                    let backward = convolution::backward(
                        grid,
                        middle,
                        weights[1],
                        y,
                        x,
                        weight2,
                        bias2,
                        &mut scratch,
                    );
                    named(NAME, backward)?;
                    let gradient = grad_middle.view_mut();
                    named(
                        NAME,
                        activation::backward_in_place(Activation::Relu, middle, middle, gradient),
                    )?;
                    let y = grad_middle.view();
                    let backward =
                        convolution::one_hot_backward(grid, codes, y, weight1, bias1, &mut scratch);
                    named(NAME, backward)
                },
            )?;
        partials.add_to(NAME, gradients, &spans)
    }

    fn reals(&self, batch: &PackedBatch, reals: Reals, out: &mut Vec<T>) -> Result<()> {
        const NAME: &str = "reals";
        let rows = |family| rows_of(NAME, batch, family);
        let values = match reals {
            Reals::Returns => &batch.returns[..],
            Reals::Observations(family) => part(
                NAME,
                &batch.real_observations,
                span(&rows(family)?.real_observations),
            )?,
            Reals::Actions(family) => {
                part(NAME, &batch.real_actions, span(&rows(family)?.real_actions))?
            }
        };
        let out = front_mut(NAME, out, values.len())?;
        for (out, &value) in out.iter_mut().zip(values) {
            *out = T::from_f64(f64::from(value));
        }
        Ok(())
    }
}
