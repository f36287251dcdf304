//! Element-wise activations.

use ndarray::{ArrayView2, ArrayViewMut2};

use crate::{Result, Scalar};

/// Which function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0)
    Relu,
    /// x·Φ(x), with the error function (not the tanh approximation).
    Gelu,
    /// tanh(x)
    Tanh,
    /// 1 + log(1 + eˣ): the key strength κ of cosine addressing (SPEC section 4).
    OnePlus,
}

/// y = f(x), element by element; `x` and `y` have the same shape.
pub fn forward<T: Scalar>(
    activation: Activation,
    x: ArrayView2<T>,
    y: ArrayViewMut2<T>,
) -> Result<()> {
    let _ = (activation, x, y);
    todo!()
}

/// dx = dy · f′(x). Takes both x and y = f(x): tanh and ReLU only read y, GELU and OnePlus only x.
/// `dx` may not alias; [`backward_in_place`] is the form that overwrites dy.
pub fn backward_in_place<T: Scalar>(
    activation: Activation,
    x: ArrayView2<T>,
    y: ArrayView2<T>,
    dy: ArrayViewMut2<T>,
) -> Result<()> {
    let _ = (activation, x, y, dy);
    todo!()
}
