//! Training and evaluation: configuration, order of the data, loop, checkpoints, metrics, pictures.
//!
//! A run is a function of its [`config::Config`]: the same configuration gives the same bits,
//! whatever the number of threads, and whether or not it was stopped and resumed.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::batch::BatchError;
use crate::model::ModelError;
use crate::tasks::{DemonstrationError, TaskError};

pub mod adapters;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod device;
pub mod evaluate;
pub mod finetune;
pub mod metrics;
pub mod plots;
pub mod ranks;
pub mod run;
pub mod schedule;

/// Why a run cannot start or go on.
#[derive(Debug, Error)]
pub enum Error {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// The demonstrations.
    #[error(transparent)]
    Demonstrations(#[from] DemonstrationError),
    /// A demonstration that cannot be packed.
    #[error("the demonstrations: {0}")]
    Batch(#[from] BatchError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The task.
    #[error("the task: {0}")]
    Task(#[from] TaskError),
    /// The file system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file of a run that is not there, or cannot be read.
    #[error(
        "{}: cannot read it: {source}; expected the output folder of a run that has this file", path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file that is damaged, or belongs to something else.
    #[error("{}: {what}: found {found}, expected {expected}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Which part of it.
        what: String,
        /// What stands there.
        found: String,
        /// What should.
        expected: String,
    },
    /// The output folder holds a run.
    #[error(
        "{}: there is a run in this folder already: continue it with --resume, replace it with \
         --overwrite, or choose another folder with --out DIR", .0.display()
    )]
    Exists(PathBuf),
    /// The output folder holds a model.
    #[error(
        "{}: there is a run in this folder already: replace it with --overwrite, or choose another \
         folder with --out DIR", .0.display()
    )]
    Taken(PathBuf),
    /// A device that was asked for.
    #[error("--device {device}: {reason}; or compute on another one, with --device auto or cpu")]
    Device {
        /// What was asked for.
        device: device::DeviceChoice,
        /// Why it does not work.
        reason: String,
    },
    /// The device of one of several ranks.
    #[error(
        "--device {device}, rank {} of {}: {reason}; ranks train on a GPU each: start as many as there are \
         (WORLD_SIZE; --nproc-per-node of torchrun), or train without ranks", .rank.number, .rank.of
    )]
    DeviceOfRank {
        /// What was asked for.
        device: device::DeviceChoice,
        /// Which rank.
        rank: crate::backend::Rank,
        /// Why it does not work.
        reason: String,
    },
    /// Other ranks that are not found.
    #[error(transparent)]
    Ranks(#[from] ranks::RanksError),
    /// A model without a task.
    #[error(
        "{}: this model was trained on demonstrations of its own and has no task to be evaluated \
         on: train it with data.validation above 0, and the loss on what was kept is measured", .0.display()
    )]
    NoTask(PathBuf),
    /// There is nothing to resume.
    #[error("{}: no run to resume in this folder: leave out --resume to start one", .0.display())]
    NothingToResume(PathBuf),
    /// The run to resume had another configuration.
    #[error(
        "{}: the run in this folder has {key} = {saved}, but {key} = {found} was asked for: resume \
         it as it was, or choose another folder with --out DIR", path.display()
    )]
    Changed {
        /// The output folder.
        path: PathBuf,
        /// The first key that differs.
        key: String,
        /// Its value in the folder.
        saved: String,
        /// Its value now.
        found: String,
    },
    /// The loss or the gradient overflowed.
    #[error(
        "step {step}: {what} is {value}, expected a finite number; {kept}. Try a lower \
         train.learning_rate, a train.warmup_steps or a train.clip"
    )]
    NotFinite {
        /// The step, from 1.
        step: u64,
        /// Loss or gradient norm.
        what: &'static str,
        /// NaN or an infinity.
        value: f64,
        /// What is left on disk.
        kept: String,
    },
    /// The backend failed in the middle of a run.
    #[error("step {step}: {source}; {kept}")]
    Interrupted {
        /// The step, from 1.
        step: u64,
        /// What failed.
        source: ModelError,
        /// What is left on disk.
        kept: String,
    },
    /// A picture could not be drawn.
    #[error("{}: cannot draw: {message}", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// Why.
        message: String,
    },
}

impl Error {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    fn file(
        path: &Path,
        what: impl Into<String>,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::File {
            path: path.to_owned(),
            what: what.into(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}
