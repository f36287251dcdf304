// Tiles in shared memory that the products of a warpgroup read (ptx_warpgroup.cuh), and these products by type.
//
// A tile of 16-bit numbers, R rows × W columns, is cut into panels of 64 columns: R·128 bytes each, panel after panel.
// In a panel the 16-byte piece c of row r stands in row r at place c ^ r%8, so that eight rows of one piece lie in
// different banks. That is the 128-byte swizzle of the PTX manual, for either major-ness; with a panel's first byte at
// a multiple of 1024, a piece's place follows from its address, bits 4–6 ^= bits 7–9, and a descriptor may begin at any
// 32 bytes of the first row.
#pragma once

#include "ptx_warpgroup.cuh"
#include "types.cuh"

namespace warpgroup {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // of a product
constexpr int kDepth = 16;
constexpr int kPanel = 64;  // columns
constexpr int kTileAlignment = 1024;

template <int kRows, typename T>
__device__ inline T* place(T* tile, int row, int column) {
    static_assert(sizeof(T) == 2);
    const int piece = column % kPanel / kVectorSize<T> ^ row % 8;
    return tile + (column / kPanel * kRows + row) * kPanel + piece * kVectorSize<T> + column % kVectorSize<T>;
}

// What the instruction is told of a matrix: where it begins, `offset` bytes into a tile, and two distances in bytes. The
// offset is added last, so that the products of a tile have one sum each for it.
__device__ inline uint64_t descriptor(uint32_t tile, int offset, int leading, int stride) {
    constexpr uint32_t kSwizzle128 = uint32_t{1} << 30;
    const auto field = [](uint32_t bytes) { return (bytes & 0x3ffff) >> 4; };
    const uint32_t low = (field(static_cast<uint32_t>(leading)) << 16 | field(tile)) + static_cast<uint32_t>(offset) / 16;
    return uint64_t{kSwizzle128 | field(static_cast<uint32_t>(stride))} << 32 | low;
}

// 16 columns of a tile from `column` on, a multiple of 16, for the rows from `row` on, a multiple of 8: an operand whose
// columns are the depth. Eight rows are 1024 bytes; there is no other distance within 16 columns.
template <int kRows, typename T>
__device__ inline uint64_t of_columns(const T* tile, int row, int column) {
    const int first = (column / kPanel * kRows + row) * kPanel + column % kPanel;
    return descriptor(ptx::shared_address(tile), first * static_cast<int>(sizeof(T)), 16, 8 * kPanel * sizeof(T));
}

// 16 rows of a tile from `row` on, a multiple of 8, all columns: an operand whose rows are the depth (`kTransposed`).
template <int kRows, typename T>
__device__ inline uint64_t of_rows(const T* tile, int row) {
    return descriptor(ptx::shared_address(tile), row * kPanel * static_cast<int>(sizeof(T)), kRows * kPanel * sizeof(T),
                      8 * kPanel * sizeof(T));
}

// d (+)= a·b. The last argument only says the type.
#define WARPGROUP_MULTIPLY(N, T)                                                                                       \
    template <int kTransposed, typename A>                                                                             \
    __device__ inline void multiply(float (&d)[N / 8][4], const A& a, uint64_t b, bool adds, const T*) {               \
        ptx::wgmma_m64n##N##k16_##T<kTransposed>(d, a, b, adds);                                                       \
    }
WARPGROUP_MULTIPLY(16, bf16)
WARPGROUP_MULTIPLY(16, f16)
WARPGROUP_MULTIPLY(64, bf16)
WARPGROUP_MULTIPLY(64, f16)
WARPGROUP_MULTIPLY(128, bf16)
WARPGROUP_MULTIPLY(128, f16)
#undef WARPGROUP_MULTIPLY

}  // namespace warpgroup
