//! The native tasks against episodes recorded from LTMB's environments, and against their own definition.
//!
//! `$DTMEM_TRACES` may name a trace file or a folder of them; they are replayed as well.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use dtmem::tasks::counting::{Counting, CountingLayout};
use dtmem::tasks::hallway::{Hallway, HallwayLayout};
use dtmem::tasks::ordering::{Ordering, OrderingLayout};
use dtmem::tasks::{Environment, Task, play_expert};
use serde::Deserialize;
use serde_json::Value;

/// One recorded episode.
#[derive(Deserialize)]
struct Trace {
    task: String,
    params: Parameters,
    max_steps: usize,
    expert: bool,
    layout: Value,
    steps: Vec<Step>,
    final_obs: Vec<u8>,
    success: bool,
    /// [recalling token, recalled token]; token 2t is the observation of step t.
    pairs: Option<Vec<(u32, u32)>>,
}

#[derive(Deserialize)]
struct Parameters {
    length: usize,
}

#[derive(Deserialize)]
struct Step {
    obs: Vec<u8>,
    action: usize,
    reward: f64,
    terminated: bool,
    truncated: bool,
}

impl Trace {
    fn task(&self) -> Task {
        serde_json::from_value(serde_json::json!({"name": self.task, "length": self.params.length}))
            .unwrap()
    }

    fn environment(&self) -> Box<dyn Environment> {
        let layout = self.layout.clone();
        let length = self.params.length;
        match self.task.as_str() {
            "hallway" => {
                let layout: HallwayLayout = serde_json::from_value(layout).unwrap();
                assert_eq!(layout.hallways.len(), length);
                Box::new(Hallway::new(&layout).unwrap())
            }
            "counting" => {
                let layout: CountingLayout = serde_json::from_value(layout).unwrap();
                Box::new(Counting::new(length, layout).unwrap())
            }
            "ordering" => {
                let layout: OrderingLayout = serde_json::from_value(layout).unwrap();
                Box::new(Ordering::new(length, layout).unwrap())
            }
            other => panic!("unknown task {other}"),
        }
    }
}

fn see(environment: &dyn Environment) -> Vec<u8> {
    let mut codes = vec![255; 147];
    environment.observe(&mut codes);
    codes
}

/// Replays an episode; panics with the first difference.
fn replay(trace: &Trace, name: &str) {
    assert_eq!(
        trace.task().max_steps(),
        trace.max_steps,
        "{name}: step limit"
    );
    let mut environment = trace.environment();
    let mut success = false;
    for (t, step) in trace.steps.iter().enumerate() {
        assert_eq!(
            see(environment.as_ref()),
            step.obs,
            "{name}: observation {t}"
        );
        if trace.expert {
            assert_eq!(
                environment.expert(),
                step.action,
                "{name}: the expert's action {t}"
            );
        }
        let outcome = environment.step(step.action);
        assert_eq!(
            outcome.reward.to_bits(),
            step.reward.to_bits(),
            "{name}: reward {t}"
        );
        assert_eq!(
            outcome.terminated, step.terminated,
            "{name}: terminated {t}"
        );
        assert_eq!(outcome.truncated, step.truncated, "{name}: truncated {t}");
        success = outcome.success;
    }
    assert_eq!(success, trace.success, "{name}: success");
    assert_eq!(
        see(environment.as_ref()),
        trace.final_obs,
        "{name}: final observation"
    );

    assert_eq!(
        trace.pairs.is_some(),
        trace.expert,
        "{name}: pairs come with the expert"
    );
    if let Some(pairs) = &trace.pairs {
        let episode = play_expert(trace.environment().as_mut(), 147, trace.max_steps);
        assert_eq!(episode.actions.len(), trace.steps.len(), "{name}: length");
        let ours: BTreeSet<(u32, u32)> = episode
            .pairs
            .iter()
            .map(|&(from, to)| (2 * from, 2 * to))
            .collect();
        assert_eq!(ours.len(), episode.pairs.len(), "{name}: each pair once");
        assert_eq!(ours, pairs.iter().copied().collect(), "{name}: pairs");
        assert!(episode.success, "{name}: the expert succeeds");
    }
}

fn replay_file(path: &Path) -> usize {
    let text =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let traces: Vec<Trace> =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    for (number, trace) in traces.iter().enumerate() {
        replay(trace, &format!("{} #{number}", path.display()));
    }
    traces.len()
}

/// The trace files of a folder, or the one file.
fn trace_files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.into()];
    }
    let entries = fs::read_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "json")
    });
    files.sort();
    files
}

#[test]
fn recorded_episodes_are_reproduced_cell_for_cell() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ltmb");
    let episodes: usize = trace_files(&folder)
        .iter()
        .map(|file| replay_file(file))
        .sum();
    assert_eq!(episodes, 33 + 41 + 40);
}

#[test]
fn traces_named_by_the_environment_are_reproduced() {
    if let Some(path) = std::env::var_os("DTMEM_TRACES") {
        let files = trace_files(Path::new(&path));
        let episodes: usize = files.iter().map(|file| replay_file(file)).sum();
        assert!(episodes > 0, "DTMEM_TRACES names no episode");
        println!("replayed {episodes} episodes of {} files", files.len());
    }
}
