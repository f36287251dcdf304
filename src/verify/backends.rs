//! The backends that a case can be run through.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use ndarray::ArrayD;

use super::file::Case;
use super::reference::Reference;
use super::{BackendChoice, Choice, Dtype, VerifyError};

/// Names a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendName {
    /// The reference, in pure Rust.
    Reference,
    /// The kernels, run on the CPU.
    Host,
    /// The kernels, run on a GPU.
    Cuda,
}

impl BackendName {
    const ALL: [Self; 3] = [Self::Reference, Self::Host, Self::Cuda];

    /// The backend, or what the build lacks for it.
    fn open(self) -> Result<Box<dyn Backend>, &'static str> {
        match self {
            Self::Reference => Ok(Box::new(Reference)),
            Self::Host => Err("it has no kernels that run on the CPU (feature `host`)"),
            Self::Cuda => Err("it has no kernels that run on a GPU (feature `cuda`)"),
        }
    }
}

impl fmt::Display for BackendName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Self::Reference => "reference",
            Self::Host => "host",
            Self::Cuda => "cuda",
        })
    }
}

impl FromStr for BackendName {
    type Err = VerifyError;

    fn from_str(word: &str) -> Result<Self, VerifyError> {
        let named = Self::ALL.into_iter().find(|name| name.to_string() == word);
        named.ok_or_else(|| VerifyError::Choice {
            what: "backend",
            found: word.to_owned(),
            expected: "reference, host, cuda or all",
        })
    }
}

/// Tensors by their name in a file.
pub(super) type Tensors = BTreeMap<String, ArrayD<f64>>;

/// Runs the operation of a case.
pub(super) trait Backend {
    /// Its name on the command line and in the table.
    fn name(&self) -> BackendName;

    /// The outputs and, if the case has output gradients, the gradients of all inputs.
    /// The numbers of the case are already of type `dtype`; so are those that come back.
    fn run(&self, case: &Case, dtype: Dtype) -> Result<Tensors, dtmem_reference::Error>;
}

/// The backends of the build that the choice names.
pub(super) fn chosen(choice: BackendChoice) -> Result<Vec<Box<dyn Backend>>, VerifyError> {
    match choice {
        Choice::One(backend) => {
            let unavailable = |missing| VerifyError::Unavailable { backend, missing };
            Ok(vec![backend.open().map_err(unavailable)?])
        }
        Choice::All => Ok(BackendName::ALL
            .into_iter()
            .filter_map(|name| name.open().ok())
            .collect()),
    }
}
