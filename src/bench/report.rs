//! What `dtmem bench` writes.

use std::fmt;
use std::io::Write;

use serde::Serialize;

use super::{Case, Ceilings, Cost, Entry, FOR_HOPPER, Result, Selection, Visit, each};
use crate::train::device::DeviceChoice;

/// One case on one device.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was computed, and whether by the version for Hopper.
    pub operation: String,
    /// Name of the shapes.
    pub scale: &'static str,
    /// Tokens of the batch.
    pub tokens: usize,
    /// Where.
    pub device: String,
    /// The numbers, or why there are none.
    #[serde(flatten)]
    pub outcome: Outcome,
}

impl Row {
    fn new(entry: Entry, device: &str, outcome: Outcome) -> Self {
        Self {
            operation: entry.operation_name(),
            scale: entry.scale.name,
            tokens: entry.scale.tokens(),
            device: device.to_owned(),
            outcome,
        }
    }
}

/// The numbers of a row.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Outcome {
    /// It was timed.
    Timed {
        /// What was computed in.
        precision: &'static str,
        /// Median of one run.
        seconds: f64,
        /// What one run must compute.
        operations: f64,
        /// What one run must move.
        bytes: f64,
        /// Operations per second.
        tflop_per_s: f64,
        /// Bytes per second.
        gb_per_s: f64,
        /// Tokens per second.
        tokens_per_s: f64,
        /// `bytes` or `operations`: what takes longer at the ceilings.
        bound: &'static str,
        /// The time that the bound takes at its ceiling, as a share of the median.
        share: f64,
    },
    /// It was not.
    Skipped {
        /// Why.
        skipped: String,
    },
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let name = format!("{}/{}", self.operation, self.scale);
        write!(f, "{name:<38} {:<12} ", self.device)?;
        match &self.outcome {
            Outcome::Timed {
                seconds,
                tflop_per_s,
                gb_per_s,
                bound,
                share,
                ..
            } => write!(
                f,
                "{:>11.4} ms {tflop_per_s:>9.3} TFLOP/s {gb_per_s:>8.1} GB/s  {:>5.1} % of {bound}",
                1e3 * seconds,
                1e2 * share,
            ),
            Outcome::Skipped { skipped } => write!(f, "skipped: {skipped}"),
        }
    }
}

/// Everything that one run measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Version of this crate.
    pub version: &'static str,
    /// Threads of the CPU.
    pub threads: usize,
    /// The ceilings of each device.
    pub ceilings: Vec<(String, Ceilings)>,
    /// In the order of the table.
    pub rows: Vec<Row>,
}

/// One case by both versions, on one device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison<'a> {
    /// The row of every GPU's version.
    pub row: &'a Row,
    /// Median of one run by that version, and by the one for Hopper.
    pub seconds: [f64; 2],
}

impl fmt::Display for Comparison<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let name = format!("{}/{}", self.row.operation, self.row.scale);
        let [portable, hopper] = self.seconds;
        write!(
            f,
            "{name:<38} {:>11.4} ms, by the version for Hopper {:>11.4} ms: {:.2} times as fast",
            1e3 * portable,
            1e3 * hopper,
            portable / hopper,
        )
    }
}

impl Report {
    /// What was timed by both versions.
    pub fn comparisons(&self) -> impl Iterator<Item = Comparison<'_>> {
        self.rows.iter().filter_map(|row| {
            let name = format!("{}{FOR_HOPPER}", row.operation);
            let same = |other: &&Row| {
                (&other.operation, other.scale, &other.device) == (&name, row.scale, &row.device)
            };
            let hopper = self.rows.iter().find(same)?;
            match (&row.outcome, &hopper.outcome) {
                (
                    Outcome::Timed {
                        seconds: portable, ..
                    },
                    Outcome::Timed {
                        seconds: hopper, ..
                    },
                ) => Some(Comparison {
                    row,
                    seconds: [*portable, *hopper],
                }),
                _ => None,
            }
        })
    }
}

/// Seconds after which nothing new is begun.
const MOST_SECONDS: f64 = 150.0;
/// Samples of a case.
const SAMPLES: usize = 9;
/// Seconds that the samples of a case take together, where one run takes less.
const CASE_SECONDS: f64 = 0.3;

/// Times the table, or what of it the filter leaves, and writes a line for each row.
///
/// # Errors
/// As [`each`]; a line that cannot be written.
pub fn run(device: DeviceChoice, filter: &str, out: &mut impl Write) -> Result<Report> {
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        threads: rayon::current_num_threads(),
        ceilings: Vec::new(),
        rows: Vec::new(),
    };
    let selection = Selection {
        group: None,
        filter,
        seconds: MOST_SECONDS,
    };
    each(device, selection, &mut |visit| {
        let row = match visit {
            Visit::Case(case) => {
                if !report
                    .ceilings
                    .iter()
                    .any(|(device, _)| device == case.device)
                {
                    let device = case.device.to_owned();
                    report.ceilings.push((device, case.ceilings()?));
                }
                measured(case)?
            }
            Visit::Skipped {
                entry,
                device,
                reason,
            } => Row::new(
                entry,
                device,
                Outcome::Skipped {
                    skipped: reason.to_owned(),
                },
            ),
        };
        writeln!(out, "{row}")?;
        report.rows.push(row);
        Ok(())
    })?;
    Ok(report)
}

fn measured(mut case: Case) -> Result<Row> {
    // The first run loads kernels, the second tells how many make a sample.
    case.time(1)?;
    let one = case.time(1)?;
    let samples = ((CASE_SECONDS / one) as usize).clamp(1, SAMPLES);
    let runs = (CASE_SECONDS / SAMPLES as f64 / one).clamp(1.0, 1e4) as u64;
    let mut seconds = (0..samples)
        .map(|_| Ok(case.time(runs)? / runs as f64))
        .collect::<Result<Vec<_>>>()?;
    seconds.sort_by(f64::total_cmp);
    case.row(seconds[samples / 2])
}

impl Case<'_> {
    /// Its row, if one run takes `seconds`. Errors: ceilings that cannot be measured.
    pub fn row(&self, seconds: f64) -> Result<Row> {
        let Cost { operations, bytes } = self.cost;
        let ceilings = self.ceilings()?;
        let least = [
            ("bytes", bytes / ceilings.bytes_per_s),
            ("operations", operations / ceilings.operations_per_s),
        ];
        let (bound, least) = if least[0].1 > least[1].1 {
            least[0]
        } else {
            least[1]
        };
        let outcome = Outcome::Timed {
            precision: self.precision,
            seconds,
            operations,
            bytes,
            tflop_per_s: operations / seconds / 1e12,
            gb_per_s: bytes / seconds / 1e9,
            tokens_per_s: self.entry.scale.tokens() as f64 / seconds,
            bound,
            share: least / seconds,
        };
        Ok(Row::new(self.entry, self.device, outcome))
    }
}
