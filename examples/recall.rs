//! How model code takes the memory loss of what a memory recalls on a CUDA device, with its gradient.
//!
//! `cargo run --release --example recall`; without a GPU it says so and ends well.

use std::error::Error;

use dtmem::ops::recall::{Loss, LossShape};
use dtmem::ops::{self, Gpu};

/// What two tokens have read: four numbers, and their shares of three recalled tokens' values.
const READ: [[f32; 7]; 2] = [
    [1.0, 2.0, 3.0, 4.0, 0.5, 0.25, 0.0],
    [5.0, 6.0, 7.0, 8.0, 0.1, 0.8, 0.0],
];

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

    let shape = LossShape {
        tokens: 2,
        width: 4,
        columns: 3,
    };
    let y = stream.clone_htod(READ.as_flattened())?;
    let to = stream.clone_htod(&[0, 1])?;
    // The third token lies in their own segment. The first of the two is to recall the first token, the other the
    // second.
    let earlier = stream.clone_htod(&[2, 2])?;
    let wanted = stream.clone_htod(&[0b01, 0b10])?;
    let weight = stream.clone_htod(&[1.0_f32])?;
    let mut read = stream.alloc_zeros::<f32>(2 * 4)?;
    let mut gradient = stream.alloc_zeros::<f32>(2 * 3)?;
    let mut loss = stream.alloc_zeros::<f32>(1)?;
    let mut workspace = stream.alloc_zeros::<f32>(shape.workspace()?)?;

    let on = gpu.on(&stream)?;
    shape.loss_and_gradient(
        &on,
        Loss {
            y: on.input(&y),
            to: on.input(&to),
            earlier: on.input(&earlier),
            wanted: on.input(&wanted),
            weight: on.input(&weight),
            read: on.output(&mut read).rows(4),
            gradient: on.output(&mut gradient),
            loss: on.output(&mut loss),
            workspace: on.output(&mut workspace),
        },
    )?;
    // −log 0.5 − log(1 − 0.25) − log(1 − 0.1) − log 0.8
    println!("loss {}", stream.clone_dtoh(&loss)?[0]);
    // −1 / 0.5, 1 / (1 − 0.25), 0; 1 / (1 − 0.1), −1 / 0.8, 0
    println!("its gradient {:?}", stream.clone_dtoh(&gradient)?);
    Ok(())
}
