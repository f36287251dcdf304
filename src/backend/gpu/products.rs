//! Linear maps: products by the library, with adapters by their own kernels.

use std::ops::Range;

use super::device::{Compute, Device, Factor, Product};
use super::memory::{Batch, Buffer};
use super::{Gpu, elementwise};
use crate::backend::{Dropped, In, Linear, Out, Result};
use crate::ops::elementwise::{BiasGradient, Dropout};

/// From the first to the last element of `columns` columns.
pub(super) fn extent(rows: usize, columns: usize, stride: usize, start: usize) -> Range<usize> {
    match rows.checked_sub(1) {
        Some(before) => start..start + before * stride + columns,
        None => start..start,
    }
}

impl<D: Device, T: Compute> Gpu<D, T> {
    fn factor<'a>(
        &'a self,
        x: In<'a, Buffer<D, T>>,
        rows: usize,
        columns: usize,
        transposed: bool,
    ) -> Result<Factor<'a, T>> {
        let range = extent(rows, columns, x.stride, x.start);
        Ok(Factor {
            elements: x.buffer.read(&self.device, range)?,
            stride: x.stride,
            transposed,
        })
    }

    /// W as the factor of y = x·Wᵀ (`transposed`), or of dx = dy·W.
    fn weight<'a>(
        &'a self,
        map: &Linear,
        parameters: &'a Buffer<D, T>,
        transposed: bool,
    ) -> Result<Factor<'a, T>> {
        Ok(Factor {
            elements: parameters.read(&self.device, map.weight.range())?,
            stride: if map.transposed {
                map.outputs
            } else {
                map.inputs
            },
            transposed: transposed != map.transposed,
        })
    }

    pub(super) fn mask<'a>(&'a self, dropped: Dropped<'a, Batch<D, T>>) -> Result<Dropout<'a>> {
        let Dropped { mask, batch } = dropped;
        Ok(Dropout {
            mask,
            step: batch.step(&self.device)?,
            origins: Some(batch.ints(&self.device, &batch.int.origins)?),
        })
    }

    pub(super) fn product_forward(
        &self,
        rows: usize,
        map: &Linear,
        parameters: &Buffer<D, T>,
        x: In<Buffer<D, T>>,
        _adapted: &mut Buffer<D, T>,
        _dropout: Option<Dropped<Batch<D, T>>>,
        y: Out<Buffer<D, T>>,
    ) -> Result<()> {
        let device = &self.device;
        let product = Product {
            rows,
            columns: map.outputs,
            inner: map.inputs,
            a: self.factor(x, rows, map.inputs, false)?,
            b: self.weight(map, parameters, true)?,
            bias: match map.bias {
                Some(span) => Some(parameters.read(device, span.range())?),
                None => None,
            },
            c: y.buffer
                .write(device, extent(rows, map.outputs, y.stride, y.start))?,
            stride: y.stride,
            accumulate: false,
        };
        device.multiply(product)?;
        Ok(())
    }

    pub(super) fn product_backward(
        &self,
        rows: usize,
        map: &Linear,
        parameters: &Buffer<D, T>,
        x: In<Buffer<D, T>>,
        _adapted: &Buffer<D, T>,
        _dropout: Option<Dropped<Batch<D, T>>>,
        grad_y: In<Buffer<D, T>>,
        grad_x: Option<Out<Buffer<D, T>>>,
        accumulate: bool,
        gradients: &mut Buffer<D, T>,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let device = &self.device;
        if let Some(out) = grad_x {
            device.multiply(Product {
                rows,
                columns: map.inputs,
                inner: map.outputs,
                a: self.factor(grad_y, rows, map.outputs, false)?,
                b: self.weight(map, parameters, false)?,
                bias: None,
                c: out
                    .buffer
                    .write(device, extent(rows, map.inputs, out.stride, out.start))?,
                stride: out.stride,
                accumulate,
            })?;
        }
        if map.trainable {
            // Wᵀ's gradient is xᵀ·dy.
            let (left, right) = match map.transposed {
                true => ((x, map.inputs), (grad_y, map.outputs)),
                false => ((grad_y, map.outputs), (x, map.inputs)),
            };
            device.multiply(Product {
                rows: left.1,
                columns: right.1,
                inner: rows,
                a: self.factor(left.0, rows, left.1, true)?,
                b: self.factor(right.0, rows, right.1, false)?,
                bias: None,
                c: gradients.write_exact(device, map.weight.range())?,
                stride: right.1,
                accumulate: true,
            })?;
            if let Some(span) = map.bias {
                let shape = elementwise::Shape {
                    rows,
                    width: map.outputs,
                };
                let mut workspace = self.floats.lock(device, shape.workspace()?)?;
                let range = extent(rows, map.outputs, grad_y.stride, grad_y.start);
                let dy = grad_y.buffer.read(device, range)?.rows(grad_y.stride);
                let [dy] = dy.columns([map.outputs]);
                let tensors = elementwise::Backward {
                    activation: None,
                    dropout: None,
                    dy,
                    dx: None,
                    bias: Some(BiasGradient {
                        dbias: gradients.write_exact(device, span.range())?,
                        workspace: workspace.output(device)?,
                    }),
                };
                shape.backward(device, tensors)?;
            }
        }
        Ok(())
    }
}
