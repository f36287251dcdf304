//! What a model consists of: its operations with the places of their parameters.

use dtmem_reference::convolution::Grid;

use super::adapters::{Adaptation, Factor, KeptAdapter, MODULES_TO_SAVE};
use super::config::{
    AdapterTarget, AddressingKind, AttentionSpan, Block, FrontEnd, MemoryConfig, ModelConfig,
    StrengthKind, SupervisedPart, SupervisionConfig, TrainedPart,
};
use super::parameters::{Declare, Start};
use crate::backend::{
    Activation, Adapter, Attention, Convolutions, Extent, LayerNorm, Linear, Memory, OneHot,
    Positions, Span, Supervised,
};
use crate::batch::TokenLayout;
use crate::spaces::{ActionSpace, Content, Family, Spaces};

/// ε of every layer normalisation.
const LAYER_NORM_EPSILON: f64 = 1e-5;
/// Channels of the two convolutions (SPEC section 6).
const CHANNELS: [usize; 2] = [40, 80];
/// Numbers that become of each patch of an image.
const PATCH_CHANNELS: usize = 64;
/// Standard deviation of learned positions.
const POSITION_DEVIATION: f64 = 0.1;

/// All operations of a model that have parameters.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Network {
    pub families: Vec<FamilyNetwork>,
    pub return_to_go: Option<Linear>,
    pub positions: Positions,
    pub embedding_norm: Option<LayerNorm>,
    pub blocks: Vec<BlockNetwork>,
    pub final_norm: Option<LayerNorm>,
}

/// What a family of tasks has for itself.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct FamilyNetwork {
    pub observation: ObservationEmbedding,
    pub action: ActionEmbedding,
    pub head: Linear,
}

/// The observation front end.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ObservationEmbedding {
    Convolution(Convolutions, Linear),
    Linear(OneHot),
    /// Of real numbers.
    Reals(Linear),
    /// A linear map of each patch of an image, ReLU, and a linear map of so many of them.
    Patches {
        count: usize,
        patch: Linear,
        map: Linear,
    },
}

/// The embedding of actions.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ActionEmbedding {
    OneHot(OneHot),
    /// Of continuous ones.
    Reals(Linear),
}

/// One block.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct BlockNetwork {
    pub attention_norm: LayerNorm,
    pub qkv: Linear,
    pub attention: Attention,
    pub attention_out: Linear,
    pub memory: Option<MemoryNetwork>,
    pub feed_forward_norm: LayerNorm,
    pub up: Linear,
    pub activation: Activation,
    pub down: Linear,
}

/// The memory layer of a block.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct MemoryNetwork {
    pub norm: LayerNorm,
    /// Wk, Ŵk and Ŵv side by side: [3·D, D].
    pub keys: Linear,
    /// Wq, used transposed.
    pub address_query: Linear,
    /// Ŵq, used transposed.
    pub strength_query: Linear,
    /// u and b_u.
    pub key_strength: Option<Linear>,
    pub memory: Memory,
    /// Wo.
    pub out: Linear,
}

/// How linear maps start: PyTorch's defaults, or N(0, 1/inputs) with zero biases.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Initialisation {
    PyTorch,
    Normal,
}

impl Initialisation {
    fn of(config: &ModelConfig) -> Self {
        match config.block {
            Block::PostLn => Self::PyTorch,
            Block::PreLn => Self::Normal,
        }
    }

    fn weight(self, inputs: usize) -> Start {
        let scale = 1.0 / (inputs as f64).sqrt();
        match self {
            Self::PyTorch => Start::Uniform(scale),
            Self::Normal => Start::Normal(scale),
        }
    }

    fn bias(self, inputs: usize) -> Start {
        match self {
            Self::PyTorch => Start::Uniform(1.0 / (inputs as f64).sqrt()),
            Self::Normal => Start::Constant(0.0),
        }
    }
}

impl Network {
    /// `spaces` are those of the model itself, without its adapters' families.
    pub fn declare(
        declare: &mut Declare,
        config: &ModelConfig,
        spaces: &Spaces,
        supervision: Option<&SupervisionConfig>,
        adaptation: &Adaptation,
    ) -> Self {
        declare.freeze(adaptation.trained != TrainedPart::All);
        let (width, start) = (config.width, Initialisation::of(config));
        // The first family's parameters have no prefix, and later families come last: those of a
        // model stay the same in one that has more families.
        let mut families = spaces.families.iter().take(adaptation.families);
        let first = families
            .next()
            .map(|family| FamilyEmbeddings::declare(declare, config, family, start));
        let return_to_go = (config.layout == TokenLayout::ReturnObsAction)
            .then(|| declare.within("return", |declare| linear(declare, 1, width, start)));
        let table = [spaces.steps, width];
        let positions = match config.layout {
            TokenLayout::ObsAction => Positions::Constant(Span {
                offset: 0,
                len: table.iter().product(),
            }),
            TokenLayout::ReturnObsAction => Positions::Learned(declare.plain(
                "position.weight",
                &table,
                Start::Normal(POSITION_DEVIATION),
            )),
        };
        let embedding_norm = (config.block == Block::PostLn)
            .then(|| declare.within("embedding_norm", |declare| norm(declare, width)));
        let blocks = (0..config.layers)
            .map(|index| {
                let supervised = supervision.filter(|supervision| supervision.layer == index);
                declare.within(format!("blocks.{index}"), |declare| {
                    BlockNetwork::declare(declare, config, supervised, start, adaptation)
                })
            })
            .collect();
        let final_norm = (config.block == Block::PreLn)
            .then(|| declare.within("final_norm", |declare| norm(declare, width)));
        let mut all = Vec::with_capacity(spaces.families.len());
        all.extend(first.map(|first| first.with_head(declare, width, start)));
        for (family, number) in families.zip(1..) {
            declare.freeze(!adaptation.trains_family(number));
            all.push(FamilyNetwork::declare(
                declare, config, family, number, None,
            ));
        }
        for (index, adapter) in adaptation.kept.iter().enumerate() {
            declare.freeze(!adaptation.trains(index));
            for (family, number) in adapter.families.iter().zip(adaptation.families..) {
                let own = Some(adapter.name.as_str());
                let family = FamilyNetwork::declare(declare, config, family, number, own);
                if adaptation.used == Some(index) {
                    all.push(family);
                }
            }
        }
        Self {
            families: all,
            return_to_go,
            positions,
            embedding_norm,
            blocks,
            final_norm,
        }
    }
}

impl FamilyNetwork {
    /// A family after the first. Those that an adapter brings have its name inside of theirs.
    pub fn declare(
        declare: &mut Declare,
        config: &ModelConfig,
        family: &Family,
        number: usize,
        adapter: Option<&str>,
    ) -> Self {
        let (width, start) = (config.width, Initialisation::of(config));
        let prefix = match adapter {
            None => format!("families.{number}"),
            Some(name) => format!("families.{number}.{MODULES_TO_SAVE}.{name}"),
        };
        declare.within(prefix, |declare| {
            FamilyEmbeddings::declare(declare, config, family, start)
                .with_head(declare, width, start)
        })
    }
}

/// A family's part before the blocks.
struct FamilyEmbeddings {
    observation: ObservationEmbedding,
    action: ActionEmbedding,
    outputs: usize,
}

impl FamilyEmbeddings {
    fn declare(
        declare: &mut Declare,
        config: &ModelConfig,
        family: &Family,
        start: Initialisation,
    ) -> Self {
        let (width, actions) = (config.width, family.action.outputs());
        Self {
            observation: declare.within("observation", |declare| {
                ObservationEmbedding::declare(declare, config, family, start)
            }),
            action: declare.within("action", |declare| match family.action {
                ActionSpace::Discrete(_) => ActionEmbedding::OneHot(OneHot {
                    weight: declare.weight(
                        "weight",
                        &[actions, width],
                        embedding_start(start, actions),
                    ),
                    bias: declare.plain("bias", &[width], start.bias(actions)),
                    offsets: vec![0],
                    inputs: actions,
                    width,
                    trainable: declare.trainable(),
                }),
                ActionSpace::Continuous(_) => {
                    ActionEmbedding::Reals(linear(declare, actions, width, start))
                }
            }),
            outputs: actions,
        }
    }

    /// And its part behind them.
    fn with_head(
        self,
        declare: &mut Declare,
        width: usize,
        start: Initialisation,
    ) -> FamilyNetwork {
        FamilyNetwork {
            observation: self.observation,
            action: self.action,
            head: declare.within("head", |declare| {
                linear(declare, width, self.outputs, start)
            }),
        }
    }
}

/// Embeddings of one code: unit variance in the normal scheme, PyTorch's linear map otherwise.
fn embedding_start(start: Initialisation, inputs: usize) -> Start {
    match start {
        Initialisation::PyTorch => start.weight(inputs),
        Initialisation::Normal => Start::Normal(1.0),
    }
}

impl ObservationEmbedding {
    fn declare(
        declare: &mut Declare,
        config: &ModelConfig,
        family: &Family,
        start: Initialisation,
    ) -> Self {
        let width = config.width;
        let space = &family.observation;
        let fields = space.fields();
        // A one-hot field has one active input, whatever its cardinality.
        let gain = |default: Start, active: usize| match config.observation_gain {
            0.0 => default,
            gain => Start::Normal(gain / (active as f64).sqrt()),
        };
        let last_map = |declare: &mut Declare, inputs: usize| Linear {
            weight: declare.weight(
                "linear.weight",
                &[width, inputs],
                gain(start.weight(inputs), inputs),
            ),
            bias: Some(declare.plain("linear.bias", &[width], gain_bias(config, start, inputs))),
            ..linear_of(inputs, width, declare.trainable())
        };
        let cardinalities = match &space.content {
            Content::Codes(cardinalities) => cardinalities,
            Content::Reals => return Self::Reals(last_map(declare, fields)),
            Content::Pixels => {
                let (count, size) = space
                    .patches()
                    .map_or((0, 0), |patches| (patches.count(), patches.size()));
                return Self::Patches {
                    count,
                    patch: declare.within("patch", |declare| {
                        linear(declare, size, PATCH_CHANNELS, start)
                    }),
                    map: last_map(declare, count * PATCH_CHANNELS),
                };
            }
        };
        let mut offsets = Vec::with_capacity(fields);
        let mut inputs = 0;
        for field in 0..fields {
            offsets.push(inputs);
            inputs += cardinalities[field % cardinalities.len()];
        }
        match config.front_end {
            FrontEnd::Convolution if space.is_grid() => {
                let grid = Grid {
                    width: space.shape[0],
                    height: space.shape[1],
                    cardinalities: cardinalities.clone(),
                };
                let [middle, out] = CHANNELS;
                let channels = grid.channels();
                let flat = out * grid.positions();
                let convolutions = Convolutions {
                    weight1: declare.weight(
                        "conv1.weight",
                        &[channels, 3, 3, middle],
                        start.weight(channels * 9),
                    ),
                    bias1: declare.plain("conv1.bias", &[middle], start.bias(channels * 9)),
                    weight2: declare.weight(
                        "conv2.weight",
                        &[out, middle, 3, 3],
                        start.weight(middle * 9),
                    ),
                    bias2: declare.plain("conv2.bias", &[out], start.bias(middle * 9)),
                    grid,
                    middle,
                    out,
                    trainable: declare.trainable(),
                };
                let map = last_map(declare, flat);
                Self::Convolution(convolutions, map)
            }
            _ => Self::Linear(OneHot {
                weight: declare.weight(
                    "linear.weight",
                    &[inputs, width],
                    gain(start.weight(inputs), fields),
                ),
                bias: declare.plain("linear.bias", &[width], gain_bias(config, start, inputs)),
                offsets,
                inputs,
                width,
                trainable: declare.trainable(),
            }),
        }
    }
}

fn gain_bias(config: &ModelConfig, start: Initialisation, inputs: usize) -> Start {
    match config.observation_gain {
        0.0 => start.bias(inputs),
        _ => Start::Constant(0.0),
    }
}

impl BlockNetwork {
    fn declare(
        declare: &mut Declare,
        config: &ModelConfig,
        supervised: Option<&SupervisionConfig>,
        start: Initialisation,
        adaptation: &Adaptation,
    ) -> Self {
        let (width, wide) = (config.width, config.feed_forward);
        let attention_norm = declare.within("attention_norm", |declare| norm(declare, width));
        let (qkv, attention_out) = declare.within("attention", |declare| {
            let qkv = Linear {
                weight: declare.weight(
                    "qkv.weight",
                    &[3 * width, width],
                    match start {
                        // Xavier over the fused matrix, as torch.nn.MultiheadAttention does.
                        Initialisation::PyTorch => {
                            Start::Uniform((6.0 / (4 * width) as f64).sqrt())
                        }
                        Initialisation::Normal => start.weight(width),
                    },
                ),
                bias: Some(declare.plain("qkv.bias", &[3 * width], Start::Constant(0.0))),
                ..linear_of(width, 3 * width, declare.trainable())
            };
            let out = Linear {
                weight: declare.weight("out.weight", &[width, width], start.weight(width)),
                bias: Some(declare.plain("out.bias", &[width], Start::Constant(0.0))),
                ..linear_of(width, width, declare.trainable())
            };
            (qkv, out)
        });
        let memory = config.memory.as_ref().map(|memory| {
            declare.within("memory", |declare| {
                let recall = supervised.is_some_and(|x| x.part == SupervisedPart::Memory);
                MemoryNetwork::declare(declare, width, memory, recall, adaptation)
            })
        });
        let feed_forward_norm = declare.within("feed_forward_norm", |declare| norm(declare, width));
        let (up, down) = declare.within("feed_forward", |declare| {
            (
                declare.within("up", |declare| linear(declare, width, wide, start)),
                declare.within("down", |declare| linear(declare, wide, width, start)),
            )
        });
        Self {
            attention_norm,
            qkv,
            attention: Attention {
                heads: config.heads,
                head_width: width / config.heads,
                extent: match config.attention {
                    AttentionSpan::Episode => Extent::Sequence,
                    AttentionSpan::Segment => Extent::Segment,
                },
                supervised: supervised.and_then(|supervision| match &supervision.part {
                    SupervisedPart::Heads(heads) => Some(Supervised {
                        heads: heads.clone(),
                        denominator: supervision.denominator,
                    }),
                    SupervisedPart::Memory => None,
                }),
            },
            attention_out,
            memory,
            feed_forward_norm,
            up,
            activation: match config.block {
                Block::PostLn => Activation::Relu,
                Block::PreLn => Activation::Gelu,
            },
            down,
        }
    }
}

impl MemoryNetwork {
    fn declare(
        declare: &mut Declare,
        width: usize,
        config: &MemoryConfig,
        supervised: bool,
        adaptation: &Adaptation,
    ) -> Self {
        let frozen_outside = !declare.trainable();
        declare.freeze(frozen_outside && adaptation.trained != TrainedPart::Memory);
        let start = Initialisation::Normal;
        let square = [width, width];
        let norm = declare.within("norm", |declare| norm(declare, width));
        // Declared one after another, so that they are one [3·D, D] matrix in the arena.
        let address_key = declare.weight("address_key.weight", &square, start.weight(width));
        declare.weight("strength_key.weight", &square, start.weight(width));
        let value = declare.weight("value.weight", &square, start.weight(width));
        let mut keys = Linear {
            weight: address_key.through(value),
            ..linear_of(width, 3 * width, declare.trainable())
        };
        let mut query = |name: &str| Linear {
            weight: declare.weight(name, &square, start.weight(width)),
            transposed: true,
            ..linear_of(width, width, declare.trainable())
        };
        let mut address_query = query("address_query.weight");
        let mut strength_query = query("strength_query.weight");
        let key_strength = (config.addressing == AddressingKind::Cosine)
            .then(|| declare.within("key_strength", |declare| linear(declare, width, 1, start)));
        let memory = Memory {
            variant: config.variant(width),
            slots: config.slots,
            width,
            initial: declare.plain("initial", &[config.slots, width], Start::Normal(1.0)),
            strength_bias: (config.strength == StrengthKind::Sigmoid).then(|| {
                declare.plain("strength_bias", &[1], Start::Constant(config.strength_bias))
            }),
            supervised,
            trainable: declare.trainable(),
        };
        let out = Linear {
            weight: declare.weight("out.weight", &square, start.weight(width)),
            ..linear_of(width, width, declare.trainable())
        };
        for (index, adapter) in adaptation.kept.iter().enumerate() {
            declare.freeze(!adaptation.trains(index));
            // In this order the outputs of the keys ascend, as a map wants its adapters.
            for target in AdapterTarget::ALL {
                if !adapter.config.targets.contains(&target) {
                    continue;
                }
                let (map, output) = match target {
                    AdapterTarget::AddressQuery => (&mut address_query, 0),
                    AdapterTarget::AddressKey => (&mut keys, 0),
                    AdapterTarget::StrengthQuery => (&mut strength_query, 0),
                    AdapterTarget::StrengthKey => (&mut keys, width),
                    AdapterTarget::Value => (&mut keys, 2 * width),
                };
                let lora = lora(declare, target, output, adapter, width);
                if adaptation.used == Some(index) {
                    map.adapters.push(lora);
                }
            }
        }
        declare.freeze(frozen_outside);
        Self {
            norm,
            keys,
            address_query,
            strength_query,
            key_strength,
            memory,
            out,
        }
    }
}

/// An adapter of a square weight: A Kaiming-uniform, B zero (SPEC section 5).
fn lora(
    declare: &mut Declare,
    target: AdapterTarget,
    output: usize,
    adapter: &KeptAdapter,
    width: usize,
) -> Adapter {
    let rank = adapter.config.rank;
    declare.within(target.name(), |declare| Adapter {
        output,
        outputs: width,
        a: declare.weight(
            &adapter.parameter(Factor::A),
            &[rank, width],
            Start::Uniform(1.0 / (width as f64).sqrt()),
        ),
        b: declare.weight(
            &adapter.parameter(Factor::B),
            &[width, rank],
            Start::Constant(0.0),
        ),
        rank,
        scaling: adapter.config.scaling(),
    })
}

fn norm(declare: &mut Declare, width: usize) -> LayerNorm {
    LayerNorm {
        weight: declare.plain("weight", &[width], Start::Constant(1.0)),
        bias: declare.plain("bias", &[width], Start::Constant(0.0)),
        width,
        epsilon: LAYER_NORM_EPSILON,
        trainable: declare.trainable(),
    }
}

fn linear(declare: &mut Declare, inputs: usize, outputs: usize, start: Initialisation) -> Linear {
    Linear {
        weight: declare.weight("weight", &[outputs, inputs], start.weight(inputs)),
        bias: Some(declare.plain("bias", &[outputs], start.bias(inputs))),
        ..linear_of(inputs, outputs, declare.trainable())
    }
}

/// A linear map without parameters yet.
fn linear_of(inputs: usize, outputs: usize, trainable: bool) -> Linear {
    Linear {
        weight: Span::default(),
        bias: None,
        inputs,
        outputs,
        transposed: false,
        trainable,
        adapters: Vec::new(),
    }
}
