//! How model code embeds one-hot codes on a CUDA device, with tanh, and gets the gradient of the weight.
//!
//! `cargo run --release --example one_hot`; without a GPU it says so and ends well.

use std::error::Error;

use dtmem::ops::one_hot::{Backward, Forward, Shape};
use dtmem::ops::{self, Gpu};
use half::bf16;

const ROWS: usize = 3;
const WIDTH: usize = 64;
/// Two fields: the first has 4 values, the second 2.
const OFFSETS: [usize; 2] = [0, 4];
const INPUTS: usize = 6;

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
        fields: OFFSETS.len(),
        inputs: INPUTS,
        width: WIDTH,
    };
    let codes: [u8; ROWS * OFFSETS.len()] = [0, 1, 3, 0, 3, 1];
    // On the device nobody checks them any more.
    shape.validate_codes(&codes, &OFFSETS)?;
    let codes = stream.clone_htod(&codes)?;
    let offsets = stream.clone_htod(&OFFSETS.map(|offset| offset as i32))?;
    // Row i of the weight is i/8 everywhere.
    let weight: Vec<_> = (0..INPUTS * WIDTH)
        .map(|i| bf16::from_f32((i / WIDTH) as f32 / 8.0))
        .collect();
    let weight = stream.clone_htod(&weight)?;
    let bias = stream.clone_htod(&[bf16::ZERO; WIDTH])?;
    let mut y = stream.alloc_zeros::<bf16>(ROWS * WIDTH)?;

    let on = gpu.on(&stream)?;
    shape.forward(
        &on,
        Forward {
            codes: on.input(&codes),
            offsets: on.input(&offsets),
            weight: on.input(&weight),
            bias: on.input(&bias),
            tanh: true,
            y: on.output(&mut y),
        },
    )?;
    // tanh of 0 + 5/8, 3/8 + 4/8, 3/8 + 5/8
    for row in stream.clone_dtoh(&y)?.chunks(WIDTH) {
        println!("y       {:?} …", &row[..4]);
    }

    let dy = stream.clone_htod(&[bf16::ONE; ROWS * WIDTH])?;
    let mut dweight = stream.alloc_zeros::<f32>(INPUTS * WIDTH)?;
    let mut dbias = stream.alloc_zeros::<f32>(WIDTH)?;
    let mut workspace = stream.alloc_zeros(shape.workspace()?)?;
    shape.backward(
        &on,
        Backward {
            codes: on.input(&codes),
            offsets: on.input(&offsets),
            y: Some(on.input(&y)),
            dy: on.input(&dy),
            dweight: on.output(&mut dweight),
            dbias: on.output(&mut dbias),
            workspace: on.output(&mut workspace),
        },
    )?;
    for row in stream.clone_dtoh(&dweight)?.chunks(WIDTH) {
        println!("dweight {:?} …", &row[..4]);
    }
    println!("dbias   {:?} …", &stream.clone_dtoh(&dbias)?[..4]);
    Ok(())
}
