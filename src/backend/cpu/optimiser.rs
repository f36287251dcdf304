//! The norm of the gradient, and AdamW's step.

use dtmem_reference::{Scalar, optimiser};
use rayon::prelude::*;

use super::views::{front, front_mut, named, part, part_mut};
use super::{Cpu, ELEMENTS};
use crate::backend::{AdamW, BackendError, METRICS, Metric, OptimiserOps, Result, Span, Trained};
use crate::batch::PackedBatch;

impl<T: Scalar> OptimiserOps for Cpu<T> {
    fn norm(
        &self,
        len: usize,
        gradients: &Vec<T>,
        clip: Option<f64>,
        _: &mut Vec<T>,
        metrics: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "norm";
        let norm = sum_of_squares(front(NAME, gradients, len)?).sqrt();
        let scale = match clip {
            _ if !norm.is_finite() => f64::NAN,
            Some(clip) => optimiser::clip_scale(norm, clip),
            None => 1.0,
        };
        let metrics = front_mut(NAME, metrics, METRICS)?;
        metrics[Metric::GradientNorm as usize] = T::from_f64(norm);
        metrics[Metric::GradientScale as usize] = T::from_f64(scale);
        Ok(())
    }

    fn adamw(
        &self,
        batch: &PackedBatch,
        trained: Trained,
        metrics: &Vec<T>,
        gradients: &Vec<T>,
        parameters: &mut Vec<T>,
        first_moment: &mut Vec<T>,
        second_moment: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "adamw";
        let hyper = batch.training.optimiser.ok_or(BackendError::NoStep)?;
        let scale = front(NAME, metrics, METRICS)?[Metric::GradientScale as usize].to_f64();
        if scale.is_nan() {
            return Ok(());
        }
        let decayed = Span {
            offset: 0,
            len: trained.decayed,
        };
        let plain = Span {
            offset: trained.decayed,
            len: trained.len - trained.decayed,
        };
        for (span, weight_decay) in [(decayed, hyper.weight_decay), (plain, 0.0)] {
            let hyper = AdamW {
                weight_decay,
                gradient_scale: scale,
                ..hyper
            };
            part_mut(NAME, parameters, span)?
                .par_chunks_mut(ELEMENTS)
                .zip(part_mut(NAME, first_moment, span)?.par_chunks_mut(ELEMENTS))
                .zip(part_mut(NAME, second_moment, span)?.par_chunks_mut(ELEMENTS))
                .zip(part(NAME, gradients, span)?.par_chunks(ELEMENTS))
                .try_for_each(|(((parameter, first), second), gradient)| {
                    named(
                        NAME,
                        optimiser::adamw(&hyper, gradient, parameter, first, second),
                    )
                })?;
        }
        Ok(())
    }
}

fn sum_of_squares<T: Scalar>(x: &[T]) -> f64 {
    if x.len() <= ELEMENTS {
        return optimiser::sum_of_squares(x);
    }
    let (left, right) = x.split_at((x.len() / 2).next_multiple_of(ELEMENTS));
    let (left, right) = rayon::join(|| sum_of_squares(left), || sum_of_squares(right));
    left + right
}
