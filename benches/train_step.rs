//! Whole training steps of the table, and smaller ones on the CPU, in real tokens per second.
//!
//! `train_step/paper`: AttentionTuner at the paper's LTMB size on 8 trajectories, 64 steps long on average and
//! at most 145. `scripts/peer_torch.py` times the same step in PyTorch.

mod table;

use criterion::{Criterion, Throughput};
use dtmem::backend::Cpu;
use dtmem::batch::{PackedBatch, TokenLayout};
use dtmem::bench::{Group, push_random};
use dtmem::model::{
    ActionSpace, AttentionSpan, Block, Capacity, Content, Family, FrontEnd, MemoryConfig, Model,
    ModelConfig, ObservationSpace, OptimiserStep, Spaces, SupervisedPart, SupervisionConfig,
    Training,
};
use dtmem_reference::attention::Denominator;

/// Steps of the eight trajectories of the paper's case.
const PAPER_STEPS: [usize; 8] = [145, 20, 96, 40, 64, 33, 88, 26];

/// As many as the cores that the numbers are for.
const SHARDS: usize = 2;

struct Case {
    name: &'static str,
    config: ModelConfig,
    spaces: Spaces,
    lengths: Vec<usize>,
    lambda: f64,
}

fn ltmb(steps: usize) -> Spaces {
    let observation = ObservationSpace::codes([7, 7, 3], [11, 6, 3]);
    Spaces::of(observation, ActionSpace::Discrete(7), steps)
}

fn cases() -> [Case; 3] {
    [
        Case {
            name: "paper",
            config: ModelConfig::default(),
            spaces: ltmb(145),
            lengths: PAPER_STEPS.to_vec(),
            lambda: 10.0,
        },
        Case {
            name: "quick",
            config: ModelConfig {
                front_end: FrontEnd::Linear,
                width: 128,
                layers: 1,
                feed_forward: 1024,
                dropout: 0.0,
                ..ModelConfig::default()
            },
            spaces: ltmb(33),
            lengths: [10, 14].repeat(16),
            lambda: 10.0,
        },
        Case {
            name: "recall",
            config: ModelConfig {
                block: Block::PreLn,
                layout: TokenLayout::ReturnObsAction,
                front_end: FrontEnd::Linear,
                width: 64,
                layers: 1,
                feed_forward: 128,
                dropout: 0.0,
                attention: AttentionSpan::Segment,
                segment_steps: 4,
                memory: Some(MemoryConfig {
                    slots: 16,
                    ..MemoryConfig::default()
                }),
                ..ModelConfig::default()
            },
            spaces: Spaces::of(
                ObservationSpace::codes([2], [36, 20]),
                ActionSpace::Discrete(17),
                17,
            ),
            lengths: vec![17; 64],
            lambda: 0.0,
        },
    ]
}

fn pack(model: &Model<Cpu<f32>>, lengths: &[usize]) -> PackedBatch {
    let mut packer = model.packer();
    let Family {
        observation,
        action,
    } = &model.spaces().families[0];
    let Content::Codes(cardinalities) = &observation.content else {
        panic!("codes");
    };
    push_random(
        &mut packer,
        observation.fields(),
        cardinalities,
        action.outputs(),
        lengths.iter().copied(),
    )
    .expect("valid trajectories");
    packer.batch().clone()
}

fn train_step(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("train_step");
    group.sample_size(10);
    for case in cases() {
        let supervision = (case.lambda > 0.0).then(|| SupervisionConfig {
            lambda: case.lambda,
            layer: 0,
            part: SupervisedPart::Heads(vec![0]),
            denominator: Denominator::Square,
        });
        let mut model = Model::new(Cpu::new(), case.config, case.spaces, supervision)
            .expect("a valid configuration");
        model.initialise(0).expect("initial values");
        let batch = pack(&model, &case.lengths);
        let mut training = Training::new(&model, Capacity::of(&batch), SHARDS).expect("buffers");
        let optimiser = OptimiserStep {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            clip: None,
        };
        group.throughput(Throughput::Elements(batch.tokens() as u64));
        let mut step = 0;
        group.bench_function(case.name, |bencher| {
            bencher.iter(|| {
                step += 1;
                training
                    .step(&mut model, &batch, 0, step, &optimiser)
                    .expect("a step");
                training.collect(&model).expect("its metrics")
            });
        });
    }
    group.finish();
}

fn main() {
    table::run(Some(Group::Step));
    train_step(&mut Criterion::default().configure_from_args());
}
