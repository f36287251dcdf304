// Attention over a pack, forward, and the attention-BCE (memory) loss. Reference: attention.rs; SPEC section 3.
//
//   S_ij = scale·q_i·k_j over the keys that the mask shows,  out_i = Σ_j A_ij v_j,  A = exp(S − lse),  lse = log Σ exp S
//   row_loss_i = −Σ_j (E_ij log A_ij + (1 − E_ij) log(1 − A_ij)) for supervised heads of annotated sequences
//
// q, out [tokens_q, H, width]; k, v [tokens_k, H_kv, width], each with a token stride (elements) of its own, rows aligned
// to 16 bytes; lse [tokens_q, H] in f32. Query head h uses key head h·H_kv/H. Queries stand at the end of their keys.
//
// A block owns 128 queries of one head (f32 and width 128: 64, width 256: 32), a warp 32 (16) of them: the scores, the output and the
// running maximum and sum of its rows stay in registers. Tiles of keys and values come by asynchronous copies in two stages:
// one barrier a tile. A warp leaves out the tiles that none of its rows sees, and masks those that some of them see.
//
// The loss of a supervised head needs lse, so it is one more pass over the keys (attention_forward.cuh).
//
// Bytes: q, out once; k and v once for each tile of queries, from the second level cache. Operations: 4·width for every
// visible pair (6 with the loss). Bound by the matrix units for long sequences, in f32 by shared memory. For width 64, 32
// queries and 64 keys, a warp has 128 matrix instructions (256 cycles of an A100's units), reads shared memory by 40
// instructions of four matrices (160 cycles; with 16 rows to a warp it were 72), and does three operations on a score, a
// multiplication with addition, 2^x and an addition, besides its part of the maximum.
//
// History (not measured on a GPU yet)
//   1  mma.sync, cp.async with one buffer each for keys and values, padded rows, 16 rows to a warp
//   2  32 rows to a warp, two stages, swizzled rows (what padding took is room for the second stage), the scale folded into
//      the argument of 2^x, masks in the tiles of a warp that need them only
//   3  f32: the second product goes over a tile in a loop, two addresses serve all of its columns, and ptxas is told how many
//      blocks there will be: no spills, 0.6 to 0.8 of the instructions, and 191 to 214 registers from width 64 on (247 to 255
//      before)
//   4  the runs that a mask shows are found before the loop, and lie in shared memory: up to 32 registers fewer (sm_90a);
//      supervision is a template parameter (`bce`): 2288 to 3640 instructions without (sm_80), 5752 to 7872 with it

#include "attention_forward.cuh"

namespace {

using namespace attention;

// Keys of a tile.
template <typename T, int kWidth>
constexpr int kKeys = kWidth * sizeof(T) <= 256 ? 64 : kWidth * sizeof(T) <= 512 ? 32 : 16;

template <int kWidth, bool kSupervised, typename T>
__device__ inline void forward(const Forward<T>& x) {
    constexpr int kM = kMatrices<T, kWidth>;
    using Rows = Owner<kWidth, kM>;
    constexpr int kTileKeys = kKeys<T, kWidth>, kTiles = kTileKeys / kColumns, kTile = kTileKeys * kWidth;
    constexpr int kOut = Rows::kPartWidth / kColumns;
    extern __shared__ __align__(16) unsigned char memory[];
    T* query_tile = reinterpret_cast<T*>(memory);
    T* key_tiles = query_tile + Rows::kRows * kWidth;
    T* value_tiles = key_tiles + kStages * kTile;
    __shared__ Run runs[Rows::kRows];

    int first;
    const Sequence sequence(
        x.pack, find_sequence(x.pack.queries, x.pack.sequences, Rows::kRows, static_cast<int>(blockIdx.x), first));
    const int rows = min(Rows::kRows, sequence.queries - first);
    if (rows <= 0) return;

    const Rows owner;
    const int head = static_cast<int>(blockIdx.y), key_head = head / (x.heads / x.key_heads);
    const T* keys = x.k + static_cast<int64_t>(sequence.first_key) * x.k_stride + key_head * kWidth;
    const T* values = x.v + static_cast<int64_t>(sequence.first_key) * x.v_stride + key_head * kWidth;
    const int64_t token = sequence.first_query + first;
    const auto load_keys = [&](int key, int end, int n) {
        load_tile<kTileKeys, kWidth>(key_tiles + n % kStages * kTile, keys + static_cast<int64_t>(key) * x.k_stride,
                                     x.k_stride, end - key);
    };
    const auto load_values = [&](int key, int end, int n) {
        load_tile<kTileKeys, kWidth>(value_tiles + n % kStages * kTile, values + static_cast<int64_t>(key) * x.v_stride,
                                     x.v_stride, end - key);
    };

    // The runs of the first and the last query bound those of all between, for the block and for the warp.
    find_runs(runs, x.mask, sequence, first);
    __syncthreads();
    const int begin = runs[0].begin, end = runs[rows - 1].end;
    const bool works = owner.first_row < rows;
    const Run of_first = runs[owner.first_row];
    const Run of_last = runs[min(owner.first_row + Rows::kWarpRows, rows) - 1];
    const auto shown = [&](int key) { return works && key < of_last.end && of_first.begin < key + kTileKeys; };
    const auto shown_whole = [&](int key) { return of_last.begin <= key && key + kTileKeys <= of_first.end; };

    if (begin < end) {
        load_tile<Rows::kRows, kWidth>(query_tile, x.q + token * x.q_stride + head * kWidth, x.q_stride, rows);
        load_keys(begin, end, 0);
        load_values(begin, end, 0);
    }

    // The scale stands in the argument of 2^x. A factor of 0 would make NaN of what is hidden.
    const float factor = fmaxf(fabsf(x.scale) * kLog2E, kLeastFactor);
    float out[kM][kOut][4] = {};
    float maximum[kM][2], sum[kM][2] = {};  // maximum: of scores times factor
#pragma unroll
    for (int m = 0; m < kM; ++m) maximum[m][0] = maximum[m][1] = -kInfinity;
    for (int key = begin, n = 0; key < end; key += kTileKeys, ++n) {
        ptx::cp_async_wait_all();
        __syncthreads();  // this tile is there, and nobody works on the last one
        if (key + kTileKeys < end) {
            load_keys(key + kTileKeys, end, n + 1);
            load_values(key + kTileKeys, end, n + 1);
        }
        if (!shown(key)) continue;

        float scores[kM][kTiles][4] = {};
        multiply_transposed<kWidth>(scores, query_tile, owner.first_row, key_tiles + n % kStages * kTile);
        const bool whole = shown_whole(key), negative = x.scale < 0.0f;
        if (!whole || negative) {
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    hide(scores[m], half, runs[owner.row(m, half)], key, owner, negative);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float shrink = weigh(scores[m], half, factor, maximum[m][half], sum[m][half]);
#pragma unroll
                for (int t = 0; t < kOut; ++t) {
                    out[m][t][half * 2] *= shrink;
                    out[m][t][half * 2 + 1] *= shrink;
                }
            }
        }
        multiply<kWidth>(out, scores, value_tiles + n % kStages * kTile, owner.first_column);
    }

    float inverse[kM][2], lse[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float all = row_sum(sum[m][half]);
            const int row = owner.row(m, half);
            inverse[m][half] = all > 0.0f ? 1.0f / all : all;
            lse[m][half] = maximum[m][half] * kLn2 + logf(all);
            if (row < rows && owner.part == 0 && owner.lane % 4 == 0) {
                x.lse[(token + row) * x.heads + head] = lse[m][half];
            }
        }
    }
    store_rows<kWidth>(out, inverse, x.out + token * x.out_stride + head * kWidth, x.out_stride, rows);

    const int slot = slot_of<kSupervised>(x.supervision, head);
    if (slot < 0) return;
    const bool annotated = x.supervision.annotated[sequence.index] != 0;

    // 16 rows of each warp at a time: their sums want the registers.
#pragma unroll 1
    for (int m = 0; m < kM; ++m) {
        if (annotated && begin < end) {
            __syncthreads();  // nobody works on the last keys
            load_keys(begin, end, 0);
        }
        Run run[2];
        float own_lse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            run[half] = runs[owner.row(m, half)];
            own_lse[half] = m == 0 ? lse[0][half] : lse[kM - 1][half];
        }
        RowLoss losses[2];
        for (int key = begin, n = 0; annotated && key < end; key += kTileKeys, ++n) {
            ptx::cp_async_wait_all();
            __syncthreads();
            if (key + kTileKeys < end) load_keys(key + kTileKeys, end, n + 1);
            if (!shown(key)) continue;
            float scores[1][kTiles][4] = {};
            multiply_transposed<kWidth>(scores, query_tile, owner.first_row + m * kMatrixRows,
                                        key_tiles + n % kStages * kTile);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = owner.row(m, half);
                if (row >= rows) continue;
                const uint64_t pairs = x.supervision.bits(static_cast<int>(token) + row, key);
                add_losses(losses[half], scores[0], half, run[half], key, owner, x.scale, own_lse[half], pairs);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            losses[half].join(1);
            losses[half].join(2);
            const int row = owner.row(m, half);
            if (row >= rows || owner.part != 0 || owner.lane % 4 != 0) continue;
            const bool counts = annotated && run[half].begin < run[half].end;
            store_loss(x, token + row, slot, counts, losses[half]);
        }
    }
}

}  // namespace

// grid (tokens_q / rows + sequences, H), rows = 128 (f32 and width 128: 64, width 256: 32); block 128; dynamic shared memory
// (rows + 4·keys)·width·size bytes, keys = 64 (width·size > 256: 32, > 512: 16).
#define ATTENTION_FORWARD(NAME, T, WIDTH, KIND, SUPERVISED)                                                            \
    extern "C" __global__ void __launch_bounds__(kThreads, kResidentBlocks<T, WIDTH>)                                  \
        attention_##KIND##_##WIDTH##_##NAME(ATTENTION_FORWARD_PARAMETERS(T)) {                                         \
        forward<WIDTH, SUPERVISED>(ATTENTION_FORWARD_ARGUMENTS(T));                                                    \
    }

#define ATTENTION_FORWARD_KINDS(NAME, T, WIDTH)                                                                        \
    ATTENTION_FORWARD(NAME, T, WIDTH, forward, false)                                                                  \
    ATTENTION_FORWARD(NAME, T, WIDTH, forward_bce, true)

ATTENTION_FOR_ALL_WIDTHS(ATTENTION_FORWARD_KINDS, f32, float)
ATTENTION_FOR_ALL_WIDTHS(ATTENTION_FORWARD_KINDS, bf16, bf16)
ATTENTION_FOR_ALL_WIDTHS(ATTENTION_FORWARD_KINDS, f16, f16)

// sum = Σ row_loss; loss = sum / divisor and factor = 1 / divisor, both 0 when nothing is annotated. The divisor counts, for each
// supervised head and query of an annotated sequence, the sequence's keys (`square`) or those that the mask shows.
// One block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024)
    attention_loss(const float* row_loss, const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, const int32_t* groups,
                   const uint8_t* annotated, float* sum, float* loss, float* factor, int32_t sequences,
                   int32_t supervised, int32_t mask, int32_t window, int32_t square) {
    __shared__ float sums[1024];
    __shared__ int64_t counts[1024];
    const int thread = static_cast<int>(threadIdx.x);
    float own = 0.0f;
    int64_t count = 0;
    for (int token = thread; token < cu_seqlens_q[sequences]; token += 1024) {
        int query;
        const Sequence sequence({cu_seqlens_q, cu_seqlens_k, sequences},
                                find_token(cu_seqlens_q, sequences, token, query));
        if (annotated[sequence.index] == 0) continue;
        const Run run = Mask{mask, window, groups}.visible(sequence, query);
        count += square != 0 ? sequence.keys : run.end - run.begin;
        for (int slot = 0; slot < supervised; ++slot) own += row_loss[static_cast<int64_t>(token) * supervised + slot];
    }
    sums[thread] = own;
    counts[thread] = count;
    for (int half = 512; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) {
            sums[thread] += sums[thread + half];
            counts[thread] += counts[thread + half];
        }
    }
    if (thread == 0) {
        const int64_t divisor = counts[0] * supervised;
        const float inverse = divisor == 0 ? 0.0f : 1.0f / static_cast<float>(divisor);
        *sum = sums[0];
        *loss = sums[0] * inverse;
        *factor = inverse;
    }
}
