//! convolutions_forward.cu and convolutions_backward.cu against the reference.

mod common;

use common::{
    Random, Storage, assert_close, assert_every_barrier_is_needed, assert_near, in_every_order,
    norm, upload,
};
use dtmem_host::{Arg, Executor, Launch, Result};
use dtmem_reference::activation::{self, Activation};
use dtmem_reference::convolution::{self, Grid};
use half::{bf16, f16};
use ndarray::{Array1, Array2};
use proptest::prelude::*;

const TAPS: usize = 9;
const THREADS: u32 = 128;
const GRADIENT_THREADS: u32 = 256;

/// How the launches divide the work.
#[derive(Debug, Clone, Copy)]
struct Division {
    blocks: u32,
    frames: usize,
    /// Chunks of a slice of the weights.
    slice: usize,
    /// Channels of a block's part of a gradient.
    rows: usize,
}

struct Case {
    grid: Grid,
    codes: Array2<u8>,
    weight1: Array2<f64>,
    bias1: Array1<f64>,
    weight2: Array2<f64>,
    bias2: Array1<f64>,
    dout: Array2<f64>,
}

impl Case {
    fn draw<T: Storage>(grid: &Grid, rows: usize, [middle, out]: [usize; 2], seed: u64) -> Self {
        let mut random = Random(seed);
        let fields = grid.cardinalities.len();
        let codes = Array2::from_shape_fn((rows, grid.positions() * fields), |(_, input)| {
            (random.bits() % grid.cardinalities[input % fields] as u64) as u8
        });
        let inputs = grid.channels() * TAPS;
        let mut array = |shape: (usize, usize), scale: f64| {
            random
                .array::<T, _>(shape)
                .map(|x| T::round(x * scale).widen())
        };
        Self {
            weight1: array((inputs, middle), 0.3),
            bias1: array((1, middle), 1.0).into_flat(),
            weight2: array((out, middle * TAPS), 0.1),
            bias2: array((1, out), 1.0).into_flat(),
            dout: array((rows, out * grid.positions()), 1.0),
            grid: grid.clone(),
            codes,
        }
    }

    fn rows(&self) -> usize {
        self.codes.nrows()
    }

    fn channels(&self) -> [usize; 3] {
        [
            self.grid.channels(),
            self.weight1.ncols(),
            self.weight2.nrows(),
        ]
    }

    fn codes_arguments(&self) -> [Arg; 3] {
        let starts = self.grid.cardinalities.iter().scan(0, |next, cardinality| {
            let start = *next;
            *next += cardinality;
            Some(start as u64)
        });
        let starts = starts
            .enumerate()
            .fold(0, |bytes, (f, start)| bytes | start << (8 * f));
        [
            Arg::U64(starts),
            number(self.grid.cardinalities.len()),
            number(self.grid.channels()),
        ]
    }

    fn sizes(&self, division: Division) -> [Arg; 4] {
        let Grid { width, height, .. } = self.grid;
        [self.rows(), width, height, division.frames].map(number)
    }

    fn cells(&self, frames: usize) -> usize {
        (frames * (self.grid.width + 1) + 1) * (self.grid.height + 1) + 1
    }
}

fn number(x: usize) -> Arg {
    Arg::I32(x as i32)
}

fn chunks(channels: usize) -> usize {
    channels.div_ceil(8)
}

/// Bytes from row to row of a slice of the weights.
fn slice_bytes<T>(chunks: usize) -> usize {
    (chunks * TAPS).next_multiple_of(2) * 8 * size_of::<T>() + 16
}

/// Bytes from cell to cell of a map.
fn map_bytes<T>(channels: usize) -> usize {
    match size_of::<T>() {
        2 => ((channels / 8) | 1) * 16,
        _ => channels * 4 + 16,
    }
}

/// Position-major, as the kernels keep it, from the reference's channel-major, or the other way round.
fn turned(x: &Array2<f64>, from: usize) -> Array2<f64> {
    let (rows, len) = x.dim();
    let y = x.to_shape((rows, from, len / from)).unwrap();
    let y = y.permuted_axes([0, 2, 1]);
    Array2::from_shape_vec((rows, len), y.iter().copied().collect()).unwrap()
}

#[derive(Debug, PartialEq)]
struct Forward<T> {
    middle: Vec<T>,
    out: Vec<T>,
}

fn forward<T: Storage>(executor: &Executor, case: &Case, division: Division) -> Result<Forward<T>> {
    let [channels, middle_channels, out_channels] = case.channels();
    let maps = case.rows() * case.grid.positions();
    let codes = executor.upload(case.codes.as_slice().unwrap());
    let [weight1, weight2] = [&case.weight1, &case.weight2].map(|x| upload::<T, _>(executor, x));
    let [bias1, bias2] = [&case.bias1, &case.bias2].map(|x| upload::<T, _>(executor, x));
    let [middle, out] =
        [middle_channels, out_channels].map(|channels| executor.scratch::<T>(maps * channels));
    let slices =
        [chunks(channels), chunks(middle_channels)].map(|chunks| chunks.min(division.slice));
    let mut launch = Launch::new([division.blocks, 1, 1], [THREADS, 1, 1]);
    launch.shared_bytes = (middle_channels * slice_bytes::<T>(slices[0])
        + out_channels * slice_bytes::<T>(slices[1])
        + case.cells(division.frames) * map_bytes::<T>(middle_channels)
        + (case.cells(division.frames) * chunks(channels)).next_multiple_of(16))
        as u32;
    let [starts, fields, channels] = case.codes_arguments();
    let [rows, width, height, frames] = case.sizes(division);
    executor.launch(
        &format!("convolutions_forward_{}", T::NAME),
        launch,
        &[
            Arg::Input(codes.view()),
            Arg::Input(weight1.view()),
            Arg::Input(bias1.view()),
            Arg::Input(weight2.view()),
            Arg::Input(bias2.view()),
            Arg::Output(middle.view()),
            Arg::Output(out.view()),
            starts,
            fields,
            channels,
            number(middle_channels),
            number(out_channels),
            rows,
            width,
            height,
            frames,
            number(slices[0]),
            number(slices[1]),
        ],
    )?;
    Ok(Forward {
        middle: middle.download(),
        out: out.download(),
    })
}

/// middle and out, both channel-major.
fn reference_forward<T: Storage>(case: &Case) -> [Array2<f64>; 2] {
    let [_, middle, out] = case.channels();
    let map =
        |channels| Array2::from_elem((case.rows(), channels * case.grid.positions()), f64::NAN);
    let (mut middle, mut out, mut scratch) = (map(middle), map(out), Vec::new());
    let relu = |x: &mut Array2<f64>| x.mapv_inplace(|x| if x < 0.0 { 0.0 } else { x });
    convolution::one_hot_forward(
        &case.grid,
        case.codes.view(),
        case.weight1.view(),
        case.bias1.view(),
        middle.view_mut(),
        &mut scratch,
    )
    .unwrap();
    relu(&mut middle);
    let middle = middle.map(|&x| T::round(x).widen());
    convolution::forward(
        &case.grid,
        middle.view(),
        case.weight2.view(),
        case.bias2.view(),
        out.view_mut(),
        &mut scratch,
    )
    .unwrap();
    relu(&mut out);
    [middle, out]
}

fn check_forward<T: Storage>(case: &Case, division: Division) {
    let run = in_every_order(|executor| {
        forward::<T>(executor, case, division).unwrap_or_else(|error| panic!("{error}"))
    });
    let [middle, out] = reference_forward::<T>(case);
    let middle = turned(&middle, case.channels()[1]);
    assert_close("middle", &run.middle, &middle, T::TOLERANCE);
    assert_close("out", &run.out, &out, T::TOLERANCE);
}

#[derive(Debug, PartialEq)]
struct Backward<T> {
    dy: Vec<T>,
    dmiddle: Vec<T>,
    dweight1: Vec<f32>,
    dbias1: Vec<f32>,
    dweight2: Vec<f32>,
    dbias2: Vec<f32>,
}

/// What the gradients of the parameters are added to.
struct Gradients {
    weight1: Array2<f64>,
    bias1: Array1<f64>,
    weight2: Array2<f64>,
    bias2: Array1<f64>,
}

impl Gradients {
    fn draw(case: &Case, seed: u64) -> Self {
        let mut random = Random(seed);
        Self {
            weight1: random.array::<f32, _>(case.weight1.dim()),
            bias1: random.array::<f32, _>(case.bias1.len()),
            weight2: random.array::<f32, _>(case.weight2.dim()),
            bias2: random.array::<f32, _>(case.bias2.len()),
        }
    }
}

fn backward<T: Storage>(
    executor: &Executor,
    case: &Case,
    [middle, out]: &[Array2<f64>; 2],
    before: &Gradients,
    division: Division,
) -> Result<Backward<T>> {
    let [channels, middle_channels, out_channels] = case.channels();
    let positions = case.grid.positions();
    let codes = executor.upload(case.codes.as_slice().unwrap());
    let weight2 = upload::<T, _>(executor, &case.weight2);
    let middle = upload::<T, _>(executor, &turned(middle, middle_channels));
    let out = upload::<T, _>(executor, out);
    let dout = upload::<T, _>(executor, &case.dout);
    let dmiddle = executor.scratch::<T>(case.rows() * positions * middle_channels);
    let [dweight1, dweight2] =
        [&before.weight1, &before.weight2].map(|x| upload::<f32, _>(executor, x));
    let [dbias1, dbias2] = [&before.bias1, &before.bias2].map(|x| upload::<f32, _>(executor, x));
    let [starts, fields, channels_argument] = case.codes_arguments();
    let [rows, width, height, frames] = case.sizes(division);

    let slice = chunks(out_channels).min(division.slice);
    let mut launch = Launch::new([division.blocks, 1, 1], [THREADS, 1, 1]);
    launch.shared_bytes = (middle_channels * slice_bytes::<T>(slice)
        + case.cells(division.frames) * map_bytes::<T>(out_channels)
        + division.frames * positions * 2) as u32;
    executor.launch(
        &format!("convolutions_input_gradient_{}", T::NAME),
        launch,
        &[
            Arg::Input(weight2.view()),
            Arg::Input(middle.view()),
            Arg::Input(out.view()),
            Arg::Output(dout.view()),
            Arg::Output(dmiddle.view()),
            number(middle_channels),
            number(out_channels),
            rows,
            width,
            height,
            frames,
            number(slice),
        ],
    )?;

    let padded = (division.frames * positions).next_multiple_of(16);
    let gradient_launch = |outputs: usize, input_parts: usize, cell_bytes: usize| {
        let part = outputs.min(division.rows);
        let parts = outputs.div_ceil(part) * input_parts;
        let mut launch = Launch::new([division.blocks, parts as u32, 1], [GRADIENT_THREADS, 1, 1]);
        launch.shared_bytes = (2 * padded * map_bytes::<T>(part)
            + padded * 2
            + (2 * case.cells(division.frames) * cell_bytes).next_multiple_of(16))
            as u32;
        (launch, number(part))
    };
    let partial = |outputs: usize, inputs: usize| {
        executor
            .scratch::<f32>(division.blocks as usize * outputs * (chunks(inputs) * TAPS + 1) * 8)
    };
    let partial1 = partial(middle_channels, channels);
    let partial2 = partial(out_channels, middle_channels);
    let cell_bytes = map_bytes::<T>(middle_channels.min(40));
    let (launch, part) = gradient_launch(out_channels, middle_channels.div_ceil(40), cell_bytes);
    executor.launch(
        &format!("convolutions_weight2_gradient_{}", T::NAME),
        launch,
        &[
            Arg::Input(dout.view()),
            Arg::Input(middle.view()),
            Arg::Output(partial2.view()),
            number(middle_channels),
            number(out_channels),
            rows,
            width,
            height,
            frames,
            part,
        ],
    )?;
    let (launch, part) = gradient_launch(middle_channels, channels.div_ceil(24), chunks(channels));
    executor.launch(
        &format!("convolutions_weight1_gradient_{}", T::NAME),
        launch,
        &[
            Arg::Input(dmiddle.view()),
            Arg::Input(codes.view()),
            Arg::Output(partial1.view()),
            starts,
            fields,
            channels_argument,
            number(middle_channels),
            rows,
            width,
            height,
            frames,
            part,
        ],
    )?;
    let widest = partial1.len().max(partial2.len()) / division.blocks as usize;
    executor.launch(
        "convolutions_reduce",
        Launch::new([widest.div_ceil(32) as u32, 2, 1], [GRADIENT_THREADS, 1, 1]),
        &[
            Arg::Input(partial1.view()),
            Arg::Input(partial2.view()),
            Arg::Output(dweight1.view()),
            Arg::Output(dbias1.view()),
            Arg::Output(dweight2.view()),
            Arg::Output(dbias2.view()),
            number(division.blocks as usize),
            channels_argument,
            number(middle_channels),
            number(out_channels),
        ],
    )?;
    Ok(Backward {
        dy: dout.download(),
        dmiddle: dmiddle.download(),
        dweight1: dweight1.download(),
        dbias1: dbias1.download(),
        dweight2: dweight2.download(),
        dbias2: dbias2.download(),
    })
}

fn check_backward<T: Storage>(case: &Case, division: Division, seed: u64) {
    let maps = reference_forward::<T>(case);
    let maps = maps.map(|x| x.map(|&x| T::round(x).widen()));
    let mut gradients = Gradients::draw(case, seed);
    let run = in_every_order(|executor| {
        backward::<T>(executor, case, &maps, &gradients, division)
            .unwrap_or_else(|error| panic!("{error}"))
    });
    let [middle, out] = &maps;
    let masked = |y: &Array2<f64>, dy: &mut Array2<f64>| {
        activation::backward_in_place(Activation::Relu, y.view(), y.view(), dy.view_mut()).unwrap();
    };
    let (mut dy, mut dmiddle) = (case.dout.clone(), Array2::from_elem(middle.dim(), f64::NAN));
    let mut scratch = Vec::new();
    masked(out, &mut dy);
    convolution::backward(
        &case.grid,
        middle.view(),
        case.weight2.view(),
        dy.view(),
        dmiddle.view_mut(),
        gradients.weight2.view_mut(),
        gradients.bias2.view_mut(),
        &mut scratch,
    )
    .unwrap();
    masked(middle, &mut dmiddle);
    convolution::one_hot_backward(
        &case.grid,
        case.codes.view(),
        dmiddle.view(),
        gradients.weight1.view_mut(),
        gradients.bias1.view_mut(),
        &mut scratch,
    )
    .unwrap();
    let [_, middle_channels, out_channels] = case.channels();
    assert_close("dy", &run.dy, &turned(&dy, out_channels), 0.0);
    let dmiddle = turned(&dmiddle, middle_channels);
    assert_close("dmiddle", &run.dmiddle, &dmiddle, T::TOLERANCE);
    // Sums over positions can cancel.
    let [dy_norm, dmiddle_norm] = [&dy, &dmiddle].map(|x| norm(x.iter().copied()));
    let (weight1, weight2) = (&gradients.weight1, &gradients.weight2);
    let (bias1, bias2) = (&gradients.bias1, &gradients.bias2);
    assert_near("dweight2", &run.dweight2, weight2, f32::TOLERANCE, dy_norm);
    assert_near("dbias2", &run.dbias2, bias2, f32::TOLERANCE, dy_norm);
    // dmiddle was rounded on its way.
    let tolerance = T::TOLERANCE;
    assert_near("dweight1", &run.dweight1, weight1, tolerance, dmiddle_norm);
    assert_near("dbias1", &run.dbias1, bias1, tolerance, dmiddle_norm);
}

fn grid(width: usize, height: usize, cardinalities: &[usize]) -> Grid {
    Grid {
        width,
        height,
        cardinalities: cardinalities.to_vec(),
    }
}

#[test]
fn the_papers_sizes_agree_with_the_reference() {
    let division = Division {
        blocks: 1,
        frames: 3,
        slice: 16,
        rows: 80,
    };
    let case = Case::draw::<bf16>(&grid(7, 7, &[11, 6, 3]), 4, [40, 80], 1);
    check_forward::<bf16>(&case, division);
    check_backward::<bf16>(&case, division, 2);
}

#[test]
fn codes_beyond_their_field_are_no_channel_and_a_nan_passes() {
    let division = Division {
        blocks: 2,
        frames: 1,
        slice: 16,
        rows: 80,
    };
    // The last of the values of the second field has no weight: it is as good as no value.
    let mut case = Case::draw::<f32>(&grid(3, 4, &[5, 4]), 3, [8, 8], 5);
    for tap in 0..TAPS {
        case.weight1.row_mut(8 * TAPS + tap).fill(0.0);
    }
    let expected = forward::<f32>(&Executor::new(), &case, division).unwrap();
    for (input, code) in case.codes.iter_mut().enumerate() {
        if input % 2 == 1 && *code == 3 {
            *code = [4, 8, 255][input / 2 % 3];
        }
    }
    let found = forward::<f32>(&Executor::new(), &case, division).unwrap();
    assert_eq!(found, expected);

    case.bias1[2] = f64::NAN;
    let found = forward::<f32>(&Executor::new(), &case, division).unwrap();
    for (index, middle) in found.middle.iter().enumerate() {
        assert_eq!(middle.is_nan(), index % 8 == 2, "element {index}");
    }
    assert!(found.out.iter().all(|x| x.is_nan()));
}

#[test]
fn every_barrier_is_needed() {
    // Slices of the weights come and go, or all of them stay.
    let divisions = [1, 16].map(|slice| Division {
        blocks: 1,
        frames: 1,
        slice,
        rows: 80,
    });
    let case = Case::draw::<bf16>(&grid(5, 4, &[3, 7]), 4, [16, 16], 3);
    let maps = reference_forward::<bf16>(&case);
    let before = Gradients::draw(&case, 4);
    for (file, source) in [
        (
            "kernels/convolutions.cuh",
            include_str!("../../convolutions.cuh"),
        ),
        (
            "kernels/convolutions_forward.cu",
            include_str!("../../convolutions_forward.cu"),
        ),
        (
            "kernels/convolutions_backward.cu",
            include_str!("../../convolutions_backward.cu"),
        ),
    ] {
        assert_every_barrier_is_needed(file, source, |executor| {
            divisions.iter().try_for_each(|&division| {
                forward::<bf16>(executor, &case, division)?;
                backward::<bf16>(executor, &case, &maps, &before, division)?;
                Ok(())
            })
        });
    }
}

/// Every kind of tail: of chunks, of tiles of channels and of positions, of groups of frames.
fn draw() -> impl Strategy<Value = (Grid, usize, [usize; 2], Division, u64)> {
    let grid = (
        1..9_usize,
        1..9_usize,
        prop::collection::vec(1..12_usize, 1..4),
    )
        .prop_map(|(width, height, cardinalities)| grid(width, height, &cardinalities));
    let division =
        (1..3_u32, 1..4_usize, 1..4_usize, 1..6_usize).prop_map(|(blocks, frames, slice, rows)| {
            Division {
                blocks,
                frames,
                slice,
                rows: rows * 8,
            }
        });
    let channels = [1..7_usize, 1..7_usize].prop_map(|chunks| chunks.map(|chunks| chunks * 8));
    (grid, 1..6_usize, channels, division, 0..u64::MAX / 2)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn forward_agrees_with_the_reference((grid, rows, channels, division, seed) in draw()) {
        check_forward::<f32>(&Case::draw::<f32>(&grid, rows, channels, seed), division);
        check_forward::<bf16>(&Case::draw::<bf16>(&grid, rows, channels, seed), division);
        check_forward::<f16>(&Case::draw::<f16>(&grid, rows, channels, seed), division);
    }

    #[test]
    fn backward_agrees_with_the_reference((grid, rows, channels, division, seed) in draw()) {
        check_backward::<f32>(&Case::draw::<f32>(&grid, rows, channels, seed), division, seed + 1);
        check_backward::<bf16>(&Case::draw::<bf16>(&grid, rows, channels, seed), division, seed + 1);
        check_backward::<f16>(&Case::draw::<f16>(&grid, rows, channels, seed), division, seed + 1);
    }
}
