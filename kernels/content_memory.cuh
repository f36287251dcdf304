// What the forward and the backward kernels of content_memory share: sequences of a pack, and a tile of a matrix product.
#pragma once

#include "ptx.cuh"
#include "reduce.cuh"
#include "types.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;

// A block computes kTile × kTile elements of a product, kDepth terms of each sum at a time.
constexpr int kTile = 64;
constexpr int kDepth = 32;
// Floats from row to row of a panel: float4 reads of 8 rows, and the reads of a fragment, hit every bank once.
constexpr int kPitch = kDepth + 4;
constexpr int kFetches = kTile * kDepth / kThreads;
// Four groups of threads share the tokens of a sum or product over tokens, one slot of the tile per thread.
constexpr int kGroups = kThreads / kTile;

// The tokens of one sequence of a pack.
struct Sequence {
    int64_t first;
    int tokens;

    __device__ Sequence(const int32_t* offsets, int index)
        : first(offsets[index]), tokens(offsets[index + 1] - offsets[index]) {}
};

// The share of a slot that a token erases.
__device__ inline float erased(float w, float beta, bool paper) { return paper ? w * (1.0f - beta) : w * beta; }

// Σ over the block, in every thread, by an exchange that may just have been used.
__device__ inline float sum_again(float x, float (&exchange)[kWarps]) {
    __syncthreads();
    return block_sum(x, exchange);
}

// Which elements of an operand are neighbours in memory: terms of one sum, or rows of the tile.
enum class Layout { kDepthFirst, kRowsFirst };

struct alignas(16) Panels {
    float a[kTile][kPitch];
    float b[kTile][kPitch];
};

// Element `n` of this thread in a panel. With rows first a warp takes 8 rows × 4 terms: whole sectors of memory, and
// every bank once.
template <Layout kLayout>
__device__ inline void place(int n, int& row, int& k) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    row = kLayout == Layout::kDepthFirst ? n * kWarps + warp : warp * 8 + lane % 8;
    k = kLayout == Layout::kDepthFirst ? lane : n * 4 + lane / 8;
}

// The terms from `start` of a panel's rows; 0 from `depth` on.
template <Layout kLayout, typename Operand>
__device__ inline void fetch(const Operand& operand, int start, int depth, float (&values)[kFetches]) {
#pragma unroll
    for (int n = 0; n < kFetches; ++n) {
        int row, k;
        place<kLayout>(n, row, k);
        values[n] = start + k < depth ? operand(row, start + k) : 0.0f;
    }
}

// A tile of a·bᵀ, 16 elements per thread. With kMatrix the matrix units multiply, operands rounded to TF32 (which holds
// bf16 and f16 exactly), otherwise it is f32 throughout.
template <bool kMatrix>
struct Product {
    float sums[4][4] = {};

    // Of sums[i][j] in the tile.
    __device__ static int row(int i, int j) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        return kMatrix ? warp % 4 * 16 + j / 2 * 8 + lane / 4 : i * 16 + static_cast<int>(threadIdx.x) / 16;
    }
    __device__ static int column(int i, int j) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        return kMatrix ? warp / 4 * 32 + i * 8 + lane % 4 * 2 + j % 2 : j * 16 + static_cast<int>(threadIdx.x) % 16;
    }

    // Adds Σ_k a(row, k)·b(column, k) over k < depth. The operands give 0 outside of their rows. Every thread calls it.
    template <Layout kLayoutA, Layout kLayoutB, typename A, typename B>
    __device__ void add(Panels& panels, int depth, const A& a, const B& b) {
        float next_a[kFetches], next_b[kFetches];
        fetch<kLayoutA>(a, 0, depth, next_a);
        fetch<kLayoutB>(b, 0, depth, next_b);
        for (int start = 0; start < depth; start += kDepth) {
            __syncthreads();  // the panels before have been used
            keep<kLayoutA>(next_a, panels.a);
            keep<kLayoutB>(next_b, panels.b);
            __syncthreads();
            if (start + kDepth < depth) {
                fetch<kLayoutA>(a, start + kDepth, depth, next_a);
                fetch<kLayoutB>(b, start + kDepth, depth, next_b);
            }
            if constexpr (kMatrix) {
                by_matrix_units(panels);
            } else {
                by_threads(panels);
            }
        }
    }

private:
    template <Layout kLayout>
    __device__ static void keep(const float (&values)[kFetches], float (&panel)[kTile][kPitch]) {
#pragma unroll
        for (int n = 0; n < kFetches; ++n) {
            int row, k;
            place<kLayout>(n, row, k);
            panel[row][k] = kMatrix ? __uint_as_float(ptx::to_tf32(values[n])) : values[n];
        }
    }

    __device__ void by_threads(const Panels& panels) {
#pragma unroll
        for (int k = 0; k < kDepth; k += 4) {
            float4 b[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) b[j] = *reinterpret_cast<const float4*>(&panels.b[column(0, j)][k]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float4 a = *reinterpret_cast<const float4*>(&panels.a[row(i, 0)][k]);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sums[i][j] += a.x * b[j].x;
                    sums[i][j] += a.y * b[j].y;
                    sums[i][j] += a.z * b[j].z;
                    sums[i][j] += a.w * b[j].w;
                }
            }
        }
    }

    __device__ void by_matrix_units(const Panels& panels) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        const int g = lane / 4, c = lane % 4;
        const int first_row = warp % 4 * 16 + g, first_column = warp / 4 * 32 + g;
#pragma unroll
        for (int k = c; k < kDepth; k += 8) {
            const uint32_t a[4] = {__float_as_uint(panels.a[first_row][k]), __float_as_uint(panels.a[first_row + 8][k]),
                                   __float_as_uint(panels.a[first_row][k + 4]),
                                   __float_as_uint(panels.a[first_row + 8][k + 4])};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&row)[kPitch] = panels.b[first_column + 8 * i];
                const uint32_t b[2] = {__float_as_uint(row[k]), __float_as_uint(row[k + 4])};
                ptx::mma_m16n8k8_tf32(sums[i], a, b);
            }
        }
    }
};

// f32 is for those who want f32; the others gain from matrix units.
template <typename T>
constexpr bool kMatrixUnits = sizeof(T) < sizeof(float);

}  // namespace
