//! Numbers in the device's memory.

use std::any::Any;
use std::ops::Range;

use super::Gpu;
use super::batch::Batch;
use super::device::{Compute, Device};
use crate::backend::{BackendError, Buffers, Kind, Result, Span, range};
use crate::batch::PackedBatch;
use crate::ops::{self, Input, Output};

/// Numbers of one [`Kind`]: activations in `T`, what is exact in f32, parameters in both.
#[derive(Debug)]
pub struct Buffer<D: Device, T: Compute> {
    pub(super) len: usize,
    pub(super) compute: Option<D::Memory<T>>,
    pub(super) exact: Option<D::Memory<f32>>,
}

impl<D: Device, T: Compute> Buffer<D, T> {
    pub(super) fn new(gpu: &Gpu<D, T>, len: usize, kind: Kind) -> ops::Result<Self> {
        let wide = size_of::<T>() == size_of::<f32>();
        Ok(Self {
            len,
            // Parameters in f32 are exact already.
            compute: match kind {
                Kind::Exact => None,
                Kind::Parameter if wide => None,
                Kind::Parameter | Kind::Activation => Some(gpu.allocate(len)?),
            },
            exact: match kind {
                Kind::Activation => None,
                Kind::Parameter | Kind::Exact => Some(gpu.allocate(len)?),
            },
        })
    }

    fn compute(&self) -> Option<&D::Memory<T>> {
        match (&self.compute, &self.exact) {
            (Some(memory), _) => Some(memory),
            (None, Some(exact)) => (exact as &dyn Any).downcast_ref(),
            (None, None) => None,
        }
    }

    /// Elements as operations read them.
    pub(super) fn read<'a>(&'a self, device: &'a D, range: Range<usize>) -> Result<Input<'a, T>> {
        let memory = self.compute().ok_or(WRONG_KIND)?;
        Ok(device.input(memory, range)?)
    }

    /// Elements of an activation, to write.
    pub(super) fn write<'a>(
        &'a mut self,
        device: &'a D,
        range: Range<usize>,
    ) -> Result<Output<'a, T>> {
        let memory = self.compute.as_mut().ok_or(WRONG_KIND)?;
        Ok(device.output(memory, range)?)
    }

    /// Elements that are kept in f32.
    pub(super) fn read_exact<'a>(
        &'a self,
        device: &'a D,
        range: Range<usize>,
    ) -> Result<Input<'a, f32>> {
        let memory = self.exact.as_ref().ok_or(WRONG_KIND)?;
        Ok(device.input(memory, range)?)
    }

    /// As [`Self::read_exact`], to write.
    pub(super) fn write_exact<'a>(
        &'a mut self,
        device: &'a D,
        range: Range<usize>,
    ) -> Result<Output<'a, f32>> {
        let memory = self.exact.as_mut().ok_or(WRONG_KIND)?;
        Ok(device.output(memory, range)?)
    }
}

const WRONG_KIND: BackendError = BackendError::Kind;

impl<D: Device, T: Compute> Buffers for Gpu<D, T> {
    type Element = f32;
    type Buffer = Buffer<D, T>;
    type Batch = Batch<D, T>;

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

    fn stage(&self, batch: &PackedBatch, to: &mut Self::Batch) -> Result<()> {
        let _range = range("stage");
        to.stage(&self.device, batch)
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
}
