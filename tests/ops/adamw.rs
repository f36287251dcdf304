use dtmem::ops::adamw::{
    AdamW, GROWTH_STEPS, LARGEST_LOSS_SCALE, LossScale, Norm, Shape, Step, factors, scale_losses,
};
use dtmem::ops::{Arg, Input, Storage};
use dtmem_reference::optimiser;
use half::{bf16, f16};
use ndarray::{Array1, ArrayView1};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

use crate::common::{Number, assert_near, assert_refused, draw, target, tensor};
use crate::machines::{Machine, host, on_gpu};

const HYPER: AdamW = AdamW {
    learning_rate: 1e-2,
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.1,
    gradient_scale: 1.0,
    step: 3,
};

fn norm(x: &Array1<f64>) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// A norm, and a step that is clipped by it: the scale never leaves the device.
fn check<T: Number>(
    machine: &impl Machine,
    parameters: usize,
    decayed: usize,
    max_norm: f32,
    seed: u64,
) {
    let shape = Shape { parameters };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let [gradient, mut parameter, mut first] =
        [(); 3].map(|()| draw::<f32, _>(&mut random, parameters));
    let mut second = draw::<f32, _>(&mut random, parameters).map(|x| f64::from((x * x) as f32));

    let gradient_memory = machine.numbers::<f32, _>(&gradient);
    let mut norm_and_scale = machine.scratch::<f32>(2);
    let mut workspace = machine.scratch::<f32>(shape.workspace().unwrap());
    let tensors = Norm {
        gradient: machine.input(&gradient_memory),
        norm_and_scale: machine.output(&mut norm_and_scale),
        max_norm,
        loss_scale: None,
        workspace: machine.output(&mut workspace),
    };
    shape
        .norm(machine, tensors)
        .unwrap_or_else(|error| panic!("{error}"));

    let uploaded = machine.upload(&factors(&HYPER).unwrap());
    let [mut parameter_memory, mut first_memory, mut second_memory] =
        [&parameter, &first, &second].map(|x| machine.numbers::<f32, _>(x));
    let mut copy = machine.scratch::<T>(parameters);
    let narrower = T::TYPE != f32::TYPE;
    let tensors = Step::<T> {
        factors: machine.input(&uploaded),
        scale: Some(machine.input(&norm_and_scale).slice(1..2).unwrap()),
        gradient: machine.input(&gradient_memory),
        parameter: machine.output(&mut parameter_memory),
        first_moment: machine.output(&mut first_memory),
        second_moment: machine.output(&mut second_memory),
        copy: narrower.then(|| machine.output(&mut copy)),
        decayed,
    };
    shape
        .step(machine, tensors)
        .unwrap_or_else(|error| panic!("{error}"));

    let expected_norm = optimiser::sum_of_squares(gradient.as_slice().unwrap()).sqrt();
    let scale = optimiser::clip_scale(expected_norm, max_norm.into());
    let expected = [expected_norm, scale];
    let found = machine.download(&norm_and_scale);
    assert_near(
        "norm and scale",
        &found,
        &ArrayView1::from(&expected).to_owned(),
        f32::TOLERANCE,
        0.0,
    );

    // The step may take a parameter or a moment to all but zero.
    let norms = [norm(&parameter), norm(&first), 0.0];
    for (range, weight_decay) in [(0..decayed, HYPER.weight_decay), (decayed..parameters, 0.0)] {
        optimiser::adamw(
            &AdamW {
                weight_decay,
                gradient_scale: scale,
                ..HYPER
            },
            &gradient.as_slice().unwrap()[range.clone()],
            &mut parameter.as_slice_mut().unwrap()[range.clone()],
            &mut first.as_slice_mut().unwrap()[range.clone()],
            &mut second.as_slice_mut().unwrap()[range],
        )
        .unwrap();
    }
    let updated = [&parameter_memory, &first_memory, &second_memory].map(|x| machine.download(x));
    for (((name, found), expected), norm) in ["parameter", "first moment", "second moment"]
        .iter()
        .zip(&updated)
        .zip([&parameter, &first, &second])
        .zip(norms)
    {
        assert_near(name, found, expected, f32::TOLERANCE, norm);
    }
    if narrower {
        let rounded: Vec<_> = updated[0].iter().map(|&x| T::round(x.into())).collect();
        assert!(
            machine.download(&copy) == rounded,
            "the copy is not the rounded parameters"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn clipped_steps_on_the_host_agree_with_the_reference(
        parameters in prop_oneof![0..9_usize, 1020..1030_usize, 2000..3000_usize],
        share in 0.0..=1.0_f64,
        max_norm in prop_oneof![Just(f32::INFINITY), 0.1..100.0_f32],
        seed: u64,
    ) {
        let decayed = (parameters as f64 * share) as usize;
        check::<f32>(&host(seed), parameters, decayed, max_norm, seed);
        check::<bf16>(&host(seed), parameters, decayed, max_norm, seed);
        check::<f16>(&host(seed), parameters, decayed, max_norm, seed);
    }
}

#[test]
fn clipped_steps_on_a_gpu_agree_with_the_reference() {
    on_gpu(|device| {
        for (seed, parameters) in [1, 1023, 1024, 3_000_001].into_iter().enumerate() {
            check::<f32>(device, parameters, parameters / 2, 1.0, seed as u64);
            check::<bf16>(device, parameters, parameters, 1e9, seed as u64);
            check::<f16>(device, parameters, 0, 1.0, seed as u64);
        }
    });
}

/// The state after a gradient of `size`, computed from losses that were scaled by `state`; found norm and scale are
/// those of the losses as they are.
fn check_loss_scale(machine: &impl Machine, size: f64, max_norm: f32, state: [f32; 2]) -> [f32; 2] {
    let shape = Shape { parameters: 1025 };
    let mut random = ChaCha8Rng::seed_from_u64(state[0].to_bits().into());
    let gradient = draw::<f32, _>(&mut random, 1025) * size;
    let scaled = gradient.map(|x| (x * f64::from(state[0])) as f32);
    let scaled = machine.upload(scaled.as_slice().unwrap());
    let mut state_memory = machine.upload(&state);
    let mut weights = machine.upload(&[0.5_f32, -3.0]);
    scale_losses(
        machine,
        machine.input(&state_memory),
        machine.output(&mut weights),
    )
    .unwrap();
    assert_eq!(
        machine.download(&weights),
        [0.5 * state[0], -3.0 * state[0]]
    );

    let [mut norm_and_scale, mut used] = [2, 1].map(|len| machine.scratch::<f32>(len));
    let mut workspace = machine.scratch::<f32>(shape.workspace().unwrap());
    let tensors = Norm {
        gradient: machine.input(&scaled),
        norm_and_scale: machine.output(&mut norm_and_scale),
        max_norm,
        loss_scale: Some(LossScale {
            state: machine.output(&mut state_memory),
            used: machine.output(&mut used),
        }),
        workspace: machine.output(&mut workspace),
    };
    shape.norm(machine, tensors).unwrap();
    assert_eq!(machine.download(&used), state[..1]);
    let found = machine.download(&norm_and_scale);
    if size.is_finite() {
        let expected_norm = norm(&gradient);
        let scale = optimiser::clip_scale(expected_norm, max_norm.into()) / f64::from(state[0]);
        for (found, expected) in found.into_iter().zip([expected_norm, scale]) {
            let error = (f64::from(found) / expected - 1.0).abs();
            assert!(error < 1e-5, "{found}, expected {expected}");
        }
    } else {
        assert!(!found[0].is_finite() && found[1].is_nan(), "{found:?}");
    }
    machine.download(&state_memory).try_into().unwrap()
}

fn check_loss_scales(machine: &impl Machine) {
    let last = GROWTH_STEPS as f32 - 1.0;
    for (size, state, expected) in [
        (1e-6, [1024.0, 3.0], [1024.0, 4.0]),
        (3.0, [1024.0, last], [2048.0, 0.0]),
        (1.0, [LARGEST_LOSS_SCALE, last], [LARGEST_LOSS_SCALE, 0.0]),
        (f64::INFINITY, [1024.0, 3.0], [512.0, 0.0]),
        (f64::NAN, [1024.0, last], [512.0, 0.0]),
        (f64::NAN, [1.0, 7.0], [1.0, 0.0]),
    ] {
        for max_norm in [1.0, f32::INFINITY] {
            let found = check_loss_scale(machine, size, max_norm, state);
            assert_eq!(found, expected, "{size}, {state:?}");
        }
    }
}

#[test]
fn an_overflow_halves_the_loss_scale_and_enough_good_steps_double_it() {
    for seed in 0..3 {
        check_loss_scales(&host(seed));
    }
}

#[test]
fn loss_scales_on_a_gpu_change_as_on_the_host() {
    on_gpu(|device| check_loss_scales(device));
}

const N: usize = 5000;
const SHAPE: Shape = Shape { parameters: N };

fn step() -> Step<'static, bf16> {
    Step {
        factors: tensor(0x1004, 8),
        scale: None,
        gradient: tensor(0x10000, N),
        parameter: target(0x20000, N),
        first_moment: target(0x30000, N),
        second_moment: target(0x40000, N),
        copy: None,
        decayed: 7,
    }
}

fn norm_of_gradient() -> Norm<'static> {
    Norm {
        gradient: tensor(0x10000, N),
        norm_and_scale: target(0x1000, 2),
        max_norm: 1.0,
        loss_scale: None,
        workspace: target(0x20000, SHAPE.workspace().unwrap()),
    }
}

#[test]
fn the_plan_of_a_step_takes_the_copy_only_where_there_is_one() {
    let tensors = step();
    let launch = SHAPE.plan_step(&tensors).unwrap();
    assert_eq!((launch.kernel(), launch.grid()), ("adamw_f32", [5, 1, 1]));
    assert_eq!(launch.args()[6..], [Arg::I64(5000), Arg::I64(7)]);
    let tensors = Step {
        copy: Some(target(0x50000, N)),
        ..step()
    };
    let launch = SHAPE.plan_step(&tensors).unwrap();
    assert_eq!((launch.kernel(), launch.args().len()), ("adamw_bf16", 9));
}

#[test]
fn the_plan_of_a_norm_depends_on_the_parameters_alone() {
    let tensors = norm_of_gradient();
    let [squares, scale] = SHAPE.plan_norm(&tensors).unwrap();
    assert_eq!(
        (squares.kernel(), squares.grid()),
        ("sum_of_squares", [5, 1, 1])
    );
    assert_eq!((scale.kernel(), scale.grid()), ("clip_scale", [1, 1, 1]));
    assert_eq!(scale.args()[4..6], [Arg::I32(5), Arg::F32(1.0)]);
    assert_eq!(Shape { parameters: 0 }.workspace().unwrap(), 1);
    assert_eq!(
        Shape {
            parameters: 1 << 30
        }
        .workspace()
        .unwrap(),
        1024
    );
}

#[test]
fn steps_that_cannot_be_done_are_refused() {
    assert_refused(
        Shape {
            parameters: usize::MAX,
        }
        .validate(),
        &["parameters is", "at most"],
    );
    assert_refused(
        SHAPE.plan_step(&Step {
            decayed: N + 1,
            ..step()
        }),
        &["decayed is 5001", "at most the 5000"],
    );
    let scale: Option<Input<'_, f32>> = Some(tensor(0x2000, 2));
    assert_refused(
        SHAPE.plan_step(&Step { scale, ..step() }),
        &["scale has 2 elements, expected 1"],
    );
    let short = Step {
        second_moment: target(0x40000, N - 1),
        ..step()
    };
    assert_refused(
        SHAPE.plan_step(&short),
        &["second_moment has 4999 elements, expected 5000"],
    );
    let misaligned = Step {
        gradient: tensor(0x10004, N),
        ..step()
    };
    assert_refused(
        SHAPE.plan_step(&misaligned),
        &["gradient begins at", "16 bytes"],
    );
    let shared = Step {
        first_moment: target(0x20000, N),
        ..step()
    };
    assert_refused(
        SHAPE.plan_step(&shared),
        &["parameter and first_moment overlap"],
    );
    let wide = Step {
        factors: tensor(0x1000, 8),
        scale: None,
        gradient: tensor(0x10000, N),
        parameter: target(0x20000, N),
        first_moment: target(0x30000, N),
        second_moment: target(0x40000, N),
        copy: Some(target::<f32>(0x50000, N)),
        decayed: 0,
    };
    assert_refused(
        SHAPE.plan_step(&wide),
        &["copy is given in f32", "bf16 or f16"],
    );

    for max_norm in [0.0, -1.0, f32::NAN] {
        let tensors = Norm {
            max_norm,
            ..norm_of_gradient()
        };
        assert_refused(SHAPE.plan_norm(&tensors), &["max_norm is", "above 0"]);
    }
    let small = Norm {
        workspace: target(0x20000, 4),
        ..norm_of_gradient()
    };
    assert_refused(
        SHAPE.plan_norm(&small),
        &["workspace has 4 elements, expected at least 5"],
    );
    assert_refused(
        factors(&AdamW {
            beta2: 1.0,
            ..HYPER
        }),
        &["beta2 is 1", "less than 1"],
    );
    assert_refused(
        factors(&AdamW {
            beta1: f64::NAN,
            ..HYPER
        }),
        &["beta1 is NaN"],
    );
    assert_refused(
        factors(&AdamW { step: 0, ..HYPER }),
        &["step is 0", "at least 1"],
    );
}
