//! A content memory alone, without a transformer: known patterns are written, and read back.
//!
//! A pattern is a key and a value, each of D/2 random numbers, N(0, 1). The token [key, value] of
//! every pattern is written, `segment` of them at a time; then the tokens [key, 0] of all patterns
//! are the last segment, and what they read is compared with what was written (SPEC section 4):
//! a pattern is recalled if the inner product y·v of its read is largest with its own value
//! v = Ŵv x. Patterns are new in every episode, so only the rule can be learnt, not the patterns.
//! Training minimises the cross-entropy of softmax(y·v/√D) in the memory's own parameters.

use std::collections::BTreeMap;
use std::f64::consts::{PI, TAU};
use std::iter;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use dtmem_reference::Scalar;
use dtmem_reference::activation::{self, Activation};
use dtmem_reference::content_memory::{self, Addressing, ContentMemory};
use dtmem_reference::optimiser::{AdamW, adamw, clip_scale, sum_of_squares};
use ndarray::{Array1, Array2, ArrayView2, Axis, Zip, s};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use toml::Table;

use crate::model::MemoryConfig;
use crate::train;
use crate::train::config::{ConfigError, apply_override, describe};
use crate::train::run::Event;

/// What a cell of the memory alone is called in tables and errors.
pub const NAME: &str = "the memory alone";
/// Largest norm of the gradient.
const CLIP: f64 = 1.0;

/// The settings of a cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryTest {
    /// Everything random follows from it.
    pub seed: u64,
    /// Patterns that are written and read back, P.
    pub patterns: usize,
    /// Width D of tokens and slots; even.
    pub width: usize,
    /// Patterns that are written at once.
    pub segment: usize,
    /// The form of the memory.
    pub memory: MemoryConfig,
    /// Its training.
    pub train: MemoryTraining,
    /// Episodes that accuracies are measured on.
    pub episodes: u64,
}

/// How a memory alone is trained: AdamW without decay, half a cosine down to 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryTraining {
    /// Optimiser steps.
    pub steps: u64,
    /// Episodes of a step.
    pub batch: u64,
    /// Highest learning rate.
    pub learning_rate: f64,
}

impl Default for MemoryTest {
    fn default() -> Self {
        Self {
            seed: 0,
            patterns: 16,
            width: 64,
            segment: 4,
            memory: MemoryConfig::default(),
            train: MemoryTraining::default(),
            episodes: 100,
        }
    }
}

impl Default for MemoryTraining {
    fn default() -> Self {
        Self {
            steps: 200,
            batch: 8,
            learning_rate: 3e-3,
        }
    }
}

/// Episodes of training and of measuring differ for every seed.
#[derive(Clone, Copy)]
enum Use {
    Start,
    Training,
    Measuring,
}

impl MemoryTest {
    /// The defaults with `key=value` settings.
    ///
    /// # Errors
    /// A key that does not exist, a value out of range.
    pub fn parse(set: &[String]) -> Result<Self, ConfigError> {
        let mut table = Table::new();
        for argument in set {
            apply_override(&mut table, argument)?;
        }
        let test: Self =
            serde_path_to_error::deserialize(table).map_err(|error| describe(NAME, set, &error))?;
        test.validate()?;
        Ok(test)
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let memory = &self.memory;
        for (key, value, least, most) in [
            ("patterns", self.patterns, 1, 1 << 14),
            ("width", self.width, 2, 1 << 12),
            ("segment", self.segment, 1, 1 << 14),
            ("memory.slots", memory.slots, 1, 1 << 16),
            ("memory.top_k", memory.top_k, 0, memory.slots),
            ("train.batch", self.train.batch as usize, 1, 1 << 16),
            ("episodes", self.episodes as usize, 1, 1 << 24),
        ] {
            if !(least..=most).contains(&value) {
                return Err(ConfigError::value(key, value, format!("{least} to {most}")));
            }
        }
        if !self.width.is_multiple_of(2) {
            let expected = "an even number: half for the key, half for the value";
            return Err(ConfigError::value("width", self.width, expected));
        }
        let (rate, bias) = (self.train.learning_rate, memory.strength_bias);
        if !(rate > 0.0 && rate.is_finite()) {
            let expected = "a number above 0";
            return Err(ConfigError::value("train.learning_rate", rate, expected));
        }
        if !bias.is_finite() {
            return Err(ConfigError::value("memory.strength_bias", bias, "a number"));
        }
        Ok(())
    }

    /// The recall of a guess.
    pub fn chance(&self) -> f64 {
        1.0 / self.patterns as f64
    }

    /// Accuracies `before` and `after` training, and after it those of the quarters of the patterns
    /// that were written first and last, `oldest` and `newest`. None if it was stopped.
    ///
    /// # Errors
    /// A loss that is not finite.
    pub fn run(
        &self,
        stop: &AtomicBool,
        watch: &mut (dyn FnMut(Event) + Send),
    ) -> Result<Option<BTreeMap<String, f64>>, train::Error> {
        let layout = Layout::new(self);
        let mut values: Vec<f32> = layout.initial(self);
        let [before, ..] = self.measure(&layout, &values)?;
        let mut moments = [vec![0.0; values.len()], vec![0.0; values.len()]];
        for step in 1..=self.train.steps {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            self.step(&layout, &mut values, &mut moments, step)?;
            watch(Event::Step {
                step,
                steps: self.train.steps,
            });
        }
        let [after, oldest, newest] = self.measure(&layout, &values)?;
        let named = [
            ("before", before),
            ("after", after),
            ("oldest", oldest),
            ("newest", newest),
        ];
        Ok(Some(
            named.map(|(key, value)| (key.to_owned(), value)).into(),
        ))
    }

    fn step(
        &self,
        layout: &Layout,
        values: &mut [f32],
        [first, second]: &mut [Vec<f32>; 2],
        step: u64,
    ) -> Result<(), train::Error> {
        let batch = self.train.batch;
        let numbers = (step - 1) * batch..step * batch;
        let shared = &*values;
        let episodes: Result<Vec<_>, _> = numbers
            .into_par_iter()
            .map(|number| {
                let tokens = self.tokens(Use::Training, number);
                let episode = Episode::read(layout, shared, tokens)?;
                episode.gradient(layout, shared)
            })
            .collect();
        // Added in their order, whatever thread was first.
        let mut loss = 0.0;
        let mut gradient = vec![0.0_f32; values.len()];
        for (of_episode, other) in episodes.map_err(unfit)? {
            loss += of_episode / batch as f64;
            for (sum, value) in gradient.iter_mut().zip(other) {
                *sum += value / batch as f32;
            }
        }
        let norm = sum_of_squares(&gradient).sqrt();
        for (what, value) in [("the loss", loss), ("the norm of the gradient", norm)] {
            if !value.is_finite() {
                return Err(train::Error::NotFinite {
                    step,
                    what,
                    value,
                    kept: "a memory alone has no checkpoints".to_owned(),
                });
            }
        }
        let done = (step - 1) as f64 / self.train.steps as f64;
        let hyper = AdamW {
            learning_rate: self.train.learning_rate * 0.5 * (1.0 + (PI * done).cos()),
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            gradient_scale: clip_scale(norm, CLIP),
            step,
        };
        adamw(&hyper, &gradient, values, first, second).map_err(unfit)
    }

    /// Accuracy of all patterns, of the first quarter that was written, and of the last.
    fn measure(&self, layout: &Layout, values: &[f32]) -> Result<[f64; 3], train::Error> {
        let right: Result<Vec<Vec<bool>>, _> = (0..self.episodes)
            .into_par_iter()
            .map(|number| {
                let tokens = self.tokens(Use::Measuring, number);
                Ok(Episode::read(layout, values, tokens)?.right())
            })
            .collect();
        let right = right.map_err(unfit)?;
        let quarter = self.patterns.div_ceil(4);
        let share = |range: Range<usize>| {
            let count = range.len() as f64 * self.episodes as f64;
            let of_episode =
                |right: &Vec<bool>| right[range.clone()].iter().filter(|x| **x).count();
            right.iter().map(of_episode).sum::<usize>() as f64 / count
        };
        let all = self.patterns;
        Ok([share(0..all), share(0..quarter), share(all - quarter..all)])
    }

    /// X [2P, D]: the patterns [key, value], then [key, 0].
    fn tokens<T: Scalar>(&self, of: Use, number: u64) -> Array2<T> {
        let mut rng = self.generator(of, number);
        let (patterns, half) = (self.patterns, self.width / 2);
        let mut tokens = Array2::zeros((2 * patterns, self.width));
        for value in tokens.slice_mut(s![..patterns, ..]) {
            *value = T::from_f64(normal(&mut rng));
        }
        let (written, mut asked) = tokens.view_mut().split_at(Axis(0), patterns);
        asked
            .slice_mut(s![.., ..half])
            .assign(&written.slice(s![.., ..half]));
        tokens
    }

    fn generator(&self, of: Use, number: u64) -> ChaCha8Rng {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&number.to_le_bytes());
        key[16] = of as u8;
        ChaCha8Rng::from_seed(key)
    }
}

/// A number from N(0, 1), by Box and Muller.
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let (a, b): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - a).ln()).sqrt() * (TAU * b).cos()
}

fn unfit(error: dtmem_reference::Error) -> train::Error {
    let expected = "arrays that fit each other";
    ConfigError::value(NAME, error, expected).into()
}

/// The parameters one after another: Wk, Wq, Ŵk, Ŵq, Ŵv [D, D] each; M₀ [N, D]; u \[D\], its bias;
/// b.
struct Layout {
    variant: ContentMemory,
    width: usize,
    slots: usize,
    patterns: usize,
    segment: usize,
}

/// Numbers of the square matrices.
const ADDRESS_KEY: usize = 0;
const ADDRESS_QUERY: usize = 1;
const STRENGTH_KEY: usize = 2;
const STRENGTH_QUERY: usize = 3;
const VALUE: usize = 4;
const SQUARES: usize = 5;

impl Layout {
    fn new(test: &MemoryTest) -> Self {
        Self {
            variant: test.memory.variant(test.width),
            width: test.width,
            slots: test.memory.slots,
            patterns: test.patterns,
            segment: test.segment,
        }
    }

    fn square(&self, number: usize) -> Range<usize> {
        let size = self.width * self.width;
        number * size..(number + 1) * size
    }

    fn initial_memory(&self) -> Range<usize> {
        let start = self.square(SQUARES).start;
        start..start + self.slots * self.width
    }

    /// u, its bias and b.
    fn scalars(&self) -> (Range<usize>, usize, usize) {
        let start = self.initial_memory().end;
        let end = start + self.width;
        (start..end, end, end + 1)
    }

    fn len(&self) -> usize {
        self.scalars().2 + 1
    }

    fn matrix<'a, T: Scalar>(&self, values: &'a [T], number: usize) -> ArrayView2<'a, T> {
        let part = &values[self.square(number)];
        ArrayView2::from_shape((self.width, self.width), part).expect("a square of this very size")
    }

    /// Projections and u from N(0, 1/D), biases as configured, M₀ from N(0, 1).
    fn initial<T: Scalar>(&self, test: &MemoryTest) -> Vec<T> {
        let mut rng = test.generator(Use::Start, 0);
        let mut values = vec![T::zero(); self.len()];
        let narrow = (self.width as f64).sqrt().recip();
        let (key_strength, _, strength_bias) = self.scalars();
        for (range, deviation) in [
            (0..self.square(SQUARES).start, narrow),
            (self.initial_memory(), 1.0),
            (key_strength, narrow),
        ] {
            for value in &mut values[range] {
                *value = T::from_f64(deviation * normal(&mut rng));
            }
        }
        values[strength_bias] = T::from_f64(test.memory.strength_bias);
        values
    }

    /// Tokens of every segment: the patterns, then the questions.
    fn segments(&self) -> Vec<Range<usize>> {
        let all = self.patterns;
        let writes = (0..all).step_by(self.segment);
        let writes = writes.map(|start| start..all.min(start + self.segment));
        writes.chain(iter::once(all..2 * all)).collect()
    }
}

/// One episode: patterns written, and what was read.
struct Episode<T> {
    tokens: Array2<T>,
    /// Wk x and Ŵk x [2P, D].
    keys: [Array2<T>; 2],
    /// a and s [2P, D].
    address: Array2<T>,
    strength: Array2<T>,
    /// v [2P, D].
    value: Array2<T>,
    /// u·x + b_u and κ [2P, 1], for cosine addressing.
    key_strength: Option<[Array2<T>; 2]>,
    /// M before every segment.
    memories: Vec<Array2<T>>,
    /// y [P, D] of the questions.
    read: Array2<T>,
    /// y·v/√D [P, P].
    logits: Array2<T>,
}

impl<T: Scalar> Episode<T> {
    fn read(layout: &Layout, values: &[T], tokens: Array2<T>) -> dtmem_reference::Result<Self> {
        let through = |x: &Array2<T>, number| x.dot(&layout.matrix(values, number).t());
        let keys = [ADDRESS_KEY, STRENGTH_KEY].map(|number| through(&tokens, number));
        let address = keys[0].dot(&layout.matrix(values, ADDRESS_QUERY));
        let strength = keys[1].dot(&layout.matrix(values, STRENGTH_QUERY));
        let value = through(&tokens, VALUE);
        let (map, bias, _) = layout.scalars();
        let key_strength = match layout.variant.addressing {
            Addressing::Dot => None,
            Addressing::Cosine => {
                let map = ArrayView2::from_shape((layout.width, 1), &values[map])
                    .expect("a row of this very width");
                let before = tokens.dot(&map) + values[bias];
                let mut after = before.clone();
                activation::forward(Activation::OnePlus, before.view(), after.view_mut())?;
                Some([before, after])
            }
        };
        let initial = values[layout.initial_memory()].to_vec();
        let initial = Array2::from_shape_vec((layout.slots, layout.width), initial)
            .expect("a memory of this very size");
        let mut episode = Self {
            read: Array2::zeros((layout.patterns, layout.width)),
            logits: Array2::zeros((0, 0)),
            memories: vec![initial],
            tokens,
            keys,
            address,
            strength,
            value,
            key_strength,
        };
        let mut scratch = Vec::new();
        for segment in layout.segments() {
            let memory = episode.memories.last().expect("the initial one").clone();
            let mut next = memory.clone();
            let mut read = Array2::zeros((segment.len(), layout.width));
            let inputs = episode.inputs(layout, values, &memory, segment);
            let variant = layout.variant;
            variant.forward(inputs, next.view_mut(), read.view_mut(), &mut scratch)?;
            episode.memories.push(next);
            // The last one stays: that of the questions.
            episode.read = read;
        }
        let factor = T::from_f64((layout.width as f64).sqrt().recip());
        let written = episode.value.slice(s![..layout.patterns, ..]);
        episode.logits = episode.read.dot(&written.t()) * factor;
        Ok(episode)
    }

    fn inputs<'a>(
        &'a self,
        layout: &Layout,
        values: &[T],
        memory: &'a Array2<T>,
        segment: Range<usize>,
    ) -> content_memory::Inputs<'a, T> {
        let rows = s![segment.clone(), ..];
        let after = self.key_strength.as_ref().map(|[_, after]| after);
        content_memory::Inputs {
            memory: memory.view(),
            address_key: self.address.slice(rows),
            strength_key: self.strength.slice(rows),
            value: self.value.slice(rows),
            key_strength: after.map(|after| after.slice(s![segment, 0])),
            strength_bias: values[layout.scalars().2],
        }
    }

    /// Which patterns are recalled; not those with a tie, or with something that is no number.
    fn right(&self) -> Vec<bool> {
        let rows = self.logits.rows().into_iter().enumerate();
        rows.map(|(own, row)| {
            let best = |(other, logit): (usize, &T)| other == own || row[own] > *logit;
            row.iter().enumerate().all(best)
        })
        .collect()
    }

    /// Mean cross-entropy of the questions, and its gradient.
    fn gradient(&self, layout: &Layout, values: &[T]) -> dtmem_reference::Result<(f64, Vec<T>)> {
        let patterns = layout.patterns;
        let factor = T::from_f64((layout.width as f64).sqrt().recip());
        let mut dlogits = self.logits.clone();
        let mut loss = 0.0;
        for (own, mut row) in dlogits.rows_mut().into_iter().enumerate() {
            let most = row.fold(T::neg_infinity(), |most, x| most.max(*x));
            row.mapv_inplace(|x| (x - most).exp());
            let sum = row.sum();
            row.mapv_inplace(|x| x / sum);
            loss -= row[own].to_f64().max(f64::MIN_POSITIVE).ln() / patterns as f64;
            row[own] -= T::one();
        }
        dlogits *= factor / T::from_f64(patterns as f64);

        let mut daddress = Array2::zeros(self.tokens.raw_dim());
        let mut dstrength = Array2::zeros(self.tokens.raw_dim());
        let mut dvalue = Array2::zeros(self.tokens.raw_dim());
        let mut dkey_strength = Array2::zeros((2 * patterns, 1));
        let mut dbias = T::zero();
        let written = self.value.slice(s![..patterns, ..]);
        let dread_of_questions = dlogits.dot(&written);
        let mut dmemory = Array2::zeros((layout.slots, layout.width));
        let mut scratch = Vec::new();
        let segments = layout.segments();
        for (segment, memory) in segments.iter().zip(&self.memories).rev() {
            let of_questions = segment.start == patterns;
            let dread = match of_questions {
                true => dread_of_questions.clone(),
                false => Array2::zeros((segment.len(), layout.width)),
            };
            let mut before = Array2::zeros(dmemory.raw_dim());
            let mut bias = T::zero();
            let rows = s![segment.clone(), ..];
            let of_scores = dkey_strength.slice_mut(s![segment.clone(), 0]);
            let gradients = content_memory::Gradients {
                memory: before.view_mut(),
                address_key: daddress.slice_mut(rows),
                strength_key: dstrength.slice_mut(rows),
                value: dvalue.slice_mut(rows),
                key_strength: self.key_strength.is_some().then_some(of_scores),
                strength_bias: &mut bias,
            };
            let inputs = self.inputs(layout, values, memory, segment.clone());
            let (next, read) = (dmemory.view(), dread.view());
            layout
                .variant
                .backward(inputs, next, read, gradients, &mut scratch)?;
            dmemory = before;
            dbias += bias;
        }
        // Values are compared with what was read, too.
        let direct = dlogits.t().dot(&self.read);
        Zip::from(dvalue.slice_mut(s![..patterns, ..]))
            .and(&direct)
            .for_each(|value, direct| *value += *direct);

        let mut gradient = vec![T::zero(); values.len()];
        let mut put = |range: Range<usize>, array: Array2<T>| {
            for (place, value) in gradient[range].iter_mut().zip(array) {
                *place = value;
            }
        };
        for (number, key, query, dkey) in [
            (ADDRESS_KEY, &self.keys[0], ADDRESS_QUERY, &daddress),
            (STRENGTH_KEY, &self.keys[1], STRENGTH_QUERY, &dstrength),
        ] {
            put(layout.square(query), key.t().dot(dkey));
            let through = dkey.dot(&layout.matrix(values, query).t());
            put(layout.square(number), through.t().dot(&self.tokens));
        }
        put(layout.square(VALUE), dvalue.t().dot(&self.tokens));
        put(layout.initial_memory(), dmemory);
        let (map, map_bias, strength_bias) = layout.scalars();
        if let Some([before, after]) = &self.key_strength {
            let (x, y) = (before.view(), after.view());
            let mut slope = dkey_strength;
            activation::backward_in_place(Activation::OnePlus, x, y, slope.view_mut())?;
            put(map, self.tokens.t().dot(&slope));
            let sum: Array1<T> = slope.sum_axis(Axis(0));
            gradient[map_bias] = sum[0];
        }
        gradient[strength_bias] = dbias;
        Ok((loss, gradient))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(set: &[&str]) -> MemoryTest {
        let small = ["patterns=3", "width=4", "segment=2", "memory.slots=3"];
        let set = small.iter().chain(set).map(|&one| one.to_owned());
        MemoryTest::parse(&set.collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn gradient_of_an_episode_is_that_of_finite_differences() {
        for (number, set) in [
            &[][..],
            &["memory.addressing=dot", "memory.strength=softmax"],
            &["memory.erase=paper", "memory.order=write_then_read"],
            &["segment=1", "memory.strength_bias=-1"],
        ]
        .into_iter()
        .enumerate()
        {
            let test = test(set);
            let layout = Layout::new(&test);
            let tokens: Array2<f64> = test.tokens(Use::Training, number as u64);
            let mut values: Vec<f64> = layout.initial(&test);
            let episode = Episode::read(&layout, &values, tokens.clone()).unwrap();
            let (_, gradient) = episode.gradient(&layout, &values).unwrap();
            let loss = |values: &[f64]| {
                let episode = Episode::read(&layout, values, tokens.clone()).unwrap();
                episode.gradient(&layout, values).unwrap().0
            };
            let (mut error, mut size) = (0.0_f64, 0.0_f64);
            for index in 0..values.len() {
                let (kept, step) = (values[index], 1e-5);
                let ends = [-step, step].map(|step| {
                    values[index] = kept + step;
                    loss(&values)
                });
                values[index] = kept;
                let expected = (ends[1] - ends[0]) / (2.0 * step);
                error += (gradient[index] - expected).powi(2);
                size += expected * expected;
            }
            assert!(
                size > 0.0 && (error / size).sqrt() < 1e-7,
                "{set:?}: {error} of {size}"
            );
        }
    }

    #[test]
    fn ties_and_what_is_no_number_are_not_recalled() {
        let test = test(&[]);
        let layout = Layout::new(&test);
        let values: Vec<f64> = layout.initial(&test);
        let tokens = test.tokens(Use::Training, 0);
        let mut episode = Episode::read(&layout, &values, tokens).unwrap();
        let nan = f64::NAN;
        episode.logits = ndarray::array![[1.0, 0.0, 0.5], [2.0, 2.0, 1.0], [0.0, nan, 1.0]];
        assert_eq!(episode.right(), [true, false, false]);
    }
}
