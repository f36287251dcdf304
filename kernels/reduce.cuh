// Sums in an order that depends on nothing but the shape, so that every run gives the same bits.
#pragma once

constexpr int kWarpSize = 32;

// Σ over the lanes of a warp, in every lane.
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

// Σ over a block of `kWarps` warps, in every thread. All threads call it; `exchange` is free again after the next barrier.
template <int kWarps>
__device__ inline float block_sum(float x, float (&exchange)[kWarps]) {
    x = warp_sum(x);
    if (threadIdx.x % kWarpSize == 0) exchange[threadIdx.x / kWarpSize] = x;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += exchange[w];
    return sum;
}
