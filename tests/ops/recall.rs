use dtmem::ops::recall::{Columns, Loss, LossShape, Widen, WidenShape, words};
use dtmem_reference::attention::Pairs;
use dtmem_reference::recall::recall_loss;
use half::{bf16, f16};
use ndarray::{Array1, Array2, s};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

use crate::common::{Number, assert_close, assert_refused, draw, target, tensor};
use crate::machines::{Machine, host, on_gpu};

const WEIGHT: f32 = 0.5;

/// Tokens recall what tokens before them have written: widened, as if each of them had read its own slot alone, and
/// judged.
fn check<T: Number>(machine: &impl Machine, [tokens, width, columns]: [usize; 3], seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let x = draw::<T, _>(&mut random, (tokens, width));
    // No share is close to 0 or 1: what rounds to those is the kernels' own test.
    let shares = Array2::from_shape_simple_fn((tokens, columns), || {
        T::round(random.random_range(0.1..0.9)).widen()
    });
    let order: Vec<i32> = (0..tokens as i32).rev().collect();
    let earlier: Vec<i32> = (0..tokens)
        .map(|_| random.random_range(0..=columns as i32))
        .collect();
    let wanted: Vec<Vec<i32>> = (0..tokens)
        .map(|_| (0..columns as i32).filter(|_| random.random()).collect())
        .collect();
    let bits: Vec<i32> = wanted
        .iter()
        .flat_map(|wanted| {
            let mut bits = vec![0; words(columns)];
            for &column in wanted {
                bits[column as usize / 32] |= 1 << (column % 32);
            }
            bits
        })
        .collect();

    let shape = WidenShape {
        rows: tokens,
        group: 1,
        sources: tokens,
        width,
        columns,
    };
    let [x_memory, shares_memory] = [&x, &shares].map(|x| machine.numbers::<T, _>(x));
    let order_memory = machine.upload(&order);
    let mut wide = machine.scratch::<T>(tokens * (width + columns));
    let tensors = Widen {
        x: machine.input(&x_memory).rows(width),
        from: machine.input(&order_memory),
        columns: Columns::Given(machine.input(&shares_memory)),
        y: machine.output(&mut wide),
    };
    shape.widen(machine, tensors).unwrap();

    let shape = LossShape {
        tokens,
        width,
        columns,
    };
    let (earlier_memory, bits) = (machine.upload(&earlier), machine.upload(&bits));
    let weight = machine.upload(&[WEIGHT]);
    let mut read = machine.scratch::<T>(tokens * width);
    let mut gradient = machine.scratch::<T>(tokens * columns);
    let mut loss = machine.scratch::<f32>(1);
    let mut workspace = machine.scratch::<f32>(shape.workspace().unwrap());
    let tensors = Loss {
        y: machine.input(&wide),
        to: machine.input(&order_memory),
        earlier: machine.input(&earlier_memory),
        wanted: machine.input(&bits),
        weight: machine.input(&weight),
        read: machine.output(&mut read).rows(width),
        gradient: machine.output(&mut gradient),
        loss: machine.output(&mut loss),
        workspace: machine.output(&mut workspace),
    };
    shape.loss_and_gradient(machine, tensors).unwrap();

    // Backwards there and back again.
    assert_close("read", &machine.download(&read), &x, 0.0);
    let recalled: Vec<i32> = (0..columns as i32).collect();
    let mut expected = Array2::from_elem((tokens, columns), f64::NAN);
    let mut expected_loss = 0.0;
    for (token, keys) in wanted.iter().enumerate() {
        let row = s![token..token + 1, ..];
        let pairs = Pairs {
            offsets: &[0, keys.len() as i32],
            keys,
        };
        let gradient = expected.slice_mut(row);
        let (shares, weight) = (shares.slice(row), f64::from(WEIGHT));
        expected_loss +=
            recall_loss(shares, &recalled, earlier[token], pairs, weight, gradient).unwrap();
    }
    let found = machine.download(&gradient);
    assert_close("gradient", &found, &expected, T::TOLERANCE);
    let expected_loss = Array1::from_elem(1, expected_loss);
    assert_close(
        "loss",
        &machine.download(&loss),
        &expected_loss,
        f32::TOLERANCE,
    );
}

fn check_all_types(machine: &impl Machine, sizes: [usize; 3], seed: u64) {
    check::<f32>(machine, sizes, seed);
    check::<bf16>(machine, sizes, seed);
    check::<f16>(machine, sizes, seed);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn recall_on_the_host_agrees_with_the_reference(
        tokens in 0..40_usize, width in prop_oneof![1..20_usize, Just(64)],
        columns in prop_oneof![1..20_usize, Just(8), 30..70_usize], seed: u64,
    ) {
        check_all_types(&host(seed), [tokens, width, columns], seed);
    }
}

#[test]
fn recall_on_a_gpu_agrees_with_the_reference() {
    on_gpu(|device| {
        for (seed, sizes) in [[6000, 128, 8], [1, 1, 1], [300, 33, 70]]
            .into_iter()
            .enumerate()
        {
            check_all_types(device, sizes, seed as u64);
        }
    });
}

#[test]
fn memories_are_widened_slot_by_slot() {
    let machine = host(0);
    let x: Vec<f32> = (0..12).map(|x| x as f32).collect();
    let shape = WidenShape {
        rows: 9,
        group: 3,
        sources: 2,
        width: 2,
        columns: 1,
    };
    let (x, from) = (machine.upload(&x), machine.upload(&[1, 0, 1]));
    let mut y = machine.scratch::<f32>(27);
    let tensors = Widen {
        x: machine.input(&x).rows(2),
        from: machine.input(&from),
        columns: Columns::Zeros,
        y: machine.output(&mut y),
    };
    shape.widen(&machine, tensors).unwrap();
    let found = machine.download(&y);
    let of = |first: f32| {
        let [a, b, c] = [first, first + 2.0, first + 4.0];
        [a, a + 1.0, 0.0, b, b + 1.0, 0.0, c, c + 1.0, 0.0]
    };
    assert_eq!(found, [of(6.0), of(0.0), of(6.0)].concat());
}

#[test]
fn shapes_and_tensors_that_do_not_fit_are_refused() {
    let shape = WidenShape {
        rows: 12,
        group: 3,
        sources: 2,
        width: 16,
        columns: 8,
    };
    let tensors = || Widen::<f32> {
        x: tensor(0x10000, 96).rows(16),
        from: tensor(0x20000, 4),
        columns: Columns::OneHot(tensor(0x30000, 12)),
        y: target(0x40000, 12 * 24),
    };
    let launch = shape.plan(&tensors()).map(|launch| launch.grid());
    assert_eq!(launch.unwrap(), [2, 1, 1]);
    for (shape, part) in [
        (WidenShape { group: 5, ..shape }, "group is 5 of 12 rows"),
        (WidenShape { group: 0, ..shape }, "group is 0 of 12 rows"),
        (WidenShape { width: 0, ..shape }, "width is 0"),
        (
            WidenShape {
                columns: 65537,
                ..shape
            },
            "columns is 65537",
        ),
        (
            WidenShape {
                sources: 1 << 30,
                ..shape
            },
            "sources is 1073741824 groups of 3",
        ),
    ] {
        assert_refused(shape.plan(&tensors()), &[part]);
    }
    let wrong = Widen {
        columns: Columns::Given(tensor(0x30000, 12)),
        ..tensors()
    };
    assert_refused(
        shape.plan(&wrong),
        &["columns has 12 elements, expected 96"],
    );
    let wrong = Widen {
        y: target(0x10000, 12 * 24),
        ..tensors()
    };
    assert_refused(shape.plan(&wrong), &["y and x overlap"]);

    let shape = LossShape {
        tokens: 20,
        width: 16,
        columns: 40,
    };
    let tensors = || Loss::<bf16> {
        y: tensor(0x10000, 20 * 56),
        to: tensor(0x20000, 20),
        earlier: tensor(0x30000, 20),
        wanted: tensor(0x40000, 40),
        weight: tensor(0x50000, 1),
        read: target(0x60000, 320).rows(16),
        gradient: target(0x70000, 800),
        loss: target(0x80000, 1),
        workspace: target(0x90000, shape.workspace().unwrap()),
    };
    shape.plan(&tensors()).unwrap();
    let wrong = Loss {
        wanted: tensor(0x40000, 20),
        ..tensors()
    };
    assert_refused(shape.plan(&wrong), &["wanted has 20 elements, expected 40"]);
    let wrong = Loss {
        gradient: target(0x10000, 800),
        ..tensors()
    };
    assert_refused(shape.plan(&wrong), &["gradient and y overlap"]);
    let none = LossShape { width: 0, ..shape };
    assert_refused(none.plan(&tensors()), &["width is 0"]);
}
