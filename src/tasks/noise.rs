//! Wrong annotation, to see how much of it a method bears.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use super::{TaskError, validate_frequency};

/// Shares of the annotated pairs to an earlier step that are wrong, each in its own way; together at most 1. Pairs of
/// a step with itself need no annotator and stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AnnotationNoise {
    /// Left out.
    pub dropped: f64,
    /// To any earlier step instead.
    pub random: f64,
    /// To the step before or after the right one, if that is an earlier step.
    pub shifted: f64,
}

impl AnnotationNoise {
    /// Whether every pair stays as it is.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Checks the shares.
    ///
    /// # Errors
    /// A share outside 0 to 1, or more than 1 together.
    pub fn validate(&self) -> Result<(), TaskError> {
        validate_frequency("dropped", self.dropped)?;
        validate_frequency("random", self.random)?;
        validate_frequency("shifted", self.shifted)?;
        let sum = self.dropped + self.random + self.shifted;
        if sum > 1.0 + 1e-9 {
            let found = format!("{} with the other kinds: {sum} together", self.shifted);
            return Err(TaskError::new("shifted", found, "at most 1 together"));
        }
        Ok(())
    }

    /// Changes the pairs of one episode.
    pub(super) fn disturb(&self, seed: u64, episode: usize, pairs: &mut Vec<(u32, u32)>) {
        let mut key = *b"noise in the annotation, seed   ";
        key[24..].copy_from_slice(&seed.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(episode as u64);
        pairs.retain_mut(|(recalling, recalled)| {
            let limit = *recalling;
            if *recalled == limit {
                return true;
            }
            let choice: f64 = rng.random();
            if choice < self.dropped {
                return false;
            }
            if choice < self.dropped + self.random {
                *recalled = rng.random_range(0..limit);
            } else if choice < self.dropped + self.random + self.shifted {
                let neighbours = [recalled.checked_sub(1), recalled.checked_add(1)];
                let earlier = neighbours
                    .into_iter()
                    .flatten()
                    .filter(|&step| step < limit);
                let earlier: Vec<u32> = earlier.collect();
                if !earlier.is_empty() {
                    *recalled = earlier[rng.random_range(0..earlier.len())];
                }
            }
            true
        });
    }
}
