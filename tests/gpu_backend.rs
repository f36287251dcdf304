//! The GPU backend on the host executor, and on a GPU where there is one.

mod data;

use std::sync::atomic;

use data::{Data, all_kinds, capacity, grid, several};
use dtmem::backend::gpu::{
    Compute, CudaDevice, Device, Factor, Gpu, Graphs, HostDevice, Multiply, Product, Repeated,
};
use dtmem::backend::{Backend, BackendError, Cpu, Member};
use dtmem::batch::TokenLayout;
use dtmem::model::{
    ActionSpace, Actor, AdapterConfig, AddressingKind, AttentionSpan, Block, EraseKind, FrontEnd,
    MemoryConfig, Model, ModelConfig, ModelError, ObservationSpace, OptimiserStep, OrderKind,
    Spaces, StepMetrics, StrengthKind, SupervisedPart, SupervisionConfig, Training,
};
use dtmem::ops::{Error, Version};
use dtmem_host::{Executor, Order};
use dtmem_reference::attention::Denominator;
use half::{bf16, f16};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

/// Runs the checks on the first GPU, or says past the test's captured output that they were skipped.
fn on_gpu(check: impl FnOnce()) {
    use std::io::Write as _;
    match CudaDevice::new(0, Multiply::Exact) {
        Ok(_) => check(),
        Err(reason @ (Error::NoDriver { .. } | Error::NoGpu { .. } | Error::NoBlas)) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED: a GPU check: {reason}");
        }
        Err(other) => panic!("{other}"),
    }
}

/// Rows of `columns` random numbers, `stride` apart, with NaN between them.
fn draw<T: Compute>(rows: usize, columns: usize, stride: usize, random: &mut ChaCha8Rng) -> Vec<T> {
    let len = if rows == 0 {
        0
    } else {
        (rows - 1) * stride + columns
    };
    (0..len)
        .map(|index| match index % stride < columns {
            true => T::narrow(random.random_range(-1.0..1.0)),
            false => T::narrow(f32::NAN),
        })
        .collect()
}

fn check_product<T: Compute, U: Compute>(
    device: &impl Device,
    [rows, columns, inner]: [usize; 3],
    transposed: [bool; 2],
    (with_bias, accumulate): (bool, bool),
    seed: u64,
) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut factor = |rows: usize, columns: usize, transposed: bool| {
        let (rows, columns) = if transposed {
            (columns, rows)
        } else {
            (rows, columns)
        };
        let stride = (columns + 3).next_multiple_of(8);
        (draw::<T>(rows, columns, stride, &mut random), stride)
    };
    let (a, a_stride) = factor(rows, inner, transposed[0]);
    let (b, b_stride) = factor(inner, columns, transposed[1]);
    let bias = draw::<U>(1, columns, columns, &mut random);
    let stride = (columns + 1).next_multiple_of(8);
    let before = draw::<U>(rows, columns, stride, &mut random);
    let at = |x: &[T], stride: usize, transposed: bool, i: usize, j: usize| {
        let index = if transposed {
            j * stride + i
        } else {
            i * stride + j
        };
        f64::from(x[index].widen())
    };

    let upload = |x: &[T]| {
        let mut memory = device.allocate::<T>(x.len()).unwrap();
        device.upload(x, &mut memory, 0).unwrap();
        memory
    };
    let [a_memory, b_memory] = [upload(&a), upload(&b)];
    let mut bias_memory = device.allocate::<U>(columns).unwrap();
    device.upload(&bias, &mut bias_memory, 0).unwrap();
    let mut c_memory = device.allocate::<U>(before.len()).unwrap();
    device.upload(&before, &mut c_memory, 0).unwrap();
    let product = Product {
        rows,
        columns,
        inner,
        a: Factor {
            elements: device.input(&a_memory, 0..a.len()).unwrap(),
            stride: a_stride,
            transposed: transposed[0],
        },
        b: Factor {
            elements: device.input(&b_memory, 0..b.len()).unwrap(),
            stride: b_stride,
            transposed: transposed[1],
        },
        bias: with_bias.then(|| device.input(&bias_memory, 0..columns).unwrap()),
        c: device.output(&mut c_memory, 0..before.len()).unwrap(),
        stride,
        accumulate,
    };
    device.multiply(product).unwrap();
    let mut after = vec![U::default(); before.len()];
    device.download(&c_memory, 0, &mut after).unwrap();

    let (mut error, mut norm) = (0.0, 0.0);
    for (index, (after, before)) in after.iter().zip(&before).enumerate() {
        let (i, j) = (index / stride, index % stride);
        if j >= columns {
            assert!(after.widen().is_nan(), "written between the rows");
            continue;
        }
        let mut expected = 0.0;
        for k in 0..inner {
            expected +=
                at(&a, a_stride, transposed[0], i, k) * at(&b, b_stride, transposed[1], k, j);
        }
        if with_bias {
            expected += f64::from(bias[j].widen());
        }
        if accumulate {
            expected += f64::from(before.widen());
        }
        error += (f64::from(after.widen()) - expected).powi(2);
        norm += expected.powi(2);
    }
    let limit = if size_of::<U>() == 4 { 2e-5 } else { 1.5e-2 };
    assert!(error.sqrt() <= limit * norm.sqrt(), "{error} of {norm}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]
    #[test]
    fn products_on_the_host_device_are_right(
        sizes in [0..9usize, 1..20usize, 0..20usize],
        transposed in any::<[bool; 2]>(),
        bias in any::<bool>(),
        accumulate in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let device = HostDevice::default();
        let options = (bias && !accumulate, accumulate);
        check_product::<f32, f32>(&device, sizes, transposed, options, seed);
        check_product::<bf16, bf16>(&device, sizes, transposed, options, seed);
        check_product::<f16, f32>(&device, sizes, transposed, options, seed);
    }
}

#[test]
fn products_on_a_gpu_are_right() {
    on_gpu(|| {
        let device = CudaDevice::new(0, Multiply::Exact).unwrap();
        for (seed, sizes) in [
            [1, 7, 512],
            [300, 1536, 512],
            [512, 7, 1000],
            [64, 512, 1],
            [7, 64, 0],
        ]
        .into_iter()
        .enumerate()
        {
            for transposed in [[false, false], [false, true], [true, false], [true, true]] {
                for options in [(false, false), (true, false), (false, true)] {
                    let seed = seed as u64;
                    check_product::<f32, f32>(&device, sizes, transposed, options, seed);
                    check_product::<bf16, bf16>(&device, sizes, transposed, options, seed);
                    check_product::<bf16, f32>(&device, sizes, transposed, options, seed);
                    check_product::<f16, f16>(&device, sizes, transposed, options, seed);
                }
            }
        }
    });
}

/// AttentionTuner with everything that it can have.
fn tuner(front_end: FrontEnd) -> ModelConfig {
    ModelConfig {
        front_end,
        width: 32,
        layers: 2,
        heads: 2,
        feed_forward: 40,
        dropout: 0.1,
        ..ModelConfig::default()
    }
}

fn supervision() -> SupervisionConfig {
    SupervisionConfig {
        lambda: 3.0,
        layer: 0,
        part: SupervisedPart::Heads(vec![1]),
        denominator: Denominator::Square,
    }
}

const OPTIMISER: OptimiserStep = OptimiserStep {
    learning_rate: 3e-3,
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.1,
    clip: Some(1.0),
};

/// The metrics of some steps on fresh batches, and the parameters after them.
fn train<B: Backend<Element = f32>>(
    backend: B,
    config: &ModelConfig,
    spaces: &Spaces,
    supervision: Option<SupervisionConfig>,
    steps: u64,
) -> (Vec<StepMetrics>, Vec<f32>) {
    let mut model = Model::new(backend, config.clone(), spaces.clone(), supervision).unwrap();
    model.initialise(1).unwrap();
    let lengths = [5, 3, 1, 7];
    let largest = Data::new(spaces, &lengths, 0).pack(&model);
    let mut training = Training::new(&model, capacity(&largest), 1).unwrap();
    // With a small loss at few tokens, gradients in f16 have to be small as well.
    training.set_loss_scale(&model, [1024.0, 0.0]).unwrap();
    for step in 1..=steps {
        // A GPU fills them up to the size of the largest, and repeats one step for all of them.
        let count = 4 - (step as usize - 1) / 3;
        let batch = Data::new(spaces, &lengths[..count], step as u32).pack(&model);
        training
            .step(&mut model, &batch, 3, step, &OPTIMISER)
            .unwrap();
    }
    let metrics = training.collect(&model).unwrap();
    (metrics, model.values().unwrap())
}

/// Steps on the GPU backend follow those of the CPU.
fn check_training<D: Device, T: Compute>(
    backend: Gpu<D, T>,
    config: &ModelConfig,
    spaces: &Spaces,
    supervision: Option<SupervisionConfig>,
    limit: f64,
) {
    let (expected, _) = train(Cpu::new(), config, spaces, supervision.clone(), 10);
    let (found, _) = train(backend, config, spaces, supervision, 10);
    for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
        for (what, found, expected) in [
            ("loss", found.loss, expected.loss),
            ("action loss", found.action_loss, expected.action_loss),
            ("memory loss", found.memory_loss, expected.memory_loss),
            ("norm", found.gradient_norm, expected.gradient_norm),
        ] {
            let error = (found - expected).abs();
            assert!(
                error <= limit * expected.abs().max(1e-2),
                "step {}: {what} {found}, expected {expected}",
                step + 1
            );
        }
    }
}

/// DT-Mem: segments, a memory, returns to go.
fn decision() -> ModelConfig {
    ModelConfig {
        block: Block::PreLn,
        layout: TokenLayout::ReturnObsAction,
        memory: Some(MemoryConfig {
            slots: 5,
            ..MemoryConfig::default()
        }),
        attention: AttentionSpan::Segment,
        segment_steps: 2,
        ..tuner(FrontEnd::Linear)
    }
}

/// A memory between attention to whole episodes and its loss.
fn both() -> ModelConfig {
    ModelConfig {
        memory: decision().memory,
        segment_steps: 3,
        ..tuner(FrontEnd::Linear)
    }
}

/// The memory of the first of two layers learns what to recall of earlier segments.
fn recall() -> SupervisionConfig {
    SupervisionConfig {
        part: SupervisedPart::Memory,
        ..supervision()
    }
}

/// As [`decision`], with the memory of the paper.
fn paper() -> ModelConfig {
    let mut config = decision();
    if let Some(memory) = &mut config.memory {
        memory.addressing = AddressingKind::Dot;
        memory.strength = StrengthKind::Softmax;
        memory.erase = EraseKind::Paper;
        memory.order = OrderKind::WriteThenRead;
    }
    config
}

/// Adapters alone are trained.
fn adapted() -> ModelConfig {
    ModelConfig {
        adapter: Some(AdapterConfig {
            rank: 8,
            alpha: 3.0,
            dropout: 0.25,
            ..AdapterConfig::default()
        }),
        ..decision()
    }
}

type Case = (ModelConfig, Option<SupervisionConfig>);

fn cases() -> [Case; 7] {
    [
        (tuner(FrontEnd::Linear), Some(supervision())),
        (tuner(FrontEnd::Convolution), Some(supervision())),
        (decision(), None),
        (both(), Some(supervision())),
        (adapted(), None),
        (decision(), Some(recall())),
        (paper(), Some(recall())),
    ]
}

/// They are known before anything is allocated, and by the names that a configuration gives them.
#[test]
fn sizes_that_the_kernels_are_not_made_for_are_refused_when_a_model_is_made() {
    fn refused<B: Backend<Element = f32>>(
        backend: B,
        config: &ModelConfig,
        spaces: &Spaces,
    ) -> Option<&'static str> {
        match Model::new(backend, config.clone(), spaces.clone(), None) {
            Ok(_) => None,
            Err(ModelError::Setting { setting, .. }) => Some(setting),
            Err(error) => panic!("{error}"),
        }
    }
    let slots = MemoryConfig {
        slots: 4097,
        ..MemoryConfig::default()
    };
    let rank = AdapterConfig {
        rank: 65,
        ..AdapterConfig::default()
    };
    let narrow = |width| ModelConfig {
        width,
        ..tuner(FrontEnd::Linear)
    };
    let wide = |config, width| ModelConfig {
        width,
        heads: width / 16,
        layers: 1,
        ..config
    };
    for (setting, config) in [
        (None, narrow(64)),
        (Some("heads"), narrow(48)),
        (None, wide(tuner(FrontEnd::Linear), 1040)),
        (Some("width"), wide(tuner(FrontEnd::Linear), 4112)),
        (Some("width"), wide(decision(), 1040)),
        (
            Some("memory.slots"),
            ModelConfig {
                memory: Some(slots),
                ..decision()
            },
        ),
        (
            Some("adapter.rank"),
            ModelConfig {
                width: 128,
                adapter: Some(rank),
                ..decision()
            },
        ),
    ] {
        let gpu = Gpu::<_, bf16>::new(HostDevice::default());
        assert_eq!(refused(gpu, &config, &grid()), setting);
        assert_eq!(refused(Cpu::new(), &config, &grid()), None);
    }
    // Some grids fit into shared memory in 16 bits only.
    for (side, in_bf16, in_f32) in [
        (9, None, None),
        (16, None, Some("front_end")),
        (17, Some("front_end"), Some("front_end")),
    ] {
        let observation = ObservationSpace::codes([side, side, 3], [11, 6, 3]);
        let spaces = Spaces::of(observation, ActionSpace::Discrete(5), 9);
        let config = tuner(FrontEnd::Convolution);
        let host = HostDevice::default;
        let found = refused(Gpu::<_, bf16>::new(host()), &config, &spaces);
        assert_eq!(found, in_bf16);
        let found = refused(Gpu::<_, f32>::new(host()), &config, &spaces);
        assert_eq!(found, in_f32);
        assert_eq!(refused(Cpu::new(), &config, &spaces), None);
        let linear = tuner(FrontEnd::Linear);
        assert_eq!(refused(Gpu::<_, f32>::new(host()), &linear, &spaces), None);
    }
}

/// A model with heads, and one with a memory, for which there are versions for Hopper.
fn cases_for_hopper() -> [Case; 2] {
    let wide = ModelConfig {
        width: 128,
        heads: 2,
        ..tuner(FrontEnd::Linear)
    };
    [(wide, Some(supervision())), (decision(), Some(recall()))]
}

#[test]
fn steps_by_the_versions_for_hopper_follow_the_cpus() {
    for (config, supervision) in cases_for_hopper() {
        let backend = Gpu::<_, bf16>::new(HostDevice::default()).with_version(Version::Hopper);
        check_training(backend, &config, &grid(), supervision, 5e-2);
    }
}

#[test]
fn steps_by_the_versions_for_hopper_on_a_gpu_follow_the_cpus() {
    on_gpu(|| {
        for (config, supervision) in cases_for_hopper() {
            let device = CudaDevice::new(0, Multiply::Exact).unwrap();
            let backend = Gpu::<_, bf16>::new(device).with_version(Version::Hopper);
            check_training(backend, &config, &grid(), supervision, 5e-2);
        }
    });
}

#[test]
fn steps_in_f32_follow_the_cpus() {
    for (config, supervision) in cases() {
        check_training(
            Gpu::<_, f32>::new(HostDevice::default()),
            &config,
            &grid(),
            supervision,
            1e-3,
        );
    }
}

#[test]
fn steps_of_several_families_follow_the_cpus() {
    let host = HostDevice::default;
    let tuner = tuner(FrontEnd::Convolution);
    check_training(
        Gpu::<_, f32>::new(host()),
        &tuner,
        &several(),
        Some(supervision()),
        1e-3,
    );
    check_training(
        Gpu::<_, f32>::new(host()),
        &decision(),
        &all_kinds(),
        None,
        1e-3,
    );
    check_training(
        Gpu::<_, bf16>::new(host()),
        &decision(),
        &all_kinds(),
        None,
        5e-2,
    );
}

#[test]
fn steps_in_bf16_follow_the_cpus() {
    for (config, supervision) in cases() {
        check_training(
            Gpu::<_, bf16>::new(HostDevice::default()),
            &config,
            &grid(),
            supervision,
            5e-2,
        );
    }
}

#[test]
fn steps_in_f16_follow_the_cpus() {
    for (config, supervision) in cases() {
        check_training(
            Gpu::<_, f16>::new(HostDevice::default()),
            &config,
            &grid(),
            supervision,
            1e-2,
        );
    }
}

/// Steps on batches in which `one` token of a sequence is recalled, or `none`, or `all` but the last few.
fn train_on_unlike_batches<B: Backend<Element = f32>>(
    backend: B,
    recalled: &[&str],
) -> Vec<StepMetrics> {
    // So many that more than a word says which of them a token is to recall.
    const LONGEST: usize = 36;
    let mut spaces = grid();
    spaces.steps = LONGEST;
    let mut model = Model::new(backend, decision(), spaces.clone(), Some(recall())).unwrap();
    model.initialise(1).unwrap();
    let every_pair = |steps: &usize| {
        let steps = *steps as u32;
        (0..steps).flat_map(|step| (0..=step).map(move |key| (step, key)))
    };
    let batch = |recalled: &&str| {
        let mut data = Data::new(&spaces, &[LONGEST, 4, 7], 1);
        match *recalled {
            "all" => {
                data.pairs = data
                    .lengths
                    .iter()
                    .map(|x| every_pair(x).collect())
                    .collect()
            }
            "none" => data.pairs.iter_mut().for_each(Vec::clear),
            _ => {}
        }
        data.pack(&model)
    };
    let batches: Vec<_> = recalled.iter().map(batch).collect();
    let mut training = Training::new(&model, capacity(&batches[0]), 1).unwrap();
    for (step, batch) in (1..).zip(&batches) {
        training
            .step(&mut model, batch, 3, step, &OPTIMISER)
            .unwrap();
    }
    training.collect(&model).unwrap()
}

/// Metrics of the same steps on the CPU and on a backend that repeats what it has recorded.
fn check_unlike_batches(device: HostDevice, recalled: &[&str]) {
    let expected = train_on_unlike_batches(Cpu::new(), recalled);
    let found = train_on_unlike_batches(Gpu::<_, f32>::new(device), recalled);
    for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert_eq!(
            expected.memory_loss > 0.0,
            recalled[step] != "none",
            "step {step}"
        );
        for (found, expected) in [
            (found.loss, expected.loss),
            (found.memory_loss, expected.memory_loss),
            (found.gradient_norm, expected.gradient_norm),
        ] {
            let error = (found - expected).abs();
            assert!(
                error <= 1e-3 * expected,
                "step {step}: {found}, expected {expected}"
            );
        }
    }
}

#[test]
fn batches_in_which_more_tokens_are_recalled_or_none_follow_the_cpus() {
    let recalled = ["one", "one", "all", "none", "one", "one", "one", "all"];
    check_unlike_batches(HostDevice::default(), &recalled);
}

/// How often something was recorded, and repeated.
fn counts(graphs: &Graphs) -> [usize; 2] {
    [&graphs.recorded, &graphs.replayed].map(|count| count.load(atomic::Ordering::Relaxed))
}

#[test]
fn batches_that_alternate_between_two_shapes_are_recorded_once_each() {
    const STEPS: usize = 8;
    let device = HostDevice::default();
    let graphs = device.graphs();
    check_unlike_batches(device, &["all", "one"].repeat(STEPS / 2));
    // The first lets memory grow; the next two are the first of their shape.
    assert_eq!(counts(&graphs), [2, STEPS - 3]);
}

#[test]
fn a_recording_is_dropped_when_enough_other_shapes_were_used_since() {
    const KEPT: u64 = 8;
    let backend = Gpu::<_, f32>::new(HostDevice::default());
    let graphs = backend.device().graphs();
    let mut repeated = Repeated::default();
    let mut recorded_by = |shapes: &[u64]| {
        let before = counts(&graphs)[0];
        for &shape in shapes {
            let work = || Ok::<_, BackendError>(());
            backend.repeat(&mut repeated, shape, work).unwrap();
        }
        counts(&graphs)[0] - before
    };
    let all: Vec<u64> = (0..KEPT).collect();
    assert_eq!([recorded_by(&all), recorded_by(&all)], [0, KEPT as usize]);
    // Another one in the place of the least recently used, which is not the first any more.
    assert_eq!(recorded_by(&[0, KEPT, KEPT]), 1);
    assert_eq!(recorded_by(&[0]), 0);
    assert_eq!([recorded_by(&[1]), recorded_by(&[1])], [0, 1]);
}

/// Steps with a loss scale that is too large change nothing until it has come down.
fn check_overflow<D: Device>(device: D) {
    let backend = Gpu::<D, f16>::new(device);
    let (config, spaces) = (tuner(FrontEnd::Linear), grid());
    let mut model = Model::new(backend, config, spaces.clone(), Some(supervision())).unwrap();
    model.initialise(1).unwrap();
    let batch = Data::new(&spaces, &[5, 3, 1, 7], 0).pack(&model);
    let mut training = Training::new(&model, capacity(&batch), 1).unwrap();
    let mut scale = 16_777_216.0;
    training.set_loss_scale(&model, [scale, 5.0]).unwrap();
    let before = model.values().unwrap();
    let mut step = |model: &mut Model<_>, number| {
        training.step(model, &batch, 3, number, &OPTIMISER).unwrap();
        let metrics = training.collect(model).unwrap().remove(0);
        let state = training.loss_scale(model).unwrap();
        (metrics, state, training.moments(model).unwrap())
    };
    let mut first = 1;
    let started = loop {
        let (metrics, state, moments) = step(&mut model, first);
        assert_eq!(metrics.loss_scale, Some(scale));
        if !metrics.is_skipped() {
            assert_eq!(state, [scale, 1.0]);
            break metrics;
        }
        assert!(metrics.loss.is_finite() && metrics.loss > 0.0);
        assert_eq!(state, [scale / 2.0, 0.0]);
        assert!(model.values().unwrap() == before);
        assert!(moments.iter().flatten().all(|&moment| moment == 0.0));
        (scale, first) = (scale / 2.0, first + 1);
    };
    assert!(first > 3, "more than a recorded step was skipped");
    assert!(model.values().unwrap() != before);
    let mut last = started;
    for number in first + 1..first + 8 {
        last = step(&mut model, number).0;
        assert!(last.is_finite());
    }
    assert!(last.loss < started.loss, "{last:?} after {started:?}");
}

/// Ranks on parts of each batch follow one rank on the whole of it.
fn check_ranks(size: usize, config: &ModelConfig, supervision: Option<&SupervisionConfig>) {
    let train_with = |device: HostDevice| {
        let backend = Gpu::<_, f32>::new(device);
        train(backend, config, &grid(), supervision.cloned(), 10)
    };
    let (expected, _) = train_with(HostDevice::default());
    let ranks: Vec<_> = std::thread::scope(|scope| {
        let device = |member| HostDevice::default().with_member(member);
        let threads: Vec<_> = Member::group(size)
            .into_iter()
            .map(|member| scope.spawn(move || train_with(device(member))))
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join().unwrap();
        threads.into_iter().map(join).collect()
    });
    let (first, parameters) = &ranks[0];
    for (found, expected) in first.iter().zip(&expected) {
        for (found, expected) in [
            (found.loss, expected.loss),
            (found.memory_loss, expected.memory_loss),
            (found.gradient_norm, expected.gradient_norm),
        ] {
            let error = (found - expected).abs();
            assert!(error <= 1e-4 * expected, "{found}, expected {expected}");
        }
        assert_eq!(
            (found.accuracy, found.tokens),
            (expected.accuracy, expected.tokens)
        );
    }
    for (metrics, others) in &ranks[1..] {
        assert!(metrics == first && others == parameters, "ranks differ");
    }
}

#[test]
fn two_ranks_on_halves_of_a_batch_are_one_on_the_whole() {
    for (config, supervision) in [
        (tuner(FrontEnd::Linear), Some(supervision())),
        (both(), Some(supervision())),
        (decision(), Some(recall())),
    ] {
        check_ranks(2, &config, supervision.as_ref());
    }
}

#[test]
fn an_overflow_in_f16_is_skipped_and_recovered_from() {
    check_overflow(HostDevice::default());
}

#[test]
fn an_overflow_in_f16_on_a_gpu_is_skipped_and_recovered_from() {
    on_gpu(|| check_overflow(CudaDevice::new(0, Multiply::Exact).unwrap()));
}

#[test]
fn steps_on_a_gpu_follow_the_cpus() {
    on_gpu(|| {
        for (config, supervision) in cases() {
            let exact = CudaDevice::new(0, Multiply::Exact).unwrap();
            check_training(
                Gpu::<_, f32>::new(exact),
                &config,
                &grid(),
                supervision.clone(),
                1e-3,
            );
            let narrow = CudaDevice::new(0, Multiply::Exact).unwrap();
            check_training(
                Gpu::<_, bf16>::new(narrow),
                &config,
                &grid(),
                supervision.clone(),
                5e-2,
            );
            let narrow = CudaDevice::new(0, Multiply::Exact).unwrap();
            check_training(
                Gpu::<_, f16>::new(narrow),
                &config,
                &grid(),
                supervision,
                1e-2,
            );
        }
    });
}

/// Logits of every step of some episodes that end at different times.
fn act<B: Backend<Element = f32>>(backend: B, config: &ModelConfig) -> Vec<Vec<f32>> {
    act_and(backend, config, || {})
}

/// The same, with something to do after each step.
fn act_and<B: Backend<Element = f32>>(
    backend: B,
    config: &ModelConfig,
    mut after_step: impl FnMut(),
) -> Vec<Vec<f32>> {
    let spaces = grid();
    let mut model = Model::new(backend, config.clone(), spaces.clone(), None).unwrap();
    model.initialise(1).unwrap();
    let lengths = [7, 4, 9];
    let data = Data::new(&spaces, &lengths, 4);
    let fields = spaces.families[0].observation.fields();
    let mut actor = Actor::new(&model, 0, lengths.len()).unwrap();
    (0..9)
        .map(|time| {
            let active: Vec<usize> = (0..3).filter(|&episode| time < lengths[episode]).collect();
            let at = |episode: &usize| data.observations[*episode].all().row(time, fields).bytes();
            let observations: Vec<u8> = active.iter().flat_map(at).copied().collect();
            let returns: Vec<f32> = active.iter().map(|&e| data.returns[e][time]).collect();
            actor.act(&model, &active, &observations, &returns).unwrap();
            after_step();
            actor.logits().to_vec()
        })
        .collect()
}

fn check_acting<D: Device>(device: impl Fn() -> D) {
    for (config, _) in cases() {
        let expected = act(Cpu::new(), &config);
        let found = act(Gpu::<D, f32>::new(device()), &config);
        for (time, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(expected) {
                let error = (found - expected).abs();
                assert!(error < 1e-4, "step {time}: {found}, expected {expected}");
            }
        }
    }
}

#[test]
fn acting_gives_the_cpus_logits() {
    check_acting(HostDevice::default);
}

/// A copy that is not staged may wait for what the device does, and the next step for it.
#[test]
fn a_step_of_acting_copies_nothing_from_the_host_but_its_batch() {
    for (config, _) in cases() {
        let device = HostDevice::default();
        let graphs = device.graphs();
        let mut uploads = Vec::new();
        act_and(Gpu::<_, f32>::new(device), &config, || {
            uploads.push(graphs.uploads.load(atomic::Ordering::Relaxed));
        });
        assert!(uploads[0] > 0, "the model's parameters were not counted");
        // A map of codes brings a table at its first use, that of actions in the second step.
        let later = &uploads[2..];
        assert!(
            later.iter().all(|&so_far| so_far == uploads[1]),
            "{uploads:?}"
        );
    }
}

#[test]
fn acting_on_a_gpu_gives_the_cpus_logits() {
    on_gpu(|| check_acting(|| CudaDevice::new(0, Multiply::Exact).unwrap()));
}

/// The bits of the parameters after some steps.
fn bits<D: Device>(device: impl Fn() -> D) -> [Vec<u32>; 2] {
    [(both(), supervision()), (decision(), recall())].map(|(config, supervision)| {
        let backend = Gpu::<D, bf16>::new(device());
        let (_, values) = train(backend, &config, &grid(), Some(supervision), 4);
        values.into_iter().map(f32::to_bits).collect()
    })
}

#[test]
fn two_runs_have_the_same_bits() {
    let reversed = || {
        let mut executor = Executor::new();
        executor.set_order(Order::Reversed);
        HostDevice::new(executor)
    };
    assert!(bits(HostDevice::default) == bits(reversed));
}

/// The bits of the parameters after steps on batches of several sizes; in each step everything is
/// computed as it comes, if it is the first of a training.
fn bits_of_steps<D: Device>(device: D, config: &ModelConfig, first: bool) -> Vec<u32> {
    let backend = Gpu::<D, bf16>::new(device);
    let mut model = Model::new(backend, config.clone(), grid(), None).unwrap();
    model.initialise(1).unwrap();
    let lengths = [5, 3, 1, 7];
    let capacity = data::capacity(&Data::new(&grid(), &lengths, 0).pack(&model));
    let mut training = Training::new(&model, capacity.clone(), 1).unwrap();
    for step in 1..=6 {
        if first {
            let [first, second] = training.moments(&model).unwrap();
            training = Training::new(&model, capacity.clone(), 1).unwrap();
            training.set_moments(&model, &first, &second).unwrap();
        }
        let batch = Data::new(&grid(), &lengths[step % 3..], step as u32).pack(&model);
        let step = step as u64;
        training
            .step(&mut model, &batch, 3, step, &OPTIMISER)
            .unwrap();
    }
    let values = model.values().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn a_repeated_step_has_the_bits_of_one_that_is_computed_as_it_comes() {
    for config in [tuner(FrontEnd::Linear), decision(), both()] {
        let device = HostDevice::default();
        let graphs = device.graphs();
        let repeated = bits_of_steps(device, &config, false);
        // The largest of them is the third.
        assert!(graphs.replayed.load(atomic::Ordering::Relaxed) >= 3);
        let device = HostDevice::default();
        let graphs = device.graphs();
        assert!(repeated == bits_of_steps(device, &config, true));
        assert_eq!(graphs.replayed.load(atomic::Ordering::Relaxed), 0);
    }
}

#[test]
fn dropout_of_a_branch_is_no_launch_but_for_its_gradient_in_pre_ln_blocks() {
    let commands = |config: &ModelConfig, dropout| {
        let device = HostDevice::default();
        let graphs = device.graphs();
        let config = ModelConfig {
            dropout,
            ..config.clone()
        };
        train(Gpu::<_, bf16>::new(device), &config, &grid(), None, 4);
        assert!(counts(&graphs)[0] > 0);
        graphs.commands.load(atomic::Ordering::Relaxed)
    };
    let post_ln = tuner(FrontEnd::Linear);
    let pre_ln = ModelConfig {
        block: Block::PreLn,
        ..post_ln.clone()
    };
    // That of the embedding, forward and backward, is.
    for (config, launches) in [(&post_ln, 2), (&pre_ln, 2 + pre_ln.layers)] {
        assert_eq!(commands(config, 0.1), commands(config, 0.0) + launches);
    }
}

#[test]
fn two_runs_on_a_gpu_have_the_same_bits() {
    let device = || CudaDevice::new(0, Multiply::Exact).unwrap();
    on_gpu(|| assert!(bits(device) == bits(device)));
}
