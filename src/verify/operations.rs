//! The operations that a fixture file can hold, with their parameters and tensors.

use dtmem_reference::activation::Activation;
use dtmem_reference::attention::Denominator;
use dtmem_reference::content_memory::{Addressing, ContentMemory, Erase, Order, Strength};
use serde_json::Value;

use super::file::Problem;
use super::params::{Params, count, parameter};

/// An operation with its parameters.
#[derive(Debug, Clone)]
pub(super) enum Operation {
    /// Packed attention with the attention-BCE.
    Attention(AttentionParams),
    /// One segment of the content-addressed memory, for each sequence.
    ContentMemory(ContentMemory),
    /// A linear map, with an adapter if it has a scaling.
    Linear {
        /// α/r.
        scaling: Option<f64>,
    },
    /// Layer normalisation.
    LayerNorm {
        /// Added to the variance.
        epsilon: f64,
    },
    /// An element-wise function.
    Activation(Activation),
    /// Mean cross-entropy of the rows.
    CrossEntropy,
}

/// Parameters of `attention`.
#[derive(Debug, Clone)]
pub(super) struct AttentionParams {
    /// Factor of the scores.
    pub scale: f64,
    /// Which keys a query sees.
    pub mask: MaskName,
    /// For `sliding_window`.
    pub window: usize,
    /// None: no memory loss.
    pub supervised_heads: Vec<usize>,
    /// What the memory loss is divided by.
    pub denominator: Denominator,
}

/// A mask without its numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum MaskName {
    /// `none`
    None,
    /// `causal`
    Causal,
    /// `sliding_window`
    SlidingWindow,
    /// `grouped_causal`
    GroupedCausal,
}

/// The tensors of an operation. Shapes are words: names of sizes, a name and `+1`, or numbers.
pub(super) struct Signature {
    /// Inputs; the order says which tensor sets a size first.
    pub inputs: Vec<Input>,
    /// Outputs.
    pub outputs: Vec<Output>,
    /// The largest intermediate result.
    pub scratch: &'static str,
}

/// One input.
pub(super) struct Input {
    /// Without the `input.` in front.
    pub name: &'static str,
    /// Floats or integers.
    pub kind: Kind,
    /// Its shape.
    pub shape: &'static str,
    /// Whether the operation can do without it.
    pub needed: bool,
}

/// What an input holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Floats, with a gradient.
    Real,
    /// Integers or flags.
    Integer,
}

/// One output.
pub(super) struct Output {
    /// Without the `output.` in front.
    pub name: &'static str,
    /// Its shape.
    pub shape: &'static str,
    /// Whether gradients can come in through it.
    pub differentiable: bool,
}

fn real(name: &'static str, shape: &'static str) -> Input {
    Input {
        name,
        kind: Kind::Real,
        shape,
        needed: true,
    }
}

fn integer(name: &'static str, shape: &'static str) -> Input {
    Input {
        name,
        kind: Kind::Integer,
        shape,
        needed: true,
    }
}

impl Input {
    fn optional(self) -> Self {
        Self {
            needed: false,
            ..self
        }
    }
}

fn output(name: &'static str, shape: &'static str) -> Output {
    Output {
        name,
        shape,
        differentiable: true,
    }
}

/// An output that the reference has no gradient through.
fn constant(name: &'static str, shape: &'static str) -> Output {
    Output {
        name,
        shape,
        differentiable: false,
    }
}

impl Operation {
    /// The operation that the metadata name, with its parameters.
    pub fn read(name: Option<&str>, params: &mut Params) -> Result<Self, Problem> {
        Ok(match name {
            Some("attention") => Self::Attention(AttentionParams::read(params)?),
            Some("content_memory") => Self::ContentMemory(ContentMemory {
                addressing: params.word(
                    "addressing",
                    &[("cosine", Addressing::Cosine), ("dot", Addressing::Dot)],
                    None,
                )?,
                strength: params.word(
                    "strength",
                    &[
                        ("sigmoid", Strength::Sigmoid),
                        ("softmax", Strength::Softmax),
                    ],
                    None,
                )?,
                erase: params.word(
                    "erase",
                    &[("coupled", Erase::Coupled), ("paper", Erase::Paper)],
                    None,
                )?,
                order: params.word(
                    "order",
                    &[
                        ("read_then_write", Order::ReadThenWrite),
                        ("write_then_read", Order::WriteThenRead),
                    ],
                    None,
                )?,
                top_k: params.count("top_k")?,
                scale: params.number("scale")?,
                epsilon: params.number("epsilon")?,
            }),
            Some("lora_linear") => Self::Linear {
                scaling: Some(params.number("scaling")?),
            },
            Some("linear") => Self::Linear { scaling: None },
            Some("layer_norm") => Self::LayerNorm {
                epsilon: params.number("epsilon")?,
            },
            Some("relu") => Self::Activation(Activation::Relu),
            Some("gelu") => Self::Activation(Activation::Gelu),
            Some("tanh") => Self::Activation(Activation::Tanh),
            Some("cross_entropy") => Self::CrossEntropy,
            other => {
                let found = other.map_or("missing".to_owned(), |name| format!("`{name}`"));
                let expected = "attention, content_memory, lora_linear, layer_norm, linear, relu, \
                                gelu, tanh or cross_entropy";
                return Err(Problem::new("metadata `op`", found, expected));
            }
        })
    }

    /// The tensors that the operation takes and gives.
    pub fn signature(&self) -> Signature {
        match self {
            Self::Attention(params) => {
                let mut inputs = vec![
                    real("q", "tokens heads width"),
                    real("k", "keys key_heads width"),
                    real("v", "keys key_heads width"),
                    integer("cu_seqlens", "sequences+1"),
                    integer("cu_seqlens_k", "sequences+1").optional(),
                    integer("pair_offsets", "tokens+1").optional(),
                    integer("pair_keys", "pairs").optional(),
                    integer("annotated", "sequences").optional(),
                ];
                if params.mask == MaskName::GroupedCausal {
                    inputs.push(integer("groups", "keys"));
                }
                Signature {
                    inputs,
                    outputs: vec![
                        output("out", "tokens heads width"),
                        constant("lse", "tokens heads"),
                        output("memory_loss", "1"),
                    ],
                    scratch: "64 keys",
                }
            }
            Self::ContentMemory(memory) => {
                let mut inputs = vec![
                    real("memory", "sequences slots width"),
                    real("address_key", "sequences tokens width"),
                    real("strength_key", "sequences tokens width"),
                    real("value", "sequences tokens width"),
                ];
                if memory.addressing == Addressing::Cosine {
                    inputs.push(real("key_strength", "sequences tokens"));
                }
                if memory.strength == Strength::Sigmoid {
                    inputs.push(real("strength_bias", "1"));
                }
                Signature {
                    inputs,
                    outputs: vec![
                        output("memory_next", "sequences slots width"),
                        output("read", "sequences tokens width"),
                    ],
                    scratch: "tokens slots",
                }
            }
            Self::Linear { scaling } => {
                let mut inputs = vec![
                    real("x", "tokens in"),
                    real("weight", "out in"),
                    real("bias", "out").optional(),
                ];
                let mut outputs = vec![output("y", "tokens out")];
                if scaling.is_some() {
                    inputs.extend([real("lora_a", "rank in"), real("lora_b", "out rank")]);
                    outputs.push(constant("merged_weight", "out in"));
                }
                Signature {
                    inputs,
                    outputs,
                    scratch: "tokens rank",
                }
            }
            Self::LayerNorm { .. } => Signature {
                inputs: vec![
                    real("x", "tokens width"),
                    real("weight", "width"),
                    real("bias", "width"),
                ],
                outputs: vec![output("y", "tokens width")],
                scratch: "tokens",
            },
            Self::Activation(_) => Signature {
                inputs: vec![real("x", "tokens width")],
                outputs: vec![output("y", "tokens width")],
                scratch: "1",
            },
            Self::CrossEntropy => Signature {
                inputs: vec![real("logits", "rows classes"), integer("targets", "rows")],
                outputs: vec![output("loss", "1")],
                scratch: "1",
            },
        }
    }
}

impl AttentionParams {
    fn read(params: &mut Params) -> Result<Self, Problem> {
        let masks = [
            ("causal", MaskName::Causal),
            ("none", MaskName::None),
            ("sliding_window", MaskName::SlidingWindow),
            ("grouped_causal", MaskName::GroupedCausal),
        ];
        let denominators = [
            ("square", Denominator::Square),
            ("causal", Denominator::Causal),
        ];
        let heads = |value: &Value| value.as_array()?.iter().map(count).collect();
        let mask = params.word("mask", &masks, None)?;
        let window = match mask {
            MaskName::SlidingWindow => params.count("window")?.ok_or_else(|| {
                Problem::new(parameter("window"), "missing", "a whole number from 1")
            })?,
            _ => 0,
        };
        Ok(Self {
            scale: params.number("scale")?,
            mask,
            window,
            supervised_heads: params
                .optional("supervised_heads", "a list of heads, from 0", heads)?
                .unwrap_or_default(),
            denominator: params.word("denominator", &denominators, Some(Denominator::Square))?,
        })
    }
}
