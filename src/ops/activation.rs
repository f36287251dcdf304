//! Element-wise activations. Kernels: `kernels/activation.cu`; definition: `dtmem_reference::activation`.

use dtmem_reference::activation::Activation;

use super::Result;
use super::launch::{Arg, Launch, Launcher, blocks};
use super::memory::{Check, Input, Output, Storage, for_each_type, kernel_for};

const FAMILY: &str = "activation";
const THREADS: u32 = 256;
const VECTOR_BYTES: usize = 16;

/// Any number of elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Of each tensor.
    pub elements: usize,
}

/// The tensors of y = f(x); all begin at multiples of 16 bytes.
#[derive(Debug)]
pub struct Forward<'a, T> {
    /// f
    pub activation: Activation,
    /// \[elements\]
    pub x: Input<'a, T>,
    /// \[elements\]; may be x.
    pub y: Output<'a, T>,
}

/// The tensors of dy ← dy·f′; all begin at multiples of 16 bytes.
#[derive(Debug)]
pub struct Backward<'a, T> {
    /// f
    pub activation: Activation,
    /// y of the forward pass for ReLU and tanh, x for GELU and OnePlus \[elements\].
    pub kept: Input<'a, T>,
    /// The gradient of y, which becomes that of x \[elements\].
    pub dy: Output<'a, T>,
}

impl Shape {
    /// Errors: more elements than a grid covers, 2³¹ − 1 blocks of 4 KiB.
    pub fn validate<T: Storage>(&self) -> Result<()> {
        self.grid::<T>().map(drop)
    }

    /// y ← x: one launch. Errors: those of [`plan_forward`](Self::plan_forward) and of the launcher.
    pub fn forward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Forward<'_, T>,
    ) -> Result<()> {
        launcher.launch(&self.plan_forward(&tensors)?)
    }

    /// What [`forward`](Self::forward) launches. Errors: sizes, alignment, overlaps.
    pub fn plan_forward<'a, T: Storage>(&self, tensors: &'a Forward<'_, T>) -> Result<Launch<'a>> {
        let grid = self.grid::<T>()?;
        let mut check = Check::new();
        check.input("x", &tensors.x, self.elements, VECTOR_BYTES)?;
        check.output("y", &tensors.y, self.elements, VECTOR_BYTES)?;
        let home = check.disjoint(&[("y", "x")])?;
        Ok(Launch::new(
            (
                FAMILY,
                kernel_for::<T>(for_each_type!("activation_forward")),
            ),
            grid,
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::I32(number(tensors.activation)),
                Arg::Input(tensors.x.span()),
                Arg::Output(tensors.y.span()),
                Arg::I64(self.elements as i64),
            ],
        ))
    }

    /// dy ← dy·f′: one launch. Errors: those of [`plan_backward`](Self::plan_backward) and of the launcher.
    pub fn backward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Backward<'_, T>,
    ) -> Result<()> {
        launcher.launch(&self.plan_backward(&tensors)?)
    }

    /// What [`backward`](Self::backward) launches. Errors: sizes, alignment, overlaps.
    pub fn plan_backward<'a, T: Storage>(
        &self,
        tensors: &'a Backward<'_, T>,
    ) -> Result<Launch<'a>> {
        let grid = self.grid::<T>()?;
        let mut check = Check::new();
        check.input("kept", &tensors.kept, self.elements, VECTOR_BYTES)?;
        check.output("dy", &tensors.dy, self.elements, VECTOR_BYTES)?;
        let home = check.disjoint(&[])?;
        Ok(Launch::new(
            (
                FAMILY,
                kernel_for::<T>(for_each_type!("activation_backward")),
            ),
            grid,
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::I32(number(tensors.activation)),
                Arg::Input(tensors.kept.span()),
                Arg::Output(tensors.dy.span()),
                Arg::I64(self.elements as i64),
            ],
        ))
    }

    fn grid<T: Storage>(&self) -> Result<[u32; 3]> {
        let per_block = THREADS as usize * VECTOR_BYTES / size_of::<T>();
        Ok([blocks("elements", self.elements, per_block)?, 1, 1])
    }
}

/// As the kernels number them.
pub(super) fn number(activation: Activation) -> i32 {
    match activation {
        Activation::Relu => 0,
        Activation::Gelu => 1,
        Activation::Tanh => 2,
        Activation::OnePlus => 3,
    }
}
