//! Where cases run, and how their time is taken there.

use std::time::Instant;

use super::Result;
use super::runs::Merges;
use crate::backend::Cpu;

/// A device with a backend and a clock.
pub(super) trait Place {
    /// The backend.
    type Backend: Merges;
    /// What activations are stored in.
    const PRECISION: &'static str;
    /// Its bytes.
    const ELEMENT_BYTES: f64;
    /// Bytes that the sets of inputs of a case exceed together.
    const CACHE_BYTES: f64;
    /// Numbers of the copy, and rows of the square matrices of the product, that set the ceilings.
    const LARGE: [usize; 2];

    /// For the report.
    fn name(&self) -> String;

    /// Whether it is slow.
    fn is_cpu(&self) -> bool;

    /// A backend of its own.
    fn backend(&self) -> Result<Self::Backend>;

    /// One that computes by the versions for Hopper; `None` where these do not run.
    fn hopper_backend(&self) -> Result<Option<Self::Backend>>;

    /// Seconds that the device works on this.
    fn seconds(&self, backend: &Self::Backend, work: &mut dyn FnMut() -> Result<()>)
    -> Result<f64>;
}

/// The CPU.
pub(super) struct CpuPlace;

impl Place for CpuPlace {
    type Backend = Cpu<f32>;
    const PRECISION: &'static str = "f32";
    const ELEMENT_BYTES: f64 = 4.0;
    const CACHE_BYTES: f64 = 0.0;
    const LARGE: [usize; 2] = [1 << 25, 1024];

    fn name(&self) -> String {
        "cpu".to_owned()
    }

    fn is_cpu(&self) -> bool {
        true
    }

    fn backend(&self) -> Result<Cpu<f32>> {
        Ok(Cpu::new())
    }

    fn hopper_backend(&self) -> Result<Option<Cpu<f32>>> {
        Ok(None)
    }

    fn seconds(&self, _: &Cpu<f32>, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed().as_secs_f64())
    }
}

#[cfg(feature = "cuda")]
pub(super) use cuda::CudaPlace;

#[cfg(feature = "cuda")]
mod cuda {
    use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
    use half::bf16;

    use super::{Place, Result};
    use crate::backend::gpu::{CudaDevice, Gpu, Multiply};
    use crate::bench::BenchError;
    use crate::ops::Version;

    /// A GPU, computing in bf16.
    pub(in crate::bench) struct CudaPlace {
        number: usize,
        name: String,
    }

    impl CudaPlace {
        /// Errors: why it does not work.
        pub fn new(number: usize) -> std::result::Result<Self, String> {
            let open = || CudaDevice::new(number, Multiply::Exact)?.describe();
            let name = open().map_err(|reason| reason.to_string())?;
            Ok(Self { number, name })
        }
    }

    fn failed(reason: impl ToString) -> BenchError {
        BenchError::Device(reason.to_string())
    }

    impl Place for CudaPlace {
        type Backend = Gpu<CudaDevice, bf16>;
        const PRECISION: &'static str = "bf16";
        const ELEMENT_BYTES: f64 = 2.0;
        const CACHE_BYTES: f64 = 2e8;
        const LARGE: [usize; 2] = [1 << 28, 8192];

        fn name(&self) -> String {
            self.name.clone()
        }

        fn is_cpu(&self) -> bool {
            false
        }

        fn backend(&self) -> Result<Self::Backend> {
            let device = CudaDevice::new(self.number, Multiply::Exact).map_err(failed)?;
            Ok(Gpu::new(device))
        }

        fn hopper_backend(&self) -> Result<Option<Self::Backend>> {
            let backend = self.backend()?;
            let runs = backend.device().runs_hopper_kernels().map_err(failed)?;
            Ok(runs.then(|| backend.with_version(Version::Hopper)))
        }

        fn seconds(
            &self,
            backend: &Self::Backend,
            work: &mut dyn FnMut() -> Result<()>,
        ) -> Result<f64> {
            let stream = backend.device().stream();
            let mark = || stream.record_event(Some(CU_EVENT_DEFAULT)).map_err(failed);
            let start = mark()?;
            work()?;
            let milliseconds = start.elapsed_ms(&mark()?).map_err(failed)?;
            Ok(f64::from(milliseconds) / 1e3)
        }
    }
}
