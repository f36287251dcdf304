// A linear map of one-hot codes: sums of weight rows. Reference: one_hot.rs.
//
//   forward   y_r = f(bias + Σ_k weight[offsets[k] + codes[r, k]]),  f = tanh, or the identity
//   backward  dweight[offsets[k] + codes[r, k]] += g_r,  dbias += Σ_r g_r,  g = dy·(1 − y²), or dy
//
// codes [rows, fields], one byte each; offsets [fields], ascending: the first weight row (input) of each field; a code is
// below the size of its field, which whoever uploads it has checked. weight [inputs, width], bias [width], y, dy
// [rows, width] in the storage type; dweight, dbias in f32.
//
// Forward: 8 lanes own a row and 64 columns (128 bytes of bf16), 8 of them per lane in registers; a block owns 32 rows, and
// brings 64 fields of theirs at a time to shared memory. Neighbouring blocks have the same columns, so that what runs
// together reads one strip of the weight, which stays in the first-level cache.
//
// Backward: a block owns 128 columns, 64 inputs and a chunk of the rows, with the sums in shared memory; a warp owns every
// eighth of the block's fields, to which no other warp adds, a lane 4 of the columns. So each sum has one owner and one
// order. The bias is one more field behind the others, whose only code is always 0. Each chunk writes partial sums,
// which one_hot_add_partials adds up.
//
// Forward: rows·fields·width elements out of the cache, which bounds it (147 fields of 512 bf16: 150 KB a row), beside
// one element written per column; an addition each. Backward: rows·fields·width additions to shared memory, 8 bytes each,
// which bound it (128 bytes a clock and multiprocessor); dy and y are read once per 64 inputs, partial sums take
// 8·chunks·(inputs + 1)·width bytes.
//
// History
//   1  this version. A product with the expanded codes on tensor cores would take a fifth of the time of the backward pass

#include "partials.cuh"
#include "types.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;

// Forward.
constexpr int kLanesPerRow = 8;
constexpr int kPerLane = 8;
constexpr int kColumns = kLanesPerRow * kPerLane;
constexpr int kRows = kThreads / kLanesPerRow;
constexpr int kFields = 64;

// The weight rows of the block's rows and of some fields; an odd pitch keeps the rows of a warp in different banks.
using Inputs = int32_t[kRows][kFields + 1];

template <int kSize, typename T>
__device__ inline void forward(bool with_tanh, const uint8_t* codes, const int32_t* offsets, const T* weight,
                               const T* bias, T* y, int rows, int fields, int width, Inputs& inputs) {
    constexpr int kVectors = kPerLane / kSize;
    const int first_row = blockIdx.x * kRows, row_in_block = threadIdx.x / kLanesPerRow;
    const int row = first_row + row_in_block;
    const int first_column = blockIdx.y * kColumns + threadIdx.x % kLanesPerRow * kSize;
    const auto column = [=](int v) { return first_column + v * kLanesPerRow * kSize; };
    const int end = row < rows ? width : 0;

    float sums[kVectors][kSize];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (column(v) < end) load<kSize>(bias + column(v), sums[v]);
    }
    for (int first = 0; first < fields; first += kFields) {
        const int count = min(kFields, fields - first);
        __syncthreads();
        for (int i = threadIdx.x; i < kRows * kFields; i += kThreads) {
            const int r = i / kFields, field = first + i % kFields;
            if (first_row + r >= rows || field >= fields) continue;
            inputs[r][i % kFields] = offsets[field] + codes[static_cast<int64_t>(first_row + r) * fields + field];
        }
        __syncthreads();
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (column(v) >= end) continue;
#pragma unroll 4
            for (int k = 0; k < count; ++k) {
                float values[kSize];
                load<kSize>(weight + static_cast<int64_t>(inputs[row_in_block][k]) * width + column(v), values);
#pragma unroll
                for (int i = 0; i < kSize; ++i) sums[v][i] += values[i];
            }
        }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (column(v) >= end) continue;
#pragma unroll
        for (int i = 0; i < kSize; ++i) sums[v][i] = with_tanh ? tanhf(sums[v][i]) : sums[v][i];
        store<kSize>(sums[v], y + static_cast<int64_t>(row) * width + column(v));
    }
}

// Backward.
constexpr int kOwnColumns = 4;
constexpr int kTileColumns = kOwnColumns * kWarpSize;
constexpr int kTileInputs = 64;
constexpr int kBatch = 8;  // rows whose gradients are in registers

using Sums = float[kTileInputs][kTileColumns];

// The field of an input: the last one that does not begin behind it. The bias, behind all inputs, is field `fields`.
__device__ inline int field_of(const int32_t* offsets, int fields, int inputs, int input) {
    if (input >= inputs) return fields;
    int low = 0, high = fields;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (offsets[middle] <= input ? low : high) = middle;
    }
    return low;
}

template <int kSize, typename T>
__device__ inline void backward(const uint8_t* codes, const int32_t* offsets, const T* y, const T* dy,
                                float* partial, int rows, int fields, int inputs, int width, int rows_per_chunk,
                                Sums& sums) {
    constexpr int kVectors = kOwnColumns / kSize;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int first_column = blockIdx.x * kTileColumns, first_input = blockIdx.y * kTileInputs;
    const int end_input = min(first_input + kTileInputs, inputs + 1);
    const int first_field = field_of(offsets, fields, inputs, first_input);
    const int last_field = field_of(offsets, fields, inputs, end_input - 1);
    const int64_t first_row = static_cast<int64_t>(blockIdx.z) * rows_per_chunk;
    const int64_t end_row = min(first_row + rows_per_chunk, static_cast<int64_t>(rows));

    for (int i = threadIdx.x; i < kTileInputs * kTileColumns; i += kThreads) sums[i / kTileColumns][i % kTileColumns] = 0.0f;
    __syncthreads();
    for (int64_t batch = first_row; batch < end_row; batch += kBatch) {
        float g[kBatch][kVectors][kSize];
#pragma unroll
        for (int r = 0; r < kBatch; ++r) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const int column = first_column + (v * kWarpSize + lane) * kSize;
                const bool inside = batch + r < end_row && column < width;
                const int64_t at = (batch + r) * width + column;
                float kept[kSize] = {};
#pragma unroll
                for (int i = 0; i < kSize; ++i) g[r][v][i] = 0.0f;
                if (inside) load<kSize>(dy + at, g[r][v]);
                if (inside && y != nullptr) load<kSize>(y + at, kept);
#pragma unroll
                for (int i = 0; i < kSize; ++i) g[r][v][i] *= 1.0f - kept[i] * kept[i];
            }
        }
        for (int field = first_field + warp; field <= last_field; field += kWarps) {
            // Lane r knows where row r of the batch adds; outside of the block's inputs it does not.
            int own = -1;
            if (lane < kBatch && batch + lane < end_row) {
                own = (field < fields ? offsets[field] + codes[(batch + lane) * fields + field] : inputs) - first_input;
            }
#pragma unroll
            for (int r = 0; r < kBatch; ++r) {
                const int input = __shfl_sync(0xffffffffu, own, r);
                if (input < 0 || input >= kTileInputs) continue;
#pragma unroll
                for (int v = 0; v < kVectors; ++v) {
                    float* sum = &sums[input][(v * kWarpSize + lane) * kSize];
                    float values[kSize];
                    load<kSize>(sum, values);
#pragma unroll
                    for (int i = 0; i < kSize; ++i) values[i] += g[r][v][i];
                    store<kSize>(values, sum);
                }
            }
        }
    }
    __syncthreads();
    float* rows_of_chunk = partial + (static_cast<int64_t>(blockIdx.z) * (inputs + 1) + first_input) * width;
    for (int i = threadIdx.x; i < (end_input - first_input) * kTileColumns; i += kThreads) {
        const int input = i / kTileColumns, column = i % kTileColumns;
        if (first_column + column >= width) continue;
        rows_of_chunk[static_cast<int64_t>(input) * width + first_column + column] = sums[input][column];
    }
}

template <typename T>
__device__ inline void forward_any(bool with_tanh, const uint8_t* codes, const int32_t* offsets, const T* weight,
                                   const T* bias, T* y, int rows, int fields, int width) {
    constexpr int kSize = kVectorSize<T>;
    __shared__ Inputs inputs;
    if (is_aligned<kSize>(weight, width) && is_aligned<kSize>(bias, width) && is_aligned<kSize>(y, width)) {
        forward<kSize>(with_tanh, codes, offsets, weight, bias, y, rows, fields, width, inputs);
    } else {
        forward<1>(with_tanh, codes, offsets, weight, bias, y, rows, fields, width, inputs);
    }
}

template <typename T>
__device__ inline void backward_any(const uint8_t* codes, const int32_t* offsets, const T* y,
                                    const T* dy, float* partial, int rows, int fields, int inputs, int width,
                                    int rows_per_chunk) {
    __shared__ alignas(kVectorBytes) Sums sums;
    if (is_aligned<kOwnColumns>(y, width) && is_aligned<kOwnColumns>(dy, width)) {
        backward<kOwnColumns>(codes, offsets, y, dy, partial, rows, fields, inputs, width, rows_per_chunk, sums);
    } else {
        backward<1>(codes, offsets, y, dy, partial, rows, fields, inputs, width, rows_per_chunk, sums);
    }
}

}  // namespace

// grid (⌈rows/32⌉, ⌈width/64⌉), block 256.
#define ONE_HOT_FORWARD(NAME, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads) one_hot_forward_##NAME(                                     \
        int32_t with_tanh, const uint8_t* codes, const int32_t* offsets, const T* weight, const T* bias, T* y,         \
        int32_t rows, int32_t fields, int32_t width) {                                                                 \
        forward_any(with_tanh != 0, codes, offsets, weight, bias, y, rows, fields, width);                             \
    }

// grid (⌈width/128⌉, ⌈(inputs + 1)/64⌉, chunks), block 256; the chunks, of rows_per_chunk rows each, are part of the
// definition of the sums. y is null without tanh. partial [chunks, inputs + 1, width].
#define ONE_HOT_BACKWARD(NAME, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(kThreads) one_hot_backward_##NAME(                                    \
        const uint8_t* codes, const int32_t* offsets, const T* y, const T* dy, float* partial,       \
        int32_t rows, int32_t fields, int32_t inputs, int32_t width, int32_t rows_per_chunk) {                         \
        backward_any(codes, offsets, y, dy, partial, rows, fields, inputs, width, rows_per_chunk);           \
    }

ONE_HOT_FORWARD(f32, float)
ONE_HOT_FORWARD(bf16, bf16)
ONE_HOT_FORWARD(f16, f16)
ONE_HOT_BACKWARD(f32, float)
ONE_HOT_BACKWARD(bf16, bf16)
ONE_HOT_BACKWARD(f16, f16)

// dweight [inputs, width] and dbias [width] += Σ partial [chunks, inputs + 1, width].
// grid ⌈(inputs + 1)·width/32⌉, block 256.
extern "C" __global__ void __launch_bounds__(kThreads)
    one_hot_add_partials(const float* partial, float* dweight, float* dbias, int32_t chunks, int32_t inputs,
                         int32_t width) {
    const int64_t weights = static_cast<int64_t>(inputs) * width;
    add_partials(partial, dweight, dbias, chunks, weights, weights + width);
}
