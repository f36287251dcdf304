//! Content-addressed memory: one segment of each sequence of a pack. Kernels and equations:
//! `kernels/content_memory.cu`, `kernels/content_memory_backward.cu`, and for segments of up to 64 tokens in bf16 or f16
//! `kernels/content_memory_short.cu` and `kernels/content_memory_short_backward.cu`; definition:
//! `dtmem_reference::content_memory`, SPEC section 4.
//!
//! Slots may be wider than keys: keys are compared with their first columns, and the others are written and read alike,
//! but carried along unseen. What such columns recall is in [`recall`](super::recall).
//!
//! An episode is a chain: the memory of a segment is [`Forward::memory_next`] of the one before. Its backward pass goes
//! through the segments from the last to the first, and [`Backward::d_memory`] of one is
//! [`Backward::grad_memory_next`] of the one before; of the last it is 0. Nothing of the forward pass is kept but the
//! memories between the segments.

use dtmem_reference::content_memory as reference;

pub use reference::{Addressing, ContentMemory, Erase, Order, Strength};

use super::launch::{Arg, Launch, Launcher, Version, launch_first_possible};
use super::memory::{
    Check, Home, Input, Output, Rows, Span, Storage, Type, for_each_type, kernel_for, span_or_null,
};
use super::{Error, Result};

const FORWARD: &str = "content_memory";
const SHORT: &str = "content_memory_short";
const BACKWARD: &str = "content_memory_backward";
const SHORT_BACKWARD: &str = "content_memory_short_backward";
const THREADS: u32 = 256;
/// Of a block of the backward pass by clusters.
const SHORT_BACKWARD_THREADS: u32 = 384;
/// Rows and columns of a product that a block computes.
const TILE: usize = 64;
/// Of shared memory, for the panels of the kernels that multiply.
const PANELS_BYTES: usize = 72 << 10;
/// Columns of a block of `content_memory_gradients`, in bytes.
const GRADIENT_COLUMN_BYTES: usize = 128;
const MAX_SEQUENCES: usize = 65535;
const MAX_TOKENS: usize = 1 << 30;
const MAX_LONGEST: usize = 1 << 16;
/// Most slots.
pub const MAX_SLOTS: usize = 4096;
/// Largest width of keys.
pub const MAX_KEY_WIDTH: usize = 1024;
const MAX_WIDTH: usize = 1 << 16;

/// A segment of each sequence of a pack, and what is done with it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// B, up to 65535.
    pub sequences: usize,
    /// Rows of the tensors of tokens, up to 2³⁰. Those of no sequence are neither read nor written.
    pub tokens: usize,
    /// No sequence has more tokens; up to 65536.
    pub longest: usize,
    /// N: 1 to 4096.
    pub slots: usize,
    /// D, of keys: 1 to 1024.
    pub key_width: usize,
    /// V ≥ D, of slots and values: up to 65536.
    pub width: usize,
    /// How slots are addressed and written.
    pub variant: ContentMemory,
}

/// What both passes read.
#[derive(Debug)]
pub struct Inputs<'a, T> {
    /// M [B, N, V]
    pub memory: Input<'a, T>,
    /// a [tokens, D]
    pub address_key: Rows<Input<'a, T>>,
    /// s [tokens, D]
    pub strength_key: Rows<Input<'a, T>>,
    /// v [tokens, V]
    pub value: Rows<Input<'a, T>>,
    /// κ \[tokens\], with cosine addressing and only then.
    pub key_strength: Option<Input<'a, T>>,
    /// b \[1\], with sigmoid strength and only then.
    pub strength_bias: Option<Input<'a, f32>>,
    /// Offsets of the sequences [B + 1]: see [`Shape::validate_offsets`]. They may also begin and end between 0 and
    /// `tokens`, and where they fall a sequence takes no part: its memory is neither read nor written.
    pub cu_seqlens: Input<'a, i32>,
}

/// The tensors of M′ = keep·M + Σ_t w·β·v and y = w·M, or w·M′. Where [`Shape::vectors`] says so, all of type T begin
/// at multiples of 16 bytes, and so do their rows.
#[derive(Debug)]
pub struct Forward<'a, T> {
    /// What is read.
    pub inputs: Inputs<'a, T>,
    /// M′ [B, N, V]
    pub memory_next: Output<'a, T>,
    /// y [tokens, V]
    pub read: Output<'a, T>,
    /// At least [`Shape::forward_workspace`] elements, of any content.
    pub workspace: Output<'a, f32>,
}

/// The tensors of the gradients of Σ grad_memory_next·M′ + Σ grad_read·y.
#[derive(Debug)]
pub struct Backward<'a, T> {
    /// What the forward pass read.
    pub inputs: Inputs<'a, T>,
    /// [B, N, V]
    pub grad_memory_next: Input<'a, T>,
    /// [tokens, V]
    pub grad_read: Input<'a, T>,
    /// Overwritten [B, N, V].
    pub d_memory: Output<'a, T>,
    /// Overwritten [tokens, D]; with the next two it may be columns of one matrix.
    pub d_address_key: Rows<Output<'a, T>>,
    /// Overwritten [tokens, D].
    pub d_strength_key: Rows<Output<'a, T>>,
    /// Overwritten [tokens, V].
    pub d_value: Rows<Output<'a, T>>,
    /// Overwritten \[tokens\], with cosine addressing and only then.
    pub d_key_strength: Option<Output<'a, T>>,
    /// Added to \[1\], with sigmoid strength and only then.
    pub d_strength_bias: Option<Output<'a, f32>>,
    /// At least [`Shape::backward_workspace`] elements, of any content.
    pub workspace: Output<'a, f32>,
}

/// How the kernels for short segments share the work.
#[derive(Clone, Copy)]
struct Short {
    /// Slots of a block.
    tile: usize,
    tiles: usize,
    /// Tokens of a sequence, in whole matrices.
    rows: usize,
}

impl Short {
    const MOST_TOKENS: usize = 64;
    const ROWS: usize = 16;
    const MOST_TILE: usize = 96;
    /// What every GPU from compute capability 8.0 on has for a block, less the kernels' static shared memory.
    const MOST_SHARED: usize = 94 << 10;
    /// What GPUs of compute capability 9.0 have, less the same.
    const MOST_CLUSTER_SHARED: usize = 219 << 10;
    const MOST_CLUSTER: usize = 16;
    /// What the backward pass by clusters may have, less the same.
    const MOST_BACKWARD_SHARED: usize = 216 << 10;

    fn scores_bytes(&self) -> usize {
        self.tile * 400 + self.rows * 864
    }

    fn update_bytes(&self, width: usize) -> usize {
        let row = 2 * width.next_multiple_of(TILE) + 16 + 4 * self.rows + 32;
        self.tile.next_multiple_of(Self::ROWS) * row + self.rows * 384
    }

    fn cluster_bytes(&self, width: usize) -> usize {
        self.update_bytes(width) + self.rows * 1024
    }

    fn backward_bytes(&self, width: usize) -> usize {
        let padded = self.tile.next_multiple_of(Self::ROWS);
        let products = 288 * (4 * self.rows + padded);
        let factors = 12 * padded * (self.rows + 8);
        let columns = 160 * (3 * self.rows + padded);
        let shares = 128 * self.tiles * (3 * self.rows).div_ceil(self.tiles);
        let memory = self.tile * (2 * width.next_multiple_of(TILE) + 16);
        memory + products.max(factors + columns + shares)
    }
}

/// Cuts a workspace into pieces, from the front, aligned to vectors.
struct Pieces(Span);

impl Pieces {
    const ALIGNMENT: usize = 4;

    /// Floats of a workspace for these pieces.
    fn sum(pieces: &[usize]) -> usize {
        let aligned = |floats: &usize| floats.next_multiple_of(Self::ALIGNMENT);
        pieces.iter().map(aligned).sum()
    }

    fn take(&mut self, floats: usize) -> Span {
        let address = self.0.address;
        self.0.address += (Self::sum(&[floats]) * size_of::<f32>()) as u64;
        Span {
            address,
            bytes: floats * size_of::<f32>(),
        }
    }
}

impl Shape {
    /// Errors: sequences, tokens, longest, slots or widths beyond their bounds, `top_k` of 0, a scale that is not
    /// finite, with cosine addressing an epsilon that is not above 0.
    pub fn validate(&self) -> Result<()> {
        for (argument, found, least, most) in [
            ("sequences", self.sequences, 0, MAX_SEQUENCES),
            ("tokens", self.tokens, 0, MAX_TOKENS),
            ("longest", self.longest, 0, MAX_LONGEST),
            ("slots", self.slots, 1, MAX_SLOTS),
            ("key_width", self.key_width, 1, MAX_KEY_WIDTH),
            ("width", self.width, self.key_width, MAX_WIDTH),
        ] {
            if !(least..=most).contains(&found) {
                let expected = format_args!("{least} to {most}");
                return Err(Error::value(argument, found, expected));
            }
        }
        let variant = &self.variant;
        if variant.top_k == Some(0) {
            return Err(Error::value("top_k", 0, "at least 1"));
        }
        if !variant.scale.is_finite() {
            return Err(Error::value("scale", variant.scale, "a finite number"));
        }
        let epsilon = variant.epsilon as f32;
        if self.cosine() && !(epsilon > 0.0 && epsilon.is_finite()) {
            return Err(Error::value(
                "epsilon",
                variant.epsilon,
                "a positive number",
            ));
        }
        Ok(())
    }

    /// Checks on the host what [`Inputs::cu_seqlens`] holds for a whole pack: offsets from 0 to `tokens` that do not
    /// decrease, and no sequence with more tokens than `longest`. The kernels trust what is uploaded.
    ///
    /// Errors: those of [`validate`](Self::validate), and what does not hold.
    pub fn validate_offsets(&self, cu_seqlens: &[i32]) -> Result<()> {
        const NAME: &str = "cu_seqlens";
        self.validate()?;
        if cu_seqlens.len() != self.sequences + 1 {
            return Err(Error::Length {
                argument: NAME,
                found: cu_seqlens.len(),
                expected: self.sequences + 1,
            });
        }
        let ends = [0, self.tokens as i32];
        for (at, offset) in [(0, ends[0]), (self.sequences, ends[1])] {
            if cu_seqlens[at] != offset {
                let found = format_args!("{} at {at}", cu_seqlens[at]);
                return Err(Error::value(NAME, found, offset));
            }
        }
        for (at, pair) in (1..).zip(cu_seqlens.windows(2)) {
            let length = i64::from(pair[1]) - i64::from(pair[0]);
            if length < 0 || length > self.longest as i64 {
                let found = format_args!("{} after {} at {at}", pair[1], pair[0]);
                let expected = format_args!("sequences of 0 to {} tokens", self.longest);
                return Err(Error::value(NAME, found, expected));
            }
        }
        Ok(())
    }

    /// Whether the forward pass reads vectors of 16 bytes.
    pub fn vectors<T: Storage>(&self) -> bool {
        self.short::<T>().is_some()
    }

    /// f32 elements of the workspace of the forward pass.
    pub fn forward_workspace<T: Storage>(&self) -> Result<usize> {
        self.validate()?;
        Ok(match self.short::<T>() {
            None => Pieces::sum(&self.long_pieces()),
            Some(short) => Pieces::sum(&self.short_pieces(short)),
        })
    }

    /// f32 elements of the workspace of the backward pass.
    pub fn backward_workspace(&self) -> Result<usize> {
        self.validate()?;
        Ok(Pieces::sum(&self.backward_pieces()))
    }

    /// M′ and y ← the inputs: up to four launches. Errors: those of [`plan_forward`](Self::plan_forward) and of the
    /// launcher.
    pub fn forward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Forward<'_, T>,
    ) -> Result<()> {
        self.forward_by(Version::default(), launcher, tensors)
    }

    /// The same by this version, where there is one for the shape and type (for Hopper: bf16 and f16, a short segment
    /// and a memory that the shared memory of a cluster holds) and the GPU has it; otherwise by the portable one.
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

    /// What [`forward`](Self::forward) launches by the version that every GPU has. Errors: shape, sizes, alignment,
    /// overlaps.
    pub fn plan_forward<'a, T: Storage>(
        &self,
        tensors: &'a Forward<'_, T>,
    ) -> Result<[Option<Launch<'a>>; 4]> {
        self.plan_forward_by(Version::Portable, tensors)
    }

    /// The same by this version, or by the portable one where this one has no kernel. Errors: those of
    /// [`plan_forward`](Self::plan_forward).
    pub fn plan_forward_by<'a, T: Storage>(
        &self,
        version: Version,
        tensors: &'a Forward<'_, T>,
    ) -> Result<[Option<Launch<'a>>; 4]> {
        let (on, short) = self.check_forward(tensors)?;
        let clusters = match version {
            Version::Portable => None,
            Version::Hopper => short.and_then(|short| self.cluster(short)),
        };
        Ok(match (clusters, short) {
            (Some(short), _) => [
                Some(self.plan_cluster(&on, tensors, short)),
                None,
                None,
                None,
            ],
            (None, Some(short)) => self.plan_short(&on, tensors, short),
            (None, None) => self.plan_long(&on, tensors).map(Some),
        })
    }

    /// Clusters of blocks, each of which holds one memory in shared memory.
    fn plan_cluster<'a, T: Storage>(
        &self,
        on: &On<'_, '_, T>,
        tensors: &Forward<'_, T>,
        short: Short,
    ) -> Launch<'a> {
        let inputs = on.inputs;
        let [slots, width, key_width] = self.sizes();
        let [tile, rows] = [short.tile, short.rows].map(|n| Arg::I32(n as i32));
        let launch = on.launch_shared(
            (
                SHORT,
                kernel_for::<T>(for_each_type!("content_memory_short_cluster")),
            ),
            [short.tiles, self.sequences, 1],
            short.cluster_bytes(self.width),
            [
                Arg::Input(inputs.memory.span()),
                Arg::Input(on.keys(&inputs.address_key)),
                Arg::Input(on.keys(&inputs.strength_key)),
                Arg::Input(on.values()),
                on.key_strength(),
                on.strength_bias(),
                on.offsets(),
                Arg::Output(tensors.memory_next.span()),
                Arg::Output(tensors.read.span()),
                slots,
                width,
                key_width,
                inputs.address_key.stride(),
                inputs.strength_key.stride(),
                inputs.value.stride(),
                tile,
                rows,
                self.scale(),
                self.epsilon(),
                self.paper(),
                self.write_then_read(),
            ],
        );
        launch.in_clusters(short.tiles as u32)
    }

    fn check_forward<'s, 't, T: Storage>(
        &'s self,
        tensors: &'t Forward<'t, T>,
    ) -> Result<(On<'s, 't, T>, Option<Short>)> {
        let workspace = self.forward_workspace::<T>()?;
        let short = self.short::<T>();
        let alignment = if short.is_some() { 16 } else { 1 };
        let mut check = Check::new();
        self.check_inputs(&mut check, &tensors.inputs, alignment)?;
        check.output(
            "memory_next",
            &tensors.memory_next,
            self.of_memory(),
            alignment,
        )?;
        check.output("read", &tensors.read, self.of_rows(), alignment)?;
        check.workspace("workspace", &tensors.workspace, workspace)?;
        let on = On {
            shape: self,
            inputs: &tensors.inputs,
            home: check.disjoint(&[])?,
        };
        Ok((on, short))
    }

    /// The four kernels that take every shape.
    fn plan_long<'a, T: Storage>(
        &self,
        on: &On<'_, '_, T>,
        tensors: &Forward<'_, T>,
    ) -> [Launch<'a>; 4] {
        let inputs = on.inputs;
        let mut pieces = Pieces(tensors.workspace.span());
        let [w, beta, squares] = self.long_pieces().map(|len| pieces.take(len));
        let memory = inputs.memory.span();
        let seen = match self.variant.order {
            Order::ReadThenWrite => memory,
            Order::WriteThenRead => tensors.memory_next.span(),
        };
        let [slots, width, _] = self.sizes();
        [
            on.scores([w, beta], squares, None),
            on.address(squares, w, w, beta, Span::NULL),
            on.launch(
                (
                    FORWARD,
                    kernel_for::<T>(for_each_type!("content_memory_write")),
                ),
                [tiles(self.slots), tiles(self.width), self.sequences],
                [
                    Arg::Input(memory),
                    Arg::Input(w),
                    Arg::Input(beta),
                    Arg::Input(on.values()),
                    on.offsets(),
                    Arg::Output(tensors.memory_next.span()),
                    slots,
                    width,
                    inputs.value.stride(),
                    self.paper(),
                ],
            ),
            on.launch(
                (
                    FORWARD,
                    kernel_for::<T>(for_each_type!("content_memory_read")),
                ),
                [tiles(self.width), tiles(self.longest), self.sequences],
                [
                    Arg::Input(w),
                    Arg::Input(seen),
                    on.offsets(),
                    Arg::Output(tensors.read.span()),
                    slots,
                    width,
                ],
            ),
        ]
    }

    fn plan_short<'a, T: Storage>(
        &self,
        on: &On<'_, '_, T>,
        tensors: &Forward<'_, T>,
        short: Short,
    ) -> [Option<Launch<'a>>; 4] {
        let inputs = on.inputs;
        let mut pieces = Pieces(tensors.workspace.span());
        let [products, stats, shares] = self.short_pieces(short).map(|len| pieces.take(len));
        let grid = [short.tiles, self.sequences, 1];
        let memory = Arg::Input(inputs.memory.span());
        let [slots, width, key_width] = self.sizes();
        let [tile, tiles, rows] = [short.tile, short.tiles, short.rows].map(|n| Arg::I32(n as i32));
        let scores = on.launch_shared(
            (
                SHORT,
                kernel_for::<T>(for_each_type!("content_memory_short_scores")),
            ),
            grid,
            short.scores_bytes(),
            [
                memory,
                Arg::Input(on.keys(&inputs.address_key)),
                Arg::Input(on.keys(&inputs.strength_key)),
                on.key_strength(),
                on.strength_bias(),
                on.offsets(),
                Arg::Output(products),
                Arg::Output(stats),
                slots,
                width,
                key_width,
                inputs.address_key.stride(),
                inputs.strength_key.stride(),
                tile,
                rows,
                self.scale(),
                self.epsilon(),
            ],
        );
        let update = on.launch_shared(
            (
                SHORT,
                kernel_for::<T>(for_each_type!("content_memory_short_update")),
            ),
            grid,
            short.update_bytes(self.width),
            [
                memory,
                Arg::Input(products),
                Arg::Input(stats),
                Arg::Input(on.values()),
                on.offsets(),
                Arg::Output(tensors.memory_next.span()),
                Arg::Output(shares),
                self.all_tokens(),
                slots,
                width,
                inputs.value.stride(),
                tile,
                rows,
                Arg::I32(self.sigmoid().into()),
                self.paper(),
                self.write_then_read(),
            ],
        );
        let read = on.launch(
            (
                SHORT,
                kernel_for::<T>(for_each_type!("content_memory_short_read")),
            ),
            [
                (self.longest * self.width).div_ceil(1024),
                self.sequences,
                1,
            ],
            [
                Arg::Input(shares),
                on.offsets(),
                Arg::Output(tensors.read.span()),
                tiles,
                self.all_tokens(),
                width,
            ],
        );
        [Some(scores), Some(update), Some(read), None]
    }

    /// Gradients of all inputs: up to six launches. Errors: those of [`plan_backward`](Self::plan_backward) and of the
    /// launcher.
    pub fn backward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Backward<'_, T>,
    ) -> Result<()> {
        self.backward_by(Version::default(), launcher, tensors)
    }

    /// The same by this version, where there is one for the shape, type and addresses (for Hopper: what
    /// [`forward_by`](Self::forward_by) says, with the order read-then-write, in f16 with sigmoid strength, and with all tensors
    /// that are read, and `d_memory`, aligned to 16 bytes with their rows) and the GPU has it; otherwise by the portable one.
    pub fn backward_by<T: Storage>(
        &self,
        version: Version,
        launcher: &impl Launcher,
        tensors: Backward<'_, T>,
    ) -> Result<()> {
        launch_first_possible(launcher, &self.plan_backward_by(version, &tensors)?, || {
            self.plan_backward(&tensors)
        })
    }

    /// What [`backward`](Self::backward) launches by the version that every GPU has. Errors: shape, sizes, overlaps.
    pub fn plan_backward<'a, T: Storage>(
        &self,
        tensors: &'a Backward<'_, T>,
    ) -> Result<[Option<Launch<'a>>; 6]> {
        self.plan_backward_by(Version::Portable, tensors)
    }

    /// The same by this version, or by the portable one where this one has no kernel. Errors: those of
    /// [`plan_backward`](Self::plan_backward).
    pub fn plan_backward_by<'a, T: Storage>(
        &self,
        version: Version,
        tensors: &'a Backward<'_, T>,
    ) -> Result<[Option<Launch<'a>>; 6]> {
        let on = self.check_backward(tensors)?;
        let clusters = match version {
            Version::Portable => None,
            Version::Hopper => self.backward_cluster(tensors),
        };
        Ok(match clusters {
            Some(short) => self.plan_backward_cluster(&on, tensors, short),
            None => self.plan_backward_long(&on, tensors).map(Some),
        })
    }

    fn check_backward<'s, 't, T: Storage>(
        &'s self,
        tensors: &'t Backward<'t, T>,
    ) -> Result<On<'s, 't, T>> {
        let workspace = self.backward_workspace()?;
        let [rows, key_rows] = self.rows();
        let mut check = Check::new();
        self.check_inputs(&mut check, &tensors.inputs, 1)?;
        check.input(
            "grad_memory_next",
            &tensors.grad_memory_next,
            self.of_memory(),
            1,
        )?;
        check.input("grad_read", &tensors.grad_read, self.of_rows(), 1)?;
        check.output("d_memory", &tensors.d_memory, self.of_memory(), 1)?;
        check.output_rows("d_address_key", &tensors.d_address_key, key_rows, 1)?;
        check.output_rows("d_strength_key", &tensors.d_strength_key, key_rows, 1)?;
        check.output_rows("d_value", &tensors.d_value, rows, 1)?;
        let d_key_strength = tensors.d_key_strength.as_ref();
        check_presence("d_key_strength", d_key_strength.is_some(), self.cosine())?;
        if let Some(d_key_strength) = d_key_strength {
            check.output("d_key_strength", d_key_strength, self.tokens, 1)?;
        }
        let d_strength_bias = tensors.d_strength_bias.as_ref();
        check_presence("d_strength_bias", d_strength_bias.is_some(), self.sigmoid())?;
        if let Some(d_strength_bias) = d_strength_bias {
            check.output("d_strength_bias", d_strength_bias, 1, 1)?;
        }
        check.workspace("workspace", &tensors.workspace, workspace)?;
        Ok(On {
            shape: self,
            inputs: &tensors.inputs,
            home: check.disjoint(&[])?,
        })
    }

    /// Clusters of blocks, each of which holds one memory in shared memory, and a block for db.
    fn plan_backward_cluster<'a, T: Storage>(
        &self,
        on: &On<'_, '_, T>,
        tensors: &Backward<'_, T>,
        short: Short,
    ) -> [Option<Launch<'a>>; 6] {
        let inputs = on.inputs;
        let [rows, key_rows] = self.rows();
        let [slots, width, key_width] = self.sizes();
        let [tile, tile_rows] = [short.tile, short.rows].map(|n| Arg::I32(n as i32));
        let d_key_strength = tensors.d_key_strength.as_ref();
        // The workspace has more numbers for each slot than a cluster has blocks for it.
        let of_blocks = self.sequences * short.tiles;
        let bias_shares = Pieces(tensors.workspace.span()).take(of_blocks);
        let gradients = Launch::new(
            (
                SHORT_BACKWARD,
                kernel_for::<T>(for_each_type!("content_memory_short_backward")),
            ),
            [short.tiles as u32, self.sequences as u32, 1],
            [SHORT_BACKWARD_THREADS, 1, 1],
            short.backward_bytes(self.width) as u32,
            on.home,
            [
                Arg::Input(inputs.memory.span()),
                Arg::Input(tensors.grad_memory_next.span()),
                Arg::Input(on.keys(&inputs.address_key)),
                Arg::Input(on.keys(&inputs.strength_key)),
                Arg::Input(tensors.grad_read.span()),
                Arg::Input(on.values()),
                on.key_strength(),
                on.strength_bias(),
                on.offsets(),
                Arg::Output(tensors.d_memory.span()),
                Arg::Output(tensors.d_address_key.span(key_rows)),
                Arg::Output(tensors.d_strength_key.span(key_rows)),
                Arg::Output(tensors.d_value.span(rows)),
                Arg::Output(d_key_strength.map_or(Span::NULL, Output::span)),
                Arg::Output(bias_shares),
                slots,
                width,
                key_width,
                inputs.address_key.stride(),
                inputs.strength_key.stride(),
                inputs.value.stride(),
                tensors.d_address_key.stride(),
                tensors.d_strength_key.stride(),
                tensors.d_value.stride(),
                tile,
                tile_rows,
                self.scale(),
                self.epsilon(),
                self.paper(),
            ],
        );
        let of_bias = tensors.d_strength_bias.as_ref().map(|d_strength_bias| {
            self.plan_sum_of_bias(on, bias_shares, of_blocks, d_strength_bias.span())
        });
        [
            Some(gradients.in_clusters(short.tiles as u32)),
            of_bias,
            None,
            None,
            None,
            None,
        ]
    }

    /// Only the block of `content_memory_sums` that adds so many shares to db.
    fn plan_sum_of_bias<'a, T: Storage>(
        &self,
        on: &On<'_, '_, T>,
        shares: Span,
        count: usize,
        d_strength_bias: Span,
    ) -> Launch<'a> {
        let (none, nothing) = (Arg::Input(Span::NULL), Arg::Output(Span::NULL));
        let [zero, one] = [0, 1].map(Arg::I32);
        on.launch(
            (
                BACKWARD,
                kernel_for::<T>(for_each_type!("content_memory_sums")),
            ),
            [1; 3],
            [
                none,
                none,
                Arg::Input(shares),
                none,
                on.offsets(),
                none,
                nothing,
                nothing,
                nothing,
                nothing,
                Arg::Output(d_strength_bias),
                self.all_tokens(),
                // One slot is one tile, and so one share of each sequence.
                one,
                Arg::I32(count as i32),
                zero,
                zero,
                zero,
                zero,
                zero,
                zero,
                zero,
                zero,
            ],
        )
    }

    /// The six kernels that take every shape.
    fn plan_backward_long<'a, T: Storage>(
        &self,
        on: &On<'_, '_, T>,
        tensors: &Backward<'_, T>,
    ) -> [Launch<'a>; 6] {
        let inputs = on.inputs;
        let [rows, key_rows] = self.rows();
        let d_key_strength = tensors.d_key_strength.as_ref();
        let d_strength_bias = tensors.d_strength_bias.as_ref();
        let mut pieces = Pieces(tensors.workspace.span());
        // dw and d_strength are named after what they become: R·M, and G·v, the gradient of w·β.
        let [
            similarity,
            beta,
            dw,
            w,
            d_strength,
            planes,
            squares,
            dots,
            keep,
            slopes,
            norms,
            means,
            token_shares,
            bias_shares,
            cross,
            gates,
            shares,
        ] = self.backward_pieces().map(|len| pieces.take(len));
        // The products of the factors before a token are no longer needed when the coefficients come.
        let before = planes;
        let after_write = self.variant.order == Order::WriteThenRead;
        let [cross, gates] = [cross, gates].map(|x| if after_write { x } else { Span::NULL });

        let [slots, width, key_width] = self.sizes();
        let [pitch, pair_pitch, longest, splits, sequences] = [
            self.slot_pitch(),
            self.pair_pitch(),
            self.longest,
            self.splits(),
            self.sequences,
        ]
        .map(|n| Arg::I32(n as i32));
        let offsets = on.offsets();
        let memory = Arg::Input(inputs.memory.span());
        let g = Arg::Input(tensors.grad_memory_next.span());
        let r = Arg::Input(tensors.grad_read.span());
        let [key, strength_key] =
            [&inputs.address_key, &inputs.strength_key].map(|x| Arg::Input(on.keys(x)));
        let of_slots = tiles(self.slots);
        let of_pairs = if after_write { tiles(self.longest) } else { 0 };

        let products = on.scores(
            [similarity, beta],
            squares,
            Some(Through {
                gradient: g,
                read: r,
                products: [dw, d_strength],
                dots,
                cross,
            }),
        );
        let address = on.address(squares, similarity, w, beta, norms);
        let through_product = on.launch(
            (BACKWARD, "content_memory_slots"),
            [of_slots, self.sequences, 1],
            [
                Arg::Input(w),
                Arg::Input(beta),
                Arg::Input(dots),
                Arg::Input(cross),
                offsets,
                Arg::Output(before),
                Arg::Output(keep),
                Arg::Output(dw),
                Arg::Output(d_strength),
                Arg::Output(means),
                self.all_tokens(),
                slots,
                pair_pitch,
                self.paper(),
            ],
        );
        let coefficients = on.launch(
            (
                BACKWARD,
                kernel_for::<T>(for_each_type!("content_memory_coefficients")),
            ),
            [of_slots + of_pairs * of_pairs, self.sequences, 1],
            [
                Arg::Input(w),
                Arg::Input(beta),
                Arg::Input(similarity),
                Arg::Input(dw),
                Arg::Input(d_strength),
                Arg::Input(keep),
                Arg::Input(squares),
                Arg::Input(norms),
                Arg::Input(means),
                on.key_strength(),
                on.strength_bias(),
                offsets,
                Arg::Output(planes),
                Arg::Output(gates),
                Arg::Output(slopes),
                Arg::Output(token_shares),
                Arg::Output(bias_shares),
                self.all_tokens(),
                slots,
                longest,
                pitch,
                pair_pitch,
                self.scale(),
                self.epsilon(),
            ],
        );
        let columns = GRADIENT_COLUMN_BYTES / size_of::<T>();
        let of_columns = self.width.div_ceil(columns);
        let gradients = on.launch_shared(
            (
                BACKWARD,
                kernel_for::<T>(for_each_type!("content_memory_gradients")),
            ),
            [
                of_columns,
                self.splits() * tiles(self.longest).max(1),
                self.sequences,
            ],
            PANELS_BYTES,
            [
                memory,
                g,
                key,
                strength_key,
                r,
                Arg::Input(planes),
                Arg::Input(gates),
                Arg::Input(keep),
                Arg::Input(slopes),
                offsets,
                Arg::Output(tensors.d_memory.span()),
                Arg::Output(shares),
                self.all_tokens(),
                slots,
                width,
                key_width,
                inputs.address_key.stride(),
                inputs.strength_key.stride(),
                pitch,
                pair_pitch,
                splits,
            ],
        );
        let sums = on.launch(
            (
                BACKWARD,
                kernel_for::<T>(for_each_type!("content_memory_sums")),
            ),
            [
                self.longest + usize::from(self.sigmoid()),
                self.sequences,
                1,
            ],
            [
                Arg::Input(shares),
                Arg::Input(token_shares),
                Arg::Input(bias_shares),
                Arg::Input(norms),
                offsets,
                key,
                Arg::Output(d_key_strength.map_or(Span::NULL, Output::span)),
                Arg::Output(tensors.d_address_key.span(key_rows)),
                Arg::Output(tensors.d_strength_key.span(key_rows)),
                Arg::Output(tensors.d_value.span(rows)),
                Arg::Output(d_strength_bias.map_or(Span::NULL, Output::span)),
                self.all_tokens(),
                slots,
                sequences,
                width,
                key_width,
                Arg::I32((of_columns * columns) as i32),
                splits,
                inputs.address_key.stride(),
                tensors.d_address_key.stride(),
                tensors.d_strength_key.stride(),
                tensors.d_value.stride(),
            ],
        );
        [
            products,
            address,
            through_product,
            coefficients,
            gradients,
            sums,
        ]
    }

    fn check_inputs<T: Storage>(
        &self,
        check: &mut Check,
        inputs: &Inputs<'_, T>,
        alignment: usize,
    ) -> Result<()> {
        let [rows, key_rows] = self.rows();
        check.input("memory", &inputs.memory, self.of_memory(), alignment)?;
        check.input_rows("address_key", &inputs.address_key, key_rows, alignment)?;
        check.input_rows("strength_key", &inputs.strength_key, key_rows, alignment)?;
        check.input_rows("value", &inputs.value, rows, alignment)?;
        check_presence("key_strength", inputs.key_strength.is_some(), self.cosine())?;
        if let Some(key_strength) = &inputs.key_strength {
            check.input("key_strength", key_strength, self.tokens, 1)?;
        }
        check_presence(
            "strength_bias",
            inputs.strength_bias.is_some(),
            self.sigmoid(),
        )?;
        if let Some(strength_bias) = &inputs.strength_bias {
            check.input("strength_bias", strength_bias, 1, 1)?;
        }
        check.input("cu_seqlens", &inputs.cu_seqlens, self.sequences + 1, 1)
    }

    /// How the kernels for short segments do it, if they can.
    fn short<T: Storage>(&self) -> Option<Short> {
        let all_slots = self.variant.top_k.is_none_or(|k| k >= self.slots);
        let short = (1..=Short::MOST_TOKENS).contains(&self.longest);
        let whole = [self.width, self.key_width].map(|width| width.is_multiple_of(16));
        let columns = whole == [true; 2] && size_of::<T>() == 2;
        if !(all_slots && short && columns) {
            return None;
        }
        let rows = self.longest.next_multiple_of(Short::ROWS);
        let most = Short::MOST_TILE.min(self.slots.next_multiple_of(Short::ROWS));
        (Short::ROWS..=most)
            .rev()
            .step_by(Short::ROWS)
            .map(|tile| Short {
                tile,
                tiles: self.slots.div_ceil(tile),
                rows,
            })
            .find(|short| {
                short.scores_bytes().max(short.update_bytes(self.width)) <= Short::MOST_SHARED
            })
    }

    /// The same by one cluster for each sequence, if its blocks can hold a memory.
    fn cluster(&self, short: Short) -> Option<Short> {
        let tiles = (self.slots / Short::ROWS).next_power_of_two();
        let tiles = tiles.clamp(2, Short::MOST_CLUSTER);
        let tile = self.slots.div_ceil(tiles);
        let short = Short {
            tile,
            tiles,
            ..short
        };
        let fits = short.cluster_bytes(self.width) <= Short::MOST_CLUSTER_SHARED;
        (tile <= Short::MOST_TILE && fits).then_some(short)
    }

    /// The same of the backward pass, whose kernels for clusters read vectors of 16 bytes.
    fn backward_cluster<T: Storage>(&self, tensors: &Backward<'_, T>) -> Option<Short> {
        let aligned = || {
            let mut check = Check::new();
            self.check_inputs(&mut check, &tensors.inputs, 16)?;
            let (memory, rows) = (self.of_memory(), self.of_rows());
            check.input("grad_memory_next", &tensors.grad_memory_next, memory, 16)?;
            check.input("grad_read", &tensors.grad_read, rows, 16)?;
            check.output("d_memory", &tensors.d_memory, memory, 16)
        };
        // With two softmaxes w·β is below what f16 resolves, and dv is made of nothing else.
        let resolved = self.sigmoid() || T::TYPE == Type::Bf16;
        let served = self.variant.order == Order::ReadThenWrite && resolved;
        let short = self.cluster(self.short::<T>()?)?;
        let fits = short.backward_bytes(self.width) <= Short::MOST_BACKWARD_SHARED;
        (served && fits && aligned().is_ok()).then_some(short)
    }

    /// f32 elements for w, β and the squares of the norms.
    fn long_pieces(&self) -> [usize; 3] {
        let plane = self.tokens * self.slots;
        [plane, plane, self.sequences * self.slots]
    }

    /// f32 elements for five planes [tokens, N], the four planes of coefficients, four numbers of each slot, the norms
    /// of the keys, the sums over 32 slots of each token (twice), the shares of db, two matrices tokens × tokens, and
    /// the shares of da, ds and dv.
    fn backward_pieces(&self) -> [usize; 17] {
        const SHARED: usize = 3;
        let [plane, of_slots] = [self.tokens, self.sequences].map(|n| n * self.slots);
        let sums = tiles(self.slots) * 2 * self.tokens * 2;
        let pairs = self.tokens * self.pair_pitch();
        let width = self.width.next_multiple_of(TILE);
        [
            plane,
            plane,
            plane,
            plane,
            plane,
            4 * self.tokens * self.slot_pitch(),
            of_slots,
            of_slots,
            of_slots,
            of_slots,
            self.tokens,
            sums,
            sums,
            self.sequences * tiles(self.slots),
            pairs,
            pairs,
            self.splits() * SHARED * self.tokens * width,
        ]
    }

    /// f32 elements for products, stats and shares of y.
    fn short_pieces(&self, short: Short) -> [usize; 3] {
        let blocks = self.sequences * short.tiles;
        [
            blocks * short.tile * short.rows * 2,
            blocks * Short::MOST_TOKENS * 2 * 2,
            short.tiles * self.of_rows(),
        ]
    }

    /// Rows and columns of values, and of keys.
    fn rows(&self) -> [[usize; 2]; 2] {
        [self.width, self.key_width].map(|width| [self.tokens, width])
    }

    fn of_memory(&self) -> usize {
        self.sequences * self.slots * self.width
    }

    fn of_rows(&self) -> usize {
        self.tokens * self.width
    }

    /// Of the backward pass's coefficients: rows are aligned to 16 bytes.
    fn slot_pitch(&self) -> usize {
        self.slots.next_multiple_of(8)
    }

    /// The same of the matrices tokens × tokens, where there are any.
    fn pair_pitch(&self) -> usize {
        match self.variant.order {
            Order::ReadThenWrite => 0,
            Order::WriteThenRead => self.longest.next_multiple_of(8),
        }
    }

    /// Parts of the slots that blocks share in the backward pass: so many that there are two blocks for each of the
    /// multiprocessors of a large GPU, and none without a tile.
    fn splits(&self) -> usize {
        const ENOUGH: usize = 256;
        let blocks = tiles(self.width) * tiles(self.longest).max(1) * self.sequences;
        let of_slots = tiles(self.slots);
        let splits = ENOUGH.div_ceil(blocks.max(1)).min(of_slots);
        of_slots.div_ceil(of_slots.div_ceil(splits))
    }

    fn cosine(&self) -> bool {
        self.variant.addressing == Addressing::Cosine
    }

    fn sigmoid(&self) -> bool {
        self.variant.strength == Strength::Sigmoid
    }

    /// N, V and D.
    fn sizes(&self) -> [Arg; 3] {
        [self.slots, self.width, self.key_width].map(|n| Arg::I32(n as i32))
    }

    fn all_tokens(&self) -> Arg {
        Arg::I32(self.tokens as i32)
    }

    fn scale(&self) -> Arg {
        Arg::F32(self.variant.scale as f32)
    }

    fn epsilon(&self) -> Arg {
        Arg::F32(self.variant.epsilon as f32)
    }

    fn paper(&self) -> Arg {
        Arg::I32((self.variant.erase == Erase::Paper).into())
    }

    fn write_then_read(&self) -> Arg {
        Arg::I32((self.variant.order == Order::WriteThenRead).into())
    }
}

/// What the backward pass wants of the scores as well: G and R, M·R and G·v, G·M, and v·Rᵀ, which may be null.
struct Through {
    gradient: Arg,
    read: Arg,
    products: [Span; 2],
    dots: Span,
    cross: Span,
}

impl Through {
    const NONE: Self = Self {
        gradient: Arg::Input(Span::NULL),
        read: Arg::Input(Span::NULL),
        products: [Span::NULL; 2],
        dots: Span::NULL,
        cross: Span::NULL,
    };
}

/// What the launches of both passes have in common.
struct On<'s, 'i, T> {
    shape: &'s Shape,
    inputs: &'s Inputs<'i, T>,
    home: Home,
}

impl<T: Storage> On<'_, '_, T> {
    fn launch<'a, const N: usize>(
        &self,
        kernel: (&'static str, &'static str),
        grid: [usize; 3],
        args: [Arg; N],
    ) -> Launch<'a> {
        self.launch_shared(kernel, grid, 0, args)
    }

    fn launch_shared<'a, const N: usize>(
        &self,
        kernel: (&'static str, &'static str),
        grid: [usize; 3],
        shared_bytes: usize,
        args: [Arg; N],
    ) -> Launch<'a> {
        let grid = grid.map(|blocks| blocks as u32);
        Launch::new(
            kernel,
            grid,
            [THREADS, 1, 1],
            shared_bytes as u32,
            self.home,
            args,
        )
    }

    /// Products of the memory with both keys, and |M|² of each slot; on the way back more.
    fn scores<'a>(
        &self,
        [of_keys, of_strength_keys]: [Span; 2],
        squares: Span,
        through: Option<Through>,
    ) -> Launch<'a> {
        let shape = self.shape;
        let inputs = self.inputs;
        let [slots, width, key_width] = shape.sizes();
        let (value, value_stride) = match through {
            None => (Span::NULL, Arg::I32(0)),
            Some(_) => (self.values(), inputs.value.stride()),
        };
        let through = through.unwrap_or(Through::NONE);
        let of_pairs = if through.cross == Span::NULL {
            0
        } else {
            tiles(shape.longest)
        };
        self.launch_shared(
            (
                FORWARD,
                kernel_for::<T>(for_each_type!("content_memory_scores")),
            ),
            [
                tiles(shape.slots) + of_pairs,
                tiles(shape.longest),
                shape.sequences,
            ],
            PANELS_BYTES,
            [
                Arg::Input(inputs.memory.span()),
                through.gradient,
                Arg::Input(self.keys(&inputs.address_key)),
                Arg::Input(self.keys(&inputs.strength_key)),
                through.read,
                Arg::Input(value),
                self.offsets(),
                Arg::Output(of_keys),
                Arg::Output(of_strength_keys),
                Arg::Output(through.products[0]),
                Arg::Output(through.products[1]),
                Arg::Output(squares),
                Arg::Output(through.dots),
                Arg::Output(through.cross),
                slots,
                width,
                key_width,
                inputs.address_key.stride(),
                inputs.strength_key.stride(),
                value_stride,
                Arg::I32(shape.pair_pitch() as i32),
            ],
        )
    }

    fn address<'a>(
        &self,
        squares: Span,
        similarity: Span,
        w: Span,
        beta: Span,
        norms: Span,
    ) -> Launch<'a> {
        let shape = self.shape;
        let [slots, _, key_width] = shape.sizes();
        let top_k = shape.variant.top_k.and_then(|k| i32::try_from(k).ok());
        self.launch(
            (
                FORWARD,
                kernel_for::<T>(for_each_type!("content_memory_address")),
            ),
            [shape.longest, shape.sequences, 1],
            [
                Arg::Input(self.keys(&self.inputs.address_key)),
                self.key_strength(),
                self.strength_bias(),
                self.offsets(),
                Arg::Input(squares),
                Arg::Output(similarity),
                Arg::Output(w),
                Arg::Output(beta),
                Arg::Output(norms),
                slots,
                key_width,
                self.inputs.address_key.stride(),
                Arg::I32(top_k.unwrap_or(i32::MAX)),
                shape.scale(),
                shape.epsilon(),
            ],
        )
    }

    fn keys(&self, rows: &Rows<Input<'_, T>>) -> Span {
        rows.span(self.shape.rows()[1])
    }

    fn values(&self) -> Span {
        self.inputs.value.span(self.shape.rows()[0])
    }

    fn offsets(&self) -> Arg {
        Arg::Input(self.inputs.cu_seqlens.span())
    }

    fn key_strength(&self) -> Arg {
        Arg::Input(span_or_null(self.inputs.key_strength.as_ref()))
    }

    fn strength_bias(&self) -> Arg {
        Arg::Input(span_or_null(self.inputs.strength_bias.as_ref()))
    }
}

fn tiles(n: usize) -> usize {
    n.div_ceil(TILE)
}

/// Refuses a tensor that the variant has no use for, and the lack of one that it needs.
fn check_presence(argument: &'static str, given: bool, needed: bool) -> Result<()> {
    match (given, needed) {
        (true, false) => Err(Error::value(argument, "given", "none with this variant")),
        (false, true) => Err(Error::value(argument, "missing", "one with this variant")),
        _ => Ok(()),
    }
}
