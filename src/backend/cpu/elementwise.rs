//! What is done to one number at a time.

use dtmem_reference::{Scalar, activation};
use rayon::prelude::*;

use super::adapters::draw;
use super::views::{front, front_mut, matrix, matrix_mut, named};
use super::{Cpu, ELEMENTS};
use crate::backend::{Activation, Dropped, ElementwiseOps, Result};
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

    fn dropout(&self, dropout: Dropped<PackedBatch>, width: usize, x: &mut Vec<T>) -> Result<()> {
        const NAME: &str = "dropout";
        let rows = ELEMENTS.div_ceil(width.max(1));
        front_mut(NAME, x, dropout.batch.tokens() * width)?
            .par_chunks_mut(rows * width.max(1))
            .enumerate()
            .try_for_each(|(index, x)| draw(NAME, dropout, index * rows, width, x))
    }

    fn add(&self, len: usize, x: &Vec<T>, y: &Vec<T>, out: &mut Vec<T>) -> Result<()> {
        front_mut("add", out, len)?
            .par_chunks_mut(ELEMENTS)
            .zip(front("add", x, len)?.par_chunks(ELEMENTS))
            .zip(front("add", y, len)?.par_chunks(ELEMENTS))
            .for_each(|((out, x), y)| {
                for ((out, &x), &y) in out.iter_mut().zip(x).zip(y) {
                    *out = x + y;
                }
            });
        Ok(())
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
