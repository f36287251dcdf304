//! What the tests of every operation share: seeded arrays, the error measure of SPEC section 9,
//! finite differences and the fixture files.
#![allow(dead_code)] // each test binary uses its own part

use std::path::Path;

use dtmem_reference::Scalar;
use ndarray::{Array, ArrayBase, ArrayD, Data, Dimension, IntoDimension, Ix1};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// A small seeded generator (SplitMix64): the same seed draws the same arrays everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Uniform in 0 .. end.
    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Standard normal entries, rounded to `T`.
    pub fn array<T: Scalar, Sh: IntoDimension>(&mut self, shape: Sh) -> Array<T, Sh::Dim> {
        Array::from_shape_simple_fn(shape.into_dimension(), || T::from_f64(self.normal()))
    }
}

/// An output buffer that only a complete overwrite makes valid.
pub fn poisoned<T: Scalar, Sh: IntoDimension>(shape: Sh) -> Array<T, Sh::Dim> {
    Array::from_elem(shape.into_dimension(), T::nan())
}

/// The same numbers in another type.
pub fn cast<T: Scalar, U: Scalar, D: Dimension>(x: &Array<T, D>) -> Array<U, D> {
    x.map(|&x| U::from_f64(x.to_f64()))
}

/// ‖x − reference‖₂/‖reference‖₂, the absolute error where the reference is zero, ∞ for a NaN.
/// Entries that are the same infinity agree and are left out (lse of a row that sees no key).
pub fn relative_error<T: Scalar, S, R, D: Dimension>(
    x: &ArrayBase<S, D>,
    reference: &ArrayBase<R, D>,
) -> f64
where
    S: Data<Elem = T>,
    R: Data<Elem = f64>,
{
    assert_eq!(x.shape(), reference.shape());
    let (mut difference, mut norm) = (0.0_f64, 0.0_f64);
    for (&x, &reference) in x.iter().zip(reference) {
        let x = x.to_f64();
        if x == reference && x.is_infinite() {
            continue;
        }
        difference += (x - reference).powi(2);
        norm += reference.powi(2);
    }
    let error = difference.sqrt() / if norm == 0.0 { 1.0 } else { norm.sqrt() };
    if error.is_nan() { f64::INFINITY } else { error }
}

/// Fails with the tensor's name when [`relative_error`] is above the tolerance.
#[track_caller]
pub fn assert_close<T: Scalar, S, R, D: Dimension>(
    name: &str,
    x: &ArrayBase<S, D>,
    reference: &ArrayBase<R, D>,
    tolerance: f64,
) where
    S: Data<Elem = T>,
    R: Data<Elem = f64>,
{
    let error = relative_error(x, reference);
    assert!(
        error <= tolerance,
        "{name}: relative error {error:e} above {tolerance:e}"
    );
}

/// ∂f/∂x by central differences of width 2e-5.
pub fn finite_difference<D: Dimension>(
    x: &Array<f64, D>,
    mut f: impl FnMut(&Array<f64, D>) -> f64,
) -> Array<f64, D> {
    const STEP: f64 = 1e-5;
    let mut moved = x.as_standard_layout().into_owned();
    let mut gradient = Array::zeros(x.raw_dim());
    for (n, slope) in gradient.iter_mut().enumerate() {
        let mut at = |offset: f64| {
            let entries = moved.as_slice_mut().expect("standard layout");
            let before = entries[n];
            entries[n] = before + offset;
            let value = f(&moved);
            moved.as_slice_mut().expect("standard layout")[n] = before;
            value
        };
        *slope = (at(STEP) - at(-STEP)) / (2.0 * STEP);
    }
    gradient
}

/// Fails unless a gradient is that difference quotient. Both are compared on top of one, since
/// rounding leaves the quotient an absolute error, whatever its size.
#[track_caller]
pub fn assert_slope<D: Dimension>(name: &str, gradient: &Array<f64, D>, quotient: &Array<f64, D>) {
    assert_close(name, &(gradient + 1.0), &(quotient + 1.0), 1e-7);
}

/// One file of tests/fixtures/ops (SPEC section 9), read into memory.
pub struct Fixture {
    bytes: Vec<u8>,
    /// The settings of the operation.
    pub params: serde_json::Value,
}

impl Fixture {
    /// Opens `NAME.safetensors`.
    pub fn open(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/fixtures/ops")
            .join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors header");
        let metadata = header.metadata().as_ref().expect("metadata");
        let params = serde_json::from_str(&metadata["params"]).expect("params in JSON");
        Self { bytes, params }
    }

    /// Opens every fixture whose name begins with `prefix`, with its name.
    pub fn all(prefix: &str) -> Vec<(String, Self)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/ops");
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .expect("the fixture folder")
            .map(|entry| entry.expect("a folder entry").path())
            .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        assert!(!names.is_empty(), "no fixture begins with {prefix}");
        let open = |name: String| (name.clone(), Self::open(&name));
        names.into_iter().map(open).collect()
    }

    /// A number of `params`.
    pub fn number(&self, name: &str) -> f64 {
        let value = self.params[name].as_f64();
        value.unwrap_or_else(|| panic!("params.{name} is no number"))
    }

    /// A word of `params`.
    pub fn word(&self, name: &str) -> &str {
        let value = self.params[name].as_str();
        value.unwrap_or_else(|| panic!("params.{name} is no string"))
    }

    /// A float tensor of the rank that the caller asks for, rounded to `T` if that is narrower.
    pub fn array<T: Scalar, D: Dimension>(&self, name: &str) -> Array<T, D> {
        self.tensor(name, Dtype::F64, |tensor| {
            let entries = tensor.data().chunks_exact(8).map(|bytes| {
                T::from_f64(f64::from_le_bytes(bytes.try_into().expect("eight bytes")))
            });
            ArrayD::from_shape_vec(tensor.shape(), entries.collect())
                .expect("a shape that fits its data")
                .into_dimensionality()
                .unwrap_or_else(|_| panic!("{name} has shape {:?}", tensor.shape()))
        })
    }

    /// The single entry of a tensor of shape [1].
    pub fn scalar(&self, name: &str) -> f64 {
        let entries = self.array::<f64, Ix1>(name);
        assert_eq!(entries.len(), 1, "{name}");
        entries[0]
    }

    /// An i32 tensor, flat.
    pub fn integers(&self, name: &str) -> Vec<i32> {
        self.tensor(name, Dtype::I32, |tensor| {
            let entries = tensor.data().chunks_exact(4);
            entries
                .map(|bytes| i32::from_le_bytes(bytes.try_into().expect("four bytes")))
                .collect()
        })
    }

    /// A u8 tensor, flat.
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        self.tensor(name, Dtype::U8, |tensor| tensor.data().to_vec())
    }

    fn tensor<R>(&self, name: &str, dtype: Dtype, read: impl FnOnce(&TensorView) -> R) -> R {
        let file = SafeTensors::deserialize(&self.bytes).expect("a safetensors file");
        let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(tensor.dtype(), dtype, "{name}");
        read(&tensor)
    }
}
