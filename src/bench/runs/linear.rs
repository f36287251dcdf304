//! Linear maps, with and without adapters.

use super::{Arena, Run, drop_tenth, random, staged};
use crate::backend::{Adapter, Backend, In, Kind, Linear, Out};
use crate::bench::operations::RANK;
use crate::bench::{Result, Scale};

/// How a linear map is adapted.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Adapters {
    Plain,
    Dropout,
}

/// The feed-forward layer's first product, or three frozen projections with adapters.
pub(super) fn linear<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    adapters: Option<Adapters>,
    backward: bool,
) -> Result<Run<'a>> {
    let (rows, inputs) = (scale.tokens(), scale.width);
    let (outputs, projections) = match adapters {
        Some(_) => (3 * inputs, 3),
        None => (scale.feed_forward, 0),
    };
    let mut arena = Arena::default();
    let map = Linear {
        adapters: (0..projections)
            .map(|index| Adapter {
                output: index * inputs,
                outputs: inputs,
                a: arena.span(RANK * inputs),
                b: arena.span(inputs * RANK),
                rank: RANK,
                scaling: 2.0,
            })
            .collect(),
        weight: arena.span(inputs * outputs),
        bias: adapters.is_none().then(|| arena.span(outputs)),
        inputs,
        outputs,
        transposed: false,
        trainable: adapters.is_none(),
    };
    let batch = staged(backend, scale)?;
    let dropped = adapters == Some(Adapters::Dropout);
    let parameters = random(backend, Kind::Parameter, arena.0, 0.05)?;
    let x = random(backend, Kind::Activation, rows * inputs, 1.0)?;
    let mut adapted = random(backend, Kind::Activation, rows * map.ranks(), 1.0)?;
    let mut y = random(backend, Kind::Activation, rows * outputs, 1.0)?;
    if !backward {
        return Ok(Box::new(move || {
            let (x, y) = (In::rows(&x, inputs), Out::rows(&mut y, outputs));
            let dropout = dropped.then_some(drop_tenth(&batch));
            Ok(backend.linear(rows, &map, &parameters, x, &mut adapted, dropout, y)?)
        }));
    }
    let mut grad_x = backend.buffer(rows * inputs, Kind::Activation)?;
    let mut gradients = random(backend, Kind::Exact, arena.0, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.linear_backward(
            rows,
            &map,
            &parameters,
            In::rows(&x, inputs),
            &adapted,
            dropped.then_some(drop_tenth(&batch)),
            In::rows(&y, outputs),
            Some(Out::rows(&mut grad_x, inputs)),
            false,
            &mut gradients,
        )?)
    }))
}
