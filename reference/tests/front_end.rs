//! What turns codes into features: one-hot maps and convolutions.

mod common;

use common::{Random, assert_close, poisoned};
use dtmem_reference::{Error, one_hot};
use ndarray::{Array1, Array2, Axis, Slice, arr2};
use proptest::prelude::*;

/// The argument that an operation refused, and its message.
fn refused<R: std::fmt::Debug>(result: Result<R, Error>) -> (&'static str, String) {
    let error = result.expect_err("should have been refused");
    let message = error.to_string();
    match error {
        Error::Shape { argument, .. } | Error::Value { argument, .. } => (argument, message),
    }
}

/// Fields of `cardinalities` values each, some rows of random codes.
struct Codes {
    codes: Array2<u8>,
    offsets: Vec<usize>,
    inputs: usize,
}

impl Codes {
    fn random(random: &mut Random, rows: usize, cardinalities: &[usize]) -> Self {
        let starts = cardinalities.iter().scan(0, |start, &cardinality| {
            *start += cardinality;
            Some(*start - cardinality)
        });
        Self {
            codes: Array2::from_shape_fn([rows, cardinalities.len()], |(_, field)| {
                random.below(cardinalities[field]) as u8
            }),
            offsets: starts.collect(),
            inputs: cardinalities.iter().sum(),
        }
    }

    /// The same as zeros and ones [rows, inputs].
    fn one_hot(&self) -> Array2<f64> {
        let mut x = Array2::zeros([self.codes.nrows(), self.inputs]);
        for ((row, field), &code) in self.codes.indexed_iter() {
            x[[row, self.offsets[field] + usize::from(code)]] = 1.0;
        }
        x
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn one_hot_map_is_the_matrix_product_and_its_gradients(
        seed: u64, rows in 0_usize..6, width in 0_usize..20, with_bias: bool,
        cardinalities in prop::collection::vec(1_usize..8, 0..9),
    ) {
        let mut random = Random::new(seed);
        let input = Codes::random(&mut random, rows, &cardinalities);
        let weight: Array2<f64> = random.array([input.inputs, width]);
        let bias: Array1<f64> = random.array([width]);
        let bias = with_bias.then_some(bias.view());
        let mut y = poisoned([rows, width]);
        one_hot::forward(input.codes.view(), &input.offsets, weight.view(), bias, y.view_mut())?;
        let mut expected = input.one_hot().dot(&weight);
        if let Some(bias) = bias {
            expected += &bias;
        }
        assert_close("y", &y, &expected, 1e-12);

        let dy: Array2<f64> = random.array([rows, width]);
        let old: Array2<f64> = random.array([input.inputs, width]);
        let old_bias: Array1<f64> = random.array([width]);
        let (mut dweight, mut dbias) = (old.clone(), old_bias.clone());
        // In two ranges of columns, as threads would.
        for columns in [Slice::from(..width / 3), Slice::from(width / 3..)] {
            let dbias = dbias.slice_axis_mut(Axis(0), columns);
            one_hot::backward(
                input.codes.view(),
                &input.offsets,
                dy.slice_axis(Axis(1), columns),
                dweight.slice_axis_mut(Axis(1), columns),
                with_bias.then_some(dbias),
            )?;
        }
        assert_close("dweight", &dweight, &(old + input.one_hot().t().dot(&dy)), 1e-12);
        let added = if with_bias { dy.sum_axis(Axis(0)) } else { Array1::zeros(width) };
        assert_close("dbias", &dbias, &(old_bias + added), 1e-12);
    }
}

#[test]
fn one_hot_map_refuses_a_code_beyond_its_field() {
    let run = |codes: [[u8; 2]; 2], offsets: &[usize]| {
        let (weight, mut y) = (Array2::<f32>::zeros([5, 3]), Array2::zeros([2, 3]));
        let forward = one_hot::forward(
            arr2(&codes).view(),
            offsets,
            weight.view(),
            None,
            y.view_mut(),
        );
        let (dy, mut dweight) = (y, weight);
        let backward = one_hot::backward(
            arr2(&codes).view(),
            offsets,
            dy.view(),
            dweight.view_mut(),
            None,
        );
        assert_eq!(forward, backward);
        forward
    };
    assert_eq!(run([[1, 2], [0, 0]], &[0, 2]), Ok(()));
    // Of the next field, and beyond the weight.
    let (argument, message) = refused(run([[1, 2], [2, 0]], &[0, 2]));
    assert_eq!(argument, "codes");
    assert!(message.contains("2 at row 1, field 0"), "{message}");
    assert!(message.contains("less than 2"), "{message}");
    let (argument, message) = refused(run([[1, 3], [0, 0]], &[0, 2]));
    assert_eq!(argument, "codes");
    assert!(message.contains("3 at row 0, field 1"), "{message}");
    for offsets in [[0, 0], [2, 0], [0, 5], [0, usize::MAX], [usize::MAX, 1]] {
        assert_eq!(refused(run([[0, 0], [0, 0]], &offsets)).0, "offsets");
    }
    assert_eq!(refused(run([[0, 0], [0, 0]], &[0])).0, "offsets");
}

#[test]
fn one_hot_map_refuses_wrong_shapes_by_name() {
    let codes = Array2::<u8>::zeros([2, 1]);
    let weight = Array2::<f32>::zeros([4, 3]);
    let forward = |bias: usize, y: [usize; 2]| {
        let bias = Array1::zeros(bias);
        let mut y = Array2::zeros(y);
        refused(one_hot::forward(
            codes.view(),
            &[0],
            weight.view(),
            Some(bias.view()),
            y.view_mut(),
        ))
    };
    assert_eq!(forward(2, [2, 3]).0, "bias");
    assert_eq!(forward(3, [1, 3]).0, "y");
    let backward = |dy: [usize; 2], dbias: usize| {
        let (mut dweight, mut dbias) = (weight.clone(), Array1::zeros(dbias));
        let dy = Array2::zeros(dy);
        let result = one_hot::backward(
            codes.view(),
            &[0],
            dy.view(),
            dweight.view_mut(),
            Some(dbias.view_mut()),
        );
        refused(result)
    };
    assert_eq!(backward([2, 4], 3).0, "dy");
    assert_eq!(backward([2, 3], 4).0, "dbias");
}
