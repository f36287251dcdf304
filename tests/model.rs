//! The assembled models: size, gradients, acting, and bits that do not depend on threads.

mod data;

use data::{Data, all_kinds, capacity, draw, grid, images, several, symbols, vectors};
use dtmem::backend::Cpu;
use dtmem::batch::{PackedBatch, TokenLayout};
use dtmem::model::{
    ActionSpace, Actor, AdapterConfig, AddressingKind, AttentionSpan, Block, Capacity, EraseKind,
    FrontEnd, MemoryConfig, Model, ModelConfig, ObservationSpace, OptimiserStep, OrderKind, Spaces,
    StepMetrics, StrengthKind, SupervisedPart, SupervisionConfig, Training,
};
use dtmem::spaces::{Numbers, Values};
use dtmem_reference::Scalar;
use dtmem_reference::attention::Denominator;

fn tuner() -> ModelConfig {
    ModelConfig {
        width: 8,
        layers: 2,
        heads: 2,
        feed_forward: 12,
        dropout: 0.0,
        ..ModelConfig::default()
    }
}

fn decision() -> ModelConfig {
    ModelConfig {
        block: Block::PreLn,
        layout: TokenLayout::ReturnObsAction,
        front_end: FrontEnd::Linear,
        memory: Some(MemoryConfig {
            slots: 5,
            ..MemoryConfig::default()
        }),
        attention: AttentionSpan::Segment,
        segment_steps: 2,
        observation_gain: 1.0,
        ..tuner()
    }
}

fn supervision() -> SupervisionConfig {
    SupervisionConfig {
        lambda: 3.0,
        layer: 0,
        part: SupervisedPart::Heads(vec![1]),
        denominator: Denominator::Square,
    }
}

fn recall() -> SupervisionConfig {
    SupervisionConfig {
        part: SupervisedPart::Memory,
        ..supervision()
    }
}

fn model<T: Scalar>(
    config: &ModelConfig,
    spaces: &Spaces,
    supervision: Option<SupervisionConfig>,
) -> Model<Cpu<T>> {
    let mut model = Model::new(Cpu::new(), config.clone(), spaces.clone(), supervision)
        .expect("a valid configuration");
    model.initialise(1).expect("initial values");
    model
}

/// Directional derivatives along random directions, one for each parameter array, against central
/// differences in f64.
fn check_gradients(config: &ModelConfig, spaces: &Spaces, supervision: Option<SupervisionConfig>) {
    let data = Data::new(spaces, &[5, 3, 0, 1, 7], 3);
    let mut model = model::<f64>(config, spaces, supervision);
    // B of an adapter starts at zero, where A has no gradient: move off it.
    let mut values = model.values().expect("values");
    for parameter in model.parameters() {
        if parameter.name.contains("lora_B") {
            for (index, value) in values[parameter.span.range()].iter_mut().enumerate() {
                *value = draw(9, index, 200) as f64 / 200.0 - 0.5;
            }
        }
    }
    model.set_values(&values).expect("values");
    let batch = data.pack(&model);
    let mut training = Training::new(&model, capacity(&batch), 2).expect("buffers");
    training.gradients(&model, &batch, 5, 1).expect("gradients");
    let gradients = training.gradient_values(&model).expect("gradients");
    let mut checked = 0;
    for (number, parameter) in model.parameters().to_vec().into_iter().enumerate() {
        if !parameter.trainable {
            continue;
        }
        let span = parameter.span.range();
        let direction: Vec<f64> = span
            .clone()
            .map(|index| draw(number as u32 + 50, index, 2000) as f64 / 1000.0 - 1.0)
            .collect();
        let analytic: f64 = gradients[span.clone()]
            .iter()
            .zip(&direction)
            .map(|(g, d)| g * d)
            .sum();
        let step = 1e-5;
        let mut loss = |sign: f64| {
            let mut moved = values.clone();
            for (value, d) in moved[span.clone()].iter_mut().zip(&direction) {
                *value += sign * step * d;
            }
            model.set_values(&moved).expect("values");
            training.gradients(&model, &batch, 5, 1).expect("loss").loss
        };
        let numeric = (loss(1.0) - loss(-1.0)) / (2.0 * step);
        model.set_values(&values).expect("values");
        let scale = gradients[span]
            .iter()
            .map(|g| g * g)
            .sum::<f64>()
            .sqrt()
            .max(1e-3);
        assert!(
            (analytic - numeric).abs() <= 1e-5 * scale,
            "{}: {analytic} against {numeric}",
            parameter.name
        );
        checked += 1;
    }
    assert!(checked > 5);
}

#[test]
fn the_papers_ltmb_model_has_14_661_919_parameters() {
    let observation = ObservationSpace::codes([7, 7, 3], [11, 6, 3]);
    let spaces = Spaces::of(observation, ActionSpace::Discrete(7), 145);
    let model = Model::new(Cpu::<f32>::new(), ModelConfig::default(), spaces, None)
        .expect("the paper's model");
    assert_eq!(model.parameter_count(), 14_661_919);
    assert_eq!(model.trained_count(), 14_661_919);
}

#[test]
fn attention_tuner_gradients_match_finite_differences() {
    check_gradients(&tuner(), &grid(), Some(supervision()));
}

#[test]
fn attention_tuner_gradients_match_with_dropout() {
    let config = ModelConfig {
        dropout: 0.3,
        front_end: FrontEnd::Linear,
        ..tuner()
    };
    check_gradients(&config, &grid(), Some(supervision()));
}

#[test]
fn memory_model_gradients_match_finite_differences() {
    check_gradients(&decision(), &symbols(), None);
    check_gradients(&decision(), &symbols(), Some(recall()));
}

#[test]
fn several_families_have_right_gradients() {
    check_gradients(&tuner(), &several(), Some(supervision()));
    let config = ModelConfig {
        front_end: FrontEnd::Convolution,
        ..decision()
    };
    check_gradients(&config, &several(), None);
}

#[test]
fn every_kind_of_observations_and_actions_has_right_gradients() {
    for spaces in [vectors(), images(), all_kinds()] {
        let config = ModelConfig {
            front_end: FrontEnd::Linear,
            observation_gain: 1.0,
            ..tuner()
        };
        check_gradients(&config, &spaces, Some(supervision()));
        check_gradients(&decision(), &spaces, None);
    }
}

#[test]
fn squared_error_is_the_mean_over_the_numbers_of_an_action() {
    let model = model::<f64>(&decision(), &vectors(), None);
    let batch = Data::new(&vectors(), &[5, 2], 3).pack(&model);
    let mut training = Training::new(&model, capacity(&batch), 2).expect("buffers");
    let metrics = training.gradients(&model, &batch, 5, 1).expect("gradients");
    let outputs = model.logits(&batch).expect("outputs");
    let squares = outputs.iter().zip(&batch.real_targets);
    let sum: f64 = squares.map(|(y, &t)| (y - f64::from(t)).powi(2)).sum();
    let mean = sum / outputs.len() as f64;
    assert!((metrics.loss - mean).abs() < 1e-12 * mean);
    assert_eq!(metrics.accuracy, 0.0);
}

#[test]
fn images_are_cut_into_patches_without_losing_a_pixel() {
    let model = model::<f32>(&decision(), &images(), None);
    let data = Data::new(&images(), &[1], 8);
    let batch = data.pack(&model);
    let pixels = data.observations[0].all().bytes();
    let patch = 12 * 12 * 2;
    assert_eq!(batch.real_observations.len(), 2 * patch);
    let mut sum = 0.0;
    for (index, &pixel) in pixels.iter().enumerate() {
        let (y, x, channel) = (index / 28, index / 2 % 14, index % 2);
        let place = (x / 12) * patch + (y * 12 + x % 12) * 2 + channel;
        assert_eq!(batch.real_observations[place], f32::from(pixel) / 255.0);
        sum += f64::from(pixel) / 255.0;
    }
    let all: f64 = batch.real_observations.iter().map(|&x| f64::from(x)).sum();
    assert!((all - sum).abs() < 1e-3, "the rest is 0");
}

#[test]
fn a_family_learns_the_same_alone_and_beside_others() {
    for spaces in [several(), all_kinds()] {
        check_alone_and_beside_others(&spaces);
    }
}

fn check_alone_and_beside_others(spaces: &Spaces) {
    // What sequences of other families are in a batch changes a sum, and nothing else.
    let config = ModelConfig {
        front_end: FrontEnd::Linear,
        ..tuner()
    };
    let model = model::<f64>(&config, spaces, None);
    let data = Data::new(spaces, &[5, 3, 4, 7], 3);
    let all = data.pack(&model);
    let mut training = Training::new(&model, capacity(&all), 2).expect("buffers");
    let mut gradients = |batch: &PackedBatch| {
        let metrics = training.gradients(&model, batch, 5, 1).expect("gradients");
        let rows = batch.observation_tokens.len() as f64;
        let values = training.gradient_values(&model).expect("gradients");
        let sums: Vec<f64> = values.into_iter().map(|g| g * rows).collect();
        (metrics.action_loss * rows, sums)
    };
    let (loss, together) = gradients(&all);
    let mut sum = vec![0.0; together.len()];
    let mut losses = 0.0;
    for sequence in 0..all.sequences() {
        let mut alone = PackedBatch::default();
        all.select(&[sequence], &mut alone);
        let (loss, own) = gradients(&alone);
        losses += loss;
        for (sum, own) in sum.iter_mut().zip(own) {
            *sum += own;
        }
    }
    assert!(
        (loss - losses).abs() < 1e-10 * loss,
        "{loss} against {losses}"
    );
    for (a, b) in sum.iter().zip(&together) {
        assert!((a - b).abs() < 1e-10, "{a} alone, {b} together");
    }
}

#[test]
fn a_model_keeps_its_parameters_when_families_are_added() {
    let small = model::<f32>(&decision(), &symbols(), None);
    let config = decision();
    let large = model::<f32>(&config, &several(), None);
    for known in small.parameters() {
        let same = |own: &&dtmem::model::Parameter| own.name == known.name;
        let own = large.parameters().iter().find(same).expect("the same name");
        assert_eq!(own.shape, known.shape, "{}", known.name);
    }
    assert!(large.parameters().len() > small.parameters().len());
}

#[test]
fn sequences_out_of_the_order_of_their_families_are_refused() {
    let model = model::<f32>(&tuner(), &several(), None);
    let mut data = Data::new(&several(), &[2, 2, 2], 1);
    let pack = |data: &Data| std::panic::catch_unwind(|| data.pack(&model).sequences());
    assert_eq!(pack(&data).expect("in order"), 3);
    data.families.swap(0, 1);
    assert!(pack(&data).is_err());
}

#[test]
fn every_memory_variant_has_right_gradients() {
    for (addressing, strength, erase, order, top_k) in [
        (
            AddressingKind::Dot,
            StrengthKind::Softmax,
            EraseKind::Paper,
            OrderKind::WriteThenRead,
            0,
        ),
        (
            AddressingKind::Cosine,
            StrengthKind::Softmax,
            EraseKind::Coupled,
            OrderKind::ReadThenWrite,
            0,
        ),
        (
            AddressingKind::Dot,
            StrengthKind::Sigmoid,
            EraseKind::Coupled,
            OrderKind::ReadThenWrite,
            3,
        ),
    ] {
        let config = ModelConfig {
            memory: Some(MemoryConfig {
                slots: 5,
                addressing,
                strength,
                erase,
                order,
                top_k,
                ..MemoryConfig::default()
            }),
            ..decision()
        };
        check_gradients(&config, &symbols(), None);
        check_gradients(&config, &symbols(), Some(recall()));
    }
}

#[test]
fn memory_in_post_ln_blocks_with_episode_attention_has_right_gradients() {
    let config = ModelConfig {
        memory: decision().memory,
        segment_steps: 3,
        front_end: FrontEnd::Linear,
        ..tuner()
    };
    check_gradients(&config, &symbols(), Some(supervision()));
    check_gradients(&config, &symbols(), Some(recall()));
}

#[test]
fn adapters_alone_are_trained_and_have_right_gradients() {
    for dropout in [0.0, 0.25] {
        let config = ModelConfig {
            adapter: Some(AdapterConfig {
                rank: 2,
                alpha: 3.0,
                dropout,
                ..AdapterConfig::default()
            }),
            ..decision()
        };
        check_gradients(&config, &symbols(), None);
        let model = model::<f64>(&config, &symbols(), None);
        // 5 projections of 2 layers, A [2, 8] and B [8, 2].
        assert_eq!(model.trained_count(), 5 * 2 * 32);
        assert!(
            model
                .parameters()
                .iter()
                .all(|parameter| parameter.trainable == parameter.name.contains("lora_"))
        );
    }
}

#[test]
fn frozen_parameters_keep_their_bits() {
    let config = ModelConfig {
        adapter: Some(AdapterConfig::default()),
        ..decision()
    };
    let mut model = model::<f32>(&config, &symbols(), None);
    let before = model.values().expect("values");
    let batch = Data::new(&symbols(), &[6, 4], 2).pack(&model);
    let mut training = Training::new(&model, capacity(&batch), 2).expect("buffers");
    for step in 1..=3 {
        training
            .step(&mut model, &batch, 0, step, &optimiser())
            .expect("a step");
    }
    let after = model.values().expect("values");
    let trained = model.trained_len();
    assert!(before[..trained] != after[..trained]);
    assert!(
        before[trained..]
            .iter()
            .zip(&after[trained..])
            .all(|(a, b)| a.to_bits() == b.to_bits())
    );
}

fn optimiser() -> OptimiserStep {
    OptimiserStep {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        clip: Some(1.0),
    }
}

#[test]
fn metrics_of_many_steps_are_collected_in_their_order() {
    const STEPS: usize = 300; // more than wait at once
    let config = ModelConfig {
        front_end: FrontEnd::Linear,
        ..tuner()
    };
    let run = |collect_every: usize| {
        let mut model = model::<f32>(&config, &symbols(), None);
        let largest = Data::new(&symbols(), &[3], 0).pack(&model);
        let mut training = Training::new(&model, capacity(&largest), 1).expect("buffers");
        let mut collected = Vec::new();
        for step in 1..=STEPS {
            let batch = Data::new(&symbols(), &[1 + step % 3], step as u32).pack(&model);
            training
                .step(&mut model, &batch, 0, step as u64, &optimiser())
                .expect("a step");
            if step.is_multiple_of(collect_every) {
                collected.extend(training.collect(&model).expect("metrics"));
            }
        }
        collected
    };
    let each = run(1);
    assert_eq!(each.len(), STEPS);
    assert!(each == run(STEPS));
    assert!((1..=STEPS).all(|step| each[step - 1].tokens == 2 * (1 + step % 3)));
}

/// Acting step by step gives the logits of the whole episode at once.
fn check_acting(config: &ModelConfig, spaces: &Spaces) {
    for family in 0..spaces.families.len() {
        check_acting_in(config, spaces, family);
    }
}

fn check_acting_in(config: &ModelConfig, spaces: &Spaces, family: usize) {
    let model = model::<f64>(config, spaces, None);
    let lengths = [7, 4, 9];
    let alone = Spaces {
        families: vec![spaces.families[family].clone()],
        ..*spaces
    };
    let mut data = Data::new(&alone, &lengths, 4);
    data.families = vec![family; lengths.len()];
    let (fields, actions) = (
        alone.families[0].observation.fields(),
        alone.families[0].action.outputs(),
    );
    let mut actor = Actor::new(&model, family, lengths.len()).expect("an actor");
    let mut acted: Vec<Vec<f64>> = vec![Vec::new(); lengths.len()];
    for time in 0..9 {
        let active: Vec<usize> = (0..3).filter(|&episode| time < lengths[episode]).collect();
        let mut observations = Numbers::observations(&alone.families[0].observation);
        for &episode in &active {
            observations.extend(data.observations[episode].all().row(time, fields));
        }
        let returns: Vec<f32> = active
            .iter()
            .map(|&episode| data.returns[episode][time])
            .collect();
        let chosen = actor
            .act(&model, &active, observations.all(), &returns)
            .expect("actions");
        let chosen = match chosen {
            Values::Bytes(values) => Numbers::Bytes(values.to_vec()),
            Values::Reals(values) => Numbers::Reals(values.to_vec()),
        };
        for (index, &episode) in active.iter().enumerate() {
            let logits = &actor.logits()[index * actions..][..actions];
            acted[episode].extend_from_slice(logits);
            if time == 0 {
                data.actions[episode].clear();
            }
            let width = alone.families[0].action.fields();
            data.actions[episode].extend(chosen.all().row(index, width));
        }
    }
    let batch = data.pack(&model);
    let whole = model.logits(&batch).expect("logits");
    let acted = acted.concat();
    assert_eq!(whole.len(), acted.len());
    for (index, (a, b)) in whole.iter().zip(&acted).enumerate() {
        assert!(
            (a - b).abs() < 1e-10,
            "logit {index}: {a} at once, {b} step by step"
        );
    }
}

#[test]
fn acting_step_by_step_equals_the_whole_episode() {
    check_acting(&tuner(), &grid());
    check_acting(&tuner(), &several());
    check_acting(&decision(), &symbols());
    check_acting(&decision(), &several());
    check_acting(&decision(), &all_kinds());
    for (attention, segment_steps, memory) in [
        (AttentionSpan::Episode, 3, true),
        (AttentionSpan::Episode, 0, true),
        (AttentionSpan::Segment, 3, false),
        (AttentionSpan::Episode, 0, false),
        (AttentionSpan::Segment, 100, true),
    ] {
        let config = ModelConfig {
            attention,
            segment_steps,
            memory: decision().memory.filter(|_| memory),
            ..decision()
        };
        check_acting(&config, &symbols());
        check_acting(&config, &vectors());
    }
}

#[test]
fn attention_maps_are_causal_and_sum_to_one() {
    for config in [tuner(), decision()] {
        let spaces = if config.front_end == FrontEnd::Linear {
            symbols()
        } else {
            grid()
        };
        let model = model::<f64>(&config, &spaces, None);
        let batch = Data::new(&spaces, &[5], 1).pack(&model);
        let map = model.attention_map(&batch, 1, 0).expect("a map");
        for (query, row) in map.rows().into_iter().enumerate() {
            assert!((row.sum() - 1.0).abs() < 1e-12);
            assert!(row.iter().skip(query + 1).all(|&a| a == 0.0));
        }
    }
}

#[test]
fn the_memory_loss_of_sequences_one_by_one_is_that_of_their_batch() {
    let several_heads = SupervisionConfig {
        part: SupervisedPart::Heads(vec![0, 1]),
        denominator: Denominator::Causal,
        ..supervision()
    };
    for (config, supervision) in [
        (tuner(), supervision()),
        (tuner(), several_heads),
        (decision(), recall()),
    ] {
        let config = ModelConfig {
            dropout: 0.0,
            front_end: FrontEnd::Linear,
            ..config
        };
        for seed in 0..10 {
            let model = model::<f64>(&config, &symbols(), Some(supervision.clone()));
            let data = Data::new(&symbols(), &[9, 3, 7, 1, 8], seed);
            let batch = data.pack(&model);
            let mut training = Training::new(&model, capacity(&batch), 1).expect("buffers");
            let metrics = training.gradients(&model, &batch, 1, 1).expect("metrics");
            let (mut loss, mut alone) = (0.0, PackedBatch::default());
            for sequence in 0..batch.sequences() {
                batch.select(&[sequence], &mut alone);
                loss += model.memory_loss(&alone).expect("a loss");
            }
            let loss = loss / supervision.divisor(&batch);
            let error = (loss - metrics.memory_loss).abs();
            assert!(loss > 0.0 && error <= 1e-10 * loss, "{loss}: {error:e}");
        }
    }
}

/// Large enough that every operation is split into several tasks.
fn train_bits(threads: usize, config: &ModelConfig, spaces: &Spaces) -> Vec<u32> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .expect("a pool");
    pool.install(|| {
        let supervision = match config.attention {
            AttentionSpan::Episode => supervision(),
            AttentionSpan::Segment => recall(),
        };
        let mut model = model::<f32>(config, spaces, Some(supervision));
        let batch = Data::new(spaces, &[9; 60], 6).pack(&model);
        let mut training = Training::new(&model, capacity(&batch), 2).expect("buffers");
        for step in 1..=3 {
            training
                .step(&mut model, &batch, 3, step, &optimiser())
                .expect("a step");
        }
        let metrics = training.collect(&model).expect("metrics");
        assert!(metrics.len() == 3 && metrics.iter().all(StepMetrics::is_finite));
        model
            .values()
            .expect("values")
            .into_iter()
            .map(f32::to_bits)
            .collect()
    })
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let tuner = ModelConfig {
        width: 72,
        feed_forward: 200,
        dropout: 0.1,
        ..tuner()
    };
    let decision = ModelConfig {
        width: 72,
        feed_forward: 200,
        ..decision()
    };
    for (config, spaces) in [
        (tuner.clone(), grid()),
        (decision, symbols()),
        (tuner, several()),
    ] {
        let one = train_bits(1, &config, &spaces);
        for threads in [2, 3, 5] {
            assert!(
                one == train_bits(threads, &config, &spaces),
                "{threads} threads"
            );
        }
    }
}

#[test]
fn settings_that_do_not_fit_are_named() {
    let cases: [(&str, ModelConfig, Spaces, Option<SupervisionConfig>); 7] = [
        (
            "width",
            ModelConfig {
                heads: 3,
                ..tuner()
            },
            grid(),
            None,
        ),
        (
            "dropout",
            ModelConfig {
                dropout: 1.0,
                ..tuner()
            },
            grid(),
            None,
        ),
        ("front_end", tuner(), symbols(), None),
        (
            "segment_steps",
            ModelConfig {
                segment_steps: 0,
                ..decision()
            },
            symbols(),
            None,
        ),
        (
            "loss.layer",
            tuner(),
            grid(),
            Some(SupervisionConfig {
                layer: 2,
                ..supervision()
            }),
        ),
        ("attention", decision(), symbols(), Some(supervision())),
        ("memory", tuner(), grid(), Some(recall())),
    ];
    for (name, config, spaces, supervision) in cases {
        let error = Model::new(Cpu::<f32>::new(), config, spaces, supervision)
            .expect_err("an invalid setting");
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn batches_beyond_the_buffers_are_an_error() {
    let model = model::<f32>(&tuner(), &grid(), None);
    let batch = Data::new(&grid(), &[5, 5], 1).pack(&model);
    let small = Capacity {
        tokens: 4,
        ..capacity(&batch)
    };
    let mut training = Training::new(&model, small, 2).expect("buffers");
    let error = training
        .gradients(&model, &batch, 0, 1)
        .expect_err("too large a batch");
    assert!(error.to_string().contains("tokens"), "{error}");
}

#[test]
fn the_number_of_shards_changes_rounding_only() {
    let dropout = ModelConfig {
        dropout: 0.2,
        ..tuner()
    };
    let memory = ModelConfig {
        segment_steps: 2,
        ..decision()
    };
    for (config, spaces, supervision) in [
        (dropout.clone(), grid(), Some(supervision())),
        (memory.clone(), symbols(), Some(recall())),
        (dropout, several(), Some(supervision())),
        (memory.clone(), several(), Some(recall())),
        (memory, all_kinds(), None),
    ] {
        let model = model::<f64>(&config, &spaces, supervision);
        let batch = Data::new(&spaces, &[5, 3, 8], 7).pack(&model);
        let run = |shards: usize| {
            let mut training = Training::new(&model, capacity(&batch), shards).expect("buffers");
            let metrics = training.gradients(&model, &batch, 9, 4).expect("gradients");
            (
                metrics,
                training.gradient_values(&model).expect("gradients"),
            )
        };
        let (whole, gradients) = run(1);
        // More shards than sequences: some are empty.
        for shards in [2, 5] {
            let (metrics, others) = run(shards);
            assert!((metrics.loss - whole.loss).abs() < 1e-12 * whole.loss);
            assert!((metrics.memory_loss - whole.memory_loss).abs() < 1e-12);
            let norm = whole.gradient_norm;
            assert!(
                gradients
                    .iter()
                    .zip(&others)
                    .all(|(a, b)| (a - b).abs() < 1e-12 * norm)
            );
        }
    }
}
