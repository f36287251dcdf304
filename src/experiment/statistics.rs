//! Means and their intervals over seeds.

use std::f64::consts::FRAC_2_PI;

/// A mean and, of two values or more, its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mean {
    /// x̄.
    pub mean: f64,
    /// x̄ ± t · s/√n, with s² = Σ (x − x̄)²/(n − 1) and t the 0.975 quantile of Student's
    /// distribution with n − 1 degrees of freedom.
    pub interval: Option<[f64; 2]>,
}

impl Mean {
    /// Of some values; none of no value.
    pub fn of(values: &[f64]) -> Option<Self> {
        let count = values.len() as f64;
        let mean = (!values.is_empty()).then(|| values.iter().sum::<f64>() / count)?;
        let interval = (values.len() > 1).then(|| {
            let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
            let error = (squares / (count - 1.0) / count).sqrt();
            let half = quantile(values.len() as u64 - 1) * error;
            [mean - half, mean + half]
        });
        Some(Self { mean, interval })
    }

    /// The same of a number that cannot lie outside of these bounds.
    pub fn within(self, low: f64, high: f64) -> Self {
        Self {
            interval: self
                .interval
                .map(|ends| ends.map(|end| end.clamp(low, high))),
            ..self
        }
    }
}

/// The 0.975 quantile of Student's distribution, by halving.
pub fn quantile(degrees: u64) -> f64 {
    let (mut low, mut high) = (1.9, 13.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if two_sided(middle, degrees) < 0.95 {
            low = middle;
        } else {
            high = middle;
        }
    }
    0.5 * (low + high)
}

/// The probability that |T| ≤ t: with θ = atan(t/√n), a finite sum in powers of cos θ for whole n
/// (Abramowitz and Stegun, 26.7.3 and 26.7.4).
fn two_sided(t: f64, degrees: u64) -> f64 {
    let angle = (t / (degrees as f64).sqrt()).atan();
    let (sine, cosine) = angle.sin_cos();
    let odd = degrees % 2 == 1;
    // cos θ · (1 + 2/3 cos²θ + …) or 1 + 1/2 cos²θ + …
    let mut term = if odd { cosine } else { 1.0 };
    let first = if odd { 3 } else { 2 };
    let mut sum = if degrees == 1 { 0.0 } else { term };
    for power in (first..degrees).step_by(2) {
        term *= cosine * cosine * (power - 1) as f64 / power as f64;
        sum += term;
    }
    if odd {
        FRAC_2_PI * (angle + sine * sum)
    } else {
        sine * sum
    }
}
