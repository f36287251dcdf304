//! Layer normalisation.

use super::{Arena, Run, random};
use crate::backend::{Backend, Kind, LayerNorm};
use crate::bench::{Result, Scale};

pub(super) fn layer_norm<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    backward: bool,
) -> Result<Run<'a>> {
    let (rows, width) = (scale.tokens(), scale.width);
    let mut arena = Arena::default();
    let norm = LayerNorm {
        weight: arena.span(width),
        bias: arena.span(width),
        width,
        epsilon: 1e-5,
        trainable: true,
    };
    let parameters = random(backend, Kind::Parameter, arena.0, 1.0)?;
    let x = random(backend, Kind::Activation, rows * width, 1.0)?;
    let mut y = backend.buffer(rows * width, Kind::Activation)?;
    let mut statistics = backend.buffer(2 * rows, Kind::Exact)?;
    backend.layer_norm(rows, &norm, &parameters, &x, None, &mut y, &mut statistics)?;
    if !backward {
        return Ok(Box::new(move || {
            Ok(backend.layer_norm(rows, &norm, &parameters, &x, None, &mut y, &mut statistics)?)
        }));
    }
    let mut grad_x = backend.buffer(rows * width, Kind::Activation)?;
    let mut gradients = random(backend, Kind::Exact, arena.0, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.layer_norm_backward(
            rows,
            &norm,
            &parameters,
            &x,
            &statistics,
            &y,
            &mut grad_x,
            false,
            None,
            &mut gradients,
        )?)
    }))
}
