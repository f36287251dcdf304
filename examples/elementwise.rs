//! How model code puts bias, activation, dropout and residual sum into one launch on a CUDA device, and their
//! gradients, with that of the bias, into two.
//!
//! `cargo run --release --example elementwise`; without a GPU it says so and ends well.

use std::error::Error;

use dtmem::ops::elementwise::{
    Activation, Backward, BiasGradient, Dropout, Forward, Kept, Mask, Shape,
};
use dtmem::ops::{self, Gpu};
use half::bf16;

const ROWS: usize = 64;
const WIDTH: usize = 512;

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

    let shape = Shape {
        rows: ROWS,
        width: WIDTH,
    };
    // What a product gave, its bias, and the residual stream.
    let x = stream.clone_htod(&[bf16::ONE; ROWS * WIDTH])?;
    let bias = stream.clone_htod(&[bf16::ONE; WIDTH])?;
    let residual = stream.clone_htod(&[bf16::ONE; ROWS * WIDTH])?;
    let mut y = stream.alloc_zeros::<bf16>(ROWS * WIDTH)?;
    // A tenth of the elements becomes 0. The step lies in device memory: a captured graph draws another mask when it is
    // replayed with another step.
    let mask = Mask::new(1, 0, 0, 0.1)?;
    let step = stream.clone_htod(&[1_u32])?;

    let on = gpu.on(&stream)?;
    let dropout = || Dropout {
        mask,
        step: on.input(&step),
        origins: None,
    };
    shape.forward(
        &on,
        Forward {
            x: on.input(&x),
            bias: Some(on.input(&bias)),
            activation: Some(Activation::Relu),
            dropout: Some(dropout()),
            residual: Some(on.input(&residual)),
            y: on.output(&mut y),
        },
    )?;
    // 1 where an element was dropped, 1 + 2/0.9 elsewhere.
    println!("y     {:?} …", &stream.clone_dtoh(&y)?[..8]);

    let dy = stream.clone_htod(&[bf16::ONE; ROWS * WIDTH])?;
    let mut dx = stream.alloc_zeros::<bf16>(ROWS * WIDTH)?;
    let mut dbias = stream.alloc_zeros::<f32>(WIDTH)?;
    let mut workspace = stream.alloc_zeros(shape.workspace()?)?;
    // ReLU's slope is taken from its value, here 2 everywhere.
    let activated = stream.clone_htod(&[bf16::from_f32(2.0); ROWS * WIDTH])?;
    shape.backward(
        &on,
        Backward {
            activation: Some(Kept {
                activation: Activation::Relu,
                kept: on.input(&activated),
                bias: None,
            }),
            dropout: Some(dropout()),
            dy: on.input(&dy).rows(WIDTH),
            dx: Some(on.output(&mut dx)),
            bias: Some(BiasGradient {
                dbias: on.output(&mut dbias),
                workspace: on.output(&mut workspace),
            }),
        },
    )?;
    println!("dx    {:?} …", &stream.clone_dtoh(&dx)?[..8]);
    println!("dbias {:?} …", &stream.clone_dtoh(&dbias)?[..4]);
    Ok(())
}
