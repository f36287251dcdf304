// Attention over a pack, backward, with the gradient of the attention-BCE. Reference: attention.rs; SPEC section 3.
// Shapes, packs, masks and strides as in attention_forward.cu.
//
//   dP_ij = dO_i·v_j,  Δ_i = dO_i·out_i
//   dS_ij = A_ij (dP_ij − Δ_i) + c·(gradient of row_loss_i),  c = grad_memory_loss·factor
//   dq_i = scale·Σ_j dS_ij k_j,  dk_j = scale·Σ_i dS_ij q_i,  dv_j = Σ_i A_ij dO_i
//
// Three launches: attention_delta (Δ, a warp per row), attention_query_gradient and attention_key_gradient. The second
// walks over keys as the forward pass does. In the third a block owns 128 keys of one key head (f32 and width 128: 64, width
// 256: 32), a warp 32 (16) of them, and walks over the queries that see them, of all query heads of the group in their
// order; it computes Sᵀ and dPᵀ, so that dk and dv stay in registers. Every sum has one order: no atomics, the same bits.
// Scores are computed anew in both, 10 operations per width and visible pair where one kernel with atomics needs 7. In both
// the other side's tiles come in two stages, and a warp leaves out and masks tiles as in the forward pass.
//
// Bytes: q, k, v, dO read and dq, dk, dv written once, and the others' tiles once per tile from the second level cache.
// Bound by the matrix units for long sequences, in f32 by shared memory. For width 64, a warp reads shared memory
// by 40 instructions of four matrices for 96 matrix instructions (query gradient, 32 keys), and by 32 for 64 (key gradient,
// 16 queries): 160 and 128 cycles where an A100's matrix units take 192 and 128. With 16 rows to a warp it were 64 and 48.
//
// In f16 the gradients have the type's range, 6e-8 … 65504: callers scale the loss as usual.
//
// History (not measured on a GPU yet)
//   1  mma.sync; the tile is copied asynchronously, but waited for; padded rows, 16 rows to a warp
//   2  two stages, with a query's lse and Δ among what is copied; 32 rows to a warp where its accumulators fit; swizzled rows;
//      one multiplication with addition for the argument of 2^x; masks and pairs only in the tiles that have some
//   3  in the query gradient launch bounds, and the factor of the loss is read where it is needed: no spills in bf16 and f16,
//      with three blocks to an H100's multiprocessor for width 256
//   4  f32: as version 3 of the forward pass; no spills, and 0.5 to 0.9 of the instructions
//   5  as version 4 of the forward pass; the key gradient has a query's run with its lse, and looks for no end of a group in
//      the loop; a third block on a multiprocessor for width 32 in the query gradient, too

#include "attention_backward.cuh"

namespace {

using namespace attention;

// The other side's tokens in a tile.
template <typename T, int kWidth>
constexpr int kOthers = kWidth * sizeof(T) <= 256 ? 32 : kWidth * sizeof(T) <= 512 ? 16 : 8;
// In the key gradient, whose two sums leave fewer registers.
template <typename T, int kWidth>
constexpr int kQueries = kMatrices<T, kWidth> == 2 && kWidth == 64 ? 16 : kOthers<T, kWidth>;

// In the query gradient a third block fits for these widths.
template <typename T, int kWidth>
constexpr int kQueryBlocks = sizeof(T) < sizeof(float) && (kWidth == 32 || kWidth == 256) ? 3 : kResidentBlocks<T, kWidth>;

template <int kWidth, bool kSupervised, typename T>
__device__ inline void query_gradient(const Backward<T>& x, T* dq, int dq_stride) {
    constexpr int kM = kMatrices<T, kWidth>;
    using Rows = Owner<kWidth, kM>;
    constexpr int kTileKeys = kOthers<T, kWidth>, kTiles = kTileKeys / kColumns, kTile = kTileKeys * kWidth;
    extern __shared__ __align__(16) unsigned char memory[];
    T* query_tile = reinterpret_cast<T*>(memory);
    T* grad_tile = query_tile + Rows::kRows * kWidth;
    T* key_tiles = grad_tile + Rows::kRows * kWidth;
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
    const int slot = active_slot<kSupervised>(x, sequence, head);
    find_runs(runs, x.mask, sequence, first);
    __syncthreads();
    const int begin = runs[0].begin, end = runs[rows - 1].end;
    const bool works = owner.first_row < rows;
    const Run of_first = runs[owner.first_row];
    const Run of_last = runs[min(owner.first_row + Rows::kWarpRows, rows) - 1];
    float centres[kM][2] = {}, deltas[kM][2] = {};
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = owner.row(m, half);
            if (row >= rows) continue;
            centres[m][half] = centre_of(x.lse[(token + row) * x.heads + head]);
            deltas[m][half] = x.delta[(token + row) * x.heads + head];
        }
    }
    const auto start = [&](int key, int n) {
        load_tile<kTileKeys, kWidth>(key_tiles + n % kStages * kTile, keys + static_cast<int64_t>(key) * x.k_stride,
                                     x.k_stride, end - key);
        load_tile<kTileKeys, kWidth>(value_tiles + n % kStages * kTile, values + static_cast<int64_t>(key) * x.v_stride,
                                     x.v_stride, end - key);
    };
    if (begin < end) {
        load_tile<Rows::kRows, kWidth>(query_tile, x.q + token * x.q_stride + head * kWidth, x.q_stride, rows);
        load_tile<Rows::kRows, kWidth>(grad_tile, x.grad_out + token * x.grad_out_stride + head * kWidth,
                                       x.grad_out_stride, rows);
        start(begin, 0);
    }

    const float factor = x.scale * kLog2E;
    float sums[kM][Rows::kPartWidth / kColumns][4] = {};
    for (int key = begin, n = 0; key < end; key += kTileKeys, ++n) {
        ptx::cp_async_wait_all();
        __syncthreads();  // this tile is there, and nobody works on the last one
        if (key + kTileKeys < end) start(key + kTileKeys, n + 1);
        if (!works || key >= of_last.end || key + kTileKeys <= of_first.begin) continue;

        const T* key_tile = key_tiles + n % kStages * kTile;
        float weights[kM][kTiles][4] = {}, grads[kM][kTiles][4] = {};
        multiply_transposed<kWidth>(weights, query_tile, owner.first_row, key_tile);
        multiply_transposed<kWidth>(grads, grad_tile, owner.first_row, value_tiles + n % kStages * kTile);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float weight = ptx::exp2_approx(fmaf(weights[m][t][i], factor, -centres[m][i / 2]));
                    weights[m][t][i] = weight;
                    grads[m][t][i] = weight * (grads[m][t][i] - deltas[m][i / 2]);
                }
            }
        }
        if (of_last.begin > key || key + kTileKeys > of_first.end) {
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Run run = runs[owner.row(m, half)];
#pragma unroll
                    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                        for (int i = half * 2; i < half * 2 + 2; ++i) {
                            if (!run.holds(key + owner.column(t, i))) weights[m][t][i] = grads[m][t][i] = 0.0f;
                        }
                    }
                }
            }
        }
        if (slot >= 0) {
            const float loss_factor = *x.grad_memory_loss * *x.factor;
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int64_t query = token + owner.row(m, half);
                    if (owner.row(m, half) >= rows) continue;
                    const LossRow row = loss_row(x, query, slot);
                    const uint64_t pairs = x.supervision.bits(static_cast<int>(query), key);
#pragma unroll
                    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                        for (int i = half * 2; i < half * 2 + 2; ++i) {
                            const int column = owner.column(t, i);
                            grads[m][t][i] += loss_factor * row.gradient(weights[m][t][i], key + column,
                                                                         (pairs >> column & 1) != 0);
                        }
                    }
                }
            }
        }
        multiply<kWidth>(sums, grads, key_tile, owner.first_column);
    }
    float scales[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) scales[m][0] = scales[m][1] = x.scale;
    store_rows<kWidth>(sums, scales, dq + token * dq_stride + head * kWidth, dq_stride, rows);
}

template <int kWidth, bool kSupervised, typename T>
__device__ inline void key_gradient(const Backward<T>& x, T* dk, T* dv, int dk_stride, int dv_stride) {
    constexpr int kM = kMatrices<T, kWidth>;
    using Rows = Owner<kWidth, kM>;
    constexpr int kTileQueries = kQueries<T, kWidth>, kTiles = kTileQueries / kColumns, kTile = kTileQueries * kWidth;
    constexpr int kWords = (Rows::kRows + 63) / 64;
    extern __shared__ __align__(16) unsigned char memory[];
    T* key_tile = reinterpret_cast<T*>(memory);
    T* value_tile = key_tile + Rows::kRows * kWidth;
    T* query_tiles = value_tile + Rows::kRows * kWidth;
    T* grad_tiles = query_tiles + kStages * kTile;
    // Of the queries of a tile.
    __shared__ Run runs[kStages][kTileQueries];
    __shared__ alignas(8) float lses[kStages][kTileQueries];
    __shared__ alignas(8) float deltas[kStages][kTileQueries];
    __shared__ LossRow loss_rows[kStages][kTileQueries];
    __shared__ uint64_t query_pairs[kStages][kTileQueries][kWords];

    int first;
    const Sequence sequence(
        x.pack, find_sequence(x.pack.keys, x.pack.sequences, Rows::kRows, static_cast<int>(blockIdx.x), first));
    const int rows = min(Rows::kRows, sequence.keys - first);
    if (rows <= 0) return;

    const Rows owner;
    const int key_head = static_cast<int>(blockIdx.y), group = x.heads / x.key_heads;
    const int64_t token = sequence.first_key + first;
    // The queries that see any of these keys.
    const int begin = first_query(0, sequence.queries,
                                  [&](int query) { return x.mask.visible(sequence, query).end > first; });
    const int end = first_query(begin, sequence.queries,
                                [&](int query) { return x.mask.visible(sequence, query).begin >= first + rows; });
    const int own_begin = first + owner.first_row, own_end = first + min(owner.first_row + Rows::kWarpRows, rows);

    // Step n: a tile of queries of one head, head by head.
    const int of_head = (end - begin + kTileQueries - 1) / kTileQueries, steps = of_head * group;
    const auto head_of = [&](int n) { return key_head * group + n / of_head; };
    const auto query_of = [&](int n) { return begin + n % of_head * kTileQueries; };
    const auto start = [&](int n) {
        const int head = head_of(n), query = query_of(n), queries = end - query, stage = n % kStages;
        const int64_t query_token = sequence.first_query + query;
        load_tile<kTileQueries, kWidth>(query_tiles + stage * kTile, x.q + query_token * x.q_stride + head * kWidth,
                                        x.q_stride, queries);
        load_tile<kTileQueries, kWidth>(grad_tiles + stage * kTile,
                                        x.grad_out + query_token * x.grad_out_stride + head * kWidth, x.grad_out_stride,
                                        queries);
        const int row = static_cast<int>(threadIdx.x);
        if (row >= kTileQueries) return;
        const bool exists = row < queries;
        runs[stage][row] = exists ? x.mask.visible(sequence, query + row) : Run{0, 0};
        const int64_t at = (query_token + (exists ? row : 0)) * x.heads + head;
        ptx::cp_async_4_zfill(&lses[stage][row], x.lse + at, exists ? 4 : 0);
        ptx::cp_async_4_zfill(&deltas[stage][row], x.delta + at, exists ? 4 : 0);
        const int slot = active_slot<kSupervised>(x, sequence, head);
        if (slot < 0) return;
        loss_rows[stage][row] = exists ? loss_row(x, query_token + row, slot) : LossRow{-1, 0.0f, 0.0f};
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
            query_pairs[stage][row][word] =
                exists ? x.supervision.bits(static_cast<int>(query_token) + row, first + word * 64) : 0;
        }
    };

    if (steps > 0) {
        load_tile<Rows::kRows, kWidth>(key_tile, x.k + token * x.k_stride + key_head * kWidth, x.k_stride, rows);
        load_tile<Rows::kRows, kWidth>(value_tile, x.v + token * x.v_stride + key_head * kWidth, x.v_stride, rows);
        start(0);
    }

    const float factor = x.scale * kLog2E;
    float key_sums[kM][Rows::kPartWidth / kColumns][4] = {}, value_sums[kM][Rows::kPartWidth / kColumns][4] = {};
    for (int n = 0; n < steps; ++n) {
        ptx::cp_async_wait_all();
        __syncthreads();  // this tile is there, and nobody works on the last one
        if (n + 1 < steps) start(n + 1);
        const int stage = n % kStages, queries = min(kTileQueries, end - query_of(n));
        const Run of_first = runs[stage][0], of_last = runs[stage][queries - 1];
        if (own_begin >= own_end || own_begin >= of_last.end || own_end <= of_first.begin) continue;

        const T* query_tile = query_tiles + stage * kTile;
        const T* grad_tile = grad_tiles + stage * kTile;
        float weights[kM][kTiles][4] = {}, grads[kM][kTiles][4] = {};
        multiply_transposed<kWidth>(weights, key_tile, owner.first_row, query_tile);
        multiply_transposed<kWidth>(grads, value_tile, owner.first_row, grad_tile);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            float lse[2], delta[2];
            load(&lses[stage][owner.column(t, 0)], lse);
            load(&deltas[stage][owner.column(t, 0)], delta);
            const float centre[2] = {centre_of(lse[0]), centre_of(lse[1])};
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float weight = ptx::exp2_approx(fmaf(weights[m][t][i], factor, -centre[i % 2]));
                    weights[m][t][i] = weight;
                    grads[m][t][i] = weight * (grads[m][t][i] - delta[i % 2]);
                }
            }
        }
        if (queries < kTileQueries || of_last.begin > own_begin || own_end > of_first.end) {
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const Run run = runs[stage][owner.column(t, side)];
#pragma unroll
                    for (int m = 0; m < kM; ++m) {
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            if (run.holds(first + owner.row(m, half))) continue;
                            weights[m][t][half * 2 + side] = grads[m][t][half * 2 + side] = 0.0f;
                        }
                    }
                }
            }
        }
        if (active_slot<kSupervised>(x, sequence, head_of(n)) >= 0) {
            const float loss_factor = *x.grad_memory_loss * *x.factor;
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const int column = owner.column(t, side);
                    const LossRow& row = loss_rows[stage][column];
#pragma unroll
                    for (int m = 0; m < kM; ++m) {
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const int own = owner.row(m, half), i = half * 2 + side;
                            const uint64_t pairs = query_pairs[stage][column][own / 64];
                            grads[m][t][i] += loss_factor * row.gradient(weights[m][t][i], first + own,
                                                                         (pairs >> own % 64 & 1) != 0);
                        }
                    }
                }
            }
        }
        multiply<kWidth>(value_sums, weights, grad_tile, owner.first_column);
        multiply<kWidth>(key_sums, grads, query_tile, owner.first_column);
    }
    float ones[kM][2], scales[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
        ones[m][0] = ones[m][1] = 1.0f;
        scales[m][0] = scales[m][1] = x.scale;
    }
    store_rows<kWidth>(value_sums, ones, dv + token * dv_stride + key_head * kWidth, dv_stride, rows);
    store_rows<kWidth>(key_sums, scales, dk + token * dk_stride + key_head * kWidth, dk_stride, rows);
}

// Δ of a row per warp.
template <typename T>
__device__ inline void delta_rows(const T* grad_out, const T* out, float* delta, int tokens, int heads, int width,
                                  int grad_out_stride, int out_stride) {
    constexpr int kSize = kVectorSize<T>;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
    if (row >= static_cast<int64_t>(tokens) * heads) return;
    const int64_t token = row / heads, column = row % heads * width;
    float sum = 0.0f;
    for (int i = lane * kSize; i < width; i += kWarpSize * kSize) {
        float gradient[kSize], value[kSize];
        load<kSize>(grad_out + token * grad_out_stride + column + i, gradient);
        load<kSize>(out + token * out_stride + column + i, value);
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum += gradient[j] * value[j];
    }
    sum = warp_sum(sum);
    if (lane == 0) delta[row] = sum;
}

}  // namespace

// delta [tokens, H]; grid ⌈tokens·H / 4⌉, block 128.
#define ATTENTION_DELTA(NAME, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads) attention_delta_##NAME(                                     \
        const T* grad_out, const T* out, float* delta, int32_t tokens, int32_t heads, int32_t width,                   \
        int32_t grad_out_stride, int32_t out_stride) {                                                                 \
        delta_rows(grad_out, out, delta, tokens, heads, width, grad_out_stride, out_stride);                           \
    }

// Both: block 128; dynamic shared memory (2·rows + 4·others)·width·size bytes with rows = 128 (f32 and width
// 128: 64, width 256: 32) and others = 32 (width·size > 256: 16, > 512: 8; width 64 of the key gradient, but in f32: 16).
// Without supervision the pointers from `slots` to `grad_memory_loss` are null.
// query gradient: grid (tokens_q / rows + sequences, H). key gradient: grid (tokens_k / rows + sequences, H_kv).
#define ATTENTION_GRADIENTS(NAME, T, WIDTH, KIND, SUPERVISED)                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads, kQueryBlocks<T, WIDTH>)                                     \
        attention_query_##KIND##_##WIDTH##_##NAME(                                                                     \
        ATTENTION_INPUTS(T), T* dq, ATTENTION_SIZES, int32_t dq_stride, ATTENTION_NUMBERS) {                           \
        query_gradient<WIDTH, SUPERVISED>(ATTENTION_BACKWARD(T), dq, dq_stride);                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads, kResidentBlocks<T, WIDTH>)                                  \
        attention_key_##KIND##_##WIDTH##_##NAME(                                                                       \
        ATTENTION_INPUTS(T), T* dk, T* dv, ATTENTION_SIZES, int32_t dk_stride, int32_t dv_stride, ATTENTION_NUMBERS) { \
        key_gradient<WIDTH, SUPERVISED>(ATTENTION_BACKWARD(T), dk, dv, dk_stride, dv_stride);                          \
    }

#define ATTENTION_GRADIENTS_KINDS(NAME, T, WIDTH)                                                                      \
    ATTENTION_GRADIENTS(NAME, T, WIDTH, gradient, false)                                                               \
    ATTENTION_GRADIENTS(NAME, T, WIDTH, gradient_bce, true)

ATTENTION_DELTA(f32, float)
ATTENTION_DELTA(bf16, bf16)
ATTENTION_DELTA(f16, f16)
ATTENTION_FOR_ALL_WIDTHS(ATTENTION_GRADIENTS_KINDS, f32, float)
ATTENTION_FOR_ALL_WIDTHS(ATTENTION_GRADIENTS_KINDS, bf16, bf16)
ATTENTION_FOR_ALL_WIDTHS(ATTENTION_GRADIENTS_KINDS, f16, f16)
