//! Demonstrations in memory, and their generation.

use std::fmt::Write as _;
use std::iter;
use std::ops::Range;

use rayon::prelude::*;

use super::{AnnotationNoise, Episode, Split, Task, TaskError};
use crate::spaces::{
    ActionSpace, Content, Family, Numbers, ObservationSpace, Part, SpaceError, Values,
};

/// Episodes generated between two reports of progress.
const CHUNK: u64 = 256;

/// A set of recorded episodes, packed one after another.
#[derive(Clone, Debug, PartialEq)]
pub struct Demonstrations {
    family: Family,
    /// The task that the episodes come from, if it is one of ours.
    pub task: Option<Task>,
    /// The seed they were generated with.
    pub seed: Option<u64>,
    observations: Numbers,
    actions: Numbers,
    rewards: Vec<f32>,
    /// Where each episode starts among the steps; one more at the end.
    offsets: Vec<usize>,
    pairs: Vec<(u32, u32)>,
    /// Where each episode's pairs start; one more at the end.
    pair_offsets: Vec<usize>,
    annotated: Vec<bool>,
}

/// One episode of a set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EpisodeView<'a> {
    /// `[steps, fields]`; each observation is the one before its action.
    pub observations: Values<'a>,
    /// Actions, `[steps]`, or `[steps, numbers]` where they are continuous.
    pub actions: Values<'a>,
    /// Rewards, `[steps]`.
    pub rewards: &'a [f32],
    /// Memory dependency pairs (recalling step, recalled step); in a set they are sorted, each once.
    pub pairs: &'a [(u32, u32)],
    /// Whether the pairs are known. If not, they are no target: not even an empty one.
    pub annotated: bool,
}

impl EpisodeView<'_> {
    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.rewards.len()
    }
}

impl<'a> From<&'a Episode> for EpisodeView<'a> {
    /// The episode, annotated.
    fn from(episode: &'a Episode) -> Self {
        let Episode {
            observations,
            actions,
            rewards,
            pairs,
            ..
        } = episode;
        Self {
            observations: observations.into(),
            actions: actions.into(),
            rewards,
            pairs,
            annotated: true,
        }
    }
}

/// Something in a set of demonstrations that cannot be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}{place}: found {found}, expected {expected}")]
pub struct Invalid {
    /// The tensor or the metadata entry.
    pub what: &'static str,
    /// Where in it: empty, or a clause such as ", episode 3, step 17".
    pub place: String,
    /// What stands there.
    pub found: String,
    /// What should.
    pub expected: String,
}

impl Invalid {
    pub(super) fn new(
        what: &'static str,
        place: impl Into<String>,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self {
            what,
            place: place.into(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}

impl From<SpaceError> for Invalid {
    /// With the names that a file has for the parts.
    fn from(error: SpaceError) -> Self {
        let what = match error.part {
            Part::Observations => "tensor `observations`",
            Part::Cardinalities => "`observation_cardinalities`",
            Part::Actions => "`action_count`",
        };
        Self::new(what, error.place, error.found, error.expected)
    }
}

impl Demonstrations {
    /// An empty set of what a family of tasks observes and does.
    ///
    /// # Errors
    /// Those of [`Family::validate`].
    pub fn new(family: Family) -> Result<Self, Invalid> {
        family.validate()?;
        Ok(Self {
            observations: Numbers::observations(&family.observation),
            actions: Numbers::actions(family.action),
            family,
            task: None,
            seed: None,
            rewards: Vec::new(),
            offsets: vec![0],
            pairs: Vec::new(),
            pair_offsets: vec![0],
            annotated: Vec::new(),
        })
    }

    /// Lets the expert play the episodes 0 .. `episodes` of [`Split::Demonstration`], on all threads; the result
    /// depends only on the arguments. `annotated_share` of them keep their pairs
    /// ([`Demonstrations::limit_annotations`]). `progress` is told now and then how many are done.
    ///
    /// # Errors
    /// Parameters of the task out of range, no episodes, a share outside 0 to 1.
    pub fn generate(
        task: &Task,
        episodes: usize,
        seed: u64,
        annotated_share: f64,
        mut progress: impl FnMut(usize),
    ) -> Result<Self, TaskError> {
        task.validate()?;
        if episodes == 0 {
            return Err(TaskError::new("episodes", episodes, "1 or more"));
        }
        let unfit = |invalid: Invalid| TaskError::new("task", invalid, "what the task declares");
        let mut set = Self::new(task.family()).map_err(unfit)?;
        set.task = Some(task.clone());
        set.seed = Some(seed);
        let episodes = episodes as u64;
        for start in (0..episodes).step_by(CHUNK as usize) {
            let chunk = start..episodes.min(start.saturating_add(CHUNK));
            let played: Result<Vec<Episode>, TaskError> = chunk
                .into_par_iter()
                .map(|episode| task.demonstrate(Split::Demonstration, seed, episode))
                .collect();
            for episode in &played? {
                set.push(episode.into()).map_err(unfit)?;
            }
            progress(set.len());
        }
        set.limit_annotations(annotated_share)?;
        Ok(set)
    }

    /// Appends an episode.
    ///
    /// # Errors
    /// No steps, lengths that do not fit each other, an action or a code out of range, a reward that is not finite, a
    /// pair that points forward or outside of the episode.
    pub fn push(&mut self, episode: EpisodeView) -> Result<(), Invalid> {
        let number = self.len();
        let place = format!(", episode {number}");
        let at = |step: usize| format!(", episode {number}, step {step}");
        let steps = episode.steps();
        if steps == 0 || u32::try_from(steps).is_err() {
            return Err(Invalid::new(
                "tensor `actions`",
                place,
                format!("{steps} steps"),
                "1 or more, below 2³²",
            ));
        }
        let fields = self.space().fields();
        for (what, values, kept, each) in [
            (
                "tensor `observations`",
                episode.observations,
                &self.observations,
                fields,
            ),
            (
                "tensor `actions`",
                episode.actions,
                &self.actions,
                self.family.action.fields(),
            ),
        ] {
            let kind = |bytes| {
                if bytes {
                    "whole numbers"
                } else {
                    "real numbers"
                }
            };
            if !kept.is_kind_of(values) {
                let found = kind(matches!(values, Values::Bytes(_)));
                let expected = kind(matches!(kept, Numbers::Bytes(_)));
                return Err(Invalid::new(what, place, found, expected));
            }
            if steps.checked_mul(each) != Some(values.len()) {
                let found = format!("{} numbers", values.len());
                return Err(Invalid::new(
                    what,
                    place,
                    found,
                    format!("{steps} × {each}"),
                ));
            }
            let odd = values.reals().iter().position(|value| !value.is_finite());
            if let Some(index) = odd {
                let place = format!("{}, number {}", at(index / each), index % each);
                let found = values.reals()[index];
                return Err(Invalid::new(what, place, found, "a finite number"));
            }
        }
        if let ActionSpace::Discrete(count) = self.family.action {
            let actions = episode.actions.bytes();
            if let Some(step) = actions.iter().position(|&a| usize::from(a) >= count) {
                return Err(Invalid::new(
                    "tensor `actions`",
                    at(step),
                    actions[step],
                    format!("an action below {count}"),
                ));
            }
        }
        if let Content::Codes(cardinalities) = &self.space().content {
            let limits = cardinalities.iter().cycle();
            if let Some((field, (code, limit))) = iter::zip(episode.observations.bytes(), limits)
                .enumerate()
                .find(|(_, (code, limit))| usize::from(**code) >= **limit)
            {
                let place = format!("{}, code {}", at(field / fields), field % fields);
                return Err(Invalid::new(
                    "tensor `observations`",
                    place,
                    code,
                    format!("a code below {limit}"),
                ));
            }
        }
        if let Some(step) = episode
            .rewards
            .iter()
            .position(|reward| !reward.is_finite())
        {
            return Err(Invalid::new(
                "tensor `rewards`",
                at(step),
                episode.rewards[step],
                "a finite number",
            ));
        }
        if let Some(pair) = episode
            .pairs
            .iter()
            .position(|&(from, to)| to > from || from as usize >= steps)
        {
            let expected = format!("recalled ≤ recalling < {steps}");
            let found = format!("{:?}", episode.pairs[pair]);
            return Err(Invalid::new(
                "tensor `pairs`",
                format!("{place}, pair {pair}"),
                found,
                expected,
            ));
        }
        self.observations.extend(episode.observations);
        self.actions.extend(episode.actions);
        self.rewards.extend_from_slice(episode.rewards);
        self.offsets.push(self.rewards.len());
        let mut pairs = episode.pairs.to_vec();
        pairs.sort_unstable();
        pairs.dedup();
        self.pairs.extend(pairs);
        self.pair_offsets.push(self.pairs.len());
        self.annotated.push(episode.annotated);
        Ok(())
    }

    /// Keeps the annotation of `share` of the annotated episodes (rounded, evenly spread), and drops the pairs of the
    /// others.
    ///
    /// # Errors
    /// A share outside 0 to 1.
    pub fn limit_annotations(&mut self, share: f64) -> Result<(), TaskError> {
        super::validate_frequency("annotated", share)?;
        let due = |annotated: usize| (annotated as f64 * share).round();
        let mut seen = 0;
        for annotated in self.annotated.iter_mut().filter(|annotated| **annotated) {
            seen += 1;
            *annotated = due(seen) > due(seen - 1);
        }
        self.replace_pairs(|_, _| {});
        Ok(())
    }

    /// Damages the pairs of the annotated episodes: always in the same way for the same noise, seed and number of the
    /// episode.
    ///
    /// # Errors
    /// Those of [`AnnotationNoise::validate`].
    pub fn disturb_annotations(
        &mut self,
        noise: &AnnotationNoise,
        seed: u64,
    ) -> Result<(), TaskError> {
        noise.validate()?;
        self.replace_pairs(|episode, pairs| noise.disturb(seed, episode, pairs));
        Ok(())
    }

    /// Changes the pairs of each annotated episode, in any way that keeps them inside of it, and drops the others.
    fn replace_pairs(&mut self, mut change: impl FnMut(usize, &mut Vec<(u32, u32)>)) {
        let mut all = Vec::with_capacity(self.pairs.len());
        let mut offsets = vec![0];
        let mut pairs = Vec::new();
        for episode in 0..self.len() {
            pairs.clear();
            if self.annotated[episode] {
                pairs.extend_from_slice(&self.pairs[self.pair_range(episode)]);
                change(episode, &mut pairs);
                pairs.sort_unstable();
                pairs.dedup();
            }
            all.extend_from_slice(&pairs);
            offsets.push(all.len());
        }
        self.pairs = all;
        self.pair_offsets = offsets;
    }

    /// Number of episodes.
    pub fn len(&self) -> usize {
        self.annotated.len()
    }

    /// Whether there is no episode.
    pub fn is_empty(&self) -> bool {
        self.annotated.is_empty()
    }

    /// Number of steps of all episodes.
    pub fn steps(&self) -> usize {
        self.rewards.len()
    }

    /// What is observed and done.
    pub fn family(&self) -> &Family {
        &self.family
    }

    /// What the observations look like.
    pub fn space(&self) -> &ObservationSpace {
        &self.family.observation
    }

    /// How often each action was taken; none where actions are not discrete.
    pub fn taken(&self) -> Option<Vec<u64>> {
        let ActionSpace::Discrete(count) = self.family.action else {
            return None;
        };
        let mut taken = vec![0; count];
        for &action in self.actions.all().bytes() {
            taken[usize::from(action)] += 1;
        }
        Some(taken)
    }

    /// Steps of the longest episode.
    pub fn longest(&self) -> usize {
        self.episodes()
            .map(|episode| episode.steps())
            .max()
            .unwrap_or(0)
    }

    /// An episode by its number.
    pub fn episode(&self, number: usize) -> Option<EpisodeView<'_>> {
        let annotated = *self.annotated.get(number)?;
        let steps = self.offsets[number]..self.offsets[number + 1];
        let rows = |width: usize| steps.start * width..steps.end * width;
        Some(EpisodeView {
            observations: self.observations.all().part(rows(self.space().fields())),
            actions: self.actions.all().part(rows(self.family.action.fields())),
            rewards: &self.rewards[steps],
            pairs: &self.pairs[self.pair_range(number)],
            annotated,
        })
    }

    /// All episodes, in order.
    pub fn episodes(&self) -> impl Iterator<Item = EpisodeView<'_>> {
        (0..self.len()).filter_map(|number| self.episode(number))
    }

    fn pair_range(&self, episode: usize) -> Range<usize> {
        self.pair_offsets[episode]..self.pair_offsets[episode + 1]
    }

    pub(super) fn all_observations(&self) -> Values<'_> {
        self.observations.all()
    }

    pub(super) fn all_actions(&self) -> Values<'_> {
        self.actions.all()
    }

    pub(super) fn all_rewards(&self) -> &[f32] {
        &self.rewards
    }

    pub(super) fn all_pairs(&self) -> &[(u32, u32)] {
        &self.pairs
    }

    pub(super) fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    pub(super) fn pair_offsets(&self) -> &[usize] {
        &self.pair_offsets
    }

    /// What is in the set, for people: several lines.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<14}{value}");
        };
        let annotated = self
            .annotated
            .iter()
            .filter(|annotated| **annotated)
            .count();
        let percent = |part: usize, whole: usize| 100.0 * part as f64 / whole.max(1) as f64;
        let range = |values: &mut dyn Iterator<Item = f64>| {
            let (mut low, mut high, mut sum, mut count) =
                (f64::INFINITY, f64::NEG_INFINITY, 0.0, 0);
            for value in values {
                low = low.min(value);
                high = high.max(value);
                sum += value;
                count += 1;
            }
            match count {
                0 => "none".to_owned(),
                _ => format!(
                    "{low:.4} min, {:.4} mean, {high:.4} max",
                    sum / f64::from(count)
                ),
            }
        };

        line(
            "source",
            match &self.task {
                Some(task) => format!(
                    "{task}{}",
                    self.seed
                        .map_or(String::new(), |seed| format!(", seed {seed}"))
                ),
                None => "not told".to_owned(),
            },
        );
        line("episodes", self.len().to_string());
        line("steps", self.steps().to_string());
        line(
            "length",
            range(&mut self.episodes().map(|episode| episode.steps() as f64)),
        );
        let total =
            |episode: EpisodeView| episode.rewards.iter().copied().map(f64::from).sum::<f64>();
        line("return", range(&mut self.episodes().map(total)));
        line("observation", self.space().to_string());
        match self.taken() {
            Some(taken) => {
                for (action, &count) in taken.iter().enumerate() {
                    let share = percent(count as usize, self.steps());
                    line(
                        &format!("action {action}"),
                        format!("{count} ({share:.1} %)"),
                    );
                }
            }
            None => {
                let width = self.family.action.fields();
                for index in 0..width {
                    let values = self.actions.all().reals().iter().skip(index);
                    let mut values = values.step_by(width).copied().map(f64::from);
                    line(&format!("action [{index}]"), range(&mut values));
                }
            }
        }
        line(
            "annotated",
            format!("{annotated} ({:.2} %)", percent(annotated, self.len())),
        );
        let annotated = self.episodes().filter(|episode| episode.annotated);
        line(
            "pairs",
            range(&mut annotated.map(|episode| episode.pairs.len() as f64)),
        );
        text
    }
}
