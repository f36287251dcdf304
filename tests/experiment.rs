//! Experiments at toy size: what they write, that they go on where they stopped, what they refuse.

#![cfg(feature = "trainer")]

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use dtmem::experiment::grid::{Base, Grid, Measure, OF_TRAINING};
use dtmem::experiment::run::{CellResult, End, Event, Request, run};
use dtmem::experiment::statistics::{Mean, quantile};
use dtmem::experiment::{EXPERIMENTS, Error, Experiment, Size};
use dtmem::tasks::{AnnotationNoise, Demonstrations, Task};
use dtmem::train::config::Config;
use dtmem::train::device::DeviceChoice;
use dtmem::train::run as runs;
use proptest::prelude::*;
use tempfile::TempDir;

const TOY: Base = Base::Train {
    name: "toy.toml",
    text: r#"
        [task]
        name = "hallway"
        length = 1
        [data]
        episodes = 20
        [model]
        front_end = "linear"
        width = 4
        layers = 1
        heads = 2
        feed_forward = 8
        [train]
        steps = 4
        batch_tokens = 90
        learning_rate = 1e-2
        [evaluation]
        episodes = 5
    "#,
};
const EXPERIMENT: Experiment = Experiment {
    name: "toy",
    about: "",
    takes: ["", ""],
    grid,
};

fn grid(_: Size) -> Grid {
    const MEASURES: &[Measure] = &[
        Measure::share("success_rate", "success rate"),
        Measure::share("after", "recall"),
        Measure::count("parameters", "parameters"),
    ];
    let mut grid = Grid::new(MEASURES, 2);
    grid.cell("width", "width 4", TOY, &[]);
    grid.cell("width", "width 8, as an \"extra\"", TOY, &["model.width=8"]);
    let set = ["patterns=4", "width=8", "memory.slots=4", "train.steps=2"];
    grid.cell("memory", "alone", Base::Memory, &set);
    grid
}

/// What is changed in a request of the toy experiment.
#[derive(Default)]
struct Changed {
    seeds: Option<u64>,
    set: Vec<String>,
    overwrite: bool,
    /// Stops in the step with this number of all steps, from 1.
    stop_in: Option<usize>,
    width: Option<usize>,
}

/// The end, and the cells that were begun.
fn toy(out: &Path, changed: Changed) -> Result<(End, Vec<(String, u64)>), Error> {
    let stop = AtomicBool::new(false);
    let (mut begun, mut steps) = (Vec::new(), 0);
    let mut watch = |event: Event| match event {
        Event::Cell { cell, seed, .. } => begun.push((cell.name.clone(), seed)),
        Event::Run(runs::Event::Step { .. }) => {
            steps += 1;
            stop.store(changed.stop_in == Some(steps), Ordering::Relaxed);
        }
        Event::Run(_) => {}
    };
    let mut request = Request {
        device: DeviceChoice::Cpu,
        set: &changed.set,
        overwrite: changed.overwrite,
        ..Request::new(
            &EXPERIMENT,
            Size::Quick,
            changed.seeds,
            out,
            &stop,
            &mut watch,
        )
    };
    if let Some(width) = changed.width {
        request.grid.cells[0].set = vec![format!("model.width={width}")];
    }
    let end = run(request)?;
    Ok((end, begun))
}

const FILES: [&str; 3] = ["results.csv", "results.md", "results.png"];

fn files(out: &Path) -> Vec<Vec<u8>> {
    FILES
        .map(|file| std::fs::read(out.join(file)).unwrap())
        .into()
}

fn text(out: &Path, file: &str) -> String {
    std::fs::read_to_string(out.join(file)).unwrap()
}

#[test]
fn two_runs_give_the_same_bits_also_when_one_is_stopped_twice_and_killed() {
    let (straight, stopped) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (end, begun) = toy(straight.path(), Changed::default()).unwrap();
    assert_eq!((end, begun.len()), (End::Finished, 6));

    let out = stopped.path();
    // In the second cell; then in the memory alone, which has no checkpoints.
    for (stop_in, done, first) in [(6, 1, "width 4"), (3, 2, "width 8, as an \"extra\"")] {
        let changed = Changed {
            stop_in: Some(stop_in),
            ..Changed::default()
        };
        let (end, begun) = toy(out, changed).unwrap();
        assert_eq!(end, End::Stopped { done, total: 6 });
        assert_eq!(begun[0], (first.to_owned(), 0));
        let partial = text(out, "results.md");
        assert!(partial.contains("1 of 2"), "{partial}");
    }
    // As a kill between training and the result would leave it.
    let result = out.join("cells/width-4/seed-0/result.json");
    std::fs::remove_file(&result).unwrap();
    let (end, begun) = toy(out, Changed::default()).unwrap();
    assert_eq!((end, begun.len()), (End::Finished, 5));
    assert_eq!(begun[0], ("width 4".to_owned(), 0));
    assert!(
        files(straight.path()) == files(out),
        "{}",
        text(out, "results.md")
    );

    // Nothing is left to do; more seeds add to what is there.
    assert!(toy(out, Changed::default()).unwrap().1.is_empty());
    let more = Changed {
        seeds: Some(3),
        ..Changed::default()
    };
    let begun = toy(out, more).unwrap().1;
    assert_eq!(
        begun.iter().map(|(_, seed)| *seed).collect::<Vec<_>>(),
        [2, 2, 2]
    );
}

#[test]
fn table_and_csv_hold_the_results_their_means_and_intervals() {
    let out = TempDir::new().unwrap();
    let out = out.path();
    toy(out, Changed::default()).unwrap();
    let result = |cell: &str, seed: u64| -> CellResult {
        let path = out.join(format!("cells/{cell}/seed-{seed}/result.json"));
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    };
    let csv = text(out, "results.csv");
    let rows: Vec<&str> = csv.lines().collect();
    assert_eq!(rows.len(), 7, "{csv}");
    let head = "group,cell,seed,success_rate,after,parameters,without_memory,failure,settings";
    assert_eq!(rows[0], head);
    let first = result("width-4", 1);
    let numbers = [first.values["success_rate"], first.values["parameters"]];
    let expected = format!(
        "width,width 4,1,{},,{},0.5,,toy.toml",
        numbers[0], numbers[1]
    );
    assert_eq!(rows[2], expected);
    assert!(
        rows[3].starts_with("width,\"width 8, as an \"\"extra\"\"\",0,"),
        "{}",
        rows[3]
    );
    assert!(
        rows[3].ends_with("toy.toml --set model.width=8"),
        "{}",
        rows[3]
    );

    let recalls = [0, 1].map(|seed| result("alone", seed).values["after"]);
    let mean = (recalls[0] + recalls[1]) / 2.0;
    // Of two values, s/√n is half of their distance.
    let half = 12.7062 * (recalls[0] - recalls[1]).abs() / 2.0;
    let (low, high) = ((mean - half).max(0.0), (mean + half).min(1.0));
    let row = format!("| alone | – | {mean:.3} ({low:.3} to {high:.3}) | – | 0.250 | 2 |");
    let table = text(out, "results.md");
    assert!(table.contains(&row), "{row}\n{table}");
    let one = TempDir::new().unwrap();
    toy(
        one.path(),
        Changed {
            seeds: Some(1),
            ..Changed::default()
        },
    )
    .unwrap();
    let row = format!("| alone | – | {:.3} | – | 0.250 | 1 |", recalls[0]);
    assert!(text(one.path(), "results.md").contains(&row));
    // What only an unfinished run needs is gone; the model is there.
    let cell = runs::Folder::new(out.join("cells/width-4/seed-0"));
    assert!(cell.model().exists() && !cell.state().exists());
}

#[test]
fn result_of_other_settings_is_refused_or_run_again() {
    let out = TempDir::new().unwrap();
    let out = out.path();
    // The second cell is left half trained.
    let half = Changed {
        seeds: Some(1),
        stop_in: Some(6),
        ..Changed::default()
    };
    toy(out, half).unwrap();
    let changed = |overwrite| Changed {
        seeds: Some(1),
        set: vec!["train.learning_rate=0.02".to_owned()],
        overwrite,
        ..Changed::default()
    };
    // The memory alone has this key as well, so that one setting can be given for all cells.
    let error = toy(out, changed(false)).unwrap_err().to_string();
    assert!(
        error.contains("train.learning_rate = 0.01") && error.contains("0.02"),
        "{error}"
    );
    let (end, begun) = toy(out, changed(true)).unwrap();
    assert_eq!((end, begun.len()), (End::Finished, 3));
    let fresh = TempDir::new().unwrap();
    toy(fresh.path(), changed(false)).unwrap();
    assert!(files(out) == files(fresh.path()));

    // A changed grid: only the cell that changed is run again.
    let wider = |overwrite| Changed {
        width: Some(12),
        ..changed(overwrite)
    };
    let error = toy(out, wider(false)).unwrap_err().to_string();
    assert!(error.contains("model.width = 4"), "{error}");
    let (_, begun) = toy(out, wider(true)).unwrap();
    assert_eq!(begun, [("width 4".to_owned(), 0)]);
    // A damaged result is named.
    let result = out.join("cells/alone/seed-0/result.json");
    std::fs::write(&result, "{").unwrap();
    let error = toy(out, wider(false)).unwrap_err().to_string();
    assert!(error.contains("result.json"), "{error}");
    assert_eq!(toy(out, wider(true)).unwrap().1.len(), 1);
}

#[test]
fn run_whose_loss_is_not_finite_is_a_result() {
    let out = TempDir::new().unwrap();
    let stop = AtomicBool::new(false);
    let mut watch = |_: Event| {};
    let mut request = Request {
        device: DeviceChoice::Cpu,
        ..Request::new(
            &EXPERIMENT,
            Size::Quick,
            Some(1),
            out.path(),
            &stop,
            &mut watch,
        )
    };
    request.grid.cells.truncate(1);
    request.grid.cells[0].set = vec!["train.learning_rate=1e38".to_owned()];
    assert_eq!(run(request).unwrap(), End::Finished);
    let table = text(out.path(), "results.md");
    assert!(table.contains("1 not finite"), "{table}");
    assert!(text(out.path(), "results.csv").contains(",step "));
}

#[test]
fn every_shipped_grid_has_names_of_its_own_and_settings_that_are_accepted() {
    for experiment in EXPERIMENTS {
        for size in [Size::Quick, Size::Full] {
            let grid = (experiment.grid)(size);
            let mut folders: Vec<String> = grid.cells.iter().map(|cell| cell.folder()).collect();
            folders.sort_unstable();
            folders.dedup();
            assert_eq!(folders.len(), grid.cells.len(), "{}", experiment.name);
            // Those that adapt a cell can be read when its model is there.
            let own = grid.cells.iter().filter(|cell| cell.adapts.is_none());
            for cell in own {
                let accepted = match cell.base {
                    Base::Train { name, text } => Config::parse(name, text, &cell.set).map(|_| ()),
                    Base::Memory => {
                        dtmem::experiment::memory::MemoryTest::parse(&cell.set).map(|_| ())
                    }
                };
                accepted
                    .unwrap_or_else(|error| panic!("{}, {}: {error}", experiment.name, cell.name));
            }
        }
    }
    assert_eq!(OF_TRAINING[0].key, "success_rate");
}

#[test]
fn quantiles_and_intervals_agree_with_published_values() {
    // Any table of Student's distribution, two-sided 95 %.
    for (degrees, published) in [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (9, 2.262),
        (10, 2.228),
        (29, 2.045),
        (120, 1.980),
    ] {
        assert!(
            (quantile(degrees) - published).abs() < 5e-4,
            "{degrees}: {}",
            quantile(degrees)
        );
    }
    // R: t.test(c(0.976, 0.978, 0.968))$conf.int, 0.9608541 to 0.9871459
    let mean = Mean::of(&[0.976, 0.978, 0.968]).unwrap();
    let [low, high] = mean.interval.unwrap();
    assert!((mean.mean - 0.974).abs() < 1e-12);
    assert!(
        (low - 0.960855).abs() < 1e-5 && (high - 0.987145).abs() < 1e-5,
        "{low} {high}"
    );
    assert_eq!(Mean::of(&[0.5]).unwrap().interval, None);
    assert_eq!(Mean::of(&[]), None);
    assert!(Mean::of(&[0.5, f64::NAN]).unwrap().mean.is_nan());
}

proptest! {
    #[test]
    fn interval_is_a_mean_with_the_standard_error_around_it(
        values in prop::collection::vec(-10.0..10.0_f64, 2..40),
        by in -3.0..3.0_f64,
    ) {
        let Mean { mean, interval } = Mean::of(&values).unwrap();
        let [low, high] = interval.unwrap();
        let n = values.len() as f64;
        let squares: f64 = values.iter().map(|x| x * x).sum::<f64>() - n * mean * mean;
        let half = quantile(values.len() as u64 - 1) * (squares.max(0.0) / (n * (n - 1.0))).sqrt();
        prop_assert!((high - mean - half).abs() < 1e-6 && (mean - low - half).abs() < 1e-6);
        let moved: Vec<f64> = values.iter().map(|x| x + by).collect();
        let [moved_low, _] = Mean::of(&moved).unwrap().interval.unwrap();
        prop_assert!((moved_low - low - by).abs() < 1e-6);
    }

    #[test]
    fn noise_damages_the_share_of_earlier_pairs_that_it_says_and_nothing_else(
        seed: u64,
        dropped in 0.0..0.5_f64,
        random in 0.0..0.3_f64,
        shifted in 0.0..0.2_f64,
    ) {
        let task: Task = "ordering,length=8".parse().unwrap();
        let clean = Demonstrations::generate(&task, 40, seed, 0.9, |_| {}).unwrap();
        let disturbed = |noise| {
            let mut set = clean.clone();
            set.disturb_annotations(&noise, seed).unwrap();
            set
        };
        let noise = AnnotationNoise { dropped, random, shifted };
        let set = disturbed(noise);
        prop_assert_eq!(&set, &disturbed(noise));
        prop_assert_eq!(&clean, &disturbed(AnnotationNoise::default()));
        let earlier = |pairs: &[(u32, u32)]| -> Vec<(u32, u32)> {
            pairs.iter().copied().filter(|(recalling, recalled)| recalled < recalling).collect()
        };
        let (mut kept, mut all) = (0, 0);
        for (before, after) in clean.episodes().zip(set.episodes()) {
            prop_assert_eq!(before.annotated, after.annotated);
            prop_assert_eq!(before.actions, after.actions);
            let diagonal = |pairs: &[(u32, u32)]| pairs.iter().filter(|(a, b)| a == b).count();
            prop_assert_eq!(diagonal(before.pairs), diagonal(after.pairs));
            let right = earlier(before.pairs);
            all += right.len();
            kept += earlier(after.pairs).iter().filter(|pair| right.contains(pair)).count();
        }
        // Some replaced pairs are right by chance; 40 · 0.9 · 16 pairs.
        let share = kept as f64 / all as f64;
        let expected = 1.0 - dropped - random - shifted;
        prop_assert!(share > expected - 0.12 && share < expected + 0.12 + 0.2 * random, "{share} {expected}");

        // Each kind alone, of all pairs.
        let only = |dropped, random, shifted| disturbed(AnnotationNoise { dropped, random, shifted });
        let [none, anywhere, beside] = [only(1.0, 0.0, 0.0), only(0.0, 1.0, 0.0), only(0.0, 0.0, 1.0)];
        for (index, before) in clean.episodes().enumerate() {
            let right = earlier(before.pairs);
            prop_assert!(earlier(none.episode(index).unwrap().pairs).is_empty());
            let any = earlier(anywhere.episode(index).unwrap().pairs);
            prop_assert!(any.len() <= right.len() && (any != right || right.is_empty()));
            for (recalling, recalled) in earlier(beside.episode(index).unwrap().pairs) {
                prop_assert!(right.iter().any(|&(q, p)| q == recalling && p.abs_diff(recalled) == 1));
            }
        }
    }
}

#[test]
fn noise_is_a_setting_of_the_trainer() {
    let Base::Train { name, text } = TOY else {
        unreachable!()
    };
    let parse = |set: &str| Config::parse(name, text, &[set.to_owned()]);
    let config = parse("data.annotation_noise.random=0.25").unwrap();
    assert_eq!(config.data.annotation_noise.random, 0.25);
    // A configuration without noise is written as it was before there was any.
    assert!(
        !parse("seed=1")
            .unwrap()
            .to_toml()
            .unwrap()
            .contains("annotation_noise")
    );
    for (set, expected) in [
        (
            "data.annotation_noise.dropped=1.5",
            "data.annotation_noise.dropped",
        ),
        (
            "data.annotation_noise={random=0.6,shifted=0.6}",
            "at most 1 together",
        ),
        ("data.annotation_noise.droped=1", "`dropped`"),
    ] {
        let error = parse(set).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // It reaches the model: another loss from the first step on.
    let run = |noise: &str| {
        let out = TempDir::new().unwrap();
        let changed = Changed {
            seeds: Some(1),
            set: vec![noise.to_owned()],
            ..Changed::default()
        };
        let stop = AtomicBool::new(false);
        let mut losses = Vec::new();
        let mut watch = |event: Event| {
            if let Event::Run(runs::Event::Metrics(line)) = event {
                losses.push(line.memory_loss);
            }
        };
        let mut request = Request {
            device: DeviceChoice::Cpu,
            set: &changed.set,
            ..Request::new(
                &EXPERIMENT,
                Size::Quick,
                changed.seeds,
                out.path(),
                &stop,
                &mut watch,
            )
        };
        request.grid.cells.truncate(1);
        run_to_end(request);
        losses
    };
    let losses = [
        "data.annotation_noise.random=0",
        "data.annotation_noise.random=1",
    ]
    .map(run);
    assert_ne!(losses[0], losses[1]);
    assert_eq!(losses[0].len(), 1);
}

fn run_to_end(request: Request) {
    assert_eq!(run(request).unwrap(), End::Finished);
}

#[test]
fn training_a_memory_alone_lifts_its_recall() {
    let set = [
        "patterns=4",
        "width=16",
        "memory.slots=16",
        "train.steps=150",
        "segment=2",
    ];
    let set = set.map(str::to_owned);
    let test = dtmem::experiment::memory::MemoryTest::parse(&set).unwrap();
    let run = || {
        test.run(&AtomicBool::new(false), &mut |_| {})
            .unwrap()
            .unwrap()
    };
    let values = run();
    assert!(values["after"] > values["before"] + 0.1, "{values:?}");
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(3)
        .build()
        .unwrap();
    assert_eq!(pool.install(run), values);
}

#[test]
fn command_names_experiments_and_prints_the_table() {
    let dtmem = || Command::new(env!("CARGO_BIN_EXE_dtmem"));
    let help = dtmem().args(["experiment", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    for experiment in EXPERIMENTS {
        assert!(help.contains(experiment.about), "{help}");
    }
    let unknown = dtmem().args(["experiment", "anotation"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("annotation"));
    let out = TempDir::new().unwrap();
    let tiny = ["patterns=2", "width=4", "train.steps=1", "episodes=1"];
    let tiny = tiny.iter().flat_map(|set| ["--set", set]);
    let mut command = dtmem();
    command
        .args(["experiment", "recall", "--seeds", "1", "--out"])
        .arg(out.path())
        .args(tiny);
    let done = command.output().unwrap();
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let table = String::from_utf8(done.stdout).unwrap();
    assert!(
        table.contains("| slots |") && table == text(out.path(), "results.md"),
        "{table}"
    );
}
