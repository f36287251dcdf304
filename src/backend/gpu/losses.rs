//! Losses of predicted actions, and their scale.

use super::Gpu;
use super::device::{Compute, Device};
use crate::backend::{LossOps, Metric, Result, range};
use crate::ops::{adamw, cross_entropy, squared_error};

impl<D: Device, T: Compute> LossOps for Gpu<D, T> {
    fn cross_entropy(
        &self,
        batch: &Self::Batch,
        family: usize,
        actions: usize,
        logits: &Self::Buffer,
        grad_logits: &mut Self::Buffer,
        metrics: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("cross_entropy");
        let device = &self.device;
        let rows = &batch.rows_of(family)?.observations;
        let shape = cross_entropy::Shape {
            rows: rows.len(),
            classes: actions,
        };
        let mut workspace = self.floats.lock(device, shape.workspace()?)?;
        const { assert!(Metric::ActionLoss as usize == 0 && Metric::Correct as usize == 1) };
        let [scale, _] = batch.weights(device)?;
        let tensors = cross_entropy::Tensors {
            logits: logits.read(device, 0..shape.rows * actions)?,
            targets: batch
                .ints(device, &batch.int.targets)?
                .slice(rows.clone())?,
            scale,
            dlogits: grad_logits.write(device, 0..shape.rows * actions)?,
            metrics: metrics.write_exact(device, 0..2)?,
            workspace: workspace.output(device)?,
        };
        Ok(shape.loss_and_gradient(device, tensors)?)
    }

    fn squared_error(
        &self,
        batch: &Self::Batch,
        family: usize,
        size: usize,
        outputs: &Self::Buffer,
        grad_outputs: &mut Self::Buffer,
        metrics: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("squared_error");
        let device = &self.device;
        let [scale, _] = batch.weights(device)?;
        let rows = batch.rows_of(family)?;
        let shape = squared_error::Shape {
            rows: rows.observations.len(),
            size,
        };
        let mut workspace = self.floats.lock(device, shape.workspace()?)?;
        let tensors = squared_error::Tensors {
            y: outputs.read(device, 0..shape.rows * size)?,
            targets: batch
                .floats(device, &batch.float.targets)?
                .slice(rows.real_targets.clone())?,
            known: batch
                .ints(device, &batch.int.targets)?
                .slice(rows.observations.clone())?,
            scale,
            dy: grad_outputs.write(device, 0..shape.rows * size)?,
            metrics: metrics.write_exact(device, 0..2)?,
            workspace: workspace.output(device)?,
        };
        Ok(shape.loss_and_gradient(device, tensors)?)
    }

    fn scale_losses(&self, batch: &mut Self::Batch, loss_scale: &Self::Buffer) -> Result<()> {
        if !T::UNDERFLOWS {
            return Ok(());
        }
        let device = &self.device;
        let state = loss_scale.read_exact(device, 0..loss_scale.len)?;
        Ok(adamw::scale_losses(
            device,
            state,
            batch.weights_mut(device)?,
        )?)
    }
}
