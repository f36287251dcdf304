//! The learning rate over the steps.

use super::config::{ScheduleKind, TrainConfig};

/// Learning rate of every step of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    kind: ScheduleKind,
    peak: f64,
    warmup: u64,
    steps: u64,
}

impl Schedule {
    /// The schedule of a run of `steps` steps.
    pub fn new(config: &TrainConfig, steps: u64) -> Self {
        Self {
            kind: config.schedule,
            peak: config.learning_rate,
            warmup: config.warmup_steps,
            steps,
        }
    }

    /// Learning rate of step `step`, counted from 1. It grows linearly over the warm-up; then it
    /// stays, or falls along half a cosine that would reach 0 one step after the last.
    pub fn learning_rate(&self, step: u64) -> f64 {
        if step <= self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        match self.kind {
            ScheduleKind::Constant => self.peak,
            ScheduleKind::Cosine => {
                let passed = (step - self.warmup - 1) as f64;
                let whole = self.steps.saturating_sub(self.warmup).max(1) as f64;
                let share = (passed / whole).min(1.0);
                self.peak * 0.5 * (1.0 + (std::f64::consts::PI * share).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind, warmup_steps: u64, steps: u64) -> Schedule {
        let config = TrainConfig {
            schedule: kind,
            warmup_steps,
            learning_rate: 2.0,
            ..TrainConfig::default()
        };
        Schedule::new(&config, steps)
    }

    #[test]
    fn warm_up_grows_linearly_and_reaches_the_peak() {
        let s = schedule(ScheduleKind::Constant, 4, 10);
        let rates: Vec<f64> = (1..=6).map(|step| s.learning_rate(step)).collect();
        assert_eq!(rates, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]);
    }

    #[test]
    fn cosine_starts_at_the_peak_is_half_at_the_middle_and_ends_near_zero() {
        let s = schedule(ScheduleKind::Cosine, 0, 1000);
        assert_eq!(s.learning_rate(1), 2.0);
        assert!((s.learning_rate(501) - 1.0).abs() < 1e-12);
        assert!(s.learning_rate(1000) > 0.0 && s.learning_rate(1000) < 1e-4);
        assert!(s.learning_rate(1001).abs() < 1e-12);
        assert!((1..1000).all(|step| s.learning_rate(step) > s.learning_rate(step + 1)));
    }

    #[test]
    fn warm_up_longer_than_the_run_never_divides_by_zero() {
        let s = schedule(ScheduleKind::Cosine, 50, 10);
        assert!((1..=60).all(|step| s.learning_rate(step).is_finite()));
    }
}
