//! Whole runs at toy size: repeatable bits, stopping and resuming, damaged files, the command.

#![cfg(feature = "trainer")]

mod toy;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dtmem::backend::Cpu;
use dtmem::spaces::{ActionSpace, Family, ObservationSpace};
use dtmem::tasks::{Demonstrations, EpisodeView, Task};
use dtmem::train::checkpoint::{load_model, model_from_bytes, state_from_bytes};
use dtmem::train::config::Config;
use dtmem::train::evaluate::{Conditions, Validation, evaluate};
use dtmem::train::run::{Evaluated, Event, Folder, Options, Outcome, Start, train};
use proptest::prelude::*;
use tempfile::TempDir;
use toy::{MANY, RECALL, config, dtmem, finish, lines, run, text};

/// AttentionTuner in a hallway; dropout on, so that the masks matter.
const HALLWAY: &str = r#"
seed = 7
[task]
name = "hallway"
length = 1
[data]
episodes = 30
[model]
front_end = "linear"
width = 8
layers = 1
heads = 2
feed_forward = 16
dropout = 0.1
[loss]
heads = [1, 2]
[train]
steps = 11
batch_tokens = 90
learning_rate = 1e-2
schedule = "cosine"
log_every = 3
checkpoint_every = 4
[evaluation]
episodes = 6
"#;

fn message(config: &Config, folder: &Path, start: Start) -> String {
    run(config, folder, start, None).unwrap_err().to_string()
}

fn model_bytes(folder: &Path) -> Vec<u8> {
    std::fs::read(Folder::new(folder).model()).unwrap()
}

/// The parameters, without the header, which has the configuration.
fn weights(folder: &Path) -> Vec<u8> {
    let mut bytes = model_bytes(folder);
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    bytes.split_off(8 + header as usize)
}

/// One finished run, for the tests that only read it.
fn finished() -> &'static TempDir {
    static RUN: OnceLock<TempDir> = OnceLock::new();
    RUN.get_or_init(|| {
        let folder = TempDir::new().unwrap();
        finish(&config(HALLWAY, &[]), folder.path(), Start::Fresh);
        folder
    })
}

#[test]
fn a_run_leaves_its_files_and_sums_itself_up() {
    let folder = TempDir::new().unwrap();
    let summary = finish(&config(HALLWAY, &[]), folder.path(), Start::Fresh);
    assert_eq!(
        (summary.task.as_deref(), summary.episodes, summary.steps),
        (Some("hallway"), 6, 11)
    );
    let (rate, [low, high]) = (summary.success_rate.unwrap(), summary.interval.unwrap());
    assert!((0.0..=1.0).contains(&rate) && low <= rate && rate <= high);
    assert_eq!(summary.parameters, summary.trained_parameters);
    let steps: Vec<u64> = lines(folder.path()).iter().map(|line| line.step).collect();
    assert_eq!(
        steps,
        [3, 4, 6, 8, 9, 11],
        "logged every 3, checkpoints every 4, and the end"
    );
    for line in lines(folder.path()) {
        let loss = line.action_loss + 10.0 * line.memory_loss;
        assert!((line.loss - loss).abs() < 1e-5 * loss && line.gradient_norm > 0.0);
        assert!((0.0..=1.0).contains(&line.accuracy) && line.tokens <= 90 * line.step);
    }
    for picture in ["curves.png", "attention.png"] {
        let bytes = std::fs::read(folder.path().join(picture)).unwrap();
        assert!(bytes.starts_with(b"\x89PNG"), "{picture}");
    }
    let files = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(files, 7, "nothing else is left behind");
    let resolved = Config::load(&folder.path().join("config.toml"), &[]).unwrap();
    assert_eq!(resolved, config(HALLWAY, &[]));
}

#[test]
fn stopping_anywhere_and_resuming_gives_the_bits_of_never_stopping() {
    for config in [
        config(HALLWAY, &[]),
        config(RECALL, &[]),
        config(MANY, &["train.steps=9"]),
    ] {
        let straight = TempDir::new().unwrap();
        let steps = finish(&config, straight.path(), Start::Fresh).steps;
        for stop in 1..=steps {
            let folder = TempDir::new().unwrap();
            // Stop twice: a resumed run must be resumable.
            for (start, stop) in [(Start::Fresh, stop), (Start::Resume, stop + 2)] {
                match run(&config, folder.path(), start, Some(stop)).unwrap() {
                    Outcome::Stopped { step } => assert_eq!(step, stop.min(steps)),
                    Outcome::Finished(_) => assert!(stop > steps),
                    Outcome::Helped => panic!("there are no other ranks"),
                }
            }
            finish(&config, folder.path(), Start::Resume);
            assert!(
                model_bytes(folder.path()) == model_bytes(straight.path()),
                "stopped after {stop}"
            );
            assert_eq!(lines(folder.path()).last().unwrap().step, steps);
        }
    }
}

fn evaluations(folder: &Path) -> Vec<Evaluated> {
    let text = std::fs::read_to_string(Folder::new(folder).evaluations()).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn evaluations_on_the_way_are_recorded_and_change_nothing() {
    let kept = ["tasks.1.data.validation=0.2", "train.steps=9"];
    let straight = TempDir::new().unwrap();
    finish(&config(MANY, &kept), straight.path(), Start::Fresh);
    assert!(!Folder::new(straight.path()).evaluations().exists());

    let config = config(MANY, &[&kept[..], &["evaluation.every=4"]].concat());
    let folder = TempDir::new().unwrap();
    let summary = finish(&config, folder.path(), Start::Fresh);
    assert!(weights(folder.path()) == weights(straight.path()));
    let all = evaluations(folder.path());
    let steps: Vec<u64> = all.iter().map(|line| line.step).collect();
    assert_eq!(steps, [4, 8, 9]);
    let last = all.last().unwrap();
    assert_eq!(last.tasks, summary.tasks);
    let loss = |all: &[Validation]| all.iter().map(|one| one.loss).collect::<Vec<_>>();
    assert_eq!(loss(&last.validation), loss(&summary.validation));
    assert_ne!(loss(&all[0].validation), loss(&all[1].validation));
    let tokens = |step| {
        let lines = lines(folder.path());
        lines.iter().find(|line| line.step == step).unwrap().tokens
    };
    assert!(all.iter().all(|line| line.tokens == tokens(line.step)));

    // Stopped at a step, or by the first task that an evaluation has played.
    for stop in 1..=9 {
        for during in [false, true] {
            let folder = TempDir::new().unwrap();
            let reached = AtomicU64::new(0);
            let stopper = AtomicBool::new(false);
            let mut watch = |event: Event| {
                let stops = match event {
                    Event::Step { step, .. } => {
                        reached.store(step, Ordering::Relaxed);
                        !during && step == stop
                    }
                    Event::Evaluation { .. } => during && reached.load(Ordering::Relaxed) >= stop,
                    _ => false,
                };
                stopper.fetch_or(stops, Ordering::Relaxed);
            };
            let options = Options {
                folder: &Folder::new(folder.path()),
                start: Start::Fresh,
                stop: &stopper,
                watch: &mut watch,
            };
            let outcome = train(Cpu::new(), &config, options).unwrap();
            assert!(matches!(outcome, Outcome::Stopped { .. }), "{outcome:?}");
            finish(&config, folder.path(), Start::Resume);
            assert_eq!(evaluations(folder.path()), all, "stopped after {stop}");
        }
    }
}

#[test]
fn thread_count_does_not_change_a_bit() {
    for (text, episodes) in [
        (HALLWAY, &["data.episodes=200"][..]),
        (RECALL, &["data.episodes=200"]),
        (
            MANY,
            &["tasks.0.data.episodes=200", "tasks.1.data.episodes=200"],
        ),
    ] {
        let bigger = ["train.batch_tokens=1500", "model.width=32"];
        let config = config(text, &[episodes, &bigger].concat());
        let of = |threads| {
            let folder = TempDir::new().unwrap();
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let summary = pool.install(|| finish(&config, folder.path(), Start::Fresh));
            (model_bytes(folder.path()), summary.success_rate)
        };
        let one = of(1);
        assert!(one == of(2) && one == of(5));
    }
}

#[test]
fn several_tasks_are_reported_one_by_one() {
    let folder = TempDir::new().unwrap();
    let config = config(MANY, &[]);
    let summary = finish(&config, folder.path(), Start::Fresh);
    assert_eq!((summary.task, summary.episodes), (None, 18));
    let told: Vec<_> = summary
        .tasks
        .iter()
        .map(|task| {
            (
                task.label.as_str(),
                task.task.as_str(),
                task.held_out,
                task.episodes,
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            ("recall", "recall", false, 6),
            ("hallway", "hallway", false, 6),
            ("longer", "recall", true, 6)
        ]
    );
    let rates = summary.tasks.iter().map(|task| task.success_rate);
    let mean = rates.sum::<f64>() / 3.0;
    assert!((summary.success_rate.unwrap() - mean).abs() < 1e-12);
    let saved = std::fs::read_to_string(Folder::new(folder.path()).summary()).unwrap();
    let saved: serde_json::Value = serde_json::from_str(&saved).unwrap();
    assert_eq!(saved["tasks"][2]["label"], "longer");

    let (model, header) = load_model(&Folder::new(folder.path()).model(), Cpu::new()).unwrap();
    assert_eq!(model.spaces().families.len(), 2);
    assert_eq!(header.target_returns, [1.0, 0.9, 1.0]);
    // What one task does is the same, whoever else is evaluated.
    let tasks = header.config.task_list();
    for (index, reported) in summary.tasks.iter().enumerate() {
        let conditions = Conditions {
            episodes: 6,
            seed: 0,
            target_return: header.target_returns[index],
            return_scale: tasks[index].data.return_scale,
        };
        let task = tasks[index].task.as_ref().unwrap();
        let stop = AtomicBool::new(false);
        let alone = evaluate(&model, task, &conditions, &stop, |_| {})
            .unwrap()
            .unwrap();
        assert_eq!(alone.success_rate(), reported.success_rate);
        assert_eq!(alone.mean_return, reported.mean_return);
    }
    let output = dtmem(
        folder.path(),
        &[
            "eval",
            &folder.path().display().to_string(),
            "--episodes",
            "2",
        ],
    );
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&shown["episodes"], &shown["tasks"][1]["episodes"]),
        (&6.into(), &2.into())
    );
    assert!(text(&output.stderr).contains("longer (held out): success rate"));
}

#[test]
fn a_list_of_one_task_trains_the_bits_of_that_task() {
    let of = |text: &str| {
        let folder = TempDir::new().unwrap();
        finish(&config(text, &[]), folder.path(), Start::Fresh);
        let (model, _) = load_model(&Folder::new(folder.path()).model(), Cpu::new()).unwrap();
        let values: Vec<f32> = model.values().unwrap();
        let parameters = model.parameters().iter();
        let bits = |span: std::ops::Range<usize>| values[span].iter().map(|x| x.to_bits());
        parameters
            .flat_map(|parameter| bits(parameter.span.range()))
            .collect::<Vec<u32>>()
    };
    let listed = RECALL
        .replace("[task]", "[[tasks]]\n[tasks.task]")
        .replace("[data]", "[tasks.data]");
    assert!(of(RECALL) == of(&listed));
}

#[test]
fn seed_changes_the_model() {
    let folder = TempDir::new().unwrap();
    finish(&config(HALLWAY, &["seed=8"]), folder.path(), Start::Fresh);
    assert_ne!(model_bytes(folder.path()), model_bytes(finished().path()));
}

#[test]
fn a_batch_holds_all_demonstrations_where_they_are_few() {
    let folder = TempDir::new().unwrap();
    let few = ["data.episodes=3", "train.batch_tokens=4096"];
    let summary = finish(&config(HALLWAY, &few), folder.path(), Start::Fresh);
    let tokens: Vec<u64> = lines(folder.path())
        .iter()
        .map(|line| line.tokens)
        .collect();
    let all = tokens[0] / 3; // the first line is that of step 3
    assert!((15..=60).contains(&all), "{all} tokens of three episodes");
    assert_eq!(tokens.last(), Some(&(all * summary.steps)));
}

#[test]
fn a_folder_with_a_run_is_not_overwritten_unless_asked() {
    let folder = TempDir::new().unwrap();
    let (first, second) = (config(HALLWAY, &[]), config(HALLWAY, &["seed=8"]));
    let error = message(&first, folder.path(), Start::Resume);
    assert!(error.contains("no run to resume"), "{error}");
    finish(&first, folder.path(), Start::Fresh);
    let before = model_bytes(folder.path());
    let error = message(&second, folder.path(), Start::Fresh);
    for part in ["--resume", "--overwrite", "--out"] {
        assert!(error.contains(part), "{error}");
    }
    let error = message(&second, folder.path(), Start::Resume);
    assert!(
        error.contains("seed = 7") && error.contains("seed = 8"),
        "{error}"
    );
    assert_eq!(
        model_bytes(folder.path()),
        before,
        "a refused start changes nothing"
    );
    finish(&second, folder.path(), Start::Overwrite);
    assert_ne!(model_bytes(folder.path()), before);
}

#[test]
fn a_run_that_is_refused_leaves_its_folder_as_it_was() {
    let folder = TempDir::new().unwrap();
    let (right, wrong) = (
        config(HALLWAY, &[]),
        config(HALLWAY, &["train.batch_tokens=19"]),
    );
    assert!(message(&wrong, folder.path(), Start::Fresh).contains("train.batch_tokens"));
    finish(&right, folder.path(), Start::Fresh);
    let files = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    let names = ["config.toml", "metrics.jsonl", "model.safetensors"];
    let before = names.map(files);
    assert!(message(&wrong, folder.path(), Start::Overwrite).contains("train.batch_tokens"));
    assert_eq!(names.map(files), before);
}

#[test]
fn a_kill_between_the_two_files_leaves_a_run_that_resumes() {
    let config = config(HALLWAY, &[]);
    let folder = TempDir::new().unwrap();
    run(&config, folder.path(), Start::Fresh, Some(4)).unwrap();
    let old_model = model_bytes(folder.path());
    run(&config, folder.path(), Start::Resume, Some(8)).unwrap();
    // As if killed after the state of step 8 was renamed, with the model half written.
    let files = Folder::new(folder.path());
    std::fs::write(files.model(), &old_model).unwrap();
    let mut half = files.model().into_os_string();
    half.push(".tmp");
    std::fs::write(&half, &old_model[..old_model.len() / 2]).unwrap();
    assert_eq!(load_model(&files.model(), Cpu::new()).unwrap().1.step, 4);
    finish(&config, folder.path(), Start::Resume);
    assert_eq!(model_bytes(folder.path()), model_bytes(finished().path()));
    // And before the first checkpoint there is nothing to lose.
    std::fs::remove_file(files.state()).unwrap();
    finish(&config, folder.path(), Start::Resume);
    assert_eq!(model_bytes(folder.path()), model_bytes(finished().path()));
}

#[test]
fn loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint() {
    let folder = TempDir::new().unwrap();
    // The first step leaves finite parameters, with which the second overflows.
    let wild = config(
        HALLWAY,
        &[
            "train.learning_rate=1e30",
            "train.checkpoint_every=1",
            "train.schedule=constant",
        ],
    );
    let error = message(&wild, folder.path(), Start::Fresh);
    let saved = load_model(&Folder::new(folder.path()).model(), Cpu::new())
        .unwrap()
        .1
        .step;
    for part in [
        format!("step {}: ", saved + 1),
        format!("the checkpoint of step {saved} is in"),
        "a finite number".to_owned(),
    ] {
        assert!(error.contains(&part), "{part} is missing in: {error}");
    }
    assert!(
        lines(folder.path())
            .iter()
            .all(|line| line.loss.is_finite())
    );
}

#[test]
fn loss_that_is_not_finite_is_found_before_the_next_checkpoint() {
    let folder = TempDir::new().unwrap();
    let wild = config(
        HALLWAY,
        &[
            "train.learning_rate=1e30",
            "train.schedule=constant",
            "train.log_every=4",
            "train.checkpoint_every=4",
        ],
    );
    let error = message(&wild, folder.path(), Start::Fresh);
    for part in ["step 2: ", "no checkpoint had been written yet"] {
        assert!(error.contains(part), "{part} is missing in: {error}");
    }
    assert!(lines(folder.path()).is_empty() && !Folder::new(folder.path()).state().exists());
}

#[test]
fn configurations_that_do_not_fit_the_data_are_refused() {
    let folder = TempDir::new().unwrap();
    let refused = |text: &str, overrides: &[&str], parts: &[&str]| {
        let error = message(&config(text, overrides), folder.path(), Start::Overwrite);
        for part in parts {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    };
    refused(
        HALLWAY,
        &["train.batch_tokens=19"],
        &["train.batch_tokens", "19", "at least 20"],
    );
    refused(
        MANY,
        &["train.batch_tokens=9999"],
        &["train.batch_tokens", "at most"],
    );
    refused(
        RECALL,
        &["model.front_end=convolution"],
        &["model.front_end", "linear"],
    );

    let file = folder.path().join("own.safetensors");
    let path = format!("data.file={}", file.display());
    refused(HALLWAY, &[&path], &["own.safetensors"]);
    let task: Task = serde_json::from_str(r#"{"name":"recall"}"#).unwrap();
    let set = Demonstrations::generate(&task, 5, 0, 1.0, |_| {}).unwrap();
    set.save(&file).unwrap();
    refused(
        HALLWAY,
        &[&path],
        &["data.file", "own.safetensors", "[7, 7, 3]", "hallway"],
    );
    refused(
        RECALL,
        &[&path, "data.episodes=6"],
        &["data.episodes", "6", "at most the 5"],
    );
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    refused(RECALL, &[&path], &["own.safetensors"]);
}

#[test]
fn own_demonstrations_train_without_a_task() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("own.safetensors");
    let task: Task = serde_json::from_str(r#"{"name":"hallway","length":1}"#).unwrap();
    let set = Demonstrations::generate(&task, 30, 7, 1.0, |_| {}).unwrap();
    set.save(&file).unwrap();
    let path = format!("data.file={}", file.display());
    let out = folder.path().join("run");
    let without = [&path, "task=", "data.validation=0"];
    let summary = finish(&config(HALLWAY, &without), &out, Start::Fresh);
    assert_eq!((summary.task, summary.success_rate), (None, None));
    assert_eq!(summary.validation, []);
    assert!(out.join("attention.png").exists());
    load_model(&Folder::new(&out).model(), Cpu::new()).unwrap();
    // The same demonstrations give the same losses, wherever they come from.
    let mine: Vec<f64> = lines(&out).iter().map(|line| line.action_loss).collect();
    let generated: Vec<f64> = lines(finished().path())
        .iter()
        .map(|line| line.action_loss)
        .collect();
    assert_eq!(mine, generated);
}

/// A file of episodes in which the action is twice the first number of the observation.
fn steering(file: &Path, episodes: u32) {
    let mut set = Demonstrations::new(Family {
        observation: ObservationSpace::reals([2]),
        action: ActionSpace::Continuous(1),
    })
    .unwrap();
    for episode in 0..episodes {
        let steps = 3 + episode as usize % 3;
        let observations: Vec<f32> = (0..2 * steps)
            .map(|index| (episode as f32 * 1.7 + index as f32 * 0.9).sin())
            .collect();
        let actions: Vec<f32> = observations.iter().step_by(2).map(|x| 2.0 * x).collect();
        set.push(EpisodeView {
            observations: (&observations).into(),
            actions: (&actions).into(),
            rewards: &vec![1.0; steps],
            pairs: &[],
            annotated: false,
        })
        .unwrap();
    }
    set.save(file).unwrap();
}

#[test]
fn tasks_with_and_without_pairs_share_a_memory_that_is_taught() {
    let folder = TempDir::new().unwrap();
    let overrides = [
        "loss.lambda=10",
        "loss.supervise=memory",
        "tasks.1.data.annotated=0",
        "tasks.0.data.validation=0.2",
        "tasks.1.data.validation=0.2",
    ];
    let summary = finish(&config(MANY, &overrides), folder.path(), Start::Fresh);
    let [recall, hallway] = &summary.validation[..] else {
        panic!("{:?}", summary.validation);
    };
    assert!(recall.memory_loss.is_some_and(|loss| loss > 0.0));
    assert_eq!(hallway.memory_loss, None, "nothing to measure it on");
    let drawn = |name: &str| folder.path().join(name).exists();
    assert!(drawn("recall.png") && !drawn("attention.png"));
}

#[test]
fn own_files_of_real_numbers_train_beside_a_task_and_are_measured_on_what_was_kept() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("steering.safetensors");
    steering(&file, 60);
    let own = format!("tasks.1.data.file={}", file.display());
    let overrides = [
        own.as_str(),
        "tasks.1.task=",
        "tasks.1.data.episodes=",
        "tasks.1.data.validation=0.25",
        "tasks.0.share=1",
        "train.epochs=30",
    ];
    let config = config(MANY, &overrides);
    let out = folder.path().join("run");
    let summary = finish(&config, &out, Start::Fresh);
    assert_eq!(summary.tasks.len(), 2, "the file has no task to play");
    let [validation] = &summary.validation[..] else {
        panic!("{:?}", summary.validation);
    };
    assert_eq!(validation.label, "steering");
    assert_eq!((validation.episodes, validation.accuracy), (15, None));
    // The mean of the squared actions, about 2, is what a model gets that always says 0.
    assert!(validation.loss < 1.0, "{validation:?}");
    let told = dtmem(folder.path(), &["eval", &out.display().to_string()]);
    let told: serde_json::Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(told["validation"][0]["loss"], validation.loss);
    let shown = dtmem(
        folder.path(),
        &["demos", "--inspect", &file.display().to_string()],
    );
    let shown = text(&shown.stdout);
    for part in [
        "[2], real numbers",
        "actions of 1 real numbers",
        "action [0]",
    ] {
        assert!(shown.contains(part), "{part} is missing in: {shown}");
    }
}

#[test]
fn unwritable_folder_is_named_before_anything_is_generated() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = message(&config(HALLWAY, &[]), &file.join("run"), Start::Fresh);
    assert!(
        error.contains(&file.join("run").display().to_string()),
        "{error}"
    );
}

#[test]
fn evaluation_does_not_depend_on_how_many_act_at_once() {
    let folder = Folder::new(finished().path());
    let (model, header) = load_model(&folder.model(), Cpu::new()).unwrap();
    let task = header.config.task.as_ref().unwrap();
    let stop = AtomicBool::new(false);
    let play = |episodes| {
        let conditions = Conditions {
            episodes,
            seed: 3,
            target_return: header.target_returns[0],
            return_scale: 1.0,
        };
        let result = evaluate(&model, task, &conditions, &stop, |_| {});
        result.unwrap().unwrap()
    };
    // Prefixes of one list of episodes: each one alone adds what it adds in company.
    let mut before = 0;
    for episodes in 1..=8 {
        let successes = play(episodes).successes;
        assert!(successes == before || successes == before + 1);
        before = successes;
    }
}

#[test]
fn checkpoint_of_another_model_is_refused_by_name() {
    let folder = finished().path();
    let bytes = model_bytes(folder);
    // One letter for each byte, so that places agree.
    let letter = |byte: &u8| match byte.is_ascii() {
        true => char::from(*byte),
        false => '?',
    };
    let text: String = bytes.iter().map(letter).collect();
    let path = Path::new("other.safetensors");
    // The same length, so that the file stays whole.
    for (from, to, part) in [
        ("\\\"width\\\":8", "\\\"width\\\":4", "tensor"),
        ("\\\"heads\\\":2", "\\\"heads\\\":3", "model.heads"),
        ("\\\"version\\\":2", "\\\"version\\\":1", "version"),
        ("\\\"discrete\\\":7", "\\\"discrete\\\":6", "spaces"),
        ("\\\"length\\\":1", "\\\"length\\\":9", "spaces"),
        ("\\\"dtmem\\\"", "\\\"dtmen\\\"", ""),
    ] {
        if let Some(place) = text.find(from) {
            let mut other = bytes.clone();
            other[place..place + from.len()].copy_from_slice(to.as_bytes());
            let error = model_from_bytes(path, &other, Cpu::new())
                .unwrap_err()
                .to_string();
            assert!(error.contains(part), "{to}: {error}");
        } else {
            assert!(part.is_empty(), "{from} is not in the header");
        }
    }
    for length in [0, 7, 8, 100, bytes.len() - 1] {
        let error = model_from_bytes(path, &bytes[..length], Cpu::new())
            .unwrap_err()
            .to_string();
        assert!(error.contains("other.safetensors"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_checkpoints_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        header_only: bool,
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let folder = Folder::new(finished().path());
        for file in [folder.model(), folder.state()] {
            let mut bytes = std::fs::read(&file).unwrap();
            let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            for (place, byte) in &edits {
                let place = place.index(if header_only { header } else { bytes.len() });
                bytes[place] = *byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Err(error) = model_from_bytes(&file, &bytes, Cpu::new()) {
                prop_assert!(error.to_string().len() > 10);
            }
            if let Err(error) = state_from_bytes(&file, &bytes, 100) {
                prop_assert!(error.to_string().len() > 10);
            }
        }
    }
}

#[test]
fn command_trains_evaluates_and_prints_one_json_line() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("toy.toml"), HALLWAY).unwrap();
    let output = dtmem(folder.path(), &["train", "toy.toml", "--threads", "1"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("without memory reaches about 50.0 %"));
    let trained: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut keys: Vec<&String> = trained.as_object().unwrap().keys().collect();
    keys.sort();
    assert_eq!(
        keys,
        [
            "episodes",
            "interval",
            "parameters",
            "real_tokens_per_s",
            "seconds",
            "steps",
            "success_rate",
            "task",
            "trained_parameters"
        ]
    );
    let output = dtmem(folder.path(), &["eval", "runs/toy"]);
    let evaluated: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(trained["success_rate"], evaluated["success_rate"]);
    let output = dtmem(
        folder.path(),
        &["eval", "runs/toy", "--episodes", "3", "--seed", "5"],
    );
    let evaluated: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(evaluated["episodes"], 3);
    let output = dtmem(folder.path(), &["train", "toy.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("runs/toy: there is a run in this folder already"));
}

#[test]
fn command_writes_and_shows_demonstrations() {
    let folder = TempDir::new().unwrap();
    let write = [
        "demos",
        "recall",
        "--episodes",
        "9",
        "--steps",
        "5",
        "--pairs",
        "2",
    ];
    let output = dtmem(
        folder.path(),
        &[&write[..], &["--out", "d.safetensors"]].concat(),
    );
    assert!(
        output.status.success() && output.stdout.is_empty(),
        "{}",
        text(&output.stderr)
    );
    let output = dtmem(folder.path(), &["demos", "--inspect", "d.safetensors"]);
    let shown = text(&output.stdout);
    for part in [
        "recall",
        "episodes       9",
        "steps          54",
        "9 episodes, 9 pairs",
    ] {
        assert!(shown.contains(part), "{part} is missing in: {shown}");
    }
}

#[test]
fn command_refuses_bad_input_with_exit_code_2() {
    let folder = TempDir::new().unwrap();
    for (arguments, part) in [
        (vec!["train", "none.toml"], "none.toml"),
        (vec!["eval", "none"], "none/model.safetensors"),
        (vec!["demos", "--inspect", "none"], "none"),
        (vec!["demos", "maze", "--out", "x"], "hallway"),
        (
            vec!["demos", "hallway", "--pairs", "2", "--out", "x"],
            "pairs",
        ),
        (
            vec!["demos", "hallway", "--length", "0", "--out", "x"],
            "length",
        ),
        (vec!["demos", "hallway"], "--out"),
        (vec!["info", "--threads", "0"], "--threads: found 0"),
        (vec!["bench", "--filter", "none"], "attention_backward"),
        (vec!["bench", "--device", "cuda:99"], "--device cuda:99: "),
        (vec!["verify", "none.safetensors"], "none.safetensors"),
        (vec!["fly"], "fly"),
    ] {
        let output = dtmem(folder.path(), &arguments);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(
            error.contains("error: ") && error.contains(part),
            "{arguments:?}: {error}"
        );
        assert!(!error.contains("panicked"), "{error}");
    }
}

#[test]
fn command_says_what_this_build_can_do() {
    let folder = TempDir::new().unwrap();
    let shown = text(&dtmem(folder.path(), &["info"]).stdout);
    for part in ["version", "features", "cpu", "gpus", "kernel images"] {
        assert!(shown.contains(part), "{shown}");
    }
}

#[test]
fn a_reader_that_leaves_ends_the_command_without_a_panic() {
    let bench = ["bench", "--device", "cpu", "--filter", "layer_norm/acting"];
    for arguments in [&["info"][..], &bench] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_dtmem"))
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(
            error.contains("error: ") && !error.contains("panicked"),
            "{error}"
        );
    }
}

#[cfg(unix)]
#[test]
fn interrupt_saves_and_says_how_to_go_on() {
    use std::io::{BufRead, BufReader};

    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("toy.toml"), HALLWAY).unwrap();
    let long = [
        "train",
        "toy.toml",
        "--device",
        "cpu",
        "--set",
        "train.steps=1000000",
    ];
    let mut child = Command::new(env!("CARGO_BIN_EXE_dtmem"))
        .args(long)
        .current_dir(folder.path())
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap())
        .lines()
        .map(Result::unwrap);
    assert!(said.by_ref().any(|line| line.contains("1000000 steps")));
    // The first line of metrics tells that training is under way.
    let files = Folder::new(folder.path().join("runs/toy"));
    while std::fs::metadata(files.metrics()).map_or(0, |metadata| metadata.len()) == 0 {
        std::thread::yield_now();
    }
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    let rest: Vec<String> = said.collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    let hint = rest.last().unwrap();
    assert!(
        hint.contains(
            "dtmem train toy.toml --set 'train.steps=1000000' --device cpu --out runs/toy --resume"
        ),
        "{hint}"
    );
    let (_, header) = load_model(&files.model(), Cpu::new()).unwrap();
    assert!(
        header.step > 0 && hint.contains(&format!("step {}", header.step)),
        "{hint}"
    );
    assert_eq!(
        lines(files.path()).last().unwrap().step,
        header.step,
        "the steps since the last line are logged"
    );
}
