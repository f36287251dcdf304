//! A linear map of one-hot codes, with or without tanh: embeddings of observations and actions. Kernels and equations:
//! `kernels/one_hot.cu`; definition: `dtmem_reference::one_hot`.

use dtmem_reference::one_hot as reference;
use ndarray::ArrayView2;

use super::launch::{Arg, Launch, Launcher, blocks, launch_all};
use super::memory::{Check, Input, Output, Storage, for_each_type, kernel_for, span_or_null};
use super::{Error, Result};

const FAMILY: &str = "one_hot";
const THREADS: u32 = 256;
const FORWARD_ROWS: usize = 32;
const FORWARD_COLUMNS: usize = 64;
const BACKWARD_COLUMNS: usize = 128;
const BACKWARD_INPUTS: usize = 128;
const REDUCE_COLUMNS: usize = 32;
/// Row numbers of the kernels are 32-bit.
const MAX_ROWS: usize = 1 << 30;
/// So that the blocks along fields and columns have numbers below 65536.
const MAX_SIDE: usize = 1 << 20;
/// Of the backward pass, at least as many as the weight has tiles. Fixed, not the number of a GPU's processors: the
/// bits of the gradients depend on it.
const BACKWARD_BLOCKS: usize = 256;
/// Fewer are not worth a row of partial sums.
const MIN_CHUNK: usize = 64;

/// Rows of codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Up to 2³⁰.
    pub rows: usize,
    /// Codes in a row, at least 1.
    pub fields: usize,
    /// Rows of the weight, one for each value of each field, up to 2²⁰.
    pub inputs: usize,
    /// Columns of the weight, 1 to 2²⁰.
    pub width: usize,
}

/// The tensors of y = f(bias + Σ over the fields of weight\[offset + code\]).
#[derive(Debug)]
pub struct Forward<'a, T> {
    /// [rows, fields], each below the size of its field: [`Shape::validate_codes`].
    pub codes: Input<'a, u8>,
    /// First input of each field, ascending \[fields\].
    pub offsets: Input<'a, i32>,
    /// [inputs, width]
    pub weight: Input<'a, T>,
    /// \[width\]
    pub bias: Input<'a, T>,
    /// Whether f is tanh, and not the identity.
    pub tanh: bool,
    /// [rows, width]
    pub y: Output<'a, T>,
}

/// The tensors of dweight\[offset + code\] += g, dbias += Σ g over the rows, with g = dy·(1 − y²) or dy.
#[derive(Debug)]
pub struct Backward<'a, T> {
    /// [rows, fields]
    pub codes: Input<'a, u8>,
    /// \[fields\]
    pub offsets: Input<'a, i32>,
    /// What the forward pass gave, if f is tanh [rows, width].
    pub y: Option<Input<'a, T>>,
    /// [rows, width]; a number that is not finite makes all gradients of its column NaN.
    pub dy: Input<'a, T>,
    /// Added to [inputs, width].
    pub dweight: Output<'a, f32>,
    /// Added to \[width\].
    pub dbias: Output<'a, f32>,
    /// At least [`Shape::workspace`] elements, of any content.
    pub workspace: Output<'a, f32>,
}

impl Shape {
    /// Errors: a side beyond its bounds, fewer inputs than fields.
    pub fn validate(&self) -> Result<()> {
        if self.rows > MAX_ROWS {
            let expected = format_args!("at most {MAX_ROWS}");
            return Err(Error::value("rows", self.rows, expected));
        }
        if !(1..=MAX_SIDE).contains(&self.width) {
            let expected = format_args!("1 to {MAX_SIDE}");
            return Err(Error::value("width", self.width, expected));
        }
        if self.inputs > MAX_SIDE {
            let expected = format_args!("at most {MAX_SIDE}");
            return Err(Error::value("inputs", self.inputs, expected));
        }
        if !(1..=self.inputs).contains(&self.fields) {
            let expected = format_args!("1 to {}, the inputs", self.inputs);
            return Err(Error::value("fields", self.fields, expected));
        }
        Ok(())
    }

    /// Checks on the host what the device's arrays are to hold: offsets that ascend, codes [rows, fields] that are
    /// below the size of their field. Errors: those of [`validate`](Self::validate), and what does not hold.
    pub fn validate_codes(&self, codes: &[u8], offsets: &[usize]) -> Result<()> {
        self.validate()?;
        let matrix = ArrayView2::from_shape((self.rows, self.fields), codes);
        let matrix = matrix.map_err(|_| Error::Length {
            argument: "codes",
            found: codes.len(),
            expected: self.rows * self.fields,
        })?;
        Ok(reference::check_codes(matrix, offsets, self.inputs)?)
    }

    /// f32 elements of the workspace of the backward pass.
    pub fn workspace(&self) -> Result<usize> {
        self.validate()?;
        Ok(self.chunks() * (self.inputs + 1) * self.width)
    }

    /// y ← codes: one launch. Errors: those of [`plan_forward`](Self::plan_forward) and of the launcher.
    pub fn forward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Forward<'_, T>,
    ) -> Result<()> {
        launcher.launch(&self.plan_forward(&tensors)?)
    }

    /// What [`forward`](Self::forward) launches. Errors: shape, sizes, overlaps.
    pub fn plan_forward<'a, T: Storage>(&self, tensors: &'a Forward<'_, T>) -> Result<Launch<'a>> {
        self.validate()?;
        let mut check = Check::new();
        check.input("codes", &tensors.codes, self.rows * self.fields, 1)?;
        check.input("offsets", &tensors.offsets, self.fields, 1)?;
        check.input("weight", &tensors.weight, self.inputs * self.width, 1)?;
        check.input("bias", &tensors.bias, self.width, 1)?;
        check.output("y", &tensors.y, self.rows * self.width, 1)?;
        let home = check.disjoint(&[])?;
        let rows = blocks("rows", self.rows, FORWARD_ROWS)?;
        Ok(Launch::new(
            (FAMILY, kernel_for::<T>(for_each_type!("one_hot_forward"))),
            [rows, self.width.div_ceil(FORWARD_COLUMNS) as u32, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::I32(tensors.tanh.into()),
                Arg::Input(tensors.codes.span()),
                Arg::Input(tensors.offsets.span()),
                Arg::Input(tensors.weight.span()),
                Arg::Input(tensors.bias.span()),
                Arg::Output(tensors.y.span()),
                Arg::I32(self.rows as i32),
                Arg::I32(self.fields as i32),
                Arg::I32(self.width as i32),
            ],
        ))
    }

    /// dweight and dbias are added to: two launches. Errors: those of [`plan_backward`](Self::plan_backward) and of the
    /// launcher.
    pub fn backward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Backward<'_, T>,
    ) -> Result<()> {
        launch_all(launcher, &self.plan_backward(&tensors)?.map(Some))
    }

    /// What [`backward`](Self::backward) launches. Errors: shape, sizes, overlaps.
    pub fn plan_backward<'a, T: Storage>(
        &self,
        tensors: &'a Backward<'_, T>,
    ) -> Result<[Launch<'a>; 2]> {
        let workspace = self.workspace()?;
        let size = self.rows * self.width;
        let mut check = Check::new();
        check.input("codes", &tensors.codes, self.rows * self.fields, 1)?;
        check.input("offsets", &tensors.offsets, self.fields, 1)?;
        if let Some(y) = &tensors.y {
            check.input("y", y, size, 1)?;
        }
        check.input("dy", &tensors.dy, size, 1)?;
        check.output("dweight", &tensors.dweight, self.inputs * self.width, 1)?;
        check.output("dbias", &tensors.dbias, self.width, 1)?;
        check.workspace("workspace", &tensors.workspace, workspace)?;
        let home = check.disjoint(&[])?;

        let chunks = self.chunks();
        let partial = tensors.workspace.span();
        let [inputs, width] = [self.inputs, self.width].map(|side| Arg::I32(side as i32));
        let [columns, input_tiles] = self.tiles();
        let rows = Launch::new(
            (FAMILY, kernel_for::<T>(for_each_type!("one_hot_backward"))),
            [columns as u32, input_tiles as u32, chunks as u32],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.codes.span()),
                Arg::Input(tensors.offsets.span()),
                Arg::Input(span_or_null(tensors.y.as_ref())),
                Arg::Input(tensors.dy.span()),
                Arg::Output(partial),
                Arg::I32(self.rows as i32),
                Arg::I32(self.fields as i32),
                inputs,
                width,
                Arg::I32(self.rows.div_ceil(chunks) as i32),
            ],
        );
        let sums = (self.inputs + 1) * self.width;
        let sums = Launch::new(
            (FAMILY, "one_hot_add_partials"),
            [blocks("inputs", sums, REDUCE_COLUMNS)?, 1, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(partial),
                Arg::Output(tensors.dweight.span()),
                Arg::Output(tensors.dbias.span()),
                Arg::I32(chunks as i32),
                inputs,
                width,
            ],
        );
        Ok([rows, sums])
    }

    /// Of the backward pass: along the columns, and along the inputs with the bias behind them.
    fn tiles(&self) -> [usize; 2] {
        [
            self.width.div_ceil(BACKWARD_COLUMNS),
            (self.inputs + 1).div_ceil(BACKWARD_INPUTS),
        ]
    }

    /// Parts of the rows, at least one: it writes partial sums of 0 where there are no rows.
    fn chunks(&self) -> usize {
        let [columns, inputs] = self.tiles();
        let most = (BACKWARD_BLOCKS / (columns * inputs)).max(1);
        self.rows.div_ceil(MIN_CHUNK).clamp(1, most)
    }
}
