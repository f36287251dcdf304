//! Element-wise activations.

use ndarray::{ArrayView2, ArrayViewMut2, Zip};

use crate::error::check_shape;
use crate::{Result, Scalar};

/// Which function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0); its derivative at 0 is 0.
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
    mut y: ArrayViewMut2<T>,
) -> Result<()> {
    check_shape("y", y.shape(), x.shape())?;
    match activation {
        Activation::Relu => map(x, &mut y, |x| if x < T::zero() { T::zero() } else { x }),
        Activation::Gelu => map(x, &mut y, |x| x * normal_cdf(x)),
        Activation::Tanh => map(x, &mut y, T::tanh),
        // log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|), which cannot overflow.
        Activation::OnePlus => map(x, &mut y, |x| {
            T::one() + x.max(T::zero()) + (-x.abs()).exp().ln_1p()
        }),
    }
    Ok(())
}

/// Turns the gradient of y into that of x: dy ← dy·f′(x).
///
/// `x`, `y` = f(x) and `dy` have the same shape. Tanh and ReLU read only `y`, GELU and OnePlus only
/// `x`; whoever kept just that one can pass it for both.
pub fn backward_in_place<T: Scalar>(
    activation: Activation,
    x: ArrayView2<T>,
    y: ArrayView2<T>,
    mut dy: ArrayViewMut2<T>,
) -> Result<()> {
    check_shape("y", y.shape(), x.shape())?;
    check_shape("dy", dy.shape(), x.shape())?;
    let one = T::one();
    match activation {
        Activation::Relu => update(
            y,
            &mut dy,
            |y, dy| if y > T::zero() { dy } else { T::zero() },
        ),
        Activation::Gelu => update(x, &mut dy, |x, dy| dy * (normal_cdf(x) + x * normal_pdf(x))),
        Activation::Tanh => update(y, &mut dy, |y, dy| dy * (one - y * y)),
        // The derivative of log(1 + eˣ) is the logistic function.
        Activation::OnePlus => update(x, &mut dy, |x, dy| dy / (one + (-x).exp())),
    }
    Ok(())
}

/// y = f(x). Row by row, since rows are contiguous even in a range of columns of a wider array.
fn map<T: Scalar>(x: ArrayView2<T>, y: &mut ArrayViewMut2<T>, f: impl Fn(T) -> T) {
    Zip::from(y.rows_mut())
        .and(x.rows())
        .for_each(|y, x| Zip::from(y).and(x).for_each(|y, &x| *y = f(x)));
}

/// y = f(x, y), row by row.
fn update<T: Scalar>(x: ArrayView2<T>, y: &mut ArrayViewMut2<T>, f: impl Fn(T, T) -> T) {
    Zip::from(y.rows_mut())
        .and(x.rows())
        .for_each(|y, x| Zip::from(y).and(x).for_each(|y, &x| *y = f(x, *y)));
}

/// Φ(x) = (1 + erf(x/√2)) / 2
fn normal_cdf<T: Scalar>(x: T) -> T {
    let half = T::from_f64(0.5);
    half + half * (x * T::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf()
}

/// φ(x) = exp(−x²/2) / √(2π)
fn normal_pdf<T: Scalar>(x: T) -> T {
    let scale = 0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
    T::from_f64(scale) * (T::from_f64(-0.5) * x * x).exp()
}
