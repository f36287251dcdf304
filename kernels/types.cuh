// Storage types of the kernels, and 16-byte vectors of them. All arithmetic is in f32.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(T));

// `kSize` neighbours, read and written by one instruction.
template <typename T, int kSize>
struct alignas(kSize * sizeof(T)) Vector {
    T values[kSize];
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }
__device__ inline float widen(f16 x) { return __half2float(x); }

// To the nearest, ties to even.
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(float x, bf16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, f16& y) { y = __float2half_rn(x); }

template <int kSize, typename T>
__device__ inline void load(const T* from, float (&x)[kSize]) {
    const auto vector = *reinterpret_cast<const Vector<T, kSize>*>(from);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = widen(vector.values[i]);
}

template <int kSize, typename T>
__device__ inline void store(const float (&x)[kSize], T* to) {
    Vector<T, kSize> vector;
#pragma unroll
    for (int i = 0; i < kSize; ++i) narrow(x[i], vector.values[i]);
    *reinterpret_cast<Vector<T, kSize>*>(to) = vector;
}

// Whether rows of `width` elements at this address can be read by vectors of `kSize`. Null can.
template <int kSize, typename T>
__device__ inline bool is_aligned(const T* rows, int width) {
    return width % kSize == 0 && reinterpret_cast<uintptr_t>(rows) % (kSize * sizeof(T)) == 0;
}
