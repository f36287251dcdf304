// What the attention kernels for compute capability 9.0 share: blocks of two warpgroups, and their tiles and products.
#pragma once

#include "attention.cuh"
#include "warpgroup.cuh"

namespace attention {

constexpr int kGroups = 2;  // warpgroups of a block
constexpr int kBlock = kGroups * warpgroup::kThreads;
constexpr int kBlockRows = kGroups * warpgroup::kRows;

// Tiles that one warp fills and other warps use, over and over: tile n = 0, 1, … stands at place n % kPlaces. `filled` goes
// a phase further when a tile is there, `emptied` when every user has released one. All lanes of a warp call together.
template <int kPlaces, int kSize, typename T>
struct Ring {
    T* tiles;
    uint64_t *filled, *emptied;  // [kPlaces] each

    __device__ Ring(T* tiles, uint64_t* barriers) : tiles(tiles), filled(barriers), emptied(barriers + kPlaces) {}

    __device__ T* tile(int n) const { return tiles + n % kPlaces * kSize; }
    __device__ uint64_t* barrier(int n) const { return filled + n % kPlaces; }

    __device__ void init(int users) const {
        for (int i = 0; i < kPlaces; ++i) {
            ptx::mbarrier_init(filled + i, 1);
            ptx::mbarrier_init(emptied + i, users);
        }
    }
    // The first round finds its places empty: it waits for the phase before the first, which counts as over.
    __device__ void wait_until_empty(int n) const {
        ptx::mbarrier_wait(emptied + n % kPlaces, (n / kPlaces + 1) % 2);
        __syncwarp();  // else one lane could take the ring further than another's wait can tell
    }
    __device__ void wait_until_filled(int n) const { ptx::mbarrier_wait(filled + n % kPlaces, n / kPlaces % 2); }
    __device__ void release(int n) const {
        __syncwarp();
        if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(emptied + n % kPlaces);
    }
    __device__ void skip(int n) const {
        wait_until_filled(n);  // else a user could release a place twice in one phase
        release(n);
    }
};

// Warpgroups that begin something one after another, turn by turn. It orders no memory and nothing depends on it: it keeps
// them out of step. Named barriers from 1 on.
template <int kCount>
struct Turns {
    int own;

    __device__ void open() const {
        if (own == kCount - 1) pass();
    }
    __device__ void begin() const { ptx::barrier_sync(1 + own, 2 * warpgroup::kThreads); }
    // `last`: nobody has a turn behind this one.
    __device__ void end(bool last) const {
        if (!last || own < kCount - 1) pass();
    }
    __device__ void pass() const { ptx::barrier_arrive(1 + (own + 1) % kCount, 2 * warpgroup::kThreads); }
};

// Starts the copy of `kCount` rows, zeros from `count` on. A thread has one column: the rows of its pieces are equal
// modulo 8, and so is their place in the row.
template <int kCount, int kWidth, typename T>
__device__ inline void load_swizzled(T* tile, const T* rows, int64_t stride, int count) {
    constexpr int kPieces = kWidth / kVectorSize<T>, kStep = kBlock / kPieces;
    static_assert(kStep % 8 == 0 && kCount % kStep == 0);
    const int first = static_cast<int>(threadIdx.x) / kPieces;
    const int column = static_cast<int>(threadIdx.x) % kPieces * kVectorSize<T>;
    T* to = warpgroup::place<kCount>(tile, first, column);
    const T* from = rows + first * stride + column;
#pragma unroll
    for (int row = 0; row < kCount; row += kStep) {
        const bool exists = first + row < count;
        ptx::cp_async_16_zfill(to + row * warpgroup::kPanel, exists ? from + row * stride : rows,
                               exists ? kVectorBytes : 0);
    }
}

// d [64, 8·kN] = the block's `kOwn` rows from `row` on · the other side's from `other_row` on, transposed, over their
// width: one group of products. A tile of the other side has `kOthers` rows.
template <int kWidth, int kOthers, int kOwn = kBlockRows, int kN, typename T>
__device__ inline void start_scores(float (&d)[kN][4], const T* own, int row, const T* other, int other_row) {
#pragma unroll
    for (int column = 0; column < kWidth; column += warpgroup::kDepth) {
        warpgroup::multiply<0>(d, warpgroup::of_columns<kOwn>(own, row, column),
                               warpgroup::of_columns<kOthers>(other, other_row, column), column > 0, own);
    }
    ptx::wgmma_commit();
}

// d [64, 8·kN] += a · the other side's rows, as many as a has columns: one group of products.
template <int kDepths, int kN, typename T>
__device__ inline void start_sum(float (&d)[kN][4], const uint32_t (&a)[kDepths][4], const T* other) {
#pragma unroll
    for (int depth = 0; depth < kDepths; ++depth) {
        warpgroup::multiply<1>(
            d, a[depth], warpgroup::of_rows<kDepths * warpgroup::kDepth>(other, depth * warpgroup::kDepth), true, other);
    }
    ptx::wgmma_commit();
}

// What a product gave as the left factor of the next, rounded. The last argument only says the type.
template <int kTiles, typename T>
__device__ inline void to_factor(const float (&x)[kTiles][4], uint32_t (&a)[kTiles / 2][4], const T* type) {
#pragma unroll
    for (int depth = 0; depth < kTiles / 2; ++depth) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const auto& from = x[depth * 2 + i / 2];
            a[depth][i] = pack(from[i % 2 * 2], from[i % 2 * 2 + 1], type);
        }
    }
}

}  // namespace attention
