//! Packed attention and the attention-BCE (memory) loss (SPEC section 3).
//!
//! Sequences are packed: `cu_seqlens` holds B+1 offsets into the token axis. No attention matrix
//! is stored: each head of each sequence is done in blocks of query rows, and the backward pass
//! computes the scores again and takes A = exp(S − lse) from the saved log-sum-exp.
//!
//! Saturated rows. 1 − A of the row's largest entry (its *peak*) is never a subtraction from 1: it
//! is the sum of the other entries, so it keeps its digits when A rounds to 1. Likewise the
//! gradient into a row of scores is formed relative to the peak's, see `score_gradient`.

use std::ops::Range;

use ndarray::linalg::general_mat_mul;
use ndarray::{
    ArrayBase, ArrayView1, ArrayView2, ArrayView3, ArrayViewMut1, ArrayViewMut2, ArrayViewMut3,
    Axis, Dimension, RawData, RemoveAxis,
};

use crate::error::{check_offsets, check_shape};
use crate::{Error, Result, Scalar};

/// Query rows of one block. The scratch space is this many rows of the keys that they see, so
/// memory grows with T and not with T².
const BLOCK_ROWS: usize = 64;
/// Partial results of a reduction, enough for the compiler to use the vector unit.
const LANES: usize = 16;
/// Lower limit of each logarithm in the memory loss.
pub const LOG_FLOOR: f64 = -100.0;
/// Lower limit of A(1 − A) in the gradient of the memory loss.
pub(crate) const VARIANCE_FLOOR: f64 = 1e-12;

/// Which keys a query sees inside of its own sequence. With T_q queries and T_k keys, query i
/// stands at key position i + T_k − T_q (aligned at the end).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask<'a> {
    /// Every key (bidirectional).
    None,
    /// Keys at or before the query's position.
    Causal,
    /// The query's own position and the `window − 1` before it.
    SlidingWindow {
        /// Number of visible positions, at least 1.
        window: usize,
    },
    /// Keys of the query's own group and of groups before it.
    GroupedCausal {
        /// Group of every packed key token, not decreasing inside of a sequence.
        groups: &'a [i32],
    },
}

impl Mask<'_> {
    /// Checks the mask against the keys of one sequence.
    fn check(&self, keys: usize) -> Result<()> {
        match *self {
            Mask::None | Mask::Causal => Ok(()),
            Mask::SlidingWindow { window: 0 } => Err(Error::value("window", 0, "at least 1")),
            Mask::SlidingWindow { .. } => Ok(()),
            Mask::GroupedCausal { groups } => {
                check_shape("groups", &[groups.len()], &[keys])?;
                match groups.windows(2).position(|pair| pair[1] < pair[0]) {
                    None => Ok(()),
                    Some(at) => Err(Error::value(
                        "groups",
                        format!("{} after {} at key {}", groups[at + 1], groups[at], at + 1),
                        "groups that do not decrease inside of a sequence",
                    )),
                }
            }
        }
    }

    /// The keys that a query sees: one run for every mask, moving forward with the query.
    fn visible(&self, query: usize, queries: usize, keys: usize) -> Range<usize> {
        let Some(position) = (query + keys).checked_sub(queries) else {
            return match self {
                Mask::None => 0..keys,
                _ => 0..0, // more queries than keys: this one stands before the first key
            };
        };
        match *self {
            Mask::None => 0..keys,
            Mask::Causal => 0..position + 1,
            Mask::SlidingWindow { window } => (position + 1).saturating_sub(window)..position + 1,
            Mask::GroupedCausal { groups } => {
                let own = groups.get(position);
                0..own.map_or(0, |own| groups.partition_point(|group| group <= own))
            }
        }
    }

    /// The mask of one sequence of a pack.
    fn of_sequence(&self, keys: Range<usize>) -> Self {
        match *self {
            Mask::GroupedCausal { groups } => Mask::GroupedCausal {
                groups: groups.get(keys).unwrap_or_default(),
            },
            other => other,
        }
    }
}

/// What the attention-BCE is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Denominator {
    /// Queries of b times keys of b: what the mask hides counts, with A = E = 0.
    #[default]
    Square,
    /// The number of (query, key) pairs that the mask shows (for the causal mask: causal pairs).
    Causal,
}

/// The annotated pairs and the heads that they supervise.
#[derive(Debug, Clone, Copy)]
pub struct Supervision<'a> {
    /// Supervised query heads, from 0, ascending.
    pub heads: &'a [usize],
    /// CSR offsets over packed query tokens [tokens + 1].
    pub pair_offsets: &'a [i32],
    /// Key tokens of each query, relative to the start of the sequence, strictly ascending.
    pub pair_keys: &'a [i32],
    /// For each sequence: 1 takes part, 0 does not.
    pub annotated: &'a [u8],
    /// What the sum is divided by.
    pub denominator: Denominator,
}

/// One packed attention call.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Offsets of the sequences in q and out [B + 1].
    pub cu_seqlens_q: &'a [i32],
    /// Offsets of the sequences in k and v [B + 1]; T_q ≤ T_k for each sequence.
    pub cu_seqlens_k: &'a [i32],
    /// Factor of the scores.
    pub scale: f64,
    /// Which keys a query sees.
    pub mask: Mask<'a>,
    /// The attention-BCE, if this layer is supervised.
    pub supervision: Option<Supervision<'a>>,
}

impl<'a> Attention<'a> {
    /// Checks offsets, mask and pairs against the shapes of q [tokens_q, H, d] and
    /// k [tokens_k, H_kv, d], in O(tokens + pairs).
    pub fn validate(&self, q: &[usize], k: &[usize]) -> Result<()> {
        let &[tokens_q, heads, width] = q else {
            return Err(Error::value(
                "q",
                format!("{q:?}"),
                "[tokens, heads, width]",
            ));
        };
        let &[tokens_k, key_heads, _] = k else {
            return Err(Error::value(
                "k",
                format!("{k:?}"),
                "[tokens, heads, width]",
            ));
        };
        check_shape("k", k, &[tokens_k, key_heads, width])?;
        if heads.checked_rem(key_heads).unwrap_or(heads) != 0 {
            let found = format!("{heads} query heads for {key_heads} key heads");
            return Err(Error::value("q", found, "a multiple of the key heads"));
        }
        check_offsets("cu_seqlens_q", self.cu_seqlens_q, tokens_q)?;
        check_offsets("cu_seqlens_k", self.cu_seqlens_k, tokens_k)?;
        check_shape(
            "cu_seqlens_k",
            &[self.cu_seqlens_k.len()],
            &[self.cu_seqlens_q.len()],
        )?;
        if !self.scale.is_finite() {
            return Err(Error::value("scale", self.scale, "a finite number"));
        }
        if let Mask::GroupedCausal { groups } = self.mask {
            check_shape("groups", &[groups.len()], &[tokens_k])?;
        }
        if let Some(supervision) = &self.supervision {
            supervision.check(heads, tokens_q, self.sequences().count())?;
        }
        for (b, sequence) in self.sequences().enumerate() {
            if sequence.queries.len() > sequence.keys.len() {
                let (queries, keys) = (sequence.queries.len(), sequence.keys.len());
                return Err(Error::value(
                    "cu_seqlens_q",
                    format!("{queries} queries for {keys} keys in sequence {b}"),
                    "at most as many queries as keys",
                ));
            }
            let pairs = self.supervision.map(|s| s.pairs(&sequence.queries));
            self.work(&sequence, pairs)
                .check(sequence.queries.len(), sequence.keys.len())
                .map_err(|error| in_sequence(error, b))?;
        }
        Ok(())
    }

    /// out_i = Σ_j A_ij v_j, lse_i = log Σ_j exp S_ij, and the memory loss (0 without supervision).
    ///
    /// `q` [tokens_q, H, d]; `k`, `v` [tokens_k, H_kv, d] with H a multiple of H_kv (query head h
    /// uses key head h·H_kv/H); `out` [tokens_q, H, d]; `lse` [tokens_q, H].
    /// A query that sees no key gets out = 0 and lse = −∞.
    pub fn forward<T: Scalar>(
        &self,
        q: ArrayView3<T>,
        k: ArrayView3<T>,
        v: ArrayView3<T>,
        mut out: ArrayViewMut3<T>,
        mut lse: ArrayViewMut2<T>,
        scratch: &mut Vec<T>,
    ) -> Result<f64> {
        self.validate(q.shape(), k.shape())?;
        let (tokens, heads, _) = q.dim();
        check_shape("v", v.shape(), k.shape())?;
        check_shape("out", out.shape(), q.shape())?;
        check_shape("lse", lse.shape(), &[tokens, heads])?;

        let mut numerator = 0.0;
        for (b, sequence) in self.sequences().enumerate() {
            for h in 0..heads {
                let g = h * k.dim().1 / heads;
                numerator += self.head(&sequence, b, h).forward(
                    of_head(q.view(), &sequence.queries, h),
                    of_head(k.view(), &sequence.keys, g),
                    of_head(v.view(), &sequence.keys, g),
                    of_head(out.view_mut(), &sequence.queries, h),
                    of_head(lse.view_mut(), &sequence.queries, h),
                    scratch,
                )?;
            }
        }
        Ok(per_pair(numerator, self.denominator()))
    }

    /// Gradients of Σ grad_out·out + grad_memory_loss·memory_loss; dq, dk, dv are overwritten.
    /// `lse` is what [`Attention::forward`] gave for the same inputs.
    pub fn backward<T: Scalar>(
        &self,
        q: ArrayView3<T>,
        k: ArrayView3<T>,
        v: ArrayView3<T>,
        lse: ArrayView2<T>,
        grad_out: ArrayView3<T>,
        grad_memory_loss: f64,
        mut dq: ArrayViewMut3<T>,
        mut dk: ArrayViewMut3<T>,
        mut dv: ArrayViewMut3<T>,
        scratch: &mut Vec<T>,
    ) -> Result<()> {
        self.validate(q.shape(), k.shape())?;
        let (tokens, heads, _) = q.dim();
        check_shape("v", v.shape(), k.shape())?;
        check_shape("lse", lse.shape(), &[tokens, heads])?;
        check_shape("grad_out", grad_out.shape(), q.shape())?;
        check_shape("dq", dq.shape(), q.shape())?;
        check_shape("dk", dk.shape(), k.shape())?;
        check_shape("dv", dv.shape(), k.shape())?;

        dk.fill(T::zero());
        dv.fill(T::zero());
        let pair_gradient = per_pair(grad_memory_loss, self.denominator());
        for (b, sequence) in self.sequences().enumerate() {
            for h in 0..heads {
                let g = h * k.dim().1 / heads;
                self.head(&sequence, b, h).backward(
                    of_head(q.view(), &sequence.queries, h),
                    of_head(k.view(), &sequence.keys, g),
                    of_head(v.view(), &sequence.keys, g),
                    of_head(lse.view(), &sequence.queries, h),
                    of_head(grad_out.view(), &sequence.queries, h),
                    pair_gradient,
                    of_head(dq.view_mut(), &sequence.queries, h),
                    of_head(dk.view_mut(), &sequence.keys, g),
                    of_head(dv.view_mut(), &sequence.keys, g),
                    scratch,
                )?;
            }
        }
        Ok(())
    }

    /// Σ over supervised heads and annotated sequences of den_b, the divisor of the summed loss;
    /// 0 when nothing is annotated.
    pub fn denominator(&self) -> f64 {
        let Some(supervision) = &self.supervision else {
            return 0.0;
        };
        let annotated = self.sequences().zip(supervision.annotated);
        let pairs: f64 = annotated
            .filter(|&(_, &annotated)| annotated != 0)
            .map(
                |(Sequence { queries, keys }, _)| match supervision.denominator {
                    Denominator::Square => queries.len() as f64 * keys.len() as f64,
                    Denominator::Causal => {
                        let mask = self.mask.of_sequence(keys.clone());
                        (0..queries.len())
                            .map(|i| mask.visible(i, queries.len(), keys.len()).len() as f64)
                            .sum()
                    }
                },
            )
            .sum();
        supervision.heads.len() as f64 * pairs
    }

    /// The work of query head `head` in sequence b.
    fn head(&self, sequence: &Sequence, b: usize, head: usize) -> Head<'a> {
        let supervision = self.supervision.filter(|supervision| {
            supervision.annotated.get(b).is_some_and(|&flag| flag != 0)
                && supervision.heads.contains(&head)
        });
        self.work(sequence, supervision.map(|s| s.pairs(&sequence.queries)))
    }

    /// The work of a head of one sequence, supervised by these pairs.
    fn work(&self, sequence: &Sequence, pairs: Option<Pairs<'a>>) -> Head<'a> {
        Head {
            scale: self.scale,
            mask: self.mask.of_sequence(sequence.keys.clone()),
            pairs,
        }
    }

    /// The sequences of the pack; offsets that go back or below 0 make empty ones.
    fn sequences(&self) -> impl Iterator<Item = Sequence> + use<'a> {
        let ranges = |offsets: &'a [i32]| {
            offsets.windows(2).map(|ends| {
                let [start, end] = [ends[0], ends[1]].map(|x| usize::try_from(x).unwrap_or(0));
                start..end.max(start)
            })
        };
        ranges(self.cu_seqlens_q)
            .zip(ranges(self.cu_seqlens_k))
            .map(|(queries, keys)| Sequence { queries, keys })
    }
}

/// The packed tokens of one sequence.
struct Sequence {
    queries: Range<usize>,
    keys: Range<usize>,
}

impl<'a> Supervision<'a> {
    /// Checks everything but the pairs themselves, which [`Pairs::check`] does by sequence.
    fn check(&self, heads: usize, tokens: usize, sequences: usize) -> Result<()> {
        if let Some(&head) = self.heads.iter().find(|&&head| head >= heads) {
            let expected = format!("heads below {heads}");
            return Err(Error::value("supervision.heads", head, expected));
        }
        if !self.heads.is_sorted_by(|a, b| a < b) {
            let found = format!("{:?}", self.heads);
            return Err(Error::value("supervision.heads", found, "ascending heads"));
        }
        check_shape("annotated", &[self.annotated.len()], &[sequences])?;
        if let Some(flag) = self.annotated.iter().find(|&&flag| flag > 1) {
            return Err(Error::value("annotated", flag, "0 or 1"));
        }
        check_shape("pair_offsets", &[self.pair_offsets.len()], &[tokens + 1])?;
        check_offsets("pair_offsets", self.pair_offsets, self.pair_keys.len())
    }

    fn pairs(&self, queries: &Range<usize>) -> Pairs<'a> {
        Pairs {
            offsets: self
                .pair_offsets
                .get(queries.start..queries.end + 1)
                .unwrap_or_default(),
            keys: self.pair_keys,
        }
    }
}

/// Says in which sequence a value was refused.
fn in_sequence(error: Error, sequence: usize) -> Error {
    match error {
        Error::Value {
            argument,
            found,
            expected,
        } => Error::value(argument, format!("{found} (sequence {sequence})"), expected),
        shape => shape,
    }
}

/// A sum over the supervised pairs, divided by their number; nothing annotated: 0.
fn per_pair(sum: f64, denominator: f64) -> f64 {
    if denominator == 0.0 {
        0.0
    } else {
        sum / denominator
    }
}

/// One head of one sequence: the unit of work that a caller can hand to a thread.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// Factor of the scores.
    pub scale: f64,
    /// The mask; `groups` holds this sequence's key tokens only.
    pub mask: Mask<'a>,
    /// The pairs of this sequence's queries, if this head is supervised and the sequence annotated.
    pub pairs: Option<Pairs<'a>>,
}

/// The rows of the CSR that belong to one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Pairs<'a> {
    /// `pair_offsets[first ..= first + T_q]` of the whole CSR (offsets into `keys`, not rebased).
    pub offsets: &'a [i32],
    /// The whole `pair_keys`.
    pub keys: &'a [i32],
}

impl<'a> Pairs<'a> {
    /// The keys of one query; `None` if the offsets do not point into `keys`.
    pub(crate) fn of_query(&self, query: usize) -> Option<&'a [i32]> {
        let start = usize::try_from(*self.offsets.get(query)?).ok()?;
        let end = usize::try_from(*self.offsets.get(query + 1)?).ok()?;
        self.keys.get(start..end)
    }

    /// Each query's keys are ascending and among those that it sees.
    fn check(&self, mask: &Mask, queries: usize, keys: usize) -> Result<()> {
        check_shape("pair_offsets", &[self.offsets.len()], &[queries + 1])?;
        for query in 0..queries {
            let Some(pairs) = self.of_query(query) else {
                return Err(Error::value(
                    "pair_offsets",
                    format!("{:?} at query {query}", &self.offsets[query..query + 2]),
                    format!("ascending offsets up to {}", self.keys.len()),
                ));
            };
            if !pairs.is_sorted_by(|a, b| a < b) {
                return Err(Error::value(
                    "pair_keys",
                    format!("{pairs:?} at query {query}"),
                    "strictly ascending keys",
                ));
            }
            let visible = mask.visible(query, queries, keys);
            let hidden = |&&key: &&i32| !usize::try_from(key).is_ok_and(|k| visible.contains(&k));
            if let Some(key) = pairs.iter().find(hidden) {
                return Err(Error::value(
                    "pair_keys",
                    format!("{key} at query {query}"),
                    format!("a key that the query sees, in {visible:?}"),
                ));
            }
        }
        Ok(())
    }
}

impl<'a> Head<'a> {
    /// Forward of one head: `q [T_q, d]`, `k` and `v [T_k, d]`, `out [T_q, d]`, `lse [T_q]`.
    /// Returns the numerator of the memory loss, −Σ (E log A + (1−E) log(1−A)) over the visible
    /// keys, 0 without pairs.
    pub fn forward<T: Scalar>(
        &self,
        q: ArrayView2<T>,
        k: ArrayView2<T>,
        v: ArrayView2<T>,
        mut out: ArrayViewMut2<T>,
        mut lse: ArrayViewMut1<T>,
        scratch: &mut Vec<T>,
    ) -> Result<f64> {
        let ((queries, width), keys) = (q.dim(), k.nrows());
        self.check(queries, keys)?;
        check_shape("k", k.shape(), &[keys, width])?;
        check_shape("v", v.shape(), k.shape())?;
        check_shape("out", out.shape(), q.shape())?;
        check_shape("lse", lse.shape(), &[queries])?;

        let mut loss = 0.0;
        for block in self.blocks(queries, keys) {
            let (height, columns) = (block.rows.len(), block.keys.len());
            let (weights, logits) = split_scratch(scratch, [height * columns, columns]);
            self.scores(&block, &q, &k, weights);
            run(lse.view_mut(), &block.rows).fill(T::neg_infinity());
            for (i, row) in block.rows.clone().zip(rows(weights, columns)) {
                let visible = self.mask.visible(i, queries, keys);
                let Some((row, first)) = block.show(row, visible) else {
                    continue;
                };
                let pairs = self.pairs.and_then(|pairs| pairs.of_query(i));
                if pairs.is_some() {
                    logits[..row.len()].copy_from_slice(row);
                }
                let softmax = softmax(row);
                lse[i] = softmax.maximum + softmax.rest.ln_1p();
                if let Some(pairs) = pairs {
                    loss += row_loss(&logits[..row.len()], row, &softmax, first, pairs);
                }
            }
            general_mat_mul(
                T::one(),
                &matrix(weights, (height, columns)),
                &run(v.view(), &block.keys),
                T::zero(),
                &mut run(out.view_mut(), &block.rows),
            );
        }
        Ok(loss)
    }

    /// Backward of one head. `pair_gradient` is c = grad_memory_loss/(heads·Σ den). `dq` is
    /// overwritten, `dk` and `dv` are added to (several query heads may share a key head).
    pub fn backward<T: Scalar>(
        &self,
        q: ArrayView2<T>,
        k: ArrayView2<T>,
        v: ArrayView2<T>,
        lse: ArrayView1<T>,
        grad_out: ArrayView2<T>,
        pair_gradient: f64,
        mut dq: ArrayViewMut2<T>,
        mut dk: ArrayViewMut2<T>,
        mut dv: ArrayViewMut2<T>,
        scratch: &mut Vec<T>,
    ) -> Result<()> {
        let ((queries, width), keys) = (q.dim(), k.nrows());
        self.check(queries, keys)?;
        check_shape("k", k.shape(), &[keys, width])?;
        check_shape("v", v.shape(), k.shape())?;
        check_shape("lse", lse.shape(), &[queries])?;
        check_shape("grad_out", grad_out.shape(), q.shape())?;
        check_shape("dq", dq.shape(), q.shape())?;
        check_shape("dk", dk.shape(), k.shape())?;
        check_shape("dv", dv.shape(), k.shape())?;

        let (one, scale) = (T::one(), T::from_f64(self.scale));
        let pair_gradient = T::from_f64(pair_gradient);
        for block in self.blocks(queries, keys) {
            let (height, columns) = (block.rows.len(), block.keys.len());
            let area = height * columns;
            let (weights, gradients) = split_scratch(scratch, [area, area]);
            let query = run(q.view(), &block.rows);
            let key = run(k.view(), &block.keys);
            let grad = run(grad_out.view(), &block.rows);

            self.scores(&block, &q, &k, weights);
            general_mat_mul(
                one,
                &grad,
                &run(v.view(), &block.keys).t(),
                T::zero(),
                &mut matrix_mut(gradients, (height, columns)),
            );
            let both = rows(weights, columns).zip(rows(gradients, columns));
            for (i, (weights, gradients)) in block.rows.clone().zip(both) {
                let visible = self.mask.visible(i, queries, keys);
                let (Some((weights, first)), Some((gradients, _))) = (
                    block.show(weights, visible.clone()),
                    block.show(gradients, visible),
                ) else {
                    continue;
                };
                weights.iter_mut().for_each(|x| *x = (*x - lse[i]).exp());
                let peak = peak(weights);
                if let Some(pairs) = self.pairs.and_then(|pairs| pairs.of_query(i)) {
                    add_loss_gradient(weights, peak, first, pairs, pair_gradient, gradients);
                }
                score_gradient(weights, peak, gradients);
            }
            let weights = matrix(weights, (height, columns));
            let gradients = matrix(gradients, (height, columns));
            let mut dv = run(dv.view_mut(), &block.keys);
            let mut dk = run(dk.view_mut(), &block.keys);
            let mut dq = run(dq.view_mut(), &block.rows);
            general_mat_mul(one, &weights.t(), &grad, one, &mut dv);
            general_mat_mul(scale, &gradients.t(), &query, one, &mut dk);
            general_mat_mul(scale, &gradients, &key, T::zero(), &mut dq);
        }
        Ok(())
    }

    fn check(&self, queries: usize, keys: usize) -> Result<()> {
        self.mask.check(keys)?;
        match &self.pairs {
            Some(pairs) => pairs.check(&self.mask, queries, keys),
            None => Ok(()),
        }
    }

    /// Runs of query rows, each with the keys that any of them sees.
    fn blocks(&self, queries: usize, keys: usize) -> impl Iterator<Item = Block> + use<'a> {
        let mask = self.mask;
        (0..queries).step_by(BLOCK_ROWS).map(move |start| {
            let end = (start + BLOCK_ROWS).min(queries);
            let last = mask.visible(end - 1, queries, keys);
            let first = mask.visible(start, queries, keys);
            Block {
                rows: start..end,
                keys: first.start..last.end,
            }
        })
    }

    /// S = scale·Q·Kᵀ of one block.
    fn scores<T: Scalar>(
        &self,
        block: &Block,
        q: &ArrayView2<T>,
        k: &ArrayView2<T>,
        scores: &mut [T],
    ) {
        general_mat_mul(
            T::from_f64(self.scale),
            &run(q.view(), &block.rows),
            &run(k.view(), &block.keys).t(),
            T::zero(),
            &mut matrix_mut(scores, (block.rows.len(), block.keys.len())),
        );
    }
}

/// Query rows that are done together, and the keys that they see.
struct Block {
    rows: Range<usize>,
    keys: Range<usize>,
}

impl Block {
    /// The visible part of a row and its first key. The hidden part becomes 0, so that it adds
    /// nothing to the products. `None`: the query sees no key.
    fn show<'r, T: Scalar>(
        &self,
        row: &'r mut [T],
        visible: Range<usize>,
    ) -> Option<(&'r mut [T], usize)> {
        if visible.is_empty() {
            row.fill(T::zero());
            return None;
        }
        let (start, end) = (
            visible.start - self.keys.start,
            visible.end - self.keys.start,
        );
        row[..start].fill(T::zero());
        row[end..].fill(T::zero());
        Some((&mut row[start..end], visible.start))
    }
}

/// A run of rows of a view.
fn run<S: RawData, D: Dimension>(
    mut view: ArrayBase<S, D>,
    rows: &Range<usize>,
) -> ArrayBase<S, D> {
    view.slice_axis_inplace(Axis(0), rows.clone().into());
    view
}

/// One head of one sequence, from a view whose axes are token, head, and what each head has.
fn of_head<S: RawData, D: RemoveAxis>(
    view: ArrayBase<S, D>,
    tokens: &Range<usize>,
    head: usize,
) -> ArrayBase<S, D::Smaller> {
    run(view, tokens).index_axis_move(Axis(1), head)
}

/// Two pieces of the scratch space, which grows when it is too small and never shrinks.
fn split_scratch<T: Scalar>(
    scratch: &mut Vec<T>,
    [first, second]: [usize; 2],
) -> (&mut [T], &mut [T]) {
    if scratch.len() < first + second {
        scratch.resize(first + second, T::zero());
    }
    scratch[..first + second].split_at_mut(first)
}

/// The rows of a row-major matrix; none if it has no columns.
fn rows<T>(entries: &mut [T], columns: usize) -> impl Iterator<Item = &mut [T]> {
    entries.chunks_exact_mut(columns.max(1))
}

fn matrix<T>(entries: &[T], shape: (usize, usize)) -> ArrayView2<'_, T> {
    ArrayView2::from_shape(shape, entries).expect("scratch of this shape's size")
}

fn matrix_mut<T>(entries: &mut [T], shape: (usize, usize)) -> ArrayViewMut2<'_, T> {
    ArrayViewMut2::from_shape(shape, entries).expect("scratch of this shape's size")
}

/// What a row of scores leaves behind when its softmax takes its place.
struct Softmax<T> {
    /// The largest score.
    maximum: T,
    /// Where it stands.
    peak: usize,
    /// Σ exp(S − maximum) over the other keys, so lse = maximum + ln(1 + rest).
    rest: T,
}

/// Replaces the scores of a row, at least one, by their softmax.
fn softmax<T: Scalar>(row: &mut [T]) -> Softmax<T> {
    let peak = peak(row);
    let maximum = row[peak];
    row.iter_mut().for_each(|x| *x = (*x - maximum).exp());
    let rest = sum_without(row, peak);
    let factor = (T::one() + rest).recip();
    row.iter_mut().for_each(|x| *x *= factor);
    Softmax {
        maximum,
        peak,
        rest,
    }
}

/// −Σ_j (E log A + (1 − E) log(1 − A)) of one row in f64, from its scores, their softmax and the
/// pairs; `first` is the key of the row's first entry.
fn row_loss<T: Scalar>(
    scores: &[T],
    weights: &[T],
    softmax: &Softmax<T>,
    first: usize,
    pairs: &[i32],
) -> f64 {
    let floored = |log: f64| log.clamp(LOG_FLOOR, 0.0); // unlike max, this lets a NaN through
    let log_sum = softmax.rest.to_f64().ln_1p();
    let mut loss = 0.0;
    // 1 − Π (1 − A) over the keys that are neither paired nor the peak: A ≤ 1/2 there and the
    // product is at least about 1/e, so one logarithm does for all of them.
    let mut complement = 0.0;
    let mut pairs = pairs.iter().peekable();
    for (j, (&score, &weight)) in scores.iter().zip(weights).enumerate() {
        if pairs.next_if(|&&key| key as usize == first + j).is_some() {
            loss -= floored((score - softmax.maximum).to_f64() - log_sum);
        } else if j == softmax.peak {
            loss -= floored(softmax.rest.to_f64().ln() - log_sum);
        } else {
            complement += weight.to_f64() * (1.0 - complement);
        }
    }
    loss - (-complement).ln_1p()
}

/// Adds g_ij = c(A − E)/max(A(1 − A), floor) of one row to ∂L/∂A.
fn add_loss_gradient<T: Scalar>(
    weights: &mut [T],
    peak: usize,
    first: usize,
    pairs: &[i32],
    c: T,
    gradients: &mut [T],
) {
    let floor = T::from_f64(VARIANCE_FLOOR);
    let rest = sum_without(weights, peak);
    let mut pairs = pairs.iter().peekable();
    for (j, (&a, gradient)) in weights.iter().zip(gradients).enumerate() {
        let complement = if j == peak { rest } else { T::one() - a };
        let difference = match pairs.next_if(|&&key| key as usize == first + j) {
            Some(_) => -complement,
            None => a,
        };
        *gradient += c * difference / (a * complement).max(floor);
    }
}

/// dS_j = A_j (t_j − Σ_k A_k t_k) in place of t = ∂L/∂A (SPEC's Δ and r are the two parts of the
/// sum). Subtracting the peak's t from all changes nothing but takes the peak out of the sum: a
/// saturated row has no cancellation, and a row of one key gets exactly 0.
fn score_gradient<T: Scalar>(weights: &[T], peak: usize, gradients: &mut [T]) {
    let reference = gradients[peak];
    for (gradient, &a) in gradients.iter_mut().zip(weights) {
        *gradient = a * (*gradient - reference);
    }
    let total = reduce(gradients, T::zero(), |sum, x| sum + x);
    for (gradient, &a) in gradients.iter_mut().zip(weights) {
        *gradient -= a * total;
    }
}

/// Where the largest entry of a row stands, the first of equals.
fn peak<T: Scalar>(row: &[T]) -> usize {
    let larger = |a: T, b: T| if b > a { b } else { a };
    let maximum = reduce(row, row[0], larger);
    row.iter().position(|&x| x == maximum).unwrap_or(0)
}

/// The sum of a row without the entry at `peak`.
fn sum_without<T: Scalar>(row: &mut [T], peak: usize) -> T {
    let entry = std::mem::replace(&mut row[peak], T::zero());
    let sum = reduce(row, T::zero(), |sum, x| sum + x);
    row[peak] = entry;
    sum
}

/// Combines the entries of a row with `start`, which `join` must leave unchanged, in [`LANES`]
/// parts.
fn reduce<T: Scalar>(row: &[T], start: T, join: impl Fn(T, T) -> T) -> T {
    let mut lanes = [start; LANES];
    let chunks = row.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = join(*lane, x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane = join(*lane, x);
    }
    lanes.into_iter().fold(start, join)
}
