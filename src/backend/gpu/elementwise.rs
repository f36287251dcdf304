//! What is done to one number at a time.

use super::Gpu;
use super::batch::Batch;
use super::device::{Compute, Device};
use crate::backend::{Activation, Dropped, ElementwiseOps, Result, range};
use crate::ops::elementwise::Dropout;
use crate::ops::{self, activation, elementwise};

impl<D: Device, T: Compute> ElementwiseOps for Gpu<D, T> {
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
        x: Option<&Self::Buffer>,
        y: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("dropout");
        let device = &self.device;
        let rows = dropout.batch.tokens;
        let all = 0..rows * width;
        let mut tensors = elementwise::Forward {
            dropout: Some(self.mask(dropout)?),
            ..nothing(y.write(device, all.clone())?)
        };
        if let Some(x) = x {
            tensors.x = x.read(device, all)?;
        }
        Ok(elementwise::Shape { rows, width }.forward(device, tensors)?)
    }

    fn add(
        &self,
        rows: usize,
        width: usize,
        x: &Self::Buffer,
        y: &Self::Buffer,
        dropout: Option<Dropped<Self::Batch>>,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range("add");
        let device = &self.device;
        let all = 0..rows * width;
        let tensors = elementwise::Forward {
            x: y.read(device, all.clone())?,
            dropout: match dropout {
                Some(dropout) => Some(self.mask(dropout)?),
                None => None,
            },
            residual: Some(x.read(device, all.clone())?),
            ..nothing(out.write(device, all)?)
        };
        Ok(elementwise::Shape { rows, width }.forward(device, tensors)?)
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
}

impl<D: Device, T: Compute> Gpu<D, T> {
    pub(super) fn mask<'a>(&'a self, dropped: Dropped<'a, Batch<D, T>>) -> Result<Dropout<'a>> {
        let Dropped { mask, batch } = dropped;
        Ok(Dropout {
            mask,
            step: batch.step(&self.device)?,
            origins: Some(batch.ints(&self.device, &batch.int.origins)?),
        })
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
