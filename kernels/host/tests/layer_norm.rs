//! layer_norm.cu against the reference.

mod common;

use common::{
    Random, Storage, assert_close, assert_every_barrier_is_needed, assert_near, in_every_order,
    norm, upload,
};
use dtmem_host::{Arg, Buffer, Executor, Launch, Result, View};
use dtmem_reference::dropout::{self, Mask};
use dtmem_reference::layer_norm;
use half::{bf16, f16};
use ndarray::{Array1, Array2, Axis};
use proptest::prelude::*;

const EPSILON: f64 = 1e-5;
const THREADS: u32 = 256;
const COLUMNS_PER_WARP: usize = 512;

fn warps_per_row(width: usize) -> u32 {
    (width.div_ceil(COLUMNS_PER_WARP).max(1) as u32).next_power_of_two()
}

struct Case {
    x: Array2<f64>,
    residual: Option<Array2<f64>>,
    /// Of the residual, and the origin of each row.
    mask: Option<(Mask, Vec<i32>)>,
    weight: Array1<f64>,
    bias: Array1<f64>,
    dy: Array2<f64>,
    dsum: Option<Array2<f64>>,
}

impl Case {
    fn draw<T: Storage>(rows: usize, width: usize, with_residual: bool, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut array = || random.array::<T, _>((rows, width));
        let (x, dy) = (array() + 3.0, array());
        let (residual, dsum) = (
            with_residual.then(&mut array),
            with_residual.then(&mut array),
        );
        let [weight, bias] = [(); 2].map(|()| random.array::<T, _>(width));
        let mask =
            (with_residual && width.is_multiple_of(4) && !seed.is_multiple_of(4)).then(|| {
                // A share whose factor is exact.
                let mask =
                    Mask::new(seed, random.bits() as u32, random.bits() as u32, 0.5).unwrap();
                let origins = (0..rows).map(|_| (random.bits() as i32) & i32::MAX);
                (mask, origins.collect())
            });
        Self {
            x: x.map(|&x| T::round(x).widen()),
            residual,
            mask,
            dy,
            dsum,
            weight,
            bias,
        }
    }

    fn drop(&self, x: &mut Array2<f64>) {
        let Some((mask, origins)) = &self.mask else {
            return;
        };
        let width = x.ncols() as u64;
        for (mut row, &origin) in x.rows_mut().into_iter().zip(origins) {
            let row = row.as_slice_mut().unwrap();
            dropout::apply(*mask, origin as u64 * width, row).unwrap();
        }
    }

    /// In device memory: step and origins of the mask.
    fn upload_mask(&self, executor: &Executor) -> Option<(Buffer<u32>, Buffer<i32>)> {
        let (mask, origins) = self.mask.as_ref()?;
        Some((executor.upload(&[mask.step]), executor.upload(origins)))
    }

    /// The kernel's name behind the pass, and what it takes of the mask: step, origins, seed, site, threshold, scale.
    fn mask_args(&self, memory: &Option<(Buffer<u32>, Buffer<i32>)>) -> (&'static str, Vec<Arg>) {
        let (Some((mask, _)), Some((step, origins))) = (&self.mask, memory) else {
            return ("", Vec::new());
        };
        let args = [
            Arg::Input(step.view()),
            Arg::Input(origins.view()),
            Arg::U64(mask.seed),
            Arg::U32(mask.site),
            Arg::U32(mask.threshold),
            Arg::F32(mask.scale() as f32),
        ];
        ("dropout_", args.to_vec())
    }

    fn dim(&self) -> (usize, usize) {
        self.x.dim()
    }

    /// x + dropout(residual) as the storage type holds it.
    fn sum<T: Storage>(&self) -> Array2<f64> {
        let Some(mut residual) = self.residual.clone() else {
            return self.x.clone();
        };
        self.drop(&mut residual);
        (&self.x + &residual).map(|&sum| T::round(sum).widen())
    }
}

#[derive(Debug, PartialEq)]
struct Forward<T> {
    sum: Option<Vec<T>>,
    y: Vec<T>,
    mean: Vec<f32>,
    rstd: Vec<f32>,
}

fn forward<T: Storage>(executor: &Executor, case: &Case) -> Result<Forward<T>> {
    let (rows, width) = case.dim();
    let [x, y] = [
        upload::<T, _>(executor, &case.x),
        executor.scratch(rows * width),
    ];
    let residual = case
        .residual
        .as_ref()
        .map(|residual| upload::<T, _>(executor, residual));
    let sum = case
        .residual
        .as_ref()
        .map(|_| executor.scratch::<T>(rows * width));
    let [weight, bias] = [&case.weight, &case.bias].map(|x| upload::<T, _>(executor, x));
    let [mean, rstd] = [(); 2].map(|()| executor.scratch::<f32>(rows));
    let mask = case.upload_mask(executor);
    let (masked, mask_args) = case.mask_args(&mask);
    let warps = warps_per_row(width);
    let grid = (rows as u32).div_ceil(8 / warps);
    executor.launch(
        &format!("layer_norm_forward_{masked}{}", T::NAME),
        Launch::new([grid, 1, 1], [THREADS, 1, 1]),
        &[
            &[
                Arg::Input(x.view()),
                Arg::Input(
                    residual
                        .as_ref()
                        .map_or(View::NULL, |residual| residual.view()),
                ),
                Arg::Input(weight.view()),
                Arg::Input(bias.view()),
                Arg::Output(sum.as_ref().map_or(View::NULL, |sum| sum.view())),
                Arg::Output(y.view()),
                Arg::Output(mean.view()),
                Arg::Output(rstd.view()),
                Arg::I32(rows as i32),
                Arg::I32(width as i32),
                Arg::I32(warps as i32),
                Arg::F32(EPSILON as f32),
            ][..],
            &mask_args,
        ]
        .concat(),
    )?;
    Ok(Forward {
        sum: sum.map(|sum| sum.download()),
        y: y.download(),
        mean: mean.download(),
        rstd: rstd.download(),
    })
}

fn reference_forward(case: &Case, sum: &Array2<f64>) -> (Array2<f64>, Array1<f64>, Array1<f64>) {
    let (rows, width) = case.dim();
    let mut y = Array2::from_elem((rows, width), f64::NAN);
    let [mut mean, mut rstd] = [(); 2].map(|()| Array1::from_elem(rows, f64::NAN));
    let (weight, bias) = (case.weight.view(), case.bias.view());
    let epsilon = f64::from(EPSILON as f32);
    layer_norm::forward(
        sum.view(),
        weight,
        bias,
        epsilon,
        y.view_mut(),
        mean.view_mut(),
        rstd.view_mut(),
    )
    .unwrap();
    (y, mean, rstd)
}

fn check_forward<T: Storage>(rows: usize, width: usize, with_residual: bool, seed: u64) {
    let case = Case::draw::<T>(rows, width, with_residual, seed);
    let run = in_every_order(|executor| {
        forward::<T>(executor, &case).unwrap_or_else(|error| panic!("{error}"))
    });
    let sum = case.sum::<T>();
    let (y, mean, rstd) = reference_forward(&case, &sum);
    if let Some(found) = run.sum {
        assert_close("sum", &found, &sum, 0.0);
    }
    assert_close("y", &run.y, &y, T::TOLERANCE);
    assert_close("mean", &run.mean, &mean, f32::TOLERANCE);
    assert_close("rstd", &run.rstd, &rstd, f32::TOLERANCE);
}

#[derive(Debug, PartialEq)]
struct Backward<T> {
    ds: Vec<T>,
    /// With dropout.
    of_residual: Option<Vec<T>>,
    dweight: Vec<f32>,
    dbias: Vec<f32>,
}

/// What the gradients of the parameters are added to.
struct Gradients {
    dweight: Array1<f64>,
    dbias: Array1<f64>,
}

fn backward<T: Storage>(
    executor: &Executor,
    case: &Case,
    before: &Gradients,
    blocks: u32,
) -> Result<Backward<T>> {
    let (rows, width) = case.dim();
    let s = case.sum::<T>();
    let (_, mean, rstd) = reference_forward(case, &s);
    let [s, dy] = [&s, &case.dy].map(|x| upload::<T, _>(executor, x));
    let dsum = case.dsum.as_ref().map(|x| upload::<T, _>(executor, x));
    let weight = upload::<T, _>(executor, &case.weight);
    let [mean, rstd, dweight, dbias] =
        [&mean, &rstd, &before.dweight, &before.dbias].map(|x| upload::<f32, _>(executor, x));
    let ds = executor.scratch::<T>(rows * width);
    let mask = case.upload_mask(executor);
    let (masked, mask_args) = case.mask_args(&mask);
    let of_residual = mask.as_ref().map(|_| executor.scratch::<T>(rows * width));
    let partial = executor.scratch::<f32>(2 * blocks as usize * width);
    executor.launch(
        &format!("layer_norm_backward_{masked}{}", T::NAME),
        Launch::new([blocks, 1, 1], [THREADS, 1, 1]),
        &[
            &[
                Arg::Input(s.view()),
                Arg::Input(weight.view()),
                Arg::Input(mean.view()),
                Arg::Input(rstd.view()),
                Arg::Input(dy.view()),
                Arg::Input(dsum.as_ref().map_or(View::NULL, |dsum| dsum.view())),
                Arg::Output(ds.view()),
                Arg::Output(partial.view()),
                Arg::I32(rows as i32),
                Arg::I32(width as i32),
                Arg::I32(warps_per_row(width) as i32),
            ][..],
            &of_residual
                .iter()
                .map(|x| Arg::Output(x.view()))
                .collect::<Vec<_>>(),
            &mask_args,
        ]
        .concat(),
    )?;
    executor.launch(
        "layer_norm_reduce",
        Launch::new([(2 * width as u32).div_ceil(32), 1, 1], [THREADS, 1, 1]),
        &[
            Arg::Input(partial.view()),
            Arg::Output(dweight.view()),
            Arg::Output(dbias.view()),
            Arg::I32(blocks as i32),
            Arg::I32(width as i32),
        ],
    )?;
    Ok(Backward {
        ds: ds.download(),
        of_residual: of_residual.map(|x| x.download()),
        dweight: dweight.download(),
        dbias: dbias.download(),
    })
}

fn check_backward<T: Storage>(
    rows: usize,
    width: usize,
    blocks: u32,
    with_residual: bool,
    seed: u64,
) {
    let case = Case::draw::<T>(rows, width, with_residual, seed);
    let [dweight, dbias] = [1, 2].map(|n| Random(seed + n).array::<f32, _>(width));
    let mut gradients = Gradients { dweight, dbias };
    let run = in_every_order(|executor| {
        backward::<T>(executor, &case, &gradients, blocks).unwrap_or_else(|error| panic!("{error}"))
    });
    let s = case.sum::<T>();
    let (_, mean, rstd) = reference_forward(&case, &s);
    let mut ds = Array2::from_elem((rows, width), f64::NAN);
    layer_norm::backward(
        s.view(),
        case.weight.view(),
        mean.view(),
        rstd.view(),
        case.dy.view(),
        ds.view_mut(),
        gradients.dweight.view_mut(),
        gradients.dbias.view_mut(),
    )
    .unwrap();
    if let Some(dsum) = &case.dsum {
        ds += dsum;
    }
    // With two columns nothing is left of the gradient but rounding.
    let g = norm((&case.dy * &case.weight) * &rstd.insert_axis(Axis(1)));
    assert_near("ds", &run.ds, &ds, T::TOLERANCE, g);
    if let Some(of_residual) = &run.of_residual {
        case.drop(&mut ds);
        assert_near("of the residual", of_residual, &ds, T::TOLERANCE, g);
    }
    assert_close("dweight", &run.dweight, &gradients.dweight, f32::TOLERANCE);
    assert_close("dbias", &run.dbias, &gradients.dbias, f32::TOLERANCE);
}

#[test]
fn every_barrier_is_needed() {
    // One warp or two own a row, of vectors.
    let cases = [128, 516].map(|width| {
        let zeros = || Array1::zeros(width);
        let before = Gradients {
            dweight: zeros(),
            dbias: zeros(),
        };
        (Case::draw::<f32>(16, width, true, 5), before)
    });
    let source = include_str!("../../layer_norm.cu");
    assert_every_barrier_is_needed("kernels/layer_norm.cu", source, |executor| {
        for (case, before) in &cases {
            forward::<f32>(executor, case)?;
            backward::<f32>(executor, case, before, 1)?;
        }
        Ok(())
    });
}

/// Widths with a tail, one column, a whole row per warp, and several warps per row.
fn width() -> impl Strategy<Value = usize> {
    prop_oneof![
        1..40_usize,
        Just(64),
        Just(512),
        Just(513),
        Just(1024),
        1000..1100_usize,
        Just(4096)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn forward_agrees_with_the_reference(
        rows in 1..20_usize, width in width(), with_residual: bool, seed: u64,
    ) {
        check_forward::<f32>(rows, width, with_residual, seed);
        check_forward::<bf16>(rows, width, with_residual, seed);
        check_forward::<f16>(rows, width, with_residual, seed);
    }

    #[test]
    fn backward_agrees_with_the_reference(
        rows in 1..20_usize, width in width(), blocks in 1..5_u32, with_residual: bool, seed in 0..u64::MAX / 2,
    ) {
        check_backward::<f32>(rows, width, blocks, with_residual, seed);
        check_backward::<bf16>(rows, width, blocks, with_residual, seed);
        check_backward::<f16>(rows, width, blocks, with_residual, seed);
    }
}
