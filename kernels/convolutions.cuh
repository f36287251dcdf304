// What the convolutions' kernels share: where cells lie in shared memory, what a tap reads there, and products of a warp.
//
// A convolution is a matrix product whose left side is never written down. Its sums run over numbers j = 9·chunk + tap,
// each the eight channels of a chunk as the neighbour that the tap sees has them. In shared memory those eight lie
// together, at an offset from the position that depends on j alone: so a fragment of mma is read where it lies.
#pragma once

#include "mma.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "types.cuh"

namespace convolutions {

constexpr int kSide = 3;
constexpr int kTaps = kSide * kSide;
constexpr int kChunk = 8;   // channels
constexpr int kTile = 16;   // positions of an mma
constexpr int kDepth = 16;  // terms of an mma
// f32 is for those who want f32; the others gain from matrix units.
template <typename T>
constexpr bool kMatrixUnits = sizeof(T) < sizeof(float);

__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ inline int round_up(int a, int multiple) { return ceil_div(a, multiple) * multiple; }

__device__ inline uint32_t bits_of_one(const bf16*) { return 0x3f80; }
__device__ inline uint32_t bits_of_one(const f16*) { return 0x3c00; }
// Bits 0 and 16 as two numbers.
template <typename T>
__device__ inline uint32_t two_numbers(uint32_t bits) {
    return (bits & 0x10001) * bits_of_one(static_cast<const T*>(nullptr));
}

// Unlike fmaxf, this lets a NaN through.
__device__ inline float relu(float x) { return x < 0.0f ? 0.0f : x; }

// --- Cells. The frames of a group stand below each other, one empty row of cells between two, one empty cell between two
// rows. So the neighbours of every position exist, and each is at a fixed distance.

struct Grid {
    int width, height;

    __device__ int positions() const { return width * height; }
    // Cells from one row to the next.
    __device__ int row() const { return height + 1; }
    __device__ int cells(int frames) const { return (frames * (width + 1) + 1) * row() + 1; }
    // From a position's first tap to itself.
    __device__ int centre() const { return row() + 1; }
    // The cell under the first tap of a position; positions are counted through the frames.
    __device__ int corner(int position) const {
        const int frame = position / positions(), within = position % positions();
        return (frame * (width + 1) + within / height) * row() + within % height;
    }
    // The position of a cell, or −1 between them.
    __device__ int position(int cell) const {
        const int line = cell / row(), column = cell % row() - 1;
        const int frame = line / (width + 1), within = line % (width + 1) - 1;
        return within < 0 || column < 0 ? -1 : frame * positions() + within * height + column;
    }
    __device__ int tap(int tap) const { return tap / kSide * row() + tap % kSide; }
};

// Elements from cell to cell: eight rows of a matrix, or the reads of four lanes, then lie in different banks.
template <typename T>
__device__ constexpr int pitch(int channels) {
    return kMatrixUnits<T> ? ((channels / kChunk) | 1) * kChunk : channels + 4;
}

// A feature map.
template <typename T>
struct Map {
    static constexpr int kCorners = kMatrixUnits<T> ? 1 : 2;

    T* cells;
    Grid grid;
    int chunks;

    __device__ int step() const { return pitch<T>(chunks * kChunk); }
    // The positions of a tile that a lane needs the corners of.
    __device__ static int row(int i) {
        const int lane = threadIdx.x % kWarpSize;
        return kMatrixUnits<T> ? lane % kTile : lane / 4 + 8 * i;
    }
    __device__ int corner(int position) const { return grid.corner(position) * step(); }
    __device__ int offset(int j) const {
        const int chunk = min(j / kTaps, chunks - 1);  // beyond the last, any will do: its weights are 0
        return grid.tap(j % kTaps) * step() + chunk * kChunk;
    }

    // For rows(): of j for the lanes that read its channels, of j + 1 for the others.
    __device__ int offsets(int j) const { return offset(j + static_cast<int>(threadIdx.x) % kWarpSize / kTile); }
    // Rows: 16 positions; columns: the channels of j and of j + 1.
    __device__ void rows(uint32_t (&a)[4], const int (&corner)[1], int offsets) const {
        ptx::ldmatrix_x4(a, cells + corner[0] + offsets);
    }
    // Rows: the 16 positions from `corners` on; columns: the channels at two offsets.
    __device__ void columns(uint32_t (&b)[4], const uint16_t* corners, int offset0, int offset1) const {
        const int lane = threadIdx.x % kWarpSize;
        ptx::ldmatrix_x4_trans(b, cells + corners[lane % kTile] + (lane < kTile ? offset0 : offset1));
    }
    // Channel `e` of a chunk.
    __device__ float value(int corner, int offset, int e) const { return widen(cells[corner + offset + e]); }
};

// One-hot cells: a bit for each channel.
template <typename T>
struct Bits {
    static constexpr int kCorners = 2;

    uint8_t* cells;
    Grid grid;
    int chunks;

    __device__ int step() const { return chunks; }
    __device__ static int row(int i) { return static_cast<int>(threadIdx.x) % kWarpSize / 4 + 8 * i; }
    __device__ int corner(int position) const { return grid.corner(position) * chunks; }
    __device__ int offset(int j) const {
        const int chunk = min(j / kTaps, chunks - 1);
        return grid.tap(j % kTaps) * chunks + chunk;
    }

    __device__ int2 offsets(int j) const { return {offset(j), offset(j + 1)}; }
    __device__ void rows(uint32_t (&a)[4], const int (&corner)[2], int2 offsets) const {
        const int shift = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t byte = cells[corner[i % 2] + (i < 2 ? offsets.x : offsets.y)] >> shift;
            a[i] = two_numbers<T>(byte | byte << 15);
        }
    }
    __device__ void columns(uint32_t (&b)[4], const uint16_t* corners, int offset0, int offset1) const {
        const int lane = threadIdx.x % kWarpSize, channel = lane / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint16_t* two = corners + lane % 4 * 2 + i % 2 * 8;
            const int offset = i < 2 ? offset0 : offset1;
            const uint32_t low = cells[two[0] + offset] >> channel, high = cells[two[1] + offset] >> channel;
            b[i] = two_numbers<T>((low & 1) | high << 16);
        }
    }
    __device__ float value(int corner, int offset, int e) const {
        return static_cast<float>(cells[corner + offset] >> e & 1);
    }
};

// The codes of observations, and how they become channels: byte f of `starts` is the first channel of field f.
struct Codes {
    static constexpr int kMostFields = 8;

    const uint8_t* values;  // [rows, positions·fields]
    uint64_t starts;
    int fields, channels;

    __device__ int start(int field) const {
        return field < fields ? static_cast<int>(starts >> 8 * field & 0xff) : channels;
    }

    // Fills all cells of a group of `frames`; reads a cell's codes at once. One that is no value of its field is no
    // channel.
    template <typename T>
    __device__ void to_bits(const Bits<T>& bits, int frames, int64_t first_position, int positions) const {
        for (int cell = threadIdx.x; cell < bits.grid.cells(frames); cell += blockDim.x) {
            const int position = bits.grid.position(cell);
            uint8_t* bytes = bits.cells + cell * bits.chunks;
            for (int chunk = 0; chunk < bits.chunks; ++chunk) bytes[chunk] = 0;
            if (position < 0 || position >= positions) continue;
            int channel[kMostFields];
#pragma unroll
            for (int field = 0; field < kMostFields; ++field) {
                if (field < fields) channel[field] = start(field) + values[(first_position + position) * fields + field];
            }
#pragma unroll
            for (int field = 0; field < kMostFields; ++field) {
                if (field >= fields || channel[field] >= start(field + 1)) continue;
                bytes[channel[field] / kChunk] |= 1 << channel[field] % kChunk;
            }
        }
    }
};

// Sets all of a buffer to zero; ends without a barrier.
template <typename E>
__device__ inline void clear(E* memory, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) memory[i] = E{};
}

// --- A convolution: what a block of kWarps warps does for a group of frames.

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = 5;     // tiles of 16 positions that a warp owns at a time,
constexpr int kColumns = 5;  // and of eight channels of the output

// How a weight lies in device memory.
enum class Order {
    kInputMajor,   // [channels, 9, rows]
    kOutputMajor,  // [rows, channels, 9]
    kTransposed,   // [channels, rows, 9], the taps turned round: the convolution's transpose
};

template <typename T, Order kOrder>
struct Weights {
    const T* values;
    int rows, channels;
    T* slice;    // [rows, pitch] in shared memory
    int chunks;  // in a slice
    int held = -1;

    // Nine for each chunk, an even number for mma, and 16 bytes against bank conflicts.
    __device__ int pitch() const { return round_up(chunks * kTaps, 2) * kChunk + kVectorSize<T>; }

    // Makes sure that the slice which begins at `chunk` is in shared memory. Every thread calls it.
    __device__ void hold(int chunk) {
        if (held == chunk) return;
        held = chunk;
        __syncthreads();  // the slice before has been used
        const int first = chunk * kChunk, count = min(chunks * kChunk, round_up(channels - first, kChunk));
        // Lines of neighbours in memory, whole vectors of them.
        const int length = kOrder == Order::kInputMajor ? rows : (kOrder == Order::kOutputMajor ? count : rows) * kTaps;
        const int lines = kOrder == Order::kInputMajor ? count * kTaps : kOrder == Order::kOutputMajor ? rows : count;
#pragma unroll 4
        for (int i = threadIdx.x * kSize; i < lines * length; i += kThreads * kSize) {
            const int line = i / length, start = i % length;
            Vector<T, kSize> vector{};
            if (kOrder != Order::kInputMajor || first + line / kTaps < channels) {
                vector = *reinterpret_cast<const Vector<T, kSize>*>(values + line_start(line, first) + start);
            }
#pragma unroll
            for (int e = 0; e < kSize; ++e) *place(line, start + e) = vector.values[e];
        }
        if (count / kChunk % 2 != 0) {  // the last of an odd number
            for (int i = threadIdx.x; i < rows * kChunk; i += kThreads) {
                slice[i / kChunk * pitch() + count * kTaps + i % kChunk] = T{};
            }
        }
        __syncthreads();
    }

private:
    static constexpr int kSize = kVectorSize<T>;

    __device__ int line_start(int line, int first) const {
        if (kOrder == Order::kInputMajor) return (first * kTaps + line) * rows;
        if (kOrder == Order::kOutputMajor) return (line * channels + first) * kTaps;
        return (first + line) * rows * kTaps;
    }
    // Where element `at` of a line belongs.
    __device__ T* place(int line, int at) const {
        if (kOrder == Order::kInputMajor) return place(at, line / kTaps, line % kTaps);
        if (kOrder == Order::kOutputMajor) return place(line, at / kTaps, at % kTaps);
        return place(at / kTaps, line, kTaps - 1 - at % kTaps);
    }
    __device__ T* place(int row, int channel, int tap) const {
        return slice + row * pitch() + (channel / kChunk * kTaps + tap) * kChunk + channel % kChunk;
    }
};

// sums += the taps of kCount tiles of positions × the slice at `chunk` for five tiles of channels.
template <int kCount, typename T, template <typename> class Source, Order kOrder>
__device__ inline void multiply(float (&sums)[kRows][kColumns][4], const Source<T>& source,
                                const int (&corners)[kRows][Source<T>::kCorners], const Weights<T, kOrder>& weights,
                                int column_tile, int chunk) {
    const int lane = threadIdx.x % kWarpSize;
    const int terms = min(weights.chunks, source.chunks - chunk) * kTaps, first = chunk * kTaps;
    const int last = weights.rows / kChunk - 1, pitch = weights.pitch();
    if constexpr (kMatrixUnits<T>) {
        const T* columns[kColumns / 2 + 1];  // a row of the weights that this lane reads, for two tiles at a time
#pragma unroll
        for (int n = 0; n < kColumns; n += 2) {
            const int tile = min(column_tile + n + lane / 16, last);
            columns[n / 2] = weights.slice + (tile * kChunk + lane % 8) * pitch + lane / 8 % 2 * kChunk;
        }
        auto offsets = source.offsets(first);
#pragma unroll 1
        for (int j = 0; j < terms; j += 2) {
            uint32_t a[kCount][4], b[kColumns / 2 + 1][4];
#pragma unroll
            for (int n = 0; n < kColumns; n += 2) ptx::ldmatrix_x4(b[n / 2], columns[n / 2] + j * kChunk);
#pragma unroll
            for (int m = 0; m < kCount; ++m) source.rows(a[m], corners[m], offsets);
            offsets = source.offsets(first + j + 2);  // while the matrix units work
#pragma unroll
            for (int m = 0; m < kCount; ++m) {
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
                    mma(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1], weights.slice);
                }
            }
        }
    } else {
        const T* columns[kColumns];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
            columns[n] = weights.slice + (min(column_tile + n, last) * kChunk + lane % 4 * 2) * pitch;
        }
#pragma unroll 1
        for (int j = 0; j < terms; ++j) {
            const int offset = source.offset(first + j);
#pragma unroll 2
            for (int e = 0; e < kChunk; ++e) {
                float b[kColumns][2];
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
                    for (int i = 0; i < 2; ++i) b[n][i] = columns[n][i * pitch + j * kChunk + e];
                }
#pragma unroll
                for (int m = 0; m < kCount; ++m) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float a = source.value(corners[m][i], offset, e);
#pragma unroll
                        for (int n = 0; n < kColumns; ++n) {
                            sums[m][n][i * 2] += a * b[n][0];
                            sums[m][n][i * 2 + 1] += a * b[n][1];
                        }
                    }
                }
            }
        }
    }
}

// The same for `count` tiles: a loop without a branch in it for each number of them.
template <int kMost = kRows, typename... Arguments>
__device__ inline void multiply_tiles(int count, Arguments&&... arguments) {
    if (count == kMost) {
        multiply<kMost>(arguments...);
    } else if constexpr (kMost > 1) {
        multiply_tiles<kMost - 1>(count, arguments...);
    }
}

// The convolution of `positions` positions; gives each pair of neighbouring channels to finish(position)(channel, pair).
// What the source holds must be seen by all threads. Every thread calls it.
template <typename T, template <typename> class Source, Order kOrder, typename Finish>
__device__ inline void convolve(const Source<T>& source, Weights<T, kOrder>& weights, int positions,
                                const Finish& finish) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int row_tiles = ceil_div(positions, kTile), column_tiles = weights.rows / kChunk;
    const int column_groups = ceil_div(column_tiles, kColumns);
    // Tiles of positions for a warp at a time, so that all warps have the same number of turns.
    const int tiles = row_tiles * column_groups;
    const int share = ceil_div(tiles, kWarps * ceil_div(tiles, kWarps * kRows));
    const int units = ceil_div(row_tiles, share) * column_groups;
    for (int first = 0; first < units; first += kWarps) {
        const int row_tile = (first + warp) / column_groups * share;
        const int column_tile = (first + warp) % column_groups * kColumns;
        const int count = min(share, row_tiles - row_tile);  // none, or less, where there is nothing left for the warp
        int corners[kRows][Source<T>::kCorners];
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
#pragma unroll
            for (int i = 0; i < Source<T>::kCorners; ++i) {
                const int position = (row_tile + m) * kTile + Source<T>::row(i);
                corners[m][i] = source.corner(position < positions ? position : 0);
            }
        }
        float sums[kRows][kColumns][4] = {};
        for (int chunk = 0; chunk < source.chunks; chunk += weights.chunks) {
            weights.hold(chunk);
            multiply_tiles(count, sums, source, corners, weights, column_tile, chunk);
        }
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int position = (row_tile + m) * kTile + lane / 4 + 8 * i;
                if (m >= count || position >= positions) continue;
                const auto finish_pair = finish(position);
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
                    if (column_tile + n >= column_tiles) continue;
                    float pair[2] = {sums[m][n][2 * i], sums[m][n][2 * i + 1]};
                    finish_pair((column_tile + n) * kChunk + lane % 4 * 2, pair);
                }
            }
        }
    }
}

}  // namespace convolutions
