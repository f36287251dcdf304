//! What stands between two matrix products of a model, in one pass: bias, activation, dropout and the residual sum; and
//! the column sums that are a bias's gradient. Kernels and equations: `kernels/elementwise.cu`; definitions:
//! `dtmem_reference::{activation, dropout}`.
//!
//! Every part can be left out. So a sum of two tensors is a [`Forward`] with nothing but a residual, dropout in place
//! one with nothing but dropout whose y is x, and column sums a [`Backward`] with nothing but a bias's gradient.

pub use dtmem_reference::activation::Activation;
pub use dtmem_reference::dropout::Mask;

use super::activation::number;
use super::launch::{Arg, Launch, Launcher, blocks, launch_all};
use super::memory::{
    Check, Input, Output, Rows, Span, Storage, for_each_type, kernel_for, span_or_null,
};
use super::{Error, Result};

const FAMILY: &str = "elementwise";
const THREADS: u32 = 256;
const WARPS: usize = 8;
const COLUMNS_PER_WARP: usize = 256;
const VECTOR_BYTES: usize = 16;
const CONVERTED_PER_THREAD: usize = 4;
/// Row and column numbers of the kernels are 32-bit, and go beyond the last by what all blocks take in a turn.
const MAX_SIDE: usize = 1 << 30;
const MAX_ROW_BLOCKS: usize = 65535;
/// Of the backward pass. Fixed, not the number of a GPU's processors: the bits of dbias depend on it.
const MAX_BACKWARD_BLOCKS: usize = 512;
const REDUCE_COLUMNS: usize = 32;
/// As the kernels number it: behind the activations.
const NO_FUNCTION: i32 = 4;

/// Rows of numbers. Where neither bias nor dropout tells columns apart, any split of the elements into rows will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Up to 2³⁰.
    pub rows: usize,
    /// Numbers in a row: 1 to 2³⁰; with dropout a multiple of 4.
    pub width: usize,
}

/// A dropout mask: element e of row r is drawn at index origin(r)·width + e.
#[derive(Debug)]
pub struct Dropout<'a> {
    /// Seed, site and share. Its step is not read: see below.
    pub mask: Mask,
    /// Optimiser step \[1\]. It changes from launch to launch, so it lies in device memory.
    pub step: Input<'a, u32>,
    /// Origin of each row \[rows\]; without it a row's own number.
    pub origins: Option<Input<'a, i32>>,
}

/// The tensors of y = residual + dropout(f(x + bias)).
#[derive(Debug)]
pub struct Forward<'a, T> {
    /// [rows, width]
    pub x: Input<'a, T>,
    /// \[width\]
    pub bias: Option<Input<'a, T>>,
    /// f
    pub activation: Option<Activation>,
    /// The mask.
    pub dropout: Option<Dropout<'a>>,
    /// [rows, width]
    pub residual: Option<Input<'a, T>>,
    /// [rows, width]; may be x or the residual.
    pub y: Output<'a, T>,
}

/// The tensors of dx = dropout(dy)·f′ and dbias += Σ dx over the rows.
#[derive(Debug)]
pub struct Backward<'a, T> {
    /// f, and what was kept for it.
    pub activation: Option<Kept<'a, T>>,
    /// The forward pass's mask.
    pub dropout: Option<Dropout<'a>>,
    /// [rows, width]
    pub dy: Rows<Input<'a, T>>,
    /// Overwritten [rows, width]; may be dy, if that has no gaps.
    pub dx: Option<Output<'a, T>>,
    /// The bias's gradient.
    pub bias: Option<BiasGradient<'a>>,
}

/// What f′ is taken from.
#[derive(Debug)]
pub struct Kept<'a, T> {
    /// f
    pub activation: Activation,
    /// f(x + bias), before dropout, for ReLU and tanh (after dropout does as well for ReLU); the forward pass's x for
    /// GELU and OnePlus [rows, width].
    pub kept: Input<'a, T>,
    /// The forward pass's bias, for GELU and OnePlus \[width\].
    pub bias: Option<Input<'a, T>>,
}

/// Where column sums go.
#[derive(Debug)]
pub struct BiasGradient<'a> {
    /// Added to \[width\].
    pub dbias: Output<'a, f32>,
    /// At least [`Shape::workspace`] elements, of any content.
    pub workspace: Output<'a, f32>,
}

impl Shape {
    /// Errors: rows or width beyond their bounds.
    pub fn validate(&self) -> Result<()> {
        if self.rows > MAX_SIDE {
            let expected = format_args!("at most {MAX_SIDE}");
            return Err(Error::value("rows", self.rows, expected));
        }
        if !(1..=MAX_SIDE).contains(&self.width) {
            let expected = format_args!("1 to {MAX_SIDE}");
            return Err(Error::value("width", self.width, expected));
        }
        Ok(())
    }

    /// f32 elements of the workspace of a bias's gradient: at most 512 rows.
    pub fn workspace(&self) -> Result<usize> {
        self.validate()?;
        Ok(self.backward_row_blocks() * self.width)
    }

    /// y ← x and the others: one launch. Errors: those of [`plan_forward`](Self::plan_forward) and of the launcher.
    pub fn forward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Forward<'_, T>,
    ) -> Result<()> {
        launcher.launch(&self.plan_forward(&tensors)?)
    }

    /// What [`forward`](Self::forward) launches. Errors: sizes, overlaps, a width that dropout cannot have.
    pub fn plan_forward<'a, T: Storage>(&self, tensors: &'a Forward<'_, T>) -> Result<Launch<'a>> {
        self.validate()?;
        let mut check = Check::new();
        check.input("x", &tensors.x, self.size(), 1)?;
        if let Some(bias) = &tensors.bias {
            check.input("bias", bias, self.width, 1)?;
        }
        self.check_dropout(&mut check, tensors.dropout.as_ref())?;
        if let Some(residual) = &tensors.residual {
            check.input("residual", residual, self.size(), 1)?;
        }
        check.output("y", &tensors.y, self.size(), 1)?;
        let home = check.disjoint(&[("y", "x"), ("y", "residual")])?;

        let row_blocks = self.row_blocks().min(MAX_ROW_BLOCKS);
        Ok(Launch::new(
            (
                FAMILY,
                kernel_for::<T>(for_each_type!("elementwise_forward")),
            ),
            [self.column_blocks(), row_blocks as u32, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::I32(tensors.activation.map_or(NO_FUNCTION, number)),
                Arg::Input(tensors.x.span()),
                Arg::Input(span_or_null(tensors.bias.as_ref())),
                Arg::Input(span_or_null(tensors.residual.as_ref())),
                Arg::Output(tensors.y.span()),
            ],
        )
        .and(dropout_args(tensors.dropout.as_ref()))
        .and([
            Arg::I32(self.rows as i32),
            Arg::I32(self.width as i32),
            Arg::I32(self.warps_per_row() as i32),
        ]))
    }

    /// dx ← dy, dbias is added to: one launch, or two with a bias's gradient. Errors: those of
    /// [`plan_backward`](Self::plan_backward) and of the launcher.
    pub fn backward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Backward<'_, T>,
    ) -> Result<()> {
        launch_all(launcher, &self.plan_backward(&tensors)?)
    }

    /// What [`backward`](Self::backward) launches; the second for the bias's gradient. Errors: sizes, overlaps, a width
    /// that dropout cannot have.
    pub fn plan_backward<'a, T: Storage>(
        &self,
        tensors: &'a Backward<'_, T>,
    ) -> Result<[Option<Launch<'a>>; 2]> {
        let workspace = self.workspace()?;
        let shape = [self.rows, self.width];
        let mut check = Check::new();
        let kept = tensors.activation.as_ref();
        if let Some(Kept { kept, bias, .. }) = kept {
            check.input("kept", kept, self.size(), 1)?;
            if let Some(bias) = bias {
                check.input("bias", bias, self.width, 1)?;
            }
        }
        self.check_dropout(&mut check, tensors.dropout.as_ref())?;
        check.input_rows("dy", &tensors.dy, shape, 1)?;
        if let Some(dx) = &tensors.dx {
            check.output("dx", dx, self.size(), 1)?;
        }
        if let Some(bias) = &tensors.bias {
            check.output("dbias", &bias.dbias, self.width, 1)?;
            check.workspace("workspace", &bias.workspace, workspace)?;
        }
        let home = check.disjoint(&[("dx", "dy")])?;

        let row_blocks = self.backward_row_blocks() as u32;
        let partial = tensors
            .bias
            .as_ref()
            .map_or(Span::NULL, |bias| bias.workspace.span());
        let rows = Launch::new(
            (
                FAMILY,
                kernel_for::<T>(for_each_type!("elementwise_backward")),
            ),
            [self.column_blocks(), row_blocks, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::I32(kept.map_or(NO_FUNCTION, |kept| number(kept.activation))),
                Arg::Input(span_or_null(kept.map(|kept| &kept.kept))),
                Arg::Input(span_or_null(kept.and_then(|kept| kept.bias.as_ref()))),
                Arg::Input(tensors.dy.span(shape)),
                Arg::Output(tensors.dx.as_ref().map_or(Span::NULL, Output::span)),
                Arg::Output(partial),
            ],
        )
        .and(dropout_args(tensors.dropout.as_ref()))
        .and([
            Arg::I32(self.rows as i32),
            Arg::I32(self.width as i32),
            tensors.dy.stride(),
            Arg::I32(self.warps_per_row() as i32),
        ]);
        let sums = tensors.bias.as_ref().map(|bias| {
            Launch::new(
                (FAMILY, "elementwise_add_partials"),
                [self.width.div_ceil(REDUCE_COLUMNS) as u32, 1, 1],
                [THREADS, 1, 1],
                0,
                home,
                [
                    Arg::Input(partial),
                    Arg::Output(bias.dbias.span()),
                    Arg::I32(row_blocks as i32),
                    Arg::I32(self.width as i32),
                ],
            )
        });
        Ok([Some(rows), sums])
    }

    /// out ← x, rounded to the nearest: one launch. Errors: those of [`plan_narrow`](Self::plan_narrow) and of the
    /// launcher.
    pub fn narrow<T: Storage>(
        &self,
        launcher: &impl Launcher,
        x: Input<'_, f32>,
        out: Output<'_, T>,
    ) -> Result<()> {
        launcher.launch(&self.plan_narrow(&x, &out)?)
    }

    /// What [`narrow`](Self::narrow) launches, for tensors that begin at multiples of 16 bytes. Errors: sizes,
    /// alignment, overlaps.
    pub fn plan_narrow<'a, T: Storage>(
        &self,
        x: &'a Input<'_, f32>,
        out: &'a Output<'_, T>,
    ) -> Result<Launch<'a>> {
        self.conversion(
            kernel_for::<T>(for_each_type!("elementwise_narrow")),
            x,
            out,
        )
    }

    /// out ← x: one launch. Errors: those of [`plan_widen`](Self::plan_widen) and of the launcher.
    pub fn widen<T: Storage>(
        &self,
        launcher: &impl Launcher,
        x: Input<'_, T>,
        out: Output<'_, f32>,
    ) -> Result<()> {
        launcher.launch(&self.plan_widen(&x, &out)?)
    }

    /// What [`widen`](Self::widen) launches, for tensors that begin at multiples of 16 bytes. Errors: sizes, alignment,
    /// overlaps.
    pub fn plan_widen<'a, T: Storage>(
        &self,
        x: &'a Input<'_, T>,
        out: &'a Output<'_, f32>,
    ) -> Result<Launch<'a>> {
        self.conversion(kernel_for::<T>(for_each_type!("elementwise_widen")), x, out)
    }

    fn conversion<'a, From, To>(
        &self,
        kernel: &'static str,
        x: &'a Input<'_, From>,
        out: &'a Output<'_, To>,
    ) -> Result<Launch<'a>> {
        self.validate()?;
        let mut check = Check::new();
        check.input("x", x, self.size(), VECTOR_BYTES)?;
        check.output("out", out, self.size(), VECTOR_BYTES)?;
        let home = check.disjoint(&[])?;
        let per_block = THREADS as usize * CONVERTED_PER_THREAD;
        Ok(Launch::new(
            (FAMILY, kernel),
            [blocks("elements", self.size(), per_block)?, 1, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(x.span()),
                Arg::Output(out.span()),
                Arg::I64(self.size() as i64),
            ],
        ))
    }

    pub(super) fn check_dropout(
        &self,
        check: &mut Check,
        dropout: Option<&Dropout<'_>>,
    ) -> Result<()> {
        let Some(dropout) = dropout else {
            return Ok(());
        };
        if !self.width.is_multiple_of(4) {
            return Err(Error::value(
                "width",
                self.width,
                "a multiple of 4 with dropout",
            ));
        }
        check.input("step", &dropout.step, 1, 1)?;
        if let Some(origins) = &dropout.origins {
            check.input("origins", origins, self.rows, 1)?;
        }
        Ok(())
    }

    fn size(&self) -> usize {
        self.rows * self.width
    }

    fn warps_per_row(&self) -> usize {
        let slabs = self.width.div_ceil(COLUMNS_PER_WARP);
        slabs.next_power_of_two().min(WARPS)
    }

    fn column_blocks(&self) -> u32 {
        let columns = self.warps_per_row() * COLUMNS_PER_WARP;
        self.width.div_ceil(columns) as u32
    }

    fn row_blocks(&self) -> usize {
        self.rows.div_ceil(WARPS / self.warps_per_row())
    }

    /// One where there are no rows: it writes partial sums of 0.
    fn backward_row_blocks(&self) -> usize {
        let most = (MAX_BACKWARD_BLOCKS / self.column_blocks() as usize).max(1);
        self.row_blocks().clamp(1, most)
    }
}

/// In the order of the kernels: step, origins, seed, site, threshold, scale.
pub(super) fn dropout_args(dropout: Option<&Dropout<'_>>) -> [Arg; 6] {
    let Some(Dropout {
        mask,
        step,
        origins,
    }) = dropout
    else {
        return [
            Arg::Input(Span::NULL),
            Arg::Input(Span::NULL),
            Arg::U64(0),
            Arg::U32(0),
            Arg::U32(0),
            Arg::F32(1.0),
        ];
    };
    [
        Arg::Input(step.span()),
        Arg::Input(span_or_null(origins.as_ref())),
        Arg::U64(mask.seed),
        Arg::U32(mask.site),
        Arg::U32(mask.threshold),
        Arg::F32(mask.scale() as f32),
    ]
}
