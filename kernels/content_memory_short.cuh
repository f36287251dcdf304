// What the kernels of content_memory for short segments share: a tile of slots with all their columns in shared memory, and
// what blocks that have tiles of one memory tell each other.
#pragma once

#include "content_memory.cuh"

namespace {

constexpr int kMostTokens = 64;
constexpr int kRows = 16;  // of a matrix instruction
constexpr int kMostTile = 96;
constexpr int kParts = 2;   // address and strength
constexpr int kHalves = 2;  // of the tokens; a warp has one
constexpr int kFragments = kMostTokens / kHalves / 8;
constexpr int kStep = 64;  // columns
constexpr int kGap = 8;    // elements behind a row: rows of a matrix then lie in different banks

// The tile and the segment of a block.
struct Place {
    int64_t first_token, first_slot;  // among those of all sequences
    int tokens, rows;                 // rows: tokens, rounded up to whole matrices
    int slots, tile;                  // the same of slots: those beyond are 0 in the tile

    __device__ Place(const int32_t* offsets, int slots_of_memory, int slots_of_tile)
        : tile((slots_of_tile + kRows - 1) / kRows * kRows) {
        const Sequence sequence(offsets, blockIdx.y);
        const int before = blockIdx.x * slots_of_tile;
        first_token = sequence.first;
        first_slot = static_cast<int64_t>(blockIdx.y) * slots_of_memory + before;
        tokens = sequence.tokens;
        rows = (tokens + kRows - 1) / kRows * kRows;
        slots = max(0, min(slots_of_tile, slots_of_memory - before));
    }
};

// The first `columns` of a tile of slots of `width`, in shared memory: `ring` steps of columns at a time.
template <typename T>
struct Tile {
    T* first;
    int ring, columns, width;

    __device__ int pitch() const { return ring * kStep + kGap; }
    __device__ T* at(int slot, int column) const { return first + slot * pitch() + column; }
    // Where the columns of a step stand in the ring.
    __device__ int column(int step) const { return step % ring * kStep; }
    __device__ T* end(const Place& place) const { return first + place.tile * pitch(); }

    // Starts to copy columns step·64 … of the memory.
    __device__ void load(const T* memory, const Place& place, int step) const {
        for (int n = threadIdx.x; n < place.tile * (kStep / 8); n += kThreads) {
            const int slot = n / (kStep / 8), piece = n % (kStep / 8) * 8, from = step * kStep + piece;
            if (from >= columns) continue;
            const bool real = slot < place.slots;
            const T* source = real ? memory + (place.first_slot + slot) * width + from : memory;
            ptx::cp_async_16_zfill(at(slot, column(step) + piece), source, real ? kVectorBytes : 0);
        }
    }
};

struct Norms {
    float slots[kMostTile];
    float tokens[kMostTokens];
};

// Of a row over slots: x − max is at most 0, and the sum belongs to this maximum.
struct Stats {
    float most, sum;
};
using StatsOfTokens = Stats[kParts][kMostTokens];

// Of all tiles: `of(tile, part, token)` has each one's. The sum becomes its inverse. Every thread calls it.
template <typename Of>
__device__ inline void combine(int tiles, const Place& place, StatsOfTokens& all, const Of& of) {
    const int p = threadIdx.x / kMostTokens, token = threadIdx.x % kMostTokens;
    if (p < kParts && token < place.tokens) {
        float most = -INFINITY, sum = 0.0f;
        for (int n = 0; n < tiles; ++n) most = fmaxf(most, of(n, p, token).most);
        for (int n = 0; n < tiles; ++n) {
            const Stats one = of(n, p, token);
            if (one.sum > 0.0f) sum += one.sum * expf(one.most - most);
        }
        all[p][token] = {most, 1.0f / sum};
    }
    __syncthreads();
}

// --- Clusters: the tile comes by bulk copies

[[maybe_unused]] constexpr int kFetchColumns = 256;  // of a slot, by one bulk copy
[[maybe_unused]] constexpr int kMostFetches = 32;    // what fits into shared memory is narrower

// `copy(slot)` for all slots of the tile: the first lanes of the block's warps take turns.
template <int kCrew, typename Copy>
__device__ inline void each_slot(const Place& place, const Copy& copy) {
    if (threadIdx.x % kWarpSize != 0) return;
    for (int slot = threadIdx.x / kWarpSize; slot < place.slots; slot += kCrew) copy(slot);
}

// Starts to copy the whole tile, `kFetchColumns` for each of the barriers. It has places for so many slots; those beyond
// the ones that exist become 0.
template <int kCrew, typename T>
__device__ inline void fetch_tile(const T* memory, const Place& place, const Tile<T>& tile, int places,
                                  uint64_t* fetched) {
    const int fetches = (tile.width + kFetchColumns - 1) / kFetchColumns;
    if (threadIdx.x == 0) {
        for (int n = 0; n < fetches; ++n) ptx::mbarrier_init(fetched + n, 1);
        ptx::fence_proxy_async();
    }
    __syncthreads();
    for (int n = 0; n < fetches; ++n) {
        const int column = n * kFetchColumns, bytes = min(kFetchColumns, tile.width - column) * static_cast<int>(sizeof(T));
        if (threadIdx.x == 0) ptx::mbarrier_arrive(fetched + n, place.slots * bytes);
        each_slot<kCrew>(place, [&](int slot) {
            ptx::bulk_load(tile.at(slot, column), memory + (place.first_slot + slot) * tile.width + column, bytes,
                           fetched + n);
        });
    }
    const int beyond = places - place.slots, vectors = tile.width / kVectorSize<T>;
    for (int n = threadIdx.x; n < beyond * vectors; n += kCrew * kWarpSize) {
        const float zeros[kVectorSize<T>] = {};
        store(zeros, tile.at(place.slots + n / vectors, n % vectors * kVectorSize<T>));
    }
}

}  // namespace
