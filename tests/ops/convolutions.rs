use dtmem::ops::{Error, convolutions};
use dtmem_reference::activation::{self, Activation};
use dtmem_reference::convolution::{self, Grid};
use half::{bf16, f16};
use ndarray::{Array2, ArrayView2};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

use crate::common::{Number, assert_close, assert_near, assert_refused, draw, target, tensor};
use crate::machines::{Machine, host, on_gpu};

const TAPS: usize = 9;

fn shape(
    rows: usize,
    (width, height): (usize, usize),
    cardinalities: &[usize],
    [middle, out]: [usize; 2],
) -> convolutions::Shape {
    convolutions::Shape {
        rows,
        grid: Grid {
            width,
            height,
            cardinalities: cardinalities.to_vec(),
        },
        middle,
        out,
    }
}

/// Position-major, as the operation keeps it, from the reference's channel-major.
fn turned(x: &Array2<f64>, channels: usize) -> Array2<f64> {
    let (rows, len) = x.dim();
    let x = x.to_shape((rows, channels, len / channels)).unwrap();
    let x = x.permuted_axes([0, 2, 1]);
    Array2::from_shape_vec((rows, len), x.iter().copied().collect()).unwrap()
}

fn norm(x: &Array2<f64>) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn rounded<T: Number>(x: Array2<f64>) -> Array2<f64> {
    x.mapv_into(|x| T::round(x).widen())
}

fn masked(y: ArrayView2<f64>, dy: &mut Array2<f64>) {
    activation::backward_in_place(Activation::Relu, y, y, dy.view_mut()).unwrap();
}

fn check<T: Number>(machine: &impl Machine, shape: &convolutions::Shape, seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let convolutions::Shape {
        rows,
        ref grid,
        middle,
        out,
    } = *shape;
    let (channels, positions) = (grid.channels(), grid.positions());
    let fields = grid.cardinalities.len();
    let codes = Array2::from_shape_fn((rows, positions * fields), |(_, input)| {
        random.random_range(0..grid.cardinalities[input % fields]) as u8
    });
    let weight1 = rounded::<T>(draw::<T, _>(&mut random, (channels * TAPS, middle)) * 0.3);
    let weight2 = rounded::<T>(draw::<T, _>(&mut random, (out, middle * TAPS)) * 0.1);
    let bias1 = draw::<T, _>(&mut random, middle);
    let bias2 = draw::<T, _>(&mut random, out);
    let dout = draw::<T, _>(&mut random, (rows, out * positions));
    let mut dweight1 = draw::<f32, _>(&mut random, weight1.dim());
    let mut dweight2 = draw::<f32, _>(&mut random, weight2.dim());
    let mut dbias1 = draw::<f32, _>(&mut random, middle);
    let mut dbias2 = draw::<f32, _>(&mut random, out);

    let codes_memory = machine.upload(codes.as_slice().unwrap());
    let [weight1_memory, weight2_memory] = [&weight1, &weight2].map(|x| machine.numbers::<T, _>(x));
    let [bias1_memory, bias2_memory] = [&bias1, &bias2].map(|x| machine.numbers::<T, _>(x));
    let mut middle_memory = machine.scratch::<T>(rows * positions * middle);
    let mut out_memory = machine.scratch::<T>(rows * positions * out);
    let forward = convolutions::Forward {
        codes: machine.input(&codes_memory),
        weight1: machine.input(&weight1_memory),
        bias1: machine.input(&bias1_memory),
        weight2: machine.input(&weight2_memory),
        bias2: machine.input(&bias2_memory),
        middle: machine.output(&mut middle_memory),
        out: machine.output(&mut out_memory),
    };
    shape
        .forward(machine, forward)
        .unwrap_or_else(|error| panic!("{error}"));

    let map = |channels: usize| Array2::from_elem((rows, channels * positions), f64::NAN);
    let (mut y1, mut y2, mut scratch) = (map(middle), map(out), Vec::new());
    convolution::one_hot_forward(
        grid,
        codes.view(),
        weight1.view(),
        bias1.view(),
        y1.view_mut(),
        &mut scratch,
    )
    .unwrap();
    let y1 = rounded::<T>(y1.mapv_into(|x| x.max(0.0)));
    convolution::forward(
        grid,
        y1.view(),
        weight2.view(),
        bias2.view(),
        y2.view_mut(),
        &mut scratch,
    )
    .unwrap();
    let y2 = rounded::<T>(y2.mapv_into(|x| x.max(0.0)));
    let y1_turned = turned(&y1, middle);
    assert_close(
        "middle",
        &machine.download(&middle_memory),
        &y1_turned,
        T::TOLERANCE,
    );
    assert_close("out", &machine.download(&out_memory), &y2, T::TOLERANCE);

    // From the reference's activations, so that both round and mask alike.
    let middle_memory = machine.numbers::<T, _>(&y1_turned);
    let out_memory = machine.numbers::<T, _>(&y2);
    let mut dout_memory = machine.numbers::<T, _>(&dout);
    let mut dmiddle_memory = machine.scratch::<T>(rows * positions * middle);
    let [mut dweight1_memory, mut dweight2_memory] =
        [&dweight1, &dweight2].map(|x| machine.numbers::<f32, _>(x));
    let [mut dbias1_memory, mut dbias2_memory] =
        [&dbias1, &dbias2].map(|x| machine.numbers::<f32, _>(x));
    let mut workspace = machine.scratch::<f32>(shape.workspace::<T>().unwrap());
    let backward = convolutions::Backward {
        codes: machine.input(&codes_memory),
        weight2: machine.input(&weight2_memory),
        middle: machine.input(&middle_memory),
        out: machine.input(&out_memory),
        dout: machine.output(&mut dout_memory),
        dmiddle: machine.output(&mut dmiddle_memory),
        dweight1: machine.output(&mut dweight1_memory),
        dbias1: machine.output(&mut dbias1_memory),
        dweight2: machine.output(&mut dweight2_memory),
        dbias2: machine.output(&mut dbias2_memory),
        workspace: machine.output(&mut workspace),
    };
    shape
        .backward(machine, backward)
        .unwrap_or_else(|error| panic!("{error}"));

    let (mut dy2, mut dy1) = (dout, map(middle));
    masked(y2.view(), &mut dy2);
    convolution::backward(
        grid,
        y1.view(),
        weight2.view(),
        dy2.view(),
        dy1.view_mut(),
        dweight2.view_mut(),
        dbias2.view_mut(),
        &mut scratch,
    )
    .unwrap();
    masked(y1.view(), &mut dy1);
    convolution::one_hot_backward(
        grid,
        codes.view(),
        dy1.view(),
        dweight1.view_mut(),
        dbias1.view_mut(),
        &mut scratch,
    )
    .unwrap();
    let found = machine.download(&dmiddle_memory);
    assert_close("dmiddle", &found, &turned(&dy1, middle), T::TOLERANCE);
    // Sums over positions can cancel; dmiddle was rounded before it was added up.
    let (exact, near) = (f32::TOLERANCE, T::TOLERANCE);
    let (scale1, scale2) = (norm(&dy1), norm(&dy2));
    let found = machine.download(&dweight2_memory);
    assert_near("dweight2", &found, &dweight2, exact, scale2);
    let found = machine.download(&dbias2_memory);
    assert_near("dbias2", &found, &dbias2, exact, scale2);
    let found = machine.download(&dweight1_memory);
    assert_near("dweight1", &found, &dweight1, near, scale1);
    let found = machine.download(&dbias1_memory);
    assert_near("dbias1", &found, &dbias1, near, scale1);
}

fn drawn_shape() -> impl Strategy<Value = convolutions::Shape> {
    (
        0..5_usize,
        (1..8_usize, 1..8_usize),
        prop::collection::vec(1..12_usize, 1..4),
        [1..7_usize, 1..12_usize],
    )
        .prop_map(|(rows, sides, cardinalities, chunks)| {
            shape(rows, sides, &cardinalities, chunks.map(|chunks| chunks * 8))
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn convolutions_on_the_host_agree_with_the_reference(shape in drawn_shape(), seed: u64) {
        check::<f32>(&host(seed), &shape, seed);
        check::<bf16>(&host(seed), &shape, seed);
        check::<f16>(&host(seed), &shape, seed);
    }
}

#[test]
fn convolutions_of_the_largest_sizes_agree_with_the_reference() {
    // A grid, and channels, for which the weights come in slices.
    let shape = shape(1, (16, 16), &[11, 6, 3], [40, 80]);
    check::<bf16>(&host(1), &shape, 1);
    let wide = convolutions::Shape {
        grid: Grid {
            width: 3,
            height: 2,
            cardinalities: vec![100, 20, 8],
        },
        middle: 128,
        out: 128,
        ..shape
    };
    check::<f32>(&host(2), &wide, 2);
}

#[test]
fn convolutions_on_a_gpu_agree_with_the_reference() {
    on_gpu(|device| {
        for (seed, rows) in [1, 7, 300, 1500].into_iter().enumerate() {
            let shape = shape(rows, (7, 7), &[11, 6, 3], [40, 80]);
            check::<f32>(device, &shape, seed as u64);
            check::<bf16>(device, &shape, seed as u64);
            check::<f16>(device, &shape, seed as u64);
        }
        for (sides, channels) in [((16, 16), [40, 80]), ((1, 1), [8, 8]), ((5, 3), [128, 128])] {
            let shape = shape(70, sides, &[11, 6, 3], channels);
            check::<bf16>(device, &shape, 9);
        }
    });
}

fn paper(rows: usize) -> convolutions::Shape {
    shape(rows, (7, 7), &[11, 6, 3], [40, 80])
}

const ROWS: usize = 4500;
const MAP: usize = ROWS * 49;

fn forward() -> convolutions::Forward<'static, bf16> {
    convolutions::Forward {
        codes: tensor(0x1000_0000, MAP * 3),
        weight1: tensor(0x2000_0000, 180 * 40),
        bias1: tensor(0x2100_0000, 40),
        weight2: tensor(0x2200_0000, 80 * 360),
        bias2: tensor(0x2300_0000, 80),
        middle: target(0x3000_0000, MAP * 40),
        out: target(0x5000_0000, MAP * 80),
    }
}

fn backward() -> convolutions::Backward<'static, bf16> {
    convolutions::Backward {
        codes: tensor(0x1000_0000, MAP * 3),
        weight2: tensor(0x2200_0000, 80 * 360),
        middle: tensor(0x3000_0000, MAP * 40),
        out: tensor(0x5000_0000, MAP * 80),
        dout: target(0x7000_0000, MAP * 80),
        dmiddle: target(0x9000_0000, MAP * 40),
        dweight1: target(0xa000_0000, 180 * 40),
        dbias1: target(0xa100_0000, 40),
        dweight2: target(0xa200_0000, 80 * 360),
        dbias2: target(0xa300_0000, 80),
        workspace: target(0xb000_0000, paper(ROWS).workspace::<bf16>().unwrap()),
    }
}

#[test]
fn the_plan_of_the_convolutions_keeps_the_papers_weights_in_shared_memory() {
    let (shape, tensors) = (paper(ROWS), forward());
    let launch = shape.plan_forward(&tensors).unwrap();
    assert_eq!(launch.kernel(), "convolutions_forward_bf16");
    assert_eq!((launch.grid(), launch.block()), ([264, 1, 1], [128, 1, 1]));
    // 40 rows of 28 chunks and 80 of 46, 16 bytes more each; three frames of 8·8 cells and what surrounds them.
    assert_eq!(
        launch.shared_bytes(),
        40 * 29 * 16 + 80 * 47 * 16 + 201 * 80 + 608
    );
    let starts = 11 << 8 | 17 << 16;
    let numbers = [3, 20, 40, 80, 4500, 7, 7, 3, 3, 5].map(dtmem::ops::Arg::I32);
    assert_eq!(launch.args()[7], dtmem::ops::Arg::U64(starts));
    assert_eq!(launch.args()[8..], numbers);

    let tensors = backward();
    let plan = shape.plan_backward(&tensors).unwrap();
    let found = plan.map(|launch| (launch.kernel(), launch.grid()));
    let expected = [
        ("convolutions_input_gradient_bf16", [264, 1, 1]),
        ("convolutions_weight2_gradient_bf16", [128, 1, 1]),
        ("convolutions_weight1_gradient_bf16", [128, 1, 1]),
        ("convolutions_reduce", [920, 2, 1]),
    ];
    assert_eq!(found, expected);
}

#[test]
fn convolutions_beyond_the_kernels_are_refused() {
    let fields = vec![1; 9];
    for (shape, parts) in [
        (paper((1 << 30) + 1), ["rows is 1073741825", "1073741824"]),
        (shape(1, (17, 7), &[3], [8, 8]), ["width is 17", "1 to 16"]),
        (shape(1, (7, 0), &[3], [8, 8]), ["height is 0", "1 to 16"]),
        (shape(1, (7, 7), &fields, [8, 8]), ["fields is 9", "1 to 8"]),
        (shape(1, (7, 7), &[], [8, 8]), ["fields is 0", "1 to 8"]),
        (
            shape(1, (7, 7), &[120, 9], [8, 8]),
            ["channels is 129", "1 to 128"],
        ),
        (
            shape(1, (7, 7), &[3], [12, 8]),
            ["middle is 12", "a multiple of 8"],
        ),
        (shape(1, (7, 7), &[3], [8, 136]), ["out is 136", "8 to 128"]),
        (
            shape(1, (16, 16), &[11, 6, 3], [128, 128]),
            ["16×16, 20→128→128", "shared memory"],
        ),
    ] {
        assert_refused(shape.validate::<bf16>(), &parts);
        assert_refused(shape.workspace::<bf16>(), &parts);
        assert_refused(shape.plan_forward(&forward()), &parts);
        assert_refused(shape.plan_backward(&backward()), &parts);
    }
    // What the documentation promises.
    shape(ROWS, (16, 16), &[11, 6, 3], [40, 80])
        .validate::<f16>()
        .unwrap();
    shape(ROWS, (9, 9), &[11, 6, 3], [40, 80])
        .validate::<f32>()
        .unwrap();
}

#[test]
fn wrong_tensors_of_convolutions_are_refused() {
    let shape = paper(ROWS);
    let tensors = convolutions::Forward {
        codes: tensor(0x1000_0000, MAP * 3 - 1),
        ..forward()
    };
    assert_refused(
        shape.plan_forward(&tensors),
        &["codes has 661499 elements, expected 661500"],
    );
    let tensors = convolutions::Forward {
        middle: target(0x3000_0008, MAP * 40),
        ..forward()
    };
    assert_refused(
        shape.plan_forward(&tensors),
        &["middle begins at address 0x30000008", "16 bytes"],
    );
    let tensors = convolutions::Backward {
        dout: target(0x5000_0000, MAP * 80),
        ..backward()
    };
    let refused = shape.plan_backward(&tensors).unwrap_err();
    assert!(matches!(refused, Error::Overlap { .. }), "{refused}");
    let tensors = convolutions::Backward {
        workspace: target(0xb000_0000, 7),
        ..backward()
    };
    assert_refused(
        shape.plan_backward(&tensors),
        &["workspace has 7 elements, expected at least"],
    );
}
