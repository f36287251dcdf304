// Sums in an order that depends on nothing but the shape, so that every run gives the same bits.
#pragma once

constexpr int kWarpSize = 32;

// Σ over the lanes of a warp, in every lane.
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}
