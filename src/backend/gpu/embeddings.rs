//! What becomes the rows of tokens: codes by maps of one-hot inputs or by convolutions, and real numbers.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::Gpu;
use super::batch::Batch;
use super::device::{Compute, Device};
use crate::backend::{Codes, Convolutions, EmbeddingOps, OneHot, Reals, Result, range};
use crate::ops::{self, convolutions, one_hot, tokens};

/// Arrays of indices that stay on the device.
pub(super) type Known<D> = HashMap<Vec<usize>, Arc<<D as Device>::Memory<i32>>>;

impl<D: Device, T: Compute> Gpu<D, T> {
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
}

fn convolutions_shape(front_end: &Convolutions, rows: usize) -> convolutions::Shape {
    convolutions::Shape {
        rows,
        grid: front_end.grid.clone(),
        middle: front_end.middle,
        out: front_end.out,
    }
}

impl<D: Device, T: Compute> EmbeddingOps for Gpu<D, T> {
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

    fn check_convolutions(&self, front_end: &Convolutions) -> Result<()> {
        Ok(convolutions_shape(front_end, 0).validate::<T>()?)
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
        let rows = batch.rows_of(family)?.observations.len();
        let shape = convolutions_shape(front_end, rows);
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
        let rows = batch.rows_of(family)?.observations.len();
        let shape = convolutions_shape(front_end, rows);
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
}
