//! Acting: attention with a cache of keys and values, which is read where it stands.

use super::device::{Compute, Device};
use super::memory::{Batch, Buffer};
use super::{AttentionState, Gpu, attention, tokens};
use crate::backend::{Attention, BackendError, KeyValueCache, Result};

impl<D: Device, T: Compute> Gpu<D, T> {
    /// Writes the keys and values of the batch's tokens behind the cached ones, and attends to both.
    pub(super) fn act(
        &self,
        batch: &Batch<D, T>,
        attention: &Attention,
        qkv: &Buffer<D, T>,
        cache: &mut KeyValueCache<Buffer<D, T>>,
        rows: &[usize],
        prefix: usize,
        out: &mut Buffer<D, T>,
        state: &mut AttentionState<D, T>,
    ) -> Result<()> {
        let device = &self.device;
        let width = attention.width();
        let cached = cache.keys.len / width;
        let seen = Seen::new(&batch.cu_seqlens, rows, prefix, cache.capacity, cached);
        let (new, offsets) = (seen.to.len(), seen.cu_seqlens_q.len());
        let mut indices = self.indices.upload(
            device,
            &[&seen.to[..], &seen.cu_seqlens_q[..], &seen.cu_seqlens_k[..]].concat(),
        )?;
        let [to, cu_seqlens_q, cu_seqlens_k] = indices.output(device)?.parts([
            0..new,
            new..new + offsets,
            new + offsets..new + 2 * offsets,
        ])?;
        let columns = || {
            let qkv = qkv.read(device, 0..batch.tokens * 3 * width)?;
            Ok::<_, BackendError>(qkv.rows(3 * width).columns([width; 3]))
        };
        let [q, new_keys, new_values] = columns()?;
        for (new, cache) in [(new_keys, &mut cache.keys), (new_values, &mut cache.values)] {
            let shape = tokens::CopyShape {
                rows: batch.tokens,
                width,
                x_rows: batch.tokens,
                y_rows: cached,
            };
            shape.copy(
                device,
                tokens::Copy {
                    x: new,
                    from: None,
                    to: Some(to.as_input()),
                    y: cache.write(device, 0..cached * width)?.rows(width),
                },
            )?;
        }
        let shape = attention::Shape {
            sequences: offsets - 1,
            queries: batch.tokens,
            keys: cached,
            heads: attention.heads,
            key_heads: attention.heads,
            width: attention.head_width,
            mask: attention::Mask::Causal,
        };
        let tensors = attention::Forward {
            q,
            k: cache.keys.read(device, 0..cached * width)?.rows(width),
            v: cache.values.read(device, 0..cached * width)?.rows(width),
            pack: attention::Pack {
                cu_seqlens_q: cu_seqlens_q.as_input(),
                cu_seqlens_k: cu_seqlens_k.as_input(),
                groups: None,
            },
            scale: attention.scale() as f32,
            out: out.write(device, 0..batch.tokens * width)?.rows(width),
            lse: state
                .lse
                .write_exact(device, 0..batch.tokens * attention.heads)?,
            memory_loss: None,
        };
        Ok(shape.forward(device, tensors)?)
    }
}

/// Which tokens of the cache those of a batch are, and which they see.
///
/// What lies between two rows of the cache, and behind what a row holds so far, counts as a sequence
/// that nobody asks for: so the cache is one pack of sequences as it stands.
struct Seen {
    /// Token of the cache, of each token of the batch.
    to: Vec<i32>,
    cu_seqlens_q: Vec<i32>,
    cu_seqlens_k: Vec<i32>,
}

impl Seen {
    /// `rows` ascending, of a cache of `cached` tokens.
    fn new(
        cu_seqlens: &[i32],
        rows: &[usize],
        prefix: usize,
        capacity: usize,
        cached: usize,
    ) -> Self {
        let mut seen = Self {
            to: Vec::new(),
            cu_seqlens_q: vec![0],
            cu_seqlens_k: vec![0],
        };
        for (ends, row) in cu_seqlens.windows(2).zip(rows) {
            let first = row * capacity;
            let end = first + prefix + (ends[1] - ends[0]) as usize;
            seen.to.extend((first + prefix..end).map(|row| row as i32));
            seen.cu_seqlens_q.extend(ends);
            seen.cu_seqlens_k.extend([first as i32, end as i32]);
        }
        seen.cu_seqlens_q.extend(cu_seqlens.last());
        seen.cu_seqlens_k.push(cached as i32);
        seen
    }
}
