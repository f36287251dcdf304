//! Numbers of each type, and how results and refusals are judged.

use std::fmt::Debug;

use dtmem::ops::{Input, Output, Result, Storage};
use half::{bf16, f16};
use ndarray::{Array, Dimension};
use rand::{RngExt as _, rngs::ChaCha8Rng};

use crate::machines::Cell;

/// A storage type with what a test needs to know of it.
pub trait Number: Storage + Cell + PartialEq + Debug {
    /// The relative error that SPEC section 9 allows.
    const TOLERANCE: f64;
    fn round(x: f64) -> Self;
    fn widen(self) -> f64;
}

impl Number for f32 {
    const TOLERANCE: f64 = 2e-5;
    fn round(x: f64) -> Self {
        x as f32
    }
    fn widen(self) -> f64 {
        f64::from(self)
    }
}

impl Number for bf16 {
    const TOLERANCE: f64 = 1.5e-2;
    fn round(x: f64) -> Self {
        Self::from_f32(x as f32) // from_f64 forgets the low bits of x
    }
    fn widen(self) -> f64 {
        self.to_f64()
    }
}

impl Number for f16 {
    const TOLERANCE: f64 = 1.5e-2;
    fn round(x: f64) -> Self {
        Self::from_f32(x as f32) // from_f64 forgets the low bits of x
    }
    fn widen(self) -> f64 {
        self.to_f64()
    }
}

/// Standard normal numbers as T can hold them.
pub fn draw<T: Number, Sh: ndarray::ShapeBuilder>(
    random: &mut ChaCha8Rng,
    shape: Sh,
) -> Array<f64, Sh::Dim> {
    Array::from_shape_simple_fn(shape, || {
        let uniform: [f64; 2] = [1.0 - random.random::<f64>(), random.random()];
        let normal = (-2.0 * uniform[0].ln()).sqrt() * (std::f64::consts::TAU * uniform[1]).cos();
        T::round(normal).widen()
    })
}

#[track_caller]
pub fn assert_close<T: Number, D: Dimension>(
    name: &str,
    x: &[T],
    reference: &Array<f64, D>,
    tolerance: f64,
) {
    assert_near(name, x, reference, tolerance, 0.0);
}

/// As [`assert_close`], with an error relative to at least `scale`: the norm of what cancels in a
/// result that can be all but zero.
#[track_caller]
pub fn assert_near<T: Number, D: Dimension>(
    name: &str,
    x: &[T],
    reference: &Array<f64, D>,
    tolerance: f64,
    scale: f64,
) {
    assert_eq!(x.len(), reference.len(), "{name}: length");
    let (mut difference, mut norm) = (0.0_f64, 0.0_f64);
    for (&x, &reference) in x.iter().zip(reference) {
        difference += (x.widen() - reference).powi(2);
        norm += reference.powi(2);
    }
    let norm = norm.sqrt().max(scale);
    let error = difference.sqrt() / if norm == 0.0 { 1.0 } else { norm };
    assert!(
        error <= tolerance,
        "{name}: relative error {error:e} above {tolerance:e}"
    );
}

/// Tensors at addresses that nobody reads: plans and errors need no more.
pub fn tensor<T>(address: u64, len: usize) -> Input<'static, T> {
    Input::on_host(address, len)
}

pub fn target<T>(address: u64, len: usize) -> Output<'static, T> {
    Output::on_host(address, len)
}

#[track_caller]
pub fn assert_refused<T>(result: Result<T>, parts: &[&str]) {
    let message = match result {
        Ok(_) => panic!("was planned"),
        Err(error) => error.to_string(),
    };
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}
