//! `metrics.jsonl`, with one line per logged step, and other files of lines that a run adds to.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Error;
use crate::model::StepMetrics;
use crate::tasks::write_beside;

/// One line: means over the steps since the line before.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Optimiser steps done.
    pub step: u64,
    /// Tokens learnt from so far; none of them is padding.
    pub tokens: u64,
    /// Action loss + λ · memory loss.
    pub loss: f64,
    /// Mean cross-entropy of the actions, in nats.
    pub action_loss: f64,
    /// Attention-BCE, without λ.
    pub memory_loss: f64,
    /// Share of the actions predicted right.
    pub accuracy: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Norm of the gradient before clipping, over the steps that were not skipped.
    pub gradient_norm: f64,
    /// What losses were multiplied by for gradients in f16, at this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// How many of the steps were skipped, because gradients in f16 overflowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<u64>,
    /// Real tokens per second.
    pub tokens_per_s: f64,
}

/// Collects steps until a line is written.
#[derive(Debug, Clone, Default)]
pub struct Window {
    steps: u64,
    skipped: u64,
    tokens: u64,
    sums: [f64; 4],
    norms: f64,
    loss_scale: Option<f64>,
}

impl Window {
    /// Adds a step.
    pub fn add(&mut self, step: &StepMetrics) {
        self.steps += 1;
        self.tokens += step.tokens as u64;
        let values = [step.loss, step.action_loss, step.memory_loss, step.accuracy];
        for (sum, value) in self.sums.iter_mut().zip(values) {
            *sum += value;
        }
        match step.is_skipped() {
            true => self.skipped += 1,
            false => self.norms += step.gradient_norm,
        }
        self.loss_scale = step.loss_scale;
    }

    /// The line of these steps, which took `seconds`, if there are any. `step` and `tokens` are those
    /// of the whole run.
    pub fn line(self, seconds: f64, step: u64, tokens: u64, learning_rate: f64) -> Option<Line> {
        if self.steps == 0 {
            return None;
        }
        let [loss, action_loss, memory_loss, accuracy] =
            self.sums.map(|sum| sum / self.steps as f64);
        let updates = self.steps - self.skipped;
        Some(Line {
            step,
            tokens,
            loss,
            action_loss,
            memory_loss,
            accuracy,
            learning_rate,
            gradient_norm: self.norms / updates.max(1) as f64,
            loss_scale: self.loss_scale,
            skipped: self.loss_scale.map(|_| self.skipped),
            tokens_per_s: per_second(self.tokens, seconds),
        })
    }
}

/// Tokens per second; 0 if no time has passed.
pub fn per_second(tokens: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        tokens as f64 / seconds
    } else {
        0.0
    }
}

/// One line of a file, a JSON object.
pub trait Record: Serialize + DeserializeOwned {
    /// Optimiser steps done.
    fn step(&self) -> u64;
}

impl Record for Line {
    fn step(&self) -> u64 {
        self.step
    }
}

/// A file of lines, open for appending.
#[derive(Debug)]
pub struct Records<R> {
    path: PathBuf,
    file: File,
    lines: Vec<R>,
}

impl<R: Record> Records<R> {
    /// Opens the file with its lines up to `step`; later ones, and what a kill cut off, are
    /// dropped. `step` 0 starts a new file.
    pub fn open(path: &Path, step: u64) -> Result<Self, Error> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) if step > 0 => text,
            _ => String::new(),
        };
        let lines: Vec<R> = text
            .lines()
            .map_while(|line| serde_json::from_str(line).ok())
            .take_while(|line: &R| line.step() <= step)
            .collect();
        let kept: String = text
            .lines()
            .take(lines.len())
            .flat_map(|line| [line, "\n"])
            .collect();
        write_beside(path, kept.as_bytes()).map_err(Error::io("write it", path))?;
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(Error::io("append to it", path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            lines,
        })
    }

    /// Appends a line.
    pub fn append(&mut self, line: R) -> Result<(), Error> {
        let mut text = serde_json::to_string(&line)
            .map_err(|error| Error::file(&self.path, "a line", error, "numbers"))?;
        text.push('\n');
        self.file
            .write_all(text.as_bytes())
            .map_err(Error::io("append to it", &self.path))?;
        self.lines.push(line);
        Ok(())
    }

    /// All lines so far.
    pub fn lines(&self) -> &[R] {
        &self.lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> Line {
        let mut window = Window::default();
        let metrics = StepMetrics {
            loss: 3.0,
            action_loss: 1.0,
            memory_loss: 0.2,
            accuracy: 0.5,
            gradient_norm: 2.0,
            loss_scale: None,
            tokens: 10,
        };
        window.add(&metrics);
        window.add(&StepMetrics {
            loss: 1.0,
            ..metrics
        });
        window.line(4.0, step, 20, 1e-3).unwrap()
    }

    #[test]
    fn a_line_holds_the_means_of_its_steps() {
        let line = line(2);
        assert_eq!((line.loss, line.tokens_per_s), (2.0, 5.0));
        assert_eq!(Window::default().line(1.0, 1, 0, 0.0), None);
    }

    #[test]
    fn skipped_steps_are_counted_and_have_no_norm() {
        let good = StepMetrics {
            loss: 3.0,
            action_loss: 1.0,
            memory_loss: 0.2,
            accuracy: 0.5,
            gradient_norm: 2.0,
            loss_scale: Some(4.0),
            tokens: 10,
        };
        let overflow = StepMetrics {
            gradient_norm: f64::INFINITY,
            ..good
        };
        let mut window = Window::default();
        for step in [overflow, good, overflow, good] {
            window.add(&step);
        }
        let line = window.line(4.0, 4, 40, 1e-3).unwrap();
        assert_eq!((line.gradient_norm, line.skipped), (2.0, Some(2)));
        assert_eq!(line.loss_scale, Some(4.0));
        // With a scale of 1 nothing can be lowered: not an overflow of the scaled gradient.
        let broken = StepMetrics {
            loss_scale: Some(1.0),
            ..overflow
        };
        assert!(overflow.is_skipped() && !broken.is_skipped() && !good.is_skipped());
    }

    #[test]
    fn resuming_drops_later_and_broken_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut file = Records::<Line>::open(&path, 0).unwrap();
        for step in [10, 20, 30] {
            file.append(line(step)).unwrap();
        }
        let mut text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(Records::<Line>::open(&path, 20).unwrap().lines().len(), 2);
        text.truncate(text.len() - 5);
        std::fs::write(&path, &text).unwrap();
        let mut file = Records::<Line>::open(&path, 100).unwrap();
        assert_eq!(file.lines(), [line(10), line(20)]);
        file.append(line(40)).unwrap();
        let steps: Vec<u64> = Records::<Line>::open(&path, 100)
            .unwrap()
            .lines()
            .iter()
            .map(|line| line.step)
            .collect();
        assert_eq!(steps, [10, 20, 40]);
        assert!(Records::<Line>::open(&path, 0).unwrap().lines().is_empty());
    }
}
