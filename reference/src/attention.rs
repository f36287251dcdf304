//! Packed attention and the attention-BCE (memory) loss (SPEC section 3).
//!
//! Sequences are packed: `cu_seqlens` holds B+1 offsets into the token axis. No attention matrix
//! is stored: each head of each sequence is done in blocks of query rows, and the backward pass
//! computes the scores again from the saved log-sum-exp.

use ndarray::{ArrayView1, ArrayView2, ArrayView3, ArrayViewMut1, ArrayViewMut2, ArrayViewMut3};

use crate::{Result, Scalar};

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

/// What the attention-BCE is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Denominator {
    /// (tokens of b)²: the upper triangle counts, with A = E = 0.
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

impl Attention<'_> {
    /// Checks offsets, mask and pairs against the shapes of q [tokens_q, H, d] and
    /// k [tokens_k, H_kv, d].
    pub fn validate(&self, q: &[usize], k: &[usize]) -> Result<()> {
        let _ = (q, k);
        todo!()
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
        out: ArrayViewMut3<T>,
        lse: ArrayViewMut2<T>,
        scratch: &mut Vec<T>,
    ) -> Result<f64> {
        let _ = (q, k, v, out, lse, scratch);
        todo!()
    }

    /// Gradients of Σ grad_out·out + grad_memory_loss·memory_loss; dq, dk, dv are overwritten.
    pub fn backward<T: Scalar>(
        &self,
        q: ArrayView3<T>,
        k: ArrayView3<T>,
        v: ArrayView3<T>,
        out: ArrayView3<T>,
        lse: ArrayView2<T>,
        grad_out: ArrayView3<T>,
        grad_memory_loss: f64,
        dq: ArrayViewMut3<T>,
        dk: ArrayViewMut3<T>,
        dv: ArrayViewMut3<T>,
        scratch: &mut Vec<T>,
    ) -> Result<()> {
        let _ = (
            q,
            k,
            v,
            out,
            lse,
            grad_out,
            grad_memory_loss,
            dq,
            dk,
            dv,
            scratch,
        );
        todo!()
    }

    /// Σ over supervised heads and annotated sequences of den_b: the divisor of the summed loss is
    /// `heads · Σ_b den_b`; 0 when nothing is annotated.
    pub fn denominator(&self) -> f64 {
        todo!()
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

impl Head<'_> {
    /// Forward of one head: `q` [T_q, d], `k`, `v` [T_k, d], `out` [T_q, d], `lse` [T_q].
    /// Returns the numerator of the memory loss, −Σ (E log A + (1−E) log(1−A)), 0 without pairs.
    pub fn forward<T: Scalar>(
        &self,
        q: ArrayView2<T>,
        k: ArrayView2<T>,
        v: ArrayView2<T>,
        out: ArrayViewMut2<T>,
        lse: ArrayViewMut1<T>,
        scratch: &mut Vec<T>,
    ) -> Result<f64> {
        let _ = (q, k, v, out, lse, scratch);
        todo!()
    }

    /// Backward of one head. `pair_gradient` is c = grad_memory_loss/(heads·Σ den). `dq` is
    /// overwritten, `dk` and `dv` are added to (several query heads may share a key head).
    pub fn backward<T: Scalar>(
        &self,
        q: ArrayView2<T>,
        k: ArrayView2<T>,
        v: ArrayView2<T>,
        out: ArrayView2<T>,
        lse: ArrayView1<T>,
        grad_out: ArrayView2<T>,
        pair_gradient: f64,
        dq: ArrayViewMut2<T>,
        dk: ArrayViewMut2<T>,
        dv: ArrayViewMut2<T>,
        scratch: &mut Vec<T>,
    ) -> Result<()> {
        let _ = (
            q,
            k,
            v,
            out,
            lse,
            grad_out,
            pair_gradient,
            dq,
            dk,
            dv,
            scratch,
        );
        todo!()
    }
}
