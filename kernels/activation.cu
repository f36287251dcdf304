// Element-wise activations, forward and backward, over n contiguous elements of f32, bf16 or f16; arithmetic in f32.
//
// One thread owns 16 bytes; the last one owns what is left. Pointers are aligned to 16 bytes. Grids cover n: there is no
// loop, so offsets fit 64 bits whatever n is.
// Bound by memory: n·2 element reads and writes forward, n·3 backward; a few dozen operations per element (erf the most)
// stay below that. The function is chosen by an argument: the branch is the same for a whole grid, and six kernels are
// compiled instead of twenty-four.

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;

template <typename T>
struct alignas(kVectorBytes) Vector {
    static constexpr int kSize = kVectorBytes / sizeof(T);
    T values[kSize];
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& y) { y = __float2half_rn(x); }

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
    constexpr int kSize = Vector<T>::kSize;
    const int64_t start = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize;
    if (start + kSize <= n) {
        const Vector<T> x = *reinterpret_cast<const Vector<T>*>(a + start);
        Vector<T> y = *reinterpret_cast<const Vector<T>*>(b + start);
#pragma unroll
        for (int i = 0; i < kSize; ++i) narrow(f(widen(x.values[i]), widen(y.values[i])), y.values[i]);
        *reinterpret_cast<Vector<T>*>(out + start) = y;
    } else {
#pragma unroll 1
        for (int64_t i = start; i < n; ++i) narrow(f(widen(a[i]), widen(b[i])), out[i]);
    }
}

}  // namespace

// forward: y = f(x), and y may be x. backward: dy ← dy·f′.
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
ACTIVATION_KERNELS(bf16, __nv_bfloat16)
ACTIVATION_KERNELS(f16, __half)
