use dtmem::ops::tokens;
use half::{bf16, f16};
use ndarray::{Array2, s};
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::ChaCha8Rng};

use crate::common::{Number, assert_close, assert_near, assert_refused, draw, target, tensor};
use crate::machines::{Machine, host, on_gpu};

/// Return, observation and action tokens in turn, and padding at the end.
fn check_batch<T: Number>(machine: &impl Machine, (rows, width): (usize, usize), seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let steps = 5;
    let tokens = 3 * rows + 2;
    let shape = tokens::Shape {
        tokens,
        observations: rows,
        actions: rows + 1,
        returns: rows,
        steps,
        width,
    };
    let kinds: Vec<u8> = (0..tokens)
        .map(|token| {
            if token < 3 * rows {
                [2, 0, 1][token % 3]
            } else {
                3
            }
        })
        .collect();
    let token_rows: Vec<_> = (0..tokens as i32).map(|token| token / 3).collect();
    let times: Vec<_> = (0..tokens)
        .map(|token| {
            if token < 3 * rows {
                random.random_range(0..steps as i32)
            } else {
                -1
            }
        })
        .collect();
    let of_kind = |first: i32, count: usize| -> Vec<_> {
        (0..count as i32)
            .map(|row| {
                if row < rows as i32 {
                    3 * row + first
                } else {
                    -1
                }
            })
            .collect()
    };
    let [observation_tokens, action_tokens, return_tokens] =
        [of_kind(1, rows), of_kind(2, rows + 1), of_kind(0, rows)];
    let [observations, actions, returns, positions] =
        [rows, rows + 1, rows, steps].map(|rows| draw::<T, _>(&mut random, (rows, width)));
    let dout = draw::<T, _>(&mut random, (tokens, width));
    let mut dpositions = draw::<f32, _>(&mut random, (steps, width));

    let kinds_memory = machine.upload(&kinds);
    let [rows_memory, times_memory] = [&token_rows, &times].map(|x| machine.upload(x));
    let embeddings =
        [&observations, &actions, &returns, &positions].map(|x| machine.numbers::<T, _>(x));
    let mut out = machine.scratch::<T>(tokens * width);
    let assemble = tokens::Assemble {
        kinds: machine.input(&kinds_memory),
        rows: machine.input(&rows_memory),
        times: machine.input(&times_memory),
        observations: machine.input(&embeddings[0]),
        actions: machine.input(&embeddings[1]),
        returns: Some(machine.input(&embeddings[2])),
        positions: machine.input(&embeddings[3]),
        out: machine.output(&mut out),
    };
    shape.assemble(machine, assemble).unwrap();

    let dout_memory = machine.numbers::<T, _>(&dout);
    let index = [&observation_tokens, &action_tokens, &return_tokens].map(|x| machine.upload(x));
    let [mut dobservations, mut dactions, mut dreturns] =
        [rows, rows + 1, rows].map(|rows| machine.scratch::<T>(rows * width));
    let take_apart = tokens::TakeApart {
        dout: machine.input(&dout_memory),
        observations: tokens::Part {
            tokens: machine.input(&index[0]),
            gradient: machine.output(&mut dobservations),
        },
        actions: tokens::Part {
            tokens: machine.input(&index[1]),
            gradient: machine.output(&mut dactions),
        },
        returns: Some(tokens::Part {
            tokens: machine.input(&index[2]),
            gradient: machine.output(&mut dreturns),
        }),
    };
    shape.take_apart(machine, take_apart).unwrap();

    let (step_offsets, step_tokens) = tokens::by_time_step(&times, steps);
    let [step_offsets, step_tokens] = [&step_offsets, &step_tokens].map(|x| machine.upload(x));
    let mut dpositions_memory = machine.numbers::<f32, _>(&dpositions);
    let gradient = tokens::PositionGradient {
        dout: machine.input(&dout_memory),
        step_offsets: machine.input(&step_offsets),
        step_tokens: machine.input(&step_tokens),
        dpositions: machine.output(&mut dpositions_memory),
    };
    shape.position_gradient(machine, gradient).unwrap();

    let mut expected = Array2::zeros((tokens, width));
    for token in 0..3 * rows {
        let embeddings = [&observations, &actions, &returns][usize::from(kinds[token])];
        let sum = &embeddings.row(token / 3) + &positions.row(times[token] as usize);
        expected
            .row_mut(token)
            .assign(&sum.map(|&x| T::round(x).widen()));
        let mut position = dpositions.row_mut(times[token] as usize);
        position += &dout.row(token);
    }
    assert_close("out", &machine.download(&out), &expected, 0.0);
    for (name, found, tokens) in [
        (
            "dobservations",
            machine.download(&dobservations),
            &observation_tokens,
        ),
        ("dactions", machine.download(&dactions), &action_tokens),
        ("dreturns", machine.download(&dreturns), &return_tokens),
    ] {
        let expected = Array2::from_shape_fn((tokens.len(), width), |(row, column)| {
            usize::try_from(tokens[row]).map_or(0.0, |token| dout[[token, column]])
        });
        assert_close(name, &found, &expected, 0.0);
    }
    let made_of = dout.iter().map(|x| x * x).sum::<f64>().sqrt();
    let found = machine.download(&dpositions_memory);
    assert_near("dpositions", &found, &dpositions, f32::TOLERANCE, made_of);
}

/// Columns of wider rows to rows that are further apart, as for a cache of keys.
fn check_copy<T: Number>(machine: &impl Machine, (rows, width): (usize, usize), seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let x = draw::<T, _>(&mut random, (rows + 1, 3 * width));
    let mut y = draw::<T, _>(&mut random, (2 * rows + 1, width));
    let from: Vec<i32> = (0..rows)
        .map(|_| random.random_range(-1..=rows as i32))
        .collect();
    let to: Vec<_> = (0..rows as i32)
        .map(|row| if row == 1 { -1 } else { 2 * row + 1 })
        .collect();
    let [x_memory, mut y_memory] = [&x, &y].map(|x| machine.numbers::<T, _>(x));
    let [from_memory, to_memory] = [&from, &to].map(|x| machine.upload(x));
    let shape = tokens::CopyShape {
        rows,
        width,
        x_rows: rows + 1,
        y_rows: 2 * rows + 1,
    };
    let [_, columns] = machine
        .input(&x_memory)
        .rows(3 * width)
        .columns([width, width]);
    let copy = tokens::Copy {
        x: columns,
        from: Some(machine.input(&from_memory)),
        to: Some(machine.input(&to_memory)),
        y: machine.output(&mut y_memory).rows(width),
    };
    shape.copy(machine, copy).unwrap();
    for (&from, &to) in from.iter().zip(&to) {
        let Ok(to) = usize::try_from(to) else {
            continue;
        };
        match usize::try_from(from) {
            Ok(from) => y.row_mut(to).assign(&x.slice(s![from, width..2 * width])),
            Err(_) => y.row_mut(to).fill(0.0),
        }
    }
    assert_close("y", &machine.download(&y_memory), &y, 0.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn tokens_and_copies_on_the_host_are_those_of_the_batch(
        rows in 0..12_usize, width in prop_oneof![1..20_usize, Just(64), 250..270_usize], seed: u64,
    ) {
        check_batch::<f32>(&host(seed), (rows, width), seed);
        check_batch::<bf16>(&host(seed), (rows, width), seed);
        check_batch::<f16>(&host(seed), (rows, width), seed);
        check_copy::<f32>(&host(seed), (rows, width), seed);
        check_copy::<bf16>(&host(seed), (rows, width), seed);
        check_copy::<f16>(&host(seed), (rows, width), seed);
    }
}

#[test]
fn tokens_and_copies_on_a_gpu_are_those_of_the_batch() {
    on_gpu(|device| {
        for (seed, dim) in [(1, 1), (40, 33), (2000, 512), (3, 50_000)]
            .into_iter()
            .enumerate()
        {
            check_batch::<f32>(device, dim, seed as u64);
            check_batch::<bf16>(device, dim, seed as u64);
            check_batch::<f16>(device, dim, seed as u64);
            check_copy::<f32>(device, dim, seed as u64);
            check_copy::<bf16>(device, dim, seed as u64);
            check_copy::<f16>(device, dim, seed as u64);
        }
    });
}

const SHAPE: tokens::Shape = tokens::Shape {
    tokens: 20,
    observations: 9,
    actions: 8,
    returns: 0,
    steps: 4,
    width: 600,
};

fn assemble() -> tokens::Assemble<'static, f32> {
    tokens::Assemble {
        kinds: tensor(0x10000, 20),
        rows: tensor(0x20000, 20),
        times: tensor(0x30000, 20),
        observations: tensor(0x40000, 9 * 600),
        actions: tensor(0x50000, 8 * 600),
        returns: None,
        positions: tensor(0x60000, 4 * 600),
        out: target(0x70000, 20 * 600),
    }
}

#[test]
fn plans_cover_all_rows_and_columns() {
    let tensors = assemble();
    let launch = SHAPE.plan_assemble(&tensors).unwrap();
    assert_eq!(
        (launch.kernel(), launch.grid()),
        ("tokens_assemble_f32", [3, 3, 1])
    );
    let tensors = tokens::TakeApart::<f32> {
        dout: tensor(0x10000, 20 * 600),
        observations: tokens::Part {
            tokens: tensor(0x30000, 9),
            gradient: target(0x50000, 9 * 600),
        },
        actions: tokens::Part {
            tokens: tensor(0x40000, 8),
            gradient: target(0x60000, 8 * 600),
        },
        returns: None,
    };
    let launch = SHAPE.plan_take_apart(&tensors).unwrap();
    assert_eq!(
        (launch.kernel(), launch.grid()),
        ("tokens_take_apart_f32", [3, 3, 1])
    );
    let tensors = tokens::PositionGradient::<f32> {
        dout: tensor(0x10000, 20 * 600),
        step_offsets: tensor(0x30000, 5),
        step_tokens: tensor(0x40000, 17),
        dpositions: target(0x50000, 4 * 600),
    };
    let launch = SHAPE.plan_position_gradient(&tensors).unwrap();
    assert_eq!(
        (launch.kernel(), launch.grid()),
        ("tokens_position_gradient_f32", [4, 3, 1])
    );
}

#[test]
fn shapes_and_tensors_that_do_not_fit_are_refused() {
    for (shape, part) in [
        (tokens::Shape { width: 0, ..SHAPE }, "width is 0"),
        (
            tokens::Shape {
                width: 1 << 24,
                ..SHAPE
            },
            "width is 16777216",
        ),
        (
            tokens::Shape {
                returns: 1,
                ..SHAPE
            },
            "returns is 1",
        ),
        (
            tokens::Shape {
                tokens: 1 << 31,
                ..SHAPE
            },
            "tokens is",
        ),
    ] {
        assert_refused(shape.plan_assemble(&assemble()), &[part]);
    }
    let tensors = tokens::Assemble {
        actions: tensor(0x50000, 9 * 600),
        ..assemble()
    };
    assert_refused(
        SHAPE.plan_assemble(&tensors),
        &["actions has 5400 elements, expected 4800"],
    );

    let shape = tokens::CopyShape {
        rows: 5,
        width: 8,
        x_rows: 4,
        y_rows: 5,
    };
    let copy = |from| tokens::Copy::<f32> {
        x: tensor(0x10000, 32).rows(8),
        from,
        to: None,
        y: target(0x20000, 40).rows(8),
    };
    assert_refused(
        shape.plan(&copy(None)),
        &["rows is 5", "at most 4 without `from`"],
    );
    shape.plan(&copy(Some(tensor(0x30000, 5)))).unwrap();
}
