//! The memory that kernels read and write: always the caller's.

use std::marker::PhantomData;
use std::ops::Range;

use half::{bf16, f16};

use super::launch::{Arg, TensorMap};
use super::{Error, Result};

/// A type that kernels store numbers in. Their arithmetic is in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Type {
    /// 32 bits.
    F32,
    /// 16 bits with the exponent of f32.
    Bf16,
    /// 16 bits, as in IEEE 754.
    F16,
}

impl Type {
    /// Of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// A Rust type that tensors may have: `f32`, `bf16` or `f16` of the crate `half`.
pub trait Storage: Copy + 'static {
    /// Which one it is.
    const TYPE: Type;
}

impl Storage for f32 {
    const TYPE: Type = Type::F32;
}

impl Storage for bf16 {
    const TYPE: Type = Type::Bf16;
}

impl Storage for f16 {
    const TYPE: Type = Type::F16;
}

/// The name of the kernel for a type, from one for each: f32, bf16, f16.
pub(super) fn kernel_for<T: Storage>([f32, bf16, f16]: [&'static str; 3]) -> &'static str {
    match T::TYPE {
        Type::F32 => f32,
        Type::Bf16 => bf16,
        Type::F16 => f16,
    }
}

/// The three names of a kernel that is there for each type, from the parts before the type's.
macro_rules! for_each_type {
    ($($stem:literal),+) => {
        [
            concat!($($stem),+, "_f32"),
            concat!($($stem),+, "_bf16"),
            concat!($($stem),+, "_f16"),
        ]
    };
}
pub(super) use for_each_type;

/// Where memory lies: with the host executor, or in a CUDA context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Home(Option<usize>);

impl Home {
    /// On the CPU, with the executor that runs kernels there.
    pub const HOST: Self = Self(None);

    pub(crate) fn context(context: &cudarc::driver::CudaContext) -> Self {
        Self::raw(context.cu_ctx())
    }

    pub(crate) fn raw(context: cudarc::driver::sys::CUcontext) -> Self {
        Self(Some(context.addr()))
    }
}

/// An address range, as plain data: what a kernel is given for a pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Of the first byte.
    pub address: u64,
    /// Bytes that the kernel may touch.
    pub bytes: usize,
}

impl Span {
    /// A null pointer, for what a kernel may go without.
    pub const NULL: Self = Self {
        address: 0,
        bytes: 0,
    };

    fn end(self) -> u64 {
        self.address.saturating_add(self.bytes as u64)
    }

    fn meets(self, other: Self) -> bool {
        self.bytes > 0
            && other.bytes > 0
            && self.address < other.end()
            && other.address < self.end()
    }
}

/// Keeps other streams from the memory until the launch has been queued.
type Guard<'a> = Option<cudarc::driver::SyncOnDrop<'a>>;

macro_rules! memory {
    ($(#[$documentation:meta])* $name:ident, $borrow:ty) => {
        $(#[$documentation])*
        #[derive(Debug)]
        pub struct $name<'a, T> {
            home: Home,
            address: u64,
            len: usize,
            _guard: Guard<'a>,
            element: PhantomData<$borrow>,
        }

        impl<'a, T> $name<'a, T> {
            /// `len` elements of the host executor. Only that one will touch them, and it checks that they are its own;
            /// for looking at a plan, any address will do.
            pub fn on_host(address: u64, len: usize) -> Self {
                Self::new(Home::HOST, address, len, None)
            }

            pub(crate) fn new(home: Home, address: u64, len: usize, guard: Guard<'a>) -> Self {
                Self { home, address, len, _guard: guard, element: PhantomData }
            }

            /// Some of the elements. Errors: a range that it does not have.
            pub fn slice(self, range: Range<usize>) -> Result<Self> {
                if range.start > range.end || range.end > self.len {
                    return Err(Error::Range { found: range, expected: self.len });
                }
                let address = self.address + (range.start * size_of::<T>()) as u64;
                Ok(Self { address, len: range.len(), ..self })
            }

            /// Elements.
            pub fn len(&self) -> usize {
                self.len
            }

            /// Whether there are no elements.
            pub fn is_empty(&self) -> bool {
                self.len == 0
            }

            /// The addresses.
            pub fn span(&self) -> Span {
                Span { address: self.address, bytes: self.len.saturating_mul(size_of::<T>()) }
            }

            /// As a matrix: a row every `stride` elements. The last one may end where its columns do.
            pub fn rows(self, stride: usize) -> Rows<Self> {
                Rows { memory: self, columns: stride, stride }
            }
        }

        impl<'a, T> Rows<$name<'a, T>> {
            /// Matrices that stand side by side in this one, each with its number of columns.
            pub fn columns<const N: usize>(self, widths: [usize; N]) -> [Self; N] {
                let Rows { memory, columns, stride } = self;
                let $name { home, address, len, mut _guard, element } = memory;
                let mut first = 0;
                widths.map(|width| {
                    let start = first.min(columns);
                    first = first.saturating_add(width);
                    let offset = start.min(len);
                    let address = address + (offset * size_of::<T>()) as u64;
                    let _guard = _guard.take();
                    Rows {
                        memory: $name { home, address, len: len - offset, _guard, element },
                        columns: width.min(columns - start),
                        stride,
                    }
                })
            }

            /// What a kernel may touch of `shape` [rows, columns]: up to the last element.
            pub(super) fn span(&self, shape: [usize; 2]) -> Span {
                let bytes = extent(shape, self.stride).saturating_mul(size_of::<T>());
                Span { address: self.memory.address, bytes }
            }
        }
    };
}

memory! {
    /// Elements that a kernel reads.
    Input, &'a T
}

memory! {
    /// Elements that a kernel writes, or reads and writes.
    Output, &'a mut T
}

/// A matrix in an [`Input`] or [`Output`], whose rows need not be neighbours: columns of a larger one, such as the
/// queries in a buffer of queries, keys and values.
#[derive(Debug)]
pub struct Rows<M> {
    memory: M,
    columns: usize,
    stride: usize,
}

impl<M> Rows<M> {
    /// As kernels take it: `Check` has seen that it fits.
    pub(super) fn stride(&self) -> Arg {
        Arg::I32(self.stride as i32)
    }
}

impl<T: Storage> Rows<Input<'_, T>> {
    /// As kernels take it that load `shape` [rows, columns] by boxes of `box_rows` rows: `Check` has seen that rows begin
    /// at multiples of 16 bytes.
    pub(super) fn map(&self, shape: [usize; 2], box_rows: usize) -> Arg {
        let [rows, columns] = shape.map(|extent| extent as u64);
        Arg::Map(TensorMap {
            span: self.span(shape),
            element: T::TYPE,
            columns,
            rows,
            stride: (self.stride * size_of::<T>()) as u64,
            box_rows: box_rows as u32,
        })
    }
}

/// Elements from the first to the last of a matrix [rows, columns].
fn extent([rows, columns]: [usize; 2], stride: usize) -> usize {
    match rows.checked_sub(1) {
        Some(before) if columns > 0 => before.saturating_mul(stride).saturating_add(columns),
        _ => 0,
    }
}

impl<'a, T> Input<'a, T> {
    /// Some of the elements, beside these. Errors: a range that it does not have.
    pub fn part(&self, range: Range<usize>) -> Result<Self> {
        Self::new(self.home, self.address, self.len, None).slice(range)
    }
}

impl<'a, T> Output<'a, T> {
    /// Several parts of the elements, to write each on its own. Errors: a range that it does not have, or two that
    /// share elements.
    pub fn parts<const N: usize>(self, ranges: [Range<usize>; N]) -> Result<[Self; N]> {
        for (index, range) in ranges.iter().enumerate() {
            let shared = ranges[..index].iter().any(|other| {
                !range.is_empty()
                    && !other.is_empty()
                    && range.start < other.end
                    && other.start < range.end
            });
            if shared || range.start > range.end || range.end > self.len {
                return Err(Error::Range {
                    found: range.clone(),
                    expected: self.len,
                });
            }
        }
        let Self {
            home,
            address,
            mut _guard,
            element,
            ..
        } = self;
        Ok(ranges.map(|range| Self {
            home,
            address: address + (range.start * size_of::<T>()) as u64,
            len: range.len(),
            _guard: _guard.take(),
            element,
        }))
    }

    /// The same elements to write, for one operation of several.
    pub fn reborrow(&mut self) -> Output<'_, T> {
        Output::new(self.home, self.address, self.len, None)
    }

    /// The same elements, from now on only to read.
    pub fn into_input(self) -> Input<'a, T> {
        Input::new(self.home, self.address, self.len, self._guard)
    }

    /// The same elements to read from, for operations that work in place.
    pub fn as_input(&self) -> Input<'a, T> {
        Input::new(self.home, self.address, self.len, None)
    }
}

/// The address of an optional input.
pub(super) fn span_or_null<T>(input: Option<&Input<'_, T>>) -> Span {
    input.map_or(Span::NULL, Input::span)
}

const MAX_TENSORS: usize = 32;
/// Kernels may read workspaces by vectors.
const WORKSPACE_BYTES: usize = 16;

#[derive(Clone, Copy)]
struct Tensor {
    name: &'static str,
    span: Span,
    /// Bytes of a row, and from row to row.
    row: usize,
    stride: usize,
    written: bool,
}

impl Tensor {
    fn overlaps(&self, other: &Self) -> bool {
        // Columns of one matrix share addresses, but no element.
        let interleaved = self.stride == other.stride && self.stride > 0 && {
            let stride = self.stride as u64;
            let (first, second) = (self.span.address % stride, other.span.address % stride);
            let between = ((second + stride - first) % stride) as usize;
            self.row <= between && between + other.row <= self.stride
        };
        self.span.meets(other.span) && !interleaved
    }
}

/// Goes through the tensors of an operation, each by its name.
pub(super) struct Check {
    tensors: [Tensor; MAX_TENSORS],
    count: usize,
    home: Option<Home>,
}

impl Check {
    pub(super) fn new() -> Self {
        let none = Tensor {
            name: "",
            span: Span::NULL,
            row: 0,
            stride: 0,
            written: false,
        };
        Self {
            tensors: [none; MAX_TENSORS],
            count: 0,
            home: None,
        }
    }

    /// A tensor to read, of `len` elements, that begins at a multiple of `alignment` bytes.
    pub(super) fn input<T>(
        &mut self,
        name: &'static str,
        input: &Input<'_, T>,
        len: usize,
        alignment: usize,
    ) -> Result<()> {
        same_length(name, input.len, len)?;
        let span = input.span();
        self.tensor::<T>(name, input.home, span, [span.bytes; 2], alignment, false)
    }

    /// A tensor to write.
    pub(super) fn output<T>(
        &mut self,
        name: &'static str,
        output: &Output<'_, T>,
        len: usize,
        alignment: usize,
    ) -> Result<()> {
        same_length(name, output.len, len)?;
        let span = output.span();
        self.tensor::<T>(name, output.home, span, [span.bytes; 2], alignment, true)
    }

    /// A matrix [rows, columns] to read, each row of which begins at a multiple of `alignment` bytes.
    pub(super) fn input_rows<T>(
        &mut self,
        name: &'static str,
        matrix: &Rows<Input<'_, T>>,
        shape: [usize; 2],
        alignment: usize,
    ) -> Result<()> {
        let pitch = check_rows::<T, _>(name, matrix, matrix.memory.len, shape, alignment)?;
        let (home, span) = (matrix.memory.home, matrix.span(shape));
        self.tensor::<T>(name, home, span, pitch, alignment, false)
    }

    /// A matrix to write.
    pub(super) fn output_rows<T>(
        &mut self,
        name: &'static str,
        matrix: &Rows<Output<'_, T>>,
        shape: [usize; 2],
        alignment: usize,
    ) -> Result<()> {
        let pitch = check_rows::<T, _>(name, matrix, matrix.memory.len, shape, alignment)?;
        let (home, span) = (matrix.memory.home, matrix.span(shape));
        self.tensor::<T>(name, home, span, pitch, alignment, true)
    }

    /// A tensor to read, of any length.
    pub(super) fn any_input<T>(&mut self, name: &'static str, input: &Input<'_, T>) -> Result<()> {
        self.input(name, input, input.len, align_of::<T>())
    }

    /// Memory for what has to be kept between two kernels: at least `len` elements, aligned for vectors.
    pub(super) fn workspace<T>(
        &mut self,
        name: &'static str,
        workspace: &Output<'_, T>,
        len: usize,
    ) -> Result<()> {
        if workspace.len < len {
            return Err(Error::TooSmall {
                argument: name,
                found: workspace.len,
                expected: len,
            });
        }
        self.output(name, workspace, workspace.len, WORKSPACE_BYTES)
    }

    fn tensor<T>(
        &mut self,
        name: &'static str,
        home: Home,
        span: Span,
        [row, stride]: [usize; 2],
        alignment: usize,
        written: bool,
    ) -> Result<()> {
        let alignment = alignment.max(align_of::<T>());
        if !span.address.is_multiple_of(alignment as u64) {
            return Err(Error::Misaligned {
                argument: name,
                address: span.address,
                expected: alignment,
            });
        }
        if *self.home.get_or_insert(home) != home {
            return Err(Error::ForeignMemory { argument: name });
        }
        if let Some(slot) = self.tensors.get_mut(self.count) {
            *slot = Tensor {
                name,
                span,
                row,
                stride,
                written,
            };
            self.count += 1;
        }
        Ok(())
    }

    /// Fails if a tensor that is written overlaps another one, unless both are the same memory and `in_place` has
    /// their names, the written one first. Gives where all of them lie.
    pub(super) fn disjoint(self, in_place: &[(&str, &str)]) -> Result<Home> {
        let tensors = &self.tensors[..self.count];
        for (index, written) in tensors.iter().enumerate().filter(|(_, x)| x.written) {
            for (other_index, other) in tensors.iter().enumerate() {
                let again = other.written && other_index <= index;
                let same =
                    written.span == other.span && in_place.contains(&(written.name, other.name));
                if !again && !same && written.overlaps(other) {
                    return Err(Error::Overlap {
                        first: written.name,
                        second: other.name,
                    });
                }
            }
        }
        Ok(self.home.unwrap_or(Home::HOST))
    }
}

/// Bytes of a row, and from row to row.
fn check_rows<T, M>(
    name: &'static str,
    matrix: &Rows<M>,
    found: usize,
    [rows, columns]: [usize; 2],
    alignment: usize,
) -> Result<[usize; 2]> {
    let Rows {
        columns: wide,
        stride,
        ..
    } = *matrix;
    if wide < columns {
        let found = format_args!("{wide} columns wide");
        return Err(Error::value(name, found, columns));
    }
    let step = (alignment / size_of::<T>()).max(1);
    if !stride.is_multiple_of(step) || i32::try_from(stride).is_err() {
        let found = format_args!("a matrix with a row every {stride} elements");
        let expected = format_args!("a multiple of {step} below 2^31");
        return Err(Error::value(name, found, expected));
    }
    let needed = extent([rows, columns], stride);
    if found < needed {
        return Err(Error::TooSmall {
            argument: name,
            found,
            expected: needed,
        });
    }
    same_length(name, found, found.min(rows.saturating_mul(stride)))?;
    Ok([columns, stride].map(|elements| elements * size_of::<T>()))
}

fn same_length(argument: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        Ok(())
    } else {
        Err(Error::Length {
            argument,
            found,
            expected,
        })
    }
}
