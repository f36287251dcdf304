//! The GPU backend: the kernels of [`crate::ops`] and a library's matrix products.
//!
//! Everything happens in the order of the calls; nothing waits but [`Backend::download`], and
//! [`Backend::stage`] for the batch before last. What changes from step to step lies in the staged
//! batch, in the device's memory.

mod acting;
#[allow(unsafe_code)] // the boundary to cuBLASLt
mod blas;
mod chain;
#[allow(unsafe_code)] // the boundary to the CUDA driver
mod cuda;
mod device;
#[cfg(feature = "host")]
mod host;
mod memory;
#[cfg(feature = "nccl")]
#[allow(unsafe_code)] // the boundary to NCCL
mod nccl;
mod products;
mod recall;

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use blas::Multiply;
pub use cuda::CudaDevice;
pub use device::{Compute, Device, Element, Factor, Product};
#[cfg(feature = "host")]
pub use host::{Graphs, HostDevice};
pub use memory::{Batch, Buffer};

use memory::Scratch;

use super::{
    Activation, Attention, Backend, BackendError, Bytes, Codes, Convolutions, Dropped, In,
    KeyValueCache, Kind, LayerNorm, Linear, METRICS, Memory, MemoryGradients, MemoryInputs,
    MemoryStart, Metric, OneHot, Out, Positions, Rank, Reals, Residual, Result, Span, Supervised,
    Trained, is_heard, range,
};
use crate::batch::PackedBatch;
use crate::ops::{
    self, Version, activation, adamw, attention, convolutions, cross_entropy, elementwise,
    layer_norm, one_hot, squared_error, tokens,
};

/// Most episodes that act at once.
const MOST_EPISODES: usize = 4096;
/// Free memory where a device does not say.
const UNKNOWN_BYTES: usize = 1 << 30;

/// Computes with the kernels on a device, in `T`: sums, parameters and their gradients in f32.
#[derive(Debug)]
pub struct Gpu<D: Device, T: Compute> {
    device: D,
    version: Version,
    /// For partial sums.
    floats: Scratch<D, f32>,
    /// For packed keys and values.
    activations: Scratch<D, T>,
    /// For indices.
    indices: Scratch<D, i32>,
    /// For dropout masks as bits.
    bits: Scratch<D, u32>,
    /// First inputs of the fields of every one-hot map so far.
    offsets: Mutex<Known<D>>,
    /// How often a buffer that models keep has grown.
    grown: AtomicU32,
    /// Bytes asked for so far, while they are only counted.
    counted: Mutex<Option<usize>>,
}

/// Arrays of indices that stay on the device.
type Known<D> = HashMap<Vec<usize>, Arc<<D as Device>::Memory<i32>>>;

/// A sequence of operations that comes again and again.
#[derive(Debug)]
pub struct Repeated<D: Device> {
    /// Of the batches that it is for.
    shape: Option<u64>,
    recording: Option<D::Recording>,
}

impl<D: Device> Default for Repeated<D> {
    fn default() -> Self {
        Self {
            shape: None,
            recording: None,
        }
    }
}

/// What attention keeps for its backward pass.
#[derive(Debug)]
pub struct AttentionState<D: Device, T: Compute> {
    /// [tokens, heads]
    lse: Buffer<D, T>,
    supervised: Option<SupervisedState<D>>,
}

/// What a memory layer keeps for its backward pass. Both grow to what a batch needs whose recalled
/// tokens have columns in the memory.
#[derive(Debug)]
pub struct MemoryState<D: Device, T: Compute> {
    /// See [`chain::Chain`].
    memories: Buffer<D, T>,
    /// Gradient of the recall, in the order of segments.
    recall: Buffer<D, T>,
}

/// The same for the supervised heads, S of them.
#[derive(Debug)]
struct SupervisedState<D: Device> {
    /// \[heads\]
    slots: D::Memory<i32>,
    /// [tokens, S]
    peak: D::Memory<i32>,
    /// [3, tokens, S]: shift, value at the peak, loss of the row.
    rows: D::Memory<f32>,
    /// The loss and its factor, which a part of a batch has no use for.
    loss: D::Memory<f32>,
}

impl<D: Device, T: Compute> Gpu<D, T> {
    /// A backend on this device.
    pub fn new(device: D) -> Self {
        Self {
            device,
            version: Version::default(),
            floats: Scratch::default(),
            activations: Scratch::default(),
            indices: Scratch::default(),
            bits: Scratch::default(),
            offsets: Mutex::default(),
            grown: AtomicU32::default(),
            counted: Mutex::default(),
        }
    }

    /// The same with operations by this version, where there is one for the shape.
    pub fn with_version(self, version: Version) -> Self {
        Self { version, ..self }
    }

    fn counted(&self) -> MutexGuard<'_, Option<usize>> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory of a buffer, or of nothing while bytes are only counted.
    fn allocate<E: Element>(&self, len: usize) -> ops::Result<D::Memory<E>> {
        match &mut *self.counted() {
            Some(bytes) => {
                *bytes += len * size_of::<E>();
                self.device.allocate(0)
            }
            None => self.device.allocate(len),
        }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Codes of one kind: shape of the map on them, the codes, and where their rows are.
    fn codes<'a>(
        &'a self,
        batch: &'a Batch<D, T>,
        codes: Codes,
        map: &OneHot,
    ) -> Result<(one_hot::Shape, ops::Input<'a, u8>, Range<usize>)> {
        let device = &self.device;
        let (rows, codes) = match codes {
            Codes::Observations(family) => (
                &batch.rows_of(family)?.observations,
                batch.observation_codes(device, family)?,
            ),
            Codes::Actions(family) => {
                let rows = &batch.rows_of(family)?.actions;
                let all = batch.bytes(device, &batch.byte.actions)?;
                (rows, all.slice(rows.clone())?)
            }
        };
        let shape = one_hot::Shape {
            rows: rows.len(),
            fields: map.offsets.len(),
            inputs: map.inputs,
            width: map.width,
        };
        let numbers = rows.start * map.width..rows.end * map.width;
        Ok((shape, codes, numbers))
    }

    /// The first input of each field, which stays on the device.
    fn offsets(&self, map: &OneHot) -> Result<Arc<D::Memory<i32>>> {
        let mut known = self.offsets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memory) = known.get(&map.offsets) {
            return Ok(Arc::clone(memory));
        }
        let offsets: Vec<i32> = map.offsets.iter().map(|&offset| offset as i32).collect();
        let mut memory = self.device.allocate(offsets.len())?;
        self.device.upload(&offsets, &mut memory, 0)?;
        let memory = Arc::new(memory);
        known.insert(map.offsets.clone(), Arc::clone(&memory));
        Ok(memory)
    }

    fn convolutions_shape(
        &self,
        batch: &Batch<D, T>,
        family: usize,
        front_end: &Convolutions,
    ) -> Result<convolutions::Shape> {
        Ok(convolutions::Shape {
            rows: batch.rows_of(family)?.observations.len(),
            grid: front_end.grid.clone(),
            middle: front_end.middle,
            out: front_end.out,
        })
    }

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

    fn attention_shape(&self, batch: &Batch<D, T>, attention: &Attention) -> attention::Shape {
        attention::Shape {
            sequences: match attention.extent {
                super::Extent::Sequence => batch.sequences,
                super::Extent::Segment => batch.segments,
            },
            queries: batch.tokens,
            keys: batch.tokens,
            heads: attention.heads,
            key_heads: attention.heads,
            width: attention.head_width,
            mask: attention::Mask::Causal,
        }
    }

    fn pack<'a>(
        &'a self,
        batch: &'a Batch<D, T>,
        attention: &Attention,
    ) -> Result<attention::Pack<'a>> {
        let at = match attention.extent {
            super::Extent::Sequence => &batch.int.cu_seqlens,
            super::Extent::Segment => &batch.int.segment_offsets,
        };
        Ok(attention::Pack {
            cu_seqlens_q: batch.ints(&self.device, at)?,
            cu_seqlens_k: batch.ints(&self.device, at)?,
            groups: None,
        })
    }

    fn supervision<'a>(
        &'a self,
        batch: &'a Batch<D, T>,
        supervised: &Supervised,
        state: &'a D::Memory<i32>,
    ) -> Result<attention::Supervision<'a>> {
        let device = &self.device;
        Ok(attention::Supervision {
            heads: supervised.heads.len(),
            slots: device.input(state, 0..device.len(state))?,
            annotated: batch.bytes(device, &batch.byte.annotated)?,
            pair_offsets: batch.ints(device, &batch.int.pair_offsets)?,
            pair_keys: batch.pair_keys(device)?,
        })
    }
}

/// The `part`th of three arrays of `len` elements.
fn third(part: usize, len: usize) -> Range<usize> {
    part * len..(part + 1) * len
}

impl<D: Device, T: Compute> Backend for Gpu<D, T> {
    type Element = f32;
    type Buffer = Buffer<D, T>;
    type Batch = Batch<D, T>;
    type Recording = Repeated<D>;
    type AttentionState = AttentionState<D, T>;
    type MemoryState = MemoryState<D, T>;

    fn name(&self) -> &'static str {
        self.device.name()
    }

    fn rank(&self) -> Rank {
        self.device.rank()
    }

    fn sum_over_ranks(&self, buffer: &mut Self::Buffer, len: usize) -> Result<()> {
        let memory = buffer.exact.as_mut().ok_or(BackendError::Kind)?;
        Ok(self.device.sum_over_ranks(memory, len)?)
    }

    /// In at most half of the free memory: activations come on top.
    fn episodes_at_once(&self, numbers: usize) -> usize {
        let bytes = numbers.saturating_mul(size_of::<T>());
        let room = self.device.room();
        let free = room.map_or(UNKNOWN_BYTES, |room| room.free.0);
        (free / 2 / bytes.max(1)).clamp(1, MOST_EPISODES)
    }

    fn needed_for(&self, work: impl FnOnce()) -> Bytes {
        *self.counted() = Some(0);
        work();
        Bytes(self.counted().take().unwrap_or(0))
    }

    fn shards(&self, _for_threads: usize) -> usize {
        1
    }

    fn for_each<S: Send, E: Send>(
        &self,
        items: &mut [S],
        work: impl Fn(&mut S) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<(), E> {
        items.iter_mut().try_for_each(work)
    }

    fn buffer(&self, len: usize, kind: Kind) -> Result<Self::Buffer> {
        Ok(Buffer::new(self, len, kind)?)
    }

    fn upload(&self, from: &[f32], to: &mut Self::Buffer, offset: usize) -> Result<()> {
        if let Some(exact) = &mut to.exact {
            self.device.upload(from, exact, offset)?;
        }
        if let Some(compute) = &mut to.compute {
            let narrow: Vec<T> = from.iter().map(|&x| T::narrow(x)).collect();
            self.device.upload(&narrow, compute, offset)?;
        }
        Ok(())
    }

    fn download(&self, from: &Self::Buffer, offset: usize, to: &mut [f32]) -> Result<()> {
        if let Some(exact) = &from.exact {
            return Ok(self.device.download(exact, offset, to)?);
        }
        let memory = from.compute.as_ref().ok_or(BackendError::Kind)?;
        let mut narrow = vec![T::default(); to.len()];
        self.device.download(memory, offset, &mut narrow)?;
        for (to, from) in to.iter_mut().zip(narrow) {
            *to = from.widen();
        }
        Ok(())
    }

    fn wants_one_size(&self) -> bool {
        true
    }

    fn shape(&self, batch: &Self::Batch) -> u64 {
        let mut hash = DefaultHasher::new();
        batch.shape().hash(&mut hash);
        batch.recalled.columns.hash(&mut hash);
        let of_scratch = [
            self.grown.load(Ordering::Relaxed),
            self.floats.grown(),
            self.activations.grown(),
            self.indices.grown(),
            self.bits.grown(),
        ];
        of_scratch.hash(&mut hash);
        hash.finish()
    }

    /// The first batch of a shape is computed as it comes, which also loads kernels and lets scratch
    /// memory grow; the second is recorded.
    fn repeat<E: From<BackendError>>(
        &self,
        repeated: &mut Repeated<D>,
        shape: u64,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        // A graph has none of the ranges.
        if is_heard() {
            return work();
        }
        if repeated.shape != Some(shape) {
            *repeated = Repeated {
                shape: Some(shape),
                recording: None,
            };
            return work();
        }
        if repeated.recording.is_none() {
            let mut failure = None;
            let recorded = self.device.record(|| {
                work().map_err(|error| {
                    failure = Some(error);
                    ops::Error::NoGraph
                })
            });
            if let Some(failure) = failure {
                return Err(failure);
            }
            repeated.recording = Some(recorded.map_err(BackendError::from)?);
        }
        match &repeated.recording {
            Some(recording) => Ok(self.device.replay(recording).map_err(BackendError::from)?),
            None => Ok(()),
        }
    }

    fn stage(&self, batch: &PackedBatch, to: &mut Self::Batch) -> Result<()> {
        let _range = range("stage");
        Ok(to.stage(&self.device, batch)?)
    }

    fn zero(&self, buffer: &mut Self::Buffer, span: Span) -> Result<()> {
        if let Some(exact) = &mut buffer.exact {
            self.device.zero(exact, span.range())?;
        }
        if let Some(compute) = &mut buffer.compute {
            self.device.zero(compute, span.range())?;
        }
        Ok(())
    }

    fn copy(
        &self,
        from: &Self::Buffer,
        to: &mut Self::Buffer,
        offset: usize,
        len: usize,
    ) -> Result<()> {
        let device = &self.device;
        match (&from.compute, &mut to.compute) {
            (Some(from), Some(to)) => device.copy(from, to, offset, len)?,
            (None, None) => {}
            _ => return Err(BackendError::Kind),
        }
        match (&from.exact, &mut to.exact) {
            (Some(from), Some(to)) => device.copy(from, to, offset, len)?,
            (None, None) => {}
            _ => return Err(BackendError::Kind),
        }
        Ok(())
    }

    fn one_hot(
        &self,
        batch: &Self::Batch,
        codes: Codes,
        map: &OneHot,
        parameters: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("one_hot");
        let device = &self.device;
        let offsets = self.offsets(map)?;
        let (shape, codes, numbers) = self.codes(batch, codes, map)?;
        let tensors = one_hot::Forward {
            codes,
            offsets: device.input(&offsets, 0..map.offsets.len())?,
            weight: parameters.read(device, map.weight.range())?,
            bias: parameters.read(device, map.bias.range())?,
            tanh: false,
            y: out.write(device, numbers)?,
        };
        Ok(shape.forward(device, tensors)?)
    }

    fn one_hot_backward(
        &self,
        batch: &Self::Batch,
        codes: Codes,
        map: &OneHot,
        grad_out: &Self::Buffer,
        gradients: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("one_hot_backward");
        if !map.trainable {
            return Ok(());
        }
        let device = &self.device;
        let offsets = self.offsets(map)?;
        let (shape, codes, numbers) = self.codes(batch, codes, map)?;
        let mut workspace = self.floats.lock(device, shape.workspace()?)?;
        let len = gradients.len;
        let [dweight, dbias] = gradients
            .write_exact(device, 0..len)?
            .parts([map.weight.range(), map.bias.range()])?;
        let tensors = one_hot::Backward {
            codes,
            offsets: device.input(&offsets, 0..map.offsets.len())?,
            y: None,
            dy: grad_out.read(device, numbers)?,
            dweight,
            dbias,
            workspace: workspace.output(device)?,
        };
        Ok(shape.backward::<T>(device, tensors)?)
    }

    fn convolutions(
        &self,
        batch: &Self::Batch,
        family: usize,
        front_end: &Convolutions,
        parameters: &Self::Buffer,
        middle: &mut Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("convolutions");
        let device = &self.device;
        let shape = self.convolutions_shape(batch, family, front_end)?;
        let cells = shape.rows * shape.grid.positions();
        let tensors = convolutions::Forward {
            codes: batch.observation_codes(device, family)?,
            weight1: parameters.read(device, front_end.weight1.range())?,
            bias1: parameters.read(device, front_end.bias1.range())?,
            weight2: parameters.read(device, front_end.weight2.range())?,
            bias2: parameters.read(device, front_end.bias2.range())?,
            middle: middle.write(device, 0..cells * shape.middle)?,
            out: out.write(device, 0..cells * shape.out)?,
        };
        Ok(shape.forward(device, tensors)?)
    }

    fn convolutions_backward(
        &self,
        batch: &Self::Batch,
        family: usize,
        front_end: &Convolutions,
        parameters: &Self::Buffer,
        middle: &Self::Buffer,
        out: &Self::Buffer,
        grad_out: &mut Self::Buffer,
        grad_middle: &mut Self::Buffer,
        gradients: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("convolutions_backward");
        if !front_end.trainable {
            return Ok(());
        }
        let device = &self.device;
        let shape = self.convolutions_shape(batch, family, front_end)?;
        let cells = shape.rows * shape.grid.positions();
        let mut workspace = self.floats.lock(device, shape.workspace::<T>()?)?;
        let len = gradients.len;
        let [dweight1, dbias1, dweight2, dbias2] =
            gradients.write_exact(device, 0..len)?.parts([
                front_end.weight1.range(),
                front_end.bias1.range(),
                front_end.weight2.range(),
                front_end.bias2.range(),
            ])?;
        let tensors = convolutions::Backward {
            codes: batch.observation_codes(device, family)?,
            weight2: parameters.read(device, front_end.weight2.range())?,
            middle: middle.read(device, 0..cells * shape.middle)?,
            out: out.read(device, 0..cells * shape.out)?,
            dout: grad_out.write(device, 0..cells * shape.out)?,
            dmiddle: grad_middle.write(device, 0..cells * shape.middle)?,
            dweight1,
            dbias1,
            dweight2,
            dbias2,
            workspace: workspace.output(device)?,
        };
        Ok(shape.backward(device, tensors)?)
    }

    fn reals(&self, batch: &Self::Batch, reals: Reals, out: &mut Self::Buffer) -> Result<()> {
        let _range = range("reals");
        let device = &self.device;
        let x = batch.reals(device, reals)?;
        let rows = match reals {
            Reals::Returns => batch.returns,
            Reals::Observations(family) => batch.rows_of(family)?.observations.len(),
            Reals::Actions(family) => batch.rows_of(family)?.actions.len(),
        };
        let (len, width) = (x.len(), (x.len() / rows.max(1)).max(1));
        let shape = tokens::CopyShape {
            rows,
            width,
            x_rows: rows,
            y_rows: rows,
        };
        let tensors = tokens::Copy {
            x: x.rows(width),
            from: None,
            to: None,
            y: out.write(device, 0..len)?.rows(width),
        };
        Ok(shape.copy(device, tensors)?)
    }

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

    fn linear(
        &self,
        rows: usize,
        map: &Linear,
        parameters: &Self::Buffer,
        x: In<Self::Buffer>,
        adapted: &mut Self::Buffer,
        dropout: Option<Dropped<Self::Batch>>,
        y: Out<Self::Buffer>,
    ) -> Result<()> {
        let _range = range("linear");
        self.product_forward(rows, map, parameters, x, adapted, dropout, y)
    }

    fn linear_backward(
        &self,
        rows: usize,
        map: &Linear,
        parameters: &Self::Buffer,
        x: In<Self::Buffer>,
        adapted: &Self::Buffer,
        dropout: Option<Dropped<Self::Batch>>,
        grad_y: In<Self::Buffer>,
        grad_x: Option<Out<Self::Buffer>>,
        accumulate: bool,
        gradients: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("linear_backward");
        self.product_backward(
            rows, map, parameters, x, adapted, dropout, grad_y, grad_x, accumulate, gradients,
        )
    }

    fn activation(
        &self,
        activation: Activation,
        len: usize,
        x: &Self::Buffer,
        y: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("activation");
        let device = &self.device;
        let tensors = activation::Forward {
            activation,
            x: x.read(device, 0..len)?,
            y: y.write(device, 0..len)?,
        };
        Ok(activation::Shape { elements: len }.forward(device, tensors)?)
    }

    fn activation_backward(
        &self,
        activation: Activation,
        len: usize,
        x: &Self::Buffer,
        y: &Self::Buffer,
        grad: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("activation_backward");
        let device = &self.device;
        let kept = match activation {
            Activation::Relu | Activation::Tanh => y,
            Activation::Gelu | Activation::OnePlus => x,
        };
        let tensors = activation::Backward {
            activation,
            kept: kept.read(device, 0..len)?,
            dy: grad.write(device, 0..len)?,
        };
        Ok(activation::Shape { elements: len }.backward(device, tensors)?)
    }

    fn dropout(
        &self,
        dropout: Dropped<Self::Batch>,
        width: usize,
        x: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("dropout");
        let (device, batch) = (&self.device, dropout.batch);
        let shape = elementwise::Shape {
            rows: batch.tokens,
            width,
        };
        let tensors = elementwise::Forward {
            dropout: Some(self.mask(dropout)?),
            ..nothing(x.write(device, 0..batch.tokens * width)?)
        };
        Ok(shape.forward(device, tensors)?)
    }

    fn add(
        &self,
        len: usize,
        x: &Self::Buffer,
        y: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("add");
        let device = &self.device;
        let tensors = elementwise::Forward {
            x: x.read(device, 0..len)?,
            residual: Some(y.read(device, 0..len)?),
            ..nothing(out.write(device, 0..len)?)
        };
        Ok(flat(len).forward(device, tensors)?)
    }

    fn add_assign(&self, len: usize, y: &Self::Buffer, x: &mut Self::Buffer) -> Result<()> {
        let _range = range("add_assign");
        let device = &self.device;
        match x.exact.is_some() {
            true => {
                let y = y.read_exact(device, 0..len)?;
                accumulate(device, len, y, x.write_exact(device, 0..len)?)
            }
            false => {
                let y = y.read(device, 0..len)?;
                accumulate(device, len, y, x.write(device, 0..len)?)
            }
        }
    }

    fn layer_norm(
        &self,
        rows: usize,
        norm: &LayerNorm,
        parameters: &Self::Buffer,
        x: &Self::Buffer,
        residual: Option<Residual<Self::Buffer>>,
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
                Some(Residual { summand, sum }) => Some(layer_norm::Residual {
                    residual: summand.read(device, all.clone())?,
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
            dy: grad_y.read(device, all)?,
            dsum: accumulate.then(|| ds.as_input()),
            ds,
            dweight,
            dbias,
            workspace,
        };
        Ok(shape.backward(device, tensors)?)
    }

    fn attention_state(
        &self,
        attention: &Attention,
        tokens: usize,
    ) -> Result<Self::AttentionState> {
        let supervised = match &attention.supervised {
            Some(supervised) => {
                let rows = tokens * supervised.heads.len();
                let shape = attention::Shape {
                    sequences: 1,
                    queries: tokens,
                    keys: tokens,
                    heads: attention.heads,
                    key_heads: attention.heads,
                    width: attention.head_width,
                    mask: attention::Mask::Causal,
                };
                let mut slots = self.allocate(attention.heads)?;
                if self.device.len(&slots) == attention.heads {
                    let places = shape.slots(&supervised.heads);
                    self.device.upload(&places, &mut slots, 0)?;
                }
                Some(SupervisedState {
                    slots,
                    peak: self.allocate(rows)?,
                    rows: self.allocate(3 * rows)?,
                    loss: self.allocate(2)?,
                })
            }
            None => None,
        };
        Ok(AttentionState {
            lse: Buffer::new(self, tokens * attention.heads, Kind::Exact)?,
            supervised,
        })
    }

    fn log_sum_exp<'a>(&self, state: &'a Self::AttentionState) -> &'a Self::Buffer {
        &state.lse
    }

    fn attention(
        &self,
        batch: &Self::Batch,
        attention: &Attention,
        qkv: &Self::Buffer,
        out: &mut Self::Buffer,
        state: &mut Self::AttentionState,
        metrics: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("attention");
        let device = &self.device;
        let shape = self.attention_shape(batch, attention);
        let width = attention.width();
        let qkv = qkv.read(device, 0..batch.tokens * 3 * width)?;
        let [q, k, v] = qkv.rows(3 * width).columns([width; 3]);
        let memory_loss = match (&attention.supervised, &mut state.supervised) {
            (Some(supervised), Some(state)) => {
                let rows = batch.tokens * supervised.heads.len();
                let [shift, at_peak, row_loss] = device
                    .output(&mut state.rows, 0..3 * rows)?
                    .parts([0, 1, 2].map(|part| third(part, rows)))?;
                let [loss, factor] = device.output(&mut state.loss, 0..2)?.parts([0..1, 1..2])?;
                let sum = Metric::MemoryLoss as usize;
                Some(attention::MemoryLoss {
                    supervision: self.supervision(batch, supervised, &state.slots)?,
                    denominator: supervised.denominator,
                    sum: metrics.write_exact(device, sum..sum + 1)?,
                    loss,
                    factor,
                    peak: device.output(&mut state.peak, 0..rows)?,
                    shift,
                    at_peak,
                    row_loss,
                })
            }
            _ => None,
        };
        let tensors = attention::Forward {
            q,
            k,
            v,
            pack: self.pack(batch, attention)?,
            scale: attention.scale() as f32,
            out: out.write(device, 0..batch.tokens * width)?.rows(width),
            lse: state
                .lse
                .write_exact(device, 0..batch.tokens * attention.heads)?,
            memory_loss,
        };
        Ok(shape.forward_by(self.version, device, tensors)?)
    }

    fn attention_backward(
        &self,
        batch: &Self::Batch,
        attention: &Attention,
        qkv: &Self::Buffer,
        out: &Self::Buffer,
        state: &Self::AttentionState,
        grad_out: &Self::Buffer,
        grad_qkv: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("attention_backward");
        let device = &self.device;
        let shape = self.attention_shape(batch, attention);
        let width = attention.width();
        let qkv = qkv.read(device, 0..batch.tokens * 3 * width)?;
        let [q, k, v] = qkv.rows(3 * width).columns([width; 3]);
        let memory_loss = match (&attention.supervised, &state.supervised) {
            (Some(supervised), Some(state)) => {
                let rows = batch.tokens * supervised.heads.len();
                let [_, grad_loss] = batch.weights(device)?;
                Some(attention::MemoryLossGradient {
                    supervision: self.supervision(batch, supervised, &state.slots)?,
                    // The weight in the batch has the divisor in it.
                    grad_loss,
                    factor: batch.floats(device, &batch.float.one)?,
                    peak: device.input(&state.peak, 0..rows)?,
                    shift: device.input(&state.rows, third(0, rows))?,
                    at_peak: device.input(&state.rows, third(1, rows))?,
                })
            }
            _ => None,
        };
        let [dq, dk, dv] = grad_qkv
            .write(device, 0..batch.tokens * 3 * width)?
            .rows(3 * width)
            .columns([width; 3]);
        let mut workspace = self.floats.lock(device, shape.workspace()?)?;
        let tensors = attention::Backward {
            q,
            k,
            v,
            pack: self.pack(batch, attention)?,
            scale: attention.scale() as f32,
            out: out.read(device, 0..batch.tokens * width)?.rows(width),
            lse: state
                .lse
                .read_exact(device, 0..batch.tokens * attention.heads)?,
            grad_out: grad_out.read(device, 0..batch.tokens * width)?.rows(width),
            memory_loss,
            dq,
            dk,
            dv,
            workspace: workspace.output(device)?,
        };
        Ok(shape.backward(device, tensors)?)
    }

    fn attention_cached(
        &self,
        batch: &Self::Batch,
        attention: &Attention,
        qkv: &Self::Buffer,
        cache: &mut KeyValueCache<Self::Buffer>,
        rows: &[usize],
        prefix: usize,
        out: &mut Self::Buffer,
        state: &mut Self::AttentionState,
    ) -> Result<()> {
        let _range = range("attention_cached");
        self.act(batch, attention, qkv, cache, rows, prefix, out, state)
    }

    fn memory_state(
        &self,
        memory: &Memory,
        sequences: usize,
        segments: usize,
        links: usize,
    ) -> Result<Self::MemoryState> {
        let memories = chain::memories(sequences, segments, links);
        let numbers = memories * memory.slots * memory.width;
        Ok(MemoryState {
            memories: self.buffer(numbers, Kind::Activation)?,
            recall: self.buffer(0, Kind::Activation)?,
        })
    }

    fn memory(
        &self,
        batch: &Self::Batch,
        memory: &Memory,
        parameters: &Self::Buffer,
        start: MemoryStart<Self::Buffer>,
        inputs: MemoryInputs<Self::Buffer>,
        state: &mut Self::MemoryState,
        read: &mut Self::Buffer,
        metrics: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("memory");
        self.chain_forward(
            batch, memory, parameters, start, inputs, state, read, metrics,
        )
    }

    fn memory_backward(
        &self,
        batch: &Self::Batch,
        memory: &Memory,
        parameters: &Self::Buffer,
        inputs: MemoryInputs<Self::Buffer>,
        state: &Self::MemoryState,
        grad_read: &Self::Buffer,
        input_gradients: MemoryGradients<Self::Buffer>,
        grad_states: &mut Self::Buffer,
        gradients: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("memory_backward");
        self.chain_backward(
            batch,
            memory,
            parameters,
            inputs,
            state,
            grad_read,
            input_gradients,
            grad_states,
            gradients,
        )
    }

    fn commit_memory(
        &self,
        batch: &Self::Batch,
        memory: &Memory,
        state: &Self::MemoryState,
        slots: &[usize],
        to: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("commit_memory");
        self.chain_commit(batch, memory, &state.memories, slots, to)
    }

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

/// Elements that no row tells apart.
fn flat(len: usize) -> elementwise::Shape {
    elementwise::Shape {
        rows: 1,
        width: len,
    }
}

/// y = y, to which parts are added.
fn nothing<S>(y: ops::Output<'_, S>) -> elementwise::Forward<'_, S> {
    elementwise::Forward {
        x: y.as_input(),
        bias: None,
        activation: None,
        dropout: None,
        residual: None,
        y,
    }
}

/// x += y.
fn accumulate<D: Device, S: Compute>(
    device: &D,
    len: usize,
    y: ops::Input<'_, S>,
    x: ops::Output<'_, S>,
) -> Result<()> {
    let tensors = elementwise::Forward {
        residual: Some(y),
        ..nothing(x)
    };
    Ok(flat(len).forward(device, tensors)?)
}
