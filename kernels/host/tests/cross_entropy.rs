//! cross_entropy.cu against the reference.

mod common;

use common::{
    Random, Storage, assert_close, assert_every_barrier_is_needed, assert_near, in_every_order,
    norm, upload,
};
use dtmem_host::{Arg, Executor, Launch, Result};
use dtmem_reference::cross_entropy;
use half::{bf16, f16};
use ndarray::{Array1, Array2, ArrayView1, Axis, array};
use proptest::prelude::*;

const THREADS: u32 = 256;
const SCALE: f32 = 0.125;

#[derive(Debug, PartialEq)]
struct Run<T> {
    dlogits: Vec<T>,
    metrics: Vec<f32>,
}

fn run<T: Storage>(executor: &Executor, logits: &Array2<f64>, targets: &[i32]) -> Result<Run<T>> {
    let (rows, classes) = logits.dim();
    let lanes = classes.next_power_of_two().clamp(1, 32);
    let blocks = (rows * lanes).div_ceil(THREADS as usize);
    let metrics = executor.scratch::<f32>(2);
    let partial = executor.scratch::<f32>(2 * blocks);
    let logits = upload::<T, _>(executor, logits);
    let dlogits = executor.scratch::<T>(logits.len());
    let (targets, scale) = (executor.upload(targets), executor.upload(&[SCALE]));
    if blocks > 0 {
        executor.launch(
            &format!("cross_entropy_{}", T::NAME),
            Launch::new([blocks as u32, 1, 1], [THREADS, 1, 1]),
            &[
                Arg::Input(logits.view()),
                Arg::Input(targets.view()),
                Arg::Input(scale.view()),
                Arg::Output(dlogits.view()),
                Arg::Output(partial.view()),
                Arg::I32(rows as i32),
                Arg::I32(classes as i32),
                Arg::I32(lanes as i32),
            ],
        )?;
    }
    executor.launch(
        "cross_entropy_metrics",
        Launch::new([2, 1, 1], [THREADS, 1, 1]),
        &[
            Arg::Input(partial.view()),
            Arg::Output(metrics.view()),
            Arg::I32(blocks as i32),
        ],
    )?;
    Ok(Run {
        dlogits: dlogits.download(),
        metrics: metrics.download(),
    })
}

/// Rows without a target have a gradient of 0 and count for nothing.
fn reference(logits: &Array2<f64>, targets: &[i32]) -> (Array2<f64>, Array1<f64>) {
    let counted: Vec<_> = (0..targets.len())
        .filter(|&row| targets[row] >= 0)
        .collect();
    let counted_targets: Vec<_> = counted.iter().map(|&row| targets[row]).collect();
    let counted_logits = logits.select(Axis(0), &counted);
    let mut gradient = Array2::from_elem(counted_logits.dim(), f64::NAN);
    let sums = cross_entropy::forward_backward(
        counted_logits.view(),
        &counted_targets,
        f64::from(SCALE),
        gradient.view_mut(),
    )
    .unwrap();
    let mut dlogits = Array2::zeros(logits.dim());
    for (row, gradient) in counted.into_iter().zip(gradient.rows()) {
        dlogits.row_mut(row).assign(&gradient);
    }
    (dlogits, array![sums.loss, sums.correct as f64])
}

fn check<T: Storage>(rows: usize, classes: usize, spread: f64, seed: u64) {
    let mut random = Random(seed);
    // Few different numbers: some rows have several largest ones.
    let logits = random
        .array::<T, _>((rows, classes))
        .map(|x| T::round((x * 2.0).round() * spread).widen());
    let targets: Vec<i32> = (0..rows)
        .map(|_| (random.bits() % (classes as u64 + 1)) as i32 - 1)
        .collect();
    let found = in_every_order(|executor| {
        run::<T>(executor, &logits, &targets).unwrap_or_else(|error| panic!("{error}"))
    });
    let (dlogits, metrics) = reference(&logits, &targets);
    // p − 1 of a p close to 1 is made of ones.
    let ones = f64::from(SCALE) * (rows as f64).sqrt();
    assert_near("dlogits", &found.dlogits, &dlogits, T::TOLERANCE, ones);
    // As a sum over classes, log Σ exp may cancel with what it is compared to.
    let made_of = norm(logits.iter().copied());
    let loss = ArrayView1::from(&metrics.as_slice().unwrap()[..1]);
    assert_near("loss", &found.metrics[..1], &loss, f32::TOLERANCE, made_of);
    assert_eq!(f64::from(found.metrics[1]), metrics[1], "correct");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn loss_hits_and_gradient_agree_with_the_reference(
        rows in prop_oneof![0..10_usize, 60..70_usize, 250..300_usize],
        classes in prop_oneof![1..10_usize, 30..35_usize, Just(100)],
        spread in prop_oneof![Just(1.0), Just(20.0)],
        seed: u64,
    ) {
        check::<f32>(rows, classes, spread, seed);
        check::<bf16>(rows, classes, spread, seed);
        check::<f16>(rows, classes, spread, seed);
    }
}

#[test]
fn of_equal_logits_the_first_counts_as_the_largest() {
    let logits = array![
        [1.0, 2.0, 2.0],
        [1.0, 2.0, 2.0],
        [2.0, 2.0, 1.0],
        [0.0, 0.0, 0.0]
    ];
    let found = run::<f32>(&Executor::new(), &logits, &[1, 2, 0, 0]).unwrap();
    assert_eq!(found.metrics[1], 3.0);
}

#[test]
fn what_is_not_a_number_stays_visible() {
    let logits = array![[1.0, f64::NAN], [1.0, 0.0], [f64::NAN, f64::NAN]];
    for (targets, correct) in [([1, 0, -1], 1.0), ([0, 0, -1], 1.0)] {
        let found = run::<bf16>(&Executor::new(), &logits, &targets).unwrap();
        assert!(found.metrics[0].is_nan());
        assert_eq!(found.metrics[1], correct);
        assert!(found.dlogits[..2].iter().all(|x| x.is_nan()), "{found:?}");
        assert!(found.dlogits[2..].iter().all(|x| !x.is_nan()), "{found:?}");
        assert_close("no target", &found.dlogits[4..], &array![0.0, 0.0], 0.0);
    }
    // A target that is no class.
    let found = run::<bf16>(&Executor::new(), &array![[1.0, 2.0]], &[2]).unwrap();
    assert!(found.metrics[0].is_nan());
}

#[test]
fn every_barrier_is_needed() {
    let logits = Random(1).array::<f32, _>((100, 7));
    let source = include_str!("../../reduce.cuh");
    assert_every_barrier_is_needed("kernels/reduce.cuh", source, |executor| {
        run::<f32>(executor, &logits, &[3; 100]).map(|_| ())
    });
}
