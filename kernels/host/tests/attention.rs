//! attention_forward.cu and attention_backward.cu, and attention_hopper.cu and attention_backward_hopper.cu, against
//! the reference.

mod common;

use common::{Random, Storage, assert_close, assert_every_barrier_is_needed, in_every_order};
use dtmem_host::{Arg, Boxes, Buffer, Executor, Launch, Result, TensorMap, View};
use dtmem_reference::attention::{Attention, Denominator, Mask, Supervision};
use half::{bf16, f16};
use ndarray::{Array2, Array3};
use proptest::prelude::*;

const THREADS: u32 = 128;
/// Elements behind each row of a buffer; keeps rows aligned to 16 bytes.
const GAP: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Shown {
    All,
    Causal,
    Window(usize),
    Groups,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Annotation {
    Unsupervised,
    NoPair,
    EveryPair,
    SomePairs,
    /// The pair is the query's own key, and the scores are large.
    Diagonal,
}

#[derive(Debug, Clone)]
struct Shape {
    /// Queries and keys of each sequence.
    lengths: Vec<(usize, usize)>,
    key_heads: usize,
    group: usize,
    width: usize,
    shown: Shown,
    annotation: Annotation,
    /// Factor of the queries: large ones saturate the rows.
    sharpness: f64,
    /// q, k and v in one buffer, if every sequence has as many queries as keys.
    fused: bool,
    seed: u64,
}

/// A shape filled with numbers.
struct Case {
    shape: Shape,
    heads: usize,
    cu_seqlens_q: Vec<i32>,
    cu_seqlens_k: Vec<i32>,
    groups: Vec<i32>,
    supervised: Vec<usize>,
    annotated: Vec<u8>,
    pair_offsets: Vec<i32>,
    pair_keys: Vec<i32>,
    denominator: Denominator,
    scale: f64,
    q: Array3<f64>,
    k: Array3<f64>,
    v: Array3<f64>,
    grad_out: Array3<f64>,
}

fn offsets(lengths: impl Iterator<Item = usize>) -> Vec<i32> {
    std::iter::once(0)
        .chain(lengths.scan(0, |sum, length| {
            *sum += length as i32;
            Some(*sum)
        }))
        .collect()
}

impl Case {
    fn draw<T: Storage>(shape: &Shape) -> Self {
        let mut random = Random(shape.seed);
        let heads = shape.key_heads * shape.group;
        let cu_seqlens_q = offsets(shape.lengths.iter().map(|&(queries, _)| queries));
        let cu_seqlens_k = offsets(shape.lengths.iter().map(|&(_, keys)| keys));
        let groups: Vec<i32> = shape
            .lengths
            .iter()
            .flat_map(|&(_, keys)| {
                let mut group = 0;
                (0..keys)
                    .map(|_| {
                        group += i32::from(random.bits().is_multiple_of(5));
                        group
                    })
                    .collect::<Vec<_>>()
            })
            .collect();
        let mut counts = Vec::new();
        let mut pair_keys = Vec::new();
        for (&(queries, keys), &start) in shape.lengths.iter().zip(&cu_seqlens_k) {
            let group = &groups[start as usize..];
            for query in 0..queries {
                let own = query + keys - queries;
                let before = pair_keys.len();
                pair_keys.extend(
                    (0..keys)
                        .filter(|&key| {
                            let shown = match shape.shown {
                                Shown::All => true,
                                Shown::Causal => key <= own,
                                Shown::Window(window) => key <= own && own < key + window,
                                Shown::Groups => group[key] <= group[own],
                            };
                            shown
                                && match shape.annotation {
                                    Annotation::Unsupervised | Annotation::NoPair => false,
                                    Annotation::EveryPair => true,
                                    Annotation::SomePairs => random.bits().is_multiple_of(3),
                                    Annotation::Diagonal => key == own,
                                }
                        })
                        .map(|key| key as i32),
                );
                counts.push(pair_keys.len() - before);
            }
        }
        let supervised = match shape.annotation {
            Annotation::Unsupervised => vec![],
            _ => (0..heads)
                .filter(|head| head % 2 == heads % 2 || heads == 1)
                .collect(),
        };
        let annotated = shape
            .lengths
            .iter()
            .map(|_| u8::from(!random.bits().is_multiple_of(4)))
            .collect();
        let denominator = match random.bits() % 2 {
            0 => Denominator::Square,
            _ => Denominator::Causal,
        };
        let [tokens_q, tokens_k] = [&cu_seqlens_q, &cu_seqlens_k].map(|x| x[x.len() - 1] as usize);
        let sharpness = shape.sharpness;
        let mut array = |tokens, heads| random.array::<T, _>((tokens, heads, shape.width));
        let mut q = array(tokens_q, heads).map(|&x| T::round(x * sharpness).widen());
        let k = array(tokens_k, shape.key_heads);
        if shape.annotation == Annotation::Diagonal {
            // Queries that are like their own key, so that they attend to it alone.
            for (&(queries, keys), (&first_q, &first_k)) in shape
                .lengths
                .iter()
                .zip(cu_seqlens_q.iter().zip(&cu_seqlens_k))
            {
                for query in 0..queries {
                    for head in 0..heads {
                        for d in 0..shape.width {
                            let key = first_k as usize + query + keys - queries;
                            q[[first_q as usize + query, head, d]] =
                                T::round(sharpness * k[[key, head / shape.group, d]]).widen();
                        }
                    }
                }
            }
        }
        Self {
            heads,
            groups,
            supervised,
            annotated,
            pair_offsets: offsets(counts.into_iter()),
            pair_keys,
            denominator,
            scale: f64::from((shape.width as f32).powf(-0.5)),
            q,
            k,
            v: array(tokens_k, shape.key_heads),
            grad_out: array(tokens_q, heads),
            cu_seqlens_q,
            cu_seqlens_k,
            shape: shape.clone(),
        }
    }

    fn attention(&self) -> Attention<'_> {
        Attention {
            cu_seqlens_q: &self.cu_seqlens_q,
            cu_seqlens_k: &self.cu_seqlens_k,
            scale: self.scale,
            mask: match self.shape.shown {
                Shown::All => Mask::None,
                Shown::Causal => Mask::Causal,
                Shown::Window(window) => Mask::SlidingWindow { window },
                Shown::Groups => Mask::GroupedCausal {
                    groups: &self.groups,
                },
            },
            supervision: (!self.supervised.is_empty()).then_some(Supervision {
                heads: &self.supervised,
                pair_offsets: &self.pair_offsets,
                pair_keys: &self.pair_keys,
                annotated: &self.annotated,
                denominator: self.denominator,
            }),
        }
    }

    /// Such that the memory loss weighs as much as the output, whatever its denominator.
    fn grad_memory_loss(&self) -> f32 {
        (0.5 * self.attention().denominator()) as f32
    }

    fn tokens(&self) -> (usize, usize) {
        (self.q.dim().0, self.k.dim().0)
    }

    fn mask(&self) -> [Arg; 2] {
        let (kind, window) = match self.shape.shown {
            Shown::All => (0, 0),
            Shown::Causal => (1, 0),
            Shown::Window(window) => (2, window),
            Shown::Groups => (3, 0),
        };
        [Arg::I32(kind), Arg::I32(window as i32)]
    }
}

/// Tensors [tokens, heads, width] side by side in one buffer, whose rows end with elements that belong to nobody.
struct Strided<T> {
    buffer: Buffer<T>,
    columns: Vec<usize>,
    stride: usize,
}

impl<T: Storage> Strided<T> {
    fn upload(executor: &Executor, parts: &[&Array3<f64>]) -> Self {
        let columns: Vec<_> = parts.iter().map(|x| x.dim().1 * x.dim().2).collect();
        let mut content = Vec::new();
        for token in 0..parts[0].dim().0 {
            for part in parts {
                content.extend(
                    part.index_axis(ndarray::Axis(0), token)
                        .iter()
                        .map(|&x| T::round(x)),
                );
            }
            content.extend([T::round(f64::NAN); GAP]);
        }
        Self {
            buffer: executor.upload(&content),
            stride: columns.iter().sum::<usize>() + GAP,
            columns,
        }
    }

    fn scratch(executor: &Executor, parts: &[&Array3<f64>]) -> Self {
        let columns: Vec<_> = parts.iter().map(|x| x.dim().1 * x.dim().2).collect();
        let stride = columns.iter().sum::<usize>() + GAP;
        Self {
            buffer: executor.scratch(parts[0].dim().0 * stride),
            stride,
            columns,
        }
    }

    fn start(&self, part: usize) -> usize {
        self.columns[..part].iter().sum()
    }

    fn view(&self, part: usize) -> View {
        self.buffer.slice(self.start(part)..self.buffer.len())
    }

    fn stride(&self) -> Arg {
        Arg::I32(self.stride as i32)
    }

    fn download(&self, part: usize) -> Vec<T> {
        let content = self.buffer.download();
        content
            .chunks_exact(self.stride)
            .flat_map(|row| row[self.start(part)..][..self.columns[part]].to_vec())
            .collect()
    }
}

/// q, k, v or their gradients: parts of one buffer, or buffers of their own.
struct Three<T> {
    buffers: Vec<Strided<T>>,
}

impl<T: Storage> Three<T> {
    fn new(case: &Case, of: impl Fn(&[&Array3<f64>]) -> Strided<T>) -> Self {
        let parts = [&case.q, &case.k, &case.v];
        let fused = case.shape.fused && case.cu_seqlens_q == case.cu_seqlens_k;
        let buffers = match fused {
            true => vec![of(&parts)],
            false => parts.iter().map(|&part| of(&[part])).collect(),
        };
        Self { buffers }
    }

    fn of(&self, part: usize) -> (&Strided<T>, usize) {
        match self.buffers.get(part) {
            Some(buffer) if self.buffers.len() > 1 => (buffer, 0),
            _ => (&self.buffers[0], part),
        }
    }

    fn view(&self, part: usize) -> View {
        let (buffer, part) = self.of(part);
        buffer.view(part)
    }

    fn stride(&self, part: usize) -> Arg {
        self.of(part).0.stride()
    }

    fn map(&self, part: usize, tokens: usize, box_rows: usize) -> Arg {
        let (buffer, part) = self.of(part);
        if tokens == 0 {
            return Arg::Map(TensorMap::EMPTY);
        }
        let map = TensorMap::new(Boxes {
            address: buffer.view(part).address,
            element: size_of::<T>(),
            columns: buffer.columns[part] as u64,
            rows: tokens as u64,
            stride: (buffer.stride * size_of::<T>()) as u64,
            box_columns: 64,
            box_rows: box_rows as u32,
        });
        Arg::Map(map.expect("rows are aligned"))
    }

    fn download(&self, part: usize) -> Vec<T> {
        let (buffer, part) = self.of(part);
        buffer.download(part)
    }
}

/// Everything that the kernels wrote.
#[derive(Debug, PartialEq)]
struct Run<T> {
    out: Vec<T>,
    lse: Vec<f32>,
    loss: Vec<f32>,
    gradients: [Vec<T>; 3],
}

/// Which kernels compute both passes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Version {
    Portable,
    Hopper,
}

/// Forward, loss and backward, as a training step launches them.
fn run<T: Storage>(executor: &Executor, case: &Case, version: Version) -> Result<Run<T>> {
    let (tokens_q, tokens_k) = case.tokens();
    let (heads, key_heads, width) = (case.heads, case.shape.key_heads, case.shape.width);
    let sequences = case.shape.lengths.len();
    let input = Three::new(case, |parts| Strided::<T>::upload(executor, parts));
    let out = Strided::<T>::scratch(executor, &[&case.q]);
    let grad_out = Strided::<T>::upload(executor, &[&case.grad_out]);
    let gradients = Three::new(case, |parts| Strided::<T>::scratch(executor, parts));
    let [lse, delta] = [(); 2].map(|()| executor.scratch::<f32>(tokens_q * heads));
    let [cu_seqlens_q, cu_seqlens_k] =
        [&case.cu_seqlens_q, &case.cu_seqlens_k].map(|x| executor.upload(x));
    let groups = executor.upload(&case.groups);
    let groups = match case.shape.shown {
        Shown::Groups => groups.view(),
        _ => View::NULL,
    };

    let supervised = !case.supervised.is_empty();
    let optional = |view: View| if supervised { view } else { View::NULL };
    let slots: Vec<i32> = (0..heads)
        .map(|head| {
            case.supervised
                .iter()
                .position(|&h| h == head)
                .map_or(-1, |slot| slot as i32)
        })
        .collect();
    let slots = executor.upload(&slots);
    let annotated = executor.upload(&case.annotated);
    let [pair_offsets, pair_keys] =
        [&case.pair_offsets, &case.pair_keys].map(|x| executor.upload(x));
    let rows = tokens_q * case.supervised.len();
    let peak = executor.scratch::<i32>(rows);
    let [shift, at_peak, row_loss] = [(); 3].map(|()| executor.scratch::<f32>(rows));
    let [sum, loss, factor] = [(); 3].map(|()| executor.scratch::<f32>(1));
    let grad_memory_loss = executor.upload(&[case.grad_memory_loss()]);

    let row_bytes = width * size_of::<T>();
    // Tokens of a block: twice as many where the accumulators of that many fit.
    let twice = width <= 64 && size_of::<T>() == 2;
    let rows = match width {
        _ if twice => 128,
        ..=128 => 64,
        _ => 32,
    };
    let launch = |name: &str, grid: [u32; 2], threads: u32, shared_bytes: usize, args: &[Arg]| {
        let launch = Launch {
            shared_bytes: shared_bytes as u32,
            ..Launch::new([grid[0], grid[1], 1], [threads, 1, 1])
        };
        executor.launch(name, launch, args)
    };

    let pack = [
        Arg::Input(cu_seqlens_q.view()),
        Arg::Input(cu_seqlens_k.view()),
        Arg::Input(groups),
    ];
    let supervision = [
        Arg::Input(optional(slots.view())),
        Arg::Input(optional(annotated.view())),
        Arg::Input(optional(pair_offsets.view())),
        Arg::Input(optional(pair_keys.view())),
    ];
    let sizes = [
        Arg::I32(sequences as i32),
        Arg::I32(heads as i32),
        Arg::I32(key_heads as i32),
        Arg::I32(case.supervised.len() as i32),
        input.stride(0),
        input.stride(1),
        input.stride(2),
    ];
    let scale = Arg::F32(case.scale as f32);

    let mut args = vec![];
    args.extend([0, 1, 2].map(|part| Arg::Input(input.view(part))));
    args.extend([Arg::Output(out.view(0)), Arg::Output(lse.view())]);
    args.extend(pack);
    args.extend(supervision);
    args.push(Arg::Output(optional(peak.view())));
    args.extend([&shift, &at_peak, &row_loss].map(|x| Arg::Output(optional(x.view()))));
    args.extend(sizes);
    args.push(out.stride());
    args.extend(case.mask());
    args.push(scale);
    let kind = if supervised { "_bce" } else { "" };
    let (name, rows_of_block, threads, shared_bytes) = match version {
        Version::Portable => {
            let keys = match row_bytes {
                ..=256 => 64,
                257..=512 => 32,
                _ => 16,
            };
            ("forward", rows, THREADS, (rows + 4 * keys) * row_bytes)
        }
        Version::Hopper => {
            // 64 queries for each warpgroup but one; places for tiles of 128 keys, and as many for values.
            let (groups, places) = if width == 64 { (3, 4) } else { (2, 3) };
            let queries = 64 * groups;
            let tiles = (queries + 2 * places * 128) * row_bytes;
            args.push(input.map(0, tokens_q, queries));
            args.extend([1, 2].map(|part| input.map(part, tokens_k, 128)));
            let barriers = 8 * (1 + 4 * places);
            let threads = 128 * (groups as u32 + 1);
            ("hopper", queries, threads, tiles + 8 * queries + barriers)
        }
    };
    launch(
        &format!("attention_{name}{kind}_{width}_{}", T::NAME),
        [(tokens_q / rows_of_block + sequences) as u32, heads as u32],
        threads,
        shared_bytes,
        &args,
    )?;

    if supervised {
        let mut args = vec![Arg::Input(row_loss.view())];
        args.extend(pack);
        args.extend([
            Arg::Input(annotated.view()),
            Arg::Output(sum.view()),
            Arg::Output(loss.view()),
            Arg::Output(factor.view()),
            Arg::I32(sequences as i32),
            Arg::I32(case.supervised.len() as i32),
        ]);
        args.extend(case.mask());
        args.push(Arg::I32(i32::from(case.denominator == Denominator::Square)));
        launch("attention_loss", [1, 1], 1024, 0, &args)?;
    }

    launch(
        &format!("attention_delta_{}", T::NAME),
        [(tokens_q * heads).div_ceil(4) as u32, 1],
        THREADS,
        0,
        &[
            Arg::Input(grad_out.view(0)),
            Arg::Input(out.view(0)),
            Arg::Output(delta.view()),
            Arg::I32(tokens_q as i32),
            Arg::I32(heads as i32),
            Arg::I32(width as i32),
            grad_out.stride(),
            out.stride(),
        ],
    )?;

    let mut inputs = vec![];
    inputs.extend([0, 1, 2].map(|part| Arg::Input(input.view(part))));
    inputs.extend([grad_out.view(0), lse.view(), delta.view()].map(Arg::Input));
    inputs.extend(pack);
    inputs.extend(supervision);
    inputs.push(Arg::Input(optional(peak.view())));
    inputs.extend(
        [&shift, &at_peak, &factor, &grad_memory_loss].map(|x| Arg::Input(optional(x.view()))),
    );
    let mut numbers = case.mask().to_vec();
    numbers.push(scale);
    let others = match row_bytes {
        ..=256 => 32,
        257..=512 => 16,
        _ => 8,
    };
    // `hopper_bytes`: shared memory that the version for Hopper wants beside its tiles.
    let gradient = |name: &str, grid: [usize; 2], others: usize, hopper_bytes, parts: &[usize]| {
        let mut args = inputs.clone();
        args.extend(parts.iter().map(|&part| Arg::Output(gradients.view(part))));
        args.extend(sizes);
        args.push(grad_out.stride());
        args.extend(parts.iter().map(|&part| gradients.stride(part)));
        args.extend(&numbers);
        let (version, rows, threads, shared_bytes) = match version {
            Version::Portable => ("", rows, THREADS, 2 * (rows + 2 * others) * row_bytes),
            Version::Hopper => ("_hopper", 128, 256, 640 * row_bytes + hopper_bytes),
        };
        let name = format!(
            "attention_{name}_gradient{version}{kind}_{width}_{}",
            T::NAME
        );
        let [tokens, heads] = grid;
        let grid = [(tokens / rows + sequences) as u32, heads as u32];
        launch(&name, grid, threads, shared_bytes, &args)
    };
    gradient("query", [tokens_q, heads], others, 1024, &[0])?;
    let others = if twice && width == 64 { 16 } else { others };
    gradient("key", [tokens_k, key_heads], others, 9216, &[1, 2])?;

    Ok(Run {
        out: out.download(0),
        lse: lse.download(),
        loss: if supervised {
            loss.download()
        } else {
            vec![0.0]
        },
        gradients: [0, 1, 2].map(|part| gradients.download(part)),
    })
}

fn check<T: Storage>(shape: &Shape, version: Version) {
    let case = Case::draw::<T>(shape);
    let found = in_every_order(|executor| {
        run::<T>(executor, &case, version).unwrap_or_else(|error| panic!("{error}"))
    });

    let attention = case.attention();
    let (tokens, heads) = (case.tokens().0, case.heads);
    let mut out = Array3::from_elem(case.q.dim(), f64::NAN);
    let mut lse = Array2::from_elem((tokens, heads), f64::NAN);
    let (q, k, v) = (case.q.view(), case.k.view(), case.v.view());
    let mut scratch = vec![];
    let loss = attention
        .forward(q, k, v, out.view_mut(), lse.view_mut(), &mut scratch)
        .unwrap();
    let mut gradients = [&case.q, &case.k, &case.v].map(|x| Array3::from_elem(x.dim(), f64::NAN));
    let [dq, dk, dv] = gradients.each_mut().map(|x| x.view_mut());
    attention
        .backward(
            q,
            k,
            v,
            lse.view(),
            case.grad_out.view(),
            f64::from(case.grad_memory_loss()),
            dq,
            dk,
            dv,
            &mut scratch,
        )
        .unwrap();

    assert_close("out", &found.out, &out, T::TOLERANCE);
    assert_close("lse", &found.lse, &lse, f32::TOLERANCE);
    // 1 − A of a row that one key takes is a sum of exp(S − lse): as exact as lse is, in f32.
    let largest = lse.iter().filter(|lse| lse.is_finite());
    let largest = largest.fold(0.0, |largest: f64, lse| largest.max(lse.abs()));
    let tolerance = f32::TOLERANCE + largest * f64::from(f32::EPSILON);
    assert_close("loss", &found.loss, &ndarray::arr1(&[loss]), tolerance);
    let names = ["dq", "dk", "dv"];
    for ((name, found), gradient) in names.iter().zip(&found.gradients).zip(&gradients) {
        assert_gradient_close(name, found, gradient, shape.sharpness);
    }
}

/// As `assert_close`, but not relative to less than a part of what one key adds: where a row sees few keys, or one of
/// them takes all, dP − Δ is 0 but for the rounding of `out`.
#[track_caller]
fn assert_gradient_close<T: Storage>(name: &str, x: &[T], reference: &Array3<f64>, size: f64) {
    let norm = reference.iter().map(|x| x * x).sum::<f64>().sqrt();
    let part = if size_of::<T>() == 4 { 0.1 } else { 0.5 };
    let least = part * size * (x.len() as f64).sqrt();
    let divisor = if norm == 0.0 { 1.0 } else { norm }; // as in assert_close
    assert_close(name, x, reference, T::TOLERANCE * norm.max(least) / divisor);
}

fn lengths(longest: usize) -> impl Strategy<Value = Vec<(usize, usize)>> {
    let length = prop_oneof![
        Just(0),
        Just(1),
        1..longest,
        // Around the edges of the tiles.
        prop::sample::select(vec![15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129])
            .prop_map(move |length| length.min(longest)),
    ];
    let cached = prop_oneof![3 => Just(0_usize), 1 => 0..longest];
    prop::collection::vec((length, cached), 1..4)
        .prop_filter("at least one token", |all| {
            all.iter().any(|&(queries, _)| queries > 0)
        })
        .prop_map(|all| {
            all.into_iter()
                .map(|(queries, cached)| (queries, queries + cached))
                .collect()
        })
}

fn shape(widths: &'static [usize], longest: usize) -> impl Strategy<Value = Shape> {
    let shown = prop_oneof![
        Just(Shown::All),
        Just(Shown::Causal),
        (1..80_usize).prop_map(Shown::Window),
        Just(Shown::Groups),
    ];
    let annotation = prop::sample::select(vec![
        Annotation::Unsupervised,
        Annotation::NoPair,
        Annotation::EveryPair,
        Annotation::SomePairs,
        Annotation::Diagonal,
    ]);
    (
        lengths(longest),
        (1..3_usize, 1..3_usize),
        prop::sample::select(widths),
        shown,
        annotation,
        prop::sample::select(vec![1.0, 1.0, 4.0]),
        any::<bool>(),
        any::<u64>(),
    )
        .prop_map(
            |(lengths, (key_heads, group), width, shown, annotation, sharpness, fused, seed)| {
                Shape {
                    lengths,
                    key_heads,
                    group,
                    width,
                    shown,
                    annotation,
                    sharpness,
                    fused,
                    seed,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn narrow_heads_agree_with_the_reference(shape in shape(&[16, 32], 150)) {
        check::<f32>(&shape, Version::Portable);
        check::<bf16>(&shape, Version::Portable);
        check::<f16>(&shape, Version::Portable);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn wide_heads_agree_with_the_reference(shape in shape(&[64, 128, 256], 40)) {
        check::<f32>(&shape, Version::Portable);
        check::<bf16>(&shape, Version::Portable);
        check::<f16>(&shape, Version::Portable);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn products_of_warpgroups_agree_with_the_reference(shape in shape(&[64, 128], 200)) {
        check::<bf16>(&shape, Version::Hopper);
        check::<f16>(&shape, Version::Hopper);
    }
}

/// Keys that go through every place of the tiles in shared memory more than once.
#[test]
fn long_sequences_by_products_of_warpgroups_agree_with_the_reference() {
    for (width, shown) in [(64, Shown::Causal), (128, Shown::Window(300))] {
        check::<bf16>(
            &Shape {
                lengths: vec![(210, 900), (1, 600)],
                key_heads: 1,
                group: 1,
                width,
                shown,
                annotation: Annotation::SomePairs,
                sharpness: 1.0,
                fused: false,
                seed: 5,
            },
            Version::Hopper,
        );
    }
}

/// Tiles reach into other sequences, whose numbers may be anything: 0 times NaN would be NaN.
#[test]
fn what_other_sequences_hold_does_not_matter() {
    let [first, second] = [(70, 150), (200, 330)];
    for (version, width) in [
        (Version::Portable, 32),
        (Version::Hopper, 64),
        (Version::Hopper, 128),
    ] {
        let mut case = Case::draw::<bf16>(&Shape {
            lengths: vec![first, second],
            key_heads: 1,
            group: 1,
            width,
            shown: Shown::All,
            annotation: Annotation::Unsupervised,
            sharpness: 1.0,
            fused: false,
            seed: 6,
        });
        let executor = Executor::new();
        let clean = run::<bf16>(&executor, &case, version).unwrap();
        for (spoiled, kept) in [(0, 1), (1, 0)] {
            let rows = |sequence, queries: bool| match (sequence, queries) {
                (0, true) => 0..first.0,
                (0, false) => 0..first.1,
                (_, true) => first.0..first.0 + second.0,
                (_, false) => first.1..first.1 + second.1,
            };
            let whole = (case.q.clone(), case.k.clone(), case.v.clone());
            let spoil = |x: &mut Array3<f64>, rows| {
                x.slice_axis_mut(ndarray::Axis(0), ndarray::Slice::from(rows))
                    .fill(f64::NAN);
            };
            spoil(&mut case.q, rows(spoiled, true));
            spoil(&mut case.k, rows(spoiled, false));
            spoil(&mut case.v, rows(spoiled, false));
            let found = run::<bf16>(&executor, &case, version).unwrap();
            let (queries, keys) = (rows(kept, true), rows(kept, false));
            let same =
                |name: &str, found: &[bf16], clean: &[bf16], rows: &std::ops::Range<usize>| {
                    let at = rows.start * width..rows.end * width;
                    assert_eq!(
                        found[at.clone()],
                        clean[at],
                        "{version:?}, width {width}: {name}"
                    );
                };
            same("out", &found.out, &clean.out, &queries);
            for (name, part, rows) in [("dq", 0, &queries), ("dk", 1, &keys), ("dv", 2, &keys)] {
                same(name, &found.gradients[part], &clean.gradients[part], rows);
            }
            assert_eq!(found.lse[queries.clone()], clean.lse[queries]);
            (case.q, case.k, case.v) = whole;
        }
    }
}

#[test]
fn every_barrier_is_needed() {
    for (file, source, version, width) in [
        (
            "kernels/attention_forward.cu",
            include_str!("../../attention_forward.cu"),
            Version::Portable,
            16,
        ),
        (
            "kernels/attention_backward.cu",
            include_str!("../../attention_backward.cu"),
            Version::Portable,
            16,
        ),
        (
            "kernels/attention_hopper.cu",
            include_str!("../../attention_hopper.cu"),
            Version::Hopper,
            64,
        ),
        (
            "kernels/attention_backward_hopper.cu",
            include_str!("../../attention_backward_hopper.cu"),
            Version::Hopper,
            64,
        ),
    ] {
        let case = Case::draw::<bf16>(&Shape {
            lengths: vec![(200, 200), (70, 200)],
            key_heads: 1,
            group: 1,
            width,
            shown: Shown::Window(70),
            annotation: Annotation::SomePairs,
            sharpness: 1.0,
            fused: false,
            seed: 3,
        });
        assert_every_barrier_is_needed(file, source, |executor| {
            run::<bf16>(executor, &case, version).map(drop)
        });
    }
}

/// A window wider than a tile of keys: tiles stand inside of the first row's window and not of the last one's.
#[test]
fn wide_windows_agree_with_the_reference() {
    let shape = Shape {
        lengths: vec![(150, 150), (70, 200)],
        key_heads: 1,
        group: 2,
        width: 16,
        shown: Shown::Window(66),
        annotation: Annotation::SomePairs,
        sharpness: 1.0,
        fused: false,
        seed: 4,
    };
    check::<f32>(&shape, Version::Portable);
    check::<bf16>(&shape, Version::Portable);
    check::<f16>(&shape, Version::Portable);
}
