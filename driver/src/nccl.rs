//! NCCL: ranks are processes on this machine, which add up over TCP.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUresult;
use cudarc::nccl::sys::{ncclDataType_t, ncclRedOp_t, ncclResult_t as Code, ncclUniqueId};

use crate::device::{Fault, fault};
use crate::machine::{self, Machine, call};
use crate::work::{Address, Handle, Work};

type Result<T> = std::result::Result<T, Fault<Code>>;

/// How long ranks wait for each other.
const PATIENCE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(5);
/// What rank 0 says to one that may take part.
const WELCOME: u8 = 1;

/// What NCCL knows in this process.
#[derive(Debug, Default)]
pub struct State {
    /// Where others find the rank that made an id.
    root: Option<TcpListener>,
    connections: HashMap<Handle, Arc<Ranks>>,
}

/// The ways to all others from rank 0, in their order; from another one to rank 0.
#[derive(Debug)]
pub struct Ranks {
    rank: u32,
    others: Mutex<Vec<TcpStream>>,
}

impl Ranks {
    /// Rank 0 waits for all others, which have GPUs of their own.
    fn gather(root: &TcpListener, of: u32, gpu: i32) -> io::Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let mut gpus = vec![gpu];
        let mut others: Vec<Option<TcpStream>> = (1..of).map(|_| None).collect();
        while others.iter().any(Option::is_none) {
            let mut stream = match root.accept() {
                Ok((stream, _)) => stream,
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => {
                    std::thread::sleep(PAUSE);
                    continue;
                }
            };
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let [rank, size, gpu] = [(); 3].map(|()| read_number(&mut stream));
            let (rank, size, gpu) = (rank? as usize, size?, gpu? as i32);
            let place = rank.checked_sub(1).and_then(|index| others.get_mut(index));
            let Some(place @ None) = place else {
                return Err(io::Error::other(format!("two ranks {rank}, or too many")));
            };
            if size != u64::from(of) || gpus.contains(&gpu) {
                let message = format!("rank {rank} of {size} on GPU {gpu}, which another one has");
                return Err(io::Error::other(message));
            }
            gpus.push(gpu);
            *place = Some(stream);
        }
        let mut others: Vec<TcpStream> = others.into_iter().flatten().collect();
        for stream in &mut others {
            stream.write_all(&[WELCOME])?;
        }
        Ok(Self::new(0, others))
    }

    fn join(port: u16, [rank, of]: [u32; 2], gpu: i32) -> io::Result<Self> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        for number in [u64::from(rank), u64::from(of), gpu as u64] {
            stream.write_all(&number.to_le_bytes())?;
        }
        stream.read_exact(&mut [0])?;
        Ok(Self::new(rank, vec![stream]))
    }

    fn new(rank: u32, others: Vec<TcpStream>) -> Self {
        let others = Mutex::new(others);
        Self { rank, others }
    }

    /// Σ over all ranks of numbers in f32, in their order. All have to come, with as many bytes.
    pub fn sum(&self, bytes: u64, mine: Vec<u8>) -> machine::Result<Vec<u8>> {
        let summed = self.try_sum(bytes, mine);
        summed.or_else(|error| {
            let message = format!("rank {} and the others: {error}", self.rank);
            fault(CUresult::CUDA_ERROR_LAUNCH_FAILED, message)
        })
    }

    fn try_sum(&self, bytes: u64, mut content: Vec<u8>) -> io::Result<Vec<u8>> {
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        if self.rank > 0 {
            for stream in &mut *others {
                stream.write_all(&bytes.to_le_bytes())?;
                stream.write_all(&content)?;
                stream.read_exact(&mut content)?;
            }
            return Ok(content);
        }
        for stream in &mut *others {
            let theirs = read_number(stream)?;
            if theirs != bytes {
                let message = format!("{bytes} bytes are added to {theirs}");
                return Err(io::Error::other(message));
            }
            let mut part = vec![0; content.len()];
            stream.read_exact(&mut part)?;
            for (sum, part) in content.chunks_exact_mut(4).zip(part.chunks_exact(4)) {
                let [x, y] = [&*sum, part].map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]]));
                sum.copy_from_slice(&(x + y).to_le_bytes());
            }
        }
        for stream in &mut *others {
            stream.write_all(&content)?;
        }
        Ok(content)
    }
}

fn read_number(stream: &mut TcpStream) -> io::Result<u64> {
    let mut number = [0; 8];
    stream.read_exact(&mut number)?;
    Ok(u64::from_le_bytes(number))
}

fn invalid<T>(message: impl Into<String>) -> Result<T> {
    fault(Code::ncclInvalidArgument, message.into())
}

fn of_system(error: io::Error) -> Fault<Code> {
    Fault {
        code: Code::ncclSystemError,
        message: error.to_string(),
    }
}

fn of_driver(fault: Fault<CUresult>) -> Fault<Code> {
    fault.with_code(Code::ncclUnhandledCudaError)
}

impl Machine {
    /// An id has the port of the rank that made it.
    fn make_id(&mut self) -> Result<[u8; 128]> {
        let listen = || {
            let root = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            root.set_nonblocking(true)?;
            let port = root.local_addr()?.port();
            Ok((root, port))
        };
        let (root, port) = listen().map_err(of_system)?;
        self.nccl.root = Some(root);
        let mut id = [0x5a; 128];
        id[..2].copy_from_slice(&port.to_le_bytes());
        Ok(id)
    }

    /// Waits for all ranks.
    fn connect(&mut self, id: [u8; 128], [rank, of]: [u32; 2]) -> Result<Handle> {
        self.ready().map_err(of_driver)?;
        self.forbid_in_capture("to connect ranks")
            .map_err(of_driver)?;
        if rank >= of {
            return invalid(format!("rank {rank} of {of}"));
        }
        let port = u16::from_le_bytes([id[0], id[1]]);
        let connected = match (rank, &self.nccl.root) {
            (0, Some(root)) => Ranks::gather(root, of, self.gpu),
            (0, None) => return invalid("rank 0 has an id of another process"),
            _ => Ranks::join(port, [rank, of], self.gpu),
        };
        let connected = connected.or_else(|error| fault(Code::ncclInvalidUsage, error))?;
        let handle = self.handle();
        self.nccl.connections.insert(handle, Arc::new(connected));
        Ok(handle)
    }

    fn all_reduce(
        &mut self,
        connection: Handle,
        at: Address,
        len: usize,
        stream: Handle,
    ) -> Result<()> {
        self.ready().map_err(of_driver)?;
        let Some(ranks) = self.nccl.connections.get(&connection).cloned() else {
            return invalid(format!("{connection:#x} is no connection"));
        };
        let bytes = 4 * len as u64;
        self.submit(stream, Work::Sum { ranks, at, bytes })
            .map_err(of_driver)
    }
}

macro_rules! functions {
    ($(fn $name:ident(|$machine:ident| $($argument:ident: $type:ty),*) $body:block)*) => {$(
        /// # Safety
        /// As NCCL's manual says.
        #[allow(non_snake_case, unused_unsafe)]
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: $type),*) -> Code {
            call(stringify!($name), Code::ncclSuccess, |$machine: &mut Machine| {
                // SAFETY: the caller's.
                unsafe { $body }
            })
        }
    )*};
}

functions! {
    fn ncclGetUniqueId(|machine| to: *mut ncclUniqueId) {
        let Some(to) = to.as_mut() else {
            return invalid("a null pointer");
        };
        to.internal = machine.make_id()?.map(|byte| byte as _);
        Ok(())
    }

    fn ncclCommInitRank(|machine| to: *mut Handle, of: i32, id: ncclUniqueId, rank: i32) {
        let (Some(to), Ok(of), Ok(rank)) = (to.as_mut(), of.try_into(), rank.try_into()) else {
            return invalid(format!("a null pointer, or rank {rank} of {of}"));
        };
        *to = machine.connect(id.internal.map(|byte| byte as u8), [rank, of])?;
        Ok(())
    }

    fn ncclAllReduce(
        |machine| from: Address, to: Address, len: usize, of: u32, operation: u32, connection: Handle,
        stream: Handle
    ) {
        let known = of == ncclDataType_t::ncclFloat32 as u32 && operation == ncclRedOp_t::ncclSum as u32;
        if !known || from != to {
            return invalid(format!(
                "type {of}, operation {operation}, from {from:#x} to {to:#x}: this model knows sums of f32 in place"
            ));
        }
        machine.all_reduce(connection, to, len, stream)
    }
}
