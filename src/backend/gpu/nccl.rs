//! NCCL: GPUs that add up among themselves. The library is loaded when several ranks need it.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut as _};
use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId};
use libloading::Library;

use crate::backend::Rank;
use crate::ops::{Error, Result};

/// As packages of PyTorch name it, and as packages for developers do: cudarc knows the second only.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

type GetUniqueId = unsafe extern "C" fn(*mut ncclUniqueId) -> ncclResult_t;
type CommInitRank =
    unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> ncclResult_t;
type AllReduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    ncclDataType_t,
    ncclRedOp_t,
    ncclComm_t,
    *mut c_void,
) -> ncclResult_t;

/// What is used of the library.
struct Functions {
    get_unique_id: GetUniqueId,
    comm_init_rank: CommInitRank,
    all_reduce: AllReduce,
}

/// Loaded once; stays.
fn functions() -> Result<&'static Functions> {
    static LIBRARY: OnceLock<Option<(Library, Functions)>> = OnceLock::new();
    let load = || {
        // SAFETY: NCCL may be loaded at any time, and its functions have these types since version 2.
        unsafe {
            let library = NAMES.iter().find_map(|name| Library::new(*name).ok())?;
            let functions = Functions {
                get_unique_id: *library.get(b"ncclGetUniqueId\0").ok()?,
                comm_init_rank: *library.get(b"ncclCommInitRank\0").ok()?,
                all_reduce: *library.get(b"ncclAllReduce\0").ok()?,
            };
            Some((library, functions))
        }
    };
    let library = LIBRARY.get_or_init(load).as_ref();
    library.map(|(_, functions)| functions).ok_or(Error::NoNccl)
}

fn check(what: &'static str, code: ncclResult_t) -> Result<()> {
    match code {
        ncclResult_t::ncclSuccess => Ok(()),
        _ => Err(Error::Nccl {
            what,
            code: format!("{code:?}"),
        }),
    }
}

/// What one rank makes and all others are given. Errors: no NCCL, or what it says.
pub(super) fn id() -> Result<[u8; 128]> {
    let mut id = MaybeUninit::<ncclUniqueId>::zeroed();
    // SAFETY: writes an id, which is an array of bytes.
    let id = unsafe {
        check("an id", (functions()?.get_unique_id)(id.as_mut_ptr()))?;
        id.assume_init()
    };
    Ok(id.internal.map(|byte| byte as u8))
}

/// One rank's connection to all others. It is left to the end of the process: to end it is an
/// agreement of all ranks, too.
pub(super) struct Nccl {
    rank: Rank,
    stream: Arc<CudaStream>,
    connection: Mutex<ncclComm_t>,
}

// SAFETY: NCCL's communicators may be used by any thread, by one at a time: it is behind a lock.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NCCL, rank {} of {}", self.rank.number, self.rank.of)
    }
}

impl Nccl {
    /// Waits until all ranks are there. Errors: no NCCL, or what it says.
    pub fn new(stream: &Arc<CudaStream>, rank: Rank, id: &[u8; 128]) -> Result<Self> {
        let functions = functions()?;
        stream.context().bind_to_thread()?;
        let id = ncclUniqueId {
            internal: id.map(|byte| byte as _),
        };
        let (number, of) = (rank.number as c_int, rank.of as c_int);
        let mut connection = MaybeUninit::zeroed();
        // SAFETY: writes the connection, of the GPU whose context is bound.
        let code = unsafe { (functions.comm_init_rank)(connection.as_mut_ptr(), of, id, number) };
        check("to connect the ranks", code)?;
        Ok(Self {
            rank,
            stream: Arc::clone(stream),
            // SAFETY: written by the call before.
            connection: Mutex::new(unsafe { connection.assume_init() }),
        })
    }

    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The first `len` elements become their sum over all ranks, on the stream.
    pub fn sum(&self, memory: &mut CudaSlice<f32>, len: usize) -> Result<()> {
        let functions = functions()?;
        let connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.stream.context().bind_to_thread()?;
        let mut part = memory.slice_mut(..len);
        let (address, _guard) = part.device_ptr_mut(&self.stream);
        // SAFETY: memory of that many elements, which all work on this stream has its turns with.
        let code = unsafe {
            (functions.all_reduce)(
                address as *const c_void,
                address as *mut c_void,
                len,
                ncclDataType_t::ncclFloat32,
                ncclRedOp_t::ncclSum,
                *connection,
                self.stream.cu_stream().cast(),
            )
        };
        check("a sum over all ranks", code)
    }
}
