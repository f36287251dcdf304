//! Adapters of a model: added, switched and merged; and that what is not trained keeps its bits.

mod data;

use data::{Data, capacity, draw, several, symbols};
use dtmem::backend::gpu::{Gpu, HostDevice};
use dtmem::backend::{Backend, Cpu};
use dtmem::batch::{TokenLayout, Trajectory};
use dtmem::model::{
    AdapterConfig, AdapterTarget, AdapterWeights, AttentionSpan, Block, Family, FrontEnd,
    MemoryConfig, Model, ModelConfig, NamedTensor, OptimiserStep, Spaces, TRAINED_ADAPTER,
    TrainedPart, Training,
};
use dtmem_reference::Scalar;
use half::bf16;

fn base() -> ModelConfig {
    ModelConfig {
        block: Block::PreLn,
        layout: TokenLayout::ReturnObsAction,
        front_end: FrontEnd::Linear,
        width: 32,
        layers: 2,
        heads: 2,
        feed_forward: 24,
        dropout: 0.0,
        observation_gain: 1.0,
        attention: AttentionSpan::Segment,
        segment_steps: 2,
        memory: Some(MemoryConfig {
            slots: 5,
            ..MemoryConfig::default()
        }),
        ..ModelConfig::default()
    }
}

fn adapter(rank: usize, targets: &[AdapterTarget]) -> AdapterConfig {
    AdapterConfig {
        rank,
        alpha: 3.0,
        dropout: 0.25,
        targets: targets.to_vec(),
    }
}

fn weights<T: Scalar>(config: AdapterConfig, seed: u32) -> AdapterWeights<T> {
    weights_for(config, &[], seed)
}

/// An adapter that brings families.
fn weights_for<T: Scalar>(
    config: AdapterConfig,
    families: &[Family],
    seed: u32,
) -> AdapterWeights<T> {
    let tensors = model(Cpu::<f32>::new(), base())
        .adapter_layout(&config, families)
        .into_iter()
        .enumerate()
        .map(|(number, (name, shape))| NamedTensor {
            name,
            values: (0..shape.iter().product())
                .map(|index| {
                    T::from_f64(draw(seed + number as u32, index, 1000) as f64 / 1000.0 - 0.5)
                })
                .collect(),
            shape,
        })
        .collect();
    AdapterWeights {
        config,
        families: families.to_vec(),
        tensors,
    }
}

fn model<B: Backend>(backend: B, config: ModelConfig) -> Model<B> {
    let mut model = Model::new(backend, config, symbols(), None).unwrap();
    model.initialise(1).unwrap();
    model
}

fn logits<B: Backend>(model: &Model<B>) -> Vec<B::Element> {
    let data = Data::new(&symbols(), &[6, 3, 7], 4);
    model.logits(&data.pack(model)).unwrap()
}

/// ‖x − y‖/‖y‖.
fn error<T: Scalar>(x: &[T], y: &[T]) -> f64 {
    let sum = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let distance = sum(&mut x
        .iter()
        .zip(y)
        .map(|(x, y)| Scalar::to_f64(*x) - Scalar::to_f64(*y)));
    (distance / sum(&mut y.iter().map(|y| Scalar::to_f64(*y)))).sqrt()
}

#[test]
fn adapters_are_switched_without_touching_the_base() {
    let mut model = model(Cpu::<f64>::new(), base());
    let (values, without) = (model.values().unwrap(), logits(&model));
    let first = weights(adapter(2, &AdapterTarget::ALL), 10);
    let second = weights(
        adapter(3, &[AdapterTarget::Value, AdapterTarget::AddressQuery]),
        50,
    );
    model.add_adapter("first", &first).unwrap();
    model.add_adapter("second", &second).unwrap();
    assert!(model.adapters().eq(["first", "second"]));
    assert_eq!(logits(&model), without, "an added adapter is not used yet");
    let mut with = |name| {
        model.use_adapter(Some(name)).unwrap();
        logits(&model)
    };
    let (one, two) = (with("first"), with("second"));
    assert!(error(&one, &without) > 1e-3 && error(&two, &without) > 1e-3);
    assert!(error(&one, &two) > 1e-3);
    assert_eq!(with("first"), one);
    model.use_adapter(None).unwrap();
    assert_eq!(logits(&model), without);
    // An adapter alone gives what it gives in company.
    let mut alone = self::model(Cpu::<f64>::new(), base());
    alone.add_adapter("x", &second).unwrap();
    alone.use_adapter(Some("x")).unwrap();
    assert_eq!(logits(&alone), two);
    assert_eq!(model.adapter("first").unwrap(), first);
    assert_eq!(model.adapter("second").unwrap(), second);
    assert_eq!(model.merge().unwrap().values().unwrap(), values);
}

#[test]
fn every_adapter_has_its_own_numbers_for_a_family_that_it_brings() {
    let mut model = model(Cpu::<f64>::new(), base());
    let (values, spaces) = (model.values().unwrap(), model.spaces().clone());
    let without = logits(&model);
    let new = several().families.split_off(1);
    let first = weights_for(adapter(2, &AdapterTarget::ALL), &new, 10);
    let second = weights_for(adapter(1, &[AdapterTarget::Value]), &new[1..], 50);
    model.add_adapter("first", &first).unwrap();
    model.add_adapter("second", &second).unwrap();
    assert_eq!(model.spaces(), &spaces, "an added adapter is not used yet");
    let names = |model: &Model<Cpu<f64>>| -> Vec<String> {
        let own = model.own_parameters();
        own.map(|parameter| parameter.name.clone()).collect()
    };
    assert_eq!(names(&model), names(&self::model(Cpu::new(), base())));
    let logits_of = |model: &Model<Cpu<f64>>| {
        // The last family alone, whichever its number is.
        let data = Data::new(
            &Spaces {
                families: vec![new[1].clone()],
                steps: 9,
            },
            &[5, 4],
            2,
        );
        let last = model.spaces().families.len() - 1;
        let mut packer = model.packer();
        for sequence in 0..2 {
            let trajectory = Trajectory {
                family: last,
                observations: data.observations[sequence].all(),
                actions: data.actions[sequence].all(),
                returns: &data.returns[sequence],
                pairs: &[],
                annotated: false,
            };
            packer.push_trajectory(trajectory).unwrap();
        }
        model.logits(packer.batch()).unwrap()
    };
    model.use_adapter(Some("first")).unwrap();
    assert_eq!(model.spaces(), &several());
    let one = logits_of(&model);
    model.use_adapter(Some("second")).unwrap();
    assert_eq!(
        model.spaces().families,
        [&spaces.families[..], &new[1..]].concat()
    );
    let two = logits_of(&model);
    assert!(error(&one, &two) > 1e-3);
    assert_eq!(model.adapter("first").unwrap(), first);
    assert_eq!(model.adapter("second").unwrap(), second);
    // Folded in, the families are the model's own.
    model.use_adapter(Some("first")).unwrap();
    let mut merged = model.merge().unwrap();
    assert_eq!(merged.spaces(), &several());
    assert!(error(&logits_of(&merged), &one) < 1e-9);
    assert_eq!(merged.own_parameters().count(), merged.parameters().len());
    let again = merged.add_adapter("first", &first).unwrap_err().to_string();
    assert!(again.contains("families"), "{again}");
    // And without the adapter, the base was what it had been.
    let mut model = self::model(Cpu::<f64>::new(), base());
    model.add_adapter("first", &first).unwrap();
    model.use_adapter(Some("first")).unwrap();
    model.use_adapter(None).unwrap();
    assert_eq!((model.spaces(), logits(&model)), (&spaces, without));
    let merged = model.merge().unwrap();
    assert_eq!(merged.values().unwrap(), values);
}

#[test]
fn adapters_that_do_not_fit_are_refused_by_name() {
    let mut model = model(Cpu::<f32>::new(), base());
    let good = weights(adapter(2, &[AdapterTarget::Value]), 3);
    model.add_adapter("kept", &good).unwrap();
    let refused = |model: &mut Model<Cpu<f32>>, name: &str, weights: &AdapterWeights<f32>| {
        model.add_adapter(name, weights).unwrap_err().to_string()
    };
    assert!(refused(&mut model, "kept", &good).contains("a name of its own"));
    let mut missing = good.clone();
    let lost = missing.tensors.pop().unwrap().name;
    assert!(refused(&mut model, "x", &missing).contains(&lost));
    let mut wide = good.clone();
    wide.tensors[0].shape = vec![32, 2];
    assert!(refused(&mut model, "x", &wide).contains("[32, 2]"));
    let mut more = good.clone();
    more.tensors.push(more.tensors[0].clone());
    assert!(refused(&mut model, "x", &more).contains("adapter.tensors"));
    for (targets, rank) in [(vec![], 2), (vec![AdapterTarget::Value; 2], 2)]
        .into_iter()
        .chain([(vec![AdapterTarget::Value], 33)])
    {
        let unfit = weights(adapter(rank, &targets), 3);
        assert!(refused(&mut model, "x", &unfit).contains("adapter."));
    }
    let error = model.use_adapter(Some("lost")).unwrap_err().to_string();
    assert!(error.contains("lost") && error.contains("kept"), "{error}");
    assert!(model.adapters().eq(["kept"]));
}

#[test]
fn a_merged_model_gives_the_outputs_of_base_and_adapter() {
    fn check<B: Backend>(backend: B, limit: f64) {
        let mut model = model(backend, base());
        let alone = logits(&model);
        let weights = weights(adapter(3, &AdapterTarget::ALL), 7);
        model.add_adapter("x", &weights).unwrap();
        model.use_adapter(Some("x")).unwrap();
        let adapted = logits(&model);
        let merged = logits(&model.merge().unwrap());
        let distance = error(&merged, &adapted);
        // A NaN is no success.
        assert!(distance <= limit, "{distance}");
        assert!(error(&alone, &adapted) > 10.0 * limit);
    }
    check(Cpu::<f64>::new(), 1e-10);
    check(Cpu::<f32>::new(), 2e-5);
    check(Gpu::<_, f32>::new(HostDevice::default()), 2e-5);
    check(Gpu::<_, bf16>::new(HostDevice::default()), 1.5e-2);
}

fn steps(model: &mut Model<Cpu<f32>>) {
    let batch = Data::new(&symbols(), &[6, 4], 2).pack(model);
    let mut training = Training::new(model, capacity(&batch), 2).unwrap();
    for step in 1..=3 {
        let optimiser = OptimiserStep {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip: Some(1.0),
        };
        training.step(model, &batch, 0, step, &optimiser).unwrap();
    }
    let metrics = training.collect(model).unwrap();
    assert!(metrics.len() == 3 && metrics.iter().all(|step| step.is_finite()));
}

#[test]
fn what_is_not_trained_keeps_its_bits() {
    let with_adapter = ModelConfig {
        adapter: Some(adapter(
            2,
            &[AdapterTarget::Value, AdapterTarget::StrengthQuery],
        )),
        ..base()
    };
    for (config, part) in [
        (base(), TrainedPart::All),
        (base(), TrainedPart::Memory),
        (base(), TrainedPart::Nothing),
        (with_adapter.clone(), TrainedPart::Adapter),
        (with_adapter, TrainedPart::Memory),
    ] {
        let known = symbols();
        let mut model =
            Model::partly_trained(Cpu::<f32>::new(), config, known, &[], None, part).unwrap();
        model.initialise(3).unwrap();
        let others = weights(adapter(1, &[AdapterTarget::Value]), 5);
        model.add_adapter("another", &others).unwrap();
        let before = model.values().unwrap();
        if part != TrainedPart::Nothing {
            steps(&mut model);
        }
        let after = model.values().unwrap();
        let mut count = 0;
        for parameter in model.parameters() {
            let own = parameter.name.contains(TRAINED_ADAPTER);
            let expected = match part {
                TrainedPart::All => !parameter.name.contains("lora_"),
                TrainedPart::Memory => {
                    parameter.name.contains(".memory.") && !parameter.name.contains("lora_")
                }
                TrainedPart::Adapter => own,
                TrainedPart::Nothing => false,
            };
            assert_eq!(parameter.trainable, expected, "{}", parameter.name);
            let bits = |values: &[f32]| -> Vec<u32> {
                let values = &values[parameter.span.range()];
                values.iter().map(|value| value.to_bits()).collect()
            };
            // B = 0 at the start, so A has no gradient in the first step, but weight decay.
            let moved = bits(&before) != bits(&after);
            assert_eq!(moved, expected, "{part:?}: {}", parameter.name);
            count += usize::from(expected) * parameter.span.len;
        }
        assert_eq!(model.trained_count(), count);
    }
}

#[test]
fn a_frozen_adapter_is_not_trained_through() {
    let mut model = model(Cpu::<f32>::new(), base());
    let frozen = weights(adapter(1, &[AdapterTarget::Value]), 5);
    model.add_adapter("frozen", &frozen).unwrap();
    model.use_adapter(Some("frozen")).unwrap();
    let batch = Data::new(&symbols(), &[6, 4], 2).pack(&model);
    let error = Training::new(&model, capacity(&batch), 1).unwrap_err();
    assert!(error.to_string().contains("frozen"), "{error}");
}

#[test]
fn training_a_part_that_is_not_there_is_refused() {
    let memoryless = ModelConfig {
        memory: None,
        ..base()
    };
    for (part, config) in [
        (TrainedPart::Memory, memoryless),
        (TrainedPart::Adapter, base()),
    ] {
        let error = Model::partly_trained(Cpu::<f32>::new(), config, symbols(), &[], None, part);
        assert!(error.unwrap_err().to_string().contains("to be trained"));
    }
}
