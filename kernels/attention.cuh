// What the attention kernels share: the pack, masks, pairs, tiles in shared memory and products of a warp.
//
// A warp owns 16 rows of a tile; accumulators lie as mma leaves them (ptx.cuh): lane 4g + c holds, of each 8 columns,
// columns 2c and 2c + 1 of rows g and g + 8. bf16 and f16 multiply by mma.sync. f32 multiplies by plain FMA in the same
// layout, so that one kernel serves all types.
#pragma once

#include "mma.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "sequences.cuh"
#include "types.cuh"

namespace attention {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpRows = 16;
constexpr int kColumns = 8;  // of one accumulator
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// Sizes of the tiles for heads of `kWidth`.
template <typename T, int kWidth>
struct Tile {
    // Warps that own the same rows, each with a part of the output's columns: they would not fit into registers.
    static constexpr int kParts = kWidth > 128 ? 2 : 1;
    static constexpr int kRows = kWarpRows * kWarps / kParts;
    static constexpr int kPartWidth = kWidth / kParts;
    // 16 bytes more than a row: eight rows of a matrix then lie in different banks.
    static constexpr int kPitch = kWidth + kVectorSize<T>;
};

// The rows and the part of the output's columns that a warp owns, and the lane's place in them.
template <typename T, int kWidth>
struct Owner {
    int lane = threadIdx.x % kWarpSize;
    int warp = threadIdx.x / kWarpSize;
    int first_row = warp / Tile<T, kWidth>::kParts * kWarpRows;
    int part = warp % Tile<T, kWidth>::kParts;
    int first_column = part * Tile<T, kWidth>::kPartWidth;

    __device__ int row(int half) const { return first_row + lane / 4 + half * 8; }
    // Of accumulator n, element i.
    __device__ int column(int n, int i) const { return n * kColumns + lane % 4 * 2 + i % 2; }
};

// --- The pack

struct Pack {
    const int32_t* queries;  // offsets [sequences + 1]
    const int32_t* keys;
    int32_t sequences;
};

struct Sequence {
    int index;
    int first_query, queries;
    int first_key, keys;

    __device__ Sequence(const Pack& pack, int b)
        : index(b), first_query(pack.queries[b]), queries(pack.queries[b + 1] - first_query), first_key(pack.keys[b]),
          keys(pack.keys[b + 1] - first_key) {}
};

// --- Masks: each shows a query one run of keys, and the runs move forward with the query. So a kernel needs nothing
// but the run of each row; tiles outside of all runs are never visited, those inside of all are not masked.

struct Run {
    int begin, end;

    __device__ bool holds(int key) const { return begin <= key && key < end; }
};

struct Mask {
    enum Kind : int32_t { kNone, kCausal, kSlidingWindow, kGroupedCausal };
    int32_t kind;
    int32_t window;
    const int32_t* groups;  // of every packed key token

    __device__ Run visible(const Sequence& sequence, int query) const {
        if (query >= sequence.queries) return {sequence.keys, sequence.keys};
        const int position = query + sequence.keys - sequence.queries;
        switch (kind) {
            case kNone: return {0, sequence.keys};
            case kCausal: return {0, max(position + 1, 0)};
            case kSlidingWindow: return {max(position + 1 - window, 0), max(position + 1, 0)};
            default: return {0, end_of_group(sequence, position)};
        }
    }

    __device__ int end_of_group(const Sequence& sequence, int position) const {
        if (position < 0) return 0;
        const int32_t* group = groups + sequence.first_key;
        int low = position, high = sequence.keys;  // the first key of a later group
        while (low < high) {
            const int middle = (low + high) / 2;
            if (group[middle] <= group[position]) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }
};

// --- Pairs of the memory loss

struct Supervision {
    const int32_t* slots;      // of each query head: its place among the supervised, or −1; null: no head is
    const uint8_t* annotated;  // of each sequence
    const int32_t* pair_offsets;
    const int32_t* pair_keys;
    int32_t count;  // supervised heads

    __device__ int slot(int head) const { return slots == nullptr ? -1 : slots[head]; }

    // Bit j: `first_key + j` is a pair of the query token.
    __device__ uint64_t bits(int token, int first_key) const {
        const int end = pair_offsets[token + 1];
        int low = pair_offsets[token], high = end;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (pair_keys[middle] < first_key) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        uint64_t bits = 0;
        for (; low < end && pair_keys[low] - first_key < 64; ++low) bits |= uint64_t{1} << (pair_keys[low] - first_key);
        return bits;
    }
};

constexpr float kVarianceFloor = 1e-12f;  // of A(1 − A) in the loss's gradient

// A·∂loss/∂A of an entry that is not the largest of its row: A ≤ 1/2, so 1 − A keeps its digits.
__device__ inline float loss_slope(float weight, bool paired) {
    const float variance = weight * (1.0f - weight);
    return (paired ? -variance : weight * weight) / fmaxf(variance, kVarianceFloor);
}

// --- Tiles

// Starts the copy of `kRows` rows, zeros from `count` on.
template <int kRows, int kWidth, typename T>
__device__ inline void load_tile(T* tile, const T* rows, int64_t stride, int count) {
    constexpr int kVectors = kWidth / kVectorSize<T>;
    for (int i = threadIdx.x; i < kRows * kVectors; i += kThreads) {
        const int row = i / kVectors, column = i % kVectors * kVectorSize<T>;
        const bool exists = row < count;
        ptx::cp_async_16_zfill(tile + row * Tile<T, kWidth>::kPitch + column,
                               rows + (exists ? row * stride : 0) + column, exists ? kVectorBytes : 0);
    }
}

// d [16, 8·kTiles] += a [16, kDepth] · b [8·kTiles, kDepth]ᵀ, both in shared memory with rows of `kPitch`.
template <int kDepth, int kPitch, int kTiles, typename T>
__device__ inline void multiply_transposed(float (&d)[kTiles][4], const T* a, const T* b) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
        uint32_t rows[4];
        ptx::ldmatrix_x4(rows, a + lane % 16 * kPitch + k + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            uint32_t columns[4];
            ptx::ldmatrix_x4(columns, b + ((n + lane / 16) * 8 + lane % 8) * kPitch + k + lane / 8 % 2 * 8);
            mma(d[n], rows, columns[0], columns[1], a);
            mma(d[n + 1], rows, columns[2], columns[3], a);
        }
    }
}

template <int kDepth, int kPitch, int kTiles>
__device__ inline void multiply_transposed(float (&d)[kTiles][4], const float* a, const float* b) {
    const int lane = threadIdx.x % kWarpSize;
    const float* row = a + lane / 4 * kPitch;
    const float* column = b + lane % 4 * 2 * kPitch;
#pragma unroll 2
    for (int k = 0; k < kDepth; ++k) {
        const float upper = row[k], lower = row[8 * kPitch + k];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const float left = column[n * 8 * kPitch + k], right = column[(n * 8 + 1) * kPitch + k];
            d[n][0] += upper * left;
            d[n][1] += upper * right;
            d[n][2] += lower * left;
            d[n][3] += lower * right;
        }
    }
}

// d [16, 8·kTiles] += a · b: a [16, 8·kDepthTiles] in accumulators, which mma takes as its rows after rounding; b in
// shared memory, row-major.
template <int kPitch, int kTiles, int kDepthTiles, typename T>
__device__ inline void multiply(float (&d)[kTiles][4], const float (&a)[kDepthTiles][4], const T* b) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int k = 0; k < kDepthTiles; k += 2) {
        const uint32_t rows[4] = {pack(a[k][0], a[k][1], b), pack(a[k][2], a[k][3], b),
                                  pack(a[k + 1][0], a[k + 1][1], b), pack(a[k + 1][2], a[k + 1][3], b)};
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            uint32_t columns[4];
            ptx::ldmatrix_x4_trans(columns, b + (k * 8 + lane % 16) * kPitch + (n + lane / 16) * 8);
            mma(d[n], rows, columns[0], columns[1], b);
            mma(d[n + 1], rows, columns[2], columns[3], b);
        }
    }
}

template <int kPitch, int kTiles, int kDepthTiles>
__device__ inline void multiply(float (&d)[kTiles][4], const float (&a)[kDepthTiles][4], const float* b) {
    const int lane = threadIdx.x % kWarpSize;
    const float* column = b + lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < kDepthTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int owner = (lane & ~3) + i / 2;
            const float upper = __shfl_sync(0xffffffffu, a[tile][i % 2], owner);
            const float lower = __shfl_sync(0xffffffffu, a[tile][2 + i % 2], owner);
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                float right[2];
                load<2>(column + (tile * 8 + i) * kPitch + n * 8, right);
                d[n][0] += upper * right[0];
                d[n][1] += upper * right[1];
                d[n][2] += lower * right[0];
                d[n][3] += lower * right[1];
            }
        }
    }
}

// Writes factor[half]·d to the rows that exist; `rows` is the tile's first row.
template <int kWidth, int kTiles, typename T>
__device__ inline void store_rows(const float (&d)[kTiles][4], const float (&factor)[2], T* rows, int64_t stride, int count) {
    const Owner<T, kWidth> owner;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = owner.row(half);
        if (row >= count) continue;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const float pair[2] = {d[n][half * 2] * factor[half], d[n][half * 2 + 1] * factor[half]};
            store<2>(pair, rows + row * stride + owner.first_column + owner.column(n, 0));
        }
    }
}

// Over the four lanes that share a row.
__device__ inline float row_maximum(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace attention
