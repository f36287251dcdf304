use dtmem::ops::cross_entropy;
use half::{bf16, f16};
use ndarray::{Array2, array};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

use crate::common::{Number, assert_near, assert_refused, draw, target, tensor};
use crate::machines::{Machine, host, on_gpu};

const SCALE: f32 = 0.25;

fn check<T: Number>(machine: &impl Machine, (rows, classes): (usize, usize), seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let logits = draw::<T, _>(&mut random, (rows, classes));
    let targets: Vec<i32> = (0..rows)
        .map(|_| random.random_range(0..classes as i32))
        .collect();
    let shape = cross_entropy::Shape { rows, classes };
    let mut memory = machine.numbers::<T, _>(&logits);
    let (targets_memory, scale) = (machine.upload(&targets), machine.upload(&[SCALE]));
    let mut metrics = machine.scratch::<f32>(2);
    let mut workspace = machine.scratch::<f32>(shape.workspace().unwrap());
    let in_place = machine.output(&mut memory);
    let tensors = cross_entropy::Tensors {
        logits: in_place.as_input(),
        targets: machine.input(&targets_memory),
        scale: machine.input(&scale),
        dlogits: in_place,
        metrics: machine.output(&mut metrics),
        workspace: machine.output(&mut workspace),
    };
    shape.loss_and_gradient(machine, tensors).unwrap();

    let mut dlogits = Array2::from_elem((rows, classes), f64::NAN);
    let sums = dtmem_reference::cross_entropy::forward_backward(
        logits.view(),
        &targets,
        f64::from(SCALE),
        dlogits.view_mut(),
    )
    .unwrap();
    // p − 1 of a p close to 1 is made of ones.
    let ones = f64::from(SCALE) * (rows as f64).sqrt();
    let found = machine.download(&memory);
    assert_near("dlogits", &found, &dlogits, T::TOLERANCE, ones);
    let found = machine.download(&metrics);
    assert_near("loss", &found[..1], &array![sums.loss], f32::TOLERANCE, 0.0);
    assert_eq!(found[1] as usize, sums.correct);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn losses_on_the_host_agree_with_the_reference(
        rows in prop_oneof![0..10_usize, 250..300_usize], classes in prop_oneof![2..10_usize, 30..70_usize], seed: u64,
    ) {
        check::<f32>(&host(seed), (rows, classes), seed);
        check::<bf16>(&host(seed), (rows, classes), seed);
        check::<f16>(&host(seed), (rows, classes), seed);
    }
}

#[test]
fn losses_on_a_gpu_agree_with_the_reference() {
    on_gpu(|device| {
        for (seed, dim) in [(1, 2), (6000, 7), (100, 33), (20_000, 3)]
            .into_iter()
            .enumerate()
        {
            check::<f32>(device, dim, seed as u64);
            check::<bf16>(device, dim, seed as u64);
            check::<f16>(device, dim, seed as u64);
        }
    });
}

const SHAPE: cross_entropy::Shape = cross_entropy::Shape {
    rows: 100,
    classes: 5,
};

fn tensors() -> cross_entropy::Tensors<'static, f32> {
    cross_entropy::Tensors {
        logits: tensor(0x10000, 500),
        targets: tensor(0x20000, 100),
        scale: tensor(0x30000, 1),
        dlogits: target(0x40000, 500),
        metrics: target(0x50000, 2),
        workspace: target(0x60000, SHAPE.workspace().unwrap()),
    }
}

#[test]
fn the_plan_gives_a_row_as_many_lanes_as_hold_its_classes() {
    let tensors = tensors();
    let [rows, metrics] = SHAPE.plan(&tensors).unwrap();
    // 8 lanes a row, 32 rows a block.
    assert_eq!(
        (rows.kernel(), rows.grid()),
        ("cross_entropy_f32", [4, 1, 1])
    );
    assert_eq!(
        (metrics.kernel(), metrics.grid()),
        ("cross_entropy_metrics", [2, 1, 1])
    );
    assert_eq!(SHAPE.workspace().unwrap(), 8);
}

#[test]
fn shapes_and_tensors_that_do_not_fit_are_refused() {
    let shape = cross_entropy::Shape {
        classes: 0,
        ..SHAPE
    };
    assert_refused(shape.plan(&tensors()), &["classes is 0"]);
    let mut targets = [4; 100];
    targets[7] = -1;
    SHAPE.validate_targets(&targets).unwrap();
    targets[9] = 5;
    let message = ["targets is 5 at row 9", "negative or a class below 5"];
    assert_refused(SHAPE.validate_targets(&targets), &message);
    assert_refused(SHAPE.validate_targets(&[]), &["targets has 0 elements"]);
    let wrong = cross_entropy::Tensors {
        metrics: target(0x50000, 3),
        ..tensors()
    };
    assert_refused(SHAPE.plan(&wrong), &["metrics has 3 elements, expected 2"]);
    let wrong = cross_entropy::Tensors {
        dlogits: target(0x10004, 500),
        ..tensors()
    };
    assert_refused(SHAPE.plan(&wrong), &["dlogits and logits overlap"]);
}
