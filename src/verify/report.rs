//! The error measure and the table.

use std::io::{self, Write};
use std::path::PathBuf;

use ndarray::ArrayD;

use super::{BackendName, Dtype, VerifyError};

/// One row of the table.
pub(super) struct Comparison {
    /// What was checked: the file or a backend.
    pub checked: String,
    /// The type that its numbers are stored in.
    pub dtype: Dtype,
    /// Name of the tensor.
    pub tensor: String,
    /// How far it is from the reference.
    pub error: Error,
    /// The largest relative error that passes.
    pub limit: f64,
    /// What the reader should know about this row.
    pub notes: Vec<String>,
}

impl Comparison {
    /// A row that fails since there is nothing to compare.
    pub fn impossible(checked: &str, dtype: Dtype, tensor: &str, note: String) -> Self {
        Self {
            checked: checked.to_owned(),
            dtype,
            tensor: tensor.to_owned(),
            error: Error::INFINITE,
            limit: dtype.limit(false),
            notes: vec![note],
        }
    }

    /// Whether the error is within the limit.
    pub fn passed(&self) -> bool {
        self.error.relative <= self.limit
    }
}

/// How far a tensor is from its reference.
pub(super) struct Error {
    /// ‖x − reference‖₂/‖reference‖₂, or ‖x‖₂ where the reference is all zero; ∞ for a NaN.
    pub relative: f64,
    /// The largest |x − reference|.
    pub absolute: f64,
}

impl Error {
    /// Of something that cannot be compared.
    pub const INFINITE: Error = Error {
        relative: f64::INFINITY,
        absolute: f64::INFINITY,
    };

    /// Entries that are the same infinity agree (lse of a query that sees no key).
    pub fn between(x: &ArrayD<f64>, reference: &ArrayD<f64>) -> Self {
        if x.shape() != reference.shape() {
            return Self::INFINITE;
        }
        let pairs = || {
            let all = x
                .iter()
                .zip(reference)
                .map(|(&x, &reference)| (x, reference));
            all.filter(|(x, reference)| !(x == reference && x.is_infinite()))
        };
        // Dividing by the largest entry first keeps the squares of tiny or huge numbers in range.
        let largest = pairs().fold(0.0_f64, |largest, (_, reference)| {
            largest.max(reference.abs())
        });
        let scale = if largest == 0.0 { 1.0 } else { largest };
        let (mut difference, mut norm, mut absolute) = (0.0_f64, 0.0_f64, 0.0_f64);
        for (x, reference) in pairs() {
            let distance = (x - reference).abs();
            if distance.is_nan() {
                return Self::INFINITE;
            }
            difference += (distance / scale).powi(2);
            norm += (reference / scale).powi(2);
            absolute = absolute.max(distance);
        }
        let relative = difference.sqrt() / if norm == 0.0 { 1.0 } else { norm.sqrt() };
        Self {
            relative: if relative.is_nan() {
                f64::INFINITY
            } else {
                relative
            },
            absolute,
        }
    }
}

/// What makes the numbers of a tensor differ from the reference in kind and not in degree.
pub(super) fn oddities(x: &ArrayD<f64>, reference: &ArrayD<f64>) -> Vec<String> {
    let count = |odd: fn(f64, f64) -> bool, what: &str| {
        let pairs = x.iter().zip(reference);
        let count = pairs.filter(|&(&x, &reference)| odd(x, reference)).count();
        (count > 0).then(|| format!("{count} of {} {what}", x.len()))
    };
    let found = [
        count(|x, _| x.is_nan(), "NaN"),
        count(
            |x, reference| x.is_infinite() && x != reference,
            "overflowed",
        ),
        count(|x, reference| x == 0.0 && reference != 0.0, "underflowed"),
    ];
    found.into_iter().flatten().collect()
}

/// Writes rows as they come and counts them.
pub(super) struct Table<'a, W> {
    names: Vec<String>,
    width: usize,
    passed: usize,
    failed: usize,
    skipped: usize,
    out: &'a mut W,
}

impl<'a, W: Write> Table<'a, W> {
    /// Writes the head. Files are named by their stem, or by their path where stems repeat.
    pub fn new(files: &[PathBuf], out: &'a mut W) -> io::Result<Self> {
        let mut names: Vec<String> = files
            .iter()
            .map(|file| file.file_stem().unwrap_or_default().display().to_string())
            .collect();
        let mut sorted = names.clone();
        sorted.sort();
        if sorted.windows(2).any(|two| two[0] == two[1]) {
            names = files
                .iter()
                .map(|file| file.display().to_string())
                .collect();
        }
        let width = names.iter().map(|name| name.chars().count()).max();
        let width = width.unwrap_or(0).max("file".len());
        writeln!(
            out,
            "{:<width$}  {:<9}  {:<5}  {:<24}  {:>9}  {:>9}  {:>7}  result",
            "file", "checked", "dtype", "tensor", "relative", "largest", "limit"
        )?;
        Ok(Self {
            names,
            width,
            passed: 0,
            failed: 0,
            skipped: 0,
            out,
        })
    }

    /// Writes one row about file number `file`.
    pub fn row(&mut self, file: usize, row: &Comparison) -> io::Result<()> {
        let passed = row.passed();
        *(if passed {
            &mut self.passed
        } else {
            &mut self.failed
        }) += 1;
        let line = format!(
            "{:<width$}  {:<9}  {:<5}  {:<24}  {:>9.1e}  {:>9.1e}  {:>7.1e}  {:<4}  {}",
            self.names.get(file).map_or("", String::as_str),
            row.checked,
            row.dtype,
            row.tensor,
            row.error.relative,
            row.error.absolute,
            row.limit,
            if passed { "ok" } else { "FAIL" },
            row.notes.join("; "),
            width = self.width,
        );
        writeln!(self.out, "{}", line.trim_end())
    }

    /// Writes what a backend has nothing for, and why.
    pub fn skip(
        &mut self,
        file: usize,
        backend: BackendName,
        dtype: Dtype,
        reason: &str,
    ) -> io::Result<()> {
        self.skipped += 1;
        writeln!(
            self.out,
            "{:<width$}  {backend:<9}  {dtype:<5}  skipped: {reason}",
            self.names.get(file).map_or("", String::as_str),
            width = self.width,
        )
    }

    /// Writes the counts; true if no row failed.
    pub fn finish(self) -> Result<bool, VerifyError> {
        if self.skipped > 0 {
            write!(self.out, "{} skipped, ", self.skipped)?;
        }
        writeln!(self.out, "{} passed, {} failed", self.passed, self.failed)?;
        Ok(self.failed == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::arr1;

    fn relative(x: &[f64], reference: &[f64]) -> f64 {
        Error::between(&arr1(x).into_dyn(), &arr1(reference).into_dyn()).relative
    }

    #[test]
    fn equal_infinities_agree_and_everything_else_that_is_not_finite_does_not() {
        let infinity = f64::INFINITY;
        assert_eq!(relative(&[-infinity, 1.0], &[-infinity, 1.0]), 0.0);
        assert_eq!(relative(&[-infinity], &[-infinity]), 0.0);
        for (x, reference) in [
            (infinity, -infinity),
            (infinity, 1.0),
            (1.0, infinity),
            (f64::NAN, 1.0),
            (1.0, f64::NAN),
            (f64::NAN, f64::NAN),
            (f64::NAN, 0.0),
            (f64::NAN, infinity),
        ] {
            assert_eq!(
                relative(&[x, 1.0], &[reference, 1.0]),
                infinity,
                "{x} {reference}"
            );
        }
    }

    #[test]
    fn the_error_is_relative_to_the_norm_and_absolute_where_the_reference_is_zero() {
        assert_eq!(relative(&[3.0, 4.5], &[3.0, 4.0]), 0.1);
        assert_eq!(relative(&[0.3, 0.4], &[0.0, 0.0]), 0.5);
        assert_eq!(relative(&[], &[]), 0.0);
        let error = Error::between(&arr1(&[1.0, 2.5]).into_dyn(), &arr1(&[1.5, 2.0]).into_dyn());
        assert_eq!(error.absolute, 0.5);
    }

    #[test]
    fn tiny_and_huge_numbers_keep_their_relative_error() {
        assert_eq!(relative(&[1.5e-200], &[1e-200]), 0.5);
        assert_eq!(relative(&[1.5e200], &[1e200]), 0.5);
    }

    #[test]
    fn tensors_of_different_shapes_never_agree() {
        assert_eq!(relative(&[1.0], &[1.0, 1.0]), f64::INFINITY);
    }
}
