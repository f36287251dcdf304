//! The code that calls CUDA's driver, cuBLASLt and NCCL, on the model of them that `driver/` is: the
//! command as it is, and what the model itself finds.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)] // cudarc's copies to memory that is read too early

use std::ffi::OsStr;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaSlice, DriverError};
use dtmem::backend::gpu::{Compute, Gpu, HostDevice};
use dtmem::ops::{self, Launcher as _, Version, activation, attention};
use dtmem::train::metrics::Line;
use dtmem::train::run::{Outcome, Start};
use dtmem_reference::activation::Activation;
use half::bf16;
use tempfile::TempDir;
use toy::{HALLWAY_FOR_KERNELS, run_on};

mod toy;

/// What the toy has here.
const SHORT: [&str; 3] = [
    "train.steps=5",
    "train.precision=f32",
    "evaluation.episodes=2",
];

/// The same in bf16 with a memory that is taught what to recall.
const MEMORY: [&str; 9] = [
    "train.precision=bf16",
    "model.block=pre_ln",
    "model.attention=segment",
    "model.segment_steps=3",
    "model.memory.slots=6",
    "loss.supervise=memory",
    "train.learning_rate=1e-3",
    "train.steps=3",
    "evaluation.episodes=1",
];

/// A folder that has the model under the names that the libraries have.
fn libraries() -> TempDir {
    let model = std::env::current_exe().unwrap();
    let model = model.with_file_name("libdtmem_driver.so");
    assert!(model.is_file(), "{} is not built", model.display());
    let folder = TempDir::new().unwrap();
    for name in [
        "libcuda.so",
        "libcuda.so.1",
        "libcublasLt.so",
        "libnccl.so.2",
    ] {
        symlink(&model, folder.path().join(name)).unwrap();
    }
    folder
}

fn output(command: &mut Command, options: &str) -> Output {
    let libraries = libraries();
    let output = on(&libraries, command, options).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}\n{text}");
    output
}

fn on<'a>(libraries: &TempDir, command: &'a mut Command, options: &str) -> &'a mut Command {
    let command = command.env("LD_LIBRARY_PATH", libraries.path());
    command.env("DTMEM_DRIVER", options)
}

/// What the command printed where the model had nothing to tell.
fn said(output: Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!errors.contains("CUDA model:"), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// The command, of which the model has nothing to tell. Gives what it printed.
fn dtmem(options: &str, arguments: &[impl AsRef<OsStr>]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dtmem"));
    said(output(command.args(arguments), options))
}

/// The error with which the command ends.
fn refused(options: &str, arguments: &[impl AsRef<OsStr>]) -> String {
    let (libraries, mut command) = (libraries(), Command::new(env!("CARGO_BIN_EXE_dtmem")));
    let command = on(&libraries, command.args(arguments), options);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    text
}

/// Runs this test again in a process that has the model. True there.
fn on_the_model(options: &str, name: &str) -> bool {
    const HERE: &str = "DTMEM_ON_THE_MODEL";
    if std::env::var_os(HERE).is_some() {
        return true;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    let command = command.args(["--exact", name]).env(HERE, "1");
    let said = output(command, options).stdout;
    assert!(String::from_utf8_lossy(&said).contains("1 passed"));
    false
}

struct Toy {
    folder: TempDir,
    overrides: Vec<&'static str>,
}

impl Toy {
    fn new(overrides: &[&'static str]) -> Self {
        let folder = TempDir::new().unwrap();
        std::fs::write(folder.path().join("toy.toml"), HALLWAY_FOR_KERNELS).unwrap();
        let overrides = SHORT.iter().chain(overrides).copied().collect();
        Self { folder, overrides }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What the command is told, to train into that folder.
    fn arguments(&self, device: &str, name: &str) -> Vec<String> {
        let [config, out] = ["toy.toml", name].map(|name| self.path(name));
        let [config, out] = [&config, &out].map(|path| path.to_str().unwrap());
        let first = ["train", config, "--device", device, "--out", out];
        let overrides = self.overrides.iter().flat_map(|&word| ["--set", word]);
        first
            .into_iter()
            .chain(overrides)
            .map(str::to_owned)
            .collect()
    }

    /// Trains on the model of a GPU, into that folder.
    fn on_cuda(&self, options: &str, name: &str, more: &[&str]) -> Vec<Line> {
        let mut arguments = self.arguments("cuda:0", name);
        arguments.extend(more.iter().map(|&word| word.to_owned()));
        dtmem(options, &arguments);
        lines(&self.path(name))
    }

    /// Trains by two ranks, each of which has a GPU of this number. Gives how they ended.
    fn on_two(&self, gpus: [usize; 2], name: &str) -> [Output; 2] {
        let (libraries, port) = (libraries(), TcpListener::bind("127.0.0.1:0").unwrap());
        let number = port.local_addr().unwrap().port();
        drop(port);
        let start = |rank: usize| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_dtmem"));
            command.args(self.arguments("auto", name));
            for (variable, value) in [
                ("WORLD_SIZE", "2"),
                ("RANK", &rank.to_string()),
                ("LOCAL_RANK", &gpus[rank].to_string()),
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", &number.to_string()),
            ] {
                command.env(variable, value);
            }
            let piped = command.stdout(Stdio::piped()).stderr(Stdio::piped());
            on(&libraries, piped, "gpus=2").spawn().unwrap()
        };
        [0, 1]
            .map(start)
            .map(|process| process.wait_with_output().unwrap())
    }

    /// Trains on the executor, until it is done or so many steps are.
    fn on_host<T: Compute>(&self, name: &str, stop_after: Option<u64>) -> Vec<Line> {
        let config = toy::config(HALLWAY_FOR_KERNELS, &self.overrides);
        let (backend, folder) = (Gpu::<_, T>::new(HostDevice::default()), self.path(name));
        let outcome = run_on(backend, &config, &folder, Start::Fresh, stop_after).unwrap();
        let finished = matches!(outcome, Outcome::Finished(_));
        assert_eq!(finished, stop_after.is_none());
        lines(&folder)
    }
}

/// The metrics, without times.
fn lines(folder: &Path) -> Vec<Line> {
    let mut lines = toy::lines(folder);
    lines.iter_mut().for_each(|line| line.tokens_per_s = 0.0);
    lines
}

/// Nothing waits between the first step and the last: a step whose batch is overwritten, or computed
/// with before it is there, has other losses.
#[test]
fn training_on_cuda_has_the_executors_bits_whenever_streams_do_what_they_are_given() {
    let toy = Toy::new(&[
        "train.steps=6",
        "train.log_every=6",
        "train.checkpoint_every=6",
        "evaluation.episodes=1",
    ]);
    let expected = toy.on_host::<f32>("host", None);
    assert!(expected.len() == 1 && expected[0].loss > 0.0);
    assert_eq!(toy.on_cuda("", "late", &[]), expected);
    for seed in 1..3 {
        let options = format!("a100,order={seed}");
        assert_eq!(toy.on_cuda(&options, &options, &[]), expected, "{options}");
    }
}

#[test]
fn a_memory_in_bf16_on_cuda_has_the_executors_bits() {
    let toy = Toy::new(&MEMORY);
    let expected = toy.on_host::<bf16>("host", None);
    assert!(expected.iter().all(|line| line.memory_loss > 0.0));
    assert_eq!(toy.on_cuda("order=3", "cuda", &[]), expected);
}

#[test]
fn cuda_goes_on_from_a_checkpoint_and_evaluates() {
    let toy = Toy::new(&["train.precision=f16"]);
    let expected = toy.on_host::<half::f16>("straight", None);
    let stopped = toy.on_host::<half::f16>("resumed", Some(2));
    assert_eq!(stopped.len(), 2);
    assert_eq!(toy.on_cuda("", "resumed", &["--resume"]), expected);
    let run = toy.path("resumed");
    let run = run.to_str().unwrap();
    let said = dtmem(
        "",
        &[
            "eval",
            run,
            "--device",
            "cuda:0",
            "--episodes",
            "3",
            "--seed",
            "1",
        ],
    );
    assert!(said.contains(r#""episodes":3"#), "{said}");
}

/// Processes with a GPU each, which find each other by the variables of launchers.
#[test]
fn two_ranks_on_halves_of_batches_are_one_on_the_whole() {
    for overrides in [&[][..], &MEMORY] {
        let toy = Toy::new(overrides);
        let expected = toy.on_cuda("", "alone", &[]);
        let ended = toy.on_two([1, 0], "ranks");
        for output in ended {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{text}");
            said(output);
        }
        let found = lines(&toy.path("ranks"));
        let limit = if overrides.is_empty() { 1e-4 } else { 2e-2 };
        toy::assert_near(&found, &expected, limit);
    }
}

#[test]
fn two_ranks_on_one_gpu_are_refused() {
    for output in Toy::new(&[]).on_two([1, 1], "ranks") {
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains("NCCL, to connect the ranks"), "{text}");
        // What ranks cannot use is no remedy.
        assert!(
            text.contains("WORLD_SIZE") && !text.contains("or cpu"),
            "{text}"
        );
    }
}

#[test]
fn a_driver_that_is_too_old_or_a_gpu_that_is_taken_is_told_and_auto_takes_the_cpu() {
    let toy = Toy::new(&["train.steps=1", "evaluation.episodes=1"]);
    for (options, parts) in [
        (
            "old",
            [
                "a driver for CUDA 13.0 or above",
                "this one is for CUDA 12.4",
            ],
        ),
        ("taken", ["another process", "--compute-mode=DEFAULT"]),
    ] {
        let error = refused(options, &toy.arguments("cuda:0", "refused"));
        for part in parts {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_dtmem"));
        let log = output(command.args(toy.arguments("auto", options)), options).stderr;
        let log = String::from_utf8_lossy(&log);
        assert!(log.contains("device: cpu, because"), "{log}");
    }
}

#[test]
fn a_gpu_that_is_lost_is_an_error_and_the_checkpoint_goes_on_on_the_cpu() {
    let toy = Toy::new(&["train.checkpoint_every=2"]);
    let mut arguments = toy.arguments("cuda:0", "run");
    arguments.push("--overwrite".to_owned());
    let mut works = 200;
    let error = loop {
        let error = refused(&format!("lost={works}"), &arguments);
        assert!(error.contains("CUDA_ERROR_UNKNOWN"), "{error}");
        if error.contains("the checkpoint of step") {
            break error;
        }
        works += works / 4;
    };
    assert!(error.contains(toy.path("run").to_str().unwrap()), "{error}");
    let mut resume = toy.arguments("cpu", "run");
    resume.push("--resume".to_owned());
    dtmem("", &resume);
    let steps: Vec<u64> = lines(&toy.path("run"))
        .iter()
        .map(|line| line.step)
        .collect();
    assert_eq!(steps, [1, 2, 3, 4, 5]);
}

#[test]
fn a_gpu_that_is_too_small_is_told_with_what_is_needed_and_what_lowers_it() {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/hallway-paper.toml");
    let folder = TempDir::new().unwrap();
    let arguments = [
        "train",
        config.to_str().unwrap(),
        "--device",
        "cuda:0",
        "--out",
        folder.path().to_str().unwrap(),
        "--overwrite",
        "--set",
        "data.episodes=200",
    ];
    for (mib, parts) in [
        (100, ["a model of 14661919 parameters takes", "model.width"]),
        (500, [" are free", "train.batch_tokens"]),
    ] {
        let error = refused(&format!("idle,memory={mib}"), &arguments);
        for part in parts {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    }
}

#[test]
fn every_fixture_is_verified_on_cuda() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ops");
    let files = std::fs::read_dir(folder).unwrap();
    let files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    let mut arguments = vec!["verify", "--backend", "cuda", "--dtype", "all"];
    arguments.extend(files.iter().map(|path| path.to_str().unwrap()));
    let said = dtmem("", &arguments);
    assert!(said.contains(" 0 failed"), "{said}");
}

#[test]
fn whole_steps_of_full_size_are_timed_on_cuda() {
    let said = dtmem(
        "idle",
        &["bench", "--device", "cuda:0", "--filter", "step/"],
    );
    let timed = |line: &&str| line.contains("H100") && line.contains("GB/s");
    assert_eq!(said.lines().filter(timed).count(), 3, "{said}");
}

#[test]
fn configurations_train_on_cuda_at_their_full_size() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    for name in ["hallway-paper", "hallway-memory-quick", "recall-quick"] {
        let config = configs.join(name).with_extension("toml");
        let folder = TempDir::new().unwrap();
        let [config, out] = [&config, folder.path()].map(|path| path.to_str().unwrap());
        let mut arguments = vec!["train", config, "--device", "cuda:0", "--out", out];
        for word in [
            "data.episodes=200",
            "train.steps=10",
            "evaluation.episodes=2",
        ] {
            arguments.extend(["--set", word]);
        }
        let said = dtmem("idle", &arguments);
        assert!(said.contains(r#""steps":10"#), "{said}");
    }
}

#[test]
fn what_nobody_waits_for_has_not_happened() {
    if !on_the_model("", "what_nobody_waits_for_has_not_happened") {
        return;
    }
    let context = CudaContext::new(0).unwrap();
    // SAFETY: events are what this test is about.
    unsafe { context.disable_event_tracking() };
    let [first, second] = [(); 2].map(|()| context.new_stream().unwrap());
    let mut numbers = first.clone_htod(&[1.0_f32; 4]).unwrap();
    first.synchronize().unwrap();
    first.memset_zeros(&mut numbers).unwrap();
    assert_eq!(second.clone_dtoh(&numbers).unwrap(), [1.0; 4]);
    second.join(&first).unwrap();
    assert_eq!(second.clone_dtoh(&numbers).unwrap(), [0.0; 4]);
    // SAFETY: written before it is read.
    let mut pinned = unsafe { context.alloc_pinned::<f32>(4) }.unwrap();
    pinned.as_mut_slice().unwrap().fill(2.0);
    let raw = pinned.as_mut_ptr().unwrap();
    first.memcpy_htod(&pinned, &mut numbers).unwrap();
    // SAFETY: it is alive; that a copy still reads it is the point.
    unsafe { raw.write(3.0) };
    assert_eq!(first.clone_dtoh(&numbers).unwrap(), [3.0, 2.0, 2.0, 2.0]);
}

#[test]
fn a_graph_has_what_was_captured_and_a_capture_nothing_that_waits() {
    if !on_the_model(
        "",
        "a_graph_has_what_was_captured_and_a_capture_nothing_that_waits",
    ) {
        return;
    }
    const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    let gpu = ops::Gpu::new(0).unwrap();
    // SAFETY: one stream.
    unsafe { gpu.context().disable_event_tracking() };
    let stream = gpu.context().new_stream().unwrap();
    let on = gpu.on(&stream).unwrap();
    let x = stream.clone_htod(&[-1.0_f32, 2.0]).unwrap();
    let mut y = stream.clone_htod(&[9.0_f32; 2]).unwrap();
    let relu = |y: &mut CudaSlice<f32>| {
        let tensors = activation::Forward {
            activation: Activation::Relu,
            x: on.input(&x),
            y: on.output(y),
        };
        activation::Shape { elements: 2 }.forward(&on, tensors)
    };
    relu(&mut y).unwrap();
    stream.memset_zeros(&mut y).unwrap();
    stream.begin_capture(MODE).unwrap();
    relu(&mut y).unwrap();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [0.0; 2]);
    graph.unwrap().launch().unwrap();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [0.0, 2.0]);

    let unsupported = Err(DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED));
    let invalidated = CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    let waits: [&dyn Fn() -> Result<(), DriverError>; 4] = [
        &|| stream.synchronize(),
        &|| stream.context().synchronize(),
        &|| stream.clone_htod(&[0.0_f32]).map(drop),
        &|| stream.clone_dtoh(&x).map(drop),
    ];
    for wait in waits {
        stream.begin_capture(MODE).unwrap();
        assert_eq!(wait(), unsupported);
        let ended = stream.end_capture(CUgraphInstantiate_flags(0)).map(drop);
        assert_eq!(ended, Err(DriverError(invalidated)));
    }
}

#[test]
fn what_was_launched_is_done_before_the_kernels_code_goes() {
    if !on_the_model("", "what_was_launched_is_done_before_the_kernels_code_goes") {
        return;
    }
    let gpu = ops::Gpu::new(0).unwrap();
    let stream = gpu.context().new_stream().unwrap();
    let x = stream.clone_htod(&[-1.0_f32, 2.0]).unwrap();
    let mut y = stream.clone_htod(&[9.0_f32; 2]).unwrap();
    let on = gpu.on(&stream).unwrap();
    let tensors = activation::Forward {
        activation: Activation::Relu,
        x: on.input(&x),
        y: on.output(&mut y),
    };
    let shape = activation::Shape { elements: 2 };
    shape.forward(&on, tensors).unwrap();
    drop(gpu);
    assert_eq!(stream.context().check_err(), Ok(()));
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [0.0, 2.0]);
}

/// Its kernel is empty there, so the launch would succeed and write nothing.
#[test]
fn a_launch_for_hopper_is_refused_by_other_gpus() {
    if !on_the_model("a100", "a_launch_for_hopper_is_refused_by_other_gpus") {
        return;
    }
    const TOKENS: usize = 5;
    let shape = attention::Shape {
        sequences: 1,
        queries: TOKENS,
        keys: TOKENS,
        heads: 1,
        key_heads: 1,
        width: 64,
        mask: attention::Mask::Causal,
    };
    let gpu = ops::Gpu::new(0).unwrap();
    let stream = gpu.context().default_stream();
    let bounds = stream.clone_htod(&[0, TOKENS as i32]).unwrap();
    let x = stream.clone_htod(&[bf16::ONE; TOKENS * 64]).unwrap();
    let mut out = stream.clone_htod(&[bf16::ZERO; TOKENS * 64]).unwrap();
    let mut lse = stream.clone_htod(&[0.0_f32; TOKENS]).unwrap();
    let on = gpu.on(&stream).unwrap();
    let [q, k, v] = [(); 3].map(|()| on.input(&x).rows(64));
    let tensors = attention::Forward {
        q,
        k,
        v,
        pack: attention::Pack {
            cu_seqlens_q: on.input(&bounds),
            cu_seqlens_k: on.input(&bounds),
            groups: None,
        },
        scale: 0.125,
        out: on.output(&mut out).rows(64),
        lse: on.output(&mut lse),
        memory_loss: None,
    };
    let launch = |version| {
        let [launch, _] = shape.plan_forward_by(version, &tensors).unwrap();
        on.launch(&launch.unwrap())
    };
    let refused = launch(Version::Hopper);
    assert!(
        matches!(refused, Err(ops::Error::CannotLaunch { .. })),
        "{refused:?}"
    );
    launch(Version::Portable).unwrap();
}

/// Its kernel loads boxes by tensor maps, which the driver encodes: also while a graph is recorded.
#[test]
fn a_launch_with_tensor_maps_gives_what_the_portable_version_gives() {
    if !on_the_model(
        "",
        "a_launch_with_tensor_maps_gives_what_the_portable_version_gives",
    ) {
        return;
    }
    const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    const TOKENS: usize = 70;
    const WIDTH: usize = 64;
    let shape = attention::Shape {
        sequences: 2,
        queries: TOKENS,
        keys: TOKENS,
        heads: 1,
        key_heads: 1,
        width: WIDTH,
        mask: attention::Mask::Causal,
    };
    let gpu = ops::Gpu::new(0).unwrap();
    let stream = gpu.context().new_stream().unwrap();
    let bounds = stream.clone_htod(&[0, 30, TOKENS as i32]).unwrap();
    let numbers: Vec<_> = (0..3 * TOKENS * WIDTH)
        .map(|i| bf16::from_f32((i * 37 % 101) as f32 / 50.0 - 1.0))
        .collect();
    let fused = stream.clone_htod(&numbers).unwrap();
    let out = [Version::Portable, Version::Hopper].map(|version| {
        let mut out = stream.clone_htod(&[bf16::ZERO; TOKENS * WIDTH]).unwrap();
        let mut lse = stream.clone_htod(&[0.0_f32; TOKENS]).unwrap();
        let on = gpu.on(&stream).unwrap();
        let [q, k, v] = on.input(&fused).rows(3 * WIDTH).columns([WIDTH; 3]);
        let tensors = attention::Forward {
            q,
            k,
            v,
            pack: attention::Pack {
                cu_seqlens_q: on.input(&bounds),
                cu_seqlens_k: on.input(&bounds),
                groups: None,
            },
            scale: 0.125,
            out: on.output(&mut out).rows(WIDTH),
            lse: on.output(&mut lse),
            memory_loss: None,
        };
        let [launch, _] = shape.plan_forward_by(version, &tensors).unwrap();
        let launch = launch.unwrap();
        if !on.can_launch(&launch).unwrap() {
            println!("this build has no machine code for {}", launch.kernel());
            return None;
        }
        on.launch(&launch).unwrap(); // loads the kernel
        stream.begin_capture(MODE).unwrap();
        on.launch(&launch).unwrap();
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap();
        graph.unwrap().launch().unwrap();
        drop(tensors);
        let out = stream.clone_dtoh(&out).unwrap();
        Some(out.into_iter().map(f32::from).collect::<Vec<_>>())
    });
    if let [Some(portable), Some(hopper)] = out {
        for (portable, hopper) in portable.iter().zip(&hopper) {
            assert!((portable - hopper).abs() < 0.01, "{portable} {hopper}");
        }
    }
}

#[test]
fn memory_that_was_freed_or_never_there_is_refused() {
    if !on_the_model("", "memory_that_was_freed_or_never_there_is_refused") {
        return;
    }
    let invalid = Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE));
    let context = CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    assert_eq!(stream.alloc_zeros::<f32>(0).map(drop), invalid);
    let numbers = stream.alloc_zeros::<f32>(4).unwrap();
    let address = numbers.leak();
    // SAFETY: what is wrong with the memory is refused.
    let [short, mut long] =
        [4, 5].map(|len| unsafe { stream.upgrade_device_ptr::<f32>(address, len) });
    assert_eq!(stream.memset_zeros(&mut long), invalid);
    std::mem::forget(long);
    drop(short);
    // SAFETY: as above.
    let mut freed = unsafe { stream.upgrade_device_ptr::<f32>(address, 4) };
    assert_eq!(stream.memset_zeros(&mut freed), invalid);
    drop(freed);
    assert_eq!(context.check_err(), invalid);
}
