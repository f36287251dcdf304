//! elementwise.cu against the reference.

mod common;

use common::{
    Random, Storage, assert_close, assert_every_barrier_is_needed, assert_near, in_every_order,
    norm, upload,
};
use dtmem_host::{Arg, Buffer, Executor, Launch, Result, View};
use dtmem_reference::activation::{self, Activation};
use dtmem_reference::dropout::{self, Mask};
use half::{bf16, f16};
use ndarray::{Array1, Array2, Axis};
use proptest::prelude::*;

const THREADS: u32 = 256;
const WARPS: u32 = 8;
const SLAB: usize = 256;

/// In the order of activation.cuh.
const FUNCTIONS: [Option<Activation>; 5] = [
    Some(Activation::Relu),
    Some(Activation::Gelu),
    Some(Activation::Tanh),
    Some(Activation::OnePlus),
    None,
];

#[derive(Debug, Clone, Copy)]
struct Parts {
    function: usize,
    bias: bool,
    residual: bool,
    dropout: bool,
    /// Blocks along the rows.
    blocks: u32,
}

struct Case {
    parts: Parts,
    x: Array2<f64>,
    bias: Option<Array1<f64>>,
    residual: Option<Array2<f64>>,
    dy: Array2<f64>,
    mask: Option<(Mask, Vec<i32>)>,
}

impl Case {
    fn draw<T: Storage>(rows: usize, width: usize, parts: Parts, seed: u64) -> Self {
        let mut random = Random(seed);
        let dim = (rows, width);
        let mask = parts.dropout.then(|| {
            let [seed, step, site] = [(); 3].map(|()| random.bits());
            let mask = Mask::new(seed, step as u32, site as u32, 0.3).unwrap();
            let origins = (0..rows).map(|_| (random.bits() as i32) & i32::MAX);
            (mask, origins.collect())
        });
        Self {
            parts,
            x: random.array::<T, _>(dim),
            bias: parts.bias.then(|| random.array::<T, _>(width)),
            residual: parts.residual.then(|| random.array::<T, _>(dim)),
            dy: random.array::<T, _>(dim),
            mask,
        }
    }

    fn dim(&self) -> (usize, usize) {
        self.x.dim()
    }

    /// x after the mask.
    fn dropped(&self, x: &Array2<f64>) -> Array2<f64> {
        let mut x = x.clone();
        if let Some((mask, origins)) = &self.mask {
            let width = x.ncols() as u64;
            for (mut row, &origin) in x.rows_mut().into_iter().zip(origins) {
                let row = row.as_slice_mut().unwrap();
                dropout::apply(*mask, origin as u64 * width, row).unwrap();
            }
        }
        x
    }

    /// f's argument and its value.
    fn activated(&self) -> [Array2<f64>; 2] {
        let z = match &self.bias {
            Some(bias) => &self.x + bias,
            None => self.x.clone(),
        };
        let mut y = z.clone();
        if let Some(function) = FUNCTIONS[self.parts.function] {
            activation::forward(function, z.view(), y.view_mut()).unwrap();
        }
        [z, y]
    }

    /// What the backward pass is given: f(x + bias) or x.
    fn kept<T: Storage>(&self) -> Option<Array2<f64>> {
        match FUNCTIONS[self.parts.function]? {
            Activation::Relu | Activation::Tanh => {
                Some(self.activated()[1].map(|&y| T::round(y).widen()))
            }
            Activation::Gelu | Activation::OnePlus => Some(self.x.clone()),
        }
    }

    /// step, origins, seed, site, threshold, scale.
    fn mask_args(&self, memory: &Option<(Buffer<u32>, Buffer<i32>)>) -> [Arg; 6] {
        let mask = self.mask.as_ref().map(|(mask, _)| *mask);
        let (step, origins) = match memory {
            Some((step, origins)) => (step.view(), origins.view()),
            None => (View::NULL, View::NULL),
        };
        [
            Arg::Input(step),
            Arg::Input(origins),
            Arg::U64(mask.map_or(0, |mask| mask.seed)),
            Arg::U32(mask.map_or(0, |mask| mask.site)),
            Arg::U32(mask.map_or(0, |mask| mask.threshold)),
            Arg::F32(mask.map_or(0.0, scale)),
        ]
    }
}

fn scale(mask: Mask) -> f32 {
    let range = 2f64.powi(32);
    (range / (range - f64::from(mask.threshold))) as f32
}

fn mask_memory(executor: &Executor, case: &Case) -> Option<(Buffer<u32>, Buffer<i32>)> {
    let (mask, origins) = case.mask.as_ref()?;
    Some((executor.upload(&[mask.step]), executor.upload(origins)))
}

fn view_or_null<T>(buffer: &Option<Buffer<T>>) -> View
where
    T: dtmem_host::Element,
{
    buffer.as_ref().map_or(View::NULL, |buffer| buffer.view())
}

/// Warps side by side, and the grid.
fn layout(width: usize, blocks: u32) -> (u32, Launch) {
    let warps = (width.div_ceil(SLAB) as u32).next_power_of_two().min(WARPS);
    let columns = width.div_ceil(SLAB * warps as usize) as u32;
    (warps, Launch::new([columns, blocks, 1], [THREADS, 1, 1]))
}

fn forward<T: Storage>(executor: &Executor, case: &Case) -> Result<Vec<T>> {
    let (rows, width) = case.dim();
    let x = upload::<T, _>(executor, &case.x);
    let bias = case.bias.as_ref().map(|x| upload::<T, _>(executor, x));
    let residual = case.residual.as_ref().map(|x| upload::<T, _>(executor, x));
    let y = executor.scratch::<T>(rows * width);
    let mask = mask_memory(executor, case);
    let (warps, launch) = layout(width, case.parts.blocks);
    let mut args = vec![
        Arg::I32(case.parts.function as i32),
        Arg::Input(x.view()),
        Arg::Input(view_or_null(&bias)),
        Arg::Input(view_or_null(&residual)),
        Arg::Output(y.view()),
    ];
    args.extend(case.mask_args(&mask));
    args.extend([rows as i32, width as i32, warps as i32].map(Arg::I32));
    executor.launch(&format!("elementwise_forward_{}", T::NAME), launch, &args)?;
    Ok(y.download())
}

#[derive(Debug, PartialEq)]
struct Backward<T> {
    dx: Vec<T>,
    dbias: Vec<f32>,
}

/// dy stands in rows that are `margin` wider.
fn backward<T: Storage>(
    executor: &Executor,
    case: &Case,
    before: &Array1<f64>,
    margin: usize,
) -> Result<Backward<T>> {
    let (rows, width) = case.dim();
    let stride = width + margin;
    let mut wide = Array2::from_elem((rows, stride), f64::NAN);
    wide.slice_mut(ndarray::s![.., ..width]).assign(&case.dy);
    let dy = upload::<T, _>(executor, &wide);
    let kept = case.kept::<T>().map(|x| upload::<T, _>(executor, &x));
    let bias = case.bias.as_ref().map(|x| upload::<T, _>(executor, x));
    let dx = executor.scratch::<T>(rows * width);
    let partial = executor.scratch::<f32>(case.parts.blocks as usize * width);
    let dbias = upload::<f32, _>(executor, before);
    let mask = mask_memory(executor, case);
    let (warps, launch) = layout(width, case.parts.blocks);
    let mut args = vec![
        Arg::I32(case.parts.function as i32),
        Arg::Input(view_or_null(&kept)),
        Arg::Input(view_or_null(&bias)),
        Arg::Input(dy.view()),
        Arg::Output(dx.view()),
        Arg::Output(partial.view()),
    ];
    args.extend(case.mask_args(&mask));
    args.extend([rows as i32, width as i32, stride as i32, warps as i32].map(Arg::I32));
    executor.launch(&format!("elementwise_backward_{}", T::NAME), launch, &args)?;
    executor.launch(
        "elementwise_add_partials",
        Launch::new([(width as u32).div_ceil(32), 1, 1], [THREADS, 1, 1]),
        &[
            Arg::Input(partial.view()),
            Arg::Output(dbias.view()),
            Arg::I32(case.parts.blocks as i32),
            Arg::I32(width as i32),
        ],
    )?;
    Ok(Backward {
        dx: dx.download(),
        dbias: dbias.download(),
    })
}

fn check<T: Storage>(rows: usize, width: usize, parts: Parts, margin: usize, seed: u64) {
    let case = Case::draw::<T>(rows, width, parts, seed);
    let y = in_every_order(|executor| {
        forward::<T>(executor, &case).unwrap_or_else(|error| panic!("{error}"))
    });
    let [z, activated] = case.activated();
    let mut expected = case.dropped(&activated);
    if let Some(residual) = &case.residual {
        expected += residual;
    }
    // Far from zero the functions and slopes are differences of nearly equal numbers, and sums cancel.
    let made_of = norm(z.iter().copied());
    assert_near("y", &y, &expected, T::TOLERANCE, made_of);

    let mut dbias = Random(seed ^ 1).array::<f32, _>(width);
    let run = in_every_order(|executor| {
        backward::<T>(executor, &case, &dbias, margin).unwrap_or_else(|error| panic!("{error}"))
    });
    let mut dx = case.dropped(&case.dy);
    if let Some(function) = FUNCTIONS[parts.function] {
        let y = case.kept::<T>().unwrap();
        activation::backward_in_place(function, z.view(), y.view(), dx.view_mut()).unwrap();
    }
    let dy_norm = norm(case.dy.iter().copied());
    assert_near("dx", &run.dx, &dx, T::TOLERANCE, dy_norm);
    dbias += &dx.sum_axis(Axis(0));
    assert_near("dbias", &run.dbias, &dbias, f32::TOLERANCE, dy_norm);
}

fn parts() -> impl Strategy<Value = Parts> {
    (
        0..FUNCTIONS.len(),
        any::<[bool; 3]>(),
        prop_oneof![Just(1_u32), 2..5_u32],
    )
        .prop_map(|(function, [bias, residual, dropout], blocks)| Parts {
            function,
            bias,
            residual,
            dropout,
            blocks,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn each_combination_of_parts_agrees_with_the_reference(
        rows in 0..20_usize,
        // Single elements, vectors, several warps side by side, several blocks.
        width in prop_oneof![1..40_usize, 60..70_usize, Just(256), Just(512), 500..530_usize, Just(2056)],
        parts in parts(),
        margin in prop_oneof![Just(0), Just(8), 1..9_usize],
        seed: u64,
    ) {
        let width = if parts.dropout { width.next_multiple_of(4) } else { width };
        check::<f32>(rows, width, parts, margin, seed);
        check::<bf16>(rows, width, parts, margin, seed);
        check::<f16>(rows, width, parts, margin, seed);
    }

    #[test]
    fn masks_are_those_of_the_reference(
        rows in 1..5_usize, quads in prop_oneof![1..20_usize, Just(64), Just(300)], seed: u64,
    ) {
        let parts = Parts { function: 4, bias: false, residual: false, dropout: true, blocks: 1 };
        let mut case = Case::draw::<f32>(rows, 4 * quads, parts, seed);
        case.x.fill(1.0);
        let found = in_every_order(|executor| {
            forward::<f32>(executor, &case).unwrap_or_else(|error| panic!("{error}"))
        });
        let expected: Vec<f32> = case.dropped(&case.x).iter().map(|&x| x as f32).collect();
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn numbers_change_their_type_to_the_nearest(
        n in prop_oneof![0..20_usize, 1020..1030_usize, 1..3000_usize], seed: u64,
    ) {
        let x = Random(seed).array::<f32, _>(n);
        check_conversion::<bf16>(&x);
        check_conversion::<f16>(&x);
    }
}

fn check_conversion<T: Storage>(x: &Array1<f64>) {
    let n = x.len();
    let launch = Launch::new([n.div_ceil(1024) as u32, 1, 1], [THREADS, 1, 1]);
    let (narrow, wide) = in_every_order(|executor| {
        let from = upload::<f32, _>(executor, x);
        let narrow = executor.scratch::<T>(n);
        let wide = executor.scratch::<f32>(n);
        for (kernel, from, to) in [
            ("narrow", from.view(), narrow.view()),
            ("widen", narrow.view(), wide.view()),
        ] {
            let args = [Arg::Input(from), Arg::Output(to), Arg::I64(n as i64)];
            let kernel = format!("elementwise_{kernel}_{}", T::NAME);
            if n > 0 {
                executor
                    .launch(&kernel, launch, &args)
                    .unwrap_or_else(|error| panic!("{error}"));
            }
        }
        (narrow.download(), wide.download())
    });
    let rounded = x.map(|&x| T::round(x).widen());
    assert_close("narrow", &narrow, &rounded, 0.0);
    assert_close("wide", &wide, &rounded, 0.0);
}

#[test]
fn what_is_dropped_is_zero_and_what_is_not_a_number_stays_one() {
    let parts = Parts {
        function: 0,
        bias: false,
        residual: false,
        dropout: true,
        blocks: 1,
    };
    let mut case = Case::draw::<f32>(4, 64, parts, 3);
    case.x.fill(f64::NAN);
    let found = forward::<f32>(&Executor::new(), &case).unwrap();
    let kept = case.dropped(&Array2::ones((4, 64)));
    for (found, kept) in found.iter().zip(&kept) {
        assert_eq!(found.is_nan(), *kept != 0.0, "{found}");
    }
}

#[test]
fn every_barrier_is_needed() {
    let parts = Parts {
        function: 1,
        bias: true,
        residual: false,
        dropout: false,
        blocks: 2,
    };
    let case = Case::draw::<f32>(20, 512, parts, 5);
    let before = Array1::zeros(512);
    for (file, source) in [
        (
            "kernels/elementwise.cu",
            include_str!("../../elementwise.cu"),
        ),
        ("kernels/partials.cuh", include_str!("../../partials.cuh")),
    ] {
        assert_every_barrier_is_needed(file, source, |executor| {
            backward::<f32>(executor, &case, &before, 0).map(|_| ())
        });
    }
}
