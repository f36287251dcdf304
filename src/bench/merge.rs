//! Weights that take up their adapters.

use dtmem_reference::lora_linear::{Adapter, merge};
use ndarray::Array2;

use super::operations::RANK;
use super::runs::{Merges, Run, numbers};
use super::{BenchError, Result};
use crate::backend::Cpu;

const SCALING: f32 = 2.0;

impl Merges for Cpu<f32> {
    fn merge(&self, width: usize) -> Result<Run<'_>> {
        let matrix = |rows, columns| {
            let mut values = numbers(rows * columns, 0.05).into_iter();
            Array2::from_shape_simple_fn((rows, columns), || values.next().unwrap_or_default())
        };
        let [weight, a, b] = [
            matrix(width, width),
            matrix(RANK, width),
            matrix(width, RANK),
        ];
        let mut merged = Array2::zeros((width, width));
        Ok(Box::new(move || {
            let adapter = Adapter {
                a: a.view(),
                b: b.view(),
                scaling: SCALING,
            };
            merge(weight.view(), adapter, merged.view_mut())
                .map_err(|error| BenchError::Device(error.to_string()))
        }))
    }
}

/// From a master in f32.
#[cfg(feature = "cuda")]
impl<D: crate::backend::gpu::Device, T: crate::backend::gpu::Compute> Merges
    for crate::backend::gpu::Gpu<D, T>
{
    fn merge(&self, width: usize) -> Result<Run<'_>> {
        use crate::backend::BackendError;
        use crate::ops::lora_linear::{Merge, Merging};

        let device = self.device();
        let upload = |len: usize| {
            let mut memory = device.allocate(len)?;
            device.upload(&numbers(len, 0.05), &mut memory, 0)?;
            Ok::<_, crate::ops::Error>(memory)
        };
        let upload = |len| upload(len).map_err(BackendError::from);
        let [weight, a, b] = [width * width, RANK * width, width * RANK].map(upload);
        let (weight, a, b) = (weight?, a?, b?);
        let merged = device.allocate::<T>(width * width);
        let mut merged = merged.map_err(BackendError::from)?;
        let shape = Merge {
            rows: width,
            columns: width,
            rank: RANK,
        };
        Ok(Box::new(move || {
            let mut run = || {
                let tensors = Merging {
                    weight: device.input(&weight, 0..width * width)?.rows(width),
                    a: device.input(&a, 0..RANK * width)?,
                    b: device.input(&b, 0..RANK * width)?,
                    scaling: SCALING,
                    merged: device.output(&mut merged, 0..width * width)?.rows(width),
                };
                shape.run(device, tensors)
            };
            Ok(run().map_err(BackendError::from)?)
        }))
    }
}
