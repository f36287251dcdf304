//! What turns codes into features: one-hot maps and convolutions.

mod common;

use common::{Random, assert_close, assert_slope, cast, finite_difference, poisoned};
use dtmem_reference::convolution::{self, Grid};
use dtmem_reference::{Error, Scalar, one_hot};
use ndarray::{Array1, Array2, Array4, Axis, Slice, arr2};
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

/// A 3×3 convolution with padding 1 by its definition. `x` [rows, in, vx, vy]; `weight`
/// [out, in, kx, ky]; the result is [rows, out, vx, vy].
fn naive_convolution(x: &Array4<f64>, weight: &Array4<f64>, bias: &Array1<f64>) -> Array4<f64> {
    let (rows, channels, width, height) = x.dim();
    Array4::from_shape_fn([rows, bias.len(), width, height], |(row, out, vx, vy)| {
        let mut sum = bias[out];
        for channel in 0..channels {
            for kx in 0..3 {
                for ky in 0..3 {
                    let (from_x, from_y) =
                        (vx as isize + kx as isize - 1, vy as isize + ky as isize - 1);
                    let inside = (0..width as isize).contains(&from_x)
                        && (0..height as isize).contains(&from_y);
                    if inside {
                        sum += weight[[out, channel, kx, ky]]
                            * x[[row, channel, from_x as usize, from_y as usize]];
                    }
                }
            }
        }
        sum
    })
}

fn grid(width: usize, height: usize, cardinalities: &[usize]) -> Grid {
    Grid {
        width,
        height,
        cardinalities: cardinalities.to_vec(),
    }
}

/// Random codes of a grid [rows, positions·fields].
fn random_cells(random: &mut Random, rows: usize, grid: &Grid) -> Array2<u8> {
    let fields = grid.cardinalities.len();
    Array2::from_shape_fn([rows, grid.positions() * fields], |(_, input)| {
        random.below(grid.cardinalities[input % fields]) as u8
    })
}

/// The cells as zeros and ones [rows, channels, vx, vy].
fn one_hot_cells(grid: &Grid, codes: &Array2<u8>) -> Array4<f64> {
    let fields = grid.cardinalities.len();
    let mut x = Array4::zeros([codes.nrows(), grid.channels(), grid.width, grid.height]);
    for ((row, input), &code) in codes.indexed_iter() {
        let (position, field) = (input / fields, input % fields);
        let before: usize = grid.cardinalities[..field].iter().sum();
        let (vx, vy) = (position / grid.height, position % grid.height);
        x[[row, before + usize::from(code), vx, vy]] = 1.0;
    }
    x
}

/// Rows of feature maps as one flat row each, and back.
fn flat(x: &Array4<f64>) -> Array2<f64> {
    let (rows, channels, width, height) = x.dim();
    let x = x.as_standard_layout().into_owned();
    x.into_shape_with_order([rows, channels * width * height])
        .expect("the same size")
}

fn maps(x: &Array2<f64>, channels: usize, grid: &Grid) -> Array4<f64> {
    let shape = [x.nrows(), channels, grid.width, grid.height];
    let x = x.as_standard_layout().into_owned();
    x.into_shape_with_order(shape).expect("the same size")
}

/// A scratch vector with something of an earlier call in it.
fn used_scratch<T: Scalar>() -> Vec<T> {
    vec![T::nan(); 50]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn one_hot_convolution_and_its_gradients_are_those_of_the_dense_one(
        seed: u64, rows in 0_usize..3, width in 0_usize..5, height in 0_usize..5,
        out in 0_usize..4, cardinalities in prop::collection::vec(1_usize..5, 0..4),
    ) {
        let mut random = Random::new(seed);
        let grid = grid(width, height, &cardinalities);
        let codes = random_cells(&mut random, rows, &grid);
        let channels = grid.channels();
        let weight: Array2<f64> = random.array([channels * 9, out]);
        let bias: Array1<f64> = random.array([out]);
        let x = one_hot_cells(&grid, &codes);
        let dense = |weight: &Array2<f64>, bias: &Array1<f64>| {
            let weight = Array4::from_shape_fn([out, channels, 3, 3], |(out, channel, kx, ky)| {
                weight[[(channel * 3 + kx) * 3 + ky, out]]
            });
            flat(&naive_convolution(&x, &weight, bias))
        };
        let expected = dense(&weight, &bias);
        let mut scratch = used_scratch();
        let mut y = poisoned(expected.raw_dim());
        convolution::one_hot_forward(
            &grid, codes.view(), weight.view(), bias.view(), y.view_mut(), &mut scratch,
        )?;
        assert_close("y", &y, &expected, 1e-12);

        let dy: Array2<f64> = random.array(expected.raw_dim());
        let old: Array2<f64> = random.array(weight.raw_dim());
        let old_bias: Array1<f64> = random.array([out]);
        let (mut dweight, mut dbias) = (old.clone(), old_bias.clone());
        scratch.fill(f64::NAN);
        convolution::one_hot_backward(
            &grid, codes.view(), dy.view(), dweight.view_mut(), dbias.view_mut(), &mut scratch,
        )?;
        let slope = finite_difference(&weight, |weight| (dense(weight, &bias) * &dy).sum());
        assert_slope("dweight", &dweight, &(old + slope));
        let slope = finite_difference(&bias, |bias| (dense(&weight, bias) * &dy).sum());
        assert_slope("dbias", &dbias, &(old_bias + slope));
    }

    #[test]
    fn convolution_and_its_gradients_follow_the_definition(
        seed: u64, rows in 0_usize..3, width in 0_usize..5, height in 0_usize..5,
        channels in 0_usize..4, out in 0_usize..4,
    ) {
        let mut random = Random::new(seed);
        let grid = grid(width, height, &[]);
        let x: Array2<f64> = random.array([rows, channels * width * height]);
        let weight: Array2<f64> = random.array([out, channels * 9]);
        let bias: Array1<f64> = random.array([out]);
        let naive = |x: &Array2<f64>, weight: &Array2<f64>, bias: &Array1<f64>| {
            let kernel = weight.to_shape([out, channels, 3, 3]).expect("the same size");
            flat(&naive_convolution(&maps(x, channels, &grid), &kernel.into_owned(), bias))
        };
        let expected = naive(&x, &weight, &bias);
        let mut scratch = used_scratch();
        let mut y = poisoned(expected.raw_dim());
        convolution::forward(
            &grid, x.view(), weight.view(), bias.view(), y.view_mut(), &mut scratch,
        )?;
        assert_close("y", &y, &expected, 1e-12);

        let dy: Array2<f64> = random.array(expected.raw_dim());
        let old: Array2<f64> = random.array(weight.raw_dim());
        let old_bias: Array1<f64> = random.array([out]);
        let (mut dweight, mut dbias) = (old.clone(), old_bias.clone());
        let mut dx = poisoned(x.raw_dim());
        scratch.fill(f64::NAN);
        convolution::backward(
            &grid, x.view(), weight.view(), dy.view(), dx.view_mut(), dweight.view_mut(),
            dbias.view_mut(), &mut scratch,
        )?;
        let slope = finite_difference(&x, |x| (naive(x, &weight, &bias) * &dy).sum());
        assert_slope("dx", &dx, &slope);
        let slope = finite_difference(&weight, |weight| (naive(&x, weight, &bias) * &dy).sum());
        assert_slope("dweight", &dweight, &(old + slope));
        let slope = finite_difference(&bias, |bias| (naive(&x, &weight, bias) * &dy).sum());
        assert_slope("dbias", &dbias, &(old_bias + slope));
    }
}

#[test]
fn the_front_end_of_ltmb_agrees_with_the_definition_in_f32() {
    let mut random = Random::new(8);
    let grid = grid(7, 7, &[11, 6, 3]);
    let codes = random_cells(&mut random, 3, &grid);
    let (weight, bias): (Array2<f32>, Array1<f32>) = (random.array([180, 40]), random.array([40]));
    let mut scratch = used_scratch();
    let mut middle: Array2<f32> = poisoned([3, 40 * 49]);
    convolution::one_hot_forward(
        &grid,
        codes.view(),
        weight.view(),
        bias.view(),
        middle.view_mut(),
        &mut scratch,
    )
    .expect("first");
    let kernel = Array4::from_shape_fn([40, 20, 3, 3], |(out, channel, kx, ky)| {
        f64::from(weight[[(channel * 3 + kx) * 3 + ky, out]])
    });
    let expected = naive_convolution(&one_hot_cells(&grid, &codes), &kernel, &cast(&bias));
    assert_close("first", &middle, &flat(&expected), 2e-5);

    let (weight, bias): (Array2<f32>, Array1<f32>) = (random.array([80, 360]), random.array([80]));
    let mut y: Array2<f32> = poisoned([3, 80 * 49]);
    convolution::forward(
        &grid,
        middle.view(),
        weight.view(),
        bias.view(),
        y.view_mut(),
        &mut scratch,
    )
    .expect("second");
    let kernel: Array2<f64> = cast(&weight);
    let kernel = kernel
        .into_shape_with_order([80, 40, 3, 3])
        .expect("the same size");
    let expected = naive_convolution(&maps(&cast(&middle), 40, &grid), &kernel, &cast(&bias));
    assert_close("second", &y, &flat(&expected), 2e-5);
}

#[test]
fn one_hot_convolution_refuses_a_code_beyond_its_field_and_says_where() {
    let grid = grid(2, 2, &[3, 2]);
    let mut codes = Array2::<u8>::zeros([2, 8]);
    let (mut weight, mut bias) = (Array2::<f32>::zeros([45, 4]), Array1::zeros(4));
    let mut y = Array2::zeros([2, 16]);
    let mut both = |codes: &Array2<u8>| {
        let mut scratch = Vec::new();
        let forward = convolution::one_hot_forward(
            &grid,
            codes.view(),
            weight.view(),
            bias.view(),
            y.view_mut(),
            &mut scratch,
        );
        let backward = convolution::one_hot_backward(
            &grid,
            codes.view(),
            y.view(),
            weight.view_mut(),
            bias.view_mut(),
            &mut scratch,
        );
        assert_eq!(forward, backward);
        forward
    };
    assert_eq!(both(&codes), Ok(()));
    codes[[1, 5]] = 2; // a third value of the second field
    let (argument, message) = refused(both(&codes));
    assert_eq!(argument, "codes");
    assert!(
        message.contains("2 at row 1, position 2, field 1"),
        "{message}"
    );
    assert!(message.contains("less than 2"), "{message}");
}

#[test]
fn convolutions_refuse_wrong_shapes_by_name() {
    let grid = grid(2, 3, &[4]);
    let a = |shape: [usize; 2]| Array2::<f32>::zeros(shape);
    let one_hot = |codes: [usize; 2], weight: [usize; 2], bias: usize, y: [usize; 2]| {
        let (codes, mut weight, mut y) = (Array2::zeros(codes), a(weight), a(y));
        let mut bias = Array1::zeros(bias);
        let forward = convolution::one_hot_forward(
            &grid,
            codes.view(),
            weight.view(),
            bias.view(),
            y.view_mut(),
            &mut Vec::new(),
        );
        let backward = convolution::one_hot_backward(
            &grid,
            codes.view(),
            y.view(),
            weight.view_mut(),
            bias.view_mut(),
            &mut Vec::new(),
        );
        (refused(forward).0, refused(backward).0)
    };
    assert_eq!(one_hot([2, 5], [36, 5], 5, [2, 30]), ("codes", "codes"));
    assert_eq!(one_hot([2, 6], [35, 5], 5, [2, 30]), ("weight", "weight"));
    assert_eq!(one_hot([2, 6], [36, 5], 4, [2, 30]), ("bias", "dbias"));
    assert_eq!(one_hot([2, 6], [36, 5], 5, [2, 25]), ("y", "dy"));

    // Right: two rows of three channels to five.
    let dense = |x: [usize; 2], weight: [usize; 2], bias: usize, y: [usize; 2]| {
        let (x, weight, mut y) = (a(x), a(weight), a(y));
        let mut bias = Array1::zeros(bias);
        let forward = convolution::forward(
            &grid,
            x.view(),
            weight.view(),
            bias.view(),
            y.view_mut(),
            &mut Vec::new(),
        );
        let (mut dx, mut dweight) = (x.clone(), weight.clone());
        let backward = convolution::backward(
            &grid,
            x.view(),
            weight.view(),
            y.view(),
            dx.view_mut(),
            dweight.view_mut(),
            bias.view_mut(),
            &mut Vec::new(),
        );
        (refused(forward).0, refused(backward).0)
    };
    assert_eq!(dense([2, 18], [5, 26], 5, [2, 30]), ("weight", "weight"));
    assert_eq!(dense([2, 12], [5, 27], 5, [2, 30]), ("x", "x"));
    assert_eq!(dense([2, 18], [5, 27], 4, [2, 30]), ("bias", "dbias"));
    assert_eq!(dense([2, 18], [5, 27], 5, [1, 30]), ("y", "dy"));
    let gradients = |dx: [usize; 2], dweight: [usize; 2]| {
        refused(convolution::backward(
            &grid,
            a([2, 18]).view(),
            a([5, 27]).view(),
            a([2, 30]).view(),
            a(dx).view_mut(),
            a(dweight).view_mut(),
            Array1::zeros(5).view_mut(),
            &mut Vec::new(),
        ))
        .0
    };
    assert_eq!(gradients([2, 12], [5, 27]), "dx");
    assert_eq!(gradients([2, 18], [4, 27]), "dweight");

    // Rows with gaps are refused, not misread.
    let (x, weight, bias) = (a([18, 2]), a([5, 27]), Array1::zeros(5));
    let result = convolution::forward(
        &grid,
        x.t(),
        weight.view(),
        bias.view(),
        a([2, 30]).view_mut(),
        &mut Vec::new(),
    );
    assert_eq!(refused(result).0, "x");
}

#[test]
fn a_grid_too_large_for_memory_is_refused() {
    let grid = grid(usize::MAX, 2, &[usize::MAX, 1]);
    let result = convolution::one_hot_forward(
        &grid,
        Array2::zeros([1, 6]).view(),
        Array2::<f32>::zeros([9, 2]).view(),
        Array1::zeros(2).view(),
        Array2::zeros([1, 4]).view_mut(),
        &mut Vec::new(),
    );
    assert_eq!(refused(result).0, "codes");
}
