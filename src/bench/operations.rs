//! The operations of the table: where it has them, and what they must do.

use super::{Cost, Scale};
use crate::batch::TokenLayout;

/// The agent's view in LTMB.
pub(super) const VIEW: [usize; 3] = [7, 7, 3];
/// Values of each field of a cell.
pub(super) const CARDINALITIES: [usize; 3] = [11, 6, 3];
/// Actions of LTMB.
pub(super) const ACTIONS: usize = 7;

pub(super) const FIELDS: usize = VIEW[0] * VIEW[1] * VIEW[2];
pub(super) const CELLS: usize = VIEW[0] * VIEW[1];
pub(super) const CHANNELS: usize = CARDINALITIES[0] + CARDINALITIES[1] + CARDINALITIES[2];
pub(super) const MIDDLE: usize = 40;
pub(super) const MAPS: usize = 80;
pub(super) const TAPS: usize = 9;
/// Of adapters.
pub(super) const RANK: usize = 8;
/// Tokens of each episode that acting has cached.
pub(super) const CACHED: usize = 64;

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Causal attention.
    Attention,
    /// Its gradients.
    AttentionBackward,
    /// Causal attention with the BCE on one head.
    AttentionBce,
    /// Its gradients.
    AttentionBceBackward,
    /// Attention of a step's tokens to a cache that is read where it stands, and its update.
    AttentionCached,
    /// The content-addressed memory over all segments.
    ContentMemory,
    /// Its gradients.
    ContentMemoryBackward,
    /// The same with a loss on what is recalled.
    ContentMemoryRecall,
    /// Its gradients.
    ContentMemoryRecallBackward,
    /// The feed-forward layer's first product.
    Linear,
    /// The memory's three fused projections, frozen, with adapters.
    LoraLinear,
    /// Its gradients.
    LoraLinearBackward,
    /// The same as `LoraLinear` with dropout on the adapters' input, its mask included.
    LoraDropout,
    /// Its gradients.
    LoraDropoutBackward,
    /// A weight that takes up its adapter.
    LoraMerge,
    /// Layer normalisation.
    LayerNorm,
    /// Its gradients.
    LayerNormBackward,
    /// One linear map of an observation's one-hot codes.
    OneHot,
    /// Its gradients.
    OneHotBackward,
    /// Both convolutions of the front end.
    Convolutions,
    /// Their gradients.
    ConvolutionsBackward,
    /// Token rows from what each token embeds, and positions.
    Tokens,
    /// Their gradients.
    TokensBackward,
    /// Loss and gradient of the actions.
    CrossEntropy,
    /// The same of continuous actions.
    SquaredError,
    /// GELU on the feed-forward layer's width.
    Activation,
    /// Its gradient.
    ActivationBackward,
    /// Dropout in place.
    Dropout,
    /// A residual sum.
    Add,
    /// The norm of all gradients of the blocks.
    Norm,
    /// One AdamW update of the blocks.
    AdamW,
    /// A whole training step.
    Step,
}

/// Operations that have a file together, here in `runs/` and in `benches/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Attention, with and without the memory loss, and to a cache.
    Attention,
    /// The content-addressed memory.
    Memory,
    /// Linear maps, with and without adapters.
    Linear,
    /// Layer normalisation.
    LayerNorm,
    /// What observations become.
    Embeddings,
    /// Token rows.
    Tokens,
    /// Losses of actions.
    Losses,
    /// Element by element.
    Elementwise,
    /// The norm of gradients, and updates.
    Optimiser,
    /// Whole training steps.
    Step,
}

impl Operation {
    /// All, in the order of the table: first what must not be left out when time is short.
    pub const ALL: [Self; 32] = [
        Self::Step,
        Self::Attention,
        Self::AttentionBackward,
        Self::AttentionBce,
        Self::AttentionBceBackward,
        Self::AttentionCached,
        Self::ContentMemory,
        Self::ContentMemoryBackward,
        Self::ContentMemoryRecall,
        Self::ContentMemoryRecallBackward,
        Self::Linear,
        Self::LoraLinear,
        Self::LoraLinearBackward,
        Self::LoraDropout,
        Self::LoraDropoutBackward,
        Self::LoraMerge,
        Self::LayerNorm,
        Self::LayerNormBackward,
        Self::OneHot,
        Self::OneHotBackward,
        Self::Convolutions,
        Self::ConvolutionsBackward,
        Self::Tokens,
        Self::TokensBackward,
        Self::CrossEntropy,
        Self::SquaredError,
        Self::Activation,
        Self::ActivationBackward,
        Self::Dropout,
        Self::Add,
        Self::Norm,
        Self::AdamW,
    ];

    /// As in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::AttentionBackward => "attention_backward",
            Self::AttentionBce => "attention_bce",
            Self::AttentionBceBackward => "attention_bce_backward",
            Self::AttentionCached => "attention_cached",
            Self::ContentMemory => "content_memory",
            Self::ContentMemoryBackward => "content_memory_backward",
            Self::ContentMemoryRecall => "content_memory_recall",
            Self::ContentMemoryRecallBackward => "content_memory_recall_backward",
            Self::Linear => "linear",
            Self::LoraLinear => "lora_linear",
            Self::LoraLinearBackward => "lora_linear_backward",
            Self::LoraDropout => "lora_dropout",
            Self::LoraDropoutBackward => "lora_dropout_backward",
            Self::LoraMerge => "lora_merge",
            Self::LayerNorm => "layer_norm",
            Self::LayerNormBackward => "layer_norm_backward",
            Self::OneHot => "one_hot",
            Self::OneHotBackward => "one_hot_backward",
            Self::Convolutions => "convolutions",
            Self::ConvolutionsBackward => "convolutions_backward",
            Self::Tokens => "tokens",
            Self::TokensBackward => "tokens_backward",
            Self::CrossEntropy => "cross_entropy",
            Self::SquaredError => "squared_error",
            Self::Activation => "activation",
            Self::ActivationBackward => "activation_backward",
            Self::Dropout => "dropout",
            Self::Add => "add",
            Self::Norm => "norm",
            Self::AdamW => "adamw",
            Self::Step => "step",
        }
    }

    /// With which others it is.
    pub fn group(self) -> Group {
        match self {
            Self::Attention
            | Self::AttentionBackward
            | Self::AttentionBce
            | Self::AttentionBceBackward
            | Self::AttentionCached => Group::Attention,
            Self::ContentMemory
            | Self::ContentMemoryBackward
            | Self::ContentMemoryRecall
            | Self::ContentMemoryRecallBackward => Group::Memory,
            Self::Linear
            | Self::LoraLinear
            | Self::LoraLinearBackward
            | Self::LoraDropout
            | Self::LoraDropoutBackward
            | Self::LoraMerge => Group::Linear,
            Self::LayerNorm | Self::LayerNormBackward => Group::LayerNorm,
            Self::OneHot
            | Self::OneHotBackward
            | Self::Convolutions
            | Self::ConvolutionsBackward => Group::Embeddings,
            Self::Tokens | Self::TokensBackward => Group::Tokens,
            Self::CrossEntropy | Self::SquaredError => Group::Losses,
            Self::Activation | Self::ActivationBackward | Self::Dropout | Self::Add => {
                Group::Elementwise
            }
            Self::Norm | Self::AdamW => Group::Optimiser,
            Self::Step => Group::Step,
        }
    }

    /// Whether the table has it at this scale: what acting does not do it does not time, nor what a
    /// scale adds nothing to.
    pub(super) fn has(self, scale: &Scale) -> bool {
        match (self, scale.name) {
            (
                Self::Linear
                | Self::LayerNorm
                | Self::OneHot
                | Self::Convolutions
                | Self::AttentionCached
                | Self::ContentMemory,
                "acting",
            ) => true,
            (_, "acting") | (Self::AttentionCached, _) => false,
            (
                Self::Attention
                | Self::AttentionBackward
                | Self::AttentionBce
                | Self::AttentionBceBackward
                | Self::ContentMemory
                | Self::ContentMemoryBackward,
                _,
            ) => true,
            (Self::Step | Self::LoraLinear | Self::LoraLinearBackward, name) => name != "long",
            (Self::LoraMerge, name) => name == "paper",
            (_, name) => name == "quick" || name == "paper",
        }
    }

    /// Whether there is a version for Hopper at this scale.
    pub(super) fn has_for_hopper(self, scale: &Scale) -> bool {
        match self {
            Self::Attention
            | Self::AttentionBackward
            | Self::AttentionBce
            | Self::AttentionBceBackward => matches!(scale.width / scale.heads, 64 | 128),
            // Where there are enough rows for wide tiles.
            Self::LoraLinear | Self::LoraLinearBackward => scale.name == "paper",
            Self::ContentMemory
            | Self::ContentMemoryBackward
            | Self::ContentMemoryRecall
            | Self::ContentMemoryRecallBackward
            | Self::Step => true,
            _ => false,
        }
    }

    /// What one run must do, with activations of `element` bytes. A backward pass is counted
    /// without what it computes again.
    pub(super) fn cost(self, scale: &Scale, element: f64) -> Cost {
        let [tokens, width, wide] =
            [scale.tokens(), scale.width, scale.feed_forward].map(|x| x as f64);
        let [frames, visible, weights] =
            [scale.steps(), scale.visible(), scale.weights()].map(|x| x as f64);
        let [fields, cells, inputs] = [FIELDS, CELLS, CELLS * CHANNELS].map(|x| x as f64);
        let actions = ACTIONS as f64;
        let slots = scale.slots as f64;
        let states = scale.segments() as f64 * slots * width;
        let rows = tokens * width;
        let first = (3 * TAPS * MIDDLE) as f64;
        let second = (2 * TAPS * MIDDLE * MAPS) as f64;
        let maps = (MIDDLE + MAPS) as f64;
        let ranked = (RANK * 6) as f64 * width;
        let (operations, bytes) = match self {
            Self::Attention | Self::AttentionBce => (4.0 * visible * width, element * 4.0 * rows),
            Self::AttentionBackward | Self::AttentionBceBackward => {
                (10.0 * visible * width, element * 8.0 * rows)
            }
            Self::AttentionCached => {
                let cached = (scale.sequences() * CACHED) as f64;
                let seen = visible + tokens * CACHED as f64;
                let moved = 6.0 * rows + 2.0 * cached * width;
                (4.0 * seen * width, element * moved)
            }
            Self::ContentMemory | Self::ContentMemoryRecall => {
                (8.0 * rows * slots, element * (4.0 * rows + states))
            }
            Self::ContentMemoryBackward | Self::ContentMemoryRecallBackward => {
                (16.0 * rows * slots, element * (7.0 * rows + states))
            }
            Self::Linear => (
                2.0 * rows * wide,
                element * (rows + width * wide + tokens * wide),
            ),
            Self::LoraLinear | Self::LoraDropout => (
                6.0 * rows * width + 2.0 * tokens * ranked,
                element * (4.0 * rows + 3.0 * width * width + ranked),
            ),
            Self::LoraLinearBackward | Self::LoraDropoutBackward => (
                6.0 * rows * width + 4.0 * tokens * ranked,
                element * (5.0 * rows + 3.0 * width * width + ranked) + 8.0 * ranked,
            ),
            // A master in f32 and its adapter, and what is computed with.
            Self::LoraMerge => (
                (2 * RANK + 1) as f64 * width * width,
                (4.0 + element) * width * width + (8 * RANK) as f64 * width,
            ),
            Self::LayerNorm => (8.0 * rows, element * 2.0 * rows),
            Self::LayerNormBackward => (16.0 * rows, element * 3.0 * rows),
            Self::OneHot => (
                frames * fields * width,
                frames * fields + element * (inputs + frames) * width,
            ),
            Self::OneHotBackward => (
                frames * fields * width,
                frames * fields + (8.0 * inputs + element * frames) * width,
            ),
            Self::Convolutions => (
                frames * cells * (first + second),
                frames * (fields + element * cells * maps),
            ),
            Self::ConvolutionsBackward => (
                frames * cells * (first + 2.0 * second),
                frames * (fields + element * cells * (maps + MAPS as f64)),
            ),
            Self::Tokens | Self::TokensBackward => (rows, element * 2.0 * rows),
            Self::CrossEntropy => (8.0 * frames * actions, 2.0 * element * frames * actions),
            Self::SquaredError => (
                4.0 * frames * actions,
                (2.0 * element + 4.0) * frames * actions,
            ),
            Self::Activation => (8.0 * tokens * wide, element * 2.0 * tokens * wide),
            Self::ActivationBackward => (8.0 * tokens * wide, element * 3.0 * tokens * wide),
            Self::Dropout => (rows, element * 2.0 * rows),
            Self::Add => (rows, element * 3.0 * rows),
            Self::Norm => (2.0 * weights, 4.0 * weights),
            // Gradients read; parameters and two moments read and written; a narrow copy written.
            Self::AdamW => (
                12.0 * weights,
                (28.0 + if element < 4.0 { element } else { 0.0 }) * weights,
            ),
            Self::Step => {
                let layers = scale.layers as f64;
                let memory = match scale.layout {
                    TokenLayout::ObsAction => 0.0,
                    TokenLayout::ReturnObsAction => 24.0 * rows * slots + 36.0 * rows * width,
                };
                let seen = match scale.layout {
                    TokenLayout::ObsAction => visible,
                    TokenLayout::ReturnObsAction => {
                        tokens * (3 * scale.segment_steps + 1) as f64 / 2.0
                    }
                };
                let front =
                    frames * cells * (2.0 * first + 3.0 * second + 6.0 * MAPS as f64 * width);
                (
                    6.0 * weights * tokens + layers * (14.0 * seen * width + memory) + front,
                    28.0 * weights,
                )
            }
        };
        Cost { operations, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::Operation;

    /// An operation without a file would silently be no part of `cargo bench`.
    #[test]
    fn every_operation_has_a_file_in_benches() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/benches");
        let files: String = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|name| name == "rs"))
            .map(|path| std::fs::read_to_string(path).unwrap())
            .collect();
        for operation in Operation::ALL {
            let group = format!("Group::{:?})", operation.group());
            assert!(files.contains(&group), "{group}: {}", operation.name());
        }
    }
}
