use dtmem::ops::one_hot;
use dtmem_reference::one_hot as reference;
use half::{bf16, f16};
use ndarray::Array2;
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

use crate::common::{Number, assert_near, assert_refused, draw, target, tensor};
use crate::machines::{Machine, host, on_gpu};

fn check<T: Number>(
    machine: &impl Machine,
    (rows, fields, width): (usize, usize, usize),
    tanh: bool,
    seed: u64,
) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    // Fields with 1 to 5 values.
    let mut offsets = vec![0];
    for _ in 0..fields {
        offsets.push(offsets[offsets.len() - 1] + random.random_range(1..=5));
    }
    let inputs = offsets.pop().unwrap();
    let mut codes = Array2::<u8>::zeros((rows, fields));
    for ((_, field), code) in codes.indexed_iter_mut() {
        let end = offsets.get(field + 1).copied().unwrap_or(inputs);
        *code = random.random_range(0..end - offsets[field]) as u8;
    }
    let weight = draw::<T, _>(&mut random, (inputs, width)) * 0.125;
    let bias = draw::<T, _>(&mut random, width);
    let dy = draw::<T, _>(&mut random, (rows, width));
    let mut dweight = draw::<f32, _>(&mut random, (inputs, width));
    let mut dbias = draw::<f32, _>(&mut random, width);

    let shape = one_hot::Shape {
        rows,
        fields,
        inputs,
        width,
    };
    let code_slice = codes.as_slice().unwrap();
    shape.validate_codes(code_slice, &offsets).unwrap();
    let codes_memory = machine.upload(code_slice);
    let offsets_memory: Vec<_> = offsets.iter().map(|&offset| offset as i32).collect();
    let offsets_memory = machine.upload(&offsets_memory);
    let weight_memory = machine.numbers::<T, _>(&weight);
    let bias_memory = machine.numbers::<T, _>(&bias);
    let mut y_memory = machine.scratch::<T>(rows * width);
    let forward = one_hot::Forward {
        codes: machine.input(&codes_memory),
        offsets: machine.input(&offsets_memory),
        weight: machine.input(&weight_memory),
        bias: machine.input(&bias_memory),
        tanh,
        y: machine.output(&mut y_memory),
    };
    shape.forward(machine, forward).unwrap();
    let found = machine.download(&y_memory);
    let mut y = Array2::from_elem((rows, width), f64::NAN);
    reference::forward(
        codes.view(),
        &offsets,
        weight.view(),
        Some(bias.view()),
        y.view_mut(),
    )
    .unwrap();
    if tanh {
        y.mapv_inplace(f64::tanh);
    }
    // Sums of weights can cancel.
    let made_of = bias.iter().map(|x| x * x).sum::<f64>().sqrt() * (rows as f64).sqrt();
    assert_near("y", &found, &y, T::TOLERANCE, made_of);

    let dy_memory = machine.numbers::<T, _>(&dy);
    let mut dweight_memory = machine.numbers::<f32, _>(&dweight);
    let mut dbias_memory = machine.numbers::<f32, _>(&dbias);
    let mut workspace = machine.scratch::<f32>(shape.workspace().unwrap());
    let backward = one_hot::Backward {
        codes: machine.input(&codes_memory),
        offsets: machine.input(&offsets_memory),
        y: tanh.then(|| machine.input(&y_memory)),
        dy: machine.input(&dy_memory),
        dweight: machine.output(&mut dweight_memory),
        dbias: machine.output(&mut dbias_memory),
        workspace: machine.output(&mut workspace),
    };
    shape.backward(machine, backward).unwrap();
    let mut g = dy.clone();
    if tanh {
        for (g, y) in g.iter_mut().zip(&found) {
            *g *= 1.0 - y.widen().powi(2);
        }
    }
    let (weight, bias) = (dweight.view_mut(), dbias.view_mut());
    reference::backward(codes.view(), &offsets, g.view(), weight, Some(bias)).unwrap();
    let made_of = dy.iter().map(|x| x * x).sum::<f64>().sqrt();
    let found = machine.download(&dweight_memory);
    assert_near("dweight", &found, &dweight, f32::TOLERANCE, made_of);
    let found = machine.download(&dbias_memory);
    assert_near("dbias", &found, &dbias, f32::TOLERANCE, made_of);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn sums_of_weight_rows_on_the_host_agree_with_the_reference(
        rows in prop_oneof![0..10_usize, 120..140_usize],
        fields in prop_oneof![Just(1), 20..30_usize],
        width in prop_oneof![1..10_usize, Just(64), 120..140_usize],
        tanh: bool,
        seed: u64,
    ) {
        check::<f32>(&host(seed), (rows, fields, width), tanh, seed);
        check::<bf16>(&host(seed), (rows, fields, width), tanh, seed);
        check::<f16>(&host(seed), (rows, fields, width), tanh, seed);
    }
}

#[test]
fn sums_of_weight_rows_on_a_gpu_agree_with_the_reference() {
    on_gpu(|device| {
        for (seed, dim) in [(1, 1, 1), (500, 1, 512), (3000, 147, 512), (70, 30, 130)]
            .into_iter()
            .enumerate()
        {
            for tanh in [false, true] {
                check::<f32>(device, dim, tanh, seed as u64);
                check::<bf16>(device, dim, tanh, seed as u64);
                check::<f16>(device, dim, tanh, seed as u64);
            }
        }
    });
}

const SHAPE: one_hot::Shape = one_hot::Shape {
    rows: 100,
    fields: 2,
    inputs: 7,
    width: 200,
};

fn backward() -> one_hot::Backward<'static, f16> {
    one_hot::Backward {
        codes: tensor(0x10000, 200),
        offsets: tensor(0x20000, 2),
        y: None,
        dy: tensor(0x30000, 100 * 200),
        dweight: target(0x80000, 7 * 200),
        dbias: target(0x90000, 200),
        workspace: target(0xa0000, SHAPE.workspace().unwrap()),
    }
}

#[test]
fn plans_cover_all_rows_inputs_and_columns() {
    let tensors = one_hot::Forward::<f16> {
        codes: tensor(0x10000, 200),
        offsets: tensor(0x20000, 2),
        weight: tensor(0x30000, 7 * 200),
        bias: tensor(0x40000, 200),
        tanh: true,
        y: target(0x50000, 100 * 200),
    };
    let launch = SHAPE.plan_forward(&tensors).unwrap();
    assert_eq!(
        (launch.kernel(), launch.grid()),
        ("one_hot_forward_f16", [4, 4, 1])
    );
    let tensors = backward();
    let [rows, sums] = SHAPE.plan_backward(&tensors).unwrap();
    assert_eq!(
        (rows.kernel(), rows.grid()),
        ("one_hot_backward_f16", [2, 1, 2])
    );
    assert_eq!(
        (sums.kernel(), sums.grid()),
        ("one_hot_add_partials", [50, 1, 1])
    );
    assert_eq!(SHAPE.workspace().unwrap(), 2 * 8 * 200);
}

#[test]
fn shapes_codes_and_tensors_that_do_not_fit_are_refused() {
    for (shape, part) in [
        (one_hot::Shape { fields: 0, ..SHAPE }, "fields is 0"),
        (one_hot::Shape { fields: 8, ..SHAPE }, "fields is 8"),
        (one_hot::Shape { width: 0, ..SHAPE }, "width is 0"),
        (
            one_hot::Shape {
                inputs: 1 << 21,
                ..SHAPE
            },
            "inputs is",
        ),
        (
            one_hot::Shape {
                rows: 1 << 31,
                ..SHAPE
            },
            "rows is",
        ),
    ] {
        assert_refused(shape.validate(), &[part]);
        assert_refused(shape.plan_backward(&backward()), &[part]);
    }
    let mut codes = [0; 200];
    SHAPE.validate_codes(&codes, &[0, 3]).unwrap();
    assert_refused(
        SHAPE.validate_codes(&codes[..199], &[0, 3]),
        &["codes has 199"],
    );
    assert_refused(SHAPE.validate_codes(&codes, &[3, 0]), &["offsets"]);
    codes[2 * 40] = 3;
    assert_refused(
        SHAPE.validate_codes(&codes, &[0, 3]),
        &["codes", "row 40, field 0"],
    );

    let tensors = one_hot::Backward {
        dbias: target(0x80000 + 4, 200),
        ..backward()
    };
    assert_refused(
        SHAPE.plan_backward(&tensors),
        &["dweight and dbias overlap"],
    );
}
