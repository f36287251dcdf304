//! The memory over the segments of each sequence.
//!
//! The kernels take one segment of several sequences that lie one after another. So tokens are
//! brought into the order of their segments, sequences with more segments first: then those that
//! go on after a segment are the first of those that had it, and so are their memories.
//!
//! Of a batch that was filled up, launches are those of the largest batch: offsets, which lie in
//! the device's memory, say which sequences have come to their end.

use std::cmp::Reverse;
use std::ops::Range;

use crate::batch::PackedBatch;

/// Which tokens and sequences each segment has.
///
/// Memories stand in groups: first those that the sequences start with, then those after the first
/// segment, and so on; in each group in the order of `order`.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// Sequences, those with more segments first.
    pub order: Vec<usize>,
    /// Memories that sequences start with.
    pub starts: usize,
    /// Tokens in the order of their segments; behind them those of no sequence.
    pub tokens: Vec<i32>,
    /// Whether there may be such.
    pub filled: bool,
    pub links: Vec<Link>,
    /// First memory of each group [links + 1].
    pub groups: Vec<usize>,
    /// Offsets of the sequences in each link, one link after another.
    pub offsets: Vec<i32>,
}

/// One segment of those sequences that have so many.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Link {
    /// At most so many.
    pub sequences: usize,
    /// Tokens of a segment, at most.
    pub longest: usize,
    /// Among the chain's offsets.
    pub offsets: Range<usize>,
}

/// Most sequences that have more than `index` segments, if there are so many of both.
fn most(sequences: usize, segments: usize, index: usize) -> usize {
    sequences.min(segments / (index + 1))
}

/// Memories before and after all segments, at most.
pub(super) fn memories(sequences: usize, segments: usize, links: usize) -> usize {
    let after = (0..links).map(|index| most(sequences, segments, index));
    sequences + after.sum::<usize>()
}

impl Chain {
    /// From the segments of each sequence and the tokens of each segment.
    pub fn new(batch: &PackedBatch) -> Self {
        let count = |sequence: usize| batch.segments_of(sequence).len();
        let mut order: Vec<usize> = (0..batch.sequences()).collect();
        order.sort_by_key(|&sequence| Reverse(count(sequence)));
        let having = |index: usize| order.partition_point(|&sequence| count(sequence) > index);
        let size = batch.filled.as_ref();
        let starts = size.map_or(order.len(), |size| size.sequences);
        let mut chain = Self {
            starts,
            filled: size.is_some(),
            groups: vec![0],
            ..Self::default()
        };
        let mut memories = starts;
        for index in 0..size.map_or(batch.links(), |size| size.links) {
            let (first_offset, having) = (chain.offsets.len(), having(index));
            let mut longest = 0;
            chain.offsets.push(chain.tokens.len() as i32);
            for &sequence in &order[..having] {
                let segment = batch.segments_of(sequence).start + index;
                let tokens = batch.tokens_of_segment(segment);
                longest = longest.max(tokens.len());
                chain.tokens.extend(tokens.map(|token| token as i32));
                chain.offsets.push(chain.tokens.len() as i32);
            }
            let (sequences, longest) = match size {
                Some(size) => (
                    most(size.sequences, size.segments, index),
                    size.segment_tokens,
                ),
                None => (having, longest),
            };
            // For the others they fall.
            let end = chain.tokens.len() as i32;
            let ended = 1..=sequences.saturating_sub(having) as i32;
            chain.offsets.extend(ended.map(|place| end - place));
            chain.links.push(Link {
                sequences,
                longest,
                offsets: first_offset..chain.offsets.len(),
            });
            chain.groups.push(memories);
            memories += sequences;
        }
        // What fills a batch up stands behind all else.
        chain
            .tokens
            .extend(chain.tokens.len() as i32..batch.tokens() as i32);
        Self { order, ..chain }
    }

    /// Number of memories of all groups.
    pub fn memories(&self) -> usize {
        let after: usize = self.links.iter().map(|link| link.sequences).sum();
        self.starts + after
    }

    /// The last memory of each sequence, in the order of the batch.
    pub fn last(&self) -> Vec<i32> {
        let mut last = vec![0; self.order.len()];
        for (place, &sequence) in self.order.iter().enumerate() {
            let group = self.links.partition_point(|link| link.sequences > place);
            last[sequence] = (self.groups[group] + place) as i32;
        }
        last
    }
}
