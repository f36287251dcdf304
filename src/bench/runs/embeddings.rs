//! What observations become: one-hot codes by a linear map, or by convolutions.

use dtmem_reference::convolution::Grid;

use super::{Arena, Run, random, staged};
use crate::backend::{Backend, Codes, Convolutions, Kind, OneHot};
use crate::bench::operations::{CARDINALITIES, CELLS, CHANNELS, FIELDS, MAPS, MIDDLE, TAPS, VIEW};
use crate::bench::{Result, Scale};

pub(super) fn one_hot<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    backward: bool,
) -> Result<Run<'a>> {
    let width = scale.width;
    let mut arena = Arena::default();
    let first = [0, CARDINALITIES[0], CARDINALITIES[0] + CARDINALITIES[1]];
    let map = OneHot {
        weight: arena.span(CELLS * CHANNELS * width),
        bias: arena.span(width),
        offsets: (0..FIELDS)
            .map(|field| field / first.len() * CHANNELS + first[field % first.len()])
            .collect(),
        inputs: CELLS * CHANNELS,
        width,
        trainable: true,
    };
    let batch = staged(backend, scale)?;
    if backward {
        let grad_out = random(backend, Kind::Activation, scale.steps() * width, 1.0)?;
        let mut gradients = random(backend, Kind::Exact, arena.0, 1.0)?;
        return Ok(Box::new(move || {
            let (codes, to) = (Codes::Observations(0), &mut gradients);
            Ok(backend.one_hot_backward(&batch, codes, &map, &grad_out, to)?)
        }));
    }
    let parameters = random(backend, Kind::Parameter, arena.0, 0.05)?;
    let mut out = backend.buffer(scale.steps() * width, Kind::Activation)?;
    Ok(Box::new(move || {
        Ok(backend.one_hot(&batch, Codes::Observations(0), &map, &parameters, &mut out)?)
    }))
}

pub(super) fn convolutions<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    backward: bool,
) -> Result<Run<'a>> {
    let cells = scale.steps() * CELLS;
    let mut arena = Arena::default();
    let front_end = Convolutions {
        grid: Grid {
            width: VIEW[0],
            height: VIEW[1],
            cardinalities: CARDINALITIES.to_vec(),
        },
        weight1: arena.span(CHANNELS * TAPS * MIDDLE),
        bias1: arena.span(MIDDLE),
        weight2: arena.span(MAPS * MIDDLE * TAPS),
        bias2: arena.span(MAPS),
        middle: MIDDLE,
        out: MAPS,
        trainable: true,
    };
    let batch = staged(backend, scale)?;
    let parameters = random(backend, Kind::Parameter, arena.0, 0.05)?;
    let mut middle = backend.buffer(cells * MIDDLE, Kind::Activation)?;
    let mut out = backend.buffer(cells * MAPS, Kind::Activation)?;
    backend.convolutions(&batch, 0, &front_end, &parameters, &mut middle, &mut out)?;
    if !backward {
        return Ok(Box::new(move || {
            Ok(backend.convolutions(&batch, 0, &front_end, &parameters, &mut middle, &mut out)?)
        }));
    }
    let mut grad_out = random(backend, Kind::Activation, cells * MAPS, 1.0)?;
    let mut grad_middle = backend.buffer(cells * MIDDLE, Kind::Activation)?;
    let mut gradients = random(backend, Kind::Exact, arena.0, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.convolutions_backward(
            &batch,
            0,
            &front_end,
            &parameters,
            &middle,
            &out,
            &mut grad_out,
            &mut grad_middle,
            &mut gradients,
        )?)
    }))
}
