// Layer normalisation over rows of `width` ≤ 4096, with the residual sum before it. Reference: layer_norm.rs.
//
//   s = x + dropout(residual)     kept in `sum`; without a residual s = x
//   y = (s − mean)·rstd·weight + bias,  rstd = 1/√(variance + epsilon)
//   ds = rstd·(g − mean(g) − ŝ·mean(g·ŝ)) + dsum,  ŝ = (s − mean)·rstd,  g = dy·weight
//   dweight += Σ dy·ŝ,  dbias += Σ dy over the rows
//
//   dresidual = dropout(ds)       where there was dropout
//
// x, residual, sum, y, dy, dsum, ds, dresidual [rows, width] in the storage type; weight, bias [width] likewise; mean, rstd [rows]
// and dweight, dbias [width] in f32.
//
// A warp owns up to 512 columns of a row, 16 of them per lane in registers; `warps_per_row` warps of a block of 8 own
// a row. So a row is read once, by vectors of 16 bytes where width and addresses allow it and else by single elements, and
// the variance is taken around the mean. The backward pass walks over rows with a fixed number of blocks; each warp keeps
// its sums for dweight and dbias in shared memory, the block adds those of its warps and writes one row of partial sums,
// which layer_norm_reduce adds up: no atomics, one order, the same bits.
//
// Bound by memory. Forward: x, residual read, sum, y written, 4·width elements a row, ≈ 8 operations each. Backward: s,
// dy, dsum read, ds written, 4·width elements a row, ≈ 14 operations each; partial sums 8·width bytes per block. Dropout adds 25
// integer operations an element, and on the way back dresidual, another width elements a row.
//
// History (not measured on a GPU yet)
//   1  backward sums for dweight and dbias in registers: 147 of them, one block on a multiprocessor
//   2  in shared memory: 79 to 103 registers, two or three blocks
//   3  dropout of the residual, which was a launch before, and two on the way back: kernels of their own, since they take
//      80 to 128 registers

#include "dropout.cuh"
#include "partials.cuh"
#include "reduce.cuh"
#include "types.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPerLane = 16;
constexpr int kSlab = kPerLane * kWarpSize;  // columns of a row that one warp owns

// Which rows and columns are this thread's.
struct Owner {
    int lane, warp;
    int warps_per_row, rows_per_block;
    int row_in_block, slab;

    __device__ explicit Owner(int warps_per_row)
        : lane(threadIdx.x % kWarpSize), warp(threadIdx.x / kWarpSize), warps_per_row(warps_per_row),
          rows_per_block(kWarps / warps_per_row), row_in_block(warp / warps_per_row), slab(warp % warps_per_row) {}

    // First column of vector `v` of this lane.
    template <int kSize>
    __device__ int column(int v) const {
        return slab * kSlab + (v * kWarpSize + lane) * kSize;
    }
};

// Σ over the warps that own the row, in all of their lanes. Every thread of the block calls it. Two sums in a row need
// an exchange each: the barrier of the second is also what lets the first be used again.
__device__ inline float row_sum(float x, const Owner& owner, float (&exchange)[kWarps]) {
    x = warp_sum(x);
    if (owner.warps_per_row == 1) return x;
    if (owner.lane == 0) exchange[owner.warp] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int w = 0; w < owner.warps_per_row; ++w) sum += exchange[owner.warp - owner.slab + w];
    return sum;
}

// In the place of a dropout mask where there is none: kernels without one keep their registers.
struct NoDropout {
    template <int kSize>
    __device__ void apply(float (&)[kSize], int, int, int) const {}
};

template <int kSize, typename T, typename Mask>
__device__ inline void forward(const T* x, const T* residual, const T* weight, const T* bias, T* sum, T* y, float* mean,
                               float* rstd, const Mask& mask, int rows, int width, int warps_per_row, float epsilon,
                               float (&exchange)[2][kWarps]) {
    constexpr int kVectors = kPerLane / kSize;
    const Owner owner(warps_per_row);
    const int row = blockIdx.x * owner.rows_per_block + owner.row_in_block;
    const int end = row < rows ? width : 0;
    const int64_t start = static_cast<int64_t>(row) * width;

    float values[kVectors][kSize];
    float total = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const int column = owner.column<kSize>(v);
        if (column >= end) continue;
        load<kSize>(x + start + column, values[v]);
        if (residual != nullptr) {
            float other[kSize];
            load<kSize>(residual + start + column, other);
            mask.apply(other, row, column, width);
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
                T rounded;  // as the backward pass will find it
                narrow(values[v][i] + other[i], rounded);
                values[v][i] = widen(rounded);
            }
            store<kSize>(values[v], sum + start + column);
        }
#pragma unroll
        for (int i = 0; i < kSize; ++i) total += values[v][i];
    }
    const float centre = row_sum(total, owner, exchange[0]) / static_cast<float>(width);

    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (owner.column<kSize>(v) >= end) continue;
#pragma unroll
        for (int i = 0; i < kSize; ++i) squares += (values[v][i] - centre) * (values[v][i] - centre);
    }
    const float variance = row_sum(squares, owner, exchange[1]) / static_cast<float>(width);
    const float scale = 1.0f / sqrtf(variance + epsilon);

    if (row < rows && owner.slab == 0 && owner.lane == 0) {
        mean[row] = centre;
        rstd[row] = scale;
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const int column = owner.column<kSize>(v);
        if (column >= end) continue;
        float slope[kSize], offset[kSize];
        load<kSize>(weight + column, slope);
        load<kSize>(bias + column, offset);
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[v][i] = (values[v][i] - centre) * scale * slope[i] + offset[i];
        store<kSize>(values[v], y + start + column);
    }
}

template <int kSize, typename T, typename Mask>
__device__ inline void backward(const T* s, const T* weight, const float* mean, const float* rstd, const T* dy,
                                const T* dsum, T* ds, T* dresidual, float* partial, const Mask& mask, int rows,
                                int width, int warps_per_row, float (&exchange)[2][kWarps], float (&sums)[2][kWarps][kSlab]) {
    constexpr int kVectors = kPerLane / kSize;
    const Owner owner(warps_per_row);

    // Each thread touches its own columns until the rows are done.
    float* dweight = sums[0][owner.warp];
    float* dbias = sums[1][owner.warp];
    for (int slot = owner.lane; slot < kSlab; slot += kWarpSize) dweight[slot] = dbias[slot] = 0.0f;
    __syncwarp();
    // The same number of turns for every warp: all of them meet in row_sum.
    for (int first = blockIdx.x * owner.rows_per_block; first < rows; first += gridDim.x * owner.rows_per_block) {
        const int row = first + owner.row_in_block;
        const int end = row < rows ? width : 0;
        const int64_t start = static_cast<int64_t>(row) * width;
        const float centre = row < rows ? mean[row] : 0.0f;
        const float scale = row < rows ? rstd[row] : 0.0f;

        float normal[kVectors][kSize], g[kVectors][kSize];
        float g_total = 0.0f, g_normal_total = 0.0f;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int column = owner.column<kSize>(v), slot = column % kSlab;
            if (column >= end) continue;
            float slope[kSize];
            load<kSize>(s + start + column, normal[v]);
            load<kSize>(dy + start + column, g[v]);
            load<kSize>(weight + column, slope);
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
                normal[v][i] = (normal[v][i] - centre) * scale;
                dweight[slot + i] += g[v][i] * normal[v][i];
                dbias[slot + i] += g[v][i];
                g[v][i] *= slope[i];
                g_total += g[v][i];
                g_normal_total += g[v][i] * normal[v][i];
            }
        }
        const float share = 1.0f / static_cast<float>(width);
        const float g_mean = row_sum(g_total, owner, exchange[0]) * share;
        const float g_slope = row_sum(g_normal_total, owner, exchange[1]) * share;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int column = owner.column<kSize>(v);
            if (column >= end) continue;
            float other[kSize] = {};
            if (dsum != nullptr) load<kSize>(dsum + start + column, other);
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
                other[i] += scale * (g[v][i] - g_mean - normal[v][i] * g_slope);
            }
            store<kSize>(other, ds + start + column);
            if (dresidual == nullptr) continue;
            mask.apply(other, row, column, width);
            store<kSize>(other, dresidual + start + column);
        }
    }

    // Row blockIdx.x of partial sums: [gridDim.x][dweight, dbias][width]
    __syncthreads();
    for (int which = 0; which < 2; ++which) {
        float* row = partial + (2 * static_cast<int64_t>(blockIdx.x) + which) * width;
        for (int column = threadIdx.x; column < width; column += kThreads) {
            float sum = 0.0f;
            for (int w = column / kSlab; w < kWarps; w += warps_per_row) sum += sums[which][w][column % kSlab];
            row[column] = sum;
        }
    }
}

template <typename T, typename Mask>
__device__ inline void forward_any(const T* x, const T* residual, const T* weight, const T* bias, T* sum, T* y,
                                   float* mean, float* rstd, const Mask& mask, int rows, int width,
                                   int warps_per_row, float epsilon) {
    constexpr int kSize = kVectorSize<T>;
    __shared__ float exchange[2][kWarps];
    const bool aligned = is_aligned<kSize>(x, width) && is_aligned<kSize>(residual, width) &&
                         is_aligned<kSize>(weight, width) && is_aligned<kSize>(bias, width) &&
                         is_aligned<kSize>(sum, width) && is_aligned<kSize>(y, width);
    if (aligned) {
        forward<kSize>(x, residual, weight, bias, sum, y, mean, rstd, mask, rows, width, warps_per_row, epsilon,
                       exchange);
    } else {
        forward<1>(x, residual, weight, bias, sum, y, mean, rstd, mask, rows, width, warps_per_row, epsilon,
                   exchange);
    }
}

template <typename T, typename Mask>
__device__ inline void backward_any(const T* s, const T* weight, const float* mean, const float* rstd, const T* dy,
                                    const T* dsum, T* ds, T* dresidual, float* partial, const Mask& mask,
                                    int rows, int width, int warps_per_row) {
    constexpr int kSize = kVectorSize<T>;
    __shared__ float exchange[2][kWarps];
    __shared__ float sums[2][kWarps][kSlab];
    const bool aligned = is_aligned<kSize>(s, width) && is_aligned<kSize>(weight, width) && is_aligned<kSize>(dy, width) &&
                         is_aligned<kSize>(dsum, width) && is_aligned<kSize>(ds, width) &&
                         is_aligned<kSize>(dresidual, width);
    if (aligned) {
        backward<kSize>(s, weight, mean, rstd, dy, dsum, ds, dresidual, partial, mask, rows, width, warps_per_row,
                        exchange, sums);
    } else {
        backward<1>(s, weight, mean, rstd, dy, dsum, ds, dresidual, partial, mask, rows, width, warps_per_row,
                    exchange, sums);
    }
}

}  // namespace

// grid ⌈rows / (8 / warps_per_row)⌉, block 256; warps_per_row = 1, 2, 4 or 8 with 512·warps_per_row ≥ width.
// Without a residual, `residual` and `sum` are null. y may be x; sum may be x or residual.
#define LAYER_NORM_FORWARD(NAME, T)                                                                                    \
    extern "C" __global__ void __launch_bounds__(kThreads) layer_norm_forward_##NAME(                                  \
        const T* x, const T* residual, const T* weight, const T* bias, T* sum, T* y, float* mean, float* rstd,         \
        int32_t rows, int32_t width, int32_t warps_per_row, float epsilon) {                                           \
        forward_any(x, residual, weight, bias, sum, y, mean, rstd, NoDropout{}, rows, width, warps_per_row, epsilon);  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads) layer_norm_forward_dropout_##NAME(                          \
        const T* x, const T* residual, const T* weight, const T* bias, T* sum, T* y, float* mean, float* rstd,         \
        int32_t rows, int32_t width, int32_t warps_per_row, float epsilon, const uint32_t* step,                       \
        const int32_t* origins, uint64_t seed, uint32_t site, uint32_t threshold, float scale) {                       \
        const Dropout mask{step, origins, seed, site, threshold, scale};                                               \
        forward_any(x, residual, weight, bias, sum, y, mean, rstd, mask, rows, width, warps_per_row, epsilon);         \
    }

// block 256; any grid, which is part of the result's definition. partial [grid, 2, width]. dsum is null where nothing
// else uses the sum; ds may be dy or dsum.
#define LAYER_NORM_BACKWARD(NAME, T)                                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads) layer_norm_backward_##NAME(                                 \
        const T* s, const T* weight, const float* mean, const float* rstd, const T* dy, const T* dsum, T* ds,          \
        float* partial, int32_t rows, int32_t width, int32_t warps_per_row) {                                          \
        T* const none = nullptr;                                                                                       \
        backward_any(s, weight, mean, rstd, dy, dsum, ds, none, partial, NoDropout{}, rows, width, warps_per_row);     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads) layer_norm_backward_dropout_##NAME(                         \
        const T* s, const T* weight, const float* mean, const float* rstd, const T* dy, const T* dsum, T* ds,          \
        float* partial, int32_t rows, int32_t width, int32_t warps_per_row, T* dresidual, const uint32_t* step,        \
        const int32_t* origins, uint64_t seed, uint32_t site, uint32_t threshold, float scale) {                       \
        const Dropout mask{step, origins, seed, site, threshold, scale};                                               \
        backward_any(s, weight, mean, rstd, dy, dsum, ds, dresidual, partial, mask, rows, width, warps_per_row);       \
    }

LAYER_NORM_FORWARD(f32, float)
LAYER_NORM_FORWARD(bf16, bf16)
LAYER_NORM_FORWARD(f16, f16)
LAYER_NORM_BACKWARD(f32, float)
LAYER_NORM_BACKWARD(bf16, bf16)
LAYER_NORM_BACKWARD(f16, f16)

// dweight and dbias += Σ partial over `blocks` rows of 2·width. grid ⌈2·width/32⌉, block 256.
extern "C" __global__ void __launch_bounds__(kThreads)
    layer_norm_reduce(const float* partial, float* dweight, float* dbias, int32_t blocks, int32_t width) {
    add_partials(partial, dweight, dbias, blocks, width, 2 * width);
}
