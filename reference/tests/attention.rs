//! Attention and the memory loss against a dense computation, finite differences and fixtures.

mod common;

use common::{Fixture, Random, assert_close, cast, finite_difference, poisoned, relative_error};
use dtmem_reference::attention::{Attention, Denominator, Head, Mask, Pairs, Supervision};
use dtmem_reference::{Error, Scalar};
use ndarray::{Array, Array1, Array2, Array3, ArrayView3, Axis, Dimension, Ix2, Ix3, arr0};
use proptest::prelude::*;

/// The arguments of one call, owned.
#[derive(Debug, Clone)]
struct Case {
    heads: usize,
    key_heads: usize,
    width: usize,
    cu_seqlens_q: Vec<i32>,
    cu_seqlens_k: Vec<i32>,
    scale: f64,
    mask: OwnedMask,
    supervision: Option<OwnedSupervision>,
    seed: u64,
}

#[derive(Debug, Clone)]
enum OwnedMask {
    None,
    Causal,
    Window(usize),
    Groups(Vec<i32>),
}

#[derive(Debug, Clone)]
struct OwnedSupervision {
    heads: Vec<usize>,
    pair_offsets: Vec<i32>,
    pair_keys: Vec<i32>,
    annotated: Vec<u8>,
    denominator: Denominator,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Annotation {
    Unsupervised,
    NoPair,
    EveryPair,
    SomePairs,
}

struct Outputs<T> {
    out: Array3<T>,
    lse: Array2<T>,
    loss: f64,
}

struct Gradients<T> {
    dq: Array3<T>,
    dk: Array3<T>,
    dv: Array3<T>,
}

/// What comes in and what flows back.
struct Inputs<T> {
    q: Array3<T>,
    k: Array3<T>,
    v: Array3<T>,
    grad_out: Array3<T>,
    grad_loss: f64,
}

impl<T: Scalar> Inputs<T> {
    fn to<U: Scalar>(&self) -> Inputs<U> {
        Inputs {
            q: cast(&self.q),
            k: cast(&self.k),
            v: cast(&self.v),
            grad_out: cast(&self.grad_out),
            grad_loss: self.grad_loss,
        }
    }
}

impl Case {
    /// A causal pack of sequences of these lengths, without supervision.
    fn causal(lengths: &[usize], heads: usize, width: usize) -> Self {
        Self {
            heads,
            key_heads: heads,
            width,
            cu_seqlens_q: offsets(lengths.iter().copied()),
            cu_seqlens_k: offsets(lengths.iter().copied()),
            scale: (width as f64).powf(-0.5),
            mask: OwnedMask::Causal,
            supervision: None,
            seed: 1,
        }
    }

    /// Annotates every sequence and supervises every head.
    fn supervised(mut self, annotation: Annotation, denominator: Denominator) -> Self {
        let random = &mut Random::new(self.seed);
        let mut pair_keys = Vec::new();
        let mut counts = Vec::new();
        for (queries, keys) in self.lengths() {
            for i in 0..queries {
                let before = pair_keys.len();
                pair_keys.extend((0..keys as i32).filter(|&j| {
                    self.sees(keys, queries, i, j as usize)
                        && match annotation {
                            Annotation::Unsupervised | Annotation::NoPair => false,
                            Annotation::EveryPair => true,
                            Annotation::SomePairs => random.below(3) == 0,
                        }
                }));
                counts.push(pair_keys.len() - before);
            }
        }
        self.supervision = (annotation != Annotation::Unsupervised).then(|| OwnedSupervision {
            heads: (0..self.heads).collect(),
            pair_offsets: offsets(counts),
            pair_keys,
            annotated: vec![1; self.cu_seqlens_q.len() - 1],
            denominator,
        });
        self
    }

    fn attention(&self) -> Attention<'_> {
        Attention {
            cu_seqlens_q: &self.cu_seqlens_q,
            cu_seqlens_k: &self.cu_seqlens_k,
            scale: self.scale,
            mask: match &self.mask {
                OwnedMask::None => Mask::None,
                OwnedMask::Causal => Mask::Causal,
                &OwnedMask::Window(window) => Mask::SlidingWindow { window },
                OwnedMask::Groups(groups) => Mask::GroupedCausal { groups },
            },
            supervision: self.supervision.as_ref().map(|s| Supervision {
                heads: &s.heads,
                pair_offsets: &s.pair_offsets,
                pair_keys: &s.pair_keys,
                annotated: &s.annotated,
                denominator: s.denominator,
            }),
        }
    }

    fn q_shape(&self) -> (usize, usize, usize) {
        let tokens = *self.cu_seqlens_q.last().unwrap() as usize;
        (tokens, self.heads, self.width)
    }

    fn k_shape(&self) -> (usize, usize, usize) {
        let tokens = *self.cu_seqlens_k.last().unwrap() as usize;
        (tokens, self.key_heads, self.width)
    }

    fn inputs(&self) -> Inputs<f64> {
        let random = &mut Random::new(self.seed);
        Inputs {
            q: random.array(self.q_shape()),
            k: random.array(self.k_shape()),
            v: random.array(self.k_shape()),
            grad_out: random.array(self.q_shape()),
            grad_loss: 3.0 * random.normal(),
        }
    }

    fn forward<T: Scalar>(&self, inputs: &Inputs<T>) -> Outputs<T> {
        let (tokens, heads, _) = self.q_shape();
        let mut out = poisoned(self.q_shape());
        let mut lse = poisoned((tokens, heads));
        let loss = self.attention().forward(
            inputs.q.view(),
            inputs.k.view(),
            inputs.v.view(),
            out.view_mut(),
            lse.view_mut(),
            &mut vec![T::nan(); 100],
        );
        let loss = loss.unwrap();
        Outputs { out, lse, loss }
    }

    fn backward<T: Scalar>(&self, inputs: &Inputs<T>) -> Gradients<T> {
        let lse = self.forward(inputs).lse;
        let mut dq = poisoned(self.q_shape());
        let mut dk = poisoned(self.k_shape());
        let mut dv = poisoned(self.k_shape());
        let done = self.attention().backward(
            inputs.q.view(),
            inputs.k.view(),
            inputs.v.view(),
            lse.view(),
            inputs.grad_out.view(),
            inputs.grad_loss,
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            &mut vec![T::nan(); 100],
        );
        done.unwrap();
        Gradients { dq, dk, dv }
    }

    /// The function whose gradients `backward` gives.
    fn objective(&self, inputs: &Inputs<f64>) -> f64 {
        let Outputs { out, loss, .. } = self.forward(inputs);
        (&out * &inputs.grad_out).sum() + inputs.grad_loss * loss
    }

    fn lengths(&self) -> Vec<(usize, usize)> {
        let lengths = |offsets: &[i32]| -> Vec<usize> {
            let pairs = offsets.windows(2);
            pairs.map(|pair| (pair[1] - pair[0]) as usize).collect()
        };
        let keys = lengths(&self.cu_seqlens_k);
        lengths(&self.cu_seqlens_q).into_iter().zip(keys).collect()
    }

    /// Whether query i of a sequence sees its key j, straight from the definition. (Groups are
    /// the same for every sequence, so that this needs no offset.)
    fn sees(&self, keys: usize, queries: usize, i: usize, j: usize) -> bool {
        let position = i + keys - queries;
        match &self.mask {
            OwnedMask::None => true,
            OwnedMask::Causal => j <= position,
            &OwnedMask::Window(window) => j <= position && position - j < window,
            OwnedMask::Groups(_) => group(j) <= group(position),
        }
    }

    /// The same with whole matrices and plain formulas.
    fn dense(&self, inputs: &Inputs<f64>) -> Outputs<f64> {
        let (tokens, heads, width) = self.q_shape();
        let mut out = Array3::zeros(self.q_shape());
        let mut lse = Array2::zeros((tokens, heads));
        let (mut loss, mut denominator) = (0.0, 0.0);
        for (b, (queries, keys)) in self.lengths().into_iter().enumerate() {
            let first_q = self.cu_seqlens_q[b] as usize;
            let first_k = self.cu_seqlens_k[b] as usize;
            let supervision = self.supervision.as_ref().filter(|s| s.annotated[b] == 1);
            for h in 0..heads {
                let g = h / (heads / self.key_heads);
                let supervision = supervision.filter(|s| s.heads.contains(&h));
                if supervision.is_some_and(|s| s.denominator == Denominator::Square) {
                    denominator += (queries * keys) as f64;
                }
                for i in 0..queries {
                    let q = |x: usize| inputs.q[(first_q + i, h, x)];
                    let score = |j: usize| -> f64 {
                        let products = (0..width).map(|x| q(x) * inputs.k[(first_k + j, g, x)]);
                        self.scale * products.sum::<f64>()
                    };
                    let visible: Vec<usize> = (0..keys)
                        .filter(|&j| self.sees(keys, queries, i, j))
                        .collect();
                    let sum: f64 = visible.iter().map(|&j| score(j).exp()).sum();
                    lse[(first_q + i, h)] = sum.ln();
                    for &j in &visible {
                        let a = score(j).exp() / sum;
                        for x in 0..width {
                            out[(first_q + i, h, x)] += a * inputs.v[(first_k + j, g, x)];
                        }
                        if let Some(s) = supervision {
                            let row = s.pair_offsets[first_q + i] as usize
                                ..s.pair_offsets[first_q + i + 1] as usize;
                            let paired = s.pair_keys[row].contains(&(j as i32));
                            loss -= if paired { a } else { 1.0 - a }.ln().max(-100.0);
                            if s.denominator == Denominator::Causal {
                                denominator += 1.0;
                            }
                        }
                    }
                }
            }
        }
        if denominator > 0.0 {
            loss /= denominator;
        }
        Outputs { out, lse, loss }
    }
}

fn offsets(lengths: impl IntoIterator<Item = usize>) -> Vec<i32> {
    let mut offsets = vec![0];
    for length in lengths {
        offsets.push(offsets[offsets.len() - 1] + length as i32);
    }
    offsets
}

/// Groups of 1, 2, 3, 1, 2, 3 … keys.
fn group(key: usize) -> i32 {
    (key / 6 * 3) as i32 + [0, 1, 1, 2, 2, 2][key % 6]
}

/// Scores of 100 have errors of 1e-5 in f32, and so have, relatively, their exponentials. A whole
/// tensor that is made of the tails of softmaxes may also be too small for f32 to hold.
fn check_saturated<T: Scalar, D: Dimension>(
    name: &str,
    x: &Array<T, D>,
    reference: &Array<f64, D>,
) {
    let held = reference.iter().any(|x| x.abs() > 1e-30);
    let reference = if held {
        reference
    } else {
        &Array::zeros(reference.raw_dim())
    };
    assert_close(name, x, reference, if held { 1e-4 } else { 1e-30 });
}

prop_compose! {
    /// Packs of up to three sequences with every mask, with and without supervision.
    fn cases(longest: usize)(
        lengths in prop::collection::vec((0..=longest, 0..4_usize), 0..4),
        key_heads in 1..3_usize,
        group_size in 1..4_usize,
        width in 1..6_usize,
        mask in 0..4,
        window in 1..=longest + 3,
        annotation in prop::sample::select(vec![
            Annotation::Unsupervised,
            Annotation::NoPair,
            Annotation::EveryPair,
            Annotation::SomePairs,
        ]),
        denominator in prop::sample::select(vec![Denominator::Square, Denominator::Causal]),
        seed in any::<u64>(),
    ) -> Case {
        let keys: Vec<usize> = lengths.iter().map(|(length, more)| length + more).collect();
        let mut case = Case {
            heads: key_heads * group_size,
            key_heads,
            width,
            cu_seqlens_q: offsets(lengths.iter().map(|&(length, _)| length)),
            cu_seqlens_k: offsets(keys.iter().copied()),
            // Not so large that A(1 − A) reaches its floor, where the gradient is none any more.
            scale: 0.7 / (width as f64).sqrt(),
            mask: match mask {
                0 => OwnedMask::None,
                1 => OwnedMask::Causal,
                2 => OwnedMask::Window(window),
                _ => OwnedMask::Groups(keys.iter().flat_map(|&n| (0..n).map(group)).collect()),
            },
            supervision: None,
            seed,
        }.supervised(annotation, denominator);
        if let Some(supervision) = &mut case.supervision {
            let random = &mut Random::new(seed);
            supervision.heads.retain(|_| random.below(4) != 0);
            supervision.annotated.iter_mut().for_each(|flag| *flag = (random.below(4) != 0).into());
        }
        case
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn forward_is_the_dense_computation(case in cases(150)) {
        let inputs = case.inputs();
        let (found, expected) = (case.forward(&inputs), case.dense(&inputs));
        assert_close("out", &found.out, &expected.out, 1e-12);
        assert_close("lse", &found.lse, &expected.lse, 1e-12);
        assert_close("loss", &arr0(found.loss), &arr0(expected.loss), 1e-10);
    }

    #[test]
    fn backward_is_the_finite_difference(case in cases(6)) {
        let inputs = case.inputs();
        let gradients = case.backward(&inputs);
        let difference = |which: fn(&mut Inputs<f64>) -> &mut Array3<f64>| {
            let mut moved = inputs.to();
            let start = which(&mut moved).clone();
            finite_difference(&start, |x| {
                which(&mut moved).assign(x);
                case.objective(&moved)
            })
        };
        // The exact side is the reference: it is exactly 0 where a query sees a single key.
        assert_close("dq", &difference(|inputs| &mut inputs.q), &gradients.dq, 1e-6);
        assert_close("dk", &difference(|inputs| &mut inputs.k), &gradients.dk, 1e-6);
        assert_close("dv", &difference(|inputs| &mut inputs.v), &gradients.dv, 1e-6);
    }

    /// Sequences of several blocks, where one difference per entry would take too long.
    #[test]
    fn backward_is_the_slope_along_any_direction(case in cases(150)) {
        let inputs = case.inputs();
        let gradients = case.backward(&inputs);
        let random = &mut Random::new(case.seed ^ 1);
        let direction = [
            random.array::<f64, _>(case.q_shape()),
            random.array(case.k_shape()),
            random.array(case.k_shape()),
        ];
        let slope = finite_difference(&arr0(0.0), |step| {
            let step = step[()];
            let mut moved: Inputs<f64> = inputs.to();
            moved.q.scaled_add(step, &direction[0]);
            moved.k.scaled_add(step, &direction[1]);
            moved.v.scaled_add(step, &direction[2]);
            case.objective(&moved)
        });
        let parts = [
            &gradients.dq * &direction[0],
            &gradients.dk * &direction[1],
            &gradients.dv * &direction[2],
        ];
        let found: f64 = parts.iter().map(|part| part.sum()).sum();
        // The slope is a sum of many terms that may cancel, so it is measured against their size.
        let size = parts.iter().flatten().map(|x| x * x).sum::<f64>().sqrt();
        prop_assert!((found - slope.into_scalar()).abs() <= 1e-6 * size.max(1e-3));
    }

    /// As a caller with threads does it: each head on its own, with its part of the pairs.
    #[test]
    fn heads_done_one_by_one_are_the_whole(case in cases(20)) {
        let inputs: Inputs<f32> = case.inputs().to();
        let whole = (case.forward(&inputs), case.backward(&inputs));
        let attention = case.attention();
        let part = |x: &Array3<f32>, first: usize, count: usize, head: usize| {
            let head = x.index_axis(Axis(1), head);
            head.slice_axis(Axis(0), (first..first + count).into()).to_owned()
        };
        let divisor = attention.denominator();
        let mut numerator = 0.0;
        for (b, (queries, keys)) in case.lengths().into_iter().enumerate() {
            let first = case.cu_seqlens_q[b] as usize;
            let first_k = case.cu_seqlens_k[b] as usize;
            for h in 0..case.heads {
                let g = h * case.key_heads / case.heads;
                let supervision = attention.supervision.filter(|supervision| {
                    supervision.annotated[b] == 1 && supervision.heads.contains(&h)
                });
                let head = Head {
                    scale: case.scale,
                    mask: match attention.mask {
                        Mask::GroupedCausal { groups } => Mask::GroupedCausal {
                            groups: &groups[first_k..first_k + keys],
                        },
                        other => other,
                    },
                    pairs: supervision.map(|supervision| Pairs {
                        offsets: &supervision.pair_offsets[first..=first + queries],
                        keys: supervision.pair_keys,
                    }),
                };
                let q = part(&inputs.q, first, queries, h);
                let k = part(&inputs.k, first_k, keys, g);
                let v = part(&inputs.v, first_k, keys, g);
                let mut out = poisoned((queries, case.width));
                let mut lse = poisoned(queries);
                let (q, k, v, scratch) = (q.view(), k.view(), v.view(), &mut Vec::new());
                numerator += head
                    .forward(q, k, v, out.view_mut(), lse.view_mut(), scratch)
                    .unwrap();
                prop_assert_eq!(out, part(&whole.0.out, first, queries, h));

                let grad_out = part(&inputs.grad_out, first, queries, h);
                let c = if divisor == 0.0 { 0.0 } else { inputs.grad_loss / divisor };
                let mut dq = poisoned(q.dim());
                let (mut dk, mut dv) = (Array2::ones(k.dim()), Array2::ones(k.dim()));
                head.backward(
                    q, k, v, lse.view(), grad_out.view(), c,
                    dq.view_mut(), dk.view_mut(), dv.view_mut(), scratch,
                ).unwrap();
                prop_assert_eq!(dq, part(&whole.1.dq, first, queries, h));
                if case.heads == case.key_heads {
                    // Added to what was there.
                    let expected = part(&whole.1.dv, first_k, keys, g) + 1.0;
                    assert_close("dv", &dv, &cast(&expected), 1e-6);
                    let expected = part(&whole.1.dk, first_k, keys, g) + 1.0;
                    assert_close("dk", &dk, &cast(&expected), 1e-6);
                }
            }
        }
        let loss = if divisor == 0.0 { 0.0 } else { numerator / divisor };
        prop_assert_eq!(loss, whole.0.loss);
    }

    #[test]
    fn views_of_a_fused_buffer_give_the_same_bits(case in cases(80)) {
        // One buffer needs as many queries as keys.
        let case = Case { cu_seqlens_q: case.cu_seqlens_k.clone(), supervision: None, ..case };
        let case = case.supervised(Annotation::SomePairs, Denominator::Square);
        let (heads, key_heads) = (case.heads, case.key_heads);
        let inputs: Inputs<f32> = case.inputs().to();
        let (outputs, gradients) = (case.forward(&inputs), case.backward(&inputs));

        let parts = [inputs.q.view(), inputs.k.view(), inputs.v.view()];
        let fused = ndarray::concatenate(Axis(1), &parts).unwrap();
        let (q, rest) = fused.view().split_at(Axis(1), heads);
        let (k, v) = rest.split_at(Axis(1), key_heads);
        // Results go into strided places as well.
        let mut results = poisoned::<f32, _>((fused.dim().0, 2 * heads, case.width));
        let (mut out, _) = results.view_mut().split_at(Axis(1), heads);
        let mut lse = poisoned((heads, fused.dim().0)).reversed_axes();
        let (attention, scratch) = (case.attention(), &mut Vec::new());
        let loss = attention.forward(q, k, v, out.view_mut(), lse.view_mut(), scratch);
        prop_assert_eq!(&out, &outputs.out);
        prop_assert_eq!(&lse, &outputs.lse);
        prop_assert_eq!(loss.unwrap(), outputs.loss);

        let mut fused_gradient = poisoned::<f32, _>(fused.dim());
        let (mut dq, rest) = fused_gradient.view_mut().split_at(Axis(1), heads);
        let (mut dk, mut dv) = rest.split_at(Axis(1), key_heads);
        attention.backward(
            q, k, v, lse.view(), inputs.grad_out.view(), inputs.grad_loss,
            dq.view_mut(), dk.view_mut(), dv.view_mut(), scratch,
        ).unwrap();
        prop_assert_eq!(&dq, &gradients.dq);
        prop_assert_eq!(&dk, &gradients.dk);
        prop_assert_eq!(&dv, &gradients.dv);
    }

    #[test]
    fn saturated_rows_keep_their_digits_in_f32(case in cases(100), spread in 10.0..60.0_f64) {
        // Scores reach ±60 and beyond: softmaxes of one key, of two, and in between.
        let mut inputs = case.inputs();
        inputs.q *= spread;
        let narrow: Inputs<f32> = inputs.to();
        let wide: Inputs<f64> = narrow.to();
        let (found, expected) = (case.forward(&narrow), case.forward(&wide));
        check_saturated("out", &found.out, &expected.out);
        check_saturated("lse", &found.lse, &expected.lse);
        check_saturated("loss", &arr0(found.loss), &arr0(expected.loss));
        let (found, expected) = (case.backward(&narrow), case.backward(&wide));
        check_saturated("dv", &found.dv, &expected.dv);
        // Where a row is nearly one-hot, dP − Δ of its peak is a difference of equal numbers, whose rounding alone can
        // be more than 1e-4 of what is left of dq and dk.
        let norm = |x: &Array3<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let scores = case.scale * norm(&wide.grad_out) * norm(&wide.v);
        for (name, found, expected, factor) in [
            ("dq", &found.dq, &expected.dq, &wide.k),
            ("dk", &found.dk, &expected.dk, &wide.q),
        ] {
            let error = norm(&(&found.mapv(f64::from) - expected));
            let rounding = f64::from(f32::EPSILON) * scores * norm(factor);
            prop_assert!(error <= 1e-4 * norm(expected) + rounding, "{name}: error {error}");
        }
    }

    /// A sequence that is not annotated takes no part, whatever its pairs say.
    #[test]
    fn sequences_without_annotation_get_no_gradient_from_the_loss(case in cases(20)) {
        let mut case = case;
        let inputs: Inputs<f32> = case.inputs().to();
        let free = Case { supervision: None, ..case.clone() }.backward(&inputs);
        let found = case.backward(&inputs);
        if let Some(supervision) = &case.supervision {
            for (b, _) in supervision.annotated.iter().enumerate().filter(|(_, flag)| **flag == 0) {
                for token in case.cu_seqlens_q[b] as usize..case.cu_seqlens_q[b + 1] as usize {
                    let row = |x: &Array3<f32>| x.index_axis(Axis(0), token).to_owned();
                    prop_assert_eq!(row(&found.dq), row(&free.dq));
                }
            }
        }
        if let Some(supervision) = &mut case.supervision {
            supervision.annotated.fill(0);
        }
        let found = case.backward(&inputs);
        prop_assert_eq!(case.forward(&inputs).loss, 0.0);
        prop_assert_eq!(found.dq, free.dq);
        prop_assert_eq!(found.dk, free.dk);
        prop_assert_eq!(found.dv, free.dv);
    }
}

/// A fixture's call and its inputs.
fn read(fixture: &Fixture) -> (Case, Inputs<f64>) {
    let q = fixture.array::<f64, Ix3>("input.q");
    let (_, heads, width) = q.dim();
    let cu_seqlens = fixture.integers("input.cu_seqlens");
    let supervised = fixture.params["supervised_heads"].as_array().unwrap();
    assert_eq!(fixture.word("mask"), "causal");
    let case = Case {
        scale: fixture.number("scale"),
        supervision: Some(OwnedSupervision {
            heads: supervised
                .iter()
                .map(|head| head.as_u64().unwrap() as usize)
                .collect(),
            pair_offsets: fixture.integers("input.pair_offsets"),
            pair_keys: fixture.integers("input.pair_keys"),
            annotated: fixture.bytes("input.annotated"),
            denominator: match fixture.word("denominator") {
                "square" => Denominator::Square,
                "causal" => Denominator::Causal,
                other => panic!("denominator {other}"),
            },
        }),
        cu_seqlens_q: cu_seqlens.clone(),
        cu_seqlens_k: cu_seqlens,
        ..Case::causal(&[], heads, width)
    };
    let inputs = Inputs {
        q,
        k: fixture.array("input.k"),
        v: fixture.array("input.v"),
        grad_out: fixture.array("grad_output.out"),
        grad_loss: fixture.scalar("grad_output.memory_loss"),
    };
    (case, inputs)
}

#[test]
fn f64_agrees_with_the_fixtures() {
    for (name, fixture) in Fixture::all("attention_") {
        let (case, inputs) = read(&fixture);
        let outputs = case.forward(&inputs);
        let check = |tensor: &str, found: &Array3<f64>| {
            let expected = fixture.array::<f64, Ix3>(tensor);
            assert_close(&format!("{name} {tensor}"), found, &expected, 1e-10);
        };
        check("output.out", &outputs.out);
        let expected = fixture.array::<f64, Ix2>("output.lse");
        assert_close(&format!("{name} lse"), &outputs.lse, &expected, 1e-10);
        let expected = arr0(fixture.scalar("output.memory_loss"));
        assert_close(
            &format!("{name} loss"),
            &arr0(outputs.loss),
            &expected,
            1e-10,
        );
        let gradients = case.backward(&inputs);
        check("grad_input.q", &gradients.dq);
        check("grad_input.k", &gradients.dk);
        check("grad_input.v", &gradients.dv);
    }
}

#[test]
fn f32_agrees_with_f64_on_the_rounded_fixtures() {
    for (name, fixture) in Fixture::all("attention_") {
        let (case, inputs) = read(&fixture);
        let narrow: Inputs<f32> = inputs.to();
        let wide: Inputs<f64> = narrow.to();
        let (found, expected) = (case.forward(&narrow), case.forward(&wide));
        assert_close(&format!("{name} out"), &found.out, &expected.out, 2e-5);
        assert_close(&format!("{name} lse"), &found.lse, &expected.lse, 2e-5);
        let loss = (arr0(found.loss), arr0(expected.loss));
        assert_close(&format!("{name} loss"), &loss.0, &loss.1, 2e-5);
        let (found, expected) = (case.backward(&narrow), case.backward(&wide));
        assert_close(&format!("{name} dq"), &found.dq, &expected.dq, 2e-5);
        assert_close(&format!("{name} dk"), &found.dk, &expected.dk, 2e-5);
        assert_close(&format!("{name} dv"), &found.dv, &expected.dv, 2e-5);
    }
}

/// A query that sees one key has A = 1 whatever its score is: scores get exactly no gradient, and
/// an unpaired one costs the clamp.
#[test]
fn a_single_key_gets_exactly_no_gradient() {
    for (annotation, loss) in [(Annotation::EveryPair, 0.0), (Annotation::NoPair, 100.0)] {
        let case = Case::causal(&[1, 1, 1], 2, 5).supervised(annotation, Denominator::Causal);
        let inputs: Inputs<f32> = case.inputs().to();
        assert_eq!(case.forward(&inputs).loss, loss);
        let gradients = case.backward(&inputs);
        assert_eq!(gradients.dq, Array3::<f32>::zeros(case.q_shape()));
        assert_eq!(gradients.dk, Array3::<f32>::zeros(case.k_shape()));
        assert_eq!(gradients.dv, inputs.grad_out);
    }
}

/// One query and two keys, where the definition fits on a few lines. The floor of A(1 − A) is
/// reached between 20 and 30.
#[test]
fn the_gradient_of_saturated_rows_is_the_definition_with_its_floor() {
    for difference in [0.0, 5.0, 20.0, 30.0, 50.0_f64] {
        for pairs in [vec![], vec![0], vec![1], vec![0, 1]] {
            let a = [-difference, difference].map(|x| 1.0 / (1.0 + x.exp()));
            let g = [0, 1].map(|j| {
                let paired = if pairs.contains(&(j as i32)) {
                    1.0
                } else {
                    0.0
                };
                let difference = if paired == 1.0 { -a[1 - j] } else { a[j] };
                difference / (a[0] * a[1]).max(1e-12)
            });
            let expected = a[0] * a[1] * (g[1] - g[0]) / 2.0;

            let case = Case {
                cu_seqlens_k: vec![0, 2],
                supervision: Some(OwnedSupervision {
                    heads: vec![0],
                    pair_offsets: vec![0, pairs.len() as i32],
                    pair_keys: pairs.clone(),
                    annotated: vec![1],
                    denominator: Denominator::Square,
                }),
                ..Case::causal(&[1], 1, 1)
            };
            let mut inputs = case.inputs();
            inputs.q.fill(1.0);
            inputs.k[(0, 0, 0)] = 0.0;
            inputs.k[(1, 0, 0)] = -difference;
            inputs.grad_out.fill(0.0);
            inputs.grad_loss = 1.0;
            let expected = ndarray::arr3(&[[[-expected]], [[expected]]]);
            assert_close("f64", &case.backward(&inputs).dk, &expected, 1e-12);
            assert_close(
                "f32",
                &case.backward::<f32>(&inputs.to()).dk,
                &expected,
                1e-5,
            );
        }
    }
}

/// With one weight of 1 and all others below the smallest number, every logarithm is clamped
/// and nothing is NaN.
#[test]
fn weights_that_underflow_cost_the_clamp() {
    for annotation in [Annotation::NoPair, Annotation::EveryPair] {
        let case = Case {
            scale: 1.0,
            mask: OwnedMask::None,
            ..Case::causal(&[3], 1, 1)
        };
        let case = case.supervised(annotation, Denominator::Causal);
        let mut inputs: Inputs<f32> = case.inputs().to();
        inputs.q.fill(1.0);
        inputs.k[(1, 0, 0)] = 1000.0;
        let clamped = if annotation == Annotation::NoPair {
            1.0
        } else {
            2.0
        };
        assert_eq!(case.forward(&inputs).loss, 100.0 * clamped / 3.0);
        let gradients = case.backward(&inputs);
        for gradient in [&gradients.dq, &gradients.dk, &gradients.dv] {
            assert!(gradient.iter().all(|x| x.is_finite()));
        }
    }
}

/// A head with more queries than keys has queries before the first key.
#[test]
fn a_query_that_sees_no_key_gets_nothing() {
    let masks = [Mask::Causal, Mask::SlidingWindow { window: 2 }];
    let masks = masks
        .into_iter()
        .chain([Mask::GroupedCausal { groups: &[4, 4] }]);
    for (mask, keys) in masks
        .map(|mask| (mask, 2))
        .chain([(Mask::None, 0), (Mask::Causal, 0)])
    {
        let head = Head {
            scale: 1.0,
            mask,
            pairs: Some(Pairs {
                offsets: &[0; 71],
                keys: &[],
            }),
        };
        let random = &mut Random::new(7);
        let q = random.array::<f32, _>((70, 3));
        let (k, v) = (random.array::<f32, _>((keys, 3)), random.array((keys, 3)));
        let (mut out, mut lse) = (poisoned((70, 3)), poisoned(70));
        let scratch = &mut vec![f32::NAN; 500];
        let loss = head.forward(
            q.view(),
            k.view(),
            v.view(),
            out.view_mut(),
            lse.view_mut(),
            scratch,
        );
        assert!(loss.unwrap().is_finite());
        let grad_out = random.array((70, 3));
        let mut dq = poisoned((70, 3));
        let (mut dk, mut dv) = (Array2::zeros((keys, 3)), Array2::zeros((keys, 3)));
        head.backward(
            q.view(),
            k.view(),
            v.view(),
            lse.view(),
            grad_out.view(),
            1.0,
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            scratch,
        )
        .unwrap();
        for i in 0..70 - keys {
            assert_eq!(out.row(i), Array1::<f32>::zeros(3), "{mask:?} query {i}");
            assert_eq!(lse[i], f32::NEG_INFINITY, "{mask:?} query {i}");
            assert_eq!(dq.row(i), Array1::<f32>::zeros(3), "{mask:?} query {i}");
        }
        for gradient in [dq, dk, dv, out] {
            assert!(gradient.iter().all(|x| x.is_finite()), "{mask:?}");
        }
    }
}

#[test]
fn a_nan_is_never_hidden() {
    for length in [1, 2, 30] {
        let case =
            Case::causal(&[length], 1, 4).supervised(Annotation::EveryPair, Denominator::Square);
        let mut inputs: Inputs<f32> = case.inputs().to();
        inputs.q[(length - 1, 0, 2)] = f32::NAN;
        let outputs = case.forward(&inputs);
        assert!(outputs.loss.is_nan());
        assert!(outputs.lse[(length - 1, 0)].is_nan());
        assert!(outputs.out[(length - 1, 0, 0)].is_nan());
        assert!(case.backward(&inputs).dq[(length - 1, 0, 0)].is_nan());
        assert_eq!(
            relative_error(&outputs.lse, &Array2::zeros((length, 1))),
            f64::INFINITY
        );
    }
}

#[test]
fn denominators_count_pairs_of_annotated_sequences_for_each_head() {
    let mut case =
        Case::causal(&[3, 0, 5], 4, 2).supervised(Annotation::NoPair, Denominator::Square);
    assert_eq!(case.attention().denominator(), 4.0 * (9.0 + 25.0));
    let supervision = case.supervision.as_mut().unwrap();
    supervision.denominator = Denominator::Causal;
    supervision.heads = vec![1];
    assert_eq!(case.attention().denominator(), 6.0 + 15.0);
    case.supervision.as_mut().unwrap().annotated[2] = 0;
    assert_eq!(case.attention().denominator(), 6.0);
    case.mask = OwnedMask::Window(1);
    assert_eq!(case.attention().denominator(), 3.0);
    case.supervision = None;
    assert_eq!(case.attention().denominator(), 0.0);
}

#[test]
fn scratch_grows_with_the_length_and_not_its_square() {
    for (mask, limit) in [
        (OwnedMask::Causal, 2 * 64 * 3000),
        (OwnedMask::Window(10), 2 * 64 * 73),
    ] {
        let case = Case {
            mask,
            ..Case::causal(&[3000], 1, 2)
        };
        let inputs: Inputs<f32> = case.inputs().to();
        let lse = case.forward(&inputs).lse;
        let mut gradients = [(); 3].map(|()| poisoned(case.q_shape()));
        let [dq, dk, dv] = gradients.each_mut().map(|gradient| gradient.view_mut());
        let scratch = &mut Vec::new();
        let (q, k, v) = (inputs.q.view(), inputs.k.view(), inputs.v.view());
        let grad_out = inputs.grad_out.view();
        case.attention()
            .backward(q, k, v, lse.view(), grad_out, 1.0, dq, dk, dv, scratch)
            .unwrap();
        assert!(scratch.len() <= limit, "{} above {limit}", scratch.len());
    }
}

/// Each line breaks one thing of a valid call and names the argument that the error must name.
#[test]
fn invalid_calls_are_errors_that_name_the_argument() {
    type Break = fn(&mut Case);
    let table: &[(&str, Break)] = &[
        ("cu_seqlens_q", |case| case.cu_seqlens_q.clear()),
        ("cu_seqlens_q", |case| case.cu_seqlens_q[0] = 1),
        ("cu_seqlens_q", |case| case.cu_seqlens_q[0] = -1),
        ("cu_seqlens_q", |case| case.cu_seqlens_q[1] = 9),
        ("cu_seqlens_q", |case| case.cu_seqlens_q[1] = -4),
        ("cu_seqlens_q", |case| case.cu_seqlens_q[2] = 6),
        ("cu_seqlens_q", |case| case.cu_seqlens_q[2] = i32::MAX),
        ("cu_seqlens_k", |case| case.cu_seqlens_k.clear()),
        ("cu_seqlens_k", |case| case.cu_seqlens_k[0] = 2),
        ("cu_seqlens_k", |case| case.cu_seqlens_k[1] = i32::MIN),
        ("cu_seqlens_k", |case| case.cu_seqlens_k[2] += 1),
        ("cu_seqlens_k", |case| case.cu_seqlens_k.insert(1, 1)),
        ("cu_seqlens_q", |case| case.cu_seqlens_k[1] = 2),
        ("scale", |case| case.scale = f64::NAN),
        ("scale", |case| case.scale = f64::INFINITY),
        ("window", |case| case.mask = OwnedMask::Window(0)),
        ("groups", |case| case.mask = OwnedMask::Groups(vec![0; 8])),
        ("groups", |case| {
            case.mask = OwnedMask::Groups(vec![0, 1, 0, 0, 0, 0, 0, 0, 0]);
        }),
        ("supervision.heads", |case| case.broken().heads = vec![4]),
        ("supervision.heads", |case| case.broken().heads = vec![1, 1]),
        ("supervision.heads", |case| case.broken().heads = vec![2, 0]),
        ("annotated", |case| case.broken().annotated.push(1)),
        ("annotated", |case| case.broken().annotated[1] = 2),
        ("pair_offsets", |case| case.broken().pair_offsets.clear()),
        ("pair_offsets", |case| case.broken().pair_offsets.push(9)),
        ("pair_offsets", |case| case.broken().pair_offsets[0] = 1),
        ("pair_offsets", |case| case.broken().pair_offsets[2] = -1),
        ("pair_offsets", |case| case.broken().pair_offsets[2] = 100),
        ("pair_offsets", |case| case.broken().pair_keys.push(0)),
        ("pair_keys", |case| case.broken().pair_keys.swap(0, 1)),
        ("pair_keys", |case| case.broken().pair_keys[1] = 0),
        ("pair_keys", |case| case.broken().pair_keys[0] = -1),
        ("pair_keys", |case| case.broken().pair_keys[1] = 2), // points forward
        ("pair_keys", |case| case.broken().pair_keys[1] = i32::MAX),
        ("pair_keys", |case| case.mask = OwnedMask::Window(1)), // now some are hidden
    ];
    let mut valid = Case::causal(&[3, 4], 4, 2);
    valid.cu_seqlens_k = vec![0, 4, 9];
    let valid = valid.supervised(Annotation::EveryPair, Denominator::Square);
    let inputs = valid.inputs();
    for (number, (argument, change)) in table.iter().enumerate() {
        let mut case = valid.clone();
        change(&mut case);
        let error = attempt(&case, inputs.q.view(), inputs.k.view(), inputs.v.view());
        assert_eq!(name(&error), *argument, "line {number}: {error}");
        let _ = case.attention().denominator();
    }
}

impl Case {
    fn broken(&mut self) -> &mut OwnedSupervision {
        self.supervision.as_mut().unwrap()
    }
}

fn name(error: &Error) -> &'static str {
    match error {
        Error::Shape { argument, .. } | Error::Value { argument, .. } => argument,
    }
}

/// The error of a call that must fail.
fn attempt(case: &Case, q: ArrayView3<f64>, k: ArrayView3<f64>, v: ArrayView3<f64>) -> Error {
    let (mut out, mut lse) = (poisoned(q.dim()), poisoned((q.dim().0, q.dim().1)));
    let scratch = &mut Vec::new();
    let mut gradients = [q, k, v].map(|x| poisoned(x.dim()));
    let [dq, dk, dv] = gradients.each_mut().map(|gradient| gradient.view_mut());
    let backward = case
        .attention()
        .backward(q, k, v, lse.view(), q, 1.0, dq, dk, dv, scratch);
    let forward = case
        .attention()
        .forward(q, k, v, out.view_mut(), lse.view_mut(), scratch);
    let forward = forward.expect_err("forward accepted it");
    assert_eq!(backward, Err(forward.clone()));
    forward
}

#[test]
fn arrays_that_do_not_fit_are_errors_that_name_the_argument() {
    let case = Case::causal(&[3, 4], 4, 2);
    let shapes = [
        ("cu_seqlens_q", [8, 4, 2], [7, 4, 2], [7, 4, 2]),
        ("cu_seqlens_k", [7, 4, 2], [6, 4, 2], [6, 4, 2]),
        ("q", [7, 4, 2], [7, 3, 2], [7, 3, 2]),
        ("q", [7, 4, 2], [7, 0, 2], [7, 0, 2]),
        ("k", [7, 4, 2], [7, 4, 3], [7, 4, 3]),
        ("v", [7, 4, 2], [7, 4, 2], [7, 2, 2]),
        ("v", [7, 4, 2], [7, 4, 2], [6, 4, 2]),
    ];
    for (argument, q, k, v) in shapes {
        let [q, k, v] = [q, k, v].map(Array3::zeros);
        let error = attempt(&case, q.view(), k.view(), v.view());
        assert_eq!(name(&error), argument, "{error}");
    }

    let x = Array3::<f32>::zeros((7, 4, 2));
    let x = x.view();
    let (mut out, mut lse) = (Array3::zeros((7, 4, 3)), Array2::zeros((7, 4)));
    let scratch = &mut Vec::new();
    let error = case
        .attention()
        .forward(x, x, x, out.view_mut(), lse.view_mut(), scratch);
    assert_eq!(name(&error.unwrap_err()), "out");
    let (mut out, mut lse) = (Array3::zeros((7, 4, 2)), Array2::zeros((7, 5)));
    let error = case
        .attention()
        .forward(x, x, x, out.view_mut(), lse.view_mut(), scratch);
    assert_eq!(name(&error.unwrap_err()), "lse");

    let names = ["lse", "grad_out", "dq", "dk", "dv"];
    for (wrong, argument) in names.into_iter().enumerate() {
        let width = |argument: usize| if argument == wrong { 1 } else { 2 };
        let lse = Array2::zeros((7, 2 * width(0)));
        let grad_out = Array3::zeros((7, 4, width(1)));
        let mut gradients = [2, 3, 4].map(|n| Array3::zeros((7, 4, width(n))));
        let [dq, dk, dv] = gradients.each_mut().map(|gradient| gradient.view_mut());
        let (lse, grad_out) = (lse.view(), grad_out.view());
        let error = case
            .attention()
            .backward(x, x, x, lse, grad_out, 1.0, dq, dk, dv, scratch);
        assert_eq!(name(&error.unwrap_err()), argument);
    }
}
