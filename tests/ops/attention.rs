use dtmem::ops::attention::{
    Backward, Denominator, Forward, Mask, MemoryLoss, MemoryLossGradient, Pack, Shape, Supervision,
};
use dtmem::ops::{Arg, Error, Input, Output, Type, Version};
use dtmem_reference::attention as reference;
use half::{bf16, f16};
use ndarray::{Array1, Array2, Array3, s};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

use crate::common::{Number, assert_close, assert_near, assert_refused, draw, target, tensor};
use crate::machines::{Machine, host, on_gpu};

const SCALE: f32 = 0.25;

/// What is on the host before it is uploaded: offsets, groups and pairs, drawn for a shape.
#[derive(Clone)]
struct HostPack {
    cu_seqlens_q: Vec<i32>,
    cu_seqlens_k: Vec<i32>,
    groups: Vec<i32>,
    supervised: Vec<usize>,
    annotated: Vec<u8>,
    pair_offsets: Vec<i32>,
    pair_keys: Vec<i32>,
}

fn offsets(lengths: impl Iterator<Item = usize>) -> Vec<i32> {
    let mut offsets = vec![0];
    offsets.extend(lengths.scan(0, |sum, length| {
        *sum += length as i32;
        Some(*sum)
    }));
    offsets
}

impl HostPack {
    /// `lengths`: queries and keys of each sequence.
    fn draw(
        lengths: &[(usize, usize)],
        mask: Mask,
        supervised: &[usize],
        random: &mut ChaCha8Rng,
    ) -> Self {
        let mut groups = Vec::new();
        let (mut pair_offsets, mut pair_keys) = (vec![0], Vec::new());
        for &(queries, keys) in lengths {
            let first = groups.len();
            let mut group = 0;
            groups.extend((0..keys).map(|_| {
                group += i32::from(random.random_bool(0.3));
                group
            }));
            for query in 0..queries {
                let own = query + keys - queries;
                let shown = |&key: &usize| match mask {
                    Mask::None => true,
                    Mask::Causal => key <= own,
                    Mask::SlidingWindow { window } => key <= own && own < key + window,
                    Mask::GroupedCausal => groups[first + key] <= groups[first + own],
                };
                let visible = (0..keys).filter(shown);
                pair_keys.extend(
                    visible
                        .filter(|_| random.random_bool(0.2))
                        .map(|x| x as i32),
                );
                pair_offsets.push(pair_keys.len() as i32);
            }
        }
        Self {
            cu_seqlens_q: offsets(lengths.iter().map(|x| x.0)),
            cu_seqlens_k: offsets(lengths.iter().map(|x| x.1)),
            groups,
            supervised: supervised.to_vec(),
            annotated: lengths
                .iter()
                .map(|_| random.random_bool(0.7).into())
                .collect(),
            pair_offsets,
            pair_keys,
        }
    }

    fn attention(&self, mask: Mask) -> reference::Attention<'_> {
        let supervision = reference::Supervision {
            heads: &self.supervised,
            pair_offsets: &self.pair_offsets,
            pair_keys: &self.pair_keys,
            annotated: &self.annotated,
            denominator: Denominator::Causal,
        };
        reference::Attention {
            cu_seqlens_q: &self.cu_seqlens_q,
            cu_seqlens_k: &self.cu_seqlens_k,
            scale: f64::from(SCALE),
            mask: match mask {
                Mask::None => reference::Mask::None,
                Mask::Causal => reference::Mask::Causal,
                Mask::SlidingWindow { window } => reference::Mask::SlidingWindow { window },
                Mask::GroupedCausal => reference::Mask::GroupedCausal {
                    groups: &self.groups,
                },
            },
            supervision: (!self.supervised.is_empty()).then_some(supervision),
        }
    }
}

/// [tokens, heads, width] as rows.
fn flat(x: &Array3<f64>) -> Array2<f64> {
    let (tokens, heads, width) = x.dim();
    x.to_shape((tokens, heads * width)).unwrap().to_owned()
}

/// Behind the rows of a fused matrix.
const GAP: usize = 8;

fn check<T: Number>(
    machine: &impl Machine,
    version: Version,
    lengths: &[(usize, usize)],
    [heads, key_heads, width]: [usize; 3],
    mask: Mask,
    supervised: &[usize],
    seed: u64,
) {
    const GRAD_LOSS: f32 = 20.0;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let pack = HostPack::draw(lengths, mask, supervised, &mut random);
    let [queries, keys] = [&pack.cu_seqlens_q, &pack.cu_seqlens_k].map(|x| x[x.len() - 1] as usize);
    let shape = Shape {
        sequences: lengths.len(),
        queries,
        keys,
        heads,
        key_heads,
        width,
        mask,
    };
    let attention = pack.attention(mask);
    shape.validate_pack(&attention).unwrap();
    let [q, grad_out] = [(); 2].map(|()| draw::<T, _>(&mut random, (queries, heads, width)));
    let [k, v] = [(); 2].map(|()| draw::<T, _>(&mut random, (keys, key_heads, width)));

    // q, k and v are columns of one matrix if they can be.
    let fused = queries == keys;
    let widths = [heads, key_heads, key_heads].map(|heads| heads * width);
    let stride = widths.iter().sum::<usize>() + GAP;
    let [wide_q, wide_k, wide_v] = widths;
    let parts = [&q, &k, &v].map(flat);
    let memories = parts.each_ref().map(|x| machine.numbers::<T, _>(x));
    let fused_memory = fused.then(|| {
        let mut all = Array2::from_elem((queries, stride), f64::NAN);
        let mut first = 0;
        for part in &parts {
            all.slice_mut(s![.., first..first + part.ncols()])
                .assign(part);
            first += part.ncols();
        }
        machine.numbers::<T, _>(&all)
    });
    let inputs = || match &fused_memory {
        Some(memory) => machine.input(memory).rows(stride).columns(widths),
        None => {
            let [q, k, v] = memories.each_ref().map(|x| machine.input(x));
            [q.rows(wide_q), k.rows(wide_k), v.rows(wide_v)]
        }
    };

    let [
        cu_seqlens_q,
        cu_seqlens_k,
        groups,
        pair_offsets,
        pair_keys,
        slots,
    ] = [
        &pack.cu_seqlens_q,
        &pack.cu_seqlens_k,
        &pack.groups,
        &pack.pair_offsets,
        &pack.pair_keys,
        &shape.slots(supervised),
    ]
    .map(|x| machine.upload(x));
    let annotated = machine.upload(&pack.annotated);
    let device_pack = || Pack {
        cu_seqlens_q: machine.input(&cu_seqlens_q),
        cu_seqlens_k: machine.input(&cu_seqlens_k),
        groups: (mask == Mask::GroupedCausal).then(|| machine.input(&groups)),
    };
    let supervision = || Supervision {
        heads: supervised.len(),
        slots: machine.input(&slots),
        annotated: machine.input(&annotated),
        pair_offsets: machine.input(&pair_offsets),
        pair_keys: machine.input(&pair_keys),
    };

    let mut out = machine.scratch::<T>(queries * wide_q);
    let mut lse = machine.scratch::<f32>(queries * heads);
    let rows = queries * supervised.len();
    let [mut sum, mut loss, mut factor] = [(); 3].map(|()| machine.scratch::<f32>(1));
    let mut peak = machine.scratch::<i32>(rows);
    let [mut shift, mut at_peak, mut row_loss] = [(); 3].map(|()| machine.scratch::<f32>(rows));
    let [q_rows, k_rows, v_rows] = inputs();
    let forward = Forward {
        q: q_rows,
        k: k_rows,
        v: v_rows,
        pack: device_pack(),
        scale: SCALE,
        out: machine.output(&mut out).rows(wide_q),
        lse: machine.output(&mut lse),
        memory_loss: (!supervised.is_empty()).then(|| MemoryLoss {
            supervision: supervision(),
            denominator: Denominator::Causal,
            sum: machine.output(&mut sum),
            loss: machine.output(&mut loss),
            factor: machine.output(&mut factor),
            peak: machine.output(&mut peak),
            shift: machine.output(&mut shift),
            at_peak: machine.output(&mut at_peak),
            row_loss: machine.output(&mut row_loss),
        }),
    };
    shape
        .forward_by(version, machine, forward)
        .unwrap_or_else(|error| panic!("{error}"));

    let grad_out_memory = machine.numbers::<T, _>(&grad_out);
    let grad_loss = machine.upload(&[GRAD_LOSS]);
    let mut workspace = machine.scratch(shape.workspace().unwrap());
    let mut fused_gradients = machine.scratch::<T>(if fused { queries * stride } else { 0 });
    let [mut dq, mut dk, mut dv] = parts.each_ref().map(|x| machine.scratch::<T>(x.len()));
    let [q_rows, k_rows, v_rows] = inputs();
    let [dq_rows, dk_rows, dv_rows] = if fused {
        machine
            .output(&mut fused_gradients)
            .rows(stride)
            .columns(widths)
    } else {
        [(&mut dq, wide_q), (&mut dk, wide_k), (&mut dv, wide_v)]
            .map(|(memory, width)| machine.output(memory).rows(width))
    };
    let backward = Backward {
        q: q_rows,
        k: k_rows,
        v: v_rows,
        pack: device_pack(),
        scale: SCALE,
        out: machine.input(&out).rows(wide_q),
        lse: machine.input(&lse),
        grad_out: machine.input(&grad_out_memory).rows(wide_q),
        memory_loss: (!supervised.is_empty()).then(|| MemoryLossGradient {
            supervision: supervision(),
            grad_loss: machine.input(&grad_loss),
            factor: machine.input(&factor),
            peak: machine.input(&peak),
            shift: machine.input(&shift),
            at_peak: machine.input(&at_peak),
        }),
        dq: dq_rows,
        dk: dk_rows,
        dv: dv_rows,
        workspace: machine.output(&mut workspace),
    };
    shape
        .backward_by(version, machine, backward)
        .unwrap_or_else(|error| panic!("{error}"));
    let found = if fused {
        let all = machine.download(&fused_gradients);
        [0, wide_q, wide_q + wide_k].map(|first| {
            let width = if first == 0 { wide_q } else { wide_k };
            let rows = all.chunks_exact(stride);
            rows.flat_map(|row| row[first..first + width].to_vec())
                .collect()
        })
    } else {
        [&dq, &dk, &dv].map(|x| machine.download(x))
    };

    let mut expected_out = Array3::from_elem(q.dim(), f64::NAN);
    let mut expected_lse = Array2::from_elem((queries, heads), f64::NAN);
    let scratch = &mut Vec::new();
    let expected_loss = attention
        .forward(
            q.view(),
            k.view(),
            v.view(),
            expected_out.view_mut(),
            expected_lse.view_mut(),
            scratch,
        )
        .unwrap();
    let mut gradients = [&q, &k, &v].map(|x| Array3::from_elem(x.dim(), f64::NAN));
    let [dq, dk, dv] = gradients.each_mut().map(|x| x.view_mut());
    attention
        .backward(
            q.view(),
            k.view(),
            v.view(),
            expected_lse.view(),
            grad_out.view(),
            f64::from(GRAD_LOSS),
            dq,
            dk,
            dv,
            scratch,
        )
        .unwrap();
    assert_close("out", &machine.download(&out), &expected_out, T::TOLERANCE);
    assert_close(
        "lse",
        &machine.download(&lse),
        &expected_lse,
        f32::TOLERANCE,
    );
    if !supervised.is_empty() {
        let expected = Array1::from_elem(1, expected_loss);
        assert_close("loss", &machine.download(&loss), &expected, f32::TOLERANCE);
        let [sum, factor] = [&sum, &factor].map(|x| machine.download(x)[0]);
        assert_close("sum·factor", &[sum * factor], &expected, f32::TOLERANCE);
    }
    // Where a row sees few keys, or one of them takes all, dP − Δ is 0 but for the rounding of `out`.
    let least = grad_out.iter().map(|x| x * x).sum::<f64>().sqrt();
    for ((name, found), expected) in ["dq", "dk", "dv"].iter().zip(&found).zip(&gradients) {
        assert_near(name, found, expected, T::TOLERANCE, least);
    }
}

fn check_all_types(
    machine: &impl Machine,
    lengths: &[(usize, usize)],
    heads: [usize; 3],
    mask: Mask,
    supervised: &[usize],
    seed: u64,
) {
    let version = Version::Portable;
    check::<f32>(machine, version, lengths, heads, mask, supervised, seed);
    check::<bf16>(machine, version, lengths, heads, mask, supervised, seed);
    check::<f16>(machine, version, lengths, heads, mask, supervised, seed);
}

/// The types and widths that there is a version for Hopper for.
fn check_hopper(
    machine: &impl Machine,
    lengths: &[(usize, usize)],
    heads: [usize; 3],
    mask: Mask,
    supervised: &[usize],
    seed: u64,
) {
    let version = Version::Hopper;
    check::<bf16>(machine, version, lengths, heads, mask, supervised, seed);
    check::<f16>(machine, version, lengths, heads, mask, supervised, seed);
}

fn masks() -> impl Strategy<Value = Mask> {
    prop_oneof![
        Just(Mask::None),
        Just(Mask::Causal),
        prop_oneof![2 => 1..30_usize, 1 => 30..150_usize]
            .prop_map(|window| Mask::SlidingWindow { window }),
        Just(Mask::GroupedCausal),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn attention_on_the_host_agrees_with_the_reference(
        lengths in prop::collection::vec((0..20_usize, prop_oneof![2 => Just(0_usize), 1 => 0..10_usize]), 1..4),
        key_heads in 1..3_usize,
        group in 1..3_usize,
        width in prop_oneof![4 => Just(16_usize), 2 => Just(32), 1 => Just(64), 1 => Just(128), 1 => Just(256)],
        mask in masks(),
        supervised in prop::option::of(0..4_usize),
        seed: u64,
    ) {
        let lengths: Vec<_> = lengths.into_iter().map(|(queries, cached)| (queries, queries + cached)).collect();
        let heads = key_heads * group;
        let supervised: Vec<_> = supervised.map(|head| head % heads).into_iter().collect();
        check_all_types(&host(seed), &lengths, [heads, key_heads, width], mask, &supervised, seed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3))]

    #[test]
    fn attention_for_hopper_on_the_host_agrees_with_the_reference(
        lengths in prop::collection::vec((0..20_usize, prop_oneof![2 => Just(0_usize), 1 => 0..140_usize]), 1..4),
        width in prop_oneof![Just(64_usize), Just(128)],
        mask in masks(),
        supervised in prop::option::of(0..2_usize),
        seed: u64,
    ) {
        let lengths: Vec<_> = lengths.into_iter().map(|(queries, cached)| (queries, queries + cached)).collect();
        let supervised: Vec<_> = supervised.into_iter().collect();
        check_hopper(&host(seed), &lengths, [2, 1, width], mask, &supervised, seed);
    }
}

/// Sequences that end before, at and behind the ends of tiles, of which a mask shows some not at all.
fn across_tiles() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let near = prop_oneof![Just(0_usize), Just(32), Just(64), Just(128)];
    let tokens = (near, 0..5_usize).prop_map(|(end, behind)| (end + behind).saturating_sub(2));
    let cached = prop_oneof![2 => Just(0_usize), 1 => 0..130_usize];
    prop::collection::vec((tokens, cached), 1..3).prop_map(|lengths| {
        let of_keys = |(queries, cached)| (queries, queries + cached);
        lengths.into_iter().map(of_keys).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]

    #[test]
    fn attention_across_tiles_on_the_host_agrees_with_the_reference(
        lengths in across_tiles(),
        width in prop_oneof![2 => Just(16_usize), 2 => Just(32), 1 => Just(64), 1 => Just(128), 1 => Just(256)],
        mask in masks(),
        supervised in prop::option::of(0..2_usize),
        seed: u64,
    ) {
        let supervised: Vec<_> = supervised.into_iter().collect();
        check_all_types(&host(seed), &lengths, [2, 1, width], mask, &supervised, seed);
        if (64..=128).contains(&width) {
            check_hopper(&host(seed), &lengths, [2, 1, width], mask, &supervised, seed);
        }
    }
}

#[test]
fn attention_on_a_gpu_agrees_with_the_reference() {
    on_gpu(|device| {
        let long = [(200, 200), (1, 1), (0, 0), (130, 130)];
        let cached = [(1, 90), (65, 200)];
        for (seed, width) in [16, 32, 64, 128, 256].into_iter().enumerate() {
            for mask in [
                Mask::None,
                Mask::Causal,
                Mask::SlidingWindow { window: 70 },
                Mask::GroupedCausal,
            ] {
                let heads = [4, 2, width];
                check_all_types(device, &long, heads, mask, &[1, 2], seed as u64);
                check_all_types(device, &cached, heads, mask, &[], seed as u64);
                check_hopper(device, &long, heads, mask, &[1, 2], seed as u64);
                check_hopper(device, &cached, heads, mask, &[], seed as u64);
            }
        }
    });
}

const HEADS: usize = 4;
const KEY_HEADS: usize = 2;
const QUERIES: usize = 100;
const KEYS: usize = 150;
/// Of the rows of q and of k.
const WIDE: usize = HEADS * 32;
const NARROW: usize = KEY_HEADS * 32;
const SHAPE: Shape = Shape {
    sequences: 3,
    queries: QUERIES,
    keys: KEYS,
    heads: HEADS,
    key_heads: KEY_HEADS,
    width: 32,
    mask: Mask::Causal,
};

fn pack() -> Pack<'static> {
    Pack {
        cu_seqlens_q: tensor(0x1000, 4),
        cu_seqlens_k: tensor(0x2000, 4),
        groups: None,
    }
}

fn supervision() -> Supervision<'static> {
    Supervision {
        heads: 1,
        slots: tensor(0x3000, HEADS),
        annotated: tensor(0x4000, 3),
        pair_offsets: tensor(0x5000, QUERIES + 1),
        pair_keys: tensor(0x6000, 17),
    }
}

fn forward() -> Forward<'static, bf16> {
    Forward {
        q: tensor(0x10000, QUERIES * WIDE).rows(WIDE),
        k: tensor(0x20000, KEYS * NARROW).rows(NARROW),
        v: tensor(0x30000, KEYS * NARROW).rows(NARROW),
        pack: pack(),
        scale: SCALE,
        out: target(0x40000, QUERIES * WIDE).rows(WIDE),
        lse: target(0x50000, QUERIES * HEADS),
        memory_loss: None,
    }
}

fn backward() -> Backward<'static, bf16> {
    Backward {
        q: tensor(0x10000, QUERIES * WIDE).rows(WIDE),
        k: tensor(0x20000, KEYS * NARROW).rows(NARROW),
        v: tensor(0x30000, KEYS * NARROW).rows(NARROW),
        pack: pack(),
        scale: SCALE,
        out: tensor(0x40000, QUERIES * WIDE).rows(WIDE),
        lse: tensor(0x50000, QUERIES * HEADS),
        grad_out: tensor(0x60000, QUERIES * WIDE).rows(WIDE),
        memory_loss: None,
        dq: target(0x70000, QUERIES * WIDE).rows(WIDE),
        dk: target(0x80000, KEYS * NARROW).rows(NARROW),
        dv: target(0x90000, KEYS * NARROW).rows(NARROW),
        workspace: target(0xa0000, QUERIES * HEADS),
    }
}

#[test]
fn the_plan_of_attention_has_a_block_for_every_tile_of_every_sequence() {
    let tensors = forward();
    let [attention, loss] = SHAPE.plan_forward(&tensors).unwrap();
    let attention = attention.unwrap();
    assert!(loss.is_none());
    assert_eq!(
        (attention.family(), attention.kernel()),
        ("attention_forward", "attention_forward_32_bf16")
    );
    assert_eq!(
        (attention.grid(), attention.block()),
        ([QUERIES as u32 / 128 + 3, 4, 1], [128, 1, 1])
    );
    // A tile of queries, and two of keys and of values.
    assert_eq!(attention.shared_bytes(), (128 + 4 * 64) * 64);
    assert_eq!(attention.args().len(), 27);

    let tensors = backward();
    let [delta, query, key] = SHAPE.plan_backward(&tensors).unwrap();
    assert_eq!(
        (delta.kernel(), delta.grid()),
        ("attention_delta_bf16", [100, 1, 1])
    );
    assert_eq!(
        (query.kernel(), query.grid()),
        (
            "attention_query_gradient_32_bf16",
            [QUERIES as u32 / 128 + 3, 4, 1]
        )
    );
    assert_eq!(
        (key.kernel(), key.grid()),
        (
            "attention_key_gradient_32_bf16",
            [KEYS as u32 / 128 + 3, 2, 1]
        )
    );
    assert_eq!(key.shared_bytes(), 2 * (128 + 2 * 32) * 64);
    assert_eq!(
        key.args()[28..],
        [
            Arg::I32(64),
            Arg::I32(64),
            Arg::I32(1),
            Arg::I32(0),
            Arg::F32(SCALE)
        ]
    );
}

#[test]
fn the_version_for_hopper_is_planned_for_its_widths_and_types_only() {
    let wide = Shape {
        width: 64,
        heads: 2,
        key_heads: 1,
        ..SHAPE
    };
    let lse = || target(0x50000, QUERIES * wide.heads);
    let tensors = Forward {
        lse: lse(),
        ..forward()
    };
    let plan = |version| wide.plan_forward_by(version, &tensors).unwrap()[0].unwrap();
    let [portable, hopper] = [Version::Portable, Version::Hopper].map(plan);
    assert_eq!(
        (hopper.family(), hopper.kernel()),
        ("attention_hopper", "attention_hopper_64_bf16")
    );
    assert_eq!(
        (hopper.grid(), hopper.block()),
        ([QUERIES as u32 / 192 + 3, 2, 1], [512, 1, 1])
    );
    // 192 queries, room for four tiles of 128 keys and four of values; a run of keys for each query, and barriers.
    let beside = 192 * 8 + (1 + 4 * 4) * 8;
    assert_eq!(hopper.shared_bytes(), (192 + 2 * 4 * 128) * 128 + beside);
    assert!(hopper.is_for_hopper() && !portable.is_for_hopper());
    let (same, maps) = hopper.args().split_at(portable.args().len());
    assert_eq!(same, portable.args());
    for (index, (rows, box_rows)) in [(QUERIES, 192), (KEYS, 128), (KEYS, 128)]
        .into_iter()
        .enumerate()
    {
        let (Arg::Map(map), Arg::Input(span)) = (maps[index], same[index]) else {
            panic!("{maps:?}");
        };
        assert_eq!(map.span, span);
        assert_eq!((map.rows, map.box_rows), (rows as u64, box_rows));
        assert_eq!((map.element, map.box_columns()), (Type::Bf16, 64));
    }

    let tensors = forward();
    let narrow = SHAPE.plan_forward_by(Version::Hopper, &tensors).unwrap();
    assert_eq!(narrow, SHAPE.plan_forward(&tensors).unwrap());
    let exact: Forward<'_, f32> = Forward {
        q: tensor(0x10000, QUERIES * WIDE).rows(WIDE),
        k: tensor(0x20000, KEYS * NARROW).rows(NARROW),
        v: tensor(0x30000, KEYS * NARROW).rows(NARROW),
        pack: pack(),
        scale: SCALE,
        out: target(0x80000, QUERIES * WIDE).rows(WIDE),
        lse: lse(),
        memory_loss: None,
    };
    let kernel = wide.plan_forward_by(Version::Hopper, &exact).unwrap()[0].unwrap();
    assert_eq!(kernel.kernel(), "attention_forward_64_f32");

    let tensors = Backward {
        lse: tensor(0x50000, QUERIES * wide.heads),
        workspace: target(0xa0000, QUERIES * wide.heads),
        ..backward()
    };
    let plan = |version| wide.plan_backward_by(version, &tensors).unwrap();
    let [portable, hopper] = [Version::Portable, Version::Hopper].map(plan);
    assert_eq!(hopper[0], portable[0]);
    for (gradient, kernel, tokens, heads, beside) in [
        (
            1,
            "attention_query_gradient_hopper_64_bf16",
            QUERIES,
            2,
            1024,
        ),
        (2, "attention_key_gradient_hopper_64_bf16", KEYS, 1, 9216),
    ] {
        let [portable, hopper] = [&portable, &hopper].map(|plan| plan[gradient]);
        assert_eq!(
            (hopper.family(), hopper.kernel()),
            ("attention_backward_hopper", kernel)
        );
        assert_eq!(
            (hopper.grid(), hopper.block()),
            ([tokens as u32 / 128 + 3, heads, 1], [256, 1, 1])
        );
        // Two tiles of the block's own rows, and three of each of two others.
        assert_eq!(hopper.shared_bytes(), 2 * (128 + 3 * 64) * 128 + beside);
        assert!(hopper.is_for_hopper() && !portable.is_for_hopper());
        assert_eq!(hopper.args(), portable.args());
    }
    let tensors = backward();
    let narrow = SHAPE.plan_backward_by(Version::Hopper, &tensors).unwrap();
    assert_eq!(narrow, SHAPE.plan_backward(&tensors).unwrap());
}

#[test]
fn shapes_beyond_the_attention_kernels_are_refused() {
    let window = |window| Mask::SlidingWindow { window };
    for (shape, parts) in [
        (
            Shape {
                sequences: (1 << 30) + 1,
                ..SHAPE
            },
            ["sequences is 1073741825", "at most 1073741824"],
        ),
        (
            Shape {
                queries: usize::MAX,
                ..SHAPE
            },
            ["queries is", "at most"],
        ),
        (
            Shape {
                keys: usize::MAX,
                ..SHAPE
            },
            ["keys is", "at most"],
        ),
        (Shape { heads: 0, ..SHAPE }, ["heads is 0", "1 to 65535"]),
        (
            Shape {
                heads: 65536,
                ..SHAPE
            },
            ["heads is 65536", "1 to 65535"],
        ),
        (
            Shape {
                key_heads: 3,
                ..SHAPE
            },
            ["key_heads is 3", "a divisor of the 4 query heads"],
        ),
        (
            Shape {
                key_heads: 0,
                ..SHAPE
            },
            ["key_heads is 0", "a divisor"],
        ),
        (
            Shape { width: 48, ..SHAPE },
            ["width is 48", "[16, 32, 64, 128, 256]"],
        ),
        (
            Shape {
                mask: window(0),
                ..SHAPE
            },
            ["window is 0", "1 to"],
        ),
        (
            Shape {
                mask: window(1 << 31),
                ..SHAPE
            },
            ["window is 2147483648", "1 to"],
        ),
    ] {
        assert_refused(shape.validate(), &parts);
        assert_refused(shape.workspace(), &parts);
        assert_refused(shape.plan_forward(&forward()), &parts);
        assert_refused(shape.plan_backward(&backward()), &parts);
    }
    let scale = f32::NAN;
    assert_refused(
        SHAPE.plan_forward(&Forward { scale, ..forward() }),
        &["scale is NaN", "finite"],
    );
    assert_refused(
        SHAPE.plan_backward(&Backward {
            scale,
            ..backward()
        }),
        &["scale is NaN", "finite"],
    );
}

#[test]
fn tensors_that_do_not_fit_the_pack_are_refused() {
    let short = Forward {
        q: tensor(0x10000, QUERIES * WIDE - 1).rows(WIDE),
        ..forward()
    };
    assert_refused(
        SHAPE.plan_forward(&short),
        &["q has 12799 elements, expected at least 12800"],
    );
    let long = Forward {
        q: tensor(0x10000, QUERIES * WIDE + 1).rows(WIDE),
        ..forward()
    };
    assert_refused(
        SHAPE.plan_forward(&long),
        &["q has 12801 elements, expected 12800"],
    );
    let narrow = Forward {
        k: tensor(0x20000, KEYS * NARROW).rows(NARROW - 8),
        ..forward()
    };
    assert_refused(
        SHAPE.plan_forward(&narrow),
        &["k is 56 columns wide, expected 64"],
    );
    let askew = Forward {
        k: tensor(0x20000, KEYS * (NARROW + 4)).rows(NARROW + 4),
        ..forward()
    };
    assert_refused(
        SHAPE.plan_forward(&askew),
        &[
            "k is a matrix with a row every 68 elements",
            "a multiple of 8",
        ],
    );
    let misaligned = Forward {
        v: tensor(0x30008, KEYS * NARROW).rows(NARROW),
        ..forward()
    };
    assert_refused(
        SHAPE.plan_forward(&misaligned),
        &["v begins at address 0x30008", "16 bytes"],
    );
    let workspace = Backward {
        workspace: target(0xa0000, QUERIES * HEADS - 1),
        ..backward()
    };
    assert_refused(
        SHAPE.plan_backward(&workspace),
        &["workspace has 399 elements, expected at least 400"],
    );
    let odd = Backward {
        workspace: target(0xa0004, QUERIES * HEADS),
        ..backward()
    };
    assert_refused(
        SHAPE.plan_backward(&odd),
        &["workspace begins at address 0xa0004", "16 bytes"],
    );
    let offsets = Forward {
        pack: Pack {
            cu_seqlens_k: tensor(0x2000, 3),
            ..pack()
        },
        ..forward()
    };
    assert_refused(
        SHAPE.plan_forward(&offsets),
        &["cu_seqlens_k has 3 elements, expected 4"],
    );

    let grouped = Shape {
        mask: Mask::GroupedCausal,
        ..SHAPE
    };
    assert_refused(grouped.plan_forward(&forward()), &["groups is missing"]);
    let groups = || Some(tensor(0x7000, KEYS));
    let with_groups = Forward {
        pack: Pack {
            groups: groups(),
            ..pack()
        },
        ..forward()
    };
    assert_refused(
        SHAPE.plan_forward(&with_groups),
        &["groups is given, expected none"],
    );
    grouped.plan_forward(&with_groups).unwrap();

    for (heads, parts) in [(0, "heads is 0"), (5, "heads is 5")] {
        assert_refused(SHAPE.plan_backward(&supervised(heads)), &[parts, "1 to 4"]);
    }
}

fn supervised(heads: usize) -> Backward<'static, bf16> {
    Backward {
        memory_loss: Some(MemoryLossGradient {
            supervision: Supervision {
                heads,
                ..supervision()
            },
            grad_loss: tensor(0xb0000, 1),
            factor: tensor(0xb1000, 1),
            peak: tensor(0xb2000, QUERIES),
            shift: tensor(0xb3000, QUERIES),
            at_peak: tensor(0xb4000, QUERIES),
        }),
        ..backward()
    }
}

#[test]
fn only_supervised_heads_take_kernels_with_the_memory_loss() {
    let kernels = |tensors| {
        let plan = SHAPE.plan_backward(&tensors).unwrap();
        plan.map(|launch| launch.kernel().to_owned())
    };
    let [delta, query, key] = kernels(supervised(1));
    assert_eq!(delta, "attention_delta_bf16");
    assert_eq!(query, "attention_query_gradient_bce_32_bf16");
    assert_eq!(key, "attention_key_gradient_bce_32_bf16");
    let plain = kernels(backward());
    assert!(plain.iter().all(|name| !name.contains("bce")));
}

/// Gradients in the columns of one matrix, as those of q, k and v are.
fn side_by_side(address: u64, widths: [usize; 3]) -> Backward<'static, bf16> {
    let stride = WIDE + 2 * NARROW;
    let [dq, dk, dv] = target(address, QUERIES * stride)
        .rows(stride)
        .columns(widths);
    Backward {
        k: tensor(0x20000, QUERIES * NARROW).rows(NARROW),
        v: tensor(0x30000, QUERIES * NARROW).rows(NARROW),
        dq,
        dk,
        dv,
        ..backward()
    }
}

#[test]
fn columns_of_one_matrix_do_not_overlap_but_what_shares_elements_does() {
    let shape = Shape {
        keys: QUERIES,
        ..SHAPE
    };
    let tensors = side_by_side(0x100000, [WIDE, NARROW, NARROW]);
    let [_, query, key] = shape.plan_backward(&tensors).unwrap();
    let stride = Arg::I32((WIDE + 2 * NARROW) as i32);
    assert_eq!(
        (query.args()[27], key.args()[28], key.args()[29]),
        (stride, stride, stride)
    );

    let narrow = side_by_side(0x100000, [WIDE - 8, NARROW, NARROW]);
    assert_refused(
        shape.plan_backward(&narrow),
        &["dq is 120 columns wide, expected 128"],
    );
    let beyond = side_by_side(0x100000, [WIDE, NARROW + 8, NARROW]);
    assert_refused(
        shape.plan_backward(&beyond),
        &["dv is 56 columns wide, expected 64"],
    );
    let overlapping = side_by_side(0x30000 - 0x400, [WIDE, NARROW, NARROW]);
    let refused = shape.plan_backward(&overlapping).unwrap_err();
    assert!(matches!(refused, Error::Overlap { .. }), "{refused}");

    // Columns that meet, in rows of the same length and of others.
    let stride = 2 * WIDE;
    for (first, other_stride) in [(WIDE - 8, stride), (WIDE, stride - 8)] {
        let output: Output<'_, bf16> = target(0x100000, QUERIES * stride);
        let other: Input<'_, bf16> = tensor(
            0x100000 + 2 * first as u64,
            (QUERIES - 1) * other_stride + WIDE,
        );
        let tensors = Forward {
            q: other.rows(other_stride),
            out: output.rows(stride),
            ..forward()
        };
        assert_refused(SHAPE.plan_forward(&tensors), &["out and q overlap"]);
    }
}

#[test]
fn packs_that_the_kernels_cannot_work_with_are_refused_on_the_host() {
    let shape = Shape {
        queries: 5,
        keys: 6,
        sequences: 2,
        ..SHAPE
    };
    let good = HostPack {
        cu_seqlens_q: vec![0, 2, 5],
        cu_seqlens_k: vec![0, 3, 6],
        groups: vec![0, 1, 1, 0, 0, 2],
        supervised: vec![1],
        annotated: vec![1, 0],
        pair_offsets: vec![0, 2, 2, 3, 3, 4],
        pair_keys: vec![0, 1, 0, 2],
    };
    assert_refused(
        Shape {
            sequences: 3,
            ..shape
        }
        .validate_pack(&good.attention(Mask::Causal)),
        &["cu_seqlens_q has 3 elements, expected 4"],
    );
    assert_refused(
        shape.validate_pack(&good.attention(Mask::None)),
        &["mask is None, expected Causal"],
    );
    let grouped = Shape {
        mask: Mask::GroupedCausal,
        ..shape
    };
    let break_and_refuse = |shape: &Shape, change: &dyn Fn(&mut HostPack), part: &str| {
        let mut pack = good.clone();
        shape.validate_pack(&pack.attention(shape.mask)).unwrap();
        change(&mut pack);
        assert_refused(shape.validate_pack(&pack.attention(shape.mask)), &[part]);
    };
    break_and_refuse(
        &shape,
        &|pack| pack.cu_seqlens_q[1] = 6,
        "offsets that do not decrease",
    );
    break_and_refuse(&shape, &|pack| pack.cu_seqlens_q[2] = 4, "5 as the last");
    break_and_refuse(&shape, &|pack| pack.cu_seqlens_k[0] = 1, "cu_seqlens_k");
    break_and_refuse(
        &shape,
        &|pack| pack.cu_seqlens_k[1] = 1,
        "at most as many queries as keys",
    );
    break_and_refuse(&shape, &|pack| pack.pair_keys[1] = 2, "pair_keys"); // forward: query 0 stands at key 1
    break_and_refuse(&shape, &|pack| pack.pair_keys.swap(0, 1), "pair_keys");
    break_and_refuse(&shape, &|pack| pack.pair_keys[3] = -1, "pair_keys");
    break_and_refuse(&shape, &|pack| pack.pair_offsets[1] = 3, "pair_offsets");
    break_and_refuse(&shape, &|pack| pack.annotated[0] = 2, "annotated");
    break_and_refuse(&shape, &|pack| pack.supervised = vec![4], "heads below 4");
    break_and_refuse(
        &grouped,
        &|pack| pack.groups[2] = 0,
        "groups that do not decrease",
    );
}
