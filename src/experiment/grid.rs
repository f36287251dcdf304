//! What an experiment runs: cells, each a shipped configuration with a few keys set.

use super::memory;

/// The cells of an experiment, in the order of its table.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    /// What every cell is measured by: a column of the table each.
    pub measures: &'static [Measure],
    /// How many seeds each cell has, unless the command says otherwise.
    pub seeds: u64,
    /// The cells.
    pub cells: Vec<Cell>,
}

/// A number that a cell's run ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// Its column in the CSV file.
    pub key: &'static str,
    /// What it is called in the table and the picture.
    pub title: &'static str,
    /// What kind of number it is.
    pub kind: Kind,
}

/// A kind of number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// From 0 to 1: it is drawn, and has an interval over the seeds.
    Share,
    /// The same for every seed.
    Count,
}

impl Measure {
    /// A share from 0 to 1.
    pub const fn share(key: &'static str, title: &'static str) -> Self {
        let kind = Kind::Share;
        Self { key, title, kind }
    }

    /// A whole number.
    pub const fn count(key: &'static str, title: &'static str) -> Self {
        let kind = Kind::Count;
        Self { key, title, kind }
    }
}

/// Greedy play on unseen episodes, and the size of the model.
pub const OF_TRAINING: &[Measure] = &[
    Measure::share("success_rate", "success rate"),
    Measure::count("parameters", "parameters"),
];

/// A setting to be run.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    /// What is varied: a table of its own.
    pub group: &'static str,
    /// Its value: unique in the grid.
    pub name: String,
    /// What is run.
    pub base: Base,
    /// `key=value` settings on top of the base, as `dtmem train --set` takes them.
    pub set: Vec<String>,
    /// The cell of the grid that it adapts, an earlier one: its run with the same seed.
    pub adapts: Option<String>,
}

/// What a cell runs, before its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// The trainer, with this configuration.
    Train {
        /// The file, for errors.
        name: &'static str,
        /// What is in it.
        text: &'static str,
    },
    /// A content memory alone ([`MemoryTest`](super::memory::MemoryTest)), on the CPU.
    Memory,
}

impl Base {
    /// What it is called in tables.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Train { name, .. } => name,
            Self::Memory => memory::NAME,
        }
    }
}

/// A configuration of `configs/`, as it is when the program is built.
macro_rules! shipped {
    ($name:literal) => {
        $crate::experiment::grid::Base::Train {
            name: concat!("configs/", $name),
            text: include_str!(concat!("../../configs/", $name)),
        }
    };
}
pub(super) use shipped;

impl Grid {
    /// A grid without cells.
    pub fn new(measures: &'static [Measure], seeds: u64) -> Self {
        Self {
            measures,
            seeds,
            cells: Vec::new(),
        }
    }

    /// Adds a cell: `set` are settings as in `train.steps=100`.
    pub fn cell(&mut self, group: &'static str, name: impl Into<String>, base: Base, set: &[&str]) {
        self.cells.push(Cell {
            group,
            name: name.into(),
            base,
            set: set.iter().map(|&one| one.to_owned()).collect(),
            adapts: None,
        });
    }

    /// Adds a cell that adapts an earlier one, by its name: `finetune.base` is that one's run.
    pub fn adapted(
        &mut self,
        group: &'static str,
        name: impl Into<String>,
        base: Base,
        adapts: &str,
        set: &[&str],
    ) {
        self.cell(group, name, base, set);
        if let Some(cell) = self.cells.last_mut() {
            cell.adapts = Some(adapts.to_owned());
        }
    }

    /// The number of the cell that a cell adapts.
    pub fn adapted_by(&self, cell: &Cell) -> Option<usize> {
        let name = cell.adapts.as_ref()?;
        self.cells.iter().position(|one| one.name == *name)
    }

    /// The groups in the order in which they first come.
    pub fn groups(&self) -> Vec<&'static str> {
        let mut groups = Vec::new();
        for cell in &self.cells {
            if !groups.contains(&cell.group) {
                groups.push(cell.group);
            }
        }
        groups
    }
}

impl Cell {
    /// The name as that of a folder.
    pub fn folder(&self) -> String {
        let plain = |c: char| match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '.' => c,
            _ => '-',
        };
        self.name.chars().map(plain).collect()
    }
}
