//! The memory that kernels read and write: always the caller's.

use std::marker::PhantomData;
use std::ops::Range;

use half::{bf16, f16};

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

/// The three names of a kernel that is there for each type.
macro_rules! for_each_type {
    ($stem:literal) => {
        [
            concat!($stem, "_f32"),
            concat!($stem, "_bf16"),
            concat!($stem, "_f16"),
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

    pub(super) fn context(context: &cudarc::driver::CudaContext) -> Self {
        Self(Some(context.cu_ctx().addr()))
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

    fn overlaps(self, other: Self) -> bool {
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

            pub(super) fn new(home: Home, address: u64, len: usize, guard: Guard<'a>) -> Self {
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

impl<'a, T> Output<'a, T> {
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

#[derive(Clone, Copy)]
struct Tensor {
    name: &'static str,
    span: Span,
    written: bool,
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
        self.tensor::<T>(name, input.home, input.span(), alignment, false)
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
        self.tensor::<T>(name, output.home, output.span(), alignment, true)
    }

    /// Memory for what has to be kept between two kernels: at least `len` elements.
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
        self.tensor::<T>(
            name,
            workspace.home,
            workspace.span(),
            align_of::<T>(),
            true,
        )
    }

    fn tensor<T>(
        &mut self,
        name: &'static str,
        home: Home,
        span: Span,
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
                if !again && !same && written.span.overlaps(other.span) {
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
