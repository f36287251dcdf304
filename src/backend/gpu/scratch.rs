//! Memory that grows, and memory that operations use in passing.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::device::{Device, Element};
use crate::backend::{BackendError, Result};
use crate::ops::{self, Output};

/// Memory that grows to the most that was ever needed, and stays.
#[derive(Debug)]
pub(super) struct Growing<D: Device, E: Element> {
    memory: Option<D::Memory<E>>,
    grown: u32,
}

impl<D: Device, E: Element> Default for Growing<D, E> {
    fn default() -> Self {
        Self {
            memory: None,
            grown: 0,
        }
    }
}

impl<D: Device, E: Element> Growing<D, E> {
    /// Makes room for `len` elements; what stood there is lost where it was too small for them.
    pub fn reserve(&mut self, device: &D, len: usize) -> ops::Result<()> {
        let memory = self.memory.as_ref();
        if memory.is_none_or(|memory| device.len(memory) < len) {
            // Not both at once.
            self.memory = None;
            self.memory = Some(device.allocate(len.max(1).next_power_of_two())?);
            self.grown += 1;
        }
        Ok(())
    }

    /// Errors: nothing was reserved.
    pub fn get(&self) -> Result<&D::Memory<E>> {
        self.memory.as_ref().ok_or(BackendError::NotStaged)
    }

    /// Errors: nothing was reserved.
    pub fn get_mut(&mut self) -> Result<&mut D::Memory<E>> {
        self.memory.as_mut().ok_or(BackendError::NotStaged)
    }

    /// How often it has been another memory.
    pub fn grown(&self) -> u32 {
        self.grown
    }
}

/// Memory for what kernels keep between two launches; one operation uses it at a time.
#[derive(Debug)]
pub(super) struct Scratch<D: Device, E: Element>(Mutex<Growing<D, E>>);

impl<D: Device, E: Element> Default for Scratch<D, E> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<D: Device, E: Element> Scratch<D, E> {
    fn memory(&self) -> MutexGuard<'_, Growing<D, E>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// At least `len` elements.
    pub fn lock(&self, device: &D, len: usize) -> ops::Result<InUse<'_, D, E>> {
        let mut memory = self.memory();
        memory.reserve(device, len)?;
        Ok(InUse { memory, len })
    }

    /// How often it has been another memory.
    pub fn grown(&self) -> u32 {
        self.memory().grown()
    }
}

/// Scratch memory that is in use.
pub(super) struct InUse<'a, D: Device, E: Element> {
    memory: MutexGuard<'a, Growing<D, E>>,
    len: usize,
}

impl<D: Device, E: Element> InUse<'_, D, E> {
    /// Elements of `range` become 0.
    pub fn zero(&mut self, device: &D, range: Range<usize>) -> Result<()> {
        Ok(device.zero(self.memory.get_mut()?, range)?)
    }

    pub fn output<'a>(&'a mut self, device: &'a D) -> Result<Output<'a, E>> {
        Ok(device.output(self.memory.get_mut()?, 0..self.len)?)
    }
}
