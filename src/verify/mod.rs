//! `dtmem verify`: checks numbers against the reference (SPEC section 9).
//!
//! A fixture file holds the inputs of one operation, its outputs and, if wanted, its gradients, as
//! any framework can dump them; docs/fixtures.md describes it. Two things are checked:
//!
//! * **the file**: its outputs and gradients against the reference in f64, on the inputs as they
//!   stand in the file, with the limit of the type that each tensor is stored in;
//! * **each backend in each type**: the inputs and output gradients are rounded to the type, the
//!   backend runs, and the reference in f64 on the rounded inputs is what it is compared with. The
//!   reference in f64 itself is what the file was compared with, so it is not run a second time.

mod backends;
mod dtype;
mod file;
#[cfg(feature = "cuda")]
mod kernels;
mod operations;
mod params;
mod reference;
mod report;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ndarray::ArrayD;
use safetensors::SafeTensorError;

pub use backends::BackendName;
pub use dtype::Dtype;

use backends::{Backend, RunError, Tensors};
use file::{Case, Fixture, Problem, Recorded};
use report::{Comparison, Error, Table};

/// Why nothing could be checked. (A number that is wrong is not an error but a row that says FAIL.)
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The file cannot be read.
    #[error("{}: cannot read it: {source}; expected a fixture file (docs/fixtures.md)", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file is no safetensors file, or only a part of one.
    #[error(
        "{}: contents: found {source}, expected a whole safetensors file (docs/fixtures.md)", file.display()
    )]
    Format {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        source: SafeTensorError,
    },
    /// A tensor, a parameter or the metadata is not what the operation needs.
    #[error("{}: {what} is {found}, expected {expected}", file.display())]
    Content {
        /// The file.
        file: PathBuf,
        /// The tensor or parameter.
        what: String,
        /// What stands there.
        found: String,
        /// What would have been accepted.
        expected: String,
    },
    /// A backend that this build or this machine does not have.
    #[error("no backend `{backend}`: {missing}")]
    Unavailable {
        /// The backend that was asked for.
        backend: BackendName,
        /// What the build or the machine lacks.
        missing: String,
    },
    /// A backend that did not give results.
    #[error("{}: backend `{backend}`: {source}", file.display())]
    Backend {
        /// The file.
        file: PathBuf,
        /// The backend.
        backend: BackendName,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A word on the command line.
    #[error("`{found}` is no {what}, expected {expected}")]
    Choice {
        /// What the word should name.
        what: &'static str,
        /// The word.
        found: String,
        /// The words that are known.
        expected: &'static str,
    },
    /// The table cannot be written.
    #[error("cannot write the table: {0}")]
    Write(#[from] io::Error),
}

/// Scores this close may change their order when they are computed in f32.
const NEAR_TIE: f64 = 1e-5;

/// One of a kind, or all of them; `all` on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice<T> {
    /// This one.
    One(T),
    /// Every one that the build has.
    All,
}

/// The `--backend` of the command.
pub type BackendChoice = Choice<BackendName>;
/// The `--dtype` of the command.
pub type DtypeChoice = Choice<Dtype>;

impl<T: FromStr> FromStr for Choice<T> {
    type Err = T::Err;

    fn from_str(word: &str) -> Result<Self, T::Err> {
        match word {
            "all" => Ok(Choice::All),
            one => one.parse().map(Choice::One),
        }
    }
}

impl<T: std::fmt::Display> std::fmt::Display for Choice<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Choice::One(one) => one.fmt(f),
            Choice::All => f.pad("all"),
        }
    }
}

/// Checks `files` one after another and writes a table to `out`: one row for each tensor of each
/// file, backend and type, and a last line `N passed, M failed`. True if no row failed. Where all
/// backends are asked for, one that has nothing for a case is a row that says so.
///
/// # Errors
/// A backend that the build lacks, before anything is read. A file that cannot be read or does not
/// fit its operation, after the rows of the files before it.
pub fn run(
    files: &[PathBuf],
    backend: BackendChoice,
    dtype: DtypeChoice,
    out: &mut impl Write,
) -> Result<bool, VerifyError> {
    let backends = backends::chosen(backend)?;
    let dtypes = match dtype {
        Choice::One(one) => vec![one],
        Choice::All => Dtype::ALL.to_vec(),
    };
    let mut table = Table::new(files, out)?;
    for (n, path) in files.iter().enumerate() {
        let Checked {
            comparisons,
            skipped,
        } = check(path, &backends, &dtypes, backend == Choice::All)?;
        for comparison in comparisons {
            table.row(n, &comparison)?;
        }
        for (backend, dtype, reason) in skipped {
            table.skip(n, backend, dtype, &reason)?;
        }
    }
    table.finish()
}

/// What became of one file.
struct Checked {
    comparisons: Vec<Comparison>,
    /// What a backend has nothing for, and why.
    skipped: Vec<(BackendName, Dtype, String)>,
}

/// All comparisons of one file; `may_skip` those that a backend has nothing for.
fn check(
    path: &Path,
    backends: &[Box<dyn Backend>],
    dtypes: &[Dtype],
    may_skip: bool,
) -> Result<Checked, VerifyError> {
    let Fixture { case, recorded } = Fixture::open(path)?;
    let refused = |error| Problem::from(error).in_file(path);
    let unfinished = |backend, error| match error {
        RunError::Refused(error) => refused(error),
        RunError::Missing(reason) => VerifyError::Backend {
            file: path.to_owned(),
            backend,
            source: reason.into(),
        },
        RunError::Failed(source) => VerifyError::Backend {
            file: path.to_owned(),
            backend,
            source,
        },
    };
    let mut comparisons = Vec::new();
    let mut skipped = Vec::new();

    let expected = Expected::new(&case).map_err(refused)?;
    for tensor in &recorded {
        let values = Some(&tensor.values);
        comparisons.push(expected.compare("file", tensor.dtype, &tensor.name, values));
    }
    for &dtype in dtypes {
        let backends: Vec<_> = backends.iter().filter(|b| b.stores(dtype)).collect();
        if backends.is_empty() {
            continue;
        }
        let case = case.rounded(dtype);
        let overflows = case.overflows();
        if !overflows.is_empty() {
            for backend in backends {
                let name = backend.name().to_string();
                comparisons.extend(overflows.iter().map(|(tensor, note)| {
                    Comparison::impossible(&name, dtype, tensor, note.clone())
                }));
            }
            continue;
        }
        let expected = Expected::new(&case).map_err(refused)?;
        for backend in backends {
            let name = backend.name().to_string();
            let found = match backend.run(&case, dtype) {
                Ok(found) => found,
                Err(RunError::Missing(reason)) if may_skip => {
                    skipped.push((backend.name(), dtype, reason));
                    continue;
                }
                Err(error) => return Err(unfinished(backend.name(), error)),
            };
            for Recorded { name: tensor, .. } in &recorded {
                comparisons.push(expected.compare(&name, dtype, tensor, found.get(tensor)));
            }
        }
    }
    Ok(Checked {
        comparisons,
        skipped,
    })
}

/// What the reference in f64 says about a case.
struct Expected {
    tensors: Tensors,
    saturated: bool,
    top_k_gap: Option<f64>,
}

impl Expected {
    fn new(case: &Case) -> Result<Self, dtmem_reference::Error> {
        Ok(Self {
            tensors: case.run::<f64>()?,
            saturated: case.saturated()?,
            top_k_gap: case.top_k_gap()?,
        })
    }

    fn compare(
        &self,
        checked: &str,
        dtype: Dtype,
        tensor: &str,
        found: Option<&ArrayD<f64>>,
    ) -> Comparison {
        let (Some(found), Some(reference)) = (found, self.tensors.get(tensor)) else {
            return Comparison::impossible(checked, dtype, tensor, "not computed".to_owned());
        };
        let saturated = self.saturated && matches!(tensor, "grad_input.q" | "grad_input.k");
        let mut comparison = Comparison {
            checked: checked.to_owned(),
            dtype,
            tensor: tensor.to_owned(),
            error: Error::between(found, reference),
            limit: dtype.limit(saturated),
            notes: Vec::new(),
        };
        if comparison.limit != dtype.limit(false) {
            comparison.notes.push("saturated rows".to_owned());
        }
        if !comparison.passed() {
            comparison.notes.extend(report::oddities(found, reference));
            if let Some(gap) = self
                .top_k_gap
                .filter(|gap| dtype != Dtype::F64 && *gap < NEAR_TIE)
            {
                let note = format!("top_k: scores {gap:.0e} apart, either slot may be kept");
                comparison.notes.push(note);
            }
        }
        comparison
    }
}
