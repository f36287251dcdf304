//! Acting: many episodes in lockstep, one time step after another, without computing the past again.

use dtmem_reference::Scalar;

use super::activations::Activations;
use super::config::{AttentionSpan, ModelConfig};
use super::forward::{ActingState, Counts, Pass};
use super::{Capacity, Model, ModelError, allocate};
use crate::backend::{Backend, BackendError, KeyValueCache, Kind, Span};
use crate::batch::{Acting, Packer, TokenLayout};
use crate::spaces::{Family, Numbers, Values};

/// Acts greedily in up to a fixed number of episodes that all started together.
///
/// Tokens are computed from the last commit on. Without segments every step is a commit: keys and
/// values go to the cache once. With segments the current one is computed again at each of its
/// steps and committed when it is complete, so that memory is written as in training; attention
/// inside of segments then needs no cache.
#[derive(Debug)]
pub struct Actor<B: Backend> {
    family: usize,
    packer: Packer,
    batch: B::Batch,
    capacity: Capacity,
    activations: Activations<B>,
    caches: Vec<KeyValueCache<B::Buffer>>,
    memories: Vec<B::Buffer>,
    /// Of every observation of the windows.
    all_logits: Vec<B::Element>,
    logits: Vec<B::Element>,
    actions: Numbers,
    /// Steps since the last commit, for each episode.
    windows: Vec<Window>,
    /// Steps between two commits of a whole segment; 0: every step is a commit.
    segment: usize,
    time: usize,
    /// Tokens of each episode that the caches have room for, and that they hold.
    cached: usize,
    prefix: usize,
}

/// What an episode has seen and done since the last commit.
#[derive(Debug)]
struct Window {
    /// The action before the first step, if its token is not committed yet.
    action_before: Option<(Numbers, i32)>,
    observations: Numbers,
    returns: Vec<f32>,
    actions: Numbers,
    /// How many observations and actions.
    seen: usize,
    done: usize,
}

impl Window {
    fn new(family: &Family) -> Self {
        Self {
            action_before: None,
            observations: Numbers::observations(&family.observation),
            returns: Vec::new(),
            actions: Numbers::actions(family.action),
            seen: 0,
            done: 0,
        }
    }
}

/// What makes acting need less memory on a device.
const LOWER: &str = "model.width or model.layers, or compute with train.precision = \"bf16\"";

/// What acting keeps of an episode.
struct Sizes {
    /// Steps between two commits of a whole segment; 0: every step is a commit.
    segment: usize,
    /// Most steps since the last commit.
    window: usize,
    /// Tokens whose keys and values are kept.
    cached: usize,
}

impl Sizes {
    fn new(config: &ModelConfig, steps: usize) -> Self {
        let per_step = config.layout.tokens_per_step();
        let segment = match (config.segment_steps, &config.memory) {
            (0, None) => 0,
            (0, Some(_)) => steps,
            (segment, _) => segment.min(steps),
        };
        let window = segment.max(1);
        let seen = match config.attention {
            AttentionSpan::Episode => steps,
            AttentionSpan::Segment => window,
        };
        Self {
            segment,
            window,
            cached: seen * per_step,
        }
    }
}

impl<B: Backend> Model<B> {
    /// How many episodes to act in at once: as many as the backend has room for.
    pub fn episodes_at_once(&self) -> usize {
        let config = &self.config;
        let sizes = Sizes::new(config, self.spaces.steps);
        let slots = config.memory.as_ref().map_or(0, |memory| memory.slots);
        // Rows of every layer: keys and values, the memory with its states, and about what the tokens
        // of a window leave behind.
        let of_token = 16 + 2 * config.feed_forward / config.width.max(1);
        let tokens = (sizes.window + 1).saturating_mul(config.layout.tokens_per_step());
        let rows = sizes
            .cached
            .saturating_mul(2)
            .saturating_add(slots.saturating_mul(4))
            .saturating_add(tokens.saturating_mul(of_token));
        let numbers = rows
            .saturating_mul(config.layers)
            .saturating_mul(config.width);
        self.backend.episodes_at_once(numbers)
    }
}

impl<B: Backend> Actor<B> {
    /// An actor for `episodes` episodes of a family, all at their first step.
    pub fn new(model: &Model<B>, family: usize, episodes: usize) -> Result<Self, ModelError> {
        let own = model.family(family)?;
        let (backend, config) = (&*model.backend, &model.config);
        let per_step = config.layout.tokens_per_step();
        let Sizes {
            segment,
            window,
            cached,
        } = Sizes::new(config, model.spaces.steps);
        // A window may also hold the last action before it.
        let mut observations = vec![0; model.spaces.families.len()];
        observations[family] = episodes * window + episodes;
        let capacity = Capacity {
            tokens: episodes * window * per_step.max(2) + episodes,
            observations,
            sequences: episodes,
            segments: 2 * episodes,
            links: 2,
        };
        let len = episodes * cached * config.width;
        let purpose = || format!("acting in {episodes} episodes at once");
        let (caches, activations) = allocate(backend, purpose, LOWER, || {
            let cache = |_| {
                Ok(KeyValueCache {
                    keys: backend.buffer(len, Kind::Activation)?,
                    values: backend.buffer(len, Kind::Activation)?,
                })
            };
            let caches: Result<Vec<_>, BackendError> = (0..config.layers).map(cache).collect();
            let activations = Activations::new(backend, &model.network, config, &capacity)?;
            Ok((caches?, activations))
        })?;
        let mut memories = Vec::new();
        for memory in model
            .network
            .blocks
            .iter()
            .filter_map(|block| block.memory.as_ref())
        {
            let Span { len, .. } = memory.memory.initial;
            let mut state = backend.buffer(episodes * len, Kind::Activation)?;
            let mut initial = vec![B::Element::default(); len];
            backend.download(&model.values, memory.memory.initial.offset, &mut initial)?;
            for episode in 0..episodes {
                backend.upload(&initial, &mut state, episode * len)?;
            }
            memories.push(state);
        }
        Ok(Self {
            family,
            packer: model.packer(),
            batch: B::Batch::default(),
            capacity,
            activations,
            caches,
            memories,
            all_logits: Vec::new(),
            logits: Vec::new(),
            actions: Numbers::actions(own.action),
            windows: (0..episodes).map(|_| Window::new(own)).collect(),
            segment,
            time: 0,
            cached,
            prefix: 0,
        })
    }

    /// The next time step of the episodes `active` (ascending, none that was left out before):
    /// `observations` [active, fields] and `returns` to go `[active]` (read by
    /// [`TokenLayout::ReturnObsAction`] only). Returns the action of largest logit of each, the
    /// first of equals, or the continuous actions [active, numbers], and takes it as the action of
    /// that step.
    pub fn act<'v>(
        &mut self,
        model: &Model<B>,
        active: &[usize],
        observations: impl Into<Values<'v>>,
        returns: &[f32],
    ) -> Result<Values<'_>, ModelError> {
        let own = model.family(self.family)?;
        let observations = observations.into();
        let (fields, action_fields) = (own.observation.fields(), own.action.fields());
        let with_returns = model.config.layout == TokenLayout::ReturnObsAction;
        self.check(
            active,
            observations.len(),
            returns.len(),
            fields,
            with_returns,
        )?;
        let segment = self.segment;
        if segment > 0 && self.time > 0 && self.time.is_multiple_of(segment) {
            self.run(model, active, true)?;
            for window in &mut self.windows {
                *window = Window::new(own);
            }
        }
        for (index, &episode) in active.iter().enumerate() {
            let window = &mut self.windows[episode];
            window.observations.extend(observations.row(index, fields));
            window.seen += 1;
            if with_returns {
                window.returns.push(returns[index]);
            }
        }
        self.run(model, active, segment == 0)?;
        self.choose(model, active)?;
        let time = self.time as i32;
        for (index, &episode) in active.iter().enumerate() {
            let action = self.actions.all().row(index, action_fields);
            let window = &mut self.windows[episode];
            if segment == 0 {
                let mut before = Numbers::actions(own.action);
                before.extend(action);
                *window = Window {
                    action_before: Some((before, time)),
                    ..Window::new(own)
                };
            } else {
                window.actions.extend(action);
                window.done += 1;
            }
        }
        self.time += 1;
        Ok(self.actions.all())
    }

    fn check(
        &self,
        active: &[usize],
        observations: usize,
        returns: usize,
        fields: usize,
        with_returns: bool,
    ) -> Result<(), ModelError> {
        let ascending = active.is_sorted_by(|a, b| a < b);
        if !ascending
            || active
                .last()
                .is_some_and(|&last| last >= self.windows.len())
        {
            return Err(ModelError::setting(
                "active",
                format!("{active:?}"),
                format!("ascending episodes below {}", self.windows.len()),
            ));
        }
        if observations != active.len() * fields {
            return Err(ModelError::setting(
                "observations",
                observations,
                active.len() * fields,
            ));
        }
        if with_returns && returns != active.len() {
            return Err(ModelError::setting("returns", returns, active.len()));
        }
        Ok(())
    }

    /// Computes the windows of the active episodes; `commit` makes their tokens final.
    fn run(&mut self, model: &Model<B>, active: &[usize], commit: bool) -> Result<(), ModelError> {
        let own = model.family(self.family)?;
        let (fields, action_fields) = (own.observation.fields(), own.action.fields());
        self.packer.clear();
        self.packer.start_family(self.family)?;
        for &episode in active {
            let window = &self.windows[episode];
            let steps = window.seen;
            let first = (self.time + usize::from(window.done < steps)) - steps;
            if let Some((action, time)) = &window.action_before {
                self.packer.push_action(action.all(), *time)?;
            }
            for step in 0..steps {
                let time = (first + step) as i32;
                if let Some(&value) = window.returns.get(step) {
                    self.packer.push_return(value, time);
                }
                let observation = window.observations.all().row(step, fields);
                self.packer.push_observation(observation, time, None)?;
                if step < window.done {
                    let action = window.actions.all().row(step, action_fields);
                    self.packer.push_action(action, time)?;
                }
            }
            self.packer.end_sequence(false);
        }
        self.packer.follow(Acting {
            episodes: active.to_vec(),
            prefix: self.prefix,
            capacity: self.cached,
            rows: self.windows.len(),
        })?;
        let batch = self.packer.batch();
        model.check(batch, &self.capacity)?;
        model.backend.stage(batch, &mut self.batch)?;
        let state = ActingState {
            caches: &mut self.caches,
            memories: &mut self.memories,
            commit,
        };
        let counts = Counts::from(batch);
        let pass = Pass {
            batch: &self.batch,
            counts,
            families: &batch.families,
            training: None,
        };
        model.forward(pass, Some(state), &mut self.activations)?;
        if commit && model.config.attention == AttentionSpan::Episode {
            self.prefix += counts.tokens / active.len().max(1);
        }
        Ok(())
    }

    /// Logits of the last call of [`Self::act`] [active, actions]; where actions are continuous,
    /// these.
    pub fn logits(&self) -> &[B::Element] {
        &self.logits
    }

    /// Greedy actions at the last observation of each window.
    fn choose(&mut self, model: &Model<B>, active: &[usize]) -> Result<(), ModelError> {
        let classes = model.family(self.family)?.action.outputs();
        let rows = self.packer.batch().observation_tokens.len();
        let observations = rows / active.len().max(1);
        self.all_logits
            .resize(rows * classes, B::Element::default());
        let all = &mut self.all_logits;
        let logits = &self.activations.families[self.family].logits;
        model.backend.download(logits, 0, all)?;
        self.logits.clear();
        self.actions.clear();
        for window in self.all_logits.chunks(observations.max(1) * classes) {
            let logits = &window[window.len() - classes..];
            self.logits.extend_from_slice(logits);
            match &mut self.actions {
                Numbers::Bytes(actions) => {
                    let mut best = 0;
                    for (action, logit) in logits.iter().enumerate() {
                        if *logit > logits[best] {
                            best = action;
                        }
                    }
                    actions.push(best as u8);
                }
                Numbers::Reals(actions) => {
                    actions.extend(logits.iter().map(|number| number.to_f64() as f32));
                }
            }
        }
        Ok(())
    }
}
