//! Softmax cross-entropy of integer targets, with its gradient. Kernels and equations: `kernels/cross_entropy.cu`;
//! definition: `dtmem_reference::cross_entropy`.

use super::launch::{Arg, Launch, Launcher, blocks, launch_all};
use super::memory::{Check, Home, Input, Output, Storage, for_each_type, kernel_for};
use super::{Error, Result};

pub(super) const FAMILY: &str = "cross_entropy";
pub(super) const THREADS: usize = 256;
const WARP: usize = 32;
/// Row and class numbers of the kernels are 32-bit.
pub(super) const MAX_SIDE: usize = 1 << 30;
/// Σ of the losses and number of the hits.
pub(super) const METRICS: usize = 2;

/// Rows of logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Up to 2³⁰.
    pub rows: usize,
    /// Logits in a row: 1 to 2³⁰.
    pub classes: usize,
}

/// The tensors of loss_r = −log softmax(logits_r)\[target_r\] and dlogits = scale·(softmax(logits) − onehot(target)).
#[derive(Debug)]
pub struct Tensors<'a, T> {
    /// [rows, classes]
    pub logits: Input<'a, T>,
    /// \[rows\], each a class ([`Shape::validate_targets`]), or negative: such a row counts for nothing, and its
    /// gradient is 0.
    pub targets: Input<'a, i32>,
    /// What the sum of the losses is multiplied by before its gradient is taken \[1\].
    pub scale: Input<'a, f32>,
    /// Overwritten [rows, classes]; may be logits.
    pub dlogits: Output<'a, T>,
    /// Overwritten: the sum of the losses (not scaled), and the number of rows whose largest logit, the first of
    /// equals, is the target \[2\].
    pub metrics: Output<'a, f32>,
    /// At least [`Shape::workspace`] elements, of any content.
    pub workspace: Output<'a, f32>,
}

impl Shape {
    /// Errors: rows or classes beyond their bounds.
    pub fn validate(&self) -> Result<()> {
        if self.rows > MAX_SIDE {
            let expected = format_args!("at most {MAX_SIDE}");
            return Err(Error::value("rows", self.rows, expected));
        }
        if !(1..=MAX_SIDE).contains(&self.classes) {
            let expected = format_args!("1 to {MAX_SIDE}");
            return Err(Error::value("classes", self.classes, expected));
        }
        Ok(())
    }

    /// Checks on the host what the device's array is to hold: targets \[rows\], each negative or a class. Errors: those
    /// of [`validate`](Self::validate), and what does not hold.
    pub fn validate_targets(&self, targets: &[i32]) -> Result<()> {
        self.validate()?;
        if targets.len() != self.rows {
            return Err(Error::Length {
                argument: "targets",
                found: targets.len(),
                expected: self.rows,
            });
        }
        let beyond = |&target: &i32| usize::try_from(target).is_ok_and(|t| t >= self.classes);
        match targets.iter().position(beyond) {
            None => Ok(()),
            Some(row) => Err(Error::value(
                "targets",
                format_args!("{} at row {row}", targets[row]),
                format_args!("negative or a class below {}", self.classes),
            )),
        }
    }

    /// f32 elements of the workspace: at most rows/4, rounded up to a pair.
    pub fn workspace(&self) -> Result<usize> {
        self.validate()?;
        Ok(METRICS * self.blocks()? as usize)
    }

    /// metrics and dlogits ← logits: two launches. Errors: those of [`plan`](Self::plan) and of the launcher.
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
        let size = self.rows * self.classes;
        let mut check = Check::new();
        check.input("logits", &tensors.logits, size, 1)?;
        check.input("targets", &tensors.targets, self.rows, 1)?;
        check.input("scale", &tensors.scale, 1, 1)?;
        check.output("dlogits", &tensors.dlogits, size, 1)?;
        check.output("metrics", &tensors.metrics, METRICS, 1)?;
        check.workspace("workspace", &tensors.workspace, workspace)?;
        let home = check.disjoint(&[("dlogits", "logits")])?;

        let blocks = self.blocks()?;
        let partial = tensors.workspace.span();
        let rows = Launch::new(
            (FAMILY, kernel_for::<T>(for_each_type!("cross_entropy"))),
            [blocks, 1, 1],
            [THREADS as u32, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.logits.span()),
                Arg::Input(tensors.targets.span()),
                Arg::Input(tensors.scale.span()),
                Arg::Output(tensors.dlogits.span()),
                Arg::Output(partial),
                Arg::I32(self.rows as i32),
                Arg::I32(self.classes as i32),
                Arg::I32(self.lanes_per_row() as i32),
            ],
        );
        let metrics = self.plan_metrics(&tensors.workspace, &tensors.metrics, home)?;
        Ok([rows, metrics])
    }

    /// Adds up the blocks' partial sums.
    pub(super) fn plan_metrics<'a>(
        &self,
        partial: &'a Output<'_, f32>,
        metrics: &'a Output<'_, f32>,
        home: Home,
    ) -> Result<Launch<'a>> {
        Ok(Launch::new(
            (FAMILY, "cross_entropy_metrics"),
            [METRICS as u32, 1, 1],
            [THREADS as u32, 1, 1],
            0,
            home,
            [
                Arg::Input(partial.span()),
                Arg::Output(metrics.span()),
                Arg::I32(self.blocks()? as i32),
            ],
        ))
    }

    pub(super) fn lanes_per_row(&self) -> usize {
        self.classes.next_power_of_two().min(WARP)
    }

    pub(super) fn blocks(&self) -> Result<u32> {
        blocks("rows", self.rows, THREADS / self.lanes_per_row())
    }
}
