//! Rows of a packed batch: tokens put together from their embeddings, taken apart again, and rows copied by index.
//! Kernels and equations: `kernels/tokens.cu`; definition: the CPU backend's `assemble_tokens` and what stands around
//! it.
//!
//! What a batch looks like lies in device memory, and no launch depends on its content, so that a CUDA graph can be
//! replayed with the next one; a shorter batch is padded with tokens of no kind and rows without a token.

use super::launch::{Arg, Launch, Launcher};
use super::memory::{
    Check, Input, Output, Rows, Span, Storage, for_each_type, kernel_for, span_or_null,
};
use super::{Error, Result};

const FAMILY: &str = "tokens";
const THREADS: u32 = 256;
const ROWS_PER_BLOCK: usize = 8;
const COLUMNS_PER_BLOCK: usize = 256;
/// Row numbers of the kernels are 32-bit.
const MAX_ROWS: usize = 1 << 30;
/// So that the blocks along the columns have numbers below 65536.
const MAX_WIDTH: usize = 65535 * COLUMNS_PER_BLOCK;

/// A packed batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Tokens, up to 2³⁰.
    pub tokens: usize,
    /// Rows of observations, up to 2³⁰.
    pub observations: usize,
    /// Rows of actions, up to 2³⁰.
    pub actions: usize,
    /// Rows of returns to go, up to 2³⁰.
    pub returns: usize,
    /// Time steps that have a position, up to 2³⁰.
    pub steps: usize,
    /// Numbers in a row, 1 to about 2²⁴.
    pub width: usize,
}

/// The tensors of out = embedding of each token's kind + position of its time step.
#[derive(Debug)]
pub struct Assemble<'a, T> {
    /// Kind of each token, as `TokenKind` numbers them: 0 observation, 1 action, 2 return; anything else is padding,
    /// whose row becomes 0 \[tokens\].
    pub kinds: Input<'a, u8>,
    /// Row of each token among those of its kind \[tokens\].
    pub rows: Input<'a, i32>,
    /// Time step of each token \[tokens\].
    pub times: Input<'a, i32>,
    /// [observations, width]
    pub observations: Input<'a, T>,
    /// [actions, width]
    pub actions: Input<'a, T>,
    /// [returns, width]; not needed where there are none.
    pub returns: Option<Input<'a, T>>,
    /// [steps, width]
    pub positions: Input<'a, T>,
    /// Overwritten [tokens, width].
    pub out: Output<'a, T>,
}

/// The tensors of the embeddings' gradients: those of their tokens.
#[derive(Debug)]
pub struct TakeApart<'a, T> {
    /// [tokens, width]
    pub dout: Input<'a, T>,
    /// The observations' part.
    pub observations: Part<'a, T>,
    /// The actions' part.
    pub actions: Part<'a, T>,
    /// The returns' part; not needed where there are none.
    pub returns: Option<Part<'a, T>>,
}

/// The rows of one kind.
#[derive(Debug)]
pub struct Part<'a, T> {
    /// Packed token of each row \[rows of that kind\]; negative for a row without one, which becomes 0.
    pub tokens: Input<'a, i32>,
    /// Overwritten [rows of that kind, width].
    pub gradient: Output<'a, T>,
}

/// The tensors of dpositions\[s\] += Σ dout over the tokens of time step s.
#[derive(Debug)]
pub struct PositionGradient<'a, T> {
    /// [tokens, width]
    pub dout: Input<'a, T>,
    /// Where the tokens of each time step begin in `step_tokens` [steps + 1].
    pub step_offsets: Input<'a, i32>,
    /// Tokens of all time steps, ascending in each; as many as `step_offsets` says, or more. See [`by_time_step`].
    pub step_tokens: Input<'a, i32>,
    /// Added to [steps, width].
    pub dpositions: Output<'a, f32>,
}

/// The time steps' tokens for [`PositionGradient`]: offsets [steps + 1] and tokens, from the time step of each token.
/// Tokens of other steps stand in none.
pub fn by_time_step(times: &[i32], steps: usize) -> (Vec<i32>, Vec<i32>) {
    let step = |time: i32| usize::try_from(time).ok().filter(|&step| step < steps);
    let mut offsets = vec![0; steps + 1];
    for step in times.iter().filter_map(|&time| step(time)) {
        offsets[step + 1] += 1;
    }
    for step in 0..steps {
        offsets[step + 1] += offsets[step];
    }
    let mut next = offsets.clone();
    let mut tokens = vec![0; offsets[steps] as usize];
    for (token, &time) in (0..).zip(times) {
        if let Some(step) = step(time) {
            tokens[next[step] as usize] = token;
            next[step] += 1;
        }
    }
    (offsets, tokens)
}

impl Shape {
    /// Errors: a side beyond its bounds.
    pub fn validate(&self) -> Result<()> {
        for (argument, found) in [
            ("tokens", self.tokens),
            ("observations", self.observations),
            ("actions", self.actions),
            ("returns", self.returns),
            ("steps", self.steps),
        ] {
            check_rows(argument, found)?;
        }
        check_width(self.width)
    }

    fn check_no_returns(&self) -> Result<()> {
        match self.returns {
            0 => Ok(()),
            rows => Err(Error::value("returns", rows, "0 where they are left out")),
        }
    }

    /// out ← embeddings and positions: one launch. Errors: those of [`plan_assemble`](Self::plan_assemble) and of the
    /// launcher.
    pub fn assemble<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Assemble<'_, T>,
    ) -> Result<()> {
        launcher.launch(&self.plan_assemble(&tensors)?)
    }

    /// What [`assemble`](Self::assemble) launches. Errors: shape, sizes, overlaps.
    pub fn plan_assemble<'a, T: Storage>(
        &self,
        tensors: &'a Assemble<'_, T>,
    ) -> Result<Launch<'a>> {
        self.validate()?;
        let mut check = Check::new();
        check.input("kinds", &tensors.kinds, self.tokens, 1)?;
        check.input("rows", &tensors.rows, self.tokens, 1)?;
        check.input("times", &tensors.times, self.tokens, 1)?;
        for (name, input, rows) in [
            (
                "observations",
                Some(&tensors.observations),
                self.observations,
            ),
            ("actions", Some(&tensors.actions), self.actions),
            ("returns", tensors.returns.as_ref(), self.returns),
            ("positions", Some(&tensors.positions), self.steps),
        ] {
            match input {
                Some(input) => check.input(name, input, rows * self.width, 1)?,
                None => self.check_no_returns()?,
            }
        }
        check.output("out", &tensors.out, self.tokens * self.width, 1)?;
        let home = check.disjoint(&[])?;
        Ok(Launch::new(
            (FAMILY, kernel_for::<T>(for_each_type!("tokens_assemble"))),
            grid(self.tokens, self.width),
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.kinds.span()),
                Arg::Input(tensors.rows.span()),
                Arg::Input(tensors.times.span()),
                Arg::Input(tensors.observations.span()),
                Arg::Input(tensors.actions.span()),
                Arg::Input(span_or_null(tensors.returns.as_ref())),
                Arg::Input(tensors.positions.span()),
                Arg::Output(tensors.out.span()),
                Arg::I32(self.tokens as i32),
                Arg::I32(self.width as i32),
            ],
        ))
    }

    /// Gradients of the embeddings ← dout: one launch. Errors: those of [`plan_take_apart`](Self::plan_take_apart) and
    /// of the launcher.
    pub fn take_apart<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: TakeApart<'_, T>,
    ) -> Result<()> {
        launcher.launch(&self.plan_take_apart(&tensors)?)
    }

    /// What [`take_apart`](Self::take_apart) launches. Errors: shape, sizes, overlaps.
    pub fn plan_take_apart<'a, T: Storage>(
        &self,
        tensors: &'a TakeApart<'_, T>,
    ) -> Result<Launch<'a>> {
        self.validate()?;
        let mut check = Check::new();
        check.input("dout", &tensors.dout, self.tokens * self.width, 1)?;
        for (names, part, rows) in [
            (
                ["observation_tokens", "dobservations"],
                Some(&tensors.observations),
                self.observations,
            ),
            (
                ["action_tokens", "dactions"],
                Some(&tensors.actions),
                self.actions,
            ),
            (
                ["return_tokens", "dreturns"],
                tensors.returns.as_ref(),
                self.returns,
            ),
        ] {
            let Some(part) = part else {
                self.check_no_returns()?;
                continue;
            };
            check.input(names[0], &part.tokens, rows, 1)?;
            check.output(names[1], &part.gradient, rows * self.width, 1)?;
        }
        let home = check.disjoint(&[])?;
        let rows = self.observations + self.actions + self.returns;
        let returns = tensors.returns.as_ref();
        Ok(Launch::new(
            (FAMILY, kernel_for::<T>(for_each_type!("tokens_take_apart"))),
            grid(rows, self.width),
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.dout.span()),
                Arg::Input(tensors.observations.tokens.span()),
                Arg::Input(tensors.actions.tokens.span()),
                Arg::Input(span_or_null(returns.map(|part| &part.tokens))),
                Arg::Output(tensors.observations.gradient.span()),
                Arg::Output(tensors.actions.gradient.span()),
                Arg::Output(returns.map_or(Span::NULL, |part| part.gradient.span())),
                Arg::I32(self.observations as i32),
                Arg::I32(self.actions as i32),
                Arg::I32(self.returns as i32),
                Arg::I32(self.width as i32),
            ],
        ))
    }

    /// dpositions are added to: one launch. Errors: those of [`plan_position_gradient`](Self::plan_position_gradient)
    /// and of the launcher.
    pub fn position_gradient<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: PositionGradient<'_, T>,
    ) -> Result<()> {
        launcher.launch(&self.plan_position_gradient(&tensors)?)
    }

    /// What [`position_gradient`](Self::position_gradient) launches. Errors: shape, sizes, overlaps.
    pub fn plan_position_gradient<'a, T: Storage>(
        &self,
        tensors: &'a PositionGradient<'_, T>,
    ) -> Result<Launch<'a>> {
        self.validate()?;
        let mut check = Check::new();
        check.input("dout", &tensors.dout, self.tokens * self.width, 1)?;
        check.input("step_offsets", &tensors.step_offsets, self.steps + 1, 1)?;
        check.any_input("step_tokens", &tensors.step_tokens)?;
        check.output(
            "dpositions",
            &tensors.dpositions,
            self.steps * self.width,
            1,
        )?;
        let home = check.disjoint(&[])?;
        let [_, columns, _] = grid(0, self.width);
        Ok(Launch::new(
            (
                FAMILY,
                kernel_for::<T>(for_each_type!("tokens_position_gradient")),
            ),
            [self.steps as u32, columns, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.dout.span()),
                Arg::Input(tensors.step_offsets.span()),
                Arg::Input(tensors.step_tokens.span()),
                Arg::Output(tensors.dpositions.span()),
                Arg::I32(self.width as i32),
            ],
        ))
    }
}

/// Rows to copy by index: a gather, a scatter, or both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyShape {
    /// Rows to copy, up to 2³⁰.
    pub rows: usize,
    /// Numbers in a row, 1 to about 2²⁴.
    pub width: usize,
    /// Rows of x, up to 2³⁰.
    pub x_rows: usize,
    /// Rows of y, up to 2³⁰.
    pub y_rows: usize,
}

/// The tensors of y\[to\[i\]\] = x\[from\[i\]\].
#[derive(Debug)]
pub struct Copy<'a, T> {
    /// [x_rows, width]
    pub x: Rows<Input<'a, T>>,
    /// Below x_rows, or negative for a row of zeros \[rows\]; without it row i is read.
    pub from: Option<Input<'a, i32>>,
    /// Below y_rows, no two alike, or negative for nothing \[rows\]; without it row i is written.
    pub to: Option<Input<'a, i32>>,
    /// [y_rows, width]; rows that `to` does not name stay as they are.
    pub y: Rows<Output<'a, T>>,
}

impl CopyShape {
    /// Errors: a side beyond its bounds.
    pub fn validate(&self) -> Result<()> {
        for (argument, found) in [
            ("rows", self.rows),
            ("x_rows", self.x_rows),
            ("y_rows", self.y_rows),
        ] {
            check_rows(argument, found)?;
        }
        check_width(self.width)
    }

    /// y ← x: one launch. Errors: those of [`plan`](Self::plan) and of the launcher.
    pub fn copy<T: Storage>(&self, launcher: &impl Launcher, tensors: Copy<'_, T>) -> Result<()> {
        launcher.launch(&self.plan(&tensors)?)
    }

    /// What [`copy`](Self::copy) launches. Errors: shape, sizes, overlaps, more rows than there are where no index says
    /// which.
    pub fn plan<'a, T: Storage>(&self, tensors: &'a Copy<'_, T>) -> Result<Launch<'a>> {
        self.validate()?;
        let (x, y) = ([self.x_rows, self.width], [self.y_rows, self.width]);
        let mut check = Check::new();
        check.input_rows("x", &tensors.x, x, 1)?;
        for (name, index, rows) in [
            ("from", &tensors.from, self.x_rows),
            ("to", &tensors.to, self.y_rows),
        ] {
            match index {
                Some(index) => check.input(name, index, self.rows, 1)?,
                None if self.rows > rows => {
                    let expected = format_args!("at most {rows} without `{name}`");
                    return Err(Error::value("rows", self.rows, expected));
                }
                None => {}
            }
        }
        check.output_rows("y", &tensors.y, y, 1)?;
        let home = check.disjoint(&[])?;
        Ok(Launch::new(
            (FAMILY, kernel_for::<T>(for_each_type!("tokens_copy_rows"))),
            grid(self.rows, self.width),
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.x.span(x)),
                Arg::Input(span_or_null(tensors.from.as_ref())),
                Arg::Input(span_or_null(tensors.to.as_ref())),
                Arg::Output(tensors.y.span(y)),
                Arg::I32(self.rows as i32),
                Arg::I32(self.width as i32),
                tensors.x.stride(),
                tensors.y.stride(),
            ],
        ))
    }
}

fn check_rows(argument: &'static str, found: usize) -> Result<()> {
    if found > MAX_ROWS {
        let expected = format_args!("at most {MAX_ROWS}");
        return Err(Error::value(argument, found, expected));
    }
    Ok(())
}

fn check_width(width: usize) -> Result<()> {
    if !(1..=MAX_WIDTH).contains(&width) {
        let expected = format_args!("1 to {MAX_WIDTH}");
        return Err(Error::value("width", width, expected));
    }
    Ok(())
}

/// A warp for 256 columns of each row.
fn grid(rows: usize, width: usize) -> [u32; 3] {
    let columns = width.div_ceil(COLUMNS_PER_BLOCK);
    [rows.div_ceil(ROWS_PER_BLOCK) as u32, columns as u32, 1]
}
