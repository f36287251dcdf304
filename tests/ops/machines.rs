//! The machines that the operations run on: the host executor, and a GPU if there is one.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use dtmem::ops::host::Host;
use dtmem::ops::{self, Error, Gpu, Input, Launcher, OnStream, Output, Result};
use dtmem_host::{Buffer, Element, Executor, Order};
use half::{bf16, f16};
use ndarray::{Array, Dimension};

use crate::common::Number;

/// What buffers hold.
pub trait Cell: Element + DeviceRepr {
    /// A value that no right kernel takes for a result.
    const POISON: Self;
}

macro_rules! cells {
    ($($t:ty: $poison:expr),*) => {$(
        impl Cell for $t {
            const POISON: Self = $poison;
        }
    )*};
}
cells!(f32: f32::NAN, bf16: bf16::NAN, f16: f16::NAN, i32: i32::MIN, u32: u32::MAX, u8: u8::MAX);

/// What a launch runs on: memory and a launcher.
pub trait Machine: Launcher {
    type Memory<T>;
    fn upload<T: Cell>(&self, content: &[T]) -> Self::Memory<T>;
    fn download<T: Cell>(&self, memory: &Self::Memory<T>) -> Vec<T>;
    fn input<'b, T: Cell>(&'b self, memory: &'b Self::Memory<T>) -> Input<'b, T>;
    fn output<'b, T: Cell>(&'b self, memory: &'b mut Self::Memory<T>) -> Output<'b, T>;

    /// Memory that must be written before it is read.
    fn scratch<T: Cell>(&self, len: usize) -> Self::Memory<T>;

    fn numbers<T: Number, D: Dimension>(&self, x: &Array<f64, D>) -> Self::Memory<T> {
        self.upload(&x.iter().map(|&x| T::round(x)).collect::<Vec<_>>())
    }
}

impl Machine for Host {
    type Memory<T> = Buffer<T>;
    fn upload<T: Cell>(&self, content: &[T]) -> Buffer<T> {
        self.0.upload(content)
    }
    fn scratch<T: Cell>(&self, len: usize) -> Buffer<T> {
        self.0.scratch(len)
    }
    fn download<T: Cell>(&self, memory: &Buffer<T>) -> Vec<T> {
        memory.download()
    }
    fn input<'b, T: Cell>(&'b self, memory: &'b Buffer<T>) -> Input<'b, T> {
        Host::input(self, memory)
    }
    fn output<'b, T: Cell>(&'b self, memory: &'b mut Buffer<T>) -> Output<'b, T> {
        Host::output(self, memory)
    }
}

pub struct Device<'a> {
    on: OnStream<'a>,
    stream: &'a Arc<CudaStream>,
}

impl Launcher for Device<'_> {
    fn launch(&self, launch: &ops::Launch<'_>) -> Result<()> {
        self.on.launch(launch)
    }

    /// Says past the test's captured output which launches are not tested here.
    fn can_launch(&self, launch: &ops::Launch<'_>) -> Result<bool> {
        let can = self.on.can_launch(launch)?;
        if !can {
            let mut text = std::io::stderr().lock();
            let _ = writeln!(text, "not run: {} on this GPU", launch.kernel());
        }
        Ok(can)
    }
}

/// Memory on a GPU with one element more than is used, as it allocates no 0 bytes.
pub struct Memory<T>(CudaSlice<T>);

impl Machine for Device<'_> {
    type Memory<T> = Memory<T>;
    fn upload<T: Cell>(&self, content: &[T]) -> Memory<T> {
        let padded = [content, &[T::POISON]].concat();
        Memory(self.stream.clone_htod(&padded).unwrap())
    }
    fn scratch<T: Cell>(&self, len: usize) -> Memory<T> {
        self.upload(&vec![T::POISON; len])
    }
    fn download<T: Cell>(&self, memory: &Memory<T>) -> Vec<T> {
        let mut content = self.stream.clone_dtoh(&memory.0).unwrap();
        content.pop();
        content
    }
    fn input<'b, T: Cell>(&'b self, memory: &'b Memory<T>) -> Input<'b, T> {
        let all = self.on.input(&memory.0);
        let used = 0..all.len() - 1;
        all.slice(used).unwrap()
    }
    fn output<'b, T: Cell>(&'b self, memory: &'b mut Memory<T>) -> Output<'b, T> {
        let all = self.on.output(&mut memory.0);
        let used = 0..all.len() - 1;
        all.slice(used).unwrap()
    }
}

/// The host executor, in a thread order that is drawn from the seed.
pub fn host(seed: u64) -> Host {
    let mut executor = Executor::new();
    executor.set_order(Order::ALL[seed as usize % 3]);
    Host(executor)
}

/// Runs the checks on the first GPU, or says past the test's captured output that they were skipped, and how many so
/// far.
pub fn on_gpu(check: impl FnOnce(&Device<'_>)) {
    let gpu = match Gpu::new(0) {
        Ok(gpu) => gpu,
        Err(reason @ (Error::NoDriver { .. } | Error::NoGpu { .. })) => {
            static SKIPPED: AtomicUsize = AtomicUsize::new(0);
            let mut text = std::io::stderr().lock();
            let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
            let _ = writeln!(text, "GPU checks skipped: {count} ({reason})");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let stream = gpu.context().new_stream().unwrap();
    let on = gpu.on(&stream).unwrap();
    check(&Device {
        on,
        stream: &stream,
    });
    stream.synchronize().unwrap();
    gpu.context().check_err().unwrap();
}
