//! The operations of `dtmem::ops`: plans and errors without a GPU, whole launches through the host executor against the
//! reference, and the same on a GPU where there is one.

use std::fmt::Debug;
use std::io::Write as _;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use dtmem::ops::{
    self, Arg, Error, Gpu, Input, Launcher, OnStream, Output, Storage, activation, gpu, layer_norm,
};
use dtmem_host::{Buffer, Element, Executor, Order};
use dtmem_reference::activation::Activation;
use half::{bf16, f16};
use ndarray::{Array, Array1, Array2, Dimension};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

// What the feature `host` compiles as ops::host; the tests need no feature.
use ops::{Result, launch, memory};
#[path = "../src/ops/host.rs"]
mod host;
use host::Host;

const EPSILON: f32 = 1e-5;

/// A storage type with what a test needs to know of it.
trait Number: Storage + Element + DeviceRepr + PartialEq + Debug {
    /// The relative error that SPEC section 9 allows.
    const TOLERANCE: f64;
    fn round(x: f64) -> Self;
    fn widen(self) -> f64;
}

impl Number for f32 {
    const TOLERANCE: f64 = 2e-5;
    fn round(x: f64) -> Self {
        x as f32
    }
    fn widen(self) -> f64 {
        f64::from(self)
    }
}

impl Number for bf16 {
    const TOLERANCE: f64 = 1.5e-2;
    fn round(x: f64) -> Self {
        Self::from_f64(x)
    }
    fn widen(self) -> f64 {
        self.to_f64()
    }
}

impl Number for f16 {
    const TOLERANCE: f64 = 1.5e-2;
    fn round(x: f64) -> Self {
        Self::from_f64(x)
    }
    fn widen(self) -> f64 {
        self.to_f64()
    }
}

/// What a launch runs on: memory and a launcher.
trait Machine: Launcher {
    type Memory<T>;
    fn upload<T: Number>(&self, content: &[T]) -> Self::Memory<T>;
    fn download<T: Number>(&self, memory: &Self::Memory<T>) -> Vec<T>;
    fn input<'b, T: Number>(&'b self, memory: &'b Self::Memory<T>) -> Input<'b, T>;
    fn output<'b, T: Number>(&'b self, memory: &'b mut Self::Memory<T>) -> Output<'b, T>;

    /// Memory that must be written before it is read.
    fn scratch<T: Number>(&self, len: usize) -> Self::Memory<T>;

    fn numbers<T: Number, D: Dimension>(&self, x: &Array<f64, D>) -> Self::Memory<T> {
        self.upload(&x.iter().map(|&x| T::round(x)).collect::<Vec<_>>())
    }
}

impl Machine for Host {
    type Memory<T> = Buffer<T>;
    fn upload<T: Number>(&self, content: &[T]) -> Buffer<T> {
        self.0.upload(content)
    }
    fn scratch<T: Number>(&self, len: usize) -> Buffer<T> {
        self.0.scratch(len)
    }
    fn download<T: Number>(&self, memory: &Buffer<T>) -> Vec<T> {
        memory.download()
    }
    fn input<'b, T: Number>(&'b self, memory: &'b Buffer<T>) -> Input<'b, T> {
        Host::input(self, memory)
    }
    fn output<'b, T: Number>(&'b self, memory: &'b mut Buffer<T>) -> Output<'b, T> {
        Host::output(self, memory)
    }
}

struct Device<'a> {
    on: OnStream<'a>,
    stream: &'a std::sync::Arc<CudaStream>,
}

impl Launcher for Device<'_> {
    fn launch(&self, launch: &ops::Launch<'_>) -> Result<()> {
        self.on.launch(launch)
    }
}

impl Machine for Device<'_> {
    type Memory<T> = CudaSlice<T>;
    fn upload<T: Number>(&self, content: &[T]) -> CudaSlice<T> {
        self.stream.clone_htod(content).unwrap()
    }
    fn scratch<T: Number>(&self, len: usize) -> CudaSlice<T> {
        self.upload(&vec![T::round(f64::NAN); len])
    }
    fn download<T: Number>(&self, memory: &CudaSlice<T>) -> Vec<T> {
        self.stream.clone_dtoh(memory).unwrap()
    }
    fn input<'b, T: Number>(&'b self, memory: &'b CudaSlice<T>) -> Input<'b, T> {
        self.on.input(memory)
    }
    fn output<'b, T: Number>(&'b self, memory: &'b mut CudaSlice<T>) -> Output<'b, T> {
        self.on.output(memory)
    }
}

/// The host executor, in a thread order that is drawn from the seed.
fn host(seed: u64) -> Host {
    let mut executor = Executor::new();
    executor.set_order(Order::ALL[seed as usize % 3]);
    Host(executor)
}

/// Runs the checks on the first GPU, or says past the test's captured output that they were skipped.
fn on_gpu(check: impl FnOnce(&Device<'_>)) {
    let gpu = match Gpu::new(0) {
        Ok(gpu) => gpu,
        Err(reason @ (Error::NoDriver { .. } | Error::NoGpu { .. })) => {
            let mut text = std::io::stderr().lock();
            let _ = writeln!(text, "1 GPU check skipped: no GPU ({reason})");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let stream = gpu.context().new_stream().unwrap();
    let on = gpu.on(&stream).unwrap();
    check(&Device {
        on,
        stream: &stream,
    });
    stream.synchronize().unwrap();
    gpu.context().check_err().unwrap();
}

/// Standard normal numbers as T can hold them.
fn draw<T: Number, Sh: ndarray::ShapeBuilder>(
    random: &mut ChaCha8Rng,
    shape: Sh,
) -> Array<f64, Sh::Dim> {
    Array::from_shape_simple_fn(shape, || {
        let uniform: [f64; 2] = [1.0 - random.random::<f64>(), random.random()];
        let normal = (-2.0 * uniform[0].ln()).sqrt() * (std::f64::consts::TAU * uniform[1]).cos();
        T::round(normal).widen()
    })
}

#[track_caller]
fn assert_close<T: Number, D: Dimension>(
    name: &str,
    x: &[T],
    reference: &Array<f64, D>,
    tolerance: f64,
) {
    assert_near(name, x, reference, tolerance, 0.0);
}

/// As [`assert_close`], with an error relative to at least `scale`: the norm of what cancels in a
/// result that can be all but zero.
#[track_caller]
fn assert_near<T: Number, D: Dimension>(
    name: &str,
    x: &[T],
    reference: &Array<f64, D>,
    tolerance: f64,
    scale: f64,
) {
    assert_eq!(x.len(), reference.len(), "{name}: length");
    let (mut difference, mut norm) = (0.0_f64, 0.0_f64);
    for (&x, &reference) in x.iter().zip(reference) {
        difference += (x.widen() - reference).powi(2);
        norm += reference.powi(2);
    }
    let norm = norm.sqrt().max(scale);
    let error = difference.sqrt() / if norm == 0.0 { 1.0 } else { norm };
    assert!(
        error <= tolerance,
        "{name}: relative error {error:e} above {tolerance:e}"
    );
}

fn check_layer_norm<T: Number>(
    machine: &impl Machine,
    (rows, width): (usize, usize),
    with_residual: bool,
    seed: u64,
) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let [x, residual, dy, dsum] = [(); 4].map(|()| draw::<T, _>(&mut random, (rows, width)));
    let [weight, bias] = [(); 2].map(|()| draw::<T, _>(&mut random, width));
    let [mut dweight, mut dbias] = [(); 2].map(|()| draw::<f32, _>(&mut random, width));
    let s = match with_residual {
        true => (&x + &residual).map(|&sum| T::round(sum).widen()),
        false => x.clone(),
    };

    let shape = layer_norm::Shape { rows, width };
    let [x_memory, residual_memory] = [&x, &residual].map(|x| machine.numbers::<T, _>(x));
    let [weight_memory, bias_memory] = [&weight, &bias].map(|x| machine.numbers::<T, _>(x));
    let [mut sum_memory, mut y_memory] = [(); 2].map(|()| machine.scratch::<T>(rows * width));
    let [mut mean_memory, mut rstd_memory] = [(); 2].map(|()| machine.scratch::<f32>(rows));
    let forward = layer_norm::Forward {
        x: machine.input(&x_memory),
        residual: with_residual.then(|| layer_norm::Residual {
            residual: machine.input(&residual_memory),
            sum: machine.output(&mut sum_memory),
        }),
        weight: machine.input(&weight_memory),
        bias: machine.input(&bias_memory),
        y: machine.output(&mut y_memory),
        mean: machine.output(&mut mean_memory),
        rstd: machine.output(&mut rstd_memory),
        epsilon: EPSILON,
    };
    shape
        .forward(machine, forward)
        .unwrap_or_else(|error| panic!("{error}"));

    let [mut dweight_memory, mut dbias_memory] =
        [&dweight, &dbias].map(|x| machine.numbers::<f32, _>(x));
    let mut dy_memory = machine.numbers::<T, _>(&dy);
    let dsum_memory = machine.numbers::<T, _>(&dsum);
    let mut workspace = machine.scratch::<f32>(shape.workspace().unwrap());
    let ds = machine.output(&mut dy_memory);
    let backward = layer_norm::Backward {
        s: machine.input(if with_residual {
            &sum_memory
        } else {
            &x_memory
        }),
        weight: machine.input(&weight_memory),
        mean: machine.input(&mean_memory),
        rstd: machine.input(&rstd_memory),
        dy: ds.as_input(),
        dsum: with_residual.then(|| machine.input(&dsum_memory)),
        ds,
        dweight: machine.output(&mut dweight_memory),
        dbias: machine.output(&mut dbias_memory),
        workspace: machine.output(&mut workspace),
    };
    shape
        .backward(machine, backward)
        .unwrap_or_else(|error| panic!("{error}"));

    let mut y = Array2::from_elem((rows, width), f64::NAN);
    let mut ds = y.clone();
    let [mut mean, mut rstd] = [(); 2].map(|()| Array1::from_elem(rows, f64::NAN));
    dtmem_reference::layer_norm::forward(
        s.view(),
        weight.view(),
        bias.view(),
        f64::from(EPSILON),
        y.view_mut(),
        mean.view_mut(),
        rstd.view_mut(),
    )
    .unwrap();
    dtmem_reference::layer_norm::backward(
        s.view(),
        weight.view(),
        mean.view(),
        rstd.view(),
        dy.view(),
        ds.view_mut(),
        dweight.view_mut(),
        dbias.view_mut(),
    )
    .unwrap();
    if with_residual {
        ds += &dsum;
        assert_close("sum", &machine.download(&sum_memory), &s, 0.0);
    }
    assert_close("y", &machine.download(&y_memory), &y, T::TOLERANCE);
    assert_close("ds", &machine.download(&dy_memory), &ds, T::TOLERANCE);
    // A mean, or a sum over rows, can cancel.
    let norm = |x: &Array2<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    for (name, memory, reference, scale) in [
        (
            "mean",
            &mean_memory,
            &mean,
            norm(&s) / (width as f64).sqrt(),
        ),
        ("rstd", &rstd_memory, &rstd, 0.0),
        ("dweight", &dweight_memory, &dweight, norm(&dy)),
        ("dbias", &dbias_memory, &dbias, norm(&dy)),
    ] {
        let found = machine.download(memory);
        assert_near(name, &found, reference, f32::TOLERANCE, scale);
    }
}

const ACTIVATIONS: [Activation; 4] = [
    Activation::Relu,
    Activation::Gelu,
    Activation::Tanh,
    Activation::OnePlus,
];

fn check_activation<T: Number>(machine: &impl Machine, elements: usize, seed: u64) {
    let shape = activation::Shape { elements };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for activation in ACTIVATIONS {
        let [x, dy] = [(); 2].map(|()| draw::<T, _>(&mut random, (1, elements)));
        let mut y = Array2::from_elem(x.dim(), f64::NAN);
        dtmem_reference::activation::forward(activation, x.view(), y.view_mut()).unwrap();

        let mut memory = machine.numbers::<T, _>(&x);
        let in_place = machine.output(&mut memory);
        let forward = activation::Forward {
            activation,
            x: in_place.as_input(),
            y: in_place,
        };
        shape.forward(machine, forward).unwrap();
        let name = format!("{activation:?}");
        assert_close(&name, &machine.download(&memory), &y, T::TOLERANCE);

        let y = y.map(|&y| T::round(y).widen());
        let kept = machine.numbers::<T, _>(match activation {
            Activation::Relu | Activation::Tanh => &y,
            Activation::Gelu | Activation::OnePlus => &x,
        });
        let mut memory = machine.numbers::<T, _>(&dy);
        let backward = activation::Backward {
            activation,
            kept: machine.input(&kept),
            dy: machine.output(&mut memory),
        };
        shape.backward(machine, backward).unwrap();
        let mut dx = dy;
        dtmem_reference::activation::backward_in_place(
            activation,
            x.view(),
            y.view(),
            dx.view_mut(),
        )
        .unwrap();
        assert_close(&name, &machine.download(&memory), &dx, T::TOLERANCE);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn layer_norm_on_the_host_agrees_with_the_reference(
        rows in 0..20_usize,
        // Of narrower rows little but rounding is left in ds; the executor's own tests have them.
        width in prop_oneof![8..40_usize, Just(512), Just(513), 1000..1100_usize],
        with_residual: bool,
        seed: u64,
    ) {
        check_layer_norm::<f32>(&host(seed), (rows, width), with_residual, seed);
        check_layer_norm::<bf16>(&host(seed), (rows, width), with_residual, seed);
        check_layer_norm::<f16>(&host(seed), (rows, width), with_residual, seed);
    }

    #[test]
    fn activations_on_the_host_agree_with_the_reference(
        elements in prop_oneof![0..20_usize, 1020..1030_usize, 2000..3000_usize],
        seed: u64,
    ) {
        check_activation::<f32>(&host(seed), elements, seed);
        check_activation::<bf16>(&host(seed), elements, seed);
        check_activation::<f16>(&host(seed), elements, seed);
    }
}

#[test]
fn layer_norm_on_a_gpu_agrees_with_the_reference() {
    on_gpu(|device| {
        for (seed, (rows, width)) in [(1, 1), (5, 33), (300, 512), (70, 513), (9, 4096)]
            .into_iter()
            .enumerate()
        {
            for with_residual in [false, true] {
                check_layer_norm::<f32>(device, (rows, width), with_residual, seed as u64);
                check_layer_norm::<bf16>(device, (rows, width), with_residual, seed as u64);
                check_layer_norm::<f16>(device, (rows, width), with_residual, seed as u64);
            }
        }
    });
}

#[test]
fn activations_on_a_gpu_agree_with_the_reference() {
    on_gpu(|device| {
        for elements in [1, 7, 1024, 100_003] {
            check_activation::<f32>(device, elements, 1);
            check_activation::<bf16>(device, elements, 2);
            check_activation::<f16>(device, elements, 3);
        }
    });
}

/// Tensors at addresses that nobody reads: plans and errors need no more.
fn tensor<T>(address: u64, len: usize) -> Input<'static, T> {
    Input::on_host(address, len)
}

fn target<T>(address: u64, len: usize) -> Output<'static, T> {
    Output::on_host(address, len)
}

const ROWS: usize = 10;
const WIDTH: usize = 600;
const SHAPE: layer_norm::Shape = layer_norm::Shape {
    rows: ROWS,
    width: WIDTH,
};

fn forward() -> layer_norm::Forward<'static, bf16> {
    layer_norm::Forward {
        x: tensor(0x10000, ROWS * WIDTH),
        residual: Some(layer_norm::Residual {
            residual: tensor(0x20000, ROWS * WIDTH),
            sum: target(0x30000, ROWS * WIDTH),
        }),
        weight: tensor(0x40000, WIDTH),
        bias: tensor(0x50000, WIDTH),
        y: target(0x60000, ROWS * WIDTH),
        mean: target(0x70000, ROWS),
        rstd: target(0x80000, ROWS),
        epsilon: EPSILON,
    }
}

fn backward() -> layer_norm::Backward<'static, bf16> {
    layer_norm::Backward {
        s: tensor(0x10000, ROWS * WIDTH),
        weight: tensor(0x20000, WIDTH),
        mean: tensor(0x30000, ROWS),
        rstd: tensor(0x40000, ROWS),
        dy: tensor(0x50000, ROWS * WIDTH),
        dsum: None,
        ds: target(0x60000, ROWS * WIDTH),
        dweight: target(0x70000, WIDTH),
        dbias: target(0x80000, WIDTH),
        workspace: target(0x90000, SHAPE.workspace().unwrap()),
    }
}

#[test]
fn the_plan_of_layer_norm_covers_all_rows_and_columns() {
    let tensors = forward();
    let launch = SHAPE.plan_forward(&tensors).unwrap();
    assert_eq!(
        (launch.family(), launch.kernel()),
        ("layer_norm", "layer_norm_forward_bf16")
    );
    // 600 columns take two warps of 512, so a block of eight has four rows.
    assert_eq!((launch.grid(), launch.block()), ([3, 1, 1], [256, 1, 1]));
    assert_eq!(
        launch.args()[8..],
        [Arg::I32(10), Arg::I32(600), Arg::I32(2), Arg::F32(EPSILON)]
    );

    let tensors = backward();
    let [rows, sums] = SHAPE.plan_backward(&tensors).unwrap();
    assert_eq!(
        (rows.kernel(), rows.grid()),
        ("layer_norm_backward_bf16", [3, 1, 1])
    );
    assert_eq!(
        (sums.kernel(), sums.grid()),
        ("layer_norm_reduce", [19, 2, 1])
    );
    assert_eq!(SHAPE.workspace().unwrap(), 2 * 3 * WIDTH);
    let long = layer_norm::Shape {
        rows: 1 << 30,
        width: 1,
    };
    assert_eq!(long.workspace().unwrap(), 2 * 256);
}

#[test]
fn the_plan_of_an_activation_covers_all_elements() {
    let tensors = activation::Forward::<f16> {
        activation: Activation::Tanh,
        x: tensor(0x10000, 2049),
        y: target(0x20000, 2049),
    };
    let launch = activation::Shape { elements: 2049 }
        .plan_forward(&tensors)
        .unwrap();
    assert_eq!(
        (launch.kernel(), launch.grid(), launch.block()),
        ("activation_forward_f16", [2, 1, 1], [256, 1, 1])
    );
    assert_eq!(
        (launch.args()[0], launch.args()[3]),
        (Arg::I32(2), Arg::I64(2049))
    );
}

#[track_caller]
fn assert_refused<T>(result: Result<T>, parts: &[&str]) {
    let message = match result {
        Ok(_) => panic!("was planned"),
        Err(error) => error.to_string(),
    };
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn shapes_beyond_the_kernels_are_refused() {
    for (rows, width, parts) in [
        (1, 0, ["width is 0", "1 to 4096"]),
        (1, 4097, ["width is 4097", "1 to 4096"]),
        (
            (1 << 30) + 1,
            1,
            ["rows is 1073741825", "at most 1073741824"],
        ),
    ] {
        let shape = layer_norm::Shape { rows, width };
        assert_refused(shape.validate(), &parts);
        assert_refused(shape.workspace(), &parts);
        assert_refused(shape.plan_forward(&forward()), &parts);
    }
    let shape = activation::Shape {
        elements: usize::MAX,
    };
    assert_refused(
        shape.validate::<f32>(),
        &["elements is 18446744073709551615"],
    );
    for epsilon in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let tensors = layer_norm::Forward {
            epsilon,
            ..forward()
        };
        assert_refused(SHAPE.plan_forward(&tensors), &["epsilon is", "positive"]);
    }
}

#[test]
fn tensors_of_another_size_are_refused() {
    let tensors = layer_norm::Forward {
        weight: tensor(0x40000, WIDTH - 1),
        ..forward()
    };
    assert_refused(
        SHAPE.plan_forward(&tensors),
        &["weight has 599 elements, expected 600"],
    );
    let tensors = layer_norm::Forward {
        mean: target(0x70000, ROWS + 1),
        ..forward()
    };
    assert_refused(
        SHAPE.plan_forward(&tensors),
        &["mean has 11 elements, expected 10"],
    );
    let tensors = layer_norm::Backward {
        workspace: target(0x90000, 2 * 3 * WIDTH - 1),
        ..backward()
    };
    assert_refused(
        SHAPE.plan_backward(&tensors),
        &["workspace has 3599 elements, expected at least 3600"],
    );
}

#[test]
fn misaligned_tensors_are_refused() {
    let tensors = activation::Backward::<f32> {
        activation: Activation::Gelu,
        kept: tensor(0x10004, 8),
        dy: target(0x20000, 8),
    };
    assert_refused(
        activation::Shape { elements: 8 }.plan_backward(&tensors),
        &["kept begins at address 0x10004", "16 bytes"],
    );
    let tensors = layer_norm::Forward {
        y: target(0x60001, ROWS * WIDTH),
        ..forward()
    };
    assert_refused(SHAPE.plan_forward(&tensors), &["y begins at", "2 bytes"]);
}

#[test]
fn tensors_that_overlap_are_refused_unless_the_operation_works_in_place() {
    let size = ROWS * WIDTH;
    for address in [
        0x10000 + 2,
        0x10000 - 2,
        0x10000 + 2 * size as u64 - 2,
        0x20000,
        0x30000 + 2 * size as u64 - 2,
        0x40000,
    ] {
        let tensors = layer_norm::Forward {
            y: target(address, size),
            ..forward()
        };
        let refused = SHAPE.plan_forward(&tensors).unwrap_err();
        assert!(
            matches!(refused, Error::Overlap { .. }),
            "{address:#x}: {refused}"
        );
    }
    let in_place = layer_norm::Forward {
        y: target(0x10000, size),
        ..forward()
    };
    SHAPE.plan_forward(&in_place).unwrap();
    let tensors = layer_norm::Backward {
        dbias: target(0x70000, WIDTH),
        ..backward()
    };
    assert_refused(
        SHAPE.plan_backward(&tensors),
        &["dweight and dbias overlap"],
    );
}

#[test]
fn memory_of_another_executor_is_refused() {
    let tensors = forward();
    let launch = SHAPE.plan_forward(&tensors).unwrap();
    let error = host(0).launch(&launch).unwrap_err();
    assert!(matches!(error, Error::Launch { .. }), "{error}");
    assert!(
        error.to_string().contains("layer_norm_forward_bf16"),
        "{error}"
    );
}

#[test]
fn memory_of_the_host_is_refused_by_a_gpu() {
    on_gpu(|device| {
        let tensors = forward();
        let error = device.launch(&SHAPE.plan_forward(&tensors).unwrap());
        assert!(matches!(error, Err(Error::ForeignMemory { .. })));
    });
}

#[test]
fn a_machine_without_driver_or_gpu_gives_an_error_and_not_a_panic() {
    match gpu::count() {
        Ok(count) => match Gpu::new(count) {
            Err(Error::NoGpu { ordinal, count }) => assert_eq!(ordinal, count),
            other => panic!("{other:?}"),
        },
        Err(Error::NoDriver { .. }) => {
            assert_refused(Gpu::new(0), &["no NVIDIA driver", "libcuda"])
        }
        Err(other) => panic!("{other}"),
    }
}
