//! One episode of a trained model as a page to look at: what it saw, did, attended to, wrote into
//! its memory and read from it, and where it left the expert's way.
//!
//! [`inspect`] plays the episode and makes one HTML file that needs nothing else: style, program
//! and data stand in it. Probabilities are those of acting; attention and memory come from one
//! forward pass over the finished episode ([`Model::trace`]).

mod diagnosis;
mod encode;
mod episode;
mod look;
mod page;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use diagnosis::Diagnosis;
pub use encode::{decode, encode};
pub use episode::Episode;

use crate::backend::Backend;
use crate::batch::{BatchError, PackedBatch, Trajectory};
use crate::model::{AttentionSpan, Model, ModelError, Trace};
use crate::spaces::Family;
use crate::tasks::{Task, TaskError, write_beside};
use crate::train::checkpoint::ModelHeader;
use crate::train::config::TaskConfig;

/// Most tokens of an episode that is shown.
pub const MOST_TOKENS: usize = 4096;

/// Why there is no page.
#[derive(Debug, Error)]
pub enum Error {
    /// The folder, or the model in it.
    #[error(transparent)]
    Train(#[from] crate::train::Error),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The task.
    #[error("the task: {0}")]
    Task(#[from] TaskError),
    /// The episode cannot be packed.
    #[error("the episode: {0}")]
    Batch(#[from] BatchError),
    /// There is no model to inspect.
    #[error(
        "{}: no model in this folder ({source}); expected the output folder of `dtmem train`, with \
         model.safetensors in it; an adapter is inspected on its base: `dtmem inspect BASE --adapter \
         DIR`",
        .folder.display()
    )]
    NoModel {
        /// The folder.
        folder: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The model has no task to play.
    #[error(
        "this model was trained on demonstrations of its own and has no task to be played: name \
         one that it fits with --task, such as --task hallway,length=2"
    )]
    NoTask,
    /// The model cannot play a task.
    #[error("--task {task}: it has {found}, but this model was made for {expected}")]
    OtherTask {
        /// What was asked for.
        task: String,
        /// What the task asks of a model.
        found: String,
        /// What this model can do.
        expected: String,
    },
    /// No episode fails.
    #[error(
        "--failed: the model succeeds in all of the {episodes} episodes from {first} on: leave \
         --failed out, or start at another one with --seed"
    )]
    NoFailure {
        /// The first that was tried.
        first: u64,
        /// How many were.
        episodes: u64,
    },
    /// An episode is longer than a page can show.
    #[error("the episode has {tokens} tokens, a page shows at most {MOST_TOKENS}")]
    TooLong {
        /// Its length.
        tokens: usize,
    },
    /// The data of the page cannot be written as JSON.
    #[error("the data of the page: {0}")]
    Data(String),
    /// The page cannot be written.
    #[error("{}: cannot write it: {source}", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// Which episode to show.
#[derive(Debug, Clone, PartialEq)]
pub struct Request<'a> {
    /// What the model is called on the page.
    pub name: &'a str,
    /// The task to play.
    pub task: &'a Played,
    /// Number of the episode in the evaluation set of the run.
    pub episode: u64,
    /// Go on from there to the first episode that fails, at most so many.
    pub failed: Option<u64>,
}

/// An episode with everything that is shown of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspection {
    /// The number of the episode.
    pub number: u64,
    /// What was seen and done.
    pub episode: Episode,
    /// What happened inside of the model.
    pub trace: Trace,
    /// Where it left the expert's way, and what it recalled there.
    pub diagnosis: Diagnosis,
    /// The whole page.
    pub html: String,
}

impl Inspection {
    /// Writes the page beside the old one and renames it.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        write_beside(path, self.html.as_bytes()).map_err(|source| Error::Write {
            path: path.to_owned(),
            source,
        })
    }
}

/// A task that a model can play, and what it is told there.
#[derive(Debug, Clone, PartialEq)]
pub struct Played {
    /// Its name among the tasks of the run, or its own.
    pub label: String,
    /// The task.
    pub task: Task,
    /// Number of its family in the model.
    pub family: usize,
    /// The return to ask for.
    pub target_return: f64,
    /// Returns are divided by this.
    pub return_scale: f64,
}

/// The task that `name` asks of a model: the first of its run without a name, the one of that name
/// in the run, or else what [`Task::from_str`](std::str::FromStr) reads, with the returns of the
/// run's first task of that kind.
///
/// # Errors
/// A model without a task, a name that is no task, and a task that the model does not fit.
pub fn task(header: &ModelHeader, name: Option<&str>) -> Result<Played, Error> {
    let list = header.config.task_list();
    let known = || list.iter().zip(&header.target_returns);
    let of_run = |wanted: &dyn Fn(&TaskConfig, &Task) -> bool| {
        known().find_map(|(config, &target_return)| {
            let task = config.task.as_ref().filter(|task| wanted(config, task))?;
            Some((config, task, target_return))
        })
    };
    let (label, task, like) = match name {
        None => match of_run(&|_, _| true) {
            Some((config, task, target)) => {
                let label = config.label.clone().unwrap_or_default();
                (label, task.clone(), Some((config, target)))
            }
            None => return Err(Error::NoTask),
        },
        Some(name) => match of_run(&|config, _| config.label.as_deref() == Some(name)) {
            Some((config, task, target)) => (name.to_owned(), task.clone(), Some((config, target))),
            None => {
                let task: Task = name.parse()?;
                let kind = task.name();
                let like = of_run(&|_, task| task.name() == kind).or(of_run(&|_, _| true));
                let like = like.map(|(config, _, target)| (config, target));
                (task.to_string(), task, like)
            }
        },
    };
    let (family, spaces) = (task.family(), &header.spaces);
    let position = spaces.position(&family);
    let Some(position) = position.filter(|_| task.max_steps() <= spaces.steps) else {
        let families: Vec<String> = spaces.families.iter().map(Family::to_string).collect();
        return Err(Error::OtherTask {
            found: format!("{family}, up to {} steps", task.max_steps()),
            expected: format!("{}, up to {} steps", families.join("; or "), spaces.steps),
            task: task.to_string(),
        });
    };
    Ok(Played {
        label,
        task,
        family: position,
        target_return: like.map_or(0.0, |(_, target)| target),
        return_scale: like.map_or(1.0, |(config, _)| config.data.return_scale),
    })
}

/// Plays an episode of the run's evaluation set and makes a page of it. `progress` is told how many
/// episodes were played in search of a failure.
///
/// # Errors
/// A task that does not fit the model, an episode that is too long to be shown, no failure where
/// one was asked for.
pub fn inspect<B: Backend<Element = f32>>(
    model: &Model<B>,
    header: &ModelHeader,
    request: &Request,
    mut progress: impl FnMut(u64),
) -> Result<Inspection, Error> {
    let seed = header.config.evaluation.seed;
    let play = |number| Episode::play(model, request.task, seed, number);
    let mut number = request.episode;
    let mut episode = play(number)?;
    if let Some(most) = request.failed {
        let last = number.saturating_add(most.saturating_sub(1));
        while episode.success {
            if number >= last {
                return Err(Error::NoFailure {
                    first: request.episode,
                    episodes: most,
                });
            }
            number += 1;
            progress(number - request.episode);
            episode = play(number)?;
        }
    }
    let tokens = episode.steps() * model.config().layout.tokens_per_step();
    if tokens > MOST_TOKENS {
        return Err(Error::TooLong { tokens });
    }
    let trace = model.trace(&pack(model, request.task.family, &episode)?)?;
    let supervised = header.config.supervision();
    let recall: Vec<_> = trace
        .memory
        .iter()
        .map(|memory| memory.recall(&trace.segments))
        .collect();
    let view = diagnosis::View {
        layout: model.config().layout,
        by_segment: model.config().attention == AttentionSpan::Segment,
        supervision: supervised.as_ref(),
        actions: &look::action_names(&request.task.task),
        episode: &episode,
        trace: &trace,
        recall: &recall,
    };
    let diagnosis = Diagnosis::new(&view);
    let html = page::render(&view, &diagnosis, header, request, number, model)?;
    Ok(Inspection {
        number,
        diagnosis,
        html,
        trace,
        episode,
    })
}

/// The finished episode as one sequence.
fn pack<B: Backend>(
    model: &Model<B>,
    family: usize,
    episode: &Episode,
) -> Result<PackedBatch, BatchError> {
    let mut packer = model.packer();
    packer.push_trajectory(Trajectory {
        family,
        observations: (&episode.observations).into(),
        actions: (&episode.actions).into(),
        returns: &episode.returns,
        pairs: &[],
        annotated: false,
    })?;
    Ok(packer.batch().clone())
}
