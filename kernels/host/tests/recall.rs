//! recall.cu against the reference.

mod common;

use common::{Random, Storage, assert_close, in_every_order, upload};
use dtmem_host::{Arg, Executor, Launch, Result, View};
use dtmem_reference::attention::Pairs;
use dtmem_reference::recall::recall_loss;
use half::{bf16, f16};
use ndarray::{Array2, arr0, s};
use proptest::prelude::*;

const THREADS: u32 = 256;
const ROWS: usize = 8;
const WEIGHT: f32 = 0.375;

/// Elements behind a row, so that it is aligned where rows of `width` are.
fn gap(width: usize) -> usize {
    if width.is_multiple_of(8) { 8 } else { 3 }
}

fn launch(executor: &Executor, name: &str, blocks: usize, args: &[Arg]) -> Result<()> {
    if blocks == 0 {
        return Ok(());
    }
    executor.launch(
        name,
        Launch::new([blocks as u32, 1, 1], [THREADS, 1, 1]),
        args,
    )
}

/// What tokens have read, and what they should recall.
#[derive(Debug, Clone)]
struct Case {
    /// [tokens, D + C]
    y: Array2<f64>,
    width: usize,
    /// Where each token's row goes.
    to: Vec<i32>,
    earlier: Vec<usize>,
    wanted: Vec<Vec<usize>>,
}

impl Case {
    fn draw<T: Storage>(tokens: usize, width: usize, columns: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut y = random.array::<T, _>((tokens, width + columns));
        for share in y.slice_mut(s![.., width..]) {
            // Some are 0, some 1, and some a little beyond.
            let drawn = random.bits() % 1000;
            *share = match drawn % 10 {
                0 => 0.0,
                1 => T::round(1.0 + drawn as f64 * 1e-8).widen(),
                _ => T::round(drawn as f64 / 1000.0).widen(),
            };
        }
        let mut to: Vec<i32> = (0..tokens as i32).collect();
        to.reverse();
        let earlier: Vec<_> = (0..tokens)
            .map(|_| random.bits() as usize % (columns + 1))
            .collect();
        // Pairs of one segment are in the list of pairs, but not among the earlier ones.
        let wanted = (0..tokens)
            .map(|_| {
                (0..columns)
                    .filter(|_| random.bits().is_multiple_of(3))
                    .collect()
            })
            .collect();
        Self {
            y,
            width,
            to,
            earlier,
            wanted,
        }
    }

    fn columns(&self) -> usize {
        self.y.ncols() - self.width
    }

    fn words(&self) -> Vec<i32> {
        let of_token = |wanted: &Vec<usize>| {
            let mut words = vec![0_u32; self.columns().div_ceil(32)];
            for column in wanted {
                words[column / 32] |= 1 << (column % 32);
            }
            words.into_iter().map(u32::cast_signed).collect::<Vec<_>>()
        };
        self.wanted.iter().flat_map(of_token).collect()
    }

    /// The loss, dR and the rows of `read`.
    fn run<T: Storage>(&self, executor: &Executor) -> Result<(f32, Vec<T>, Vec<T>)> {
        let (tokens, width, columns) = (self.to.len(), self.width, self.columns());
        let stride = width + gap(width);
        let earlier: Vec<i32> = self.earlier.iter().map(|&count| count as i32).collect();
        let blocks = tokens.div_ceil(ROWS);
        let read = executor.scratch::<T>((tokens * stride).saturating_sub(gap(width)));
        let gradient = executor.scratch::<T>(tokens * columns);
        let (sums, loss) = (executor.scratch::<f32>(blocks), executor.scratch::<f32>(1));
        let y = upload::<T, _>(executor, &self.y);
        let to = executor.upload(&self.to);
        let (earlier, wanted) = (executor.upload(&earlier), executor.upload(&self.words()));
        let weight = executor.upload(&[WEIGHT]);
        let args = [
            Arg::Input(y.view()),
            Arg::Input(to.view()),
            Arg::Input(earlier.view()),
            Arg::Input(wanted.view()),
            Arg::Input(weight.view()),
            Arg::Output(read.view()),
            Arg::Output(gradient.view()),
            Arg::Output(sums.view()),
            Arg::I32(tokens as i32),
            Arg::I32(width as i32),
            Arg::I32(columns as i32),
            Arg::I32(stride as i32),
        ];
        launch(executor, &format!("recall_loss_{}", T::NAME), blocks, &args)?;
        let args = [
            Arg::Input(sums.view()),
            Arg::Output(loss.view()),
            Arg::I32(blocks as i32),
        ];
        launch(executor, "recall_sum", 1, &args)?;
        let read = read.download();
        let rows = read.chunks(stride);
        let read = rows.flat_map(|row| row[..width].to_vec()).collect();
        Ok((loss.download()[0], gradient.download(), read))
    }

    /// What a rounded share counts as.
    fn share<T: Storage>(share: f64) -> f64 {
        let [zero, one] = match T::NAME {
            "bf16" => [0.0, 1.0 - 0.5_f64.powi(10)],
            "f16" => [0.5_f64.powi(14), 1.0 - 0.5_f64.powi(13)],
            _ => [0.0, 1.0],
        };
        share.clamp(zero, one)
    }

    fn reference<T: Storage>(&self) -> (f64, Array2<f64>, Array2<f64>) {
        let (tokens, columns) = (self.to.len(), self.columns());
        let recalled: Vec<i32> = (0..columns as i32).collect();
        let mut gradient = Array2::from_elem((tokens, columns), f64::NAN);
        let mut loss = 0.0;
        for token in 0..tokens {
            let keys: Vec<i32> = self.wanted[token].iter().map(|&key| key as i32).collect();
            let at = s![token..token + 1, ..];
            let mut shares = self.y.slice(s![token..token + 1, self.width..]).to_owned();
            for (column, share) in shares.iter_mut().enumerate() {
                // A share of 1 that is wanted has neither loss nor gradient, one of 0 that is not neither.
                let wanted = self.wanted[token].contains(&column);
                if *share != f64::from(u8::from(wanted)) {
                    *share = Self::share::<T>(*share);
                }
            }
            loss += recall_loss(
                shares.view(),
                &recalled,
                self.earlier[token] as i32,
                Pairs {
                    offsets: &[0, keys.len() as i32],
                    keys: &keys,
                },
                f64::from(WEIGHT),
                gradient.slice_mut(at),
            )
            .unwrap();
        }
        let mut read = Array2::from_elem((tokens, self.width), f64::NAN);
        for (token, &to) in self.to.iter().enumerate() {
            let row = self.y.slice(s![token, ..self.width]);
            read.row_mut(to as usize).assign(&row);
        }
        (loss, gradient, read)
    }
}

fn check_loss<T: Storage>(tokens: usize, width: usize, columns: usize, seed: u64) {
    let case = Case::draw::<T>(tokens, width, columns, seed);
    let (loss, gradient, read) = in_every_order(|executor| {
        let (loss, gradient, read) = unwrap(case.run::<T>(executor));
        (vec![loss], gradient, read)
    });
    let (expected_loss, expected_gradient, expected_read) = case.reference::<T>();
    assert_close("loss", &loss, &arr0(expected_loss), f32::TOLERANCE);
    // What is close to 0 or 1 has gradients that outweigh all others.
    for (found, expected) in gradient.iter().zip(&expected_gradient) {
        assert_close("gradient", &[*found], &arr0(*expected), T::TOLERANCE);
    }
    assert_close("read", &read, &expected_read, 0.0);
}

fn unwrap<R>(run: Result<R>) -> R {
    run.unwrap_or_else(|error| panic!("{error}"))
}

/// Which columns rows get.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Columns {
    Zeros,
    OneHot,
    Given,
}

fn check_widen<T: Storage>(
    [groups, group, sources]: [usize; 3],
    [width, columns]: [usize; 2],
    kind: Columns,
    seed: u64,
) {
    let mut random = Random(seed);
    let rows = groups * group;
    let stride = width + gap(width);
    let x = random.array::<T, _>((sources * group, stride));
    let from: Vec<_> = (0..groups)
        .map(|_| (random.bits() % sources as u64) as i32)
        .collect();
    let one: Vec<_> = (0..rows)
        .map(|_| (random.bits() % (columns as u64 + 1)) as i32 - 1)
        .collect();
    let given = random.array::<T, _>((rows, columns));
    let found = in_every_order(|executor| {
        let y = executor.scratch::<T>(rows * (width + columns));
        let x = upload::<T, _>(executor, &x);
        let (from, one) = (executor.upload(&from), executor.upload(&one));
        let given = upload::<T, _>(executor, &given);
        let if_kind = |wanted: Columns, view: View| {
            Arg::Input(if kind == wanted { view } else { View::NULL })
        };
        let args = [
            Arg::Input(x.view()),
            Arg::Input(from.view()),
            if_kind(Columns::OneHot, one.view()),
            if_kind(Columns::Given, given.view()),
            Arg::Output(y.view()),
            Arg::I32(rows as i32),
            Arg::I32(group as i32),
            Arg::I32(width as i32),
            Arg::I32(columns as i32),
            Arg::I32(stride as i32),
        ];
        let name = format!("recall_widen_{}", T::NAME);
        unwrap(launch(executor, &name, rows.div_ceil(ROWS), &args));
        y.download()
    });
    let expected = Array2::from_shape_fn((rows, width + columns), |(row, column)| {
        let source = from[row / group] as usize * group + row % group;
        match (column.checked_sub(width), kind) {
            (None, _) => x[[source, column]],
            (Some(_), Columns::Zeros) => 0.0,
            (Some(column), Columns::OneHot) => f64::from(u8::from(one[row] == column as i32)),
            (Some(column), Columns::Given) => given[[row, column]],
        }
    });
    assert_close("y", &found, &expected, 0.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn loss_and_gradient_agree_with_the_reference(
        tokens in prop_oneof![0..20_usize, 60..70_usize],
        width in prop_oneof![1..10_usize, Just(64), 250..300_usize],
        columns in prop_oneof![1..10_usize, Just(8), 30..70_usize],
        seed: u64,
    ) {
        check_loss::<f32>(tokens, width, columns, seed);
        check_loss::<bf16>(tokens, width, columns, seed);
        check_loss::<f16>(tokens, width, columns, seed);
    }

    #[test]
    fn rows_get_their_columns(
        groups in 0..20_usize,
        group in prop_oneof![Just(1), 2..9_usize],
        sources in 1..5_usize,
        width in prop_oneof![1..10_usize, Just(64), 250..300_usize],
        columns in prop_oneof![1..10_usize, Just(8), 30..70_usize],
        kind in prop_oneof![Just(Columns::Zeros), Just(Columns::OneHot), Just(Columns::Given)],
        seed: u64,
    ) {
        let sizes = [groups, group, sources];
        check_widen::<f32>(sizes, [width, columns], kind, seed);
        check_widen::<bf16>(sizes, [width, columns], kind, seed);
        check_widen::<f16>(sizes, [width, columns], kind, seed);
    }
}

#[test]
fn what_is_not_a_number_stays_visible() {
    let mut case = Case::draw::<bf16>(20, 3, 2, 1);
    case.earlier[7] = 2;
    case.y[[7, 4]] = f64::NAN;
    let (loss, gradient, _) = case.run::<bf16>(&Executor::new()).unwrap();
    assert!(loss.is_nan());
    let nan: Vec<_> = (0..40).filter(|&at| gradient[at].is_nan()).collect();
    assert_eq!(nan, [15]);
}
