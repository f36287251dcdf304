//! Packed batches: what a backend computes on. Nothing here knows what a task is.

mod packer;

use std::ops::Range;

use dtmem_reference::optimiser::AdamW;
use thiserror::Error;

use crate::spaces::{ActionSpace, Content, Family};
pub use packer::{Packer, Trajectory};

/// Which tokens stand for one time step (SPEC section 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenLayout {
    /// o_t, a_t: AttentionTuner, behaviour cloning.
    ObsAction,
    /// R_t, o_t, a_t: Decision Transformer, DT-Mem.
    ReturnObsAction,
}

impl TokenLayout {
    /// Tokens of one complete time step.
    pub fn tokens_per_step(self) -> usize {
        match self {
            Self::ObsAction => 2,
            Self::ReturnObsAction => 3,
        }
    }

    /// Where the observation stands among the tokens of its step.
    pub fn observation_offset(self) -> usize {
        self.tokens_per_step() - 2
    }
}

/// What a token holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum TokenKind {
    /// An observation.
    Observation,
    /// An action.
    Action,
    /// A return to go.
    Return,
}

/// Whole or partial trajectories, one after another, without padding.
///
/// Token arrays have one entry per packed token; `observations`, `actions` and `returns` have one
/// row per token of that kind, in packed order. Sequences stand in the order of their families, so
/// that the rows of a family are neighbours.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PackedBatch {
    /// Token offsets of the sequences [B + 1].
    pub cu_seqlens: Vec<i32>,
    /// Token offsets of all segments [S + 1]; a segment never crosses a sequence.
    pub segment_offsets: Vec<i32>,
    /// Segment offsets of the sequences [B + 1].
    pub sequence_segments: Vec<i32>,
    /// [`TokenKind`] of each token.
    pub token_kind: Vec<u8>,
    /// Row of each token among the tokens of its kind.
    pub token_row: Vec<i32>,
    /// Time step of each token.
    pub token_time: Vec<i32>,
    /// Which rows are whose: one entry for each family of the model.
    pub families: Vec<FamilyRows>,
    /// Observation codes of one family after another, each [its observations, its fields].
    pub observations: Vec<u8>,
    /// Real numbers of observations, in the same way: vectors, and images cut into patches.
    pub real_observations: Vec<f32>,
    /// Packed token of each observation.
    pub observation_tokens: Vec<i32>,
    /// Action to predict at each observation; −1 where there is none (acting). Where actions are
    /// continuous, 0 if there is one.
    pub targets: Vec<i32>,
    /// Continuous actions to predict, of one family after another.
    pub real_targets: Vec<f32>,
    /// Action codes of the action tokens; 0 where actions are continuous.
    pub actions: Vec<u8>,
    /// Continuous actions of the action tokens, of one family after another.
    pub real_actions: Vec<f32>,
    /// Packed token of each action.
    pub action_tokens: Vec<i32>,
    /// Return to go of each return token.
    pub returns: Vec<f32>,
    /// Packed token of each return.
    pub return_tokens: Vec<i32>,
    /// CSR offsets of the annotated pairs over packed tokens [tokens + 1].
    pub pair_offsets: Vec<i32>,
    /// Recalled tokens of each token, relative to the start of its sequence, ascending.
    pub pair_keys: Vec<i32>,
    /// Family of each sequence, never falling.
    pub sequence_family: Vec<usize>,
    /// For each sequence: 1 takes part in the memory loss, 0 does not.
    pub annotated: Vec<u8>,
    /// First token of each sequence in the batch that it was selected from ([`Self::select`]), so
    /// that dropout draws the same mask for it; its own first token otherwise.
    pub origins: Vec<i32>,
    /// What it was filled up to ([`Self::fill_up`]).
    pub filled: Option<BatchSize>,
    /// What its tokens go on from, in episodes that are acted in ([`Packer::follow`]).
    pub acting: Option<Acting>,
    /// What changes from step to step of a training.
    pub training: TrainingStep,
}

/// How far episodes are that are acted in, in lockstep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acting {
    /// Episode of each sequence, ascending: its row in caches and in states of a memory.
    pub episodes: Vec<usize>,
    /// Tokens of each episode that are cached, before those of the batch.
    pub prefix: usize,
    /// Most tokens of an episode that a cache holds.
    pub capacity: usize,
    /// Episodes that a cache holds.
    pub rows: usize,
}

/// The rows of one family.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct FamilyRows {
    /// Among the observations and their targets.
    pub observations: Range<usize>,
    /// Among the actions.
    pub actions: Range<usize>,
    /// Among the codes of the observations.
    pub codes: Range<usize>,
    /// Among the real numbers of the observations.
    pub real_observations: Range<usize>,
    /// Among the continuous targets.
    pub real_targets: Range<usize>,
    /// Among the continuous actions.
    pub real_actions: Range<usize>,
}

/// The numbers of one observation, with what is to be done there.
#[derive(Debug, Clone, Copy)]
struct ObservationRow<'a> {
    codes: &'a [u8],
    reals: &'a [f32],
    target: i32,
    real_target: &'a [f32],
}

/// A step of a training, as far as it concerns its batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TrainingStep {
    /// Number of the step, from 1: dropout draws from it.
    pub number: u32,
    /// Weights of the losses.
    pub weights: LossWeights,
    /// What the optimiser does; nothing where only gradients are wanted.
    pub optimiser: Option<AdamW>,
}

/// What each summed loss counts in the gradient.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossWeights {
    /// Of the cross-entropy of one action: 1 / actions of the whole batch.
    pub action: f64,
    /// Of the numerator of the memory loss: λ / its denominator over the whole batch.
    pub pair: f64,
}

/// What [`PackedBatch::fill_up`] fills a batch up to: no batch has more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchSize {
    /// Tokens.
    pub tokens: usize,
    /// Observations of each family, and as many actions.
    pub rows: Vec<usize>,
    /// Returns to go.
    pub returns: usize,
    /// Sequences.
    pub sequences: usize,
    /// Segments of all sequences.
    pub segments: usize,
    /// Segments of one sequence.
    pub links: usize,
    /// Tokens of one segment.
    pub segment_tokens: usize,
    /// Time steps that tokens may have.
    pub steps: usize,
}

impl PackedBatch {
    /// Number of packed tokens.
    pub fn tokens(&self) -> usize {
        self.token_kind.len()
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.annotated.len()
    }

    /// Number of segments of all sequences.
    pub fn segments(&self) -> usize {
        self.segment_offsets.len().saturating_sub(1)
    }

    /// Most segments of one sequence.
    pub fn links(&self) -> usize {
        let all = (0..self.sequences()).map(|sequence| self.segments_of(sequence).len());
        all.max().unwrap_or(0)
    }

    /// Tokens of one sequence.
    pub fn tokens_of(&self, sequence: usize) -> Range<usize> {
        self.cu_seqlens[sequence] as usize..self.cu_seqlens[sequence + 1] as usize
    }

    /// First token of each segment of the first sequence, and its length.
    pub fn segments_of_first(&self) -> Vec<usize> {
        let last = self.sequence_segments.get(1).map_or(0, |&s| s as usize);
        let offsets = self.segment_offsets.iter().take(last + 1);
        offsets.map(|&token| token as usize).collect()
    }

    /// Segments of one sequence.
    pub fn segments_of(&self, sequence: usize) -> Range<usize> {
        self.sequence_segments[sequence] as usize..self.sequence_segments[sequence + 1] as usize
    }

    /// Tokens of one segment.
    pub fn tokens_of_segment(&self, segment: usize) -> Range<usize> {
        self.segment_offsets[segment] as usize..self.segment_offsets[segment + 1] as usize
    }

    /// The tokens of an annotated sequence that tokens of later segments recall: `to` becomes their
    /// numbers, relative to the start of the sequence, ascending.
    pub fn recalled_tokens(&self, sequence: usize, to: &mut Vec<i32>) {
        to.clear();
        if self.annotated[sequence] == 0 {
            return;
        }
        let start = self.tokens_of(sequence).start;
        for segment in self.segments_of(sequence) {
            let tokens = self.tokens_of_segment(segment);
            let first = (tokens.start - start) as i32;
            let [from, end] = [tokens.start, tokens.end].map(|at| self.pair_offsets[at] as usize);
            let keys = self.pair_keys[from..end].iter();
            to.extend(keys.filter(|&&key| key < first));
        }
        to.sort_unstable();
        to.dedup();
    }

    /// Makes `to` the batch of some of these sequences, reusing its memory.
    pub fn select(&self, sequences: &[usize], to: &mut Self) {
        to.clear(self.families.len());
        for &sequence in sequences {
            let family = self.sequence_family[sequence];
            let rows = &self.families[family];
            let tokens = self.tokens_of(sequence);
            let shift = to.tokens() as i32 - tokens.start as i32;
            let segments = [0, 1].map(|next| self.sequence_segments[sequence + next] as usize);
            let ends = &self.segment_offsets[segments[0] + 1..=segments[1]];
            to.segment_offsets
                .extend(ends.iter().map(|end| end + shift));
            for token in tokens.clone() {
                let at = to.tokens() as i32;
                let row = self.token_row[token] as usize;
                let new_row = match self.token_kind[token] {
                    kind if kind == TokenKind::Observation as u8 => {
                        let own = |all| row_of(all, &rows.observations, row);
                        let observation = ObservationRow {
                            codes: &self.observations[own(&rows.codes)],
                            reals: &self.real_observations[own(&rows.real_observations)],
                            target: self.targets[row],
                            real_target: &self.real_targets[own(&rows.real_targets)],
                        };
                        to.add_observation(family, at, observation)
                    }
                    kind if kind == TokenKind::Action as u8 => {
                        let own = row_of(&rows.real_actions, &rows.actions, row);
                        to.add_action(family, at, self.actions[row], &self.real_actions[own])
                    }
                    _ => to.add_return(at, self.returns[row]),
                };
                let pairs = [0, 1].map(|next| self.pair_offsets[token + next] as usize);
                to.pair_keys
                    .extend_from_slice(&self.pair_keys[pairs[0]..pairs[1]]);
                to.pair_offsets.push(to.pair_keys.len() as i32);
                to.token_kind.push(self.token_kind[token]);
                to.token_row.push(new_row);
                to.token_time.push(self.token_time[token]);
            }
            to.sequence_segments.push(to.segments() as i32);
            to.cu_seqlens.push(to.tokens() as i32);
            to.sequence_family.push(family);
            to.annotated.push(self.annotated[sequence]);
            to.origins.push(self.origins[sequence]);
        }
    }

    /// Adds the row of an observation token, and returns its number.
    fn add_observation(&mut self, family: usize, token: i32, row: ObservationRow) -> i32 {
        let number = self.observation_tokens.len();
        self.targets.push(row.target);
        self.observation_tokens.push(token);
        let rows = &mut self.families[family];
        grow(&mut rows.observations, number, 1);
        append(&mut rows.codes, &mut self.observations, row.codes);
        append(
            &mut rows.real_observations,
            &mut self.real_observations,
            row.reals,
        );
        append(
            &mut rows.real_targets,
            &mut self.real_targets,
            row.real_target,
        );
        number as i32
    }

    /// Adds the row of an action token, and returns its number.
    fn add_action(&mut self, family: usize, token: i32, action: u8, reals: &[f32]) -> i32 {
        let number = self.action_tokens.len();
        self.actions.push(action);
        self.action_tokens.push(token);
        let rows = &mut self.families[family];
        grow(&mut rows.actions, number, 1);
        append(&mut rows.real_actions, &mut self.real_actions, reals);
        number as i32
    }

    /// Adds the row of a return token, and returns its number.
    fn add_return(&mut self, token: i32, value: f32) -> i32 {
        self.returns.push(value);
        self.return_tokens.push(token);
        self.return_tokens.len() as i32 - 1
    }

    /// Fills the batch up, so that batches have one size: tokens of no kind in a sequence and a
    /// segment of their own, empty sequences and segments, and rows without a token. They take no
    /// part in any loss, and of those segments no sequence knows.
    pub fn fill_up(&mut self, size: &BatchSize, families: &[Family]) {
        const NO_KIND: u8 = u8::MAX;
        let mut before = FamilyRows::default();
        for (number, (family, &rows)) in families.iter().zip(&size.rows).enumerate() {
            before = self.fill_up_family(number, family, rows, &before);
        }
        self.returns.resize(size.returns, 0.0);
        self.return_tokens.resize(size.returns, -1);
        let (first, end) = (self.tokens() as i32, size.tokens as i32);
        let pairs = self.pair_keys.len() as i32;
        self.token_kind.resize(size.tokens, NO_KIND);
        self.token_row.resize(size.tokens, 0);
        let last_step = size.steps.saturating_sub(1) as i32;
        self.token_time.resize(size.tokens, last_step);
        self.pair_offsets.resize(size.tokens + 1, pairs);
        let segments = self.segments() as i32;
        for _ in self.sequences()..=size.sequences {
            self.cu_seqlens.push(end);
            self.sequence_segments.push(segments);
            self.sequence_family
                .push(self.families.len().saturating_sub(1));
            self.annotated.push(0);
            self.origins.push(first);
        }
        self.segment_offsets.resize(size.segments + 2, end);
        self.filled = Some(size.clone());
    }

    /// Gives a family so many rows, behind those of the family before it. Returns where they are.
    fn fill_up_family(
        &mut self,
        number: usize,
        family: &Family,
        count: usize,
        before: &FamilyRows,
    ) -> FamilyRows {
        // From the family and not from its rows: a batch may have none.
        let space = &family.observation;
        let (codes, reals) = match (&space.content, space.patches()) {
            (_, Some(cut)) => (0, cut.count() * cut.size()),
            (Content::Reals, None) => (0, space.fields()),
            (Content::Codes(_) | Content::Pixels, None) => (space.fields(), 0),
        };
        let of_action = match family.action {
            ActionSpace::Discrete(_) => 0,
            ActionSpace::Continuous(numbers) => numbers,
        };
        let own = std::mem::take(&mut self.families[number]);
        let fill_reals = |all: &mut Vec<f32>, own, before: &Range<usize>, numbers| {
            fill(all, own, before.end, count * numbers, 0.0)
        };
        let [observations, actions] = [before.observations.end, before.actions.end];
        fill(
            &mut self.observation_tokens,
            &own.observations,
            observations,
            count,
            -1,
        );
        fill(&mut self.action_tokens, &own.actions, actions, count, -1);
        let rows = FamilyRows {
            observations: fill(
                &mut self.targets,
                &own.observations,
                observations,
                count,
                -1,
            ),
            actions: fill(&mut self.actions, &own.actions, actions, count, 0),
            codes: fill(
                &mut self.observations,
                &own.codes,
                before.codes.end,
                count * codes,
                0,
            ),
            real_observations: fill_reals(
                &mut self.real_observations,
                &own.real_observations,
                &before.real_observations,
                reals,
            ),
            real_targets: fill_reals(
                &mut self.real_targets,
                &own.real_targets,
                &before.real_targets,
                of_action,
            ),
            real_actions: fill_reals(
                &mut self.real_actions,
                &own.real_actions,
                &before.real_actions,
                of_action,
            ),
        };
        let moved = |now: &Range<usize>, then: &Range<usize>| now.start as i32 - then.start as i32;
        let moved = [
            moved(&rows.observations, &own.observations),
            moved(&rows.actions, &own.actions),
            0,
        ];
        for sequence in 0..self.sequences() {
            if self.sequence_family[sequence] == number {
                for token in self.tokens_of(sequence) {
                    self.token_row[token] += moved[usize::from(self.token_kind[token])];
                }
            }
        }
        self.families[number] = rows.clone();
        rows
    }

    /// Back to no sequences, of so many families.
    fn clear(&mut self, of_families: usize) {
        let Self {
            families,
            sequence_family,
            cu_seqlens,
            segment_offsets,
            sequence_segments,
            token_kind,
            token_row,
            token_time,
            observations,
            real_observations,
            observation_tokens,
            targets,
            real_targets,
            actions,
            real_actions,
            action_tokens,
            returns,
            return_tokens,
            pair_offsets,
            pair_keys,
            annotated,
            origins,
            filled,
            acting,
            training,
        } = self;
        *filled = None;
        *acting = None;
        *training = TrainingStep::default();
        families.clear();
        families.resize(of_families, FamilyRows::default());
        sequence_family.clear();
        for offsets in [cu_seqlens, segment_offsets, sequence_segments, pair_offsets] {
            offsets.clear();
            offsets.push(0);
        }
        for list in [
            token_row,
            token_time,
            observation_tokens,
            targets,
            action_tokens,
            return_tokens,
            pair_keys,
            origins,
        ] {
            list.clear();
        }
        for bytes in [token_kind, observations, actions, annotated] {
            bytes.clear();
        }
        for reals in [returns, real_observations, real_targets, real_actions] {
            reals.clear();
        }
    }
}

/// A range that more rows, from `end` on, are added to; they become its first where it is empty.
fn grow(range: &mut Range<usize>, end: usize, more: usize) {
    if range.start == range.end {
        range.start = end;
    }
    range.end = end + more;
}

/// Appends the numbers of one more row of a family.
fn append<T: Copy>(range: &mut Range<usize>, all: &mut Vec<T>, row: &[T]) {
    grow(range, all.len(), row.len());
    all.extend_from_slice(row);
}

/// Makes a family's part of an array `len` long, and returns where it is: from `start`, where the
/// family's numbers stand since those before it have been filled up.
fn fill<T: Copy>(
    all: &mut Vec<T>,
    own: &Range<usize>,
    start: usize,
    len: usize,
    with: T,
) -> Range<usize> {
    let end = start + own.len();
    all.splice(
        end..end,
        std::iter::repeat_n(with, len.saturating_sub(own.len())),
    );
    start..start + len
}

/// Where the numbers of one of a family's rows stand.
fn row_of(numbers: &Range<usize>, rows: &Range<usize>, row: usize) -> Range<usize> {
    let width = numbers.len() / rows.len().max(1);
    let start = numbers.start + (row - rows.start) * width;
    start..start + width
}

/// Why a sequence cannot be packed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BatchError {
    /// An observation or an action has the wrong number of numbers, or they are of another kind.
    #[error("an {what} has {found}, expected {expected}")]
    Fields {
        /// Which of the two.
        what: &'static str,
        /// Numbers passed.
        found: String,
        /// Numbers of the space.
        expected: String,
    },
    /// A pair does not point from a later (or equal) step to an earlier one of the same sequence.
    #[error(
        "pair ({query}, {key}) of a sequence of {steps} steps: expected key <= query < {steps}"
    )]
    Pair {
        /// Recalling step.
        query: u32,
        /// Recalled step.
        key: u32,
        /// Length of the sequence.
        steps: usize,
    },
    /// A sequence of a family that the packer does not know, or after one of a later family.
    #[error(
        "a sequence of family {found}, expected {first} to {last}: sequences are packed in the order of their families"
    )]
    Family {
        /// Its number.
        found: usize,
        /// Of the sequence before.
        first: usize,
        /// Of the last family.
        last: usize,
    },
    /// Episodes are not those of the sequences, or their caches are too small.
    #[error(
        "{found:?} of {sequences} sequences: expected an episode for each, ascending and below `rows`, and a capacity \
         of {needed} or more"
    )]
    Acting {
        /// What the batch should go on from.
        found: Acting,
        /// Sequences of the batch.
        sequences: usize,
        /// Tokens of the longest with those before it.
        needed: usize,
    },
    /// Pairs are not in ascending order, or one stands twice.
    #[error("pairs of a sequence are not strictly ascending")]
    PairOrder,
    /// Arrays of one trajectory differ in length.
    #[error("`{argument}` has {found} steps, expected {expected}")]
    Steps {
        /// Which array.
        argument: &'static str,
        /// Its length.
        found: usize,
        /// Length of the observations.
        expected: usize,
    },
}
