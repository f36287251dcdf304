//! The device's memory: what is allocated, and what stands there.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use cudarc::driver::sys::CUresult as Code;
use dtmem_host::{Buffer, Executor, View};

use crate::device::fault;
use crate::machine::Result;
use crate::work::Address;

/// Addresses are not used again before so many bytes were freed.
const QUARANTINE_BYTES: u64 = 64 << 20;
/// Where pretended memory begins, and what it is aligned to.
const PRETENDED: Address = 0x7f00_0000_0000;
const ALIGNMENT: u64 = 512;

#[derive(Debug)]
struct Allocation {
    bytes: u64,
    /// None where memory is only pretended.
    _buffer: Option<Buffer<u8>>,
    /// Whether the stream has come to its allocation.
    is_there: bool,
    /// Whether it was given back, though its stream may not have come so far.
    is_freed: bool,
}

/// All memory of the device.
#[derive(Debug)]
pub struct Memory {
    capacity: u64,
    used: u64,
    next: Address,
    allocations: BTreeMap<Address, Allocation>,
    quarantine: VecDeque<Allocation>,
}

impl Memory {
    pub fn new(capacity: u64) -> Self {
        Self {
            capacity,
            used: 0,
            next: PRETENDED,
            allocations: BTreeMap::new(),
            quarantine: VecDeque::new(),
        }
    }

    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    pub fn free_bytes(&self) -> u64 {
        self.capacity - self.used
    }

    /// How many allocations there are.
    pub fn count(&self) -> usize {
        self.allocations.len()
    }

    /// Memory in the executor, or pretended.
    pub fn allocate(&mut self, executor: Option<&Executor>, bytes: u64) -> Result<Address> {
        if bytes == 0 {
            return fault(Code::CUDA_ERROR_INVALID_VALUE, "an allocation of 0 bytes");
        }
        if bytes > self.free_bytes() {
            let message = format!("{bytes} bytes of {} that are free", self.free_bytes());
            return fault(Code::CUDA_ERROR_OUT_OF_MEMORY, message);
        }
        let buffer = executor.map(|executor| executor.scratch::<u8>(bytes as usize));
        let address = match &buffer {
            Some(buffer) => buffer.view().address,
            None => self.next,
        };
        self.next += (bytes + 1).next_multiple_of(ALIGNMENT);
        self.used += bytes;
        let allocation = Allocation {
            bytes,
            _buffer: buffer,
            is_there: false,
            is_freed: false,
        };
        self.allocations.insert(address, allocation);
        Ok(address)
    }

    /// A stream has come to the allocation.
    pub fn appear(&mut self, address: Address) {
        if let Some(allocation) = self.allocations.get_mut(&address) {
            allocation.is_there = true;
        }
    }

    /// From this call on nothing new may use it.
    pub fn give_back(&mut self, address: Address) -> Result<()> {
        match self.allocations.get_mut(&address) {
            Some(allocation) if !allocation.is_freed => {
                allocation.is_freed = true;
                Ok(())
            }
            Some(_) => fault(
                Code::CUDA_ERROR_INVALID_VALUE,
                format!("{address:#x} is freed twice"),
            ),
            None => fault(
                Code::CUDA_ERROR_INVALID_VALUE,
                format!("{address:#x} is freed, where no allocation begins"),
            ),
        }
    }

    /// A stream has come to the release.
    pub fn release(&mut self, address: Address) {
        if let Some(allocation) = self.allocations.remove(&address) {
            self.used -= allocation.bytes;
            self.quarantine.push_back(allocation);
        }
        let held = |all: &VecDeque<Allocation>| all.iter().map(|x| x.bytes).sum::<u64>();
        while held(&self.quarantine) > QUARANTINE_BYTES {
            self.quarantine.pop_front();
        }
    }

    fn find(&self, range: &Range<Address>) -> Result<(Address, &Allocation)> {
        let below = self.allocations.range(..=range.start).next_back();
        match below {
            Some((&start, allocation)) if range.end <= start + allocation.bytes => {
                Ok((start, allocation))
            }
            Some((start, allocation)) if range.start < start + allocation.bytes => fault(
                Code::CUDA_ERROR_INVALID_VALUE,
                format!(
                    "bytes {range:#x?} reach {} behind their allocation of {}",
                    range.end - start - allocation.bytes,
                    allocation.bytes
                ),
            ),
            _ => fault(
                Code::CUDA_ERROR_INVALID_VALUE,
                format!("bytes {range:#x?} are nobody's: never allocated, or freed"),
            ),
        }
    }

    /// Whether new work may touch these bytes.
    pub fn check(&self, range: &Range<Address>) -> Result<()> {
        match self.find(range)? {
            (_, allocation) if allocation.is_freed => fault(
                Code::CUDA_ERROR_INVALID_VALUE,
                format!("bytes {range:#x?} were freed before"),
            ),
            _ => Ok(()),
        }
    }

    /// Whether work that begins now may touch these bytes.
    pub fn check_now(&self, range: &Range<Address>) -> Result<()> {
        match self.find(range)? {
            (_, allocation) if !allocation.is_there => fault(
                Code::CUDA_ERROR_ILLEGAL_ADDRESS,
                format!(
                    "bytes {range:#x?} are not allocated yet: another stream does not wait for that"
                ),
            ),
            _ => Ok(()),
        }
    }

    /// What a kernel that is given this address may touch: all that stands behind it.
    pub fn view(&self, address: Address) -> Result<View> {
        if address == 0 {
            return Ok(View::NULL);
        }
        let (start, allocation) = self.find(&(address..address))?;
        let bytes = (start + allocation.bytes - address) as usize;
        Ok(View { address, bytes })
    }
}
