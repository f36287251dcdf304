// Element-wise functions and their derivatives, in f32. Reference: activation.rs.
#pragma once

#include <cstdint>

// (1 + erf(x/√2)) / 2
__device__ inline float normal_cdf(float x) { return 0.5f + 0.5f * erff(x * 0.70710678118654752f); }

// exp(−x²/2) / √(2π)
__device__ inline float normal_pdf(float x) { return 0.39894228040143268f * expf(-0.5f * x * x); }

// Each has f(x), and f′ from what was kept of the forward pass: y = f(x) for ReLU and tanh, x for the others.
// Comparisons are written so that NaN stays NaN.
struct Relu {
    static constexpr bool kKeepsX = false;
    static __device__ float value(float x) { return x < 0.0f ? 0.0f : x; }
    static __device__ float derivative(float y) { return y > 0.0f ? 1.0f : 0.0f; }
};

struct Gelu {
    static constexpr bool kKeepsX = true;
    static __device__ float value(float x) { return x * normal_cdf(x); }
    static __device__ float derivative(float x) { return normal_cdf(x) + x * normal_pdf(x); }
};

struct Tanh {
    static constexpr bool kKeepsX = false;
    static __device__ float value(float x) { return tanhf(x); }
    static __device__ float derivative(float y) { return 1.0f - y * y; }
};

// log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|), which cannot overflow; its derivative is the logistic function.
struct OnePlus {
    static constexpr bool kKeepsX = true;
    static __device__ float value(float x) { return 1.0f + (x < 0.0f ? 0.0f : x) + log1pf(expf(-fabsf(x))); }
    static __device__ float derivative(float x) { return 1.0f / (1.0f + expf(-x)); }
};

struct Identity {
    static constexpr bool kKeepsX = false;
    static __device__ float value(float x) { return x; }
    static __device__ float derivative(float) { return 1.0f; }
};

// Calls f with one of them: 0 to 3 in the order of `Activation` in the reference crate, anything else is the identity.
// The function is an argument of the kernels, and the branch on it the same for a whole grid.
template <typename F>
__device__ inline void with_function(int32_t function, F f) {
    switch (function) {
    case 0: return f(Relu());
    case 1: return f(Gelu());
    case 2: return f(Tanh());
    case 3: return f(OnePlus());
    default: return f(Identity());
    }
}
