//! Trajectories become packed batches.

use super::{Acting, BatchError, ObservationRow, PackedBatch, TokenKind, TokenLayout};
use crate::spaces::{ActionSpace, Content, Family, Values};

/// One trajectory as the trainer knows it.
#[derive(Debug, Clone, Copy)]
pub struct Trajectory<'a> {
    /// Number of its family in the model.
    pub family: usize,
    /// Codes, pixels or real numbers [steps, fields].
    pub observations: Values<'a>,
    /// Actions `[steps]`, or [steps, numbers]: input of the action tokens and target of the
    /// observations.
    pub actions: Values<'a>,
    /// Returns to go `[steps]`, already scaled; only read by [`TokenLayout::ReturnObsAction`].
    pub returns: &'a [f32],
    /// (recalling step, recalled step), sorted, without duplicates.
    pub pairs: &'a [(u32, u32)],
    /// Whether the sequence takes part in the memory loss.
    pub annotated: bool,
}

/// Fills a [`PackedBatch`], reusing its memory.
#[derive(Debug, Clone)]
pub struct Packer {
    layout: TokenLayout,
    families: Vec<Family>,
    segment_steps: usize,
    batch: PackedBatch,
    /// Patches of an image.
    patches: Vec<f32>,
    /// Of the current sequence.
    family: usize,
    segment: Option<i32>,
}

impl Packer {
    /// A packer for trajectories of these families. `segment_steps` is the length of a segment in
    /// time steps; segment boundaries lie at multiples of it. `None`: one segment per sequence.
    pub fn new(layout: TokenLayout, families: &[Family], segment_steps: Option<usize>) -> Self {
        let mut packer = Self {
            layout,
            families: families.to_vec(),
            segment_steps: segment_steps.unwrap_or(usize::MAX).max(1),
            batch: PackedBatch::default(),
            patches: Vec::new(),
            family: 0,
            segment: None,
        };
        packer.clear();
        packer
    }

    /// Starts an empty batch.
    pub fn clear(&mut self) {
        self.batch.clear(self.families.len());
        self.family = 0;
        self.segment = None;
    }

    /// From here on sequences are of this family: the same as before, or a later one.
    pub fn start_family(&mut self, family: usize) -> Result<(), BatchError> {
        if family < self.family || family >= self.families.len() {
            return Err(BatchError::Family {
                found: family,
                first: self.family,
                last: self.families.len().saturating_sub(1),
            });
        }
        self.family = family;
        Ok(())
    }

    /// The sequences of the batch, which is complete, go on from here. Errors: other than one episode for each,
    /// ascending, or tokens that there is no room for.
    pub fn follow(&mut self, acting: Acting) -> Result<(), BatchError> {
        let batch = &mut self.batch;
        let longest = (0..batch.sequences()).map(|sequence| batch.tokens_of(sequence).len());
        let needed = acting.prefix + longest.max().unwrap_or(0);
        let ascending = acting.episodes.is_sorted_by(|a, b| a < b);
        if acting.episodes.len() != batch.sequences()
            || !ascending
            || acting
                .episodes
                .last()
                .is_some_and(|&last| last >= acting.rows)
            || needed > acting.capacity
        {
            return Err(BatchError::Acting {
                sequences: batch.sequences(),
                needed,
                found: acting,
            });
        }
        batch.acting = Some(acting);
        Ok(())
    }

    /// The batch so far. Complete after [`Self::end_sequence`] or [`Self::push_trajectory`].
    pub fn batch(&self) -> &PackedBatch {
        &self.batch
    }

    /// Appends a whole trajectory, every step of it with its action.
    pub fn push_trajectory(&mut self, trajectory: Trajectory) -> Result<(), BatchError> {
        self.start_family(trajectory.family)?;
        let own = &self.families[self.family];
        let (fields, action_fields) = (own.observation.fields(), own.action.fields());
        let steps = trajectory.actions.len() / action_fields.max(1);
        if trajectory.observations.len() != steps * fields {
            return Err(BatchError::Steps {
                argument: "observations",
                found: trajectory.observations.len() / fields.max(1),
                expected: steps,
            });
        }
        let with_returns = self.layout == TokenLayout::ReturnObsAction;
        if with_returns && trajectory.returns.len() != steps {
            return Err(BatchError::Steps {
                argument: "returns",
                found: trajectory.returns.len(),
                expected: steps,
            });
        }
        if let Some(&(query, key)) = trajectory
            .pairs
            .iter()
            .find(|(query, key)| key > query || *query as usize >= steps)
        {
            return Err(BatchError::Pair { query, key, steps });
        }
        if !trajectory.pairs.is_sorted_by(|a, b| a < b) {
            return Err(BatchError::PairOrder);
        }
        let mut pairs = trajectory.pairs.iter().peekable();
        let per_step = self.layout.tokens_per_step() as i32;
        let offset = self.layout.observation_offset() as i32;
        for step in 0..steps {
            let time = step as i32;
            if with_returns {
                self.push_return(trajectory.returns[step], time);
            }
            let observation = trajectory.observations.row(step, fields);
            let action = trajectory.actions.row(step, action_fields);
            self.push_observation(observation, time, Some(action))?;
            while let Some(&&(_, key)) = pairs.peek().filter(|pair| pair.0 as usize == step) {
                self.batch.pair_keys.push(key as i32 * per_step + offset);
                pairs.next();
            }
            *self.batch.pair_offsets.last_mut().unwrap_or(&mut 0) =
                self.batch.pair_keys.len() as i32;
            self.push_action(action, time)?;
        }
        self.end_sequence(trajectory.annotated);
        Ok(())
    }

    /// Appends a return-to-go token to the current sequence.
    pub fn push_return(&mut self, value: f32, time: i32) {
        let row = self.batch.add_return(self.next_token(), value);
        self.push_token(TokenKind::Return, row, time);
    }

    /// Appends an observation token, with the action to predict there if it is known.
    pub fn push_observation(
        &mut self,
        values: Values,
        time: i32,
        target: Option<Values>,
    ) -> Result<(), BatchError> {
        let (number, token) = (self.family, self.next_token());
        let Self {
            families,
            batch,
            patches,
            ..
        } = self;
        let own = families.get(number).ok_or(BatchError::Family {
            found: number,
            first: 0,
            last: families.len().saturating_sub(1),
        })?;
        let (space, action) = (&own.observation, own.action);
        let reals = matches!(space.content, Content::Reals);
        expect("observation", values, space.fields(), reals)?;
        if let Some(target) = target {
            expect("action", target, action.fields(), !action.is_discrete())?;
        }
        let unknown;
        let (target, real_target): (i32, &[f32]) = match (action, target) {
            (ActionSpace::Discrete(_), target) => {
                let code = target.and_then(|target| target.bytes().first());
                (code.map_or(-1, |&code| i32::from(code)), &[])
            }
            (ActionSpace::Continuous(_), Some(target)) => (0, target.reals()),
            (ActionSpace::Continuous(size), None) => {
                unknown = vec![0.0; size];
                (-1, &unknown)
            }
        };
        let (codes, reals): (&[u8], &[f32]) = match space.patches() {
            Some(cut) => {
                patches.clear();
                cut.cut(values.bytes(), patches);
                (&[], patches)
            }
            None => (values.bytes(), values.reals()),
        };
        let row = ObservationRow {
            codes,
            reals,
            target,
            real_target,
        };
        let row = batch.add_observation(number, token, row);
        self.push_token(TokenKind::Observation, row, time);
        Ok(())
    }

    /// Appends an action token to the current sequence.
    pub fn push_action(&mut self, action: Values, time: i32) -> Result<(), BatchError> {
        let own = self.families.get(self.family).ok_or(BatchError::Family {
            found: self.family,
            first: 0,
            last: self.families.len().saturating_sub(1),
        })?;
        let space = own.action;
        expect("action", action, space.fields(), !space.is_discrete())?;
        let code = action.bytes().first().copied().unwrap_or_default();
        let token = self.next_token();
        let row = self
            .batch
            .add_action(self.family, token, code, action.reals());
        self.push_token(TokenKind::Action, row, time);
        Ok(())
    }

    /// Ends the current sequence; an empty one is kept as an empty sequence.
    pub fn end_sequence(&mut self, annotated: bool) {
        let tokens = self.batch.tokens() as i32;
        if self.segment.take().is_some() {
            self.batch.segment_offsets.push(tokens);
        }
        self.batch.origins.extend(self.batch.cu_seqlens.last());
        self.batch
            .sequence_segments
            .push(self.batch.segments() as i32);
        self.batch.cu_seqlens.push(tokens);
        self.batch.sequence_family.push(self.family);
        self.batch.annotated.push(u8::from(annotated));
    }

    fn next_token(&self) -> i32 {
        self.batch.tokens() as i32
    }

    fn push_token(&mut self, kind: TokenKind, row: i32, time: i32) {
        let segment = (time as usize / self.segment_steps) as i32;
        if self.segment.is_some_and(|current| current != segment) {
            self.batch.segment_offsets.push(self.batch.tokens() as i32);
        }
        self.segment = Some(segment);
        self.batch.token_kind.push(kind as u8);
        self.batch.token_row.push(row);
        self.batch.token_time.push(time);
        self.batch
            .pair_offsets
            .push(self.batch.pair_keys.len() as i32);
    }
}

/// Checks the numbers of an observation or of an action.
fn expect(
    what: &'static str,
    values: Values,
    fields: usize,
    reals: bool,
) -> Result<(), BatchError> {
    let kind = |reals| if reals { "real numbers" } else { "codes" };
    let found = matches!(values, Values::Reals(_));
    if values.len() == fields && found == reals {
        return Ok(());
    }
    Err(BatchError::Fields {
        what,
        found: format!("{} {}", values.len(), kind(found)),
        expected: format!("{fields} {}", kind(reals)),
    })
}
