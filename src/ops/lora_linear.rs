//! Linear maps with low-rank adapters: y = x·Wᵀ + b + s·(x̃·Aᵀ)·Bᵀ, one launch for all projections of x, with other
//! adapters for each group of rows if need be. Kernels and equations: `kernels/lora_linear.cu` (for compute capability
//! 9.0 also `kernels/lora_hopper.cu`), `kernels/lora_linear_backward.cu`, `kernels/lora_dropout.cu`,
//! `kernels/lora_merge.cu`; definition: `dtmem_reference::lora_linear`, SPEC section 5.
//!
//! Gradients of W and b, where those are trained, are a product and a sum that libraries have.

use super::elementwise::{self, dropout_args};
use super::launch::{Arg, Launch, Launcher, Version, blocks, launch_first_possible};
use super::memory::{
    Check, Input, Output, Rows, Span, Storage, Type, for_each_type, kernel_for, span_or_null,
};
use super::{Error, Result};

/// Adapters of one map at most.
pub const MAX_ADAPTERS: usize = 4;
/// Rank of an adapter at most.
pub const MAX_RANK: usize = 64;

const VECTOR_BYTES: usize = 16;
/// Element numbers of a row of tiles are 32-bit.
const MAX_WIDTH: usize = 1 << 24;
const MAX_ROWS: usize = 1 << 30;
/// Of a grid in y and z.
const MAX_BLOCKS: usize = 65535;
/// Bits of a word of [`Dropout::keep`].
const WORD: usize = 32;

const FACTOR_THREADS: u32 = 128;
const FACTOR_COLUMNS: usize = 128;
/// Rows that are worth a block of their own.
const FACTOR_ROWS: usize = 128;
/// Blocks that keep a large GPU busy. Fixed, not the number of its processors: the bits of dA and dB depend on it.
const FACTOR_BLOCKS: usize = 264;
const ADD_THREADS: u32 = 256;
const MERGE_THREADS: usize = 256;
const KEEP_THREADS: usize = 256;

/// A linear map of rows, and its adapters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape<'a> {
    /// Up to 2³⁰, and to 65535 tiles of 64.
    pub rows: usize,
    /// Columns of x: a multiple of 16 bytes.
    pub inputs: usize,
    /// Columns of y: a multiple of 16 bytes.
    pub outputs: usize,
    /// The weight is used as it lies, y = x·W: it is [inputs, outputs] then, otherwise [outputs, inputs]. A and B still
    /// describe W, so that A [rank, outputs] takes y's side and B [inputs, rank] that of x.
    pub transposed: bool,
    /// In ascending order of outputs, at most [`MAX_ADAPTERS`].
    pub adapters: &'a [Adapter],
    /// With groups of rows that use adapters of their own; otherwise all rows use the same.
    pub tasks: Option<Tasks>,
}

/// A low-rank update of the map to some of the outputs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adapter {
    /// The first one: a multiple of 16 bytes.
    pub output: usize,
    /// How many: a multiple of 16 bytes.
    pub outputs: usize,
    /// 1 to [`MAX_RANK`].
    pub rank: usize,
    /// s = α/r.
    pub scaling: f32,
}

/// How many groups of rows, and adapters to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tasks {
    /// Of rows: the sequences of a pack, or runs of sequences with the same adapters, which is faster where sequences
    /// are short: each group begins with a new tile of 64 or 128 rows.
    pub groups: usize,
    /// What [`Factors`] hold, one after another: 1 to 65535.
    pub sets: usize,
}

/// Which rows use which adapters.
#[derive(Debug)]
pub struct Groups<'a> {
    /// Where each group begins, from 0, ascending, and the number of rows [groups + 1].
    pub offsets: Input<'a, i32>,
    /// Of each group: its place among the sets, or −1 for none \[groups\].
    pub sets: Input<'a, i32>,
}

/// A and B of an adapter, for each set.
#[derive(Debug)]
pub struct Factors<'a, T> {
    /// [sets, rank, inputs]; transposed: [sets, rank, outputs of the adapter].
    pub a: Input<'a, T>,
    /// [sets, outputs of the adapter, rank]; transposed: [sets, inputs, rank].
    pub b: Input<'a, T>,
}

/// Gradients of A and B, as [`Factors`]; added to.
#[derive(Debug)]
pub struct FactorGradients<'a> {
    /// As A.
    pub a: Output<'a, f32>,
    /// As B.
    pub b: Output<'a, f32>,
}

/// Dropout of the adapters' input: x̃ = x∘keep·scale.
#[derive(Debug)]
pub struct Dropout<'a> {
    /// Bits of the elements that stay, from the lowest of each word on [rows, ⌈inputs/32⌉]: see [`Shape::draw_keep`].
    pub keep: Input<'a, u32>,
    /// 1/(1 − p).
    pub scale: f32,
}

/// The tensors of y = x·Wᵀ + b + s·(x̃·Aᵀ)·Bᵀ. Weight, bias, and rows of x and y begin at multiples of 16 bytes.
#[derive(Debug)]
pub struct Forward<'a, T> {
    /// [rows, inputs]
    pub x: Rows<Input<'a, T>>,
    /// [outputs, inputs]; transposed: [inputs, outputs].
    pub weight: Input<'a, T>,
    /// \[outputs\]
    pub bias: Option<Input<'a, T>>,
    /// Of each adapter.
    pub factors: &'a [Factors<'a, T>],
    /// With [`Shape::tasks`], and only then.
    pub groups: Option<Groups<'a>>,
    /// In training.
    pub dropout: Option<Dropout<'a>>,
    /// [rows, outputs]; not x.
    pub y: Rows<Output<'a, T>>,
    /// Whether y is added to, or overwritten.
    pub accumulate: bool,
    /// (x∘keep)·Aᵀ of all adapters side by side, kept for the backward pass [rows, Σ rank]; 0 without adapters.
    pub kept: Output<'a, T>,
}

/// The tensors of dx = dy·W + s·((dy·B)·A)∘keep·scale, dA += s·(dy·B)ᵀ·x̃, dB += s·dyᵀ·(x̃·Aᵀ). Alignment as for
/// [`Forward`].
#[derive(Debug)]
pub struct Backward<'a, T> {
    /// [rows, inputs]
    pub x: Rows<Input<'a, T>>,
    /// [outputs, inputs]; transposed: [inputs, outputs].
    pub weight: Input<'a, T>,
    /// Of each adapter.
    pub factors: &'a [Factors<'a, T>],
    /// That of the forward pass.
    pub groups: Option<Groups<'a>>,
    /// That of the forward pass.
    pub dropout: Option<Dropout<'a>>,
    /// What the forward pass kept [rows, Σ rank].
    pub kept: Input<'a, T>,
    /// [rows, outputs]
    pub dy: Rows<Input<'a, T>>,
    /// [rows, inputs], if it is wanted; not dy.
    pub dx: Option<Rows<Output<'a, T>>>,
    /// Whether dx is added to, or overwritten.
    pub accumulate: bool,
    /// Of each adapter.
    pub gradients: &'a [FactorGradients<'a>],
    /// Memory for dy·B [rows, Σ rank], of any content.
    pub kept_gradient: Output<'a, T>,
    /// At least [`Shape::workspace`] elements, of any content.
    pub workspace: Output<'a, f32>,
}

/// How large the tiles of a product are, which its columns and rows decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tile {
    Small,
    Wide,
    /// Wide, by products of warpgroups.
    Hopper,
}

impl Tile {
    /// Wide tiles multiply faster, if there are blocks for most processors of a large GPU, and groups fill them.
    const MIN_WIDE_BLOCKS: usize = 96;
    const MIN_WIDE_GROUP: usize = 256;

    fn rows(self) -> usize {
        match self {
            Self::Small => 64,
            Self::Wide | Self::Hopper => 128,
        }
    }

    fn columns(self) -> usize {
        match self {
            Self::Small => 64,
            Self::Wide | Self::Hopper => 256,
        }
    }

    fn threads(self) -> u32 {
        match self {
            Self::Small => 128,
            Self::Wide | Self::Hopper => 256,
        }
    }

    /// Three stages: 64 bytes of each row, of each column and of each rank, and a bit for each element of y. For Hopper
    /// four, of 128 bytes, and no bits.
    fn shared_bytes(self) -> u32 {
        let (rows, columns) = (self.rows(), self.columns());
        let all = rows + columns + MAX_RANK;
        match self {
            Self::Small | Self::Wide => 3 * (all * 64 + rows * columns / 8) as u32,
            Self::Hopper => 4 * (all * 128) as u32,
        }
    }
}

/// The parts of a product that differ between the passes.
struct Product<'t, 'a, T> {
    version: Version,
    backward: bool,
    x: Span,
    x_stride: Arg,
    bias: Span,
    weight: &'t Input<'a, T>,
    factors: &'t [Factors<'a, T>],
    groups: Option<&'t Groups<'a>>,
    dropout: Option<&'t Dropout<'a>>,
    y: Option<(Span, Arg)>,
    accumulate: bool,
    kept: Span,
}

impl Shape<'_> {
    /// Errors: rows, columns, ranks or numbers of adapters, groups and sets beyond their bounds, columns that are no
    /// multiple of 16 bytes, adapters that are not in order.
    pub fn validate<T: Storage>(&self) -> Result<()> {
        let vector = VECTOR_BYTES / size_of::<T>();
        let columns = format_args!("a multiple of {vector} from {vector} to {MAX_WIDTH}");
        for (argument, found) in [("inputs", self.inputs), ("outputs", self.outputs)] {
            if found == 0 || !found.is_multiple_of(vector) || found > MAX_WIDTH {
                return Err(Error::value(argument, found, columns));
            }
        }
        if self.rows > MAX_ROWS || self.row_tiles(Tile::Small) > MAX_BLOCKS {
            let expected = format_args!("at most {MAX_BLOCKS} tiles of 64 with all groups");
            return Err(Error::value("rows", self.rows, expected));
        }
        if let Some(tasks) = self.tasks
            && (tasks.sets == 0 || tasks.sets > MAX_BLOCKS || tasks.groups > MAX_ROWS)
        {
            let found = format_args!("{} sets for {} groups", tasks.sets, tasks.groups);
            let expected = format_args!("1 to {MAX_BLOCKS} sets, at most {MAX_ROWS} groups");
            return Err(Error::value("tasks", found, expected));
        }
        if self.adapters.len() > MAX_ADAPTERS {
            let expected = format_args!("at most {MAX_ADAPTERS}");
            return Err(Error::value("adapters", self.adapters.len(), expected));
        }
        let mut free = 0;
        for adapter in self.adapters {
            let end = adapter.output.saturating_add(adapter.outputs);
            let aligned =
                adapter.output.is_multiple_of(vector) && adapter.outputs.is_multiple_of(vector);
            if adapter.output < free || end > self.outputs || adapter.outputs == 0 || !aligned {
                let found = format_args!("outputs {} to {end}", adapter.output);
                let expected =
                    format_args!("multiples of {vector} from {free} to {}", self.outputs);
                return Err(Error::value("adapters", found, expected));
            }
            if !(1..=MAX_RANK).contains(&adapter.rank) {
                let expected = format_args!("1 to {MAX_RANK}");
                return Err(Error::value("rank", adapter.rank, expected));
            }
            if !adapter.scaling.is_finite() {
                return Err(Error::value("scaling", adapter.scaling, "a finite number"));
            }
            free = end;
        }
        Ok(())
    }

    /// Σ of the ranks: the columns of [`Forward::kept`].
    pub fn ranks(&self) -> usize {
        self.adapters.iter().map(|adapter| adapter.rank).sum()
    }

    /// f32 elements of the workspace of the backward pass.
    pub fn workspace<T: Storage>(&self) -> Result<usize> {
        self.validate::<T>()?;
        Ok(self.splits() * self.sets() * self.gradient_elements())
    }

    /// Words of [`Dropout::keep`].
    pub fn keep_words(&self) -> usize {
        self.rows * self.inputs.div_ceil(WORD)
    }

    /// keep ← a dropout mask of x: one launch. Errors: those of [`plan_keep`](Self::plan_keep) and of the launcher.
    pub fn draw_keep(
        &self,
        launcher: &impl Launcher,
        dropout: elementwise::Dropout<'_>,
        keep: Output<'_, u32>,
    ) -> Result<()> {
        launcher.launch(&self.plan_keep(&dropout, &keep)?)
    }

    /// What [`draw_keep`](Self::draw_keep) launches. Errors: sizes, overlaps, inputs that are no multiple of 4.
    pub fn plan_keep<'a>(
        &self,
        dropout: &'a elementwise::Dropout<'_>,
        keep: &'a Output<'_, u32>,
    ) -> Result<Launch<'a>> {
        let mask = elementwise::Shape {
            rows: self.rows,
            width: self.inputs,
        };
        mask.validate()?;
        let mut check = Check::new();
        mask.check_dropout(&mut check, Some(dropout))?;
        check.output("keep", keep, self.keep_words(), 1)?;
        let home = check.disjoint(&[])?;
        Ok(Launch::new(
            ("lora_dropout", "lora_dropout"),
            [blocks("keep", self.keep_words(), KEEP_THREADS)?, 1, 1],
            [KEEP_THREADS as u32, 1, 1],
            0,
            home,
            dropout_args(Some(dropout)),
        )
        .and([
            Arg::Output(keep.span()),
            Arg::I32(self.rows as i32),
            Arg::I32(self.inputs as i32),
        ]))
    }

    /// y and kept ← x: one launch. Errors: those of [`plan_forward`](Self::plan_forward) and of the launcher.
    pub fn forward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Forward<'_, T>,
    ) -> Result<()> {
        self.forward_by(Version::default(), launcher, tensors)
    }

    /// The same by this version, where there is one for the shape and type (for Hopper: bf16 and f16, without dropout,
    /// enough rows and columns for wide tiles) and the GPU has it; otherwise by the portable one.
    pub fn forward_by<T: Storage>(
        &self,
        version: Version,
        launcher: &impl Launcher,
        tensors: Forward<'_, T>,
    ) -> Result<()> {
        let plan = [Some(self.plan_forward_by(version, &tensors)?)];
        launch_first_possible(launcher, &plan, || Ok([Some(self.plan_forward(&tensors)?)]))
    }

    /// What [`forward`](Self::forward) launches by the version that every GPU has. Errors: shape, sizes, alignment,
    /// overlaps.
    pub fn plan_forward<'a, T: Storage>(&self, tensors: &'a Forward<'_, T>) -> Result<Launch<'a>> {
        self.plan_forward_by(Version::Portable, tensors)
    }

    /// The same by this version, or by the portable one where this one has no kernel. Errors: those of
    /// [`plan_forward`](Self::plan_forward).
    pub fn plan_forward_by<'a, T: Storage>(
        &self,
        version: Version,
        tensors: &'a Forward<'_, T>,
    ) -> Result<Launch<'a>> {
        self.validate::<T>()?;
        let [x, y] = [[self.rows, self.inputs], [self.rows, self.outputs]];
        let mut check = Check::new();
        check.input_rows("x", &tensors.x, x, VECTOR_BYTES)?;
        if let Some(bias) = &tensors.bias {
            check.input("bias", bias, self.outputs, VECTOR_BYTES)?;
        }
        self.check_map(&mut check, &tensors.weight, tensors.factors)?;
        self.check_rows(
            &mut check,
            tensors.groups.as_ref(),
            tensors.dropout.as_ref(),
        )?;
        check.output_rows("y", &tensors.y, y, VECTOR_BYTES)?;
        check.output("kept", &tensors.kept, self.rows * self.ranks(), 1)?;
        let home = check.disjoint(&[])?;
        self.product(
            home,
            Product {
                version,
                backward: false,
                x: tensors.x.span(x),
                x_stride: tensors.x.stride(),
                bias: span_or_null(tensors.bias.as_ref()),
                weight: &tensors.weight,
                factors: tensors.factors,
                groups: tensors.groups.as_ref(),
                dropout: tensors.dropout.as_ref(),
                y: Some((tensors.y.span(y), tensors.y.stride())),
                accumulate: tensors.accumulate,
                kept: tensors.kept.span(),
            },
        )
    }

    /// dx ← dy; dA and dB are added to: three launches, or one without adapters. Errors: those of
    /// [`plan_backward`](Self::plan_backward) and of the launcher.
    pub fn backward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Backward<'_, T>,
    ) -> Result<()> {
        self.backward_by(Version::default(), launcher, tensors)
    }

    /// The same, with dx by this version as [`forward_by`](Self::forward_by).
    pub fn backward_by<T: Storage>(
        &self,
        version: Version,
        launcher: &impl Launcher,
        tensors: Backward<'_, T>,
    ) -> Result<()> {
        let plan = self.plan_backward_by(version, &tensors)?;
        launch_first_possible(launcher, &plan, || self.plan_backward(&tensors))
    }

    /// What [`backward`](Self::backward) launches by the version that every GPU has. Errors: shape, sizes, alignment,
    /// overlaps.
    pub fn plan_backward<'a, T: Storage>(
        &self,
        tensors: &'a Backward<'_, T>,
    ) -> Result<[Option<Launch<'a>>; 3]> {
        self.plan_backward_by(Version::Portable, tensors)
    }

    /// The same by this version, or by the portable one where this one has no kernel. Errors: those of
    /// [`plan_backward`](Self::plan_backward).
    pub fn plan_backward_by<'a, T: Storage>(
        &self,
        version: Version,
        tensors: &'a Backward<'_, T>,
    ) -> Result<[Option<Launch<'a>>; 3]> {
        let workspace = self.workspace::<T>()?;
        let [x, dy] = [[self.rows, self.inputs], [self.rows, self.outputs]];
        let kept = self.rows * self.ranks();
        let mut check = Check::new();
        check.input_rows("x", &tensors.x, x, VECTOR_BYTES)?;
        check.input_rows("dy", &tensors.dy, dy, VECTOR_BYTES)?;
        check.input("kept", &tensors.kept, kept, 1)?;
        self.check_map(&mut check, &tensors.weight, tensors.factors)?;
        self.check_rows(
            &mut check,
            tensors.groups.as_ref(),
            tensors.dropout.as_ref(),
        )?;
        self.check_count("gradients", tensors.gradients.len())?;
        for (adapter, gradients) in self.adapters.iter().zip(tensors.gradients) {
            let [a, b] = self.factor_sizes(adapter);
            check.output("gradients.a", &gradients.a, a, 1)?;
            check.output("gradients.b", &gradients.b, b, 1)?;
        }
        if let Some(dx) = &tensors.dx {
            check.output_rows("dx", dx, x, VECTOR_BYTES)?;
        }
        check.output("kept_gradient", &tensors.kept_gradient, kept, 1)?;
        check.workspace("workspace", &tensors.workspace, workspace)?;
        let home = check.disjoint(&[])?;

        let product = self.product(
            home,
            Product {
                version,
                backward: true,
                x: tensors.dy.span(dy),
                x_stride: tensors.dy.stride(),
                bias: Span::NULL,
                weight: &tensors.weight,
                factors: tensors.factors,
                groups: tensors.groups.as_ref(),
                dropout: tensors.dropout.as_ref(),
                y: tensors.dx.as_ref().map(|dx| (dx.span(x), dx.stride())),
                accumulate: tensors.accumulate,
                kept: tensors.kept_gradient.span(),
            },
        )?;
        if kept == 0 {
            return Ok([tensors.dx.is_some().then_some(product), None, None]);
        }

        let sets = self.sets() as u32;
        let partial = tensors.workspace.span();
        let mut factors = Launch::new(
            (
                "lora_linear_backward",
                kernel_for::<T>(for_each_type!("lora_linear_factors")),
            ),
            [self.factor_tiles() as u32, self.splits() as u32, sets],
            [FACTOR_THREADS, 1, 1],
            // Three stages: 64 bytes for each column and rank, and a bit for each element of x.
            3 * ((FACTOR_COLUMNS + MAX_RANK) * 64 + FACTOR_COLUMNS / 8 * 64 / size_of::<T>())
                as u32,
            home,
            [
                Arg::Input(tensors.x.span(x)),
                Arg::Input(keep(tensors.dropout.as_ref())),
                Arg::Input(tensors.dy.span(dy)),
                Arg::Input(tensors.kept.span()),
                Arg::Input(tensors.kept_gradient.as_input().span()),
            ],
        );
        let mut add = Launch::new(
            ("lora_linear_backward", "lora_linear_add"),
            [
                blocks("workspace", self.gradient_elements(), ADD_THREADS as usize)?,
                sets,
                1,
            ],
            [ADD_THREADS, 1, 1],
            0,
            home,
            [Arg::Input(partial)],
        );
        let scale = scale(tensors.dropout.as_ref());
        for p in 0..MAX_ADAPTERS {
            let [first, count, rank] = self.range(p);
            let gradients = tensors.gradients.get(p);
            let [a, b] = gradients.map_or([Span::NULL; 2], |x| [x.a.span(), x.b.span()]);
            let [down, up] = if self.transposed { [b, a] } else { [a, b] };
            factors = factors.and([first, count, rank]);
            add = add.and([
                Arg::Output(down),
                Arg::Output(up),
                count,
                rank,
                Arg::F32(self.scaling(p) * scale),
            ]);
        }
        let [offsets, sets] = groups_args(tensors.groups.as_ref());
        factors = factors.and([
            offsets,
            sets,
            Arg::Output(partial),
            Arg::I32(self.rows as i32),
            Arg::I32(self.inputs as i32),
            self.groups(),
            tensors.x.stride(),
            tensors.dy.stride(),
        ]);
        add = add.and([
            Arg::I32(self.inputs as i32),
            Arg::I32(self.splits() as i32),
            Arg::I32(self.transposed.into()),
        ]);
        Ok([Some(product), Some(factors), Some(add)])
    }

    fn product<'l, T: Storage>(
        &self,
        home: super::memory::Home,
        product: Product<'_, '_, T>,
    ) -> Result<Launch<'l>> {
        let Product { backward, .. } = product;
        // Without dx the kernel has no columns to write, and still gives what is kept.
        let (depth, columns) = match (backward, product.y) {
            (false, _) => (self.inputs, self.outputs),
            (true, Some(_)) => (self.outputs, self.inputs),
            (true, None) => (self.outputs, 0),
        };
        let (y, y_stride) = product.y.unwrap_or((Span::NULL, Arg::I32(0)));
        let dropout = product.dropout.filter(|_| columns > 0);
        let tile = match self.tile(backward, columns) {
            Tile::Wide
                if product.version == Version::Hopper
                    && size_of::<T>() == 2
                    && product.dropout.is_none() =>
            {
                Tile::Hopper
            }
            tile => tile,
        };
        // The kernels for Hopper are for adapters up to this rank.
        let few = self.adapters.iter().all(|adapter| adapter.rank <= 16);
        let kernels = match (backward != self.transposed, tile) {
            (false, Tile::Small) => for_each_type!("lora_linear_small"),
            (false, Tile::Wide) => for_each_type!("lora_linear_wide"),
            (false, Tile::Hopper) if few => for_each_type!("lora_linear_hopper_16"),
            (false, Tile::Hopper) => for_each_type!("lora_linear_hopper_64"),
            (true, Tile::Small) => for_each_type!("lora_linear_transposed_small"),
            (true, Tile::Wide) => for_each_type!("lora_linear_transposed_wide"),
            (true, Tile::Hopper) if few => for_each_type!("lora_linear_transposed_hopper_16"),
            (true, Tile::Hopper) => for_each_type!("lora_linear_transposed_hopper_64"),
        };
        let family = if tile == Tile::Hopper {
            "lora_hopper"
        } else {
            "lora_linear"
        };
        let column_tiles = self.column_tiles(backward, columns, tile);
        let mut launch = Launch::new(
            (family, kernel_for::<T>(kernels)),
            [column_tiles as u32, self.row_tiles(tile) as u32, 1],
            [tile.threads(), 1, 1],
            tile.shared_bytes(),
            home,
            [
                Arg::Input(product.x),
                Arg::Input(keep(dropout)),
                Arg::Input(product.weight.span()),
                Arg::Input(product.bias),
            ],
        );
        if tile == Tile::Hopper {
            launch = launch.for_hopper();
        }
        let scale = scale(product.dropout);
        for p in 0..MAX_ADAPTERS {
            let factors = product.factors.get(p);
            let [a, b] = factors.map_or([Span::NULL; 2], |x| [x.a.span(), x.b.span()]);
            let [down, up] = match backward != self.transposed {
                true => [b, a],
                false => [a, b],
            };
            let [first, count, rank] = self.range(p);
            launch = launch.and([
                Arg::Input(down),
                Arg::Input(up),
                first,
                count,
                rank,
                Arg::F32(self.scaling(p) * scale),
            ]);
        }
        let [offsets, sets] = groups_args(product.groups);
        Ok(launch.and([
            offsets,
            sets,
            Arg::Output(y),
            Arg::Output(product.kept),
            Arg::I32(self.rows as i32),
            Arg::I32(depth as i32),
            Arg::I32(columns as i32),
            self.groups(),
            product.x_stride,
            y_stride,
            Arg::I32(backward.into()),
            Arg::I32(product.accumulate.into()),
        ]))
    }

    fn check_map<T: Storage>(
        &self,
        check: &mut Check,
        weight: &Input<'_, T>,
        factors: &[Factors<'_, T>],
    ) -> Result<()> {
        check.input("weight", weight, self.outputs * self.inputs, VECTOR_BYTES)?;
        self.check_count("factors", factors.len())?;
        for (adapter, factors) in self.adapters.iter().zip(factors) {
            let [a, b] = self.factor_sizes(adapter);
            check.input("factors.a", &factors.a, a, 1)?;
            check.input("factors.b", &factors.b, b, 1)?;
        }
        Ok(())
    }

    fn check_rows(
        &self,
        check: &mut Check,
        groups: Option<&Groups<'_>>,
        dropout: Option<&Dropout<'_>>,
    ) -> Result<()> {
        match (self.tasks, groups) {
            (Some(tasks), Some(groups)) => {
                check.input("groups.offsets", &groups.offsets, tasks.groups + 1, 1)?;
                check.input("groups.sets", &groups.sets, tasks.groups, 1)?;
            }
            (None, None) => {}
            (tasks, groups) => {
                let having = |yes| if yes { "given" } else { "not given" };
                let expected = format_args!("{}, as `tasks`", having(tasks.is_some()));
                return Err(Error::value("groups", having(groups.is_some()), expected));
            }
        }
        if let Some(dropout) = dropout {
            check.input("keep", &dropout.keep, self.keep_words(), 1)?;
            if !dropout.scale.is_finite() {
                return Err(Error::value("scale", dropout.scale, "a finite number"));
            }
        }
        Ok(())
    }

    fn check_count(&self, argument: &'static str, found: usize) -> Result<()> {
        match self.adapters.len() {
            expected if found == expected => Ok(()),
            expected => Err(Error::Length {
                argument,
                found,
                expected,
            }),
        }
    }

    /// Elements of A and B of all sets.
    fn factor_sizes(&self, adapter: &Adapter) -> [usize; 2] {
        let [inputs, outputs] =
            [self.inputs, adapter.outputs].map(|width| self.sets() * adapter.rank * width);
        match self.transposed {
            true => [outputs, inputs],
            false => [inputs, outputs],
        }
    }

    fn sets(&self) -> usize {
        self.tasks.map_or(1, |tasks| tasks.sets)
    }

    fn groups(&self) -> Arg {
        Arg::I32(self.tasks.map_or(0, |tasks| tasks.groups as i32))
    }

    /// First output, outputs and rank of adapter p, as the kernels take them; there need not be one.
    fn range(&self, p: usize) -> [Arg; 3] {
        let range = match self.adapters.get(p) {
            Some(adapter) => [adapter.output, adapter.outputs, adapter.rank],
            None => [self.outputs, 0, 0],
        };
        range.map(|number| Arg::I32(number as i32))
    }

    fn scaling(&self, p: usize) -> f32 {
        self.adapters.get(p).map_or(0.0, |adapter| adapter.scaling)
    }

    /// Each group begins with a tile of its own: this many suit groups of any lengths.
    fn row_tiles(&self, tile: Tile) -> usize {
        match self.tasks {
            Some(tasks) if self.rows > 0 => self.rows / tile.rows() + tasks.groups,
            _ => self.rows.div_ceil(tile.rows()),
        }
    }

    /// Forward, each adapter begins with a tile of its own, and so do the outputs after it. Without columns one tile is
    /// there for what is kept.
    fn column_tiles(&self, backward: bool, columns: usize, tile: Tile) -> usize {
        let tiles = |columns: usize| columns.div_ceil(tile.columns());
        if backward {
            return tiles(columns.max(1));
        }
        let mut end = 0;
        let mut count = 0;
        for adapter in self.adapters {
            count += tiles(adapter.output - end) + tiles(adapter.outputs);
            end = adapter.output + adapter.outputs;
        }
        count + tiles(columns - end)
    }

    fn tile(&self, backward: bool, columns: usize) -> Tile {
        let wide = Tile::Wide;
        let blocks = self.row_tiles(wide) * self.column_tiles(backward, columns, wide);
        let filled = self
            .tasks
            .is_none_or(|tasks| self.rows >= tasks.groups.saturating_mul(Tile::MIN_WIDE_GROUP));
        if filled && blocks >= Tile::MIN_WIDE_BLOCKS && columns >= Tile::Wide.columns() {
            wide
        } else {
            Tile::Small
        }
    }

    /// Tiles of the gradients: of x with all ranks, and of the outputs of each adapter.
    fn factor_tiles(&self) -> usize {
        let tiles = |columns: usize| columns.div_ceil(FACTOR_COLUMNS);
        let outputs = self.adapters.iter().map(|adapter| tiles(adapter.outputs));
        tiles(self.inputs) * self.ranks().div_ceil(MAX_RANK) + outputs.sum::<usize>()
    }

    /// Parts that the rows are split into for the gradients.
    fn splits(&self) -> usize {
        let blocks = (self.factor_tiles() * self.sets()).max(1);
        let most = self.rows.div_ceil(FACTOR_ROWS).max(1);
        FACTOR_BLOCKS.div_ceil(blocks).min(most)
    }

    /// Of A and B of one set.
    fn gradient_elements(&self) -> usize {
        let sizes = self.adapters.iter();
        sizes
            .map(|adapter| adapter.rank * (self.inputs + adapter.outputs))
            .sum()
    }
}

fn keep(dropout: Option<&Dropout<'_>>) -> Span {
    span_or_null(dropout.map(|dropout| &dropout.keep))
}

/// The dropout's scale goes with that of the adapter, so that the kernels only mask.
fn scale(dropout: Option<&Dropout<'_>>) -> f32 {
    dropout.map_or(1.0, |dropout| dropout.scale)
}

fn groups_args(groups: Option<&Groups<'_>>) -> [Arg; 2] {
    [
        Arg::Input(span_or_null(groups.map(|groups| &groups.offsets))),
        Arg::Input(span_or_null(groups.map(|groups| &groups.sets))),
    ]
}

/// A weight that takes up an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merge {
    /// Of the weight: 1 to 65535.
    pub rows: usize,
    /// Of the weight: 1 to 2³¹ − 1.
    pub columns: usize,
    /// Of the adapter; 0 for none.
    pub rank: usize,
}

/// The tensors of merged = W + s·B·A. `weight` stays as it is: with rank 0 merged becomes W again, exactly.
#[derive(Debug)]
pub struct Merging<'a, M, T> {
    /// W [rows, columns]; for an adapter of some outputs, these rows, or columns where the map is transposed.
    pub weight: Rows<Input<'a, M>>,
    /// A [rank, columns]
    pub a: Input<'a, M>,
    /// B [rows, rank]
    pub b: Input<'a, M>,
    /// s = α/r.
    pub scaling: f32,
    /// [rows, columns]
    pub merged: Rows<Output<'a, T>>,
}

impl Merge {
    /// Errors: rows, columns or rank beyond their bounds.
    pub fn validate(&self) -> Result<()> {
        if !(1..=MAX_BLOCKS).contains(&self.rows) {
            let expected = format_args!("1 to {MAX_BLOCKS}");
            return Err(Error::value("rows", self.rows, expected));
        }
        for (argument, found, least) in [("columns", self.columns, 1), ("rank", self.rank, 0)] {
            if found < least || i32::try_from(found).is_err() {
                let expected = format_args!("{least} to {}", i32::MAX);
                return Err(Error::value(argument, found, expected));
            }
        }
        Ok(())
    }

    /// merged ← weight, a, b, computed in f32 and rounded once: one launch. Errors: those of [`plan`](Self::plan) and
    /// of the launcher.
    pub fn run<M: Storage, T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Merging<'_, M, T>,
    ) -> Result<()> {
        launcher.launch(&self.plan(&tensors)?)
    }

    /// What [`run`](Self::run) launches. Errors: shape, sizes, overlaps, a master that is neither f32 nor of the type
    /// of `merged`.
    pub fn plan<'a, M: Storage, T: Storage>(
        &self,
        tensors: &'a Merging<'_, M, T>,
    ) -> Result<Launch<'a>> {
        self.validate()?;
        let kernel = match (M::TYPE, T::TYPE) {
            (Type::F32, Type::F32) => "lora_merge_f32",
            (Type::Bf16, Type::Bf16) => "lora_merge_bf16",
            (Type::F16, Type::F16) => "lora_merge_f16",
            (Type::F32, Type::Bf16) => "lora_merge_f32_bf16",
            (Type::F32, Type::F16) => "lora_merge_f32_f16",
            (found, merged) => {
                let expected = format_args!("F32 or {merged:?}");
                return Err(Error::value("weight", format_args!("{found:?}"), expected));
            }
        };
        let shape = [self.rows, self.columns];
        let mut check = Check::new();
        check.input_rows("weight", &tensors.weight, shape, 1)?;
        check.input("a", &tensors.a, self.rank.saturating_mul(self.columns), 1)?;
        check.input("b", &tensors.b, self.rank.saturating_mul(self.rows), 1)?;
        check.output_rows("merged", &tensors.merged, shape, 1)?;
        let home = check.disjoint(&[])?;
        Ok(Launch::new(
            ("lora_merge", kernel),
            [
                blocks("columns", self.columns, MERGE_THREADS)?,
                self.rows as u32,
                1,
            ],
            [MERGE_THREADS as u32, 1, 1],
            0,
            home,
            [
                Arg::Input(tensors.weight.span(shape)),
                Arg::Input(tensors.a.span()),
                Arg::Input(tensors.b.span()),
                Arg::Output(tensors.merged.span(shape)),
                tensors.weight.stride(),
                tensors.merged.stride(),
                Arg::I32(self.columns as i32),
                Arg::I32(self.rank as i32),
                Arg::F32(tensors.scaling),
            ],
        ))
    }
}
