//! one_hot.cu against the reference.

mod common;

use common::{
    Random, Storage, assert_every_barrier_is_needed, assert_near, in_every_order, norm, upload,
};
use dtmem_host::{Arg, Executor, Launch, Result, View};
use dtmem_reference::one_hot;
use half::{bf16, f16};
use ndarray::{Array1, Array2};
use proptest::prelude::*;

const THREADS: u32 = 256;

struct Case {
    codes: Array2<u8>,
    offsets: Vec<usize>,
    weight: Array2<f64>,
    bias: Array1<f64>,
    dy: Array2<f64>,
    tanh: bool,
}

impl Case {
    /// Fields of these sizes.
    fn draw<T: Storage>(rows: usize, sizes: &[usize], width: usize, tanh: bool, seed: u64) -> Self {
        let mut random = Random(seed);
        let offsets = sizes
            .iter()
            .scan(0, |end, size| Some(std::mem::replace(end, *end + size)))
            .collect();
        let codes = Array2::from_shape_fn((rows, sizes.len()), |(_, field)| {
            (random.bits() % sizes[field] as u64) as u8
        });
        // Small, so that the sums stay where tanh has a slope.
        let weight = random.array::<T, _>((sizes.iter().sum(), width)) * 0.125;
        Self {
            codes,
            offsets,
            weight,
            bias: random.array::<T, _>(width),
            dy: random.array::<T, _>((rows, width)),
            tanh,
        }
    }

    fn rows(&self) -> usize {
        self.codes.nrows()
    }

    fn width(&self) -> usize {
        self.bias.len()
    }

    fn y(&self) -> Array2<f64> {
        let mut y = Array2::from_elem((self.rows(), self.width()), f64::NAN);
        let (weight, bias) = (self.weight.view(), self.bias.view());
        one_hot::forward(
            self.codes.view(),
            &self.offsets,
            weight,
            Some(bias),
            y.view_mut(),
        )
        .unwrap();
        if self.tanh { y.map(|y| y.tanh()) } else { y }
    }
}

fn forward<T: Storage>(executor: &Executor, case: &Case) -> Result<Vec<T>> {
    let (rows, width) = (case.rows(), case.width());
    let codes = executor.upload(case.codes.as_slice().unwrap());
    let offsets: Vec<i32> = case.offsets.iter().map(|&offset| offset as i32).collect();
    let offsets = executor.upload(&offsets);
    let weight = upload::<T, _>(executor, &case.weight);
    let bias = upload::<T, _>(executor, &case.bias);
    let y = executor.scratch::<T>(rows * width);
    let grid = [rows.div_ceil(32) as u32, width.div_ceil(64) as u32, 1];
    executor.launch(
        &format!("one_hot_forward_{}", T::NAME),
        Launch::new(grid, [THREADS, 1, 1]),
        &[
            Arg::I32(case.tanh.into()),
            Arg::Input(codes.view()),
            Arg::Input(offsets.view()),
            Arg::Input(weight.view()),
            Arg::Input(bias.view()),
            Arg::Output(y.view()),
            Arg::I32(rows as i32),
            Arg::I32(case.offsets.len() as i32),
            Arg::I32(width as i32),
        ],
    )?;
    Ok(y.download())
}

#[derive(Debug, PartialEq)]
struct Gradients {
    dweight: Vec<f32>,
    dbias: Vec<f32>,
}

fn backward<T: Storage>(
    executor: &Executor,
    case: &Case,
    before: (&Array2<f64>, &Array1<f64>),
    chunks: usize,
) -> Result<Gradients> {
    let (rows, inputs, width) = (case.rows(), case.weight.nrows(), case.width());
    let codes = executor.upload(case.codes.as_slice().unwrap());
    let offsets: Vec<i32> = case.offsets.iter().map(|&offset| offset as i32).collect();
    let offsets = executor.upload(&offsets);
    let dy = upload::<T, _>(executor, &case.dy);
    let y = case.tanh.then(|| upload::<T, _>(executor, &case.y()));
    let dweight = upload::<f32, _>(executor, before.0);
    let dbias = upload::<f32, _>(executor, before.1);
    let partial = executor.scratch::<f32>(chunks * (inputs + 1) * width);
    let grid = [width.div_ceil(128), (inputs + 1).div_ceil(128), chunks].map(|n| n as u32);
    executor.launch(
        &format!("one_hot_backward_{}", T::NAME),
        Launch::new(grid, [THREADS, 1, 1]),
        &[
            Arg::Input(codes.view()),
            Arg::Input(offsets.view()),
            Arg::Input(y.as_ref().map_or(View::NULL, |y| y.view())),
            Arg::Input(dy.view()),
            Arg::Output(partial.view()),
            Arg::I32(rows as i32),
            Arg::I32(case.offsets.len() as i32),
            Arg::I32(inputs as i32),
            Arg::I32(width as i32),
            Arg::I32(rows.div_ceil(chunks) as i32),
        ],
    )?;
    executor.launch(
        "one_hot_add_partials",
        Launch::new(
            [((inputs + 1) * width).div_ceil(32) as u32, 1, 1],
            [THREADS, 1, 1],
        ),
        &[
            Arg::Input(partial.view()),
            Arg::Output(dweight.view()),
            Arg::Output(dbias.view()),
            Arg::I32(chunks as i32),
            Arg::I32(inputs as i32),
            Arg::I32(width as i32),
        ],
    )?;
    Ok(Gradients {
        dweight: dweight.download(),
        dbias: dbias.download(),
    })
}

fn check<T: Storage>(
    rows: usize,
    sizes: &[usize],
    width: usize,
    tanh: bool,
    chunks: usize,
    seed: u64,
) {
    let case = Case::draw::<T>(rows, sizes, width, tanh, seed);
    if rows > 0 {
        let y = in_every_order(|executor| {
            forward::<T>(executor, &case).unwrap_or_else(|error| panic!("{error}"))
        });
        // Sums of weights can cancel.
        let weights = norm(case.bias.iter().copied()) * (rows as f64).sqrt();
        assert_near("y", &y, &case.y(), T::TOLERANCE, weights);
    }

    let mut random = Random(seed ^ 1);
    let mut dweight = random.array::<f32, _>(case.weight.dim());
    let mut dbias = random.array::<f32, _>(width);
    let run = in_every_order(|executor| {
        backward::<T>(executor, &case, (&dweight, &dbias), chunks)
            .unwrap_or_else(|error| panic!("{error}"))
    });
    let g = match tanh {
        true => &case.dy * &case.y().map(|&y| 1.0 - T::round(y).widen().powi(2)),
        false => case.dy.clone(),
    };
    let (weight, bias) = (dweight.view_mut(), dbias.view_mut());
    one_hot::backward(
        case.codes.view(),
        &case.offsets,
        g.view(),
        weight,
        Some(bias),
    )
    .unwrap();
    let dy_norm = norm(case.dy.iter().copied());
    assert_near("dweight", &run.dweight, &dweight, f32::TOLERANCE, dy_norm);
    assert_near("dbias", &run.dbias, &dbias, f32::TOLERANCE, dy_norm);
}

/// One field, a grid of cells with few values each, fields longer than a block's inputs.
fn sizes() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        (1..=256_usize).prop_map(|size| vec![size]),
        prop::collection::vec(1..5_usize, 60..75),
        prop::collection::vec(prop_oneof![1..8_usize, 60..70_usize], 1..6),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn sums_of_weight_rows_agree_with_the_reference(
        rows in prop_oneof![0..10_usize, 30..40_usize],
        sizes in sizes(),
        width in prop_oneof![1..20_usize, Just(64), Just(128), 120..140_usize],
        tanh: bool,
        chunks in 1..4_usize,
        seed: u64,
    ) {
        check::<f32>(rows, &sizes, width, tanh, chunks, seed);
        check::<bf16>(rows, &sizes, width, tanh, chunks, seed);
        check::<f16>(rows, &sizes, width, tanh, chunks, seed);
    }
}

#[test]
fn every_barrier_is_needed() {
    let case = Case::draw::<f32>(33, &[3; 66], 64, false, 5);
    let (dweight, dbias) = (Array2::zeros(case.weight.dim()), Array1::zeros(64));
    let source = include_str!("../../one_hot.cu");
    assert_every_barrier_is_needed("kernels/one_hot.cu", source, |executor| {
        forward::<f32>(executor, &case)?;
        backward::<f32>(executor, &case, (&dweight, &dbias), 1).map(|_| ())
    });
}
