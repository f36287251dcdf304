// Rows of a packed batch: tokens put together from their embeddings, taken apart again, and rows copied by index.
// Reference: the CPU backend, `src/backend/cpu/tokens.rs`.
//
//   assemble           out_t = embedding of the kind of token t, row rows[t]  +  positions[times[t]]
//   take apart         dobservations_i = dout[observation_tokens[i]], and so for actions and returns
//   position gradient  dpositions[s] += Σ dout_t over the tokens t of time step s
//   copy rows          y[to[i]] = x[from[i]]
//
// out, dout [tokens, width], observations [observations, width], actions, returns likewise, positions [steps, width], x, y
// in the storage type; dpositions in f32. What a batch looks like lies in device memory, so that a captured graph can be
// replayed with the next one:
//   kinds  [tokens], u8   0 observation, 1 action, 2 return; anything else is padding, whose row becomes 0
//   rows   [tokens], i32  row among the tokens of its kind
//   times  [tokens], i32  time step
//   …_tokens [rows of that kind], i32  packed token of each row; a row whose token is negative becomes 0
//   step_offsets [steps + 1], step_tokens [tokens], i32  the tokens of each time step, ascending
//   from, to [rows], i32  without `from` row i of x is read, without `to` row i of y written; from < 0 writes zeros, and
//                         to < 0 nothing
//
// A warp owns 256 columns of a row, 8 of them per lane, by vectors of 16 bytes where width and addresses allow it and else
// by single elements. For the position gradient a block owns 256 columns of a time step, whose tokens its warps share.
//
// Bound by memory: each row is read and written once; assembling reads the position as well (from the cache: there are few).
//
// History (not measured on a GPU yet)
//   1  this version

#include "reduce.cuh"
#include "types.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPerLane = 8;
constexpr int kSlab = kPerLane * kWarpSize;

// Calls f(v, column) with the vectors of this lane in its slab, blockIdx.y.
template <int kSize, typename F>
__device__ inline void for_my_columns(int width, F f) {
#pragma unroll
    for (int v = 0; v < kPerLane / kSize; ++v) {
        const int column = blockIdx.y * kSlab + (v * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize) * kSize;
        if (column < width) f(v, column);
    }
}

// The row of this warp.
__device__ inline int64_t my_row() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize; }

// to ← from, or 0 for a null row.
template <int kSize, typename T>
__device__ inline void copy(const T* from, T* to, int width) {
    for_my_columns<kSize>(width, [=](int, int column) {
        float values[kSize] = {};
        if (from != nullptr) load<kSize>(from + column, values);
        store<kSize>(values, to + column);
    });
}

template <int kSize, typename T>
__device__ inline void assemble(const uint8_t* kinds, const int32_t* rows, const int32_t* times, const T* observations,
                                const T* actions, const T* returns, const T* positions, T* out, int tokens, int width) {
    const int64_t token = my_row();
    if (token >= tokens) return;
    const int kind = kinds[token];
    const T* embeddings = kind == 0 ? observations : kind == 1 ? actions : kind == 2 ? returns : nullptr;
    T* to = out + token * width;
    if (embeddings == nullptr) return copy<kSize, T>(nullptr, to, width);
    const T* embedding = embeddings + static_cast<int64_t>(rows[token]) * width;
    const T* position = positions + static_cast<int64_t>(times[token]) * width;
    for_my_columns<kSize>(width, [=](int, int column) {
        float values[kSize], other[kSize];
        load<kSize>(embedding + column, values);
        load<kSize>(position + column, other);
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[i] += other[i];
        store<kSize>(values, to + column);
    });
}

// The rows of one kind: the packed token of each, and where its gradient goes.
template <typename T>
struct Kind {
    const int32_t* tokens;
    T* gradient;
    int count;
};

template <int kSize, typename T>
__device__ inline void take_apart(const T* dout, const Kind<T>& observations, const Kind<T>& actions,
                                  const Kind<T>& returns, int width) {
    int64_t row = my_row();
    const auto copy_of = [&](const Kind<T>& kind) {
        const int64_t token = kind.tokens[row];
        copy<kSize>(token < 0 ? nullptr : dout + token * width, kind.gradient + row * width, width);
    };
    if (row < observations.count) return copy_of(observations);
    row -= observations.count;
    if (row < actions.count) return copy_of(actions);
    row -= actions.count;
    if (row < returns.count) return copy_of(returns);
}

template <int kSize, typename T>
__device__ inline void position_gradient(const T* dout, const int32_t* step_offsets, const int32_t* step_tokens,
                                         float* dpositions, int width, float (&exchange)[kWarps][kSlab]) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int step = blockIdx.x;
    float sums[kPerLane / kSize][kSize] = {};
    for (int i = step_offsets[step] + warp; i < step_offsets[step + 1]; i += kWarps) {
        const T* row = dout + static_cast<int64_t>(step_tokens[i]) * width;
        for_my_columns<kSize>(width, [&](int v, int column) {
            float values[kSize];
            load<kSize>(row + column, values);
#pragma unroll
            for (int k = 0; k < kSize; ++k) sums[v][k] += values[k];
        });
    }
#pragma unroll
    for (int v = 0; v < kPerLane / kSize; ++v) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) exchange[warp][(v * kWarpSize + lane) * kSize + k] = sums[v][k];
    }
    __syncthreads();
    const int slot = threadIdx.x, column = blockIdx.y * kSlab + slot;
    if (column >= width) return;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += exchange[w][slot];
    dpositions[static_cast<int64_t>(step) * width + column] += sum;
}

static_assert(kThreads == kSlab, "a thread adds up one column of the slab");

template <int kSize, typename T>
__device__ inline void copy_rows(const T* x, const int32_t* from, const int32_t* to, T* y, int rows, int width,
                                 int64_t x_stride, int64_t y_stride) {
    const int64_t row = my_row();
    if (row >= rows) return;
    const int64_t source = from != nullptr ? from[row] : row, target = to != nullptr ? to[row] : row;
    if (target < 0) return;
    copy<kSize>(source < 0 ? nullptr : x + source * x_stride, y + target * y_stride, width);
}

}  // namespace

// grid (⌈rows/8⌉, ⌈width/256⌉), block 256, with one row per token. returns is null where no token is one.
#define TOKENS_ASSEMBLE(NAME, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads) tokens_assemble_##NAME(                                     \
        const uint8_t* kinds, const int32_t* rows, const int32_t* times, const T* observations, const T* actions,      \
        const T* returns, const T* positions, T* out, int32_t tokens, int32_t width) {                                 \
        constexpr int kSize = kVectorSize<T>;                                                                          \
        const bool aligned = is_aligned<kSize>(observations, width) && is_aligned<kSize>(actions, width) &&            \
                             is_aligned<kSize>(returns, width) && is_aligned<kSize>(positions, width) &&               \
                             is_aligned<kSize>(out, width);                                                            \
        if (aligned) {                                                                                                 \
            assemble<kSize>(kinds, rows, times, observations, actions, returns, positions, out, tokens, width);        \
        } else {                                                                                                       \
            assemble<1>(kinds, rows, times, observations, actions, returns, positions, out, tokens, width);            \
        }                                                                                                              \
    }

// The same grid, with the rows of all kinds, observations first, then actions, then returns.
#define TOKENS_TAKE_APART(NAME, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads) tokens_take_apart_##NAME(                                   \
        const T* dout, const int32_t* observation_tokens, const int32_t* action_tokens, const int32_t* return_tokens,  \
        T* dobservations, T* dactions, T* dreturns, int32_t observations, int32_t actions, int32_t returns,            \
        int32_t width) {                                                                                               \
        constexpr int kSize = kVectorSize<T>;                                                                          \
        const Kind<T> of_observations{observation_tokens, dobservations, observations};                                \
        const Kind<T> of_actions{action_tokens, dactions, actions};                                                    \
        const Kind<T> of_returns{return_tokens, dreturns, returns};                                                    \
        const bool aligned = is_aligned<kSize>(dout, width) && is_aligned<kSize>(dobservations, width) &&              \
                             is_aligned<kSize>(dactions, width) && is_aligned<kSize>(dreturns, width);                 \
        if (aligned) {                                                                                                 \
            take_apart<kSize>(dout, of_observations, of_actions, of_returns, width);                                   \
        } else {                                                                                                       \
            take_apart<1>(dout, of_observations, of_actions, of_returns, width);                                       \
        }                                                                                                              \
    }

// grid (steps, ⌈width/256⌉), block 256.
#define TOKENS_POSITION_GRADIENT(NAME, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(kThreads) tokens_position_gradient_##NAME(                            \
        const T* dout, const int32_t* step_offsets, const int32_t* step_tokens, float* dpositions, int32_t width) {    \
        constexpr int kSize = kVectorSize<T>;                                                                          \
        __shared__ float exchange[kWarps][kSlab];                                                                      \
        if (is_aligned<kSize>(dout, width)) {                                                                          \
            position_gradient<kSize>(dout, step_offsets, step_tokens, dpositions, width, exchange);                    \
        } else {                                                                                                       \
            position_gradient<1>(dout, step_offsets, step_tokens, dpositions, width, exchange);                        \
        }                                                                                                              \
    }

// grid (⌈rows/8⌉, ⌈width/256⌉), block 256. Strides in elements. No row of y may be written twice.
#define TOKENS_COPY_ROWS(NAME, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(kThreads) tokens_copy_rows_##NAME(                                    \
        const T* x, const int32_t* from, const int32_t* to, T* y, int32_t rows, int32_t width, int32_t x_stride,       \
        int32_t y_stride) {                                                                                            \
        constexpr int kSize = kVectorSize<T>;                                                                          \
        const bool aligned = is_aligned<kSize>(x, width) && is_aligned<kSize>(x, x_stride) &&                          \
                             is_aligned<kSize>(y, width) && is_aligned<kSize>(y, y_stride);                            \
        if (aligned) {                                                                                                 \
            copy_rows<kSize>(x, from, to, y, rows, width, x_stride, y_stride);                                         \
        } else {                                                                                                       \
            copy_rows<1>(x, from, to, y, rows, width, x_stride, y_stride);                                             \
        }                                                                                                              \
    }

#define TOKENS_KERNELS(NAME, T)                                                                                        \
    TOKENS_ASSEMBLE(NAME, T)                                                                                           \
    TOKENS_TAKE_APART(NAME, T)                                                                                         \
    TOKENS_POSITION_GRADIENT(NAME, T)                                                                                  \
    TOKENS_COPY_ROWS(NAME, T)

TOKENS_KERNELS(f32, float)
TOKENS_KERNELS(bf16, bf16)
TOKENS_KERNELS(f16, f16)
