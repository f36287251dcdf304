//! Element by element.

use super::{Run, drop_tenth, random, staged};
use crate::backend::{Activation, Backend, Kind};
use crate::bench::{Result, Scale};

pub(super) fn activation<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    backward: bool,
) -> Result<Run<'a>> {
    let len = scale.tokens() * scale.feed_forward;
    let x = random(backend, Kind::Activation, len, 1.0)?;
    let mut y = backend.buffer(len, Kind::Activation)?;
    backend.activation(Activation::Gelu, len, &x, &mut y)?;
    if !backward {
        return Ok(Box::new(move || {
            Ok(backend.activation(Activation::Gelu, len, &x, &mut y)?)
        }));
    }
    let mut grad = random(backend, Kind::Activation, len, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.activation_backward(Activation::Gelu, len, &x, &y, &mut grad)?)
    }))
}

pub(super) fn dropout<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
) -> Result<Run<'a>> {
    let width = scale.width;
    let batch = staged(backend, scale)?;
    let mut x = random(backend, Kind::Activation, scale.tokens() * width, 1.0)?;
    Ok(Box::new(move || {
        Ok(backend.dropout(drop_tenth(&batch), width, None, &mut x)?)
    }))
}

pub(super) fn add<'a, B: Backend<Element = f32>>(backend: &'a B, scale: &Scale) -> Result<Run<'a>> {
    let (rows, width) = (scale.tokens(), scale.width);
    let [x, y] = [(); 2].map(|()| random(backend, Kind::Activation, rows * width, 1.0));
    let (x, y) = (x?, y?);
    let mut out = backend.buffer(rows * width, Kind::Activation)?;
    Ok(Box::new(move || {
        Ok(backend.add(rows, width, &x, &y, None, &mut out)?)
    }))
}
