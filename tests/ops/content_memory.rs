use dtmem::ops::content_memory::{
    Addressing, Backward, ContentMemory, Erase, Forward, Inputs, Order, Shape, Strength,
};
use dtmem::ops::{Error, Result, Version};
use dtmem_reference::content_memory as reference;
use half::{bf16, f16};
use ndarray::{Array1, Array2, Array3, Axis, concatenate, s};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

use crate::common::{Number, assert_near, assert_refused, draw, target, tensor};
use crate::machines::{Machine, host, on_gpu};

/// The four choices from the bits of a number.
fn variant(bits: usize, width: usize, top_k: Option<usize>) -> ContentMemory {
    ContentMemory {
        addressing: [Addressing::Cosine, Addressing::Dot][bits & 1],
        strength: [Strength::Sigmoid, Strength::Softmax][bits >> 1 & 1],
        erase: [Erase::Coupled, Erase::Paper][bits >> 2 & 1],
        order: [Order::ReadThenWrite, Order::WriteThenRead][bits >> 3 & 1],
        top_k,
        scale: f64::from(1.0 / (width as f32).sqrt()),
        epsilon: f64::from(0.1_f32),
    }
}

/// Columns behind keys and values: a multiple of 16 bytes where rows are.
fn gap(width: usize) -> usize {
    if width.is_multiple_of(16) { 8 } else { 3 }
}

fn norm<'a>(x: impl IntoIterator<Item = &'a f64>) -> f64 {
    x.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn check<T: Number>(
    machine: &impl Machine,
    variant: &ContentMemory,
    lengths: &[usize],
    [slots, key_width, width]: [usize; 3],
    seed: u64,
) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let sequences = lengths.len();
    let tokens = lengths.iter().sum();
    let mut offsets = vec![0_i32];
    for &length in lengths {
        offsets.push(offsets[offsets.len() - 1] + length as i32);
    }
    let shape = Shape {
        sequences,
        tokens,
        longest: lengths.iter().copied().max().unwrap_or(0) + seed as usize % 3, // it may be more
        slots,
        key_width,
        width,
        variant: *variant,
    };
    shape.validate_offsets(&offsets).unwrap();
    let [cosine, sigmoid] = [
        variant.addressing == Addressing::Cosine,
        variant.strength == Strength::Sigmoid,
    ];
    let [memory, grad_memory_next]: [Array3<f64>; 2] =
        [(); 2].map(|()| draw::<T, _>(&mut random, (sequences, slots, width)));
    let [address_key, strength_key]: [Array2<f64>; 2] =
        [(); 2].map(|()| draw::<T, _>(&mut random, (tokens, key_width)));
    let [value, grad_read]: [Array2<f64>; 2] =
        [(); 2].map(|()| draw::<T, _>(&mut random, (tokens, width)));
    let key_strength = draw::<T, _>(&mut random, tokens).map(|x| T::round(1.0 + x.abs()).widen());
    let bias = f64::from(random.random::<f32>());
    const BIAS_BEFORE: f32 = 0.75;

    // a, s and v are columns of one matrix, as are their gradients.
    let stride = 2 * key_width + width + gap(width);
    let widths = [key_width, key_width, width];
    let columns = [0, 1, 2].map(|n| n * key_width..n * key_width + widths[n]);
    let mut fused = Array2::from_elem((tokens, stride), f64::NAN);
    for (columns, part) in columns.iter().zip([&address_key, &strength_key, &value]) {
        fused.slice_mut(s![.., columns.clone()]).assign(part);
    }
    let [memory_memory, grad_memory_next_memory] =
        [&memory, &grad_memory_next].map(|x| machine.numbers::<T, _>(x));
    let [fused, grad_read_memory] = [&fused, &grad_read].map(|x| machine.numbers::<T, _>(x));
    let key_strength_memory = machine.numbers::<T, _>(&key_strength);
    let bias_memory = machine.upload(&[bias as f32]);
    let cu_seqlens = machine.upload(&offsets);
    let inputs = || {
        let [address_key, strength_key, value] = machine.input(&fused).rows(stride).columns(widths);
        Inputs {
            memory: machine.input(&memory_memory),
            address_key,
            strength_key,
            value,
            key_strength: cosine.then(|| machine.input(&key_strength_memory)),
            strength_bias: sigmoid.then(|| machine.input(&bias_memory)),
            cu_seqlens: machine.input(&cu_seqlens),
        }
    };

    let outputs = [Version::Hopper, Version::Portable].map(|version| {
        let mut memory_next = machine.scratch::<T>(memory.len());
        let mut read = machine.scratch::<T>(value.len());
        let mut workspace = machine.scratch(shape.forward_workspace::<T>().unwrap());
        let forward = Forward {
            inputs: inputs(),
            memory_next: machine.output(&mut memory_next),
            read: machine.output(&mut read),
            workspace: machine.output(&mut workspace),
        };
        let done = shape.forward_by(version, machine, forward);
        done.unwrap_or_else(|error| panic!("{error}"));
        (machine.download(&memory_next), machine.download(&read))
    });

    let gradients = [Version::Hopper, Version::Portable].map(|version| {
        let mut d_memory = machine.scratch::<T>(memory.len());
        let mut d_fused = machine.scratch::<T>(tokens * stride);
        let mut d_key_strength = machine.scratch::<T>(tokens);
        let mut d_bias = machine.upload(&[BIAS_BEFORE]);
        let mut workspace = machine.scratch(shape.backward_workspace().unwrap());
        let [d_address_key, d_strength_key, d_value] =
            machine.output(&mut d_fused).rows(stride).columns(widths);
        let backward = Backward {
            inputs: inputs(),
            grad_memory_next: machine.input(&grad_memory_next_memory),
            grad_read: machine.input(&grad_read_memory),
            d_memory: machine.output(&mut d_memory),
            d_address_key,
            d_strength_key,
            d_value,
            d_key_strength: cosine.then(|| machine.output(&mut d_key_strength)),
            d_strength_bias: sigmoid.then(|| machine.output(&mut d_bias)),
            workspace: machine.output(&mut workspace),
        };
        let done = shape.backward_by(version, machine, backward);
        done.unwrap_or_else(|error| panic!("{error}"));
        (
            machine.download(&d_memory),
            machine.download(&d_fused),
            machine.download(&d_key_strength),
            machine.download(&d_bias),
        )
    });

    // The reference, sequence by sequence.
    let mut next = Array3::from_elem(memory.dim(), f64::NAN);
    let mut y = Array2::from_elem(value.dim(), f64::NAN);
    let mut expected_memory = next.clone();
    let mut expected = widths.map(|width| Array2::from_elem((tokens, width), f64::NAN));
    let mut expected_key_strength = Array1::from_elem(tokens, f64::NAN);
    let mut expected_bias = f64::from(BIAS_BEFORE);
    for (b, ends) in offsets.windows(2).enumerate() {
        let tokens = ends[0] as usize..ends[1] as usize;
        let rows = s![tokens.clone(), ..];
        let inputs = reference::Inputs {
            memory: memory.index_axis(Axis(0), b),
            address_key: address_key.slice(rows),
            strength_key: strength_key.slice(rows),
            value: value.slice(rows),
            key_strength: cosine.then(|| key_strength.slice(s![tokens.clone()])),
            strength_bias: bias,
        };
        let scratch = &mut Vec::new();
        let next = next.index_axis_mut(Axis(0), b);
        variant
            .forward(inputs, next, y.slice_mut(rows), scratch)
            .unwrap();
        let mut of_bias = 0.0;
        let [address_key, strength_key, value] = expected.each_mut().map(|x| x.slice_mut(rows));
        let gradients = reference::Gradients {
            memory: expected_memory.index_axis_mut(Axis(0), b),
            address_key,
            strength_key,
            value,
            key_strength: cosine.then(|| expected_key_strength.slice_mut(s![tokens.clone()])),
            strength_bias: &mut of_bias,
        };
        let grad_next = grad_memory_next.index_axis(Axis(0), b);
        variant
            .backward(inputs, grad_next, grad_read.slice(rows), gradients, scratch)
            .unwrap();
        expected_bias += of_bias;
    }

    let near = |name, found: Vec<T>, expected: &Array2<f64>, scale| {
        assert_near(name, &found, expected, T::TOLERANCE, scale);
    };
    let flat = |x: &Array3<f64>| x.to_shape((sequences * slots, width)).unwrap().to_owned();
    for (memory_next, read) in outputs {
        near("memory_next", memory_next, &flat(&next), 0.0);
        near("read", read, &y, 0.0);
    }
    // What passes through a softmax may cancel: it has the size of the gradients that arrive.
    let arriving = norm(grad_memory_next.iter().chain(&grad_read));
    let expected_bias = Array1::from_elem(1, expected_bias);
    for (d_memory, d_fused, d_key_strength, d_bias) in gradients {
        near("d_memory", d_memory, &flat(&expected_memory), 0.0);
        for (n, (name, scale)) in [("a", arriving), ("s", arriving), ("v", 0.0)]
            .into_iter()
            .enumerate()
        {
            let rows = d_fused.chunks_exact(stride);
            let found = rows
                .flat_map(|row| row[columns[n].clone()].to_vec())
                .collect();
            near(name, found, &expected[n], scale);
        }
        if cosine {
            let (found, expected) = (&d_key_strength, &expected_key_strength);
            assert_near("key_strength", found, expected, T::TOLERANCE, arriving);
        }
        assert_near(
            "strength_bias",
            &d_bias,
            &expected_bias,
            T::TOLERANCE,
            arriving,
        );
    }
}

fn check_all_types(
    machine: &impl Machine,
    variant: &ContentMemory,
    lengths: &[usize],
    sizes: [usize; 3],
    seed: u64,
) {
    check::<f32>(machine, variant, lengths, sizes, seed);
    check::<bf16>(machine, variant, lengths, sizes, seed);
    check::<f16>(machine, variant, lengths, sizes, seed);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn content_memory_on_the_host_agrees_with_the_reference(
        lengths in prop_oneof![
            3 => prop::collection::vec(0..6_usize, 1..4),
            1 => prop::collection::vec(55..70_usize, 1),
        ],
        slots in prop_oneof![1..20_usize, 60..140_usize],
        width in prop_oneof![1..20_usize, Just(16), Just(32), Just(80)],
        carried in prop_oneof![2 => Just(0), 1 => 1..20_usize, 1 => Just(16), 1 => 60..90_usize],
        bits in 0..16_usize,
        seed: u64,
    ) {
        let sizes = [slots, width, width + carried];
        check_all_types(&host(seed), &variant(bits, width, None), &lengths, sizes, seed);
    }

    // What the kernel for clusters takes: blocks without a slot, and with six groups of them.
    #[test]
    fn gradients_by_clusters_agree_with_the_reference(
        lengths in prop_oneof![
            2 => prop::collection::vec(0..20_usize, 1..4),
            1 => prop::collection::vec(30..65_usize, 1),
        ],
        slots in prop_oneof![4 => 1..40_usize, 4 => 60..180_usize, 1 => 1030..1300_usize],
        key_columns in 1..4_usize,
        carried in prop_oneof![Just(0), 1..4_usize],
        bits in 0..8_usize,
        seed: u64,
    ) {
        let width = 16 * key_columns;
        let sizes = [slots, width, width + 16 * carried];
        let variant = variant(bits, width, None);
        check::<bf16>(&host(seed), &variant, &lengths, sizes, seed);
        check::<f16>(&host(seed), &variant, &lengths, sizes, seed);
    }

    // Scores of one type only: a narrower one may rightly keep another slot.
    #[test]
    fn the_best_slots_on_the_host_agree_with_the_reference(
        lengths in prop::collection::vec(0..6_usize, 1..3),
        slots in 1..20_usize,
        k in 1..25_usize,
        carried in 0..3_usize,
        bits in 0..16_usize,
        seed: u64,
    ) {
        let sizes = [slots, 16, 16 + carried];
        check::<f32>(&host(seed), &variant(bits, 16, Some(k)), &lengths, sizes, seed);
    }
}

#[test]
fn content_memory_on_a_gpu_agrees_with_the_reference() {
    on_gpu(|device| {
        for bits in 0..16 {
            for (lengths, sizes) in [
                (vec![39, 39, 1], [1290, 512, 512]),
                (vec![39, 39, 1], [1290, 512, 528]),
                (vec![1], [64, 33, 33]),
                (vec![70, 100], [200, 64, 64]),
                (vec![70, 100], [200, 64, 72]),
                (vec![64], [4096, 1024, 1024]),
            ] {
                let variant = variant(bits, sizes[1], None);
                check_all_types(device, &variant, &lengths, sizes, bits as u64);
            }
        }
    });
}

const SHAPE: Shape = Shape {
    sequences: 3,
    tokens: 20,
    longest: 10,
    slots: 100,
    key_width: 32,
    width: 32,
    variant: ContentMemory {
        addressing: Addressing::Cosine,
        strength: Strength::Sigmoid,
        erase: Erase::Coupled,
        order: Order::ReadThenWrite,
        top_k: None,
        scale: 0.5,
        epsilon: 1e-6,
    },
};
const MEMORY: usize = 3 * 100 * 32;
const ROWS: usize = 20 * 32;

fn inputs<T>() -> Inputs<'static, T> {
    Inputs {
        memory: tensor(0x10000, MEMORY),
        address_key: tensor(0x20000, ROWS).rows(32),
        strength_key: tensor(0x30000, ROWS).rows(32),
        value: tensor(0x40000, ROWS).rows(32),
        key_strength: Some(tensor(0x50000, 20)),
        strength_bias: Some(tensor(0x50100, 1)),
        cu_seqlens: tensor(0x50200, 4),
    }
}

fn forward<T: Number>() -> Forward<'static, T> {
    Forward {
        inputs: inputs(),
        memory_next: target(0x60000, MEMORY),
        read: target(0x70000, ROWS),
        workspace: target(0x100000, SHAPE.forward_workspace::<T>().unwrap()),
    }
}

fn backward() -> Backward<'static, bf16> {
    Backward {
        inputs: inputs(),
        grad_memory_next: tensor(0x60000, MEMORY),
        grad_read: tensor(0x70000, ROWS),
        d_memory: target(0x80000, MEMORY),
        d_address_key: target(0x90000, ROWS).rows(32),
        d_strength_key: target(0xa0000, ROWS).rows(32),
        d_value: target(0xb0000, ROWS).rows(32),
        d_key_strength: Some(target(0xc0000, 20)),
        d_strength_bias: Some(target(0xc0100, 1)),
        workspace: target(0x100000, SHAPE.backward_workspace().unwrap()),
    }
}

fn names<const N: usize>(plan: Result<[Option<dtmem::ops::Launch<'_>>; N]>) -> Vec<&'static str> {
    let plan = plan.unwrap_or_else(|error| panic!("{error}"));
    plan.iter()
        .flatten()
        .map(|launch| launch.kernel())
        .collect()
}

#[test]
fn short_segments_of_narrow_types_have_kernels_of_their_own() {
    let long = Shape {
        longest: 65,
        ..SHAPE
    };
    let odd = Shape {
        key_width: 33,
        width: 33,
        ..SHAPE
    };
    let [wide, ragged] = [48, 40].map(|width| Shape { width, ..SHAPE });
    let chosen = |top_k| Shape {
        variant: ContentMemory {
            top_k,
            ..SHAPE.variant
        },
        ..SHAPE
    };
    assert!(SHAPE.vectors::<bf16>() && SHAPE.vectors::<f16>() && !SHAPE.vectors::<f32>());
    assert!(!long.vectors::<bf16>() && !odd.vectors::<bf16>());
    assert!(wide.vectors::<bf16>() && !ragged.vectors::<bf16>());
    assert!(!chosen(Some(99)).vectors::<bf16>() && chosen(Some(100)).vectors::<bf16>());

    let tensors = forward::<bf16>();
    let plan = SHAPE.plan_forward(&tensors).unwrap();
    let [scores, update, read, none] = plan;
    assert!(none.is_none());
    let [scores, update, read] = [scores, update, read].map(Option::unwrap);
    assert_eq!(
        (scores.family(), scores.kernel()),
        ("content_memory_short", "content_memory_short_scores_bf16")
    );
    // 100 slots are two tiles of 96.
    assert_eq!(
        (scores.grid(), scores.shared_bytes()),
        ([2, 3, 1], 96 * 400 + 16 * 864)
    );
    assert_eq!(
        (update.grid(), update.shared_bytes()),
        ([2, 3, 1], 96 * (128 + 16 + 64 + 32) + 16 * 384)
    );
    assert_eq!(read.grid(), [1, 3, 1]);

    let tensors = forward::<f32>();
    assert_eq!(
        names(SHAPE.plan_forward(&tensors)),
        ["scores", "address", "write", "read"].map(|name| format!("content_memory_{name}_f32"))
    );
}

#[test]
fn memories_that_fit_into_shared_memory_are_one_launch_of_clusters() {
    let plan = |shape: Shape| {
        let workspace = shape.forward_workspace::<bf16>().unwrap();
        let size = shape.sequences * shape.slots * shape.width;
        let mut tensors = Forward {
            memory_next: target(0x10_0000_0000, size),
            read: target(0x20_0000_0000, shape.tokens * shape.width),
            workspace: target(0x30_0000_0000, workspace),
            ..forward::<bf16>()
        };
        tensors.inputs.memory = tensor(0x40_0000_0000, size);
        let rows = |at| tensor(at, shape.tokens * shape.width).rows(shape.width);
        tensors.inputs.address_key = rows(0x50_0000_0000);
        tensors.inputs.strength_key = rows(0x60_0000_0000);
        tensors.inputs.value = rows(0x70_0000_0000);
        let plan = shape.plan_forward_by(Version::Hopper, &tensors).unwrap();
        let launch = plan[0].unwrap();
        let by_cluster = launch.kernel() == "content_memory_short_cluster_bf16";
        by_cluster.then(|| {
            assert_eq!(plan.iter().flatten().count(), 1);
            assert_eq!(launch.grid(), [launch.cluster(), 3, 1]);
            (launch.cluster(), launch.shared_bytes())
        })
    };
    let shape = Shape {
        longest: 39,
        slots: 1290,
        key_width: 512,
        width: 512,
        ..SHAPE
    };
    // 81 slots of a block, in 96 rows.
    let bytes = 96 * (1024 + 16 + 192 + 32) + 48 * 1408;
    assert_eq!(plan(shape), Some((16, bytes)));
    let slots = |slots| plan(Shape { slots, ..shape }).map(|(cluster, _)| cluster);
    assert_eq!(
        [1, 31, 100, 1536, 1537, 4096].map(slots),
        [Some(2), Some(2), Some(8), Some(16), None, None]
    );
    assert_eq!(
        plan(Shape {
            key_width: 1024,
            width: 1024,
            ..shape
        }),
        None
    );
    assert_eq!(
        plan(Shape {
            longest: 65,
            ..shape
        }),
        None
    );
}

#[test]
fn gradients_of_memories_that_fit_into_shared_memory_are_one_launch_of_clusters() {
    let plan = |shape: Shape, offset: u64| {
        let (memory, rows) = (
            shape.sequences * shape.slots * shape.width,
            shape.tokens * shape.width,
        );
        let place = |n: u64| n << 36;
        let read = |n| tensor(place(n), rows).rows(shape.width);
        let written = |n| target(place(n), rows).rows(shape.width);
        let mut tensors = Backward {
            grad_memory_next: tensor(place(1), memory),
            grad_read: tensor(place(2), rows),
            d_memory: target(place(3) + offset, memory),
            d_address_key: written(4),
            d_strength_key: written(5),
            d_value: written(6),
            workspace: target(place(7), shape.backward_workspace().unwrap()),
            ..backward()
        };
        tensors.inputs.memory = tensor(place(8), memory);
        tensors.inputs.address_key = read(9);
        tensors.inputs.strength_key = read(10);
        tensors.inputs.value = read(11);
        let plan = shape.plan_backward_by(Version::Hopper, &tensors).unwrap();
        let launch = plan[0].unwrap();
        let by_cluster = launch.kernel() == "content_memory_short_backward_bf16";
        by_cluster.then(|| {
            let rest = plan[1..].iter().flatten();
            let rest: Vec<_> = rest
                .map(|launch| (launch.kernel(), launch.grid()))
                .collect();
            assert_eq!(rest, [("content_memory_sums_bf16", [1, 1, 1])]);
            assert_eq!(launch.grid(), [launch.cluster(), 3, 1]);
            (launch.cluster(), launch.shared_bytes())
        })
    };
    let shape = Shape {
        longest: 39,
        slots: 1290,
        key_width: 512,
        width: 512,
        ..SHAPE
    };
    // 81 slots of a block, in 96 rows of the matrices.
    let (memory, factors, chunks) = (81 * (1024 + 16), 96 * 12 * 56, 160 * (3 * 48 + 96));
    let bytes = memory + factors + chunks + 128 * 16 * 9;
    assert_eq!(plan(shape, 0), Some((16, bytes)));
    assert_eq!(plan(shape, 8), None);
    assert_eq!(
        plan(
            Shape {
                longest: 49,
                ..shape
            },
            0
        ),
        None
    );
    let slots = 1024;
    assert!(
        plan(
            Shape {
                longest: 64,
                slots,
                ..shape
            },
            0
        )
        .is_some()
    );
    let variant = ContentMemory {
        order: Order::WriteThenRead,
        ..shape.variant
    };
    assert_eq!(plan(Shape { variant, ..shape }, 0), None);
}

#[test]
fn no_tile_of_short_segments_needs_more_shared_memory_than_every_gpu_has() {
    for longest in [1, 16, 39, 64] {
        for width in (16..=1024).step_by(16) {
            let shape = Shape {
                longest,
                key_width: width,
                width,
                sequences: 0,
                tokens: 0,
                slots: 1290,
                ..SHAPE
            };
            assert!(shape.vectors::<bf16>(), "{longest} {width}");
        }
    }
}

#[test]
fn the_plan_of_the_backward_pass_has_what_the_variant_needs() {
    let tensors = backward();
    let plan = SHAPE.plan_backward(&tensors).unwrap();
    assert_eq!(
        plan.map(|launch| launch
            .map(|launch| (launch.kernel(), launch.grid()))
            .unwrap()),
        [
            ("content_memory_scores_bf16", [2, 1, 3]),
            ("content_memory_address_bf16", [10, 3, 1]),
            ("content_memory_slots", [2, 3, 1]),
            ("content_memory_coefficients_bf16", [2, 3, 1]),
            // Both tiles of the slots to themselves: there are few blocks.
            ("content_memory_gradients_bf16", [1, 2, 3]),
            // A block for each token of a sequence, and one for the bias.
            ("content_memory_sums_bf16", [11, 3, 1]),
        ]
    );
    let shape = Shape {
        variant: ContentMemory {
            order: Order::WriteThenRead,
            strength: Strength::Softmax,
            ..SHAPE.variant
        },
        ..SHAPE
    };
    let mut tensors = Backward {
        d_strength_bias: None,
        workspace: target(0x100000, shape.backward_workspace().unwrap()),
        ..backward()
    };
    tensors.inputs.strength_bias = None;
    let plan = shape.plan_backward(&tensors).unwrap();
    // Blocks more for the products of tokens with tokens.
    assert_eq!(
        plan.map(|launch| launch.unwrap().grid()),
        [
            [3, 1, 3],
            [10, 3, 1],
            [2, 3, 1],
            [3, 3, 1],
            [1, 2, 3],
            [10, 3, 1]
        ]
    );
}

#[test]
fn shapes_beyond_the_memory_kernels_are_refused() {
    let with = |variant| Shape { variant, ..SHAPE };
    let variant = SHAPE.variant;
    for (shape, parts) in [
        (
            Shape {
                sequences: 65536,
                ..SHAPE
            },
            ["sequences is 65536", "0 to 65535"],
        ),
        (
            Shape {
                tokens: usize::MAX,
                ..SHAPE
            },
            ["tokens is", "0 to"],
        ),
        (
            Shape {
                longest: 65537,
                ..SHAPE
            },
            ["longest is 65537", "0 to 65536"],
        ),
        (Shape { slots: 0, ..SHAPE }, ["slots is 0", "1 to 4096"]),
        (
            Shape {
                slots: 4097,
                ..SHAPE
            },
            ["slots is 4097", "1 to 4096"],
        ),
        (
            Shape {
                key_width: 0,
                ..SHAPE
            },
            ["key_width is 0", "1 to 1024"],
        ),
        (
            Shape {
                key_width: 1025,
                ..SHAPE
            },
            ["key_width is 1025", "1 to 1024"],
        ),
        (Shape { width: 31, ..SHAPE }, ["width is 31", "32 to 65536"]),
        (
            Shape {
                width: 65537,
                ..SHAPE
            },
            ["width is 65537", "32 to 65536"],
        ),
        (
            with(ContentMemory {
                top_k: Some(0),
                ..variant
            }),
            ["top_k is 0", "at least 1"],
        ),
        (
            with(ContentMemory {
                scale: f64::NAN,
                ..variant
            }),
            ["scale is NaN", "finite"],
        ),
        (
            with(ContentMemory {
                epsilon: 0.0,
                ..variant
            }),
            ["epsilon is 0", "positive"],
        ),
    ] {
        assert_refused(shape.validate(), &parts);
        assert_refused(shape.forward_workspace::<f32>(), &parts);
        assert_refused(shape.plan_forward(&forward::<bf16>()), &parts);
        assert_refused(shape.plan_backward(&backward()), &parts);
    }
    with(ContentMemory {
        epsilon: 0.0,
        addressing: Addressing::Dot,
        ..variant
    })
    .validate()
    .unwrap();
}

#[test]
fn tensors_that_do_not_fit_the_memory_are_refused() {
    let change = |change: &dyn Fn(&mut Forward<'static, bf16>)| {
        let mut tensors = forward::<bf16>();
        change(&mut tensors);
        SHAPE.plan_forward(&tensors).map(drop)
    };
    change(&|_| ()).unwrap();
    assert_refused(
        change(&|x| x.inputs.memory = tensor(0x10000, 1)),
        &["memory has 1 elements, expected 9600"],
    );
    assert_refused(
        change(&|x| x.inputs.value = tensor(0x40000, ROWS).rows(31)),
        &["value is 31 columns wide"],
    );
    assert_refused(
        change(&|x| x.inputs.key_strength = None),
        &["key_strength is missing"],
    );
    assert_refused(
        change(&|x| x.inputs.strength_bias = None),
        &["strength_bias is missing"],
    );
    assert_refused(
        change(&|x| x.inputs.cu_seqlens = tensor(0x50200, 3)),
        &["cu_seqlens has 3 elements, expected 4"],
    );
    assert_refused(
        change(&|x| x.workspace = target(0x100000, 7)),
        &["workspace has 7 elements, expected at least"],
    );
    assert_refused(
        change(&|x| x.memory_next = target(0x60002, MEMORY)),
        &["memory_next begins at", "16 bytes"],
    );
    let overlap = change(&|x| x.memory_next = target(0x10000, MEMORY)).unwrap_err();
    assert!(matches!(overlap, Error::Overlap { .. }), "{overlap}");

    let dot = Shape {
        variant: ContentMemory {
            addressing: Addressing::Dot,
            ..SHAPE.variant
        },
        ..SHAPE
    };
    assert_refused(
        dot.plan_forward(&forward::<bf16>()),
        &["key_strength is given, expected none"],
    );
    let mut tensors = Backward {
        d_strength_bias: None,
        ..backward()
    };
    assert_refused(
        SHAPE.plan_backward(&tensors),
        &["d_strength_bias is missing"],
    );
    tensors = Backward {
        d_value: target(0x90000, ROWS).rows(32),
        ..backward()
    };
    assert_refused(
        SHAPE.plan_backward(&tensors),
        &["d_address_key and d_value overlap"],
    );
}

#[test]
fn offsets_that_the_kernels_cannot_work_with_are_refused_on_the_host() {
    SHAPE.validate_offsets(&[0, 10, 10, 20]).unwrap();
    for (offsets, part) in [
        (vec![0, 10, 20], "cu_seqlens has 3 elements, expected 4"),
        (vec![1, 10, 10, 20], "cu_seqlens is 1 at 0, expected 0"),
        (vec![0, 10, 10, 19], "cu_seqlens is 19 at 3, expected 20"),
        (vec![0, 10, 9, 20], "cu_seqlens is 9 after 10 at 2"),
        (
            vec![0, 11, 11, 20],
            "cu_seqlens is 11 after 0 at 1, expected sequences of 0 to 10 tokens",
        ),
        (vec![0, i32::MAX, i32::MIN, 20], "cu_seqlens is"),
    ] {
        assert_refused(SHAPE.validate_offsets(&offsets), &[part]);
    }
}

/// What both passes read.
struct Pack {
    offsets: Vec<i32>,
    /// M and dM′
    memories: [Array3<f64>; 2],
    /// a, s, v and dy
    tokens: [Array2<f64>; 4],
    key_strength: Array1<f64>,
}

impl Pack {
    /// Every output of a pass of each kind.
    fn outputs<T: Number>(
        &self,
        machine: &impl Machine,
        variant: &ContentMemory,
        version: Version,
    ) -> Passed<T> {
        let [memory, grad_memory_next] =
            self.memories.each_ref().map(|x| machine.numbers::<T, _>(x));
        let (sequences, slots, width) = self.memories[0].dim();
        let [address_key, strength_key, value, grad_read] =
            self.tokens.each_ref().map(|x| machine.numbers::<T, _>(x));
        let key_strength = machine.numbers::<T, _>(&self.key_strength);
        let (bias, cu_seqlens) = (machine.upload(&[0.5_f32]), machine.upload(&self.offsets));
        let shape = Shape {
            sequences,
            tokens: self.key_strength.len(),
            longest: 6,
            slots,
            key_width: width,
            width,
            variant: *variant,
        };
        let [cosine, sigmoid] = [
            variant.addressing == Addressing::Cosine,
            variant.strength == Strength::Sigmoid,
        ];
        let inputs = || Inputs {
            memory: machine.input(&memory),
            address_key: machine.input(&address_key).rows(width),
            strength_key: machine.input(&strength_key).rows(width),
            value: machine.input(&value).rows(width),
            key_strength: cosine.then(|| machine.input(&key_strength)),
            strength_bias: sigmoid.then(|| machine.input(&bias)),
            cu_seqlens: machine.input(&cu_seqlens),
        };
        let [mut memory_next, mut d_memory] =
            [(); 2].map(|()| machine.scratch::<T>(self.memories[0].len()));
        let [mut read, mut d_address_key, mut d_strength_key, mut d_value] =
            [(); 4].map(|()| machine.scratch::<T>(self.tokens[0].len()));
        let mut d_key_strength = machine.scratch::<T>(shape.tokens);
        let mut d_bias = machine.upload(&[0.25_f32]);
        let mut workspace = machine.scratch(shape.forward_workspace::<T>().unwrap());
        let forward = Forward {
            inputs: inputs(),
            memory_next: machine.output(&mut memory_next),
            read: machine.output(&mut read),
            workspace: machine.output(&mut workspace),
        };
        shape.forward_by(version, machine, forward).unwrap();
        let mut workspace = machine.scratch(shape.backward_workspace().unwrap());
        let backward = Backward {
            inputs: inputs(),
            grad_memory_next: machine.input(&grad_memory_next),
            grad_read: machine.input(&grad_read),
            d_memory: machine.output(&mut d_memory),
            d_address_key: machine.output(&mut d_address_key).rows(width),
            d_strength_key: machine.output(&mut d_strength_key).rows(width),
            d_value: machine.output(&mut d_value).rows(width),
            d_key_strength: cosine.then(|| machine.output(&mut d_key_strength)),
            d_strength_bias: sigmoid.then(|| machine.output(&mut d_bias)),
            workspace: machine.output(&mut workspace),
        };
        shape.backward_by(version, machine, backward).unwrap();
        Passed {
            memories: [&memory_next, &d_memory].map(|x| machine.download(x)),
            tokens: [&read, &d_address_key, &d_strength_key, &d_value].map(|x| machine.download(x)),
            key_strength: machine.download(&d_key_strength),
            bias: machine.download(&d_bias),
        }
    }
}

/// What both passes write.
struct Passed<T> {
    /// M′ and dM
    memories: [Vec<T>; 2],
    /// y, da, ds, dv
    tokens: [Vec<T>; 4],
    key_strength: Vec<T>,
    bias: Vec<f32>,
}

/// A pack between tokens of no sequence, before sequences that take no part: what they would read is
/// NaN.
fn check_that_only_some_take_part<T: Number>(
    machine: &impl Machine,
    variant: &ContentMemory,
    seed: u64,
) {
    const SLOTS: usize = 20;
    const WIDTH: usize = 16;
    const BEFORE: usize = 2;
    const BEHIND: usize = 3;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let alone = Pack {
        offsets: vec![0, 3, 3, 8],
        memories: [(); 2].map(|()| draw::<T, _>(&mut random, (3, SLOTS, WIDTH))),
        tokens: [(); 4].map(|()| draw::<T, _>(&mut random, (8, WIDTH))),
        key_strength: draw::<T, _>(&mut random, 8).map(|x| T::round(1.0 + x.abs()).widen()),
    };
    let nan = |rows, columns| Array2::from_elem((rows, columns), f64::NAN);
    let among = Pack {
        offsets: vec![2, 5, 5, 10, 9, 8],
        memories: alone.memories.each_ref().map(|x| {
            let none = Array3::from_elem((2, SLOTS, WIDTH), f64::NAN);
            concatenate![Axis(0), x.view(), none]
        }),
        tokens: alone
            .tokens
            .each_ref()
            .map(|x| concatenate![Axis(0), nan(BEFORE, WIDTH), x.view(), nan(BEHIND, WIDTH)]),
        key_strength: concatenate![
            Axis(0),
            Array1::from_elem(BEFORE, f64::NAN),
            alone.key_strength.view(),
            Array1::from_elem(BEHIND, f64::NAN)
        ],
    };
    let same = |found: &[T], expected: &[T], first: usize| {
        let end = first + expected.len();
        for (index, &found) in found.iter().enumerate() {
            match (first..end).contains(&index) {
                true => {
                    assert!(found.widen().to_bits() == expected[index - first].widen().to_bits())
                }
                false => assert!(found.widen().is_nan(), "{index} was written"),
            }
        }
    };
    for version in [Version::Hopper, Version::Portable] {
        let expected = alone.outputs::<T>(machine, variant, version);
        let found = among.outputs::<T>(machine, variant, version);
        for (found, expected) in found.memories.iter().zip(&expected.memories) {
            same(found, expected, 0);
        }
        for (found, expected) in found.tokens.iter().zip(&expected.tokens) {
            same(found, expected, BEFORE * WIDTH);
        }
        if variant.addressing == Addressing::Cosine {
            same(&found.key_strength, &expected.key_strength, BEFORE);
        }
        assert_eq!(found.bias, expected.bias);
    }
}

#[test]
fn the_bits_by_clusters_do_not_depend_on_the_order_of_threads() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let pack = Pack {
        offsets: vec![0, 6, 10],
        memories: [(); 2].map(|()| draw::<bf16, _>(&mut random, (2, 70, 32))),
        tokens: [(); 4].map(|()| draw::<bf16, _>(&mut random, (10, 32))),
        key_strength: draw::<bf16, _>(&mut random, 10).mapv(f64::abs),
    };
    for bits in 0..8 {
        let variant = variant(bits, 32, None);
        let [forward, reversed, shuffled] = [0, 1, 2].map(|order| {
            let passed = pack.outputs::<bf16>(&host(order), &variant, Version::Hopper);
            let all = passed.memories.iter().chain(&passed.tokens);
            let all = all.chain([&passed.key_strength]).flatten();
            let all: Vec<_> = all.map(|x| x.to_bits()).collect();
            (all, passed.bias[0].to_bits())
        });
        assert_eq!(forward, reversed);
        assert_eq!(forward, shuffled);
    }
}

#[test]
fn sequences_that_take_no_part_are_neither_read_nor_written() {
    for bits in 0..16 {
        let (machine, variant) = (host(bits), variant(bits as usize, 16, None));
        check_that_only_some_take_part::<f32>(&machine, &variant, bits);
        check_that_only_some_take_part::<bf16>(&machine, &variant, bits);
        check_that_only_some_take_part::<f16>(&machine, &variant, bits);
    }
}
