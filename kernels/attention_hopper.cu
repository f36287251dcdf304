// Attention over a pack, forward, for compute capability 9.0: what attention_forward.cu computes (its head has the
// equations and the shapes), by products of warpgroups. bf16 and f16, heads of width 64 and 128; for other targets than
// sm_90a the kernels are empty.
//
// A block owns 128 queries of one head, a warpgroup 64: q lies in shared memory, the scores S [64, keys], the weights
// that become the left factor of the second product, and the output [64, width] in registers. Tiles of keys and values
// (64 for width 64, 128 for width 128) come by asynchronous copies in two stages, in the layout of warpgroup.cuh.
//
// The products of a tile run beside the softmax of another. In turn n a warpgroup starts S = q·k_nᵀ and behind it
// out += weights·v_{n−1}; when S is there it weighs the scores while the second product goes on, then shrinks out to the
// new maximum. So values are a turn behind keys: turn n waits for k_n and v_{n−1}, meets the other warpgroup at the one
// barrier, starts the copies of k_{n+1} and v_n into the places of what turn n − 1 read, and no product is under way at a
// barrier. A warpgroup leaves out the tiles that none of its rows sees, a warp masks those that some of its own see.
//
// The loss of a supervised head is one more pass over the keys, 64 at a time.
//
// Bytes and operations: as in attention_forward.cu. For width 128 and 128 queries a tile of 128 keys is 8.4 million
// operations, 2048 cycles of a multiprocessor's matrix units at their dense rate. They read 128 bytes of shared memory a
// cycle at most, and need 1280 cycles' worth: each warpgroup reads k and v once (64 KiB) and its part of q (16 KiB).
// Beside them go 16384 powers of two, 1024 cycles at 16 a cycle, and 2 × 8 copies of 16 bytes by each thread. Width 64
// has half the operations for the same powers: 1024 cycles of each for 128 × 128 scores (and 768 of shared memory), so
// that both count, and the two blocks that a multiprocessor holds (128 registers a thread) do one beside the other. On this account the kernel is
// bound by the matrix units (width 128), or by them and the powers (width 64).
//
// History (not measured: no GPU has run it yet; the executor of kernels/host has, with a model of the products)
//   1  as above. Where `cargo test --release --test ops attention` finds it right on an H100 and
//      `dtmem bench --filter attention` finds it faster, it becomes the default (Shape::forward in src/ops/attention.rs)

#include "attention_forward.cuh"
#include "attention_hopper.cuh"

namespace {

using namespace attention;

template <int kWidth>
constexpr int kKeys = kWidth == 64 ? 64 : 128;
// Blocks that a multiprocessor is to hold, for the compiler.
template <int kWidth>
constexpr int kBlocks = kWidth == 64 ? 2 : 1;

template <int kWidth, typename T>
__device__ inline void forward(const Forward<T>& x) {
#if defined(DTMEM_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int kRows = kBlockRows;
    constexpr int kTileKeys = kKeys<kWidth>, kTile = kTileKeys * kWidth;
    constexpr int kTiles = kTileKeys / kColumns, kOut = kWidth / kColumns;
    constexpr int kDepths = kTileKeys / warpgroup::kDepth;
    constexpr int kLossKeys = 64;  // that the pass for the loss has the scores of at a time
    extern __shared__ __align__(1024) unsigned char memory[];
    T* query_tile = reinterpret_cast<T*>(memory);
    T* key_tiles = query_tile + kRows * kWidth;
    T* value_tiles = key_tiles + kStages * kTile;
    Run* runs = reinterpret_cast<Run*>(value_tiles + kStages * kTile);  // of the rows

    int first;
    const Sequence sequence(
        x.pack, find_sequence(x.pack.queries, x.pack.sequences, kRows, static_cast<int>(blockIdx.x), first));
    const int rows = min(kRows, sequence.queries - first);
    if (rows <= 0) return;

    const Owner<kWidth, 1> owner;
    const int group_row = owner.warp / 4 * warpgroup::kRows;
    const int head = static_cast<int>(blockIdx.y), key_head = head / (x.heads / x.key_heads);
    const T* keys = x.k + static_cast<int64_t>(sequence.first_key) * x.k_stride + key_head * kWidth;
    const T* values = x.v + static_cast<int64_t>(sequence.first_key) * x.v_stride + key_head * kWidth;
    const int64_t token = sequence.first_query + first;

    // The runs of the first and the last query bound those of all between: of the block, the warpgroup, the warp.
    if (static_cast<int>(threadIdx.x) < kRows) {
        runs[threadIdx.x] = x.mask.visible(sequence, first + static_cast<int>(threadIdx.x));
    }
    __syncthreads();
    const int begin = runs[0].begin, end = runs[rows - 1].end;
    const int group_begin = runs[group_row].begin;  // behind all keys where there is no such row
    const int group_end = runs[max(min(group_row + warpgroup::kRows, rows) - 1, group_row)].end;
    const auto shown = [&](int key) { return key < group_end && group_begin < key + kTileKeys; };
    const auto shown_whole = [&](int key) {
        const int last = max(min(owner.first_row + kMatrixRows, rows) - 1, owner.first_row);
        return runs[last].begin <= key && key + kTileKeys <= runs[owner.first_row].end;
    };

    const auto key_tile = [&](int n) { return key_tiles + n % kStages * kTile; };
    const auto value_tile = [&](int n) { return value_tiles + n % kStages * kTile; };
    const auto load_keys = [&](int key, int n) {
        load_swizzled<kTileKeys, kWidth>(key_tile(n), keys + static_cast<int64_t>(key) * x.k_stride, x.k_stride,
                                         end - key);
    };
    const auto load_values = [&](int key, int n) {
        load_swizzled<kTileKeys, kWidth>(value_tile(n), values + static_cast<int64_t>(key) * x.v_stride, x.v_stride,
                                         end - key);
    };

    // The scale stands in the argument of 2^x. A factor of 0 would make NaN of what is hidden.
    const float factor = fmaxf(fabsf(x.scale) * kLog2E, kLeastFactor);
    float out[1][kOut][4] = {};
    uint32_t weights[kDepths][4];
    float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {};  // maximum: of scores times factor

    // Weights of tile n. `weighted`: those of the tile before are there, and its product with the values goes on
    // meanwhile.
    const auto weigh_tile = [&](int key, int n, auto weighted) {
        float scores[kTiles][4];
        ptx::wgmma_fence();
        start_scores<kWidth, kTileKeys>(scores, query_tile, group_row, key_tile(n), 0);
        if constexpr (decltype(weighted)::value) {
            start_sum(out[0], weights, value_tile(n - 1));
            ptx::wgmma_wait<1>();
        } else {
            ptx::wgmma_wait<0>();
        }
        ptx::keep(scores);
        const bool negative = x.scale < 0.0f;
        if (negative || !shown_whole(key)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                hide(scores, half, runs[owner.row(0, half)], key, owner, negative);
            }
        }
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) shrink[half] = weigh(scores, half, factor, maximum[half], sum[half]);
        if constexpr (decltype(weighted)::value) {
            ptx::wgmma_wait_behind<0>(sum[0] + sum[1]);
            ptx::keep(out[0]);
            ptx::keep(weights);
#pragma unroll
            for (int t = 0; t < kOut; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) out[0][t][i] *= shrink[i / 2];
            }
        }
        to_factor(scores, weights, x.q);
    };

    if (begin < end) {
        load_swizzled<kRows, kWidth>(query_tile, x.q + token * x.q_stride + head * kWidth, x.q_stride, rows);
        load_keys(begin, 0);
        bool weighted = false;
        for (int key = begin, n = 0; key < end + kTileKeys; key += kTileKeys, ++n) {
            ptx::cp_async_wait_all();
            ptx::fence_proxy_async();
            __syncthreads();  // what this turn reads is there, and nobody reads what the last one did
            if (key + kTileKeys < end) load_keys(key + kTileKeys, n + 1);
            if (key < end) load_values(key, n);
            if (shown(key)) {
                if (weighted) {
                    weigh_tile(key, n, std::true_type());
                } else {
                    weigh_tile(key, n, std::false_type());
                }
                weighted = true;
            } else if (weighted) {
                ptx::wgmma_fence();
                start_sum(out[0], weights, value_tile(n - 1));
                ptx::wgmma_wait<0>();
                ptx::keep(out[0]);
                weighted = false;
            }
        }
    }

    float inverse[1][2], lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float all = row_sum(sum[half]);
        const int row = owner.row(0, half);
        inverse[0][half] = all > 0.0f ? 1.0f / all : all;
        lse[half] = maximum[half] * kLn2 + logf(all);
        if (row < rows && owner.lane % 4 == 0) x.lse[(token + row) * x.heads + head] = lse[half];
    }
    store_rows<kWidth>(out, inverse, x.out + token * x.out_stride + head * kWidth, x.out_stride, rows);

    const int slot = x.supervision.slot(head);
    if (slot < 0) return;
    const bool annotated = x.supervision.annotated[sequence.index] != 0;
    const Run run[2] = {runs[owner.row(0, 0)], runs[owner.row(0, 1)]};
    RowLoss losses[2];
    if (annotated && begin < end) {
        load_keys(begin, 0);  // nobody has read keys since the last barrier
        for (int key = begin, n = 0; key < end; key += kTileKeys, ++n) {
            ptx::cp_async_wait_all();
            ptx::fence_proxy_async();
            __syncthreads();
            if (key + kTileKeys < end) load_keys(key + kTileKeys, n + 1);
            if (!shown(key)) continue;
#pragma unroll 1
            for (int part = 0; part < kTileKeys; part += kLossKeys) {
                float scores[kLossKeys / kColumns][4];
                ptx::wgmma_fence();
                start_scores<kWidth, kTileKeys>(scores, query_tile, group_row, key_tile(n), part);
                ptx::wgmma_wait<0>();
                ptx::keep(scores);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = owner.row(0, half);
                    if (row >= rows) continue;
                    const uint64_t pairs = x.supervision.bits(static_cast<int>(token) + row, key + part);
                    add_losses(losses[half], scores, half, run[half], key + part, owner, x.scale, lse[half], pairs);
                }
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        losses[half].join(1);
        losses[half].join(2);
        const int row = owner.row(0, half);
        if (row >= rows || owner.lane % 4 != 0) continue;
        const bool counts = annotated && run[half].begin < run[half].end;
        store_loss(x, token + row, slot, counts, losses[half]);
    }
#endif
}

}  // namespace

// grid (tokens_q / 128 + sequences, H); block 256; dynamic shared memory (128 + 4·keys)·width·2 + 1024 bytes, keys = 64
// (width 128: 128).
#define ATTENTION_HOPPER(NAME, T, WIDTH)                                                                               \
    extern "C" __global__ void __launch_bounds__(kBlock, kBlocks<WIDTH>)                                               \
        attention_hopper_##WIDTH##_##NAME(ATTENTION_FORWARD_PARAMETERS(T)) {                                           \
        forward<WIDTH>(ATTENTION_FORWARD_ARGUMENTS(T));                                                                \
    }

ATTENTION_HOPPER(bf16, bf16, 64)
ATTENTION_HOPPER(bf16, bf16, 128)
ATTENTION_HOPPER(f16, f16, 64)
ATTENTION_HOPPER(f16, f16, 128)
