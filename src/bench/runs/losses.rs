//! Losses of actions.

use super::{Run, batch, numbers, packer, random, staged};
use crate::backend::{Backend, Kind, METRICS};
use crate::bench::operations::ACTIONS;
use crate::bench::{Result, Scale};

pub(super) fn cross_entropy<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
) -> Result<Run<'a>> {
    let len = scale.steps() * ACTIONS;
    let batch = staged(backend, scale)?;
    let logits = random(backend, Kind::Activation, len, 1.0)?;
    let mut grad = backend.buffer(len, Kind::Activation)?;
    let mut metrics = random(backend, Kind::Exact, METRICS, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.cross_entropy(&batch, 0, ACTIONS, &logits, &mut grad, &mut metrics)?)
    }))
}

/// Numbers in the place of the action codes.
pub(super) fn squared_error<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
) -> Result<Run<'a>> {
    let len = scale.steps() * ACTIONS;
    let mut packed = batch(scale, packer(scale))?;
    packed.families[0].real_targets = 0..len;
    packed.real_targets = numbers(len, 1.0);
    let mut batch = B::Batch::default();
    backend.stage(&packed, &mut batch)?;
    let outputs = random(backend, Kind::Activation, len, 1.0)?;
    let mut grad = backend.buffer(len, Kind::Activation)?;
    let mut metrics = random(backend, Kind::Exact, METRICS, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.squared_error(&batch, 0, ACTIONS, &outputs, &mut grad, &mut metrics)?)
    }))
}
