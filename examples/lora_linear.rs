//! Queries, keys and values of two tasks in one batch: one weight, and for each task adapters of its own. Forward and
//! backward on a CUDA device, then a task's adapter merged into the weight.
//!
//! `cargo run --release --example lora_linear`; without a GPU it says so and ends well.

use std::error::Error;

use dtmem::ops::lora_linear::{
    Adapter, Backward, FactorGradients, Factors, Forward, Groups, Merge, Merging, Shape, Tasks,
};
use dtmem::ops::{self, Gpu};
use half::bf16;

const WIDTH: usize = 512;
const RANK: usize = 16;
const TASKS: usize = 2;
/// Of the three groups of rows, each of one task.
const LENGTHS: [usize; 3] = [100, 28, 200];
const ROWS: usize = 328;

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

    let adapters = [0, WIDTH, 2 * WIDTH].map(|output| Adapter {
        output,
        outputs: WIDTH,
        rank: RANK,
        scaling: 2.0,
    });
    let shape = Shape {
        rows: ROWS,
        inputs: WIDTH,
        outputs: 3 * WIDTH,
        transposed: false,
        adapters: &adapters,
        tasks: Some(Tasks {
            groups: LENGTHS.len(),
            sets: TASKS,
        }),
    };

    // The caller's memory. The first group is of task 1, the second has no adapter, the third is of task 0; A of task t
    // is (t + 1)/1000 everywhere, B is 1, the weight 0, x 1: so y is 2·512·16·(t + 1)/1000 for a row of task t.
    let ones = |len: usize| vec![bf16::ONE; len];
    let x = stream.clone_htod(&ones(ROWS * WIDTH))?;
    let weight = stream.alloc_zeros::<bf16>(3 * WIDTH * WIDTH)?;
    let a: Vec<_> = (0..TASKS * RANK * WIDTH)
        .map(|i| bf16::from_f32((i / (RANK * WIDTH) + 1) as f32 / 1000.0))
        .collect();
    let a = stream.clone_htod(&a)?;
    let b = stream.clone_htod(&ones(TASKS * WIDTH * RANK))?;
    let offsets = stream.clone_htod(&[0, 100, 128, 328])?;
    let sets = stream.clone_htod(&[1, -1, 0])?;
    let mut y = stream.alloc_zeros::<bf16>(ROWS * 3 * WIDTH)?;
    let mut kept = stream.alloc_zeros::<bf16>(ROWS * shape.ranks())?;

    let on = gpu.on(&stream)?;
    let factors = [(); 3].map(|()| Factors {
        a: on.input(&a),
        b: on.input(&b),
    });
    let groups = || {
        Some(Groups {
            offsets: on.input(&offsets),
            sets: on.input(&sets),
        })
    };
    shape.forward(
        &on,
        Forward {
            x: on.input(&x).rows(WIDTH),
            weight: on.input(&weight),
            bias: None,
            factors: &factors,
            groups: groups(),
            dropout: None,
            y: on.output(&mut y).rows(3 * WIDTH),
            accumulate: false,
            kept: on.output(&mut kept),
        },
    )?;
    let found = stream.clone_dtoh(&y)?;
    for (name, row) in [("task 1", 0), ("no task", 100), ("task 0", 128)] {
        println!("y of {name}: {:?} …", &found[row * 3 * WIDTH..][..4]);
    }

    // With y's gradient all ones, the gradients of A and B count the rows of each task.
    let dy = stream.clone_htod(&ones(ROWS * 3 * WIDTH))?;
    let mut dx = stream.alloc_zeros::<bf16>(ROWS * WIDTH)?;
    let factor_len = TASKS * RANK * WIDTH;
    let mut memory = [
        [
            stream.alloc_zeros(factor_len)?,
            stream.alloc_zeros(factor_len)?,
        ],
        [
            stream.alloc_zeros(factor_len)?,
            stream.alloc_zeros(factor_len)?,
        ],
        [
            stream.alloc_zeros(factor_len)?,
            stream.alloc_zeros(factor_len)?,
        ],
    ];
    let gradients = memory.each_mut().map(|[a, b]| FactorGradients {
        a: on.output(a),
        b: on.output(b),
    });
    let mut kept_gradient = stream.alloc_zeros::<bf16>(ROWS * shape.ranks())?;
    let mut workspace = stream.alloc_zeros(shape.workspace::<bf16>()?)?;
    shape.backward(
        &on,
        Backward {
            x: on.input(&x).rows(WIDTH),
            weight: on.input(&weight),
            factors: &factors,
            groups: groups(),
            dropout: None,
            kept: on.input(&kept),
            dy: on.input(&dy).rows(3 * WIDTH),
            dx: Some(on.output(&mut dx).rows(WIDTH)),
            accumulate: false,
            gradients: &gradients,
            kept_gradient: on.output(&mut kept_gradient),
            workspace: on.output(&mut workspace),
        },
    )?;
    drop(gradients);
    let da = stream.clone_dtoh(&memory[0][0])?;
    println!("dA of the tasks: {} and {}", da[0], da[RANK * WIDTH]);

    // For acting: the queries' weight of task 0 with its adapter, W kept as it is.
    let merge = Merge {
        rows: WIDTH,
        columns: WIDTH,
        rank: RANK,
    };
    let mut merged = stream.alloc_zeros::<bf16>(WIDTH * WIDTH)?;
    merge.run(
        &on,
        Merging {
            weight: on.input(&weight).slice(0..WIDTH * WIDTH)?.rows(WIDTH),
            a: on.input(&a).slice(0..RANK * WIDTH)?,
            b: on.input(&b).slice(0..WIDTH * RANK)?,
            scaling: 2.0,
            merged: on.output(&mut merged).rows(WIDTH),
        },
    )?;
    println!("merged {:?} …", &stream.clone_dtoh(&merged)?[..4]);
    Ok(())
}
