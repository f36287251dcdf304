// Attention over a pack, backward, with the gradient of the attention-BCE. Reference: attention.rs; SPEC section 3.
// Shapes, packs, masks and strides as in attention_forward.cu.
//
//   dP_ij = dO_i·v_j,  Δ_i = dO_i·out_i
//   dS_ij = A_ij (dP_ij − Δ_i) + c·(gradient of row_loss_i),  c = grad_memory_loss·factor
//   dq_i = scale·Σ_j dS_ij k_j,  dk_j = scale·Σ_i dS_ij q_i,  dv_j = Σ_i A_ij dO_i
//
// Three launches: attention_delta (Δ, a warp per row), attention_query_gradient and attention_key_gradient. The second
// walks over keys as the forward pass does. In the third a block owns 64 keys of one key head (32 for width 256), a
// warp 16 of them, and walks over the queries that see them, of all query heads of the group in their order; it
// computes Sᵀ and dPᵀ, so that dk and dv stay in registers. Every sum has one order: no atomics, the same bits.
// Scores are computed anew in both, 10 operations per width and visible pair where one kernel with atomics needs 7.
//
// Bytes: q, k, v, dO read and dq, dk, dv written once, and the others' tiles once per tile from the second level cache.
// Bound by the matrix units for long sequences, in f32 by shared memory.
//
// In f16 the gradients have the type's range, 6e-8 … 65504: callers scale the loss as usual.
//
// History (not measured on a GPU yet)
//   1  this version: mma.sync; the tile is copied asynchronously, but waited for

#include "attention.cuh"

namespace {

using namespace attention;

// The other side's tokens in a tile.
template <typename T, int kWidth>
constexpr int kOthers = kWidth * sizeof(T) <= 512 ? 32 : 16;

template <typename T>
struct Backward {
    const T *q, *k, *v, *grad_out;
    const float *lse, *delta;  // [tokens_q, H]
    Pack pack;
    Mask mask;
    Supervision supervision;
    const int32_t* peak;  // these three [tokens_q, supervised heads]
    const float *shift, *at_peak;
    const float *factor, *grad_memory_loss;  // [1] each
    int32_t heads, key_heads, q_stride, k_stride, v_stride, grad_out_stride;
    float scale;
};

// What a query's row of scores needs for its gradient.
struct Row {
    Run run;
    float lse, delta;
    int peak;
    float shift, at_peak;

    // Gradient of the row's loss into the score of `key`.
    __device__ float loss_gradient(float weight, int key, bool paired) const {
        return key == peak ? -weight * at_peak : loss_slope(weight, paired) - weight * shift;
    }
};

template <typename T>
__device__ inline Row row_of(const Backward<T>& x, const Sequence& sequence, int query, int head, int slot) {
    const int64_t token = sequence.first_query + query, at = token * x.supervision.count + slot;
    const bool supervised = slot >= 0;
    return {x.mask.visible(sequence, query),
            x.lse[token * x.heads + head],
            x.delta[token * x.heads + head],
            supervised ? x.peak[at] : -1,
            supervised ? x.shift[at] : 0.0f,
            supervised ? x.at_peak[at] : 0.0f};
}

// The slot of the head if it is supervised and the sequence annotated, or −1.
template <typename T>
__device__ inline int active_slot(const Backward<T>& x, const Sequence& sequence, int head) {
    const int slot = x.supervision.slot(head);
    return slot >= 0 && x.supervision.annotated[sequence.index] != 0 ? slot : -1;
}

template <int kWidth, typename T>
__device__ inline void query_gradient(const Backward<T>& x, T* dq, int dq_stride) {
    using Sizes = Tile<T, kWidth>;
    constexpr int kTileKeys = kOthers<T, kWidth>, kPitch = Sizes::kPitch, kTiles = kTileKeys / kColumns;
    extern __shared__ __align__(16) unsigned char memory[];
    T* query_tile = reinterpret_cast<T*>(memory);
    T* grad_tile = query_tile + Sizes::kRows * kPitch;
    T* key_tile = grad_tile + Sizes::kRows * kPitch;
    T* value_tile = key_tile + kTileKeys * kPitch;

    int first;
    const Sequence sequence(
        x.pack, find_sequence(x.pack.queries, x.pack.sequences, Sizes::kRows, static_cast<int>(blockIdx.x), first));
    const int rows = min(Sizes::kRows, sequence.queries - first);
    if (rows <= 0) return;

    const Owner<T, kWidth> owner;
    const int head = static_cast<int>(blockIdx.y), key_head = head / (x.heads / x.key_heads);
    const T* keys = x.k + static_cast<int64_t>(sequence.first_key) * x.k_stride + key_head * kWidth;
    const T* values = x.v + static_cast<int64_t>(sequence.first_key) * x.v_stride + key_head * kWidth;
    const int64_t token = sequence.first_query + first;
    const int slot = active_slot(x, sequence, head);
    const float loss_factor = slot < 0 ? 0.0f : *x.grad_memory_loss * *x.factor;

    const Run first_run = x.mask.visible(sequence, first), last_run = x.mask.visible(sequence, first + rows - 1);
    const int end = last_run.end;
    Row own[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (owner.row(half) < rows) own[half] = row_of(x, sequence, first + owner.row(half), head, slot);
    }

    if (first_run.begin < end) {
        load_tile<Sizes::kRows, kWidth>(query_tile, x.q + token * x.q_stride + head * kWidth, x.q_stride, rows);
        load_tile<Sizes::kRows, kWidth>(grad_tile, x.grad_out + token * x.grad_out_stride + head * kWidth,
                                        x.grad_out_stride, rows);
    }

    float sums[Sizes::kPartWidth / kColumns][4] = {};
    for (int key = first_run.begin; key < end; key += kTileKeys) {
        __syncthreads();  // nobody works on the last tile
        load_tile<kTileKeys, kWidth>(key_tile, keys + static_cast<int64_t>(key) * x.k_stride, x.k_stride, end - key);
        load_tile<kTileKeys, kWidth>(value_tile, values + static_cast<int64_t>(key) * x.v_stride, x.v_stride, end - key);
        ptx::cp_async_wait_all();
        __syncthreads();

        float scores[kTiles][4] = {}, grads[kTiles][4] = {};
        multiply_transposed<kWidth, kPitch>(scores, query_tile + owner.first_row * kPitch, key_tile);
        multiply_transposed<kWidth, kPitch>(grads, grad_tile + owner.first_row * kPitch, value_tile);
        const bool whole = last_run.begin <= key && key + kTileKeys <= first_run.end && rows == Sizes::kRows;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Row& row = own[half];
            const bool supervised = slot >= 0 && owner.row(half) < rows;
            const uint64_t pairs = supervised ? x.supervision.bits(static_cast<int>(token) + owner.row(half), key) : 0;
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i) {
                    const int column = owner.column(n, i);
                    const bool shown = whole || row.run.holds(key + column);
                    const float weight =
                        shown ? ptx::exp2_approx((scores[n][i] * x.scale - row.lse) * kLog2E) : 0.0f;
                    scores[n][i] = weight * (grads[n][i] - row.delta);
                    if (supervised) {
                        scores[n][i] +=
                            loss_factor * row.loss_gradient(weight, key + column, (pairs >> column & 1) != 0 && shown);
                    }
                }
            }
        }
        multiply<kPitch>(sums, scores, key_tile + owner.first_column);
    }
    const float factor[2] = {x.scale, x.scale};
    store_rows<kWidth>(sums, factor, dq + token * dq_stride + head * kWidth, dq_stride, rows);
}

// The first query from `begin` on for which `holds` is true; it stays true for those behind.
template <typename Condition>
__device__ inline int first_query(int begin, int end, Condition holds) {
    while (begin < end) {
        const int middle = (begin + end) / 2;
        if (holds(middle)) {
            end = middle;
        } else {
            begin = middle + 1;
        }
    }
    return begin;
}

template <int kWidth, typename T>
__device__ inline void key_gradient(const Backward<T>& x, T* dk, T* dv, int dk_stride, int dv_stride) {
    using Sizes = Tile<T, kWidth>;
    constexpr int kTileQueries = kOthers<T, kWidth>, kPitch = Sizes::kPitch, kTiles = kTileQueries / kColumns;
    extern __shared__ __align__(16) unsigned char memory[];
    T* key_tile = reinterpret_cast<T*>(memory);
    T* value_tile = key_tile + Sizes::kRows * kPitch;
    T* query_tile = value_tile + Sizes::kRows * kPitch;
    T* grad_tile = query_tile + kTileQueries * kPitch;
    __shared__ Row query_rows[kTileQueries];
    __shared__ uint64_t query_pairs[kTileQueries];

    int first;
    const Sequence sequence(
        x.pack, find_sequence(x.pack.keys, x.pack.sequences, Sizes::kRows, static_cast<int>(blockIdx.x), first));
    const int rows = min(Sizes::kRows, sequence.keys - first);
    if (rows <= 0) return;

    const Owner<T, kWidth> owner;
    const int key_head = static_cast<int>(blockIdx.y), group = x.heads / x.key_heads;
    const int64_t token = sequence.first_key + first;
    // The queries that see any of these keys.
    const int begin = first_query(0, sequence.queries,
                                  [&](int query) { return x.mask.visible(sequence, query).end > first; });
    const int end = first_query(begin, sequence.queries,
                                [&](int query) { return x.mask.visible(sequence, query).begin >= first + rows; });

    if (begin < end) {
        load_tile<Sizes::kRows, kWidth>(key_tile, x.k + token * x.k_stride + key_head * kWidth, x.k_stride, rows);
        load_tile<Sizes::kRows, kWidth>(value_tile, x.v + token * x.v_stride + key_head * kWidth, x.v_stride, rows);
    }

    float key_sums[Sizes::kPartWidth / kColumns][4] = {}, value_sums[Sizes::kPartWidth / kColumns][4] = {};
    for (int head = key_head * group; head < (key_head + 1) * group; ++head) {
        const int slot = active_slot(x, sequence, head);
        const float loss_factor = slot < 0 ? 0.0f : *x.grad_memory_loss * *x.factor;
        for (int query = begin; query < end; query += kTileQueries) {
            const int queries = min(kTileQueries, end - query);
            const int64_t query_token = sequence.first_query + query;
            __syncthreads();  // nobody works on the last tile
            load_tile<kTileQueries, kWidth>(query_tile, x.q + query_token * x.q_stride + head * kWidth, x.q_stride, queries);
            load_tile<kTileQueries, kWidth>(grad_tile, x.grad_out + query_token * x.grad_out_stride + head * kWidth,
                                            x.grad_out_stride, queries);
            if (threadIdx.x < kTileQueries) {
                const int row = static_cast<int>(threadIdx.x);
                query_rows[row] = row < queries ? row_of(x, sequence, query + row, head, slot) : Row{};
                query_pairs[row] = row < queries && slot >= 0
                                       ? x.supervision.bits(static_cast<int>(query_token) + row, first)
                                       : 0;
            }
            ptx::cp_async_wait_all();
            __syncthreads();

            float weights[kTiles][4] = {}, grads[kTiles][4] = {};
            multiply_transposed<kWidth, kPitch>(weights, key_tile + owner.first_row * kPitch, query_tile);
            multiply_transposed<kWidth, kPitch>(grads, value_tile + owner.first_row * kPitch, grad_tile);
            const bool whole = queries == kTileQueries &&
                               query_rows[kTileQueries - 1].run.begin <= first && first + rows <= query_rows[0].run.end;
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const Row& row = query_rows[owner.column(n, side)];
                    const uint64_t pairs = query_pairs[owner.column(n, side)];
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int i = half * 2 + side, key = first + owner.row(half);
                        const bool shown = whole || row.run.holds(key);
                        const float weight =
                            shown ? ptx::exp2_approx((weights[n][i] * x.scale - row.lse) * kLog2E) : 0.0f;
                        weights[n][i] = weight;
                        grads[n][i] = weight * (grads[n][i] - row.delta);
                        if (slot >= 0) {
                            const bool paired = shown && (pairs >> owner.row(half) & 1) != 0;
                            grads[n][i] += loss_factor * row.loss_gradient(weight, key, paired);
                        }
                    }
                }
            }
            multiply<kPitch>(value_sums, weights, grad_tile + owner.first_column);
            multiply<kPitch>(key_sums, grads, query_tile + owner.first_column);
        }
    }
    const float one[2] = {1.0f, 1.0f}, factor[2] = {x.scale, x.scale};
    store_rows<kWidth>(value_sums, one, dv + token * dv_stride + key_head * kWidth, dv_stride, rows);
    store_rows<kWidth>(key_sums, factor, dk + token * dk_stride + key_head * kWidth, dk_stride, rows);
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

#define ATTENTION_INPUTS(T)                                                                                            \
    const T *q, const T *k, const T *v, const T *grad_out, const float *lse, const float *delta,                       \
        const int32_t *cu_seqlens_q, const int32_t *cu_seqlens_k, const int32_t *groups, const int32_t *slots,         \
        const uint8_t *annotated, const int32_t *pair_offsets, const int32_t *pair_keys, const int32_t *peak,          \
        const float *shift, const float *at_peak, const float *factor, const float *grad_memory_loss
#define ATTENTION_SIZES                                                                                                \
    int32_t sequences, int32_t heads, int32_t key_heads, int32_t supervised, int32_t q_stride, int32_t k_stride,       \
        int32_t v_stride, int32_t grad_out_stride
#define ATTENTION_NUMBERS int32_t mask, int32_t window, float scale
#define ATTENTION_BACKWARD(T)                                                                                          \
    Backward<T> {                                                                                                      \
        q, k, v, grad_out, lse, delta, {cu_seqlens_q, cu_seqlens_k, sequences}, {mask, window, groups},                \
            {slots, annotated, pair_offsets, pair_keys, supervised}, peak, shift, at_peak, factor, grad_memory_loss,   \
            heads, key_heads, q_stride, k_stride, v_stride, grad_out_stride, scale                                     \
    }

// Both: block 128; dynamic shared memory 2·(rows + others)·(width·size + 16) bytes with rows = 64 (width 256: 32) and
// others = 32 (width·size > 512: 16). Without supervision the pointers from `slots` to `grad_memory_loss` are null.
// query gradient: grid (tokens_q / rows + sequences, H). key gradient: grid (tokens_k / rows + sequences, H_kv).
#define ATTENTION_GRADIENTS(NAME, T, WIDTH)                                                                            \
    extern "C" __global__ void __launch_bounds__(kThreads) attention_query_gradient_##WIDTH##_##NAME(                  \
        ATTENTION_INPUTS(T), T* dq, ATTENTION_SIZES, int32_t dq_stride, ATTENTION_NUMBERS) {                           \
        query_gradient<WIDTH>(ATTENTION_BACKWARD(T), dq, dq_stride);                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads) attention_key_gradient_##WIDTH##_##NAME(                    \
        ATTENTION_INPUTS(T), T* dk, T* dv, ATTENTION_SIZES, int32_t dk_stride, int32_t dv_stride, ATTENTION_NUMBERS) { \
        key_gradient<WIDTH>(ATTENTION_BACKWARD(T), dk, dv, dk_stride, dv_stride);                                      \
    }

#define ATTENTION_GRADIENTS_WIDTHS(NAME, T)                                                                            \
    ATTENTION_DELTA(NAME, T)                                                                                           \
    ATTENTION_GRADIENTS(NAME, T, 16)                                                                                   \
    ATTENTION_GRADIENTS(NAME, T, 32)                                                                                   \
    ATTENTION_GRADIENTS(NAME, T, 64)                                                                                   \
    ATTENTION_GRADIENTS(NAME, T, 128)                                                                                  \
    ATTENTION_GRADIENTS(NAME, T, 256)

ATTENTION_GRADIENTS_WIDTHS(f32, float)
ATTENTION_GRADIENTS_WIDTHS(bf16, bf16)
ATTENTION_GRADIENTS_WIDTHS(f16, f16)
