//! What is done to one number at a time.

use dtmem_reference::{Scalar, activation};
use rayon::prelude::*;

use super::adapters::draw;
use super::views::{front, front_mut, matrix, matrix_mut, named};
use super::{Cpu, ELEMENTS};
use crate::backend::{Activation, Buffers, Dropped, ElementwiseOps, Result};
use crate::batch::PackedBatch;

impl<T: Scalar> ElementwiseOps for Cpu<T> {
    fn activation(
        &self,
        activation: Activation,
        len: usize,
        x: &Vec<T>,
        y: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "activation";
        front_mut(NAME, y, len)?
            .par_chunks_mut(ELEMENTS)
            .zip(front(NAME, x, len)?.par_chunks(ELEMENTS))
            .try_for_each(|(y, x)| {
                let y = matrix_mut(NAME, y, 1, x.len())?;
                named(
                    NAME,
                    activation::forward(activation, matrix(NAME, x, 1, x.len())?, y),
                )
            })
    }

    fn activation_backward(
        &self,
        activation: Activation,
        len: usize,
        x: &Vec<T>,
        y: &Vec<T>,
        grad: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "activation_backward";
        front_mut(NAME, grad, len)?
            .par_chunks_mut(ELEMENTS)
            .zip(front(NAME, x, len)?.par_chunks(ELEMENTS))
            .zip(front(NAME, y, len)?.par_chunks(ELEMENTS))
            .try_for_each(|((grad, x), y)| {
                let (x, y) = (matrix(NAME, x, 1, x.len())?, matrix(NAME, y, 1, y.len())?);
                let grad = matrix_mut(NAME, grad, 1, x.len())?;
                named(NAME, activation::backward_in_place(activation, x, y, grad))
            })
    }

    fn dropout(
        &self,
        dropout: Dropped<PackedBatch>,
        width: usize,
        x: Option<&Vec<T>>,
        y: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "dropout";
        let len = dropout.batch.tokens() * width;
        if let Some(x) = x {
            self.copy(x, y, 0, len)?;
        }
        let rows = ELEMENTS.div_ceil(width.max(1));
        front_mut(NAME, y, len)?
            .par_chunks_mut(rows * width.max(1))
            .enumerate()
            .try_for_each(|(index, y)| draw(NAME, dropout, index * rows, width, y))
    }

    fn add(
        &self,
        rows: usize,
        width: usize,
        x: &Vec<T>,
        y: &Vec<T>,
        dropout: Option<Dropped<PackedBatch>>,
        out: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "add";
        let (len, rows) = (rows * width, ELEMENTS.div_ceil(width.max(1)));
        let piece = rows * width.max(1);
        front_mut(NAME, out, len)?
            .par_chunks_mut(piece)
            .zip(front(NAME, x, len)?.par_chunks(piece))
            .zip(front(NAME, y, len)?.par_chunks(piece))
            .enumerate()
            .try_for_each(|(index, ((out, x), y))| {
                out.copy_from_slice(y);
                if let Some(dropout) = dropout {
                    draw(NAME, dropout, index * rows, width, out)?;
                }
                for (out, &x) in out.iter_mut().zip(x) {
                    *out = x + *out;
                }
                Ok(())
            })
    }

    fn add_assign(&self, len: usize, y: &Vec<T>, x: &mut Vec<T>) -> Result<()> {
        front_mut("add_assign", x, len)?
            .par_chunks_mut(ELEMENTS)
            .zip(front("add_assign", y, len)?.par_chunks(ELEMENTS))
            .for_each(|(x, y)| {
                for (x, &y) in x.iter_mut().zip(y) {
                    *x += y;
                }
            });
        Ok(())
    }
}
