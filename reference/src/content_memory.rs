//! Content-addressed memory: one segment of one sequence (SPEC section 4).
//!
//! Everything that belongs to a (token, slot) pair is a [T, N] array, so a softmax over slots runs
//! along contiguous memory. Rows that are multiplied with the memory (keys, gradients of the read)
//! are stacked, so that the memory, the only large operand, is walked through once for all of them.

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, Zip};

use crate::error::check_shape;
use crate::{Error, Result, Scalar};

/// How slots are scored against the address key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addressing {
    /// κ_t · M_i·a_t / (√(|M_i|²+ε) · √(|a_t|²+ε) + ε). Default; deviates from the paper.
    Cosine,
    /// scale · M_i·a_t: the paper.
    Dot,
}

/// How strongly an addressed slot is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strength {
    /// σ(scale · M_i·s_t + b). Default; deviates from the paper.
    Sigmoid,
    /// softmax over slots of scale · M_i·s_t: the paper.
    Softmax,
}

/// What a write erases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Erase {
    /// keep_i = Π_t (1 − w_it β_it): erase where you write. Default; deviates from the paper.
    Coupled,
    /// keep_i = Π_t (1 − w_it (1 − β_it)): the paper.
    Paper,
}

/// Which memory a read sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The memory before this segment's write. Default; deviates from the paper.
    ReadThenWrite,
    /// The memory after it: the paper. A token then reads what later tokens of its segment wrote.
    WriteThenRead,
}

/// The variant of the memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ContentMemory {
    /// Score of a slot.
    pub addressing: Addressing,
    /// Write strength.
    pub strength: Strength,
    /// Erase rule.
    pub erase: Erase,
    /// Read before or after the write.
    pub order: Order,
    /// Only the k best slots per token take part in the softmax of the address; ties at the k-th
    /// score are all kept. At least 1; more than N means all. The choice has no gradient.
    pub top_k: Option<usize>,
    /// Factor of the dot products, 1/√D.
    pub scale: f64,
    /// ε of cosine addressing, above 0 there; `dot` ignores it.
    pub epsilon: f64,
}

/// The inputs of one segment: N slots, T tokens, keys of width D, values of width V ≥ D.
///
/// Slots are as wide as values. Keys are compared with their first D columns; the others are
/// written and read alike, but carried along unseen.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, T> {
    /// M [N, V].
    pub memory: ArrayView2<'a, T>,
    /// a [T, D].
    pub address_key: ArrayView2<'a, T>,
    /// s [T, D].
    pub strength_key: ArrayView2<'a, T>,
    /// v [T, V].
    pub value: ArrayView2<'a, T>,
    /// κ `[T]`, for cosine addressing (and only then).
    pub key_strength: Option<ArrayView1<'a, T>>,
    /// b, for sigmoid strength (ignored otherwise).
    pub strength_bias: T,
}

/// Gradients of the inputs: all are overwritten.
#[derive(Debug)]
pub struct Gradients<'a, T> {
    /// [N, V]
    pub memory: ArrayViewMut2<'a, T>,
    /// [T, D]
    pub address_key: ArrayViewMut2<'a, T>,
    /// [T, D]
    pub strength_key: ArrayViewMut2<'a, T>,
    /// [T, V]
    pub value: ArrayViewMut2<'a, T>,
    /// `[T]`, with cosine addressing (and only then).
    pub key_strength: Option<ArrayViewMut1<'a, T>>,
    /// Scalar; 0 with softmax strength.
    pub strength_bias: &'a mut T,
}

/// What [`Inputs`] say: N, T, D and V.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    slots: usize,
    tokens: usize,
    key_width: usize,
    width: usize,
}

impl<'a, T> Inputs<'a, T> {
    /// The columns of the memory that keys are compared with.
    fn scored(&self) -> ArrayView2<'a, T> {
        self.memory.split_at(Axis(1), self.address_key.ncols()).0
    }
}

impl Erase {
    /// The share of slot i that token t erases.
    #[inline]
    pub fn erased<T: Scalar>(self, w: T, beta: T) -> T {
        match self {
            Erase::Coupled => w * beta,
            Erase::Paper => w * (T::one() - beta),
        }
    }
}

impl ContentMemory {
    /// M′ and y: `memory_next` [N, V], `read` [T, V].
    ///
    /// # Errors
    /// A shape that does not fit, `top_k` of 0, `epsilon` that is not above 0 with cosine
    /// addressing, or a key strength where there should be none (or the reverse).
    pub fn forward<T: Scalar>(
        &self,
        inputs: Inputs<T>,
        mut memory_next: ArrayViewMut2<T>,
        mut read: ArrayViewMut2<T>,
        scratch: &mut Vec<T>,
    ) -> Result<()> {
        let Sizes {
            slots,
            tokens,
            key_width,
            width,
        } = self.validate(&inputs)?;
        check_shape("memory_next", memory_next.shape(), &[slots, width])?;
        check_shape("read", read.shape(), &[tokens, width])?;
        // Without slots, tokens or width nothing is written and every read is 0.
        if slots == 0 || tokens == 0 || key_width == 0 {
            memory_next.assign(&inputs.memory);
            read.fill(T::zero());
            return Ok(());
        }

        let mut scratch = Scratch::new(
            scratch,
            2 * tokens * key_width + 3 * tokens * slots + 2 * slots,
        );
        let mut keys = scratch.matrix(2 * tokens, key_width);
        let mut dots = scratch.matrix(2 * tokens, slots);
        let mut w = scratch.matrix(tokens, slots);
        let mut norms = scratch.vector(slots);
        let mut keep = scratch.vector(slots);

        stack(&mut keys, &[inputs.address_key, inputs.strength_key]);
        multiply(keys.view(), inputs.scored().t(), &mut dots);
        let (mut similarity, mut beta) = dots.split_at(Axis(0), tokens);
        self.finish_scores(
            &inputs,
            &mut similarity,
            &mut w,
            &mut beta,
            &mut norms,
            &mut keep,
        );

        if self.order == Order::ReadThenWrite {
            multiply(w.view(), inputs.memory, &mut read);
        }
        // β turns into the gate w·β.
        let mut gate = beta;
        keep.fill(T::one());
        for (w, gate) in w.rows().into_iter().zip(gate.rows_mut()) {
            Zip::from(&mut keep)
                .and(w)
                .and(gate)
                .for_each(|keep, &w, gate| {
                    *keep *= T::one() - self.erase.erased(w, *gate);
                    *gate *= w;
                });
        }
        Zip::from(memory_next.rows_mut())
            .and(inputs.memory.rows())
            .and(&keep)
            .for_each(|mut next, slot, &keep| next.zip_mut_with(&slot, |x, &m| *x = keep * m));
        multiply_add(gate.t(), inputs.value, &mut memory_next);
        if self.order == Order::WriteThenRead {
            multiply(w.view(), memory_next.view(), &mut read);
        }
        Ok(())
    }

    /// Gradients of Σ grad_memory_next·M′ + Σ grad_read·y. Nothing of the forward pass is kept:
    /// addresses and strengths are computed again from the inputs.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward<T: Scalar>(
        &self,
        inputs: Inputs<T>,
        grad_memory_next: ArrayView2<T>,
        grad_read: ArrayView2<T>,
        mut gradients: Gradients<T>,
        scratch: &mut Vec<T>,
    ) -> Result<()> {
        let sizes = self.validate(&inputs)?;
        let Sizes {
            slots,
            tokens,
            key_width,
            width,
        } = sizes;
        check_shape(
            "grad_memory_next",
            grad_memory_next.shape(),
            &[slots, width],
        )?;
        check_shape("grad_read", grad_read.shape(), &[tokens, width])?;
        self.validate_gradients(&gradients, sizes)?;

        *gradients.strength_bias = T::zero();
        gradients.memory.assign(&grad_memory_next);
        if slots == 0 || tokens == 0 || key_width == 0 {
            gradients.address_key.fill(T::zero());
            gradients.strength_key.fill(T::zero());
            gradients.value.fill(T::zero());
            if let Some(key_strength) = &mut gradients.key_strength {
                key_strength.fill(T::zero());
            }
            return Ok(());
        }

        let cross_size = match self.order {
            Order::ReadThenWrite => 0,
            Order::WriteThenRead => tokens,
        };
        let mut scratch = Scratch::new(
            scratch,
            2 * tokens * key_width
                + 7 * tokens * slots
                + cross_size * cross_size
                + 4 * slots
                + tokens,
        );
        let mut keys = scratch.matrix(2 * tokens, key_width);
        let mut dots = scratch.matrix(3 * tokens, slots);
        let mut w = scratch.matrix(tokens, slots);
        let mut gate = scratch.matrix(tokens, slots);
        let mut before = scratch.matrix(tokens, slots);
        let mut dgate = scratch.matrix(tokens, slots);
        let mut cross = scratch.matrix(cross_size, cross_size);
        let mut norms = scratch.vector(slots);
        let mut dnorms = scratch.vector(slots);
        let mut keep = scratch.vector(slots);
        let mut after = scratch.vector(slots);
        let mut token_slopes = scratch.vector(tokens);

        // The forward pass again, and R·Mᵀ, the gradient of the addresses.
        stack(&mut keys, &[inputs.address_key, inputs.strength_key]);
        let (mut of_keys, mut dw) = dots.view_mut().split_at(Axis(0), 2 * tokens);
        multiply(keys.view(), inputs.scored().t(), &mut of_keys);
        multiply(grad_read, inputs.memory.t(), &mut dw);
        let (mut similarity, mut beta) = of_keys.split_at(Axis(0), tokens);
        self.finish_scores(
            &inputs,
            &mut similarity,
            &mut w,
            &mut beta,
            &mut norms,
            &mut after,
        );
        keep.fill(T::one());
        for (t, before) in before.rows_mut().into_iter().enumerate() {
            Zip::from(&mut keep)
                .and(before)
                .and(gate.row_mut(t))
                .and(w.row(t))
                .and(beta.row(t))
                .for_each(|keep, before, gate, &w, &beta| {
                    *before = *keep;
                    *keep *= T::one() - self.erase.erased(w, beta);
                    *gate = w * beta;
                });
        }

        // gradients.memory holds G, the gradient of M′, until the slots are done below.
        if self.order == Order::WriteThenRead {
            // R·M′ᵀ with M′ = keep·M + gateᵀ·v, without M′ itself.
            for dw in dw.rows_mut() {
                Zip::from(dw).and(&keep).for_each(|dw, &keep| *dw *= keep);
            }
            multiply(grad_read, inputs.value.t(), &mut cross);
            multiply_add(cross.view(), gate.view(), &mut dw);
            multiply_add(w.t(), grad_read, &mut gradients.memory);
        }
        multiply(inputs.value, gradients.memory.t(), &mut dgate);
        multiply(gate.view(), gradients.memory.view(), &mut gradients.value);

        // ∂keep_i/∂(1 − erased_it) is the product of all other factors. One of them may be 0, so it
        // is not keep/factor but (product before t)·(product after t); `after` starts as −G_i·M_i
        // and takes the factors in while t runs backwards.
        Zip::from(&mut after)
            .and(gradients.memory.rows())
            .and(inputs.memory.rows())
            .for_each(|after, gradient, slot| *after = -gradient.dot(&slot));
        dnorms.fill(T::zero());
        token_slopes.fill(T::zero());
        let scale = T::from_f64(self.scale);
        for t in (0..tokens).rev() {
            let (w, mut dw) = (w.row(t), dw.row_mut(t));
            let (mut beta, mut dbeta) = (beta.row_mut(t), dgate.row_mut(t));
            Zip::from(&mut after)
                .and(before.row(t))
                .and(w)
                .and(&beta)
                .and(&mut dw)
                .and(&mut dbeta)
                .for_each(|after, &before, &w, &beta, dw, dgate| {
                    let derased = before * *after;
                    *after *= T::one() - self.erase.erased(w, beta);
                    match self.erase {
                        Erase::Coupled => {
                            let dgate_total = *dgate + derased;
                            *dw += dgate_total * beta;
                            *dgate = dgate_total * w;
                        }
                        Erase::Paper => {
                            *dw += *dgate * beta + derased * (T::one() - beta);
                            *dgate = (*dgate - derased) * w;
                        }
                    }
                });

            // β becomes the gradient of M·s.
            match self.strength {
                Strength::Sigmoid => {
                    dbeta.zip_mut_with(&beta, |d, &beta| *d *= beta * (T::one() - beta));
                    *gradients.strength_bias += dbeta.sum();
                    beta.zip_mut_with(&dbeta, |beta, &d| *beta = scale * d);
                }
                Strength::Softmax => {
                    let mean = beta.dot(&dbeta);
                    beta.zip_mut_with(&dbeta, |beta, &d| *beta *= scale * (d - mean));
                }
            }

            // The similarity becomes the gradient of M·a.
            let mut similarity = similarity.row_mut(t);
            let mean = w.dot(&dw);
            dw.zip_mut_with(&w, |d, &w| *d = w * (*d - mean));
            let dscore = dw;
            match (inputs.key_strength, &mut gradients.key_strength) {
                (Some(key_strength), Some(dkey_strength)) => {
                    let epsilon = T::from_f64(self.epsilon);
                    let factor = key_strength[t];
                    let norm = norm(inputs.address_key.row(t), epsilon);
                    dkey_strength[t] = dscore.dot(&similarity);
                    // similarity = M·a/q with q = norms·norm + ε.
                    let mut dq = dscore;
                    Zip::from(&mut similarity)
                        .and(&mut dq)
                        .and(&norms)
                        .and(&mut dnorms)
                        .for_each(|similarity, d, &slot_norm, dnorm| {
                            let ddot = factor * *d / (slot_norm * norm + epsilon);
                            *d = -ddot * *similarity;
                            *similarity = ddot;
                            *dnorm += *d * norm;
                        });
                    token_slopes[t] = dq.dot(&norms) / norm;
                }
                _ => similarity.zip_mut_with(&dscore, |s, &d| *s = scale * d),
            }
        }
        if self.addressing == Addressing::Cosine {
            dnorms /= &norms;
        }

        // The slots: G·keep, what read them, what their norms say and what the keys say.
        Zip::from(gradients.memory.rows_mut())
            .and(&keep)
            .for_each(|mut gradient, &keep| gradient.mapv_inplace(|g| keep * g));
        if self.order == Order::ReadThenWrite {
            multiply_add(w.t(), grad_read, &mut gradients.memory);
        }
        let (mut scored_gradient, _) = gradients.memory.view_mut().split_at(Axis(1), key_width);
        Zip::from(scored_gradient.rows_mut())
            .and(inputs.scored().rows())
            .and(&dnorms)
            .for_each(|mut gradient, slot, &slope| gradient.scaled_add(slope, &slot));
        let of_keys = first_rows(&dots, 2 * tokens);
        multiply_add(of_keys.t(), keys.view(), &mut scored_gradient);

        // The keys, in the place of what they were copied to.
        multiply(of_keys, inputs.scored(), &mut keys);
        let (daddress_key, dstrength_key) = keys.split_at(Axis(0), tokens);
        Zip::from(gradients.address_key.rows_mut())
            .and(daddress_key.rows())
            .and(inputs.address_key.rows())
            .and(&token_slopes)
            .for_each(|mut gradient, dkey, key, &slope| {
                Zip::from(&mut gradient)
                    .and(dkey)
                    .and(key)
                    .for_each(|g, &d, &a| *g = d + slope * a);
            });
        gradients.strength_key.assign(&dstrength_key);
        Ok(())
    }

    /// Addresses w and strengths β alone, both [T, N]: what is read and written, for a look inside.
    /// Allocates its scratch.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn address<T: Scalar>(
        &self,
        inputs: Inputs<T>,
        mut w: ArrayViewMut2<T>,
        mut beta: ArrayViewMut2<T>,
    ) -> Result<()> {
        let Sizes { slots, tokens, .. } = self.validate(&inputs)?;
        check_shape("w", w.shape(), &[tokens, slots])?;
        check_shape("beta", beta.shape(), &[tokens, slots])?;
        let mut buffer = Vec::new();
        let mut scratch = Scratch::new(&mut buffer, tokens * slots + 2 * slots);
        let mut similarity = scratch.matrix(tokens, slots);
        let mut norms = scratch.vector(slots);
        let mut selection = scratch.vector(slots);
        let memory = inputs.scored().reversed_axes();
        multiply(inputs.address_key, memory, &mut similarity);
        multiply(inputs.strength_key, memory, &mut beta);
        self.finish_scores(
            &inputs,
            &mut similarity,
            &mut w,
            &mut beta,
            &mut norms,
            &mut selection,
        );
        Ok(())
    }

    /// Checks the inputs and reads their sizes off them.
    fn validate<T: Scalar>(&self, inputs: &Inputs<T>) -> Result<Sizes> {
        let (slots, width) = inputs.memory.dim();
        let (tokens, key_width) = inputs.address_key.dim();
        if key_width > width {
            return Err(Error::value(
                "address_key",
                format!("keys of width {key_width}"),
                format!("at most the width {width} of the memory"),
            ));
        }
        let strength_key = inputs.strength_key.shape();
        check_shape("strength_key", strength_key, &[tokens, key_width])?;
        check_shape("value", inputs.value.shape(), &[tokens, width])?;
        let key_strength = inputs.key_strength.as_ref().map(|array| array.shape());
        self.validate_key_strength("key_strength", key_strength, tokens)?;
        if self.top_k == Some(0) {
            return Err(Error::value("top_k", 0, "at least 1, or none"));
        }
        let positive = T::from_f64(self.epsilon) > T::zero();
        if self.addressing == Addressing::Cosine && !positive {
            return Err(Error::value("epsilon", self.epsilon, "a number above 0"));
        }
        Ok(Sizes {
            slots,
            tokens,
            key_width,
            width,
        })
    }

    fn validate_gradients<T: Scalar>(&self, gradients: &Gradients<T>, sizes: Sizes) -> Result<()> {
        let Sizes {
            slots,
            tokens,
            key_width,
            width,
        } = sizes;
        for (argument, array, shape) in [
            ("gradients.memory", &gradients.memory, [slots, width]),
            (
                "gradients.address_key",
                &gradients.address_key,
                [tokens, key_width],
            ),
            (
                "gradients.strength_key",
                &gradients.strength_key,
                [tokens, key_width],
            ),
            ("gradients.value", &gradients.value, [tokens, width]),
        ] {
            check_shape(argument, array.shape(), &shape)?;
        }
        let key_strength = gradients.key_strength.as_ref().map(|array| array.shape());
        self.validate_key_strength("gradients.key_strength", key_strength, tokens)
    }

    /// A key strength belongs to cosine addressing and to nothing else.
    fn validate_key_strength(
        &self,
        argument: &'static str,
        shape: Option<&[usize]>,
        tokens: usize,
    ) -> Result<()> {
        match (self.addressing, shape) {
            (Addressing::Cosine, Some(shape)) => check_shape(argument, shape, &[tokens]),
            (Addressing::Dot, None) => Ok(()),
            (Addressing::Cosine, None) => Err(Error::value(
                argument,
                "missing",
                "one number per token with cosine addressing",
            )),
            (Addressing::Dot, Some(_)) => {
                Err(Error::value(argument, "given", "none with dot addressing"))
            }
        }
    }

    /// From dot products to w and β, all [T, N].
    ///
    /// `similarity`: M·a on entry; divided by √(|M|²+ε)·√(|a|²+ε)+ε with cosine addressing.
    /// `beta`: M·s on entry, β on return. `norms` `[N]` receives √(|M|²+ε) with cosine addressing;
    /// `selection` `[N]` is overwritten with `top_k`.
    fn finish_scores<T: Scalar>(
        &self,
        inputs: &Inputs<T>,
        similarity: &mut ArrayViewMut2<T>,
        w: &mut ArrayViewMut2<T>,
        beta: &mut ArrayViewMut2<T>,
        norms: &mut ArrayViewMut1<T>,
        selection: &mut ArrayViewMut1<T>,
    ) {
        let (scale, epsilon) = (T::from_f64(self.scale), T::from_f64(self.epsilon));
        if self.addressing == Addressing::Cosine {
            for (x, slot) in norms.iter_mut().zip(inputs.scored().rows()) {
                *x = norm(slot, epsilon);
            }
            for (mut row, key) in similarity
                .rows_mut()
                .into_iter()
                .zip(inputs.address_key.rows())
            {
                let norm = norm(key, epsilon);
                row.zip_mut_with(norms, |x, &slot_norm| *x /= slot_norm * norm + epsilon);
            }
        }
        for (t, mut w) in w.rows_mut().into_iter().enumerate() {
            let factor = inputs.key_strength.map_or(scale, |kappa| kappa[t]);
            w.zip_mut_with(&similarity.row(t), |w, &x| *w = factor * x);
            if let Some(k) = self.top_k.filter(|&k| k < w.len()) {
                select_best(&mut w, k, selection);
            }
            softmax(&mut w);
        }
        match self.strength {
            Strength::Sigmoid => beta
                .mapv_inplace(|x| (T::one() + (-(scale * x + inputs.strength_bias)).exp()).recip()),
            Strength::Softmax => {
                for mut beta in beta.rows_mut() {
                    beta.mapv_inplace(|x| scale * x);
                    softmax(&mut beta);
                }
            }
        }
    }
}

/// √(|x|² + ε)
fn norm<T: Scalar>(x: ArrayView1<T>, epsilon: T) -> T {
    (x.dot(&x) + epsilon).sqrt()
}

/// Softmax in place; an entry of −∞ becomes exactly 0.
fn softmax<T: Scalar>(row: &mut ArrayViewMut1<T>) {
    let max = row.iter().fold(T::neg_infinity(), |max, &x| max.max(x));
    row.mapv_inplace(|x| (x - max).exp());
    let factor = row.sum().recip();
    row.mapv_inplace(|x| x * factor);
}

/// Scores below the k-th best become −∞; k is in 1..=scores.len(). `copy` is overwritten.
fn select_best<T: Scalar>(scores: &mut ArrayViewMut1<T>, k: usize, copy: &mut ArrayViewMut1<T>) {
    copy.assign(scores);
    // A NaN counts as the best: it is kept, and the softmax shows it.
    let descending = |a: &T, b: &T| {
        b.partial_cmp(a)
            .unwrap_or_else(|| b.is_nan().cmp(&a.is_nan()))
    };
    let copy = copy.as_slice_mut().expect("scratch is contiguous");
    let (_, &mut limit, _) = copy.select_nth_unstable_by(k - 1, descending);
    scores.mapv_inplace(|x| if x < limit { T::neg_infinity() } else { x });
}

/// c = a·b, whatever c holds.
fn multiply<T: Scalar>(a: ArrayView2<T>, b: ArrayView2<T>, c: &mut ArrayViewMut2<T>) {
    general_mat_mul(T::one(), &a, &b, T::zero(), c);
}

/// c += a·b
fn multiply_add<T: Scalar>(a: ArrayView2<T>, b: ArrayView2<T>, c: &mut ArrayViewMut2<T>) {
    general_mat_mul(T::one(), &a, &b, T::one(), c);
}

/// The first `rows` rows.
fn first_rows<'a, T>(array: &'a ArrayViewMut2<T>, rows: usize) -> ArrayView2<'a, T> {
    array.view().split_at(Axis(0), rows).0
}

/// Copies [T, D] arrays one below the other.
fn stack<T: Scalar>(rows: &mut ArrayViewMut2<T>, parts: &[ArrayView2<T>]) {
    let tokens = rows.nrows() / parts.len();
    for (mut rows, part) in rows.axis_chunks_iter_mut(Axis(0), tokens).zip(parts) {
        rows.assign(part);
    }
}

/// What is left of the scratch; pieces are handed out one after another, their contents arbitrary.
struct Scratch<'a, T>(&'a mut [T]);

impl<'a, T: Scalar> Scratch<'a, T> {
    /// Grows the buffer to `len` if it is smaller.
    fn new(buffer: &'a mut Vec<T>, len: usize) -> Self {
        if buffer.len() < len {
            buffer.resize(len, T::zero());
        }
        Self(buffer)
    }

    fn slice(&mut self, len: usize) -> &'a mut [T] {
        let (front, back) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = back;
        front
    }

    fn vector(&mut self, len: usize) -> ArrayViewMut1<'a, T> {
        self.slice(len).into()
    }

    fn matrix(&mut self, rows: usize, columns: usize) -> ArrayViewMut2<'a, T> {
        let piece = self.slice(rows * columns);
        ArrayViewMut2::from_shape((rows, columns), piece).expect("a piece of this very size")
    }
}
