//! How model code calls an operation: one layer normalisation on a CUDA device, forward and backward.
//!
//! `cargo run --release --example layer_norm`; without a GPU it says so and ends well.

use std::error::Error;

use dtmem::ops::{self, Gpu, layer_norm};
use half::bf16;

const ROWS: usize = 4;
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

    // The caller's memory: x counts up within each row.
    let x: Vec<bf16> = (0..ROWS * WIDTH)
        .map(|i| bf16::from_f32((i % WIDTH) as f32 / WIDTH as f32))
        .collect();
    let x = stream.clone_htod(&x)?;
    let weight = stream.clone_htod(&[bf16::ONE; WIDTH])?;
    let bias = stream.clone_htod(&[bf16::ZERO; WIDTH])?;
    let mut y = stream.alloc_zeros::<bf16>(ROWS * WIDTH)?;
    let [mut mean, mut rstd] = [stream.alloc_zeros(ROWS)?, stream.alloc_zeros(ROWS)?];

    let shape = layer_norm::Shape {
        rows: ROWS,
        width: WIDTH,
    };
    let on = gpu.on(&stream)?;
    shape.forward(
        &on,
        layer_norm::Forward {
            x: on.input(&x),
            residual: None,
            weight: on.input(&weight),
            bias: on.input(&bias),
            y: on.output(&mut y),
            mean: on.output(&mut mean),
            rstd: on.output(&mut rstd),
            epsilon: 1e-5,
        },
    )?;
    println!("mean {:?}", stream.clone_dtoh(&mean)?);
    println!("rstd {:?}", stream.clone_dtoh(&rstd)?);
    println!("y    {:?} …", &stream.clone_dtoh(&y)?[..4]);

    // With y's gradient all ones, dbias is the number of rows; the gradient of x takes the place of that of y.
    let mut dy = stream.clone_htod(&[bf16::ONE; ROWS * WIDTH])?;
    let mut dweight = stream.alloc_zeros(WIDTH)?;
    let mut dbias = stream.alloc_zeros(WIDTH)?;
    let mut workspace = stream.alloc_zeros(shape.workspace()?)?;
    let ds = on.output(&mut dy);
    shape.backward(
        &on,
        layer_norm::Backward {
            s: on.input(&x),
            weight: on.input(&weight),
            mean: on.input(&mean),
            rstd: on.input(&rstd),
            dy: ds.as_input(),
            dsum: None,
            ds,
            summand: None,
            dweight: on.output(&mut dweight),
            dbias: on.output(&mut dbias),
            workspace: on.output(&mut workspace),
        },
    )?;
    println!("dbias {:?} …", &stream.clone_dtoh(&dbias)?[..4]);
    Ok(())
}
