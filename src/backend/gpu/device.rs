//! What a GPU backend needs of a device: memory, launches and products of matrices.

use std::fmt::Debug;
use std::ops::Range;

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use half::{bf16, f16};

use crate::backend::{Rank, Room};
use crate::ops::{Error, Input, Launcher, Output, Result, Storage};

#[cfg(feature = "host")]
use dtmem_host::Element as HostElement;
/// What the host executor asks of an element, where there is one.
#[cfg(not(feature = "host"))]
pub trait HostElement {}
#[cfg(not(feature = "host"))]
impl<T> HostElement for T {}

/// A number that device memory holds.
pub trait Element:
    DeviceRepr + ValidAsZeroBits + HostElement + Copy + Default + Debug + Send + Sync + Unpin + 'static
{
}

impl Element for u8 {}
impl Element for i32 {}
impl Element for u32 {}
impl Element for f32 {}
impl Element for bf16 {}
impl Element for f16 {}

/// A type that operations compute in: stored so, added up in f32.
pub trait Compute: Storage + Element {
    /// Whether small gradients underflow, so that losses have to be scaled.
    const UNDERFLOWS: bool;
    /// The nearest value.
    fn narrow(x: f32) -> Self;
    /// Exactly.
    fn widen(self) -> f32;
}

impl Compute for f32 {
    const UNDERFLOWS: bool = false;
    fn narrow(x: f32) -> Self {
        x
    }
    fn widen(self) -> f32 {
        self
    }
}

impl Compute for bf16 {
    const UNDERFLOWS: bool = false;
    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Compute for f16 {
    const UNDERFLOWS: bool = true;
    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// One factor of a [`Product`]: element (i, j) stands at i·stride + j, or at j·stride + i where
/// it is transposed.
#[derive(Debug)]
pub struct Factor<'a, T> {
    /// The elements, from the first to the last of them.
    pub elements: Input<'a, T>,
    /// Distance of two rows as they are stored.
    pub stride: usize,
    /// Whether the stored matrix is the factor's transpose.
    pub transposed: bool,
}

/// C = A·B + bias, or C += A·B: A [rows, inner], B [inner, columns], row-major. A product over nothing, `inner` = 0, is 0.
#[derive(Debug)]
pub struct Product<'a, T, U> {
    /// Rows of A and C.
    pub rows: usize,
    /// Columns of B and C.
    pub columns: usize,
    /// Columns of A, rows of B.
    pub inner: usize,
    /// A.
    pub a: Factor<'a, T>,
    /// B.
    pub b: Factor<'a, T>,
    /// Added to each row of C \[columns\].
    pub bias: Option<Input<'a, U>>,
    /// C, element (i, j) at i·stride + j.
    pub c: Output<'a, U>,
    /// Distance of two rows of C.
    pub stride: usize,
    /// C += instead of C =.
    pub accumulate: bool,
}

/// Memory and its arithmetic. What is asked for happens in the order in which it is asked for;
/// only [`Device::download`] waits for it.
pub trait Device: Launcher + Debug + Send + Sync {
    /// Elements on the device.
    type Memory<T: Element>: Debug + Send + Sync + 'static;

    /// Where elements wait on their way to the device, for [`Device::send`].
    type Staging<E: Element>: Default + Debug + Send + Sync + 'static;

    /// What [`Device::record`] gives.
    type Recording: Debug;

    /// Does not do what `work` asks for, but keeps it to be done by [`Device::replay`], on the same
    /// memory. Nothing but launches, products, copies on the device and zeros may be asked for.
    fn record<E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Self::Recording, E>;

    /// Does what was recorded.
    fn replay(&self, recording: &Self::Recording) -> Result<()>;

    /// Which one this is of several devices that train a model together.
    fn rank(&self) -> Rank;

    /// The first `len` elements become their sum over all ranks. Not to be recorded.
    fn sum_over_ranks(&self, memory: &mut Self::Memory<f32>, len: usize) -> Result<()>;

    /// Short name for messages: `cuda`.
    fn name(&self) -> &'static str;

    /// Memory that is free, and all of it; nothing where that is not known.
    fn room(&self) -> Option<Room>;

    /// `len` elements, of no defined value.
    fn allocate<T: Element>(&self, len: usize) -> Result<Self::Memory<T>>;

    /// Elements of a memory.
    fn len<T: Element>(&self, memory: &Self::Memory<T>) -> usize;

    /// Copies from the host to `to[offset..]`.
    fn upload<T: Element>(&self, from: &[T], to: &mut Self::Memory<T>, offset: usize)
    -> Result<()>;

    /// Copies from the host to the start of `to`, in the order of all that is asked for; but the way
    /// to the device does not wait for it, and the host for neither: only for what it sent through
    /// this staging the time before last.
    fn send<E: Element>(
        &self,
        from: &[E],
        staging: &mut Self::Staging<E>,
        to: &mut Self::Memory<E>,
    ) -> Result<()>;

    /// Copies `from[offset..]` to the host, when everything before it is done.
    fn download<T: Element>(
        &self,
        from: &Self::Memory<T>,
        offset: usize,
        to: &mut [T],
    ) -> Result<()>;

    /// memory\[range\] = 0.
    fn zero<T: Element>(&self, memory: &mut Self::Memory<T>, range: Range<usize>) -> Result<()>;

    /// Copies the first `len` elements to `to[offset..]`.
    fn copy<T: Element>(
        &self,
        from: &Self::Memory<T>,
        to: &mut Self::Memory<T>,
        offset: usize,
        len: usize,
    ) -> Result<()>;

    /// Elements to read. Errors: a range that the memory does not have.
    fn input<'a, T: Element>(
        &'a self,
        memory: &'a Self::Memory<T>,
        range: Range<usize>,
    ) -> Result<Input<'a, T>>;

    /// Elements to write.
    fn output<'a, T: Element>(
        &'a self,
        memory: &'a mut Self::Memory<T>,
        range: Range<usize>,
    ) -> Result<Output<'a, T>>;

    /// A product of matrices, with sums in f32.
    fn multiply<T: Compute, U: Compute>(&self, product: Product<'_, T, U>) -> Result<()>;
}

pub(super) fn check_range(range: &Range<usize>, len: usize) -> Result<()> {
    if range.start <= range.end && range.end <= len {
        return Ok(());
    }
    Err(Error::Range {
        found: range.clone(),
        expected: len,
    })
}
