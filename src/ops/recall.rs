//! The memory loss on what a memory recalls: what stands around [`content_memory`](super::content_memory), whose slots
//! then carry a column more for each recalled token. Kernels and equations: `kernels/recall.cu`; definition:
//! `dtmem_reference::recall`, SPEC section 3.
//!
//! Memories are widened by columns of zeros and the values of tokens by one-hot columns ([`WidenShape`]); what is read
//! in those columns is a token's recall, of which [`LossShape`] takes the loss and the gradient; and on the way back
//! the gradient of what is read is widened by that. No launch depends on which tokens are recalled, only on how many
//! columns there are, so that a CUDA graph can be replayed with the next batch.

use super::launch::{Arg, Launch, Launcher, blocks, launch_all};
use super::memory::{Check, Input, Output, Rows, Span, Storage, for_each_type, kernel_for};
use super::{Error, Result};

const FAMILY: &str = "recall";
const THREADS: u32 = 256;
const ROWS_PER_BLOCK: usize = 8;
/// Row numbers of the kernels are 32-bit.
const MAX_ROWS: usize = 1 << 30;
const MAX_WIDTH: usize = 1 << 16;
/// Columns that a word of [`Loss::wanted`] tells of.
const WORD: usize = 32;

/// i32 words that say of each of `columns` whether a token is to recall it.
pub fn words(columns: usize) -> usize {
    columns.div_ceil(WORD)
}

/// Rows that get more columns behind those that they have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WidenShape {
    /// Rows of y: up to 2³⁰, a multiple of `group`.
    pub rows: usize,
    /// So many rows stay together: 1 where each has a source of its own, the slots of a memory where each memory has.
    pub group: usize,
    /// Groups of x, up to 2³⁰.
    pub sources: usize,
    /// D, the columns that rows have: 1 to 65536.
    pub width: usize,
    /// C, those that they get: 1 to 65536.
    pub columns: usize,
}

/// The columns behind those of x.
#[derive(Debug)]
pub enum Columns<'a, T> {
    /// 0.
    Zeros,
    /// 1 in this column of each row, 0 in the others; a negative number is none \[rows\].
    OneHot(Input<'a, i32>),
    /// [rows, C].
    Given(Input<'a, T>),
}

/// The tensors of y_r = \[x_source(r), columns_r\], source(r) = from\[r / group\]·group + r mod group.
#[derive(Debug)]
pub struct Widen<'a, T> {
    /// [sources·group, D]
    pub x: Rows<Input<'a, T>>,
    /// Group of x for each group of y, below `sources` \[rows / group\].
    pub from: Input<'a, i32>,
    /// What stands in the other columns.
    pub columns: Columns<'a, T>,
    /// Overwritten [rows, D + C].
    pub y: Output<'a, T>,
}

/// What some tokens have read in a widened memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LossShape {
    /// Up to 2³⁰.
    pub tokens: usize,
    /// D, the columns of what is read: 1 to 65536.
    pub width: usize,
    /// C, the columns of recall: 1 to 65536.
    pub columns: usize,
}

/// The tensors of the loss −Σ (E log R + (1−E) log(1−R)) and of dR = weight·(R − E)/max(R (1−R), 1e-12). So that no
/// rounded share outweighs a batch, 1 − R counts as at least 2⁻¹⁰ in bf16 and 2⁻¹³ in f16, and R as at least 2⁻¹⁴ in
/// f16.
#[derive(Debug)]
pub struct Loss<'a, T> {
    /// What was read and, behind it, R [tokens, D + C].
    pub y: Input<'a, T>,
    /// Row of `read` for each token, no two alike \[tokens\].
    pub to: Input<'a, i32>,
    /// So many columns from the first take part in a token's loss: those of tokens before its segment \[tokens\], 0 to
    /// C.
    pub earlier: Input<'a, i32>,
    /// E: bit c mod 32 of word c / 32 says whether a token is to recall column c [tokens, [`words`]].
    pub wanted: Input<'a, i32>,
    /// What the loss is multiplied by before its gradient is taken \[1\].
    pub weight: Input<'a, f32>,
    /// Overwritten: what was read, without R [tokens, D].
    pub read: Rows<Output<'a, T>>,
    /// Overwritten: dR [tokens, C], 0 where there is no loss.
    pub gradient: Output<'a, T>,
    /// Overwritten: the loss, not weighted \[1\].
    pub loss: Output<'a, f32>,
    /// At least [`LossShape::workspace`] elements, of any content.
    pub workspace: Output<'a, f32>,
}

impl WidenShape {
    /// Errors: a side beyond its bounds, rows that are not whole groups.
    pub fn validate(&self) -> Result<()> {
        check_sides("rows", self.rows, self.width, self.columns)?;
        for (argument, found) in [("group", self.group), ("sources", self.sources)] {
            check_rows(argument, found)?;
        }
        if self.group == 0 || !self.rows.is_multiple_of(self.group) {
            let found = format_args!("{} of {} rows", self.group, self.rows);
            return Err(Error::value("group", found, "a divisor of the rows"));
        }
        if self.sources.saturating_mul(self.group) > MAX_ROWS {
            let found = format_args!("{} groups of {}", self.sources, self.group);
            let expected = format_args!("at most {MAX_ROWS} rows");
            return Err(Error::value("sources", found, expected));
        }
        Ok(())
    }

    /// y ← x: one launch. Errors: those of [`plan`](Self::plan) and of the launcher.
    pub fn widen<T: Storage>(&self, launcher: &impl Launcher, tensors: Widen<'_, T>) -> Result<()> {
        launcher.launch(&self.plan(&tensors)?)
    }

    /// What [`widen`](Self::widen) launches. Errors: shape, sizes, overlaps.
    pub fn plan<'a, T: Storage>(&self, tensors: &'a Widen<'_, T>) -> Result<Launch<'a>> {
        self.validate()?;
        let x = [self.sources * self.group, self.width];
        let mut check = Check::new();
        check.input_rows("x", &tensors.x, x, 1)?;
        check.input("from", &tensors.from, self.rows / self.group, 1)?;
        let (mut one, mut given) = (Span::NULL, Span::NULL);
        match &tensors.columns {
            Columns::Zeros => {}
            Columns::OneHot(columns) => {
                check.input("columns", columns, self.rows, 1)?;
                one = columns.span();
            }
            Columns::Given(columns) => {
                check.input("columns", columns, self.rows * self.columns, 1)?;
                given = columns.span();
            }
        }
        let len = self.rows * (self.width + self.columns);
        check.output("y", &tensors.y, len, 1)?;
        let home = check.disjoint(&[])?;
        Ok(Launch::new(
            (FAMILY, kernel_for::<T>(for_each_type!("recall_widen"))),
            [blocks("rows", self.rows, ROWS_PER_BLOCK)?, 1, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.x.span(x)),
                Arg::Input(tensors.from.span()),
                Arg::Input(one),
                Arg::Input(given),
                Arg::Output(tensors.y.span()),
                Arg::I32(self.rows as i32),
                Arg::I32(self.group as i32),
                Arg::I32(self.width as i32),
                Arg::I32(self.columns as i32),
                tensors.x.stride(),
            ],
        ))
    }
}

impl LossShape {
    /// Errors: a side beyond its bounds.
    pub fn validate(&self) -> Result<()> {
        check_sides("tokens", self.tokens, self.width, self.columns)
    }

    /// f32 elements of the workspace.
    pub fn workspace(&self) -> Result<usize> {
        self.validate()?;
        Ok(self.tokens.div_ceil(ROWS_PER_BLOCK))
    }

    /// loss, dR and what was read ← y: two launches. Errors: those of [`plan`](Self::plan) and of the launcher.
    pub fn loss_and_gradient<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Loss<'_, T>,
    ) -> Result<()> {
        launch_all(launcher, &self.plan(&tensors)?.map(Some))
    }

    /// What [`loss_and_gradient`](Self::loss_and_gradient) launches. Errors: shape, sizes, overlaps.
    pub fn plan<'a, T: Storage>(&self, tensors: &'a Loss<'_, T>) -> Result<[Launch<'a>; 2]> {
        let workspace = self.workspace()?;
        let (tokens, read) = (self.tokens, [self.tokens, self.width]);
        let mut check = Check::new();
        check.input("y", &tensors.y, tokens * (self.width + self.columns), 1)?;
        check.input("to", &tensors.to, tokens, 1)?;
        check.input("earlier", &tensors.earlier, tokens, 1)?;
        check.input("wanted", &tensors.wanted, tokens * words(self.columns), 1)?;
        check.input("weight", &tensors.weight, 1, 1)?;
        check.output_rows("read", &tensors.read, read, 1)?;
        check.output("gradient", &tensors.gradient, tokens * self.columns, 1)?;
        check.output("loss", &tensors.loss, 1, 1)?;
        check.workspace("workspace", &tensors.workspace, workspace)?;
        let home = check.disjoint(&[])?;
        let sums = tensors.workspace.span();
        let blocks = blocks("tokens", tokens, ROWS_PER_BLOCK)?;
        let of_tokens = Launch::new(
            (FAMILY, kernel_for::<T>(for_each_type!("recall_loss"))),
            [blocks, 1, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.y.span()),
                Arg::Input(tensors.to.span()),
                Arg::Input(tensors.earlier.span()),
                Arg::Input(tensors.wanted.span()),
                Arg::Input(tensors.weight.span()),
                Arg::Output(tensors.read.span(read)),
                Arg::Output(tensors.gradient.span()),
                Arg::Output(sums),
                Arg::I32(tokens as i32),
                Arg::I32(self.width as i32),
                Arg::I32(self.columns as i32),
                tensors.read.stride(),
            ],
        );
        let sum = Launch::new(
            (FAMILY, "recall_sum"),
            [1, 1, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(sums),
                Arg::Output(tensors.loss.span()),
                Arg::I32(blocks as i32),
            ],
        );
        Ok([of_tokens, sum])
    }
}

fn check_sides(rows: &'static str, found: usize, width: usize, columns: usize) -> Result<()> {
    check_rows(rows, found)?;
    for (argument, found) in [("width", width), ("columns", columns)] {
        if !(1..=MAX_WIDTH).contains(&found) {
            let expected = format_args!("1 to {MAX_WIDTH}");
            return Err(Error::value(argument, found, expected));
        }
    }
    Ok(())
}

fn check_rows(argument: &'static str, found: usize) -> Result<()> {
    if found > MAX_ROWS {
        let expected = format_args!("at most {MAX_ROWS}");
        return Err(Error::value(argument, found, expected));
    }
    Ok(())
}
