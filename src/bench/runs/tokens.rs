//! Token rows.

use super::{Arena, Run, random, staged};
use crate::backend::{Backend, Kind, Positions};
use crate::bench::{Result, Scale};

pub(super) fn tokens<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    backward: bool,
) -> Result<Run<'a>> {
    let (frames, tokens, width) = (scale.steps(), scale.tokens(), scale.width);
    let batch = staged(backend, scale)?;
    let embedded = || random(backend, Kind::Activation, frames * width, 1.0);
    let [mut observations, mut actions, mut returns] = [embedded()?, embedded()?, embedded()?];
    let mut arena = Arena::default();
    let longest = scale.lengths.iter().copied().max().unwrap_or(0);
    let positions = arena.span(longest * width);
    let mut out = random(backend, Kind::Activation, tokens * width, 1.0)?;
    if backward {
        let mut gradients = random(backend, Kind::Exact, arena.0, 1.0)?;
        return Ok(Box::new(move || {
            Ok(backend.assemble_tokens_backward(
                &batch,
                width,
                &out,
                &mut observations,
                &mut actions,
                &mut returns,
                Some(positions),
                &mut gradients,
            )?)
        }));
    }
    let table = random(backend, Kind::Parameter, arena.0, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.assemble_tokens(
            &batch,
            width,
            &observations,
            &actions,
            &returns,
            Positions::Learned(positions),
            &table,
            &mut out,
        )?)
    }))
}
