//! Attention over a pack of sequences, with the attention-BCE (memory) loss. Kernels and equations:
//! `kernels/attention_forward.cu`, `kernels/attention_backward.cu`, for compute capability 9.0 also
//! `kernels/attention_hopper.cu`, `kernels/attention_backward_hopper.cu`; definition: `dtmem_reference::attention`,
//! SPEC section 3.
//!
//! Offsets, pairs and groups lie in device memory: [`Shape::validate_pack`] checks them on the host, before they are
//! uploaded. No launch depends on their content, so that a CUDA graph can be replayed with those of the next batch.

use dtmem_reference::attention as reference;

pub use dtmem_reference::attention::Denominator;

use super::launch::{Arg, Launch, Launcher, Version, blocks, launch_first_possible};
use super::memory::{
    Check, Home, Input, Output, Rows, Span, Storage, for_each_type, kernel_for, span_or_null,
};
use super::{Error, Result};

const FORWARD: &str = "attention_forward";
const HOPPER: &str = "attention_hopper";
const BACKWARD: &str = "attention_backward";
const BACKWARD_HOPPER: &str = "attention_backward_hopper";
const THREADS: u32 = 128;
const WARPS: usize = 4;
/// Tiles of the other side that a block holds: one is worked on while the next is copied.
const STAGES: usize = 2;
/// Threads of a warpgroup, and the queries that it multiplies, in the version for Hopper.
const GROUP_THREADS: u32 = 128;
const GROUP_ROWS: usize = 64;
/// Keys of a tile there.
const HOPPER_KEYS: usize = 128;
/// Bytes of a barrier there: one for the queries, and two for each tile of keys or values that a block has room for.
const BARRIER_BYTES: usize = 8;
/// Of a block of the gradients for Hopper: two warpgroups.
const HOPPER_THREADS: u32 = 256;
/// Queries of that block, or keys in the key gradient.
const HOPPER_ROWS: usize = 128;
/// Rows of the other side's tiles in the gradients.
const HOPPER_OTHERS: usize = 64;
/// Of which a block holds three there: the sums of one are under way while the next is worked on and a third is copied.
const HOPPER_STAGES: usize = 3;
/// Bytes of shared memory for the run of keys that a query sees.
const RUN_BYTES: usize = 8;
/// The same of the key gradient, for what it knows of the queries.
const HOPPER_QUERIES: u32 = 9216;
const LOSS_THREADS: u32 = 1024;
/// Widths of a head. The kernels copy heads by vectors of 16 bytes.
pub const WIDTHS: [usize; 5] = [16, 32, 64, 128, 256];
const VECTOR_BYTES: usize = 16;
const MAX_HEADS: usize = 65535;
/// So that blocks, at most one for each token and one for each sequence, have 32-bit numbers.
const MAX_TOKENS: usize = 1 << 30;

/// The names of a kernel that is there for each width and type.
macro_rules! for_each_width {
    ($stem:literal) => {
        [
            for_each_type!($stem, "_16"),
            for_each_type!($stem, "_32"),
            for_each_type!($stem, "_64"),
            for_each_type!($stem, "_128"),
            for_each_type!($stem, "_256"),
        ]
    };
}

/// Those for Hopper.
macro_rules! for_each_hopper_width {
    ($stem:literal) => {
        [for_each_type!($stem, "_64"), for_each_type!($stem, "_128")]
    };
}

/// A pack of sequences with the attention of one layer on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Up to 2³⁰.
    pub sequences: usize,
    /// Query tokens of all sequences, up to 2³⁰.
    pub queries: usize,
    /// Key tokens of all sequences, up to 2³⁰. The queries of a sequence stand at the end of its keys.
    pub keys: usize,
    /// Query heads, up to 65535.
    pub heads: usize,
    /// Key heads, of which `heads` is a multiple: query head h uses key head h·key_heads/heads.
    pub key_heads: usize,
    /// Of a head: 16, 32, 64, 128 or 256.
    pub width: usize,
    /// Which keys a query sees.
    pub mask: Mask,
}

/// Which keys a query sees inside of its own sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// Every key (bidirectional).
    None,
    /// Keys at or before the query's position.
    Causal,
    /// The query's own position and the `window − 1` before it.
    SlidingWindow {
        /// 1 to 2³¹ − 1.
        window: usize,
    },
    /// Keys of the query's own group and of groups before it: [`Pack::groups`].
    GroupedCausal,
}

/// Where sequences begin.
#[derive(Debug)]
pub struct Pack<'a> {
    /// Offsets of the sequences in q [sequences + 1], from 0.
    pub cu_seqlens_q: Input<'a, i32>,
    /// Offsets of the sequences in k and v [sequences + 1], from 0; may be the same memory.
    pub cu_seqlens_k: Input<'a, i32>,
    /// With [`Mask::GroupedCausal`], and only then: the group of each key token \[keys\], not decreasing inside of a
    /// sequence.
    pub groups: Option<Input<'a, i32>>,
}

/// What the memory loss wants heads to attend to.
#[derive(Debug)]
pub struct Supervision<'a> {
    /// How many heads are supervised, at least 1.
    pub heads: usize,
    /// Of each query head: its place among the supervised ones, or −1 \[heads\]. See [`Shape::slots`].
    pub slots: Input<'a, i32>,
    /// Of each sequence: 1 takes part, 0 does not \[sequences\].
    pub annotated: Input<'a, u8>,
    /// CSR offsets of the pairs of each query token [queries + 1], from 0.
    pub pair_offsets: Input<'a, i32>,
    /// Keys of the pairs, relative to the start of the sequence, ascending for each query; as many as
    /// `pair_offsets` says, or more.
    pub pair_keys: Input<'a, i32>,
}

/// The tensors of out = softmax(scale·q·kᵀ)·v. Rows of matrices begin at multiples of 16 bytes.
#[derive(Debug)]
pub struct Forward<'a, T> {
    /// [queries, heads·width]
    pub q: Rows<Input<'a, T>>,
    /// [keys, key_heads·width]
    pub k: Rows<Input<'a, T>>,
    /// [keys, key_heads·width]
    pub v: Rows<Input<'a, T>>,
    /// Where sequences begin.
    pub pack: Pack<'a>,
    /// Factor of the scores.
    pub scale: f32,
    /// [queries, heads·width]; 0 where a query sees no key.
    pub out: Rows<Output<'a, T>>,
    /// log Σ exp of the scores, kept for the backward pass [queries, heads]; −∞ where a query sees no key.
    pub lse: Output<'a, f32>,
    /// The memory loss, if this layer has one.
    pub memory_loss: Option<MemoryLoss<'a>>,
}

/// The tensors of the memory loss, S supervised heads.
#[derive(Debug)]
pub struct MemoryLoss<'a> {
    /// The pairs.
    pub supervision: Supervision<'a>,
    /// What the sum is divided by.
    pub denominator: Denominator,
    /// Sum of the losses of all rows \[1\].
    pub sum: Output<'a, f32>,
    /// The sum divided \[1\]; 0 where nothing is annotated.
    pub loss: Output<'a, f32>,
    /// 1/divisor, kept for the backward pass \[1\]; 0 where nothing is annotated.
    pub factor: Output<'a, f32>,
    /// Key of the largest weight of each row, kept for the backward pass [queries, S].
    pub peak: Output<'a, i32>,
    /// Kept for the backward pass [queries, S].
    pub shift: Output<'a, f32>,
    /// Kept for the backward pass [queries, S].
    pub at_peak: Output<'a, f32>,
    /// Loss of each row, before it is divided [queries, S].
    pub row_loss: Output<'a, f32>,
}

/// The tensors of the gradients of Σ grad_out·out + grad_loss·loss. Rows of matrices begin at multiples of 16 bytes.
#[derive(Debug)]
pub struct Backward<'a, T> {
    /// [queries, heads·width]
    pub q: Rows<Input<'a, T>>,
    /// [keys, key_heads·width]
    pub k: Rows<Input<'a, T>>,
    /// [keys, key_heads·width]
    pub v: Rows<Input<'a, T>>,
    /// Where sequences begin.
    pub pack: Pack<'a>,
    /// Factor of the scores.
    pub scale: f32,
    /// What the forward pass gave [queries, heads·width].
    pub out: Rows<Input<'a, T>>,
    /// What the forward pass gave [queries, heads].
    pub lse: Input<'a, f32>,
    /// [queries, heads·width]
    pub grad_out: Rows<Input<'a, T>>,
    /// The memory loss, if the forward pass had one.
    pub memory_loss: Option<MemoryLossGradient<'a>>,
    /// Overwritten [queries, heads·width]; with dk and dv it may be columns of one matrix.
    pub dq: Rows<Output<'a, T>>,
    /// Overwritten [keys, key_heads·width].
    pub dk: Rows<Output<'a, T>>,
    /// Overwritten [keys, key_heads·width].
    pub dv: Rows<Output<'a, T>>,
    /// At least [`Shape::workspace`] elements, of any content.
    pub workspace: Output<'a, f32>,
}

/// What the backward pass knows of the memory loss, S supervised heads.
#[derive(Debug)]
pub struct MemoryLossGradient<'a> {
    /// The pairs.
    pub supervision: Supervision<'a>,
    /// Gradient of the loss, λ times any loss scale \[1\].
    pub grad_loss: Input<'a, f32>,
    /// What the forward pass gave \[1\].
    pub factor: Input<'a, f32>,
    /// What the forward pass gave [queries, S].
    pub peak: Input<'a, i32>,
    /// What the forward pass gave [queries, S].
    pub shift: Input<'a, f32>,
    /// What the forward pass gave [queries, S].
    pub at_peak: Input<'a, f32>,
}

/// A version of a kernel for a shape.
struct Kernel {
    /// Family and kernel.
    names: (&'static str, &'static str),
    /// Queries that a block owns, or keys in the key gradient.
    rows: usize,
    threads: u32,
    shared_bytes: u32,
}

impl Kernel {
    /// With blocks of these numbers of tiles and heads.
    fn launch<'a, const N: usize>(
        &self,
        shape: &Shape,
        [tokens, heads]: [usize; 2],
        home: Home,
        args: [Arg; N],
    ) -> Launch<'a> {
        // Enough for the tokens of all sequences, wherever these begin.
        let tiles = (tokens / self.rows + shape.sequences) as u32;
        let launch = Launch::new(
            self.names,
            [tiles, heads as u32, 1],
            [self.threads, 1, 1],
            self.shared_bytes,
            home,
            args,
        );
        match self.names.0 {
            HOPPER | BACKWARD_HOPPER => launch.for_hopper(),
            _ => launch,
        }
    }
}

impl Shape {
    /// Errors: sequences, tokens, heads, width or window beyond their bounds, heads that are no multiple of key_heads.
    pub fn validate(&self) -> Result<()> {
        for (argument, found) in [
            ("sequences", self.sequences),
            ("queries", self.queries),
            ("keys", self.keys),
        ] {
            if found > MAX_TOKENS {
                let expected = format_args!("at most {MAX_TOKENS}");
                return Err(Error::value(argument, found, expected));
            }
        }
        if !(1..=MAX_HEADS).contains(&self.heads) {
            let expected = format_args!("1 to {MAX_HEADS}");
            return Err(Error::value("heads", self.heads, expected));
        }
        if self.key_heads == 0 || !self.heads.is_multiple_of(self.key_heads) {
            let expected = format_args!("a divisor of the {} query heads", self.heads);
            return Err(Error::value("key_heads", self.key_heads, expected));
        }
        if !WIDTHS.contains(&self.width) {
            let expected = format_args!("one of {WIDTHS:?}, of each head");
            return Err(Error::value("width", self.width, expected));
        }
        match self.mask {
            Mask::SlidingWindow { window } if window == 0 || i32::try_from(window).is_err() => {
                Err(Error::value("window", window, "1 to 2^31 - 1"))
            }
            _ => Ok(()),
        }
    }

    /// Checks on the host what the device's arrays are to hold: offsets that begin at 0, do not decrease and end at the
    /// number of tokens, no sequence with more queries than keys, groups that do not decrease, pairs in ascending
    /// order of keys that their queries see (no forward ones), heads that exist. O(tokens + pairs).
    ///
    /// Errors: those of [`validate`](Self::validate), and what does not hold.
    pub fn validate_pack(&self, pack: &reference::Attention<'_>) -> Result<()> {
        self.validate()?;
        let mask = match pack.mask {
            reference::Mask::None => Mask::None,
            reference::Mask::Causal => Mask::Causal,
            reference::Mask::SlidingWindow { window } => Mask::SlidingWindow { window },
            reference::Mask::GroupedCausal { .. } => Mask::GroupedCausal,
        };
        if mask != self.mask {
            let [found, expected] = [mask, self.mask].map(|mask| format!("{mask:?}"));
            return Err(Error::value("mask", found, expected));
        }
        let sequences = pack.cu_seqlens_q.len().saturating_sub(1);
        if sequences != self.sequences {
            return Err(Error::Length {
                argument: "cu_seqlens_q",
                found: pack.cu_seqlens_q.len(),
                expected: self.sequences + 1,
            });
        }
        let q = [self.queries, self.heads, self.width];
        let k = [self.keys, self.key_heads, self.width];
        Ok(pack.validate(&q, &k)?)
    }

    /// [`Supervision::slots`] of these supervised heads.
    pub fn slots(&self, supervised: &[usize]) -> Vec<i32> {
        let slot = |head| supervised.iter().position(|&other| other == head);
        (0..self.heads)
            .map(|head| slot(head).map_or(-1, |slot| slot as i32))
            .collect()
    }

    /// f32 elements of the workspace of the backward pass: queries·heads.
    pub fn workspace(&self) -> Result<usize> {
        self.validate()?;
        Ok(self.rows_of_heads())
    }

    /// out, lse and the memory loss ← q, k, v: one launch, or two with a memory loss. Errors: those of
    /// [`plan_forward`](Self::plan_forward) and of the launcher.
    pub fn forward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Forward<'_, T>,
    ) -> Result<()> {
        self.forward_by(Version::default(), launcher, tensors)
    }

    /// The same by this version, where there is one for the shape and type (for Hopper: bf16 and f16, widths 64 and
    /// 128) and the GPU has it; otherwise by the portable one.
    pub fn forward_by<T: Storage>(
        &self,
        version: Version,
        launcher: &impl Launcher,
        tensors: Forward<'_, T>,
    ) -> Result<()> {
        launch_first_possible(launcher, &self.plan_forward_by(version, &tensors)?, || {
            self.plan_forward(&tensors)
        })
    }

    /// What [`forward`](Self::forward) launches by the version that every GPU has; the second for the memory loss.
    /// Errors: shape, sizes, alignment, overlaps, scale.
    pub fn plan_forward<'a, T: Storage>(
        &self,
        tensors: &'a Forward<'_, T>,
    ) -> Result<[Option<Launch<'a>>; 2]> {
        self.plan_forward_by(Version::Portable, tensors)
    }

    /// The same by this version, or by the portable one where this one has no kernel for the shape and type. Errors:
    /// those of [`plan_forward`](Self::plan_forward).
    pub fn plan_forward_by<'a, T: Storage>(
        &self,
        version: Version,
        tensors: &'a Forward<'_, T>,
    ) -> Result<[Option<Launch<'a>>; 2]> {
        self.validate()?;
        let mut check = Check::new();
        self.check_inputs(&mut check, &tensors.q, &tensors.k, &tensors.v)?;
        self.check_pack(&mut check, &tensors.pack)?;
        check_scale(tensors.scale)?;
        check.output_rows("out", &tensors.out, self.of_queries(), VECTOR_BYTES)?;
        check.output("lse", &tensors.lse, self.rows_of_heads(), 1)?;
        let memory_loss = tensors.memory_loss.as_ref();
        if let Some(loss) = memory_loss {
            self.check_supervision(&mut check, &loss.supervision)?;
            let rows = self.queries * loss.supervision.heads;
            check.output("sum", &loss.sum, 1, 1)?;
            check.output("loss", &loss.loss, 1, 1)?;
            check.output("factor", &loss.factor, 1, 1)?;
            check.output("peak", &loss.peak, rows, 1)?;
            check.output("shift", &loss.shift, rows, 1)?;
            check.output("at_peak", &loss.at_peak, rows, 1)?;
            check.output("row_loss", &loss.row_loss, rows, 1)?;
        }
        let home = check.disjoint(&[])?;

        let [mask, window] = self.mask();
        let [cu_seqlens_q, cu_seqlens_k, groups] = pack_args(&tensors.pack);
        let supervision = memory_loss.map(|loss| &loss.supervision);
        let written = memory_loss.map_or([Span::NULL; 4], |loss| {
            let [shift, at_peak, row_loss] =
                [&loss.shift, &loss.at_peak, &loss.row_loss].map(Output::span);
            [loss.peak.span(), shift, at_peak, row_loss]
        });
        let kernel = match version {
            Version::Portable => self.portable::<T>(supervision),
            Version::Hopper => self
                .hopper::<T>(supervision)
                .unwrap_or_else(|| self.portable::<T>(supervision)),
        };
        let attention = kernel
            .launch(
                self,
                [self.queries, self.heads],
                home,
                [
                    Arg::Input(tensors.q.span(self.of_queries())),
                    Arg::Input(tensors.k.span(self.of_keys())),
                    Arg::Input(tensors.v.span(self.of_keys())),
                    Arg::Output(tensors.out.span(self.of_queries())),
                    Arg::Output(tensors.lse.span()),
                    cu_seqlens_q,
                    cu_seqlens_k,
                    groups,
                ],
            )
            .and(supervision_args(supervision))
            .and(written.map(Arg::Output))
            .and(self.sizes(supervision))
            .and([
                tensors.q.stride(),
                tensors.k.stride(),
                tensors.v.stride(),
                tensors.out.stride(),
                mask,
                window,
                Arg::F32(tensors.scale),
            ]);
        let attention = match kernel.names.0 {
            HOPPER => attention.and([
                tensors.q.map(self.of_queries(), kernel.rows),
                tensors.k.map(self.of_keys(), HOPPER_KEYS),
                tensors.v.map(self.of_keys(), HOPPER_KEYS),
            ]),
            _ => attention,
        };
        let loss = memory_loss.map(|loss| {
            Launch::new(
                (FORWARD, "attention_loss"),
                [1, 1, 1],
                [LOSS_THREADS, 1, 1],
                0,
                home,
                [
                    Arg::Input(loss.row_loss.span()),
                    cu_seqlens_q,
                    cu_seqlens_k,
                    groups,
                    Arg::Input(loss.supervision.annotated.span()),
                    Arg::Output(loss.sum.span()),
                    Arg::Output(loss.loss.span()),
                    Arg::Output(loss.factor.span()),
                    Arg::I32(self.sequences as i32),
                    Arg::I32(loss.supervision.heads as i32),
                    mask,
                    window,
                    Arg::I32((loss.denominator == Denominator::Square).into()),
                ],
            )
        });
        Ok([Some(attention), loss])
    }

    /// dq, dk, dv ← grad_out and the gradient of the memory loss: three launches. Errors: those of
    /// [`plan_backward`](Self::plan_backward) and of the launcher.
    pub fn backward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Backward<'_, T>,
    ) -> Result<()> {
        self.backward_by(Version::default(), launcher, tensors)
    }

    /// The same with the gradients by this version, as [`forward_by`](Self::forward_by).
    pub fn backward_by<T: Storage>(
        &self,
        version: Version,
        launcher: &impl Launcher,
        tensors: Backward<'_, T>,
    ) -> Result<()> {
        let plan = self.plan_backward_by(version, &tensors)?.map(Some);
        launch_first_possible(launcher, &plan, || {
            Ok(self.plan_backward(&tensors)?.map(Some))
        })
    }

    /// What [`backward`](Self::backward) launches by the version that every GPU has. Errors: shape, sizes, alignment,
    /// overlaps, scale.
    pub fn plan_backward<'a, T: Storage>(
        &self,
        tensors: &'a Backward<'_, T>,
    ) -> Result<[Launch<'a>; 3]> {
        self.plan_backward_by(Version::Portable, tensors)
    }

    /// The same by this version, or by the portable one where this one has no kernels for the shape and type. Errors:
    /// those of [`plan_backward`](Self::plan_backward).
    pub fn plan_backward_by<'a, T: Storage>(
        &self,
        version: Version,
        tensors: &'a Backward<'_, T>,
    ) -> Result<[Launch<'a>; 3]> {
        self.validate()?;
        let rows = self.rows_of_heads();
        let mut check = Check::new();
        self.check_inputs(&mut check, &tensors.q, &tensors.k, &tensors.v)?;
        self.check_pack(&mut check, &tensors.pack)?;
        check_scale(tensors.scale)?;
        check.input_rows("out", &tensors.out, self.of_queries(), VECTOR_BYTES)?;
        check.input("lse", &tensors.lse, rows, 1)?;
        check.input_rows(
            "grad_out",
            &tensors.grad_out,
            self.of_queries(),
            VECTOR_BYTES,
        )?;
        let memory_loss = tensors.memory_loss.as_ref();
        if let Some(loss) = memory_loss {
            self.check_supervision(&mut check, &loss.supervision)?;
            let rows = self.queries * loss.supervision.heads;
            check.input("grad_loss", &loss.grad_loss, 1, 1)?;
            check.input("factor", &loss.factor, 1, 1)?;
            check.input("peak", &loss.peak, rows, 1)?;
            check.input("shift", &loss.shift, rows, 1)?;
            check.input("at_peak", &loss.at_peak, rows, 1)?;
        }
        check.output_rows("dq", &tensors.dq, self.of_queries(), VECTOR_BYTES)?;
        check.output_rows("dk", &tensors.dk, self.of_keys(), VECTOR_BYTES)?;
        check.output_rows("dv", &tensors.dv, self.of_keys(), VECTOR_BYTES)?;
        check.workspace("workspace", &tensors.workspace, rows)?;
        let home = check.disjoint(&[])?;

        let out = tensors.out.span(self.of_queries());
        let grad_out = tensors.grad_out.span(self.of_queries());
        let delta = tensors.workspace.span();
        let deltas = Launch::new(
            (BACKWARD, kernel_for::<T>(for_each_type!("attention_delta"))),
            [blocks("queries·heads", rows, WARPS)?, 1, 1],
            [THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(grad_out),
                Arg::Input(out),
                Arg::Output(delta),
                Arg::I32(self.queries as i32),
                Arg::I32(self.heads as i32),
                Arg::I32(self.width as i32),
                tensors.grad_out.stride(),
                tensors.out.stride(),
            ],
        );

        let [mask, window] = self.mask();
        let supervision = memory_loss.map(|loss| &loss.supervision);
        let read = memory_loss.map_or([Span::NULL; 5], |loss| {
            let [shift, at_peak, factor, grad_loss] =
                [&loss.shift, &loss.at_peak, &loss.factor, &loss.grad_loss].map(Input::span);
            [loss.peak.span(), shift, at_peak, factor, grad_loss]
        });
        let [query_kernel, key_kernel] = match version {
            Version::Portable => self.portable_gradients::<T>(supervision),
            Version::Hopper => self
                .hopper_gradients::<T>(supervision)
                .unwrap_or_else(|| self.portable_gradients::<T>(supervision)),
        };
        let gradient = |kernel: Kernel, blocks| {
            let inputs = [
                Arg::Input(tensors.q.span(self.of_queries())),
                Arg::Input(tensors.k.span(self.of_keys())),
                Arg::Input(tensors.v.span(self.of_keys())),
                Arg::Input(grad_out),
                Arg::Input(tensors.lse.span()),
                Arg::Input(delta),
            ];
            kernel
                .launch(self, blocks, home, inputs)
                .and(pack_args(&tensors.pack))
                .and(supervision_args(supervision))
                .and(read.map(Arg::Input))
        };
        let sizes = |launch: Launch<'a>| {
            launch.and(self.sizes(supervision)).and([
                tensors.q.stride(),
                tensors.k.stride(),
                tensors.v.stride(),
                tensors.grad_out.stride(),
            ])
        };
        let numbers = [mask, window, Arg::F32(tensors.scale)];

        let launch = gradient(query_kernel, [self.queries, self.heads])
            .and([Arg::Output(tensors.dq.span(self.of_queries()))]);
        let query_gradient = sizes(launch).and([tensors.dq.stride()]).and(numbers);

        let launch = gradient(key_kernel, [self.keys, self.key_heads])
            .and([&tensors.dk, &tensors.dv].map(|x| Arg::Output(x.span(self.of_keys()))));
        let key_gradient = sizes(launch)
            .and([tensors.dk.stride(), tensors.dv.stride()])
            .and(numbers);
        Ok([deltas, query_gradient, key_gradient])
    }

    fn portable<T: Storage>(&self, supervision: Option<&Supervision<'_>>) -> Kernel {
        let rows = self.rows::<T>();
        let keys = match self.row_bytes::<T>() {
            ..=256 => 64,
            257..=512 => 32,
            _ => 16,
        };
        let kernel = self.kernel::<T>(match supervision {
            None => for_each_width!("attention_forward"),
            Some(_) => for_each_width!("attention_forward_bce"),
        });
        Kernel {
            names: (FORWARD, kernel),
            rows,
            threads: THREADS,
            shared_bytes: self.shared_bytes::<T>(rows + 2 * STAGES * keys),
        }
    }

    /// Place among the widths that there are kernels for Hopper for; `None` for other widths and types.
    fn hopper_width<T>(&self) -> Option<usize> {
        let of_two_bytes = size_of::<T>() == 2;
        let width = [64, 128].into_iter().position(|width| width == self.width);
        width.filter(|_| of_two_bytes)
    }

    fn hopper<T: Storage>(&self, supervision: Option<&Supervision<'_>>) -> Option<Kernel> {
        let width = self.hopper_width::<T>()?;
        let names = match supervision {
            None => for_each_hopper_width!("attention_hopper"),
            Some(_) => for_each_hopper_width!("attention_hopper_bce"),
        };
        // Warpgroups that multiply (one more copies), and tiles of keys that there is room for, and of values.
        let (groups, tiles) = [(3, 4), (2, 3)][width];
        let rows = groups * GROUP_ROWS;
        let beside = RUN_BYTES * rows + BARRIER_BYTES * (1 + 4 * tiles);
        Some(Kernel {
            names: (HOPPER, kernel_for::<T>(names[width])),
            rows,
            threads: (groups as u32 + 1) * GROUP_THREADS,
            shared_bytes: self.shared_bytes::<T>(rows + 2 * tiles * HOPPER_KEYS) + beside as u32,
        })
    }

    /// Of the queries and of the keys.
    fn portable_gradients<T: Storage>(&self, supervision: Option<&Supervision<'_>>) -> [Kernel; 2] {
        let rows = self.rows::<T>();
        let others = match self.row_bytes::<T>() {
            ..=256 => 32,
            257..=512 => 16,
            _ => 8,
        };
        let queries = match self.width {
            64 if self.twice::<T>() => 16,
            _ => others,
        };
        let kernel = |names, others| Kernel {
            names: (BACKWARD, self.kernel::<T>(names)),
            rows,
            threads: THREADS,
            shared_bytes: self.shared_bytes::<T>(2 * (rows + STAGES * others)),
        };
        match supervision {
            None => [
                kernel(for_each_width!("attention_query_gradient"), others),
                kernel(for_each_width!("attention_key_gradient"), queries),
            ],
            Some(_) => [
                kernel(for_each_width!("attention_query_gradient_bce"), others),
                kernel(for_each_width!("attention_key_gradient_bce"), queries),
            ],
        }
    }

    fn hopper_gradients<T: Storage>(
        &self,
        supervision: Option<&Supervision<'_>>,
    ) -> Option<[Kernel; 2]> {
        let width = self.hopper_width::<T>()?;
        let [queries, keys] = match supervision {
            None => [
                for_each_hopper_width!("attention_query_gradient_hopper"),
                for_each_hopper_width!("attention_key_gradient_hopper"),
            ],
            Some(_) => [
                for_each_hopper_width!("attention_query_gradient_hopper_bce"),
                for_each_hopper_width!("attention_key_gradient_hopper_bce"),
            ],
        };
        let rows = 2 * (HOPPER_ROWS + HOPPER_STAGES * HOPPER_OTHERS);
        let kernel = |names: [_; 2], beside| Kernel {
            names: (BACKWARD_HOPPER, kernel_for::<T>(names[width])),
            rows: HOPPER_ROWS,
            threads: HOPPER_THREADS,
            shared_bytes: self.shared_bytes::<T>(rows) + beside,
        };
        let runs = (RUN_BYTES * HOPPER_ROWS) as u32;
        Some([kernel(queries, runs), kernel(keys, HOPPER_QUERIES)])
    }

    fn of_queries(&self) -> [usize; 2] {
        [self.queries, self.heads.saturating_mul(self.width)]
    }

    fn of_keys(&self) -> [usize; 2] {
        [self.keys, self.key_heads.saturating_mul(self.width)]
    }

    fn rows_of_heads(&self) -> usize {
        self.queries.saturating_mul(self.heads)
    }

    fn row_bytes<T>(&self) -> usize {
        self.width * size_of::<T>()
    }

    /// Queries that a block owns, or keys in the key gradient: twice as many where the accumulators fit into registers.
    fn rows<T>(&self) -> usize {
        match self.width {
            _ if self.twice::<T>() => 128,
            ..=128 => 64,
            _ => 32,
        }
    }

    fn twice<T>(&self) -> bool {
        size_of::<T>() == 2 && self.width <= 64
    }

    /// Of tiles with this many rows in all.
    fn shared_bytes<T>(&self, rows: usize) -> u32 {
        (rows * self.row_bytes::<T>()) as u32
    }

    fn kernel<T: Storage>(&self, names: [[&'static str; 3]; WIDTHS.len()]) -> &'static str {
        let narrower = WIDTHS.iter().filter(|&&width| width < self.width).count();
        kernel_for::<T>(names[narrower.min(WIDTHS.len() - 1)])
    }

    /// As the kernels number them.
    fn mask(&self) -> [Arg; 2] {
        let (mask, window) = match self.mask {
            Mask::None => (0, 0),
            Mask::Causal => (1, 0),
            Mask::SlidingWindow { window } => (2, window as i32),
            Mask::GroupedCausal => (3, 0),
        };
        [Arg::I32(mask), Arg::I32(window)]
    }

    fn sizes(&self, supervision: Option<&Supervision<'_>>) -> [Arg; 4] {
        let supervised = supervision.map_or(0, |supervision| supervision.heads);
        [self.sequences, self.heads, self.key_heads, supervised].map(|n| Arg::I32(n as i32))
    }

    fn check_inputs<T>(
        &self,
        check: &mut Check,
        q: &Rows<Input<'_, T>>,
        k: &Rows<Input<'_, T>>,
        v: &Rows<Input<'_, T>>,
    ) -> Result<()> {
        check.input_rows("q", q, self.of_queries(), VECTOR_BYTES)?;
        check.input_rows("k", k, self.of_keys(), VECTOR_BYTES)?;
        check.input_rows("v", v, self.of_keys(), VECTOR_BYTES)
    }

    fn check_pack(&self, check: &mut Check, pack: &Pack<'_>) -> Result<()> {
        check.input("cu_seqlens_q", &pack.cu_seqlens_q, self.sequences + 1, 1)?;
        check.input("cu_seqlens_k", &pack.cu_seqlens_k, self.sequences + 1, 1)?;
        match (&pack.groups, self.mask) {
            (Some(groups), Mask::GroupedCausal) => check.input("groups", groups, self.keys, 1),
            (None, Mask::GroupedCausal) => {
                Err(Error::value("groups", "missing", "the group of each key"))
            }
            (Some(_), _) => Err(Error::value("groups", "given", "none with this mask")),
            (None, _) => Ok(()),
        }
    }

    fn check_supervision(&self, check: &mut Check, supervision: &Supervision<'_>) -> Result<()> {
        if !(1..=self.heads).contains(&supervision.heads) {
            let expected = format_args!("1 to {}", self.heads);
            return Err(Error::value(
                "supervision.heads",
                supervision.heads,
                expected,
            ));
        }
        check.input("slots", &supervision.slots, self.heads, 1)?;
        check.input("annotated", &supervision.annotated, self.sequences, 1)?;
        check.input(
            "pair_offsets",
            &supervision.pair_offsets,
            self.queries + 1,
            1,
        )?;
        check.any_input("pair_keys", &supervision.pair_keys)
    }
}

fn check_scale(scale: f32) -> Result<()> {
    match scale.is_finite() {
        true => Ok(()),
        false => Err(Error::value("scale", scale, "a finite number")),
    }
}

fn pack_args(pack: &Pack<'_>) -> [Arg; 3] {
    let groups = span_or_null(pack.groups.as_ref());
    [pack.cu_seqlens_q.span(), pack.cu_seqlens_k.span(), groups].map(Arg::Input)
}

fn supervision_args(supervision: Option<&Supervision<'_>>) -> [Arg; 4] {
    let spans = supervision.map_or([Span::NULL; 4], |supervision| {
        [
            supervision.slots.span(),
            supervision.annotated.span(),
            supervision.pair_offsets.span(),
            supervision.pair_keys.span(),
        ]
    });
    spans.map(Arg::Input)
}
