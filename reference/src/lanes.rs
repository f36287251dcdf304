//! Sums in a fixed order that the compiler can vectorise.

use ndarray::ArrayView1;

use crate::Scalar;

/// Partial sums kept side by side: enough to fill the vector units and to hide the latency of an
/// addition.
const LANES: usize = 16;

/// Σ_i term(x_i, y_i) in the type `A`. Term i goes to partial sum i mod 16, whatever the strides;
/// the partial sums are added from first to last. `x` and `y` have the same length.
pub(crate) fn sum<T: Scalar, A: Scalar>(
    x: ArrayView1<T>,
    y: ArrayView1<T>,
    term: impl Fn(T, T) -> A,
) -> A {
    let mut partial = [A::zero(); LANES];
    let mut add = |x: &[T], y: &[T]| {
        for ((sum, &x), &y) in partial.iter_mut().zip(x).zip(y) {
            *sum += term(x, y);
        }
    };
    match (x.as_slice(), y.as_slice()) {
        (Some(x), Some(y)) => {
            let (x, x_rest) = x.as_chunks::<LANES>();
            let (y, y_rest) = y.as_chunks::<LANES>();
            for (x, y) in x.iter().zip(y) {
                add(x, y);
            }
            add(x_rest, y_rest);
        }
        _ => {
            for (i, (&x, &y)) in x.iter().zip(y).enumerate() {
                partial[i % LANES] += term(x, y);
            }
        }
    }
    partial.into_iter().sum()
}
