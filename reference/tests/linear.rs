//! Linear maps and their low-rank adapters.

mod common;

use common::{Random, assert_close, cast, finite_difference, poisoned};
use dtmem_reference::{Error, Scalar, linear};
use ndarray::{Array1, Array2, ArrayView2, Axis, Slice};
use proptest::prelude::*;

/// x·weightᵀ by its definition, in f64.
fn product<T: Scalar>(x: ArrayView2<T>, weight: ArrayView2<T>) -> Array2<f64> {
    Array2::from_shape_fn((x.nrows(), weight.nrows()), |(r, o)| {
        let terms = x.row(r).into_iter().zip(weight.row(o));
        terms.map(|(&x, &w)| x.to_f64() * w.to_f64()).sum()
    })
}

/// The name of the argument that an operation refused.
fn refused<R: std::fmt::Debug>(result: Result<R, Error>) -> &'static str {
    match result.expect_err("should have been refused") {
        Error::Shape { argument, .. } | Error::Value { argument, .. } => argument,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn forward_is_the_definition_for_every_beta_and_layout(
        seed: u64, rows in 0_usize..40, inputs in 0_usize..40, outputs in 0_usize..40,
        transposed: bool, with_bias: bool,
    ) {
        let mut random = Random::new(seed);
        let wide: Array2<f32> = random.array([rows, inputs + 3]);
        let x = wide.slice_axis(Axis(1), Slice::from(2..inputs + 2));
        let stored: Array2<f32> = random.array(if transposed { [inputs, outputs] } else { [outputs, inputs] });
        let weight = if transposed { stored.t() } else { stored.view() };
        let bias: Array1<f32> = random.array([outputs]);
        let bias = with_bias.then_some(bias.view());
        let old: Array2<f32> = random.array([rows, outputs + 1]);
        for beta in [0.0_f32, 1.0, -0.5] {
            let mut wide = if beta == 0.0 { poisoned([rows, outputs + 1]) } else { old.clone() };
            let mut y = wide.slice_axis_mut(Axis(1), Slice::from(1..));
            linear::forward(x, weight, bias, beta, y.view_mut())?;
            let mut expected = product(x, weight);
            if let Some(bias) = bias {
                expected += &cast::<_, f64, _>(&bias.to_owned());
            }
            if beta != 0.0 {
                let old = cast::<_, f64, _>(&old) * f64::from(beta);
                expected += &old.slice_axis(Axis(1), Slice::from(1..));
            }
            assert_close("y", &y, &expected, 2e-5);
        }
    }

    #[test]
    fn rows_and_columns_computed_apart_are_the_bits_of_the_whole(
        seed: u64, rows in 1_usize..70, inputs in 1_usize..300, outputs in 1_usize..70,
        split in 0.0..1.0,
    ) {
        let mut random = Random::new(seed);
        let x: Array2<f32> = random.array([rows, inputs]);
        let weight: Array2<f32> = random.array([outputs, inputs]);
        let bias: Array1<f32> = random.array([outputs]);
        let whole = {
            let mut y = poisoned([rows, outputs]);
            linear::forward(x.view(), weight.view(), Some(bias.view()), 0.0, y.view_mut())?;
            y
        };
        let mut parts: Array2<f32> = poisoned([rows, outputs]);
        let (r, o) = ((rows as f64 * split) as usize, (outputs as f64 * split) as usize);
        for rows in [Slice::from(..r), Slice::from(r..)] {
            for outputs in [Slice::from(..o), Slice::from(o..)] {
                let mut y = parts.slice_axis_mut(Axis(0), rows);
                linear::forward(
                    x.slice_axis(Axis(0), rows),
                    weight.slice_axis(Axis(0), outputs),
                    Some(bias.slice_axis(Axis(0), outputs)),
                    0.0,
                    y.slice_axis_mut(Axis(1), outputs),
                )?;
            }
        }
        prop_assert_eq!(whole, parts);
    }

    #[test]
    fn gradients_are_the_finite_differences(
        seed: u64, rows in 0_usize..6, inputs in 0_usize..6, outputs in 0_usize..6,
    ) {
        let mut random = Random::new(seed);
        let x: Array2<f64> = random.array([rows, inputs]);
        let weight: Array2<f64> = random.array([outputs, inputs]);
        let bias: Array1<f64> = random.array([outputs]);
        let dy: Array2<f64> = random.array([rows, outputs]);
        let loss = |x: &Array2<f64>, weight: &Array2<f64>, bias: &Array1<f64>| {
            let mut y = poisoned([rows, outputs]);
            linear::forward(x.view(), weight.view(), Some(bias.view()), 0.0, y.view_mut())
                .expect("forward");
            (&y * &dy).sum()
        };

        let mut dx = poisoned([rows, inputs]);
        linear::backward_input(dy.view(), weight.view(), 0.0, dx.view_mut())?;
        let expected = finite_difference(&x, |x| loss(x, &weight, &bias));
        assert_close("dx", &dx, &expected, 1e-8);
        linear::backward_input(dy.view(), weight.view(), 2.0, dx.view_mut())?;
        assert_close("dx on top of itself twice", &dx, &(&expected * 3.0), 1e-8);

        let old: Array2<f64> = random.array([outputs, inputs]);
        let mut dweight = old.clone();
        linear::backward_weight(dy.view(), x.view(), dweight.view_mut())?;
        let expected = finite_difference(&weight, |weight| loss(&x, weight, &bias));
        assert_close("dweight", &dweight, &(old + expected), 1e-8);

        let old: Array1<f64> = random.array([outputs]);
        let mut dbias = old.clone();
        linear::backward_bias(dy.view(), dbias.view_mut())?;
        let expected = finite_difference(&bias, |bias| loss(&x, &weight, bias));
        assert_close("dbias", &dbias, &(old + expected), 1e-8);
    }
}

#[test]
fn wrong_shapes_are_refused_by_name() {
    let a = |rows, columns| Array2::<f32>::zeros([rows, columns]);
    let forward = |weight: Array2<f32>, bias: usize, mut y: Array2<f32>| {
        let bias = Array1::zeros(bias);
        let x = a(2, 3);
        let result = linear::forward(
            x.view(),
            weight.view(),
            Some(bias.view()),
            0.0,
            y.view_mut(),
        );
        refused(result)
    };
    assert_eq!(forward(a(4, 5), 4, a(2, 4)), "weight");
    assert_eq!(forward(a(4, 3), 3, a(2, 4)), "bias");
    assert_eq!(forward(a(4, 3), 4, a(2, 3)), "y");
    let dy = a(2, 4);
    let input = |weight: Array2<f32>, mut dx: Array2<f32>| {
        refused(linear::backward_input(
            dy.view(),
            weight.view(),
            0.0,
            dx.view_mut(),
        ))
    };
    assert_eq!(input(a(3, 4), a(2, 4)), "weight");
    assert_eq!(input(a(4, 3), a(2, 4)), "dx");
    let weight = |x: Array2<f32>, mut dweight: Array2<f32>| {
        refused(linear::backward_weight(
            dy.view(),
            x.view(),
            dweight.view_mut(),
        ))
    };
    assert_eq!(weight(a(3, 3), a(4, 3)), "x");
    assert_eq!(weight(a(2, 3), a(3, 4)), "dweight");
    let mut dbias = Array1::zeros(3);
    assert_eq!(
        refused(linear::backward_bias(dy.view(), dbias.view_mut())),
        "dbias"
    );
}
