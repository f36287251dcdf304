//! Content-addressed memory against the fixtures, a plain transcription of SPEC section 4 and
//! finite differences.

mod common;

use common::{Fixture, Random, assert_close, cast, finite_difference, poisoned, relative_error};
use dtmem_reference::content_memory::{
    Addressing, ContentMemory, Erase, Gradients, Inputs, Order, Strength,
};
use dtmem_reference::{Error, Scalar};
use ndarray::{
    Array, Array1, Array2, Array3, Axis, Dimension, Ix2, Ix3, arr0, array, concatenate, s, stack,
};
use proptest::prelude::*;

/// The inputs of one segment, owned. Also holds their gradients.
#[derive(Clone, Debug)]
struct Segment<T> {
    memory: Array2<T>,
    address_key: Array2<T>,
    strength_key: Array2<T>,
    value: Array2<T>,
    key_strength: Option<Array1<T>>,
    strength_bias: T,
}

impl<T: Scalar> Segment<T> {
    fn inputs(&self) -> Inputs<'_, T> {
        Inputs {
            memory: self.memory.view(),
            address_key: self.address_key.view(),
            strength_key: self.strength_key.view(),
            value: self.value.view(),
            key_strength: self.key_strength.as_ref().map(|array| array.view()),
            strength_bias: self.strength_bias,
        }
    }

    fn gradients(&mut self) -> Gradients<'_, T> {
        Gradients {
            memory: self.memory.view_mut(),
            address_key: self.address_key.view_mut(),
            strength_key: self.strength_key.view_mut(),
            value: self.value.view_mut(),
            key_strength: self.key_strength.as_mut().map(|array| array.view_mut()),
            strength_bias: &mut self.strength_bias,
        }
    }

    fn poisoned_like(&self) -> Self {
        Self {
            memory: poisoned(self.memory.dim()),
            address_key: poisoned(self.address_key.dim()),
            strength_key: poisoned(self.strength_key.dim()),
            value: poisoned(self.value.dim()),
            key_strength: self
                .key_strength
                .as_ref()
                .map(|array| poisoned(array.dim())),
            strength_bias: T::nan(),
        }
    }

    fn cast<U: Scalar>(&self) -> Segment<U> {
        Segment {
            memory: cast(&self.memory),
            address_key: cast(&self.address_key),
            strength_key: cast(&self.strength_key),
            value: cast(&self.value),
            key_strength: self.key_strength.as_ref().map(cast),
            strength_bias: U::from_f64(self.strength_bias.to_f64()),
        }
    }

    #[track_caller]
    fn assert_close(&self, reference: &Segment<f64>, tolerance: f64) {
        assert_close("memory", &self.memory, &reference.memory, tolerance);
        assert_close(
            "address_key",
            &self.address_key,
            &reference.address_key,
            tolerance,
        );
        assert_close(
            "strength_key",
            &self.strength_key,
            &reference.strength_key,
            tolerance,
        );
        assert_close("value", &self.value, &reference.value, tolerance);
        assert_eq!(
            self.key_strength.is_some(),
            reference.key_strength.is_some()
        );
        if let (Some(found), Some(expected)) = (&self.key_strength, &reference.key_strength) {
            assert_close("key_strength", found, expected, tolerance);
        }
        let bias = arr0(self.strength_bias);
        assert_close(
            "strength_bias",
            &bias,
            &arr0(reference.strength_bias),
            tolerance,
        );
    }
}

/// Outputs of one segment, or gradients of these outputs.
#[derive(Clone, Debug)]
struct Outputs<T> {
    memory_next: Array2<T>,
    read: Array2<T>,
}

impl<T: Scalar> Outputs<T> {
    fn cast<U: Scalar>(&self) -> Outputs<U> {
        Outputs {
            memory_next: cast(&self.memory_next),
            read: cast(&self.read),
        }
    }

    #[track_caller]
    fn assert_close(&self, reference: &Outputs<f64>, tolerance: f64) {
        assert_close(
            "memory_next",
            &self.memory_next,
            &reference.memory_next,
            tolerance,
        );
        assert_close("read", &self.read, &reference.read, tolerance);
    }
}

impl Outputs<f64> {
    fn dot(&self, other: &Self) -> f64 {
        (&self.memory_next * &other.memory_next).sum() + (&self.read * &other.read).sum()
    }
}

fn forward<T: Scalar>(variant: &ContentMemory, segment: &Segment<T>) -> Outputs<T> {
    let mut outputs = Outputs {
        memory_next: poisoned(segment.memory.dim()),
        read: poisoned(segment.value.dim()),
    };
    let mut scratch = vec![T::nan(); 7];
    variant
        .forward(
            segment.inputs(),
            outputs.memory_next.view_mut(),
            outputs.read.view_mut(),
            &mut scratch,
        )
        .unwrap();
    outputs
}

fn backward<T: Scalar>(
    variant: &ContentMemory,
    segment: &Segment<T>,
    grad_outputs: &Outputs<T>,
) -> Segment<T> {
    let mut gradients = segment.poisoned_like();
    let mut scratch = vec![T::nan(); 4000];
    variant
        .backward(
            segment.inputs(),
            grad_outputs.memory_next.view(),
            grad_outputs.read.view(),
            gradients.gradients(),
            &mut scratch,
        )
        .unwrap();
    gradients
}

fn random_segment(variant: &ContentMemory, sizes: [usize; 3], random: &mut Random) -> Segment<f64> {
    carrying_segment(variant, sizes, 0, random)
}

/// Slots and values have `carried` columns more than the keys.
fn carrying_segment(
    variant: &ContentMemory,
    [slots, tokens, width]: [usize; 3],
    carried: usize,
    random: &mut Random,
) -> Segment<f64> {
    Segment {
        memory: random.array((slots, width + carried)),
        address_key: random.array((tokens, width)),
        strength_key: random.array((tokens, width)),
        value: random.array((tokens, width + carried)),
        key_strength: (variant.addressing == Addressing::Cosine)
            .then(|| Array1::from_shape_simple_fn(tokens, || 1.0 + 2.0 * random.uniform())),
        strength_bias: random.normal(),
    }
}

fn random_outputs([slots, tokens, width]: [usize; 3], random: &mut Random) -> Outputs<f64> {
    Outputs {
        memory_next: random.array((slots, width)),
        read: random.array((tokens, width)),
    }
}

/// The four choices from the bits of a number. ε is large enough to show in every place where it
/// stands, and to keep the cosine of a tiny slot smooth over the steps of finite differences.
fn variant(bits: usize, width: usize, top_k: Option<usize>) -> ContentMemory {
    ContentMemory {
        addressing: [Addressing::Cosine, Addressing::Dot][bits & 1],
        strength: [Strength::Sigmoid, Strength::Softmax][bits >> 1 & 1],
        erase: [Erase::Coupled, Erase::Paper][bits >> 2 & 1],
        order: [Order::ReadThenWrite, Order::WriteThenRead][bits >> 3 & 1],
        top_k,
        scale: 1.0 / (width.max(1) as f64).sqrt(),
        epsilon: 0.1,
    }
}

/// SPEC section 4 as it stands there, one slot and one token at a time: w, β [T][N] and the outputs.
fn transcribed(
    variant: &ContentMemory,
    segment: &Segment<f64>,
) -> (Vec<Vec<f64>>, Vec<Vec<f64>>, Outputs<f64>) {
    let memory = &segment.memory;
    let (slots, tokens) = (memory.nrows(), segment.value.nrows());
    let scored = memory
        .slice(s![.., ..segment.address_key.ncols()])
        .to_owned();
    let dot = |x: &Array2<f64>, i: usize, y: &Array2<f64>, t: usize| -> f64 {
        x.row(i).iter().zip(y.row(t)).map(|(x, y)| x * y).sum()
    };
    let softmax = |scores: Vec<f64>| -> Vec<f64> {
        let total: f64 = scores.iter().map(|x| x.exp()).sum();
        scores.iter().map(|x| x.exp() / total).collect()
    };
    let epsilon = variant.epsilon;
    let mut w = Vec::new();
    let mut beta = Vec::new();
    for t in 0..tokens {
        let a = &segment.address_key;
        let mut scores: Vec<f64> = (0..slots)
            .map(|i| match variant.addressing {
                Addressing::Cosine => {
                    let norms = (dot(&scored, i, &scored, i) + epsilon).sqrt()
                        * (dot(a, t, a, t) + epsilon).sqrt();
                    segment.key_strength.as_ref().unwrap()[t] * dot(&scored, i, a, t)
                        / (norms + epsilon)
                }
                Addressing::Dot => dot(&scored, i, a, t) * variant.scale,
            })
            .collect();
        if let Some(k) = variant.top_k.filter(|&k| k < slots) {
            let mut sorted = scores.clone();
            sorted.sort_by(|x, y| y.total_cmp(x));
            for score in &mut scores {
                if *score < sorted[k - 1] {
                    *score = f64::NEG_INFINITY;
                }
            }
        }
        w.push(softmax(scores));
        let strength =
            (0..slots).map(|i| dot(&scored, i, &segment.strength_key, t) * variant.scale);
        beta.push(match variant.strength {
            Strength::Sigmoid => strength
                .map(|x| 1.0 / (1.0 + (-x - segment.strength_bias).exp()))
                .collect(),
            Strength::Softmax => softmax(strength.collect()),
        });
    }
    let memory_next = Array2::from_shape_fn(memory.dim(), |(i, j)| {
        let keep: f64 = (0..tokens)
            .map(|t| match variant.erase {
                Erase::Coupled => 1.0 - w[t][i] * beta[t][i],
                Erase::Paper => 1.0 - w[t][i] * (1.0 - beta[t][i]),
            })
            .product();
        let add: f64 = (0..tokens)
            .map(|t| w[t][i] * beta[t][i] * segment.value[[t, j]])
            .sum();
        keep * memory[[i, j]] + add
    });
    let seen = match variant.order {
        Order::ReadThenWrite => memory,
        Order::WriteThenRead => &memory_next,
    };
    let read = Array2::from_shape_fn(segment.value.dim(), |(t, j)| {
        (0..slots).map(|i| w[t][i] * seen[[i, j]]).sum()
    });
    (w, beta, Outputs { memory_next, read })
}

/// The gradients that finite differences give for Σ grad_outputs·outputs.
fn differences(
    variant: &ContentMemory,
    segment: &Segment<f64>,
    grad_outputs: &Outputs<f64>,
) -> Segment<f64> {
    fn along<D: Dimension>(
        x: &Array<f64, D>,
        segment: &Segment<f64>,
        set: impl Fn(&mut Segment<f64>, &Array<f64, D>),
        loss: impl Fn(&Segment<f64>) -> f64,
    ) -> Array<f64, D> {
        let mut moved = segment.clone();
        finite_difference(x, |x| {
            set(&mut moved, x);
            loss(&moved)
        })
    }
    let loss = |moved: &Segment<f64>| forward(variant, moved).dot(grad_outputs);
    Segment {
        memory: along(&segment.memory, segment, |s, x| s.memory.assign(x), loss),
        address_key: along(
            &segment.address_key,
            segment,
            |s, x| s.address_key.assign(x),
            loss,
        ),
        strength_key: along(
            &segment.strength_key,
            segment,
            |s, x| s.strength_key.assign(x),
            loss,
        ),
        value: along(&segment.value, segment, |s, x| s.value.assign(x), loss),
        key_strength: segment
            .key_strength
            .as_ref()
            .map(|x| along(x, segment, |s, x| s.key_strength = Some(x.clone()), loss)),
        strength_bias: along(
            &array![segment.strength_bias],
            segment,
            |s, x| s.strength_bias = x[0],
            loss,
        )[0],
    }
}

/// Whether every token's k-th and next best score are at least `gap` apart, so that neither rounding
/// nor a small step changes the choice.
fn choice_is_clear(variant: &ContentMemory, segment: &Segment<f64>, gap: f64) -> bool {
    let Some(k) = variant.top_k else { return true };
    let everything = ContentMemory {
        top_k: None,
        ..*variant
    };
    let (w, _, _) = transcribed(&everything, segment);
    w.into_iter().all(|mut w| {
        w.sort_by(|x, y| y.total_cmp(x));
        k >= w.len() || (w[k - 1] / w[k]).ln() > gap
    })
}

fn top_k() -> impl Strategy<Value = Option<usize>> {
    prop_oneof![Just(None), (1_usize..=8).prop_map(Some)]
}

proptest! {
    #[test]
    fn outputs_match_the_transcribed_equations(
        bits in 0_usize..16,
        slots in 1_usize..70,
        tokens in 0_usize..20,
        width in 1_usize..40,
        carried in 0_usize..4,
        top_k in top_k(),
        seed: u64,
    ) {
        let mut random = Random::new(seed);
        let variant = variant(bits, width, top_k);
        let segment = carrying_segment(&variant, [slots, tokens, width], carried, &mut random);
        prop_assume!(choice_is_clear(&variant, &segment, 1e-9));
        let (w, beta, outputs) = transcribed(&variant, &segment);
        forward(&variant, &segment).assert_close(&outputs, 1e-12);

        let shape = (tokens, slots);
        let flat = |rows: Vec<Vec<f64>>| Array2::from_shape_vec(shape, rows.concat()).unwrap();
        let (mut found_w, mut found_beta) = (poisoned::<f64, _>(shape), poisoned::<f64, _>(shape));
        variant.address(segment.inputs(), found_w.view_mut(), found_beta.view_mut()).unwrap();
        assert_close("w", &found_w, &flat(w), 1e-12);
        assert_close("beta", &found_beta, &flat(beta), 1e-12);
    }

    #[test]
    fn gradients_match_finite_differences(
        slots in 1_usize..7,
        tokens in 0_usize..6,
        width in 1_usize..6,
        carried in 0_usize..3,
        top_k in top_k(),
        seed: u64,
    ) {
        for bits in 0..16 {
            let mut random = Random::new(seed);
            let variant = variant(bits, width, top_k);
            let segment = carrying_segment(&variant, [slots, tokens, width], carried, &mut random);
            if !choice_is_clear(&variant, &segment, 1e-2) {
                continue;
            }
            let grad_outputs = random_outputs([slots, tokens, width + carried], &mut random);
            let expected = differences(&variant, &segment, &grad_outputs);
            let found = backward(&variant, &segment, &grad_outputs);
            close_or_tiny(&found, &expected);
        }
    }
}

/// Gradients against differences: relative, but differences of what cancels to nothing (a softmax
/// over one slot) only know that it is about 1e-10.
#[track_caller]
fn close_or_tiny(found: &Segment<f64>, expected: &Segment<f64>) {
    #[track_caller]
    fn check<D: Dimension>(name: &str, found: &Array<f64, D>, expected: &Array<f64, D>) {
        let error = (found - expected).mapv(|x| x * x).sum().sqrt();
        let norm = expected.mapv(|x| x * x).sum().sqrt();
        let close = error <= 1e-6 * norm.max(1e-2);
        assert!(close, "{name}: {error:e} of {norm:e}\n{found}\n{expected}");
    }
    check("memory", &found.memory, &expected.memory);
    check("address_key", &found.address_key, &expected.address_key);
    check("strength_key", &found.strength_key, &expected.strength_key);
    check("value", &found.value, &expected.value);
    if let (Some(found), Some(expected)) = (&found.key_strength, &expected.key_strength) {
        check("key_strength", found, expected);
    }
    let bias = array![expected.strength_bias];
    check("strength_bias", &array![found.strength_bias], &bias);
}

/// The variant and the sequences of a fixture, with gradients of outputs and the expected results.
struct Expected {
    variant: ContentMemory,
    segments: Vec<Segment<f64>>,
    grad_outputs: Vec<Outputs<f64>>,
    outputs: Vec<Outputs<f64>>,
    /// The bias is shared: its gradient is the sum over sequences, kept in the first.
    gradients: Vec<Segment<f64>>,
}

impl Expected {
    fn read(fixture: &Fixture) -> Self {
        let choose = |name: &str, words: [&str; 2]| {
            let word = fixture.word(name);
            words
                .iter()
                .position(|&w| w == word)
                .unwrap_or_else(|| panic!("{name} {word}"))
        };
        let variant = ContentMemory {
            top_k: fixture.params["top_k"].as_u64().map(|k| k as usize),
            scale: fixture.number("scale"),
            epsilon: fixture.number("epsilon"),
            ..variant(
                choose("addressing", ["cosine", "dot"])
                    | choose("strength", ["sigmoid", "softmax"]) << 1
                    | choose("erase", ["coupled", "paper"]) << 2
                    | choose("order", ["read_then_write", "write_then_read"]) << 3,
                1,
                None,
            )
        };
        let batch = fixture.array::<f64, Ix3>("input.memory").len_of(Axis(0));
        let segments = |group: &str, bias: &dyn Fn(usize, f64) -> f64| -> Vec<Segment<f64>> {
            let row = |name: &str, b: usize| -> Array2<f64> {
                let all: Array3<f64> = fixture.array(&format!("{group}.{name}"));
                all.index_axis(Axis(0), b).to_owned()
            };
            (0..batch)
                .map(|b| Segment {
                    memory: row("memory", b),
                    address_key: row("address_key", b),
                    strength_key: row("strength_key", b),
                    value: row("value", b),
                    key_strength: (variant.addressing == Addressing::Cosine).then(|| {
                        let all = fixture.array::<f64, Ix2>(&format!("{group}.key_strength"));
                        all.row(b).to_owned()
                    }),
                    strength_bias: match variant.strength {
                        Strength::Sigmoid => {
                            bias(b, fixture.scalar(&format!("{group}.strength_bias")))
                        }
                        Strength::Softmax => 0.0,
                    },
                })
                .collect()
        };
        let outputs = |group: &str| -> Vec<Outputs<f64>> {
            let memory_next: Array3<f64> = fixture.array(&format!("{group}.memory_next"));
            let read: Array3<f64> = fixture.array(&format!("{group}.read"));
            memory_next
                .outer_iter()
                .zip(read.outer_iter())
                .map(|(memory_next, read)| Outputs {
                    memory_next: memory_next.to_owned(),
                    read: read.to_owned(),
                })
                .collect()
        };
        Self {
            variant,
            segments: segments("input", &|_, bias| bias),
            gradients: segments("grad_input", &|b, bias| if b == 0 { bias } else { 0.0 }),
            outputs: outputs("output"),
            grad_outputs: outputs("grad_output"),
        }
    }
}

/// Moves the gradient of the shared bias into the first sequence.
fn share_bias<T: Scalar>(gradients: &mut [Segment<T>]) {
    let total = gradients.iter().map(|g| g.strength_bias).sum();
    for gradient in &mut *gradients {
        gradient.strength_bias = T::zero();
    }
    gradients[0].strength_bias = total;
}

#[test]
fn fixtures_agree_in_f64() {
    let fixtures = Fixture::all("memory_");
    assert_eq!(fixtures.len(), 17);
    for (name, fixture) in fixtures {
        println!("{name}");
        let expected = Expected::read(&fixture);
        let mut gradients = Vec::new();
        for (b, segment) in expected.segments.iter().enumerate() {
            forward(&expected.variant, segment).assert_close(&expected.outputs[b], 1e-10);
            gradients.push(backward(
                &expected.variant,
                segment,
                &expected.grad_outputs[b],
            ));
        }
        share_bias(&mut gradients);
        for (found, expected) in gradients.iter().zip(&expected.gradients) {
            found.assert_close(expected, 1e-10);
        }
    }
}

#[test]
fn fixtures_agree_in_f32_with_f64_on_the_rounded_inputs() {
    for (name, fixture) in Fixture::all("memory_") {
        println!("{name}");
        let Expected {
            variant,
            segments,
            grad_outputs,
            ..
        } = Expected::read(&fixture);
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for (segment, grad_outputs) in segments.iter().zip(&grad_outputs) {
            let (narrow, grad_narrow) = (segment.cast::<f32>(), grad_outputs.cast::<f32>());
            let (rounded, grad_rounded) = (narrow.cast::<f64>(), grad_narrow.cast::<f64>());
            forward(&variant, &narrow).assert_close(&forward(&variant, &rounded), 2e-5);
            found.push(backward(&variant, &narrow, &grad_narrow));
            expected.push(backward(&variant, &rounded, &grad_rounded));
        }
        share_bias(&mut found);
        share_bias(&mut expected);
        for (found, expected) in found.iter().zip(&expected) {
            found.assert_close(expected, 2e-5);
        }
    }
}

/// With one slot w = 1 and a token's factor of keep is 1 − β (coupled) or β (paper), which a large
/// strength makes exactly 0. Everything then has a short closed form without a division.
#[test]
fn gradients_are_right_where_factors_of_keep_are_zero() {
    let (tokens, width) = (6, 5);
    for erase in [Erase::Coupled, Erase::Paper] {
        for saturated in 0..=tokens {
            let mut random = Random::new(saturated as u64);
            let variant = ContentMemory {
                erase,
                ..variant(0, width, None)
            };
            let mut segment = random_segment(&variant, [1, tokens, width], &mut random);
            let memory = segment.memory.row(0).to_owned();
            let sign = if erase == Erase::Coupled { 1.0 } else { -1.0 };
            // Every second token first, so that zeros lie on both sides of the others.
            for t in [1, 3, 5, 0, 2, 4].into_iter().take(saturated) {
                let pull = &memory * (sign * 1e4 / memory.dot(&memory));
                segment.strength_key.row_mut(t).assign(&pull);
            }
            let grad_outputs = random_outputs([1, tokens, width], &mut random);
            let found = backward(&variant, &segment, &grad_outputs);

            let g = grad_outputs.memory_next.row(0);
            let beta: Vec<f64> = segment
                .strength_key
                .rows()
                .into_iter()
                .map(|s| {
                    1.0 / (1.0 + (-variant.scale * s.dot(&memory) - segment.strength_bias).exp())
                })
                .collect();
            let factor = |t: usize| if sign > 0.0 { 1.0 - beta[t] } else { beta[t] };
            assert_eq!((0..tokens).filter(|&t| factor(t) == 0.0).count(), saturated);
            let dz = |t: usize| {
                let others: f64 = (0..tokens).filter(|&u| u != t).map(factor).product();
                let dbeta = -sign * g.dot(&memory) * others + g.dot(&segment.value.row(t));
                dbeta * beta[t] * (1.0 - beta[t])
            };
            let keep: f64 = (0..tokens).map(factor).product();
            let mut dmemory = &g * keep + grad_outputs.read.sum_axis(Axis(0));
            for t in 0..tokens {
                dmemory.scaled_add(variant.scale * dz(t), &segment.strength_key.row(t));
            }
            found.assert_close(
                &Segment {
                    memory: dmemory.insert_axis(Axis(0)),
                    address_key: Array2::zeros((tokens, width)),
                    strength_key: Array2::from_shape_fn((tokens, width), |(t, j)| {
                        variant.scale * dz(t) * memory[j]
                    }),
                    value: Array2::from_shape_fn((tokens, width), |(t, j)| beta[t] * g[j]),
                    key_strength: Some(Array1::zeros(tokens)),
                    strength_bias: (0..tokens).map(dz).sum(),
                },
                1e-12,
            );
        }
    }
}

#[test]
fn a_strength_bias_beyond_saturation_leaves_finite_gradients() {
    for bits in (0..16).filter(|bits| bits >> 1 & 1 == 0) {
        for bias in [-1e3, 1e3] {
            let mut random = Random::new(5);
            let variant = variant(bits, 3, None);
            let mut segment = random_segment(&variant, [1, 4, 3], &mut random);
            segment.strength_bias = bias;
            let grad_outputs = random_outputs([1, 4, 3], &mut random);
            let found = backward(&variant, &segment, &grad_outputs);
            close_or_tiny(&found, &differences(&variant, &segment, &grad_outputs));
            let narrow = backward(&variant, &segment.cast::<f32>(), &grad_outputs.cast());
            narrow.assert_close(&found, 2e-5);
        }
    }
}

#[test]
fn ties_at_the_kth_score_are_all_kept() {
    for bits in [0, 1] {
        for (slots, width) in [(5, 3), (40, 33), (67, 600)] {
            let mut random = Random::new(slots as u64);
            let twins = [1, slots / 2, slots - 1];
            for k in 1..=4 {
                let variant = variant(bits, width, Some(k));
                let mut segment = random_segment(&variant, [slots, 1, width], &mut random);
                let best = segment.address_key.row(0).to_owned();
                for twin in twins {
                    segment.memory.row_mut(twin).assign(&best);
                }
                let (mut w, mut beta) = (
                    poisoned::<f64, _>((1, slots)),
                    poisoned::<f64, _>((1, slots)),
                );
                variant
                    .address(segment.inputs(), w.view_mut(), beta.view_mut())
                    .unwrap();
                let kept = w.iter().filter(|&&w| w > 0.0).count();
                assert_eq!(kept, k.max(twins.len()), "top_k {k} of {slots}");
                for twin in twins {
                    assert_eq!(w[[0, twin]], w[[0, 1]]);
                }
                let grad_outputs = random_outputs([slots, 1, width], &mut random);
                let gradients = backward(&variant, &segment, &grad_outputs);
                assert!(gradients.memory.iter().all(|x| x.is_finite()));
            }
        }
    }
}

#[test]
fn top_k_beyond_the_slots_means_all() {
    let mut random = Random::new(1);
    let all = variant(0, 6, None);
    let segment = random_segment(&all, [4, 3, 6], &mut random);
    for k in [4, 5, usize::MAX] {
        let limited = ContentMemory {
            top_k: Some(k),
            ..all
        };
        assert_eq!(
            forward(&limited, &segment).read,
            forward(&all, &segment).read
        );
    }
}

#[test]
fn an_empty_axis_writes_nothing_and_reads_zero() {
    for bits in 0..16 {
        for shape in [[0, 3, 4], [3, 0, 4], [3, 4, 0], [0, 0, 0]] {
            let mut random = Random::new(2);
            let variant = variant(bits, shape[2], Some(2));
            let segment = random_segment(&variant, shape, &mut random);
            let outputs = forward(&variant, &segment);
            assert_eq!(outputs.memory_next, segment.memory);
            assert!(outputs.read.iter().all(|&x| x == 0.0));

            let grad_outputs = random_outputs(shape, &mut random);
            let gradients = backward(&variant, &segment, &grad_outputs);
            assert_eq!(gradients.memory, grad_outputs.memory_next);
            let zero = |x: &Array2<f64>| x.iter().all(|&x| x == 0.0);
            assert!(zero(&gradients.address_key) && zero(&gradients.strength_key));
            assert!(zero(&gradients.value) && gradients.strength_bias == 0.0);
            assert!(gradients.key_strength.iter().flatten().all(|&x| x == 0.0));

            let [slots, tokens, _] = shape;
            let (mut w, mut beta) = (
                poisoned::<f64, _>((tokens, slots)),
                poisoned::<f64, _>((tokens, slots)),
            );
            variant
                .address(segment.inputs(), w.view_mut(), beta.view_mut())
                .unwrap();
            assert!(w.iter().chain(&beta).all(|x| x.is_finite()));
        }
    }
}

/// Two segments of an episode: the loss sees both reads and the last memory, the gradient of the
/// first segment comes through the memory of the second.
#[test]
fn the_chain_over_segments_matches_finite_differences() {
    for bits in 0..16 {
        let mut random = Random::new(40 + bits as u64);
        let variant = variant(bits, 4, None);
        let first = random_segment(&variant, [5, 3, 4], &mut random);
        let second = random_segment(&variant, [5, 2, 4], &mut random);
        let grad_first_read: Array2<f64> = random.array((3, 4));
        let grad_second = random_outputs([5, 2, 4], &mut random);

        let continued = |memory_next: Array2<f64>| Segment {
            memory: memory_next,
            ..second.clone()
        };
        let loss = |first: &Segment<f64>| {
            let outputs = forward(&variant, first);
            let last = forward(&variant, &continued(outputs.memory_next));
            (&outputs.read * &grad_first_read).sum() + last.dot(&grad_second)
        };
        let memory_next = forward(&variant, &first).memory_next;
        let through = backward(&variant, &continued(memory_next), &grad_second);
        let grad_first = Outputs {
            memory_next: through.memory,
            read: grad_first_read.clone(),
        };
        let found = backward(&variant, &first, &grad_first);

        let mut moved = first.clone();
        let memory = finite_difference(&first.memory, |x| {
            moved.memory.assign(x);
            loss(&moved)
        });
        assert_close("memory", &found.memory, &memory, 1e-7);
        let mut moved = first.clone();
        let value = finite_difference(&first.value, |x| {
            moved.value.assign(x);
            loss(&moved)
        });
        assert_close("value", &found.value, &value, 1e-7);
        let mut moved = first.clone();
        let strength_key = finite_difference(&first.strength_key, |x| {
            moved.strength_key.assign(x);
            loss(&moved)
        });
        assert_close("strength_key", &found.strength_key, &strength_key, 1e-7);
    }
}

/// Keys and value as columns of one projection, outputs and gradients in column-major order.
#[test]
fn strided_views_give_what_contiguous_arrays_give() {
    use ndarray::ShapeBuilder;
    let (slots, tokens, width) = (9, 7, 5);
    for bits in 0..16 {
        let mut random = Random::new(77);
        let variant = variant(bits, width, Some(4));
        let segment = random_segment(&variant, [slots, tokens, width], &mut random);
        let grad_outputs = random_outputs([slots, tokens, width], &mut random);
        let expected = (
            forward(&variant, &segment),
            backward(&variant, &segment, &grad_outputs),
        );

        let parts = [&segment.address_key, &segment.strength_key, &segment.value];
        let fused = concatenate(Axis(1), &parts.map(|part| part.view())).unwrap();
        let (address_key, rest) = fused.view().split_at(Axis(1), width);
        let (strength_key, value) = rest.split_at(Axis(1), width);
        let pairs: Option<Array2<f64>> = segment
            .key_strength
            .as_ref()
            .map(|x| stack(Axis(1), &[x.view(), x.view()]).unwrap());
        let inputs = Inputs {
            memory: segment.memory.view(),
            address_key,
            strength_key,
            value,
            key_strength: pairs.as_ref().map(|pairs| pairs.column(1)),
            strength_bias: segment.strength_bias,
        };
        let column_major = |rows: usize| Array2::from_elem((rows, width).f(), f64::NAN);
        let mut outputs = Outputs {
            memory_next: column_major(slots),
            read: column_major(tokens),
        };
        let mut scratch = Vec::new();
        variant
            .forward(
                inputs,
                outputs.memory_next.view_mut(),
                outputs.read.view_mut(),
                &mut scratch,
            )
            .unwrap();
        outputs.assert_close(&expected.0, 1e-12);

        let mut gradients = Segment {
            memory: column_major(slots),
            address_key: column_major(tokens),
            strength_key: column_major(tokens),
            value: column_major(tokens),
            ..segment.poisoned_like()
        };
        variant
            .backward(
                inputs,
                grad_outputs.memory_next.view(),
                grad_outputs.read.view(),
                gradients.gradients(),
                &mut scratch,
            )
            .unwrap();
        gradients.assert_close(&expected.1, 1e-12);
    }
}

#[test]
fn scratch_that_is_large_enough_is_left_as_it_is() {
    let mut random = Random::new(3);
    let variant = variant(8, 5, Some(2));
    let segment = random_segment(&variant, [6, 4, 5], &mut random);
    let grad_outputs = random_outputs([6, 4, 5], &mut random);
    let mut scratch = Vec::new();
    let mut sizes = Vec::new();
    for _ in 0..2 {
        let mut gradients = segment.poisoned_like();
        variant
            .backward(
                segment.inputs(),
                grad_outputs.memory_next.view(),
                grad_outputs.read.view(),
                gradients.gradients(),
                &mut scratch,
            )
            .unwrap();
        sizes.push((scratch.as_ptr(), scratch.len()));
        scratch.fill(f64::NAN);
    }
    assert_eq!(sizes[0], sizes[1]);
    let larger = scratch.len() + 100;
    scratch.resize(larger, 0.0);
    let mut outputs = grad_outputs.clone();
    variant
        .forward(
            segment.inputs(),
            outputs.memory_next.view_mut(),
            outputs.read.view_mut(),
            &mut scratch,
        )
        .unwrap();
    assert_eq!(scratch.len(), larger);
}

/// Scores of thousands would overflow the exponential of a softmax that does not subtract its
/// largest score.
#[test]
fn large_scores_saturate_instead_of_overflowing() {
    for bits in 0..16 {
        let mut random = Random::new(9);
        let variant = variant(bits, 8, None);
        let mut segment = random_segment(&variant, [6, 3, 8], &mut random);
        segment.address_key *= 1e4;
        segment.strength_key *= 1e4;
        segment.key_strength = segment.key_strength.map(|kappa| kappa * 1e4);
        let shape = (3, 6);
        let (mut w, mut beta) = (poisoned::<f64, _>(shape), poisoned::<f64, _>(shape));
        variant
            .address(segment.inputs(), w.view_mut(), beta.view_mut())
            .unwrap();
        assert_close("Σ w", &w.sum_axis(Axis(1)), &Array1::ones(3), 1e-12);
        assert!(beta.iter().all(|beta| (0.0..=1.0).contains(beta)));
        let grad_outputs = random_outputs([6, 3, 8], &mut random);
        let gradients = backward(&variant, &segment, &grad_outputs);
        assert!(gradients.memory.iter().all(|x| x.is_finite()));
        assert!(gradients.address_key.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn not_a_number_is_passed_on() {
    for top_k in [None, Some(1), Some(3)] {
        let mut random = Random::new(4);
        let variant = variant(0, 4, top_k);
        let mut segment = random_segment(&variant, [30, 2, 4], &mut random);
        segment.memory[[17, 2]] = f64::NAN;
        let outputs = forward(&variant, &segment);
        let reference = random_outputs([30, 2, 4], &mut random);
        assert_eq!(
            relative_error(&outputs.read, &reference.read),
            f64::INFINITY
        );
    }
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let shape = [4, 3, 5];
    let good = variant(0, 5, None);
    let segment = random_segment(&good, shape, &mut Random::new(6));
    let call = |variant: &ContentMemory, segment: &Segment<f64>, [n, t, d]: [usize; 3]| {
        let outputs = random_outputs([n, t, d], &mut Random::new(7));
        let (mut memory_next, mut read) = (outputs.memory_next.clone(), outputs.read.clone());
        let forward = variant.forward(
            segment.inputs(),
            memory_next.view_mut(),
            read.view_mut(),
            &mut Vec::new(),
        );
        let backward = variant.backward(
            segment.inputs(),
            outputs.memory_next.view(),
            outputs.read.view(),
            segment.poisoned_like().gradients(),
            &mut Vec::new(),
        );
        [forward, backward].map(|result| match result {
            Ok(()) => "",
            Err(Error::Shape { argument, .. } | Error::Value { argument, .. }) => argument,
        })
    };
    assert_eq!(call(&good, &segment, shape), ["", ""]);
    assert_eq!(
        call(&good, &segment, [5, 3, 5]),
        ["memory_next", "grad_memory_next"]
    );
    assert_eq!(call(&good, &segment, [4, 2, 5]), ["read", "grad_read"]);

    let zeros = |rows, columns| Array2::zeros((rows, columns));
    let broken = |name: &str, change: &dyn Fn(&mut Segment<f64>)| {
        let mut segment = segment.clone();
        change(&mut segment);
        assert_eq!(call(&good, &segment, shape), [name; 2]);
    };
    broken("address_key", &|s| s.memory = zeros(4, 4));
    broken("value", &|s| s.memory = zeros(4, 6));
    broken("strength_key", &|s| s.address_key = zeros(3, 4));
    broken("strength_key", &|s| s.strength_key = zeros(2, 5));
    broken("value", &|s| s.value = zeros(3, 6));
    broken("key_strength", &|s| s.key_strength = Some(Array1::zeros(2)));
    broken("key_strength", &|s| s.key_strength = None);

    let dot = variant(1, 5, None);
    assert_eq!(call(&dot, &segment, shape), ["key_strength"; 2]);
    let none_best = ContentMemory {
        top_k: Some(0),
        ..good
    };
    assert_eq!(call(&none_best, &segment, shape), ["top_k"; 2]);
    for epsilon in [0.0, -1.0, f64::NAN] {
        let without = ContentMemory { epsilon, ..good };
        assert_eq!(call(&without, &segment, shape), ["epsilon"; 2]);
    }

    let wrong_gradients = |name: &str, change: &dyn Fn(&mut Segment<f64>)| {
        let mut gradients = segment.clone();
        change(&mut gradients);
        let outputs = random_outputs(shape, &mut Random::new(8));
        let error = good
            .backward(
                segment.inputs(),
                outputs.memory_next.view(),
                outputs.read.view(),
                gradients.gradients(),
                &mut Vec::new(),
            )
            .unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    };
    wrong_gradients("gradients.memory", &|g| g.memory = zeros(3, 5));
    wrong_gradients("gradients.address_key", &|g| g.address_key = zeros(3, 4));
    wrong_gradients("gradients.strength_key", &|g| g.strength_key = zeros(4, 5));
    wrong_gradients("gradients.value", &|g| g.value = zeros(0, 5));
    wrong_gradients("gradients.key_strength", &|g| g.key_strength = None);

    let mut w = zeros(3, 4);
    let mut beta = zeros(4, 3);
    let error = good
        .address(segment.inputs(), w.view_mut(), beta.view_mut())
        .unwrap_err();
    assert!(error.to_string().contains("beta"), "{error}");
}
