//! Experiments: grids of settings, each run with several seeds, summed up in a table and a picture.
//!
//! One file per experiment: a function that lists its cells. To add one, write such a function,
//! and name it in [`EXPERIMENTS`].

use std::fmt::Write as _;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

use crate::train;
use crate::train::config::ConfigError;

mod adapt;
mod annotation;
mod carry;
pub mod grid;
pub mod memory;
mod plot;
mod recall;
pub mod report;
pub mod run;
mod slots;
pub mod statistics;
mod supervision;

use grid::Grid;

/// A question, and the grid that answers it.
#[derive(Debug, Clone, Copy)]
pub struct Experiment {
    /// Its name on the command line.
    pub name: &'static str,
    /// What is varied, and on what.
    pub about: &'static str,
    /// About how long it takes, quick on two idle cores and full on one GPU: estimates.
    pub takes: [&'static str; 2],
    /// Its cells.
    pub grid: fn(Size) -> Grid,
}

/// How large the grid and its runs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// Minutes on two cores.
    Quick,
    /// As the papers, for a GPU.
    Full,
}

impl Size {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Full => "full",
        }
    }
}

/// All experiments.
pub const EXPERIMENTS: &[Experiment] = &[
    annotation::ANNOTATION,
    supervision::SUPERVISION,
    slots::SLOTS,
    recall::RECALL,
    adapt::ADAPT,
    carry::CARRY,
];

/// What stands for all experiments, one after another.
const ALL: &str = "all";

/// One experiment, or all of them.
#[derive(Debug, Clone, Copy)]
pub struct Chosen(pub &'static [Experiment]);

impl FromStr for Chosen {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        if word == ALL {
            return Ok(Self(EXPERIMENTS));
        }
        let position = EXPERIMENTS.iter().position(|one| one.name == word);
        let names = EXPERIMENTS.iter().map(|one| one.name);
        position
            .map(|index| Self(&EXPERIMENTS[index..=index]))
            .ok_or_else(|| {
                let names: Vec<&str> = names.chain([ALL]).collect();
                format!(
                    "`{word}` is no experiment, expected one of {}",
                    names.join(", ")
                )
            })
    }
}

/// What each experiment does and about how long it takes, for `--help`.
pub fn overview() -> String {
    let mut text =
        "Experiments (about how long, with 3 seeds: --quick on two idle cores, --full on \
                    one GPU):\n"
            .to_owned();
    for Experiment {
        name, about, takes, ..
    } in EXPERIMENTS
    {
        let [quick, full] = takes;
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {name:<12} {about}\n{:15}{quick}; {full}", "");
    }
    text + "  all          each of them, one after another"
}

/// Why an experiment cannot start or go on.
#[derive(Debug, Error)]
pub enum Error {
    /// A cell.
    #[error("cell `{cell}`, seed {seed}: {source}")]
    Cell {
        /// Its name.
        cell: String,
        /// Its seed.
        seed: u64,
        /// What went wrong.
        source: Box<train::Error>,
    },
    /// A file or a picture.
    #[error(transparent)]
    File(#[from] train::Error),
    /// The result of a cell belongs to another configuration.
    #[error(
        "{}: this result has {key} = {saved}, but now the cell has {key} = {found}: run it again \
         with --overwrite, or choose another folder with --out DIR", path.display()
    )]
    Changed {
        /// The result.
        path: PathBuf,
        /// The first setting that differs.
        key: String,
        /// Its value in the folder.
        saved: String,
        /// Its value now.
        found: String,
    },
    /// An argument.
    #[error("{argument}: found {found}, expected {expected}")]
    Argument {
        /// Which.
        argument: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
}

impl Error {
    fn of_cell(cell: &str, seed: u64) -> impl FnOnce(train::Error) -> Self {
        move |source| Self::Cell {
            cell: cell.to_owned(),
            seed,
            source: Box::new(source),
        }
    }

    fn of_config(cell: &str, seed: u64) -> impl FnOnce(ConfigError) -> Self {
        move |source| Self::of_cell(cell, seed)(source.into())
    }
}
