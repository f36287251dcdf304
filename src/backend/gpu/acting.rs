//! Where the tokens of a batch stand in caches and states of episodes that are acted in.

use super::chain::Chain;
use crate::batch::{self, PackedBatch};

/// The same for every layer.
///
/// What lies between two rows of a cache, and behind what a row holds so far, counts as a sequence
/// that nobody asks for: so a cache is one pack of sequences as it stands.
pub(super) struct Acting {
    /// Token of a cache, of each token of the batch.
    pub to: Vec<i32>,
    pub cu_seqlens_q: Vec<i32>,
    pub cu_seqlens_k: Vec<i32>,
    /// Row of a state that each sequence starts with, in the order of the chain.
    pub starts: Vec<i32>,
    /// The last memory of each sequence among those of the chain, and the row of a state that it becomes.
    pub last: Vec<i32>,
    pub rows: Vec<i32>,
    /// Tokens of a cache.
    pub cached: usize,
}

impl Acting {
    pub fn new(acting: &batch::Acting, batch: &PackedBatch, chain: &Chain) -> Self {
        let rows: Vec<i32> = acting.episodes.iter().map(|&row| row as i32).collect();
        let cached = acting.rows * acting.capacity;
        let mut all = Self {
            to: Vec::with_capacity(batch.tokens()),
            cu_seqlens_q: vec![0],
            cu_seqlens_k: vec![0],
            starts: chain.order.iter().map(|&at| rows[at]).collect(),
            last: chain.last(),
            rows,
            cached,
        };
        for (ends, row) in batch.cu_seqlens.windows(2).zip(&acting.episodes) {
            let first = row * acting.capacity;
            let end = first + acting.prefix + (ends[1] - ends[0]) as usize;
            all.to
                .extend((first + acting.prefix..end).map(|token| token as i32));
            all.cu_seqlens_q.extend(ends);
            all.cu_seqlens_k.extend([first as i32, end as i32]);
        }
        all.cu_seqlens_q.extend(batch.cu_seqlens.last());
        all.cu_seqlens_k.push(cached as i32);
        all
    }
}
