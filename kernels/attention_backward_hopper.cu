// Attention over a pack, backward, for compute capability 9.0: the two gradients of attention_backward.cu (its head has the
// equations, the launches and the order of sums), by products of warpgroups. bf16 and f16, heads of width 64 and 128; for
// other targets than sm_90a the kernels are empty.
//
// In both a block owns 128 rows of two tensors, a warpgroup 64, and walks over tiles of 64 rows of two others: queries with
// their gradients and keys with their values, or the other way round. The product of the first tensors is the scores, that of
// the second ones dP, both [64, 64] in registers; the key gradient has Sᵀ and dPᵀ. Weights and dS are computed there, and after
// rounding they are the left factors of the sums, [64, width] in registers too: of all that only tiles lie in shared memory.
//
// A turn starts the products for the scores, for dP, and behind them the sum (dq or dk) of what the turn before gave. Weights
// are computed while the others are under way. In the query gradient dS follows beside the sum. In the key gradient the
// weights are a left factor first: dv's sum starts, and dS is computed beside it. So dS is a turn behind as a factor, and a
// tile stays for three turns: one for its copies, one for its products, one for the sum. One barrier a turn, at which no
// product is under way. A warpgroup leaves out tiles that have nothing for its rows, a warp masks those that are not all for
// its own.
//
// What ptxas (13.0) wants, or else it lets no product run beside anything: no sum under way at the end of a loop, and left
// factors in registers made only while no product is under way. The key gradient of width 128 needs 192 registers for its
// four accumulators and 16 for a factor; what all of its threads know alike lies in shared memory therefore.
//
// Operations: for width 128, 128 rows and 64 others the key gradient does 4 products of 2.1 million operations, 2048 cycles of
// a multiprocessor's matrix units at their dense rate, and the query gradient 3, 1536. They read 128 bytes of shared memory a
// cycle at most, and need for scores and dP 32 KiB each and warpgroup (own rows and tile), for a sum 16 KiB: 1536 and 1280
// cycles. Beside them go 8192 powers of two, 512 cycles. Width 64 has half the operations for the same powers: 1024 and 768
// cycles of the matrix units, 768 and 640 of shared memory, 512 of powers. So on this account both kernels are bound by the
// matrix units.
//
// History (not measured: no GPU has run it yet; the executor of kernels/host has, with a model of the products)
//   1  as above
//   2  kernels of their own for the memory loss (`bce`): 1448 and 1848 instructions in the query gradient without it, 4024
//      and 4432 with it; the wait for its sum stands behind dS in the machine code as well, which it did not. Where `cargo test --release --test ops attention` finds it right on an H100 and
//      `dtmem bench --filter attention` finds it faster, it becomes the default (Shape::backward in src/ops/attention.rs)

#include "attention_backward.cuh"
#include "attention_hopper.cuh"

namespace {

using namespace attention;

constexpr int kTurns = 3;    // that a tile stays
constexpr int kOthers = 64;  // rows of a tile
[[maybe_unused]] constexpr int kTiles = kOthers / kColumns, kDepths = kOthers / warpgroup::kDepth;

// Tensor 0 is the one of the scores, tensor 1 that of dP.
template <int kWidth, typename T>
struct Tiles {
    T* memory;

    __device__ T* own(int tensor) const { return memory + tensor * kBlockRows * kWidth; }
    __device__ T* other(int tensor, int n) const {
        return own(2) + (n % kTurns * 2 + tensor) * kOthers * kWidth;
    }
    __device__ void* end() const { return own(2) + kTurns * 2 * kOthers * kWidth; }
};

template <int kWidth, bool kSupervised, typename T>
__device__ inline void query_gradient(const Backward<T>& x, T* dq, int dq_stride) {
#if defined(DTMEM_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) unsigned char memory[];
    const Tiles<kWidth, T> tiles{reinterpret_cast<T*>(memory)};
    Run* runs = static_cast<Run*>(tiles.end());  // of the rows

    int first;
    const Sequence sequence(
        x.pack, find_sequence(x.pack.queries, x.pack.sequences, kBlockRows, static_cast<int>(blockIdx.x), first));
    const int rows = min(kBlockRows, sequence.queries - first);
    if (rows <= 0) return;

    const Owner<kWidth, 1> owner;
    const int group_row = owner.warp / 4 * warpgroup::kRows;
    const int head = static_cast<int>(blockIdx.y), key_head = head / (x.heads / x.key_heads);
    const T* keys = x.k + static_cast<int64_t>(sequence.first_key) * x.k_stride + key_head * kWidth;
    const T* values = x.v + static_cast<int64_t>(sequence.first_key) * x.v_stride + key_head * kWidth;
    const int64_t token = sequence.first_query + first;
    const int slot = active_slot<kSupervised>(x, sequence, head);
    const float loss_factor = slot < 0 ? 0.0f : *x.grad_memory_loss * *x.factor;

    // The runs of the first and the last query bound those of all between: of the block, the warpgroup, the warp.
    if (static_cast<int>(threadIdx.x) < kBlockRows) {
        runs[threadIdx.x] = x.mask.visible(sequence, first + static_cast<int>(threadIdx.x));
    }
    float centres[2] = {}, deltas[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = owner.row(0, half);
        if (row >= rows) continue;
        centres[half] = centre_of(x.lse[(token + row) * x.heads + head]);
        deltas[half] = x.delta[(token + row) * x.heads + head];
    }
    __syncthreads();
    const int begin = runs[0].begin, end = runs[rows - 1].end;
    const int group_begin = runs[group_row].begin;  // behind all keys where there is no such row
    const int group_end = runs[max(min(group_row + warpgroup::kRows, rows) - 1, group_row)].end;
    const int last = max(min(owner.first_row + kMatrixRows, rows) - 1, owner.first_row);
    const Run of_all{runs[last].begin, runs[owner.first_row].end};  // the keys that all rows of the warp see

    const auto start = [&](int key, int n) {
        load_swizzled<kOthers, kWidth>(tiles.other(0, n), keys + static_cast<int64_t>(key) * x.k_stride, x.k_stride,
                                       end - key);
        load_swizzled<kOthers, kWidth>(tiles.other(1, n), values + static_cast<int64_t>(key) * x.v_stride, x.v_stride,
                                       end - key);
    };
    if (begin < end) {
        load_swizzled<kBlockRows, kWidth>(tiles.own(0), x.q + token * x.q_stride + head * kWidth, x.q_stride, rows);
        load_swizzled<kBlockRows, kWidth>(tiles.own(1), x.grad_out + token * x.grad_out_stride + head * kWidth,
                                          x.grad_out_stride, rows);
        start(begin, 0);
    }

    const float factor = x.scale * kLog2E;
    float sums[1][kWidth / kColumns][4] = {};
    uint32_t factors[kDepths][4];  // dS of a turn
    // `behind`: there are factors of the turn before.
    const auto turn = [&](int key, int n, auto behind) {
        constexpr bool kBehind = decltype(behind)::value;
        float weights[kTiles][4], grads[kTiles][4];
        ptx::wgmma_fence();
        start_scores<kWidth, kOthers>(weights, tiles.own(0), group_row, tiles.other(0, n), 0);
        start_scores<kWidth, kOthers>(grads, tiles.own(1), group_row, tiles.other(1, n), 0);
        if constexpr (kBehind) start_sum(sums[0], factors, tiles.other(0, n - 1));
        ptx::wgmma_wait<kBehind ? 2 : 1>();
        ptx::keep(weights);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                weights[t][i] = ptx::exp2_approx(fmaf(weights[t][i], factor, -centres[i / 2]));
            }
        }
        if (of_all.begin > key || key + kOthers > of_all.end) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Run run = runs[owner.row(0, half)];
#pragma unroll
                for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                    for (int i = half * 2; i < half * 2 + 2; ++i) {
                        if (!run.holds(key + owner.column(t, i))) weights[t][i] = 0.0f;
                    }
                }
            }
        }
        ptx::wgmma_wait<kBehind ? 1 : 0>();
        ptx::keep(grads);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) grads[t][i] = weights[t][i] * (grads[t][i] - deltas[i / 2]);
        }
        if (slot >= 0) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t query = token + owner.row(0, half);
                if (owner.row(0, half) >= rows) continue;
                const LossRow row = loss_row(x, query, slot);
                const uint64_t pairs = x.supervision.bits(static_cast<int>(query), key);
#pragma unroll
                for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                    for (int i = half * 2; i < half * 2 + 2; ++i) {
                        const int column = owner.column(t, i);
                        grads[t][i] +=
                            loss_factor * row.gradient(weights[t][i], key + column, (pairs >> column & 1) != 0);
                    }
                }
            }
        }
        if constexpr (kBehind) {
            ptx::wgmma_wait_behind<0>(grads[0][0] + grads[kTiles - 1][3]);
            ptx::keep(sums[0]);
            ptx::keep(factors);
        }
        to_factor(grads, factors, x.q);
    };
    bool behind = false;
    for (int key = begin, n = 0; key < end + kOthers; key += kOthers, ++n) {
        ptx::cp_async_wait_all();
        ptx::fence_proxy_async();
        __syncthreads();  // this tile is there, and nobody reads the last but one
        if (key + kOthers < end) start(key + kOthers, n + 1);
        if (key < group_end && group_begin < key + kOthers) {
            if (behind) {
                turn(key, n, std::true_type());
            } else {
                turn(key, n, std::false_type());
            }
            behind = true;
        } else if (behind) {
            ptx::wgmma_fence();
            start_sum(sums[0], factors, tiles.other(0, n - 1));
            ptx::wgmma_wait<0>();
            ptx::keep(sums[0]);
            behind = false;
        }
    }
    const float scales[1][2] = {{x.scale, x.scale}};
    store_rows<kWidth>(sums, scales, dq + token * dq_stride + head * kWidth, dq_stride, rows);
#endif
}

// What the key gradient keeps in shared memory behind the tiles, so that registers are left for its sums: the same for all
// threads, and of each query of a tile.
struct Block {
    Sequence sequence;
    int first, rows;  // its keys
    int begin, end;   // the queries that see any of them
};
struct Queries {
    float lses[kOthers], deltas[kOthers];
    Run runs[kOthers];
    LossRow loss_rows[kOthers];                     // of a supervised head
    uint64_t pairs[kOthers][kBlockRows / kOthers];  // likewise; with the keys of the block
    Run some, all;                                  // the keys that some of them see, and that all do
    int32_t slot;                                   // of their head, if it is supervised, or −1
};
static_assert(kOthers == 64);  // the bits of a word
static_assert(sizeof(Block) + kTurns * sizeof(Queries) <= 9216);

template <int kWidth, bool kSupervised, typename T>
__device__ inline void key_gradient(const Backward<T>& x, T* dk, T* dv, int dk_stride, int dv_stride) {
#if defined(DTMEM_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) unsigned char memory[];
    const Tiles<kWidth, T> tiles{reinterpret_cast<T*>(memory)};
    Queries* stages = static_cast<Queries*>(tiles.end());
    Block& block = *reinterpret_cast<Block*>(stages + kTurns);

    if (threadIdx.x == 0) {
        int first;
        const Sequence sequence(
            x.pack, find_sequence(x.pack.keys, x.pack.sequences, kBlockRows, static_cast<int>(blockIdx.x), first));
        const int rows = min(kBlockRows, sequence.keys - first);
        const int begin = first_query(0, sequence.queries,
                                      [&](int query) { return x.mask.visible(sequence, query).end > first; });
        const int end = first_query(begin, sequence.queries,
                                    [&](int query) { return x.mask.visible(sequence, query).begin >= first + rows; });
        block = {sequence, first, rows, begin, end};
    }
    __syncthreads();
    if (block.rows <= 0) return;

    const Owner<kWidth, 1> owner;
    const int group_row = owner.warp / 4 * warpgroup::kRows;
    const int key_head = static_cast<int>(blockIdx.y), group = x.heads / x.key_heads;

    // Turn n: a tile of queries of one head, head by head. `query` is the next tile's first.
    int head = key_head * group, query = block.begin;
    const int turns = (block.end - block.begin + kOthers - 1) / kOthers * group;
    const auto start_next = [&](int n) {
        const Sequence& sequence = block.sequence;
        const int count = block.end - query;
        const int64_t token = sequence.first_query + query;
        load_swizzled<kOthers, kWidth>(tiles.other(0, n), x.q + token * x.q_stride + head * kWidth, x.q_stride, count);
        load_swizzled<kOthers, kWidth>(tiles.other(1, n), x.grad_out + token * x.grad_out_stride + head * kWidth,
                                       x.grad_out_stride, count);
        const int row = static_cast<int>(threadIdx.x) % kOthers, word = static_cast<int>(threadIdx.x) / kOthers;
        if (word < kBlockRows / kOthers) {
            Queries& queries = stages[n % kTurns];
            const bool exists = row < count;
            const int slot = active_slot<kSupervised>(x, sequence, head);
            if (slot >= 0) {
                queries.pairs[row][word] =
                    exists ? x.supervision.bits(static_cast<int>(token) + row, block.first + word * kOthers) : 0;
            }
            if (word == 0) {
                const int64_t at = (token + (exists ? row : 0)) * x.heads + head;
                ptx::cp_async_4_zfill(&queries.lses[row], x.lse + at, exists ? 4 : 0);
                ptx::cp_async_4_zfill(&queries.deltas[row], x.delta + at, exists ? 4 : 0);
                queries.runs[row] = exists ? x.mask.visible(sequence, query + row) : Run{0, 0};
                if (slot >= 0) {
                    queries.loss_rows[row] = exists ? loss_row(x, token + row, slot) : LossRow{-1, 0.0f, 0.0f};
                }
            } else if (row == 0) {
                const Run of_first = x.mask.visible(sequence, query);
                const Run of_last = x.mask.visible(sequence, query + min(kOthers, count) - 1);
                queries.some = {of_first.begin, of_last.end};
                queries.all = count < kOthers ? Run{0, 0} : Run{of_last.begin, of_first.end};
                queries.slot = slot;
            }
        }
        query += kOthers;
        if (query >= block.end) {
            query = block.begin;
            ++head;
        }
    };

    if (turns > 0) {
        const int64_t token = block.sequence.first_key + block.first;
        load_swizzled<kBlockRows, kWidth>(tiles.own(0), x.k + token * x.k_stride + key_head * kWidth, x.k_stride,
                                          block.rows);
        load_swizzled<kBlockRows, kWidth>(tiles.own(1), x.v + token * x.v_stride + key_head * kWidth, x.v_stride,
                                          block.rows);
        start_next(0);
    }

    const float factor = x.scale * kLog2E;
    float key_sums[1][kWidth / kColumns][4] = {}, value_sums[1][kWidth / kColumns][4] = {};
    uint32_t factors[kDepths][4];  // dSᵀ of a turn
    const auto turn = [&](int n, auto behind) {
        constexpr bool kBehind = decltype(behind)::value;
        const Queries& queries = stages[n % kTurns];
        float weights[kTiles][4], grads[kTiles][4];
        ptx::wgmma_fence();
        start_scores<kWidth, kOthers>(weights, tiles.own(0), group_row, tiles.other(0, n), 0);
        start_scores<kWidth, kOthers>(grads, tiles.own(1), group_row, tiles.other(1, n), 0);
        if constexpr (kBehind) start_sum(key_sums[0], factors, tiles.other(0, n - 1));
        ptx::wgmma_wait<kBehind ? 2 : 1>();
        ptx::keep(weights);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            float lse[2];
            load(&queries.lses[owner.column(t, 0)], lse);
            const float centre[2] = {centre_of(lse[0]), centre_of(lse[1])};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                weights[t][i] = ptx::exp2_approx(fmaf(weights[t][i], factor, -centre[i % 2]));
            }
        }
        const int first = block.first + owner.first_row;
        if (queries.all.begin > first || first + kMatrixRows > queries.all.end) {
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const Run run = queries.runs[owner.column(t, i)];
                    if (!run.holds(block.first + owner.row(0, i / 2))) weights[t][i] = 0.0f;
                }
            }
        }
        ptx::wgmma_wait<0>();
        ptx::keep(grads);
        if constexpr (kBehind) {
            ptx::keep(key_sums[0]);
            ptx::keep(factors);
        }
        to_factor(weights, factors, x.q);
        ptx::wgmma_fence();
        start_sum(value_sums[0], factors, tiles.other(1, n));
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            float delta[2];
            load(&queries.deltas[owner.column(t, 0)], delta);
#pragma unroll
            for (int i = 0; i < 4; ++i) grads[t][i] = weights[t][i] * (grads[t][i] - delta[i % 2]);
        }
        if (queries.slot >= 0) {
            const float loss_factor = *x.grad_memory_loss * *x.factor;
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = owner.column(t, i), own = owner.row(0, i / 2);
                    const uint64_t pairs = queries.pairs[column][own / kOthers];
                    const bool paired = (pairs >> own % kOthers & 1) != 0;
                    grads[t][i] +=
                        loss_factor * queries.loss_rows[column].gradient(weights[t][i], block.first + own, paired);
                }
            }
        }
        ptx::wgmma_wait<0>();
        ptx::keep(value_sums[0]);
        ptx::keep(factors);
        to_factor(grads, factors, x.q);
    };
    bool behind = false;
    for (int n = 0; n <= turns; ++n) {
        ptx::cp_async_wait_all();
        ptx::fence_proxy_async();
        __syncthreads();  // this tile is there, and nobody reads the last but one
        if (n + 1 < turns) start_next(n + 1);
        const Run some = n < turns ? stages[n % kTurns].some : Run{0, 0};
        const int first = block.first + group_row;
        if (first < some.end && some.begin < first + warpgroup::kRows) {
            if (behind) {
                turn(n, std::true_type());
            } else {
                turn(n, std::false_type());
            }
            behind = true;
        } else if (behind) {
            ptx::wgmma_fence();
            start_sum(key_sums[0], factors, tiles.other(0, n - 1));
            ptx::wgmma_wait<0>();
            ptx::keep(key_sums[0]);
            behind = false;
        }
    }
    const float ones[1][2] = {{1.0f, 1.0f}}, scales[1][2] = {{x.scale, x.scale}};
    const int64_t token = block.sequence.first_key + block.first;
    store_rows<kWidth>(value_sums, ones, dv + token * dv_stride + key_head * kWidth, dv_stride, block.rows);
    store_rows<kWidth>(key_sums, scales, dk + token * dk_stride + key_head * kWidth, dk_stride, block.rows);
#endif
}

}  // namespace

// Both: block 256; dynamic shared memory 640·width·2 bytes, and for the query gradient 1024, for the key gradient 9216.
// query gradient: grid (tokens_q / 128 + sequences, H). key gradient: grid (tokens_k / 128 + sequences, H_kv).
#define ATTENTION_GRADIENTS_HOPPER(NAME, T, WIDTH, KIND, SUPERVISED)                                                   \
    extern "C" __global__ void __launch_bounds__(kBlock, 1) attention_query_##KIND##_##WIDTH##_##NAME(                 \
        ATTENTION_INPUTS(T), T* dq, ATTENTION_SIZES, int32_t dq_stride, ATTENTION_NUMBERS) {                           \
        query_gradient<WIDTH, SUPERVISED>(ATTENTION_BACKWARD(T), dq, dq_stride);                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kBlock, 1) attention_key_##KIND##_##WIDTH##_##NAME(                   \
        ATTENTION_INPUTS(T), T* dk, T* dv, ATTENTION_SIZES, int32_t dk_stride, int32_t dv_stride, ATTENTION_NUMBERS) { \
        key_gradient<WIDTH, SUPERVISED>(ATTENTION_BACKWARD(T), dk, dv, dk_stride, dv_stride);                          \
    }

#define ATTENTION_GRADIENTS_HOPPER_KINDS(NAME, T, WIDTH)                                                               \
    ATTENTION_GRADIENTS_HOPPER(NAME, T, WIDTH, gradient_hopper, false)                                                 \
    ATTENTION_GRADIENTS_HOPPER(NAME, T, WIDTH, gradient_hopper_bce, true)

ATTENTION_GRADIENTS_HOPPER_KINDS(bf16, bf16, 64)
ATTENTION_GRADIENTS_HOPPER_KINDS(bf16, bf16, 128)
ATTENTION_GRADIENTS_HOPPER_KINDS(f16, f16, 64)
ATTENTION_GRADIENTS_HOPPER_KINDS(f16, f16, 128)
