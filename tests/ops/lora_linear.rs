use dtmem::ops::lora_linear::{
    Adapter, Backward, Dropout, FactorGradients, Factors, Forward, Groups, Merge, Merging, Shape,
    Tasks,
};
use dtmem::ops::{Arg, Input, Version, elementwise};
use dtmem_reference::dropout::{self, Mask};
use dtmem_reference::{linear, lora_linear as reference};
use half::{bf16, f16};
use ndarray::{Array1, Array2, Array3, ArrayView2, Axis, s};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

use crate::common::{Number, assert_near, assert_refused, draw, target, tensor};
use crate::machines::{Machine, host, on_gpu};

/// Behind the rows of x and y.
const GAP: usize = 8;
const KEEP_SCALE: f32 = 1.25;

/// What a map is called with.
#[derive(Debug, Clone)]
struct Call {
    /// Rows of each group.
    lengths: Vec<usize>,
    /// Sets to choose from; `None`: all rows use the same adapters.
    sets: Option<usize>,
    inputs: usize,
    /// Outputs, and the rank of their adapter: 0 for none.
    ranges: Vec<(usize, usize)>,
    transposed: bool,
    dropout: bool,
    /// Whether dx is wanted.
    wants_dx: bool,
    accumulate: bool,
}

fn norm(x: &Array2<f64>) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// As the map stores it.
fn stored(x: ArrayView2<f64>, transposed: bool) -> Array1<f64> {
    let x = if transposed { x.reversed_axes() } else { x };
    x.iter().copied().collect()
}

fn each_stored(x: &Array3<f64>, transposed: bool) -> Array1<f64> {
    let sets = x.axis_iter(Axis(0));
    sets.flat_map(|x| stored(x, transposed)).collect()
}

fn with_gaps(x: &Array2<f64>) -> Array2<f64> {
    let mut wide = Array2::from_elem((x.nrows(), x.ncols() + GAP), f64::NAN);
    wide.slice_mut(s![.., ..x.ncols()]).assign(x);
    wide
}

fn without_gaps<T: Copy>(x: &[T], width: usize) -> Vec<T> {
    let rows = x.chunks_exact(width + GAP);
    rows.flat_map(|row| row[..width].to_vec()).collect()
}

fn check<T: Number>(machine: &impl Machine, version: Version, call: &Call, seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let &Call {
        inputs, transposed, ..
    } = call;
    let rows = call.lengths.iter().sum();
    let outputs = call.ranges.iter().map(|range| range.0).sum();
    let mut adapters = vec![];
    let mut factors = vec![];
    let mut output = 0;
    for &(count, rank) in &call.ranges {
        if rank > 0 {
            adapters.push(Adapter {
                output,
                outputs: count,
                rank,
                scaling: random.random_range(0.5..2.0),
            });
            let sets = call.sets.unwrap_or(1);
            factors.push([
                draw::<T, _>(&mut random, (sets, rank, inputs)),
                draw::<T, _>(&mut random, (sets, count, rank)),
            ]);
        }
        output += count;
    }
    let shape = Shape {
        rows,
        inputs,
        outputs,
        transposed,
        adapters: &adapters,
        tasks: call.sets.map(|sets| Tasks {
            groups: call.lengths.len(),
            sets,
        }),
    };
    let mut offsets = vec![0];
    offsets.extend(call.lengths.iter().scan(0, |sum, &length| {
        *sum += length as i32;
        Some(*sum)
    }));
    let sets: Vec<i32> = call
        .lengths
        .iter()
        .map(|_| {
            call.sets
                .map_or(0, |sets| random.random_range(-1..sets as i32))
        })
        .collect();
    let [x, dx_before] = [(); 2].map(|()| draw::<T, _>(&mut random, (rows, inputs)));
    let [dy, y_before] = [(); 2].map(|()| draw::<T, _>(&mut random, (rows, outputs)));
    let weight = draw::<T, _>(&mut random, (outputs, inputs));
    let bias = draw::<T, _>(&mut random, outputs);
    let words = inputs.div_ceil(32);
    let keep: Vec<u32> = (0..rows * words)
        .map(|_| if call.dropout { random.random() } else { !0 })
        .collect();
    let kept = Array2::from_shape_fn((rows, inputs), |(row, column)| {
        f64::from(keep[row * words + column / 32] >> (column % 32) & 1)
    });
    let scale = if call.dropout { KEEP_SCALE } else { 1.0 };

    let [x_memory, dy_memory] = [&x, &dy].map(|x| machine.numbers::<T, _>(&with_gaps(x)));
    let weight_memory = machine.numbers::<T, _>(&stored(weight.view(), transposed));
    let bias_memory = machine.numbers::<T, _>(&bias);
    let keep_memory = machine.upload(&keep);
    let [offsets_memory, sets_memory] = [&offsets, &sets].map(|x| machine.upload(x));
    let factor_memories: Vec<_> = factors
        .iter()
        .map(|factors| {
            let [a, b] = factors.each_ref().map(|x| each_stored(x, transposed));
            // A and B still describe the weight as it lies.
            let [a, b] = if transposed { [b, a] } else { [a, b] };
            [a, b].map(|x| machine.numbers::<T, _>(&x))
        })
        .collect();
    let factor_inputs = || -> Vec<Factors<'_, T>> {
        let inputs = factor_memories.iter().map(|[a, b]| Factors {
            a: machine.input(a),
            b: machine.input(b),
        });
        inputs.collect()
    };
    let groups = || {
        call.sets.map(|_| Groups {
            offsets: machine.input(&offsets_memory),
            sets: machine.input(&sets_memory),
        })
    };
    let dropout = || {
        call.dropout.then(|| Dropout {
            keep: machine.input(&keep_memory),
            scale: KEEP_SCALE,
        })
    };
    let [mut y_memory, mut dx_memory] =
        [(&y_before, outputs), (&dx_before, inputs)].map(|(before, width)| match call.accumulate {
            true => machine.numbers::<T, _>(&with_gaps(before)),
            false => machine.scratch(rows * (width + GAP)),
        });
    let [mut kept_memory, mut kept_gradient] =
        [(); 2].map(|()| machine.scratch::<T>(rows * shape.ranks()));
    shape
        .forward_by(
            version,
            machine,
            Forward {
                x: machine.input(&x_memory).rows(inputs + GAP),
                weight: machine.input(&weight_memory),
                bias: Some(machine.input(&bias_memory)),
                factors: &factor_inputs(),
                groups: groups(),
                dropout: dropout(),
                y: machine.output(&mut y_memory).rows(outputs + GAP),
                accumulate: call.accumulate,
                kept: machine.output(&mut kept_memory),
            },
        )
        .unwrap_or_else(|error| panic!("{error}"));

    const BEFORE: f32 = 0.5;
    let mut gradient_memories: Vec<_> = factors
        .iter()
        .map(|[a, b]| {
            let sizes = if transposed {
                [b.len(), a.len()]
            } else {
                [a.len(), b.len()]
            };
            sizes.map(|size| machine.upload(&vec![BEFORE; size]))
        })
        .collect();
    let gradients: Vec<_> = gradient_memories
        .iter_mut()
        .map(|[a, b]| FactorGradients {
            a: machine.output(a),
            b: machine.output(b),
        })
        .collect();
    let mut workspace = machine.scratch(shape.workspace::<T>().unwrap());
    shape
        .backward_by(
            version,
            machine,
            Backward {
                x: machine.input(&x_memory).rows(inputs + GAP),
                weight: machine.input(&weight_memory),
                factors: &factor_inputs(),
                groups: groups(),
                dropout: dropout(),
                kept: machine.input(&kept_memory),
                dy: machine.input(&dy_memory).rows(outputs + GAP),
                dx: call
                    .wants_dx
                    .then(|| machine.output(&mut dx_memory).rows(inputs + GAP)),
                accumulate: call.accumulate,
                gradients: &gradients,
                kept_gradient: machine.output(&mut kept_gradient),
                workspace: machine.output(&mut workspace),
            },
        )
        .unwrap_or_else(|error| panic!("{error}"));
    drop(gradients);

    let mut y = Array2::zeros((rows, outputs));
    linear::forward(
        x.view(),
        weight.view(),
        Some(bias.view()),
        0.0,
        y.view_mut(),
    )
    .unwrap();
    let mut dx = Array2::zeros((rows, inputs));
    linear::backward_input(dy.view(), weight.view(), 0.0, dx.view_mut()).unwrap();
    let mut dx_dropped = Array2::zeros((rows, inputs));
    let x_dropped = &x * &kept * f64::from(scale);
    for (p, (adapter, [a, b])) in adapters.iter().zip(&factors).enumerate() {
        let list: Vec<_> = a
            .outer_iter()
            .zip(b.outer_iter())
            .map(|(a, b)| reference::Adapter {
                a,
                b,
                scaling: f64::from(adapter.scaling),
            })
            .collect();
        let pack = reference::Adapters {
            list: &list,
            cu_seqlens: &offsets,
            index: &sets,
        };
        let own = s![.., adapter.output..adapter.output + adapter.outputs];
        let [mut h, mut g] = [(); 2].map(|()| Array2::zeros((rows, adapter.rank)));
        let own_y = y.slice_mut(own);
        reference::forward_adapters(x_dropped.view(), pack, h.view_mut(), own_y).unwrap();
        let [mut da, mut db] = [a, b].map(|x| Array3::zeros(x.raw_dim()));
        reference::backward_adapters(
            x_dropped.view(),
            h.view(),
            pack,
            dy.slice(own),
            g.view_mut(),
            Some(dx_dropped.view_mut()),
            &mut da
                .outer_iter_mut()
                .zip(db.outer_iter_mut())
                .collect::<Vec<_>>(),
        )
        .unwrap();
        // With few rows, elements of g or h can be all but zero: no better than what they are made of.
        let least = [a, b].map(|x| x.iter().map(|x| x * x).sum::<f64>().sqrt());
        let [least_da, least_db] = [least[1] * norm(&dy), least[0] * norm(&x)];
        let found = gradient_memories[p].each_ref().map(|x| machine.download(x));
        let [found_a, found_b] = match (transposed, found) {
            (false, found) => found,
            (true, [a, b]) => [b, a],
        };
        for (name, found, reference, least) in [
            ("A, or transposed B", found_a, da, least_da),
            ("B, or transposed A", found_b, db, least_db),
        ] {
            let reference = each_stored(&reference, transposed) + f64::from(BEFORE);
            assert_near(name, &found, &reference, T::TOLERANCE, 0.1 * least);
        }
    }
    // The mask applies to the adapters' share of dx, its scale as well.
    dx += &(dx_dropped * &kept * f64::from(scale));
    if call.accumulate {
        y += &y_before;
        dx += &dx_before;
    }
    let found = without_gaps(&machine.download(&y_memory), outputs);
    assert_near("y", &found, &y, T::TOLERANCE, norm(&x));
    if call.wants_dx {
        let found = without_gaps(&machine.download(&dx_memory), inputs);
        assert_near("dx", &found, &dx, T::TOLERANCE, norm(&dy));
    }
}

fn calls() -> impl Strategy<Value = Call> {
    let range = (
        1..12_usize,
        prop_oneof![Just(0_usize), 1..20_usize, Just(16), Just(64)],
    );
    (
        prop::collection::vec(prop_oneof![Just(0_usize), 1..20_usize, 60..70_usize], 1..4),
        prop::option::of(1..3_usize),
        1..12_usize,
        prop::collection::vec(range, 1..5),
        any::<[bool; 4]>(),
    )
        .prop_map(
            |(lengths, sets, inputs, ranges, [transposed, dropout, wants_dx, accumulate])| Call {
                lengths,
                sets,
                inputs: 8 * inputs,
                ranges: ranges
                    .into_iter()
                    .map(|(count, rank)| (8 * count, rank))
                    .collect(),
                transposed,
                dropout,
                wants_dx,
                accumulate,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn lora_linear_on_the_host_agrees_with_the_reference(call in calls(), seed: u64) {
        check::<f32>(&host(seed), Version::Portable, &call, seed);
        check::<bf16>(&host(seed), Version::Portable, &call, seed);
        check::<f16>(&host(seed), Version::Portable, &call, seed);
    }
}

#[test]
fn lora_linear_on_a_gpu_agrees_with_the_reference() {
    on_gpu(|device| {
        for (seed, transposed) in [false, true].into_iter().enumerate() {
            for dropout in [false, true] {
                for sets in [None, Some(3)] {
                    let call = Call {
                        lengths: vec![5000, 0, 3, 700],
                        sets,
                        inputs: 520,
                        ranges: vec![(512, 16), (264, 7), (64, 0), (512, 64)],
                        transposed,
                        dropout,
                        wants_dx: true,
                        accumulate: dropout,
                    };
                    check::<f32>(device, Version::Portable, &call, seed as u64);
                    check::<bf16>(device, Version::Portable, &call, seed as u64);
                    check::<f16>(device, Version::Portable, &call, seed as u64);
                    check::<bf16>(device, Version::Hopper, &call, seed as u64);
                    check::<f16>(device, Version::Hopper, &call, seed as u64);
                }
            }
        }
    });
}

const MASKED: Shape<'static> = Shape {
    rows: 3,
    inputs: 72,
    ..SHAPE
};

fn check_mask(machine: &impl Machine) {
    let mask = Mask::new(7, 11, 2, 0.3).unwrap();
    let origins = [5, 900, 0];
    let (step_memory, origins_memory) = (machine.upload(&[mask.step]), machine.upload(&origins));
    let mut keep = machine.scratch(MASKED.keep_words());
    let dropout = elementwise::Dropout {
        mask,
        step: machine.input(&step_memory),
        origins: Some(machine.input(&origins_memory)),
    };
    MASKED
        .draw_keep(machine, dropout, machine.output(&mut keep))
        .unwrap_or_else(|error| panic!("{error}"));
    let found = machine.download(&keep);
    for (row, origin) in origins.into_iter().enumerate() {
        let mut ones = [1.0_f32; 72];
        dropout::apply(mask, origin as u64 * 72, &mut ones).unwrap();
        for (column, one) in ones.into_iter().enumerate() {
            let bit = found[row * 3 + column / 32] >> (column % 32) & 1;
            assert_eq!(bit == 1, one > 0.0, "row {row}, column {column}");
        }
    }
}

#[test]
fn the_mask_of_adapters_on_the_host_is_that_of_the_reference() {
    check_mask(&host(1));
}

#[test]
fn the_mask_of_adapters_on_a_gpu_is_that_of_the_reference() {
    on_gpu(|device| {
        check_mask(device);
    });
}

#[test]
fn masks_of_adapters_of_another_size_are_refused() {
    let dropout = elementwise::Dropout {
        mask: Mask::new(7, 11, 2, 0.3).unwrap(),
        step: tensor(0x10000, 1),
        origins: None,
    };
    assert_refused(
        MASKED.plan_keep(&dropout, &target(0x20000, 8)),
        &["keep has 8 elements, expected 9"],
    );
}

fn check_merge<M: Number, T: Number>(machine: &impl Machine, merge: Merge, seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let Merge {
        rows,
        columns,
        rank,
    } = merge;
    let weight = draw::<M, _>(&mut random, (rows, columns));
    let (a, b) = (
        draw::<M, _>(&mut random, (rank, columns)),
        draw::<M, _>(&mut random, (rows, rank)),
    );
    let mut expected = Array2::zeros(weight.raw_dim());
    let adapter = reference::Adapter {
        a: a.view(),
        b: b.view(),
        scaling: 0.75,
    };
    reference::merge(weight.view(), adapter, expected.view_mut()).unwrap();
    let weight_memory = machine.numbers::<M, _>(&with_gaps(&weight));
    let [a_memory, b_memory] = [&a, &b].map(|x| machine.numbers::<M, _>(x));
    let run = |merge: Merge, a: Input<'_, M>, b: Input<'_, M>| {
        let mut merged = machine.scratch::<T>(rows * columns);
        let tensors = Merging {
            weight: machine.input(&weight_memory).rows(columns + GAP),
            a,
            b,
            scaling: 0.75,
            merged: machine.output(&mut merged).rows(columns),
        };
        merge
            .run(machine, tensors)
            .unwrap_or_else(|error| panic!("{error}"));
        machine.download(&merged)
    };
    let merged = run(merge, machine.input(&a_memory), machine.input(&b_memory));
    assert_near(
        "merged",
        &merged,
        &expected,
        T::TOLERANCE,
        norm(&a) * norm(&b) * 0.1,
    );
    let empty = machine.upload::<M>(&[]);
    let unmerged = run(
        Merge { rank: 0, ..merge },
        machine.input(&empty),
        machine.input(&empty),
    );
    let rounded: Vec<_> = weight.iter().map(|&x| T::round(x)).collect();
    assert_eq!(unmerged, rounded, "unmerging gives the weight");
}

fn check_merges(machine: &impl Machine, merge: Merge, seed: u64) {
    check_merge::<f32, f32>(machine, merge, seed);
    check_merge::<bf16, bf16>(machine, merge, seed);
    check_merge::<f16, f16>(machine, merge, seed);
    check_merge::<f32, bf16>(machine, merge, seed);
    check_merge::<f32, f16>(machine, merge, seed);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn merging_on_the_host_agrees_with_the_reference_and_unmerging_is_exact(
        rows in 1..12_usize, columns in prop_oneof![1..20_usize, 250..260_usize], rank in 1..9_usize, seed: u64,
    ) {
        check_merges(&host(seed), Merge { rows, columns, rank }, seed);
    }
}

#[test]
fn merging_on_a_gpu_agrees_with_the_reference_and_unmerging_is_exact() {
    on_gpu(|device| {
        for (seed, [rows, columns, rank]) in [[1, 1, 1], [300, 520, 16]].into_iter().enumerate() {
            check_merges(
                device,
                Merge {
                    rows,
                    columns,
                    rank,
                },
                seed as u64,
            );
        }
    });
}

const QKV: [Adapter; 3] = {
    const fn third(number: usize) -> Adapter {
        Adapter {
            output: 512 * number,
            outputs: 512,
            rank: 16,
            scaling: 2.0,
        }
    }
    [third(0), third(1), third(2)]
};
const SHAPE: Shape<'static> = Shape {
    rows: 4096,
    inputs: 512,
    outputs: 1536,
    transposed: false,
    adapters: &QKV,
    tasks: None,
};
const ROWS: usize = SHAPE.rows;

fn factors(sets: usize) -> Vec<Factors<'static, bf16>> {
    let each = (0..3).map(|p| Factors {
        a: tensor(0x4000_0000 + 0x10_0000 * p, sets * 16 * 512),
        b: tensor(0x5000_0000 + 0x10_0000 * p, sets * 512 * 16),
    });
    each.collect()
}

fn forward<'a>(factors: &'a [Factors<'a, bf16>]) -> Forward<'a, bf16> {
    Forward {
        x: tensor(0x1000_0000, ROWS * 512).rows(512),
        weight: tensor(0x2000_0000, 512 * 1536),
        bias: None,
        factors,
        groups: None,
        dropout: None,
        y: target(0x3000_0000, ROWS * 1536).rows(1536),
        accumulate: false,
        kept: target(0x6000_0000, ROWS * 48),
    }
}

fn gradients(sets: usize) -> Vec<FactorGradients<'static>> {
    let each = (0..3).map(|p| FactorGradients {
        a: target(0x7000_0000 + 0x10_0000 * p, sets * 16 * 512),
        b: target(0x8000_0000 + 0x10_0000 * p, sets * 512 * 16),
    });
    each.collect()
}

fn backward<'a>(
    factors: &'a [Factors<'a, bf16>],
    gradients: &'a [FactorGradients<'a>],
) -> Backward<'a, bf16> {
    Backward {
        x: tensor(0x1000_0000, ROWS * 512).rows(512),
        weight: tensor(0x2000_0000, 512 * 1536),
        factors,
        groups: None,
        dropout: None,
        kept: tensor(0x6000_0000, ROWS * 48),
        dy: tensor(0x3000_0000, ROWS * 1536).rows(1536),
        dx: Some(target(0x9000_0000, ROWS * 512).rows(512)),
        accumulate: false,
        gradients,
        kept_gradient: target(0xa000_0000, ROWS * 48),
        workspace: target(0xb000_0000, SHAPE.workspace::<bf16>().unwrap()),
    }
}

#[test]
fn the_plan_of_lora_linear_covers_all_tiles() {
    let factors = factors(1);
    let tensors = forward(&factors);
    let launch = SHAPE.plan_forward(&tensors).unwrap();
    assert_eq!(
        (launch.family(), launch.kernel()),
        ("lora_linear", "lora_linear_wide_bf16")
    );
    // Each third is two tiles of 256 columns.
    assert_eq!((launch.grid(), launch.block()), ([6, 32, 1], [256, 1, 1]));
    assert_eq!(launch.shared_bytes(), 3 * 32768);
    let first = [Arg::I32(512), Arg::I32(512), Arg::I32(16), Arg::F32(2.0)];
    assert_eq!(launch.args()[12..16], first);

    let gradients = gradients(1);
    let tensors = backward(&factors, &gradients);
    let [dx, partial, add] = SHAPE.plan_backward(&tensors).unwrap().map(Option::unwrap);
    // Two columns of wide tiles in 32 rows are too few blocks.
    assert_eq!(dx.kernel(), "lora_linear_transposed_small_bf16");
    assert_eq!((dx.grid(), dx.shared_bytes()), ([8, 64, 1], 3 * 12800));
    // 4 tiles of x and 12 of dy, 264 blocks.
    assert_eq!(
        (partial.kernel(), partial.grid()),
        ("lora_linear_factors_bf16", [16, 17, 1])
    );
    let elements = 3 * 16 * (512 + 512);
    assert_eq!(
        (add.kernel(), add.grid()),
        ("lora_linear_add", [elements / 256, 1, 1])
    );
    assert_eq!(SHAPE.workspace::<bf16>().unwrap(), 17 * elements as usize);

    let transposed = Shape {
        transposed: true,
        ..SHAPE
    };
    let tensors = forward(&factors);
    let launch = transposed.plan_forward(&tensors).unwrap();
    assert_eq!(launch.kernel(), "lora_linear_transposed_wide_bf16");
    // Its B leads in, its A leads out.
    assert_eq!(
        launch.args()[4..6],
        [
            Arg::Input(factors[0].b.span()),
            Arg::Input(factors[0].a.span())
        ]
    );
    let empty = Shape { rows: 0, ..SHAPE };
    let tensors = Forward {
        x: tensor(0x1000_0000, 0).rows(512),
        y: target(0x3000_0000, 0).rows(1536),
        kept: target(0x6000_0000, 0),
        ..forward(&factors)
    };
    assert!(empty.plan_forward(&tensors).unwrap().is_empty());
}

#[test]
fn the_version_for_hopper_is_planned_for_wide_tiles_without_dropout() {
    let factors = factors(1);
    let tensors = forward(&factors);
    let plan = |shape: &Shape<'_>| {
        [Version::Portable, Version::Hopper]
            .map(|version| shape.plan_forward_by(version, &tensors).unwrap())
    };
    let [portable, hopper] = plan(&SHAPE);
    assert_eq!(
        (hopper.family(), hopper.kernel()),
        ("lora_hopper", "lora_linear_hopper_16_bf16")
    );
    assert_eq!(
        (hopper.grid(), hopper.block(), hopper.args()),
        (portable.grid(), portable.block(), portable.args())
    );
    assert_eq!(hopper.shared_bytes(), 4 * 57344);
    assert!(hopper.is_for_hopper() && !portable.is_for_hopper());
    let [_, transposed] = plan(&Shape {
        transposed: true,
        ..SHAPE
    });
    assert_eq!(transposed.kernel(), "lora_linear_transposed_hopper_16_bf16");

    let with_dropout = Forward {
        dropout: Some(Dropout {
            keep: tensor(0xe000_0000, ROWS * 512 / 32),
            scale: KEEP_SCALE,
        }),
        ..forward(&factors)
    };
    let launch = SHAPE.plan_forward_by(Version::Hopper, &with_dropout);
    assert_eq!(launch.unwrap().kernel(), "lora_linear_wide_bf16");
    let gradients = gradients(1);
    let tensors = backward(&factors, &gradients);
    assert_eq!(
        SHAPE.plan_backward_by(Version::Hopper, &tensors).unwrap(),
        SHAPE.plan_backward(&tensors).unwrap()
    );
}

#[test]
fn groups_of_any_lengths_have_tiles() {
    let shape = Shape {
        tasks: Some(Tasks {
            groups: 100,
            sets: 4,
        }),
        ..SHAPE
    };
    let factors = factors(4);
    let tensors = Forward {
        groups: Some(Groups {
            offsets: tensor(0xc000_0000, 101),
            sets: tensor(0xd000_0000, 100),
        }),
        ..forward(&factors)
    };
    let launch = shape.plan_forward(&tensors).unwrap();
    // Groups of 41 rows do not fill wide tiles.
    assert_eq!(launch.kernel(), "lora_linear_small_bf16");
    assert_eq!(launch.grid(), [24, 4096 / 64 + 100, 1]);
    assert_refused(
        shape.plan_forward(&forward(&factors)),
        &["groups is not given, expected given"],
    );
}

#[test]
fn maps_beyond_the_kernels_are_refused() {
    let refused = |shape: Shape<'_>, parts: &[&str]| {
        assert_refused(shape.validate::<bf16>(), parts);
        assert_refused(shape.workspace::<bf16>(), parts);
    };
    refused(Shape { inputs: 0, ..SHAPE }, &["inputs is 0"]);
    refused(
        Shape {
            inputs: 12,
            ..SHAPE
        },
        &["inputs is 12", "a multiple of 8"],
    );
    refused(
        Shape {
            outputs: 1540,
            ..SHAPE
        },
        &["outputs is 1540"],
    );
    refused(
        Shape {
            rows: 65535 * 64 + 1,
            ..SHAPE
        },
        &["rows is 4194241", "at most 65535 tiles"],
    );
    for (index, adapter, part) in [
        (
            0,
            Adapter { rank: 0, ..QKV[0] },
            "rank is 0, expected 1 to 64",
        ),
        (0, Adapter { rank: 65, ..QKV[0] }, "rank is 65"),
        (
            0,
            Adapter {
                outputs: 520,
                ..QKV[0]
            },
            "outputs 512 to 1024, expected multiples of 8 from 520",
        ),
        (
            1,
            Adapter {
                output: 516,
                ..QKV[1]
            },
            "outputs 516 to 1028",
        ),
        (
            2,
            Adapter {
                output: 1032,
                ..QKV[2]
            },
            "outputs 1032 to 1544",
        ),
        (
            2,
            Adapter {
                outputs: 0,
                ..QKV[2]
            },
            "outputs 1024 to 1024",
        ),
        (
            2,
            Adapter {
                scaling: f32::NAN,
                ..QKV[2]
            },
            "scaling is NaN",
        ),
    ] {
        let mut adapters = QKV;
        adapters[index] = adapter;
        refused(
            Shape {
                adapters: &adapters,
                ..SHAPE
            },
            &[part],
        );
    }
    let adapters = [Adapter {
        outputs: 8,
        ..QKV[0]
    }; 5];
    refused(
        Shape {
            adapters: &adapters,
            ..SHAPE
        },
        &["adapters is 5, expected at most 4"],
    );
    let tasks = Some(Tasks { groups: 1, sets: 0 });
    refused(Shape { tasks, ..SHAPE }, &["0 sets for 1 groups"]);
}

#[test]
fn tensors_of_lora_linear_that_do_not_fit_are_refused() {
    let factors = factors(1);
    let refused = |tensors: Forward<'_, bf16>, parts: &[&str]| {
        assert_refused(SHAPE.plan_forward(&tensors), parts);
    };
    let base = || forward(&factors);
    refused(
        Forward {
            weight: tensor(0x2000_0000, 512 * 1535),
            ..base()
        },
        &["weight has 785920 elements, expected 786432"],
    );
    refused(
        Forward {
            weight: tensor(0x2000_0008, 512 * 1536),
            ..base()
        },
        &["weight begins at"],
    );
    refused(
        Forward {
            x: tensor(0x1000_0000, ROWS * 516).rows(516),
            ..base()
        },
        &["x is", "516"],
    );
    refused(
        Forward {
            factors: &factors[..2],
            ..base()
        },
        &["factors has 2 elements, expected 3"],
    );
    refused(
        Forward {
            kept: target(0x6000_0000, ROWS * 47),
            ..base()
        },
        &["kept has"],
    );
    refused(
        Forward {
            y: target(0x1000_0000, ROWS * 1536).rows(1536),
            ..base()
        },
        &["y and x overlap"],
    );
    refused(
        Forward {
            bias: Some(tensor(0xe000_0000, 1535)),
            ..base()
        },
        &["bias has 1535 elements, expected 1536"],
    );
    let keep = |len, scale| {
        Some(Dropout {
            keep: tensor(0xe000_0000, len),
            scale,
        })
    };
    refused(
        Forward {
            dropout: keep(ROWS * 15, 1.0),
            ..base()
        },
        &["keep has"],
    );
    refused(
        Forward {
            dropout: keep(ROWS * 16, f32::INFINITY),
            ..base()
        },
        &["scale is inf"],
    );
    let groups = Some(Groups {
        offsets: tensor(0xc000_0000, 2),
        sets: tensor(0xd000_0000, 1),
    });
    refused(
        Forward { groups, ..base() },
        &["groups is given, expected not given"],
    );

    let gradients = gradients(1);
    let refused = |tensors: Backward<'_, bf16>, parts: &[&str]| {
        assert_refused(SHAPE.plan_backward(&tensors), parts);
    };
    let base = || backward(&factors, &gradients);
    refused(
        Backward {
            gradients: &gradients[..1],
            ..base()
        },
        &["gradients has 1 elements, expected 3"],
    );
    refused(
        Backward {
            workspace: target(0xb000_0000, 100),
            ..base()
        },
        &["workspace has 100 elements, expected at least"],
    );
    refused(
        Backward {
            kept_gradient: target(0x6000_0000, ROWS * 48),
            ..base()
        },
        &["kept_gradient and kept overlap"],
    );
    refused(
        Backward {
            dx: Some(target(0x3000_0000, ROWS * 512).rows(512)),
            ..base()
        },
        &["dx and dy overlap"],
    );
}

#[test]
fn merges_beyond_the_kernels_are_refused() {
    let merge = Merge {
        rows: 8,
        columns: 16,
        rank: 4,
    };
    fn tensors<M, T>() -> Merging<'static, M, T> {
        Merging {
            weight: tensor(0x10000, 8 * 16).rows(16),
            a: tensor(0x20000, 4 * 16),
            b: tensor(0x30000, 8 * 4),
            scaling: 1.0,
            merged: target(0x40000, 8 * 16).rows(16),
        }
    }
    assert_refused(
        Merge { rows: 0, ..merge }.validate(),
        &["rows is 0", "1 to 65535"],
    );
    assert_refused(
        Merge {
            columns: 0,
            ..merge
        }
        .validate(),
        &["columns is 0"],
    );
    assert_refused(
        merge.plan(&tensors::<bf16, f32>()),
        &["weight is Bf16, expected F32 or F32"],
    );
    let over_weight = Merging {
        merged: target(0x10000, 8 * 16).rows(16),
        ..tensors::<f32, f32>()
    };
    assert_refused(merge.plan(&over_weight), &["merged and weight overlap"]);
    let short = Merging {
        b: tensor(0x30000, 8 * 3),
        ..tensors::<f32, bf16>()
    };
    assert_refused(merge.plan(&short), &["b has 24 elements, expected 32"]);
}
