//! What the executor's checks find.

use std::ffi::{CStr, c_char};
use std::fmt;

use crate::ffi;

/// The kind of a defect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Check {
    /// An access outside of every view that was passed, or of every shared variable.
    OutOfBounds,
    /// A write to memory that was passed for reading only.
    ReadOnly,
    /// A read of memory that nothing has been written to.
    Uninitialised,
    /// An access to shared memory that an asynchronous copy is still on its way to.
    Pending,
    /// A thread ended before it waited for its asynchronous copy, or its part of a product.
    Unawaited,
    /// An address that is not a multiple of what the access needs.
    Misaligned,
    /// Two threads use one word without a barrier between them, and one of them writes.
    Race,
    /// Threads wait for others that ended or wait elsewhere.
    Divergence,
    /// An instruction of a whole warp, or a barrier, with the wrong threads.
    Collective,
    /// What C++ leaves undefined: an array index, a shift, a division, a signed overflow.
    Arithmetic,
    /// More shared memory than a multiprocessor has.
    SharedSize,
    /// A pointer to another thread's local variable, or a stack that overflowed.
    Local,
    /// The kernel accessed memory more often than the launch allows: it probably never ends.
    Runaway,
    /// The shared memory of a block of the cluster that has ended.
    Ended,
    /// Registers or shared memory that a product of a warpgroup, or a bulk copy, not waited for yet, works on.
    InFlight,
    /// A product of a warpgroup, or a bulk copy, takes registers, or shared memory, that the program used without a fence
    /// in between.
    Unfenced,
}

impl Check {
    fn from_code(code: u32) -> Self {
        use Check::*;
        const ALL: [Check; 17] = [
            Runaway,
            OutOfBounds,
            ReadOnly,
            Uninitialised,
            Pending,
            Unawaited,
            Misaligned,
            Race,
            Divergence,
            Collective,
            Arithmetic,
            SharedSize,
            Local,
            Runaway,
            Ended,
            InFlight,
            Unfenced,
        ];
        ALL.get(code as usize).copied().unwrap_or(Runaway)
    }

    fn describe(self) -> &'static str {
        match self {
            Check::OutOfBounds => "out of bounds",
            Check::ReadOnly => "memory passed for reading only",
            Check::Uninitialised => "uninitialised memory",
            Check::Pending => "an asynchronous copy has not been waited for",
            Check::Unawaited => "the thread ended before its asynchronous work was waited for",
            Check::Misaligned => "misaligned address",
            Check::Race => "race",
            Check::Divergence => "threads wait in vain",
            Check::Collective => "wrong threads or operands",
            Check::Arithmetic => "undefined behaviour",
            Check::SharedSize => "too much shared memory",
            Check::Local => "local memory",
            Check::Runaway => "no end in sight",
            Check::Ended => "shared memory of a block that has ended",
            Check::InFlight => "a product or a copy that has not been waited for",
            Check::Unfenced => "no fence before a product or a copy",
        }
    }
}

/// A line of a kernel's source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Path relative to the repository.
    pub file: String,
    /// Line, from 1.
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
}

/// A thread, and what it was executing where that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Index of the block in the grid (x, y, z).
    pub block: [u32; 3],
    /// Index of the thread in the block (x, y, z).
    pub thread: [u32; 3],
    /// The line that it executed.
    pub location: Option<Location>,
}

/// The memory that a finding is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Memory {
    /// A view passed to the kernel, or the one that is nearest to the address.
    Global {
        /// Its index among the kernel's arguments.
        argument: usize,
        /// Byte that was accessed, from the start of the view.
        offset: i64,
        /// Bytes of the view.
        extent: u64,
    },
    /// A shared variable, or the one that is nearest to the address.
    Shared {
        /// Its name in the kernel.
        variable: String,
        /// Byte that was accessed, from the start of the variable.
        offset: i64,
        /// Bytes of the variable.
        extent: u64,
    },
    /// An address near nothing that was passed.
    Unknown {
        /// The address.
        address: u64,
    },
}

/// One access to memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// What was accessed.
    pub memory: Memory,
    /// How many bytes at once.
    pub bytes: u64,
    /// Written (or read).
    pub is_write: bool,
}

/// A defect that a launch ended with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Name of the kernel.
    pub kernel: String,
    /// What is wrong.
    pub check: Check,
    /// The thread that did it (for [`Check::Divergence`] one that waits).
    pub place: Place,
    /// The access, where it is about memory.
    pub access: Option<Access>,
    /// The earlier access of a race: its thread, and whether it wrote.
    pub other: Option<(Place, bool)>,
    /// What else there is to say.
    pub detail: String,
}

impl Finding {
    pub(crate) fn from_ffi(kernel: &str, finding: &ffi::Finding) -> Self {
        let offset = finding.offset.cast_signed();
        let access = (finding.has_address != 0).then(|| Access {
            memory: match (finding.space, usize::try_from(finding.argument)) {
                (ffi::SHARED, _) => Memory::Shared {
                    variable: text(&finding.variable),
                    offset,
                    extent: finding.extent,
                },
                (ffi::GLOBAL, Ok(argument)) => Memory::Global {
                    argument,
                    offset,
                    extent: finding.extent,
                },
                _ => Memory::Unknown {
                    address: finding.address,
                },
            },
            bytes: finding.bytes,
            is_write: finding.is_write != 0,
        });
        Self {
            kernel: kernel.to_owned(),
            check: Check::from_code(finding.check),
            place: Place::from_ffi(&finding.place),
            access,
            other: (finding.has_other != 0)
                .then(|| (Place::from_ffi(&finding.other), finding.other_is_write != 0)),
            detail: text(&finding.detail),
        }
    }
}

impl Place {
    fn from_ffi(place: &ffi::Where) -> Self {
        let location = (!place.location.file.is_null()).then(|| Location {
            // SAFETY: the runtime points to a string of the program's own table of lines, which ends with a 0.
            file: unsafe { CStr::from_ptr(place.location.file) }
                .to_string_lossy()
                .into_owned(),
            line: place.location.line,
            column: place.location.column,
        });
        Self {
            block: place.block,
            thread: place.thread,
            location,
        }
    }
}

fn text(characters: &[c_char]) -> String {
    let bytes: Vec<u8> = characters
        .iter()
        .map(|&c| c.cast_unsigned())
        .take_while(|&c| c != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([bx, by, bz], [tx, ty, tz]) = (self.block, self.thread);
        write!(f, "block ({bx}, {by}, {bz}) thread ({tx}, {ty}, {tz})")?;
        match &self.location {
            Some(Location { file, line, column }) => write!(f, " at {file}:{line}:{column}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            memory,
            bytes,
            is_write,
        } = self;
        write!(
            f,
            "{} of {bytes} bytes at ",
            if *is_write { "write" } else { "read" }
        )?;
        match memory {
            Memory::Global {
                argument,
                offset,
                extent,
            } => write!(f, "byte {offset} of argument {argument} ({extent} bytes)"),
            Memory::Shared {
                variable,
                offset,
                extent,
            } => write!(f, "byte {offset} of shared `{variable}` ({extent} bytes)"),
            Memory::Unknown { address } => write!(f, "address {address:#x}"),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: ", self.kernel, self.check.describe())?;
        if let Some(access) = &self.access {
            write!(f, "{access} by ")?;
        }
        write!(f, "{}", self.place)?;
        if let Some((other, is_write)) = &self.other {
            write!(
                f,
                "; earlier {} by {other}",
                if *is_write { "write" } else { "read" }
            )?;
        }
        if !self.detail.is_empty() {
            write!(f, "; {}", self.detail)?;
        }
        Ok(())
    }
}

impl std::error::Error for Finding {}
