//! Attention: packed, and with a cache of keys and values that is read where it stands.

use std::ops::Range;

use super::Gpu;
use super::batch::Batch;
use super::buffers::Buffer;
use super::device::{Compute, Device};
use crate::backend::{
    Attention, AttentionOps, BackendError, Extent, KeyValueCache, Kind, Metric, Result, Supervised,
    range,
};
use crate::ops::{attention, tokens};

/// What attention keeps for its backward pass.
#[derive(Debug)]
pub struct AttentionState<D: Device, T: Compute> {
    /// [tokens, heads]
    lse: Buffer<D, T>,
    supervised: Option<SupervisedState<D>>,
}

/// The same for the supervised heads, S of them.
#[derive(Debug)]
struct SupervisedState<D: Device> {
    /// \[heads\]
    slots: D::Memory<i32>,
    /// [tokens, S]
    peak: D::Memory<i32>,
    /// [3, tokens, S]: shift, value at the peak, loss of the row.
    rows: D::Memory<f32>,
    /// The loss and its factor, which a part of a batch has no use for.
    loss: D::Memory<f32>,
}

impl<D: Device, T: Compute> AttentionOps for Gpu<D, T> {
    type AttentionState = AttentionState<D, T>;

    fn attention_state(
        &self,
        attention: &Attention,
        tokens: usize,
    ) -> Result<Self::AttentionState> {
        let supervised = match &attention.supervised {
            Some(supervised) => {
                let rows = tokens * supervised.heads.len();
                let shape = attention::Shape {
                    sequences: 1,
                    queries: tokens,
                    keys: tokens,
                    heads: attention.heads,
                    key_heads: attention.heads,
                    width: attention.head_width,
                    mask: attention::Mask::Causal,
                };
                let mut slots = self.allocate(attention.heads)?;
                if self.device.len(&slots) == attention.heads {
                    let places = shape.slots(&supervised.heads);
                    self.device.upload(&places, &mut slots, 0)?;
                }
                Some(SupervisedState {
                    slots,
                    peak: self.allocate(rows)?,
                    rows: self.allocate(3 * rows)?,
                    loss: self.allocate(2)?,
                })
            }
            None => None,
        };
        Ok(AttentionState {
            lse: Buffer::new(self, tokens * attention.heads, Kind::Exact)?,
            supervised,
        })
    }

    fn log_sum_exp<'a>(&self, state: &'a Self::AttentionState) -> &'a Self::Buffer {
        &state.lse
    }

    fn attention(
        &self,
        batch: &Self::Batch,
        attention: &Attention,
        qkv: &Self::Buffer,
        out: &mut Self::Buffer,
        state: &mut Self::AttentionState,
        metrics: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("attention");
        let device = &self.device;
        let shape = self.attention_shape(batch, attention);
        let width = attention.width();
        let qkv = qkv.read(device, 0..batch.tokens * 3 * width)?;
        let [q, k, v] = qkv.rows(3 * width).columns([width; 3]);
        let memory_loss = match (&attention.supervised, &mut state.supervised) {
            (Some(supervised), Some(state)) => {
                let rows = batch.tokens * supervised.heads.len();
                let [shift, at_peak, row_loss] = device
                    .output(&mut state.rows, 0..3 * rows)?
                    .parts([0, 1, 2].map(|part| third(part, rows)))?;
                let [loss, factor] = device.output(&mut state.loss, 0..2)?.parts([0..1, 1..2])?;
                let sum = Metric::MemoryLoss as usize;
                Some(attention::MemoryLoss {
                    supervision: self.supervision(batch, supervised, &state.slots)?,
                    denominator: supervised.denominator,
                    sum: metrics.write_exact(device, sum..sum + 1)?,
                    loss,
                    factor,
                    peak: device.output(&mut state.peak, 0..rows)?,
                    shift,
                    at_peak,
                    row_loss,
                })
            }
            _ => None,
        };
        let tensors = attention::Forward {
            q,
            k,
            v,
            pack: self.pack(batch, attention)?,
            scale: attention.scale() as f32,
            out: out.write(device, 0..batch.tokens * width)?.rows(width),
            lse: state
                .lse
                .write_exact(device, 0..batch.tokens * attention.heads)?,
            memory_loss,
        };
        Ok(shape.forward_by(self.version, device, tensors)?)
    }

    fn attention_backward(
        &self,
        batch: &Self::Batch,
        attention: &Attention,
        qkv: &Self::Buffer,
        out: &Self::Buffer,
        state: &Self::AttentionState,
        grad_out: &Self::Buffer,
        grad_qkv: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("attention_backward");
        let device = &self.device;
        let shape = self.attention_shape(batch, attention);
        let width = attention.width();
        let qkv = qkv.read(device, 0..batch.tokens * 3 * width)?;
        let [q, k, v] = qkv.rows(3 * width).columns([width; 3]);
        let memory_loss = match (&attention.supervised, &state.supervised) {
            (Some(supervised), Some(state)) => {
                let rows = batch.tokens * supervised.heads.len();
                let [_, grad_loss] = batch.weights(device)?;
                Some(attention::MemoryLossGradient {
                    supervision: self.supervision(batch, supervised, &state.slots)?,
                    // The weight in the batch has the divisor in it.
                    grad_loss,
                    factor: batch.floats(device, &batch.float.one)?,
                    peak: device.input(&state.peak, 0..rows)?,
                    shift: device.input(&state.rows, third(0, rows))?,
                    at_peak: device.input(&state.rows, third(1, rows))?,
                })
            }
            _ => None,
        };
        let [dq, dk, dv] = grad_qkv
            .write(device, 0..batch.tokens * 3 * width)?
            .rows(3 * width)
            .columns([width; 3]);
        let mut workspace = self.floats.lock(device, shape.workspace()?)?;
        let tensors = attention::Backward {
            q,
            k,
            v,
            pack: self.pack(batch, attention)?,
            scale: attention.scale() as f32,
            out: out.read(device, 0..batch.tokens * width)?.rows(width),
            lse: state
                .lse
                .read_exact(device, 0..batch.tokens * attention.heads)?,
            grad_out: grad_out.read(device, 0..batch.tokens * width)?.rows(width),
            memory_loss,
            dq,
            dk,
            dv,
            workspace: workspace.output(device)?,
        };
        Ok(shape.backward_by(self.version, device, tensors)?)
    }

    fn attention_cached(
        &self,
        batch: &Self::Batch,
        attention: &Attention,
        qkv: &Self::Buffer,
        cache: &mut KeyValueCache<Self::Buffer>,
        out: &mut Self::Buffer,
        state: &mut Self::AttentionState,
    ) -> Result<()> {
        let _range = range("attention_cached");
        let device = &self.device;
        let width = attention.width();
        let acting = batch.acting()?;
        let cached = acting.cached;
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
                    to: Some(batch.ints(device, &acting.to)?),
                    y: cache.write(device, 0..cached * width)?.rows(width),
                },
            )?;
        }
        let shape = attention::Shape {
            sequences: acting.cu_seqlens_q.len() - 1,
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
                cu_seqlens_q: batch.ints(device, &acting.cu_seqlens_q)?,
                cu_seqlens_k: batch.ints(device, &acting.cu_seqlens_k)?,
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

impl<D: Device, T: Compute> Gpu<D, T> {
    fn attention_shape(&self, batch: &Batch<D, T>, attention: &Attention) -> attention::Shape {
        attention::Shape {
            sequences: match attention.extent {
                Extent::Sequence => batch.sequences,
                Extent::Segment => batch.segments,
            },
            queries: batch.tokens,
            keys: batch.tokens,
            heads: attention.heads,
            key_heads: attention.heads,
            width: attention.head_width,
            mask: attention::Mask::Causal,
        }
    }

    fn pack<'a>(
        &'a self,
        batch: &'a Batch<D, T>,
        attention: &Attention,
    ) -> Result<attention::Pack<'a>> {
        let at = match attention.extent {
            Extent::Sequence => &batch.int.cu_seqlens,
            Extent::Segment => &batch.int.segment_offsets,
        };
        Ok(attention::Pack {
            cu_seqlens_q: batch.ints(&self.device, at)?,
            cu_seqlens_k: batch.ints(&self.device, at)?,
            groups: None,
        })
    }

    fn supervision<'a>(
        &'a self,
        batch: &'a Batch<D, T>,
        supervised: &Supervised,
        state: &'a D::Memory<i32>,
    ) -> Result<attention::Supervision<'a>> {
        let device = &self.device;
        Ok(attention::Supervision {
            heads: supervised.heads.len(),
            slots: device.input(state, 0..device.len(state))?,
            annotated: batch.bytes(device, &batch.byte.annotated)?,
            pair_offsets: batch.ints(device, &batch.int.pair_offsets)?,
            pair_keys: batch.pair_keys(device)?,
        })
    }
}

/// The `part`th of three arrays of `len` elements.
fn third(part: usize, len: usize) -> Range<usize> {
    part * len..(part + 1) * len
}
