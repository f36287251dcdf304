//! Whole runs on the GPU backend. On the host executor, at toy size: devices that take turns, ranks,
//! devices that are too small or get lost. On a GPU where there is one, at full size: its losses.

use std::path::Path;
use std::sync::atomic::Ordering;

use dtmem::backend::gpu::{Compute, CudaDevice, Gpu, HostDevice, Multiply};
use dtmem::backend::{Backend, Cpu, Member};
use dtmem::model::{Model, ModelConfig, ModelError, Training};
use dtmem::train::config::Config;
use dtmem::train::metrics::Line;
use dtmem::train::run::{Outcome, Start};
use half::{bf16, f16};
use tempfile::TempDir;
use toy::{HALLWAY_FOR_KERNELS, assert_near, lines, run_on};

mod data;
mod toy;

fn config(overrides: &[&str]) -> Config {
    toy::config(HALLWAY_FOR_KERNELS, overrides)
}

fn host() -> Gpu<HostDevice, f32> {
    Gpu::new(HostDevice::default())
}

/// The metrics of a whole run.
fn run_whole<B: Backend<Element = f32>>(backend: B, config: &Config) -> Vec<Line> {
    let folder = TempDir::new().unwrap();
    let outcome = run_on(backend, config, folder.path(), Start::Fresh, None).unwrap();
    assert!(matches!(outcome, Outcome::Finished(_)));
    lines(folder.path())
}

/// Of one on the CPU.
fn straight(config: &Config) -> Vec<Line> {
    run_whole(Cpu::new(), config)
}

/// Of one on the host executor.
fn on_host<T: Compute>(config: &Config) -> Vec<Line> {
    run_whole(Gpu::<_, T>::new(HostDevice::default()), config)
}

fn assert_follows(found: &[Line], expected: &[Line]) {
    assert_near(found, expected, 1e-3);
}

#[test]
fn a_checkpoint_of_one_device_goes_on_on_another_and_back() {
    let config = config(&[]);
    let folder = TempDir::new().unwrap();
    let path = folder.path();
    let outcome = run_on(host(), &config, path, Start::Fresh, Some(2)).unwrap();
    assert_eq!(outcome, Outcome::Stopped { step: 2 });
    let outcome = run_on(Cpu::new(), &config, path, Start::Resume, Some(4)).unwrap();
    assert_eq!(outcome, Outcome::Stopped { step: 4 });
    let outcome = run_on(host(), &config, path, Start::Resume, None).unwrap();
    assert!(matches!(outcome, Outcome::Finished(_)));
    assert_follows(&lines(path), &straight(&config));
}

#[test]
fn evaluations_on_the_way_leave_the_recorded_steps_as_they_are() {
    let bits = |every| {
        let config = config(&[
            "model.block=pre_ln",
            "model.attention=segment",
            "model.segment_steps=3",
            "model.memory.slots=6",
            "loss.lambda=0",
            "evaluation.episodes=8",
            every,
        ]);
        let bits = |line: &Line| (line.loss.to_bits(), line.gradient_norm.to_bits());
        let lines = on_host::<bf16>(&config);
        lines.iter().map(bits).collect::<Vec<_>>()
    };
    assert_eq!(bits("evaluation.every=4"), bits("evaluation.every=0"));
}

#[test]
fn a_memory_that_is_taught_what_to_recall_follows_the_cpu() {
    let config = config(&[
        "model.block=pre_ln",
        "model.attention=segment",
        "model.segment_steps=3",
        "model.memory.slots=6",
        "loss.supervise=memory",
        "train.learning_rate=1e-3",
        "train.steps=10",
        "evaluation.episodes=1",
    ]);
    let expected = straight(&config);
    assert_eq!(expected.len(), 10);
    assert!(expected.iter().all(|line| line.memory_loss > 0.0));
    assert_near(&on_host::<f32>(&config), &expected, 1e-3);
    assert_near(&on_host::<bf16>(&config), &expected, 5e-2);
}

#[test]
fn two_ranks_train_as_one_and_the_first_writes() {
    let config = config(&["train.log_every=3"]);
    let folder = TempDir::new().unwrap();
    let ranks = |start, stop_after: Option<u64>| -> Vec<Outcome> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = Member::group(2)
                .into_iter()
                .map(|member| {
                    let backend = Gpu::<_, f32>::new(HostDevice::default().with_member(member));
                    let (config, path) = (&config, folder.path());
                    scope.spawn(move || run_on(backend, config, path, start, stop_after).unwrap())
                })
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join().unwrap();
            threads.into_iter().map(join).collect()
        })
    };
    // Only the first is told to stop, in the middle of its steps: both do at the next line.
    let stopped = ranks(Start::Fresh, Some(1));
    assert!(stopped[0] == stopped[1], "{stopped:?}");
    assert_eq!(stopped[0], Outcome::Stopped { step: 2 });
    let done = ranks(Start::Resume, None);
    assert!(matches!(done[0], Outcome::Finished(_)) && done[1] == Outcome::Helped);
    let found = lines(folder.path());
    let steps: Vec<u64> = found.iter().map(|line| line.step).collect();
    assert_eq!(steps, [2, 3, 4, 6]);
    // Alone, with the same lines.
    let alone = TempDir::new().unwrap();
    run_on(host(), &config, alone.path(), Start::Fresh, None).unwrap();
    assert_follows(&found, &lines(alone.path()));
    let files = |folder: &TempDir| std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(files(&folder), files(&alone));
}

#[test]
fn a_lost_device_is_an_error_and_its_checkpoint_goes_on_elsewhere() {
    let config = config(&[]);
    let folder = TempDir::new().unwrap();
    let mut lifetime = 300;
    let error = loop {
        let device = HostDevice::default().with_lifetime(lifetime);
        let backend = Gpu::<_, f32>::new(device);
        let error = run_on(backend, &config, folder.path(), Start::Overwrite, None).unwrap_err();
        if error.to_string().contains("the checkpoint of step") {
            break error.to_string();
        }
        lifetime += lifetime / 4;
    };
    for part in [
        "step ",
        "the device is lost",
        folder.path().to_str().unwrap(),
    ] {
        assert!(error.contains(part), "{part} is missing in: {error}");
    }
    let outcome = run_on(Cpu::new(), &config, folder.path(), Start::Resume, None).unwrap();
    assert!(matches!(outcome, Outcome::Finished(_)));
    assert_follows(&lines(folder.path()), &straight(&config));
}

/// The first steps, of which a GPU has to have the CPU's losses.
const FIRST: u64 = 50;

/// They follow the CPU's as closely as the precision lets them.
fn assert_first_steps(what: &str, limit: f64, found: &[Line], expected: &[Line]) {
    assert_eq!([found.len(), expected.len()], [FIRST as usize; 2]);
    let mut largest = 0.0_f64;
    for (found, expected) in found.iter().zip(expected) {
        for (found, expected) in [
            (found.loss, expected.loss),
            (found.action_loss, expected.action_loss),
            (found.memory_loss, expected.memory_loss),
        ] {
            let error = (found - expected).abs() / expected.max(1e-2);
            assert!(error < limit, "{what}: {found}, expected {expected}");
            largest = largest.max(error);
        }
    }
    println!("{what}: the losses of {FIRST} steps differ by at most {largest:.1e}");
}

/// A configuration of which so many steps are trained.
fn of_first_steps(text: &str, more: &[&str]) -> Config {
    let steps = format!("train.steps={FIRST}");
    let short = [&steps, "train.log_every=1", "evaluation.episodes=1"];
    toy::config(text, &[&short, more].concat())
}

#[test]
fn the_losses_of_the_first_steps_are_the_cpus() {
    let small = ["train.learning_rate=1e-3", "train.batch_tokens=30"];
    let config = of_first_steps(HALLWAY_FOR_KERNELS, &small);
    let expected = straight(&config);
    assert_first_steps("f32", 2e-3, &on_host::<f32>(&config), &expected);
    assert_first_steps("bf16", 5e-2, &on_host::<bf16>(&config), &expected);
}

#[test]
fn the_losses_of_the_first_steps_on_a_gpu_are_the_cpus() {
    use dtmem::ops::Error;
    match CudaDevice::new(0, Multiply::Exact) {
        Ok(_) => {}
        Err(reason @ (Error::NoDriver { .. } | Error::NoGpu { .. } | Error::NoBlas)) => {
            eprintln!("SKIPPED: a GPU check: {reason}");
            return;
        }
        Err(other) => panic!("{other}"),
    }
    for text in [
        include_str!("../configs/hallway-quick.toml"),
        include_str!("../configs/hallway-memory-quick.toml"),
        include_str!("../configs/recall-quick.toml"),
    ] {
        let config = of_first_steps(text, &["data.episodes=400"]);
        let expected = straight(&config);
        let device = |multiply| CudaDevice::new(0, multiply).unwrap();
        let exact = || device(Multiply::Exact);
        let tf32 = Gpu::<_, f32>::new(device(Multiply::Tf32));
        for (what, limit, found) in [
            ("f32", 2e-3, run_whole(Gpu::<_, f32>::new(exact()), &config)),
            ("tf32", 2e-2, run_whole(tf32, &config)),
            (
                "bf16",
                5e-2,
                run_whole(Gpu::<_, bf16>::new(exact()), &config),
            ),
            ("f16", 2e-2, run_whole(Gpu::<_, f16>::new(exact()), &config)),
        ] {
            assert_first_steps(what, limit, &found, &expected);
        }
    }
}

/// The metrics of so many steps.
fn first_steps<B: Backend<Element = f32>>(backend: B, config: &Config, steps: usize) -> Vec<Line> {
    let (folder, stop_after) = (TempDir::new().unwrap(), Some(steps as u64));
    run_on(backend, config, folder.path(), Start::Fresh, stop_after).unwrap();
    lines(folder.path())
}

/// A configuration of the repository, as small as a test can be.
fn small(file: &Path) -> Config {
    let mut config = Config::load(file, &[]).unwrap();
    if config.tasks.is_empty() {
        config.data.episodes = Some(40);
    }
    for task in &mut config.tasks {
        task.data.episodes = Some(40);
    }
    config.model.width = 32;
    config.model.feed_forward = 16;
    config.train.batch_tokens = 150;
    config.train.log_every = 1;
    config
}

#[test]
fn steps_of_the_quick_configurations_are_the_cpus_and_one_recording_from_the_third_on() {
    const STEPS: usize = 10;
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(configs).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if !name.ends_with("-quick.toml") {
            continue;
        }
        let device = HostDevice::default();
        let graphs = device.graphs();
        let config = small(&path);
        let found = first_steps(Gpu::<_, bf16>::new(device), &config, STEPS);
        let expected = first_steps(Cpu::new(), &config, STEPS);
        assert_near(&found, &expected, 5e-2);
        let [recorded, replayed] =
            [&graphs.recorded, &graphs.replayed].map(|count| count.load(Ordering::Relaxed));
        // The first lets memory grow, and the second is the first of its shape.
        assert_eq!((recorded, replayed), (1, STEPS - 2), "{name}");
        names.push(name);
    }
    assert!(names.len() >= 4, "{names:?}");
}

/// A model on a device of that much memory, and its training.
fn with_memory(bytes: usize) -> Result<Result<(), ModelError>, ModelError> {
    let config = ModelConfig {
        width: 32,
        layers: 2,
        heads: 2,
        feed_forward: 40,
        ..ModelConfig::default()
    };
    let backend = Gpu::<_, half::bf16>::new(HostDevice::default().with_memory(bytes));
    let model = Model::new(backend, config, data::grid(), None)?;
    let batch = data::Data::new(&data::grid(), &[5, 3, 1, 7], 0).pack(&model);
    Ok(Training::new(&model, data::capacity(&batch), 1).map(drop))
}

/// The least number for which this is so.
fn least(holds: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, 1 << 30);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match holds(middle) {
            true => high = middle,
            false => low = middle,
        }
    }
    high
}

#[test]
fn too_little_memory_is_told_with_what_is_needed_and_what_lowers_it() {
    let for_model = least(|bytes| with_memory(bytes).is_ok());
    let for_both = least(|bytes| matches!(with_memory(bytes), Ok(Ok(()))));
    let error = with_memory(for_model / 2).unwrap_err().to_string();
    for part in ["a model of ", " parameters takes ", "model.width"] {
        assert!(error.contains(part), "{part} is missing in: {error}");
    }
    let error = with_memory(for_model).unwrap().unwrap_err();
    for part in ["batches of 32 tokens", "are free", "train.batch_tokens"] {
        assert!(
            error.to_string().contains(part),
            "{part} is missing in: {error}"
        );
    }
    let ModelError::OutOfMemory { needed, .. } = error else {
        panic!("{error:?}");
    };
    // All but what training keeps of its last steps.
    let rest = (for_both - for_model).checked_sub(needed.0).unwrap();
    assert!(rest < 8192, "{needed} of {}", for_both - for_model);
}
