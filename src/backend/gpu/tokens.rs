//! The rows of all tokens from those of their kinds, and those that actions are predicted from.

use super::Gpu;
use super::batch::Batch;
use super::device::{Compute, Device};
use crate::backend::{Buffers, Positions, Result, Span, TokenOps, range};
use crate::ops::tokens;

impl<D: Device, T: Compute> Gpu<D, T> {
    fn tokens_shape(&self, batch: &Batch<D, T>, width: usize) -> tokens::Shape {
        tokens::Shape {
            tokens: batch.tokens,
            observations: batch.observations,
            actions: batch.actions,
            returns: batch.returns,
            steps: batch.steps,
            width,
        }
    }
}

impl<D: Device, T: Compute> TokenOps for Gpu<D, T> {
    fn assemble_tokens(
        &self,
        batch: &Self::Batch,
        width: usize,
        observations: &Self::Buffer,
        actions: &Self::Buffer,
        returns: &Self::Buffer,
        positions: Positions,
        table: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("assemble_tokens");
        let device = &self.device;
        let shape = self.tokens_shape(batch, width);
        let (Positions::Constant(span) | Positions::Learned(span)) = positions;
        let tensors = tokens::Assemble {
            kinds: batch.bytes(device, &batch.byte.token_kind)?,
            rows: batch.ints(device, &batch.int.token_row)?,
            times: batch.ints(device, &batch.int.token_time)?,
            observations: observations.read(device, 0..batch.observations * width)?,
            actions: actions.read(device, 0..batch.actions * width)?,
            returns: match batch.returns {
                0 => None,
                rows => Some(returns.read(device, 0..rows * width)?),
            },
            positions: table.read(device, span.offset..span.offset + batch.steps * width)?,
            out: out.write(device, 0..batch.tokens * width)?,
        };
        Ok(shape.assemble(device, tensors)?)
    }

    fn assemble_tokens_backward(
        &self,
        batch: &Self::Batch,
        width: usize,
        grad_out: &Self::Buffer,
        grad_observations: &mut Self::Buffer,
        grad_actions: &mut Self::Buffer,
        grad_returns: &mut Self::Buffer,
        positions: Option<Span>,
        gradients: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("assemble_tokens_backward");
        let device = &self.device;
        let shape = self.tokens_shape(batch, width);
        let tokens = 0..batch.tokens * width;
        let tensors = tokens::TakeApart {
            dout: grad_out.read(device, tokens.clone())?,
            observations: tokens::Part {
                tokens: batch.ints(device, &batch.int.observation_tokens)?,
                gradient: grad_observations.write(device, 0..batch.observations * width)?,
            },
            actions: tokens::Part {
                tokens: batch.ints(device, &batch.int.action_tokens)?,
                gradient: grad_actions.write(device, 0..batch.actions * width)?,
            },
            returns: match batch.returns {
                0 => None,
                rows => Some(tokens::Part {
                    tokens: batch.ints(device, &batch.int.return_tokens)?,
                    gradient: grad_returns.write(device, 0..rows * width)?,
                }),
            },
        };
        shape.take_apart(device, tensors)?;
        let Some(span) = positions else {
            return Ok(());
        };
        let tensors = tokens::PositionGradient {
            dout: grad_out.read(device, tokens)?,
            step_offsets: batch.ints(device, &batch.int.step_offsets)?,
            step_tokens: batch.ints(device, &batch.int.step_tokens)?,
            dpositions: gradients
                .write_exact(device, span.offset..span.offset + batch.steps * width)?,
        };
        Ok(shape.position_gradient(device, tensors)?)
    }

    fn gather_observations(
        &self,
        batch: &Self::Batch,
        width: usize,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("gather_observations");
        let device = &self.device;
        let shape = tokens::CopyShape {
            rows: batch.observations,
            width,
            x_rows: batch.tokens,
            y_rows: batch.observations,
        };
        let tensors = tokens::Copy {
            x: x.read(device, 0..batch.tokens * width)?.rows(width),
            from: Some(batch.ints(device, &batch.int.observation_tokens)?),
            to: None,
            y: out
                .write(device, 0..batch.observations * width)?
                .rows(width),
        };
        Ok(shape.copy(device, tensors)?)
    }

    fn scatter_observations(
        &self,
        batch: &Self::Batch,
        width: usize,
        grad_out: &Self::Buffer,
        grad_x: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("scatter_observations");
        let device = &self.device;
        let span = Span {
            offset: 0,
            len: batch.tokens * width,
        };
        self.zero(grad_x, span)?;
        let shape = tokens::CopyShape {
            rows: batch.observations,
            width,
            x_rows: batch.observations,
            y_rows: batch.tokens,
        };
        let tensors = tokens::Copy {
            x: grad_out
                .read(device, 0..batch.observations * width)?
                .rows(width),
            from: None,
            to: Some(batch.ints(device, &batch.int.observation_tokens)?),
            y: grad_x.write(device, span.range())?.rows(width),
        };
        Ok(shape.copy(device, tensors)?)
    }
}
