//! The shapes and weights of the convolutional front end.

use ndarray::ArrayView2;

use super::partials::PARTIALS;
use super::views::{matrix, observation_codes, part, rows_of};
use crate::backend::{Convolutions, Result};
use crate::batch::PackedBatch;

/// Shapes of the convolutional front end.
pub(super) struct ConvolutionShapes<'a> {
    pub(super) rows: usize,
    pub(super) middle: usize,
    pub(super) out: usize,
    pub(super) codes: ArrayView2<'a, u8>,
}

impl<'a> ConvolutionShapes<'a> {
    pub(super) fn new(
        batch: &'a PackedBatch,
        family: usize,
        front_end: &Convolutions,
    ) -> Result<Self> {
        const NAME: &str = "convolutions";
        let rows = rows_of(NAME, batch, family)?.observations.len();
        let positions = front_end.grid.positions();
        let fields = positions * front_end.grid.cardinalities.len();
        Ok(Self {
            rows,
            middle: front_end.middle * positions,
            out: front_end.out * positions,
            codes: matrix(NAME, observation_codes(NAME, batch, family)?, rows, fields)?,
        })
    }

    /// Rows of one task.
    pub(super) fn piece(&self) -> usize {
        self.rows.div_ceil(PARTIALS).max(1)
    }

    pub(super) fn weights<'w, T>(
        &self,
        operation: &'static str,
        front_end: &Convolutions,
        parameters: &'w [T],
    ) -> Result<[ArrayView2<'w, T>; 2]> {
        let weight1 = part(operation, parameters, front_end.weight1)?;
        let weight2 = part(operation, parameters, front_end.weight2)?;
        let inputs = front_end.grid.channels() * 9;
        Ok([
            matrix(operation, weight1, inputs, front_end.middle)?,
            matrix(operation, weight2, front_end.out, front_end.middle * 9)?,
        ])
    }
}
