//! How model code puts the tokens of a packed batch together on a CUDA device, and takes their gradients apart again.
//!
//! `cargo run --release --example tokens`; without a GPU it says so and ends well.

use std::error::Error;

use dtmem::ops::tokens::{Assemble, Part, PositionGradient, Shape, TakeApart, by_time_step};
use dtmem::ops::{self, Gpu};

const WIDTH: usize = 4;
const STEPS: usize = 2;
/// o₀ a₀ o₁ a₁ of one sequence, o₀ of another, and a token of padding: 0 observation, 1 action, 3 nothing.
const KINDS: [u8; 6] = [0, 1, 0, 1, 0, 3];
const ROWS: [i32; 6] = [0, 0, 1, 1, 2, -1];
const TIMES: [i32; 6] = [0, 0, 1, 1, 0, -1];
const OBSERVATION_TOKENS: [i32; 3] = [0, 2, 4];
const ACTION_TOKENS: [i32; 2] = [1, 3];

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
        tokens: KINDS.len(),
        observations: OBSERVATION_TOKENS.len(),
        actions: ACTION_TOKENS.len(),
        returns: 0,
        steps: STEPS,
        width: WIDTH,
    };
    let kinds = stream.clone_htod(&KINDS)?;
    let [rows, times] = [stream.clone_htod(&ROWS)?, stream.clone_htod(&TIMES)?];
    let observations = stream.clone_htod(&[1.0_f32; 3 * WIDTH])?;
    let actions = stream.clone_htod(&[2.0_f32; 2 * WIDTH])?;
    // The second of them is 0.5 everywhere.
    let positions: Vec<_> = (0..STEPS * WIDTH)
        .map(|i| (i / WIDTH) as f32 / 2.0)
        .collect();
    let positions = stream.clone_htod(&positions)?;
    let mut out = stream.alloc_zeros::<f32>(KINDS.len() * WIDTH)?;

    let on = gpu.on(&stream)?;
    shape.assemble(
        &on,
        Assemble {
            kinds: on.input(&kinds),
            rows: on.input(&rows),
            times: on.input(&times),
            observations: on.input(&observations),
            actions: on.input(&actions),
            returns: None,
            positions: on.input(&positions),
            out: on.output(&mut out),
        },
    )?;
    for row in stream.clone_dtoh(&out)?.chunks(WIDTH) {
        println!("token          {row:?}");
    }

    // As if the gradient were the tokens themselves.
    let observation_tokens = stream.clone_htod(&OBSERVATION_TOKENS)?;
    let action_tokens = stream.clone_htod(&ACTION_TOKENS)?;
    let mut dobservations = stream.alloc_zeros::<f32>(3 * WIDTH)?;
    let mut dactions = stream.alloc_zeros::<f32>(2 * WIDTH)?;
    shape.take_apart(
        &on,
        TakeApart {
            dout: on.input(&out),
            observations: Part {
                tokens: on.input(&observation_tokens),
                gradient: on.output(&mut dobservations),
            },
            actions: Part {
                tokens: on.input(&action_tokens),
                gradient: on.output(&mut dactions),
            },
            returns: None,
        },
    )?;
    println!("dobservations  {:?}", stream.clone_dtoh(&dobservations)?);
    println!("dactions       {:?}", stream.clone_dtoh(&dactions)?);

    let (step_offsets, step_tokens) = by_time_step(&TIMES, STEPS);
    let step_offsets = stream.clone_htod(&step_offsets)?;
    let step_tokens = stream.clone_htod(&step_tokens)?;
    let mut dpositions = stream.alloc_zeros::<f32>(STEPS * WIDTH)?;
    shape.position_gradient(
        &on,
        PositionGradient {
            dout: on.input(&out),
            step_offsets: on.input(&step_offsets),
            step_tokens: on.input(&step_tokens),
            dpositions: on.output(&mut dpositions),
        },
    )?;
    println!("dpositions     {:?}", stream.clone_dtoh(&dpositions)?);
    Ok(())
}
