// The second stage of sums over rows: each block of the first wrote one row of partial sums.
#pragma once

#include <cstdint>

#include "reduce.cuh"

// first[i] += Σ_b partial[b, i] for i < first_count; second[i − first_count] += … for the others; partial [blocks, count].
// grid ⌈count/32⌉, block 256: warp w of a block adds rows w, w + 8, … of 32 columns, then the warps are added.
__device__ inline void add_partials(const float* partial, float* first, float* second, int32_t blocks,
                                    int64_t first_count, int64_t count) {
    constexpr int kWarps = 8;
    __shared__ float sums[kWarps][kWarpSize];
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
    float sum = 0.0f;
    if (column < count) {
        for (int b = warp; b < blocks; b += kWarps) sum += partial[b * count + column];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < count) {
        float total = 0.0f;
        for (int w = 0; w < kWarps; ++w) total += sums[w][lane];
        (column < first_count ? first[column] : second[column - first_count]) += total;
    }
}
