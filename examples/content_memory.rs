//! How model code carries a memory through an episode on a CUDA device: two segments of two packed sequences, forward,
//! and backward from the last segment to the first.
//!
//! `cargo run --release --example content_memory`; without a GPU it says so and ends well.

use std::error::Error;

use cudarc::driver::CudaSlice;
use dtmem::ops::content_memory::{
    Addressing, Backward, ContentMemory, Erase, Forward, Inputs, Order, Shape, Strength,
};
use dtmem::ops::{self, Gpu, OnStream};
use half::bf16;

const SEQUENCES: usize = 2;
const SEGMENTS: usize = 2;
const TOKENS: usize = 5;
const SLOTS: usize = 48;
const WIDTH: usize = 32;

/// What is the same in all segments here.
struct Same {
    cu_seqlens: CudaSlice<i32>,
    key_strength: CudaSlice<bf16>,
    strength_bias: CudaSlice<f32>,
}

impl Same {
    fn inputs<'a>(
        &'a self,
        on: &'a OnStream<'_>,
        memory: &'a CudaSlice<bf16>,
        rows: &'a CudaSlice<bf16>,
    ) -> Inputs<'a, bf16> {
        let [address_key, strength_key, value] = on.input(rows).rows(3 * WIDTH).columns([WIDTH; 3]);
        Inputs {
            memory: on.input(memory),
            address_key,
            strength_key,
            value,
            key_strength: Some(on.input(&self.key_strength)),
            strength_bias: Some(on.input(&self.strength_bias)),
            cu_seqlens: on.input(&self.cu_seqlens),
        }
    }
}

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

    // A segment has three tokens of the first sequence and two of the second.
    let shape = Shape {
        sequences: SEQUENCES,
        tokens: TOKENS,
        longest: 3,
        slots: SLOTS,
        key_width: WIDTH,
        width: WIDTH,
        variant: ContentMemory {
            addressing: Addressing::Cosine,
            strength: Strength::Sigmoid,
            erase: Erase::Coupled,
            order: Order::ReadThenWrite,
            top_k: None,
            scale: 1.0 / (WIDTH as f64).sqrt(),
            epsilon: 1e-6,
        },
    };
    let offsets = [0, 3, 5];
    shape.validate_offsets(&offsets)?;
    let wave = |len: usize, step: f32| -> Vec<bf16> {
        (0..len)
            .map(|i| bf16::from_f32((step * i as f32).sin()))
            .collect()
    };
    // Address key, strength key and value of each token, side by side as a projection leaves them.
    let rows = (0..SEGMENTS)
        .map(|n| stream.clone_htod(&wave(TOKENS * 3 * WIDTH, 1.0 + n as f32)))
        .collect::<Result<Vec<_>, _>>()?;
    let same = Same {
        cu_seqlens: stream.clone_htod(&offsets)?,
        key_strength: stream.clone_htod(&[bf16::from_f32(1.5); TOKENS])?,
        strength_bias: stream.clone_htod(&[0.0])?,
    };

    let on = gpu.on(&stream)?;
    // memories[n] is what segment n finds, memories[n + 1] what it leaves.
    let size = SEQUENCES * SLOTS * WIDTH;
    let mut memories: Vec<CudaSlice<bf16>> = vec![stream.clone_htod(&wave(size, 0.7))?];
    let mut workspace = stream.alloc_zeros(shape.forward_workspace::<bf16>()?)?;
    for rows in &rows {
        let mut next = stream.alloc_zeros(size)?;
        let mut read = stream.alloc_zeros(TOKENS * WIDTH)?;
        shape.forward(
            &on,
            Forward {
                inputs: same.inputs(&on, &memories[memories.len() - 1], rows),
                memory_next: on.output(&mut next),
                read: on.output(&mut read),
                workspace: on.output(&mut workspace),
            },
        )?;
        println!("read {:?} …", &stream.clone_dtoh(&read)?[..4]);
        memories.push(next);
    }

    // The loss is the sum of all reads; nobody looks at the last memory.
    let grad_read = stream.clone_htod(&[bf16::ONE; TOKENS * WIDTH])?;
    let mut grad_memory = stream.alloc_zeros::<bf16>(size)?;
    let mut d_strength_bias = stream.alloc_zeros::<f32>(1)?;
    let mut workspace = stream.alloc_zeros(shape.backward_workspace()?)?;
    for (memory, rows) in memories.iter().zip(&rows).rev() {
        let mut d_memory = stream.alloc_zeros(size)?;
        let mut d_rows = stream.alloc_zeros::<bf16>(TOKENS * 3 * WIDTH)?;
        let mut d_key_strength = stream.alloc_zeros::<bf16>(TOKENS)?;
        let [d_address_key, d_strength_key, d_value] =
            on.output(&mut d_rows).rows(3 * WIDTH).columns([WIDTH; 3]);
        shape.backward(
            &on,
            Backward {
                inputs: same.inputs(&on, memory, rows),
                grad_memory_next: on.input(&grad_memory),
                grad_read: on.input(&grad_read),
                d_memory: on.output(&mut d_memory),
                d_address_key,
                d_strength_key,
                d_value,
                d_key_strength: Some(on.output(&mut d_key_strength)),
                d_strength_bias: Some(on.output(&mut d_strength_bias)),
                workspace: on.output(&mut workspace),
            },
        )?;
        grad_memory = d_memory;
    }
    println!(
        "d initial memory {:?} …",
        &stream.clone_dtoh(&grad_memory)?[..4]
    );
    println!(
        "d strength bias  {:?}",
        stream.clone_dtoh(&d_strength_bias)?
    );
    Ok(())
}
