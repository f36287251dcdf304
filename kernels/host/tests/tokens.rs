//! tokens.cu against loops over the batch.

mod common;

use common::{
    Random, Storage, assert_close, assert_every_barrier_is_needed, in_every_order, upload,
};
use dtmem_host::{Arg, Buffer, Executor, Launch, Result};
use half::{bf16, f16};
use ndarray::{Array2, s};
use proptest::prelude::*;

const THREADS: u32 = 256;
const STEPS: usize = 7;

/// A batch as tokens.cu describes it. Kind 3 is padding.
struct Batch {
    kinds: Vec<u8>,
    rows: Vec<i32>,
    times: Vec<i32>,
    /// Packed token of each row, of each kind; the last row of each kind belongs to no token.
    tokens: [Vec<i32>; 3],
    step_offsets: Vec<i32>,
    step_tokens: Vec<i32>,
}

impl Batch {
    fn draw(tokens: usize, random: &mut Random) -> Self {
        let kinds: Vec<u8> = (0..tokens).map(|_| (random.bits() % 4) as u8).collect();
        let times: Vec<i32> = kinds
            .iter()
            .map(|_| (random.bits() % STEPS as u64) as i32)
            .collect();
        let mut of_kind: [Vec<i32>; 3] = Default::default();
        let mut rows = Vec::new();
        for (token, &kind) in kinds.iter().enumerate() {
            let of_kind = of_kind.get_mut(usize::from(kind));
            rows.push(of_kind.map_or(-1, |tokens| {
                tokens.push(token as i32);
                tokens.len() as i32 - 1
            }));
        }
        for tokens in &mut of_kind {
            tokens.push(-1);
        }
        let (mut step_offsets, mut step_tokens) = (vec![0], Vec::new());
        for step in 0..STEPS {
            step_tokens.extend((0..tokens as i32).filter(|&token| {
                kinds[token as usize] < 3 && times[token as usize] == step as i32
            }));
            step_offsets.push(step_tokens.len() as i32);
        }
        Self {
            kinds,
            rows,
            times,
            tokens: of_kind,
            step_offsets,
            step_tokens,
        }
    }
}

fn launch<T: Storage>(
    executor: &Executor,
    kernel: &str,
    blocks: usize,
    width: usize,
    args: &[Arg],
) -> Result<()> {
    let grid = [blocks as u32, width.div_ceil(256) as u32, 1];
    if grid[0] == 0 {
        return Ok(());
    }
    let kernel = format!("tokens_{kernel}_{}", T::NAME);
    executor.launch(&kernel, Launch::new(grid, [THREADS, 1, 1]), args)
}

fn assemble<T: Storage>(
    executor: &Executor,
    batch: &Batch,
    embeddings: &[Array2<f64>; 3],
    positions: &Array2<f64>,
) -> Result<Vec<T>> {
    let (tokens, width) = (batch.kinds.len(), positions.ncols());
    let kinds = executor.upload(&batch.kinds);
    let [rows, times] = [&batch.rows, &batch.times].map(|x| executor.upload(x));
    let embeddings = embeddings.each_ref().map(|x| upload::<T, _>(executor, x));
    let positions = upload::<T, _>(executor, positions);
    let out = executor.scratch::<T>(tokens * width);
    let args = [
        Arg::Input(kinds.view()),
        Arg::Input(rows.view()),
        Arg::Input(times.view()),
        Arg::Input(embeddings[0].view()),
        Arg::Input(embeddings[1].view()),
        Arg::Input(embeddings[2].view()),
        Arg::Input(positions.view()),
        Arg::Output(out.view()),
        Arg::I32(tokens as i32),
        Arg::I32(width as i32),
    ];
    launch::<T>(executor, "assemble", tokens.div_ceil(8), width, &args)?;
    Ok(out.download())
}

fn take_apart<T: Storage>(
    executor: &Executor,
    batch: &Batch,
    dout: &Array2<f64>,
) -> Result<[Vec<T>; 3]> {
    let width = dout.ncols();
    let dout = upload::<T, _>(executor, dout);
    let tokens = batch
        .tokens
        .each_ref()
        .map(|tokens| executor.upload(tokens));
    let counts = batch.tokens.each_ref().map(Vec::len);
    let gradients = counts.map(|rows| executor.scratch::<T>(rows * width));
    let mut args = vec![Arg::Input(dout.view())];
    args.extend(tokens.iter().map(|tokens| Arg::Input(tokens.view())));
    args.extend(
        gradients
            .iter()
            .map(|gradient| Arg::Output(gradient.view())),
    );
    args.extend(counts.map(|rows| Arg::I32(rows as i32)));
    args.push(Arg::I32(width as i32));
    let rows: usize = counts.iter().sum();
    launch::<T>(executor, "take_apart", rows.div_ceil(8), width, &args)?;
    Ok(gradients.each_ref().map(Buffer::download))
}

fn position_gradient<T: Storage>(
    executor: &Executor,
    batch: &Batch,
    dout: &Array2<f64>,
    before: &Array2<f64>,
) -> Result<Vec<f32>> {
    let width = dout.ncols();
    let dout = upload::<T, _>(executor, dout);
    let offsets = executor.upload(&batch.step_offsets);
    let tokens = executor.upload(&batch.step_tokens);
    let gradient = upload::<f32, _>(executor, before);
    let args = [
        Arg::Input(dout.view()),
        Arg::Input(offsets.view()),
        Arg::Input(tokens.view()),
        Arg::Output(gradient.view()),
        Arg::I32(width as i32),
    ];
    launch::<T>(executor, "position_gradient", STEPS, width, &args)?;
    Ok(gradient.download())
}

fn check_batch<T: Storage>(tokens: usize, width: usize, seed: u64) {
    let mut random = Random(seed);
    let batch = Batch::draw(tokens, &mut random);
    let embeddings = batch
        .tokens
        .each_ref()
        .map(|tokens| random.array::<T, _>((tokens.len(), width)));
    let positions = random.array::<T, _>((STEPS, width));
    let dout = random.array::<T, _>((tokens, width));
    let before = random.array::<f32, _>((STEPS, width));
    let (out, gradients, dpositions) = in_every_order(|executor| {
        let run = || {
            Ok((
                assemble::<T>(executor, &batch, &embeddings, &positions)?,
                take_apart::<T>(executor, &batch, &dout)?,
                position_gradient::<T>(executor, &batch, &dout, &before)?,
            ))
        };
        run().unwrap_or_else(|error: dtmem_host::Error| panic!("{error}"))
    });

    let mut expected = Array2::zeros((tokens, width));
    let mut expected_positions = before;
    let mut expected_gradients = embeddings.each_ref().map(|x| Array2::<f64>::zeros(x.dim()));
    for token in 0..tokens {
        let (kind, time) = (usize::from(batch.kinds[token]), batch.times[token] as usize);
        if kind < 3 {
            let row = batch.rows[token] as usize;
            let sum = &embeddings[kind].row(row) + &positions.row(time);
            expected
                .row_mut(token)
                .assign(&sum.map(|&x| T::round(x).widen()));
            expected_gradients[kind]
                .row_mut(row)
                .assign(&dout.row(token));
            let mut position = expected_positions.row_mut(time);
            position += &dout.row(token);
        }
    }
    assert_close("out", &out, &expected, 0.0);
    for (found, expected) in gradients.iter().zip(&expected_gradients) {
        assert_close("gradient of embeddings", found, expected, 0.0);
    }
    let name = "gradient of positions";
    assert_close(name, &dpositions, &expected_positions, f32::TOLERANCE);
}

struct Copy {
    x: Array2<f64>,
    /// First column, and columns, of the rows that are read; y has one column more in front.
    first: usize,
    width: usize,
    from: Option<Vec<i32>>,
    to: Option<Vec<i32>>,
    rows: usize,
}

impl Copy {
    fn run<T: Storage>(&self, executor: &Executor, y: &Array2<f64>) -> Result<Vec<T>> {
        let [x_stride, y_stride] = [self.x.ncols(), y.ncols()];
        let x = upload::<T, _>(executor, &self.x);
        let y = upload::<T, _>(executor, y);
        let upload = |index: &Option<Vec<i32>>| index.as_ref().map(|index| executor.upload(index));
        let (from, to) = (upload(&self.from), upload(&self.to));
        let view = |index: &Option<Buffer<i32>>| {
            index
                .as_ref()
                .map_or(dtmem_host::View::NULL, |index| index.view())
        };
        let args = [
            Arg::Input(x.slice(self.first..x.len())),
            Arg::Input(view(&from)),
            Arg::Input(view(&to)),
            Arg::Output(y.slice(1..y.len())),
            Arg::I32(self.rows as i32),
            Arg::I32(self.width as i32),
            Arg::I32(x_stride as i32),
            Arg::I32(y_stride as i32),
        ];
        launch::<T>(
            executor,
            "copy_rows",
            self.rows.div_ceil(8),
            self.width,
            &args,
        )?;
        Ok(y.download())
    }
}

fn check_copy<T: Storage>(rows: usize, width: usize, first: usize, index: [bool; 2], seed: u64) {
    let mut random = Random(seed);
    let x = random.array::<T, _>((rows + 2, width + first));
    let mut y = random.array::<T, _>((rows + 3, width + 1));
    let from = index[0].then(|| {
        (0..rows)
            .map(|_| (random.bits() % (rows as u64 + 3)) as i32 - 1)
            .collect::<Vec<_>>()
    });
    // Each row of y at most once: a rotation, and one row to nowhere.
    let to = index[1].then(|| {
        let shift = (random.bits() % (rows as u64 + 3)) as usize;
        let mut to: Vec<_> = (0..rows)
            .map(|row| ((row + shift) % (rows + 3)) as i32)
            .collect();
        if let Some(last) = to.last_mut() {
            *last = -1;
        }
        to
    });
    let copy = Copy {
        x,
        first,
        width,
        from,
        to,
        rows,
    };
    let found = in_every_order(|executor| {
        copy.run::<T>(executor, &y)
            .unwrap_or_else(|error| panic!("{error}"))
    });
    for row in 0..rows {
        let [source, target] = [&copy.from, &copy.to]
            .map(|index| index.as_ref().map_or(row as i32, |index| index[row]));
        let Ok(target) = usize::try_from(target) else {
            continue;
        };
        let mut y = y.slice_mut(s![target, 1..]);
        match usize::try_from(source) {
            Ok(source) => y.assign(&copy.x.slice(s![source, first..])),
            Err(_) => y.fill(0.0),
        }
    }
    assert_close("rows", &found, &y, 0.0);
}

/// Single elements, vectors, several slabs.
fn width() -> impl Strategy<Value = usize> {
    prop_oneof![1..20_usize, Just(64), Just(256), 250..270_usize, Just(520)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn tokens_are_put_together_and_taken_apart(
        tokens in prop_oneof![0..10_usize, 30..60_usize], width in width(), seed: u64,
    ) {
        check_batch::<f32>(tokens, width, seed);
        check_batch::<bf16>(tokens, width, seed);
        check_batch::<f16>(tokens, width, seed);
    }

    #[test]
    fn rows_are_copied_by_index(
        rows in 0..20_usize, width in width(), first in prop_oneof![Just(0), Just(8), 1..9_usize],
        index: [bool; 2], seed: u64,
    ) {
        check_copy::<f32>(rows, width, first, index, seed);
        check_copy::<bf16>(rows, width, first, index, seed);
        check_copy::<f16>(rows, width, first, index, seed);
    }
}

#[test]
fn every_barrier_is_needed() {
    let batch = Batch::draw(20, &mut Random(1));
    let (dout, before) = (Array2::ones((20, 64)), Array2::zeros((STEPS, 64)));
    let source = include_str!("../../tokens.cu");
    assert_every_barrier_is_needed("kernels/tokens.cu", source, |executor| {
        position_gradient::<f32>(executor, &batch, &dout, &before).map(|_| ())
    });
}
