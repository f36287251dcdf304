//! cuBLASLt: descriptions of products, and their computation in f32.

use std::collections::HashMap;
use std::ffi::c_void;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use cudarc::cublaslt::sys::{
    cublasComputeType_t as ComputeType, cublasLtEpilogue_t as Epilogue,
    cublasLtMatmulAlgo_t as Algorithm, cublasLtMatmulDescAttributes_t as Attribute,
    cublasLtMatmulHeuristicResult_t as Found, cublasLtMatmulPreferenceAttributes_t as Preferred,
    cublasStatus_t as Code, cudaDataType,
};
use cudarc::driver::sys::CUresult;
use dtmem_host::{Element, Executor, View};
use half::{bf16, f16};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ShapeBuilder};

use crate::device::{Fault, fault};
use crate::machine::{self, Machine, call};
use crate::work::{Address, Handle, Work};

type Result<T> = std::result::Result<T, Fault<Code>>;

/// A type of elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Type {
    F32,
    F16,
    Bf16,
}

impl Type {
    fn of(code: u32) -> Option<Self> {
        let known = [
            (cudaDataType::CUDA_R_32F, Self::F32),
            (cudaDataType::CUDA_R_16F, Self::F16),
            (cudaDataType::CUDA_R_16BF, Self::Bf16),
        ];
        let mut known = known.into_iter();
        known.find_map(|(known, own)| (known as u32 == code).then_some(own))
    }

    fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// Column-major: a column every `stride` elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Layout {
    of: Type,
    rows: u64,
    columns: u64,
    stride: u64,
}

impl Layout {
    fn range(&self, address: Address) -> Range<Address> {
        let elements = (self.columns - 1) * self.stride + self.rows;
        address..address + elements * self.of.bytes()
    }

    fn of_product(&self, transposed: bool) -> [u64; 2] {
        match transposed {
            false => [self.rows, self.columns],
            true => [self.columns, self.rows],
        }
    }
}

#[derive(Debug, Clone, Copy, Hash)]
struct Description {
    is_tf32: bool,
    transposed: [bool; 2],
    has_bias: bool,
    bias: Address,
}

#[derive(Debug, Clone, Copy)]
struct Preference {
    workspace: u64,
    /// Of A, B, C and D.
    alignment: [u32; 4],
}

/// A handle's objects.
#[derive(Debug)]
enum Object {
    Library,
    Description(Description),
    Layout(Layout),
    Preference(Preference),
}

/// All objects.
#[derive(Debug, Default)]
pub struct State(HashMap<Handle, Object>);

impl State {
    /// Handles that need a context; descriptions do not.
    pub fn libraries(&self) -> usize {
        let all = self.0.values();
        all.filter(|object| matches!(object, Object::Library))
            .count()
    }
}

/// D = A · B + β · C, and a bias for each row; all column-major.
#[derive(Debug, Clone)]
pub struct Product {
    /// Of A, B, and of C and D, which are the same memory.
    layouts: [Layout; 3],
    addresses: [Address; 3],
    transposed: [bool; 2],
    accumulate: bool,
    bias: Option<Address>,
    workspace: Range<Address>,
}

impl Product {
    fn bias_range(&self) -> Option<Range<Address>> {
        let [.., d] = self.layouts;
        self.bias
            .map(|address| address..address + d.rows * d.of.bytes())
    }

    pub fn touches(&self) -> Vec<Range<Address>> {
        let operands = self.layouts.iter().zip(self.addresses);
        let operands = operands.map(|(layout, address)| layout.range(address));
        let more = [Some(self.workspace.clone()), self.bias_range()];
        operands.chain(more.into_iter().flatten()).collect()
    }

    pub fn compute(&self, executor: &Executor) -> machine::Result<()> {
        let [a, b, d] = self.layouts;
        let [at_a, at_b, at_d] = self.addresses;
        let a = matrix(executor, a, at_a)?;
        let b = matrix(executor, b, at_b)?;
        let before = matrix(executor, d, at_d)?;
        let a = if self.transposed[0] { a.t() } else { a.view() };
        let b = if self.transposed[1] { b.t() } else { b.view() };
        let mut sums = Array2::zeros((d.rows as usize, d.columns as usize));
        general_mat_mul(1.0, &a, &b, 0.0, &mut sums);
        if let Some(bias) = self.bias_range() {
            let bias = numbers(executor, d.of, bias)?;
            for (mut row, bias) in sums.rows_mut().into_iter().zip(bias) {
                row += bias;
            }
        }
        if self.accumulate {
            sums += &before;
        }
        for (index, column) in sums.columns().into_iter().enumerate() {
            let address = at_d + index as u64 * d.stride * d.of.bytes();
            match d.of {
                Type::F32 => write(executor, address, column.iter().copied()),
                Type::F16 => write(executor, address, column.iter().map(|&x| f16::from_f32(x))),
                Type::Bf16 => write(executor, address, column.iter().map(|&x| bf16::from_f32(x))),
            }?;
        }
        Ok(())
    }
}

fn matrix(executor: &Executor, layout: Layout, address: Address) -> machine::Result<Array2<f32>> {
    let numbers = numbers(executor, layout.of, layout.range(address))?;
    let shape = (layout.rows as usize, layout.columns as usize);
    let matrix = ArrayView2::from_shape(shape.strides((1, layout.stride as usize)), &numbers);
    match matrix {
        Ok(matrix) => Ok(matrix.to_owned()),
        Err(error) => fault(CUresult::CUDA_ERROR_INVALID_VALUE, error),
    }
}

fn numbers(executor: &Executor, of: Type, range: Range<Address>) -> machine::Result<Vec<f32>> {
    let view = View {
        address: range.start,
        bytes: (range.end - range.start) as usize,
    };
    let found = match of {
        Type::F32 => executor.read::<f32>(view),
        Type::F16 => executor
            .read::<f16>(view)
            .map(|x| x.into_iter().map(f16::to_f32).collect()),
        Type::Bf16 => executor
            .read::<bf16>(view)
            .map(|x| x.into_iter().map(bf16::to_f32).collect()),
    };
    found.or_else(|error| fault(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, error))
}

fn write<T: Element>(
    executor: &Executor,
    address: Address,
    content: impl Iterator<Item = T>,
) -> machine::Result<()> {
    let content: Vec<T> = content.collect();
    let bytes = size_of_val(&content[..]);
    let done = executor.write(View { address, bytes }, &content);
    done.or_else(|error| fault(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, error))
}

fn invalid<T>(message: impl Into<String>) -> Result<T> {
    fault(Code::CUBLAS_STATUS_INVALID_VALUE, message.into())
}

fn unsupported<T>(message: impl Into<String>) -> Result<T> {
    fault(Code::CUBLAS_STATUS_NOT_SUPPORTED, message.into())
}

/// A failure of the driver, as cuBLASLt returns it.
fn of_driver(fault: Fault<CUresult>) -> Fault<Code> {
    fault.with_code(Code::CUBLAS_STATUS_EXECUTION_FAILED)
}

impl Machine {
    fn make(&mut self, object: Object) -> Handle {
        let handle = self.handle();
        self.blas.0.insert(handle, object);
        handle
    }

    fn check_library(&self, handle: Handle) -> Result<()> {
        match self.blas.0.get(&handle) {
            Some(Object::Library) => Ok(()),
            _ => fault(
                Code::CUBLAS_STATUS_NOT_INITIALIZED,
                "no handle of the library",
            ),
        }
    }

    fn description(&mut self, handle: Handle) -> Result<&mut Description> {
        match self.blas.0.get_mut(&handle) {
            Some(Object::Description(description)) => Ok(description),
            _ => invalid("no description of a product"),
        }
    }

    fn layout(&self, handle: Handle) -> Result<Layout> {
        match self.blas.0.get(&handle) {
            Some(Object::Layout(layout)) => Ok(*layout),
            _ => invalid("no layout of a matrix"),
        }
    }

    fn preference(&mut self, handle: Handle) -> Result<&mut Preference> {
        match self.blas.0.get_mut(&handle) {
            Some(Object::Preference(preference)) => Ok(preference),
            _ => invalid("no preference"),
        }
    }

    fn destroy(&mut self, handle: Handle) -> Result<()> {
        match self.blas.0.remove(&handle) {
            Some(_) => Ok(()),
            None => invalid(format!("{handle:#x} is no object, or destroyed")),
        }
    }

    /// Everything that the library looks at before it chooses an algorithm, of which it gives the hash.
    fn check(&mut self, description: Handle, layouts: [Handle; 4]) -> Result<u64> {
        let own = *self.description(description)?;
        let mut found = [None; 4];
        for (found, handle) in found.iter_mut().zip(layouts) {
            *found = Some(self.layout(handle)?);
        }
        let [Some(a), Some(b), Some(c), Some(d)] = found else {
            return invalid("no layout");
        };
        if c != d {
            return invalid("C and D differ");
        }
        let [rows, inner] = a.of_product(own.transposed[0]);
        let [inner_of_b, columns] = b.of_product(own.transposed[1]);
        if inner != inner_of_b || [rows, columns] != [d.rows, d.columns] {
            return invalid(format!(
                "op(A) is {rows}×{inner}, op(B) {inner_of_b}×{columns}, D {}×{}",
                d.rows, d.columns
            ));
        }
        let fits = a.of == b.of && (d.of == a.of || d.of == Type::F32);
        if !fits || own.is_tf32 && a.of != Type::F32 {
            return unsupported(format!("{:?} · {:?} → {:?}", a.of, b.of, d.of));
        }
        let mut hash = DefaultHasher::new();
        let described = (own.is_tf32, own.transposed, own.has_bias);
        (described, [a, b, c, d]).hash(&mut hash);
        Ok(hash.finish())
    }
}

/// Writes to where the caller wants it.
///
/// # Safety
/// Null, or a place for a `T`.
unsafe fn put<T>(to: *mut T, value: T) -> Result<()> {
    if to.is_null() {
        return invalid("a null pointer");
    }
    // SAFETY: the caller's.
    unsafe { to.write(value) };
    Ok(())
}

/// Reads an attribute.
///
/// # Safety
/// Null, or so many bytes.
unsafe fn get<T>(from: *const c_void, bytes: usize) -> Result<T> {
    if from.is_null() || bytes != size_of::<T>() {
        return invalid(format!("an attribute of {bytes} bytes"));
    }
    // SAFETY: the caller's.
    Ok(unsafe { from.cast::<T>().read_unaligned() })
}

macro_rules! functions {
    ($(fn $name:ident(|$machine:ident| $($argument:ident: $type:ty),*) $body:block)*) => {$(
        /// # Safety
        /// As cuBLASLt's manual says.
        #[allow(non_snake_case, unused_unsafe)]
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: $type),*) -> Code {
            call(stringify!($name), Code::CUBLAS_STATUS_SUCCESS, |$machine: &mut Machine| {
                // SAFETY: the caller's.
                unsafe { $body }
            })
        }
    )*};
}

functions! {
    fn cublasLtCreate(|machine| to: *mut Handle) {
        machine.ready().map_err(of_driver)?;
        machine.forbid_in_capture("to make a handle of cuBLASLt").map_err(of_driver)?;
        put(to, machine.make(Object::Library))
    }

    fn cublasLtDestroy(|machine| handle: Handle) {
        machine.check_library(handle)?;
        machine.destroy(handle)
    }

    fn cublasLtMatmulDescCreate(|machine| to: *mut Handle, compute: u32, scale: u32) {
        let is_tf32 = compute == ComputeType::CUBLAS_COMPUTE_32F_FAST_TF32 as u32;
        if !is_tf32 && compute != ComputeType::CUBLAS_COMPUTE_32F as u32 {
            return unsupported(format!("compute type {compute}"));
        }
        if Type::of(scale) != Some(Type::F32) {
            return unsupported(format!("scale type {scale}"));
        }
        let description = Description {
            is_tf32,
            transposed: [false; 2],
            has_bias: false,
            bias: 0,
        };
        put(to, machine.make(Object::Description(description)))
    }

    fn cublasLtMatmulDescDestroy(|machine| description: Handle) {
        machine.description(description)?;
        machine.destroy(description)
    }

    fn cublasLtMatmulDescSetAttribute(
        |machine| description: Handle, attribute: u32, value: *const c_void, bytes: usize
    ) {
        const TRANSA: u32 = Attribute::CUBLASLT_MATMUL_DESC_TRANSA as u32;
        const TRANSB: u32 = Attribute::CUBLASLT_MATMUL_DESC_TRANSB as u32;
        const EPILOGUE: u32 = Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE as u32;
        const BIAS: u32 = Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER as u32;
        const PLAIN: u32 = Epilogue::CUBLASLT_EPILOGUE_DEFAULT as u32;
        const WITH_BIAS: u32 = Epilogue::CUBLASLT_EPILOGUE_BIAS as u32;
        let own = machine.description(description)?;
        let transposed = || match get::<i32>(value, bytes)? {
            0 => Ok(false),
            1 => Ok(true),
            other => invalid(format!("operation {other}")),
        };
        match attribute {
            TRANSA => own.transposed[0] = transposed()?,
            TRANSB => own.transposed[1] = transposed()?,
            EPILOGUE => own.has_bias = match get::<u32>(value, bytes)? {
                PLAIN => false,
                WITH_BIAS => true,
                other => return unsupported(format!("epilogue {other}")),
            },
            BIAS => own.bias = get::<u64>(value, bytes)?,
            other => return unsupported(format!("attribute {other}")),
        }
        Ok(())
    }

    fn cublasLtMatrixLayoutCreate(
        |machine| to: *mut Handle, of: u32, rows: u64, columns: u64, stride: i64
    ) {
        let Some(of) = Type::of(of) else {
            return unsupported(format!("type {of}"));
        };
        let stride = u64::try_from(stride).unwrap_or(0);
        if rows == 0 || columns == 0 || stride < rows {
            return invalid(format!("a matrix {rows}×{columns} with a column every {stride}"));
        }
        let layout = Layout { of, rows, columns, stride };
        put(to, machine.make(Object::Layout(layout)))
    }

    fn cublasLtMatrixLayoutDestroy(|machine| layout: Handle) {
        machine.layout(layout)?;
        machine.destroy(layout)
    }

    fn cublasLtMatmulPreferenceCreate(|machine| to: *mut Handle) {
        // As the manual has them.
        let preference = Preference { workspace: 0, alignment: [256; 4] };
        put(to, machine.make(Object::Preference(preference)))
    }

    fn cublasLtMatmulPreferenceDestroy(|machine| preference: Handle) {
        machine.preference(preference)?;
        machine.destroy(preference)
    }

    fn cublasLtMatmulPreferenceSetAttribute(
        |machine| preference: Handle, attribute: u32, value: *const c_void, bytes: usize
    ) {
        const WORKSPACE: u32 = Preferred::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as u32;
        const FIRST: u32 = Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES as u32;
        const LAST: u32 = Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES as u32;
        let own = machine.preference(preference)?;
        match attribute {
            WORKSPACE => own.workspace = get::<u64>(value, bytes)?,
            FIRST..=LAST => {
                let alignment = get::<u32>(value, bytes)?;
                if !alignment.is_power_of_two() {
                    return invalid(format!("an alignment of {alignment}"));
                }
                own.alignment[(attribute - FIRST) as usize] = alignment;
            }
            other => return unsupported(format!("attribute {other}")),
        }
        Ok(())
    }

    fn cublasLtMatmulAlgoGetHeuristic(
        |machine| library: Handle, description: Handle, a: Handle, b: Handle, c: Handle, d: Handle,
        preference: Handle, wanted: i32, found: *mut Found, count: *mut i32
    ) {
        machine.check_library(library)?;
        machine.ready().map_err(of_driver)?;
        if wanted < 1 {
            return invalid(format!("{wanted} algorithms"));
        }
        let layouts = [a, b, c, d];
        let hash = machine.check(description, layouts)?;
        let Description { has_bias, bias, .. } = *machine.description(description)?;
        if has_bias && bias == 0 {
            return invalid("a bias without an address");
        }
        let Preference { workspace, alignment } = *machine.preference(preference)?;
        for (handle, alignment) in layouts.into_iter().zip(alignment) {
            if u64::from(alignment) < machine.layout(handle)?.of.bytes() {
                return invalid(format!("an alignment of {alignment}"));
            }
        }
        // What it was chosen for is all that an algorithm is here.
        let [a, b, c, d] = alignment.map(u64::from);
        let data = [hash, workspace, a, b, c, d, 0, 0];
        put(found, Found {
            algo: Algorithm { data },
            workspaceSize: workspace as usize,
            state: Code::CUBLAS_STATUS_SUCCESS,
            wavesCount: 1.0,
            reserved: [0; 4],
        })?;
        put(count, 1)
    }

    fn cublasLtMatmul(
        |machine| library: Handle, description: Handle, alpha: *const f32, a: Address, a_layout: Handle,
        b: Address, b_layout: Handle, beta: *const f32, c: Address, c_layout: Handle, d: Address,
        d_layout: Handle, algorithm: *const Algorithm, workspace: Address, workspace_bytes: usize,
        stream: Handle
    ) {
        machine.check_library(library)?;
        machine.ready().map_err(of_driver)?;
        let hash = machine.check(description, [a_layout, b_layout, c_layout, d_layout])?;
        if alpha.is_null() || beta.is_null() || algorithm.is_null() {
            return invalid("a null pointer");
        }
        if *alpha != 1.0 || ![0.0, 1.0].contains(&*beta) || c != d {
            return unsupported("other factors than 1, and 1 or 0, or another C than D");
        }
        let [chosen_for, needed, alignment @ .., _, _] = (*algorithm).data;
        if chosen_for != hash {
            return invalid("the algorithm was chosen for another product");
        }
        if needed > workspace_bytes as u64 || !workspace.is_multiple_of(256) {
            return invalid(format!("a workspace of {workspace_bytes} bytes, {needed} needed"));
        }
        for (address, alignment) in [a, b, c, d].into_iter().zip(alignment) {
            if !address.is_multiple_of(alignment) {
                return invalid(format!("{address:#x}, chosen for an alignment of {alignment}"));
            }
        }
        let Description { transposed, has_bias, bias, .. } = *machine.description(description)?;
        if has_bias && bias == 0 {
            return invalid("a bias without an address");
        }
        let layouts = [a_layout, b_layout, d_layout].map(|handle| machine.layout(handle));
        let [Ok(a_layout), Ok(b_layout), Ok(d_layout)] = layouts else {
            return invalid("no layout");
        };
        let product = Product {
            layouts: [a_layout, b_layout, d_layout],
            addresses: [a, b, d],
            transposed,
            accumulate: *beta != 0.0,
            bias: has_bias.then_some(bias),
            workspace: workspace..workspace + workspace_bytes as u64,
        };
        let disjoint = |x: &Range<Address>, y: &Range<Address>| x.end <= y.start || y.end <= x.start;
        let touched = product.touches();
        let written = [&touched[2], &touched[3]];
        let meets = |index: usize, own: &Range<Address>| {
            written.iter().any(|other| !std::ptr::eq(*other, own) && !disjoint(other, own)) && index != 2
        };
        if touched.iter().enumerate().any(|(index, own)| meets(index, own)) {
            return invalid("operands overlap");
        }
        machine.submit(stream, Work::Product(product)).map_err(of_driver)
    }
}
