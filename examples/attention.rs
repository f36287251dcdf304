//! How model code calls attention on a CUDA device: two packed sequences, q, k and v in one matrix as a projection
//! leaves them, and one head that is taught by the memory loss where to look; forward and backward.
//!
//! `cargo run --release --example attention`; without a GPU it says so and ends well.

use std::error::Error;

use dtmem::ops::attention::{
    Backward, Denominator, Forward, Mask, MemoryLoss, MemoryLossGradient, Pack, Shape, Supervision,
};
use dtmem::ops::{self, Gpu};
use dtmem_reference::attention as reference;
use half::bf16;

const TOKENS: usize = 10;
const HEADS: usize = 2;
const WIDTH: usize = 64;
const SCALE: f32 = 0.125;
/// λ
const GRAD_LOSS: f32 = 10.0;

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
        sequences: 2,
        queries: TOKENS,
        keys: TOKENS,
        heads: HEADS,
        key_heads: HEADS,
        width: WIDTH,
        mask: Mask::Causal,
    };
    // Sequences of 4 and of 6 tokens. The last token of each should recall the first one, in head 0.
    let cu_seqlens = [0, 4, 10];
    let pair_offsets = [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2];
    let pair_keys = [0, 0];
    let annotated = [1_u8, 1];
    let supervised = [0];
    // The kernels trust what is uploaded, so it is checked here.
    shape.validate_pack(&reference::Attention {
        cu_seqlens_q: &cu_seqlens,
        cu_seqlens_k: &cu_seqlens,
        scale: SCALE.into(),
        mask: reference::Mask::Causal,
        supervision: Some(reference::Supervision {
            heads: &supervised,
            pair_offsets: &pair_offsets,
            pair_keys: &pair_keys,
            annotated: &annotated,
            denominator: Denominator::Square,
        }),
    })?;
    let cu_seqlens = stream.clone_htod(&cu_seqlens)?;
    let pair_offsets = stream.clone_htod(&pair_offsets)?;
    let pair_keys = stream.clone_htod(&pair_keys)?;
    let annotated = stream.clone_htod(&annotated)?;
    let slots = stream.clone_htod(&shape.slots(&supervised))?;

    // [tokens, q | k | v]: three matrices side by side.
    let row = HEADS * WIDTH;
    let qkv: Vec<bf16> = (0..TOKENS * 3 * row)
        .map(|i| bf16::from_f32((i as f32).sin()))
        .collect();
    let qkv = stream.clone_htod(&qkv)?;
    let mut out = stream.alloc_zeros::<bf16>(TOKENS * row)?;
    let mut lse = stream.alloc_zeros(TOKENS * HEADS)?;
    let [mut sum, mut loss, mut factor] = [
        stream.alloc_zeros(1)?,
        stream.alloc_zeros(1)?,
        stream.alloc_zeros(1)?,
    ];
    let mut peak = stream.alloc_zeros(TOKENS)?;
    let [mut shift, mut at_peak, mut row_loss] = [
        stream.alloc_zeros(TOKENS)?,
        stream.alloc_zeros(TOKENS)?,
        stream.alloc_zeros(TOKENS)?,
    ];

    let on = gpu.on(&stream)?;
    let pack = || Pack {
        cu_seqlens_q: on.input(&cu_seqlens),
        cu_seqlens_k: on.input(&cu_seqlens),
        groups: None,
    };
    let supervision = || Supervision {
        heads: 1,
        slots: on.input(&slots),
        annotated: on.input(&annotated),
        pair_offsets: on.input(&pair_offsets),
        pair_keys: on.input(&pair_keys),
    };
    let [q, k, v] = on.input(&qkv).rows(3 * row).columns([row; 3]);
    shape.forward(
        &on,
        Forward {
            q,
            k,
            v,
            pack: pack(),
            scale: SCALE,
            out: on.output(&mut out).rows(row),
            lse: on.output(&mut lse),
            memory_loss: Some(MemoryLoss {
                supervision: supervision(),
                denominator: Denominator::Square,
                sum: on.output(&mut sum),
                loss: on.output(&mut loss),
                factor: on.output(&mut factor),
                peak: on.output(&mut peak),
                shift: on.output(&mut shift),
                at_peak: on.output(&mut at_peak),
                row_loss: on.output(&mut row_loss),
            }),
        },
    )?;
    println!("out {:?} …", &stream.clone_dtoh(&out)?[..4]);
    println!("memory loss {:?}", stream.clone_dtoh(&loss)?);

    // No gradient but that of the memory loss: it moves the queries and keys of head 0.
    let grad_out = stream.alloc_zeros::<bf16>(TOKENS * row)?;
    let grad_loss = stream.clone_htod(&[GRAD_LOSS])?;
    let mut gradients = stream.alloc_zeros::<bf16>(TOKENS * 3 * row)?;
    let mut workspace = stream.alloc_zeros(shape.workspace()?)?;
    let [q, k, v] = on.input(&qkv).rows(3 * row).columns([row; 3]);
    let [dq, dk, dv] = on.output(&mut gradients).rows(3 * row).columns([row; 3]);
    shape.backward(
        &on,
        Backward {
            q,
            k,
            v,
            pack: pack(),
            scale: SCALE,
            out: on.input(&out).rows(row),
            lse: on.input(&lse),
            grad_out: on.input(&grad_out).rows(row),
            memory_loss: Some(MemoryLossGradient {
                supervision: supervision(),
                grad_loss: on.input(&grad_loss),
                factor: on.input(&factor),
                peak: on.input(&peak),
                shift: on.input(&shift),
                at_peak: on.input(&at_peak),
            }),
            dq,
            dk,
            dv,
            workspace: on.output(&mut workspace),
        },
    )?;
    let gradients = stream.clone_dtoh(&gradients)?;
    let last = &gradients[(TOKENS - 1) * 3 * row..];
    println!("dq of the last token, head 0: {:?} …", &last[..4]);
    println!(
        "dq of the last token, head 1: {:?} …",
        &last[WIDTH..WIDTH + 4]
    );
    Ok(())
}
