//! Content-addressed memory: one segment of one sequence (SPEC section 4).

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};

use crate::{Result, Scalar};

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
    /// Only the k best slots per token take part in the softmax of the address (ties are kept).
    pub top_k: Option<usize>,
    /// Factor of the dot products, 1/√D.
    pub scale: f64,
    /// ε of cosine addressing.
    pub epsilon: f64,
}

/// The inputs of one segment: N slots, T tokens, width D.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, T> {
    /// M [N, D].
    pub memory: ArrayView2<'a, T>,
    /// a [T, D].
    pub address_key: ArrayView2<'a, T>,
    /// s [T, D].
    pub strength_key: ArrayView2<'a, T>,
    /// v [T, D].
    pub value: ArrayView2<'a, T>,
    /// κ [T], for cosine addressing (and only then).
    pub key_strength: Option<ArrayView1<'a, T>>,
    /// b, for sigmoid strength (ignored otherwise).
    pub strength_bias: T,
}

/// Gradients of the inputs: all are overwritten.
#[derive(Debug)]
pub struct Gradients<'a, T> {
    /// [N, D]
    pub memory: ArrayViewMut2<'a, T>,
    /// [T, D]
    pub address_key: ArrayViewMut2<'a, T>,
    /// [T, D]
    pub strength_key: ArrayViewMut2<'a, T>,
    /// [T, D]
    pub value: ArrayViewMut2<'a, T>,
    /// [T], with cosine addressing (and only then).
    pub key_strength: Option<ArrayViewMut1<'a, T>>,
    /// Scalar; 0 with softmax strength.
    pub strength_bias: &'a mut T,
}

impl ContentMemory {
    /// M′ and y: `memory_next` [N, D], `read` [T, D].
    pub fn forward<T: Scalar>(
        &self,
        inputs: Inputs<T>,
        memory_next: ArrayViewMut2<T>,
        read: ArrayViewMut2<T>,
        scratch: &mut Vec<T>,
    ) -> Result<()> {
        let _ = (inputs, memory_next, read, scratch);
        todo!()
    }

    /// Gradients of Σ grad_memory_next·M′ + Σ grad_read·y. Nothing of the forward pass is kept:
    /// addresses and strengths are computed again from the inputs.
    pub fn backward<T: Scalar>(
        &self,
        inputs: Inputs<T>,
        grad_memory_next: ArrayView2<T>,
        grad_read: ArrayView2<T>,
        gradients: Gradients<T>,
        scratch: &mut Vec<T>,
    ) -> Result<()> {
        let _ = (inputs, grad_memory_next, grad_read, gradients, scratch);
        todo!()
    }

    /// Addresses w and strengths β alone, both [T, N]: what is read and written, for a look inside.
    pub fn address<T: Scalar>(
        &self,
        inputs: Inputs<T>,
        w: ArrayViewMut2<T>,
        beta: ArrayViewMut2<T>,
    ) -> Result<()> {
        let _ = (inputs, w, beta);
        todo!()
    }
}
