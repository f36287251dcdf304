//! Squared error of predicted numbers, with its gradient. Kernels and equations: `kernels/cross_entropy.cu`;
//! definition: `dtmem_reference::squared_error`.

use super::cross_entropy;
use super::launch::{Arg, Launch, Launcher, launch_all};
use super::memory::{Check, Input, Output, Storage, for_each_type, kernel_for};
use super::{Error, Result};

/// Rows of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Up to 2³⁰.
    pub rows: usize,
    /// Numbers in a row: 1 to 2³⁰.
    pub size: usize,
}

/// The tensors of loss_r = (1/size)·Σ(y_r − t_r)² and dy = scale·(2/size)·(y − t).
#[derive(Debug)]
pub struct Tensors<'a, T> {
    /// [rows, size]
    pub y: Input<'a, T>,
    /// [rows, size]
    pub targets: Input<'a, f32>,
    /// \[rows\], negative for a row that counts for nothing, and whose gradient is 0.
    pub known: Input<'a, i32>,
    /// What the sum of the losses is multiplied by before its gradient is taken \[1\].
    pub scale: Input<'a, f32>,
    /// Overwritten [rows, size]; may be y.
    pub dy: Output<'a, T>,
    /// Overwritten: the sum of the losses (not scaled), and 0 \[2\].
    pub metrics: Output<'a, f32>,
    /// At least [`Shape::workspace`] elements, of any content.
    pub workspace: Output<'a, f32>,
}

impl Shape {
    /// Errors: rows or size beyond their bounds.
    pub fn validate(&self) -> Result<()> {
        if !(1..=cross_entropy::MAX_SIDE).contains(&self.size) {
            let expected = format_args!("1 to {}", cross_entropy::MAX_SIDE);
            return Err(Error::value("size", self.size, expected));
        }
        self.as_classes().validate()
    }

    /// Rows are dealt out as those of logits are.
    fn as_classes(&self) -> cross_entropy::Shape {
        cross_entropy::Shape {
            rows: self.rows,
            classes: self.size,
        }
    }

    /// f32 elements of the workspace.
    pub fn workspace(&self) -> Result<usize> {
        self.validate()?;
        self.as_classes().workspace()
    }

    /// metrics and dy ← y: two launches. Errors: those of [`plan`](Self::plan) and of the launcher.
    pub fn loss_and_gradient<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Tensors<'_, T>,
    ) -> Result<()> {
        launch_all(launcher, &self.plan(&tensors)?.map(Some))
    }

    /// What [`loss_and_gradient`](Self::loss_and_gradient) launches. Errors: shape, sizes, overlaps.
    pub fn plan<'a, T: Storage>(&self, tensors: &'a Tensors<'_, T>) -> Result<[Launch<'a>; 2]> {
        let workspace = self.workspace()?;
        let elements = self.rows * self.size;
        let mut check = Check::new();
        check.input("y", &tensors.y, elements, 1)?;
        check.input("targets", &tensors.targets, elements, 1)?;
        check.input("known", &tensors.known, self.rows, 1)?;
        check.input("scale", &tensors.scale, 1, 1)?;
        check.output("dy", &tensors.dy, elements, 1)?;
        check.output("metrics", &tensors.metrics, cross_entropy::METRICS, 1)?;
        check.workspace("workspace", &tensors.workspace, workspace)?;
        let home = check.disjoint(&[("dy", "y")])?;

        let shape = self.as_classes();
        let blocks = shape.blocks()?;
        let partial = tensors.workspace.span();
        let rows = Launch::new(
            (
                cross_entropy::FAMILY,
                kernel_for::<T>(for_each_type!("squared_error")),
            ),
            [blocks, 1, 1],
            [cross_entropy::THREADS as u32, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.y.span()),
                Arg::Input(tensors.targets.span()),
                Arg::Input(tensors.known.span()),
                Arg::Input(tensors.scale.span()),
                Arg::Output(tensors.dy.span()),
                Arg::Output(partial),
                Arg::I32(self.rows as i32),
                Arg::I32(self.size as i32),
                Arg::I32(shape.lanes_per_row() as i32),
            ],
        );
        let metrics = shape.plan_metrics(&tensors.workspace, &tensors.metrics, home)?;
        Ok([rows, metrics])
    }
}
