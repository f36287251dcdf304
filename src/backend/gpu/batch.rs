//! A batch in the device's memory.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::ops::Range;

use super::acting::Acting;
use super::chain::Chain;
use super::device::{Compute, Device, Element};
use super::recall::Recalled;
use super::scratch::Growing;
use crate::backend::{BackendError, Reals, Result};
use crate::batch::{FamilyRows, PackedBatch};
use crate::ops::tokens::by_time_step;
use crate::ops::{Input, Output, adamw};

/// Arrays of one type that travel to the device together.
#[derive(Debug)]
struct Upload<D: Device, E: Element> {
    host: Vec<E>,
    staging: D::Staging<E>,
    memory: Growing<D, E>,
}

impl<D: Device, E: Element> Default for Upload<D, E> {
    fn default() -> Self {
        Self {
            host: Vec::new(),
            staging: D::Staging::default(),
            memory: Growing::default(),
        }
    }
}

impl<D: Device, E: Element> Upload<D, E> {
    /// Where the array will stand: at a multiple of 16 elements.
    fn push(&mut self, array: &[E]) -> Range<usize> {
        let start = self.host.len().next_multiple_of(16);
        self.host.resize(start, E::default());
        self.host.extend_from_slice(array);
        start..self.host.len()
    }

    /// Copies what was pushed.
    fn send(&mut self, device: &D) -> Result<()> {
        self.memory.reserve(device, self.host.len())?;
        let memory = self.memory.get_mut()?;
        device.send(&self.host, &mut self.staging, memory)?;
        self.host.clear();
        Ok(())
    }

    fn input<'a>(&'a self, device: &'a D, range: &Range<usize>) -> Result<Input<'a, E>> {
        Ok(device.input(self.memory.get()?, range.clone())?)
    }
}

/// Places of a batch's arrays of `i32`, as [`PackedBatch`] names them.
#[derive(Debug, Default)]
pub(super) struct Ints {
    pub cu_seqlens: Range<usize>,
    pub segment_offsets: Range<usize>,
    pub token_row: Range<usize>,
    pub token_time: Range<usize>,
    pub step_offsets: Range<usize>,
    pub step_tokens: Range<usize>,
    pub observation_tokens: Range<usize>,
    pub targets: Range<usize>,
    pub action_tokens: Range<usize>,
    pub return_tokens: Range<usize>,
    pub pair_offsets: Range<usize>,
    pub pair_keys: Range<usize>,
    /// Tokens in the order of their segments, and the offsets of each link: see [`Chain`](super::chain::Chain).
    pub chain_tokens: Range<usize>,
    pub chain_offsets: Range<usize>,
    /// See [`Recalled`].
    pub recall_own: Range<usize>,
    pub recall_earlier: Range<usize>,
    pub recall_wanted: Range<usize>,
    /// As many as sequences.
    pub zeros: Range<usize>,
    /// Of each token, in the batch that dropout is drawn for.
    pub origins: Range<usize>,
}

/// Places of a batch's arrays of bytes.
#[derive(Debug, Default)]
pub(super) struct Bytes {
    pub token_kind: Range<usize>,
    pub observations: Range<usize>,
    pub actions: Range<usize>,
    pub annotated: Range<usize>,
}

/// Places of a batch's arrays of f32.
#[derive(Debug, Default)]
pub(super) struct Floats {
    /// Weights of the losses: of an action, of a pair.
    pub weights: Range<usize>,
    /// Continuous actions to predict.
    pub targets: Range<usize>,
    /// The number 1.
    pub one: Range<usize>,
    /// Of the optimiser's step.
    pub factors: Option<Range<usize>>,
}

/// Places of a batch's arrays of real numbers that are computed with.
#[derive(Debug, Default)]
struct Narrow {
    returns: Range<usize>,
    observations: Range<usize>,
    actions: Range<usize>,
}

/// A batch on the device.
#[derive(Debug)]
pub struct Batch<D: Device, T: Compute> {
    ints: Upload<D, i32>,
    bytes: Upload<D, u8>,
    floats: Upload<D, f32>,
    numbers: Upload<D, T>,
    step: Upload<D, u32>,
    pub(super) int: Ints,
    pub(super) byte: Bytes,
    pub(super) float: Floats,
    number: Narrow,
    step_at: Range<usize>,
    pub(super) tokens: usize,
    pub(super) sequences: usize,
    pub(super) segments: usize,
    pub(super) observations: usize,
    pub(super) actions: usize,
    pub(super) returns: usize,
    families: Vec<FamilyRows>,
    /// Time steps that tokens have, from 0.
    pub(super) steps: usize,
    pub(super) chain: Chain,
    pub(super) recalled: Recalled,
    acting: Option<ActingInts>,
}

/// Places of what [`Acting`] has, among the arrays of `i32`.
#[derive(Debug)]
pub(super) struct ActingInts {
    pub to: Range<usize>,
    pub cu_seqlens_q: Range<usize>,
    pub cu_seqlens_k: Range<usize>,
    pub starts: Range<usize>,
    pub last: Range<usize>,
    pub rows: Range<usize>,
    /// Tokens of a cache.
    pub cached: usize,
}

impl<D: Device, T: Compute> Default for Batch<D, T> {
    fn default() -> Self {
        Self {
            ints: Upload::default(),
            bytes: Upload::default(),
            floats: Upload::default(),
            numbers: Upload::default(),
            step: Upload::default(),
            int: Ints::default(),
            byte: Bytes::default(),
            float: Floats::default(),
            number: Narrow::default(),
            step_at: 0..0,
            tokens: 0,
            sequences: 0,
            segments: 0,
            observations: 0,
            actions: 0,
            returns: 0,
            families: Vec::new(),
            steps: 0,
            chain: Chain::default(),
            recalled: Recalled::default(),
            acting: None,
        }
    }
}

impl<D: Device, T: Compute> Batch<D, T> {
    pub(super) fn stage(&mut self, device: &D, batch: &PackedBatch) -> Result<()> {
        self.tokens = batch.tokens();
        self.sequences = batch.sequences();
        self.segments = batch.segments();
        self.observations = batch.observation_tokens.len();
        self.actions = batch.action_tokens.len();
        self.returns = batch.return_tokens.len();
        self.families.clone_from(&batch.families);
        let last = batch.token_time.iter().max();
        self.steps = match &batch.filled {
            Some(size) => size.steps,
            None => last.map_or(0, |&time| usize::try_from(time).unwrap_or(0) + 1),
        };
        self.chain = Chain::new(batch);
        self.recalled = Recalled::new(batch, &self.chain.tokens);
        let origins: Vec<i32> = (0..batch.sequences())
            .flat_map(|sequence| {
                let origin = batch.origins[sequence];
                (0..batch.tokens_of(sequence).len() as i32).map(move |token| origin + token)
            })
            .collect();
        let (step_offsets, step_tokens) = by_time_step(&batch.token_time, self.steps);
        let ints = &mut self.ints;
        self.acting = batch.acting.as_ref().map(|acting| {
            let arrays = Acting::new(acting, batch, &self.chain);
            ActingInts {
                to: ints.push(&arrays.to),
                cu_seqlens_q: ints.push(&arrays.cu_seqlens_q),
                cu_seqlens_k: ints.push(&arrays.cu_seqlens_k),
                starts: ints.push(&arrays.starts),
                last: ints.push(&arrays.last),
                rows: ints.push(&arrays.rows),
                cached: arrays.cached,
            }
        });
        self.int = Ints {
            cu_seqlens: ints.push(&batch.cu_seqlens),
            segment_offsets: ints.push(&batch.segment_offsets),
            token_row: ints.push(&batch.token_row),
            token_time: ints.push(&batch.token_time),
            step_offsets: ints.push(&step_offsets),
            step_tokens: ints.push(&step_tokens),
            observation_tokens: ints.push(&batch.observation_tokens),
            targets: ints.push(&batch.targets),
            action_tokens: ints.push(&batch.action_tokens),
            return_tokens: ints.push(&batch.return_tokens),
            pair_offsets: ints.push(&batch.pair_offsets),
            chain_tokens: ints.push(&self.chain.tokens),
            chain_offsets: ints.push(&self.chain.offsets),
            recall_own: ints.push(&self.recalled.own),
            recall_earlier: ints.push(&self.recalled.earlier),
            recall_wanted: ints.push(&self.recalled.wanted),
            zeros: ints.push(&vec![0; batch.sequences()]),
            origins: ints.push(&origins),
            pair_keys: ints.push(&batch.pair_keys),
        };
        let bytes = &mut self.bytes;
        self.byte = Bytes {
            token_kind: bytes.push(&batch.token_kind),
            observations: bytes.push(&batch.observations),
            actions: bytes.push(&batch.actions),
            annotated: bytes.push(&batch.annotated),
        };
        let weights = batch.training.weights;
        let floats = &mut self.floats;
        self.float = Floats {
            weights: floats.push(&[weights.action as f32, weights.pair as f32]),
            targets: floats.push(&batch.real_targets),
            one: floats.push(&[1.0]),
            factors: match &batch.training.optimiser {
                Some(hyper) => Some(floats.push(&adamw::factors(hyper)?)),
                None => None,
            },
        };
        let numbers = &mut self.numbers;
        let mut narrow = |values: &[f32]| {
            let values: Vec<T> = values.iter().map(|&x| T::narrow(x)).collect();
            numbers.push(&values)
        };
        self.number = Narrow {
            returns: narrow(&batch.returns),
            observations: narrow(&batch.real_observations),
            actions: narrow(&batch.real_actions),
        };
        self.numbers.send(device)?;
        self.step_at = self.step.push(&[batch.training.number]);
        self.ints.send(device)?;
        self.bytes.send(device)?;
        self.floats.send(device)?;
        self.step.send(device)
    }

    /// Tells batches of other sizes, or in other memory, apart. Where the pairs end does not matter:
    /// they stand last, and no kernel is told.
    pub(super) fn shape(&self) -> u64 {
        let mut hash = DefaultHasher::new();
        [
            self.tokens,
            self.sequences,
            self.segments,
            self.observations,
            self.actions,
            self.returns,
            self.steps,
        ]
        .hash(&mut hash);
        self.families.hash(&mut hash);
        self.chain.links.hash(&mut hash);
        self.int.pair_keys.start.hash(&mut hash);
        for grown in [
            self.ints.memory.grown(),
            self.bytes.memory.grown(),
            self.floats.memory.grown(),
            self.numbers.memory.grown(),
            self.step.memory.grown(),
        ] {
            grown.hash(&mut hash);
        }
        hash.finish()
    }

    /// Errors: a batch that is not of episodes in progress.
    pub(super) fn acting(&self) -> Result<&ActingInts> {
        self.acting.as_ref().ok_or(BackendError::NotActing)
    }

    pub(super) fn ints<'a>(&'a self, device: &'a D, at: &Range<usize>) -> Result<Input<'a, i32>> {
        self.ints.input(device, at)
    }

    /// To the end of the memory: the next batch, for which this one's launches are repeated, may have
    /// more.
    pub(super) fn pair_keys<'a>(&'a self, device: &'a D) -> Result<Input<'a, i32>> {
        let memory = self.ints.memory.get()?;
        let all = self.int.pair_keys.start..device.len(memory);
        Ok(device.input(memory, all)?)
    }

    pub(super) fn bytes<'a>(&'a self, device: &'a D, at: &Range<usize>) -> Result<Input<'a, u8>> {
        self.bytes.input(device, at)
    }

    pub(super) fn floats<'a>(&'a self, device: &'a D, at: &Range<usize>) -> Result<Input<'a, f32>> {
        self.floats.input(device, at)
    }

    /// The rows of a family.
    pub(super) fn rows_of(&self, family: usize) -> Result<&FamilyRows> {
        self.families.get(family).ok_or(BackendError::NotStaged)
    }

    /// Codes of a family's observations.
    pub(super) fn observation_codes<'a>(
        &'a self,
        device: &'a D,
        family: usize,
    ) -> Result<Input<'a, u8>> {
        let all = self.bytes(device, &self.byte.observations)?;
        Ok(all.slice(self.rows_of(family)?.codes.clone())?)
    }

    /// Weight of an action's loss, and of a pair's.
    pub(super) fn weights<'a>(&'a self, device: &'a D) -> Result<[Input<'a, f32>; 2]> {
        let weights = self.floats(device, &self.float.weights)?;
        Ok([weights.part(0..1)?, weights.part(1..2)?])
    }

    /// Both, to write.
    pub(super) fn weights_mut<'a>(&'a mut self, device: &'a D) -> Result<Output<'a, f32>> {
        let memory = self.floats.memory.get_mut()?;
        Ok(device.output(memory, self.float.weights.clone())?)
    }

    /// Real numbers of one kind.
    pub(super) fn reals<'a>(&'a self, device: &'a D, reals: Reals) -> Result<Input<'a, T>> {
        let (all, own) = match reals {
            Reals::Returns => (&self.number.returns, None),
            Reals::Observations(family) => {
                let own = &self.rows_of(family)?.real_observations;
                (&self.number.observations, Some(own))
            }
            Reals::Actions(family) => {
                let own = &self.rows_of(family)?.real_actions;
                (&self.number.actions, Some(own))
            }
        };
        let all = self.numbers.input(device, all)?;
        Ok(match own {
            Some(own) => all.slice(own.clone())?,
            None => all,
        })
    }

    /// Number of the optimiser step.
    pub(super) fn step<'a>(&'a self, device: &'a D) -> Result<Input<'a, u32>> {
        self.step.input(device, &self.step_at)
    }
}
