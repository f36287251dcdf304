use dtmem::ops::{Arg, Input, Output, elementwise};
use dtmem_reference::activation::{self, Activation};
use dtmem_reference::dropout::{self, Mask};
use half::{bf16, f16};
use ndarray::{Array2, Axis, s};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

use crate::common::{Number, assert_close, assert_near, assert_refused, draw, target, tensor};
use crate::machines::{Machine, host, on_gpu};

fn norm(x: &Array2<f64>) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// A feed-forward layer's hidden half and its output half: GELU of x + bias, and what dropout leaves of it on top of a
/// residual.
fn check_layer<T: Number>(machine: &impl Machine, (rows, width): (usize, usize), seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let [x, residual, dy] = [(); 3].map(|()| draw::<T, _>(&mut random, (rows, width)));
    let bias = draw::<T, _>(&mut random, width);
    let mut dbias = draw::<f32, _>(&mut random, width);
    let mask = Mask::new(seed, random.random(), random.random(), 0.25).unwrap();
    let origins: Vec<i32> = (0..rows).map(|_| random.random_range(0..1 << 20)).collect();
    let drop = |x: &mut Array2<f64>| {
        for (mut row, &origin) in x.rows_mut().into_iter().zip(&origins) {
            let first = origin as u64 * width as u64;
            dropout::apply(mask, first, row.as_slice_mut().unwrap()).unwrap();
        }
    };

    let shape = elementwise::Shape { rows, width };
    let [x_memory, residual_memory] = [&x, &residual].map(|x| machine.numbers::<T, _>(x));
    let bias_memory = machine.numbers::<T, _>(&bias);
    let step = machine.upload(&[mask.step]);
    let origins_memory = machine.upload(&origins);
    let mut y_memory = machine.scratch::<T>(rows * width);
    let dropout = || elementwise::Dropout {
        mask: Mask { step: 0, ..mask }, // the one in device memory counts
        step: machine.input(&step),
        origins: Some(machine.input(&origins_memory)),
    };
    let forward = elementwise::Forward {
        x: machine.input(&x_memory),
        bias: Some(machine.input(&bias_memory)),
        activation: Some(Activation::Gelu),
        dropout: Some(dropout()),
        residual: Some(machine.input(&residual_memory)),
        y: machine.output(&mut y_memory),
    };
    shape.forward(machine, forward).unwrap();
    let z = &x + &bias;
    let mut y = Array2::from_elem((rows, width), f64::NAN);
    activation::forward(Activation::Gelu, z.view(), y.view_mut()).unwrap();
    drop(&mut y);
    y += &residual;
    assert_close("y", &machine.download(&y_memory), &y, T::TOLERANCE);

    // dy: the middle of wider rows.
    let mut wide = Array2::from_elem((rows, width + 12), f64::NAN);
    wide.slice_mut(s![.., 4..width + 4]).assign(&dy);
    let wide_memory = machine.numbers::<T, _>(&wide);
    let mut dx_memory = machine.scratch::<T>(rows * width);
    let mut dbias_memory = machine.numbers::<f32, _>(&dbias);
    let mut workspace = machine.scratch::<f32>(shape.workspace().unwrap());
    let [_, dy_columns] = machine
        .input(&wide_memory)
        .rows(width + 12)
        .columns([4, width]);
    let backward = elementwise::Backward {
        activation: Some(elementwise::Kept {
            activation: Activation::Gelu,
            kept: machine.input(&x_memory),
            bias: Some(machine.input(&bias_memory)),
        }),
        dropout: Some(dropout()),
        dy: dy_columns,
        dx: Some(machine.output(&mut dx_memory)),
        bias: Some(elementwise::BiasGradient {
            dbias: machine.output(&mut dbias_memory),
            workspace: machine.output(&mut workspace),
        }),
    };
    shape.backward(machine, backward).unwrap();
    let mut dx = dy.clone();
    drop(&mut dx);
    activation::backward_in_place(Activation::Gelu, z.view(), z.view(), dx.view_mut()).unwrap();
    dbias += &dx.sum_axis(Axis(0));
    assert_near(
        "dx",
        &machine.download(&dx_memory),
        &dx,
        T::TOLERANCE,
        norm(&dy),
    );
    let found = machine.download(&dbias_memory);
    assert_near("dbias", &found, &dbias, f32::TOLERANCE, norm(&dy));
}

/// y ← x
fn nothing<'a, T>(x: Input<'a, T>, y: Output<'a, T>) -> elementwise::Forward<'a, T> {
    elementwise::Forward {
        x,
        bias: None,
        activation: None,
        dropout: None,
        residual: None,
        y,
    }
}

/// Sums, dropout in place and column sums, each alone; and conversions.
fn check_single_parts<T: Number>(machine: &impl Machine, (rows, width): (usize, usize), seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let [x, y] = [(); 2].map(|()| draw::<T, _>(&mut random, (rows, width)));
    let shape = elementwise::Shape { rows, width };
    let [x_memory, mut sum] = [&x, &y].map(|x| machine.numbers::<T, _>(x));
    let in_place = machine.output(&mut sum);
    let add = elementwise::Forward {
        residual: Some(in_place.as_input()),
        ..nothing(machine.input(&x_memory), in_place)
    };
    shape.forward(machine, add).unwrap();
    let expected = (&x + &y).map(|&sum| T::round(sum).widen());
    assert_close("sum", &machine.download(&sum), &expected, 0.0);

    let mask = Mask::new(seed, 7, 3, 0.5).unwrap();
    let step = machine.upload(&[mask.step]);
    let mut dropped = machine.numbers::<T, _>(&x);
    let in_place = machine.output(&mut dropped);
    let drop = elementwise::Forward {
        dropout: Some(elementwise::Dropout {
            mask,
            step: machine.input(&step),
            origins: None,
        }),
        ..nothing(in_place.as_input(), in_place)
    };
    shape.forward(machine, drop).unwrap();
    let mut expected = x.clone();
    dropout::apply(mask, 0, expected.as_slice_mut().unwrap()).unwrap();
    let expected = expected.map(|&x| T::round(x).widen());
    assert_close("dropped", &machine.download(&dropped), &expected, 0.0);

    let mut sums = machine.numbers::<f32, _>(&Array2::zeros((1, width)));
    let mut workspace = machine.scratch::<f32>(shape.workspace().unwrap());
    let columns = elementwise::Backward {
        activation: None,
        dropout: None,
        dy: machine.input(&x_memory).rows(width),
        dx: None,
        bias: Some(elementwise::BiasGradient {
            dbias: machine.output(&mut sums),
            workspace: machine.output(&mut workspace),
        }),
    };
    shape.backward(machine, columns).unwrap();
    let expected = x.sum_axis(Axis(0));
    let found = machine.download(&sums);
    assert_near("column sums", &found, &expected, f32::TOLERANCE, norm(&x));

    let exact = draw::<f32, _>(&mut random, (rows, width));
    let exact_memory = machine.numbers::<f32, _>(&exact);
    let mut narrow = machine.scratch::<T>(rows * width);
    let mut wide = machine.scratch::<f32>(rows * width);
    let out = machine.output(&mut narrow);
    shape
        .narrow(machine, machine.input(&exact_memory), out)
        .unwrap();
    let out = machine.output(&mut wide);
    shape.widen(machine, machine.input(&narrow), out).unwrap();
    let rounded = exact.map(|&x| T::round(x).widen());
    assert_close("wide", &machine.download(&wide), &rounded, 0.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn layers_on_the_host_agree_with_the_reference(
        rows in 0..20_usize, quads in prop_oneof![1..10_usize, Just(64), Just(128), 500..520_usize], seed: u64,
    ) {
        check_layer::<f32>(&host(seed), (rows, 4 * quads), seed);
        check_layer::<bf16>(&host(seed), (rows, 4 * quads), seed);
        check_layer::<f16>(&host(seed), (rows, 4 * quads), seed);
    }

    #[test]
    fn single_parts_on_the_host_agree_with_the_reference(
        rows in 0..20_usize, quads in prop_oneof![1..10_usize, Just(64), 120..140_usize], seed: u64,
    ) {
        check_single_parts::<f32>(&host(seed), (rows, 4 * quads), seed);
        check_single_parts::<bf16>(&host(seed), (rows, 4 * quads), seed);
        check_single_parts::<f16>(&host(seed), (rows, 4 * quads), seed);
    }
}

#[test]
fn layers_and_single_parts_on_a_gpu_agree_with_the_reference() {
    on_gpu(|device| {
        for (seed, dim) in [(1, 4), (7, 100), (3000, 512), (301, 2048), (9, 6000)]
            .into_iter()
            .enumerate()
        {
            let seed = seed as u64;
            check_layer::<f32>(device, dim, seed);
            check_layer::<bf16>(device, dim, seed);
            check_layer::<f16>(device, dim, seed);
            check_single_parts::<f32>(device, dim, seed);
            check_single_parts::<bf16>(device, dim, seed);
            check_single_parts::<f16>(device, dim, seed);
        }
    });
}

const SHAPE: elementwise::Shape = elementwise::Shape {
    rows: 100,
    width: 600,
};
const SIZE: usize = 100 * 600;

fn forward() -> elementwise::Forward<'static, bf16> {
    elementwise::Forward {
        x: tensor(0x100000, SIZE),
        bias: None,
        activation: Some(Activation::Tanh),
        dropout: None,
        residual: None,
        y: target(0x200000, SIZE),
    }
}

fn backward() -> elementwise::Backward<'static, bf16> {
    elementwise::Backward {
        activation: None,
        dropout: None,
        dy: tensor(0x100000, SIZE).rows(600),
        dx: Some(target(0x200000, SIZE)),
        bias: Some(elementwise::BiasGradient {
            dbias: target(0x300000, 600),
            workspace: target(0x400000, SHAPE.workspace().unwrap()),
        }),
    }
}

#[test]
fn plans_cover_all_rows_and_columns() {
    let tensors = forward();
    let launch = SHAPE.plan_forward(&tensors).unwrap();
    assert_eq!(launch.kernel(), "elementwise_forward_bf16");
    // 600 columns take four warps of 256, so a block of eight has two rows.
    assert_eq!((launch.grid(), launch.block()), ([1, 50, 1], [256, 1, 1]));
    assert_eq!(launch.args()[0], Arg::I32(2));
    assert_eq!(launch.args()[11..], [100, 600, 4].map(Arg::I32));

    let tensors = backward();
    let [rows, sums] = SHAPE.plan_backward(&tensors).unwrap().map(Option::unwrap);
    assert_eq!(rows.kernel(), "elementwise_backward_bf16");
    assert_eq!((rows.grid(), sums.grid()), ([1, 50, 1], [19, 1, 1]));
    assert_eq!(SHAPE.workspace().unwrap(), 50 * 600);
    let long = elementwise::Shape {
        rows: 1 << 30,
        width: 4096,
    };
    assert_eq!(long.workspace().unwrap(), 256 * 4096);

    let without_bias = elementwise::Backward {
        bias: None,
        ..backward()
    };
    let [rows, sums] = SHAPE.plan_backward(&without_bias).unwrap();
    assert!(rows.is_some() && sums.is_none());
}

#[test]
fn shapes_and_tensors_that_do_not_fit_are_refused() {
    for (rows, width, part) in [(1, 0, "width is 0"), ((1 << 30) + 1, 1, "rows is")] {
        let shape = elementwise::Shape { rows, width };
        assert_refused(shape.validate(), &[part]);
        assert_refused(shape.plan_forward(&forward()), &[part]);
        assert_refused(shape.plan_backward(&backward()), &[part]);
    }
    let odd = elementwise::Shape { rows: 1, width: 6 };
    let tensors = elementwise::Forward {
        x: tensor(0x1000, 6),
        dropout: Some(elementwise::Dropout {
            mask: Mask::new(1, 1, 1, 0.5).unwrap(),
            step: tensor(0x3000, 1),
            origins: None,
        }),
        y: target(0x2000, 6),
        ..forward()
    };
    assert_refused(odd.plan_forward(&tensors), &["width is 6", "multiple of 4"]);

    let tensors = elementwise::Forward {
        bias: Some(tensor(0x300000, 599)),
        ..forward()
    };
    assert_refused(
        SHAPE.plan_forward(&tensors),
        &["bias has 599 elements, expected 600"],
    );
    let tensors = elementwise::Forward {
        residual: Some(tensor(0x200002, SIZE)),
        ..forward()
    };
    assert_refused(SHAPE.plan_forward(&tensors), &["overlap"]);
    let tensors = elementwise::Backward {
        dy: tensor(0x100000, 100 * 604).rows(604),
        dx: Some(target(0x100000, SIZE)),
        ..backward()
    };
    assert_refused(SHAPE.plan_backward(&tensors), &["dx and dy overlap"]);
    let workspace = SHAPE.workspace().unwrap() - 1;
    let tensors = elementwise::Backward {
        bias: Some(elementwise::BiasGradient {
            dbias: target(0x300000, 600),
            workspace: target(0x400000, workspace),
        }),
        ..backward()
    };
    assert_refused(SHAPE.plan_backward(&tensors), &["workspace has 29999"]);
    let (x, out) = (tensor(0x100004, SIZE), target::<bf16>(0x200000, SIZE));
    assert_refused(SHAPE.plan_narrow(&x, &out), &["x begins at", "16 bytes"]);
}
