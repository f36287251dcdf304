//! The norm of gradients, and updates.

use super::{Run, numbers, random, staged};
use crate::backend::{Backend, FIRST_LOSS_SCALE, Kind, METRICS, Trained};
use crate::bench::{Operation, Result, Scale};

/// The norm of the gradients, or the update of the parameters of a scale's blocks.
pub(super) fn update<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    operation: Operation,
) -> Result<Run<'a>> {
    let len = scale.weights();
    let gradients = random(backend, Kind::Exact, len, 1e-3)?;
    let mut metrics = random(backend, Kind::Exact, METRICS, 1.0)?;
    let mut loss_scale = backend.buffer(FIRST_LOSS_SCALE.len(), Kind::Exact)?;
    backend.upload(&FIRST_LOSS_SCALE.map(|x| x as f32), &mut loss_scale, 0)?;
    backend.norm(len, &gradients, None, &mut loss_scale, &mut metrics)?;
    if operation == Operation::Norm {
        return Ok(Box::new(move || {
            Ok(backend.norm(len, &gradients, None, &mut loss_scale, &mut metrics)?)
        }));
    }
    let mut parameters = random(backend, Kind::Parameter, len, 0.05)?;
    let [mut first, mut second] = [
        random(backend, Kind::Exact, len, 1e-3)?,
        backend.buffer(len, Kind::Exact)?,
    ];
    let squares: Vec<f32> = numbers(len, 1e-3).iter().map(|x| x * x).collect();
    backend.upload(&squares, &mut second, 0)?;
    let batch = staged(backend, scale)?;
    let trained = Trained { len, decayed: len };
    Ok(Box::new(move || {
        Ok(backend.adamw(
            &batch,
            trained,
            &metrics,
            &gradients,
            &mut parameters,
            &mut first,
            &mut second,
        )?)
    }))
}
