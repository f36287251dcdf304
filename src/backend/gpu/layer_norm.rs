//! Layer normalisation, with the residual sum before it.

use super::Gpu;
use super::device::{Compute, Device};
use crate::backend::{LayerNorm, LayerNormOps, Residual, Result, SummandGradient, range};
use crate::ops::layer_norm;

impl<D: Device, T: Compute> LayerNormOps for Gpu<D, T> {
    fn layer_norm(
        &self,
        rows: usize,
        norm: &LayerNorm,
        parameters: &Self::Buffer,
        x: &Self::Buffer,
        residual: Option<Residual<Self>>,
        y: &mut Self::Buffer,
        statistics: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("layer_norm");
        let device = &self.device;
        let all = 0..rows * norm.width;
        let [mean, rstd] = statistics
            .write_exact(device, 0..2 * rows)?
            .parts([0..rows, rows..2 * rows])?;
        let tensors = layer_norm::Forward {
            x: x.read(device, all.clone())?,
            residual: match residual {
                Some(Residual {
                    summand,
                    dropout,
                    sum,
                }) => Some(layer_norm::Residual {
                    residual: summand.read(device, all.clone())?,
                    dropout: match dropout {
                        Some(dropout) => Some(self.mask(dropout)?),
                        None => None,
                    },
                    sum: sum.write(device, all.clone())?,
                }),
                None => None,
            },
            weight: parameters.read(device, norm.weight.range())?,
            bias: parameters.read(device, norm.bias.range())?,
            y: y.write(device, all)?,
            mean,
            rstd,
            epsilon: norm.epsilon as f32,
        };
        let shape = layer_norm::Shape {
            rows,
            width: norm.width,
        };
        Ok(shape.forward(device, tensors)?)
    }

    fn layer_norm_backward(
        &self,
        rows: usize,
        norm: &LayerNorm,
        parameters: &Self::Buffer,
        x: &Self::Buffer,
        statistics: &Self::Buffer,
        grad_y: &Self::Buffer,
        grad_x: &mut Self::Buffer,
        accumulate: bool,
        summand: Option<SummandGradient<Self>>,
        gradients: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("layer_norm_backward");
        let device = &self.device;
        let all = 0..rows * norm.width;
        let shape = layer_norm::Shape {
            rows,
            width: norm.width,
        };
        let partial = shape.workspace()?;
        // Frozen parameters have no place among the gradients: theirs are thrown away.
        let unused = if norm.trainable { 0 } else { 2 * norm.width };
        let mut workspace = self.floats.lock(device, partial + unused)?;
        workspace.zero(device, partial..partial + unused)?;
        let [workspace, weight_unused, bias_unused] = workspace.output(device)?.parts([
            0..partial,
            partial..partial + unused / 2,
            partial + unused / 2..partial + unused,
        ])?;
        let len = gradients.len;
        let [dweight, dbias] = match norm.trainable {
            true => gradients
                .write_exact(device, 0..len)?
                .parts([norm.weight.range(), norm.bias.range()])?,
            false => [weight_unused, bias_unused],
        };
        let ds = grad_x.write(device, all.clone())?;
        let tensors = layer_norm::Backward {
            s: x.read(device, all.clone())?,
            weight: parameters.read(device, norm.weight.range())?,
            mean: statistics.read_exact(device, 0..rows)?,
            rstd: statistics.read_exact(device, rows..2 * rows)?,
            dy: grad_y.read(device, all.clone())?,
            dsum: accumulate.then(|| ds.as_input()),
            ds,
            summand: match summand {
                Some(SummandGradient { dropout, gradient }) => Some(layer_norm::Summand {
                    dropout: self.mask(dropout)?,
                    gradient: gradient.write(device, all)?,
                }),
                None => None,
            },
            dweight,
            dbias,
            workspace,
        };
        Ok(shape.backward(device, tensors)?)
    }
}
