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
// Backward: the product of the expanded codes, transposed, with g, on tensor cores. A block owns 128 columns, 128 inputs and
// a chunk of the rows; it brings g of 32 rows at a time to shared memory, a warp owns 16 of the inputs and makes their zeros
// and ones out of the codes. These are exact in bf16, and g is split into bf16 numbers that add up to it: two of them
// (16 bits, all that a bf16 or f16 dy has), or three for f32. The bias is one more input behind the others, which every row
// has. Each chunk writes partial sums, which one_hot_add_partials adds up: one order, the same bits. A g that is not finite
// makes its column's gradients NaN, not only those of its own inputs.
//
// Forward: rows·fields·width elements out of the cache, which bounds it (147 fields of 512 bf16: 150 KB a row), beside
// one element written per column; an addition each. Backward: 2·parts·rows·(inputs + 1)·width operations on the matrix
// units (a warp has 2·16·parts of them for 8 codes and 8·parts loads of four matrices from shared memory); dy and y are read
// once per 128 inputs, mostly from the cache, and partial sums take 8·chunks·(inputs + 1)·width bytes.
//
// History (not measured on a GPU yet; bounds for 6000 rows of 147 fields, 735 inputs, at width 512 on an H100)
//   1  backward sums in shared memory, each with one owner, 8 bytes read or written for every row, field and column: 0.12 ms
//   2  backward on tensor cores: 9·10⁹ operations in bf16, 0.015 ms at 60 % of their rate

#include "partials.cuh"
#include "ptx.cuh"
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
using WeightRows = int32_t[kRows][kFields + 1];

template <int kSize, typename T>
__device__ inline void forward(bool with_tanh, const uint8_t* codes, const int32_t* offsets, const T* weight,
                               const T* bias, T* y, int rows, int fields, int width, WeightRows& inputs) {
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
constexpr int kTileColumns = 128;
constexpr int kWarpInputs = 16;
constexpr int kTileInputs = kWarps * kWarpInputs;
constexpr int kBatch = 32;               // rows that are in shared memory
constexpr int kStep = 16;                // rows of a matrix instruction
constexpr int kPitch = kTileColumns + 8;  // the rows of a matrix begin in different banks

template <typename T>
constexpr int kParts = sizeof(T) == 4 ? 3 : 2;

// g as a sum of bf16 numbers.
template <typename T>
using Parts = bf16[kParts<T>][kBatch][kPitch];

// An input: which code of which field it stands for. The bias stands for every row, what lies behind it for none.
struct Input {
    int field, code;
    bool always;

    __device__ Input(const int32_t* offsets, int fields, int inputs, int input)
        : field(-1), code(0), always(input == inputs) {
        if (input >= inputs) return;
        int end = fields;
        field = 0;
        while (end - field > 1) {  // the last field that does not begin behind the input
            const int middle = (field + end) / 2;
            (offsets[middle] <= input ? field : end) = middle;
        }
        code = input - offsets[field];
    }

    // 1 in bf16 if a row has it, else 0.
    __device__ uint32_t of(const uint8_t* codes, int fields, int64_t row, int64_t end_row) const {
        const bool has = row < end_row && (always || (field >= 0 && codes[row * fields + field] == code));
        return has ? 0x3f80u : 0u;
    }
};

// g of the batch's rows and the block's columns, 0 beyond their ends.
template <int kSize, typename T>
__device__ inline void load_gradient(const T* y, const T* dy, int64_t first_row, int64_t end_row, int first_column,
                                     int width, Parts<T>& parts) {
    constexpr int kVectors = kTileColumns / kSize;
    for (int i = threadIdx.x; i < kBatch * kVectors; i += kThreads) {
        const int row = i / kVectors, column = i % kVectors * kSize;
        const bool inside = first_row + row < end_row && first_column + column < width;
        const int64_t at = (first_row + row) * width + first_column + column;
        float g[kSize] = {}, kept[kSize] = {};
        if (inside) load<kSize>(dy + at, g);
        if (inside && y != nullptr) load<kSize>(y + at, kept);
#pragma unroll
        for (int k = 0; k < kSize; ++k) g[k] *= 1.0f - kept[k] * kept[k];
#pragma unroll
        for (int p = 0; p < kParts<T>; ++p) {
            store<kSize>(g, &parts[p][row][column]);
#pragma unroll
            for (int k = 0; k < kSize; ++k) {
                bf16 part;
                narrow(g[k], part);
                g[k] -= widen(part);
            }
        }
    }
}

template <typename T>
__device__ inline void backward(const uint8_t* codes, const int32_t* offsets, const T* y, const T* dy, float* partial,
                                int rows, int fields, int inputs, int width, int rows_per_chunk, Parts<T>& parts) {
    constexpr int kSize = kVectorSize<T>;
    const bool aligned = is_aligned<kSize>(y, width) && is_aligned<kSize>(dy, width);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int first_column = blockIdx.x * kTileColumns;
    const int first_input = blockIdx.y * kTileInputs + warp * kWarpInputs;
    const int64_t first_row = static_cast<int64_t>(blockIdx.z) * rows_per_chunk;
    const int64_t end_row = min(first_row + rows_per_chunk, static_cast<int64_t>(rows));
    // What of the matrices is this lane's: inputs `group` and `group` + 8, rows (and columns of the sums) from `pair`.
    const int group = lane / 4, pair = lane % 4 * 2;
    const Input low(offsets, fields, inputs, first_input + group), high(offsets, fields, inputs, first_input + group + 8);

    float sums[kTileColumns / 8][4] = {};
    for (int64_t batch = first_row; batch < end_row; batch += kBatch) {
        __syncthreads();
        if (aligned) {
            load_gradient<kSize>(y, dy, batch, end_row, first_column, width, parts);
        } else {
            load_gradient<1>(y, dy, batch, end_row, first_column, width, parts);
        }
        __syncthreads();
        if (first_input > inputs) continue;
#pragma unroll
        for (int step = 0; step < kBatch; step += kStep) {
            const auto ones = [&](const Input& input, int row) {
                const int64_t first = batch + step + row;
                return input.of(codes, fields, first, end_row) | input.of(codes, fields, first + 1, end_row) << 16;
            };
            const uint32_t a[4] = {ones(low, pair), ones(high, pair), ones(low, pair + 8), ones(high, pair + 8)};
#pragma unroll
            for (int p = 0; p < kParts<T>; ++p) {
#pragma unroll
                for (int column = 0; column < kTileColumns; column += 16) {
                    uint32_t b[4];
                    ptx::ldmatrix_x4_trans(b, &parts[p][step + lane % 16][column + lane / 16 * 8]);
                    ptx::mma_m16n8k16_bf16(sums[column / 8], a, {b[0], b[1]});
                    ptx::mma_m16n8k16_bf16(sums[column / 8 + 1], a, {b[2], b[3]});
                }
            }
        }
    }

    float* rows_of_chunk = partial + static_cast<int64_t>(blockIdx.z) * (inputs + 1) * width;
#pragma unroll
    for (int n = 0; n < kTileColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int input = first_input + group + i / 2 * 8, column = first_column + n * 8 + pair + i % 2;
            if (input <= inputs && column < width) rows_of_chunk[static_cast<int64_t>(input) * width + column] = sums[n][i];
        }
    }
}

template <typename T>
__device__ inline void forward_any(bool with_tanh, const uint8_t* codes, const int32_t* offsets, const T* weight,
                                   const T* bias, T* y, int rows, int fields, int width) {
    constexpr int kSize = kVectorSize<T>;
    __shared__ WeightRows inputs;
    if (is_aligned<kSize>(weight, width) && is_aligned<kSize>(bias, width) && is_aligned<kSize>(y, width)) {
        forward<kSize>(with_tanh, codes, offsets, weight, bias, y, rows, fields, width, inputs);
    } else {
        forward<1>(with_tanh, codes, offsets, weight, bias, y, rows, fields, width, inputs);
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

// grid (⌈width/128⌉, ⌈(inputs + 1)/128⌉, chunks), block 256; the chunks, of rows_per_chunk rows each, are part of the
// definition of the sums. y is null without tanh. partial [chunks, inputs + 1, width].
#define ONE_HOT_BACKWARD(NAME, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(kThreads) one_hot_backward_##NAME(                                    \
        const uint8_t* codes, const int32_t* offsets, const T* y, const T* dy, float* partial, int32_t rows,           \
        int32_t fields, int32_t inputs, int32_t width, int32_t rows_per_chunk) {                                       \
        __shared__ alignas(kVectorBytes) Parts<T> parts;                                                               \
        backward(codes, offsets, y, dy, partial, rows, fields, inputs, width, rows_per_chunk, parts);                  \
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
