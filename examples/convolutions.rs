//! How model code embeds observations of one-hot cells on a CUDA device: two convolutions, forward and backward.
//!
//! `cargo run --release --example convolutions`; without a GPU it says so and ends well.

use std::error::Error;

use dtmem::ops::{self, Gpu, convolutions};
use dtmem_reference::convolution::Grid;
use half::bf16;

const ROWS: usize = 2;
const MIDDLE: usize = 40;
const OUT: usize = 80;

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

    // 7×7 cells of an object, a colour and a state.
    let shape = convolutions::Shape {
        rows: ROWS,
        grid: Grid {
            width: 7,
            height: 7,
            cardinalities: vec![11, 6, 3],
        },
        middle: MIDDLE,
        out: OUT,
    };
    let (positions, channels) = (shape.grid.positions(), shape.grid.channels());
    let codes: Vec<u8> = (0..ROWS * positions * 3).map(|i| (i % 3) as u8).collect();
    let codes = stream.clone_htod(&codes)?;
    // Every weight the same, so that each output only counts what it sees.
    let weight1 = stream.clone_htod(&vec![bf16::ONE; channels * 9 * MIDDLE])?;
    let weight2 = stream.clone_htod(&vec![bf16::from_f32(0.01); OUT * MIDDLE * 9])?;
    let bias1 = stream.alloc_zeros(MIDDLE)?;
    let bias2 = stream.alloc_zeros(OUT)?;
    let mut middle = stream.alloc_zeros(ROWS * positions * MIDDLE)?;
    let mut out = stream.alloc_zeros(ROWS * OUT * positions)?;

    let on = gpu.on(&stream)?;
    shape.forward(
        &on,
        convolutions::Forward {
            codes: on.input(&codes),
            weight1: on.input(&weight1),
            bias1: on.input(&bias1),
            weight2: on.input(&weight2),
            bias2: on.input(&bias2),
            middle: on.output(&mut middle),
            out: on.output(&mut out),
        },
    )?;
    println!("first column of cells {:?}", &stream.clone_dtoh(&out)?[..7]);

    // With out's gradient all ones, and nothing negative, dbias2 is the number of positions.
    let mut dout = stream.clone_htod(&vec![bf16::ONE; ROWS * OUT * positions])?;
    let mut dmiddle = stream.alloc_zeros(ROWS * positions * MIDDLE)?;
    let mut dweight1 = stream.alloc_zeros(channels * 9 * MIDDLE)?;
    let mut dbias1 = stream.alloc_zeros(MIDDLE)?;
    let mut dweight2 = stream.alloc_zeros(OUT * MIDDLE * 9)?;
    let mut dbias2 = stream.alloc_zeros(OUT)?;
    let mut workspace = stream.alloc_zeros(shape.workspace::<bf16>()?)?;
    shape.backward(
        &on,
        convolutions::Backward {
            codes: on.input(&codes),
            weight2: on.input(&weight2),
            middle: on.input(&middle),
            out: on.input(&out),
            dout: on.output(&mut dout),
            dmiddle: on.output(&mut dmiddle),
            dweight1: on.output(&mut dweight1),
            dbias1: on.output(&mut dbias1),
            dweight2: on.output(&mut dweight2),
            dbias2: on.output(&mut dbias2),
            workspace: on.output(&mut workspace),
        },
    )?;
    println!("dbias2 {:?} …", &stream.clone_dtoh(&dbias2)?[..4]);
    Ok(())
}
