// The memory loss on what a memory recalls: what stands around content_memory.cu, whose slots then have a column more for
// each recalled token. Reference: recall.rs; who the recalled tokens are: src/backend/gpu/recall.rs.
//
//   widen  y_r = [x_source(r), columns_r]: rows of D numbers and the C columns that are carried along behind them; zeros, one
//          1 in column one[r], or given ones. source(r) = from[r / group]·group + r % group: groups of rows that stay together
//   loss   R_t = the last C columns of y_t;  E_tc = whether t is to recall what column c stands for;
//          loss = −Σ (E log R + (1−E) log(1−R)),  dR = weight·(R − E) / max(R (1 − R), 1e-12),  read_to[t] = the first D of y_t
//
// x, y, read, dR in the storage type; weight [1], loss [1] in f32 in device memory, so that a captured graph can be replayed
// with the next batch. A token's loss is over its first `earlier[t]` columns, those of tokens before its segment; the others'
// dR is 0. wanted [tokens, ⌈C/32⌉] has E in bits, the first column in the lowest. Each logarithm is at least −100.
//
// R is as the memory was stored. In bf16 and f16 a share close to 1 rounds to 1: there 1 − R is taken for half of what rounds
// so, and not for 0, or one rounded share would outweigh the whole batch. In f16, whose small numbers are coarse and whose
// large ones are not that large, R is taken for 2⁻¹⁴ at least.
//
// A warp owns a row; a lane takes every so many of its numbers, those of D by vectors of 16 bytes where addresses allow it. A
// block writes the sum of its eight tokens; recall_sum adds the blocks' sums, always in the same order.
//
// Bound by memory: each number is read and written once. B 64, N 32, D 128, C 8: 1.1 MB of memories in bf16.
//
// History (not measured on a GPU yet)
//   1  this version

#include "reduce.cuh"
#include "types.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr float kLogFloor = -100.0f;
constexpr float kVarianceFloor = 1e-12f;

// What R and 1 − R are taken for at least.
template <typename T>
struct Least {
    static constexpr float kShare = 0.0f, kRest = 0.0f;
};
template <>
struct Least<bf16> {
    static constexpr float kShare = 0.0f, kRest = 0x1p-10f;
};
template <>
struct Least<f16> {
    static constexpr float kShare = 0x1p-14f, kRest = 0x1p-13f;
};

// The row of this warp.
__device__ inline int64_t my_row() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize; }
__device__ inline int my_lane() { return threadIdx.x % kWarpSize; }

// The larger one; NaN where `x` is.
__device__ inline float at_least(float x, float least) { return x < least ? least : x; }

template <int kSize, typename T>
__device__ inline void copy(const T* from, T* to, int width) {
#pragma unroll 1
    for (int column = my_lane() * kSize; column < width; column += kWarpSize * kSize) {
        float values[kSize];
        load<kSize>(from + column, values);
        store<kSize>(values, to + column);
    }
}

template <int kSize, typename T>
__device__ inline void widen_row(const T* x, const int32_t* from, const int32_t* one, const T* given, T* y, int rows,
                                 int group, int width, int columns, int x_stride) {
    const int64_t row = my_row();
    if (row >= rows) return;
    const int64_t source = static_cast<int64_t>(from[row / group]) * group + row % group;
    y += row * (width + columns);
    copy<kSize>(x + source * x_stride, y, width);
    const int mine = one != nullptr ? one[row] : -1;
#pragma unroll 1
    for (int c = my_lane(); c < columns; c += kWarpSize) {
        const float value = given != nullptr ? widen(given[row * columns + c]) : c == mine ? 1.0f : 0.0f;
        narrow(value, y[width + c]);
    }
}

// The loss of one share R, and `gradient` = (R − E) / (R (1 − R)).
template <typename T>
__device__ inline float share_loss(float share, bool wanted, float& gradient) {
    // Rounding may carry a share a little beyond 1; NaN stays.
    share = at_least(share, 0.0f);
    if (share > 1.0f) share = 1.0f;
    const float left = at_least(share, Least<T>::kShare), right = at_least(1.0f - share, Least<T>::kRest);
    gradient = (wanted ? share - 1.0f : share) / at_least(left * right, kVarianceFloor);
    return -at_least(logf(wanted ? left : right), kLogFloor);
}

template <int kSize, typename T>
__device__ inline float row_loss(const T* y, const int32_t* to, const int32_t* earlier, const int32_t* wanted,
                                 float weight, T* read, T* gradient, int64_t row, int width, int columns,
                                 int read_stride) {
    y += row * (width + columns);
    gradient += row * columns;
    wanted += row * ((columns + 31) / 32);
    copy<kSize>(y, read + static_cast<int64_t>(to[row]) * read_stride, width);
    const int count = earlier[row];
    float loss = 0.0f;
#pragma unroll 1
    for (int c = my_lane(); c < columns; c += kWarpSize) {
        float slope = 0.0f;
        if (c < count) {
            const bool is_wanted = (static_cast<uint32_t>(wanted[c / 32]) >> c % 32 & 1u) != 0;
            loss += share_loss<T>(widen(y[width + c]), is_wanted, slope);
        }
        narrow(weight * slope, gradient[c]);
    }
    return loss;
}

}  // namespace

// grid ⌈rows/8⌉, block 256. At most one of `one` [rows] and `given` [rows, columns] is not null.
#define RECALL_WIDEN(NAME, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads) recall_widen_##NAME(                                        \
        const T* x, const int32_t* from, const int32_t* one, const T* given, T* y, int32_t rows, int32_t group,        \
        int32_t width, int32_t columns, int32_t x_stride) {                                                            \
        constexpr int kSize = kVectorSize<T>;                                                                          \
        const bool aligned = is_aligned<kSize>(x, width) && is_aligned<kSize>(x, x_stride) &&                          \
                             is_aligned<kSize>(y, width + columns);                                                    \
        if (aligned) {                                                                                                 \
            widen_row<kSize>(x, from, one, given, y, rows, group, width, columns, x_stride);                           \
        } else {                                                                                                       \
            widen_row<1>(x, from, one, given, y, rows, group, width, columns, x_stride);                               \
        }                                                                                                              \
    }
RECALL_WIDEN(f32, float)
RECALL_WIDEN(bf16, bf16)
RECALL_WIDEN(f16, f16)

// grid ⌈tokens/8⌉, block 256; a sum for each block.
#define RECALL_LOSS(NAME, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(kThreads) recall_loss_##NAME(                                         \
        const T* y, const int32_t* to, const int32_t* earlier, const int32_t* wanted, const float* weight, T* read,    \
        T* gradient, float* sums, int32_t tokens, int32_t width, int32_t columns, int32_t read_stride) {               \
        __shared__ float exchange[kWarps];                                                                             \
        constexpr int kSize = kVectorSize<T>;                                                                          \
        const bool aligned = is_aligned<kSize>(y, width + columns) && is_aligned<kSize>(read, width) &&                \
                             is_aligned<kSize>(read, read_stride);                                                     \
        const int64_t row = my_row();                                                                                  \
        float loss = 0.0f;                                                                                             \
        if (row < tokens) {                                                                                            \
            loss = aligned ? row_loss<kSize>(y, to, earlier, wanted, *weight, read, gradient, row, width, columns,     \
                                             read_stride)                                                              \
                           : row_loss<1>(y, to, earlier, wanted, *weight, read, gradient, row, width, columns,         \
                                         read_stride);                                                                 \
        }                                                                                                              \
        loss = block_sum(loss, exchange);                                                                              \
        if (threadIdx.x == 0) sums[blockIdx.x] = loss;                                                                 \
    }
RECALL_LOSS(f32, float)
RECALL_LOSS(bf16, bf16)
RECALL_LOSS(f16, f16)

// loss = Σ over `blocks` sums. grid 1, block 256.
extern "C" __global__ void __launch_bounds__(kThreads) recall_sum(const float* sums, float* loss, int32_t blocks) {
    __shared__ float exchange[kWarps];
    float sum = 0.0f;
    for (int b = threadIdx.x; b < blocks; b += kThreads) sum += sums[b];
    sum = block_sum(sum, exchange);
    if (threadIdx.x == 0) *loss = sum;
}
