//! AdamW over a flat arena, the norm of its gradient and clipping. Kernels and equations: `kernels/adamw.cu`;
//! definition: `dtmem_reference::optimiser`.
//!
//! What changes from step to step lies in device memory, so that a CUDA graph can be replayed: [`factors`] of the step,
//! the scale that [`Shape::norm`] leaves there, and that of the losses ([`LossScale`]).

pub use dtmem_reference::optimiser::AdamW;

use super::launch::{Arg, Launch, Launcher, blocks, launch_all};
use super::memory::{Check, Input, Output, Span, Storage, for_each_type, kernel_for, span_or_null};
use super::{Error, Result};

const FAMILY: &str = "adamw";
const THREADS: u32 = 256;
const PER_BLOCK: usize = 1024;
const VECTOR_BYTES: usize = 16;
/// Numbers in [`factors`].
pub const FACTORS: usize = 8;
/// Fixed, not the number of a GPU's processors: the bits of the norm depend on it.
const MAX_NORM_BLOCKS: u32 = 1024;

/// So many steps without an overflow double S.
pub const GROWTH_STEPS: u32 = 2000;
/// S does not grow beyond this.
pub const LARGEST_LOSS_SCALE: f32 = 16_777_216.0;

/// Parameters that lie one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// How many.
    pub parameters: usize,
}

/// The tensors of norm = √Σ gradient².
#[derive(Debug)]
pub struct Norm<'a> {
    /// \[parameters\], from a multiple of 16 bytes.
    pub gradient: Input<'a, f32>,
    /// The norm, and the scale that makes it at most `max_norm`: 1, max_norm/norm, or NaN where the norm is not finite
    /// \[2\].
    pub norm_and_scale: Output<'a, f32>,
    /// Above 0; infinity to clip nothing.
    pub max_norm: f32,
    /// Where `gradient` is that of scaled losses ([`scale_losses`]): norm and scale are those of the losses as they
    /// are.
    pub loss_scale: Option<LossScale<'a>>,
    /// At least [`Shape::workspace`] elements, of any content.
    pub workspace: Output<'a, f32>,
}

/// What losses are multiplied by before they are differentiated, so that gradients in f16 do not underflow. A gradient
/// that overflows halves it, down to 1; [`GROWTH_STEPS`] steps without that double it, up to [`LARGEST_LOSS_SCALE`].
#[derive(Debug)]
pub struct LossScale<'a> {
    /// S, and the good steps since it has changed last \[2\].
    pub state: Output<'a, f32>,
    /// Overwritten with the S that this gradient has \[1\].
    pub used: Output<'a, f32>,
}

/// weights ← weights·S: one launch. `state` as in [`LossScale`]. Errors: a length, an overlap, those of the launcher.
pub fn scale_losses(
    launcher: &impl Launcher,
    state: Input<'_, f32>,
    weights: Output<'_, f32>,
) -> Result<()> {
    let count = weights.len();
    let number = i32::try_from(count)
        .map_err(|_| Error::value("weights", count, "at most 2147483647 elements"))?;
    let mut check = Check::new();
    check.input("state", &state, 2, 1)?;
    check.output("weights", &weights, count, 1)?;
    let home = check.disjoint(&[])?;
    launcher.launch(&Launch::new(
        (FAMILY, "scale_losses"),
        [1, 1, 1],
        [THREADS, 1, 1],
        0,
        home,
        [
            Arg::Input(state.span()),
            Arg::Output(weights.span()),
            Arg::I32(number),
        ],
    ))
}

/// The tensors of one step; all but the first two begin at multiples of 16 bytes.
///
/// m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², p ← p·(1 − lr·decay) − lr·m̂/(√v̂ + ε), with g = gradient·scale.
#[derive(Debug)]
pub struct Step<'a, T> {
    /// [`factors`] of the step \[8\].
    pub factors: Input<'a, f32>,
    /// What gradients are multiplied by \[1\]; nothing where there is none. Where it is NaN, the step changes nothing.
    pub scale: Option<Input<'a, f32>>,
    /// \[parameters\]
    pub gradient: Input<'a, f32>,
    /// p \[parameters\]
    pub parameter: Output<'a, f32>,
    /// m \[parameters\]
    pub first_moment: Output<'a, f32>,
    /// v \[parameters\]
    pub second_moment: Output<'a, f32>,
    /// The new parameters as a narrower type holds them \[parameters\], if a model computes with these.
    pub copy: Option<Output<'a, T>>,
    /// The first so many parameters decay, the others do not.
    pub decayed: usize,
}

/// What a step needs of its hyper-parameters, to be uploaded: β₁, 1−β₁, β₂, 1−β₂, 1 − lr·decay, lr/(1−β₁ᵗ), 1/√(1−β₂ᵗ)
/// and ε, each rounded once. `gradient_scale` is not part of it: see [`Step::scale`].
///
/// Errors: a β outside of [0, 1), step 0.
pub fn factors(hyper: &AdamW) -> Result<[f32; FACTORS]> {
    for (argument, beta) in [("beta1", hyper.beta1), ("beta2", hyper.beta2)] {
        if !(0.0..1.0).contains(&beta) {
            return Err(Error::value(argument, beta, "at least 0 and less than 1"));
        }
    }
    if hyper.step == 0 {
        return Err(Error::value("step", 0, "at least 1"));
    }
    let steps = hyper.step as f64;
    let factors = [
        hyper.beta1,
        1.0 - hyper.beta1,
        hyper.beta2,
        1.0 - hyper.beta2,
        1.0 - hyper.learning_rate * hyper.weight_decay,
        hyper.learning_rate / (1.0 - hyper.beta1.powf(steps)),
        (1.0 - hyper.beta2.powf(steps)).sqrt().recip(),
        hyper.epsilon,
    ];
    Ok(factors.map(|factor| factor as f32))
}

impl Shape {
    /// Errors: more parameters than a grid covers, 2³¹ − 1 blocks of 1024.
    pub fn validate(&self) -> Result<()> {
        self.blocks().map(drop)
    }

    /// f32 elements of the workspace of [`norm`](Self::norm): at most 1024.
    pub fn workspace(&self) -> Result<usize> {
        Ok(self.norm_blocks()? as usize)
    }

    /// norm_and_scale ← gradient: two launches. Errors: those of [`plan_norm`](Self::plan_norm) and of the launcher.
    pub fn norm(&self, launcher: &impl Launcher, tensors: Norm<'_>) -> Result<()> {
        launch_all(launcher, &self.plan_norm(&tensors)?.map(Some))
    }

    /// What [`norm`](Self::norm) launches. Errors: sizes, alignment, overlaps, max_norm.
    pub fn plan_norm<'a>(&self, tensors: &'a Norm<'_>) -> Result<[Launch<'a>; 2]> {
        let blocks = self.norm_blocks()?;
        let max_norm = tensors.max_norm;
        if max_norm.is_nan() || max_norm <= 0.0 {
            return Err(Error::value("max_norm", max_norm, "above 0"));
        }
        let mut check = Check::new();
        check.input("gradient", &tensors.gradient, self.parameters, VECTOR_BYTES)?;
        check.output("norm_and_scale", &tensors.norm_and_scale, 2, 1)?;
        if let Some(LossScale { state, used }) = &tensors.loss_scale {
            check.output("state", state, 2, 1)?;
            check.output("used", used, 1, 1)?;
        }
        check.workspace("workspace", &tensors.workspace, blocks as usize)?;
        let home = check.disjoint(&[])?;
        let partial = tensors.workspace.span();
        let loss_scale = tensors.loss_scale.as_ref();
        let squares = Launch::new(
            (FAMILY, "sum_of_squares"),
            [blocks, 1, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.gradient.span()),
                Arg::Output(partial),
                Arg::I64(self.parameters as i64),
            ],
        );
        let scale = Launch::new(
            (FAMILY, "clip_scale"),
            [1, 1, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(partial),
                Arg::Output(tensors.norm_and_scale.span()),
                Arg::Output(loss_scale.map_or(Span::NULL, |scale| scale.state.span())),
                Arg::Output(loss_scale.map_or(Span::NULL, |scale| scale.used.span())),
                Arg::I32(blocks as i32),
                Arg::F32(max_norm),
                Arg::F32(GROWTH_STEPS as f32),
                Arg::F32(LARGEST_LOSS_SCALE),
            ],
        );
        Ok([squares, scale])
    }

    /// One step: one launch. Errors: those of [`plan_step`](Self::plan_step) and of the launcher.
    pub fn step<T: Storage>(&self, launcher: &impl Launcher, tensors: Step<'_, T>) -> Result<()> {
        launcher.launch(&self.plan_step(&tensors)?)
    }

    /// What [`step`](Self::step) launches. Errors: sizes, alignment, overlaps, more decayed parameters than there are,
    /// a copy that is not narrower.
    pub fn plan_step<'a, T: Storage>(&self, tensors: &'a Step<'_, T>) -> Result<Launch<'a>> {
        let grid = [self.blocks()?, 1, 1];
        let n = self.parameters;
        if tensors.decayed > n {
            let expected = format_args!("at most the {n} parameters");
            return Err(Error::value("decayed", tensors.decayed, expected));
        }
        let mut check = Check::new();
        check.input("factors", &tensors.factors, FACTORS, 1)?;
        if let Some(scale) = &tensors.scale {
            check.input("scale", scale, 1, 1)?;
        }
        check.input("gradient", &tensors.gradient, n, VECTOR_BYTES)?;
        check.output("parameter", &tensors.parameter, n, VECTOR_BYTES)?;
        check.output("first_moment", &tensors.first_moment, n, VECTOR_BYTES)?;
        check.output("second_moment", &tensors.second_moment, n, VECTOR_BYTES)?;
        if let Some(copy) = &tensors.copy {
            if size_of::<T>() == size_of::<f32>() {
                let expected = "none, or one in bf16 or f16";
                return Err(Error::value("copy", "given in f32", expected));
            }
            check.output("copy", copy, n, VECTOR_BYTES)?;
        }
        let home = check.disjoint(&[])?;

        let kernel = match tensors.copy {
            None => "adamw_f32",
            Some(_) => kernel_for::<T>(for_each_type!("adamw")),
        };
        let launch = Launch::new(
            (FAMILY, kernel),
            grid,
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.factors.span()),
                Arg::Input(span_or_null(tensors.scale.as_ref())),
                Arg::Input(tensors.gradient.span()),
                Arg::Output(tensors.parameter.span()),
                Arg::Output(tensors.first_moment.span()),
                Arg::Output(tensors.second_moment.span()),
            ],
        );
        let launch = match &tensors.copy {
            None => launch,
            Some(copy) => launch.and([Arg::Output(copy.span())]),
        };
        Ok(launch.and([Arg::I64(n as i64), Arg::I64(tensors.decayed as i64)]))
    }

    fn blocks(&self) -> Result<u32> {
        blocks("parameters", self.parameters, PER_BLOCK)
    }

    /// One where there are no parameters: their norm is 0.
    fn norm_blocks(&self) -> Result<u32> {
        Ok(self.blocks()?.clamp(1, MAX_NORM_BLOCKS))
    }
}
