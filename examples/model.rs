//! How your own program trains and uses a model: pack trajectories, step, act. The model learns to say at each step
//! what it saw at the first one, and the memory loss teaches an attention head to look there.
//!
//! `cargo run --release --example model`; on the CPU, in less than a second.

use std::error::Error;

use dtmem::backend::Cpu;
use dtmem::batch::Trajectory;
use dtmem::model::{
    ActionSpace, Actor, Capacity, FrontEnd, Model, ModelConfig, ObservationSpace, OptimiserStep,
    Spaces, SupervisedPart, SupervisionConfig, Training,
};
use dtmem::spaces::Values;
use dtmem_reference::attention::Denominator;

const SYMBOLS: usize = 4;
const STEPS: usize = 3;
const TRAINING_STEPS: u64 = 60;

fn main() -> Result<(), Box<dyn Error>> {
    let spaces = Spaces::of(
        ObservationSpace::codes([1], [SYMBOLS]),
        ActionSpace::Discrete(SYMBOLS),
        STEPS,
    );
    let config = ModelConfig {
        front_end: FrontEnd::Linear,
        width: 32,
        layers: 1,
        feed_forward: 64,
        dropout: 0.0,
        ..ModelConfig::default()
    };
    let supervision = SupervisionConfig {
        lambda: 10.0,
        layer: 0,
        part: SupervisedPart::Heads(vec![0]),
        denominator: Denominator::Square,
    };
    let mut model = Model::new(Cpu::<f32>::new(), config, spaces, Some(supervision))?;
    model.initialise(0)?;
    println!("{} parameters", model.parameter_count());

    // All 64 episodes, as one batch.
    let mut packer = model.packer();
    for episode in 0..SYMBOLS.pow(STEPS as u32) {
        let seen = [1, 4, 16].map(|place| (episode / place % SYMBOLS) as u8);
        packer.push_trajectory(Trajectory {
            family: 0,
            observations: Values::Bytes(&seen),
            actions: Values::Bytes(&[seen[0]; STEPS]),
            returns: &[],
            pairs: &[(0, 0), (1, 0), (2, 0)], // all steps recall the first
            annotated: true,
        })?;
    }
    let batch = packer.batch();

    let mut training = Training::new(&model, Capacity::of(batch), 1)?;
    let adam = OptimiserStep {
        learning_rate: 3e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
        clip: None,
    };
    for step in 1..=TRAINING_STEPS {
        training.step(&mut model, batch, 0, step, &adam)?;
    }
    // Losses are fetched when they are wanted, so that a GPU need not wait after each step.
    for (step, metrics) in (1..).zip(training.collect(&model)?) {
        if step == 1 || step % 10 == 0 {
            println!(
                "step {step:2}: action loss {:.3}, memory loss {:.3}, {:3.0} % right",
                metrics.action_loss,
                metrics.memory_loss,
                100.0 * metrics.accuracy
            );
        }
    }

    // One episode, step by step; keys and values are kept.
    let mut actor = Actor::new(&model, 0, 1)?;
    for seen in [2, 0, 3] {
        let said = actor.act(&model, &[0], Values::Bytes(&[seen]), &[])?;
        println!("sees {seen}, says {said:?}");
    }
    Ok(())
}
