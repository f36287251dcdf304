//! Linear maps with a low-rank adapter (SPEC section 5): y = x·Wᵀ + b + s·(x̃·Aᵀ)·Bᵀ, s = α/r,
//! where x̃ is x after the adapter's dropout (x itself outside of training).

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};

use crate::{Result, Scalar};

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
    /// b [out].
    pub bias: Option<ArrayView1<'a, T>>,
    /// The adapter, if this projection has one.
    pub adapter: Option<Adapter<'a, T>>,
}

/// The adapter's share alone: xa = x̃·Aᵀ (kept for [`backward_adapter`]), y += s·xa·Bᵀ.
/// `x` [rows, in]; `xa` [rows, rank]; `y` [rows, out].
pub fn forward_adapter<T: Scalar>(
    x: ArrayView2<T>,
    adapter: Adapter<T>,
    xa: ArrayViewMut2<T>,
    y: ArrayViewMut2<T>,
) -> Result<()> {
    let _ = (x, adapter, xa, y);
    todo!()
}

/// Gradients of [`forward_adapter`]: dxa = s·dy·B; da += dxaᵀ·x; db += s·dyᵀ·xa;
/// dx += dxa·A (added, since the frozen weight's share is already there).
/// `dxa` [rows, rank] is scratch.
pub fn backward_adapter<T: Scalar>(
    x: ArrayView2<T>,
    xa: ArrayView2<T>,
    adapter: Adapter<T>,
    dy: ArrayView2<T>,
    dxa: ArrayViewMut2<T>,
    dx: Option<ArrayViewMut2<T>>,
    da: ArrayViewMut2<T>,
    db: ArrayViewMut2<T>,
) -> Result<()> {
    let _ = (x, xa, adapter, dy, dxa, dx, da, db);
    todo!()
}

/// Merges: `merged` = W + s·B·A. Unmerging is using `weight` again: it was never changed.
pub fn merge<T: Scalar>(
    weight: ArrayView2<T>,
    adapter: Adapter<T>,
    merged: ArrayViewMut2<T>,
) -> Result<()> {
    let _ = (weight, adapter, merged);
    todo!()
}
