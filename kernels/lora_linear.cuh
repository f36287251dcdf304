// What the kernels of lora_linear share: adapters, ranges of rows that use the same ones, tiles in shared memory.
#pragma once

#include "mma.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "sequences.cuh"
#include "types.cuh"

namespace lora {

constexpr int kMaxAdapters = 4;
constexpr int kMaxRank = 64;

__device__ constexpr int ceil_divide(int x, int y) { return (x + y - 1) / y; }
__device__ constexpr int round_up(int x, int y) { return ceil_divide(x, y) * y; }

// `list[p]`, with registers for a list: no thread's own memory.
template <typename T>
__device__ inline T pick(const T (&list)[kMaxAdapters], int p) {
    T found = list[0];
#pragma unroll
    for (int i = 1; i < kMaxAdapters; ++i) found = p == i ? list[i] : found;
    return found;
}

// A part of a dimension, and the adapter that it has, if any.
struct Range {
    int begin, end, adapter;
};
constexpr int kNone = -1;

// Where each adapter stands in the dimension that they divide among themselves. Those that are not there are empty.
struct Layout {
    int first[kMaxAdapters], count[kMaxAdapters], rank[kMaxAdapters];

    // Σ of the ranks before adapter p, or of all.
    __device__ int ranks(int p = kMaxAdapters) const {
        int sum = 0;
#pragma unroll
        for (int i = 0; i < kMaxAdapters; ++i) sum += i < p ? rank[i] : 0;
        return sum;
    }

    // The adapters cut [0, extent) into 2·kMaxAdapters + 1 ranges: number 2p + 1 is that of adapter p, the others lie
    // between. Any of them may be empty.
    static constexpr int kRanges = 2 * kMaxAdapters + 1;

    __device__ Range range(int number, int extent) const {
        const int p = number / 2;
        const int begin = p < kMaxAdapters ? pick(first, p) : extent;
        if (number % 2 == 1) return {begin, begin + pick(count, p), p};
        return {p == 0 ? 0 : pick(first, p - 1) + pick(count, p - 1), begin, kNone};
    }

    // The range that holds a tile, where each range begins with a new one; and which of its tiles that is.
    __device__ Range find_tile(int extent, int size, int& tile) const {
        for (int number = 0;; ++number) {
            const Range found = range(number, extent);
            const int tiles = ceil_divide(found.end - found.begin, size);
            if (tile < tiles || number == kRanges - 1) return found;
            tile -= tiles;
        }
    }
};

// Rows of a matrix in tiles: groups of rows, each with a set of adapters (kNone: none). Without groups all use set 0.
struct Groups {
    const int32_t *offsets, *sets;
    int32_t count;
};

// A tile of `kWidth` columns in shared memory: its 16-byte chunks are permuted within each row, so that eight rows of a
// matrix, or of what the lanes of a warp read, lie in different banks. Of wide rows in f32 they read one at a time.
template <typename T, int kWidth>
struct Swizzled {
    T* memory;

    __device__ T* at(int row, int column) const {
        constexpr int kChunk = kVectorSize<T>;
        constexpr bool kNarrow = kWidth / kChunk == 4;  // two rows in all banks; else each row is whole rounds of them
        static_assert(kNarrow || kWidth / kChunk % 8 == 0);
        const int key = kNarrow ? row / 2 % 4 : sizeof(T) == 2 ? row % 8 : 0;
        return memory + row * kWidth + (column / kChunk ^ key) * kChunk + column % kChunk;
    }
};

// Starts the copy of a tile: what lies at `source` [rows, columns], zeros in the columns beyond, and in the rows beyond
// the last one again, of which nobody uses what is made. The rows are multiples of 16 bytes.
template <int kThreads, int kRows, int kWidth, typename T, typename At>
__device__ inline void copy(At at, const T* source, int stride, int rows, int columns) {
    constexpr int kVectors = kWidth / kVectorSize<T>;
    static_assert(kThreads % kVectors == 0, "a thread copies parts of one column");
    const int column = threadIdx.x % kVectors * kVectorSize<T>, last = max(rows - 1, 0);
    if (columns >= kWidth) {
#pragma unroll
        for (int row = threadIdx.x / kVectors; row < kRows; row += kThreads / kVectors) {
            ptx::cp_async_16(at(row, column), source + int64_t{min(row, last)} * stride + column);
        }
    } else {
        const bool exists = column < columns;
#pragma unroll 1
        for (int row = threadIdx.x / kVectors; row < kRows; row += kThreads / kVectors) {
            ptx::cp_async_16_zfill(at(row, column), source + (exists ? int64_t{min(row, last)} * stride + column : 0),
                                   exists ? kVectorBytes : 0);
        }
    }
}

// The same for factors of low rank, of which only so many rows and columns are needed. Where vectors cannot be read, it
// copies element by element, by the time of the next barrier.
template <int kThreads, int kRows, int kWidth, typename T, typename At>
__device__ inline void copy_factor(At at, const T* source, int stride, int rows, int columns, int needed_rows,
                                   int needed_columns) {
    constexpr int kSize = kVectorSize<T>, kVectors = kWidth / kSize;
    static_assert(kThreads % kVectors == 0, "a thread copies parts of one column");
    const bool vectors = stride % kSize == 0 && reinterpret_cast<uintptr_t>(source) % kVectorBytes == 0;
    const int column = threadIdx.x % kVectors * kSize;
    if (column >= needed_columns) return;
#pragma unroll 1
    for (int row = threadIdx.x / kVectors; row < min(kRows, needed_rows); row += kThreads / kVectors) {
        const int exist = row < rows ? max(0, min(columns - column, kSize)) : 0;
        const T* from = source + (exist > 0 ? int64_t{row} * stride + column : 0);
        T* to = at(row, column);
        if (vectors) {
            ptx::cp_async_16_zfill(to, from, exist * static_cast<int>(sizeof(T)));
        } else {
#pragma unroll 1
            for (int e = 0; e < kSize; ++e) narrow(e < exist ? widen(from[e]) : 0.0f, to[e]);
        }
    }
}

}  // namespace lora
