//! Products of matrices by cuBLASLt.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::{result as lt, sys};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, result};

use super::device::{Compute, Product};
use crate::ops::memory::Type;
use crate::ops::{Error, Result};

/// What NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Binary logarithm of the alignment in bytes that algorithms are told to expect at most.
const ALIGNMENT: u32 = 8;

/// How products of f32 are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Multiply {
    /// In f32.
    Exact,
    /// With factors rounded to TF32, on matrix units.
    Tf32,
}

/// A handle, its workspace, and how each product that it has made is made best.
#[derive(Debug)]
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    multiply: Multiply,
    plans: Mutex<HashMap<Key, Plan>>,
}

// SAFETY: cuBLASLt's handles may be used by any thread; the plans are behind a lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// What an algorithm is chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 3],
    strides: [usize; 3],
    transposed: [bool; 2],
    types: [Type; 2],
    bias: bool,
    alignment: [u32; 4],
}

/// How a product is made.
#[derive(Debug)]
struct Plan {
    description: Description,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// A product and its operands, as cuBLASLt describes them.
#[derive(Debug)]
struct Description {
    product: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by `Plan::new` and used by nobody else. A failure would leave a few bytes behind.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.product);
            for layout in self.layouts {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: made by `Blas::new` and used by nobody else.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

impl Blas {
    /// Errors: no cuBLASLt, or not enough memory.
    pub fn new(stream: &Arc<CudaStream>, multiply: Multiply) -> Result<Self> {
        // SAFETY: loads a library, as the next call does, which panics without it.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoBlas);
        }
        stream.context().bind_to_thread()?;
        Ok(Self {
            handle: lt::create_handle().map_err(|source| failed("a handle", source))?,
            // SAFETY: only cuBLASLt uses it, which expects nothing.
            workspace: unsafe { stream.alloc(WORKSPACE_BYTES) }?,
            multiply,
            plans: Mutex::default(),
        })
    }

    /// The context is bound to the thread.
    pub fn multiply<T: Compute, U: Compute>(
        &self,
        stream: &CudaStream,
        product: &Product<'_, T, U>,
    ) -> Result<()> {
        let Product {
            rows,
            columns,
            inner,
            ..
        } = *product;
        if rows == 0 || columns == 0 {
            return Ok(());
        }
        if inner == 0 {
            return without_terms(stream, product);
        }
        let describe = || format!("a product {rows}×{inner}×{columns}");
        let [a, b, c] = [
            product.a.elements.span().address,
            product.b.elements.span().address,
            product.c.span().address,
        ];
        let bias = product.bias.as_ref().map_or(0, |bias| bias.span().address);
        let key = Key {
            sizes: [rows, columns, inner],
            strides: [product.a.stride, product.b.stride, product.stride],
            transposed: [product.a.transposed, product.b.transposed],
            types: [T::TYPE, U::TYPE],
            bias: product.bias.is_some(),
            alignment: [a, b, c, bias].map(|address| 1 << address.trailing_zeros().min(ALIGNMENT)),
        };
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(plan) => plan.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => place.insert(
                Plan::new(self.handle, &key, bias, self.multiply)
                    .map_err(|source| failed(describe(), source))?,
            ),
        };
        let description = &plan.description;
        let [one, beta] = [1.0_f32, if product.accumulate { 1.0 } else { 0.0 }];
        let (workspace, _guard) = self.workspace.device_ptr(stream);
        // SAFETY: the plan is alive and describes these operands, whose extents the caller has checked; row-major
        // matrices are column-major transposes, so the operands change places.
        let done = unsafe {
            if product.bias.is_some() {
                set(
                    description.product,
                    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                    &bias,
                )
                .map_err(|source| failed(describe(), source))?;
            }
            lt::matmul(
                self.handle,
                description.product,
                ptr::from_ref(&one).cast(),
                ptr::from_ref(&beta).cast(),
                b as *const c_void,
                description.layouts[0],
                a as *const c_void,
                description.layouts[1],
                c as *const c_void,
                description.layouts[2],
                c as *mut c_void,
                description.layouts[2],
                &raw const plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.cu_stream().cast(),
            )
        };
        done.map_err(|source| failed(describe(), source))
    }
}

/// C = bias, or 0, or as it was: the library has no product over nothing.
fn without_terms<T, U>(stream: &CudaStream, product: &Product<'_, T, U>) -> Result<()> {
    if product.accumulate {
        return Ok(());
    }
    let (first, bytes) = (product.c.span().address, product.columns * size_of::<U>());
    for row in 0..product.rows {
        let to = first + (row * product.stride * size_of::<U>()) as u64;
        // SAFETY: a row of C and the bias have so many bytes, which the caller has checked, and are used on this stream.
        unsafe {
            match &product.bias {
                Some(bias) => {
                    result::memcpy_dtod_async(to, bias.span().address, bytes, stream.cu_stream())?
                }
                None => result::memset_d8_async(to, 0, bytes, stream.cu_stream())?,
            }
        }
    }
    Ok(())
}

impl Plan {
    /// For a bias at this address, or at others that are aligned as well.
    fn new(
        handle: sys::cublasLtHandle_t,
        key: &Key,
        bias: u64,
        multiply: Multiply,
    ) -> std::result::Result<Self, CublasError> {
        let data_type = |of: Type| match of {
            Type::F32 => sys::cudaDataType::CUDA_R_32F,
            Type::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            Type::F16 => sys::cudaDataType::CUDA_R_16F,
        };
        let compute = match (key.types[0], multiply) {
            (Type::F32, Multiply::Tf32) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let [rows, columns, inner] = key.sizes.map(|size| size as u64);
        let [of_factors, of_result] = key.types.map(data_type);
        // Column-major: Cᵀ [columns, rows] = Bᵀ [columns, inner] · Aᵀ [inner, rows].
        let layout = |of, down, across, transposed, stride: usize| {
            let (down, across) = if transposed {
                (across, down)
            } else {
                (down, across)
            };
            lt::create_matrix_layout(of, down, across, stride as i64)
        };
        let description = Description {
            product: lt::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?,
            layouts: [
                layout(
                    of_factors,
                    columns,
                    inner,
                    key.transposed[1],
                    key.strides[1],
                )?,
                layout(of_factors, inner, rows, key.transposed[0], key.strides[0])?,
                layout(of_result, columns, rows, false, key.strides[2])?,
            ],
        };
        let preference = Preference(lt::create_matmul_pref()?);
        let epilogue = match key.bias {
            true => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            false => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
        };
        // SAFETY: the descriptions are alive, and each attribute has the type that cuBLASLt's manual gives it.
        let found = unsafe {
            use sys::cublasLtMatmulDescAttributes_t as Of;
            use sys::cublasLtMatmulPreferenceAttributes_t as Preferred;
            set(
                description.product,
                Of::CUBLASLT_MATMUL_DESC_TRANSA,
                &i32::from(key.transposed[1]),
            )?;
            set(
                description.product,
                Of::CUBLASLT_MATMUL_DESC_TRANSB,
                &i32::from(key.transposed[0]),
            )?;
            set(
                description.product,
                Of::CUBLASLT_MATMUL_DESC_EPILOGUE,
                &epilogue,
            )?;
            if key.bias {
                // Of which the library looks at the alignment.
                set(
                    description.product,
                    Of::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                    &bias,
                )?;
            }
            let limit = |attribute, value: *const c_void, bytes| {
                lt::set_matmul_pref_attribute(preference.0, attribute, value, bytes)
            };
            limit(
                Preferred::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                ptr::from_ref(&WORKSPACE_BYTES).cast(),
                size_of::<usize>(),
            )?;
            let [a, b, c, _] = key.alignment;
            for (attribute, bytes) in [
                (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
                (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
                (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
                (Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c),
            ] {
                limit(attribute, ptr::from_ref(&bytes).cast(), size_of::<u32>())?;
            }
            lt::get_matmul_algo_heuristic(
                handle,
                description.product,
                description.layouts[0],
                description.layouts[1],
                description.layouts[2],
                description.layouts[2],
                preference.0,
            )?
        };
        Ok(Self {
            algorithm: found.algo,
            description,
        })
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made where this is, and used by nobody else.
        let _ = unsafe { lt::destroy_matmul_pref(self.0) };
    }
}

/// # Safety
/// The description is alive, and the attribute is of type `V`.
unsafe fn set<V>(
    description: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &V,
) -> std::result::Result<(), CublasError> {
    // SAFETY: the caller's promise.
    unsafe {
        lt::set_matmul_desc_attribute(
            description,
            attribute,
            ptr::from_ref(value).cast(),
            size_of::<V>(),
        )
    }
}

fn failed(what: impl Into<String>, source: CublasError) -> Error {
    Error::Blas {
        what: what.into(),
        source,
    }
}
