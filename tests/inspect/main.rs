//! `dtmem inspect`: the page says what the model did, and works in a browser.

#![cfg(feature = "trainer")]

mod browser;
mod page;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::AtomicBool;

use dtmem::backend::Cpu;
use dtmem::inspect::{Episode, Error, Inspection, Played, Request, decode, encode, inspect, task};
use dtmem::model::Model;
use dtmem::spaces::Spaces;
use dtmem::tasks::Task;
use dtmem::train::checkpoint::{ModelHeader, save_model};
use dtmem::train::config::Config;
use dtmem::train::evaluate::{Conditions, evaluate};
use dtmem::train::run::Folder;
use ndarray::{Array2, s};
use serde_json::Value;
use tempfile::TempDir;

/// AttentionTuner in a hallway: attention over the episode, taught heads.
const HALLWAY: &str = r#"
[task]
name = "hallway"
length = 2
[data]
episodes = 10
[model]
front_end = "linear"
width = 16
layers = 2
heads = 2
feed_forward = 16
dropout = 0.1
[loss]
layer = 2
heads = [1]
[train]
steps = 1
batch_tokens = 100
[evaluation]
seed = 5
"#;

/// DT-Mem on recall: returns, segments, memory.
const RECALL: &str = r#"
[task]
name = "recall"
steps = 9
pairs = 3
[data]
episodes = 30
return_scale = 2.0
[model]
block = "pre_ln"
layout = "return_obs_action"
front_end = "linear"
width = 16
layers = 2
heads = 2
feed_forward = 16
attention = "segment"
segment_steps = 3
[model.memory]
slots = 6
[loss]
lambda = 0
[train]
steps = 1
batch_tokens = 100
"#;

/// A model as a run would leave it, only without the training.
struct Made {
    model: Model<Cpu<f32>>,
    header: ModelHeader,
    played: Played,
}

fn make(text: &str, overrides: &[&str], seed: u64) -> Made {
    let overrides: Vec<String> = overrides.iter().map(|&s| s.to_owned()).collect();
    let config = Config::parse("toy.toml", text, &overrides).unwrap();
    let tasks = config.task_list();
    let mut spaces = Spaces {
        families: Vec::new(),
        steps: 1,
    };
    for task in tasks.iter().filter_map(|task| task.task.as_ref()) {
        spaces.include(task.family(), task.max_steps());
    }
    let header = ModelHeader::new(&config, &spaces, &vec![1.0; tasks.len()], 1234);
    let supervision = config.supervision();
    let mut model = Model::new(Cpu::new(), config.model, spaces, supervision).unwrap();
    model.initialise(seed).unwrap();
    let played = task(&header, None).unwrap();
    Made {
        model,
        header,
        played,
    }
}

impl Made {
    fn show(&self, episode: u64) -> Inspection {
        self.request(episode, None).unwrap()
    }

    fn request(&self, episode: u64, failed: Option<u64>) -> Result<Inspection, Error> {
        let request = Request {
            name: "runs/toy <b>&\"",
            task: &self.played,
            episode,
            failed,
        };
        inspect(&self.model, &self.header, &request, |_| {})
    }

    fn conditions(&self, episodes: u64) -> Conditions {
        Conditions {
            episodes,
            seed: self.header.config.evaluation.seed,
            target_return: self.played.target_return,
            return_scale: self.played.return_scale,
        }
    }

    fn play(&self, number: u64) -> Episode {
        let seed = self.header.config.evaluation.seed;
        Episode::play(&self.model, &self.played, seed, number).unwrap()
    }

    fn save(&self, folder: &Path) {
        save_model(&Folder::new(folder).model(), &self.model, &self.header).unwrap();
    }
}

/// The data of a page.
fn data(html: &str) -> Value {
    let (_, rest) = html
        .split_once(r#"<script type="application/json" id="data">"#)
        .unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    let list = value.as_array().unwrap().iter();
    list.map(|number| number.as_f64().unwrap()).collect()
}

fn dtmem(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dtmem"));
    command.args(["inspect"]).args(arguments).output().unwrap()
}
