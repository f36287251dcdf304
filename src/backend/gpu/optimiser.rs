//! The norm of the gradient, and AdamW's step.

use super::Gpu;
use super::buffers::Buffer;
use super::device::{Compute, Device};
use crate::backend::{BackendError, METRICS, Metric, OptimiserOps, Result, Trained, range};
use crate::ops::adamw;

impl<D: Device, T: Compute> OptimiserOps for Gpu<D, T> {
    fn norm(
        &self,
        len: usize,
        gradients: &Self::Buffer,
        clip: Option<f64>,
        loss_scale: &mut Self::Buffer,
        metrics: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("norm");
        let device = &self.device;
        let shape = adamw::Shape { parameters: len };
        let mut workspace = self.floats.lock(device, shape.workspace()?)?;
        const NORM: usize = Metric::GradientNorm as usize;
        const { assert!(Metric::GradientScale as usize == NORM + 1) };
        const USED: usize = Metric::LossScale as usize;
        let [norm_and_scale, used] = metrics
            .write_exact(device, 0..METRICS)?
            .parts([NORM..NORM + 2, USED..USED + 1])?;
        let state_len = loss_scale.len;
        let tensors = adamw::Norm {
            gradient: gradients.read_exact(device, 0..len)?,
            norm_and_scale,
            max_norm: clip.map_or(f32::INFINITY, |clip| clip as f32),
            loss_scale: match T::UNDERFLOWS {
                true => Some(adamw::LossScale {
                    state: loss_scale.write_exact(device, 0..state_len)?,
                    used,
                }),
                false => None,
            },
            workspace: workspace.output(device)?,
        };
        Ok(shape.norm(device, tensors)?)
    }

    fn adamw(
        &self,
        batch: &Self::Batch,
        trained: Trained,
        metrics: &Self::Buffer,
        gradients: &Self::Buffer,
        parameters: &mut Self::Buffer,
        first_moment: &mut Self::Buffer,
        second_moment: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("adamw");
        let device = &self.device;
        let all = 0..trained.len;
        let factors = batch.float.factors.as_ref().ok_or(BackendError::NoStep)?;
        let scale = Metric::GradientScale as usize;
        let Buffer { compute, exact, .. } = parameters;
        let tensors = adamw::Step {
            factors: batch.floats(device, factors)?,
            scale: Some(metrics.read_exact(device, scale..scale + 1)?),
            gradient: gradients.read_exact(device, all.clone())?,
            parameter: device.output(exact.as_mut().ok_or(BackendError::Kind)?, all.clone())?,
            first_moment: first_moment.write_exact(device, all.clone())?,
            second_moment: second_moment.write_exact(device, all.clone())?,
            copy: match compute {
                Some(compute) => Some(device.output::<T>(compute, all)?),
                None => None,
            },
            decayed: trained.decayed,
        };
        let shape = adamw::Shape {
            parameters: trained.len,
        };
        Ok(shape.step(device, tensors)?)
    }
}
