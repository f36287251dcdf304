//! Dropout with a counter-based generator: the mask is a pure function of the seed, the optimiser
//! step, the site in the model and the element's index, so that every backend and every thread
//! count draws the same one and the backward pass can draw it again.

use crate::{Result, Scalar};

/// Names one mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mask {
    /// Run seed: the Philox key (low word, high word).
    pub seed: u64,
    /// Optimiser step.
    pub step: u32,
    /// Which dropout of the model.
    pub site: u32,
    /// Share of elements set to zero, 0 ≤ p < 1, as the threshold round(p · 2³²) of a u32.
    pub threshold: u32,
}

/// Philox4x32-10 (Salmon et al. 2011): four uniform u32 for a counter and a key.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let _ = (counter, key);
    todo!()
}

/// x_e ← 0 if u_e < threshold, else x_e / (1 − p), where u_e is word e mod 4 of
/// philox([e / 4 (low 32 bits), step, site, e / 4 (high 32 bits)], seed).
/// `first` is the index of x\[0\] in the whole tensor, a multiple of 4.
pub fn apply<T: Scalar>(mask: Mask, first: u64, x: &mut [T]) -> Result<()> {
    let _ = (mask, first, x);
    todo!()
}
