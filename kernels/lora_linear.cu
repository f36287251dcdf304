// A linear map with low-rank adapters, and the gradient of its input. Reference: lora_linear.rs; SPEC section 5.
//
//   forward    y  = x·Wᵀ + b + s·h·Bᵀ over the outputs of each adapter,  h = (x∘keep)·Aᵀ
//   backward   dx = dy·W + s·keep∘(g·A) summed over the adapters,        g = dy·B over the outputs of each
//
// Both are one product of a row with a weight, to whose columns an adapter of rank r adds `r` columns (`down`: A
// forward, B backward), from which `up` (B forward, A backward) leads back. A transposed map y = x·W swaps the two:
// there are two layouts of the weight, and both passes of both maps are one of them:
//
//                         columns from        weight              down                up
//   lora_linear           Wᵀ: forward         [columns, depth]    [rank, depth]       [columns, rank]
//   lora_linear_transposed W: backward        [depth, columns]    [depth, rank]       [rank, columns]
//   (of a transposed map: backward and forward)
//
// Adapters divide the outputs among themselves: forward each has some of the columns, backward some of the depth. Rows
// offsets[g] to offsets[g + 1] use set sets[g] of the factors, which lie one after another, or none where it is
// negative; without groups (null) all rows use the first. x, y: rows with a stride, aligned to 16 bytes like the
// weight; depth, columns and the adapters' outputs are multiples of 16 bytes, ranks up to 64 (multiples of 16 bytes are
// copied faster). h [rows, Σ rank] in the storage type, 0 where a group has no adapter. `keep` [rows, ⌈inputs/32⌉]:
// bits of the elements of x that dropout keeps, or null; its scale goes with s. s·(…) is in f32, h is rounded before it
// is multiplied back.
//
// A block owns a tile of y: 128 rows × 256 columns (`wide`: eight warps of 64 × 64) or 64 × 64 (`small`: four of 32 ×
// 32). The tile of an adapter, and of a group, begins where that begins. The depth goes by in steps of 64 bytes, three
// stages deep in shared memory, and the weight's tile is extended by the columns of the adapter, so that h comes out of
// the same pass over x: 16 rows of it in each warp's registers. When its range of the depth is over, h goes to shared
// memory in the place of x, and `up` in that of the weight: one more step. The result leaves through shared memory, by
// 16 bytes.
//
// grid (tiles of columns, tiles of rows); block 256 or 128; dynamic shared memory 3·32768 or 3·12800 bytes.
// Blocks of neighbouring columns run side by side: x is read from device memory once, W comes from the second level
// cache.
//
// Bytes: x, y and W once, h, which is Σ rank / (inputs + outputs) more: 2.3 % for q, k, v of rank 16 at width 512.
// Operations: of a plain product, plus the share that r columns are of a tile (every tile of an adapter computes h
// anew) and r, rounded up to 16, ranks are of the depth. Wide tiles at depth 512: 1.094 for rank 16, 1.063 for rank 8.
// Bound by the matrix units from about 300 operations a byte on; q, k, v at width 512 in bf16 have 380. Expected
// against the plain product by the same kernel: at most those ratios; an unfused adapter reads x again, and y twice.
// In the machine code (bf16, wide, sm_80) 16 of the depth are 51 instructions, 32 of them HMMA and 8 LDSM, and 2 HMMA
// more for rank 16. On Hopper mma.sync has about 60 % of the rate of wgmma, and so of cuBLASLt's products.
//
// History (not measured on a GPU yet)
//   1  mma.sync, three stages of cp.async, swizzled tiles
//   2  a thread copies parts of one column and keeps few addresses over the steps, y gets 32 columns of a step of ranks at
//      a time, and ptxas is told how many blocks there will be: no spills, half of the instructions

#include "lora_product.cuh"

namespace {

using namespace lora;

constexpr int kStages = 3;
constexpr int kStepBytes = 64;  // of a row, or of a column of the weight, in a step of depth

template <typename T>
constexpr int kDepth = kStepBytes / static_cast<int>(sizeof(T));

template <bool kWide>
struct Tile {
    static constexpr int kRows = kWide ? 128 : 64;
    static constexpr int kColumns = kWide ? 256 : 64;
    static constexpr int kSide = kWide ? 64 : 32;  // rows, and columns, of a warp
    static constexpr int kWarpsAcross = kColumns / kSide;
    static constexpr int kWarps = kRows / kSide * kWarpsAcross;
    static constexpr int kThreads = kWarps * kWarpSize;
    // Blocks that a multiprocessor is to hold: left to itself, ptxas (13.0) spills for one more.
    static constexpr int kResident = kWide ? 1 : 3;
    static_assert(kWarps * 16 == kRows, "each warp has 16 rows of h");
};

// What a step of depth needs in shared memory. The weight's tile is extended by the columns of the adapter.
template <typename T, bool kWide, bool kAcross>
struct Stage {
    using Sizes = Tile<kWide>;
    static constexpr int kExtended = Sizes::kColumns + kMaxRank;
    static constexpr int kWeightAt = Sizes::kRows * kStepBytes;
    static constexpr int kKeepAt = kWeightAt + kExtended * kStepBytes;
    static constexpr int kWords = Sizes::kColumns / 32;
    static constexpr int kBytes = kKeepAt + Sizes::kRows * kWords * static_cast<int>(sizeof(uint32_t));

    Swizzled<T, kDepth<T>> x;                                   // [row][depth]
    Swizzled<T, kAcross ? kExtended : kDepth<T>> weight;        // [depth][column] if kAcross, else [column][depth]
    uint32_t* keep;  // forward: of the step's depth, a word for each row; backward: of the columns, kWords for each row

    __device__ Stage(unsigned char* memory, int number)
        : x{reinterpret_cast<T*>(memory + number * kBytes)},
          weight{reinterpret_cast<T*>(memory + number * kBytes + kWeightAt)},
          keep(reinterpret_cast<uint32_t*>(memory + number * kBytes + kKeepAt)) {}
};

// Which elements dropout has kept, of this lane's two rows: bit k of the words.
struct Keep {
    uint32_t words[2];

    __device__ bool holds(int half, int k) const { return words[half] >> k & 1u; }
    // For two neighbours of 16 bits.
    __device__ uint32_t mask(int half, int k) const {
        return (holds(half, k) ? 0xffffu : 0u) | (holds(half, k + 1) ? 0xffff0000u : 0u);
    }
};

struct KeepAll {
    __device__ bool holds(int, int) const { return true; }
    __device__ uint32_t mask(int, int) const { return 0xffffffffu; }
};

// d [16·kM, 8·kN] += x·weight over a step, or its first `depth`, without the columns from `columns` on. Rows and
// columns begin at `row` and `column` of the tiles.
template <int kM, int kN, typename T, bool kWide, bool kAcross, typename Kept>
__device__ inline void multiply(float (&d)[kM][kN][4], const Stage<T, kWide, kAcross>& stage, int row, int column,
                                int depth, int columns, Kept kept) {
    const int lane = threadIdx.x % kWarpSize;
    const auto x = stage.x;
    const auto weight = stage.weight;
    if constexpr (sizeof(T) == 2) {
#pragma unroll 1  // wide tiles have no registers for more
        for (int k = 0; k < kDepth<T>; k += 16) {
            if (k >= depth) continue;
            uint32_t rows[kM][4];
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                ptx::ldmatrix_x4(rows[m], x.at(row + m * 16 + lane % 16, k + lane / 16 * 8));
#pragma unroll
                for (int i = 0; i < 4; ++i) rows[m][i] &= kept.mask(i % 2, k + i / 2 * 8 + lane % 4 * 2);
            }
#pragma unroll
            for (int n = 0; n < kN; n += 2) {
                if (n * 8 >= columns) continue;
                const int first = column + n * 8;
                uint32_t pair[4];
                if constexpr (kAcross) {
                    ptx::ldmatrix_x4_trans(pair, weight.at(k + lane % 16, first + lane / 16 * 8));
                } else {
                    ptx::ldmatrix_x4(pair, weight.at(first + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
                }
#pragma unroll
                for (int m = 0; m < kM; ++m) {
                    mma(d[m][n], rows[m], pair[0], pair[1], x.memory);
                    if (n * 8 + 8 < columns) mma(d[m][n + 1], rows[m], pair[2], pair[3], x.memory);
                }
            }
        }
    } else {
#pragma unroll 1
        for (int k = 0; k < kDepth<T>; k += 4) {
            if (k >= depth) continue;
            float rows[kM][2][4];
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    load<4>(x.at(row + m * 16 + half * 8 + lane / 4, k), rows[m][half]);
#pragma unroll
                    for (int i = 0; i < 4; ++i) rows[m][half][i] = kept.holds(half, k + i) ? rows[m][half][i] : 0.0f;
                }
            }
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                if (n * 8 >= columns) continue;
                const int first = column + n * 8 + lane % 4 * 2;
                float pair[2][4];
                if constexpr (kAcross) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float both[2];
                        load<2>(weight.at(k + i, first), both);
                        pair[0][i] = both[0];
                        pair[1][i] = both[1];
                    }
                } else {
                    load<4>(weight.at(first, k), pair[0]);
                    load<4>(weight.at(first + 1, k), pair[1]);
                }
#pragma unroll
                for (int m = 0; m < kM; ++m) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) d[m][n][e] += rows[m][e / 2][i] * pair[e % 2][i];
                    }
                }
            }
        }
    }
}

template <bool kWide, bool kAcross, typename T>
__device__ inline void product(const Product<T>& p) {
    using Sizes = Tile<kWide>;
    using Memory = Stage<T, kWide, kAcross>;
    constexpr int kThreads = Sizes::kThreads, kM = Sizes::kSide / 16, kN = Sizes::kSide / 8;
    extern __shared__ __align__(128) unsigned char memory[];

    int first_row = static_cast<int>(blockIdx.y) * Sizes::kRows, last_row = p.rows, set = 0;
    if (p.groups.offsets != nullptr) {
        const int block = static_cast<int>(blockIdx.y);
        const int group = find_sequence(p.groups.offsets, p.groups.count, Sizes::kRows, block, first_row);
        first_row += p.groups.offsets[group];
        last_row = p.groups.offsets[group + 1];
        set = p.groups.sets[group];
    }
    const int rows = min(Sizes::kRows, last_row - first_row);
    if (rows <= 0) return;

    int tile = static_cast<int>(blockIdx.x);
    const Range columns =
        p.backward ? Range{0, p.columns, kNone} : p.adapters.find_tile(p.columns, Sizes::kColumns, tile);
    const int first_column = columns.begin + tile * Sizes::kColumns;

    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int warp_row = warp / Sizes::kWarpsAcross * Sizes::kSide;
    const int warp_column = warp % Sizes::kWarpsAcross * Sizes::kSide;
    const int keep_words = ceil_divide(p.backward ? p.columns : p.depth, 32);

    Steps<T, kDepth<T>> coming(p, columns.adapter), here(p, columns.adapter);
    int loaded = 0;
    const auto load_next = [&] {
        if (!coming.done()) {
            const Memory stage(memory, loaded++ % kStages);
            const Place place{first_row, rows, columns, first_column, set};
            load_step<kThreads, Sizes::kRows, Sizes::kColumns, kAcross>(
                p, coming, place, round_up(coming.ranks, 16), [&](int a, int b) { return stage.x.at(a, b); },
                [&](int a, int b) { return stage.weight.at(a, b); });
            const bool masks = p.keep != nullptr && coming.ranks > 0 && set >= 0;
            if (masks && !p.backward && !coming.is_of_ranks() && threadIdx.x < Sizes::kRows) {
                const int row = min(static_cast<int>(threadIdx.x), rows - 1);
                const uint32_t* words = p.keep + int64_t{first_row + row} * keep_words;
                ptx::cp_async_4(stage.keep + threadIdx.x, words + coming.depth() / 32);
            }
            if (masks && p.backward && coming.is_of_ranks()) {
#pragma unroll 1  // else it keeps all addresses over the steps
                for (int i = threadIdx.x; i < Sizes::kRows * Memory::kWords; i += kThreads) {
                    const int row = min(i / Memory::kWords, rows - 1);
                    const int word = min(first_column / 32 + i % Memory::kWords, keep_words - 1);
                    ptx::cp_async_4(stage.keep + i, p.keep + int64_t{first_row + row} * keep_words + word);
                }
            }
            coming.advance();
        }
        ptx::cp_async_commit();
    };

    float sums[kM][kN][4] = {};
    float h[1][kMaxRank / 8][4] = {};

    // A step of ranks, once h is complete.
    const auto add_ranks = [&](const Memory& stage) {
        const int rank = here.rank(), count = min(here.ranks - rank, kDepth<T>), adapter = here.range.adapter;
#pragma unroll
        for (int n = 0; n < kMaxRank / 8; ++n) {
            if (n * 8 / kDepth<T> * kDepth<T> != rank) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float pair[2] = {h[0][n][half * 2], h[0][n][half * 2 + 1]};
                store<2>(pair, stage.x.at(warp * 16 + lane / 4 + half * 8, n * 8 % kDepth<T> + lane % 4 * 2));
                h[0][n][half * 2] = h[0][n][half * 2 + 1] = 0.0f;
            }
        }
        __syncthreads();  // h is there
        if (first_column == columns.begin) {
            const int all = p.adapters.ranks();
            T* out = p.h + int64_t{first_row} * all + p.adapters.ranks(adapter) + rank;
            const int column = threadIdx.x % kDepth<T>;
#pragma unroll 1
            for (int row = threadIdx.x / kDepth<T>; row < rows; row += kThreads / kDepth<T>) {
                if (column < count) out[int64_t{row} * all + column] = *stage.x.at(row, column);
            }
        }
        if (set < 0) return;
        const float scaling = pick(p.scaling, adapter);
        const bool masked = p.keep != nullptr && p.backward;
        constexpr int kBits = 32, kPart = kBits / 8;  // a word of columns at a time: there are no registers for all
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int n = 0; n < kN; n += kPart) {
                const int row = warp_row + m * 16, column = warp_column + n * 8;
                float part[1][kPart][4] = {};
                multiply(part, stage, row, column, count, kBits, KeepAll());
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int at = (row + half * 8 + lane / 4) * Memory::kWords + column / kBits;
                    const uint32_t word = (masked ? stage.keep[at] : ~0u) >> lane % 4 * 2;
#pragma unroll
                    for (int i = 0; i < kPart * 2; ++i) {
                        const int tile = i / 2, e = half * 2 + i % 2;
                        const bool kept = (word >> (tile * 8 + i % 2) & 1u) != 0;
                        sums[m][n + tile][e] += kept ? scaling * part[0][tile][e] : 0.0f;
                    }
                }
            }
        }
    };

#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) load_next();
    for (int step = 0; step < loaded; ++step) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // this step is there, and nobody works on the last one
        load_next();
        const Memory stage(memory, step % kStages);
        if (here.is_of_ranks()) {
            add_ranks(stage);
        } else {
            multiply(sums, stage, warp_row, warp_column, kDepth<T>, Sizes::kSide, KeepAll());
            if (here.ranks > 0 && set >= 0) {
                if (p.keep != nullptr && !p.backward) {
                    const uint32_t* words = stage.keep + warp * 16 + lane / 4;
                    const Keep kept = {{words[0] >> here.at % 32, words[8] >> here.at % 32}};
                    multiply(h, stage, warp * 16, Sizes::kColumns, kDepth<T>, here.ranks, kept);
                } else {
                    multiply(h, stage, warp * 16, Sizes::kColumns, kDepth<T>, here.ranks, KeepAll());
                }
            }
        }
        here.advance();
    }

    // Through shared memory, so that whole vectors are written.
    __syncthreads();  // nobody works on the last step
    constexpr int kOutPitch = Sizes::kSide + 4, kSize = kVectorSize<T>, kVectors = Sizes::kSide / kSize;
    float* out = reinterpret_cast<float*>(memory) + warp * 16 * kOutPitch;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float pair[2] = {sums[m][n][half * 2], sums[m][n][half * 2 + 1]};
                store<2>(pair, out + (lane / 4 + half * 8) * kOutPitch + n * 8 + lane % 4 * 2);
            }
        }
        __syncwarp();  // 16 rows are there
        for (int i = lane; i < 16 * kVectors; i += kWarpSize) {
            const int row = warp_row + m * 16 + i / kVectors, within = i % kVectors * kSize;
            const int column = first_column + warp_column + within;
            if (row >= rows || column >= columns.end) continue;
            float values[kSize];
#pragma unroll
            for (int e = 0; e < kSize; e += 4) {
                float four[4];
                load(out + i / kVectors * kOutPitch + within + e, four);
#pragma unroll
                for (int j = 0; j < 4; ++j) values[e + j] = four[j];
            }
            store_piece(p, values, first_row + row, column);
        }
        __syncwarp();  // nobody reads these rows
    }
}

}  // namespace

#define LORA_LINEAR(KERNEL, TYPE, WIDE, ACROSS)                                                                        \
    extern "C" __global__ void __launch_bounds__(Tile<WIDE>::kThreads, Tile<WIDE>::kResident) KERNEL(                  \
        LORA_PARAMETERS(TYPE)) {                                                                                       \
        product<WIDE, ACROSS>(LORA_PRODUCT(TYPE));                                                                     \
    }
#define LORA_LINEAR_KERNELS(NAME, T)                                                                                   \
    LORA_LINEAR(lora_linear_small_##NAME, T, false, false)                                                             \
    LORA_LINEAR(lora_linear_wide_##NAME, T, true, false)                                                               \
    LORA_LINEAR(lora_linear_transposed_small_##NAME, T, false, true)                                                   \
    LORA_LINEAR(lora_linear_transposed_wide_##NAME, T, true, true)

LORA_LINEAR_KERNELS(f32, float)
LORA_LINEAR_KERNELS(bf16, bf16)
LORA_LINEAR_KERNELS(f16, f16)
