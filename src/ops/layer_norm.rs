//! Layer normalisation, with the residual sum, and dropout of a summand, before it. Kernels and equations:
//! `kernels/layer_norm.cu`; definition: `dtmem_reference::layer_norm`.

use super::elementwise::{self, Dropout, dropout_args};
use super::launch::{Arg, Launch, Launcher, blocks};
use super::memory::{Check, Input, Output, Span, Storage, for_each_type, kernel_for, span_or_null};
use super::{Error, Result};

const FAMILY: &str = "layer_norm";
const THREADS: u32 = 256;
const WARPS: usize = 8;
const COLUMNS_PER_WARP: usize = 512;
/// Most numbers in a row.
pub const MAX_WIDTH: usize = WARPS * COLUMNS_PER_WARP;
/// Row numbers of the kernels are 32-bit, and go beyond the last row by what all blocks take in a turn.
const MAX_ROWS: usize = 1 << 30;
/// Fixed, not the number of a GPU's processors: the bits of dweight and dbias depend on it.
const MAX_BACKWARD_BLOCKS: u32 = 256;
const REDUCE_COLUMNS: usize = 32;

/// Rows of numbers; each row is normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Up to 2³⁰.
    pub rows: usize,
    /// Numbers in a row: 1 to 4096.
    pub width: usize,
}

/// The tensors of s = x + dropout(residual), y = (s − mean)·rstd·weight + bias with rstd = 1/√(variance + epsilon).
#[derive(Debug)]
pub struct Forward<'a, T> {
    /// [rows, width]
    pub x: Input<'a, T>,
    /// What is added to x, if anything.
    pub residual: Option<Residual<'a, T>>,
    /// \[width\]
    pub weight: Input<'a, T>,
    /// \[width\]
    pub bias: Input<'a, T>,
    /// [rows, width]; may be x.
    pub y: Output<'a, T>,
    /// \[rows\], kept for the backward pass.
    pub mean: Output<'a, f32>,
    /// \[rows\], kept for the backward pass.
    pub rstd: Output<'a, f32>,
    /// Above 0.
    pub epsilon: f32,
}

/// A summand, and where the sum goes.
#[derive(Debug)]
pub struct Residual<'a, T> {
    /// [rows, width]
    pub residual: Input<'a, T>,
    /// Its mask; then the width is a multiple of 4.
    pub dropout: Option<Dropout<'a>>,
    /// s [rows, width]; may be x or residual.
    pub sum: Output<'a, T>,
}

/// The tensors of ds = rstd·(g − mean(g) − ŝ·mean(g·ŝ)) + dsum, dweight += Σ dy·ŝ, dbias += Σ dy, with
/// ŝ = (s − mean)·rstd and g = dy·weight.
#[derive(Debug)]
pub struct Backward<'a, T> {
    /// The forward pass's sum, or its x where there was no residual [rows, width].
    pub s: Input<'a, T>,
    /// \[width\]
    pub weight: Input<'a, T>,
    /// \[rows\]
    pub mean: Input<'a, f32>,
    /// \[rows\]
    pub rstd: Input<'a, f32>,
    /// [rows, width]
    pub dy: Input<'a, T>,
    /// Gradient of s from elsewhere [rows, width], if there is any.
    pub dsum: Option<Input<'a, T>>,
    /// Gradient of x, and of the residual without dropout [rows, width]; may be dy or dsum.
    pub ds: Output<'a, T>,
    /// Gradient of the residual with dropout.
    pub summand: Option<Summand<'a, T>>,
    /// \[width\], added to.
    pub dweight: Output<'a, f32>,
    /// \[width\], added to.
    pub dbias: Output<'a, f32>,
    /// At least [`Shape::workspace`] elements, of any content.
    pub workspace: Output<'a, f32>,
}

/// Where the gradient of a residual goes that went through dropout.
#[derive(Debug)]
pub struct Summand<'a, T> {
    /// The forward pass's.
    pub dropout: Dropout<'a>,
    /// dropout(ds) [rows, width].
    pub gradient: Output<'a, T>,
}

impl Shape {
    /// Errors: rows or width beyond their bounds.
    pub fn validate(&self) -> Result<()> {
        if self.rows > MAX_ROWS {
            return Err(Error::value(
                "rows",
                self.rows,
                format_args!("at most {MAX_ROWS}"),
            ));
        }
        if !(1..=MAX_WIDTH).contains(&self.width) {
            return Err(Error::value(
                "width",
                self.width,
                format_args!("1 to {MAX_WIDTH}"),
            ));
        }
        Ok(())
    }

    /// f32 elements of the workspace of the backward pass: at most 2·256·width.
    pub fn workspace(&self) -> Result<usize> {
        self.validate()?;
        Ok(2 * self.backward_blocks()? as usize * self.width)
    }

    /// y, mean, rstd and the sum ← x and the residual: one launch. Errors: those of
    /// [`plan_forward`](Self::plan_forward) and of the launcher.
    pub fn forward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Forward<'_, T>,
    ) -> Result<()> {
        launcher.launch(&self.plan_forward(&tensors)?)
    }

    /// What [`forward`](Self::forward) launches. Errors: sizes, alignment, overlaps, epsilon.
    pub fn plan_forward<'a, T: Storage>(&self, tensors: &'a Forward<'_, T>) -> Result<Launch<'a>> {
        self.validate()?;
        if !(tensors.epsilon > 0.0 && tensors.epsilon.is_finite()) {
            return Err(Error::value(
                "epsilon",
                tensors.epsilon,
                "a positive number",
            ));
        }
        let size = self.rows * self.width;
        let mut check = Check::new();
        check.input("x", &tensors.x, size, 1)?;
        let mut dropout = None;
        if let Some(residual) = &tensors.residual {
            check.input("residual", &residual.residual, size, 1)?;
            check.output("sum", &residual.sum, size, 1)?;
            dropout = residual.dropout.as_ref();
        }
        self.elements().check_dropout(&mut check, dropout)?;
        check.input("weight", &tensors.weight, self.width, 1)?;
        check.input("bias", &tensors.bias, self.width, 1)?;
        check.output("y", &tensors.y, size, 1)?;
        check.output("mean", &tensors.mean, self.rows, 1)?;
        check.output("rstd", &tensors.rstd, self.rows, 1)?;
        let home = check.disjoint(&[("y", "x"), ("sum", "x"), ("sum", "residual")])?;

        let residual = tensors.residual.as_ref();
        let kernel = kernel_for::<T>(match dropout {
            None => for_each_type!("layer_norm_forward"),
            Some(_) => for_each_type!("layer_norm_forward_dropout"),
        });
        let launch = Launch::new(
            (FAMILY, kernel),
            [blocks("rows", self.rows, self.rows_per_block())?, 1, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.x.span()),
                Arg::Input(span_or_null(residual.map(|residual| &residual.residual))),
                Arg::Input(tensors.weight.span()),
                Arg::Input(tensors.bias.span()),
                Arg::Output(residual.map_or(Span::NULL, |residual| residual.sum.span())),
                Arg::Output(tensors.y.span()),
                Arg::Output(tensors.mean.span()),
                Arg::Output(tensors.rstd.span()),
                Arg::I32(self.rows as i32),
                Arg::I32(self.width as i32),
                Arg::I32(self.warps_per_row() as i32),
                Arg::F32(tensors.epsilon),
            ],
        );
        Ok(match dropout {
            None => launch,
            Some(_) => launch.and(dropout_args(dropout)),
        })
    }

    /// ds ← dy; dweight and dbias are added to: two launches. Errors: those of [`plan_backward`](Self::plan_backward)
    /// and of the launcher.
    pub fn backward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Backward<'_, T>,
    ) -> Result<()> {
        let plan = self.plan_backward(&tensors)?;
        plan.iter().try_for_each(|launch| launcher.launch(launch))
    }

    /// What [`backward`](Self::backward) launches. Errors: sizes, alignment, overlaps.
    pub fn plan_backward<'a, T: Storage>(
        &self,
        tensors: &'a Backward<'_, T>,
    ) -> Result<[Launch<'a>; 2]> {
        let workspace = self.workspace()?;
        let size = self.rows * self.width;
        let mut check = Check::new();
        check.input("s", &tensors.s, size, 1)?;
        check.input("weight", &tensors.weight, self.width, 1)?;
        check.input("mean", &tensors.mean, self.rows, 1)?;
        check.input("rstd", &tensors.rstd, self.rows, 1)?;
        check.input("dy", &tensors.dy, size, 1)?;
        if let Some(dsum) = &tensors.dsum {
            check.input("dsum", dsum, size, 1)?;
        }
        check.output("ds", &tensors.ds, size, 1)?;
        let summand = tensors.summand.as_ref();
        if let Some(summand) = summand {
            check.output("summand", &summand.gradient, size, 1)?;
        }
        let dropout = summand.map(|summand| &summand.dropout);
        self.elements().check_dropout(&mut check, dropout)?;
        check.output("dweight", &tensors.dweight, self.width, 1)?;
        check.output("dbias", &tensors.dbias, self.width, 1)?;
        check.workspace("workspace", &tensors.workspace, workspace)?;
        let home = check.disjoint(&[("ds", "dy"), ("ds", "dsum")])?;

        let blocks = self.backward_blocks()?;
        let partial = tensors.workspace.span();
        let width = Arg::I32(self.width as i32);
        let kernel = kernel_for::<T>(match dropout {
            None => for_each_type!("layer_norm_backward"),
            Some(_) => for_each_type!("layer_norm_backward_dropout"),
        });
        let mut rows = Launch::new(
            (FAMILY, kernel),
            [blocks, 1, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.s.span()),
                Arg::Input(tensors.weight.span()),
                Arg::Input(tensors.mean.span()),
                Arg::Input(tensors.rstd.span()),
                Arg::Input(tensors.dy.span()),
                Arg::Input(span_or_null(tensors.dsum.as_ref())),
                Arg::Output(tensors.ds.span()),
                Arg::Output(partial),
                Arg::I32(self.rows as i32),
                width,
                Arg::I32(self.warps_per_row() as i32),
            ],
        );
        if let Some(summand) = summand {
            rows = rows
                .and([Arg::Output(summand.gradient.span())])
                .and(dropout_args(dropout));
        }
        let sums = Launch::new(
            (FAMILY, "layer_norm_reduce"),
            [(2 * self.width).div_ceil(REDUCE_COLUMNS) as u32, 1, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(partial),
                Arg::Output(tensors.dweight.span()),
                Arg::Output(tensors.dbias.span()),
                Arg::I32(blocks as i32),
                width,
            ],
        );
        Ok([rows, sums])
    }

    fn elements(&self) -> elementwise::Shape {
        elementwise::Shape {
            rows: self.rows,
            width: self.width,
        }
    }

    fn warps_per_row(&self) -> usize {
        self.width.div_ceil(COLUMNS_PER_WARP).next_power_of_two()
    }

    fn rows_per_block(&self) -> usize {
        WARPS / self.warps_per_row()
    }

    /// One where there are no rows: it writes partial sums of 0.
    fn backward_blocks(&self) -> Result<u32> {
        let blocks = blocks("rows", self.rows, self.rows_per_block())?;
        Ok(blocks.clamp(1, MAX_BACKWARD_BLOCKS))
    }
}
