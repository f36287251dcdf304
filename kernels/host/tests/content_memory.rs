//! content_memory.cu and content_memory_backward.cu against the reference, and against the fixtures of SPEC section 9.

mod common;

use std::ops::Range;
use std::path::Path;

use common::{
    Random, Storage, assert_close, assert_every_barrier_is_needed, assert_near, in_every_order,
    norm,
};
use dtmem_host::{Arg, Buffer, Executor, Launch, Result, View};
use dtmem_reference::content_memory::{
    Addressing, ContentMemory, Erase, Gradients, Inputs, Order, Strength,
};
use half::{bf16, f16};
use ndarray::{Array, Array1, Array2, Array3, Axis, Dimension, IxDyn, arr0, s};
use proptest::prelude::*;
use safetensors::SafeTensors;

const TILE: usize = 64;
const THREADS: usize = 256;

/// The segments of a pack, and the gradients of their outputs; all as the storage type holds it.
#[derive(Debug, Clone)]
struct Pack {
    /// Tokens of each sequence.
    lengths: Vec<usize>,
    memory: Array3<f64>,
    address_key: Array2<f64>,
    strength_key: Array2<f64>,
    value: Array2<f64>,
    key_strength: Option<Array1<f64>>,
    strength_bias: f64,
    grad_memory_next: Array3<f64>,
    grad_read: Array2<f64>,
}

#[derive(Debug)]
struct Outputs {
    memory_next: Array3<f64>,
    read: Array2<f64>,
}

impl Pack {
    /// Standard normal numbers.
    fn draw<T: Storage>(variant: &ContentMemory, shape: &Shape, seed: u64) -> Self {
        let Shape {
            lengths,
            slots,
            key_width,
            carried,
        } = shape;
        let (slots, width) = (*slots, key_width + carried);
        let mut random = Random(seed);
        let (sequences, tokens) = (lengths.len(), lengths.iter().sum());
        let cosine = variant.addressing == Addressing::Cosine;
        Self {
            lengths: lengths.to_vec(),
            memory: random.array::<T, _>((sequences, slots, width)),
            address_key: random.array::<T, _>((tokens, *key_width)),
            strength_key: random.array::<T, _>((tokens, *key_width)),
            value: random.array::<T, _>((tokens, width)),
            key_strength: cosine.then(|| {
                let drawn = random.array::<T, _>(tokens);
                drawn.map(|&x| T::round(1.0 + x.abs()).widen())
            }),
            strength_bias: f64::from(random.normal() as f32),
            grad_memory_next: random.array::<T, _>((sequences, slots, width)),
            grad_read: random.array::<T, _>((tokens, width)),
        }
    }

    /// Keys and memory become small whole numbers: every score is exact, and many are equal.
    fn in_whole_numbers(mut self) -> Self {
        self.memory.mapv_inplace(|x| (1.5 * x).round());
        self.address_key.mapv_inplace(|x| (1.5 * x).round());
        self.strength_key.mapv_inplace(|x| (1.5 * x).round());
        if let Some(key_strength) = &mut self.key_strength {
            key_strength.fill(2.0);
        }
        self
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn offsets(&self) -> Vec<i32> {
        let mut offsets = vec![0];
        for &length in &self.lengths {
            offsets.push(offsets[offsets.len() - 1] + length as i32);
        }
        offsets
    }

    /// Number and tokens of each sequence.
    fn sequences(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let offsets = self.offsets();
        (0..self.lengths.len()).map(move |b| (b, offsets[b] as usize..offsets[b + 1] as usize))
    }

    fn inputs(&self, sequence: usize, tokens: &Range<usize>) -> Inputs<'_, f64> {
        let rows = s![tokens.clone(), ..];
        Inputs {
            memory: self.memory.index_axis(Axis(0), sequence),
            address_key: self.address_key.slice(rows),
            strength_key: self.strength_key.slice(rows),
            value: self.value.slice(rows),
            key_strength: self
                .key_strength
                .as_ref()
                .map(|x| x.slice(s![tokens.clone()])),
            strength_bias: self.strength_bias,
        }
    }

    fn reference_forward(&self, variant: &ContentMemory) -> Outputs {
        let mut memory_next = Array::from_elem(self.memory.dim(), f64::NAN);
        let mut read = Array::from_elem(self.value.dim(), f64::NAN);
        for (b, tokens) in self.sequences() {
            variant
                .forward(
                    self.inputs(b, &tokens),
                    memory_next.index_axis_mut(Axis(0), b),
                    read.slice_mut(s![tokens.clone(), ..]),
                    &mut Vec::new(),
                )
                .unwrap();
        }
        Outputs { memory_next, read }
    }

    /// The gradients in the place of the inputs.
    fn reference_backward(&self, variant: &ContentMemory) -> Self {
        let mut gradients = self.clone();
        gradients.strength_bias = 0.0;
        for (b, tokens) in self.sequences() {
            let mut bias = f64::NAN;
            let rows = s![tokens.clone(), ..];
            variant
                .backward(
                    self.inputs(b, &tokens),
                    self.grad_memory_next.index_axis(Axis(0), b),
                    self.grad_read.slice(rows),
                    Gradients {
                        memory: gradients.memory.index_axis_mut(Axis(0), b),
                        address_key: gradients.address_key.slice_mut(rows),
                        strength_key: gradients.strength_key.slice_mut(rows),
                        value: gradients.value.slice_mut(rows),
                        key_strength: gradients
                            .key_strength
                            .as_mut()
                            .map(|x| x.slice_mut(s![tokens.clone()])),
                        strength_bias: &mut bias,
                    },
                    &mut Vec::new(),
                )
                .unwrap();
            gradients.strength_bias += bias;
        }
        gradients
    }
}

fn upload<T: Storage, D: Dimension>(executor: &Executor, x: &Array<f64, D>) -> Buffer<T> {
    common::upload(executor, x)
}

/// Rows of `width` in a buffer of wider ones.
struct Rows<'a, T> {
    buffer: &'a Buffer<T>,
    start: usize,
    stride: usize,
}

impl<T: Storage> Rows<'_, T> {
    fn view(&self) -> View {
        self.buffer
            .slice(self.start.min(self.buffer.len())..self.buffer.len())
    }

    fn stride(&self) -> Arg {
        Arg::I32(self.stride as i32)
    }

    fn download(&self, width: usize) -> Vec<T> {
        let all = self.buffer.download();
        let rows = all.chunks(self.stride);
        rows.flat_map(|row| row[self.start..self.start + width].to_vec())
            .collect()
    }
}

/// The workspace, cut into pieces from the front.
struct Workspace {
    buffer: Buffer<f32>,
    used: usize,
}

impl Workspace {
    fn take(&mut self, len: usize) -> View {
        let start = self.used;
        self.used += len;
        assert!(self.used <= self.buffer.len(), "the workspace is too small");
        self.buffer.slice(start..self.used)
    }
}

/// A pack in the executor's memory, and the launches on it.
struct Run<'a, T: Storage> {
    executor: &'a Executor,
    variant: ContentMemory,
    offsets: Buffer<i32>,
    memory: Buffer<T>,
    /// a and s side by side, with a gap behind them.
    keys: Buffer<T>,
    value: Buffer<T>,
    key_strength: Option<Buffer<T>>,
    bias: Option<Buffer<f32>>,
    grad_memory_next: Buffer<T>,
    grad_read: Buffer<T>,
    sequences: usize,
    slots: usize,
    key_width: usize,
    width: usize,
    tokens: usize,
    longest: usize,
}

fn tiles(n: usize) -> usize {
    n.div_ceil(TILE)
}

/// Elements behind a row: odd, unless the width is one that the kernels for short segments take.
fn gap(width: usize) -> usize {
    if width.is_multiple_of(16) { 8 } else { 3 }
}

fn read_only(view: Option<View>) -> Arg {
    Arg::Input(view.unwrap_or(View::NULL))
}

impl<'a, T: Storage> Run<'a, T> {
    fn new(executor: &'a Executor, variant: &ContentMemory, pack: &Pack) -> Self {
        let (sequences, slots, width) = pack.memory.dim();
        let tokens = pack.tokens();
        let key_width = pack.address_key.ncols();
        let mut keys = Array2::from_elem((tokens, 2 * key_width + gap(key_width)), f64::NAN);
        keys.slice_mut(s![.., ..key_width])
            .assign(&pack.address_key);
        keys.slice_mut(s![.., key_width..2 * key_width])
            .assign(&pack.strength_key);
        let mut value = Array2::from_elem((tokens, width + gap(width)), f64::NAN);
        value.slice_mut(s![.., ..width]).assign(&pack.value);
        Self {
            executor,
            variant: *variant,
            offsets: executor.upload(&pack.offsets()),
            memory: upload(executor, &pack.memory),
            keys: upload(executor, &keys),
            value: upload(executor, &value),
            key_strength: pack.key_strength.as_ref().map(|x| upload(executor, x)),
            bias: (variant.strength == Strength::Sigmoid)
                .then(|| executor.upload(&[pack.strength_bias as f32])),
            grad_memory_next: upload(executor, &pack.grad_memory_next),
            grad_read: upload(executor, &pack.grad_read),
            sequences,
            slots,
            key_width,
            width,
            tokens,
            longest: pack.lengths.iter().copied().max().unwrap_or(0),
        }
    }

    fn address_key(&self) -> Rows<'_, T> {
        let stride = 2 * self.key_width + gap(self.key_width);
        self.rows(&self.keys, 0, stride)
    }

    fn strength_key(&self) -> Rows<'_, T> {
        let stride = 2 * self.key_width + gap(self.key_width);
        self.rows(&self.keys, self.key_width, stride)
    }

    fn values(&self) -> Rows<'_, T> {
        self.rows(&self.value, 0, self.width + gap(self.width))
    }

    fn rows<'b>(&self, buffer: &'b Buffer<T>, start: usize, stride: usize) -> Rows<'b, T> {
        Rows {
            buffer,
            start,
            stride,
        }
    }

    fn write_then_read(&self) -> bool {
        self.variant.order == Order::WriteThenRead
    }

    /// An empty grid is no launch.
    fn launch(
        &self,
        name: &str,
        [x, y, z]: [usize; 3],
        shared_bytes: usize,
        args: &[Arg],
    ) -> Result<()> {
        if x * y * z == 0 {
            return Ok(());
        }
        let launch = Launch {
            shared_bytes: shared_bytes as u32,
            ..Launch::new([x as u32, y as u32, z as u32], [THREADS as u32, 1, 1])
        };
        self.executor
            .launch(&format!("content_memory_{name}"), launch, args)
    }

    fn launch_typed(&self, name: &str, grid: [usize; 3], args: &[Arg]) -> Result<()> {
        self.launch(&format!("{name}_{}", T::NAME), grid, 0, args)
    }

    /// With the panels of the kernels that multiply.
    fn launch_panels(&self, name: &str, grid: [usize; 3], args: &[Arg]) -> Result<()> {
        self.launch(&format!("{name}_{}", T::NAME), grid, 72 << 10, args)
    }

    fn slots_arg(&self) -> Arg {
        Arg::I32(self.slots as i32)
    }

    fn width_arg(&self) -> Arg {
        Arg::I32(self.width as i32)
    }

    fn key_width_arg(&self) -> Arg {
        Arg::I32(self.key_width as i32)
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

    /// Products of the memory with both keys, |M|²; and, on the way back, with R, of G with v, G·M and v·Rᵀ.
    fn scores(&self, of_keys: [View; 2], squares: View, through: Option<Through>) -> Result<()> {
        let (key, strength_key, value) = (self.address_key(), self.strength_key(), self.values());
        let back = through.is_some();
        let Through {
            products,
            dots,
            cross,
        } = through.unwrap_or(Through {
            products: [View::NULL; 2],
            dots: View::NULL,
            cross: None,
        });
        let of_pairs = cross.map_or(0, |_| tiles(self.longest));
        let grid = [
            tiles(self.slots) + of_pairs,
            tiles(self.longest),
            self.sequences,
        ];
        let args = [
            Arg::Input(self.memory.view()),
            read_only(back.then(|| self.grad_memory_next.view())),
            Arg::Input(key.view()),
            Arg::Input(strength_key.view()),
            read_only(back.then(|| self.grad_read.view())),
            read_only(back.then(|| value.view())),
            Arg::Input(self.offsets.view()),
            Arg::Output(of_keys[0]),
            Arg::Output(of_keys[1]),
            Arg::Output(products[0]),
            Arg::Output(products[1]),
            Arg::Output(squares),
            Arg::Output(dots),
            Arg::Output(cross.unwrap_or(View::NULL)),
            self.slots_arg(),
            self.width_arg(),
            self.key_width_arg(),
            key.stride(),
            strength_key.stride(),
            value.stride(),
            self.pair_pitch(),
        ];
        self.launch_panels("scores", grid, &args)
    }

    fn pair_pitch(&self) -> Arg {
        Arg::I32(self.longest.next_multiple_of(8) as i32)
    }

    fn address(
        &self,
        squares: View,
        similarity: View,
        w: View,
        beta: View,
        norms: View,
    ) -> Result<()> {
        let key = self.address_key();
        let top_k = self.variant.top_k.map_or(i32::MAX, |k| k as i32);
        let args = [
            Arg::Input(key.view()),
            read_only(self.key_strength.as_ref().map(Buffer::view)),
            read_only(self.bias.as_ref().map(Buffer::view)),
            Arg::Input(self.offsets.view()),
            Arg::Input(squares),
            Arg::Output(similarity),
            Arg::Output(w),
            Arg::Output(beta),
            Arg::Output(norms),
            self.slots_arg(),
            self.key_width_arg(),
            key.stride(),
            Arg::I32(top_k),
            self.scale(),
            self.epsilon(),
        ];
        self.launch_typed("address", [self.longest, self.sequences, 1], &args)
    }

    /// M′ and y.
    fn forward(&self) -> Result<(Buffer<T>, Buffer<T>)> {
        let plane = self.tokens * self.slots;
        let mut workspace = Workspace {
            buffer: self
                .executor
                .scratch(self.slots * (2 * self.tokens + self.sequences)),
            used: 0,
        };
        let [w, beta] = [(); 2].map(|()| workspace.take(plane));
        let squares = workspace.take(self.sequences * self.slots);
        let memory_next = self.executor.scratch(self.memory.len());
        let read = self.executor.scratch(self.tokens * self.width);

        let memory = self.memory.view();
        self.scores([w, beta], squares, None)?;
        self.address(squares, w, w, beta, View::NULL)?;
        let value = self.values();
        self.launch_typed(
            "write",
            [tiles(self.slots), tiles(self.width), self.sequences],
            &[
                Arg::Input(memory),
                Arg::Input(w),
                Arg::Input(beta),
                Arg::Input(value.view()),
                Arg::Input(self.offsets.view()),
                Arg::Output(memory_next.view()),
                self.slots_arg(),
                self.width_arg(),
                value.stride(),
                self.paper(),
            ],
        )?;
        let seen = if self.write_then_read() {
            memory_next.view()
        } else {
            memory
        };
        self.launch_typed(
            "read",
            [tiles(self.width), tiles(self.longest), self.sequences],
            &[
                Arg::Input(w),
                Arg::Input(seen),
                Arg::Input(self.offsets.view()),
                Arg::Output(read.view()),
                self.slots_arg(),
                self.width_arg(),
            ],
        )?;
        Ok((memory_next, read))
    }

    /// M′ and y, by the kernels for segments of up to 64 tokens.
    fn forward_short(&self, tile: usize) -> Result<(Buffer<T>, Buffer<T>)> {
        const PITCH: usize = 64;
        let (width, rows) = (self.width, self.longest.next_multiple_of(16));
        let tiles = self.slots.div_ceil(tile);
        let blocks = self.sequences * tiles;
        let padded = tile.next_multiple_of(16);
        let lens = [
            blocks * padded * rows * 2,
            blocks * PITCH * 2 * 2,
            tiles * self.tokens * width,
        ];
        let mut workspace = Workspace {
            buffer: self.executor.scratch(lens.iter().sum()),
            used: 0,
        };
        let [products, stats, shares] = lens.map(|len| workspace.take(len));
        let memory_next = self.executor.scratch(self.memory.len());
        let read = self.executor.scratch(self.tokens * width);

        let (key, strength_key, value) = (self.address_key(), self.strength_key(), self.values());
        let (memory, offsets) = (
            Arg::Input(self.memory.view()),
            Arg::Input(self.offsets.view()),
        );
        let numbers = |numbers: &[usize]| -> Vec<Arg> {
            numbers
                .iter()
                .map(|&number| Arg::I32(number as i32))
                .collect()
        };
        let launch = |name: &str, grid: [usize; 3], shared_bytes: usize, args: &[Arg]| {
            if grid.contains(&0) {
                return Ok(());
            }
            let launch = Launch {
                shared_bytes: shared_bytes as u32,
                ..Launch::new(grid.map(|n| n as u32), [THREADS as u32, 1, 1])
            };
            let name = format!("content_memory_short_{name}_{}", T::NAME);
            self.executor.launch(&name, launch, args)
        };
        let mut args = vec![
            memory,
            Arg::Input(key.view()),
            Arg::Input(strength_key.view()),
            read_only(self.key_strength.as_ref().map(Buffer::view)),
            read_only(self.bias.as_ref().map(Buffer::view)),
            offsets,
            Arg::Output(products),
            Arg::Output(stats),
        ];
        args.extend(numbers(&[
            self.slots,
            width,
            self.key_width,
            key.stride,
            strength_key.stride,
            tile,
            rows,
        ]));
        args.extend([self.scale(), self.epsilon()]);
        let grid = [tiles, self.sequences, 1];
        launch("scores", grid, padded * 400 + rows * 864, &args)?;

        let mut args = vec![
            memory,
            Arg::Input(products),
            Arg::Input(stats),
            Arg::Input(value.view()),
            offsets,
            Arg::Output(memory_next.view()),
            Arg::Output(shares),
        ];
        let (sigmoid, paper) = (self.bias.is_some(), self.variant.erase == Erase::Paper);
        let choices = [sigmoid, paper, self.write_then_read()].map(usize::from);
        args.extend(numbers(&[
            self.tokens,
            self.slots,
            width,
            value.stride,
            tile,
            rows,
        ]));
        args.extend(numbers(&choices));
        let shared_bytes =
            padded * (2 * width.next_multiple_of(64) + 16 + 4 * rows + 32) + rows * 384;
        launch("update", grid, shared_bytes, &args)?;

        let mut args = vec![Arg::Input(shares), offsets, Arg::Output(read.view())];
        args.extend(numbers(&[tiles, self.tokens, width]));
        let blocks = (self.longest * width).div_ceil(1024);
        launch("read", [blocks, self.sequences, 1], 0, &args)?;
        Ok((memory_next, read))
    }

    /// M′ and y in one launch, by clusters of `blocks`.
    fn forward_cluster(&self, blocks: usize) -> Result<(Buffer<T>, Buffer<T>)> {
        let (width, rows) = (self.width, self.longest.next_multiple_of(16));
        let tile = self.slots.div_ceil(blocks);
        let padded = tile.next_multiple_of(16);
        let memory_next = self.executor.scratch(self.memory.len());
        let read = self.executor.scratch(self.tokens * width);
        let (key, strength_key, value) = (self.address_key(), self.strength_key(), self.values());
        let mut args = vec![
            Arg::Input(self.memory.view()),
            Arg::Input(key.view()),
            Arg::Input(strength_key.view()),
            Arg::Input(value.view()),
            read_only(self.key_strength.as_ref().map(Buffer::view)),
            read_only(self.bias.as_ref().map(Buffer::view)),
            Arg::Input(self.offsets.view()),
            Arg::Output(memory_next.view()),
            Arg::Output(read.view()),
        ];
        let strides = [key.stride, strength_key.stride, value.stride];
        let numbers = [
            &[self.slots, width, self.key_width],
            &strides[..],
            &[tile, rows],
        ]
        .concat();
        args.extend(numbers.iter().map(|&number| Arg::I32(number as i32)));
        args.extend([self.scale(), self.epsilon(), self.paper()]);
        args.push(Arg::I32(self.write_then_read().into()));
        let shared_bytes =
            padded * (2 * width.next_multiple_of(64) + 16 + 4 * rows + 32) + rows * (384 + 1024);
        let grid = [blocks as u32, self.sequences as u32, 1];
        let launch = Launch {
            shared_bytes: shared_bytes as u32,
            cluster: blocks as u32,
            ..Launch::new(grid, [THREADS as u32, 1, 1])
        };
        let name = format!("content_memory_short_cluster_{}", T::NAME);
        self.executor.launch(&name, launch, &args)?;
        Ok((memory_next, read))
    }

    /// All gradients but the sum of db's shares in one launch, by clusters of `blocks`.
    fn backward_cluster(&self, blocks: usize) -> Result<()> {
        let (width, rows) = (self.width, self.longest.next_multiple_of(16));
        let tile = self.slots.div_ceil(blocks);
        let padded = tile.next_multiple_of(16);
        let (key, strength_key, value) = (self.address_key(), self.strength_key(), self.values());
        let scratch = |len| self.executor.scratch::<T>(len);
        let d_memory = scratch(self.memory.len());
        let d_keys = [(); 2].map(|()| scratch(self.tokens * self.key_width));
        let d_value = scratch(self.tokens * width);
        let d_key_strength = self.key_strength.as_ref().map(|_| scratch(self.tokens));
        let bias_shares = self.executor.scratch::<f32>(self.sequences * blocks);
        let mut args = vec![
            Arg::Input(self.memory.view()),
            Arg::Input(self.grad_memory_next.view()),
            Arg::Input(key.view()),
            Arg::Input(strength_key.view()),
            Arg::Input(self.grad_read.view()),
            Arg::Input(value.view()),
            read_only(self.key_strength.as_ref().map(Buffer::view)),
            read_only(self.bias.as_ref().map(Buffer::view)),
            Arg::Input(self.offsets.view()),
            Arg::Output(d_memory.view()),
            Arg::Output(d_keys[0].view()),
            Arg::Output(d_keys[1].view()),
            Arg::Output(d_value.view()),
            Arg::Output(d_key_strength.as_ref().map_or(View::NULL, Buffer::view)),
            Arg::Output(bias_shares.view()),
        ];
        let strides = [key.stride, strength_key.stride, value.stride];
        let numbers = [
            &[self.slots, width, self.key_width],
            &strides[..],
            &[self.key_width, self.key_width, width],
            &[tile, rows],
        ]
        .concat();
        args.extend(numbers.iter().map(|&number| Arg::I32(number as i32)));
        args.extend([self.scale(), self.epsilon(), self.paper()]);
        let products = 288 * (4 * rows + padded);
        let columns = 160 * (3 * rows + padded) + 128 * blocks * (3 * rows).div_ceil(blocks);
        let shared_bytes = tile * (2 * width.next_multiple_of(64) + 16)
            + products.max(12 * padded * (rows + 8) + columns);
        let launch = Launch {
            shared_bytes: shared_bytes as u32,
            cluster: blocks as u32,
            ..Launch::new([blocks as u32, self.sequences as u32, 1], [384, 1, 1])
        };
        let name = format!("content_memory_short_backward_{}", T::NAME);
        self.executor.launch(&name, launch, &args)
    }

    /// With so many parts of the slots.
    fn backward(&self, bias_before: f32, splits: usize) -> Result<GradientBuffers<T>> {
        let (plane, of_slots) = (self.tokens * self.slots, self.sequences * self.slots);
        let (of_tiles, columns) = (tiles(self.slots), 128 / size_of::<T>());
        let of_columns = self.width.div_ceil(columns);
        let pairs = if self.write_then_read() {
            self.tokens * self.longest.next_multiple_of(8)
        } else {
            0
        };
        let sums = of_tiles * 2 * self.tokens * 2;
        let pitch = self.slots.next_multiple_of(8);
        // All begin at multiples of 16 bytes.
        let lens = [
            plane,
            plane,
            plane,
            plane,
            plane,
            plane,
            4 * self.tokens * pitch,
            of_slots,
            of_slots,
            of_slots,
            of_slots,
            self.tokens,
            sums,
            sums,
            self.sequences * of_tiles,
            pairs,
            pairs,
            splits * 3 * self.tokens * of_columns * columns,
        ];
        let floats = lens.iter().map(|len| len.next_multiple_of(4)).sum();
        let mut workspace = Workspace {
            buffer: self.executor.scratch(floats),
            used: 0,
        };
        let [
            similarity,
            beta,
            dw,
            w,
            before,
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
        ] = lens.map(|len| {
            let piece = workspace.take(len);
            workspace.used = workspace.used.next_multiple_of(4);
            piece
        });
        let [cross, gates] = [cross, gates].map(|x| self.write_then_read().then_some(x));

        let gradients = GradientBuffers {
            memory: self.executor.scratch(self.memory.len()),
            keys: upload(
                self.executor,
                &Array2::from_elem((self.tokens, 2 * self.key_width + 1), f64::NAN),
            ),
            value: upload(
                self.executor,
                &Array2::from_elem((self.tokens, self.width + 2), f64::NAN),
            ),
            key_strength: self
                .key_strength
                .as_ref()
                .map(|_| self.executor.scratch(self.tokens)),
            strength_bias: self.executor.upload(&[bias_before]),
        };
        let stride = 2 * self.key_width + 1;
        let d_keys = self.rows(&gradients.keys, 0, stride);
        let d_strength_keys = self.rows(&gradients.keys, self.key_width, stride);
        let d_value = self.rows(&gradients.value, 0, self.width + 2);
        let (key, strength_key) = (self.address_key(), self.strength_key());

        let offsets = Arg::Input(self.offsets.view());
        let (slots, width) = (self.slots_arg(), self.width_arg());
        let kappa = read_only(self.key_strength.as_ref().map(Buffer::view));
        let bias = read_only(self.bias.as_ref().map(Buffer::view));
        let number = |n: usize| Arg::I32(n as i32);
        let of_pairs = cross.map_or(0, |_| tiles(self.longest));

        let through = Through {
            products: [dw, d_strength],
            dots,
            cross,
        };
        self.scores([similarity, beta], squares, Some(through))?;
        self.address(squares, similarity, w, beta, norms)?;
        self.launch(
            "slots",
            [of_tiles, self.sequences, 1],
            0,
            &[
                Arg::Input(w),
                Arg::Input(beta),
                Arg::Input(dots),
                read_only(cross),
                offsets,
                Arg::Output(before),
                Arg::Output(keep),
                Arg::Output(dw),
                Arg::Output(d_strength),
                Arg::Output(means),
                number(self.tokens),
                slots,
                self.pair_pitch(),
                self.paper(),
            ],
        )?;
        self.launch_typed(
            "coefficients",
            [of_tiles + of_pairs * of_pairs, self.sequences, 1],
            &[
                Arg::Input(w),
                Arg::Input(beta),
                Arg::Input(similarity),
                Arg::Input(dw),
                Arg::Input(d_strength),
                Arg::Input(keep),
                Arg::Input(squares),
                Arg::Input(norms),
                Arg::Input(means),
                kappa,
                bias,
                offsets,
                Arg::Output(planes),
                Arg::Output(gates.unwrap_or(View::NULL)),
                Arg::Output(slopes),
                Arg::Output(token_shares),
                Arg::Output(bias_shares),
                number(self.tokens),
                slots,
                number(self.longest),
                number(pitch),
                self.pair_pitch(),
                self.scale(),
                self.epsilon(),
            ],
        )?;
        self.launch_panels(
            "gradients",
            [
                of_columns,
                splits * tiles(self.longest).max(1),
                self.sequences,
            ],
            &[
                Arg::Input(self.memory.view()),
                Arg::Input(self.grad_memory_next.view()),
                Arg::Input(key.view()),
                Arg::Input(strength_key.view()),
                Arg::Input(self.grad_read.view()),
                Arg::Input(planes),
                read_only(gates),
                Arg::Input(keep),
                Arg::Input(slopes),
                offsets,
                Arg::Output(gradients.memory.view()),
                Arg::Output(shares),
                number(self.tokens),
                slots,
                width,
                self.key_width_arg(),
                key.stride(),
                strength_key.stride(),
                number(pitch),
                self.pair_pitch(),
                number(splits),
            ],
        )?;
        let d_kappa = gradients
            .key_strength
            .as_ref()
            .map_or(View::NULL, Buffer::view);
        let d_bias = self
            .bias
            .as_ref()
            .map_or(View::NULL, |_| gradients.strength_bias.view());
        self.launch_typed(
            "sums",
            [
                self.longest + usize::from(self.bias.is_some()),
                self.sequences,
                1,
            ],
            &[
                Arg::Input(shares),
                Arg::Input(token_shares),
                Arg::Input(bias_shares),
                Arg::Input(norms),
                offsets,
                Arg::Input(key.view()),
                Arg::Output(d_kappa),
                Arg::Output(d_keys.view()),
                Arg::Output(d_strength_keys.view()),
                Arg::Output(d_value.view()),
                Arg::Output(d_bias),
                number(self.tokens),
                slots,
                number(self.sequences),
                width,
                self.key_width_arg(),
                number(of_columns * columns),
                number(splits),
                key.stride(),
                d_keys.stride(),
                d_strength_keys.stride(),
                d_value.stride(),
            ],
        )?;
        Ok(gradients)
    }
}

/// What the backward pass wants of the scores as well.
struct Through {
    /// M·R and G·v
    products: [View; 2],
    dots: View,
    cross: Option<View>,
}

struct GradientBuffers<T> {
    memory: Buffer<T>,
    /// da and ds side by side.
    keys: Buffer<T>,
    value: Buffer<T>,
    key_strength: Option<Buffer<T>>,
    strength_bias: Buffer<f32>,
}

fn check_forward<T: Storage>(variant: &ContentMemory, pack: &Pack) {
    compare_forward::<T>(variant, pack, |run| run.forward());
}

fn compare_forward<T: Storage>(
    variant: &ContentMemory,
    pack: &Pack,
    forward: impl Fn(&Run<T>) -> Result<(Buffer<T>, Buffer<T>)>,
) {
    let (memory_next, read) = in_every_order(|executor| {
        let (memory_next, read) = unwrap(forward(&Run::new(executor, variant, pack)));
        (Compared(memory_next.download()), Compared(read.download()))
    });
    let reference = pack.reference_forward(variant);
    assert_close(
        "memory_next",
        &memory_next.0,
        &reference.memory_next,
        T::TOLERANCE,
    );
    assert_close("read", &read.0, &reference.read, T::TOLERANCE);
}

/// The kernels for segments of up to 64 tokens, with tiles of so many slots, and in clusters of so many blocks.
fn check_short<T: Storage>(variant: &ContentMemory, shape: &Shape, sizes: [usize; 2], seed: u64) {
    let pack = Pack::draw::<T>(variant, shape, seed);
    compare_forward::<T>(variant, &pack, |run| run.forward_short(sizes[0]));
    compare_forward::<T>(variant, &pack, |run| run.forward_cluster(sizes[1]));
}

/// Errors of what passes through a softmax, where it may cancel, are relative to at least `scale`.
fn check_backward<T: Storage>(variant: &ContentMemory, pack: &Pack, scale: f64) {
    const BIAS_BEFORE: f32 = 0.75;
    let (width, key_width) = (pack.value.ncols(), pack.address_key.ncols());
    let (found, bias) = in_every_order(|executor| {
        let run = Run::<T>::new(executor, variant, pack);
        let splits = 1 + run.slots % tiles(run.slots).min(3);
        let gradients = unwrap(run.backward(BIAS_BEFORE, splits));
        let d_keys = run.rows(&gradients.keys, 0, 2 * key_width + 1);
        let d_strength_keys = run.rows(&gradients.keys, key_width, 2 * key_width + 1);
        let d_value = run.rows(&gradients.value, 0, width + 2);
        let found = [
            gradients.memory.download(),
            d_keys.download(key_width),
            d_strength_keys.download(key_width),
            d_value.download(width),
            gradients
                .key_strength
                .as_ref()
                .map_or_else(Vec::new, Buffer::download),
        ];
        (
            found.map(Compared),
            Compared(gradients.strength_bias.download()),
        )
    });
    let [memory, address_key, strength_key, value, key_strength] = found.map(|x| x.0);
    let reference = pack.reference_backward(variant);
    assert_close("d memory", &memory, &reference.memory, T::TOLERANCE);
    assert_near(
        "d address_key",
        &address_key,
        &reference.address_key,
        T::TOLERANCE,
        scale,
    );
    assert_near(
        "d strength_key",
        &strength_key,
        &reference.strength_key,
        T::TOLERANCE,
        scale,
    );
    assert_close("d value", &value, &reference.value, T::TOLERANCE);
    if let Some(reference) = &reference.key_strength {
        assert_near(
            "d key_strength",
            &key_strength,
            reference,
            T::TOLERANCE,
            scale,
        );
    }
    let expected = arr0(f64::from(BIAS_BEFORE) + reference.strength_bias);
    assert_near("d strength_bias", &bias.0, &expected, T::TOLERANCE, scale);
}

/// Chance finds the cases where nearly everything cancels: what cancels has the size of the gradients that arrive.
fn check_random_backward<T: Storage>(variant: &ContentMemory, pack: &Pack) {
    let arriving = pack.grad_memory_next.iter().chain(&pack.grad_read);
    check_backward::<T>(variant, pack, norm(arriving.copied()));
}

fn unwrap<R>(run: Result<R>) -> R {
    run.unwrap_or_else(|error| panic!("{error}"))
}

/// Numbers that are equal when their bits are.
struct Compared<T>(Vec<T>);

impl<T: Storage> PartialEq for Compared<T> {
    fn eq(&self, other: &Self) -> bool {
        let bits = |x: &Self| x.0.iter().map(|x| x.bits()).collect::<Vec<_>>();
        bits(self) == bits(other)
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for Compared<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The four choices from the bits of a number.
fn variant(bits: usize, width: usize, top_k: Option<usize>) -> ContentMemory {
    ContentMemory {
        addressing: [Addressing::Cosine, Addressing::Dot][bits & 1],
        strength: [Strength::Sigmoid, Strength::Softmax][bits >> 1 & 1],
        erase: [Erase::Coupled, Erase::Paper][bits >> 2 & 1],
        order: [Order::ReadThenWrite, Order::WriteThenRead][bits >> 3 & 1],
        top_k,
        scale: f64::from(1.0 / (width as f32).sqrt()),
        epsilon: f64::from(0.1_f32),
    }
}

/// Sequences, slots and widths; the tails of tiles, several tiles, one token, one slot, no token.
#[derive(Debug, Clone)]
struct Shape {
    lengths: Vec<usize>,
    slots: usize,
    key_width: usize,
    /// Columns of slots and values behind those of keys.
    carried: usize,
}

impl Shape {
    /// With slots as wide as keys.
    fn new(lengths: &[usize], slots: usize, width: usize) -> Self {
        Self {
            lengths: lengths.to_vec(),
            slots,
            key_width: width,
            carried: 0,
        }
    }
}

fn shape() -> impl Strategy<Value = Shape> {
    let lengths = prop_oneof![
        4 => proptest::collection::vec(0..6_usize, 1..4),
        1 => Just(vec![1]),
        2 => proptest::collection::vec(30..70_usize, 1..3),
    ];
    let slots = prop_oneof![Just(1), 2..20_usize, Just(64), 65..140_usize];
    let width = prop_oneof![Just(1), 2..20_usize, Just(64), Just(80), 65..100_usize];
    let carried = prop_oneof![3 => Just(0), 2 => 1..20_usize, 1 => Just(64), 1 => 60..150_usize];
    let sizes = (lengths, slots, width, carried);
    sizes.prop_map(|(lengths, slots, key_width, carried)| Shape {
        lengths,
        slots,
        key_width,
        carried,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn forward_agrees_with_the_reference(shape in shape(), bits in 0..16_usize, seed: u64) {
        let variant = variant(bits, shape.key_width, None);
        check_forward::<f32>(&variant, &Pack::draw::<f32>(&variant, &shape, seed));
        check_forward::<bf16>(&variant, &Pack::draw::<bf16>(&variant, &shape, seed));
        check_forward::<f16>(&variant, &Pack::draw::<f16>(&variant, &shape, seed));
    }

    #[test]
    fn short_segments_agree_with_the_reference(
        mut shape in shape(), columns in 1..6_usize, carried in prop_oneof![0..6_usize, 6..20_usize], tile in 1..97_usize, blocks in 2..17_usize,
        bits in 0..16_usize, seed: u64,
    ) {
        (shape.key_width, shape.carried) = (16 * columns, 16 * carried);
        shape.lengths.iter_mut().for_each(|length| *length = (*length).min(64));
        let variant = variant(bits, shape.key_width, None);
        if seed % 2 == 0 {
            check_short::<bf16>(&variant, &shape, [tile, blocks], seed);
        } else {
            check_short::<f16>(&variant, &shape, [tile, blocks], seed);
        }
    }

    #[test]
    fn backward_agrees_with_the_reference(shape in shape(), bits in 0..16_usize, seed: u64) {
        let variant = variant(bits, shape.key_width, None);
        check_random_backward::<f32>(&variant, &Pack::draw::<f32>(&variant, &shape, seed));
        check_random_backward::<bf16>(&variant, &Pack::draw::<bf16>(&variant, &shape, seed));
        check_random_backward::<f16>(&variant, &Pack::draw::<f16>(&variant, &shape, seed));
    }

    #[test]
    fn ties_at_the_last_of_the_best_slots_are_all_kept(
        length in 1..5_usize, slots in 2..80_usize, width in 1..6_usize, carried in 0..4_usize, k in 1..10_usize,
        bits in 0..16_usize, seed: u64,
    ) {
        let shape = Shape { carried, ..Shape::new(&[length, 2], slots, width) };
        let variant = variant(bits, 4, Some(k));
        let pack = Pack::draw::<f32>(&variant, &shape, seed).in_whole_numbers();
        check_forward::<f32>(&variant, &pack);
        check_random_backward::<f32>(&variant, &pack);
    }

    // w = 1 and β = 1 (or 0, with the paper's erase): a token wipes its slot, and keep has a factor of 0, or several.
    #[test]
    fn factors_of_zero_leave_finite_and_right_gradients(
        length in 1..7_usize, slots in 1..6_usize, width in 1..6_usize, carried in 0..4_usize, bits in 0..16_usize,
        seed: u64,
    ) {
        let shape = Shape { carried, ..Shape::new(&[length, 3], slots, width) };
        let variant = ContentMemory { strength: Strength::Sigmoid, ..variant(bits, 4, None) };
        let mut pack = Pack::draw::<f32>(&variant, &shape, seed);
        // Every second token knows its slot and its strength for sure.
        let sure = 4.0 * 1024.0;
        // Whole numbers: the rounding of a logit of thousands, which another slot may have all but cancel, would count.
        pack.memory.mapv_inplace(|x| (x + x.signum()).round());
        pack.strength_bias = 0.0;
        for (t, (mut key, mut strength)) in pack
            .address_key
            .rows_mut()
            .into_iter()
            .zip(pack.strength_key.rows_mut())
            .enumerate()
            .filter(|(t, _)| t % 2 == 0)
        {
            let slot = pack.memory.index_axis(Axis(0), usize::from(t >= length));
            let slot = slot.slice(s![t % slots, ..width]);
            let sign = if variant.erase == Erase::Coupled { 1.0 } else { -1.0 };
            strength.assign(&slot.map(|x| sure * sign * x));
            if slots > 1 && variant.addressing == Addressing::Dot {
                key.assign(&slot.map(|x| sure * x));
            }
        }
        check_forward::<f32>(&variant, &pack);
        check_random_backward::<f32>(&variant, &pack);
    }
}

#[test]
fn the_largest_shapes_agree_with_the_reference() {
    for (lengths, slots, width, bits) in [
        (vec![2], 4096, 3, 8),
        (vec![1], 3, 1024, 0),
        (vec![512], 2, 3, 0),
        // Several tiles of everything.
        (vec![140, 10], 260, 72, 9),
    ] {
        let variant = variant(bits, width, None);
        let shape = Shape::new(&lengths, slots, width);
        let pack = Pack::draw::<bf16>(&variant, &shape, 7);
        check_forward::<bf16>(&variant, &pack);
        check_random_backward::<bf16>(&variant, &pack);
    }
}

#[test]
fn the_largest_short_segments_agree_with_the_reference() {
    for (lengths, slots, width, carried, tile, blocks, bits) in [
        (vec![64, 1], 97, 512, 64, 96, 2, 0),
        (vec![50], 70, 1024, 0, 64, 3, 11),
        (vec![1], 1290, 16, 0, 96, 16, 0),
        // A step of keys and many of columns.
        (vec![20], 33, 16, 1024, 32, 2, 0),
    ] {
        let variant = variant(bits, width, None);
        let shape = Shape {
            carried,
            ..Shape::new(&lengths, slots, width)
        };
        check_short::<bf16>(&variant, &shape, [tile, blocks], 7);
    }
}

#[test]
fn every_barrier_is_needed() {
    // Several steps of sums, of which those of bf16 are longer, an empty sequence, and the choice of the best slots.
    let variant = variant(8, 33, Some(2));
    let wide = Pack::draw::<f32>(&variant, &Shape::new(&[17, 0], 40, 33), 5);
    let carrying = Shape {
        carried: 16,
        ..Shape::new(&[22, 0], 130, 64)
    };
    let narrow = Pack::draw::<bf16>(&variant, &carrying, 5);
    // More tokens than a block has threads.
    let long = Pack::draw::<f32>(&variant, &Shape::new(&[260], 1, 1), 5);
    let run = |executor: &Executor| {
        let run = Run::<f32>::new(executor, &variant, &wide);
        run.forward()?;
        run.backward(0.0, 1)?;
        let run = Run::<bf16>::new(executor, &variant, &narrow);
        run.forward()?;
        run.backward(0.0, 2)?;
        Run::<f32>::new(executor, &variant, &long)
            .backward(0.0, 1)
            .map(drop)
    };
    for (file, source) in [
        (
            "kernels/content_memory.cu",
            include_str!("../../content_memory.cu"),
        ),
        (
            "kernels/content_memory.cuh",
            include_str!("../../content_memory.cuh"),
        ),
        (
            "kernels/content_memory_backward.cu",
            include_str!("../../content_memory_backward.cu"),
        ),
    ] {
        assert_every_barrier_is_needed(file, source, run);
    }
}

#[test]
fn every_barrier_of_the_short_kernels_is_needed() {
    // Softmax over both, two tiles, five steps of the keys, five chunks of columns, the last of which come by a copy that
    // no key needs, and an empty sequence.
    let variant = variant(2, 272, None);
    let shape = Shape {
        carried: 272,
        ..Shape::new(&[33, 0], 70, 272)
    };
    let pack = Pack::draw::<bf16>(&variant, &shape, 5);
    let source = include_str!("../../content_memory_short.cu");
    assert_every_barrier_is_needed("kernels/content_memory_short.cu", source, |executor| {
        let run = Run::<bf16>::new(executor, &variant, &pack);
        run.forward_short(48)?;
        run.forward_cluster(2).map(drop)
    });
}

#[test]
fn every_barrier_of_the_short_gradients_is_needed() {
    let shape = Shape {
        carried: 32,
        ..Shape::new(&[33, 0], 70, 144)
    };
    // Dot products with sigmoid, cosines with softmax.
    let all = [1, 2].map(|bits| {
        let variant = variant(bits, 144, None);
        let pack = Pack::draw::<bf16>(&variant, &shape, 5);
        (variant, pack)
    });
    let file = "kernels/content_memory_short_backward.cu";
    let source = include_str!("../../content_memory_short_backward.cu");
    assert_every_barrier_is_needed(file, source, |executor| {
        all.iter().try_for_each(|(variant, pack)| {
            Run::<bf16>::new(executor, variant, pack).backward_cluster(2)
        })
    });
}

/// A file of tests/fixtures/ops.
struct Fixture(Vec<u8>);

impl Fixture {
    fn all() -> Vec<(String, Self)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/ops");
        let entries = std::fs::read_dir(folder).expect("the fixture folder");
        entries
            .map(|entry| entry.expect("a folder entry").path())
            .filter_map(|path| {
                let name = path.file_stem()?.to_str()?.to_owned();
                let bytes = std::fs::read(&path).expect("a fixture");
                name.starts_with("memory_").then_some((name, Self(bytes)))
            })
            .collect()
    }

    fn params(&self) -> serde_json::Value {
        let (_, header) = SafeTensors::read_metadata(&self.0).expect("a safetensors header");
        let metadata = header.metadata().as_ref().expect("metadata");
        serde_json::from_str(&metadata["params"]).expect("params in JSON")
    }

    fn variant(&self) -> ContentMemory {
        let params = self.params();
        let choice = |name: &str, second: &str| params[name] == second;
        let number = |name: &str| f64::from(params[name].as_f64().expect("a number") as f32);
        ContentMemory {
            addressing: [Addressing::Cosine, Addressing::Dot]
                [usize::from(choice("addressing", "dot"))],
            strength: [Strength::Sigmoid, Strength::Softmax]
                [usize::from(choice("strength", "softmax"))],
            erase: [Erase::Coupled, Erase::Paper][usize::from(choice("erase", "paper"))],
            order: [Order::ReadThenWrite, Order::WriteThenRead]
                [usize::from(choice("order", "write_then_read"))],
            top_k: params["top_k"].as_u64().map(|k| k as usize),
            scale: number("scale"),
            epsilon: number("epsilon"),
        }
    }

    fn tensor<T: Storage>(&self, name: &str) -> Array<f64, IxDyn> {
        let file = SafeTensors::deserialize(&self.0).expect("a safetensors file");
        let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        let numbers = tensor.data().chunks_exact(8).map(|bytes| {
            T::round(f64::from_le_bytes(bytes.try_into().expect("eight bytes"))).widen()
        });
        Array::from_shape_vec(tensor.shape(), numbers.collect()).expect("a tensor of f64")
    }

    /// [B, T, D] as rows of packed tokens.
    fn rows<T: Storage>(&self, name: &str) -> Array2<f64> {
        let x = self.tensor::<T>(name);
        let width = x.shape()[x.ndim() - 1];
        let rows = x.len() / width;
        x.into_shape_with_order((rows, width)).expect("contiguous")
    }

    fn pack<T: Storage>(&self, variant: &ContentMemory) -> Pack {
        let cube = |name: &str| {
            let x = self.tensor::<T>(name);
            x.into_dimensionality().expect("three axes")
        };
        let tokens = self.tensor::<T>("input.value");
        Pack {
            lengths: vec![tokens.shape()[1]; tokens.shape()[0]],
            memory: cube("input.memory"),
            address_key: self.rows::<T>("input.address_key"),
            strength_key: self.rows::<T>("input.strength_key"),
            value: self.rows::<T>("input.value"),
            key_strength: (variant.addressing == Addressing::Cosine).then(|| {
                self.tensor::<T>("input.key_strength")
                    .iter()
                    .copied()
                    .collect()
            }),
            strength_bias: match variant.strength {
                Strength::Sigmoid => self.tensor::<f32>("input.strength_bias")[[0]],
                Strength::Softmax => 0.0,
            },
            grad_memory_next: cube("grad_output.memory_next"),
            grad_read: self.rows::<T>("grad_output.read"),
        }
    }
}

#[test]
fn the_fixtures_come_out() {
    let fixtures = Fixture::all();
    assert_eq!(fixtures.len(), 17);
    for (name, fixture) in fixtures {
        println!("{name}");
        let variant = fixture.variant();
        check_fixture::<f32>(&fixture, &variant);
        check_fixture::<bf16>(&fixture, &variant);
        check_fixture::<f16>(&fixture, &variant);
    }
}

fn check_fixture<T: Storage>(fixture: &Fixture, variant: &ContentMemory) {
    let pack = fixture.pack::<T>(variant);
    check_forward::<T>(variant, &pack);
    let width = pack.value.ncols();
    if T::NAME == bf16::NAME && variant.top_k.is_none() && width.is_multiple_of(16) {
        compare_forward::<T>(variant, &pack, |run| run.forward_short(32));
        compare_forward::<T>(variant, &pack, |run| run.forward_cluster(2));
    }
    check_backward::<T>(variant, &pack, 0.0);
}
