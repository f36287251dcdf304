// Products of 16-bit tiles, by type. The last argument only says which.
#pragma once

#include "ptx.cuh"
#include "types.cuh"

// d += a·b
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const bf16*) {
    ptx::mma_m16n8k16_bf16(d, a, {b0, b1});
}
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const f16*) {
    ptx::mma_m16n8k16_f16(d, a, {b0, b1});
}

// Two neighbours in a register, rounded.
__device__ inline uint32_t pack(float low, float high, const bf16*) { return ptx::pack_bf16(low, high); }
__device__ inline uint32_t pack(float low, float high, const f16*) { return ptx::pack_f16(low, high); }
