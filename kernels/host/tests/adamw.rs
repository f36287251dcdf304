//! adamw.cu against the reference.

mod common;

use common::{
    Random, Storage, assert_close, assert_every_barrier_is_needed, assert_near, in_every_order,
    norm, upload,
};
use dtmem_host::{Arg, Executor, Launch, Result, View};
use dtmem_reference::optimiser::{self, AdamW};
use half::{bf16, f16};
use ndarray::{Array1, ArrayView1};
use proptest::prelude::*;

const THREADS: u32 = 256;
const PER_BLOCK: usize = 1024;

/// What the host computes once per step, in the order of adamw.cu.
fn factors(hyper: &AdamW) -> Vec<f32> {
    let steps = hyper.step as f64;
    [
        hyper.beta1,
        1.0 - hyper.beta1,
        hyper.beta2,
        1.0 - hyper.beta2,
        1.0 - hyper.learning_rate * hyper.weight_decay,
        hyper.learning_rate / (1.0 - hyper.beta1.powf(steps)),
        (1.0 - hyper.beta2.powf(steps)).sqrt().recip(),
        hyper.epsilon,
    ]
    .map(|factor| factor as f32)
    .to_vec()
}

struct Arena {
    gradient: Array1<f64>,
    parameter: Array1<f64>,
    first: Array1<f64>,
    second: Array1<f64>,
}

impl Arena {
    fn draw(n: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut array = || random.array::<f32, _>(n);
        Self {
            gradient: array(),
            parameter: array(),
            first: array(),
            second: array().map(|x| f64::from((x * x) as f32)),
        }
    }
}

fn check<T: Storage>(n: usize, decayed: usize, clipped: bool, step: u64, seed: u64) {
    let hyper = AdamW {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        gradient_scale: if clipped { 0.25 } else { 1.0 },
        step,
    };
    let arena = Arena::draw(n, seed);
    let run = in_every_order(|executor| {
        let f32s = |x| upload::<f32, _>(executor, x);
        let (factors, scale) = (
            executor.upload(&factors(&hyper)),
            executor.upload(&[0.25_f32]),
        );
        let scale_view = if clipped {
            scale.view()
        } else {
            dtmem_host::View::NULL
        };
        let gradient = f32s(&arena.gradient);
        let [parameter, first, second] = [&arena.parameter, &arena.first, &arena.second].map(f32s);
        let copy = executor.scratch::<T>(n);
        let mut args = vec![
            Arg::Input(factors.view()),
            Arg::Input(scale_view),
            Arg::Input(gradient.view()),
            Arg::Output(parameter.view()),
            Arg::Output(first.view()),
            Arg::Output(second.view()),
            Arg::Output(copy.view()),
            Arg::I64(n as i64),
            Arg::I64(decayed as i64),
        ];
        if T::NAME == f32::NAME {
            args.remove(6);
        }
        let launch = Launch::new([n.div_ceil(PER_BLOCK) as u32, 1, 1], [THREADS, 1, 1]);
        executor
            .launch(&format!("adamw_{}", T::NAME), launch, &args)
            .unwrap_or_else(|error| panic!("{error}"));
        let updated = [parameter, first, second].map(|x| x.download());
        (updated, (T::NAME != f32::NAME).then(|| copy.download()))
    });
    let ([new_parameter, new_first, new_second], copy) = run;
    let norms = [&arena.parameter, &arena.first].map(|x| norm(x.iter().copied()));
    let Arena {
        gradient,
        mut parameter,
        mut first,
        mut second,
    } = arena;
    for (range, weight_decay) in [(0..decayed, hyper.weight_decay), (decayed..n, 0.0)] {
        optimiser::adamw(
            &AdamW {
                weight_decay,
                ..hyper
            },
            &gradient.as_slice().unwrap()[range.clone()],
            &mut parameter.as_slice_mut().unwrap()[range.clone()],
            &mut first.as_slice_mut().unwrap()[range.clone()],
            &mut second.as_slice_mut().unwrap()[range],
        )
        .unwrap();
    }
    // The step may take a parameter or a moment to all but zero.
    assert_near(
        "parameter",
        &new_parameter,
        &parameter,
        f32::TOLERANCE,
        norms[0],
    );
    assert_near("first moment", &new_first, &first, f32::TOLERANCE, norms[1]);
    assert_close("second moment", &new_second, &second, f32::TOLERANCE);
    if let Some(copy) = copy {
        let rounded: Vec<_> = new_parameter.iter().map(|&x| T::round(x.into())).collect();
        assert!(copy == rounded, "the copy is not the rounded parameters");
    }
}

fn norm_and_scale(
    executor: &Executor,
    x: &Array1<f64>,
    blocks: usize,
    max_norm: f32,
) -> Result<Vec<f32>> {
    let x = upload::<f32, _>(executor, x);
    let [partial, result] = [blocks, 2].map(|n| executor.scratch::<f32>(n));
    executor.launch(
        "sum_of_squares",
        Launch::new([blocks as u32, 1, 1], [THREADS, 1, 1]),
        &[
            Arg::Input(x.view()),
            Arg::Output(partial.view()),
            Arg::I64(x.len() as i64),
        ],
    )?;
    executor.launch(
        "clip_scale",
        Launch::new([1, 1, 1], [THREADS, 1, 1]),
        &[
            Arg::Input(partial.view()),
            Arg::Output(result.view()),
            Arg::Output(View::NULL),
            Arg::Output(View::NULL),
            Arg::I32(blocks as i32),
            Arg::F32(max_norm),
            Arg::F32(1.0),
            Arg::F32(1.0),
        ],
    )?;
    Ok(result.download())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn a_step_agrees_with_the_reference(
        n in prop_oneof![1..9_usize, 1020..1030_usize, 1..5000_usize],
        share in 0.0..=1.0_f64, clipped: bool, step in 1..10_000_u64, seed: u64,
    ) {
        let decayed = (n as f64 * share) as usize;
        check::<f32>(n, decayed, clipped, step, seed);
        check::<bf16>(n, decayed, clipped, step, seed);
        check::<f16>(n, decayed, clipped, step, seed);
    }

    #[test]
    fn norms_and_scales_agree_with_the_reference(
        n in prop_oneof![0..9_usize, 1..5000_usize], blocks in 1..6_usize, max_norm in 0.1..100.0_f32, seed: u64,
    ) {
        let x = Random(seed).array::<f32, _>(n);
        let found = in_every_order(|executor| {
            norm_and_scale(executor, &x, blocks, max_norm).unwrap_or_else(|error| panic!("{error}"))
        });
        let norm = optimiser::sum_of_squares(x.as_slice().unwrap()).sqrt();
        let expected = [norm, optimiser::clip_scale(norm, max_norm.into())];
        assert_close("norm and scale", &found, &ArrayView1::from(&expected), f32::TOLERANCE);
    }
}

#[test]
fn a_norm_that_is_not_finite_has_no_scale() {
    for (x, max_norm) in [
        (f64::NAN, 1.0),
        (f64::INFINITY, 1.0),
        (1e30, f32::INFINITY), // its square
    ] {
        let gradient = Array1::from_vec(vec![1.0, x, 2.0]);
        let found = norm_and_scale(&Executor::new(), &gradient, 2, max_norm).unwrap();
        assert!(!found[0].is_finite() && found[1].is_nan(), "{found:?}");
    }
}

#[test]
fn a_step_without_a_scale_changes_nothing() {
    let executor = Executor::new();
    let (factors, scale) = (executor.upload(&[0.5_f32; 8]), executor.upload(&[f32::NAN]));
    let before: Vec<f32> = (1..10).map(|x| x as f32).collect();
    let state = [(); 4].map(|()| executor.upload(&before));
    let [gradient, parameter, first, second] = state.each_ref().map(|x| x.view());
    let args = [
        Arg::Input(factors.view()),
        Arg::Input(scale.view()),
        Arg::Input(gradient),
        Arg::Output(parameter),
        Arg::Output(first),
        Arg::Output(second),
        Arg::I64(9),
        Arg::I64(5),
    ];
    let launch = Launch::new([1, 1, 1], [THREADS, 1, 1]);
    executor.launch("adamw_f32", launch, &args).unwrap();
    assert!(state.iter().all(|x| x.download() == before));
}

#[test]
fn every_barrier_is_needed() {
    let x = Array1::ones(3000);
    let source = include_str!("../../reduce.cuh");
    assert_every_barrier_is_needed("kernels/reduce.cuh", source, |executor| {
        norm_and_scale(executor, &x, 2, 1.0).map(|_| ())
    });
}
