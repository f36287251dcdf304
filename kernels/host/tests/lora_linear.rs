//! lora_linear.cu, lora_hopper.cu, lora_linear_backward.cu, lora_dropout.cu and lora_merge.cu against the reference.

mod common;

use common::{
    Random, Storage, assert_every_barrier_is_needed, assert_near, in_every_order, norm, upload,
};
use dtmem_host::{Arg, Buffer, Executor, Launch, Result, View};
use dtmem_reference::{dropout, linear, lora_linear};
use half::{bf16, f16};
use ndarray::{Array1, Array2, Array3, ArrayView2, Axis, s};
use proptest::prelude::*;

const MAX_ADAPTERS: usize = 4;
const MAX_RANK: usize = 64;
const STEP_BYTES: usize = 64;
const STAGES: usize = 3;
/// Elements that belong to nobody, between the rows of x and y.
const GAP: usize = 8;

/// What a block of the product owns, and by which kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Tile {
    Small,
    Wide,
    Hopper,
}

impl Tile {
    /// Rows and columns.
    fn size(self) -> [usize; 2] {
        match self {
            Self::Small => [64, 64],
            Self::Wide | Self::Hopper => [128, 256],
        }
    }

    /// Of the kernel's name, for adapters up to this rank.
    fn name(self, rank: usize) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Wide => "wide",
            Self::Hopper if rank <= 16 => "hopper_16",
            Self::Hopper => "hopper_64",
        }
    }

    fn shared_bytes(self) -> usize {
        let [rows, columns] = self.size();
        match self {
            Self::Hopper => 4 * (rows + columns + MAX_RANK) * 128,
            _ => STAGES * ((rows + columns + MAX_RANK) * STEP_BYTES + rows * columns / 8),
        }
    }
}

#[derive(Debug, Clone)]
struct Shape {
    /// Rows of each group; all of them use one set of adapters.
    lengths: Vec<usize>,
    /// Whether the kernels are told of the groups and their sets.
    grouped: bool,
    sets: usize,
    inputs: usize,
    /// Of y: with and without an adapter in turn, beginning without. Rank 0: none.
    ranges: Vec<(usize, usize)>,
    transposed: bool,
    tile: Tile,
    dropout: bool,
    bias: bool,
    accumulate: bool,
    splits: usize,
}

/// Low-rank factors of one range of the outputs, for each set.
struct Factors {
    first: usize,
    scaling: f64,
    /// [sets, rank, inputs]
    a: Array3<f64>,
    /// [sets, count, rank]
    b: Array3<f64>,
}

impl Factors {
    fn rank(&self) -> usize {
        self.a.dim().1
    }

    fn count(&self) -> usize {
        self.b.dim().1
    }
}

struct Case {
    shape: Shape,
    offsets: Vec<i32>,
    /// Of each group, −1 for none.
    sets: Vec<i32>,
    x: Array2<f64>,
    /// [outputs, inputs]
    weight: Array2<f64>,
    bias: Array1<f64>,
    factors: Vec<Factors>,
    /// 1 or 0 for each element of x.
    keep: Array2<f64>,
    dy: Array2<f64>,
    before: Array2<f64>,
    dx_before: Array2<f64>,
}

impl Case {
    fn draw<T: Storage>(shape: &Shape, seed: u64) -> Self {
        let mut random = Random(seed);
        let rows = shape.lengths.iter().sum();
        let outputs = shape.ranges.iter().map(|&(count, _)| count).sum();
        let mut offsets = vec![0];
        for &length in &shape.lengths {
            offsets.push(offsets[offsets.len() - 1] + length as i32);
        }
        let sets = shape
            .lengths
            .iter()
            .map(|_| match shape.grouped {
                true => (random.bits() % (shape.sets as u64 + 1)) as i32 - 1,
                false => 0,
            })
            .collect();
        let mut factors = vec![];
        let mut first = 0;
        for &(count, rank) in &shape.ranges {
            if rank > 0 {
                factors.push(Factors {
                    first,
                    scaling: f64::from(T::round(random.normal()).widen() as f32),
                    a: random.array::<T, _>((shape.sets, rank, shape.inputs)),
                    b: random.array::<T, _>((shape.sets, count, rank)),
                });
            }
            first += count;
        }
        let keep = Array2::from_shape_simple_fn((rows, shape.inputs), || {
            f64::from(u8::from(!shape.dropout || !random.bits().is_multiple_of(4)))
        });
        Self {
            offsets,
            sets,
            x: random.array::<T, _>((rows, shape.inputs)),
            weight: random.array::<T, _>((outputs, shape.inputs)),
            bias: random.array::<T, _>(outputs),
            factors,
            keep,
            dy: random.array::<T, _>((rows, outputs)),
            before: random.array::<T, _>((rows, outputs)),
            dx_before: random.array::<T, _>((rows, shape.inputs)),
            shape: shape.clone(),
        }
    }

    fn ranks(&self) -> usize {
        self.factors.iter().map(Factors::rank).sum()
    }

    /// For each row the bits of 32 elements in a word.
    fn keep_words(&self) -> Vec<u32> {
        let bits = |chunk: ndarray::ArrayView1<f64>| {
            let bit = |(at, &keep): (usize, &f64)| u32::from(keep > 0.0) << at;
            chunk.iter().enumerate().map(bit).sum::<u32>()
        };
        let rows = self.keep.rows().into_iter();
        rows.flat_map(|row| {
            row.axis_chunks_iter(Axis(0), 32)
                .map(bits)
                .collect::<Vec<_>>()
        })
        .collect()
    }
}

/// Rows with a gap after each.
fn spaced<T: Storage>(executor: &Executor, x: &Array2<f64>) -> Buffer<T> {
    let mut content = vec![];
    for row in x.rows() {
        content.extend(row.iter().map(|&x| T::round(x)));
        content.extend([T::round(f64::NAN); GAP]);
    }
    executor.upload(&content)
}

fn without_gaps<T: Storage>(buffer: &Buffer<T>, width: usize) -> Vec<T> {
    let content = buffer.download();
    let rows = content.chunks_exact(width + GAP);
    rows.flat_map(|row| row[..width].to_vec()).collect()
}

/// A matrix as the kernels find it, for a transposed map the other way round.
fn stored(x: ArrayView2<f64>, transposed: bool) -> Vec<f64> {
    let x = if transposed { x.reversed_axes() } else { x };
    x.iter().copied().collect()
}

fn each_stored(x: &Array3<f64>, transposed: bool) -> Array1<f64> {
    let sets = x.axis_iter(Axis(0));
    sets.flat_map(|x| stored(x, transposed)).collect()
}

#[derive(Debug, PartialEq)]
struct Run<T> {
    y: Vec<T>,
    h: Vec<T>,
    dx: Vec<T>,
    g: Vec<T>,
    /// Of A and B of each adapter, as the factors lie.
    gradients: Vec<[Vec<f32>; 2]>,
}

/// What gradients are added to.
const BEFORE: f32 = 0.25;

fn run<T: Storage>(executor: &Executor, case: &Case) -> Result<Run<T>> {
    let Case { shape, .. } = case;
    let (rows, inputs, outputs) = (case.x.nrows(), shape.inputs, case.weight.nrows());
    let numbers = |x: Vec<f64>| upload::<T, _>(executor, &Array1::from(x));
    let [x, dy] = [&case.x, &case.dy].map(|x| spaced::<T>(executor, x));
    let [y, dx] = [(&case.before, outputs), (&case.dx_before, inputs)].map(|(before, width)| {
        match shape.accumulate {
            true => spaced::<T>(executor, before),
            false => executor.scratch(rows * (width + GAP)),
        }
    });
    let weight = numbers(stored(case.weight.view(), shape.transposed));
    let bias = upload::<T, _>(executor, &case.bias);
    let [h, g] = [(); 2].map(|()| executor.scratch::<T>(rows * case.ranks()));
    let offsets = executor.upload(&case.offsets);
    let sets = executor.upload(&case.sets);
    let [offsets, sets] = [&offsets, &sets].map(|x| match shape.grouped {
        true => x.view(),
        false => View::NULL,
    });
    let keep = executor.upload(&case.keep_words());
    let keep = if shape.dropout {
        keep.view()
    } else {
        View::NULL
    };
    let groups = if shape.grouped {
        shape.lengths.len()
    } else {
        0
    };
    let a: Vec<_> = case
        .factors
        .iter()
        .map(|f| each_stored(&f.a, shape.transposed))
        .collect();
    let b: Vec<_> = case
        .factors
        .iter()
        .map(|f| each_stored(&f.b, shape.transposed))
        .collect();
    let [a, b] = [&a, &b].map(|list| {
        list.iter()
            .map(|x| upload::<T, _>(executor, x))
            .collect::<Vec<_>>()
    });

    let [tile_rows, tile_columns] = shape.tile.size();
    let tile = shape
        .tile
        .name(case.factors.iter().map(Factors::rank).max().unwrap_or(0));
    let threads = if shape.tile == Tile::Small { 128 } else { 256 };
    let row_tiles = match shape.grouped {
        true => rows / tile_rows + groups,
        false => rows.div_ceil(tile_rows),
    };
    let launch = |backward: bool, [x, y, h]: [View; 3], [depth, columns]: [usize; 2]| {
        let mut args = vec![
            Arg::Input(x),
            Arg::Input(keep),
            Arg::Input(weight.view()),
            Arg::Input(if shape.bias && !backward {
                bias.view()
            } else {
                View::NULL
            }),
        ];
        for p in 0..MAX_ADAPTERS {
            match case.factors.get(p) {
                Some(f) => {
                    let (down, up) = if backward {
                        (&b[p], &a[p])
                    } else {
                        (&a[p], &b[p])
                    };
                    args.extend([Arg::Input(down.view()), Arg::Input(up.view())]);
                    args.extend([f.first, f.count(), f.rank()].map(|n| Arg::I32(n as i32)));
                    args.push(Arg::F32(f.scaling as f32));
                }
                None => {
                    args.extend([Arg::Input(View::NULL); 2]);
                    args.extend([
                        Arg::I32(outputs as i32),
                        Arg::I32(0),
                        Arg::I32(0),
                        Arg::F32(0.0),
                    ]);
                }
            }
        }
        args.extend([
            Arg::Input(offsets),
            Arg::Input(sets),
            Arg::Output(y),
            Arg::Output(h),
        ]);
        args.extend(
            [rows, depth, columns, groups, depth + GAP, columns + GAP].map(|n| Arg::I32(n as i32)),
        );
        args.extend([backward, shape.accumulate].map(|x| Arg::I32(x.into())));
        let column_tiles: usize = match backward {
            true => columns.div_ceil(tile_columns),
            false => shape
                .ranges
                .iter()
                .map(|&(count, _)| count.div_ceil(tile_columns))
                .sum(),
        };
        let layout = if backward == shape.transposed {
            ""
        } else {
            "transposed_"
        };
        executor.launch(
            &format!("lora_linear_{layout}{tile}_{}", T::NAME),
            Launch {
                shared_bytes: shape.tile.shared_bytes() as u32,
                ..Launch::new([column_tiles as u32, row_tiles as u32, 1], [threads, 1, 1])
            },
            &args,
        )
    };
    let end = |buffer: &Buffer<T>, width: usize| {
        buffer.slice(0..(rows * (width + GAP)).saturating_sub(GAP))
    };
    if rows > 0 {
        launch(
            false,
            [end(&x, inputs), end(&y, outputs), h.view()],
            [inputs, outputs],
        )?;
        launch(
            true,
            [end(&dy, outputs), end(&dx, inputs), g.view()],
            [outputs, inputs],
        )?;
    }

    let gradients: Vec<_> = [&a, &b]
        .map(|list| {
            let before = list.iter().map(|x| executor.upload(&vec![BEFORE; x.len()]));
            before.collect::<Vec<_>>()
        })
        .into();
    let elements: usize = case
        .factors
        .iter()
        .map(|f| f.rank() * (inputs + f.count()))
        .sum();
    let partial = executor.scratch::<f32>(shape.splits * shape.sets * elements);
    let mut args = vec![Arg::Input(end(&x, inputs)), Arg::Input(keep)];
    args.extend([end(&dy, outputs), h.view(), g.view()].map(Arg::Input));
    let mut add = vec![Arg::Input(partial.view())];
    for p in 0..MAX_ADAPTERS {
        let (numbers, scaling) = match case.factors.get(p) {
            Some(f) => ([f.first, f.count(), f.rank()], f.scaling as f32),
            None => ([outputs, 0, 0], 0.0),
        };
        let views = [0, 1].map(|i| gradients[i].get(p).map_or(View::NULL, |x| x.view()));
        args.extend(numbers.map(|n| Arg::I32(n as i32)));
        add.extend(views.map(Arg::Output));
        add.extend([
            Arg::I32(numbers[1] as i32),
            Arg::I32(numbers[2] as i32),
            Arg::F32(scaling),
        ]);
    }
    args.extend([
        Arg::Input(offsets),
        Arg::Input(sets),
        Arg::Output(partial.view()),
    ]);
    args.extend([rows, inputs, groups, inputs + GAP, outputs + GAP].map(|n| Arg::I32(n as i32)));
    add.extend([inputs, shape.splits, usize::from(shape.transposed)].map(|n| Arg::I32(n as i32)));
    let tiles = inputs.div_ceil(128) * case.ranks().div_ceil(64)
        + case
            .factors
            .iter()
            .map(|f| f.count().div_ceil(128))
            .sum::<usize>();
    if elements > 0 {
        executor.launch(
            &format!("lora_linear_factors_{}", T::NAME),
            Launch {
                shared_bytes: (STAGES * (64 * (128 + 64) + 64 / size_of::<T>() * 16)) as u32,
                ..Launch::new(
                    [tiles as u32, shape.splits as u32, shape.sets as u32],
                    [128, 1, 1],
                )
            },
            &args,
        )?;
        executor.launch(
            "lora_linear_add",
            Launch::new(
                [elements.div_ceil(256) as u32, shape.sets as u32, 1],
                [256, 1, 1],
            ),
            &add,
        )?;
    }
    Ok(Run {
        y: without_gaps(&y, outputs),
        h: h.download(),
        dx: without_gaps(&dx, inputs),
        g: g.download(),
        gradients: (0..case.factors.len())
            .map(|p| [0, 1].map(|i| gradients[i][p].download()))
            .collect(),
    })
}

/// √Σ of the squares of all products in a·b: what the result would measure if nothing cancelled.
fn made_of(a: ArrayView2<f64>, b: ArrayView2<f64>) -> f64 {
    a.map(|x| x * x).dot(&b.map(|x| x * x)).sum().sqrt()
}

fn check<T: Storage>(shape: &Shape, seed: u64) {
    let case = Case::draw::<T>(shape, seed);
    let found = in_every_order(|executor| {
        run::<T>(executor, &case).unwrap_or_else(|error| panic!("{error}"))
    });
    let (rows, inputs, outputs) = (case.x.nrows(), shape.inputs, case.weight.nrows());
    let x_kept = &case.x * &case.keep;
    let none = || Array2::from_elem((rows, case.ranks()), f64::NAN);
    let (mut y, mut h, mut g) = (Array2::zeros((rows, outputs)), none(), none());
    let bias = shape.bias.then_some(case.bias.view());
    linear::forward(case.x.view(), case.weight.view(), bias, 0.0, y.view_mut()).unwrap();
    let mut dx = Array2::zeros((rows, inputs));
    linear::backward_input(case.dy.view(), case.weight.view(), 0.0, dx.view_mut()).unwrap();
    let mut dx_kept = Array2::zeros((rows, inputs));
    let mut scale_y = made_of(case.x.view(), case.weight.t());
    let mut scale_dx = made_of(case.dy.view(), case.weight.view());

    let mut column = 0;
    for (p, f) in case.factors.iter().enumerate() {
        let list: Vec<_> = (f.a.outer_iter().zip(f.b.outer_iter()))
            .map(|(a, b)| lora_linear::Adapter {
                a,
                b,
                scaling: f.scaling,
            })
            .collect();
        let adapters = lora_linear::Adapters {
            list: &list,
            cu_seqlens: &case.offsets,
            index: &case.sets,
        };
        let ranks = s![.., column..column + f.rank()];
        let own = s![.., f.first..f.first + f.count()];
        let mut h = h.slice_mut(ranks);
        lora_linear::forward_adapters(x_kept.view(), adapters, h.view_mut(), y.slice_mut(own))
            .unwrap();
        let [mut da, mut db] = [&f.a, &f.b].map(|x| Array3::zeros(x.raw_dim()));
        let mut g = g.slice_mut(ranks);
        let dy = case.dy.slice(own);
        lora_linear::backward_adapters(
            x_kept.view(),
            h.view(),
            adapters,
            dy,
            g.view_mut(),
            Some(dx_kept.view_mut()),
            &mut da
                .outer_iter_mut()
                .zip(db.outer_iter_mut())
                .collect::<Vec<_>>(),
        )
        .unwrap();
        // The kernel keeps dy·B without the scaling.
        g.mapv_inplace(|g| if f.scaling == 0.0 { g } else { g / f.scaling });
        let [mut scale_da, mut scale_db] = [0.0_f64; 2];
        for (a, b) in f.a.outer_iter().zip(f.b.outer_iter()) {
            let [g, h] = [made_of(dy, b), made_of(x_kept.view(), a.t())];
            let scale = |x: ArrayView2<f64>| norm(x.iter().copied()) / (rows.max(1) as f64).sqrt();
            scale_da = scale_da.max(f.scaling.abs() * g * scale(x_kept.view()));
            scale_db = scale_db.max(f.scaling.abs() * h * scale(dy));
            scale_y = scale_y
                .max(f.scaling.abs() * h * norm(b.iter().copied()) / (f.rank() as f64).sqrt());
            scale_dx = scale_dx
                .max(f.scaling.abs() * g * norm(a.iter().copied()) / (f.rank() as f64).sqrt());
        }
        for (name, found, reference, scale) in [
            ("da", &found.gradients[p][0], da, scale_da),
            ("db", &found.gradients[p][1], db, scale_db),
        ] {
            let reference = each_stored(&reference, shape.transposed) + f64::from(BEFORE);
            assert_near(name, found, &reference, T::TOLERANCE, scale);
        }
        column += f.rank();
    }
    dx += &(&dx_kept * &case.keep);
    if shape.accumulate {
        y += &case.before;
        dx += &case.dx_before;
    }
    let scale = |a: &Array2<f64>| norm(a.iter().copied()) * (inputs as f64).sqrt();
    assert_near("h", &found.h, &h, T::TOLERANCE, scale(&x_kept) * 0.1);
    assert_near(
        "g",
        &found.g,
        &g,
        T::TOLERANCE,
        norm(g.iter().copied()).max(norm(case.dy.iter().copied())),
    );
    assert_near("y", &found.y, &y, T::TOLERANCE, scale_y);
    assert_near("dx", &found.dx, &dx, T::TOLERANCE, scale_dx);
}

fn base() -> Shape {
    Shape {
        lengths: vec![70],
        grouped: false,
        sets: 1,
        inputs: 40,
        ranges: vec![(72, 8)],
        transposed: false,
        tile: Tile::Small,
        dropout: false,
        bias: true,
        accumulate: false,
        splits: 2,
    }
}

#[test]
fn every_barrier_for_hopper_is_needed() {
    // Five steps forward, the last one of ranks where the result is put together; two ranges backward.
    let shape = Shape {
        lengths: vec![140, 70],
        grouped: true,
        sets: 1,
        inputs: 256,
        ranges: vec![(200, 24), (264, 8)],
        tile: Tile::Hopper,
        splits: 1,
        ..base()
    };
    let case = Case::draw::<bf16>(&shape, 3);
    let source = include_str!("../../lora_hopper.cu");
    assert_every_barrier_is_needed("kernels/lora_hopper.cu", source, |executor| {
        run::<bf16>(executor, &case).map(drop)
    });
}

#[test]
fn every_barrier_is_needed() {
    // Ten steps forward, two of them of ranks: the last one lies where the result is put together.
    let shape = Shape {
        lengths: vec![40, 70],
        grouped: true,
        sets: 1,
        inputs: 120,
        ranges: vec![(136, 24)],
        dropout: true,
        splits: 1,
        ..base()
    };
    let case = Case::draw::<f32>(&shape, 3);
    for (file, source) in [
        (
            "kernels/lora_linear.cu",
            include_str!("../../lora_linear.cu"),
        ),
        (
            "kernels/lora_linear_backward.cu",
            include_str!("../../lora_linear_backward.cu"),
        ),
    ] {
        assert_every_barrier_is_needed(file, source, |executor| {
            run::<f32>(executor, &case).map(drop)
        });
    }
}

/// Ranges of the outputs with and without adapters, of all ranks.
fn ranges() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let rank = prop_oneof![1..=MAX_RANK, Just(8_usize), Just(16), Just(64)];
    let range = |rank| (1..=10_usize, rank).prop_map(|(count, rank)| (count * 8, rank));
    prop_oneof![
        range(rank.clone().boxed()).prop_map(|range| vec![range]),
        (range(rank.clone().boxed()), range(Just(0).boxed())).prop_map(|(a, b)| vec![b, a]),
        prop::collection::vec(range(rank.boxed()), 2..=MAX_ADAPTERS),
        (1..40_usize).prop_map(|count| vec![(8 * count, 0)]),
    ]
}

prop_compose! {
    fn shape()(
        lengths in prop::collection::vec(prop_oneof![Just(0_usize), 1..10_usize, 40..90_usize], 1..4),
        grouped: bool, sets in 1..3_usize, inputs in 1..12_usize, ranges in ranges(),
        transposed: bool, wide: bool, dropout: bool, bias: bool, accumulate: bool, splits in 1..4_usize,
    ) -> Shape {
        Shape {
            lengths, grouped, sets: if grouped { sets } else { 1 }, inputs: 8 * inputs, ranges, transposed,
            tile: if wide { Tile::Wide } else { Tile::Small },
            dropout, bias, accumulate, splits,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn all_kernels_agree_with_the_reference_in_f32(shape in shape(), seed: u64) {
        check::<f32>(&shape, seed);
    }

    #[test]
    fn all_kernels_agree_with_the_reference_in_bf16(shape in shape(), seed: u64) {
        check::<bf16>(&shape, seed);
    }

    #[test]
    fn all_kernels_agree_with_the_reference_in_f16(shape in shape(), seed: u64) {
        check::<f16>(&shape, seed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn products_of_warpgroups_agree_with_the_reference(shape in shape(), inputs in 1..40_usize, seed: u64) {
        let shape = Shape { inputs: 8 * inputs, tile: Tile::Hopper, dropout: false, ..shape };
        check::<bf16>(&shape, seed);
        check::<f16>(&shape, seed);
    }
}

#[test]
fn tiles_end_where_they_should() {
    // One row or column more than a tile, in all sizes and layouts; and nothing but a tile.
    for tile in [Tile::Small, Tile::Wide, Tile::Hopper] {
        let [rows, columns] = tile.size();
        for transposed in [false, true] {
            for (rows, columns) in [(rows, columns), (rows + 1, columns + 8)] {
                let shape = Shape {
                    lengths: vec![rows],
                    ranges: vec![(columns, 16)],
                    inputs: columns,
                    transposed,
                    tile,
                    dropout: tile != Tile::Hopper,
                    ..base()
                };
                check::<bf16>(&shape, rows as u64);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn kept_bits_are_those_that_the_reference_draws(
        rows in 1..6_usize, width in 1..40_usize, with_origins: bool, share in 0.0..0.9, bits: [u64; 3],
    ) {
        let width = 4 * width;
        let mask = dropout::Mask::new(bits[0], bits[1] as u32, (bits[1] >> 32) as u32, share).unwrap();
        let mut random = Random(bits[2]);
        let origins: Vec<i32> = (0..rows as i32)
            .map(|row| if with_origins { random.bits() as i32 & i32::MAX } else { row })
            .collect();
        let words = width.div_ceil(32);
        let found = in_every_order(|executor| {
            let (step, origins) = (executor.upload(&[mask.step]), executor.upload(&origins));
            let keep = executor.scratch::<u32>(rows * words);
            let args = [
                Arg::Input(step.view()),
                Arg::Input(if with_origins { origins.view() } else { View::NULL }),
                Arg::U64(mask.seed),
                Arg::U32(mask.site),
                Arg::U32(mask.threshold),
                Arg::F32(mask.scale() as f32),
                Arg::Output(keep.view()),
                Arg::I32(rows as i32),
                Arg::I32(width as i32),
            ];
            let launch = Launch::new([(rows * words).div_ceil(256) as u32, 1, 1], [256, 1, 1]);
            executor.launch("lora_dropout", launch, &args).unwrap_or_else(|error| panic!("{error}"));
            keep.download()
        });
        for (row, &origin) in origins.iter().enumerate() {
            let mut ones = vec![1.0_f32; width];
            dropout::apply(mask, origin as u64 * width as u64, &mut ones).unwrap();
            for (word, ones) in ones.chunks(32).enumerate() {
                let expected: u32 = ones.iter().enumerate().map(|(at, &x)| u32::from(x > 0.0) << at).sum();
                prop_assert_eq!(found[row * words + word], expected);
            }
        }
    }
}

fn merge<T: Storage, M: Storage>(name: &str, [rows, columns, rank]: [usize; 3], seed: u64) {
    let mut random = Random(seed);
    let weight = random.array::<M, _>((rows, columns));
    let (a, b) = (
        random.array::<M, _>((rank, columns)),
        random.array::<M, _>((rows, rank)),
    );
    let scaling = f64::from(random.normal() as f32);
    let found = in_every_order(|executor| {
        let memory = spaced::<M>(executor, &weight);
        let [a, b] = [&a, &b].map(|x| upload::<M, _>(executor, x));
        let merged = executor.scratch::<T>(rows * (columns + GAP));
        executor
            .launch(
                name,
                Launch::new([columns.div_ceil(256) as u32, rows as u32, 1], [256, 1, 1]),
                &[
                    Arg::Input(memory.view()),
                    Arg::Input(a.view()),
                    Arg::Input(b.view()),
                    Arg::Output(merged.view()),
                    Arg::I32((columns + GAP) as i32),
                    Arg::I32((columns + GAP) as i32),
                    Arg::I32(columns as i32),
                    Arg::I32(rank as i32),
                    Arg::F32(scaling as f32),
                ],
            )
            .unwrap_or_else(|error| panic!("{error}"));
        without_gaps(&merged, columns)
    });
    let merged = &weight + &(b.dot(&a) * scaling);
    let scale = scaling.abs() * made_of(b.view(), a.view());
    assert_near(name, &found, &merged, T::TOLERANCE, scale);
    if rank == 0 {
        let rounded = weight.map(|&x| T::round(x).widen());
        assert_near(name, &found, &rounded, 0.0, 0.0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// Rank 0 is the weight itself.
    #[test]
    fn merged_weights_agree_with_the_reference(
        rows in 1..20_usize, columns in prop_oneof![1..20_usize, 250..300_usize], rank in 0..20_usize, seed: u64,
    ) {
        let shape = [rows, columns, rank];
        merge::<f32, f32>("lora_merge_f32", shape, seed);
        merge::<bf16, bf16>("lora_merge_bf16", shape, seed);
        merge::<f16, f16>("lora_merge_f16", shape, seed);
        merge::<bf16, f32>("lora_merge_f32_bf16", shape, seed);
        merge::<f16, f32>("lora_merge_f32_f16", shape, seed);
    }
}
