//! The CPU backend: the reference, threaded.
//!
//! Bits do not depend on the number of threads: what is split by it has independent results (rows
//! and columns of a product, each summed in one order), and sums over rows are split by shape alone
//! and added in a fixed order.

mod adapters;
mod attention;
mod convolutions;
mod memory;
mod partials;
mod views;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use dtmem_reference as reference;
use dtmem_reference::{
    Scalar, activation, convolution, cross_entropy, layer_norm, linear, lora_linear, one_hot,
    optimiser, squared_error,
};
use ndarray::{ArrayView1, ArrayViewMut1, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use adapters::{adapter, draw, dropped, weight};
use attention::{Cached, HeadGradients, HeadSaved, Heads};
use convolutions::ConvolutionShapes;
use memory::{ChainGradients, Chains, Kept, MemoryState, Recall};
use views::{
    code_matrix, columns, columns_mut, front, front_mut, matrix, matrix_mut, named, part, part_mut,
    rows_from, rows_of, span, two_parts,
};

use super::{
    Activation, AdamW, Attention, Backend, BackendError, Bytes, Codes, Convolutions, Dropped, In,
    KeyValueCache, Kind, LayerNorm, Linear, METRICS, Memory, MemoryGradients, MemoryInputs,
    MemoryStart, Metric, OneHot, Out, Positions, Rank, Reals, Residual, Result, Span, Trained,
};
use crate::batch::{PackedBatch, TokenKind};

/// Numbers that one task of an element-wise operation touches.
const ELEMENTS: usize = 1 << 14;
/// Rows that one task of a gather copies.
const GATHERED: usize = 64;
/// Most episodes that act at once, and memory for what they keep.
const MOST_EPISODES: usize = 256;
const ACTING_BYTES: usize = 1 << 30;

/// Computes with the reference on all threads of the current rayon pool, in `T`.
#[derive(Debug)]
pub struct Cpu<T> {
    /// One scratch buffer per thread; it grows to what the largest shape needs and stays.
    scratch: Vec<Mutex<Vec<T>>>,
    /// Memory for partial sums that is not in use.
    partials: Mutex<Vec<Vec<T>>>,
    /// Items of the running [`Backend::for_each`]: threads that are busy anyway.
    items: AtomicUsize,
}

impl<T: Scalar> Default for Cpu<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Scalar> Cpu<T> {
    /// A backend for the current rayon pool (it works in any other, too).
    pub fn new() -> Self {
        let threads = rayon::current_num_threads().max(1);
        Self {
            scratch: (0..threads).map(|_| Mutex::default()).collect(),
            partials: Mutex::default(),
            items: AtomicUsize::new(1),
        }
    }

    /// The current thread's scratch. Not to be held while waiting for other tasks.
    fn scratch(&self) -> MutexGuard<'_, Vec<T>> {
        let thread = rayon::current_thread_index().unwrap_or(0) % self.scratch.len();
        self.scratch[thread]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Rows (or columns) of one task of an operation whose results do not depend on how it is
    /// split. An item of [`Backend::for_each`] that has one thread to itself is not split at all.
    fn piece(&self, len: usize) -> usize {
        let threads = rayon::current_num_threads() / self.items.load(Ordering::Relaxed).max(1);
        match threads {
            0 | 1 => len.max(1),
            threads => len.div_ceil(2 * threads).next_multiple_of(16).max(64),
        }
    }
}

fn sum_of_squares<T: Scalar>(x: &[T]) -> f64 {
    if x.len() <= ELEMENTS {
        return reference::optimiser::sum_of_squares(x);
    }
    let (left, right) = x.split_at((x.len() / 2).next_multiple_of(ELEMENTS));
    let (left, right) = rayon::join(|| sum_of_squares(left), || sum_of_squares(right));
    left + right
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

impl<T: Scalar> Backend for Cpu<T> {
    type Element = T;
    type Buffer = Vec<T>;
    type Batch = PackedBatch;
    type Recording = ();
    /// The log-sum-exp [tokens, heads].
    type AttentionState = Vec<T>;
    type MemoryState = MemoryState<T>;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn rank(&self) -> Rank {
        Rank::ALONE
    }

    fn sum_over_ranks(&self, _: &mut Vec<T>, _: usize) -> Result<()> {
        Ok(())
    }

    fn episodes_at_once(&self, numbers: usize) -> usize {
        let bytes = numbers.saturating_mul(size_of::<T>());
        (ACTING_BYTES / bytes.max(1)).clamp(1, MOST_EPISODES)
    }

    fn needed_for(&self, _: impl FnOnce()) -> Bytes {
        Bytes(0)
    }

    fn shards(&self, for_threads: usize) -> usize {
        for_threads
    }

    fn for_each<S: Send, E: Send>(
        &self,
        items: &mut [S],
        work: impl Fn(&mut S) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<(), E> {
        self.items.store(items.len(), Ordering::Relaxed);
        let result = items.par_iter_mut().with_max_len(1).try_for_each(&work);
        self.items.store(1, Ordering::Relaxed);
        result
    }

    fn buffer(&self, len: usize, _kind: Kind) -> Result<Vec<T>> {
        Ok(vec![T::nan(); len])
    }

    fn upload(&self, from: &[T], to: &mut Vec<T>, offset: usize) -> Result<()> {
        let span = Span {
            offset,
            len: from.len(),
        };
        part_mut("upload", to, span)?.copy_from_slice(from);
        Ok(())
    }

    fn download(&self, from: &Vec<T>, offset: usize, to: &mut [T]) -> Result<()> {
        let span = Span {
            offset,
            len: to.len(),
        };
        to.copy_from_slice(part("download", from, span)?);
        Ok(())
    }

    fn wants_one_size(&self) -> bool {
        false
    }

    fn shape(&self, _batch: &PackedBatch) -> u64 {
        0
    }

    fn repeat<E: From<BackendError>>(
        &self,
        _recording: &mut (),
        _shape: u64,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        work()
    }

    fn stage(&self, batch: &PackedBatch, to: &mut PackedBatch) -> Result<()> {
        to.clone_from(batch);
        Ok(())
    }

    fn zero(&self, buffer: &mut Vec<T>, span: Span) -> Result<()> {
        part_mut("zero", buffer, span)?
            .par_chunks_mut(ELEMENTS)
            .for_each(|x| x.fill(T::zero()));
        Ok(())
    }

    fn copy(&self, from: &Vec<T>, to: &mut Vec<T>, offset: usize, len: usize) -> Result<()> {
        part_mut("copy", to, Span { offset, len })?
            .par_chunks_mut(ELEMENTS)
            .zip(front("copy", from, len)?.par_chunks(ELEMENTS))
            .for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    }

    fn one_hot(
        &self,
        batch: &PackedBatch,
        codes: Codes,
        map: &OneHot,
        parameters: &Vec<T>,
        out: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "one_hot";
        let (codes, rows) = code_matrix(batch, codes, map)?;
        let weight = matrix(
            NAME,
            part(NAME, parameters, map.weight)?,
            map.inputs,
            map.width,
        )?;
        let bias = ArrayView1::from(part(NAME, parameters, map.bias)?);
        let out = part_mut(NAME, out, rows_from(rows.offset, rows.len, map.width))?;
        let mut out = matrix_mut(NAME, out, rows.len, map.width)?;
        let piece = self.piece(rows.len);
        out.axis_chunks_iter_mut(Axis(0), piece)
            .into_par_iter()
            .zip(codes.axis_chunks_iter(Axis(0), piece))
            .try_for_each(|(y, codes)| {
                named(
                    NAME,
                    one_hot::forward(codes, &map.offsets, weight, Some(bias), y),
                )
            })
    }

    fn one_hot_backward(
        &self,
        batch: &PackedBatch,
        codes: Codes,
        map: &OneHot,
        grad_out: &Vec<T>,
        gradients: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "one_hot_backward";
        if !map.trainable {
            return Ok(());
        }
        let (codes, rows) = code_matrix(batch, codes, map)?;
        let grad_out = part(NAME, grad_out, rows_from(rows.offset, rows.len, map.width))?;
        let grad_out = matrix(NAME, grad_out, rows.len, map.width)?;
        let (weight, bias) = two_parts(NAME, gradients, map.weight, map.bias)?;
        let mut weight = matrix_mut(NAME, weight, map.inputs, map.width)?;
        let mut bias = ArrayViewMut1::from(bias);
        let columns = self.piece(map.width);
        weight
            .axis_chunks_iter_mut(Axis(1), columns)
            .into_par_iter()
            .zip(bias.axis_chunks_iter_mut(Axis(0), columns))
            .zip(grad_out.axis_chunks_iter(Axis(1), columns))
            .try_for_each(|((weight, bias), grad_out)| {
                named(
                    NAME,
                    one_hot::backward(codes, &map.offsets, grad_out, weight, Some(bias)),
                )
            })
    }

    fn convolutions(
        &self,
        batch: &PackedBatch,
        family: usize,
        front_end: &Convolutions,
        parameters: &Vec<T>,
        middle: &mut Vec<T>,
        out: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "convolutions";
        let shapes = ConvolutionShapes::new(batch, family, front_end)?;
        let weights = shapes.weights(NAME, front_end, parameters)?;
        let bias1 = ArrayView1::from(part(NAME, parameters, front_end.bias1)?);
        let bias2 = ArrayView1::from(part(NAME, parameters, front_end.bias2)?);
        let mut middle = matrix_mut(NAME, middle, shapes.rows, shapes.middle)?;
        let mut out = matrix_mut(NAME, out, shapes.rows, shapes.out)?;
        let piece = shapes.piece();
        middle
            .axis_chunks_iter_mut(Axis(0), piece)
            .into_par_iter()
            .zip(out.axis_chunks_iter_mut(Axis(0), piece))
            .zip(shapes.codes.axis_chunks_iter(Axis(0), piece))
            .try_for_each(|((mut middle, mut out), codes)| {
                let grid = &front_end.grid;
                let mut scratch = self.scratch();
                let relu = |x: &mut ArrayViewMut2<T>| x.mapv_inplace(|x| x.max(T::zero()));
                let forward = (|| {
                    convolution::one_hot_forward(
                        grid,
                        codes,
                        weights[0],
                        bias1,
                        middle.view_mut(),
                        &mut scratch,
                    )?;
                    relu(&mut middle);
                    let x = middle.view();
                    convolution::forward(grid, x, weights[1], bias2, out.view_mut(), &mut scratch)
                })();
                relu(&mut out);
                named(NAME, forward)
            })
    }

    fn convolutions_backward(
        &self,
        batch: &PackedBatch,
        family: usize,
        front_end: &Convolutions,
        parameters: &Vec<T>,
        middle: &Vec<T>,
        out: &Vec<T>,
        grad_out: &mut Vec<T>,
        grad_middle: &mut Vec<T>,
        gradients: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "convolutions_backward";
        if !front_end.trainable {
            return Ok(());
        }
        let shapes = ConvolutionShapes::new(batch, family, front_end)?;
        let weights = shapes.weights(NAME, front_end, parameters)?;
        let middle = matrix(NAME, middle, shapes.rows, shapes.middle)?;
        let out = matrix(NAME, out, shapes.rows, shapes.out)?;
        let mut grad_out = matrix_mut(NAME, grad_out, shapes.rows, shapes.out)?;
        let mut grad_middle = matrix_mut(NAME, grad_middle, shapes.rows, shapes.middle)?;
        let spans = [
            front_end.weight1,
            front_end.bias1,
            front_end.weight2,
            front_end.bias2,
        ];
        let mut partials = self.partials(spans.iter().map(|span| span.len).sum());
        let rows = partials.piece(shapes.rows);
        partials
            .pieces()
            .zip(grad_out.axis_chunks_iter_mut(Axis(0), rows))
            .zip(grad_middle.axis_chunks_iter_mut(Axis(0), rows))
            .zip(out.axis_chunks_iter(Axis(0), rows))
            .zip(middle.axis_chunks_iter(Axis(0), rows))
            .zip(shapes.codes.axis_chunks_iter(Axis(0), rows))
            .try_for_each(
                |(((((partial, mut grad_out), mut grad_middle), out), middle), codes)| {
                    let (weight1, rest) = partial.split_at_mut(front_end.weight1.len);
                    let (bias1, rest) = rest.split_at_mut(front_end.bias1.len);
                    let (weight2, bias2) = rest.split_at_mut(front_end.weight2.len);
                    let channels = front_end.grid.channels();
                    let weight1 = matrix_mut(NAME, weight1, channels * 9, front_end.middle)?;
                    let weight2 = matrix_mut(NAME, weight2, front_end.out, front_end.middle * 9)?;
                    let (bias1, bias2) = (ArrayViewMut1::from(bias1), ArrayViewMut1::from(bias2));
                    let grid = &front_end.grid;
                    let mut scratch = self.scratch();
                    let gradient = grad_out.view_mut();
                    named(
                        NAME,
                        activation::backward_in_place(Activation::Relu, out, out, gradient),
                    )?;
                    let (y, x) = (grad_out.view(), grad_middle.view_mut());
                    let backward = convolution::backward(
                        grid,
                        middle,
                        weights[1],
                        y,
                        x,
                        weight2,
                        bias2,
                        &mut scratch,
                    );
                    named(NAME, backward)?;
                    let gradient = grad_middle.view_mut();
                    named(
                        NAME,
                        activation::backward_in_place(Activation::Relu, middle, middle, gradient),
                    )?;
                    let y = grad_middle.view();
                    let backward =
                        convolution::one_hot_backward(grid, codes, y, weight1, bias1, &mut scratch);
                    named(NAME, backward)
                },
            )?;
        partials.add_to(NAME, gradients, &spans)
    }

    fn reals(&self, batch: &PackedBatch, reals: Reals, out: &mut Vec<T>) -> Result<()> {
        const NAME: &str = "reals";
        let rows = |family| rows_of(NAME, batch, family);
        let values = match reals {
            Reals::Returns => &batch.returns[..],
            Reals::Observations(family) => part(
                NAME,
                &batch.real_observations,
                span(&rows(family)?.real_observations),
            )?,
            Reals::Actions(family) => {
                part(NAME, &batch.real_actions, span(&rows(family)?.real_actions))?
            }
        };
        let out = front_mut(NAME, out, values.len())?;
        for (out, &value) in out.iter_mut().zip(values) {
            *out = T::from_f64(f64::from(value));
        }
        Ok(())
    }

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

    fn linear(
        &self,
        rows: usize,
        map: &Linear,
        parameters: &Vec<T>,
        x: In<Vec<T>>,
        adapted: &mut Vec<T>,
        dropout: Option<Dropped<PackedBatch>>,
        y: Out<Vec<T>>,
    ) -> Result<()> {
        const NAME: &str = "linear";
        let x = columns(NAME, x, rows, map.inputs)?;
        let mut y = columns_mut(NAME, y, rows, map.outputs)?;
        let weight = weight(NAME, map, parameters)?;
        let bias = match map.bias {
            Some(span) => Some(ArrayView1::from(part(NAME, parameters, span)?)),
            None => None,
        };
        if rows >= map.outputs {
            let piece = self.piece(rows);
            y.axis_chunks_iter_mut(Axis(0), piece)
                .into_par_iter()
                .zip(x.axis_chunks_iter(Axis(0), piece))
                .try_for_each(|(y, x)| {
                    named(NAME, linear::forward(x, weight, bias, T::zero(), y))
                })?;
        } else {
            let piece = self.piece(map.outputs);
            y.axis_chunks_iter_mut(Axis(1), piece)
                .into_par_iter()
                .zip(weight.axis_chunks_iter(Axis(0), piece))
                .enumerate()
                .try_for_each(|(index, (y, weight))| {
                    let start = index * piece;
                    let bias = bias.map(|bias| bias.slice_move(s![start..start + y.ncols()]));
                    named(NAME, linear::forward(x, weight, bias, T::zero(), y))
                })?;
        }
        if map.adapters.is_empty() {
            return Ok(());
        }
        let mut adapted = matrix_mut(NAME, adapted, rows, map.ranks())?;
        let piece = self.piece(rows);
        y.axis_chunks_iter_mut(Axis(0), piece)
            .into_par_iter()
            .zip(adapted.axis_chunks_iter_mut(Axis(0), piece))
            .zip(x.axis_chunks_iter(Axis(0), piece))
            .enumerate()
            .try_for_each(|(index, ((mut y, adapted), x))| {
                let mut scratch = self.scratch();
                if dropout.is_some() && scratch.len() < x.len() {
                    scratch.resize(x.len(), T::zero());
                }
                let x = dropped(NAME, dropout, index * piece, x, &mut scratch)?;
                let mut adapted = adapted;
                for lora in &map.adapters {
                    let (xa, rest) = adapted.split_at(Axis(1), lora.rank);
                    adapted = rest;
                    let y = y.slice_mut(s![.., lora.output..lora.output + lora.outputs]);
                    let lora = adapter(NAME, map, lora, parameters)?;
                    named(NAME, lora_linear::forward_adapter(x, lora, xa, y))?;
                }
                Ok(())
            })
    }

    fn linear_backward(
        &self,
        rows: usize,
        map: &Linear,
        parameters: &Vec<T>,
        x: In<Vec<T>>,
        adapted: &Vec<T>,
        dropout: Option<Dropped<PackedBatch>>,
        grad_y: In<Vec<T>>,
        grad_x: Option<Out<Vec<T>>>,
        accumulate: bool,
        gradients: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "linear_backward";
        let x = columns(NAME, x, rows, map.inputs)?;
        let grad_y = columns(NAME, grad_y, rows, map.outputs)?;
        let mut grad_x = match grad_x {
            Some(out) => Some(columns_mut(NAME, out, rows, map.inputs)?),
            None => None,
        };
        let weight = weight(NAME, map, parameters)?;
        let beta = if accumulate { T::one() } else { T::zero() };
        if let Some(grad_x) = &mut grad_x {
            if rows >= map.inputs {
                let piece = self.piece(rows);
                grad_x
                    .axis_chunks_iter_mut(Axis(0), piece)
                    .into_par_iter()
                    .zip(grad_y.axis_chunks_iter(Axis(0), piece))
                    .try_for_each(|(dx, dy)| {
                        named(NAME, linear::backward_input(dy, weight, beta, dx))
                    })?;
            } else {
                let piece = self.piece(map.inputs);
                grad_x
                    .axis_chunks_iter_mut(Axis(1), piece)
                    .into_par_iter()
                    .zip(weight.axis_chunks_iter(Axis(1), piece))
                    .try_for_each(|(dx, weight)| {
                        named(NAME, linear::backward_input(grad_y, weight, beta, dx))
                    })?;
            }
        }
        if map.trainable {
            // The gradient of a transposed weight [inputs, outputs] is xᵀ·dy.
            let (left, right) = if map.transposed {
                (x, grad_y)
            } else {
                (grad_y, x)
            };
            let stored = part_mut(NAME, gradients, map.weight)?;
            let mut stored = matrix_mut(NAME, stored, left.ncols(), right.ncols())?;
            let piece = self.piece(left.ncols());
            stored
                .axis_chunks_iter_mut(Axis(0), piece)
                .into_par_iter()
                .zip(left.axis_chunks_iter(Axis(1), piece))
                .try_for_each(|(dweight, left)| {
                    named(NAME, linear::backward_weight(left, right, dweight))
                })?;
            if let Some(span) = map.bias {
                let bias = ArrayViewMut1::from(part_mut(NAME, gradients, span)?);
                named(NAME, linear::backward_bias(grad_y, bias))?;
            }
        }
        if map.adapters.is_empty() {
            return Ok(());
        }
        self.adapters_backward(
            map, parameters, x, adapted, dropout, grad_y, grad_x, gradients,
        )
    }

    fn activation(
        &self,
        activation: Activation,
        len: usize,
        x: &Vec<T>,
        y: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "activation";
        front_mut(NAME, y, len)?
            .par_chunks_mut(ELEMENTS)
            .zip(front(NAME, x, len)?.par_chunks(ELEMENTS))
            .try_for_each(|(y, x)| {
                let y = matrix_mut(NAME, y, 1, x.len())?;
                named(
                    NAME,
                    activation::forward(activation, matrix(NAME, x, 1, x.len())?, y),
                )
            })
    }

    fn activation_backward(
        &self,
        activation: Activation,
        len: usize,
        x: &Vec<T>,
        y: &Vec<T>,
        grad: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "activation_backward";
        front_mut(NAME, grad, len)?
            .par_chunks_mut(ELEMENTS)
            .zip(front(NAME, x, len)?.par_chunks(ELEMENTS))
            .zip(front(NAME, y, len)?.par_chunks(ELEMENTS))
            .try_for_each(|((grad, x), y)| {
                let (x, y) = (matrix(NAME, x, 1, x.len())?, matrix(NAME, y, 1, y.len())?);
                let grad = matrix_mut(NAME, grad, 1, x.len())?;
                named(NAME, activation::backward_in_place(activation, x, y, grad))
            })
    }

    fn dropout(&self, dropout: Dropped<PackedBatch>, width: usize, x: &mut Vec<T>) -> Result<()> {
        const NAME: &str = "dropout";
        let rows = ELEMENTS.div_ceil(width.max(1));
        front_mut(NAME, x, dropout.batch.tokens() * width)?
            .par_chunks_mut(rows * width.max(1))
            .enumerate()
            .try_for_each(|(index, x)| draw(NAME, dropout, index * rows, width, x))
    }

    fn add(&self, len: usize, x: &Vec<T>, y: &Vec<T>, out: &mut Vec<T>) -> Result<()> {
        front_mut("add", out, len)?
            .par_chunks_mut(ELEMENTS)
            .zip(front("add", x, len)?.par_chunks(ELEMENTS))
            .zip(front("add", y, len)?.par_chunks(ELEMENTS))
            .for_each(|((out, x), y)| {
                for ((out, &x), &y) in out.iter_mut().zip(x).zip(y) {
                    *out = x + y;
                }
            });
        Ok(())
    }

    fn add_assign(&self, len: usize, y: &Vec<T>, x: &mut Vec<T>) -> Result<()> {
        front_mut("add_assign", x, len)?
            .par_chunks_mut(ELEMENTS)
            .zip(front("add_assign", y, len)?.par_chunks(ELEMENTS))
            .for_each(|(x, y)| {
                for (x, &y) in x.iter_mut().zip(y) {
                    *x += y;
                }
            });
        Ok(())
    }

    fn layer_norm(
        &self,
        rows: usize,
        norm: &LayerNorm,
        parameters: &Vec<T>,
        x: &Vec<T>,
        residual: Option<Residual<Vec<T>>>,
        y: &mut Vec<T>,
        statistics: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "layer_norm";
        let x = match residual {
            Some(Residual { summand, sum }) => {
                self.add(rows * norm.width, x, summand, sum)?;
                sum
            }
            None => x,
        };
        let weight = ArrayView1::from(part(NAME, parameters, norm.weight)?);
        let bias = ArrayView1::from(part(NAME, parameters, norm.bias)?);
        let (mean, rstd) = front_mut(NAME, statistics, 2 * rows)?.split_at_mut(rows);
        let piece = self.piece(rows);
        matrix_mut(NAME, y, rows, norm.width)?
            .axis_chunks_iter_mut(Axis(0), piece)
            .into_par_iter()
            .zip(matrix(NAME, x, rows, norm.width)?.axis_chunks_iter(Axis(0), piece))
            .zip(mean.par_chunks_mut(piece))
            .zip(rstd.par_chunks_mut(piece))
            .try_for_each(|(((y, x), mean), rstd)| {
                let (mean, rstd) = (ArrayViewMut1::from(mean), ArrayViewMut1::from(rstd));
                let forward = layer_norm::forward(x, weight, bias, norm.epsilon, y, mean, rstd);
                named(NAME, forward)
            })
    }

    fn layer_norm_backward(
        &self,
        rows: usize,
        norm: &LayerNorm,
        parameters: &Vec<T>,
        x: &Vec<T>,
        statistics: &Vec<T>,
        grad_y: &Vec<T>,
        grad_x: &mut Vec<T>,
        accumulate: bool,
        gradients: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "layer_norm_backward";
        let width = norm.width;
        let weight = ArrayView1::from(part(NAME, parameters, norm.weight)?);
        let (mean, rstd) = front(NAME, statistics, 2 * rows)?.split_at(rows);
        // The third part is a row's gradient before it is added.
        let mut partials = self.partials(3 * width);
        let piece = partials.piece(rows);
        partials
            .pieces()
            .zip(matrix_mut(NAME, grad_x, rows, width)?.axis_chunks_iter_mut(Axis(0), piece))
            .zip(matrix(NAME, x, rows, width)?.axis_chunks_iter(Axis(0), piece))
            .zip(matrix(NAME, grad_y, rows, width)?.axis_chunks_iter(Axis(0), piece))
            .zip(mean.par_chunks(piece))
            .zip(rstd.par_chunks(piece))
            .try_for_each(|(((((partial, mut dx), x), dy), mean), rstd)| {
                let (dweight, rest) = partial.split_at_mut(width);
                let (dbias, scratch) = rest.split_at_mut(width);
                let mut backward = |rows: Range<usize>, dx: ArrayViewMut2<T>| {
                    let [mean, rstd] = [mean, rstd].map(|x| ArrayView1::from(&x[rows.clone()]));
                    let [x, dy] = [x, dy].map(|x| x.slice_move(s![rows.clone(), ..]));
                    let [dweight, dbias] = [&mut *dweight, &mut *dbias].map(ArrayViewMut1::from);
                    named(
                        NAME,
                        layer_norm::backward(x, weight, mean, rstd, dy, dx, dweight, dbias),
                    )
                };
                if !accumulate {
                    return backward(0..mean.len(), dx);
                }
                for (row, mut dx) in dx.rows_mut().into_iter().enumerate() {
                    backward(row..row + 1, matrix_mut(NAME, scratch, 1, width)?)?;
                    dx += &ArrayView1::from(&*scratch);
                }
                Ok(())
            })?;
        if norm.trainable {
            partials.add_to(NAME, gradients, &[norm.weight, norm.bias])?;
        }
        Ok(())
    }

    fn attention_state(&self, attention: &Attention, tokens: usize) -> Result<Vec<T>> {
        self.buffer(tokens * attention.heads, Kind::Exact)
    }

    fn log_sum_exp<'a>(&self, state: &'a Vec<T>) -> &'a Vec<T> {
        state
    }

    fn attention(
        &self,
        batch: &PackedBatch,
        attention: &Attention,
        qkv: &Vec<T>,
        out: &mut Vec<T>,
        lse: &mut Vec<T>,
        metrics: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "attention";
        let heads = Heads::new(self, attention, batch, qkv)?;
        heads.check()?;
        let out = matrix_mut(NAME, out, batch.tokens(), attention.width())?;
        let lse = matrix_mut(NAME, lse, batch.tokens(), attention.heads)?;
        let numerator = heads.forward(heads.task(), out, lse)?;
        if attention.supervised.is_some() {
            let metrics = front_mut(NAME, metrics, METRICS)?;
            metrics[Metric::MemoryLoss as usize] = T::from_f64(numerator);
        }
        Ok(())
    }

    fn attention_backward(
        &self,
        batch: &PackedBatch,
        attention: &Attention,
        qkv: &Vec<T>,
        _out: &Vec<T>,
        lse: &Vec<T>,
        grad_out: &Vec<T>,
        grad_qkv: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "attention_backward";
        let (tokens, width) = (batch.tokens(), attention.width());
        let heads = Heads::new(self, attention, batch, qkv)?;
        heads.check()?;
        let saved = HeadSaved {
            lse: matrix(NAME, lse, tokens, attention.heads)?,
            grad_out: matrix(NAME, grad_out, tokens, width)?,
            pair_gradient: batch.training.weights.pair,
        };
        let (q, rest) = matrix_mut(NAME, grad_qkv, tokens, 3 * width)?.split_at(Axis(1), width);
        let (k, v) = rest.split_at(Axis(1), width);
        heads.backward(heads.task(), saved, HeadGradients { q, k, v })
    }

    fn attention_cached(
        &self,
        batch: &PackedBatch,
        attention: &Attention,
        qkv: &Vec<T>,
        cache: &mut KeyValueCache<Vec<T>>,
        rows: &[usize],
        prefix: usize,
        out: &mut Vec<T>,
        lse: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "attention_cached";
        let width = attention.width();
        let heads = Heads::new(self, attention, batch, qkv)?;
        for (sequence, &row) in rows.iter().enumerate() {
            let [first, end] = [0, 1].map(|next| batch.cu_seqlens[sequence + next] as usize);
            if prefix + (end - first) > cache.capacity {
                return Err(BackendError::Buffer {
                    operation: NAME,
                    found: cache.capacity,
                    expected: prefix + (end - first),
                });
            }
            let span = Span {
                offset: (row * cache.capacity + prefix) * width,
                len: (end - first) * width,
            };
            let [keys, values] = heads.keys_and_values();
            for (source, target) in [(keys, &mut cache.keys), (values, &mut cache.values)] {
                let target = part_mut(NAME, target, span)?;
                matrix_mut(NAME, target, end - first, width)?
                    .assign(&source.slice(s![first..end, ..]));
            }
        }
        let heads = heads.with_cache(Cached {
            cache,
            rows,
            prefix,
        });
        let out = matrix_mut(NAME, out, batch.tokens(), width)?;
        let lse = matrix_mut(NAME, lse, batch.tokens(), attention.heads)?;
        heads.forward(heads.task(), out, lse)?;
        Ok(())
    }

    fn memory_state(
        &self,
        memory: &Memory,
        sequences: usize,
        segments: usize,
        _links: usize,
    ) -> Result<MemoryState<T>> {
        Ok(MemoryState {
            states: self.buffer(segments * memory.slots * memory.width, Kind::Exact)?,
            recalls: vec![Recall::default(); sequences],
        })
    }

    fn memory(
        &self,
        batch: &PackedBatch,
        memory: &Memory,
        parameters: &Vec<T>,
        start: MemoryStart<Vec<T>>,
        inputs: MemoryInputs<Vec<T>>,
        kept: &mut MemoryState<T>,
        read: &mut Vec<T>,
        metrics: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "memory";
        let chains = Chains::new(self, memory, batch, parameters, inputs)?;
        let state = memory.slots * memory.width;
        let states = front_mut(NAME, &mut kept.states, batch.segments() * state)?;
        let read = matrix_mut(NAME, read, batch.tokens(), memory.width)?;
        let sequences = batch.sequences();
        let recalls = &mut kept.recalls[..sequences];
        let forward = match start {
            MemoryStart::Learned => {
                let initial = part(NAME, parameters, memory.initial)?;
                chains.forward(0, sequences, &|_| initial, states, recalls, read)
            }
            MemoryStart::State(buffer, slots) => {
                let rows = slots.iter().max().map_or(0, |&slot| slot + 1);
                let buffer = front(NAME, buffer, rows * state)?;
                let start = |sequence: usize| &buffer[slots[sequence] * state..][..state];
                chains.forward(0, sequences, &start, states, recalls, read)
            }
        };
        named(NAME, forward)?;
        if memory.supervised {
            let metrics = front_mut(NAME, metrics, METRICS)?;
            let loss = kept.recalls[..sequences].iter().map(|x| x.loss).sum();
            metrics[Metric::MemoryLoss as usize] = T::from_f64(loss);
        }
        Ok(())
    }

    fn memory_backward(
        &self,
        batch: &PackedBatch,
        memory: &Memory,
        parameters: &Vec<T>,
        inputs: MemoryInputs<Vec<T>>,
        kept: &MemoryState<T>,
        grad_read: &Vec<T>,
        input_gradients: MemoryGradients<Vec<T>>,
        grad_states: &mut Vec<T>,
        gradients: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "memory_backward";
        let (tokens, width, sequences) = (batch.tokens(), memory.width, batch.sequences());
        let state = memory.slots * width;
        let chains = Chains::new(self, memory, batch, parameters, inputs)?;
        let keys = matrix_mut(NAME, input_gradients.keys, tokens, 2 * width)?;
        let (address_key, strength_key) = keys.split_at(Axis(1), width);
        let value = columns_mut(NAME, input_gradients.value, tokens, width)?;
        let key_strength = match input_gradients.key_strength {
            Some(buffer) => Some(ArrayViewMut1::from(front_mut(NAME, buffer, tokens)?)),
            None => None,
        };
        let grad_states = front_mut(NAME, grad_states, 2 * sequences * state)?;
        let initial = part(NAME, parameters, memory.initial)?;
        let kept = Kept {
            states: front(NAME, &kept.states, batch.segments() * state)?,
            recalls: &kept.recalls[..sequences],
        };
        let grad_read = matrix(NAME, grad_read, tokens, width)?;
        let chain_gradients = ChainGradients {
            address_key,
            strength_key,
            value,
            key_strength,
            states: &mut *grad_states,
        };
        let bias = named(
            NAME,
            chains.backward(0, sequences, initial, kept, grad_read, chain_gradients),
        )?;
        if !memory.trainable {
            return Ok(());
        }
        if let Some(span) = memory.strength_bias {
            part_mut(NAME, gradients, span)?[0] += bias;
        }
        part_mut(NAME, gradients, memory.initial)?
            .par_chunks_mut(ELEMENTS)
            .enumerate()
            .for_each(|(index, sum)| {
                for of_sequence in grad_states.chunks(2 * state) {
                    let piece = &of_sequence[index * ELEMENTS..][..sum.len()];
                    for (sum, &x) in sum.iter_mut().zip(piece) {
                        *sum += x;
                    }
                }
            });
        Ok(())
    }

    fn commit_memory(
        &self,
        batch: &PackedBatch,
        memory: &Memory,
        kept: &MemoryState<T>,
        slots: &[usize],
        to: &mut Vec<T>,
    ) -> Result<()> {
        const NAME: &str = "commit_memory";
        let len = memory.slots * memory.width;
        for (sequence, &slot) in slots.iter().enumerate() {
            let [first, end] = [0, 1].map(|next| batch.sequence_segments[sequence + next] as usize);
            if first == end {
                continue;
            }
            let row = |index: usize| Span {
                offset: index * len,
                len,
            };
            part_mut(NAME, to, row(slot))?.copy_from_slice(part(NAME, &kept.states, row(end - 1))?);
        }
        Ok(())
    }

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
