// What stands between two matrix products of a model: bias, activation, dropout and the residual sum, in one pass, and the
// column sums that are a bias's gradient. References: activation.rs, dropout.rs, linear.rs.
//
//   forward   y = residual + dropout(f(x + bias))
//   backward  dx = dropout(dy)·f′,  dbias += Σ dx over the rows
//
// x, residual, y, dx [rows, width], contiguous; dy [rows, width] with a row every `stride` elements; bias [width]; all in
// the storage type; dbias [width] in f32. f′ is taken from what was kept of the forward pass: f(x + bias), before dropout,
// for ReLU and tanh (after dropout does as well for ReLU), x for the others, to which the bias is added again. Each part can
// be left out, so this is also a sum of two tensors, dropout in place, or column sums alone.
//
// A warp owns 256 columns, 8 of them per lane, by vectors of 16 bytes where width and addresses allow it and else by single
// elements; `warps_per_row` warps of a block of 8 stand side by side, the others on further rows. Blocks walk over the
// rows, so a lane reads its bias once, and its column sums stay in registers until the block adds up those of its
// warps and writes one row of partial sums, which elementwise_add_partials adds up: no atomics, one order, the same bits.
//
// Bound by memory. Forward: x and residual read, y written; backward: kept and dy read, dx written: 3 elements each at most.
// Activations take up to a few dozen operations an element and dropout 25 integer operations (Philox gives four words for
// about 100), which is as long as the memory takes for a bf16 tensor that is only dropped, and hidden when more is fused.
// Partial sums: 8·width bytes for a row of blocks, of which there are at most 512.
//
// History (not measured on a GPU yet)
//   1  this version

#include "activation.cuh"
#include "dropout.cuh"
#include "partials.cuh"
#include "types.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPerLane = 8;
constexpr int kSlab = kPerLane * kWarpSize;  // columns that one warp owns

// Which rows and columns are this thread's.
struct Owner {
    int lane, warp, slab;
    int first_row, row_step;

    __device__ explicit Owner(int warps_per_row)
        : lane(threadIdx.x % kWarpSize), warp(threadIdx.x / kWarpSize),
          slab(blockIdx.x * warps_per_row + warp % warps_per_row),
          first_row(blockIdx.y * (kWarps / warps_per_row) + warp / warps_per_row),
          row_step(gridDim.y * (kWarps / warps_per_row)) {}

    // First column of vector `v` of this lane.
    template <int kSize>
    __device__ int column(int v) const {
        return slab * kSlab + (v * kWarpSize + lane) * kSize;
    }
};

template <typename Function, int kSize, typename T>
__device__ inline void forward(const T* x, const T* bias, const T* residual, T* y, const Dropout& dropout, int rows,
                               int width, int warps_per_row) {
    const Owner owner(warps_per_row);
#pragma unroll 1
    for (int v = 0; v < kPerLane / kSize; ++v) {
        const int column = owner.column<kSize>(v);
        if (column >= width) return;
        float offset[kSize] = {};
        if (bias != nullptr) load<kSize>(bias + column, offset);
        for (int row = owner.first_row; row < rows; row += owner.row_step) {
            const int64_t at = static_cast<int64_t>(row) * width + column;
            float values[kSize], other[kSize] = {};
            load<kSize>(x + at, values);
            if (residual != nullptr) load<kSize>(residual + at, other);
#pragma unroll
            for (int i = 0; i < kSize; ++i) values[i] = Function::value(values[i] + offset[i]);
            dropout.apply(values, row, column, width);
#pragma unroll
            for (int i = 0; i < kSize; ++i) values[i] += other[i];
            store<kSize>(values, y + at);
        }
    }
}

template <typename Function, int kSize, typename T>
__device__ inline void backward(const T* kept, const T* bias, const T* dy, T* dx, float* partial, const Dropout& dropout,
                                int rows, int width, int stride, int warps_per_row, float (&exchange)[kWarps][kSlab]) {
    const Owner owner(warps_per_row);
#pragma unroll 1
    for (int v = 0; v < kPerLane / kSize; ++v) {
        const int column = owner.column<kSize>(v);
        if (column >= width) break;
        float offset[kSize] = {}, sums[kSize] = {};
        if (Function::kKeepsX && bias != nullptr) load<kSize>(bias + column, offset);
        for (int row = owner.first_row; row < rows; row += owner.row_step) {
            const int64_t at = static_cast<int64_t>(row) * width + column;
            float g[kSize], x[kSize] = {};
            load<kSize>(dy + static_cast<int64_t>(row) * stride + column, g);
            if (kept != nullptr) load<kSize>(kept + at, x);
            dropout.apply(g, row, column, width);
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
                g[i] *= Function::derivative(x[i] + offset[i]);
                sums[i] += g[i];
            }
            if (dx != nullptr) store<kSize>(g, dx + at);
        }
        if (partial != nullptr) store<kSize>(sums, &exchange[owner.warp][column % kSlab]);
    }
    if (partial == nullptr) return;

    // Row blockIdx.y of partial sums [gridDim.y, width]
    __syncthreads();
    const int first = blockIdx.x * warps_per_row * kSlab;
    for (int slot = threadIdx.x; slot < warps_per_row * kSlab && first + slot < width; slot += kThreads) {
        float sum = 0.0f;
        for (int w = slot / kSlab; w < kWarps; w += warps_per_row) sum += exchange[w][slot % kSlab];
        partial[static_cast<int64_t>(blockIdx.y) * width + first + slot] = sum;
    }
}

template <typename T>
__device__ inline void forward_any(int32_t function, const T* x, const T* bias, const T* residual, T* y,
                                   const Dropout& dropout, int rows, int width, int warps_per_row) {
    constexpr int kSize = kVectorSize<T>;
    const bool aligned = is_aligned<kSize>(x, width) && is_aligned<kSize>(bias, width) &&
                         is_aligned<kSize>(residual, width) && is_aligned<kSize>(y, width);
    with_function(function, [&](auto f) {
        using Function = decltype(f);
        if (aligned) {
            forward<Function, kSize>(x, bias, residual, y, dropout, rows, width, warps_per_row);
        } else {
            forward<Function, 1>(x, bias, residual, y, dropout, rows, width, warps_per_row);
        }
    });
}

template <typename T>
__device__ inline void backward_any(int32_t function, const T* kept, const T* bias, const T* dy, T* dx, float* partial,
                                    const Dropout& dropout, int rows, int width, int stride, int warps_per_row) {
    constexpr int kSize = kVectorSize<T>;
    __shared__ alignas(kPerLane * sizeof(float)) float exchange[kWarps][kSlab];
    const bool aligned = is_aligned<kSize>(kept, width) && is_aligned<kSize>(bias, width) &&
                         is_aligned<kSize>(dy, width) && is_aligned<kSize>(dy, stride) && is_aligned<kSize>(dx, width);
    with_function(function, [&](auto f) {
        using Function = decltype(f);
        if (aligned) {
            backward<Function, kSize>(kept, bias, dy, dx, partial, dropout, rows, width, stride, warps_per_row, exchange);
        } else {
            backward<Function, 1>(kept, bias, dy, dx, partial, dropout, rows, width, stride, warps_per_row, exchange);
        }
    });
}

// out ← x, four elements per thread.
template <typename From, typename To>
__device__ inline void convert(const From* x, To* out, int64_t n) {
    constexpr int kSize = kVectorSize<float>;
    const int64_t start = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize;
    if (start + kSize <= n) {
        float values[kSize];
        load<kSize>(x + start, values);
        store<kSize>(values, out + start);
    } else {
        for (int64_t i = start; i < n; ++i) narrow(widen(x[i]), out[i]);
    }
}

}  // namespace

// grid (⌈width / (256·warps_per_row)⌉, any), block 256; warps_per_row = 1, 2, 4 or 8. Null for what is left out: bias,
// residual, step (no dropout), origins. y may be x or residual. Dropout wants a width that is a multiple of 4.
#define ELEMENTWISE_FORWARD(NAME, T)                                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads) elementwise_forward_##NAME(                                 \
        int32_t function, const T* x, const T* bias, const T* residual, T* y, const uint32_t* step,                    \
        const int32_t* origins, uint64_t seed, uint32_t site, uint32_t threshold, float scale, int32_t rows,           \
        int32_t width, int32_t warps_per_row) {                                                                        \
        const Dropout dropout{step, origins, seed, site, threshold, scale};                                            \
        forward_any(function, x, bias, residual, y, dropout, rows, width, warps_per_row);                              \
    }

// The same grid; its rows are part of the definition of the sums. Null for what is left out: kept (where there is no
// function), bias, dx, partial [grid.y, width], step, origins. dx may be dy where stride is width.
#define ELEMENTWISE_BACKWARD(NAME, T)                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads) elementwise_backward_##NAME(                                \
        int32_t function, const T* kept, const T* bias, const T* dy, T* dx, float* partial, const uint32_t* step,      \
        const int32_t* origins, uint64_t seed, uint32_t site, uint32_t threshold, float scale, int32_t rows,           \
        int32_t width, int32_t stride, int32_t warps_per_row) {                                                        \
        const Dropout dropout{step, origins, seed, site, threshold, scale};                                            \
        backward_any(function, kept, bias, dy, dx, partial, dropout, rows, width, stride, warps_per_row);              \
    }

ELEMENTWISE_FORWARD(f32, float)
ELEMENTWISE_FORWARD(bf16, bf16)
ELEMENTWISE_FORWARD(f16, f16)
ELEMENTWISE_BACKWARD(f32, float)
ELEMENTWISE_BACKWARD(bf16, bf16)
ELEMENTWISE_BACKWARD(f16, f16)

// dbias += Σ partial over `blocks` rows of `width`. grid ⌈width/32⌉, block 256.
extern "C" __global__ void __launch_bounds__(kThreads)
    elementwise_add_partials(const float* partial, float* dbias, int32_t blocks, int32_t width) {
    add_partials(partial, dbias, nullptr, blocks, width, width);
}

// Between f32 and the storage types, to the nearest: n elements, aligned to 16 bytes. grid ⌈n/1024⌉, block 256.
#define ELEMENTWISE_CONVERT(NAME, T)                                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                             \
        elementwise_narrow_##NAME(const float* x, T* out, int64_t n) {                                                 \
        convert(x, out, n);                                                                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                             \
        elementwise_widen_##NAME(const T* x, float* out, int64_t n) {                                                  \
        convert(x, out, n);                                                                                            \
    }
ELEMENTWISE_CONVERT(f32, float)
ELEMENTWISE_CONVERT(bf16, bf16)
ELEMENTWISE_CONVERT(f16, f16)
