// Element-wise activations over n contiguous elements; arithmetic in f32. Reference: activation.rs.
//
//   forward   y = f(x); y may be x
//   backward  dy ← dy·f′
//
// x, y, dy and what was kept of the forward pass [n] in the storage type, aligned to 16 bytes. A thread owns 16 bytes; the
// last one that owns any takes what is left, element by element.
//
// Bound by memory: n elements read and written forward, 2·n read and n written backward, a few dozen operations each (erf
// has the most). The function is an argument, and the branch on it the same for a whole grid: six kernels are compiled
// and not twenty-four.
//
// History
//   1  this version

#include "types.cuh"

namespace {

constexpr int kThreads = 256;

// (1 + erf(x/√2)) / 2
__device__ inline float normal_cdf(float x) { return 0.5f + 0.5f * erff(x * 0.70710678118654752f); }

// exp(−x²/2) / √(2π)
__device__ inline float normal_pdf(float x) { return 0.39894228040143268f * expf(-0.5f * x * x); }

// Each has f(x), and f′ from what was kept of the forward pass: y = f(x) for ReLU and tanh, x for the others.
// Comparisons are written so that NaN stays NaN.
struct Relu {
    static __device__ float value(float x) { return x < 0.0f ? 0.0f : x; }
    static __device__ float derivative(float y) { return y > 0.0f ? 1.0f : 0.0f; }
};

struct Gelu {
    static __device__ float value(float x) { return x * normal_cdf(x); }
    static __device__ float derivative(float x) { return normal_cdf(x) + x * normal_pdf(x); }
};

struct Tanh {
    static __device__ float value(float x) { return tanhf(x); }
    static __device__ float derivative(float y) { return 1.0f - y * y; }
};

// log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|), which cannot overflow; its derivative is the logistic function.
struct OnePlus {
    static __device__ float value(float x) { return 1.0f + (x < 0.0f ? 0.0f : x) + log1pf(expf(-fabsf(x))); }
    static __device__ float derivative(float x) { return 1.0f / (1.0f + expf(-x)); }
};

// The order of `Activation` in the reference crate.
template <typename F>
__device__ inline void with_function(int32_t function, F f) {
    switch (function) {
    case 0: return f(Relu());
    case 1: return f(Gelu());
    case 2: return f(Tanh());
    case 3: return f(OnePlus());
    }
}

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
