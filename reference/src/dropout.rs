//! Dropout with a counter-based generator: the mask is a pure function of the seed, the optimiser
//! step, the site in the model and the element's index, so that every backend and every thread
//! count draws the same one and the backward pass can draw it again.

use crate::{Error, Result, Scalar};

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

impl Mask {
    /// The mask that sets a share `p` of the elements to zero; an error unless 0 ≤ p < 1.
    pub fn new(seed: u64, step: u32, site: u32, p: f64) -> Result<Self> {
        if !(0.0..1.0).contains(&p) {
            return Err(Error::value("p", p, "at least 0 and less than 1"));
        }
        Ok(Self {
            seed,
            step,
            site,
            threshold: (p * RANGE).round() as u32, // a p that rounds to 1 becomes the largest u32
        })
    }

    /// 1 / (1 − p), what the elements that stay are multiplied by.
    pub fn scale(self) -> f64 {
        RANGE / (RANGE - f64::from(self.threshold))
    }
}

/// 2³², the number of different u32.
const RANGE: f64 = 4_294_967_296.0;

/// Counters drawn together: enough for the compiler to turn their rounds into a vector loop.
const LANES: usize = 64;

/// Philox4x32-10 (Salmon et al. 2011): four uniform u32 for a counter and a key.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    rounds(counter.map(|word| [word]), key).map(|[word]| word)
}

/// Ten rounds on `N` counters at once: word w of counter n is `counters[w][n]`.
fn rounds<const N: usize>(counters: [[u32; N]; 4], mut key: [u32; 2]) -> [[u32; N]; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counters;
    for _ in 0..10 {
        for n in 0..N {
            let product0 = u64::from(c0[n]) * 0xd251_1f53;
            let product1 = u64::from(c2[n]) * 0xcd9e_8d57;
            c0[n] = (product1 >> 32) as u32 ^ c1[n] ^ key[0];
            c1[n] = product1 as u32;
            c2[n] = (product0 >> 32) as u32 ^ c3[n] ^ key[1];
            c3[n] = product0 as u32;
        }
        key[0] = key[0].wrapping_add(0x9e37_79b9);
        key[1] = key[1].wrapping_add(0xbb67_ae85);
    }
    [c0, c1, c2, c3]
}

/// x_e ← 0 if u_e < threshold, else x_e / (1 − p), where u_e is word e mod 4 of
/// philox([e / 4 (low 32 bits), step, site, e / 4 (high 32 bits)], seed).
/// `first` is the index of x\[0\] in the whole tensor, a multiple of 4. With p = 0 nothing changes.
pub fn apply<T: Scalar>(mask: Mask, first: u64, x: &mut [T]) -> Result<()> {
    if !first.is_multiple_of(4) {
        return Err(Error::value("first", first, "a multiple of 4"));
    }
    if mask.threshold == 0 {
        return Ok(());
    }
    let scale = T::from_f64(mask.scale());
    let key = [mask.seed as u32, (mask.seed >> 32) as u32];
    for (block, x) in (0..).zip(x.chunks_mut(4 * LANES)) {
        let start = (first / 4).wrapping_add(block * LANES as u64);
        let index: [u64; LANES] = std::array::from_fn(|n| start.wrapping_add(n as u64));
        let words = rounds(
            [
                index.map(|index| index as u32),
                [mask.step; LANES],
                [mask.site; LANES],
                index.map(|index| (index >> 32) as u32),
            ],
            key,
        );
        for (n, x) in x.chunks_mut(4).enumerate() {
            for (x, word) in x.iter_mut().zip(&words) {
                *x = if word[n] < mask.threshold {
                    T::zero()
                } else {
                    *x * scale
                };
            }
        }
    }
    Ok(())
}
