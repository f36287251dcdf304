//! Where a run computes, and how precisely.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tracing::info;

use super::Error;
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

/// What is done on whatever backend was chosen.
pub trait Job {
    /// Its result.
    type Output;

    /// Does it.
    fn run<B: Backend<Element = f32>>(self, backend: B) -> Result<Self::Output, Error>;
}

/// Does a job where the choice says; the log tells where that is, and why.
///
/// # Errors
/// A GPU that was asked for and does not work, and those of the job.
pub fn run_on<J: Job>(
    choice: DeviceChoice,
    precision: Precision,
    job: J,
) -> Result<J::Output, Error> {
    let number = match choice {
        DeviceChoice::Cpu => {
            info!("device: cpu, as asked for");
            return job.run(Cpu::new());
        }
        DeviceChoice::Auto => 0,
        DeviceChoice::Cuda(number) => number,
    };
    run_on_gpu(choice, number, precision, job)
}

#[cfg(feature = "cuda")]
fn run_on_gpu<J: Job>(
    choice: DeviceChoice,
    number: usize,
    precision: Precision,
    job: J,
) -> Result<J::Output, Error> {
    let multiply = match precision {
        Precision::Tf32 => Multiply::Tf32,
        _ => Multiply::Exact,
    };
    let device = match (CudaDevice::new(number, multiply), choice) {
        (Ok(device), _) => device,
        (Err(reason), DeviceChoice::Auto) => {
            info!("device: cpu, because there is no GPU to use: {reason}");
            return job.run(Cpu::new());
        }
        (Err(reason), _) => {
            return Err(Error::Device {
                device: choice,
                reason: reason.to_string(),
            });
        }
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

#[cfg(not(feature = "cuda"))]
fn run_on_gpu<J: Job>(
    choice: DeviceChoice,
    _number: usize,
    _precision: Precision,
    job: J,
) -> Result<J::Output, Error> {
    match choice {
        DeviceChoice::Cuda(_) => Err(Error::Device {
            device: choice,
            reason: "this binary was built without the feature `cuda`".to_owned(),
        }),
        _ => {
            info!("device: cpu, because this binary was built without the feature `cuda`");
            job.run(Cpu::new())
        }
    }
}
