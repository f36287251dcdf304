//! Attention, with and without the memory loss, and to a cache.

use dtmem_reference::attention::Denominator;

use super::{Run, packer, push_lengths, random, staged};
use crate::backend::{Attention, Backend, Extent, KeyValueCache, Kind, METRICS, Supervised};
use crate::batch::Acting;
use crate::bench::operations::CACHED;
use crate::bench::{Result, Scale};

pub(super) fn attention<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
    bce: bool,
    backward: bool,
) -> Result<Run<'a>> {
    let (tokens, width) = (scale.tokens(), scale.width);
    let attention = Attention {
        heads: scale.heads,
        head_width: width / scale.heads,
        extent: Extent::Sequence,
        supervised: bce.then(|| Supervised {
            heads: vec![0],
            denominator: Denominator::Square,
        }),
    };
    let batch = staged(backend, scale)?;
    let qkv = random(backend, Kind::Activation, tokens * 3 * width, 1.0)?;
    let mut out = backend.buffer(tokens * width, Kind::Activation)?;
    let mut state = backend.attention_state(&attention, tokens)?;
    let mut metrics = random(backend, Kind::Exact, METRICS, 1.0)?;
    if !backward {
        return Ok(Box::new(move || {
            let (out, metrics) = (&mut out, &mut metrics);
            Ok(backend.attention(&batch, &attention, &qkv, out, &mut state, metrics)?)
        }));
    }
    backend.attention(&batch, &attention, &qkv, &mut out, &mut state, &mut metrics)?;
    let grad_out = random(backend, Kind::Activation, tokens * width, 1.0)?;
    let mut grad_qkv = backend.buffer(tokens * 3 * width, Kind::Activation)?;
    Ok(Box::new(move || {
        let grad = &mut grad_qkv;
        Ok(backend.attention_backward(&batch, &attention, &qkv, &out, &state, &grad_out, grad)?)
    }))
}

/// The tokens of one step of each episode, behind those that are cached.
pub(super) fn attention_cached<'a, B: Backend<Element = f32>>(
    backend: &'a B,
    scale: &Scale,
) -> Result<Run<'a>> {
    let (tokens, width, episodes) = (scale.tokens(), scale.width, scale.sequences());
    let attention = Attention {
        heads: scale.heads,
        head_width: width / scale.heads,
        extent: Extent::Sequence,
        supervised: None,
    };
    let longest = scale.lengths.iter().max().copied().unwrap_or(0);
    let capacity = CACHED + longest * scale.layout.tokens_per_step();
    let mut packer = packer(scale);
    push_lengths(scale, &mut packer)?;
    packer.follow(Acting {
        episodes: (0..episodes).collect(),
        prefix: CACHED,
        capacity,
        rows: episodes,
    })?;
    let mut batch = B::Batch::default();
    backend.stage(packer.batch(), &mut batch)?;
    let cached = || random(backend, Kind::Activation, episodes * capacity * width, 1.0);
    let mut cache = KeyValueCache {
        keys: cached()?,
        values: cached()?,
    };
    let qkv = random(backend, Kind::Activation, tokens * 3 * width, 1.0)?;
    let mut out = backend.buffer(tokens * width, Kind::Activation)?;
    let mut state = backend.attention_state(&attention, tokens)?;
    Ok(Box::new(move || {
        let (out, state) = (&mut out, &mut state);
        Ok(backend.attention_cached(&batch, &attention, &qkv, &mut cache, out, state)?)
    }))
}
