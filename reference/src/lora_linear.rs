//! Linear maps with a low-rank adapter (SPEC section 5): y = x·Wᵀ + b + s·(x̃·Aᵀ)·Bᵀ, s = α/r,
//! where x̃ is x after the adapter's dropout (x itself outside of training).
//!
//! [`forward_adapter`] and [`backward_adapter`] are the adapter's share alone and take x̃;
//! [`forward_adapters`] and [`backward_adapters`] let every packed sequence have another adapter;
//! [`forward`] and [`backward`] are several whole projections of one x, without dropout.

use std::ops::Range;

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, s};

use crate::error::{check_offsets, check_shape};
use crate::{Error, Result, Scalar, linear};

/// A low-rank update s·B·A of a weight [out, in].
#[derive(Debug, Clone, Copy)]
pub struct Adapter<'a, T> {
    /// A [rank, in].
    pub a: ArrayView2<'a, T>,
    /// B [out, rank].
    pub b: ArrayView2<'a, T>,
    /// s = α/r.
    pub scaling: T,
}

/// One of several projections of the same input.
#[derive(Debug, Clone, Copy)]
pub struct Projection<'a, T> {
    /// W [out, in].
    pub weight: ArrayView2<'a, T>,
    /// b \[out\].
    pub bias: Option<ArrayView1<'a, T>>,
    /// The adapter, if this projection has one.
    pub adapter: Option<Adapter<'a, T>>,
}

/// Where the gradients of one [`Projection`] are added. Without a place none is computed; an
/// adapter always has one.
#[derive(Debug)]
pub struct ProjectionGradients<'a, T> {
    /// Of W.
    pub weight: Option<ArrayViewMut2<'a, T>>,
    /// Of b.
    pub bias: Option<ArrayViewMut1<'a, T>>,
    /// Of A and B.
    pub adapter: Option<(ArrayViewMut2<'a, T>, ArrayViewMut2<'a, T>)>,
}

impl<T: Scalar> Adapter<'_, T> {
    /// r.
    fn rank(&self) -> usize {
        self.a.nrows()
    }

    /// Checks that A·x and B·(A·x) exist for a map of this size.
    fn check(&self, inputs: usize, outputs: usize) -> Result<()> {
        let rank = self.rank();
        check_shape("adapter.a", self.a.shape(), &[rank, inputs])?;
        check_shape("adapter.b", self.b.shape(), &[outputs, rank])
    }
}

/// The adapter's share alone: xa = x̃·Aᵀ (kept for [`backward_adapter`]), y += s·xa·Bᵀ.
/// `x` [rows, in]; `xa` [rows, rank]; `y` [rows, out].
pub fn forward_adapter<T: Scalar>(
    x: ArrayView2<T>,
    adapter: Adapter<T>,
    mut xa: ArrayViewMut2<T>,
    mut y: ArrayViewMut2<T>,
) -> Result<()> {
    let (rows, inputs) = x.dim();
    let outputs = y.ncols();
    adapter.check(inputs, outputs)?;
    check_shape("xa", xa.shape(), &[rows, adapter.rank()])?;
    check_shape("y", y.shape(), &[rows, outputs])?;
    general_mat_mul(T::one(), &x, &adapter.a.t(), T::zero(), &mut xa);
    general_mat_mul(adapter.scaling, &xa, &adapter.b.t(), T::one(), &mut y);
    Ok(())
}

/// Gradients of [`forward_adapter`]: dxa = s·dy·B; da += dxaᵀ·x̃; db += s·dyᵀ·xa;
/// dx += dxa·A (added, since the frozen weight's share is already there).
/// `dxa` [rows, rank] is scratch.
pub fn backward_adapter<T: Scalar>(
    x: ArrayView2<T>,
    xa: ArrayView2<T>,
    adapter: Adapter<T>,
    dy: ArrayView2<T>,
    mut dxa: ArrayViewMut2<T>,
    dx: Option<ArrayViewMut2<T>>,
    mut da: ArrayViewMut2<T>,
    mut db: ArrayViewMut2<T>,
) -> Result<()> {
    let (rows, inputs) = x.dim();
    let (outputs, rank) = (dy.ncols(), adapter.rank());
    adapter.check(inputs, outputs)?;
    check_shape("xa", xa.shape(), &[rows, rank])?;
    check_shape("dy", dy.shape(), &[rows, outputs])?;
    check_shape("dxa", dxa.shape(), &[rows, rank])?;
    check_shape("da", da.shape(), &[rank, inputs])?;
    check_shape("db", db.shape(), &[outputs, rank])?;
    if let Some(dx) = &dx {
        check_shape("dx", dx.shape(), &[rows, inputs])?;
    }
    general_mat_mul(adapter.scaling, &dy, &adapter.b, T::zero(), &mut dxa);
    general_mat_mul(T::one(), &dxa.t(), &x, T::one(), &mut da);
    general_mat_mul(adapter.scaling, &dy.t(), &xa, T::one(), &mut db);
    if let Some(mut dx) = dx {
        general_mat_mul(T::one(), &dxa, &adapter.a, T::one(), &mut dx);
    }
    Ok(())
}

/// Adapters of one weight, and which of them each sequence of a pack has: several tasks in one
/// batch.
#[derive(Debug, Clone, Copy)]
pub struct Adapters<'a, 'b, T> {
    /// Of equal inputs and outputs.
    pub list: &'a [Adapter<'b, T>],
    /// Where each sequence begins: one offset more than there are sequences.
    pub cu_seqlens: &'a [i32],
    /// Of each sequence, its place in `list`; negative: none.
    pub index: &'a [i32],
}

impl<'a, T: Scalar> Adapters<'a, '_, T> {
    fn check(&self, rows: usize) -> Result<()> {
        check_offsets("cu_seqlens", self.cu_seqlens, rows)?;
        check_shape("index", &[self.index.len()], &[self.cu_seqlens.len() - 1])?;
        for (sequence, &index) in self.index.iter().enumerate() {
            if usize::try_from(index).is_ok_and(|index| index >= self.list.len()) {
                let found = format!("{index} at {sequence}");
                let expected = format!("less than {} adapters", self.list.len());
                return Err(Error::value("index", found, expected));
            }
        }
        Ok(())
    }

    /// Rows of each sequence, and its adapter.
    fn sequences(&self) -> impl Iterator<Item = (Range<usize>, Option<usize>)> + use<'a, T> {
        let ranges = self.cu_seqlens.windows(2);
        ranges.zip(self.index).map(|(range, &index)| {
            (
                range[0] as usize..range[1] as usize,
                usize::try_from(index).ok(),
            )
        })
    }
}

/// [`forward_adapter`] on the rows of each sequence, with the adapter of that sequence. Without one
/// y stays as it is, and xa becomes 0.
pub fn forward_adapters<T: Scalar>(
    x: ArrayView2<T>,
    adapters: Adapters<T>,
    mut xa: ArrayViewMut2<T>,
    mut y: ArrayViewMut2<T>,
) -> Result<()> {
    adapters.check(x.nrows())?;
    check_shape("xa", &[xa.nrows()], &[x.nrows()])?;
    check_shape("y", &[y.nrows()], &[x.nrows()])?;
    for (rows, index) in adapters.sequences() {
        let rows = s![rows, ..];
        let mut xa = xa.slice_mut(&rows);
        match index {
            Some(index) => {
                forward_adapter(x.slice(&rows), adapters.list[index], xa, y.slice_mut(&rows))?
            }
            None => xa.fill(T::zero()),
        }
    }
    Ok(())
}

/// [`backward_adapter`] on the rows of each sequence; `gradients` are dA and dB of each adapter.
/// Without one dx stays as it is, and dxa becomes 0.
pub fn backward_adapters<T: Scalar>(
    x: ArrayView2<T>,
    xa: ArrayView2<T>,
    adapters: Adapters<T>,
    dy: ArrayView2<T>,
    mut dxa: ArrayViewMut2<T>,
    mut dx: Option<ArrayViewMut2<T>>,
    gradients: &mut [(ArrayViewMut2<T>, ArrayViewMut2<T>)],
) -> Result<()> {
    adapters.check(x.nrows())?;
    check_shape("gradients", &[gradients.len()], &[adapters.list.len()])?;
    for (name, rows) in [
        ("xa", xa.nrows()),
        ("dy", dy.nrows()),
        ("dxa", dxa.nrows()),
        ("dx", dx.as_ref().map_or(x.nrows(), |dx| dx.nrows())),
    ] {
        check_shape(name, &[rows], &[x.nrows()])?;
    }
    for (rows, index) in adapters.sequences() {
        let rows = s![rows, ..];
        let mut dxa = dxa.slice_mut(&rows);
        let Some(index) = index else {
            dxa.fill(T::zero());
            continue;
        };
        let (da, db) = &mut gradients[index];
        backward_adapter(
            x.slice(&rows),
            xa.slice(&rows),
            adapters.list[index],
            dy.slice(&rows),
            dxa,
            dx.as_mut().map(|dx| dx.slice_mut(&rows)),
            da.view_mut(),
            db.view_mut(),
        )?;
    }
    Ok(())
}

/// Several projections of one input: output_p = x·W_pᵀ + b_p + s_p·(x·A_pᵀ)·B_pᵀ.
///
/// `x` [rows, in]; `outputs`, one per projection, [rows, out_p]; `xa`, one per projection, [rows,
/// rank_p] (no column where there is no adapter), is kept for [`backward`].
pub fn forward<T: Scalar>(
    x: ArrayView2<T>,
    projections: &[Projection<T>],
    xa: &mut [ArrayViewMut2<T>],
    outputs: &mut [ArrayViewMut2<T>],
) -> Result<()> {
    check_shape("xa", &[xa.len()], &[projections.len()])?;
    check_shape("outputs", &[outputs.len()], &[projections.len()])?;
    for ((projection, xa), y) in projections.iter().zip(xa).zip(outputs) {
        linear::forward(
            x,
            projection.weight,
            projection.bias,
            T::zero(),
            y.view_mut(),
        )?;
        match projection.adapter {
            Some(adapter) => forward_adapter(x, adapter, xa.view_mut(), y.view_mut())?,
            None => check_shape("xa", xa.shape(), &[x.nrows(), 0])?,
        }
    }
    Ok(())
}

/// Gradients of [`forward`]: dx is overwritten with the sum over the projections, what stands in
/// `gradients` is added to.
///
/// `dy`, one per projection, [rows, out_p]; `xa` as [`forward`] left it; `dxa`, of the same shapes,
/// is scratch.
pub fn backward<T: Scalar>(
    x: ArrayView2<T>,
    projections: &[Projection<T>],
    xa: &[ArrayView2<T>],
    dy: &[ArrayView2<T>],
    dxa: &mut [ArrayViewMut2<T>],
    mut dx: ArrayViewMut2<T>,
    gradients: &mut [ProjectionGradients<T>],
) -> Result<()> {
    check_shape("xa", &[xa.len()], &[projections.len()])?;
    check_shape("dy", &[dy.len()], &[projections.len()])?;
    check_shape("dxa", &[dxa.len()], &[projections.len()])?;
    check_shape("gradients", &[gradients.len()], &[projections.len()])?;
    check_shape("dx", dx.shape(), x.shape())?;
    dx.fill(T::zero());
    let kept = xa.iter().zip(dxa).zip(dy);
    for ((projection, ((xa, dxa), dy)), gradients) in projections.iter().zip(kept).zip(gradients) {
        linear::backward_input(*dy, projection.weight, T::one(), dx.view_mut())?;
        if let Some(dweight) = &mut gradients.weight {
            linear::backward_weight(*dy, x, dweight.view_mut())?;
        }
        if let Some(dbias) = &mut gradients.bias {
            linear::backward_bias(*dy, dbias.view_mut())?;
        }
        match (projection.adapter, &mut gradients.adapter) {
            (Some(adapter), Some((da, db))) => backward_adapter(
                x,
                *xa,
                adapter,
                *dy,
                dxa.view_mut(),
                Some(dx.view_mut()),
                da.view_mut(),
                db.view_mut(),
            )?,
            (None, None) => {}
            (adapter, place) => {
                let having = |yes: bool| if yes { "an adapter" } else { "no adapter" };
                return Err(Error::value(
                    "gradients",
                    having(place.is_some()),
                    having(adapter.is_some()),
                ));
            }
        }
    }
    Ok(())
}

/// Merges: `merged` = W + s·B·A. Unmerging is using `weight` again: it was never changed.
///
/// `weight`, `merged` [out, in]. Computed in `T`: widen a bf16 weight to f32 first and round the
/// result, or small updates are lost.
pub fn merge<T: Scalar>(
    weight: ArrayView2<T>,
    adapter: Adapter<T>,
    mut merged: ArrayViewMut2<T>,
) -> Result<()> {
    let (outputs, inputs) = weight.dim();
    adapter.check(inputs, outputs)?;
    check_shape("merged", merged.shape(), &[outputs, inputs])?;
    merged.assign(&weight);
    general_mat_mul(
        adapter.scaling,
        &adapter.b,
        &adapter.a,
        T::one(),
        &mut merged,
    );
    Ok(())
}
