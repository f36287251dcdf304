//! Memory that operations use in passing.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::device::{Device, Element};
use crate::backend::{BackendError, Result};
use crate::ops::{self, Input, Output};

/// Memory for what kernels keep between two launches. It grows to what the largest shape needs and
/// stays; one operation uses it at a time.
#[derive(Debug)]
pub(super) struct Scratch<D: Device, E: Element> {
    memory: Mutex<Option<D::Memory<E>>>,
    /// How often it has been another one.
    grown: AtomicU32,
}

impl<D: Device, E: Element> Default for Scratch<D, E> {
    fn default() -> Self {
        Self {
            memory: Mutex::new(None),
            grown: AtomicU32::new(0),
        }
    }
}

impl<D: Device, E: Element> Scratch<D, E> {
    /// At least `len` elements.
    pub fn lock(&self, device: &D, len: usize) -> ops::Result<InUse<'_, D, E>> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if memory
            .as_ref()
            .is_none_or(|memory| device.len(memory) < len)
        {
            *memory = Some(device.allocate(len.max(1).next_power_of_two())?);
            self.grown.fetch_add(1, Ordering::Relaxed);
        }
        Ok(InUse { memory, len })
    }

    /// How often it has been another memory.
    pub fn grown(&self) -> u32 {
        self.grown.load(Ordering::Relaxed)
    }

    /// What stands in `content`.
    pub fn upload(&self, device: &D, content: &[E]) -> ops::Result<InUse<'_, D, E>> {
        let mut in_use = self.lock(device, content.len())?;
        if let Some(memory) = in_use.memory.as_mut() {
            device.upload(content, memory, 0)?;
        }
        Ok(in_use)
    }
}

/// Scratch memory that is in use.
pub(super) struct InUse<'a, D: Device, E: Element> {
    memory: MutexGuard<'a, Option<D::Memory<E>>>,
    len: usize,
}

impl<D: Device, E: Element> InUse<'_, D, E> {
    /// Elements of `range` become 0.
    pub fn zero(&mut self, device: &D, range: Range<usize>) -> Result<()> {
        let memory = self.memory.as_mut().ok_or(BackendError::NotStaged)?;
        Ok(device.zero(memory, range)?)
    }

    pub fn input<'a>(&'a self, device: &'a D) -> Result<Input<'a, E>> {
        let memory = self.memory.as_ref().ok_or(BackendError::NotStaged)?;
        Ok(device.input(memory, 0..self.len)?)
    }

    pub fn output<'a>(&'a mut self, device: &'a D) -> Result<Output<'a, E>> {
        let memory = self.memory.as_mut().ok_or(BackendError::NotStaged)?;
        Ok(device.output(memory, 0..self.len)?)
    }
}
