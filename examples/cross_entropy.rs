//! How model code gets the loss of its predictions, their number of hits and the gradient of the logits on a CUDA
//! device, without waiting for any of them.
//!
//! `cargo run --release --example cross_entropy`; without a GPU it says so and ends well.

use std::error::Error;

use dtmem::ops::cross_entropy::{Shape, Tensors};
use dtmem::ops::{self, Gpu};

const CLASSES: usize = 3;
/// The last row has none.
const TARGETS: [i32; 3] = [1, 0, -1];

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
        rows: TARGETS.len(),
        classes: CLASSES,
    };
    let logits = stream.clone_htod(&[0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 5.0, 5.0, 5.0_f32])?;
    let targets = stream.clone_htod(&TARGETS)?;
    // For the mean over the two rows that have a target.
    let scale = stream.clone_htod(&[0.5_f32])?;
    let mut dlogits = stream.alloc_zeros::<f32>(TARGETS.len() * CLASSES)?;
    let mut metrics = stream.alloc_zeros::<f32>(2)?;
    let mut workspace = stream.alloc_zeros(shape.workspace()?)?;

    let on = gpu.on(&stream)?;
    shape.loss_and_gradient(
        &on,
        Tensors {
            logits: on.input(&logits),
            targets: on.input(&targets),
            scale: on.input(&scale),
            dlogits: on.output(&mut dlogits),
            metrics: on.output(&mut metrics),
            workspace: on.output(&mut workspace),
        },
    )?;
    let metrics = stream.clone_dtoh(&metrics)?;
    println!("loss {}, hits {}", metrics[0], metrics[1]);
    for row in stream.clone_dtoh(&dlogits)?.chunks(CLASSES) {
        println!("dlogits {row:?}");
    }
    Ok(())
}
