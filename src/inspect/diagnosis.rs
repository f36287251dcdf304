//! What to look at first: where an episode went wrong, and what was recalled there.

use std::fmt::Write as _;
use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView1};

use super::Episode;
use crate::batch::TokenLayout;
use crate::model::{SupervisedPart, SupervisionConfig, Trace};

/// From this share on, a step counts as recalled; below the second one, as not recalled. Heads are
/// taught to share themselves out among what a step needs and the step itself.
const RECALLED: [f64; 2] = [0.4, 0.1];
/// Most recalled steps that are written about.
const MOST_SOURCES: usize = 3;

/// An episode in words.
#[derive(Debug, Clone, PartialEq)]
pub struct Diagnosis {
    /// How it ended, and at which step the model first left the expert's way.
    pub verdict: String,
    /// What it had to recall at [`Self::step`], and what it did recall.
    pub reasons: Vec<String>,
    /// The step to look at first.
    pub step: usize,
}

/// An episode and what happened inside of the model, with what is needed to talk about it.
pub(super) struct View<'a> {
    pub layout: TokenLayout,
    /// Attention ends at segments.
    pub by_segment: bool,
    pub supervision: Option<&'a SupervisionConfig>,
    /// Names of the actions.
    pub actions: &'a [String],
    pub episode: &'a Episode,
    pub trace: &'a Trace,
    /// The effective attention through each layer's memory, and what is left of M₀.
    pub recall: &'a [(Array2<f64>, Array1<f64>)],
}

impl View<'_> {
    fn tokens(&self, step: usize) -> Range<usize> {
        let per_step = self.layout.tokens_per_step();
        step * per_step..(step + 1) * per_step
    }

    /// The token at which the action of a step is chosen.
    fn query(&self, step: usize) -> usize {
        self.tokens(step).start + self.layout.observation_offset()
    }

    /// First and last step of the segment of a step.
    fn segment(&self, step: usize) -> (usize, usize) {
        let per_step = self.layout.tokens_per_step();
        let token = self.query(step);
        let mut bounds = self.trace.segments.windows(2);
        let found = bounds.find(|bounds| (bounds[0]..bounds[1]).contains(&token));
        found.map_or((0, step), |bounds| {
            (bounds[0] / per_step, bounds[1] / per_step - 1)
        })
    }

    /// Sums a row over tokens to one share per step.
    fn by_step(&self, row: ArrayView1<f64>) -> Vec<f64> {
        (0..self.episode.steps())
            .map(|step| self.tokens(step).filter_map(|token| row.get(token)).sum())
            .collect()
    }

    /// Whether a head was taught what to recall.
    pub fn is_taught(&self, layer: usize, head: usize) -> bool {
        self.supervision.is_some_and(|taught| {
            let heads = match &taught.part {
                SupervisedPart::Heads(heads) => heads.as_slice(),
                SupervisedPart::Memory => &[],
            };
            taught.layer == layer && heads.contains(&head)
        })
    }

    /// Whether a layer's memory was.
    pub fn is_memory_taught(&self, layer: usize) -> bool {
        self.supervision
            .is_some_and(|taught| taught.layer == layer && taught.part == SupervisedPart::Memory)
    }

    fn action(&self, action: u8) -> &str {
        let name = self.actions.get(usize::from(action));
        name.map_or("an action without a name", String::as_str)
    }

    fn probability(&self, step: usize, action: u8) -> f64 {
        let row = self.episode.probabilities.get(step);
        row.and_then(|row| row.get(usize::from(action)))
            .copied()
            .unwrap_or(f64::NAN)
    }
}

impl Diagnosis {
    pub(super) fn new(view: &View) -> Self {
        let episode = view.episode;
        let left_at = episode.left_at();
        let step = left_at.unwrap_or_else(|| {
            let mut steps = (0..episode.steps()).rev();
            steps
                .find(|&step| episode.recalled(step).next().is_some())
                .unwrap_or(0)
        });
        let mut reasons = Vec::new();
        let sources: Vec<usize> = episode.recalled(step).collect();
        let mut best = 0.0_f64;
        for &source in sources.iter().take(MOST_SOURCES) {
            let (share, text) = recall(view, step, source);
            best = best.max(share);
            reasons.push(text);
        }
        if sources.len() > MOST_SOURCES {
            let more = sources.len() - MOST_SOURCES;
            reasons.push(format!("It follows from {more} more steps."));
        }
        if sources.is_empty() && left_at.is_some() {
            reasons.push(format!(
                "No earlier step is annotated as needed at step {step}."
            ));
        }
        if left_at.is_some() && !sources.is_empty() {
            let [recalled, not_recalled] = RECALLED;
            reasons.push(
                if best >= recalled {
                    "So it recalled what it needed; the mistake lies in what it made of it."
                } else if best < not_recalled {
                    "So it hardly saw what it needed."
                } else {
                    "So it recalled what it needed only in part."
                }
                .to_owned(),
            );
        }
        Self {
            verdict: verdict(view, left_at),
            reasons,
            step,
        }
    }
}

/// How the episode ended, and where the model left the expert's way.
fn verdict(view: &View, left_at: Option<usize>) -> String {
    let episode = view.episode;
    let reward: f64 = episode.rewards.iter().sum();
    let mut text = match (episode.success, episode.timed_out) {
        (true, _) => format!("Succeeded after {}", count(episode.steps())),
        (false, true) => format!("Failed: out of time after {}", count(episode.steps())),
        (false, false) => format!("Failed after {}", count(episode.steps())),
    };
    let _ = write!(text, ", return {}.", significant(reward));
    match left_at {
        Some(step) => {
            let action = episode.actions.get(step).copied().unwrap_or_default();
            let expert = episode.expert.get(step).copied().flatten();
            let _ = write!(
                text,
                " The model first left the expert’s way at step {step}: it chose “{}” ({}).",
                view.action(action),
                share(view.probability(step, action))
            );
            if let Some(expert) = expert {
                let _ = write!(
                    text,
                    " The expert chooses “{}” there, which the model gave {}.",
                    view.action(expert),
                    share(view.probability(step, expert))
                );
            }
        }
        None => {
            let differing = (0..episode.steps()).filter(|&step| episode.differs(step));
            match differing.count() {
                0 => text += " It took the expert’s action at every step.",
                differing => {
                    let _ = write!(
                        text,
                        " It differed from the expert at {}, which changed nothing.",
                        count(differing)
                    );
                }
            }
        }
    }
    text
}

/// How much of a step was recalled at another, at best, and in words.
fn recall(view: &View, step: usize, source: usize) -> (f64, String) {
    let mut text = format!("At step {step} the right action follows from step {source}.");
    let query = view.query(step);
    let (first, last) = view.segment(source);
    let same_segment = view.segment(step) == (first, last);
    let mut best = 0.0_f64;
    if view.by_segment && !same_segment {
        let _ = write!(
            text,
            " Attention does not reach that far: it ends at the segment, and step {source} is in \
             the segment of steps {first} to {last}."
        );
    } else {
        let mut looked: Vec<(bool, f64, [usize; 2], Vec<f64>)> = Vec::new();
        for (layer, heads) in view.trace.attention.iter().enumerate() {
            for (head, map) in heads.iter().enumerate() {
                let shares = view.by_step(map.row(query));
                let share = shares.get(source).copied().unwrap_or(0.0);
                best = best.max(share);
                looked.push((view.is_taught(layer, head), share, [layer, head], shares));
            }
        }
        // The heads that were taught to, or the one that does it most.
        looked.sort_by(|a, b| b.1.total_cmp(&a.1));
        let taught = looked.iter().any(|(taught, ..)| *taught);
        let shown = looked.iter().enumerate();
        let shown = shown.filter(|(rank, (is_taught, ..))| *is_taught || (*rank == 0 && !taught));
        for (_, (is_taught, share_of_source, [layer, head], shares)) in shown {
            let _ = write!(
                text,
                " Attention of layer {}, head {}{}: {} on step {source}{}.",
                layer + 1,
                head + 1,
                if *is_taught {
                    " (taught to recall)"
                } else {
                    ""
                },
                share(*share_of_source),
                elsewhere(shares, source, step)
            );
        }
    }
    for (layer, (recall, of_start)) in view.recall.iter().enumerate() {
        let shares = view.by_step(recall.row(query));
        let of_segment: f64 = shares.iter().take(last + 1).skip(first).sum();
        let of_start = of_start.get(query).copied().unwrap_or(0.0);
        let all = shares.iter().sum::<f64>() + of_start;
        if all > 0.0 {
            best = best.max(of_segment / all);
        }
        let _ = write!(
            text,
            " What layer {} reads from its memory{} there holds {} of what step {source} wrote and {} \
             of what its segment did, steps {first} to {last}{}; of the initial memory, {}.",
            layer + 1,
            if view.is_memory_taught(layer) {
                " (taught to recall)"
            } else {
                ""
            },
            share(shares.get(source).copied().unwrap_or(0.0)),
            share(of_segment),
            elsewhere(&shares, source, step),
            share(of_start)
        );
    }
    (best, text)
}

/// `, most of step 7 (0.61)`, where another step than `source` has more at step `here`.
fn elsewhere(shares: &[f64], source: usize, here: usize) -> String {
    let most = shares.iter().copied().enumerate();
    let most = most.max_by(|a, b| a.1.total_cmp(&b.1));
    match most {
        Some((step, most)) if step != source && most > 0.0 => {
            let itself = if step == here { " itself" } else { "" };
            format!(", most of step {step}{itself} ({})", share(most))
        }
        _ => String::new(),
    }
}

fn count(steps: usize) -> String {
    format!("{steps} step{}", if steps == 1 { "" } else { "s" })
}

/// A probability or share: two decimals, or that it is smaller.
fn share(share: f64) -> String {
    if share > 0.0 && share < 0.005 {
        return "less than 0.01".to_owned();
    }
    format!("{share:.2}")
}

/// At most three decimals, no trailing zeros.
fn significant(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
