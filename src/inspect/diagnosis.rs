//! What to look at first: where an episode went wrong, and what was recalled there.

use std::fmt::Write as _;
use std::ops::Range;

use dtmem_reference::content_memory::Order;
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
        let recalled: Vec<Recalled> = sources
            .iter()
            .map(|&source| recall(view, step, source))
            .collect();
        reasons.extend(recalled.iter().take(MOST_SOURCES).map(|r| r.text.clone()));
        if sources.len() > MOST_SOURCES {
            let more = sources.len() - MOST_SOURCES;
            reasons.push(format!("It also follows from {more} more steps."));
        }
        if left_at.is_some() {
            reasons.push(conclusion(step, &recalled));
        }
        Self {
            verdict: verdict(view, left_at),
            reasons,
            step,
        }
    }
}

/// What a wrong action at `step` comes from, given what was recalled there.
fn conclusion(step: usize, recalled: &[Recalled]) -> String {
    // What several steps share is less for each; the one that is recalled least counts.
    let limits = RECALLED.map(|limit| limit / recalled.len().max(1) as f64);
    let Some(least) = recalled.iter().min_by(|a, b| a.share.total_cmp(&b.share)) else {
        return format!("No earlier step is annotated as needed at step {step}.");
    };
    match least.rival {
        Some(rival) if least.share >= limits[1] => format!(
            "So it recalled what it needed together with other steps, step {rival} more than that."
        ),
        _ if least.share >= limits[0] => {
            "So it recalled what it needed; the mistake lies in what it made of it.".to_owned()
        }
        _ if least.share < limits[1] && least.nearby < limits[1] => {
            "So it hardly saw what it needed.".to_owned()
        }
        _ => "So it recalled what it needed only in part.".to_owned(),
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

/// How a step was recalled at another.
struct Recalled {
    /// The largest share of any head, and of what any memory gave back.
    share: f64,
    /// A step of which the memory gave more, where a memory recalled most.
    rival: Option<usize>,
    /// The share of the step's whole segment, in what a memory gave back.
    nearby: f64,
    text: String,
}

fn recall(view: &View, step: usize, source: usize) -> Recalled {
    let mut text = format!("At step {step} the right action follows from step {source}.");
    let query = view.query(step);
    let (first, last) = view.segment(source);
    let same_segment = view.segment(step) == (first, last);
    let (mut best, mut rival, mut nearby) = (0.0_f64, None, 0.0_f64);
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
                elsewhere("on", shares, source, step)
            );
        }
    }
    for (layer, (recall, of_start)) in view.recall.iter().enumerate() {
        let reads_first = view.trace.memory[layer].order == Order::ReadThenWrite;
        if same_segment && reads_first {
            continue;
        }
        let shares = view.by_step(recall.row(query));
        let of_segment: f64 = shares.iter().take(last + 1).skip(first).sum();
        let of_start = of_start.get(query).copied().unwrap_or(0.0);
        let all = (shares.iter().sum::<f64>() + of_start).max(f64::MIN_POSITIVE);
        let own = shares.get(source).copied().unwrap_or(0.0) / all;
        nearby = nearby.max(of_segment / all);
        if own > best {
            best = own;
            rival = largest(&shares).filter(|(most, _)| *most != source);
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
            elsewhere("of", &shares, source, step),
            share(of_start)
        );
    }
    Recalled {
        share: best,
        rival: rival.map(|(step, _)| step),
        nearby,
        text,
    }
}

/// The step with the largest share, and that.
fn largest(shares: &[f64]) -> Option<(usize, f64)> {
    let shares = shares.iter().copied().enumerate();
    shares.max_by(|a, b| a.1.total_cmp(&b.1))
}

/// `, most on step 7 (0.61)`, where another step than `source` has more at step `here`.
fn elsewhere(word: &str, shares: &[f64], source: usize, here: usize) -> String {
    match largest(shares) {
        Some((step, most)) if step != source && most > 0.0 => {
            let itself = if step == here { " itself" } else { "" };
            format!(", most {word} step {step}{itself} ({})", share(most))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_conclusion_names_what_went_wrong() {
        let recalled = |share, rival, nearby| Recalled {
            share,
            rival,
            nearby,
            text: String::new(),
        };
        for (all, said) in [
            (vec![], "No earlier step is annotated"),
            (
                vec![recalled(0.9, None, 0.0)],
                "recalled what it needed; the mistake",
            ),
            (
                vec![recalled(0.31, Some(10), 0.8)],
                "other steps, step 10 more than that",
            ),
            (vec![recalled(0.02, Some(10), 0.05)], "hardly saw"),
            (vec![recalled(0.02, Some(10), 0.6)], "only in part"),
            (vec![recalled(0.3, None, 0.0)], "only in part"),
            // Two steps share the attention; the one that is missing counts.
            (
                vec![recalled(0.3, None, 0.0), recalled(0.25, None, 0.0)],
                "the mistake",
            ),
            (
                vec![recalled(0.9, None, 0.0), recalled(0.01, None, 0.0)],
                "hardly saw",
            ),
        ] {
            let text = conclusion(4, &all);
            assert!(text.contains(said), "{text}, expected {said}");
        }
    }
}
