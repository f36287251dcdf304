//! One launch of one kernel, as plain data, and who carries it out.

use std::fmt;
use std::marker::PhantomData;

use super::memory::{Home, Span, Type};
use super::{Error, Result};

/// Arguments that a kernel takes at most.
pub const MAX_ARGS: usize = 40;

/// Which kernels compute an operation that has several. All give the same numbers, up to the order of their sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Version {
    /// By products of a warp: every type and shape, every GPU from compute capability 8.0 on.
    #[default]
    Portable,
    /// By products of a warpgroup, or by clusters of blocks that share their memory: compute capability 9.0 (H100,
    /// H200), bf16 and f16, the shapes that the operation names. Not measured yet, and so not the default: only the
    /// host executor's model of these instructions has run them.
    Hopper,
}

/// Tensor maps that a kernel takes at most.
pub const MAX_MAPS: usize = 4;

/// A matrix, and the box of it that one instruction of a kernel loads: 128 bytes of so many rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap {
    /// From the first to the last element; none where there are no elements, and then nothing is loaded.
    pub span: Span,
    /// Of the elements.
    pub element: Type,
    /// Of the matrix.
    pub columns: u64,
    /// Of the matrix.
    pub rows: u64,
    /// Bytes from row to row, a multiple of 16.
    pub stride: u64,
    /// Of a box, 1 to 256.
    pub box_rows: u32,
}

impl TensorMap {
    /// Bytes of a row of a box: those of the swizzle that it arrives with.
    const ROW_BYTES: usize = 128;

    /// Columns of a box.
    pub fn box_columns(&self) -> u32 {
        (Self::ROW_BYTES / self.element.bytes()) as u32
    }
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// For `const T*`: memory that is only read.
    Input(Span),
    /// For `T*`: memory that is written, or read and written.
    Output(Span),
    /// For `ptx::TensorMap`: memory that is only read, by boxes.
    Map(TensorMap),
    /// For `int32_t`.
    I32(i32),
    /// For `uint32_t`.
    U32(u32),
    /// For `int64_t`.
    I64(i64),
    /// For `uint64_t`.
    U64(u64),
    /// For `float`.
    F32(f32),
}

/// A launch that has been validated: only the operations of this crate make one. It lives as long as the memory that
/// it names.
#[derive(Clone, Copy, PartialEq)]
pub struct Launch<'a> {
    family: &'static str,
    kernel: &'static str,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    cluster: u32,
    hopper: bool,
    home: Home,
    args: [Arg; MAX_ARGS],
    count: usize,
    memory: PhantomData<&'a ()>,
}

impl fmt::Debug for Launch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Launch")
            .field("kernel", &self.kernel)
            .field("grid", &self.grid)
            .field("block", &self.block)
            .field("shared_bytes", &self.shared_bytes)
            .field("cluster", &self.cluster)
            .field("args", &self.args())
            .finish_non_exhaustive()
    }
}

impl<'a> Launch<'a> {
    /// `home` is where all memory of the arguments lies.
    pub(super) fn new<const N: usize>(
        (family, kernel): (&'static str, &'static str),
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: u32,
        home: Home,
        list: [Arg; N],
    ) -> Self {
        const { assert!(N <= MAX_ARGS) };
        let mut args = [Arg::I32(0); MAX_ARGS];
        args[..N].copy_from_slice(&list);
        Self {
            family,
            kernel,
            grid,
            block,
            shared_bytes,
            cluster: 1,
            hopper: false,
            home,
            args,
            count: N,
            memory: PhantomData,
        }
    }

    /// With further arguments behind those that it has. The kernels' parameters are at most [`MAX_ARGS`].
    pub(super) fn and<const N: usize>(mut self, list: [Arg; N]) -> Self {
        self.args[self.count..self.count + N].copy_from_slice(&list);
        self.count += N;
        self
    }

    /// In clusters of `blocks` neighbours along x, a divisor of the grid.
    pub(super) fn in_clusters(mut self, blocks: u32) -> Self {
        self.cluster = blocks;
        self
    }

    /// Of a kernel that is for compute capability 9.0 alone.
    pub(super) fn for_hopper(mut self) -> Self {
        self.hopper = true;
        self
    }

    /// Name of the kernel's file, without `.cu`.
    pub fn family(&self) -> &'static str {
        self.family
    }

    /// Name of the kernel.
    pub fn kernel(&self) -> &'static str {
        self.kernel
    }

    /// Blocks (x, y, z).
    pub fn grid(&self) -> [u32; 3] {
        self.grid
    }

    /// Threads per block (x, y, z).
    pub fn block(&self) -> [u32; 3] {
        self.block
    }

    /// Bytes of dynamic shared memory per block.
    pub fn shared_bytes(&self) -> u32 {
        self.shared_bytes
    }

    /// Blocks of a cluster, neighbours along x: 1 where there are no clusters.
    pub fn cluster(&self) -> u32 {
        self.cluster
    }

    /// Whether the kernel is for compute capability 9.0 alone, and empty in images for others.
    pub fn is_for_hopper(&self) -> bool {
        self.hopper
    }

    /// In the order of the kernel's parameters.
    pub fn args(&self) -> &[Arg] {
        &self.args[..self.count]
    }

    /// Whether there is nothing to do: no blocks.
    pub fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }

    /// An error unless the memory lies here.
    pub fn check_home(&self, home: Home) -> Result<()> {
        if self.home == home {
            Ok(())
        } else {
            Err(Error::ForeignMemory {
                argument: self.kernel,
            })
        }
    }
}

/// Who runs kernels: a CUDA stream ([`OnStream`](super::OnStream)), or the host executor (`ops::host`).
pub trait Launcher {
    /// Starts a kernel, behind those that were started before; a launch without blocks does nothing. Errors:
    /// [`Launch::check_home`], a launch that it cannot do, and what keeps the kernel from starting.
    fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Whether there is what a launch needs. Kernels for Hopper want compute capability 9.0 and machine code for it;
    /// clusters want compute capability 9.0 or above, machine code, and multiprocessors with enough shared memory next
    /// to each other. Errors: what keeps the kernel from loading.
    fn can_launch(&self, launch: &Launch<'_>) -> Result<bool>;
}

/// Starts the launches of a plan in their order, without those that are not needed.
pub(super) fn launch_all(launcher: &impl Launcher, plan: &[Option<Launch<'_>>]) -> Result<()> {
    plan.iter()
        .flatten()
        .try_for_each(|launch| launcher.launch(launch))
}

/// The same, or `otherwise` where the launcher cannot do one of them.
pub(super) fn launch_first_possible<'a, const N: usize>(
    launcher: &impl Launcher,
    plan: &[Option<Launch<'a>>; N],
    otherwise: impl FnOnce() -> Result<[Option<Launch<'a>>; N]>,
) -> Result<()> {
    for launch in plan.iter().flatten() {
        if !launcher.can_launch(launch)? {
            return launch_all(launcher, &otherwise()?);
        }
    }
    launch_all(launcher, plan)
}

/// Blocks that are needed for `items`, as an argument called `name`.
pub(super) fn blocks(name: &'static str, items: usize, per_block: usize) -> Result<u32> {
    let blocks = items.div_ceil(per_block);
    match i32::try_from(blocks) {
        Ok(blocks) => Ok(blocks.unsigned_abs()),
        Err(_) => Err(Error::value(
            name,
            items,
            format_args!("at most {}", (i32::MAX as usize).saturating_mul(per_block)),
        )),
    }
}
