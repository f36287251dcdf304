//! How model code trains with AdamW on a CUDA device: the norm of the gradient, clipping and the step, none of which
//! comes back to the host.
//!
//! `cargo run --release --example adamw`; without a GPU it says so and ends well.

use std::error::Error;

use dtmem::ops::adamw::{AdamW, Norm, Shape, Step, factors};
use dtmem::ops::{self, Gpu};
use half::bf16;

const PARAMETERS: usize = 1000;

fn main() -> Result<(), Box<dyn Error>> {
    let gpu = match Gpu::new(0) {
        Ok(gpu) => gpu,
        Err(reason @ (ops::Error::NoDriver { .. } | ops::Error::NoGpu { .. })) => {
            println!("{reason}: nothing to show");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let stream = gpu.context().new_stream()?;
    println!("on {}", gpu.context().name()?);

    // f(p) = |p − 1|²/2 has the gradient p − 1: the first step begins at p = 0.
    let shape = Shape {
        parameters: PARAMETERS,
    };
    let gradient = stream.clone_htod(&[-1.0_f32; PARAMETERS])?;
    let mut parameter = stream.alloc_zeros::<f32>(PARAMETERS)?;
    let mut first_moment = stream.alloc_zeros::<f32>(PARAMETERS)?;
    let mut second_moment = stream.alloc_zeros::<f32>(PARAMETERS)?;
    // What a model computes with.
    let mut copy = stream.alloc_zeros::<bf16>(PARAMETERS)?;

    let on = gpu.on(&stream)?;
    let mut norm_and_scale = stream.alloc_zeros::<f32>(2)?;
    let mut workspace = stream.alloc_zeros(shape.workspace()?)?;
    shape.norm(
        &on,
        Norm {
            gradient: on.input(&gradient),
            norm_and_scale: on.output(&mut norm_and_scale),
            max_norm: 1.0,
            loss_scale: None,
            workspace: on.output(&mut workspace),
        },
    )?;

    let hyper = AdamW {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        gradient_scale: 1.0,
        step: 1,
    };
    let factors = stream.clone_htod(&factors(&hyper)?)?;
    shape.step(
        &on,
        Step {
            factors: on.input(&factors),
            scale: Some(on.input(&norm_and_scale).slice(1..2)?),
            gradient: on.input(&gradient),
            parameter: on.output(&mut parameter),
            first_moment: on.output(&mut first_moment),
            second_moment: on.output(&mut second_moment),
            copy: Some(on.output(&mut copy)),
            decayed: PARAMETERS,
        },
    )?;
    let norm_and_scale = stream.clone_dtoh(&norm_and_scale)?;
    println!("norm {}, scale {}", norm_and_scale[0], norm_and_scale[1]);
    // The first step is as long as the learning rate, whatever the gradient.
    println!("parameters {:?} …", &stream.clone_dtoh(&parameter)?[..4]);
    println!("in bf16    {:?} …", &stream.clone_dtoh(&copy)?[..4]);
    Ok(())
}
