//! How model code whose memory and streams are those of the crate `cust` calls an operation, and how cudarc's memory is
//! shown to `cust`.
//!
//! `cargo run --release --features cust --example cust`; without a GPU it says so and ends well.

use std::error::Error;

use cust::memory::{CopyDestination as _, DeviceBuffer};
use cust::stream::{Stream, StreamFlags};
use dtmem::interop::cust::{OnCust, view};
use dtmem::ops::{Gpu, gpu, layer_norm};
use half::bf16;

const ROWS: usize = 4;
const WIDTH: usize = 512;

fn main() -> Result<(), Box<dyn Error>> {
    match gpu::count() {
        Ok(1..) => {}
        Ok(0) => {
            println!("no GPU: nothing to show");
            return Ok(());
        }
        Err(error) => {
            println!("{error}: nothing to show");
            return Ok(());
        }
    }
    // Both crates have the primary context of the first GPU.
    let _context = cust::quick_init()?;
    let gpu = Gpu::new(0)?;
    let stream = Stream::new(StreamFlags::DEFAULT, None)?;
    println!("on {}", gpu.context().name()?);

    // Memory of cust: bf16 as bits, x counts up within each row.
    let x: Vec<u16> = (0..ROWS * WIDTH)
        .map(|i| bf16::from_f32((i % WIDTH) as f32 / WIDTH as f32).to_bits())
        .collect();
    let x = DeviceBuffer::from_slice(&x)?;
    let weight = DeviceBuffer::from_slice(&[bf16::ONE.to_bits(); WIDTH])?;
    let bias = DeviceBuffer::from_slice(&[bf16::ZERO.to_bits(); WIDTH])?;
    let mut y = DeviceBuffer::from_slice(&[0_u16; ROWS * WIDTH])?;
    let mut mean = DeviceBuffer::from_slice(&[0.0_f32; ROWS])?;
    let mut rstd = DeviceBuffer::from_slice(&[0.0_f32; ROWS])?;

    let shape = layer_norm::Shape {
        rows: ROWS,
        width: WIDTH,
    };
    let on = OnCust::new(&gpu, &stream)?;
    shape.forward::<bf16>(
        &on,
        layer_norm::Forward {
            x: on.input(&x)?,
            residual: None,
            weight: on.input(&weight)?,
            bias: on.input(&bias)?,
            y: on.output(&mut y)?,
            mean: on.output(&mut mean)?,
            rstd: on.output(&mut rstd)?,
            epsilon: 1e-5,
        },
    )?;
    stream.synchronize()?;
    println!("mean {:?}", mean.as_host_vec()?);
    let y: Vec<_> = y.as_host_vec()?.into_iter().map(bf16::from_bits).collect();
    println!("y    {:?} …", &y[..4]);

    // The other way round: memory of cudarc, read by cust.
    let stream = gpu.context().new_stream()?;
    let numbers = stream.clone_htod(&[1.0_f32, 2.0, 3.0])?;
    stream.synchronize()?;
    let mut found = [0.0_f32; 3];
    view(&numbers, &stream).copy_to(&mut found)?;
    println!("cust sees {found:?} in memory of cudarc");
    Ok(())
}
