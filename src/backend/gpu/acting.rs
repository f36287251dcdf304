//! Acting: attention with a cache of keys and values.

use super::device::{Compute, Device};
use super::memory::{Batch, Buffer};
use super::{AttentionState, Gpu, attention, tokens};
use crate::backend::{Attention, BackendError, KeyValueCache, Result};

impl<D: Device, T: Compute> Gpu<D, T> {
    /// Writes the keys and values of the batch's tokens behind the cached ones, packs what each
    /// sequence sees, and attends to it.
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
        let seen = Seen::new(&batch.cu_seqlens, rows, prefix, cache.capacity);
        let keys = seen.from.len();
        let mut indices = self.indices.upload(
            device,
            &[&seen.to[..], &seen.from[..], &seen.cu_seqlens_k[..]].concat(),
        )?;
        let [to, from, cu_seqlens_k] = indices.output(device)?.parts([
            0..batch.tokens,
            batch.tokens..batch.tokens + keys,
            batch.tokens + keys..batch.tokens + keys + seen.cu_seqlens_k.len(),
        ])?;
        let mut packed = self.activations.lock(device, 2 * keys * width)?;
        let [mut packed_keys, mut packed_values] = packed
            .output(device)?
            .parts([0..keys * width, keys * width..2 * keys * width])?;
        let columns = || {
            let qkv = qkv.read(device, 0..batch.tokens * 3 * width)?;
            Ok::<_, BackendError>(qkv.rows(3 * width).columns([width; 3]))
        };
        let [q, new_keys, new_values] = columns()?;
        for (new, cache, packed) in [
            (new_keys, &mut cache.keys, &mut packed_keys),
            (new_values, &mut cache.values, &mut packed_values),
        ] {
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
            let shape = tokens::CopyShape {
                rows: keys,
                width,
                x_rows: cached,
                y_rows: keys,
            };
            shape.copy(
                device,
                tokens::Copy {
                    x: cache.read(device, 0..cached * width)?.rows(width),
                    from: Some(from.as_input()),
                    to: None,
                    y: packed.reborrow().rows(width),
                },
            )?;
        }
        let shape = attention::Shape {
            sequences: batch.sequences,
            queries: batch.tokens,
            keys,
            heads: attention.heads,
            key_heads: attention.heads,
            width: attention.head_width,
            mask: attention::Mask::Causal,
        };
        let tensors = attention::Forward {
            q,
            k: packed_keys.as_input().rows(width),
            v: packed_values.as_input().rows(width),
            pack: attention::Pack {
                cu_seqlens_q: batch.ints(device, &batch.int.cu_seqlens)?,
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

/// Which rows of the cache the tokens of a batch are, and which they see.
struct Seen {
    /// Row of each token of the batch.
    to: Vec<i32>,
    /// Rows of all cached tokens, sequence by sequence.
    from: Vec<i32>,
    /// Where each sequence begins in `from`.
    cu_seqlens_k: Vec<i32>,
}

impl Seen {
    fn new(cu_seqlens: &[i32], rows: &[usize], prefix: usize, capacity: usize) -> Self {
        let mut seen = Self {
            to: Vec::new(),
            from: Vec::new(),
            cu_seqlens_k: vec![0],
        };
        for (ends, row) in cu_seqlens.windows(2).zip(rows) {
            let first = row * capacity;
            let end = first + prefix + (ends[1] - ends[0]) as usize;
            seen.to.extend((first + prefix..end).map(|row| row as i32));
            seen.from.extend((first..end).map(|row| row as i32));
            seen.cu_seqlens_k.push(seen.from.len() as i32);
        }
        seen
    }
}
