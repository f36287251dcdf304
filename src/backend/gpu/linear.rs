//! Linear maps: products by the library, with adapters by their own kernels.

use std::ops::Range;

use super::Gpu;
use super::batch::Batch;
use super::buffers::Buffer;
use super::device::{Compute, Device, Factor, Product};
use super::scratch::InUse;
use crate::backend::{Adapter, Dropped, In, Linear, LinearOps, Out, Result, range};
use crate::ops::elementwise::{self, BiasGradient};
use crate::ops::{Input, Rows, lora_linear};

/// From the first to the last element of `columns` columns.
pub(super) fn extent(rows: usize, columns: usize, stride: usize, start: usize) -> Range<usize> {
    match rows.checked_sub(1) {
        Some(before) => start..start + before * stride + columns,
        None => start..start,
    }
}

impl<D: Device, T: Compute> LinearOps for Gpu<D, T> {
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
        let device = &self.device;
        if !map.adapters.is_empty() {
            return self.adapted_forward(rows, map, parameters, x, adapted, dropout, y);
        }
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
        let device = &self.device;
        if !map.adapters.is_empty() {
            self.adapted_backward(
                rows, map, parameters, x, adapted, dropout, grad_y, grad_x, accumulate, gradients,
            )?;
        } else if let Some(out) = grad_x {
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
                let dy = self.columns(grad_y, rows, map.outputs)?;
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

    fn columns<'a>(
        &'a self,
        x: In<'a, Buffer<D, T>>,
        rows: usize,
        columns: usize,
    ) -> Result<Rows<Input<'a, T>>> {
        let range = extent(rows, columns, x.stride, x.start);
        let [x] = x
            .buffer
            .read(&self.device, range)?
            .rows(x.stride)
            .columns([columns]);
        Ok(x)
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

    fn adapters(map: &Linear) -> Vec<lora_linear::Adapter> {
        let adapter = |lora: &Adapter| lora_linear::Adapter {
            output: lora.output,
            outputs: lora.outputs,
            rank: lora.rank,
            scaling: lora.scaling as f32,
        };
        map.adapters.iter().map(adapter).collect()
    }

    fn factors<'a>(
        &'a self,
        map: &Linear,
        parameters: &'a Buffer<D, T>,
    ) -> Result<Vec<lora_linear::Factors<'a, T>>> {
        let factors = |lora: &Adapter| {
            Ok(lora_linear::Factors {
                a: parameters.read(&self.device, lora.a.range())?,
                b: parameters.read(&self.device, lora.b.range())?,
            })
        };
        map.adapters.iter().map(factors).collect()
    }

    /// The mask of the adapters' input as bits.
    fn keep(
        &self,
        shape: lora_linear::Shape<'_>,
        dropped: Option<Dropped<Batch<D, T>>>,
    ) -> Result<Option<(InUse<'_, D, u32>, f32)>> {
        let Some(dropped) = dropped else {
            return Ok(None);
        };
        let mut bits = self.bits.lock(&self.device, shape.keep_words())?;
        let scale = dropped.mask.scale() as f32;
        shape.draw_keep(
            &self.device,
            self.mask(dropped)?,
            bits.output(&self.device)?,
        )?;
        Ok(Some((bits, scale)))
    }

    fn dropout<'a>(
        &'a self,
        keep: &'a mut Option<(InUse<'_, D, u32>, f32)>,
    ) -> Result<Option<lora_linear::Dropout<'a>>> {
        Ok(match keep {
            Some((bits, scale)) => Some(lora_linear::Dropout {
                keep: bits.output(&self.device)?.as_input(),
                scale: *scale,
            }),
            None => None,
        })
    }

    fn adapted_forward(
        &self,
        rows: usize,
        map: &Linear,
        parameters: &Buffer<D, T>,
        x: In<Buffer<D, T>>,
        adapted: &mut Buffer<D, T>,
        dropout: Option<Dropped<Batch<D, T>>>,
        y: Out<Buffer<D, T>>,
    ) -> Result<()> {
        let device = &self.device;
        let adapters = Self::adapters(map);
        let shape = adapted_shape(rows, map, &adapters);
        let mut keep = self.keep(shape, dropout)?;
        let x = self.columns(x, rows, map.inputs)?;
        let columns = extent(rows, map.outputs, y.stride, y.start);
        let [y] = y
            .buffer
            .write(device, columns)?
            .rows(y.stride)
            .columns([map.outputs]);
        let tensors = lora_linear::Forward {
            x,
            weight: parameters.read(device, map.weight.range())?,
            bias: match map.bias {
                Some(span) => Some(parameters.read(device, span.range())?),
                None => None,
            },
            factors: &self.factors(map, parameters)?,
            groups: None,
            dropout: self.dropout(&mut keep)?,
            y,
            accumulate: false,
            kept: adapted.write(device, 0..rows * map.ranks())?,
        };
        Ok(shape.forward_by(self.version, device, tensors)?)
    }

    fn adapted_backward(
        &self,
        rows: usize,
        map: &Linear,
        parameters: &Buffer<D, T>,
        x: In<Buffer<D, T>>,
        adapted: &Buffer<D, T>,
        dropout: Option<Dropped<Batch<D, T>>>,
        grad_y: In<Buffer<D, T>>,
        grad_x: Option<Out<Buffer<D, T>>>,
        accumulate: bool,
        gradients: &mut Buffer<D, T>,
    ) -> Result<()> {
        let device = &self.device;
        let adapters = Self::adapters(map);
        let shape = adapted_shape(rows, map, &adapters);
        let mut keep = self.keep(shape, dropout)?;
        let x = self.columns(x, rows, map.inputs)?;
        let dy = self.columns(grad_y, rows, map.outputs)?;
        let dx = match grad_x {
            Some(out) => {
                let columns = extent(rows, map.inputs, out.stride, out.start);
                let dx = out.buffer.write(device, columns)?;
                let [dx] = dx.rows(out.stride).columns([map.inputs]);
                Some(dx)
            }
            None => None,
        };
        const PARTS: usize = 2 * lora_linear::MAX_ADAPTERS;
        let ranges: [Range<usize>; PARTS] = std::array::from_fn(|part| {
            let lora = map.adapters.get(part / 2);
            lora.map_or(0..0, |lora| [lora.a, lora.b][part % 2].range())
        });
        let len = gradients.len;
        let mut parts = gradients
            .write_exact(device, 0..len)?
            .parts(ranges)?
            .into_iter();
        let mut of_factors = Vec::with_capacity(adapters.len());
        while let (Some(a), Some(b)) = (parts.next(), parts.next()) {
            of_factors.push(lora_linear::FactorGradients { a, b });
        }
        of_factors.truncate(adapters.len());
        let mut workspace = self.floats.lock(device, shape.workspace::<T>()?)?;
        let mut kept_gradient = self.activations.lock(device, rows * map.ranks())?;
        let tensors = lora_linear::Backward {
            x,
            weight: parameters.read(device, map.weight.range())?,
            factors: &self.factors(map, parameters)?,
            groups: None,
            dropout: self.dropout(&mut keep)?,
            kept: adapted.read(device, 0..rows * map.ranks())?,
            dy,
            dx,
            accumulate,
            gradients: &of_factors,
            kept_gradient: kept_gradient.output(device)?,
            workspace: workspace.output(device)?,
        };
        Ok(shape.backward_by(self.version, device, tensors)?)
    }
}

fn adapted_shape<'a>(
    rows: usize,
    map: &Linear,
    adapters: &'a [lora_linear::Adapter],
) -> lora_linear::Shape<'a> {
    lora_linear::Shape {
        rows,
        inputs: map.inputs,
        outputs: map.outputs,
        transposed: map.transposed,
        adapters,
        tasks: None,
    }
}
