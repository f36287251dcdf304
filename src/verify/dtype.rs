use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

use super::VerifyError;

/// A type that numbers are stored in. Sums are at least f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE double.
    F64,
    /// IEEE single.
    F32,
    /// The upper half of a single.
    Bf16,
    /// IEEE half; nothing above 65504.
    F16,
}

impl Dtype {
    /// Widest first.
    pub const ALL: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::Bf16, Dtype::F16];

    /// The nearest number of this type. The halves are rounded by way of f32, as frameworks do.
    pub(super) fn round(self, x: f64) -> f64 {
        match self {
            Dtype::F64 => x,
            Dtype::F32 => f64::from(x as f32),
            Dtype::Bf16 => bf16::from_f32(x as f32).to_f64(),
            Dtype::F16 => f16::from_f32(x as f32).to_f64(),
        }
    }

    /// Largest relative error that passes (SPEC section 9). `saturated`: a gradient that went
    /// through rows of the attention-BCE in which one probability is nearly 1.
    pub(super) fn limit(self, saturated: bool) -> f64 {
        match self {
            Dtype::F64 => 1e-10,
            Dtype::F32 if saturated => 1e-4,
            Dtype::F32 => 2e-5,
            Dtype::Bf16 | Dtype::F16 => 1.5e-2,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Dtype::F64 => "f64",
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
        })
    }
}

impl FromStr for Dtype {
    type Err = VerifyError;

    fn from_str(word: &str) -> Result<Self, VerifyError> {
        let named = Dtype::ALL.into_iter().find(|d| d.to_string() == word);
        named.ok_or_else(|| VerifyError::Choice {
            what: "type",
            found: word.to_owned(),
            expected: "f64, f32, bf16, f16 or all",
        })
    }
}
