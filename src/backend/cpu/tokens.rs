//! The rows of all tokens from those of their kinds, and those that actions are predicted from.

use dtmem_reference::Scalar;
use ndarray::Axis;
use rayon::prelude::*;

use super::Cpu;
use super::views::{front, front_mut, matrix, matrix_mut, part, part_mut};
use crate::backend::{Positions, Result, Span, TokenOps};
use crate::batch::{PackedBatch, TokenKind};

/// Rows that one task of a gather copies.
const GATHERED: usize = 64;

impl<T: Scalar> TokenOps for Cpu<T> {
    fn assemble_tokens(
        &self,
        batch: &PackedBatch,
        width: usize,
        observations: &Vec<T>,
        actions: &Vec<T>,
        returns: &Vec<T>,
        positions: Positions,
        table: &Vec<T>,
        out: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "assemble_tokens";
        let (Positions::Constant(span) | Positions::Learned(span)) = positions;
        let table = part(NAME, table, span)?;
        front_mut(NAME, out, batch.tokens() * width)?
            .par_chunks_mut(width)
            .with_min_len(GATHERED)
            .enumerate()
            .try_for_each(|(token, out)| {
                let source = match batch.token_kind[token] {
                    kind if kind == TokenKind::Observation as u8 => observations,
                    kind if kind == TokenKind::Action as u8 => actions,
                    _ => returns,
                };
                let row = |index: i32| Span {
                    offset: index as usize * width,
                    len: width,
                };
                let embedding = part(NAME, source, row(batch.token_row[token]))?;
                let position = part(NAME, table, row(batch.token_time[token]))?;
                for ((out, &x), &position) in out.iter_mut().zip(embedding).zip(position) {
                    *out = x + position;
                }
                Ok(())
            })
    }

    fn assemble_tokens_backward(
        &self,
        batch: &PackedBatch,
        width: usize,
        grad_out: &Vec<T>,
        grad_observations: &mut Vec<T>,
        grad_actions: &mut Vec<T>,
        grad_returns: &mut Vec<T>,
        positions: Option<Span>,
        gradients: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "assemble_tokens_backward";
        gather(
            NAME,
            &batch.observation_tokens,
            width,
            grad_out,
            grad_observations,
        )?;
        gather(NAME, &batch.action_tokens, width, grad_out, grad_actions)?;
        gather(NAME, &batch.return_tokens, width, grad_out, grad_returns)?;
        let Some(span) = positions else {
            return Ok(());
        };
        let table = part_mut(NAME, gradients, span)?;
        let mut table = matrix_mut(NAME, table, span.len / width.max(1), width)?;
        let grad_out = matrix(NAME, grad_out, batch.tokens(), width)?;
        let columns = self.piece(width);
        table
            .axis_chunks_iter_mut(Axis(1), columns)
            .into_par_iter()
            .zip(grad_out.axis_chunks_iter(Axis(1), columns))
            .for_each(|(mut table, grad_out)| {
                for (grad_out, &time) in grad_out.rows().into_iter().zip(&batch.token_time) {
                    let mut row = table.row_mut(time as usize);
                    row += &grad_out;
                }
            });
        Ok(())
    }

    fn gather_observations(
        &self,
        batch: &PackedBatch,
        width: usize,
        x: &Vec<T>,
        out: &mut Vec<T>,
    ) -> Result<()> {
        gather(
            "gather_observations",
            &batch.observation_tokens,
            width,
            x,
            out,
        )
    }

    fn scatter_observations(
        &self,
        batch: &PackedBatch,
        width: usize,
        grad_out: &Vec<T>,
        grad_x: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "scatter_observations";
        let grad_out = front(NAME, grad_out, batch.observation_tokens.len() * width)?;
        front_mut(NAME, grad_x, batch.tokens() * width)?
            .par_chunks_mut(width)
            .with_min_len(GATHERED)
            .enumerate()
            .for_each(|(token, grad_x)| {
                if batch.token_kind[token] == TokenKind::Observation as u8 {
                    let row = batch.token_row[token] as usize * width;
                    grad_x.copy_from_slice(&grad_out[row..row + width]);
                } else {
                    grad_x.fill(T::zero());
                }
            });
        Ok(())
    }
}

/// out_i = row `tokens[i]` of x.
fn gather<T: Scalar>(
    operation: &'static str,
    tokens: &[i32],
    width: usize,
    x: &[T],
    out: &mut [T],
) -> Result<()> {
    front_mut(operation, out, tokens.len() * width)?
        .par_chunks_mut(width.max(1))
        .with_min_len(GATHERED)
        .zip(tokens)
        .try_for_each(|(out, &token)| {
            let row = Span {
                offset: token as usize * width,
                len: width,
            };
            out.copy_from_slice(part(operation, x, row)?);
            Ok(())
        })
}
