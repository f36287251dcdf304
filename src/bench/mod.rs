//! One table of operations at named shapes, and how they are timed, on the CPU and on a GPU.
//!
//! `dtmem bench` and the criterion benches (`benches/`: a file for each [`Group`]) visit the same cases ([`each`]). Inputs are random. On a
//! GPU a case is timed by events around many launches, on several sets of inputs in turn, more than
//! its L2 holds. What a case must do is set against two ceilings of the same run: the bytes per
//! second of a large copy, and the operations per second of a large product of matrices.

mod ceilings;
mod merge;
mod operations;
mod place;
mod report;
mod runs;
mod step;

use std::cell::OnceCell;
use std::time::Instant;

use thiserror::Error;

use crate::backend::BackendError;
use crate::batch::TokenLayout;
use crate::model::ModelError;
use crate::train::device::DeviceChoice;
pub use ceilings::Ceilings;
pub use operations::{Group, Operation};
use place::{CpuPlace, Place};
pub use report::{Comparison, Outcome, Report, Row, run};
pub use runs::push_random;

/// Why something could not be timed.
#[derive(Debug, Error)]
pub enum BenchError {
    /// An operation failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A model refused a shape of the table.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A batch of the table is not valid.
    #[error(transparent)]
    Batch(#[from] crate::batch::BatchError),
    /// A GPU does not work.
    #[error("{0}")]
    Device(String),
    /// A GPU that was asked for is not there.
    #[error("--device cuda:{number}: {reason}; or time the CPU alone, with --device cpu")]
    NoGpu {
        /// Which one.
        number: usize,
        /// Why not.
        reason: String,
    },
    /// A filter that leaves nothing.
    #[error("--filter {filter}: no row has that in its name; there are these operations: {known}")]
    Filter {
        /// The filter.
        filter: String,
        /// What could be filtered for.
        known: String,
    },
    /// A row cannot be shown.
    #[error("cannot write a row: {0}")]
    Write(#[from] std::io::Error),
}

/// Result of a timing.
pub type Result<T> = std::result::Result<T, BenchError>;

/// A batch and the sizes of the model that it is for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    /// Short name.
    pub name: &'static str,
    /// Tokens of a time step.
    pub layout: TokenLayout,
    /// Time steps of trajectories, `repeats` times over.
    pub lengths: &'static [usize],
    /// How often the lengths occur.
    pub repeats: usize,
    /// D.
    pub width: usize,
    /// H.
    pub heads: usize,
    /// Width of the feed-forward layer.
    pub feed_forward: usize,
    /// Blocks.
    pub layers: usize,
    /// N, slots of a memory.
    pub slots: usize,
    /// Time steps of a segment.
    pub segment_steps: usize,
}

/// Steps of eight trajectories as long as the paper's.
const PAPER_STEPS: &[usize] = &[145, 20, 96, 40, 64, 33, 88, 26];

const PAPER: Scale = Scale {
    name: "paper",
    layout: TokenLayout::ObsAction,
    lengths: PAPER_STEPS,
    repeats: 8,
    width: 512,
    heads: 2,
    feed_forward: 2048,
    layers: 4,
    slots: 64,
    segment_steps: 28,
};

/// The named shapes.
pub const SCALES: [Scale; 5] = [
    // One time step of a thousand episodes at once.
    Scale {
        name: "acting",
        lengths: &[1],
        repeats: 1024,
        ..PAPER
    },
    // configs/hallway-quick.toml.
    Scale {
        name: "quick",
        lengths: &[10, 14],
        repeats: 16,
        width: 128,
        feed_forward: 1024,
        layers: 1,
        slots: 16,
        segment_steps: 4,
        ..PAPER
    },
    // AttentionTuner: 64 trajectories.
    PAPER,
    // DT-Mem: 8 windows of 28 steps, segments of 39 tokens, and the slots of the authors' code.
    Scale {
        name: "dt-mem",
        layout: TokenLayout::ReturnObsAction,
        lengths: &[28],
        heads: 8,
        slots: 1290,
        segment_steps: 13,
        ..PAPER
    },
    Scale {
        name: "long",
        lengths: &[2048],
        repeats: 4,
        heads: 8,
        slots: 256,
        ..PAPER
    },
];

impl Scale {
    /// Trajectories.
    pub fn sequences(&self) -> usize {
        self.lengths.len() * self.repeats
    }

    /// Time steps of all of them: observations, and actions.
    pub fn steps(&self) -> usize {
        self.lengths.iter().sum::<usize>() * self.repeats
    }

    /// T.
    pub fn tokens(&self) -> usize {
        self.steps() * self.layout.tokens_per_step()
    }

    /// Segments of all trajectories.
    pub fn segments(&self) -> usize {
        let of = |steps: &usize| steps.div_ceil(self.segment_steps);
        self.lengths.iter().map(of).sum::<usize>() * self.repeats
    }

    /// Pairs of a query and a key that causal attention sees.
    pub fn visible(&self) -> usize {
        let of = |steps: &usize| {
            let tokens = steps * self.layout.tokens_per_step();
            tokens * (tokens + 1) / 2
        };
        self.lengths.iter().map(of).sum::<usize>() * self.repeats
    }

    /// Weights of the blocks' matrices.
    pub fn weights(&self) -> usize {
        self.layers * self.width * (4 * self.width + 2 * self.feed_forward)
    }
}

/// What a case must do at least.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Additions and multiplications.
    pub operations: f64,
    /// Bytes to and from memory.
    pub bytes: f64,
}

/// What the name of an operation ends with by the version for Hopper.
const FOR_HOPPER: &str = "_hopper";

/// An entry of the table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entry {
    /// What is computed.
    pub operation: Operation,
    /// At which shapes.
    pub scale: &'static Scale,
    /// By the version for Hopper.
    pub for_hopper: bool,
}

impl Entry {
    /// `operation`, or `operation_hopper`.
    pub fn operation_name(&self) -> String {
        let version = if self.for_hopper { FOR_HOPPER } else { "" };
        format!("{}{version}", self.operation.name())
    }

    /// `operation/scale`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.operation_name(), self.scale.name)
    }
}

/// A case that can be timed. Its inputs are made when it is timed first.
pub struct Case<'a> {
    /// What is computed.
    pub entry: Entry,
    /// `cpu`, or the GPU's name.
    pub device: &'a str,
    precision: &'static str,
    cost: Cost,
    ceilings: &'a dyn Fn() -> Result<Ceilings>,
    time: &'a mut dyn FnMut(u64) -> Result<f64>,
}

impl Case<'_> {
    /// Seconds that so many runs take, one after another.
    pub fn time(&mut self, runs: u64) -> Result<f64> {
        (self.time)(runs)
    }

    /// The ceilings of the device, which are measured when they are asked for first.
    pub fn ceilings(&self) -> Result<Ceilings> {
        (self.ceilings)()
    }
}

/// What [`each`] comes across.
pub enum Visit<'a> {
    /// A case to time.
    Case(Case<'a>),
    /// A case that this machine, or the time, is not enough for.
    Skipped {
        /// What would be computed.
        entry: Entry,
        /// Where.
        device: &'a str,
        /// Why not.
        reason: &'a str,
    },
}

/// Operations that the CPU takes a moment for.
const CPU_OPERATIONS: f64 = 1e10;

/// A part of the table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Selection<'a> {
    /// Of which operations; `None`: of all.
    pub group: Option<Group>,
    /// Cases whose name contains this.
    pub filter: &'a str,
    /// Seconds after which nothing new is begun.
    pub seconds: f64,
}

impl Selection<'_> {
    fn entries(&self) -> impl Iterator<Item = Entry> {
        let entries = Operation::ALL.into_iter().flat_map(|operation| {
            let at = SCALES.iter().filter(move |scale| operation.has(scale));
            at.flat_map(move |scale| {
                let hopper = operation.has_for_hopper(scale).then_some(true);
                [false]
                    .into_iter()
                    .chain(hopper)
                    .map(move |for_hopper| Entry {
                        operation,
                        scale,
                        for_hopper,
                    })
            })
        });
        entries.filter(|entry| {
            self.group
                .is_none_or(|group| group == entry.operation.group())
                && entry.name().contains(self.filter)
        })
    }
}

/// Visits the cases of a selection: unless `device` is `cpu` all of them on a GPU, and then those that take the CPU a
/// moment on the CPU.
///
/// # Errors
/// A selection of no case; a GPU that was asked for by its number and does not work; what an operation or the visitor
/// returns.
pub fn each(
    device: DeviceChoice,
    selection: Selection,
    visit: &mut dyn FnMut(Visit) -> Result<()>,
) -> Result<()> {
    if selection.entries().next().is_none() {
        let known = Operation::ALL.map(Operation::name).join(", ");
        let filter = selection.filter.to_owned();
        return Err(BenchError::Filter { filter, known });
    }
    let start = Instant::now();
    if device != DeviceChoice::Cpu {
        on_gpu(device, selection, start, visit)?;
    }
    on(&CpuPlace, selection, start, visit)
}

fn on<P: Place>(
    place: &P,
    selection: Selection,
    start: Instant,
    visit: &mut dyn FnMut(Visit) -> Result<()>,
) -> Result<()> {
    let device = place.name();
    let backend = place.backend()?;
    let hopper = place.hopper_backend()?;
    let measured = OnceCell::new();
    let ceilings = || match measured.get() {
        Some(&ceilings) => Ok(ceilings),
        None => {
            let ceilings = ceilings::ceilings(place, &backend)?;
            Ok(*measured.get_or_init(|| ceilings))
        }
    };
    for entry in selection.entries() {
        if entry.for_hopper && place.is_cpu() {
            continue;
        }
        let cost = entry.operation.cost(entry.scale, P::ELEMENT_BYTES);
        let own = match entry.for_hopper {
            true => hopper.as_ref(),
            false => Some(&backend),
        };
        let ready = match own {
            None => Err("compute capability 9.0, and a build for it, only"),
            _ if place.is_cpu() && cost.operations > CPU_OPERATIONS => {
                Err("it takes a CPU too long")
            }
            _ if start.elapsed().as_secs_f64() > selection.seconds => Err("no time left"),
            Some(backend) => Ok(backend),
        };
        let mut timer: Option<Timer> = None;
        let backend = match ready {
            Ok(backend) => backend,
            Err(reason) => {
                visit(Visit::Skipped {
                    entry,
                    device: &device,
                    reason,
                })?;
                continue;
            }
        };
        visit(Visit::Case(Case {
            entry,
            device: &device,
            precision: P::PRECISION,
            cost,
            ceilings: &ceilings,
            time: &mut |runs| match &mut timer {
                Some(timer) => timer(runs),
                none => none.insert(new_timer(place, backend, entry)?)(runs),
            },
        }))?;
    }
    Ok(())
}

/// Sets of inputs at most.
const MOST_COPIES: f64 = 64.0;

/// What takes the time of so many runs.
type Timer<'a> = Box<dyn FnMut(u64) -> Result<f64> + 'a>;

fn new_timer<'a, P: Place>(
    place: &'a P,
    backend: &'a P::Backend,
    entry: Entry,
) -> Result<Timer<'a>> {
    let Entry {
        operation, scale, ..
    } = entry;
    if operation == Operation::Step {
        // A model has a backend of its own.
        let own = match entry.for_hopper {
            true => place.hopper_backend()?,
            false => Some(place.backend()?),
        };
        let Some(own) = own else {
            return Err(BenchError::Device(
                "it does not run the versions for Hopper any more".to_owned(),
            ));
        };
        let mut step = step::Step::new(own, scale)?;
        return Ok(Box::new(move |runs| step.time(runs)));
    }
    let cost = operation.cost(scale, P::ELEMENT_BYTES);
    let copies = (P::CACHE_BYTES / cost.bytes).ceil().clamp(1.0, MOST_COPIES) as usize;
    let mut sets = (0..copies)
        .map(|_| runs::prepare(backend, operation, scale))
        .collect::<Result<Vec<_>>>()?;
    let mut next = 0;
    Ok(Box::new(move |count| {
        place.seconds(backend, &mut || {
            for _ in 0..count {
                sets[next]()?;
                next = (next + 1) % copies;
            }
            Ok(())
        })
    }))
}

#[cfg(feature = "cuda")]
fn on_gpu(
    device: DeviceChoice,
    selection: Selection,
    start: Instant,
    visit: &mut dyn FnMut(Visit) -> Result<()>,
) -> Result<()> {
    let number = match device {
        DeviceChoice::Cuda(number) => number,
        _ => 0,
    };
    match place::CudaPlace::new(number) {
        Ok(place) => on(&place, selection, start, visit),
        Err(reason) => no_gpu(device, reason, selection, visit),
    }
}

#[cfg(not(feature = "cuda"))]
fn on_gpu(
    device: DeviceChoice,
    selection: Selection,
    _start: Instant,
    visit: &mut dyn FnMut(Visit) -> Result<()>,
) -> Result<()> {
    let reason = "this binary was built without the feature `cuda`".to_owned();
    no_gpu(device, reason, selection, visit)
}

/// Skips the table, unless the GPU was asked for.
fn no_gpu(
    device: DeviceChoice,
    reason: String,
    selection: Selection,
    visit: &mut dyn FnMut(Visit) -> Result<()>,
) -> Result<()> {
    if let DeviceChoice::Cuda(number) = device {
        return Err(BenchError::NoGpu { number, reason });
    }
    let reason = format!("no GPU: {reason}");
    selection.entries().try_for_each(|entry| {
        visit(Visit::Skipped {
            entry,
            device: "gpu",
            reason: &reason,
        })
    })
}
