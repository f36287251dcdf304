use dtmem::ops::squared_error;
use half::{bf16, f16};
use ndarray::{Array2, array};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

use crate::common::{Number, assert_near, assert_refused, draw, target, tensor};
use crate::machines::{Machine, host, on_gpu};

const SCALE: f32 = 0.25;

fn check<T: Number>(machine: &impl Machine, (rows, size): (usize, usize), seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let y = draw::<T, _>(&mut random, (rows, size));
    let targets = draw::<f32, _>(&mut random, (rows, size)).mapv(|x| x as f32);
    // Some rows have no target.
    let known: Vec<i32> = (0..rows).map(|_| random.random_range(-1..2)).collect();
    let shape = squared_error::Shape { rows, size };
    let mut memory = machine.numbers::<T, _>(&y);
    let targets_memory = machine.upload(targets.as_slice().unwrap());
    let (known_memory, scale) = (machine.upload(&known), machine.upload(&[SCALE]));
    let mut metrics = machine.scratch::<f32>(2);
    let mut workspace = machine.scratch::<f32>(shape.workspace().unwrap());
    let in_place = machine.output(&mut memory);
    let tensors = squared_error::Tensors {
        y: in_place.as_input(),
        targets: machine.input(&targets_memory),
        known: machine.input(&known_memory),
        scale: machine.input(&scale),
        dy: in_place,
        metrics: machine.output(&mut metrics),
        workspace: machine.output(&mut workspace),
    };
    shape.loss_and_gradient(machine, tensors).unwrap();

    let mut dy = Array2::from_elem((rows, size), f64::NAN);
    let loss = dtmem_reference::squared_error::forward_backward(
        y.view(),
        targets.view(),
        &known,
        f64::from(SCALE),
        dy.view_mut(),
    )
    .unwrap();
    let found = machine.download(&memory);
    assert_near("dy", &found, &dy, T::TOLERANCE, 0.0);
    let found = machine.download(&metrics);
    assert_near("loss", &found, &array![loss, 0.0], f32::TOLERANCE, 0.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn errors_on_the_host_agree_with_the_reference(
        rows in prop_oneof![0..10_usize, 250..300_usize], size in prop_oneof![1..10_usize, 30..70_usize], seed: u64,
    ) {
        check::<f32>(&host(seed), (rows, size), seed);
        check::<bf16>(&host(seed), (rows, size), seed);
        check::<f16>(&host(seed), (rows, size), seed);
    }
}

#[test]
fn errors_on_a_gpu_agree_with_the_reference() {
    on_gpu(|device| {
        for (seed, dim) in [(1, 2), (6000, 7), (100, 33)].into_iter().enumerate() {
            check::<f32>(device, dim, seed as u64);
            check::<bf16>(device, dim, seed as u64);
            check::<f16>(device, dim, seed as u64);
        }
    });
}

#[test]
fn shapes_and_tensors_that_do_not_fit_are_refused() {
    let shape = squared_error::Shape { rows: 100, size: 5 };
    let tensors = || squared_error::Tensors::<f32> {
        y: tensor(0x10000, 500),
        targets: tensor(0x20000, 500),
        known: tensor(0x30000, 100),
        scale: tensor(0x40000, 1),
        dy: target(0x50000, 500),
        metrics: target(0x60000, 2),
        workspace: target(0x70000, shape.workspace().unwrap()),
    };
    shape.plan(&tensors()).unwrap();
    let none = squared_error::Shape { size: 0, ..shape };
    assert_refused(none.plan(&tensors()), &["size is 0"]);
    let wrong = squared_error::Tensors {
        targets: tensor(0x20000, 100),
        ..tensors()
    };
    assert_refused(
        shape.plan(&wrong),
        &["targets has 100 elements, expected 500"],
    );
    let wrong = squared_error::Tensors {
        dy: target(0x10004, 500),
        ..tensors()
    };
    assert_refused(shape.plan(&wrong), &["dy and y overlap"]);
}
