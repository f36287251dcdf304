// Attention over a pack, forward, for compute capability 9.0: what attention_forward.cu computes (its head has the
// equations and the shapes), by products of warpgroups. bf16 and f16, heads of width 64 and 128; for other targets than
// sm_90a the kernels are empty.
//
// A block owns 64 queries of one head for each warpgroup that multiplies: three for width 64, two for width 128. Their q
// lies in shared memory, the scores S [64, 128], the weights that become the left factor of the second product, and the
// output [64, width] in registers. One more warpgroup gives its registers to them; a warp of it does nothing but copy
// tiles of 128 keys and values, by tensor maps, into as many places as shared memory has room for (a Ring of
// attention_hopper.cuh). No barrier of the whole block is in the loop: the copying warp waits until a place is empty, the
// others until it is filled.
//
// The products of a tile run beside the softmax of another. In turn n a warpgroup starts S = q·k_nᵀ and behind it
// out += weights·v_{n−1}; when S is there it weighs the scores while the second product goes on, then shrinks out to the
// new maximum. So values are a turn behind keys. Without more, all warpgroups would start their products together, share
// the matrix units, and then weigh together while these idle: so they take turns at starting (Turns). A warpgroup leaves
// out the tiles that none of its rows sees, a warp masks those that some of its own see.
//
// A tile that reaches over the end of its sequence has rows of the next one. Keys of those are hidden with the scores;
// but their values may be NaN, and 0·NaN is not 0. The tensor's map knows only the end of the pack, so the copying warp
// loads that one tile of values by itself, with zeros.
//
// The loss of a supervised head is one more pass over the keys, 64 at a time.
//
// Bytes and operations: as in attention_forward.cu. Cycles of a multiprocessor for a tile of 128 keys, at its dense rate,
// at 16 powers of two and at 128 bytes of shared memory a cycle:
//
//   width  queries  operations   matrix units  powers   shared memory   from the cache
//   64     192      6.3 million  1536          1536     960 (120 KiB)   32 KiB: 21 bytes a cycle
//   128    128      8.4 million  2048          1024     1280 (160 KiB)  64 KiB: 32 bytes a cycle
//
// (each warpgroup reads k and v once, and its part of q). So width 128 is bound by the matrix units, and width 64 by them
// and the powers, which is why the turns matter: a warpgroup's products take a third (half) of a tile's cycles, and it
// has the rest for its softmax. 32 bytes a cycle are half of what a multiprocessor gets from the cache at most; when all
// ask for them at once, width 128 may have to wait for the cache itself. A load is a few instructions of one thread, and
// is started as soon as a place is empty: more than a tile's cycles before its bytes are wanted.
//
// Registers: 65536 for 512 threads, 128 each, of which the copying warpgroup keeps 32 and the others have 160; 168 for
// 384 threads, 40 and 232. The assembler (nvcc 13.0) uses 157 and 209 and spills nothing. In the machine code of the loop
// the scores' products, those of the values and 66 powers of two come in this order, with the wait for the second ones
// behind the powers.
//
// Blocks go through the pack from its end, so that under a causal mask the long rows of a sequence begin first.
//
// History (not measured: no GPU has run it yet; the executor of kernels/host has, with models of the products, of copies
// by tensor maps and of their barriers)
//   1  two warpgroups; tiles by cp.async of all threads in two stages, 64 keys for width 64, one __syncthreads per tile;
//      width 64 with two blocks on a multiprocessor. Every thread had the copies and their addresses beside its
//      arithmetic (124 and 214 registers), and every warpgroup waited for the slowest in each tile
//   2  as above, with kernels of their own for the memory loss (`bce`): 3032 instructions for width 128 without, 7648 with
//      it. Where `cargo test --release --test ops attention` finds it right on an H100 and
//      `dtmem bench --filter attention` finds it faster, it becomes the default (Shape::forward in src/ops/attention.rs)

#include "attention_forward.cuh"
#include "attention_hopper.cuh"

namespace {

using namespace attention;

constexpr int kKeys = 128;  // of a tile

// Warpgroups that multiply, 64 queries each. One more copies: a warp of it.
template <int kWidth>
constexpr int kUsers = kWidth == 64 ? 3 : 2;
template <int kWidth>
constexpr int kQueries = kUsers<kWidth> * warpgroup::kRows;
template <int kWidth>
constexpr int kBlockThreads = (kUsers<kWidth> + 1) * warpgroup::kThreads;
// Tiles of keys that a block has room for, and of values.
template <int kWidth>
constexpr int kPlaces = kWidth == 64 ? 4 : 3;
// Registers of a thread that copies, and of one that multiplies: together those of the launch.
template <int kWidth>
constexpr int kFewRegisters = kWidth == 64 ? 32 : 40;
template <int kWidth>
constexpr int kManyRegisters = kWidth == 64 ? 160 : 232;

// The matrices as the copies by boxes know them.
struct Maps {
    const ptx::TensorMap &q, &k, &v;
};

// A block's shared memory.
template <int kWidth, typename T>
struct Memory {
    using Tiles = Ring<kPlaces<kWidth>, kKeys * kWidth, T>;
    static constexpr int kQuerySize = kQueries<kWidth> * kWidth, kRingSize = kPlaces<kWidth> * kKeys * kWidth;

    T* queries;
    Tiles keys, values;
    Run* runs;  // of the queries
    uint64_t* queries_there;

    __device__ explicit Memory(unsigned char* memory)
        : Memory(reinterpret_cast<T*>(memory),
                 reinterpret_cast<Run*>(memory + (kQuerySize + 2 * kRingSize) * sizeof(T))) {}
    __device__ Memory(T* tiles, Run* runs) : Memory(tiles, runs, reinterpret_cast<uint64_t*>(runs + kQueries<kWidth>)) {}
    __device__ Memory(T* tiles, Run* runs, uint64_t* barriers)
        : queries(tiles), keys(tiles + kQuerySize, barriers + 1),
          values(tiles + kQuerySize + kRingSize, barriers + 1 + 2 * kPlaces<kWidth>), runs(runs), queries_there(barriers) {}

    __device__ void init() const {
        constexpr int kWarpsOfUsers = kUsers<kWidth> * 4;
        ptx::mbarrier_init(queries_there, 1);
        keys.init(kWarpsOfUsers);
        values.init(kWarpsOfUsers);
        ptx::fence_proxy_async();
    }
};

// Where a block stands, and the keys that its queries see: in `tiles` tiles from `begin` on.
struct Work {
    Sequence sequence;
    int token, rows;  // the first query, and how many
    int head, key_head;
    int begin, tiles;
};

// The box of a tile of `kRows` rows, panel by panel.
template <int kRows, int kWidth, typename T>
__device__ inline void load_boxes(T* tile, const ptx::TensorMap& map, int column, int row, uint64_t* barrier) {
    ptx::mbarrier_arrive(barrier, kRows * kWidth * static_cast<int>(sizeof(T)));
#pragma unroll
    for (int panel = 0; panel < kWidth; panel += warpgroup::kPanel) {
        ptx::tensor_load(tile + panel * kRows, map, column + panel, row, barrier);
    }
}

// What the warp does that copies.
template <int kWidth, bool kSupervised, typename T>
__device__ inline void copy(const Forward<T>& x, const Maps& maps, const Memory<kWidth, T>& memory, const Work& work) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int column = work.key_head * kWidth, first_key = work.sequence.first_key + work.begin;
    const auto load_keys = [&](int n, int tile) {
        memory.keys.wait_until_empty(n);
        if (lane == 0) {
            load_boxes<kKeys, kWidth>(memory.keys.tile(n), maps.k, column, first_key + tile * kKeys, memory.keys.barrier(n));
        }
    };
    const auto load_values = [&](int n) {
        memory.values.wait_until_empty(n);
        const int count = work.sequence.keys - work.begin - n * kKeys;
        if (count >= kKeys) {
            if (lane == 0) {
                load_boxes<kKeys, kWidth>(memory.values.tile(n), maps.v, column, first_key + n * kKeys,
                                          memory.values.barrier(n));
            }
            return;
        }
        const T* rows = x.v + static_cast<int64_t>(first_key + n * kKeys) * x.v_stride + column;
        constexpr int kPieces = kWidth / kVectorSize<T>;
#pragma unroll 1
        for (int i = lane; i < kKeys * kPieces; i += kWarpSize) {
            const int row = i / kPieces, piece = i % kPieces * kVectorSize<T>;
            const bool exists = row < count;
            ptx::cp_async_16_zfill(warpgroup::place<kKeys>(memory.values.tile(n), row, piece),
                                   rows + (exists ? static_cast<int64_t>(row) * x.v_stride + piece : 0),
                                   exists ? kVectorBytes : 0);
        }
        ptx::cp_async_wait_all();
        ptx::fence_proxy_async();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(memory.values.barrier(n));
    };

    if (lane == 0) {
        load_boxes<kQueries<kWidth>, kWidth>(memory.queries, maps.q, work.head * kWidth, work.token,
                                             memory.queries_there);
    }
    load_keys(0, 0);
#pragma unroll 1
    for (int n = 0; n < work.tiles; ++n) {
        if (n + 1 < work.tiles) load_keys(n + 1, n + 1);
        load_values(n);
    }
    if (slot_of<kSupervised>(x.supervision, work.head) < 0 || x.supervision.annotated[work.sequence.index] == 0) return;
#pragma unroll 1
    for (int n = 0; n < work.tiles; ++n) load_keys(work.tiles + n, n);
}

template <int kWidth, bool kSupervised, typename T>
__device__ inline void multiply(const Forward<T>& x, const Memory<kWidth, T>& memory, const Work& work) {
    constexpr int kTiles = kKeys / kColumns, kOut = kWidth / kColumns;
    constexpr int kDepths = kKeys / warpgroup::kDepth;
    constexpr int kLossKeys = 64;  // that the pass for the loss has the scores of at a time
    const Owner<kWidth, 1> owner;
    const Turns<kUsers<kWidth>> turns{owner.warp / 4};
    const int group_row = turns.own * warpgroup::kRows;
    const Run* runs = memory.runs;
    const int rows = work.rows, begin = work.begin;
    // The tiles that the warpgroup sees, [from, to). Its first run begins behind all keys where it has no row.
    const int group_last = max(min(group_row + warpgroup::kRows, rows) - 1, group_row);
    const int from = min(max(runs[group_row].begin - begin, 0) / kKeys, work.tiles);
    const int to = group_row < rows ? (max(runs[group_last].end - begin, 0) + kKeys - 1) / kKeys : from;
    const int warp_last = max(min(owner.first_row + kMatrixRows, rows) - 1, owner.first_row);
    const auto shown_whole = [&](int key) {
        return runs[warp_last].begin <= key && key + kKeys <= runs[owner.first_row].end;
    };

    // The scale stands in the argument of 2^x. A factor of 0 would make NaN of what is hidden.
    const float factor = fmaxf(fabsf(x.scale) * kLog2E, kLeastFactor);
    float out[1][kOut][4] = {};
    uint32_t weights[kDepths][4];
    float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {};  // maximum: of scores times factor

    // Weights of tile n. `weighted`: those of the tile before are there, and its product with the values goes on
    // meanwhile.
    const auto weigh_tile = [&](int n, auto weighted) {
        const int key = begin + n * kKeys;
        float scores[kTiles][4];
        memory.keys.wait_until_filled(n);
        if constexpr (decltype(weighted)::value) memory.values.wait_until_filled(n - 1);
        turns.begin();
        ptx::wgmma_fence();
        start_scores<kWidth, kKeys, kQueries<kWidth>>(scores, memory.queries, group_row, memory.keys.tile(n), 0);
        if constexpr (decltype(weighted)::value) {
            start_sum(out[0], weights, memory.values.tile(n - 1));
            turns.end(n + 1 == work.tiles);
            ptx::wgmma_wait<1>();
        } else {
            turns.end(n + 1 == work.tiles);
            ptx::wgmma_wait<0>();
        }
        ptx::keep(scores);
        memory.keys.release(n);
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
            memory.values.release(n - 1);
#pragma unroll
            for (int t = 0; t < kOut; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) out[0][t][i] *= shrink[i / 2];
            }
        }
        to_factor(scores, weights, x.q);
    };

    if (work.tiles > 0) {
        turns.open();
        ptx::mbarrier_wait(memory.queries_there, 0);
    }
    int n = 0;
    const auto skip_until = [&](int end) {
#pragma unroll 1
        for (; n < end; ++n) {
            turns.begin();
            turns.end(n + 1 == work.tiles);
            memory.keys.skip(n);
            memory.values.skip(n);
        }
    };
    skip_until(from);
    if (n < to) {
        weigh_tile(n, std::false_type());
        for (++n; n < to; ++n) weigh_tile(n, std::true_type());
        memory.values.wait_until_filled(n - 1);
        ptx::wgmma_fence();
        start_sum(out[0], weights, memory.values.tile(n - 1));
        ptx::wgmma_wait<0>();
        ptx::keep(out[0]);
        memory.values.release(n - 1);
    }
    skip_until(work.tiles);

    const int64_t token = work.token;
    float inverse[1][2], lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float all = row_sum(sum[half]);
        const int row = owner.row(0, half);
        inverse[0][half] = all > 0.0f ? 1.0f / all : all;
        lse[half] = maximum[half] * kLn2 + logf(all);
        if (row < rows && owner.lane % 4 == 0) x.lse[(token + row) * x.heads + work.head] = lse[half];
    }
    store_rows<kWidth>(out, inverse, x.out + token * x.out_stride + work.head * kWidth, x.out_stride, rows);

    const int slot = slot_of<kSupervised>(x.supervision, work.head);
    if (slot < 0) return;
    const bool annotated = x.supervision.annotated[work.sequence.index] != 0;
    const Run run[2] = {runs[owner.row(0, 0)], runs[owner.row(0, 1)]};
    RowLoss losses[2];
    if (annotated) {
#pragma unroll 1
        for (n = 0; n < work.tiles; ++n) {
            const int again = work.tiles + n;
            memory.keys.wait_until_filled(again);
            if (from <= n && n < to) {
                const int key = begin + n * kKeys;
#pragma unroll 1
                for (int part = 0; part < kKeys; part += kLossKeys) {
                    float scores[kLossKeys / kColumns][4];
                    ptx::wgmma_fence();
                    start_scores<kWidth, kKeys, kQueries<kWidth>>(scores, memory.queries, group_row,
                                                                  memory.keys.tile(again), part);
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
            memory.keys.release(again);
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
}

template <int kWidth, bool kSupervised, typename T>
__device__ inline void forward(const Forward<T>& x, const Maps& maps) {
#if defined(DTMEM_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) unsigned char bytes[];
    const Memory<kWidth, T> memory(bytes);
    const int thread = static_cast<int>(threadIdx.x);

    int first;
    const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x);
    const Sequence sequence(x.pack, find_sequence(x.pack.queries, x.pack.sequences, kQueries<kWidth>, block, first));
    const int rows = min(kQueries<kWidth>, sequence.queries - first);
    if (rows <= 0) return;
    if (thread < kQueries<kWidth>) memory.runs[thread] = x.mask.visible(sequence, first + thread);
    if (thread == 0) {
        memory.init();
        ptx::tensor_prefetch(maps.q);
        ptx::tensor_prefetch(maps.k);
        ptx::tensor_prefetch(maps.v);
    }
    __syncthreads();

    // The runs of the first and the last query bound those of all between: of the block, a warpgroup, a warp.
    const int head = static_cast<int>(blockIdx.y);
    const int begin = memory.runs[0].begin, end = memory.runs[rows - 1].end;
    const Work work{sequence, sequence.first_query + first, rows, head, head / (x.heads / x.key_heads), begin,
                    (max(end - begin, 0) + kKeys - 1) / kKeys};
    const int warp = __shfl_sync(0xffffffffu, thread / kWarpSize, 0);
    if (warp / 4 == kUsers<kWidth>) {
        ptx::give_registers<kFewRegisters<kWidth>>();
        if (warp % 4 == 0 && work.tiles > 0) copy<kWidth, kSupervised>(x, maps, memory, work);
    } else {
        ptx::take_registers<kManyRegisters<kWidth>>();
        multiply<kWidth, kSupervised>(x, memory, work);
    }
#endif
}

}  // namespace

// grid (tokens_q / queries + sequences, H); block 128·(users + 1); dynamic shared memory: tiles of 16-bit numbers
// (queries + 2·places·128)·width, queries runs and 1 + 4·places barriers of 8 bytes each. Boxes of 64 columns and of
// `queries` rows (q_map), 128 rows (k_map, v_map).
#define ATTENTION_HOPPER(NAME, T, WIDTH, KIND, SUPERVISED)                                                             \
    extern "C" __global__ void __launch_bounds__(kBlockThreads<WIDTH>, 1) attention_##KIND##_##WIDTH##_##NAME(         \
        ATTENTION_FORWARD_PARAMETERS(T), const __grid_constant__ ptx::TensorMap q_map,                                 \
        const __grid_constant__ ptx::TensorMap k_map, const __grid_constant__ ptx::TensorMap v_map) {                  \
        const Forward<T> x = ATTENTION_FORWARD_ARGUMENTS(T);                                                           \
        forward<WIDTH, SUPERVISED>(x, Maps{q_map, k_map, v_map});                                                      \
    }

#define ATTENTION_HOPPER_KINDS(NAME, T, WIDTH)                                                                         \
    ATTENTION_HOPPER(NAME, T, WIDTH, hopper, false)                                                                    \
    ATTENTION_HOPPER(NAME, T, WIDTH, hopper_bce, true)

ATTENTION_HOPPER_KINDS(bf16, bf16, 64)
ATTENTION_HOPPER_KINDS(bf16, bf16, 128)
ATTENTION_HOPPER_KINDS(f16, f16, 64)
ATTENTION_HOPPER_KINDS(f16, f16, 128)
