//! One episode, played and written down.

use super::{Error, Played};
use crate::backend::Backend;
use crate::model::{Actor, Model};
use crate::tasks::Split;

/// What the model saw and did in one episode, and what the expert would have done.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Episode {
    /// Codes `[steps, fields]`, each observation before its action.
    pub observations: Vec<u8>,
    /// The action taken at each step: the most probable one.
    pub actions: Vec<u8>,
    /// Probabilities of all actions, one list per step.
    pub probabilities: Vec<Vec<f64>>,
    /// The expert's action, as long as the episode looks as the expert's own: an expert is only
    /// defined on its own way.
    pub expert: Vec<Option<u8>>,
    /// Annotated pairs (recalling step, recalled step), as long as the expert is known.
    pub pairs: Vec<(u32, u32)>,
    /// Rewards `[steps]`.
    pub rewards: Vec<f64>,
    /// Return to go that the model was told at each step, scaled.
    pub returns: Vec<f32>,
    /// Whether the episode ended in success.
    pub success: bool,
    /// Whether only the step limit ended it.
    pub timed_out: bool,
}

impl Episode {
    /// Plays episode `number` of the evaluation set of a seed, with the greedy action and the full
    /// history, as [`evaluate`](crate::train::evaluate::evaluate) does.
    pub fn play<B: Backend<Element = f32>>(
        model: &Model<B>,
        played: &Played,
        seed: u64,
        number: u64,
    ) -> Result<Self, Error> {
        let (split, task) = (Split::Evaluation, &played.task);
        let mut environment = task.reset(split, seed, number)?;
        let own = task.demonstrate(split, seed, number)?;
        let fields = task.observation_space().fields();
        let mut actor = Actor::new(model, played.family, 1)?;
        let mut episode = Self::default();
        let mut on_the_way = true;
        let mut recalled = Vec::new();
        let mut to_go = played.target_return;
        for step in 0..task.max_steps() {
            let start = step * fields;
            episode.observations.resize(start + fields, 0);
            let observation = &mut episode.observations[start..];
            environment.observe(observation);
            on_the_way &= own.observations.get(start..start + fields) == Some(observation);
            recalled.clear();
            if on_the_way {
                environment.recalls(&mut recalled);
                recalled.sort_unstable();
                recalled.dedup();
            }
            let pairs = recalled.iter().map(|&recalled| (step as u32, recalled));
            episode.pairs.extend(pairs);
            let expert = on_the_way.then(|| environment.expert() as u8);
            episode.expert.push(expert);

            let told = (to_go / played.return_scale) as f32;
            let action = actor.act(model, &[0], &*observation, &[told])?;
            let action = action.bytes().first().copied().unwrap_or_default();
            let outcome = environment.step(action.into());
            to_go -= outcome.reward;
            episode.probabilities.push(softmax(actor.logits()));
            episode.returns.push(told);
            episode.actions.push(action);
            episode.rewards.push(outcome.reward);
            if outcome.over() {
                episode.success = outcome.success;
                episode.timed_out = !outcome.terminated;
                break;
            }
        }
        Ok(episode)
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.actions.len()
    }

    /// Whether the model took another action than the expert, where that one is known.
    pub fn differs(&self, step: usize) -> bool {
        let expert = self.expert.get(step).copied().flatten();
        expert.is_some_and(|expert| self.actions.get(step) != Some(&expert))
    }

    /// The first action that differs from the expert's and led off its way, or ended the episode.
    pub fn left_at(&self) -> Option<usize> {
        let off = |step: usize| self.expert.get(step + 1).is_none_or(Option::is_none);
        (0..self.steps()).find(|&step| self.differs(step) && off(step))
    }

    /// Earlier steps that the action at `step` follows from.
    pub fn recalled(&self, step: usize) -> impl Iterator<Item = usize> {
        let pairs = self.pairs.iter();
        let earlier = pairs.filter(move |(query, key)| *query as usize == step && key < query);
        earlier.map(|(_, key)| *key as usize)
    }
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let logits = || logits.iter().copied().map(f64::from);
    let most = logits().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits().map(|logit| (logit - most).exp()).sum();
    logits().map(|logit| (logit - most).exp() / sum).collect()
}
