//! Operations on single elements or single rows: normalisation, activations, dropout, loss,
//! optimiser.

mod common;

use common::{Fixture, Random, assert_close, assert_slope, finite_difference, poisoned};
use dtmem_reference::activation::{self, Activation};
use dtmem_reference::cross_entropy::{self, Sums};
use dtmem_reference::dropout::{self, Mask};
use dtmem_reference::optimiser::{self, AdamW};
use dtmem_reference::{Error, Scalar, layer_norm};
use ndarray::{Array1, Array2, Axis, Slice, arr2};
use proptest::prelude::*;

const ACTIVATIONS: [Activation; 4] = [
    Activation::Relu,
    Activation::Gelu,
    Activation::Tanh,
    Activation::OnePlus,
];

/// The name of the argument that an operation refused.
fn refused<R: std::fmt::Debug>(result: Result<R, Error>) -> &'static str {
    match result.expect_err("should have been refused") {
        Error::Shape { argument, .. } | Error::Value { argument, .. } => argument,
    }
}

/// A layer normalisation and what its forward pass keeps.
struct Normalised<T> {
    y: Array2<T>,
    mean: Array1<T>,
    rstd: Array1<T>,
}

fn normalise<T: Scalar>(
    x: &Array2<T>,
    weight: &Array1<T>,
    bias: &Array1<T>,
    epsilon: f64,
) -> Normalised<T> {
    let (mut y, mut mean, mut rstd) = (
        poisoned(x.raw_dim()),
        poisoned([x.nrows()]),
        poisoned([x.nrows()]),
    );
    layer_norm::forward(
        x.view(),
        weight.view(),
        bias.view(),
        epsilon,
        y.view_mut(),
        mean.view_mut(),
        rstd.view_mut(),
    )
    .expect("forward");
    Normalised { y, mean, rstd }
}

fn layer_norm_agrees_with_the_fixture<T: Scalar>(tolerance: f64) {
    let fixture = Fixture::open("layer_norm");
    let x: Array2<T> = fixture.array("input.x");
    let weight: Array1<T> = fixture.array("input.weight");
    let bias: Array1<T> = fixture.array("input.bias");
    let dy: Array2<T> = fixture.array("grad_output.y");
    let kept = normalise(&x, &weight, &bias, fixture.number("epsilon"));
    assert_close("y", &kept.y, &fixture.array("output.y"), tolerance);
    let mut dx = poisoned(x.raw_dim());
    let (mut dweight, mut dbias) = (Array1::zeros(weight.len()), Array1::zeros(bias.len()));
    layer_norm::backward(
        x.view(),
        weight.view(),
        kept.mean.view(),
        kept.rstd.view(),
        dy.view(),
        dx.view_mut(),
        dweight.view_mut(),
        dbias.view_mut(),
    )
    .expect("backward");
    assert_close("dx", &dx, &fixture.array("grad_input.x"), tolerance);
    assert_close(
        "dweight",
        &dweight,
        &fixture.array("grad_input.weight"),
        tolerance,
    );
    assert_close(
        "dbias",
        &dbias,
        &fixture.array("grad_input.bias"),
        tolerance,
    );
}

#[test]
fn layer_norm_agrees_with_the_fixture_in_f64() {
    layer_norm_agrees_with_the_fixture::<f64>(1e-10);
}

#[test]
fn layer_norm_agrees_with_the_fixture_in_f32() {
    layer_norm_agrees_with_the_fixture::<f32>(2e-5);
}

#[test]
fn layer_norm_keeps_its_precision_far_from_zero() {
    let mut random = Random::new(5);
    let x: Array2<f32> = random.array([3, 501]) * 0.5 + 1000.0;
    let (weight, bias) = (Array1::ones(501), Array1::zeros(501));
    let exact = normalise(
        &common::cast(&x),
        &common::cast(&weight),
        &common::cast(&bias),
        1e-5,
    );
    assert_close("y", &normalise(&x, &weight, &bias, 1e-5).y, &exact.y, 2e-3);
}

#[test]
fn layer_norm_of_rows_without_elements_is_empty() {
    let kept = normalise::<f32>(
        &Array2::zeros([3, 0]),
        &Array1::zeros(0),
        &Array1::zeros(0),
        0.25,
    );
    assert_eq!(
        (kept.mean, kept.rstd),
        (Array1::zeros(3), Array1::from_elem(3, 2.0))
    );
}

#[test]
fn layer_norm_refuses_an_epsilon_that_divides_by_zero() {
    for epsilon in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let x = Array2::<f64>::ones([1, 2]);
        let one = Array1::ones(2);
        let (mut y, mut mean, mut rstd) = (x.clone(), Array1::ones(1), Array1::ones(1));
        let result = layer_norm::forward(
            x.view(),
            one.view(),
            one.view(),
            epsilon,
            y.view_mut(),
            mean.view_mut(),
            rstd.view_mut(),
        );
        assert_eq!(refused(result), "epsilon");
    }
}

#[test]
fn layer_norm_refuses_wrong_shapes_by_name() {
    // Shapes of x, weight, bias, y, mean, rstd; one of them is wrong in each case.
    let forward = |w: usize, b: usize, y: [usize; 2], m: usize, r: usize| {
        let x = Array2::<f32>::zeros([2, 3]);
        refused(layer_norm::forward(
            x.view(),
            Array1::zeros(w).view(),
            Array1::zeros(b).view(),
            1e-5,
            Array2::zeros(y).view_mut(),
            Array1::zeros(m).view_mut(),
            Array1::zeros(r).view_mut(),
        ))
    };
    assert_eq!(forward(2, 3, [2, 3], 2, 2), "weight");
    assert_eq!(forward(3, 4, [2, 3], 2, 2), "bias");
    assert_eq!(forward(3, 3, [3, 2], 2, 2), "y");
    assert_eq!(forward(3, 3, [2, 3], 3, 2), "mean");
    assert_eq!(forward(3, 3, [2, 3], 2, 0), "rstd");
    let backward = |w, m, r, dy: [usize; 2], dx: [usize; 2], dw, db| {
        let x = Array2::<f32>::zeros([2, 3]);
        refused(layer_norm::backward(
            x.view(),
            Array1::zeros(w).view(),
            Array1::zeros(m).view(),
            Array1::zeros(r).view(),
            Array2::zeros(dy).view(),
            Array2::zeros(dx).view_mut(),
            Array1::zeros(dw).view_mut(),
            Array1::zeros(db).view_mut(),
        ))
    };
    assert_eq!(backward(2, 2, 2, [2, 3], [2, 3], 3, 3), "weight");
    assert_eq!(backward(3, 3, 2, [2, 3], [2, 3], 3, 3), "mean");
    assert_eq!(backward(3, 2, 3, [2, 3], [2, 3], 3, 3), "rstd");
    assert_eq!(backward(3, 2, 2, [2, 2], [2, 3], 3, 3), "dy");
    assert_eq!(backward(3, 2, 2, [2, 3], [1, 3], 3, 3), "dx");
    assert_eq!(backward(3, 2, 2, [2, 3], [2, 3], 2, 3), "dweight");
    assert_eq!(backward(3, 2, 2, [2, 3], [2, 3], 3, 2), "dbias");
}

#[test]
fn activations_have_their_textbook_values() {
    let x = arr2(&[[-2.0, -0.5, 0.0, 0.5, 2.0]]);
    let expected = |activation| match activation {
        Activation::Relu => arr2(&[[0.0, 0.0, 0.0, 0.5, 2.0]]),
        // x·Φ(x) with Φ(0.5) = 0.691462461274013, Φ(2) = 0.977249868051821
        Activation::Gelu => arr2(&[[
            -0.045_500_263_896_358,
            -0.154_268_769_362_993_5,
            0.0,
            0.345_731_230_637_006_5,
            1.954_499_736_103_642,
        ]]),
        Activation::Tanh => arr2(&[[
            -0.964_027_580_075_817,
            -0.462_117_157_260_010,
            0.0,
            0.462_117_157_260_010,
            0.964_027_580_075_817,
        ]]),
        // log 2 = 0.693147180559945 at zero
        Activation::OnePlus => arr2(&[[
            1.126_928_011_042_972_5,
            1.474_076_984_180_107,
            1.693_147_180_559_945_3,
            1.974_076_984_180_107,
            3.126_928_011_042_972_5,
        ]]),
    };
    for activation in ACTIVATIONS {
        let mut y = poisoned(x.raw_dim());
        activation::forward(activation, x.view(), y.view_mut()).expect("forward");
        assert_close(&format!("{activation:?}"), &y, &expected(activation), 1e-13);
    }
}

#[test]
fn activations_and_their_slopes_stay_finite_at_the_ends_of_the_range() {
    let x = arr2(&[[f32::MIN, -1e4, -89.0, -0.0, 89.0, 1e4, 1e38]]);
    for activation in ACTIVATIONS {
        let mut y = poisoned(x.raw_dim());
        activation::forward(activation, x.view(), y.view_mut()).expect("forward");
        let mut slope = Array2::ones(x.raw_dim());
        activation::backward_in_place(activation, x.view(), y.view(), slope.view_mut())
            .expect("backward");
        assert!(y.iter().all(|y| y.is_finite()), "{activation:?} {y}");
        assert!(
            slope.iter().all(|slope| (0.0..=1.0).contains(slope)),
            "{activation:?} {slope}"
        );
        let (low, high) = (y[[0, 1]], y[[0, 5]]);
        match activation {
            Activation::Relu | Activation::Gelu => assert_eq!((low, high), (0.0, 1e4)),
            Activation::Tanh => assert_eq!((low, high), (-1.0, 1.0)),
            Activation::OnePlus => assert_eq!((low, high), (1.0, 10001.0)),
        }
    }
}

#[test]
fn activations_pass_a_nan_on() {
    for activation in ACTIVATIONS {
        let mut y = Array2::zeros([1, 1]);
        activation::forward(activation, arr2(&[[f32::NAN]]).view(), y.view_mut()).expect("forward");
        assert!(y[[0, 0]].is_nan(), "{activation:?}");
    }
}

#[test]
fn activations_refuse_wrong_shapes_by_name() {
    let a = |rows, columns| Array2::<f32>::zeros([rows, columns]);
    for activation in ACTIVATIONS {
        let result = activation::forward(activation, a(2, 3).view(), a(3, 2).view_mut());
        assert_eq!(refused(result), "y");
        let backward = |y: Array2<f32>, mut dy: Array2<f32>| {
            let x = a(2, 3);
            refused(activation::backward_in_place(
                activation,
                x.view(),
                y.view(),
                dy.view_mut(),
            ))
        };
        assert_eq!(backward(a(1, 3), a(2, 3)), "y");
        assert_eq!(backward(a(2, 3), a(2, 1)), "dy");
    }
}

/// Losses of the rows by the definition, in f64.
fn negative_log_softmax(logits: &Array2<f64>, targets: &[i32]) -> f64 {
    let rows = logits.rows().into_iter().zip(targets);
    rows.map(|(row, &target)| {
        let total: f64 = row.iter().map(|l| l.exp()).sum();
        total.ln() - row[target as usize]
    })
    .sum()
}

#[test]
fn cross_entropy_of_huge_logits_is_finite_and_exact() {
    let logits = arr2(&[[1e30_f32, 0.0, -1e30], [500.0, 501.0, 0.0]]);
    let mut dlogits = poisoned(logits.raw_dim());
    let sums = cross_entropy::forward_backward(logits.view(), &[0, 0], 2.0, dlogits.view_mut())
        .expect("run");
    let loss = 1.0 + (-1.0_f64).exp().ln_1p();
    assert!((sums.loss - loss).abs() < 1e-6, "{}", sums.loss);
    assert_eq!(sums.correct, 1);
    let p = 1.0 / (1.0 + 1.0_f64.exp());
    let expected = arr2(&[[0.0, 0.0, 0.0], [2.0 * (p - 1.0), 2.0 * (1.0 - p), 0.0]]);
    assert_close("dlogits", &dlogits, &expected, 2e-5);
}

#[test]
fn only_the_first_of_equal_logits_counts_as_chosen_and_nan_never_does() {
    let correct = |logits: [f32; 3], target| {
        let mut dlogits = poisoned([1, 3]);
        let logits = arr2(&[logits]);
        cross_entropy::forward_backward(logits.view(), &[target], 1.0, dlogits.view_mut())
            .expect("run")
            .correct
    };
    assert_eq!(
        [0, 1, 2].map(|target| correct([1.0, 3.0, 3.0], target)),
        [0, 1, 0]
    );
    for target in 0..3 {
        assert_eq!(correct([f32::NAN; 3], target), 0);
        assert_eq!(correct([0.0, f32::NAN, 1.0], target), 0);
    }
}

#[test]
fn cross_entropy_refuses_a_target_that_is_no_class_and_names_the_row() {
    for wrong in [-1, 3, i32::MIN, i32::MAX] {
        let mut dlogits = Array2::from_elem([3, 3], 7.0);
        let result = cross_entropy::forward_backward(
            Array2::<f32>::zeros([3, 3]).view(),
            &[0, 2, wrong],
            1.0,
            dlogits.view_mut(),
        );
        let message = result.expect_err("should have been refused").to_string();
        assert!(
            message.contains("`targets`") && message.contains("row 2"),
            "{message}"
        );
        assert!(message.contains(&wrong.to_string()), "{message}");
        assert_eq!(
            dlogits,
            Array2::from_elem([3, 3], 7.0),
            "written before the check"
        );
    }
    let a = |rows, columns| Array2::<f32>::zeros([rows, columns]);
    let run = |targets: &[i32], mut dlogits: Array2<f32>| {
        let logits = a(2, 3);
        refused(cross_entropy::forward_backward(
            logits.view(),
            targets,
            1.0,
            dlogits.view_mut(),
        ))
    };
    assert_eq!(run(&[0], a(2, 3)), "targets");
    assert_eq!(run(&[0, 1], a(2, 2)), "dlogits");
    let result = cross_entropy::forward_backward(a(1, 0).view(), &[0], 1.0, a(1, 0).view_mut());
    assert_eq!(refused(result), "targets");
}

#[test]
fn cross_entropy_of_no_rows_is_zero() {
    let sums = cross_entropy::forward_backward(
        Array2::<f32>::zeros([0, 3]).view(),
        &[],
        1.0,
        Array2::zeros([0, 3]).view_mut(),
    );
    assert_eq!(sums, Ok(Sums::default()));
}

#[test]
fn philox_gives_the_published_known_answers() {
    let cases = [
        (
            [0; 4],
            [0; 2],
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
        ),
        (
            [0xffff_ffff; 4],
            [0xffff_ffff; 2],
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
        ),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    for (counter, key, expected) in cases {
        assert_eq!(dropout::philox(counter, key), expected);
    }
}

#[test]
fn dropout_compares_the_documented_word_of_the_documented_counter() {
    // The block of counters crosses from one high word to the next.
    let mask = Mask::new(0x0123_4567_89ab_cdef, 7, 3, 0.4).expect("a mask");
    let first = 4 * (0x5_ffff_ffff_u64 - 20);
    let mut x = vec![2.0_f64; 163];
    dropout::apply(mask, first, &mut x).expect("apply");
    for (element, x) in (first..).zip(x) {
        let (low, high) = ((element / 4) as u32, ((element / 4) >> 32) as u32);
        let words = dropout::philox([low, 7, 3, high], [0x89ab_cdef, 0x0123_4567]);
        let dropped = f64::from(words[(element % 4) as usize]) < 0.4 * 2.0_f64.powi(32);
        let expected = if dropped { 0.0 } else { 2.0 / 0.6 };
        assert!(
            (x - expected).abs() < 1e-8,
            "element {element}: {x}, expected {expected}"
        );
    }
}

#[test]
fn dropout_sets_its_share_to_zero_and_keeps_the_mean() {
    for p in [0.1, 0.5, 0.9] {
        let mut x = vec![1.0_f32; 100_000];
        dropout::apply(Mask::new(1, 2, 3, p).expect("a mask"), 0, &mut x).expect("apply");
        let zeros = x.iter().filter(|&&x| x == 0.0).count() as f64 / 1e5;
        assert!((zeros - p).abs() < 0.01, "{zeros} of {p}");
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / 1e5;
        assert!((mean - 1.0).abs() < 0.05, "{mean} at {p}");
    }
}

#[test]
fn dropout_of_nothing_changes_nothing() {
    let mut x = [1.0_f32, -0.0, f32::INFINITY, 1e-40];
    dropout::apply(Mask::new(1, 2, 3, 0.0).expect("a mask"), 0, &mut x).expect("apply");
    assert_eq!(
        x.map(f32::to_bits),
        [1.0, -0.0, f32::INFINITY, 1e-40].map(f32::to_bits)
    );
    dropout::apply(
        Mask::new(1, 2, 3, 0.5).expect("a mask"),
        0,
        &mut [0.0_f32; 0],
    )
    .expect("apply");
}

#[test]
fn dropout_refuses_a_share_of_one_and_a_start_inside_of_a_counter() {
    for p in [1.0, -0.1, 2.0, f64::NAN] {
        assert_eq!(refused(Mask::new(0, 0, 0, p)), "p");
    }
    let almost_all = Mask::new(0, 0, 0, 1.0 - 1e-15).expect("a mask");
    assert_eq!(almost_all.threshold, u32::MAX);
    assert_eq!(
        refused(dropout::apply(almost_all, 2, &mut [0.0_f32; 4])),
        "first"
    );
}

const HYPER: AdamW = AdamW {
    learning_rate: 0.01,
    beta1: 0.9,
    beta2: 0.99,
    epsilon: 1e-8,
    weight_decay: 0.1,
    gradient_scale: 0.5,
    step: 1,
};

/// Three steps of one parameter, written down from the equations: the parameter afterwards.
fn adamw_by_hand(mut p: f64, gradients: [f64; 3]) -> f64 {
    let mut history: Vec<f64> = Vec::new();
    for g in gradients {
        history.push(g * 0.5);
        // The bias-corrected moments are weighted means of all gradients so far.
        let mean = |decay: f64, power: i32| {
            let weight = |age: usize| decay.powi(age as i32);
            let total: f64 = (0..history.len()).map(weight).sum();
            let newest_first = history.iter().rev().enumerate();
            newest_first
                .map(|(age, g)| weight(age) * g.powi(power))
                .sum::<f64>()
                / total
        };
        p = p - 0.01 * 0.1 * p - 0.01 * mean(0.9, 1) / (mean(0.99, 2).sqrt() + 1e-8);
    }
    p
}

fn adamw_follows_its_equations<T: Scalar>(tolerance: f64) {
    let mut random = Random::new(11);
    let before: Array1<f64> = random.array([37]);
    let gradients: Array2<f64> = random.array([3, 37]);
    let mut p: Vec<T> = before.iter().map(|&p| T::from_f64(p)).collect();
    let (mut m, mut v) = (vec![T::zero(); 37], vec![T::zero(); 37]);
    for (step, gradient) in (1..).zip(gradients.rows()) {
        let gradient: Vec<T> = gradient.iter().map(|&g| T::from_f64(g)).collect();
        optimiser::adamw(&AdamW { step, ..HYPER }, &gradient, &mut p, &mut m, &mut v)
            .expect("step");
    }
    let expected = Array1::from_shape_fn(37, |i| {
        adamw_by_hand(
            before[i],
            [gradients[[0, i]], gradients[[1, i]], gradients[[2, i]]],
        )
    });
    assert_close("parameter", &Array1::from(p), &expected, tolerance);
}

#[test]
fn adamw_follows_its_equations_for_three_steps() {
    adamw_follows_its_equations::<f64>(1e-12);
    adamw_follows_its_equations::<f32>(1e-6);
}

#[test]
fn adam_without_decay_leaves_a_parameter_without_gradient_alone() {
    let hyper = AdamW {
        weight_decay: 0.0,
        step: 1_000_000_000_000,
        ..HYPER
    };
    let mut p = [3.0_f32];
    optimiser::adamw(&hyper, &[0.0], &mut p, &mut [0.0], &mut [0.0]).expect("step");
    assert_eq!(p, [3.0]);
}

#[test]
fn adamw_refuses_arguments_that_make_no_step() {
    let run = |hyper: AdamW, lengths: [usize; 4]| {
        let [g, mut p, mut m, mut v] = lengths.map(|length| vec![0.0_f32; length]);
        refused(optimiser::adamw(&hyper, &g, &mut p, &mut m, &mut v))
    };
    assert_eq!(run(HYPER, [1, 2, 2, 2]), "gradient");
    assert_eq!(run(HYPER, [2, 2, 3, 2]), "first_moment");
    assert_eq!(run(HYPER, [2, 2, 2, 0]), "second_moment");
    assert_eq!(run(AdamW { step: 0, ..HYPER }, [2; 4]), "step");
    for beta in [1.0, -0.1, f64::NAN] {
        assert_eq!(
            run(
                AdamW {
                    beta1: beta,
                    ..HYPER
                },
                [2; 4]
            ),
            "beta1"
        );
        assert_eq!(
            run(
                AdamW {
                    beta2: beta,
                    ..HYPER
                },
                [2; 4]
            ),
            "beta2"
        );
    }
}

#[test]
fn clipping_scales_down_to_the_largest_norm_and_never_up() {
    assert_eq!(optimiser::clip_scale(4.0, 1.0), 0.25);
    assert_eq!(optimiser::clip_scale(0.5, 1.0), 1.0);
    assert_eq!(optimiser::clip_scale(0.0, 1.0), 1.0);
    assert_eq!(optimiser::clip_scale(0.0, 0.0), 1.0);
    assert!(optimiser::clip_scale(f64::NAN, 1.0).is_nan());
    assert!(optimiser::clip_scale(f64::INFINITY, 1.0).is_nan());
}

#[test]
fn squares_are_summed_beyond_the_precision_and_the_range_of_f32() {
    let mut gradient = vec![1e-4_f32; 1_000_003];
    gradient[500_000] = 1e25;
    let sum = optimiser::sum_of_squares(&gradient);
    assert!((sum / f64::from(1e25_f32).powi(2) - 1.0).abs() < 1e-12);
    gradient[500_000] = 1.0;
    let expected = 1.0 + 1_000_002.0 * f64::from(1e-4_f32).powi(2);
    assert!((optimiser::sum_of_squares(&gradient) / expected - 1.0).abs() < 1e-12);
    gradient[7] = f32::NAN;
    assert!(optimiser::sum_of_squares(&gradient).is_nan());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn layer_norm_gradients_are_the_finite_differences(
        seed: u64, rows in 0_usize..4, width in 0_usize..40,
    ) {
        let mut random = Random::new(seed);
        let x: Array2<f64> = random.array([rows, width]);
        let weight: Array1<f64> = random.array([width]);
        let bias: Array1<f64> = random.array([width]);
        let dy: Array2<f64> = random.array([rows, width]);
        let loss = |x: &Array2<f64>, weight: &Array1<f64>, bias: &Array1<f64>| {
            (normalise(x, weight, bias, 0.1).y * &dy).sum()
        };
        let kept = normalise(&x, &weight, &bias, 0.1);
        let mut dx = poisoned(x.raw_dim());
        let (old_weight, old_bias): (Array1<f64>, Array1<f64>) =
            (random.array([width]), random.array([width]));
        let (mut dweight, mut dbias) = (old_weight.clone(), old_bias.clone());
        layer_norm::backward(
            x.view(), weight.view(), kept.mean.view(), kept.rstd.view(), dy.view(),
            dx.view_mut(), dweight.view_mut(), dbias.view_mut(),
        )?;
        let expected = finite_difference(&x, |x| loss(x, &weight, &bias));
        assert_slope("dx", &dx, &expected);
        let expected = old_weight + finite_difference(&weight, |weight| loss(&x, weight, &bias));
        assert_slope("dweight", &dweight, &expected);
        let expected = old_bias + finite_difference(&bias, |bias| loss(&x, &weight, bias));
        assert_slope("dbias", &dbias, &expected);
    }

    #[test]
    fn layer_norm_of_strided_rows_gives_the_same_bits(
        seed: u64, rows in 0_usize..4, width in 0_usize..70,
    ) {
        let mut random = Random::new(seed);
        let (weight, bias) = (random.array([width]), random.array([width]));
        let x: Array2<f32> = random.array([rows, width]);
        let expected = normalise(&x, &weight, &bias, 1e-5).y;
        let transposed = x.t().as_standard_layout().into_owned().reversed_axes();
        prop_assert_eq!(normalise(&transposed, &weight, &bias, 1e-5).y, expected);
    }

    #[test]
    fn activation_gradients_are_the_finite_differences(
        seed: u64, rows in 0_usize..4, width in 0_usize..20,
    ) {
        let mut random = Random::new(seed);
        let x: Array2<f64> = random.array([rows, width]) * 3.0;
        // A difference quotient across ReLU's kink is no slope.
        let x = x.mapv(|x| if x.abs() < 1e-3 { 1.0 } else { x });
        let dy: Array2<f64> = random.array([rows, width]);
        for activation in ACTIVATIONS {
            let run = |x: &Array2<f64>| {
                let mut y = poisoned(x.raw_dim());
                activation::forward(activation, x.view(), y.view_mut()).expect("forward");
                y
            };
            let expected = finite_difference(&x, |x| (run(x) * &dy).sum());
            let y = run(&x);
            let mut dx = dy.clone();
            activation::backward_in_place(activation, x.view(), y.view(), dx.view_mut())?;
            assert_slope(&format!("{activation:?}"), &dx, &expected);
            // Whoever kept only the array that is read may pass it twice.
            let read = match activation {
                Activation::Relu | Activation::Tanh => &y,
                Activation::Gelu | Activation::OnePlus => &x,
            };
            let mut again = dy.clone();
            activation::backward_in_place(activation, read.view(), read.view(), again.view_mut())?;
            prop_assert_eq!(&again, &dx);
        }
    }

    #[test]
    fn activations_of_a_range_of_columns_touch_nothing_else(seed: u64, rows in 0_usize..4) {
        let mut random = Random::new(seed);
        let x: Array2<f32> = random.array([rows, 21]);
        let columns = Slice::from(5..18);
        for activation in ACTIVATIONS {
            let (mut whole, mut part) = (poisoned(x.raw_dim()), x.clone());
            activation::forward(activation, x.view(), whole.view_mut())?;
            activation::forward(
                activation,
                x.slice_axis(Axis(1), columns),
                part.slice_axis_mut(Axis(1), columns),
            )?;
            let mut expected = x.clone();
            expected.slice_axis_mut(Axis(1), columns).assign(&whole.slice_axis(Axis(1), columns));
            prop_assert_eq!(part, expected);
        }
    }

    #[test]
    fn dropout_is_the_same_however_it_is_split(
        seed: u64, step: u32, site: u32, first in 0_u64..1 << 40, length in 0_usize..600, cut in 0.0..1.0,
    ) {
        let mask = Mask::new(seed, step, site, 0.3)?;
        let x: Array1<f32> = Random::new(seed).array([length]);
        let (mut whole, mut parts) = (x.to_vec(), x.to_vec());
        dropout::apply(mask, 4 * first, &mut whole)?;
        let cut = (length as f64 * cut) as usize / 4 * 4;
        let (head, tail) = parts.split_at_mut(cut);
        dropout::apply(mask, 4 * first, head)?;
        dropout::apply(mask, 4 * first + cut as u64, tail)?;
        prop_assert_eq!(whole, parts);
    }

    #[test]
    fn cross_entropy_and_its_gradient_follow_the_definition(
        seed: u64, rows in 0_usize..6, classes in 1_usize..20,
    ) {
        let mut random = Random::new(seed);
        let logits: Array2<f64> = random.array([rows, classes]) * 3.0;
        let targets: Vec<i32> = (0..rows).map(|_| random.below(classes) as i32).collect();
        let mut dlogits = poisoned(logits.raw_dim());
        let sums =
            cross_entropy::forward_backward(logits.view(), &targets, 0.3, dlogits.view_mut())?;
        let expected = negative_log_softmax(&logits, &targets);
        prop_assert!((sums.loss - expected).abs() <= 1e-12 * expected.max(1.0));
        let expected = finite_difference(&logits, |logits| {
            0.3 * negative_log_softmax(logits, &targets)
        });
        assert_slope("dlogits", &dlogits, &expected);
        let correct = logits.rows().into_iter().zip(&targets).filter(|(row, target)| {
            row.iter().all(|&l| l <= row[**target as usize])
        });
        prop_assert_eq!(sums.correct, correct.count());
    }
}
