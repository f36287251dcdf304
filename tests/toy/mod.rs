//! Whole runs at toy size, and the command.
#![allow(dead_code)] // each test binary uses a part

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use dtmem::backend::{Backend, Cpu};
use dtmem::train::Error;
use dtmem::train::config::Config;
use dtmem::train::metrics::Line;
use dtmem::train::run::{Event, Folder, Options, Outcome, Start, Summary, train};

/// AttentionTuner in a hallway, of sizes that the kernels take; dropout on, so that the masks matter.
pub const HALLWAY_FOR_KERNELS: &str = r#"
seed = 7
[task]
name = "hallway"
length = 1
[data]
episodes = 30
[model]
front_end = "linear"
width = 32
layers = 1
heads = 2
feed_forward = 32
dropout = 0.1
[loss]
heads = [1, 2]
[train]
steps = 6
batch_tokens = 90
learning_rate = 1e-2
clip = 1.0
log_every = 1
checkpoint_every = 2
[evaluation]
episodes = 3
"#;

/// DT-Mem on recall: other tokens, segments, memory.
pub const RECALL: &str = r#"
[task]
name = "recall"
steps = 6
pairs = 2
[data]
episodes = 30
[model]
block = "pre_ln"
layout = "return_obs_action"
front_end = "linear"
width = 8
layers = 2
heads = 2
feed_forward = 16
attention = "segment"
segment_steps = 2
[model.memory]
slots = 4
[loss]
lambda = 0
[train]
epochs = 2
batch_tokens = 100
optimiser = "adamw"
weight_decay = 1e-2
clip = 1.0
learning_rate = 1e-2
log_every = 2
checkpoint_every = 3
[evaluation]
episodes = 6
"#;

/// DT-Mem on two tasks of different families, with a third one held out.
pub const MANY: &str = r#"
[[tasks]]
share = 2.0
task = { name = "recall", steps = 6, pairs = 2 }
data = { episodes = 30 }
[[tasks]]
target_return = 0.9
task = { name = "hallway", length = 1 }
data = { episodes = 25, return_scale = 2.0 }
[[tasks]]
label = "longer"
share = 0.0
task = { name = "recall", steps = 40, pairs = 3 }
data = { episodes = 20 }
[model]
block = "pre_ln"
layout = "return_obs_action"
width = 8
layers = 2
heads = 2
feed_forward = 16
front_end = "linear"
attention = "segment"
segment_steps = 2
dropout = 0.1
[model.memory]
slots = 4
[loss]
lambda = 0
[train]
epochs = 2
batch_tokens = 100
optimiser = "adamw"
weight_decay = 1e-2
clip = 1.0
learning_rate = 1e-2
log_every = 2
checkpoint_every = 3
[evaluation]
episodes = 6
"#;

pub fn config(text: &str, overrides: &[&str]) -> Config {
    let overrides: Vec<String> = overrides.iter().map(|&s| s.to_owned()).collect();
    Config::parse("toy.toml", text, &overrides).unwrap()
}

/// Runs on the CPU until it is done, or until `stop_after` steps are.
pub fn run(
    config: &Config,
    folder: &Path,
    start: Start,
    stop_after: Option<u64>,
) -> Result<Outcome, Error> {
    run_on(Cpu::new(), config, folder, start, stop_after)
}

/// The same on a backend.
pub fn run_on<B: Backend<Element = f32>>(
    backend: B,
    config: &Config,
    folder: &Path,
    start: Start,
    stop_after: Option<u64>,
) -> Result<Outcome, Error> {
    let stop = AtomicBool::new(false);
    let mut watch = |event: Event| {
        if let Event::Step { step, .. } = event
            && Some(step) == stop_after
        {
            stop.store(true, Ordering::Relaxed);
        }
    };
    let options = Options {
        folder: &Folder::new(folder),
        start,
        stop: &stop,
        watch: &mut watch,
    };
    train(backend, config, options)
}

pub fn finish(config: &Config, folder: &Path, start: Start) -> Summary {
    match run(config, folder, start, None).unwrap() {
        Outcome::Finished(summary) => *summary,
        stopped => panic!("{stopped:?}"),
    }
}

/// The metrics of a run.
pub fn lines(folder: &Path) -> Vec<Line> {
    let text = std::fs::read_to_string(Folder::new(folder).metrics()).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Metrics of the same steps, each at most `limit` of its value beside that expected.
pub fn assert_near(found: &[Line], expected: &[Line], limit: f64) {
    assert_eq!(found.len(), expected.len());
    assert!(!found.is_empty());
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!((found.step, found.tokens), (expected.step, expected.tokens));
        for (found, expected) in [
            (found.loss, expected.loss),
            (found.memory_loss, expected.memory_loss),
            (found.gradient_norm, expected.gradient_norm),
        ] {
            let error = (found - expected).abs();
            assert!(error <= limit * expected, "{found}, expected {expected}");
        }
    }
}

pub fn dtmem(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dtmem"))
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
