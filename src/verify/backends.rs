//! The backends that a case can be run through.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use ndarray::ArrayD;

use super::file::Case;
#[cfg(feature = "cuda")]
use super::kernels::Kernels;
use super::reference::Reference;
use super::{BackendChoice, Choice, Dtype, VerifyError};
#[cfg(feature = "host")]
use crate::backend::gpu::HostDevice;
#[cfg(feature = "cuda")]
use crate::backend::gpu::{CudaDevice, Multiply};

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

    /// The backend, or what the build or the machine lacks for it.
    fn open(self) -> Result<Box<dyn Backend>, String> {
        match self {
            Self::Reference => Ok(Box::new(Reference)),
            #[cfg(feature = "host")]
            Self::Host => Ok(Box::new(Kernels {
                name: self,
                device: HostDevice::default(),
            })),
            #[cfg(not(feature = "host"))]
            Self::Host => Err("it was built without the feature `host`".to_owned()),
            #[cfg(feature = "cuda")]
            Self::Cuda => match CudaDevice::new(0, Multiply::Exact) {
                Ok(device) => Ok(Box::new(Kernels { name: self, device })),
                Err(error) => Err(error.to_string()),
            },
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => Err("it was built without the feature `cuda`".to_owned()),
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

/// Why a backend gave no results.
#[derive(Debug)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code))] // the reference only refuses
pub(super) enum RunError {
    /// It refused what is in the file.
    Refused(dtmem_reference::Error),
    /// It has nothing for such a case.
    Missing(String),
    /// It failed.
    Failed(Box<dyn std::error::Error + Send + Sync>),
}

#[cfg(feature = "cuda")]
impl RunError {
    /// Something that the backend does not have.
    pub fn missing(what: &str) -> Self {
        Self::Missing(format!("it has no {what}"))
    }
}

impl From<dtmem_reference::Error> for RunError {
    fn from(error: dtmem_reference::Error) -> Self {
        Self::Refused(error)
    }
}

#[cfg(feature = "cuda")]
impl From<crate::ops::Error> for RunError {
    fn from(error: crate::ops::Error) -> Self {
        match error {
            crate::ops::Error::Value { .. } => Self::Missing(error.to_string()),
            other => Self::Failed(other.into()),
        }
    }
}

/// Runs the operation of a case.
pub(super) trait Backend {
    /// Its name on the command line and in the table.
    fn name(&self) -> BackendName;

    /// Whether there are rows for it in this type.
    fn stores(&self, dtype: Dtype) -> bool;

    /// The outputs and, if the case has output gradients, the gradients of all inputs.
    /// The numbers of the case are already of type `dtype`; so are those that come back.
    fn run(&self, case: &Case, dtype: Dtype) -> Result<Tensors, RunError>;
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
