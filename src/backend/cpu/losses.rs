//! Losses of predicted actions.

use dtmem_reference::{Scalar, cross_entropy, squared_error};

use super::Cpu;
use super::views::{front_mut, matrix, matrix_mut, named, part, rows_of, span};
use crate::backend::{LossOps, METRICS, Metric, Result};
use crate::batch::PackedBatch;

impl<T: Scalar> LossOps for Cpu<T> {
    fn cross_entropy(
        &self,
        batch: &PackedBatch,
        family: usize,
        actions: usize,
        logits: &Vec<T>,
        grad_logits: &mut Vec<T>,
        metrics: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "cross_entropy";
        let rows = &rows_of(NAME, batch, family)?.observations;
        let targets = part(NAME, &batch.targets, span(rows))?;
        let logits = matrix(NAME, logits, rows.len(), actions)?;
        let grad_logits = matrix_mut(NAME, grad_logits, rows.len(), actions)?;
        let sums = named(
            NAME,
            cross_entropy::forward_backward(
                logits,
                targets,
                T::from_f64(batch.training.weights.action),
                grad_logits,
            ),
        )?;
        let metrics = front_mut(NAME, metrics, METRICS)?;
        metrics[Metric::ActionLoss as usize] = T::from_f64(sums.loss);
        metrics[Metric::Correct as usize] = T::from_f64(sums.correct as f64);
        Ok(())
    }

    fn squared_error(
        &self,
        batch: &PackedBatch,
        family: usize,
        size: usize,
        outputs: &Vec<T>,
        grad_outputs: &mut Vec<T>,
        metrics: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "squared_error";
        let rows = rows_of(NAME, batch, family)?;
        let known = part(NAME, &batch.targets, span(&rows.observations))?;
        let targets = part(NAME, &batch.real_targets, span(&rows.real_targets))?;
        let targets = matrix(NAME, targets, known.len(), size)?;
        let outputs = matrix(NAME, outputs, known.len(), size)?;
        let grad_outputs = matrix_mut(NAME, grad_outputs, known.len(), size)?;
        let scale = T::from_f64(batch.training.weights.action);
        let loss = named(
            NAME,
            squared_error::forward_backward(outputs, targets, known, scale, grad_outputs),
        )?;
        let metrics = front_mut(NAME, metrics, METRICS)?;
        metrics[Metric::ActionLoss as usize] = T::from_f64(loss);
        metrics[Metric::Correct as usize] = T::zero();
        Ok(())
    }

    fn scale_losses(&self, _: &mut PackedBatch, _: &Vec<T>) -> Result<()> {
        Ok(())
    }
}
