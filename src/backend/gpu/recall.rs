//! Which tokens of a batch are recalled: the columns that a supervised memory carries for them.

use crate::batch::PackedBatch;

/// So that rows of slots are whole matrices for the kernels of short segments, and batches differ little.
const FEWEST_COLUMNS: usize = 16;

/// The recalled tokens of each sequence have columns of their own, in their order. Lists have an entry per token, in the
/// order of the memory's chain.
#[derive(Debug, Default)]
pub(super) struct Recalled {
    /// C, of all sequences: 0 where nothing is recalled, otherwise a power of two.
    pub columns: usize,
    /// The token's column, or −1.
    pub own: Vec<i32>,
    /// Columns of tokens before the token's segment: so many from the first.
    pub earlier: Vec<i32>,
    /// Which of them the token is to recall, in bits [tokens, words].
    pub wanted: Vec<i32>,
}

impl Recalled {
    /// Of a batch whose recall has a weight in the loss, and its tokens in the order of their segments.
    pub fn new(batch: &PackedBatch, order: &[i32]) -> Self {
        if batch.training.weights.pair == 0.0 {
            return Self::default();
        }
        let lists: Vec<_> = (0..batch.sequences())
            .map(|sequence| {
                let mut tokens = Vec::new();
                batch.recalled_tokens(sequence, &mut tokens);
                tokens
            })
            .collect();
        let most = lists.iter().map(Vec::len).max().unwrap_or(0);
        if most == 0 {
            return Self::default();
        }
        let columns = most.next_power_of_two().max(FEWEST_COLUMNS);
        let words = crate::ops::recall::words(columns);
        let mut place = vec![0; order.len()];
        for (index, &token) in order.iter().enumerate() {
            place[token as usize] = index;
        }
        let mut recalled = Self {
            columns,
            own: vec![-1; order.len()],
            earlier: vec![0; order.len()],
            wanted: vec![0; order.len() * words],
        };
        for (sequence, list) in lists.iter().enumerate() {
            let start = batch.tokens_of(sequence).start;
            for (column, &token) in (0..).zip(list) {
                recalled.own[place[start + token as usize]] = column;
            }
            for segment in batch.segments_of(sequence) {
                let tokens = batch.tokens_of_segment(segment);
                let first = (tokens.start - start) as i32;
                let earlier = list.partition_point(|&token| token < first);
                for token in tokens {
                    recalled.earlier[place[token]] = earlier as i32;
                    let pairs = [0, 1].map(|next| batch.pair_offsets[token + next] as usize);
                    for key in &batch.pair_keys[pairs[0]..pairs[1]] {
                        if let Ok(column) = list[..earlier].binary_search(key) {
                            let word = place[token] * words + column / 32;
                            recalled.wanted[word] |= 1 << (column % 32);
                        }
                    }
                }
            }
        }
        recalled
    }
}
