//! The state behind all calls: streams, events, modules, captures.

use std::alloc::{Layout, alloc, dealloc};
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::ThreadId;
use std::time::Instant;

use cudarc::driver::sys::CUresult as Code;
use dtmem_host::{Arg, Executor, Launch, Parameter, TensorMap, View};

use crate::blas;
use crate::device::{Chip, Fault, OLD_VERSION, Options, SHARED_BYTES, VERSION, fault};
use crate::image::Image;
use crate::memory::Memory;
use crate::nccl;
use crate::work::{Address, Argument, Bits, Handle, Kernel, Source, Work};

/// The result of a call of the driver.
pub type Result<T> = std::result::Result<T, Fault<Code>>;

/// The one context, the primary one of the GPU that was asked for first.
pub const CONTEXT: Handle = 0xc0_0000;
/// The stream that is always there.
pub const LEGACY: Handle = 0;
/// Seconds that work takes which is only pretended.
const PRETENDED_SECONDS: f64 = 10e-6;
const PAGE_BYTES: usize = 4096;

thread_local! {
    static CURRENT: Cell<Handle> = const { Cell::new(0) };
}

/// How a capture deals with calls that it cannot keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Global,
    ThreadLocal,
    Relaxed,
}

#[derive(Debug)]
struct Capture {
    mode: Mode,
    thread: ThreadId,
    nodes: Vec<Work>,
    is_broken: bool,
}

#[derive(Debug, Default)]
struct Stream {
    queue: VecDeque<Work>,
    /// How much it was given, and how much of that it has done.
    given: u64,
    done: u64,
    /// Whether it takes turns with the legacy stream.
    is_blocking: bool,
    is_destroyed: bool,
    capture: Option<Capture>,
}

#[derive(Debug, Default)]
struct Event {
    has_time: bool,
    /// How often it was recorded, and when last: the stream, and how much that had been given.
    records: u64,
    last: Option<(Handle, u64)>,
    is_captured: bool,
    seconds: Option<f64>,
}

/// A kernel of a module.
#[derive(Debug)]
pub struct Function {
    module: Handle,
    name: String,
    /// What its code was compiled for.
    pub target: i32,
    pub max_threads: u32,
    pub static_bytes: u32,
    pub dynamic_bytes: u32,
    pub large_clusters: bool,
}

/// Everything.
#[derive(Debug)]
pub struct Machine {
    pub options: Options,
    pub chip: Chip,
    pub is_initialised: bool,
    pub blas: blas::State,
    pub nccl: nccl::State,
    /// Whose context it is.
    pub gpu: i32,
    retained: u32,
    executor: Executor,
    pub memory: Memory,
    pinned: BTreeMap<usize, Layout>,
    streams: HashMap<Handle, Stream>,
    events: HashMap<Handle, Event>,
    modules: HashMap<Handle, Image>,
    functions: HashMap<Handle, Function>,
    graphs: HashMap<Handle, Arc<Vec<Work>>>,
    executables: HashMap<Handle, Arc<Vec<Work>>>,
    next: Handle,
    failure: Option<Code>,
    performed: u64,
    start: Instant,
    pretended: f64,
    chance: u64,
}

/// The only one.
pub fn machine() -> MutexGuard<'static, Machine> {
    static MACHINE: OnceLock<Mutex<Machine>> = OnceLock::new();
    let machine = MACHINE.get_or_init(|| Mutex::new(Machine::new(Options::of_environment())));
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does a call, and tells of its failure.
pub fn call<C: Copy + fmt::Debug>(
    name: &str,
    success: C,
    work: impl FnOnce(&mut Machine) -> std::result::Result<(), Fault<C>>,
) -> C {
    let mut machine = machine();
    let done = work(&mut machine);
    if machine.options.trace {
        let code = done.as_ref().map_or_else(|fault| fault.code, |()| success);
        eprintln!("{name}: {code:?}");
    }
    match done {
        Ok(()) => success,
        Err(Fault { code, message }) => {
            eprintln!("CUDA model: {name}: {message} ({code:?})");
            code
        }
    }
}

fn unknown<T>(what: &str, handle: Handle) -> Result<T> {
    fault(
        Code::CUDA_ERROR_INVALID_HANDLE,
        format!("{handle:#x} is no {what}"),
    )
}

impl Machine {
    fn new(options: Options) -> Self {
        let chip = Chip::new(&options);
        let mut executor = Executor::new();
        executor.set_budget(u64::MAX);
        Self {
            options,
            chip,
            is_initialised: false,
            blas: blas::State::default(),
            nccl: nccl::State::default(),
            gpu: 0,
            retained: 0,
            executor,
            memory: Memory::new(chip.memory),
            pinned: BTreeMap::new(),
            streams: HashMap::from([(LEGACY, Stream::default())]),
            events: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            graphs: HashMap::new(),
            executables: HashMap::new(),
            next: 0xd0_0000,
            failure: None,
            performed: 0,
            start: Instant::now(),
            pretended: 0.0,
            chance: options.order.unwrap_or(0),
        }
    }

    pub fn handle(&mut self) -> Handle {
        self.next += 16;
        self.next
    }

    // --- the context ---

    pub fn version(&self) -> i32 {
        if self.options.old {
            OLD_VERSION
        } else {
            VERSION
        }
    }

    pub fn gpus(&self) -> i32 {
        self.options.gpus.map_or(1, |count| count as i32)
    }

    pub fn check_gpu(&self, number: i32) -> Result<()> {
        if (0..self.gpus()).contains(&number) {
            return Ok(());
        }
        let message = format!("GPU {number} of {}", self.gpus());
        fault(Code::CUDA_ERROR_INVALID_DEVICE, message)
    }

    pub fn retain(&mut self, gpu: i32) -> Result<Handle> {
        if self.options.taken {
            let message = "another process has the GPU for itself";
            return fault(Code::CUDA_ERROR_DEVICE_UNAVAILABLE, message);
        }
        if self.retained > 0 && gpu != self.gpu {
            let message = "a second GPU's context in one process, which this model does not know";
            return fault(Code::CUDA_ERROR_INVALID_DEVICE, message);
        }
        self.gpu = gpu;
        self.retained += 1;
        Ok(CONTEXT)
    }

    /// With its last owner the context goes, and all that is in it.
    pub fn release(&mut self) -> Result<()> {
        if self.retained == 0 {
            let message = "the primary context is released more often than retained";
            return fault(Code::CUDA_ERROR_INVALID_CONTEXT, message);
        }
        self.retained -= 1;
        if self.retained > 0 {
            return Ok(());
        }
        // Streams that were destroyed have done what they were given.
        let streams = self.streams.iter().filter(|(_, x)| x.is_destroyed);
        let given: Vec<(Handle, u64)> = streams.map(|(&handle, x)| (handle, x.given)).collect();
        for (stream, given) in given {
            self.run(stream, given);
        }
        let queued: usize = self.streams.values().map(|x| x.queue.len()).sum();
        let streams = self.streams.iter();
        let streams = streams.filter(|(handle, x)| **handle != LEGACY && !x.is_destroyed);
        let left = [
            (queued, "queued works"),
            (streams.count(), "streams"),
            (self.events.len(), "events"),
            (self.memory.count(), "allocations"),
            (self.pinned.len(), "pinned allocations"),
            (self.modules.len(), "modules"),
            (self.graphs.len(), "graphs"),
            (self.executables.len(), "executable graphs"),
            (self.blas.libraries(), "handles of cuBLASLt"),
        ];
        for (count, what) in left.into_iter().filter(|(count, _)| *count > 0) {
            eprintln!("CUDA model: the context is released, and {count} {what} are left in it");
        }
        *self = Self {
            is_initialised: true,
            blas: std::mem::take(&mut self.blas),
            next: self.next,
            ..Self::new(self.options)
        };
        Ok(())
    }

    pub fn current(&self) -> Handle {
        CURRENT.get()
    }

    pub fn set_current(&self, context: Handle) -> Result<()> {
        if context != 0 && (context != CONTEXT || self.retained == 0) {
            return fault(
                Code::CUDA_ERROR_INVALID_CONTEXT,
                format!("{context:#x} is no context"),
            );
        }
        CURRENT.set(context);
        Ok(())
    }

    /// What almost every call needs: a context that is alive and current, and no failure before.
    pub fn ready(&self) -> Result<()> {
        if !self.is_initialised {
            return fault(Code::CUDA_ERROR_NOT_INITIALIZED, "cuInit was not called");
        }
        if CURRENT.get() != CONTEXT || self.retained == 0 {
            let message = "no context is current on this thread";
            return fault(Code::CUDA_ERROR_INVALID_CONTEXT, message);
        }
        match self.failure {
            Some(code) => fault(code, "work has failed before"),
            None => Ok(()),
        }
    }

    // --- streams ---

    pub fn create_stream(&mut self, is_blocking: bool) -> Handle {
        let handle = self.handle();
        let stream = Stream {
            is_blocking,
            ..Stream::default()
        };
        self.streams.insert(handle, stream);
        handle
    }

    pub fn destroy_stream(&mut self, stream: Handle) -> Result<()> {
        self.stream(stream)?.is_destroyed = true;
        Ok(())
    }

    fn stream(&mut self, handle: Handle) -> Result<&mut Stream> {
        match self.streams.get_mut(&handle) {
            Some(stream) if !stream.is_destroyed => Ok(stream),
            _ => unknown("stream", handle),
        }
    }

    pub fn check_stream(&mut self, stream: Handle) -> Result<()> {
        self.stream(stream).map(drop)
    }

    /// Gives a stream something to do, or a capture something to keep.
    pub fn submit(&mut self, stream: Handle, work: Work) -> Result<()> {
        for range in work.touches() {
            self.memory.check(&range).map_err(|fault| Fault {
                message: format!("{}: {}", work.name(), fault.message),
                ..fault
            })?;
        }
        let own = self.stream(stream)?;
        if let Some(capture) = &mut own.capture {
            if capture.is_broken {
                let message = "the capture was broken before";
                return fault(Code::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, message);
            }
            if !work.can_be_repeated() {
                capture.is_broken = true;
                return fault(
                    Code::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                    format!("{} cannot be captured", work.name()),
                );
            }
            capture.nodes.push(work);
            return Ok(());
        }
        let is_blocking = own.is_blocking;
        let awaited: Vec<(Handle, u64)> = match stream {
            LEGACY => {
                self.check_legacy()?;
                let blocking = self.streams.iter().filter(|(_, x)| x.is_blocking);
                blocking.map(|(&handle, x)| (handle, x.given)).collect()
            }
            _ if is_blocking => vec![(LEGACY, self.stream(LEGACY)?.given)],
            _ => Vec::new(),
        };
        let own = self.stream(stream)?;
        for (other, given) in awaited {
            own.queue.push_back(Work::Wait(other, given));
            own.given += 1;
        }
        own.queue.push_back(work);
        own.given += 1;
        self.progress();
        self.ready()
    }

    /// The legacy stream encompasses all blocking ones.
    fn check_legacy(&mut self) -> Result<()> {
        let mut captures = self.streams.values_mut().filter(|x| x.is_blocking);
        match captures.find_map(|x| x.capture.as_mut()) {
            Some(capture) => {
                capture.is_broken = true;
                let message = "the legacy stream is used while a blocking stream is captured";
                fault(Code::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, message)
            }
            None => Ok(()),
        }
    }

    /// Does what a stream was given, up to there, and what that waits for.
    fn run(&mut self, stream: Handle, until: u64) {
        while let Some(own) = self.streams.get_mut(&stream)
            && own.done < until
        {
            match own.queue.pop_front() {
                Some(Work::Wait(other, given)) => self.run(other, given),
                Some(work) => self.perform(&work),
                None => break,
            }
            if let Some(own) = self.streams.get_mut(&stream) {
                own.done += 1;
            }
        }
    }

    /// With the option `order`: some streams go on, where events let them.
    fn progress(&mut self) {
        if self.options.order.is_none() {
            return;
        }
        while !self.random().is_multiple_of(4) {
            let mut busy: Vec<Handle> = Vec::new();
            for (&handle, stream) in &self.streams {
                let waits = match stream.queue.front() {
                    None => true,
                    Some(Work::Wait(other, given)) => {
                        self.streams.get(other).is_some_and(|x| x.done < *given)
                    }
                    Some(_) => false,
                };
                if !waits {
                    busy.push(handle);
                }
            }
            busy.sort_unstable();
            if busy.is_empty() {
                return;
            }
            let stream = busy[(self.random() % busy.len() as u64) as usize];
            let done = self.streams[&stream].done;
            self.run(stream, done + 1);
        }
    }

    /// SplitMix64.
    fn random(&mut self) -> u64 {
        self.chance = self.chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.chance ^ self.chance >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    pub fn synchronise(&mut self, stream: Handle) -> Result<()> {
        let own = self.stream(stream)?;
        if let Some(capture) = &mut own.capture {
            capture.is_broken = true;
            let message = "a stream that is captured cannot be waited for";
            return fault(Code::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, message);
        }
        let given = own.given;
        self.forbid_in_capture("to wait for a stream")?;
        if stream == LEGACY {
            let blocking: Vec<(Handle, u64)> = self
                .streams
                .iter()
                .filter(|(_, x)| x.is_blocking)
                .map(|(&handle, x)| (handle, x.given))
                .collect();
            for (handle, given) in blocking {
                self.run(handle, given);
            }
        }
        self.run(stream, given);
        self.ready()
    }

    pub fn synchronise_all(&mut self) -> Result<()> {
        let mut streams = self.streams.values_mut();
        if let Some(capture) = streams.find_map(|x| x.capture.as_mut()) {
            capture.is_broken = true;
            let message = "a context in which a stream is captured cannot be waited for";
            return fault(Code::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, message);
        }
        let all: Vec<(Handle, u64)> = self.streams.iter().map(|(&h, x)| (h, x.given)).collect();
        for (stream, given) in all {
            self.run(stream, given);
        }
        self.ready()
    }

    // --- captures and graphs ---

    /// Breaks the captures that do not bear such a call of this thread.
    pub fn forbid_in_capture(&mut self, what: &str) -> Result<()> {
        let thread = std::thread::current().id();
        let mut captures = self
            .streams
            .values_mut()
            .filter_map(|stream| stream.capture.as_mut());
        let broken = captures.find(|capture| match capture.mode {
            Mode::Global => true,
            Mode::ThreadLocal => capture.thread == thread,
            Mode::Relaxed => false,
        });
        match broken {
            Some(capture) => {
                capture.is_broken = true;
                fault(
                    Code::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                    format!("{what}, while a stream is captured"),
                )
            }
            None => Ok(()),
        }
    }

    pub fn begin_capture(&mut self, stream: Handle, mode: Mode) -> Result<()> {
        let own = self.stream(stream)?;
        if stream == LEGACY || own.capture.is_some() {
            let message = "the legacy stream, or one that is captured already";
            return fault(Code::CUDA_ERROR_ILLEGAL_STATE, message);
        }
        own.capture = Some(Capture {
            mode,
            thread: std::thread::current().id(),
            nodes: Vec::new(),
            is_broken: false,
        });
        Ok(())
    }

    pub fn end_capture(&mut self, stream: Handle) -> Result<Handle> {
        let Some(capture) = self.stream(stream)?.capture.take() else {
            let message = "the stream is not captured";
            return fault(Code::CUDA_ERROR_ILLEGAL_STATE, message);
        };
        for event in self.events.values_mut() {
            event.is_captured = false;
        }
        if capture.mode != Mode::Relaxed && capture.thread != std::thread::current().id() {
            let message = "another thread began the capture";
            return fault(Code::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, message);
        }
        if capture.is_broken {
            let message = "the capture was broken before";
            return fault(Code::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, message);
        }
        let handle = self.handle();
        self.graphs.insert(handle, Arc::new(capture.nodes));
        Ok(handle)
    }

    pub fn instantiate(&mut self, graph: Handle) -> Result<Handle> {
        let Some(nodes) = self.graphs.get(&graph).cloned() else {
            return unknown("graph", graph);
        };
        let handle = self.handle();
        self.executables.insert(handle, nodes);
        Ok(handle)
    }

    pub fn launch_graph(&mut self, executable: Handle, stream: Handle) -> Result<()> {
        match self.executables.get(&executable).cloned() {
            Some(nodes) => self.submit(stream, Work::Graph(nodes)),
            None => unknown("executable graph", executable),
        }
    }

    pub fn destroy_graph(&mut self, graph: Handle) -> Result<()> {
        match self.graphs.remove(&graph) {
            Some(_) => Ok(()),
            None => unknown("graph", graph),
        }
    }

    pub fn destroy_executable(&mut self, executable: Handle) -> Result<()> {
        match self.executables.remove(&executable) {
            Some(_) => Ok(()),
            None => unknown("executable graph", executable),
        }
    }

    // --- events ---

    pub fn create_event(&mut self, has_time: bool) -> Handle {
        let handle = self.handle();
        let event = Event {
            has_time,
            ..Event::default()
        };
        self.events.insert(handle, event);
        handle
    }

    pub fn destroy_event(&mut self, event: Handle) -> Result<()> {
        match self.events.remove(&event) {
            Some(_) => Ok(()),
            None => unknown("event", event),
        }
    }

    fn event(&mut self, handle: Handle) -> Result<&mut Event> {
        match self.events.get_mut(&handle) {
            Some(event) => Ok(event),
            None => unknown("event", handle),
        }
    }

    pub fn record(&mut self, event: Handle, stream: Handle) -> Result<()> {
        let captured = self.stream(stream)?.capture.is_some();
        let own = self.event(event)?;
        own.records += 1;
        own.seconds = None;
        own.is_captured = captured;
        let records = own.records;
        if captured {
            return Ok(());
        }
        self.submit(stream, Work::Record(event, records))?;
        let given = self.stream(stream)?.given;
        self.event(event)?.last = Some((stream, given));
        Ok(())
    }

    pub fn wait(&mut self, stream: Handle, event: Handle) -> Result<()> {
        let own = self.event(event)?;
        let (last, event_captured) = (own.last, own.is_captured);
        match (&mut self.stream(stream)?.capture, last) {
            (Some(_), _) if event_captured => Ok(()),
            (None, _) if event_captured => fault(
                Code::CUDA_ERROR_STREAM_CAPTURE_MERGE,
                "a stream joins another one's capture, which this model does not do",
            ),
            (Some(capture), Some(_)) => {
                capture.is_broken = true;
                let message = "a captured stream waits for an event from outside of the capture";
                fault(Code::CUDA_ERROR_STREAM_CAPTURE_ISOLATION, message)
            }
            (None, Some((other, given))) => self.submit(stream, Work::Wait(other, given)),
            (_, None) => Ok(()),
        }
    }

    pub fn await_event(&mut self, event: Handle) -> Result<()> {
        let own = self.event(event)?;
        if own.is_captured {
            let message = "an event that is captured cannot be waited for";
            return fault(Code::CUDA_ERROR_CAPTURED_EVENT, message);
        }
        let last = own.last;
        self.forbid_in_capture("to wait for an event")?;
        if let Some((stream, given)) = last {
            self.run(stream, given);
        }
        self.ready()
    }

    /// Milliseconds between two events.
    pub fn elapsed(&mut self, events: [Handle; 2]) -> Result<f32> {
        let mut seconds = [0.0; 2];
        for (seconds, handle) in seconds.iter_mut().zip(events) {
            let event = self.event(handle)?;
            if !event.has_time || event.last.is_none() {
                let message = "an event without time, or that was never recorded";
                return fault(Code::CUDA_ERROR_INVALID_HANDLE, message);
            }
            match event.seconds {
                Some(known) => *seconds = known,
                None => return fault(Code::CUDA_ERROR_NOT_READY, "an event that is not done"),
            }
        }
        Ok((1e3 * (seconds[1] - seconds[0])) as f32)
    }

    // --- modules ---

    pub fn load(&mut self, image: Image) -> Result<Handle> {
        if self.options.old {
            let message = "the image was made for a later driver";
            return fault(Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION, message);
        }
        if image.target(self.chip.target()).is_none() {
            let message = "the image has no code for this GPU";
            return fault(Code::CUDA_ERROR_NO_BINARY_FOR_GPU, message);
        }
        let handle = self.handle();
        self.modules.insert(handle, image);
        Ok(handle)
    }

    pub fn unload(&mut self, module: Handle) -> Result<()> {
        if !self.modules.contains_key(&module) {
            return unknown("module", module);
        }
        let own = self.functions.iter().filter(|(_, x)| x.module == module);
        let own: Vec<Handle> = own.map(|(&handle, _)| handle).collect();
        let mut queued = self.streams.values().flat_map(|x| &x.queue);
        if let Some(work) = queued.find(|work| work.launches(&own)) {
            return fault(
                Code::CUDA_ERROR_ILLEGAL_STATE,
                format!("the module is unloaded while {} is queued", work.name()),
            );
        }
        self.modules.remove(&module);
        self.functions.retain(|_, x| x.module != module);
        Ok(())
    }

    pub fn find_function(&mut self, module: Handle, name: &str) -> Result<Handle> {
        let Some(image) = self.modules.get(&module) else {
            return unknown("module", module);
        };
        let not_found = |reason: &str| {
            fault(
                Code::CUDA_ERROR_NOT_FOUND,
                format!("kernel `{name}` is not in {reason}"),
            )
        };
        if !image.has(name) {
            return not_found("the module's image");
        }
        let Some((_, max_threads)) = dtmem_host::signature(name) else {
            return not_found("the executor");
        };
        let static_bytes = image.shared_bytes(name);
        let function = Function {
            module,
            name: name.to_owned(),
            target: image.target(self.chip.target()).unwrap_or(0),
            max_threads,
            static_bytes,
            dynamic_bytes: SHARED_BYTES - static_bytes,
            large_clusters: false,
        };
        let handle = self.handle();
        self.functions.insert(handle, function);
        Ok(handle)
    }

    pub fn function(&mut self, handle: Handle) -> Result<&mut Function> {
        match self.functions.get_mut(&handle) {
            Some(function) => Ok(function),
            None => unknown("function", handle),
        }
    }

    /// What the driver refuses at once.
    pub fn check_launch(&mut self, handle: Handle, launch: &Launch) -> Result<()> {
        let chip = self.chip;
        let function = self.function(handle)?;
        let name = function.name.clone();
        let refuse = |code, what: String| fault(code, format!("{name}: {what}"));
        let invalid = Code::CUDA_ERROR_INVALID_VALUE;
        let Launch {
            grid,
            block,
            shared_bytes,
            cluster,
        } = *launch;
        let threads: u64 = block.iter().map(|&x| u64::from(x)).product();
        if grid.contains(&0) || grid[0] > i32::MAX as u32 || grid[1].max(grid[2]) > 0xffff {
            return refuse(invalid, format!("a grid of {grid:?}"));
        }
        if block.contains(&0) || threads > u64::from(function.max_threads) || block[2] > 64 {
            let most = function.max_threads;
            return refuse(invalid, format!("a block of {block:?}, at most {most}"));
        }
        if shared_bytes > function.dynamic_bytes {
            let most = function.dynamic_bytes;
            let what = format!("{shared_bytes} bytes of dynamic shared memory, allowed {most}");
            return refuse(invalid, what);
        }
        let most = match function.large_clusters {
            true => chip.cluster,
            false => chip.cluster.min(8),
        };
        if cluster > 1 && (cluster > most || !grid[0].is_multiple_of(cluster)) {
            let what = format!("clusters of {cluster} in a grid of {grid:?}, at most {most}");
            return refuse(Code::CUDA_ERROR_INVALID_CLUSTER_SIZE, what);
        }
        Ok(())
    }

    /// `bits` gives the bits of the argument of that number, of so many bytes.
    pub fn launch(
        &mut self,
        stream: Handle,
        function: Handle,
        launch: Launch,
        bits: impl Fn(usize, usize) -> Option<Bits>,
    ) -> Result<()> {
        self.check_launch(function, &launch)?;
        let name = self.function(function)?.name.clone();
        let (parameters, _) = dtmem_host::signature(&name).unwrap_or_default();
        let mut arguments = Vec::with_capacity(parameters.len());
        for (index, parameter) in parameters.into_iter().enumerate() {
            let bytes = match parameter {
                Parameter::Value(bytes) => bytes,
                Parameter::Input | Parameter::Output => 8,
                Parameter::Map => size_of::<TensorMap>(),
            };
            let Some(bits) = bits(index, bytes) else {
                let message = format!("{name}: argument {index} is missing");
                return fault(Code::CUDA_ERROR_INVALID_VALUE, message);
            };
            arguments.push(match parameter {
                Parameter::Input => Argument::Input(bits[0]),
                Parameter::Output => Argument::Output(bits[0]),
                Parameter::Value(bytes) => Argument::Value(bytes, bits[0]),
                Parameter::Map => match TensorMap::from_words(bits) {
                    Some(map) => Argument::Map(map),
                    None => {
                        let message = format!("{name}: argument {index} is no tensor's map");
                        return fault(Code::CUDA_ERROR_INVALID_VALUE, message);
                    }
                },
            });
        }
        let kernel = Kernel {
            function,
            name,
            launch,
            arguments,
        };
        self.submit(stream, Work::Kernel(kernel))
    }

    // --- memory ---

    /// On a stream, or at once.
    pub fn allocate(&mut self, bytes: u64, stream: Option<Handle>) -> Result<Address> {
        if stream.is_none() {
            self.forbid_in_capture("to allocate")?;
        }
        let executor = (!self.options.idle).then_some(&self.executor);
        let address = self.memory.allocate(executor, bytes)?;
        match stream {
            Some(stream) => self.submit(stream, Work::Allocate(address))?,
            None => self.memory.appear(address),
        }
        Ok(address)
    }

    /// On a stream, or at once, when all work is done.
    pub fn free(&mut self, address: Address, stream: Option<Handle>) -> Result<()> {
        match stream {
            Some(stream) => {
                self.memory.give_back(address)?;
                self.submit(stream, Work::Free(address))
            }
            None => {
                self.forbid_in_capture("to free")?;
                self.synchronise_all()?;
                self.memory.give_back(address)?;
                self.memory.release(address);
                Ok(())
            }
        }
    }

    pub fn allocate_pinned(&mut self, bytes: usize) -> Result<usize> {
        self.forbid_in_capture("to allocate pinned memory")?;
        let layout = Layout::from_size_align(bytes, PAGE_BYTES).ok();
        let Some(layout) = layout.filter(|layout| layout.size() > 0) else {
            return fault(Code::CUDA_ERROR_INVALID_VALUE, format!("{bytes} bytes"));
        };
        // SAFETY: the layout has a size.
        let memory = unsafe { alloc(layout) };
        if memory.is_null() {
            return fault(Code::CUDA_ERROR_OUT_OF_MEMORY, format!("{bytes} bytes"));
        }
        // SAFETY: memory of this size.
        unsafe { memory.write_bytes(0xff, bytes) };
        self.pinned.insert(memory.addr(), layout);
        Ok(memory.expose_provenance())
    }

    pub fn free_pinned(&mut self, address: usize) -> Result<()> {
        self.forbid_in_capture("to free pinned memory")?;
        let Some(layout) = self.pinned.get(&address).copied() else {
            return fault(
                Code::CUDA_ERROR_INVALID_VALUE,
                format!("{address:#x} is no pinned memory"),
            );
        };
        let range = address..address + layout.size();
        let mut queued = self.streams.values().flat_map(|x| &x.queue);
        if let Some(work) = queued.find(|work| work.uses_pinned(&range)) {
            return fault(
                Code::CUDA_ERROR_ILLEGAL_STATE,
                format!("pinned memory is freed while {} is queued", work.name()),
            );
        }
        self.pinned.remove(&address);
        // SAFETY: allocated with this layout, and not freed since.
        unsafe { dealloc(std::ptr::with_exposed_provenance_mut(address), layout) };
        Ok(())
    }

    /// Whether all of these bytes of the host are pinned; an error where only some are.
    fn is_pinned(&self, range: &Range<usize>) -> Result<bool> {
        let below = self.pinned.range(..range.end).next_back();
        match below {
            Some((&start, layout)) if range.start < start + layout.size() => {
                if range.start >= start && range.end <= start + layout.size() {
                    return Ok(true);
                }
                let message = "bytes of the host that are pinned in part";
                fault(Code::CUDA_ERROR_INVALID_VALUE, message)
            }
            _ => Ok(false),
        }
    }

    /// # Safety
    /// As many bytes can be read there, until the copy is made where they are pinned.
    pub unsafe fn copy_to_device(
        &mut self,
        stream: Handle,
        from: usize,
        to: Address,
        bytes: usize,
    ) -> Result<()> {
        let from = match self.is_pinned(&(from..from + bytes))? {
            true => Source::Pinned(from),
            // SAFETY: the caller's.
            false => Source::Read(unsafe { read_host(from, bytes) }),
        };
        let bytes = bytes as u64;
        self.submit(stream, Work::ToDevice { from, to, bytes })
    }

    /// Waits where the memory is not pinned.
    ///
    /// # Safety
    /// As many bytes can be written there, until the copy is made.
    pub unsafe fn copy_to_host(
        &mut self,
        stream: Handle,
        from: Address,
        to: usize,
        bytes: usize,
    ) -> Result<()> {
        let pinned = self.is_pinned(&(to..to + bytes))?;
        let bytes = bytes as u64;
        self.submit(stream, Work::ToHost { from, to, bytes })?;
        match pinned {
            true => Ok(()),
            false => self.synchronise(stream),
        }
    }

    // --- work ---

    fn perform(&mut self, work: &Work) {
        if self.failure.is_some() {
            return;
        }
        if let Err(Fault { code, message }) = self.perform_now(work) {
            eprintln!("CUDA model: {} fails: {message} ({code:?})", work.name());
            self.failure = Some(code);
        }
    }

    fn perform_now(&mut self, work: &Work) -> Result<()> {
        if let Work::Graph(nodes) = work {
            return nodes.iter().try_for_each(|node| self.perform_now(node));
        }
        self.performed += 1;
        if self.options.lost == Some(self.performed) {
            return fault(Code::CUDA_ERROR_UNKNOWN, "the GPU is lost");
        }
        if self.options.idle {
            self.pretended += PRETENDED_SECONDS;
        }
        for range in work.touches() {
            self.memory.check_now(&range)?;
        }
        match work {
            Work::Kernel(kernel) => self.run_kernel(kernel),
            Work::Product(product) if !self.options.idle => product.compute(&self.executor),
            Work::Sum { ranks, at, bytes } => self.sum(ranks, *at, *bytes),
            Work::ToDevice { from, to, .. } if !self.options.idle => match from {
                Source::Read(content) => self.write(*to, content),
                Source::Pinned(address) => {
                    let Work::ToDevice { bytes, .. } = work else {
                        return Ok(());
                    };
                    // SAFETY: pinned memory is not freed while a copy of it is queued.
                    let content = unsafe { read_host(*address, *bytes as usize) };
                    self.write(*to, &content)
                }
            },
            &Work::ToHost { from, to, bytes } => {
                let content = match self.options.idle {
                    true => vec![0; bytes as usize],
                    false => self.read(from, bytes)?,
                };
                let to = std::ptr::with_exposed_provenance_mut::<u8>(to);
                // SAFETY: the promise of the call that asked for the copy.
                unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), to, content.len()) };
                Ok(())
            }
            &Work::Copy { from, to, bytes } if !self.options.idle => {
                let content = self.read(from, bytes)?;
                self.write(to, &content)
            }
            &Work::Fill { to, bytes, byte } if !self.options.idle => {
                self.write(to, &vec![byte; bytes as usize])
            }
            &Work::Allocate(address) => {
                self.memory.appear(address);
                Ok(())
            }
            &Work::Free(address) => {
                self.memory.release(address);
                Ok(())
            }
            &Work::Record(event, records) => {
                let seconds = self.start.elapsed().as_secs_f64() + self.pretended;
                if let Some(event) = self.events.get_mut(&event)
                    && event.records == records
                {
                    event.seconds = Some(seconds);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn run_kernel(&mut self, kernel: &Kernel) -> Result<()> {
        self.function(kernel.function)?;
        let mut args = Vec::with_capacity(kernel.arguments.len());
        for &argument in &kernel.arguments {
            args.push(match argument {
                Argument::Input(address) => Arg::Input(self.memory.view(address)?),
                Argument::Output(address) => Arg::Output(self.memory.view(address)?),
                Argument::Map(map) => Arg::Map(map),
                Argument::Value(4, bits) => Arg::U32(bits as u32),
                Argument::Value(_, bits) => Arg::U64(bits),
            });
        }
        if self.options.idle {
            return Ok(());
        }
        let done = self.executor.launch(&kernel.name, kernel.launch, &args);
        done.or_else(|error| fault(Code::CUDA_ERROR_LAUNCH_FAILED, error))
    }

    /// With nothing computed, ranks still have to agree on what they add up.
    fn sum(&self, ranks: &nccl::Ranks, at: Address, bytes: u64) -> Result<()> {
        if self.options.idle {
            return ranks.sum(bytes, Vec::new()).map(drop);
        }
        let sum = ranks.sum(bytes, self.read(at, bytes)?)?;
        self.write(at, &sum)
    }

    fn write(&self, address: Address, content: &[u8]) -> Result<()> {
        let bytes = content.len();
        let done = self.executor.write(View { address, bytes }, content);
        done.or_else(|error| fault(Code::CUDA_ERROR_ILLEGAL_ADDRESS, error))
    }

    fn read(&self, address: Address, bytes: u64) -> Result<Vec<u8>> {
        let bytes = bytes as usize;
        let found = self.executor.read(View { address, bytes });
        found.or_else(|error| fault(Code::CUDA_ERROR_ILLEGAL_ADDRESS, error))
    }
}

/// # Safety
/// So many bytes can be read there.
unsafe fn read_host(address: usize, bytes: usize) -> Vec<u8> {
    let address = std::ptr::with_exposed_provenance::<u8>(address);
    // SAFETY: the caller's.
    unsafe { std::slice::from_raw_parts(address, bytes) }.to_vec()
}
