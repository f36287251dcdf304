use std::ffi::{CStr, CString, c_void};
use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Error, Finding, Result, TensorMap, ffi};

/// A number that kernels work on.
///
/// # Safety
/// Every pattern of bits is a value, and no byte is padding.
pub unsafe trait Element: Copy + 'static {}

macro_rules! elements {
    ($($t:ty),*) => {$(
        // SAFETY: a number without padding; every pattern of bits is one.
        unsafe impl Element for $t {}
    )*};
}
elements!(u8, u16, i32, u32, i64, u64, f32, f64, half::bf16, half::f16);

/// The runtime's state; buffers keep it alive.
struct Machine(Mutex<NonNull<ffi::Machine>>);

// SAFETY: no thread owns the runtime's state, and `lock` lets one at a time use it.
unsafe impl Send for Machine {}
// SAFETY: as above.
unsafe impl Sync for Machine {}

impl Machine {
    fn lock(&self) -> MutexGuard<'_, NonNull<ffi::Machine>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: made by dtmem_host_new, and this was its last owner.
        unsafe { ffi::dtmem_host_delete(self.lock().as_ptr()) }
    }
}

/// In which order the threads of a block, and the blocks of a grid, take their turns. A right kernel gives the same
/// bits in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// From the first to the last.
    #[default]
    Forward,
    /// From the last to the first.
    Reversed,
    /// By chance, from this seed, anew at every turn.
    Shuffled(u64),
}

impl Order {
    /// One of each kind.
    pub const ALL: [Self; 3] = [Self::Forward, Self::Reversed, Self::Shuffled(1)];
}

/// Grid, block, dynamic shared memory and clusters of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks (x, y, z).
    pub grid: [u32; 3],
    /// Threads per block (x, y, z).
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory per block.
    pub shared_bytes: u32,
    /// Blocks of a cluster, neighbours along x: 1 to 16.
    pub cluster: u32,
}

impl Launch {
    /// A launch without dynamic shared memory or clusters.
    pub fn new(grid: [u32; 3], block: [u32; 3]) -> Self {
        Self {
            grid,
            block,
            shared_bytes: 0,
            cluster: 1,
        }
    }
}

/// An address range of global memory, as plain data: what a kernel is given for a pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Address of the first byte.
    pub address: u64,
    /// Bytes that the kernel may touch.
    pub bytes: usize,
}

impl View {
    /// A null pointer, for arguments that a kernel may go without.
    pub const NULL: Self = Self {
        address: 0,
        bytes: 0,
    };
}

/// An argument of a kernel, as plain data. Each variant begins with the bytes that the kernel's parameter takes (a
/// view: its address), so that one list serves a launch on a GPU as well.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// For `const T*`: memory that is only read.
    Input(View),
    /// For `T*`: memory that is written, or read and written.
    Output(View),
    /// For `ptx::TensorMap`: memory that is only read, by boxes.
    Map(TensorMap),
    /// For `int32_t`.
    I32(i32),
    /// For `uint32_t`.
    U32(u32),
    /// For `int64_t`.
    I64(i64),
    /// For `uint64_t`.
    U64(u64),
    /// For `float`.
    F32(f32),
}

impl Arg {
    fn as_ffi(&self) -> (ffi::Argument, usize) {
        fn value<T>(value: &T) -> (ffi::Argument, usize) {
            let argument = ffi::Argument {
                value: std::ptr::from_ref(value).cast::<c_void>(),
                address: 0,
                bytes: 0,
                kind: ffi::VALUE,
            };
            (argument, size_of::<T>())
        }
        let view = |view: &View, kind| {
            let argument = ffi::Argument {
                value: std::ptr::null(),
                address: view.address,
                bytes: view.bytes as u64,
                kind,
            };
            (argument, size_of::<u64>())
        };
        match self {
            Self::Input(memory) => view(memory, ffi::INPUT),
            Self::Output(memory) => view(memory, ffi::OUTPUT),
            Self::Map(map) => {
                let memory = map.view();
                let argument = ffi::Argument {
                    value: std::ptr::from_ref(map).cast::<c_void>(),
                    address: memory.address,
                    bytes: memory.bytes as u64,
                    kind: ffi::MAP,
                };
                (argument, size_of::<TensorMap>())
            }
            Self::I32(number) => value(number),
            Self::U32(number) => value(number),
            Self::I64(number) => value(number),
            Self::U64(number) => value(number),
            Self::F32(number) => value(number),
        }
    }
}

/// Memory of an executor: `len` elements, aligned to 256 bytes as on a GPU.
pub struct Buffer<T> {
    machine: Arc<Machine>,
    data: NonNull<u8>,
    len: usize,
    element: PhantomData<T>,
}

// SAFETY: it is plain memory; threads change it through `&mut` or inside of a launch, under the machine's lock.
unsafe impl<T: Send> Send for Buffer<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Buffer<T> {}

impl<T: Element> Buffer<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it.
    pub fn view(&self) -> View {
        View {
            address: self.data.as_ptr() as u64,
            bytes: self.len * size_of::<T>(),
        }
    }

    /// Some elements of it: the kernel may not touch others. Empty where the range is not inside of the buffer.
    pub fn slice(&self, range: Range<usize>) -> View {
        if range.start > range.end || range.end > self.len {
            return View::NULL;
        }
        View {
            address: self.data.as_ptr() as u64 + (range.start * size_of::<T>()) as u64,
            bytes: range.len() * size_of::<T>(),
        }
    }

    /// A copy of the content. Elements that nothing was written to are NaN, or all ones.
    pub fn download(&self) -> Vec<T> {
        let _machine = self.machine.lock(); // no launch writes
        // SAFETY: the machine is alive, so there are `len` initialised elements, and T takes any bits.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr().cast::<T>(), self.len) }.to_vec()
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: the machine is alive, it made this memory, and nobody uses it any longer.
        unsafe { ffi::dtmem_host_release(self.machine.lock().as_ptr(), self.data.as_ptr()) }
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer of {} × {}", self.len, std::any::type_name::<T>())
    }
}

/// A CPU that runs kernels and watches them.
pub struct Executor {
    machine: Arc<Machine>,
    order: Order,
    budget: u64,
    omitted: Option<(CString, u32)>,
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Executor")
            .field("order", &self.order)
            .field("budget", &self.budget)
            .finish_non_exhaustive()
    }
}

impl Default for Executor {
    fn default() -> Self {
        Self::new()
    }
}

impl Executor {
    /// An executor with forward order and a budget of 2³⁰ memory accesses per launch.
    pub fn new() -> Self {
        // SAFETY: no precondition.
        let machine = NonNull::new(unsafe { ffi::dtmem_host_new() });
        // C++'s `new` never gives null.
        let machine = machine
            .unwrap_or_else(|| std::alloc::handle_alloc_error(std::alloc::Layout::new::<usize>()));
        Self {
            machine: Arc::new(Machine(Mutex::new(machine))),
            order: Order::Forward,
            budget: 1 << 30,
            omitted: None,
        }
    }

    /// The order of the launches that follow.
    pub fn set_order(&mut self, order: Order) {
        self.order = order;
    }

    /// Memory accesses and waits after which a launch counts as one that never ends.
    pub fn set_budget(&mut self, accesses: u64) {
        self.budget = accesses.max(1);
    }

    /// Leaves out the barriers and the waits for asynchronous copies that stand on this line of a file (such as
    /// `kernels/adamw.cu`) in the launches that follow; `None`: runs kernels as they are. For tests that want to see
    /// each of them missed.
    pub fn omit(&mut self, place: Option<(&str, u32)>) {
        self.omitted = place.and_then(|(file, line)| Some((CString::new(file).ok()?, line)));
    }

    /// A buffer with this content.
    pub fn upload<T: Element>(&self, content: &[T]) -> Buffer<T> {
        self.allocate(content.len(), content.as_ptr().cast())
    }

    /// A buffer that a kernel has to write before it reads.
    pub fn scratch<T: Element>(&self, len: usize) -> Buffer<T> {
        self.allocate(len, std::ptr::null())
    }

    /// A copy of what the host sees in a view, between launches. Errors: [`Error::NotHeld`].
    pub fn read<T: Element>(&self, view: View) -> Result<Vec<T>> {
        let machine = self.held::<T>(view)?;
        let len = view.bytes / size_of::<T>();
        let mut content = Vec::<T>::with_capacity(len);
        // SAFETY: the machine holds the bytes, is locked and writes nothing; T takes any bits.
        unsafe {
            std::ptr::copy_nonoverlapping(view.address as *const T, content.as_mut_ptr(), len);
            content.set_len(len);
        }
        drop(machine);
        Ok(content)
    }

    /// Writes to the start of a view, as the host does between launches. Errors: [`Error::NotHeld`].
    pub fn write<T: Element>(&self, view: View, content: &[T]) -> Result<()> {
        let machine = self.held::<T>(View {
            bytes: view.bytes.max(size_of_val(content)),
            ..view
        })?;
        // SAFETY: the machine is alive and locked, and holds the bytes.
        unsafe {
            ffi::dtmem_host_write(
                machine.as_ptr(),
                view.address,
                content.as_ptr().cast(),
                size_of_val(content),
            )
        }
        Ok(())
    }

    /// The machine, locked, if the view is a whole number of elements of one of its buffers.
    fn held<T: Element>(&self, view: View) -> Result<MutexGuard<'_, NonNull<ffi::Machine>>> {
        let machine = self.machine.lock();
        let whole = view.bytes.is_multiple_of(size_of::<T>())
            && view.address.is_multiple_of(align_of::<T>() as u64);
        // SAFETY: the machine is alive and locked.
        let held = view.bytes == 0
            || unsafe { ffi::dtmem_host_holds(machine.as_ptr(), view.address, view.bytes as u64) };
        if whole && held {
            Ok(machine)
        } else {
            Err(Error::NotHeld {
                bytes: view.bytes,
                element: size_of::<T>(),
            })
        }
    }

    fn allocate<T: Element>(&self, len: usize, content: *const c_void) -> Buffer<T> {
        let layout = std::alloc::Layout::array::<T>(len);
        let data = layout.ok().and_then(|layout| {
            // SAFETY: the machine is alive and not in use; the content is null or a slice of this size.
            NonNull::new(unsafe {
                ffi::dtmem_host_allocate(self.machine.lock().as_ptr(), layout.size(), content)
            })
        });
        let data =
            data.unwrap_or_else(|| std::alloc::handle_alloc_error(std::alloc::Layout::new::<T>()));
        Buffer {
            machine: Arc::clone(&self.machine),
            data,
            len,
            element: PhantomData,
        }
    }

    /// Runs a kernel to its end, or to its first defect; what it wrote until then stays written.
    ///
    /// Errors: a name that no kernel has, arguments that differ from its declaration, views outside of this executor's
    /// buffers, an impossible grid or block, and [`Error::Finding`].
    pub fn launch(&self, name: &str, launch: Launch, args: &[Arg]) -> Result<()> {
        let (kernel, signature) =
            find(name).ok_or_else(|| Error::UnknownKernel(name.to_owned()))?;
        let arguments = self.check_arguments(name, signature, args)?;
        check_shape(name, launch, u64::from(kernel.max_threads.unsigned_abs()))?;
        let (order, seed) = match self.order {
            Order::Forward => (0, 0),
            Order::Reversed => (1, 0),
            Order::Shuffled(seed) => (2, seed),
        };
        let shape = ffi::LaunchShape {
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            cluster: launch.cluster,
            order,
            seed,
            budget: self.budget,
            omitted_file: self
                .omitted
                .as_ref()
                .map_or(std::ptr::null(), |(file, _)| file.as_ptr()),
            omitted_line: self.omitted.as_ref().map_or(0, |(_, line)| *line),
        };
        let mut finding = MaybeUninit::<ffi::Finding>::zeroed();
        // SAFETY: the machine is alive and not in use; arguments and shape have been checked above; the finding is
        // plain data for which zeros are a value.
        let (good, finding) = unsafe {
            let good = ffi::dtmem_host_launch(
                self.machine.lock().as_ptr(),
                kernel,
                &raw const shape,
                arguments.as_ptr(),
                arguments.len(),
                finding.as_mut_ptr(),
            );
            (good, finding.assume_init())
        };
        if good {
            Ok(())
        } else {
            Err(Error::Finding(Box::new(Finding::from_ffi(name, &finding))))
        }
    }

    fn check_arguments(
        &self,
        name: &str,
        signature: &[ffi::Parameter],
        args: &[Arg],
    ) -> Result<Vec<ffi::Argument>> {
        if args.len() != signature.len() {
            return Err(Error::ArgumentCount {
                kernel: name.to_owned(),
                expected: signature.len(),
                found: args.len(),
            });
        }
        let mut arguments = Vec::with_capacity(args.len());
        for (index, (arg, parameter)) in args.iter().zip(signature).enumerate() {
            let (argument, bytes) = arg.as_ffi();
            if argument.kind != parameter.kind || bytes != parameter.bytes as usize {
                let expected = match parameter.kind {
                    ffi::INPUT => "an input".to_owned(),
                    ffi::OUTPUT => "an output".to_owned(),
                    ffi::MAP => "a tensor's map".to_owned(),
                    _ => format!("a value of {} bytes", parameter.bytes),
                };
                return Err(Error::ArgumentType {
                    kernel: name.to_owned(),
                    index,
                    expected,
                    found: format!("{arg:?}"),
                });
            }
            // SAFETY: the machine is alive and not in use.
            let held = argument.bytes == 0
                || unsafe {
                    ffi::dtmem_host_holds(
                        self.machine.lock().as_ptr(),
                        argument.address,
                        argument.bytes,
                    )
                };
            if !held {
                return Err(Error::ForeignView {
                    kernel: name.to_owned(),
                    index,
                    bytes: usize::try_from(argument.bytes).unwrap_or(usize::MAX),
                });
            }
            arguments.push(argument);
        }
        Ok(arguments)
    }
}

fn check_shape(name: &str, launch: Launch, max_threads: u64) -> Result<()> {
    let product = |extents: [u32; 3]| {
        extents
            .iter()
            .map(|&extent| u64::from(extent))
            .product::<u64>()
    };
    let shape = |what, found, expected: String| {
        Err(Error::Shape {
            kernel: name.to_owned(),
            what,
            found,
            expected,
        })
    };
    let [_, y, z] = launch.grid;
    if launch.grid.contains(&0)
        || launch.grid[0] > i32::MAX.unsigned_abs()
        || y > 65535
        || z > 65535
    {
        return shape(
            "grid",
            launch.grid,
            "1 to 2147483647, 65535, 65535 blocks".to_owned(),
        );
    }
    if !(1..=16).contains(&launch.cluster) || !launch.grid[0].is_multiple_of(launch.cluster) {
        return shape(
            "cluster",
            [launch.cluster, 1, 1],
            format!("1 to 16 blocks that divide {}", launch.grid[0]),
        );
    }
    let max_threads = max_threads.min(1024);
    if product(launch.block) == 0 || product(launch.block) > max_threads || launch.block[2] > 64 {
        return shape(
            "block",
            launch.block,
            format!("1 to {max_threads} threads (its launch bounds)"),
        );
    }
    Ok(())
}

/// The names of all kernels that were compiled in, sorted.
pub fn kernels() -> Vec<String> {
    let mut names: Vec<_> = table()
        .map(|(name, _)| name.to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn table() -> impl Iterator<Item = (&'static CStr, &'static ffi::Kernel)> {
    // SAFETY: the table is made before `main`, never changed afterwards, and ends with a null pointer.
    let entry = |kernel: *const ffi::Kernel| unsafe { kernel.as_ref() };
    // SAFETY: no precondition.
    let first = unsafe { ffi::dtmem_host_kernels() };
    std::iter::successors(entry(first), move |kernel| entry(kernel.next)).map(|kernel| {
        // SAFETY: names are string literals.
        (unsafe { CStr::from_ptr(kernel.name) }, kernel)
    })
}

/// What a kernel declares for one of its parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parameter {
    /// `const T*`
    Input,
    /// `T*`
    Output,
    /// `ptx::TensorMap`
    Map,
    /// A number of so many bytes.
    Value(usize),
}

/// The parameters that a kernel declares, and the most threads of a block; nothing for a name that no kernel has.
pub fn signature(name: &str) -> Option<(Vec<Parameter>, u32)> {
    let (kernel, parameters) = find(name)?;
    let parameter = |parameter: &ffi::Parameter| match parameter.kind {
        ffi::INPUT => Parameter::Input,
        ffi::OUTPUT => Parameter::Output,
        ffi::MAP => Parameter::Map,
        _ => Parameter::Value(parameter.bytes as usize),
    };
    let parameters = parameters.iter().map(parameter).collect();
    Some((parameters, kernel.max_threads.unsigned_abs()))
}

fn find(name: &str) -> Option<(&'static ffi::Kernel, &'static [ffi::Parameter])> {
    let (_, kernel) = table().find(|(found, _)| found.to_bytes() == name.as_bytes())?;
    // SAFETY: the table holds as many parameters as it says.
    let parameters =
        unsafe { std::slice::from_raw_parts(kernel.parameters, kernel.parameter_count) };
    Some((kernel, parameters))
}
