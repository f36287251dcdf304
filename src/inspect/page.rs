//! The page: data as JSON in a file with its own style and program.

use ndarray::ArrayView2;
use serde::Serialize;

use super::diagnosis::{Diagnosis, View};
use super::encode::encode_all;
use super::look::Frames;
use super::{Error, Request};
use crate::backend::Backend;
use crate::batch::TokenLayout;
use crate::model::Model;
use crate::train::checkpoint::ModelHeader;
use dtmem_reference::content_memory::Order;

const HTML: &str = include_str!("page.html");
const CSS: &str = include_str!("page.css");
const JS: &str = include_str!("page.js");

/// Characters that the maps over tokens, and those over slots, may take.
const BUDGET: usize = 1_500_000;

/// Everything that the page shows. Layers and heads are counted from 1, steps from 0.
#[derive(Debug, Serialize)]
struct Data<'a> {
    name: &'a str,
    label: &'a str,
    task: String,
    episode: u64,
    seed: u64,
    parameters: usize,
    trained_steps: u64,
    success: bool,
    timed_out: bool,
    verdict: &'a str,
    reasons: &'a [String],
    /// The step to look at first.
    focus: usize,
    /// First step off the expert's way.
    left_at: Option<usize>,
    actions: &'a [String],
    steps: Vec<Step>,
    frames: Frames,
    /// Kinds of the tokens of a step, in order.
    tokens: &'static [&'static str],
    /// Which of them the action is chosen at.
    query: usize,
    /// First token of each segment, and the number of tokens.
    segments: &'a [usize],
    by_segment: bool,
    attention: Vec<Head>,
    /// Shares of attention below this are left out.
    attention_floor: f64,
    memory: Vec<Layer>,
    memory_floor: f64,
}

#[derive(Debug, Serialize)]
struct Step {
    action: u8,
    expert: Option<u8>,
    differs: bool,
    probabilities: Vec<f64>,
    reward: f64,
    /// The return to go it was told, where it is told one.
    #[serde(skip_serializing_if = "Option::is_none")]
    told: Option<f32>,
    /// Earlier steps that the action follows from.
    recalls: Vec<usize>,
}

/// Attention of one head, [T, T] as text.
#[derive(Debug, Serialize)]
struct Head {
    layer: usize,
    head: usize,
    taught: bool,
    map: String,
}

/// A memory layer, maps as text.
#[derive(Debug, Serialize)]
struct Layer {
    layer: usize,
    taught: bool,
    slots: usize,
    reads_after_writing: bool,
    /// w [T, N].
    address: String,
    /// w·β [T, N].
    written: String,
    /// keep [S, N].
    keep: String,
    /// E [T, T].
    recall: String,
    /// What is left of M₀ [1, T].
    start: String,
}

/// Writes the page.
pub(super) fn render<B: Backend<Element = f32>>(
    view: &View,
    diagnosis: &Diagnosis,
    header: &ModelHeader,
    request: &Request,
    number: u64,
    model: &Model<B>,
) -> Result<String, Error> {
    let (episode, trace) = (view.episode, view.trace);
    let heads = trace.attention.iter().flatten();
    let recalls = view.recall.iter().map(|(map, _)| map);
    let maps: Vec<ArrayView2<f64>> = heads.chain(recalls).map(|map| map.view()).collect();
    let (over_tokens, attention_floor) = encode_all(&maps, BUDGET);
    let starts: Vec<_> = view
        .recall
        .iter()
        .map(|(_, start)| start.view().insert_axis(ndarray::Axis(0)))
        .collect();
    let maps: Vec<ArrayView2<f64>> = trace
        .memory
        .iter()
        .zip(&starts)
        .flat_map(|(memory, start)| {
            [
                memory.address.view(),
                memory.written.view(),
                memory.keep.view(),
                start.view(),
            ]
        })
        .collect();
    let (over_slots, memory_floor) = encode_all(&maps, BUDGET);
    let (mut over_tokens, mut over_slots) = (over_tokens.into_iter(), over_slots.into_iter());
    let next = |maps: &mut std::vec::IntoIter<String>| maps.next().unwrap_or_default();
    let attention = trace
        .attention
        .iter()
        .enumerate()
        .flat_map(|(layer, heads)| (0..heads.len()).map(move |head| [layer, head]))
        .map(|[layer, head]| Head {
            layer: layer + 1,
            head: head + 1,
            taught: view.is_taught(layer, head),
            map: next(&mut over_tokens),
        })
        .collect();
    let memory = trace
        .memory
        .iter()
        .enumerate()
        .map(|(layer, memory)| Layer {
            layer: layer + 1,
            taught: view.is_memory_taught(layer),
            slots: memory.address.ncols(),
            reads_after_writing: memory.order == Order::WriteThenRead,
            address: next(&mut over_slots),
            written: next(&mut over_slots),
            keep: next(&mut over_slots),
            start: next(&mut over_slots),
            recall: next(&mut over_tokens),
        })
        .collect();
    let data = Data {
        name: request.name,
        label: &request.task.label,
        task: request.task.task.to_string(),
        episode: number,
        seed: header.config.evaluation.seed,
        parameters: model.parameter_count(),
        trained_steps: header.step,
        success: episode.success,
        timed_out: episode.timed_out,
        verdict: &diagnosis.verdict,
        reasons: &diagnosis.reasons,
        focus: diagnosis.step,
        left_at: episode.left_at(),
        actions: view.actions,
        steps: (0..episode.steps())
            .map(|step| of_step(view, step))
            .collect(),
        frames: Frames::new(&request.task.task, &episode.observations),
        tokens: match view.layout {
            TokenLayout::ObsAction => &["observation", "action"],
            TokenLayout::ReturnObsAction => &["return", "observation", "action"],
        },
        query: view.layout.observation_offset(),
        segments: &trace.segments,
        by_segment: view.by_segment,
        attention,
        attention_floor,
        memory,
        memory_floor,
    };
    // No `<` in the data, so that nothing in it can end its element.
    let json = serde_json::to_string(&data)
        .map_err(|error| Error::Data(error.to_string()))?
        .replace('<', "\\u003c");
    Ok(HTML
        .replacen("/*style*/", CSS, 1)
        .replacen("/*program*/", JS, 1)
        .replacen("/*data*/", &json, 1))
}

fn of_step(view: &View, step: usize) -> Step {
    let episode = view.episode;
    let rounded = |p: &f64| (p * 1e6).round() / 1e6;
    let told = episode.returns.get(step).copied();
    Step {
        action: episode.actions.get(step).copied().unwrap_or_default(),
        expert: episode.expert.get(step).copied().flatten(),
        differs: episode.differs(step),
        probabilities: episode
            .probabilities
            .get(step)
            .map(|row| row.iter().map(rounded).collect())
            .unwrap_or_default(),
        reward: episode.rewards.get(step).copied().unwrap_or(0.0),
        told: told.filter(|_| view.layout == TokenLayout::ReturnObsAction),
        recalls: episode.recalled(step).collect(),
    }
}
