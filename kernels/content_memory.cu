// Content-addressed memory, forward: one segment of each of B packed sequences. Reference: content_memory.rs; SPEC
// section 4. The backward kernels stand in content_memory_backward.cu.
//
//   score_it = κ_t·M_i·a_t / (√(|M_i|²+ε)·√(|a_t|²+ε) + ε)  or  scale·M_i·a_t;  w = softmax over slots (or the top k)
//   β_it = σ(scale·M_i·s_t + b)  or  softmax over slots of scale·M_i·s_t
//   keep_i = Π_t (1 − erased_it),  erased = w·β (coupled) or w·(1 − β) (paper)
//   M′_i = keep_i·M_i + Σ_t w_it·β_it·v_t,  y_t = Σ_i w_it·M_i  or of M′
//
// M, M′ [B, N, V] and y [tokens, V] contiguous in the storage type; a, s rows of D ≤ V and v rows of V, each with a stride of
// its own; κ [tokens] in the storage type, b [1] in f32. Keys meet the first D columns of M (M_i·a_t, M_i·s_t and |M_i| are
// theirs alone); the V − D behind them are only carried along, written and read. In the code D is `key_width`, V `width`.
// `offsets` [B + 1]: sequence j has the tokens offsets[j] … offsets[j+1]; where that falls it takes no part, and tokens of no
// sequence stay as they are. N ≤ 4096. Pointers need no alignment beyond their type's; rows that are aligned to 16 bytes are
// copied faster.
//
// Workspace, f32: w and β [tokens, N] each, and squares [B, N]: 4·N·(2·tokens + B) bytes.
//
// Launches, in order (`longest` is the most tokens of a sequence; `tiles(n)` = ⌈n/64⌉; all with 256 threads):
//   scores   (tiles(N), tiles(longest), B)   M·a, M·s and |M|²: 64 slots × 64 tokens per block; 72 KiB of dynamic shared memory
//   address  (longest, B)                    one token per block: w and β in the place of the products
//   write    (tiles(N), tiles(V), B)         64 slots × 64 columns of M′ per block
//   read     (tiles(V), tiles(longest), B)   64 tokens × 64 columns of y per block, all slots in order
// The backward pass begins with the first two, and has scores multiply R and v as well.
// With order read_then_write, write and read both take M; with write_then_read, read takes M′.
// A block sums in one order that the shape alone decides, nothing is added atomically: the same bits in every run.
//
// Bound by memory for segments of a few dozen tokens: with element size e, 3·N·D·e bytes of M are read (scores, write,
// read; further tiles of tokens find M in the cache) and N·D·e written per sequence, and 8·N·T·D operations done,
// 2·T/e per byte; for B 8–64, N 1290, D 512, T 39 in bf16 that is 4·1.3 MB and 206 MFLOP a sequence.
//
// History (not measured on a GPU yet)
//   1  four launches; panels in shared memory as f32, fetched through registers one step ahead; f32 storage multiplies on
//      the ordinary units, bf16 and f16 on matrix units as TF32
//   2  bf16 and f16: panels in the storage type, what lies in memory comes by cp.async in 16-byte pieces, what is computed
//      in two parts, so that nothing is lost where sums cancel; ldmatrix and m16n8k16
//   3  scores: all products of a tile of slots in one block, three stages of swizzled panels; f32 by cp.async, too
//   4  slots may be wider than keys

#include "content_memory.cuh"

namespace {

constexpr int kMostSlots = 4096;
constexpr int kSlotsPerThread = kMostSlots / kThreads;

// What scores multiplies: rows of tokens, and of slots.
enum Operand { kKeys, kStrengthKeys, kReads, kValues, kOperands };

// What a step of scores takes: 64 bytes of each row.
template <typename T>
struct ScoreStage {
    static constexpr int kColumns = 64 / sizeof(T);
    Panel<T, kColumns> memory, gradient, rows[kOperands];
};
constexpr int kScoreStages = 3;

// Products of a, s, R with the rows of `memory`, of v with those of `gradient`: products[n] [tokens, N]; a warp has one
// operand and half of the slots. squares[i] = |M_i|², dots[i] = G_i·M_i. Blocks behind those of the slots have as many
// rows of R in the place of G's: cross[t, u] = v_t·R_u. Without a gradient there is neither R nor v nor what comes of them.
template <typename T>
__device__ inline void scores(const T* memory, const T* gradient, const Rows<T> (&rows)[kOperands],
                              const int32_t* offsets, float* const (&products)[kOperands], float* squares, float* dots,
                              float* cross, unsigned char* shared, int slots, int width, int key_width, int pitch) {
    using Stage = ScoreStage<T>;
    constexpr int kColumns = Stage::kColumns;
    auto* stages = reinterpret_cast<Stage*>(shared);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const Sequence sequence(offsets, blockIdx.z);
    const int first_token = blockIdx.y * kTile, tokens = min(sequence.tokens - first_token, kTile);
    const int tiles = (slots + kTile - 1) / kTile;
    const bool of_slots = static_cast<int>(blockIdx.x) < tiles;
    const int first = (blockIdx.x - (of_slots ? 0 : tiles)) * kTile;
    const int count = min((of_slots ? slots : sequence.tokens) - first, kTile);
    if (tokens <= 0 || count <= 0) return;
    const int64_t of_sequence = static_cast<int64_t>(blockIdx.z) * slots;
    const Rows<T> of_memory{memory, width};
    const Rows<T> of_gradient = of_slots ? Rows<T>{gradient, width} : rows[kReads];
    const int64_t of_memory_from = of_sequence + first, of_gradient_from = of_slots ? of_memory_from : sequence.first + first;
    const bool memory_vectors = of_memory.in_vectors(), gradient_vectors = of_gradient.in_vectors();
    bool vectors[kOperands];
#pragma unroll
    for (int n = 0; n < kOperands; ++n) vectors[n] = rows[n].in_vectors();

    // Keys, and so everything without a gradient, end at their width: zeros stand in their places behind it.
    const int all = gradient != nullptr ? width : key_width;
    const int steps = (all + kColumns - 1) / kColumns, fragments = (tokens + 15) / 16;
    const auto start = [&](int step) {
        Stage& stage = stages[step % kScoreStages];
        const int column = step * kColumns, extent = all - column;
        if (step < steps && of_slots) {
            stage.memory.load(kTile, extent, memory, memory_vectors, [&](int row) {
                return row < count ? of_memory[of_memory_from + row] + column : nullptr;
            });
        }
        if (step < steps && gradient != nullptr) {
            stage.gradient.load(kTile, extent, of_gradient.first, gradient_vectors, [&](int row) {
                return row < count ? of_gradient[of_gradient_from + row] + column : nullptr;
            });
        }
#pragma unroll
        for (int n = 0; n < kOperands; ++n) {
            if (step >= steps || rows[n].first == nullptr || !(of_slots || n == kValues)) continue;
            const int row_extent = n < kReads ? key_width - column : extent;
            stage.rows[n].load(fragments * 16, row_extent, rows[n].first, vectors[n], [&](int row) {
                return row < tokens ? rows[n][sequence.first + first_token + row] + column : nullptr;
            });
        }
        ptx::cp_async_commit();
    };
#pragma unroll
    for (int step = 0; step < kScoreStages - 1; ++step) start(step);

    const int operand = warp / 2, half = warp % 2 * (kTile / 2);
    const bool works = (operand < kReads || gradient != nullptr) && (of_slots || operand == kValues);
    const int slot = threadIdx.x / 4, piece = threadIdx.x % 4 * kVectorSize<T>;
    float d[4][4][4] = {}, square = 0.0f, dot = 0.0f;
    for (int step = 0; step < steps; ++step) {
        ptx::cp_async_wait<kScoreStages - 2>();
        __syncthreads();  // this step is there for all, and the one before has been used
        start(step + kScoreStages - 1);
        const Stage& stage = stages[step % kScoreStages];
        if (works) {
            multiply_rows(d, stage.rows[operand], operand == kValues ? stage.gradient : stage.memory, half, fragments);
        }
        if (of_slots && blockIdx.y == 0) {
            float m[kVectorSize<T>], g[kVectorSize<T>];
            load(stage.memory.at(slot, piece), m);
#pragma unroll
            for (int i = 0; i < kVectorSize<T>; ++i) {
                if (step * kColumns + piece + i < key_width) square += m[i] * m[i];
            }
            if (gradient == nullptr) continue;
            load(stage.gradient.at(slot, piece), g);
#pragma unroll
            for (int i = 0; i < kVectorSize<T>; ++i) dot += g[i] * m[i];
        }
    }

    if (of_slots && blockIdx.y == 0) {
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
            square += __shfl_xor_sync(0xffffffffu, square, lanes);
            dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
        }
        if (threadIdx.x % 4 == 0 && slot < count) {
            squares[of_memory_from + slot] = square;
            if (gradient != nullptr) dots[of_memory_from + slot] = dot;
        }
    }
    if (!works) return;
    float* y = of_slots ? products[kKeys] : cross;
    if (of_slots) {
#pragma unroll
        for (int n = 1; n < kOperands; ++n) {
            if (operand == n) y = products[n];
        }
    }
    const int y_pitch = of_slots ? slots : pitch;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = m * 16 + e / 2 * 8 + lane / 4, column = half + n * 8 + lane % 4 * 2 + e % 2;
                if (row >= tokens || column >= count) continue;
                y[(sequence.first + first_token + row) * y_pitch + first + column] = d[m][n][e];
            }
        }
    }
}

__device__ inline float block_max(float x, float (&exchange)[kWarps]) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    __syncthreads();
    if (threadIdx.x % kWarpSize == 0) exchange[threadIdx.x / kWarpSize] = x;
    __syncthreads();
    float most = exchange[0];
    for (int w = 1; w < kWarps; ++w) most = fmaxf(most, exchange[w]);
    return most;
}

// Unsigned numbers in the order of the floats; −0 is 0, and NaN comes last.
__device__ inline uint32_t in_order(float x) {
    if (x != x) return 0xffffffffu;
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// What a thread holds of a row over slots: slots threadIdx.x, threadIdx.x + 256, …
using SlotValues = float[kSlotsPerThread];

// Softmax over the slots; −∞ becomes exactly 0. What lies beyond the slots is not touched.
__device__ inline void softmax(SlotValues& x, int slots, float (&exchange)[kWarps]) {
    float most = -INFINITY;
#pragma unroll
    for (int n = 0; n < kSlotsPerThread; ++n) {
        if (n * kThreads + static_cast<int>(threadIdx.x) < slots) most = fmaxf(most, x[n]);
    }
    most = block_max(most, exchange);
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kSlotsPerThread; ++n) {
        if (n * kThreads + static_cast<int>(threadIdx.x) >= slots) continue;
        x[n] = expf(x[n] - most);
        sum += x[n];
    }
    const float factor = 1.0f / sum_again(sum, exchange);
#pragma unroll
    for (int n = 0; n < kSlotsPerThread; ++n) {
        if (n * kThreads + static_cast<int>(threadIdx.x) < slots) x[n] *= factor;
    }
}

// Scores below the k-th best become −∞: the limit is found bit by bit, by counting how many are not below.
__device__ inline void select_best(SlotValues& x, int slots, int k, float (&exchange)[kWarps]) {
    uint32_t limit = 0;
    for (int bit = 31; bit >= 0; --bit) {
        const uint32_t candidate = limit | 1u << bit;
        float count = 0.0f;  // at most 4096: exact
#pragma unroll
        for (int n = 0; n < kSlotsPerThread; ++n) {
            const bool real = n * kThreads + static_cast<int>(threadIdx.x) < slots;
            if (real && in_order(x[n]) >= candidate) count += 1.0f;
        }
        if (sum_again(count, exchange) >= static_cast<float>(k)) limit = candidate;
    }
#pragma unroll
    for (int n = 0; n < kSlotsPerThread; ++n) {
        const bool real = n * kThreads + static_cast<int>(threadIdx.x) < slots;
        if (real && in_order(x[n]) < limit) x[n] = -INFINITY;
    }
}

// One token: `similarity` M·a → M·a over the norms (cosine, that is with κ), `beta` M·s → β, and w, which may stand in
// the place of `similarity`. Sigmoid strength where there is a bias. norms[token] = √(|a|²+ε), unless null.
template <typename T>
__device__ inline void address(const T* keys, const T* kappa, const float* bias, const int32_t* offsets,
                               const float* squares, float* similarity, float* w, float* beta, float* norms, int slots,
                               int key_width, int stride, int top_k, float scale, float epsilon) {
    __shared__ float exchange[kWarps];
    const Sequence sequence(offsets, blockIdx.y);
    if (static_cast<int>(blockIdx.x) >= sequence.tokens) return;
    const int64_t token = sequence.first + blockIdx.x;
    similarity += token * slots;
    w += token * slots;
    beta += token * slots;
    squares += static_cast<int64_t>(blockIdx.y) * slots;

    float norm = 0.0f;
    if (kappa != nullptr) {
        float sum = 0.0f;
        for (int d = threadIdx.x; d < key_width; d += kThreads) {
            const float x = widen(keys[token * stride + d]);
            sum += x * x;
        }
        norm = sqrtf(sum_again(sum, exchange) + epsilon);
        if (norms != nullptr && threadIdx.x == 0) norms[token] = norm;
    }
    const float factor = kappa != nullptr ? widen(kappa[token]) : scale;

    SlotValues x;
#pragma unroll
    for (int n = 0; n < kSlotsPerThread; ++n) {
        const int slot = n * kThreads + threadIdx.x;
        if (slot >= slots) continue;
        x[n] = similarity[slot];
        if (kappa != nullptr) {
            x[n] /= sqrtf(squares[slot] + epsilon) * norm + epsilon;
            similarity[slot] = x[n];
        }
        x[n] *= factor;
    }
    if (top_k < slots) select_best(x, slots, top_k, exchange);
    softmax(x, slots, exchange);
#pragma unroll
    for (int n = 0; n < kSlotsPerThread; ++n) {
        const int slot = n * kThreads + threadIdx.x;
        if (slot >= slots) continue;
        w[slot] = x[n];
        x[n] = scale * beta[slot];
    }

    if (bias == nullptr) softmax(x, slots, exchange);
    const float offset = bias != nullptr ? *bias : 0.0f;
#pragma unroll
    for (int n = 0; n < kSlotsPerThread; ++n) {
        const int slot = n * kThreads + threadIdx.x;
        if (slot < slots) beta[slot] = bias != nullptr ? 1.0f / (1.0f + expf(-(x[n] + offset))) : x[n];
    }
}

// M′ = keep·M + Σ_t w·β·v
template <typename T>
__device__ inline void write(const T* memory, const float* w, const float* beta, const T* value,
                             const int32_t* offsets, T* memory_next, int slots, int width, int stride, bool paper) {
    using Tiles = Product<T>;
    using Panels = typename Tiles::Panels;
    __shared__ Panels panels;
    __shared__ float factors[kGroups][kTile];
    const Sequence sequence(offsets, blockIdx.z);
    const int tokens = sequence.tokens;
    if (tokens < 0) return;
    const int first_slot = blockIdx.x * kTile, first_column = blockIdx.y * kTile;
    memory += static_cast<int64_t>(blockIdx.z) * slots * width;
    memory_next += static_cast<int64_t>(blockIdx.z) * slots * width;
    w += sequence.first * slots;
    beta += sequence.first * slots;
    value += sequence.first * stride;

    float keep = 1.0f;
    const int mine = threadIdx.x % kTile, slot = first_slot + mine;
    for (int t = threadIdx.x / kTile; t < tokens && slot < slots; t += kGroups) {
        keep *= 1.0f - erased(w[t * slots + slot], beta[t * slots + slot], paper);
    }
    factors[threadIdx.x / kTile][mine] = keep;

    Tiles product;
    product.add(panels, tokens,
                computed<Layout::kRowsFirst>([=](int row, int t) {
                    const int at = t * slots + first_slot + row;
                    return first_slot + row < slots ? w[at] * beta[at] : 0.0f;
                }),
                stored(value, width - first_column, Rows<T>{value, stride}.in_vectors(), [=](int t) {
                    return value + static_cast<int64_t>(t) * stride + first_column;
                }));
    __syncthreads();  // the factors, where there was no token
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = product.row(i, j), column = first_column + product.column(i, j);
            if (first_slot + row >= slots || column >= width) continue;
            float kept = 1.0f;
            for (int g = 0; g < kGroups; ++g) kept *= factors[g][row];
            const int at = (first_slot + row) * width + column;
            narrow(kept * widen(memory[at]) + product.sums[i][j], memory_next[at]);
        }
    }
}

// y = w·M
template <typename T>
__device__ inline void read(const float* w, const T* memory, const int32_t* offsets, T* y, int slots, int width) {
    using Tiles = Product<T>;
    using Panels = typename Tiles::Panels;
    __shared__ Panels panels;
    const Sequence sequence(offsets, blockIdx.z);
    const int tokens = sequence.tokens;
    const int first_column = blockIdx.x * kTile, first_token = blockIdx.y * kTile;
    if (first_token >= tokens) return;
    memory += static_cast<int64_t>(blockIdx.z) * slots * width;
    w += sequence.first * slots;

    Tiles product;
    product.add(panels, slots,
                computed<Layout::kDepthFirst>([=](int row, int slot) {
                    return first_token + row < tokens ? w[(first_token + row) * slots + slot] : 0.0f;
                }),
                stored(memory, width - first_column, Rows<T>{memory, width}.in_vectors(),
                       [=](int slot) { return memory + slot * width + first_column; }));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int t = first_token + product.row(i, j), column = first_column + product.column(i, j);
            if (t < tokens && column < width) narrow(product.sums[i][j], y[(sequence.first + t) * width + column]);
        }
    }
}

}  // namespace

#define CONTENT_MEMORY(NAME, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) content_memory_scores_##NAME(                            \
        const T* memory, const T* gradient, const T* keys, const T* strength_keys, const T* reads, const T* values,    \
        const int32_t* offsets, float* of_keys, float* of_strength_keys, float* of_reads, float* of_values,            \
        float* squares, float* dots, float* cross, int32_t slots, int32_t width, int32_t key_width, int32_t stride,    \
        int32_t strength_stride, int32_t value_stride, int32_t pitch) {                                                \
        extern __shared__ __align__(16) unsigned char shared[];                                                        \
        scores<T>(memory, gradient,                                                                                    \
                  {{keys, stride}, {strength_keys, strength_stride}, {reads, width}, {values, value_stride}}, offsets, \
                  {of_keys, of_strength_keys, of_reads, of_values}, squares, dots, cross, shared, slots, width,        \
                  key_width, pitch);                                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads) content_memory_address_##NAME(                              \
        const T* keys, const T* kappa, const float* bias, const int32_t* offsets, const float* squares,                \
        float* similarity, float* w, float* beta, float* norms, int32_t slots, int32_t key_width, int32_t stride,      \
        int32_t top_k, float scale, float epsilon) {                                                                   \
        address(keys, kappa, bias, offsets, squares, similarity, w, beta, norms, slots, key_width, stride, top_k,      \
                scale, epsilon);                                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads) content_memory_write_##NAME(                                \
        const T* memory, const float* w, const float* beta, const T* value, const int32_t* offsets, T* memory_next,    \
        int32_t slots, int32_t width, int32_t stride, int32_t paper) {                                                 \
        write(memory, w, beta, value, offsets, memory_next, slots, width, stride, paper != 0);                         \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) content_memory_read_##NAME(                               \
        const float* w, const T* memory, const int32_t* offsets, T* y, int32_t slots, int32_t width) {                 \
        read(w, memory, offsets, y, slots, width);                                                                     \
    }

CONTENT_MEMORY(f32, float)
CONTENT_MEMORY(bf16, bf16)
CONTENT_MEMORY(f16, f16)
