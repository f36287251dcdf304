// What the kernels of lora_linear.cu's product share: its parameters, the steps that a block takes, what a step copies,
// and how the result is written.
#pragma once

#include "lora_linear.cuh"

namespace lora {

template <typename T>
struct Product {
    const T* x;
    const uint32_t* keep;
    const T *weight, *bias;
    const T *down[kMaxAdapters], *up[kMaxAdapters];
    float scaling[kMaxAdapters];
    Layout adapters;
    Groups groups;
    T *y, *h;
    int32_t rows, depth, columns, x_stride, y_stride;
    bool backward, accumulate;
};

// What a block multiplies, in steps: those of the depth, each of which lies in one range, and after each range that has
// an adapter those of its ranks.
template <typename T, int kDepth>
struct Steps {
    const Product<T>& p;
    int number;  // of the range
    Range range;
    int ranks;  // of its adapter
    int at = 0;

    __device__ Steps(const Product<T>& p, int adapter) : p(p), number(Layout::kRanges - 1), range{0, p.depth, adapter} {
        if (p.backward) range = p.adapters.range(number = 0, p.depth);
        settle();
    }

    // Steps of the depth, which come first.
    __device__ int own() const { return round_up(range.end - range.begin, kDepth); }
    __device__ bool done() const { return at >= own() + ranks; }
    __device__ bool is_of_ranks() const { return at >= own(); }
    __device__ int rank() const { return at - own(); }
    __device__ int depth() const { return range.begin + at; }

    __device__ void advance() {
        at += kDepth;
        settle();
    }

    __device__ void settle() {
        for (;; at = 0) {
            ranks = range.adapter == kNone ? 0 : pick(p.adapters.rank, range.adapter);
            if (!done() || number == Layout::kRanges - 1) return;
            range = p.adapters.range(++number, p.depth);
        }
    }
};

// The tile of a block: its rows, the columns of its range from `first_column` on, and the set of factors.
struct Place {
    int first_row, rows;
    Range columns;
    int first_column, set;
};

// Starts the copies of a step to x [kRows, kDepth] and to the weight, [kColumns + kMaxRank, kDepth] or the other way
// round if `kAcross`: of the adapter `needed` ranks, zeros beyond its own.
template <int kThreads, int kRows, int kColumns, bool kAcross, typename T, int kDepth, typename X, typename Weight>
__device__ inline void load_step(const Product<T>& p, const Steps<T, kDepth>& coming, const Place& place, int needed,
                                 X x, Weight weight) {
    const int first_column = place.first_column, set = place.set;
    const Range columns = place.columns;
    const int width = columns.end - first_column, adapter = coming.range.adapter, ranks = coming.ranks;
    const int own_depth = p.backward ? coming.range.end - coming.range.begin : p.depth;
    const int own_columns = p.backward ? p.columns : columns.end - columns.begin;
    if (!coming.is_of_ranks()) {
        const int k = coming.depth(), depth = coming.range.end - k;
        copy<kThreads, kRows, kDepth>(x, p.x + int64_t{place.first_row} * p.x_stride + k, p.x_stride, place.rows, depth);
        if constexpr (kAcross) {
            copy<kThreads, kDepth, kColumns>(weight, p.weight + int64_t{k} * p.columns + first_column, p.columns, depth,
                                             width);
        } else {
            copy<kThreads, kColumns, kDepth>(weight, p.weight + int64_t{first_column} * p.depth + k, p.depth, width,
                                             depth);
        }
        if (ranks > 0 && set >= 0) {
            const T* down = pick(p.down, adapter) + int64_t{set} * ranks * own_depth;
            if constexpr (kAcross) {
                copy_factor<kThreads, kDepth, kMaxRank>([&](int a, int b) { return weight(a, kColumns + b); },
                                                        down + int64_t{coming.at} * ranks, ranks, depth, ranks, kDepth,
                                                        needed);
            } else {
                copy_factor<kThreads, kMaxRank, kDepth>([&](int a, int b) { return weight(kColumns + a, b); },
                                                        down + coming.at, own_depth, ranks, depth, needed, kDepth);
            }
        }
    } else if (set >= 0) {
        const int rank = coming.rank(), column = first_column - columns.begin;
        const int here = min(needed - rank, kDepth);
        const T* up = pick(p.up, adapter) + int64_t{set} * ranks * own_columns;
        if constexpr (kAcross) {
            copy_factor<kThreads, kDepth, kColumns>(weight, up + int64_t{rank} * own_columns + column, own_columns,
                                                    ranks - rank, width, here, kColumns);
        } else {
            copy_factor<kThreads, kColumns, kDepth>(weight, up + int64_t{column} * ranks + rank, ranks, width,
                                                    ranks - rank, kColumns, here);
        }
    }
}

// A thread's piece of y, 16 bytes at `row` and `column` of the whole: the sums with the bias, added to what is there if
// need be.
template <typename T>
__device__ inline void store_piece(const Product<T>& p, float (&values)[kVectorSize<T>], int row, int column) {
    constexpr int kSize = kVectorSize<T>;
    T* y = p.y + static_cast<int64_t>(row) * p.y_stride + column;
    float more[kSize] = {};
    if (p.bias != nullptr) load(p.bias + column, more);
#pragma unroll
    for (int e = 0; e < kSize; ++e) values[e] += more[e];
    if (p.accumulate) {
        load(y, more);
#pragma unroll
        for (int e = 0; e < kSize; ++e) values[e] += more[e];
    }
    store(values, y);
}

#define ADAPTER(TYPE, P)                                                                                               \
    const TYPE *down##P, const TYPE *up##P, int32_t first##P, int32_t count##P, int32_t rank##P, float scaling##P
#define EACH(NAME) {NAME##0, NAME##1, NAME##2, NAME##3}

#define LORA_PARAMETERS(TYPE)                                                                                          \
    const TYPE *x, const uint32_t *keep, const TYPE *weight, const TYPE *bias, ADAPTER(TYPE, 0), ADAPTER(TYPE, 1),     \
        ADAPTER(TYPE, 2), ADAPTER(TYPE, 3), const int32_t *offsets, const int32_t *sets, TYPE *y, TYPE *h,             \
        int32_t rows, int32_t depth, int32_t columns, int32_t groups, int32_t x_stride, int32_t y_stride,              \
        int32_t backward, int32_t accumulate
#define LORA_PRODUCT(TYPE)                                                                                             \
    Product<TYPE> {                                                                                                    \
        x, keep, weight, bias, EACH(down), EACH(up), EACH(scaling), {EACH(first), EACH(count), EACH(rank)},            \
            {offsets, sets, groups}, y, h, rows, depth, columns, x_stride, y_stride, backward != 0, accumulate != 0    \
    }

}  // namespace lora
