//! The host executor as a device: what a GPU would do, on the CPU, every access checked.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dtmem_host::{Buffer, Executor, View};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ShapeBuilder};

use super::device::{Compute, Device, Element, Factor, Product, check_range};
use crate::backend::{Bytes, Member, Rank, Room};
use crate::ops::host::Host;
use crate::ops::memory::Span;
use crate::ops::{Error, Input, Launch, Launcher, Output, Result};

/// Kernels run by the executor, products of matrices by the CPU in f32.
#[derive(Debug, Default)]
pub struct HostDevice {
    host: Host,
    /// Where what is asked for goes instead of being done.
    recording: Mutex<Option<Recording>>,
    /// Of a group of threads that train together.
    member: Option<Member>,
    /// Bytes that it has; as many as are asked for, if nothing is said.
    memory: Option<usize>,
    allocated: AtomicUsize,
    /// It is lost after so many commands.
    lifetime: Option<usize>,
    done: AtomicUsize,
    graphs: Arc<Graphs>,
}

/// How often something was recorded, a recording was repeated, and something came from the host.
#[derive(Debug, Default)]
pub struct Graphs {
    /// Recordings.
    pub recorded: AtomicUsize,
    /// Repetitions.
    pub replayed: AtomicUsize,
    /// Launches, copies and zeros of the last recording.
    pub commands: AtomicUsize,
    /// Copies from the host that are not [sent](Device::send): a GPU's way to the device may wait for them.
    pub uploads: AtomicUsize,
}

/// What the device was asked for.
#[derive(Default)]
pub struct Recording(Vec<Command>);

type Command = Box<dyn Fn(&HostDevice) -> Result<()> + Send + Sync>;

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} commands", self.0.len())
    }
}

impl HostDevice {
    /// A device whose threads take turns in the executor's order.
    pub fn new(executor: Executor) -> Self {
        Self {
            host: Host(executor),
            ..Self::default()
        }
    }

    /// The same as one of several ranks.
    pub fn with_member(self, member: Member) -> Self {
        Self {
            member: Some(member),
            ..self
        }
    }

    /// The same with so many bytes of memory; freeing gives none back.
    pub fn with_memory(self, bytes: usize) -> Self {
        Self {
            memory: Some(bytes),
            ..self
        }
    }

    /// The same, but after so many commands nothing works any more.
    pub fn with_lifetime(self, commands: usize) -> Self {
        Self {
            lifetime: Some(commands),
            ..self
        }
    }

    /// What is counted of its recordings, from here on too.
    pub fn graphs(&self) -> Arc<Graphs> {
        Arc::clone(&self.graphs)
    }

    /// Counts a command.
    fn live(&self) -> Result<()> {
        let done = self.done.fetch_add(1, Ordering::Relaxed);
        match self.lifetime {
            Some(lifetime) if done >= lifetime => Err(failed("the device is lost")),
            _ => Ok(()),
        }
    }

    fn executor(&self) -> &Executor {
        &self.host.0
    }

    fn recording(&self) -> MutexGuard<'_, Option<Recording>> {
        self.recording
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Does a command, or records it.
    fn command(&self, command: impl Fn(&Self) -> Result<()> + Send + Sync + 'static) -> Result<()> {
        let mut recording = self.recording();
        match &mut *recording {
            Some(recording) => recording.0.push(Box::new(command)),
            None => {
                drop(recording);
                self.live()?;
                command(self)?;
            }
        }
        Ok(())
    }

    /// Fails for what a recording cannot repeat.
    fn check_not_recording(&self) -> Result<()> {
        match *self.recording() {
            Some(_) => Err(failed("a copy from or to the host cannot be recorded")),
            None => self.live(),
        }
    }

    /// Copies from the host.
    fn arrive<T: Element>(&self, from: &[T], to: &mut Buffer<T>, offset: usize) -> Result<()> {
        self.check_not_recording()?;
        let range = offset..offset + from.len();
        check_range(&range, to.len())?;
        self.write(to.slice(range), from)
    }

    fn write<T: Element>(&self, view: View, content: &[T]) -> Result<()> {
        self.executor().write(view, content).map_err(failed)
    }

    fn read<T: Element>(&self, view: View) -> Result<Vec<T>> {
        self.executor().read(view).map_err(failed)
    }
}

/// A matrix in memory.
#[derive(Clone, Copy)]
struct Matrix {
    view: View,
    stride: usize,
    transposed: bool,
}

impl Matrix {
    fn new<T>(factor: &Factor<'_, T>) -> Self {
        Self {
            view: view_of(factor.elements.span()),
            stride: factor.stride,
            transposed: factor.transposed,
        }
    }

    /// Its elements as f32, not transposed any more.
    fn read<T: Compute>(
        &self,
        device: &HostDevice,
        rows: usize,
        columns: usize,
    ) -> Result<Array2<f32>> {
        let numbers = device.read::<T>(self.view)?;
        let numbers: Vec<f32> = numbers.into_iter().map(Compute::widen).collect();
        let strides = match self.transposed {
            false => (self.stride, 1),
            true => (1, self.stride),
        };
        let matrix = ArrayView2::from_shape((rows, columns).strides(strides), &numbers);
        Ok(matrix.map_err(failed)?.to_owned())
    }
}

fn failed(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Launch {
        kernel: "a copy or product on the host",
        source: source.into(),
    }
}

impl Launcher for HostDevice {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        match Host::prepare(launch)? {
            Some(prepared) => self.command(move |device| device.host.run(&prepared)),
            None => Ok(()),
        }
    }

    fn can_launch(&self, launch: &Launch<'_>) -> Result<bool> {
        self.host.can_launch(launch)
    }
}

impl Device for HostDevice {
    type Memory<T: Element> = Buffer<T>;
    type Staging<E: Element> = ();
    type Recording = Recording;

    fn record<E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Recording, E> {
        *self.recording() = Some(Recording::default());
        let done = work();
        let recording = self.recording().take().unwrap_or_default();
        done?;
        let Graphs {
            recorded, commands, ..
        } = &*self.graphs;
        recorded.fetch_add(1, Ordering::Relaxed);
        commands.store(recording.0.len(), Ordering::Relaxed);
        Ok(recording)
    }

    fn replay(&self, recording: &Recording) -> Result<()> {
        self.graphs.replayed.fetch_add(1, Ordering::Relaxed);
        recording.0.iter().try_for_each(|command| {
            self.live()?;
            command(self)
        })
    }

    fn rank(&self) -> Rank {
        self.member.as_ref().map_or(Rank::ALONE, Member::rank)
    }

    fn sum_over_ranks(&self, memory: &mut Buffer<f32>, len: usize) -> Result<()> {
        let Some(member) = &self.member else {
            return Ok(());
        };
        self.check_not_recording()?;
        check_range(&(0..len), memory.len())?;
        let view = memory.slice(0..len);
        let sum = member.sum(self.read(view)?).map_err(failed)?;
        self.write(view, &sum)
    }

    fn name(&self) -> &'static str {
        "host"
    }

    fn room(&self) -> Option<Room> {
        let total = self.memory?;
        let allocated = self.allocated.load(Ordering::Relaxed);
        Some(Room {
            free: Bytes(total.saturating_sub(allocated)),
            total: Bytes(total),
        })
    }

    fn allocate<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        let needed = len * size_of::<T>();
        let allocated = self.allocated.fetch_add(needed, Ordering::Relaxed);
        match self.memory {
            Some(total) if allocated + needed > total => {
                self.allocated.fetch_sub(needed, Ordering::Relaxed);
                Err(Error::OutOfMemory {
                    needed,
                    free: total - allocated,
                    total,
                })
            }
            _ => Ok(self.executor().scratch(len)),
        }
    }

    fn len<T: Element>(&self, memory: &Buffer<T>) -> usize {
        memory.len()
    }

    fn upload<T: Element>(&self, from: &[T], to: &mut Buffer<T>, offset: usize) -> Result<()> {
        self.graphs.uploads.fetch_add(1, Ordering::Relaxed);
        self.arrive(from, to, offset)
    }

    /// Nothing goes on meanwhile.
    fn send<E: Element>(&self, from: &[E], (): &mut (), to: &mut Buffer<E>) -> Result<()> {
        self.arrive(from, to, 0)
    }

    fn download<T: Element>(&self, from: &Buffer<T>, offset: usize, to: &mut [T]) -> Result<()> {
        self.check_not_recording()?;
        let range = offset..offset + to.len();
        check_range(&range, from.len())?;
        to.copy_from_slice(&self.read(from.slice(range))?);
        Ok(())
    }

    fn zero<T: Element>(&self, memory: &mut Buffer<T>, range: Range<usize>) -> Result<()> {
        check_range(&range, memory.len())?;
        let (len, view) = (range.len(), memory.slice(range));
        self.command(move |device| device.write(view, &vec![T::default(); len]))
    }

    fn copy<T: Element>(
        &self,
        from: &Buffer<T>,
        to: &mut Buffer<T>,
        offset: usize,
        len: usize,
    ) -> Result<()> {
        check_range(&(0..len), from.len())?;
        check_range(&(offset..offset + len), to.len())?;
        let (from, to) = (from.slice(0..len), to.slice(offset..offset + len));
        self.command(move |device| device.write(to, &device.read::<T>(from)?))
    }

    fn input<'a, T: Element>(
        &'a self,
        memory: &'a Buffer<T>,
        range: Range<usize>,
    ) -> Result<Input<'a, T>> {
        check_range(&range, memory.len())?;
        Ok(Input::on_host(
            memory.slice(range.clone()).address,
            range.len(),
        ))
    }

    fn output<'a, T: Element>(
        &'a self,
        memory: &'a mut Buffer<T>,
        range: Range<usize>,
    ) -> Result<Output<'a, T>> {
        check_range(&range, memory.len())?;
        Ok(Output::on_host(
            memory.slice(range.clone()).address,
            range.len(),
        ))
    }

    fn multiply<T: Compute, U: Compute>(&self, product: Product<'_, T, U>) -> Result<()> {
        let Product {
            rows,
            columns,
            inner,
            stride,
            accumulate,
            ..
        } = product;
        if rows == 0 || columns == 0 {
            return Ok(());
        }
        let (a, b) = (Matrix::new(&product.a), Matrix::new(&product.b));
        let bias = product.bias.as_ref().map(|bias| view_of(bias.span()));
        let first = product.c.span().address;
        self.command(move |device| {
            let mut c = Array2::zeros((rows, columns));
            if inner > 0 {
                let a = a.read::<T>(device, rows, inner)?;
                let b = b.read::<T>(device, inner, columns)?;
                general_mat_mul(1.0, &a, &b, 0.0, &mut c);
            }
            if let Some(bias) = bias {
                let bias = device.read::<U>(bias)?;
                for mut row in c.rows_mut() {
                    for (c, bias) in row.iter_mut().zip(&bias) {
                        *c += bias.widen();
                    }
                }
            }
            for (index, row) in c.rows().into_iter().enumerate() {
                let view = View {
                    address: first + (index * stride * size_of::<U>()) as u64,
                    bytes: columns * size_of::<U>(),
                };
                let before = match accumulate {
                    true => device.read::<U>(view)?,
                    false => vec![U::default(); columns],
                };
                let sums = before.iter().zip(row);
                let after: Vec<U> = sums.map(|(x, &c)| U::narrow(x.widen() + c)).collect();
                device.write(view, &after)?;
            }
            Ok(())
        })
    }
}

fn view_of(Span { address, bytes }: Span) -> View {
    View { address, bytes }
}
