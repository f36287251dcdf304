use dtmem::ops::{Arg, Error, elementwise, layer_norm};
use dtmem_reference::dropout::{self, Mask};
use half::{bf16, f16};
use ndarray::{Array1, Array2};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

use crate::common::{Number, assert_close, assert_near, assert_refused, draw, target, tensor};
use crate::machines::{Machine, host, on_gpu};

const EPSILON: f32 = 1e-5;

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
    // A share whose factor is exact.
    let mask = Mask::new(seed, random.random(), random.random(), 0.5).unwrap();
    let with_dropout = with_residual && width.is_multiple_of(4);
    let drop = |x: &mut Array2<f64>| {
        if with_dropout {
            dropout::apply(mask, 0, x.as_slice_mut().unwrap()).unwrap();
        }
    };
    let s = match with_residual {
        true => {
            let mut dropped = residual.clone();
            drop(&mut dropped);
            (&x + &dropped).map(|&sum| T::round(sum).widen())
        }
        false => x.clone(),
    };
    let step = machine.upload(&[mask.step]);
    let dropout = || elementwise::Dropout {
        mask: Mask { step: 0, ..mask }, // the one in device memory counts
        step: machine.input(&step),
        origins: None,
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
            dropout: with_dropout.then(dropout),
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
    let mut of_residual_memory = machine.scratch::<T>(rows * width);
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
        summand: with_dropout.then(|| layer_norm::Summand {
            dropout: dropout(),
            gradient: machine.output(&mut of_residual_memory),
        }),
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
    if with_dropout {
        drop(&mut ds);
        let found = machine.download(&of_residual_memory);
        assert_close("of the residual", &found, &ds, T::TOLERANCE);
    }
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
            dropout: None,
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
        summand: None,
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
        ("layer_norm_reduce", [38, 1, 1])
    );
    assert_eq!(SHAPE.workspace().unwrap(), 2 * 3 * WIDTH);
    let long = layer_norm::Shape {
        rows: 1 << 30,
        width: 1,
    };
    assert_eq!(long.workspace().unwrap(), 2 * 256);
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
