//! The convolutional front end: two 3×3 convolutions, each with ReLU, on one-hot cells (SPEC section 6). Kernels and
//! equations: `kernels/convolutions_forward.cu` and `kernels/convolutions_backward.cu`; definition:
//! `dtmem_reference::convolution`.

use dtmem_reference::convolution::Grid;

use super::launch::{Arg, Launch, Launcher};
use super::memory::{Check, Input, Output, Span, Storage, for_each_type, kernel_for};
use super::{Error, Result};

const TAPS: usize = 9;
const CHUNK: usize = 8;
const VECTOR_BYTES: usize = 16;
/// Positions of a tile of the kernels.
const TILE: usize = 16;
const MAX_SIDE: usize = 16;
const MAX_CHANNELS: usize = 128;
const MAX_FIELDS: usize = 8;
const MAX_ROWS: usize = 1 << 30;
/// What a block may have on every GPU of compute capability 8.0 and above.
const SHARED_BYTES: usize = 99 << 10;

const THREADS: u32 = 128;
const WARPS: usize = 4;
/// Tiles of positions, and chunks of channels, that a warp owns at a time.
const WARP_TILES: usize = 5;
/// Two for each multiprocessor of a large GPU.
const MAX_BLOCKS: usize = 264;
/// Fewer than these are not worth a slice of weights that stays where it is.
const MIN_POSITIONS: usize = 96;

const GRADIENT_THREADS: u32 = 256;
/// Fixed, not the number of a GPU's processors: the bits of the parameters' gradients depend on it.
const MAX_GRADIENT_BLOCKS: usize = 128;
/// Chunks of the input of a block: channels of the map, one-hot channels.
const INPUT_CHUNKS: usize = 5;
const ONE_HOT_CHUNKS: usize = 3;
const REDUCE_COLUMNS: usize = 32;

/// Observations, and the channels that become of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Observations: up to 2³⁰.
    pub rows: usize,
    /// Up to 16×16 cells of up to 8 fields, with up to 128 one-hot channels in all.
    pub grid: Grid,
    /// Channels after the first convolution: a multiple of 8, up to 128.
    pub middle: usize,
    /// Channels after the second: a multiple of 8, up to 128.
    pub out: usize,
}

/// The tensors of middle = ReLU(W1 ∗ one-hot(codes) + b1), out = ReLU(W2 ∗ middle + b2). Weights and middle begin at
/// multiples of 16 bytes.
#[derive(Debug)]
pub struct Forward<'a, T> {
    /// [rows, positions·fields], \[vx\]\[vy\]\[field\] in a row. A code that is no value of its field counts as no
    /// channel.
    pub codes: Input<'a, u8>,
    /// [channels, 9, middle]
    pub weight1: Input<'a, T>,
    /// \[middle\]
    pub bias1: Input<'a, T>,
    /// [out, middle, 9]
    pub weight2: Input<'a, T>,
    /// \[out\]
    pub bias2: Input<'a, T>,
    /// [rows, positions, middle], kept for the backward pass: unlike in the reference, position by position.
    pub middle: Output<'a, T>,
    /// [rows, out, positions]
    pub out: Output<'a, T>,
}

/// The tensors of the gradients. weight2, middle, out, dout and dmiddle begin at multiples of 16 bytes.
#[derive(Debug)]
pub struct Backward<'a, T> {
    /// As in the forward pass.
    pub codes: Input<'a, u8>,
    /// [out, middle, 9]
    pub weight2: Input<'a, T>,
    /// Of the forward pass [rows, positions, middle].
    pub middle: Input<'a, T>,
    /// Of the forward pass [rows, out, positions].
    pub out: Input<'a, T>,
    /// The gradient of out [rows, out, positions]; is overwritten, and then good for nothing else.
    pub dout: Output<'a, T>,
    /// The gradient of middle before its ReLU [rows, positions, middle].
    pub dmiddle: Output<'a, T>,
    /// [channels, 9, middle], added to.
    pub dweight1: Output<'a, f32>,
    /// \[middle\], added to.
    pub dbias1: Output<'a, f32>,
    /// [out, middle, 9], added to.
    pub dweight2: Output<'a, f32>,
    /// \[out\], added to.
    pub dbias2: Output<'a, f32>,
    /// At least [`Shape::workspace`] elements, of any content.
    pub workspace: Output<'a, f32>,
}

/// How a kernel takes its work: frames of a block at a time, and what else its blocks own.
#[derive(Debug, Clone, Copy)]
struct Tiling {
    frames: usize,
    /// Chunks of a slice of the weights, or rows of a block's part of the gradient.
    size: usize,
    shared_bytes: usize,
}

impl Shape {
    /// Errors: numbers beyond their bounds; a grid with channels that do not fit into 99 KiB of shared memory. 16×16
    /// cells of 20→40→80 channels do in 16 bits, 9×9 in f32.
    pub fn validate<T: Storage>(&self) -> Result<()> {
        let bounds = [
            ("rows", self.rows, 0, MAX_ROWS),
            ("width", self.grid.width, 1, MAX_SIDE),
            ("height", self.grid.height, 1, MAX_SIDE),
            ("fields", self.grid.cardinalities.len(), 1, MAX_FIELDS),
            ("channels", self.grid.channels(), 1, MAX_CHANNELS),
            ("middle", self.middle, CHUNK, MAX_CHANNELS),
            ("out", self.out, CHUNK, MAX_CHANNELS),
        ];
        for (name, found, least, most) in bounds {
            if !(least..=most).contains(&found) {
                let expected = format_args!("{least} to {most}");
                return Err(Error::value(name, found, expected));
            }
        }
        for (name, found) in [("middle", self.middle), ("out", self.out)] {
            if !found.is_multiple_of(CHUNK) {
                return Err(Error::value(name, found, "a multiple of 8"));
            }
        }
        self.forward_tiling::<T>()?;
        self.input_gradient_tiling::<T>()?;
        self.weight_gradient_tiling::<T>(self.out, Some(self.middle))?;
        self.weight_gradient_tiling::<T>(self.middle, None)?;
        Ok(())
    }

    /// f32 elements of the workspace of the backward pass: at most 128 times the parameters with their channels rounded
    /// up to multiples of 8, and 8 per bias.
    pub fn workspace<T: Storage>(&self) -> Result<usize> {
        self.validate::<T>()?;
        Ok(self.partial_len().iter().sum())
    }

    /// middle and out ← codes: one launch. Errors: those of [`plan_forward`](Self::plan_forward) and of the launcher.
    pub fn forward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Forward<'_, T>,
    ) -> Result<()> {
        launcher.launch(&self.plan_forward(&tensors)?)
    }

    /// What [`forward`](Self::forward) launches. Errors: those of [`validate`](Self::validate), sizes, alignment,
    /// overlaps.
    pub fn plan_forward<'a, T: Storage>(&self, tensors: &'a Forward<'_, T>) -> Result<Launch<'a>> {
        self.validate::<T>()?;
        let [weight1, weight2] = self.weights();
        let mut check = Check::new();
        check.input("codes", &tensors.codes, self.codes(), 1)?;
        check.input("weight1", &tensors.weight1, weight1, VECTOR_BYTES)?;
        check.input("bias1", &tensors.bias1, self.middle, 1)?;
        check.input("weight2", &tensors.weight2, weight2, VECTOR_BYTES)?;
        check.input("bias2", &tensors.bias2, self.out, 1)?;
        check.output(
            "middle",
            &tensors.middle,
            self.maps(self.middle),
            VECTOR_BYTES,
        )?;
        check.output("out", &tensors.out, self.maps(self.out), 1)?;
        let home = check.disjoint(&[])?;

        let tiling = self.forward_tiling::<T>()?;
        let [rows, width, height, frames] = self.sizes(tiling);
        Ok(Launch::new(
            (
                "convolutions_forward",
                kernel_for::<T>(for_each_type!("convolutions_forward")),
            ),
            [self.blocks(tiling), 1, 1],
            [THREADS, 1, 1],
            tiling.shared_bytes as u32,
            home,
            [
                Arg::Input(tensors.codes.span()),
                Arg::Input(tensors.weight1.span()),
                Arg::Input(tensors.bias1.span()),
                Arg::Input(tensors.weight2.span()),
                Arg::Input(tensors.bias2.span()),
                Arg::Output(tensors.middle.span()),
                Arg::Output(tensors.out.span()),
                self.starts(),
                number(self.grid.cardinalities.len()),
                number(self.grid.channels()),
                number(self.middle),
                number(self.out),
                rows,
                width,
                height,
                frames,
                number(tiling.size.min(self.chunks())),
                number(tiling.size.min(self.middle / CHUNK)),
            ],
        ))
    }

    /// The parameters' gradients are added to, dmiddle ← dout: four launches. Errors: those of
    /// [`plan_backward`](Self::plan_backward) and of the launcher.
    pub fn backward<T: Storage>(
        &self,
        launcher: &impl Launcher,
        tensors: Backward<'_, T>,
    ) -> Result<()> {
        let plan = self.plan_backward(&tensors)?;
        plan.iter().try_for_each(|launch| launcher.launch(launch))
    }

    /// What [`backward`](Self::backward) launches. Errors: those of [`validate`](Self::validate), sizes, alignment,
    /// overlaps.
    pub fn plan_backward<'a, T: Storage>(
        &self,
        tensors: &'a Backward<'_, T>,
    ) -> Result<[Launch<'a>; 4]> {
        const FAMILY: &str = "convolutions_backward";
        let workspace = self.workspace::<T>()?;
        let [weight1, weight2] = self.weights();
        let [middle, out] = [self.middle, self.out].map(|channels| self.maps(channels));
        let mut check = Check::new();
        check.input("codes", &tensors.codes, self.codes(), 1)?;
        check.input("weight2", &tensors.weight2, weight2, VECTOR_BYTES)?;
        check.input("middle", &tensors.middle, middle, VECTOR_BYTES)?;
        check.input("out", &tensors.out, out, VECTOR_BYTES)?;
        check.output("dout", &tensors.dout, out, VECTOR_BYTES)?;
        check.output("dmiddle", &tensors.dmiddle, middle, VECTOR_BYTES)?;
        check.output("dweight1", &tensors.dweight1, weight1, 1)?;
        check.output("dbias1", &tensors.dbias1, self.middle, 1)?;
        check.output("dweight2", &tensors.dweight2, weight2, 1)?;
        check.output("dbias2", &tensors.dbias2, self.out, 1)?;
        check.workspace("workspace", &tensors.workspace, workspace)?;
        let home = check.disjoint(&[])?;

        let [middle_channels, out_channels] = [self.middle, self.out].map(number);
        let channels = number(self.grid.channels());
        let [dy, dmiddle] = [tensors.dout.span(), tensors.dmiddle.span()];
        let mut address = tensors.workspace.span().address;
        let [partial1, partial2] = self.partial_len().map(|len| {
            let bytes = len * size_of::<f32>();
            let span = Span { address, bytes };
            address += bytes as u64;
            span
        });
        let blocks = self.gradient_blocks();

        let tiling = self.input_gradient_tiling::<T>()?;
        let [rows, width, height, frames] = self.sizes(tiling);
        let input = Launch::new(
            (
                FAMILY,
                kernel_for::<T>(for_each_type!("convolutions_input_gradient")),
            ),
            [self.blocks(tiling), 1, 1],
            [THREADS, 1, 1],
            tiling.shared_bytes as u32,
            home,
            [
                Arg::Input(tensors.weight2.span()),
                Arg::Input(tensors.middle.span()),
                Arg::Input(tensors.out.span()),
                Arg::Output(dy),
                Arg::Output(dmiddle),
                middle_channels,
                out_channels,
                rows,
                width,
                height,
                frames,
                number(tiling.size.min(self.out / CHUNK)),
            ],
        );

        let tiling = self.weight_gradient_tiling::<T>(self.out, Some(self.middle))?;
        let [rows, width, height, frames] = self.sizes(tiling);
        let second = Launch::new(
            (
                FAMILY,
                kernel_for::<T>(for_each_type!("convolutions_weight2_gradient")),
            ),
            [
                blocks,
                parts(self.out, tiling, self.middle / CHUNK, INPUT_CHUNKS),
                1,
            ],
            [GRADIENT_THREADS, 1, 1],
            tiling.shared_bytes as u32,
            home,
            [
                Arg::Input(dy),
                Arg::Input(tensors.middle.span()),
                Arg::Output(partial2),
                middle_channels,
                out_channels,
                rows,
                width,
                height,
                frames,
                number(tiling.size),
            ],
        );

        let tiling = self.weight_gradient_tiling::<T>(self.middle, None)?;
        let [rows, width, height, frames] = self.sizes(tiling);
        let first = Launch::new(
            (
                FAMILY,
                kernel_for::<T>(for_each_type!("convolutions_weight1_gradient")),
            ),
            [
                blocks,
                parts(self.middle, tiling, self.chunks(), ONE_HOT_CHUNKS),
                1,
            ],
            [GRADIENT_THREADS, 1, 1],
            tiling.shared_bytes as u32,
            home,
            [
                Arg::Input(dmiddle),
                Arg::Input(tensors.codes.span()),
                Arg::Output(partial1),
                self.starts(),
                number(self.grid.cardinalities.len()),
                channels,
                middle_channels,
                rows,
                width,
                height,
                frames,
                number(tiling.size),
            ],
        );

        let columns = self.partial_len().map(|len| len / blocks as usize);
        let widest = columns[0].max(columns[1]);
        let sums = Launch::new(
            (FAMILY, "convolutions_reduce"),
            [widest.div_ceil(REDUCE_COLUMNS) as u32, 2, 1],
            [GRADIENT_THREADS, 1, 1],
            0,
            home,
            [
                Arg::Input(partial1),
                Arg::Input(partial2),
                Arg::Output(tensors.dweight1.span()),
                Arg::Output(tensors.dbias1.span()),
                Arg::Output(tensors.dweight2.span()),
                Arg::Output(tensors.dbias2.span()),
                number(blocks as usize),
                channels,
                middle_channels,
                out_channels,
            ],
        );
        Ok([input, second, first, sums])
    }

    /// Chunks of one-hot channels.
    fn chunks(&self) -> usize {
        self.grid.channels().div_ceil(CHUNK)
    }

    fn codes(&self) -> usize {
        self.rows * self.grid.positions() * self.grid.cardinalities.len()
    }

    fn maps(&self, channels: usize) -> usize {
        self.rows * self.grid.positions() * channels
    }

    fn weights(&self) -> [usize; 2] {
        [
            self.grid.channels() * TAPS * self.middle,
            self.out * self.middle * TAPS,
        ]
    }

    /// Byte f is the first channel of field f.
    fn starts(&self) -> Arg {
        let mut bytes = [0; MAX_FIELDS];
        let mut start = 0;
        for (byte, &cardinality) in bytes.iter_mut().zip(&self.grid.cardinalities) {
            *byte = start as u8;
            start += cardinality;
        }
        Arg::U64(u64::from_le_bytes(bytes))
    }

    fn sizes(&self, tiling: Tiling) -> [Arg; 4] {
        [self.rows, self.grid.width, self.grid.height, tiling.frames].map(number)
    }

    fn blocks(&self, tiling: Tiling) -> u32 {
        self.rows.div_ceil(tiling.frames).min(MAX_BLOCKS) as u32
    }

    /// One where there are no rows: it writes partial sums of 0.
    fn gradient_blocks(&self) -> u32 {
        self.rows.clamp(1, MAX_GRADIENT_BLOCKS) as u32
    }

    /// Partial sums of both convolutions: per block and output channel nine for each channel of the input, and one
    /// chunk for the bias.
    fn partial_len(&self) -> [usize; 2] {
        [
            (self.middle, self.chunks()),
            (self.out, self.middle / CHUNK),
        ]
        .map(|(outputs, chunks)| {
            self.gradient_blocks() as usize * outputs * (chunks * TAPS + 1) * CHUNK
        })
    }

    /// Cells in shared memory: the frames below each other, with what separates them.
    fn cells(&self, frames: usize) -> usize {
        (frames * (self.grid.width + 1) + 1) * (self.grid.height + 1) + 1
    }

    fn forward_tiling<T: Storage>(&self) -> Result<Tiling> {
        let chunks = self.chunks().max(self.middle / CHUNK);
        self.convolution_tiling(chunks, self.out, |slice, frames| {
            let first = self.middle * slice_pitch::<T>(slice.min(self.chunks()));
            let second = self.out * slice_pitch::<T>(slice.min(self.middle / CHUNK));
            let map = self.cells(frames) * map_pitch::<T>(self.middle);
            let bits = self.cells(frames) * self.chunks();
            (first + second + map) * size_of::<T>() + bits.next_multiple_of(VECTOR_BYTES)
        })
    }

    fn input_gradient_tiling<T: Storage>(&self) -> Result<Tiling> {
        self.convolution_tiling(self.out / CHUNK, self.middle, |slice, frames| {
            let weight = self.middle * slice_pitch::<T>(slice);
            let places = frames * self.grid.positions() * size_of::<u16>();
            (weight + self.cells(frames) * map_pitch::<T>(self.out)) * size_of::<T>() + places
        })
    }

    /// The largest slice of the weights that leaves room for enough positions. `chunks`: of the input.
    fn convolution_tiling(
        &self,
        chunks: usize,
        outputs: usize,
        bytes: impl Fn(usize, usize) -> usize,
    ) -> Result<Tiling> {
        let groups = (outputs / CHUNK).div_ceil(WARP_TILES);
        let slots = |frames: usize| {
            let tiles = (frames * self.grid.positions()).div_ceil(TILE);
            let turns = (tiles * groups).div_ceil(WARPS * WARP_TILES);
            let share = (tiles * groups).div_ceil(WARPS * turns);
            (tiles.div_ceil(share) * groups).div_ceil(WARPS) * share
        };
        let most = self.most_frames(MAX_BLOCKS);
        let mut found = None;
        for size in [chunks, 2.min(chunks), 1] {
            let Some(tiling) = self.tiling(most, size, |frames| bytes(size, frames), slots) else {
                continue;
            };
            found = Some(tiling);
            if tiling.frames * self.grid.positions() >= MIN_POSITIONS || tiling.frames == most {
                break;
            }
        }
        found.ok_or_else(|| self.too_large(bytes(1, 1)))
    }

    /// For dy of `outputs` channels, and a map of `inputs` channels or the bits.
    fn weight_gradient_tiling<T: Storage>(
        &self,
        outputs: usize,
        inputs: Option<usize>,
    ) -> Result<Tiling> {
        let padded = |frames: usize| (frames * self.grid.positions()).next_multiple_of(TILE);
        let bytes = |rows: usize, frames: usize| {
            let input = match inputs {
                Some(channels) => {
                    map_pitch::<T>(channels.min(INPUT_CHUNKS * CHUNK)) * size_of::<T>()
                }
                None => self.chunks(),
            };
            let dy = padded(frames) * map_pitch::<T>(rows) * size_of::<T>();
            let input = (2 * self.cells(frames) * input).next_multiple_of(VECTOR_BYTES);
            input + 2 * dy + padded(frames) * size_of::<u16>()
        };
        let most = self.most_frames(MAX_GRADIENT_BLOCKS);
        [80, 40, 16]
            .into_iter()
            .map(|rows| outputs.min(rows))
            .find_map(|rows| self.tiling(most, rows, |frames| bytes(rows, frames), padded))
            .ok_or_else(|| self.too_large(bytes(outputs.min(16), 1)))
    }

    /// With the frames that fit and leave the smallest part of the slots empty.
    fn tiling(
        &self,
        most: usize,
        size: usize,
        bytes: impl Fn(usize) -> usize,
        slots: impl Fn(usize) -> usize,
    ) -> Option<Tiling> {
        (1..=most)
            .map(|frames| (frames, bytes(frames)))
            .take_while(|&(_, bytes)| bytes <= SHARED_BYTES)
            .max_by_key(|&(frames, _)| (frames * 10_000 / slots(frames), frames))
            .map(|(frames, shared_bytes)| Tiling {
                frames,
                size,
                shared_bytes,
            })
    }

    /// So that few observations are spread over many blocks.
    fn most_frames(&self, blocks: usize) -> usize {
        self.rows.div_ceil(blocks).clamp(1, 64)
    }

    fn too_large(&self, bytes: usize) -> Error {
        Error::value(
            "grid and channels",
            format_args!(
                "{}×{}, {}→{}→{}",
                self.grid.width,
                self.grid.height,
                self.grid.channels(),
                self.middle,
                self.out
            ),
            format_args!("what fits into {SHARED_BYTES} bytes of shared memory, not {bytes}"),
        )
    }
}

fn number(x: usize) -> Arg {
    Arg::I32(x as i32)
}

/// Blocks that share a gradient: ⌈outputs / rows of a part⌉ · ⌈chunks / those of a part⌉.
fn parts(outputs: usize, tiling: Tiling, chunks: usize, per_part: usize) -> u32 {
    (outputs.div_ceil(tiling.size) * chunks.div_ceil(per_part)) as u32
}

/// Elements of a row of a slice of the weights, as in `Weights::slice_pitch`.
fn slice_pitch<T>(chunks: usize) -> usize {
    (chunks * TAPS).next_multiple_of(2) * CHUNK + VECTOR_BYTES / size_of::<T>()
}

/// Elements of a cell of a map, as in the kernels' `pitch`.
fn map_pitch<T>(channels: usize) -> usize {
    match size_of::<T>() {
        4 => channels + 4,
        _ => ((channels / CHUNK) | 1) * CHUNK,
    }
}
