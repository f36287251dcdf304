// What the attention kernels share: the pack, masks, pairs, tiles in shared memory and products of a warp.
//
// A warp owns one or two matrices of 16 rows of a tile; accumulators lie as mma leaves them (ptx.cuh): lane 4g + c holds, of
// each 8 columns, columns 2c and 2c + 1 of rows g and g + 8. bf16 and f16 multiply by mma.sync. f32 multiplies by plain FMA
// in the same layout, so that one kernel serves all types.
#pragma once

#include "mma.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "sequences.cuh"
#include "types.cuh"

namespace attention {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMatrixRows = 16;
constexpr int kStages = 2;  // of the other side's tiles
constexpr int kColumns = 8;  // of one accumulator
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// Matrices of 16 rows that a warp owns: two where the accumulators of both fit into registers, because what it reads of
// the other side's tile then serves twice, and reading shared memory is what takes longest.
template <typename T, int kWidth>
constexpr int kMatrices = sizeof(T) < sizeof(float) && kWidth <= 64 ? 2 : 1;

// Blocks that a multiprocessor is to hold: left to itself, ptxas (13.0) spills for one more.
template <typename T, int kWidth>
constexpr int kResidentBlocks = sizeof(T) == sizeof(float) && kWidth <= 32 ? 3 : 2;

// The rows and the part of the output's columns that a warp owns, and the lane's place in them.
template <int kWidth, int kM>
struct Owner {
    // Warps that own the same rows, each with a part of the output's columns: they would not fit into registers.
    static constexpr int kParts = kWidth > 128 ? 2 : 1;
    static constexpr int kPartWidth = kWidth / kParts;
    static constexpr int kWarpRows = kMatrixRows * kM;
    static constexpr int kRows = kWarpRows * kWarps / kParts;  // of a block

    int lane = threadIdx.x % kWarpSize;
    int warp = threadIdx.x / kWarpSize;
    int first_row = warp / kParts * kWarpRows;
    int part = warp % kParts;
    int first_column = part * kPartWidth;

    __device__ int row(int m, int half) const { return first_row + m * kMatrixRows + lane / 4 + half * 8; }
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
//
// A launch says which mask it is. Once the runs are found, which is before the loop, all masks are the same to a kernel: as
// template parameters they would make four kernels of each one and save nothing in the loop. Supervision does change the
// loop, so it is a template parameter: without it a kernel has neither its code nor its registers.

struct Run {
    int begin, end;

    __device__ bool holds(int key) const { return static_cast<unsigned>(key - begin) < static_cast<unsigned>(end - begin); }
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

// The runs of a block's rows, of which `first` is the first. Finding them in the loop would cost all masks the registers
// that the search for the end of a group takes. A barrier has to follow.
template <int kRows>
__device__ inline void find_runs(Run (&runs)[kRows], const Mask& mask, const Sequence& sequence, int first) {
    const int row = static_cast<int>(threadIdx.x);
    if (row < kRows) runs[row] = mask.visible(sequence, first + row);
}

// --- Pairs of the memory loss

struct Supervision {
    const int32_t* slots;      // of each query head: its place among the supervised, or −1
    const uint8_t* annotated;  // of each sequence
    const int32_t* pair_offsets;
    const int32_t* pair_keys;
    int32_t count;  // supervised heads

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

template <bool kSupervised>
__device__ inline int slot_of(const Supervision& supervision, int head) {
    return kSupervised ? supervision.slots[head] : -1;
}

constexpr float kVarianceFloor = 1e-12f;  // of A(1 − A) in the loss's gradient

// A·∂loss/∂A of an entry that is not the largest of its row: A ≤ 1/2, so 1 − A keeps its digits.
__device__ inline float loss_slope(float weight, bool paired) {
    const float variance = weight * (1.0f - weight);
    return (paired ? -variance : weight * weight) / fmaxf(variance, kVarianceFloor);
}

// --- Tiles: rows of kWidth elements. A piece of 16 bytes stands at another place in each of eight rows, so that the eight
// of a matrix lie in different banks.

template <int kWidth, typename T>
__device__ inline int offset(int row, int column) {
    constexpr int kSize = kVectorSize<T>, kPieces = kWidth / kSize;
    static_assert(kPieces == 2 || kPieces == 4 || kPieces % 8 == 0);
    // Rows that share the banks once are turned alike.
    const int turn = kPieces == 2 ? row / 4 % 2 : kPieces == 4 ? row / 2 % 4 : row % 8;
    return row * kWidth + (column / kSize ^ turn) * kSize + column % kSize;
}

template <int kWidth, typename T>
__device__ inline T* place(T* tile, int row, int column) {
    return tile + offset<kWidth, T>(row, column);
}

// The same of column + own: `column` a multiple of 8 that all lanes have alike, own < 8 the lane's. Taken apart, two
// addresses serve all columns, instead of a register for each.
template <int kWidth>
__device__ inline const float* place(const float* tile, int row, int column, int own) {
    const int common = offset<kWidth, float>(row, column);
    return tile + ((common & 7) ^ own) + (common & ~7);
}

// Starts the copy of `kRows` rows, zeros from `count` on.
template <int kRows, int kWidth, typename T>
__device__ inline void load_tile(T* tile, const T* rows, int64_t stride, int count) {
    constexpr int kVectors = kWidth / kVectorSize<T>;
    for (int i = threadIdx.x; i < kRows * kVectors; i += kThreads) {
        const int row = i / kVectors, column = i % kVectors * kVectorSize<T>;
        const bool exists = row < count;
        ptx::cp_async_16_zfill(place<kWidth>(tile, row, column), rows + (exists ? row * stride : 0) + column,
                               exists ? kVectorBytes : 0);
    }
}

// d [16·kM, 8·kN] += rows of a from `first_row` · the first rows of bᵀ, over their width.
template <int kWidth, int kM, int kN, typename T>
__device__ inline void multiply_transposed(float (&d)[kM][kN][4], const T* a, int first_row, const T* b) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int k = 0; k < kWidth; k += 16) {
        uint32_t rows[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            ptx::ldmatrix_x4(rows[m], place<kWidth>(a, first_row + m * kMatrixRows + lane % 16, k + lane / 16 * 8));
        }
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
            uint32_t columns[4];
            ptx::ldmatrix_x4(columns, place<kWidth>(b, (n + lane / 16) * 8 + lane % 8, k + lane / 8 % 2 * 8));
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                mma(d[m][n], rows[m], columns[0], columns[1], a);
                mma(d[m][n + 1], rows[m], columns[2], columns[3], a);
            }
        }
    }
}

template <int kWidth, int kM, int kN>
__device__ inline void multiply_transposed(float (&d)[kM][kN][4], const float* a, int first_row, const float* b) {
    static_assert(kM == 1);
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int k = 0; k < kWidth; k += 4) {
        float rows[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) load(place<kWidth>(a, first_row + lane / 4 + half * 8, k), rows[half]);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                float column[4];
                load(place<kWidth>(b, n * 8 + lane % 4 * 2 + side, k), column);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    d[0][n][side] += rows[0][i] * column[i];
                    d[0][n][2 + side] += rows[1][i] * column[i];
                }
            }
        }
    }
}

// d [16·kM, 8·kN] += a · b from column `first_column`: a [16·kM, 8·kDepth] in accumulators, which mma takes as its rows
// after rounding; b in shared memory.
template <int kWidth, int kM, int kN, int kDepth, typename T>
__device__ inline void multiply(float (&d)[kM][kN][4], const float (&a)[kM][kDepth][4], const T* b, int first_column) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int k = 0; k < kDepth; k += 2) {
        uint32_t rows[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) rows[m][i] = pack(a[m][k + i / 2][i % 2 * 2], a[m][k + i / 2][i % 2 * 2 + 1], b);
        }
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
            uint32_t columns[4];
            ptx::ldmatrix_x4_trans(columns,
                                   place<kWidth>(b, k * 8 + lane % 16, first_column + (n + lane / 16) * 8));
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                mma(d[m][n], rows[m], columns[0], columns[1], b);
                mma(d[m][n + 1], rows[m], columns[2], columns[3], b);
            }
        }
    }
}

template <int kWidth, int kM, int kN, int kDepth>
__device__ inline void multiply(float (&d)[kM][kN][4], const float (&a)[kM][kDepth][4], const float* b,
                                int first_column) {
    static_assert(kM == 1);
    const int lane = threadIdx.x % kWarpSize;
    b += first_column;  // of 0 or 128: pieces change places among eight
    float left[kDepth][4];  // the tiles to come
#pragma unroll
    for (int tile = 0; tile < kDepth; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) left[tile][i] = a[0][tile][i];
    }
#pragma unroll 1  // else ptxas fetches ahead until it has to spill
    for (int tile = 0; tile < kDepth; ++tile) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int owner = (lane & ~3) + i / 2;
            const float upper = __shfl_sync(0xffffffffu, left[0][i % 2], owner);
            const float lower = __shfl_sync(0xffffffffu, left[0][2 + i % 2], owner);
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                float right[2];
                load<2>(place<kWidth>(b, tile * 8 + i, n * 8, lane % 4 * 2), right);
                d[0][n][0] += upper * right[0];
                d[0][n][1] += upper * right[1];
                d[0][n][2] += lower * right[0];
                d[0][n][3] += lower * right[1];
            }
        }
#pragma unroll
        for (int next = 1; next < kDepth; ++next) {
#pragma unroll
            for (int i = 0; i < 4; ++i) left[next - 1][i] = left[next][i];
        }
    }
}

// Writes factor·d to the rows that exist; `rows` is the tile's first row.
template <int kWidth, int kM, int kN, typename T>
__device__ inline void store_rows(const float (&d)[kM][kN][4], const float (&factor)[kM][2], T* rows, int64_t stride,
                                  int count) {
    const Owner<kWidth, kM> owner;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = owner.row(m, half);
            if (row >= count) continue;
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                const float pair[2] = {d[m][n][half * 2] * factor[m][half], d[m][n][half * 2 + 1] * factor[m][half]};
                store<2>(pair, rows + row * stride + owner.first_column + owner.column(n, 0));
            }
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

#define ATTENTION_FOR_ALL_WIDTHS(KERNELS, NAME, T)                                                                     \
    KERNELS(NAME, T, 16)                                                                                               \
    KERNELS(NAME, T, 32)                                                                                               \
    KERNELS(NAME, T, 64)                                                                                               \
    KERNELS(NAME, T, 128)                                                                                              \
    KERNELS(NAME, T, 256)

}  // namespace attention
