// The convolutional front end, backward. Reference: convolution.rs; forward: convolutions_forward.cu, which says how codes,
// weights, middle and out lie in memory.
//
//   dy = dout where out > 0,  dmiddle = W2ᵀ ∗ dy where middle > 0
//   dweight2 += Σ dy ⊗ taps of middle,  dbias2 += Σ dy,  dweight1 += Σ dmiddle ⊗ taps of the bits,  dbias1 += Σ dmiddle
//
// dout [rows, out, positions] becomes dy [rows, positions, out], dmiddle is [rows, positions, middle]: position-major, so
// that the sums over positions copy both by 16 bytes, and for both convolutions by the same code. The gradients of the
// parameters are in f32.
//
// input_gradient is the forward pass's second convolution with the weight transposed and the taps turned round. It turns
// dout over on its way to shared memory.
//
// weight_gradient multiplies over positions. A block owns up to 80 channels of dy and, of up to 40 channels of a map or 24
// one-hot channels, all nine taps; a warp owns six or four of those chunks, for all of the 80 channels, in registers until
// its frames are done. The biases are one chunk more, whose input is 1. Groups of frames come by asynchronous copies, one
// while the other is worked on. Each block writes partial sums, reduce adds them up in their order.
//
// 4500 frames of 7×7 cells, 20→40→80 channels: 12.7 GFLOP for dmiddle, 12.7 for dweight2, 3.2 for dweight1; 176 MB in
// 16-bit types, and 20 MB of partial sums with 128 blocks, written and read. A group is three frames, of dweight1
// twelve. dmiddle: 15 mma take 52 instructions, 6 of them ldmatrix, 1.6 clocks of shared memory each: as long as the matrix units (sm_90), and a
// fifth of its positions are tails. dweight2: 30 mma, 82 instructions, 8 ldmatrix, 1.1 clocks: bound by the matrix units.
// dweight1 gathers its bits by single bytes, 126 instructions for 12 mma: bound by those, but a sixth of the whole.
//
// History (not measured on a GPU yet)
//   1  a branch around each tile of rows and pair of columns
//   2  a loop for each number of tiles, without branches
//   3  dmiddle: dout and out by vectors, four of each under way, instead of pairs of numbers one after another

#include "convolutions.cuh"

namespace {

using namespace convolutions;

// Turns dout [frames, channels, positions], where out > 0, into the map of dy. Cells of positions are at `places`.
template <typename T>
__device__ inline void load_turned(const Map<T>& map, const uint16_t* places, const T* dout, const T* out, int positions) {
    constexpr int kSize = kVectorSize<T>, kStep = kThreads * kSize;
    constexpr int kBatch = 4;  // vectors of a thread that are under way at the same time
    const int per_frame = map.grid.positions(), channels = map.chunks * kChunk, size = positions * channels;
    for (int first = threadIdx.x * kSize; first < size; first += kBatch * kStep) {
        Vector<T, kSize> gradients[kBatch], kept[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int at = first + b * kStep;
            if (at >= size) continue;
            gradients[b] = *reinterpret_cast<const Vector<T, kSize>*>(dout + at);
            kept[b] = *reinterpret_cast<const Vector<T, kSize>*>(out + at);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int at = first + b * kStep;
            if (at >= size) continue;
            int channel = at / per_frame % channels, within = at % per_frame;
            int first_place = at / per_frame / channels * per_frame;
#pragma unroll
            for (int e = 0; e < kSize; ++e) {
                T value{};
                if (widen(kept[b].values[e]) > 0.0f) value = gradients[b].values[e];
                map.cells[places[first_place + within] + channel] = value;
                if (++within < per_frame) continue;
                within = 0;
                if (++channel < channels) continue;
                channel = 0;
                first_place += per_frame;
            }
        }
    }
}

// Writes the positions of a map one after another.
template <typename T>
__device__ inline void store_dense(const Map<T>& map, const uint16_t* places, T* to, int positions) {
    constexpr int kSize = kVectorSize<T>;
    const int vectors = map.chunks * kChunk / kSize;
    for (int i = threadIdx.x; i < positions * vectors; i += kThreads) {
        const T* from = map.cells + places[i / vectors] + i % vectors * kSize;
        reinterpret_cast<Vector<T, kSize>*>(to)[i] = *reinterpret_cast<const Vector<T, kSize>*>(from);
    }
}

template <typename T>
__device__ inline void input_gradient(Weights<T, Order::kTransposed> weight, const T* middle, const T* out, T* dout,
                                      T* dmiddle, int rows, const Grid& grid, int frames) {
    extern __shared__ __align__(16) unsigned char memory[];
    weight.slice = reinterpret_cast<T*>(memory);
    const Map<T> map{weight.slice + weight.rows * weight.pitch(), grid, weight.channels / kChunk};
    const int map_size = grid.cells(frames) * map.step();
    uint16_t* places = reinterpret_cast<uint16_t*>(map.cells + map_size);
    clear(map.cells, map_size);
    for (int i = threadIdx.x; i < frames * grid.positions(); i += kThreads) {
        places[i] = static_cast<uint16_t>(map.corner(i) + grid.centre() * map.step());
    }
    for (int frame = blockIdx.x * frames; frame < rows; frame += gridDim.x * frames) {
        const int positions = min(frames, rows - frame) * grid.positions();
        const int64_t first_position = static_cast<int64_t>(frame) * grid.positions();
        const int64_t start = first_position * weight.channels;
        __syncthreads();  // the map of the group before has been used
        load_turned(map, places, dout + start, out + start, positions);
        __syncthreads();
        store_dense(map, places, dout + start, positions);
        convolve(map, weight, positions, [&](int position) {
            const int64_t at = (first_position + position) * weight.rows;
            const T* kept = middle + at;
            T* to = dmiddle + at;
            return [=](int channel, float(&pair)[2]) {
                float y[2];
                load<2>(kept + channel, y);
                for (int i = 0; i < 2; ++i) pair[i] = y[i] > 0.0f ? pair[i] : 0.0f;
                store<2>(pair, to + channel);
            };
        });
    }
}

// --- The gradients of the weights

constexpr int kGradientWarps = 8;
constexpr int kGradientThreads = kGradientWarps * kWarpSize;
constexpr int kGradientRows = 5;  // tiles of 16 channels of dy in a block

// Which part of the gradient a block owns: of the input up to kChunks chunks with their taps, and the chunk of the bias.
template <int kChunks>
struct Part {
    static constexpr int kColumns = (kChunks * kTaps + kGradientWarps) / kGradientWarps;  // of a warp
    static_assert(kColumns % 2 == 0, "fragments come in pairs");

    int first_row, rows;      // channels of dy
    int first_chunk, chunks;  // of the input

    __device__ Part(int part, int all_rows, int rows_per_block, int all_chunks) {
        const int row_parts = ceil_div(all_rows, rows_per_block);
        first_row = part % row_parts * rows_per_block;
        rows = min(rows_per_block, all_rows - first_row);
        first_chunk = part / row_parts * kChunks;
        chunks = min(kChunks, all_chunks - first_chunk);
    }
    __device__ int columns() const { return chunks * kTaps + (first_chunk == 0 ? 1 : 0); }
};

// Starts the copy of the channels from `first` on of all positions.
template <typename T>
__device__ inline void load_map(const Map<T>& map, const T* x, int channels, int first, int64_t first_position,
                                int positions) {
    const int vectors = map.chunks * kChunk / kVectorSize<T>;
    for (int i = threadIdx.x; i < positions * vectors; i += kGradientThreads) {
        const int position = i / vectors, channel = i % vectors * kVectorSize<T>;
        ptx::cp_async_16(map.cells + map.corner(position) + map.grid.centre() * map.step() + channel,
                         x + (first_position + position) * channels + first + channel);
    }
}

// Starts the copy of dy [positions, rows of the part], zeros up to whole tiles.
template <typename T, int kChunks>
__device__ inline void load_gradient(T* rows, const T* dy, int channels, const Part<kChunks>& part, int64_t first_position,
                                     int positions) {
    const int vectors = part.rows / kVectorSize<T>, padded = round_up(positions, kDepth);
    for (int i = threadIdx.x; i < padded * vectors; i += kGradientThreads) {
        const int position = i / vectors, channel = i % vectors * kVectorSize<T>;
        const bool exists = position < positions;
        ptx::cp_async_16_zfill(rows + position * pitch<T>(part.rows) + channel,
                               dy + (first_position + (exists ? position : 0)) * channels + part.first_row + channel,
                               exists ? kVectorBytes : 0);
    }
}

// sums += dy [positions, rows]ᵀ · the chunks of the input at `offsets`, over positions; kCount tiles of rows.
template <int kCount, int kColumns, typename T, template <typename> class Source>
__device__ inline void multiply_over_positions(float (&sums)[kGradientRows][kColumns][4], const T* dy,
                                               const Source<T>& source, const uint16_t* corners, int positions, int rows,
                                               const int (&offsets)[kColumns], int bias) {
    const int lane = threadIdx.x % kWarpSize, step = pitch<T>(rows);
    if constexpr (kMatrixUnits<T>) {
#pragma unroll 1
        for (int k = 0; k < positions; k += kDepth) {
            uint32_t a[kCount][4], b[kColumns / 2][4];
#pragma unroll
            for (int n = 0; n < kColumns; n += 2) {
                source.columns(b[n / 2], corners + k, offsets[n], offsets[n + 1]);
#pragma unroll
                for (int i = 0; i < 4; ++i) b[n / 2][i] = n + i / 2 == bias ? two_numbers<T>(0x10001) : b[n / 2][i];
            }
#pragma unroll
            for (int m = 0; m < kCount; ++m) {
                const int row = min(m * kTile + lane / 8 % 2 * 8, rows - 8);  // beyond the last, any will do
                ptx::ldmatrix_x4_trans(a[m], dy + (k + lane / 16 * 8 + lane % 8) * step + row);
            }
#pragma unroll
            for (int m = 0; m < kCount; ++m) {
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
                    mma(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1], dy);
                }
            }
        }
    } else {
#pragma unroll 1
        for (int k = 0; k < positions; ++k) {
            float a[kCount][2];
#pragma unroll
            for (int m = 0; m < kCount; ++m) {
                for (int i = 0; i < 2; ++i) a[m][i] = dy[k * step + min(m * kTile + lane / 4 + 8 * i, rows - 1)];
            }
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                float b[2];
                for (int i = 0; i < 2; ++i) {
                    b[i] = n == bias ? 1.0f : source.value(corners[k], offsets[n], lane % 4 * 2 + i);
                }
#pragma unroll
                for (int m = 0; m < kCount; ++m) {
                    for (int i = 0; i < 4; ++i) sums[m][n][i] += a[m][i / 2] * b[i % 2];
                }
            }
        }
    }
}

// The same for `count` tiles: a loop without a branch in it for each number of them.
template <int kMost = kGradientRows, typename... Arguments>
__device__ inline void multiply_tiles_over_positions(int count, Arguments&&... arguments) {
    if (count == kMost) {
        multiply_over_positions<kMost>(arguments...);
    } else if constexpr (kMost > 1) {
        multiply_tiles_over_positions<kMost - 1>(count, arguments...);
    }
}

// `input` is where the first stage of the input goes; load(input, first_position, positions) starts to fill it. Number
// first_j is that of the part's first chunk in it.
template <typename T, template <typename> class Source, int kChunks, typename Load>
__device__ inline void weight_gradient(const T* dy, const Part<kChunks>& part, int all_rows, int all_chunks,
                                       Source<T> input, int first_j, float* partial, int rows, int frames,
                                       const Load& load) {
    extern __shared__ __align__(16) unsigned char memory[];
    using Cell = std::remove_pointer_t<decltype(input.cells)>;
    const Grid grid = input.grid;
    // Two stages of the input and of dy, then the corner of each position.
    const int positions = frames * grid.positions(), padded = round_up(positions, kDepth);
    const int input_size = grid.cells(frames) * input.step(), dy_size = padded * pitch<T>(part.rows);
    input.cells = reinterpret_cast<Cell*>(memory);
    T* gradients = reinterpret_cast<T*>(memory + round_up(2 * input_size * sizeof(Cell), kVectorBytes));
    uint16_t* corners = reinterpret_cast<uint16_t*>(gradients + 2 * dy_size);
    clear(input.cells, 2 * input_size);
    for (int i = threadIdx.x; i < padded; i += kGradientThreads) {
        corners[i] = static_cast<uint16_t>(input.corner(i < positions ? i : 0));
    }
    __syncthreads();

    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    constexpr int kColumns = Part<kChunks>::kColumns;
    const int first_column = warp * kColumns, columns = part.columns() - first_column;
    const int bias = part.chunks * kTaps - first_column;
    int offsets[kColumns];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
        offsets[n] = input.offset(first_j + min(first_column + n, part.chunks * kTaps - 1));
    }
    auto start = [&](int frame, int stage) {
        const int64_t first_position = static_cast<int64_t>(frame) * grid.positions();
        const int count = min(frames, rows - frame) * grid.positions();
        load_gradient(gradients + stage * dy_size, dy, all_rows, part, first_position, count);
        Source<T> other = input;
        other.cells += stage * input_size;
        load(other, first_position, count);
    };

    float sums[kGradientRows][kColumns][4] = {};
    const int first_frame = blockIdx.x * frames, step = gridDim.x * frames;
    if (first_frame < rows) start(first_frame, 0);
    ptx::cp_async_commit();
    for (int frame = first_frame, stage = 0; frame < rows; frame += step, stage ^= 1) {
        if (frame + step < rows) start(frame + step, stage ^ 1);
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();
        __syncthreads();
        Source<T> now = input;
        now.cells += stage * input_size;
        multiply_tiles_over_positions(columns > 0 ? ceil_div(part.rows, kTile) : 0, sums, gradients + stage * dy_size, now,
                                      corners, min(frames, rows - frame) * grid.positions(), part.rows, offsets, bias);
        __syncthreads();  // before the stage is filled again
    }

    // [blocks, all_rows, 9·all_chunks + 1, 8]
    const int all_columns = all_chunks * kTaps + 1;
#pragma unroll
    for (int m = 0; m < kGradientRows; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = m * kTile + lane / 4 + 8 * i;
            if (row >= part.rows) continue;
            const int64_t line = static_cast<int64_t>(blockIdx.x) * all_rows + part.first_row + row;
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                if (n >= columns) continue;
                const int column = n == bias ? all_columns - 1 : part.first_chunk * kTaps + first_column + n;
                const float pair[2] = {sums[m][n][2 * i], sums[m][n][2 * i + 1]};
                store<2>(pair, partial + (line * all_columns + column) * kChunk + lane % 4 * 2);
            }
        }
    }
}

}  // namespace

// block 128; any grid; dynamic shared memory: a slice of the weight, the map, 2 bytes for each position of a group. dout
// becomes dy; what is only read is told apart from it, so that a warp need not wait for one load after another.
#define CONVOLUTIONS_INPUT_GRADIENT(NAME, T)                                                                           \
    extern "C" __global__ void __launch_bounds__(kThreads) convolutions_input_gradient_##NAME(                         \
        const T* __restrict__ weight2, const T* __restrict__ middle, const T* __restrict__ out, T* dout, T* dmiddle,   \
        int32_t middle_channels,                                                                                       \
        int32_t out_channels, int32_t rows, int32_t width, int32_t height, int32_t frames, int32_t chunks) {           \
        input_gradient<T>({weight2, middle_channels, out_channels, nullptr, chunks}, middle, out, dout, dmiddle, rows, \
                          {width, height}, frames);                                                                    \
    }

// Both: grid (blocks, parts) with parts = ⌈channels of dy / rows_per_block⌉·⌈chunks of the input / 5 (map) or 3 (codes)⌉;
// rows_per_block, a multiple of 8, at most 80; block 256; dynamic shared memory: the input twice, rounded up to 16 bytes,
// dy twice, the corners. The number of blocks is part of the result's definition.
// partial [blocks, channels of dy, 9·chunks + 1, 8].
#define CONVOLUTIONS_WEIGHT_GRADIENTS(NAME, T)                                                                         \
    extern "C" __global__ void __launch_bounds__(kGradientThreads) convolutions_weight2_gradient_##NAME(               \
        const T* dy, const T* middle, float* partial, int32_t middle_channels, int32_t out_channels, int32_t rows,     \
        int32_t width, int32_t height, int32_t frames, int32_t rows_per_block) {                                       \
        const int chunks = middle_channels / kChunk;                                                                   \
        const Part<5> part(blockIdx.y, out_channels, rows_per_block, chunks);                                             \
        const Map<T> input{nullptr, {width, height}, part.chunks};                                                     \
        weight_gradient(dy, part, out_channels, chunks, input, 0, partial, rows, frames,                               \
                        [&](const Map<T>& map, int64_t first_position, int positions) {                                \
                            load_map(map, middle, middle_channels, part.first_chunk * kChunk, first_position,          \
                                     positions);                                                                       \
                        });                                                                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kGradientThreads) convolutions_weight1_gradient_##NAME(               \
        const T* dmiddle, const uint8_t* codes, float* partial, uint64_t starts, int32_t fields, int32_t channels,     \
        int32_t middle_channels, int32_t rows, int32_t width, int32_t height, int32_t frames,                          \
        int32_t rows_per_block) {                                                                                      \
        const int chunks = ceil_div(channels, kChunk);                                                                 \
        const Part<3> part(blockIdx.y, middle_channels, rows_per_block, chunks);                                          \
        const Bits<T> input{nullptr, {width, height}, chunks};                                                         \
        const Codes cells{codes, starts, fields, channels};                                                            \
        weight_gradient(dmiddle, part, middle_channels, chunks, input, part.first_chunk * kTaps, partial, rows,        \
                        frames, [&](const Bits<T>& bits, int64_t first_position, int positions) {                      \
                            cells.to_bits(bits, frames, first_position, positions);                                            \
                        });                                                                                            \
    }

CONVOLUTIONS_INPUT_GRADIENT(f32, float)
CONVOLUTIONS_INPUT_GRADIENT(bf16, bf16)
CONVOLUTIONS_INPUT_GRADIENT(f16, f16)
CONVOLUTIONS_WEIGHT_GRADIENTS(f32, float)
CONVOLUTIONS_WEIGHT_GRADIENTS(bf16, bf16)
CONVOLUTIONS_WEIGHT_GRADIENTS(f16, f16)

// dweight1 [channels, 9, middle], dbias1 += Σ partial1 and dweight2 [out, middle, 9], dbias2 += Σ partial2 over the
// blocks. grid (⌈columns/32⌉, 2) with the columns of the larger partial sum, block 256: warp w of a block adds rows w,
// w + 8, … of 32 columns, then the warps are added.
extern "C" __global__ void __launch_bounds__(kGradientThreads)
    convolutions_reduce(const float* partial1, const float* partial2, float* dweight1, float* dbias1, float* dweight2,
                        float* dbias2, int32_t blocks, int32_t channels, int32_t middle_channels, int32_t out_channels) {
    __shared__ float sums[kGradientWarps][kWarpSize];
    const bool first = blockIdx.y == 0;
    const int inputs = first ? channels : middle_channels, outputs = first ? middle_channels : out_channels;
    const int per_row = (ceil_div(inputs, kChunk) * kTaps + 1) * kChunk, columns = outputs * per_row;
    const float* partial = first ? partial1 : partial2;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int index = blockIdx.x * kWarpSize + lane;
    float sum = 0.0f;
    if (index < columns) {
        for (int b = warp; b < blocks; b += kGradientWarps) sum += partial[static_cast<int64_t>(b) * columns + index];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || index >= columns) return;
    float total = 0.0f;
    for (int w = 0; w < kGradientWarps; ++w) total += sums[w][lane];
    const int row = index / per_row, column = index % per_row / kChunk;
    const int channel = column / kTaps * kChunk + index % kChunk, tap = column % kTaps;
    if (column == per_row / kChunk - 1) {
        if (index % kChunk == 0) (first ? dbias1 : dbias2)[row] += total;
    } else if (channel < inputs) {
        if (first) {
            dweight1[(channel * kTaps + tap) * outputs + row] += total;
        } else {
            dweight2[(row * inputs + channel) * kTaps + tap] += total;
        }
    }
}
