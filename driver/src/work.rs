//! What streams do.

use std::ops::Range;
use std::sync::Arc;

use dtmem_host::{Launch, TensorMap};

use crate::blas::Product;
use crate::nccl::Ranks;

/// A number that stands for an object. Nobody looks behind it.
pub type Handle = u64;
/// An address on the device.
pub type Address = u64;

/// Where a copy to the device finds its bytes.
#[derive(Debug, Clone)]
pub enum Source {
    /// Pageable memory is read at the call.
    Read(Vec<u8>),
    /// Pinned memory is read when the copy is made.
    Pinned(usize),
}

/// What a kernel is given for a parameter: the first bytes, as many as it declares.
pub type Bits = [u64; 16];

/// An argument of a kernel, as it declares it.
#[derive(Debug, Clone, Copy)]
pub enum Argument {
    Input(Address),
    Output(Address),
    Map(TensorMap),
    /// Its bytes, and these.
    Value(usize, u64),
}

/// A launch of a kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    pub function: Handle,
    pub name: String,
    pub launch: Launch,
    pub arguments: Vec<Argument>,
}

/// One thing that a stream does.
#[derive(Debug, Clone)]
pub enum Work {
    Kernel(Kernel),
    Product(Product),
    /// Over all ranks, in place.
    Sum {
        ranks: Arc<Ranks>,
        at: Address,
        bytes: u64,
    },
    ToDevice {
        from: Source,
        to: Address,
        bytes: u64,
    },
    ToHost {
        from: Address,
        to: usize,
        bytes: u64,
    },
    Copy {
        from: Address,
        to: Address,
        bytes: u64,
    },
    Fill {
        to: Address,
        bytes: u64,
        byte: u8,
    },
    /// Memory of this address is there from now on.
    Allocate(Address),
    Free(Address),
    /// An event, and how often it has been recorded.
    Record(Handle, u64),
    /// For what another stream has been given so far.
    Wait(Handle, u64),
    Graph(Arc<Vec<Work>>),
}

impl Work {
    /// Whether it may stand in a graph that is launched again and again.
    pub fn can_be_repeated(&self) -> bool {
        matches!(
            self,
            Self::Kernel(_) | Self::Product(_) | Self::Copy { .. } | Self::Fill { .. }
        )
    }

    /// Short name for messages.
    pub fn name(&self) -> String {
        match self {
            Self::Kernel(kernel) => kernel.name.clone(),
            Self::Product(_) => "a product".to_owned(),
            Self::Sum { .. } => "a sum over all ranks".to_owned(),
            Self::ToDevice { .. } => "a copy to the device".to_owned(),
            Self::ToHost { .. } => "a copy to the host".to_owned(),
            Self::Copy { .. } => "a copy on the device".to_owned(),
            Self::Fill { .. } => "a fill".to_owned(),
            Self::Allocate(_) => "an allocation".to_owned(),
            Self::Free(_) => "a release".to_owned(),
            Self::Record(..) => "an event's record".to_owned(),
            Self::Wait(..) => "a wait for an event".to_owned(),
            Self::Graph(work) => format!("a graph of {} nodes", work.len()),
        }
    }

    /// The ranges of the device's memory that it touches. Of a kernel's pointer only the first byte is
    /// known; a null pointer is none, and neither is the map of a matrix without elements.
    pub fn touches(&self) -> Vec<Range<Address>> {
        let range = |start: Address, bytes: u64| start..start.saturating_add(bytes);
        match self {
            Self::Kernel(kernel) => {
                let touched = kernel.arguments.iter().map(|argument| match argument {
                    &(Argument::Input(address) | Argument::Output(address)) => range(address, 0),
                    Argument::Map(map) => range(map.view().address, map.view().bytes as u64),
                    Argument::Value(..) => range(0, 0),
                });
                touched.filter(|range| range.start != 0).collect()
            }
            Self::Product(product) => product.touches(),
            &Self::Sum { at, bytes, .. } => vec![range(at, bytes)],
            &Self::ToDevice { to, bytes, .. } | &Self::Fill { to, bytes, .. } => {
                vec![range(to, bytes)]
            }
            &Self::ToHost { from, bytes, .. } => vec![range(from, bytes)],
            &Self::Copy { from, to, bytes } => vec![range(from, bytes), range(to, bytes)],
            Self::Graph(work) => work.iter().flat_map(Self::touches).collect(),
            Self::Allocate(_) | Self::Free(_) | Self::Record(..) | Self::Wait(..) => Vec::new(),
        }
    }

    /// Whether it will read or write the host's pinned memory there.
    pub fn uses_pinned(&self, pinned: &Range<usize>) -> bool {
        match self {
            Self::ToDevice {
                from: Source::Pinned(address),
                ..
            } => pinned.contains(address),
            Self::ToHost { to, .. } => pinned.contains(to),
            _ => false,
        }
    }

    /// Whether it will launch one of these functions.
    pub fn launches(&self, functions: &[Handle]) -> bool {
        match self {
            Self::Kernel(kernel) => functions.contains(&kernel.function),
            Self::Graph(work) => work.iter().any(|work| work.launches(functions)),
            _ => false,
        }
    }
}
