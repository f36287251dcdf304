//! Packed attention on the CPU: one task per head of each sequence.

use dtmem_reference as reference;
use dtmem_reference::Scalar;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};

use super::Cpu;
use super::views::{front_mut, matrix, matrix_mut, named, part_mut};
use crate::backend::{
    Attention, AttentionOps, BackendError, Buffers, Extent, KeyValueCache, Kind, METRICS, Metric,
    Result, Span,
};
use crate::batch::{Acting, PackedBatch};

/// Sequences `first ..` of an attention call with the rows and heads that belong to them; halved
/// until one head of one sequence is left.
pub(super) struct HeadTask<'a> {
    offsets: &'a [i32],
    /// Number of the first sequence in the batch.
    sequence: usize,
    /// Number of the first head.
    head: usize,
    heads: usize,
    head_width: usize,
}

impl<'a> HeadTask<'a> {
    fn sequences(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Halves the sequences; the row at which the second half starts.
    fn halve_sequences(&self) -> (Self, Self, usize) {
        let middle = self.sequences() / 2;
        let row = self.offsets[middle] - self.offsets[0];
        let left = HeadTask {
            offsets: &self.offsets[..=middle],
            ..*self
        };
        let right = HeadTask {
            offsets: &self.offsets[middle..],
            sequence: self.sequence + middle,
            ..*self
        };
        (left, right, row as usize)
    }

    /// Halves the heads; the head at which the second half starts.
    fn halve_heads(&self) -> (Self, Self, usize) {
        let middle = self.heads / 2;
        let left = HeadTask {
            heads: middle,
            ..*self
        };
        let right = HeadTask {
            head: self.head + middle,
            heads: self.heads - middle,
            ..*self
        };
        (left, right, middle)
    }
}

/// Keys and values of earlier tokens, and where they stand.
#[derive(Clone, Copy)]
pub(super) struct Cached<'a, T> {
    pub(super) cache: &'a KeyValueCache<Vec<T>>,
    pub(super) acting: &'a Acting,
}

/// What all heads of one attention call share.
pub(super) struct Heads<'a, T> {
    backend: &'a Cpu<T>,
    attention: &'a Attention,
    batch: &'a PackedBatch,
    q: ArrayView2<'a, T>,
    k: ArrayView2<'a, T>,
    v: ArrayView2<'a, T>,
    cached: Option<Cached<'a, T>>,
}

impl<'a, T: Scalar> Heads<'a, T> {
    pub(super) fn new(
        backend: &'a Cpu<T>,
        attention: &'a Attention,
        batch: &'a PackedBatch,
        qkv: &'a [T],
    ) -> Result<Self> {
        let width = attention.width();
        let qkv = matrix("attention", qkv, batch.tokens(), 3 * width)?;
        let (q, rest) = qkv.split_at(Axis(1), width);
        let (k, v) = rest.split_at(Axis(1), width);
        Ok(Self {
            backend,
            attention,
            batch,
            q,
            k,
            v,
            cached: None,
        })
    }

    /// The same with the keys and values of a cache, which hold the batch's own already.
    pub(super) fn with_cache(self, cached: Cached<'a, T>) -> Self {
        Self {
            cached: Some(cached),
            ..self
        }
    }

    /// Keys and values of the batch [tokens, width].
    pub(super) fn keys_and_values(&self) -> [ArrayView2<'a, T>; 2] {
        [self.k, self.v]
    }

    /// Checks offsets and pairs of the whole batch.
    pub(super) fn check(&self) -> Result<()> {
        let offsets = self.offsets();
        let call = reference::attention::Attention {
            cu_seqlens_q: offsets,
            cu_seqlens_k: offsets,
            scale: self.attention.scale(),
            mask: Attention::MASK,
            supervision: self.attention.supervised.as_ref().map(|supervised| {
                reference::attention::Supervision {
                    heads: &supervised.heads,
                    pair_offsets: &self.batch.pair_offsets,
                    pair_keys: &self.batch.pair_keys,
                    annotated: &self.batch.annotated,
                    denominator: supervised.denominator,
                }
            }),
        };
        let shape = [
            self.batch.tokens(),
            self.attention.heads,
            self.attention.head_width,
        ];
        named("attention", call.validate(&shape, &shape))
    }

    fn offsets(&self) -> &'a [i32] {
        match self.attention.extent {
            Extent::Segment if self.cached.is_none() => &self.batch.segment_offsets,
            _ => &self.batch.cu_seqlens,
        }
    }

    pub(super) fn task(&self) -> HeadTask<'a> {
        HeadTask {
            offsets: self.offsets(),
            sequence: 0,
            head: 0,
            heads: self.attention.heads,
            head_width: self.attention.head_width,
        }
    }

    /// q, k, v and the head's description for a task that is down to one head of one sequence.
    fn unit(
        &self,
        task: &HeadTask,
    ) -> Result<(reference::attention::Head<'a>, [ArrayView2<'a, T>; 3])> {
        let rows = task.offsets[0] as usize..task.offsets[1] as usize;
        let columns = task.head * task.head_width..(task.head + 1) * task.head_width;
        let supervised = self
            .attention
            .supervised
            .as_ref()
            .is_some_and(|supervised| {
                supervised.heads.contains(&task.head) && self.batch.annotated[task.sequence] != 0
            });
        let head = reference::attention::Head {
            scale: self.attention.scale(),
            mask: Attention::MASK,
            pairs: supervised.then(|| reference::attention::Pairs {
                offsets: &self.batch.pair_offsets[rows.start..=rows.end],
                keys: &self.batch.pair_keys,
            }),
        };
        let view = |x: ArrayView2<'a, T>| x.slice_move(s![rows.clone(), columns.clone()]);
        let [k, v] = match self.cached {
            None => [view(self.k), view(self.v)],
            Some(Cached { cache, acting }) => {
                let width = self.attention.width();
                let first = acting.episodes[task.sequence] * acting.capacity * width;
                let tokens = acting.prefix + rows.len();
                let view = |buffer: &'a [T]| {
                    let all = matrix("attention", &buffer[first..], tokens, width)?;
                    Ok::<_, BackendError>(all.slice_move(s![.., columns.clone()]))
                };
                [view(&cache.keys)?, view(&cache.values)?]
            }
        };
        Ok((head, [view(self.q), k, v]))
    }

    /// Returns the numerator of the memory loss of the task's heads.
    pub(super) fn forward(
        &self,
        task: HeadTask,
        out: ArrayViewMut2<T>,
        lse: ArrayViewMut2<T>,
    ) -> Result<f64> {
        if task.sequences() == 0 || task.heads == 0 {
            return Ok(0.0);
        }
        let (left, right) = if task.sequences() > 1 {
            let (left, right, row) = task.halve_sequences();
            let (out_left, out_right) = out.split_at(Axis(0), row);
            let (lse_left, lse_right) = lse.split_at(Axis(0), row);
            rayon::join(
                || self.forward(left, out_left, lse_left),
                || self.forward(right, out_right, lse_right),
            )
        } else if task.heads > 1 {
            let (left, right, head) = task.halve_heads();
            let (out_left, out_right) = out.split_at(Axis(1), head * task.head_width);
            let (lse_left, lse_right) = lse.split_at(Axis(1), head);
            rayon::join(
                || self.forward(left, out_left, lse_left),
                || self.forward(right, out_right, lse_right),
            )
        } else {
            let (head, [q, k, v]) = self.unit(&task)?;
            let lse = lse.index_axis_move(Axis(1), 0);
            let numerator = head.forward(q, k, v, out, lse, &mut self.backend.scratch());
            return named("attention", numerator);
        };
        Ok(left? + right?)
    }

    pub(super) fn backward(
        &self,
        task: HeadTask,
        saved: HeadSaved<T>,
        gradients: HeadGradients<T>,
    ) -> Result<()> {
        if task.sequences() == 0 || task.heads == 0 {
            return Ok(());
        }
        if task.sequences() > 1 || task.heads > 1 {
            let ((left, right, at), axis) = if task.sequences() > 1 {
                (task.halve_sequences(), Axis(0))
            } else {
                (task.halve_heads(), Axis(1))
            };
            let (saved_left, saved_right) = saved.split(axis, at, task.head_width);
            let (gradients_left, gradients_right) = gradients.split(axis, at, task.head_width);
            let (left, right) = rayon::join(
                || self.backward(left, saved_left, gradients_left),
                || self.backward(right, saved_right, gradients_right),
            );
            return left.and(right);
        }
        let (head, [q, k, v]) = self.unit(&task)?;
        let HeadGradients {
            q: dq,
            k: mut dk,
            v: mut dv,
        } = gradients;
        dk.fill(T::zero());
        dv.fill(T::zero());
        let gradients = head.backward(
            q,
            k,
            v,
            saved.lse.index_axis_move(Axis(1), 0),
            saved.grad_out,
            saved.pair_gradient,
            dq,
            dk,
            dv,
            &mut self.backend.scratch(),
        );
        named("attention_backward", gradients)
    }
}

/// What the backward pass of some heads reads.
pub(super) struct HeadSaved<'a, T> {
    pub(super) lse: ArrayView2<'a, T>,
    pub(super) grad_out: ArrayView2<'a, T>,
    /// c = λ / (heads·Σ den).
    pub(super) pair_gradient: f64,
}

impl<'a, T> HeadSaved<'a, T> {
    fn split(self, axis: Axis, at: usize, head_width: usize) -> (Self, Self) {
        let column = if axis == Axis(0) { at } else { at * head_width };
        let (lse, lse_right) = self.lse.split_at(axis, at);
        let (grad_out, grad_out_right) = self.grad_out.split_at(axis, column);
        (
            Self {
                lse,
                grad_out,
                ..self
            },
            Self {
                lse: lse_right,
                grad_out: grad_out_right,
                ..self
            },
        )
    }
}

/// What the backward pass of some heads writes.
pub(super) struct HeadGradients<'a, T> {
    pub(super) q: ArrayViewMut2<'a, T>,
    pub(super) k: ArrayViewMut2<'a, T>,
    pub(super) v: ArrayViewMut2<'a, T>,
}

impl<T> HeadGradients<'_, T> {
    fn split(self, axis: Axis, at: usize, head_width: usize) -> (Self, Self) {
        let at = if axis == Axis(0) { at } else { at * head_width };
        let (q, q_right) = self.q.split_at(axis, at);
        let (k, k_right) = self.k.split_at(axis, at);
        let (v, v_right) = self.v.split_at(axis, at);
        (
            Self { q, k, v },
            Self {
                q: q_right,
                k: k_right,
                v: v_right,
            },
        )
    }
}

impl<T: Scalar> AttentionOps for Cpu<T> {
    /// The log-sum-exp [tokens, heads].
    type AttentionState = Vec<T>;

    fn attention_state(&self, attention: &Attention, tokens: usize) -> Result<Vec<T>> {
        self.buffer(tokens * attention.heads, Kind::Exact)
    }

    fn log_sum_exp<'a>(&self, state: &'a Vec<T>) -> &'a Vec<T> {
        state
    }

    fn attention(
        &self,
        batch: &PackedBatch,
        attention: &Attention,
        qkv: &Vec<T>,
        out: &mut Vec<T>,
        lse: &mut Vec<T>,
        metrics: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "attention";
        let heads = Heads::new(self, attention, batch, qkv)?;
        heads.check()?;
        let out = matrix_mut(NAME, out, batch.tokens(), attention.width())?;
        let lse = matrix_mut(NAME, lse, batch.tokens(), attention.heads)?;
        let numerator = heads.forward(heads.task(), out, lse)?;
        if attention.supervised.is_some() {
            let metrics = front_mut(NAME, metrics, METRICS)?;
            metrics[Metric::MemoryLoss as usize] = T::from_f64(numerator);
        }
        Ok(())
    }

    fn attention_backward(
        &self,
        batch: &PackedBatch,
        attention: &Attention,
        qkv: &Vec<T>,
        _out: &Vec<T>,
        lse: &Vec<T>,
        grad_out: &Vec<T>,
        grad_qkv: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "attention_backward";
        let (tokens, width) = (batch.tokens(), attention.width());
        let heads = Heads::new(self, attention, batch, qkv)?;
        heads.check()?;
        let saved = HeadSaved {
            lse: matrix(NAME, lse, tokens, attention.heads)?,
            grad_out: matrix(NAME, grad_out, tokens, width)?,
            pair_gradient: batch.training.weights.pair,
        };
        let (q, rest) = matrix_mut(NAME, grad_qkv, tokens, 3 * width)?.split_at(Axis(1), width);
        let (k, v) = rest.split_at(Axis(1), width);
        heads.backward(heads.task(), saved, HeadGradients { q, k, v })
    }

    fn attention_cached(
        &self,
        batch: &PackedBatch,
        attention: &Attention,
        qkv: &Vec<T>,
        cache: &mut KeyValueCache<Vec<T>>,
        out: &mut Vec<T>,
        lse: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "attention_cached";
        let width = attention.width();
        let heads = Heads::new(self, attention, batch, qkv)?;
        let acting = batch.acting.as_ref().ok_or(BackendError::NotActing)?;
        let &Acting {
            prefix, capacity, ..
        } = acting;
        for (sequence, &row) in acting.episodes.iter().enumerate() {
            let [first, end] = [0, 1].map(|next| batch.cu_seqlens[sequence + next] as usize);
            let span = Span {
                offset: (row * capacity + prefix) * width,
                len: (end - first) * width,
            };
            let [keys, values] = heads.keys_and_values();
            for (source, target) in [(keys, &mut cache.keys), (values, &mut cache.values)] {
                let target = part_mut(NAME, target, span)?;
                matrix_mut(NAME, target, end - first, width)?
                    .assign(&source.slice(s![first..end, ..]));
            }
        }
        let heads = heads.with_cache(Cached { cache, acting });
        let out = matrix_mut(NAME, out, batch.tokens(), width)?;
        let lse = matrix_mut(NAME, lse, batch.tokens(), attention.heads)?;
        heads.forward(heads.task(), out, lse)?;
        Ok(())
    }
}
