//! Where a run computes, and how precisely.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tracing::info;

use super::Error;
use super::ranks::Ranks;
#[cfg(feature = "cuda")]
use crate::backend::gpu::{Compute, CudaDevice, Gpu, Multiply};
use crate::backend::{Backend, Cpu};

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first GPU if it works, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let gpu = |word: &str| word.strip_prefix("cuda:")?.parse().ok();
        match word {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            other => gpu(other)
                .map(Self::Cuda)
                .ok_or_else(|| format!("`{other}` is no device, expected auto, cpu or cuda:N")),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// What a GPU computes in; parameters, their gradients and all sums are f32. The CPU computes in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Everything in f32.
    F32,
    /// As f32, with the factors of matrix products rounded to TF32.
    Tf32,
    /// Activations in bf16.
    #[default]
    Bf16,
    /// Activations in f16, with losses scaled so that gradients do not underflow.
    F16,
}

/// Where something is computed.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// `--device`.
    pub device: DeviceChoice,
    /// What a GPU computes in.
    pub precision: Precision,
    /// The ranks that train together; none if this process is alone.
    pub ranks: Option<&'a Ranks>,
}

impl Place<'_> {
    fn fails(&self, reason: String) -> Error {
        let device = self.device;
        match self.ranks.map(|ranks| ranks.rank) {
            Some(rank) => Error::DeviceOfRank {
                device,
                rank,
                reason,
            },
            None => Error::Device { device, reason },
        }
    }
}

/// What is done on whatever backend was chosen.
pub trait Job {
    /// Its result.
    type Output;

    /// Does it.
    fn run<B: Backend<Element = f32>>(self, backend: B) -> Result<Self::Output, Error>;
}

/// Does a job at that place; the log tells where that is, and why.
///
/// # Errors
/// A GPU that was asked for and does not work, several ranks without GPUs, and those of the job.
pub fn run_on<J: Job>(place: Place<'_>, job: J) -> Result<J::Output, Error> {
    let Place { device, ranks, .. } = place;
    let number = match (device, ranks) {
        (DeviceChoice::Cpu, Some(_)) => {
            return Err(place.fails("the CPU is no GPU".to_owned()));
        }
        (DeviceChoice::Cpu, None) => {
            info!("device: cpu, as asked for");
            return job.run(Cpu::new());
        }
        (DeviceChoice::Auto, ranks) => ranks.map_or(0, |ranks| ranks.local),
        (DeviceChoice::Cuda(number), _) => number,
    };
    run_on_gpu(place, number, job)
}

#[cfg(feature = "cuda")]
fn run_on_gpu<J: Job>(place: Place<'_>, number: usize, job: J) -> Result<J::Output, Error> {
    let Place {
        device: choice,
        precision,
        ranks,
    } = place;
    let multiply = match precision {
        Precision::Tf32 => Multiply::Tf32,
        _ => Multiply::Exact,
    };
    let fails = |reason: crate::ops::Error| place.fails(reason.to_string());
    let device = match (CudaDevice::new(number, multiply), choice) {
        (Ok(device), _) => device,
        (Err(reason), DeviceChoice::Auto) if ranks.is_none() => {
            info!("device: cpu, because there is no GPU to use: {reason}");
            return job.run(Cpu::new());
        }
        (Err(reason), _) => return Err(fails(reason)),
    };
    let device = match ranks {
        Some(ranks) => among(ranks, device, fails)?,
        None => device,
    };
    fn on<T: Compute, J: Job>(device: CudaDevice, job: J) -> Result<J::Output, Error> {
        job.run(Gpu::<_, T>::new(device))
    }
    let name = device.describe().unwrap_or_default();
    info!("device: cuda:{number} ({name}), {precision:?}");
    match precision {
        Precision::F32 | Precision::Tf32 => on::<f32, J>(device, job),
        Precision::Bf16 => on::<half::bf16, J>(device, job),
        Precision::F16 => on::<half::f16, J>(device, job),
    }
}

/// A device as one of several ranks.
#[cfg(feature = "nccl")]
fn among(
    ranks: &Ranks,
    device: CudaDevice,
    fails: impl Fn(crate::ops::Error) -> Error,
) -> Result<CudaDevice, Error> {
    let rank = ranks.rank;
    info!(
        "rank {} of {}: looking for the others",
        rank.number, rank.of
    );
    let id = ranks.share(|| CudaDevice::rank_id().map_err(&fails))?;
    device.with_rank(rank, &id).map_err(fails)
}

#[cfg(all(feature = "cuda", not(feature = "nccl")))]
fn among(
    ranks: &Ranks,
    _: CudaDevice,
    _: impl Fn(crate::ops::Error) -> Error,
) -> Result<CudaDevice, Error> {
    Err(Error::Ranks(super::ranks::RanksError::NotBuilt {
        of: ranks.rank.of,
    }))
}

#[cfg(not(feature = "cuda"))]
fn run_on_gpu<J: Job>(place: Place<'_>, _: usize, job: J) -> Result<J::Output, Error> {
    match (place.device, place.ranks) {
        (DeviceChoice::Cuda(_), _) | (_, Some(_)) => {
            Err(place.fails("this binary was built without the feature `cuda`".to_owned()))
        }
        _ => {
            info!("device: cpu, because this binary was built without the feature `cuda`");
            job.run(Cpu::new())
        }
    }
}
