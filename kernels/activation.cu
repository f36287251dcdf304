// Element-wise activations over n contiguous elements; arithmetic in f32. Reference: activation.rs.
//
//   forward   y = f(x); y may be x
//   backward  dy ← dy·f′
//
// x, y, dy and what was kept of the forward pass [n] in the storage type, aligned to 16 bytes. A thread owns 16 bytes; the
// last one that owns any takes what is left, element by element.
//
// Bound by memory: n elements read and written forward, 2·n read and n written backward, a few dozen operations each (erf
// has the most). The function is an argument: six kernels are compiled and not thirty.
//
// History (not measured on a GPU yet)
//   1  this version

#include "activation.cuh"
#include "types.cuh"

namespace {

constexpr int kThreads = 256;

// out ← f(a, b) for the elements of this thread.
template <typename T, typename F>
__device__ inline void for_my_vector(const T* a, const T* b, T* out, int64_t n, F f) {
    constexpr int kSize = kVectorSize<T>;
    const int64_t start = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize;
    if (start + kSize <= n) {
        float x[kSize], y[kSize];
        load(a + start, x);
        load(b + start, y);
#pragma unroll
        for (int i = 0; i < kSize; ++i) y[i] = f(x[i], y[i]);
        store(y, out + start);
    } else {
#pragma unroll 1
        for (int64_t i = start; i < n; ++i) narrow(f(widen(a[i]), widen(b[i])), out[i]);
    }
}

}  // namespace

#define ACTIVATION_KERNELS(NAME, T)                                                                                    \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                             \
        activation_forward_##NAME(int32_t function, const T* x, T* y, int64_t n) {                                     \
        with_function(function, [=](auto f) {                                                                          \
            for_my_vector(x, x, y, n, [](float x, float) { return decltype(f)::value(x); });                           \
        });                                                                                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                             \
        activation_backward_##NAME(int32_t function, const T* kept, T* dy, int64_t n) {                                \
        with_function(function, [=](auto f) {                                                                          \
            for_my_vector(kept, dy, dy, n,                                                                             \
                          [](float kept, float dy) { return dy * decltype(f)::derivative(kept); });                    \
        });                                                                                                            \
    }

ACTIVATION_KERNELS(f32, float)
ACTIVATION_KERNELS(bf16, bf16)
ACTIVATION_KERNELS(f16, f16)
