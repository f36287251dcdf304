// Content-addressed memory, backward: gradients of Σ dM′·M′ + Σ dy·y for one segment of each of B packed sequences.
// Reference: content_memory.rs; SPEC section 4. Shapes, symbols and layouts are those of content_memory.cu.
//
// Nothing of the forward pass is kept: w and β are computed again by its kernels. With G = dM′ and R = dy:
//   ∂keep_i/∂(1 − erased_it) = (product of the factors before t)·(product of those after t), which stays right where a
//   factor is 0. With write_then_read everything has G + wᵀ·R in the place of G; that sum is never formed, so it is
//   not rounded: v·Rᵀ and (w·β)·wᵀ, two matrices of tokens × tokens, carry its second part.
//
// dM [B, N, V] contiguous; da, ds rows of D and dv rows of V, each with a stride of its own; dκ [tokens], all overwritten; db [1] in f32,
// added to. No gradient may lie in the storage of an input.
//
// Launches, in order, all with 256 threads, `tiles(n)` = ⌈n/64⌉, * with write_then_read:
//   scores (forward's)   (tiles(N) + tiles(longest)*, tiles(longest), B)  M·a, M·s, M·R, G·v, |M|², G·M; v·Rᵀ*
//   address (forward's)  (longest, B)                       w, β and √(|a|²+ε), one token per block
//   slots                (tiles(N), B)                      the products over tokens, what R brings through M′*: dw, dβ
//                                                           and the sums over slots that both softmaxes want
//   coefficients         (tiles(N) + tiles(longest)²*, B)   through softmax, sigmoid and norms: the factors of all
//                                                           further products; (w·β)·wᵀ*
//   gradients            (tiles(V) or ⌈V/32⌉, splits·tiles(longest), B)  dM, and shares of da, ds, dv
//   sums                 (longest + 1, B)                   da, ds, dv, dκ from their shares, and db
// scores and gradients have 72 KiB of dynamic shared memory, and registers for two blocks on a multiprocessor.
//
// Workspace: `Shape::backward_pieces` of src/ops/content_memory.rs; most of it are nine planes [tokens, N] of f32.
//
// What has to move: M and G come from device memory twice, for the scores and, when all scores of the segment are known,
// for the gradients; dM is written once: 5·N·D elements a sequence. `gradients` reads four coefficients of each slot and
// token, 16·N·T bytes, for every column tile, and its shares are 12·splits·T·D bytes: both stay in the L2 cache. B 8,
// N 1290, D 512, T 39 in bf16 (4 splits): 6.6 MB a sequence of M, G and dM, 6.4 + 2·1.0 MB through the cache, and in
// `gradients` 6 products of two parts, 760 MFLOP, on matrix units. For 64 × 64 × 64 of a product a warp reads 16 times
// four matrices of shared memory for 32 instructions of the matrix units, which take about as long.
//
// History (not measured on a GPU yet)
//   1  the tiles of content_memory.cuh, one kernel per step: ten to thirteen launches
//   2  bf16 (all) and f16 (products without gradients): panels in the storage type by cp.async, m16n8k16
//   3  six launches: all products of a tile of M and G at once, before the softmaxes and behind them (8 elements read of
//      each of N·D became 4); coefficients are rounded once, to two parts of bf16, not for every column tile, and come by
//      cp.async to swizzled panels; f16 is split into two parts of bf16, exactly, and no longer multiplied as TF32
//   4  slots may be wider than keys: behind the keys' columns `gradients` finds zeros in the places of M, a and s

#include "content_memory.cuh"

namespace {

// A warp of the kernels with a slot per thread gives sums over its 32 slots: so many to a tile.
constexpr int kShares = kTile / kWarpSize;
// Gradients that blocks of slots share: da, ds, dv.
constexpr int kShared = 3;

// A slot per thread, and every fourth or a fourth of the tokens.
struct SlotOwner {
    int mine = threadIdx.x % kTile, group = threadIdx.x / kTile;
    int slot;
    bool real;
    int share;  // among those of all slots

    __device__ explicit SlotOwner(int slots)
        : slot(blockIdx.x * kTile + mine), real(slot < slots), share(blockIdx.x * kShares + mine / kWarpSize) {}
};

// Factors of the products with rows of T: matrices [kParts, tokens, pitch]. What is rounded, rounds to bf16, which has the
// range of f32, and keeps what the rounding left as a second part: sums may cancel.
template <typename T>
struct Coefficients {
    using Number = bf16;
    static constexpr int kParts = 2;
    Number* first;
    int64_t part;
    int pitch;

    __device__ void set(int64_t row, int column, float x) const {
        Number* at = first + row * pitch + column;
        narrow(x, *at);
        narrow(x - widen(*at), at[part]);
    }
};
template <>
struct Coefficients<float> {
    using Number = float;
    static constexpr int kParts = 1;
    Number* first;
    int64_t part;
    int pitch;

    __device__ void set(int64_t row, int column, float x) const { first[row * pitch + column] = x; }
};

// The planes of coefficients, one behind the other: of M·a, of M·s, of R through y, of v through M′.
enum Plane { kAddress, kStrength, kRead, kGate, kPlanes };

// Who was given them to read sets none.
template <typename T>
__device__ inline Coefficients<T> plane_of(const float* planes, int plane, int64_t tokens, int pitch) {
    const int64_t part = tokens * pitch;
    return {reinterpret_cast<typename Coefficients<T>::Number*>(const_cast<float*>(planes) + plane * part), part, pitch};
}

// A tile of gates = (w·β)·wᵀ: Σ over slots.
template <typename T>
__device__ inline void gate_products(const float* w, const float* beta, const Sequence& sequence,
                                     const Coefficients<T>& gates, Product<float>::Panels& panels, int tile, int slots,
                                     int longest) {
    const int tiles = (longest + kTile - 1) / kTile, tokens = sequence.tokens;
    const int first_row = tile / tiles * kTile, first_column = tile % tiles * kTile;
    if (first_row >= tokens || first_column >= tokens) return;
    w += sequence.first * slots;
    beta += sequence.first * slots;
    Product<float> product;
    product.add(panels, slots,
                computed<Layout::kDepthFirst>([=](int t, int slot) {
                    t += first_row;
                    const int64_t at = static_cast<int64_t>(t) * slots + slot;
                    return t < tokens ? w[at] * beta[at] : 0.0f;
                }),
                computed<Layout::kDepthFirst>([=](int u, int slot) {
                    u += first_column;
                    return u < tokens ? w[static_cast<int64_t>(u) * slots + slot] : 0.0f;
                }));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int t = first_row + product.row(i, j), u = first_column + product.column(i, j);
            if (t < tokens && u < tokens) gates.set(sequence.first + t, u, product.sums[i][j]);
        }
    }
}

// What arrives at the coefficients' kernel from those before it.
struct Slopes {
    const float *w, *beta, *similarity, *dw, *d_beta;  // [tokens, N]
    const float *keep, *squares;                       // [B, N]
    const float *norms, *means;                        // [tokens], [shares, tokens, 2]
};

// From dw and dβ through softmax, sigmoid and norms: the coefficients of this tile of slots, the slope of each slot's norm
// divided by it, and shares of dκ, of the slope of |a| and of db.
template <typename T>
__device__ inline void coefficients(const Slopes& x, const T* kappa, const float* bias, const int32_t* offsets,
                                    float* planes, float* slopes, float* token_shares, float* bias_shares,
                                    int64_t all_tokens, int slots, int pitch, bool write_then_read, float scale,
                                    float epsilon) {
    __shared__ float means[2][kThreads];
    __shared__ float exchange[kWarps];
    __shared__ float slope_shares[kGroups][kTile];
    const Sequence sequence(offsets, blockIdx.y);
    const SlotOwner owner(slots);
    const int64_t of_slot = static_cast<int64_t>(blockIdx.y) * slots + owner.slot;
    const int shares = (slots + kTile - 1) / kTile * kShares;
    Coefficients<T> of[kPlanes];
#pragma unroll
    for (int n = 0; n < kPlanes; ++n) of[n] = plane_of<T>(planes, n, all_tokens, pitch);

    const bool cosine = kappa != nullptr, some = owner.real && sequence.tokens > 0;
    const float slot_norm = some && cosine ? sqrtf(x.squares[of_slot] + epsilon) : 1.0f;
    const float kept = some && write_then_read ? x.keep[of_slot] : 1.0f;
    float slope = 0.0f, d_bias = 0.0f;
    for (int start = 0; start < sequence.tokens; start += kThreads) {
        const int count = min(kThreads, sequence.tokens - start);
        __syncthreads();  // the means before have been used
        if (static_cast<int>(threadIdx.x) < count) {
            float mean[2] = {};
            for (int n = 0; n < shares; ++n) {
                float share[2];
                load(x.means + (n * all_tokens + sequence.first + start + threadIdx.x) * 2, share);
                mean[0] += share[0];
                mean[1] += share[1];
            }
            means[0][threadIdx.x] = mean[0];
            means[1][threadIdx.x] = mean[1];
        }
        __syncthreads();
        for (int t = owner.group; t < count; t += kGroups) {
            const int64_t token = sequence.first + start + t, at = token * slots + owner.slot;
            float d_factor = 0.0f, d_norm = 0.0f;
            if (owner.real) {
                const float w = x.w[at], b = x.beta[at], d = x.d_beta[at];
                const float d_logit = bias != nullptr ? d * b * (1.0f - b) : b * (d - means[1][t]);
                const float d_score = w * (x.dw[at] - means[0][t]);
                d_bias += d_logit;
                float d_dot = scale * d_score;
                if (cosine) {
                    const float norm = x.norms[token], similarity = x.similarity[at];
                    d_dot = widen(kappa[token]) * d_score / (slot_norm * norm + epsilon);
                    d_factor = d_score * similarity;
                    d_norm = -d_dot * similarity * slot_norm;
                    slope -= d_dot * similarity * norm;
                }
                of[kAddress].set(token, owner.slot, d_dot);
                of[kStrength].set(token, owner.slot, scale * d_logit);
                of[kRead].set(token, owner.slot, w * kept);
                of[kGate].set(token, owner.slot, w * b);
            }
            if (!cosine) continue;
            const float sums[2] = {warp_sum(d_factor), warp_sum(d_norm)};
            if (threadIdx.x % kWarpSize == 0) store(sums, token_shares + (owner.share * all_tokens + token) * 2);
        }
    }
    slope_shares[owner.group][owner.mine] = slope;
    d_bias = sum_again(d_bias, exchange);
    if (threadIdx.x == 0) bias_shares[blockIdx.y * (shares / kShares) + blockIdx.x] = d_bias;
    if (owner.group != 0 || !owner.real) return;
    for (int n = 1; n < kGroups; ++n) slope += slope_shares[n][owner.mine];
    slopes[of_slot] = slope / slot_norm;
}

// A tile of coefficients: tokens × slots.
template <typename T>
using CoefficientPanels = Panel<typename Coefficients<T>::Number, kTile>[Coefficients<T>::kParts];

// d [16, 8·kN] += 16 rows of a, or of aᵀ, from `first_row` · the first `depth` rows of b from column `first_column`.
template <bool kTransposed, int kN, typename T, int kColumns>
__device__ inline void multiply(float (&d)[kN][4], const CoefficientPanels<T>& a, int first_row,
                                const Panel<T, kColumns>& b, int first_column, int depth) {
    const int lane = threadIdx.x % kWarpSize;
    if constexpr (sizeof(T) < sizeof(float)) {
#pragma unroll 2
        for (int k = 0; k < depth; k += 16) {
            uint32_t rows[2][4];
#pragma unroll
            for (int p = 0; p < 2; ++p) {
                if constexpr (kTransposed) {
                    ptx::ldmatrix_x4_trans(rows[p], a[p].at(k + lane / 16 * 8 + lane % 8, first_row + lane / 8 % 2 * 8));
                } else {
                    ptx::ldmatrix_x4(rows[p], a[p].at(first_row + lane % 16, k + lane / 16 * 8));
                }
            }
#pragma unroll
            for (int n = 0; n < kN; n += 2) {
                uint32_t columns[4];
                ptx::ldmatrix_x4_trans(columns, b.at(k + lane % 16, first_column + n * 8 + lane / 16 * 8));
                multiply_parts(d[n], rows, columns[0], columns[1], b.values);
                multiply_parts(d[n + 1], rows, columns[2], columns[3], b.values);
            }
        }
    } else {
        const int row = first_row + lane / 4, column = first_column + lane % 4 * 2;
#pragma unroll 1
        for (int k = 0; k < depth; k += 4) {
            float rows[2][4];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if constexpr (kTransposed) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) rows[h][i] = *a[0].at(k + i, row + 8 * h);
                } else {
                    load(a[0].at(row + 8 * h, k), rows[h]);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int n = 0; n < kN; ++n) {
                    float columns[2];
                    load(b.at(k + i, column + n * 8), columns);
#pragma unroll
                    for (int e = 0; e < 4; ++e) d[n][e] += rows[e / 2][i] * columns[e % 2];
                }
            }
        }
    }
}

template <typename T>
struct GradientTiles {
    static constexpr int kColumns = sizeof(T) < sizeof(float) ? 64 : 32;
    Panel<T, kColumns> memory, gradient, rows[kGate];  // rows of a, s and R
    CoefficientPanels<T> coefficients[2];
};

// dM = keep·G + slope·M + d(M·a)ᵀ·a + d(M·s)ᵀ·s + (w, or w·keep)ᵀ·R, and for 64 tokens, over this block's part of the slots,
//   d(M·a)·M,  d(M·s)·M,  (w·β)·G, to which the first part adds gates·R
// A block takes the columns blockIdx.x of all of it. It goes from tile to tile of slots, and in a tile from plane to plane of
// coefficients: one is multiplied while the next is copied. M and G are there once. Of a segment of more than 64 tokens, the
// blocks that share slots and columns make dM of every so many tiles, for all tokens.
template <typename T>
__device__ inline void gradients(const T* memory, const T* g, const Rows<T> (&rows)[kGate], const float* planes,
                                 Coefficients<T> gates, const float* keep, const float* slopes, const int32_t* offsets,
                                 T* d_memory, float* shares, unsigned char* shared, int64_t all_tokens, int slots,
                                 int width, int key_width, int pitch, int splits) {
    using Tiles = GradientTiles<T>;
    constexpr int kColumns = Tiles::kColumns, kFragments = kColumns / 2 / 8;
    auto& tiles = *reinterpret_cast<Tiles*>(shared);
    const Sequence sequence(offsets, blockIdx.z);
    if (sequence.tokens < 0) return;
    const int64_t of_sequence = static_cast<int64_t>(blockIdx.z) * slots;
    const int split = blockIdx.y % splits, chunk = blockIdx.y / splits;
    const int chunks = max(1, (sequence.tokens + kTile - 1) / kTile);
    if (chunk >= chunks) return;
    const int slot_tiles = (slots + kTile - 1) / kTile, of_split = (slot_tiles + splits - 1) / splits;
    const int begin = split * of_split, end = min(begin + of_split, slot_tiles);
    const int carried = gates.first != nullptr && split == 0 ? chunks : 0;
    const int block_column = blockIdx.x * kColumns, extent = width - block_column;
    // Behind the keys' columns neither keys nor what they met have a part.
    const int key_extent = key_width - block_column;
    const auto takes_part = [&](int plane) { return key_extent > 0 || plane >= kRead; };
    memory += of_sequence * width + block_column;
    g += of_sequence * width + block_column;
    const Rows<T> of_memory{memory, width}, of_gradient{g, width};
    const bool memory_vectors = of_memory.in_vectors(), gradient_vectors = of_gradient.in_vectors();
    bool vectors[kGate];
#pragma unroll
    for (int n = 0; n < kGate; ++n) vectors[n] = rows[n].in_vectors();

    // Tokens of a chunk, and as whole matrices.
    const auto tokens_of = [&](int of) { return min(kTile, sequence.tokens - of * kTile); };
    const auto rows_of = [&](int of) { return (tokens_of(of) + 15) / 16 * 16; };
    const auto row_of = [&](const Rows<T>& x, int of, int row) -> const T* {
        return row < tokens_of(of) ? x[sequence.first + of * kTile + row] + block_column : nullptr;
    };

    // A plane of coefficients, of a tile of slots and the tokens of a chunk. Behind the last tile come the tiles of gates.
    struct Step {
        int tile, plane, chunk;
    };
    const auto owns = [&](int tile) { return tile % chunks == chunk; };
    const auto behind = [&](Step step) {
        if (step.plane == kPlanes) return Step{step.tile + 1, kPlanes, chunk};
        do {
            if (++step.plane < kPlanes) continue;
            step.plane = kAddress;
            step.chunk = step.chunk + 1 == chunks ? 0 : step.chunk + 1;
            if (owns(step.tile) && step.chunk != chunk) continue;
            if (++step.tile == end) return Step{0, kPlanes, chunk};
            step.chunk = chunk;
        } while ((step.plane == kRead && !owns(step.tile)) || (step.plane == kGate && step.chunk != chunk));
        return step;
    };
    const auto exists = [&](Step step) { return step.plane < kPlanes || step.tile < carried; };
    // R in the places of M and G by turns.
    const auto of_carried = [&](int tile) -> Panel<T, kColumns>& { return tile % 2 == 0 ? tiles.memory : tiles.gradient; };
    const auto start = [&](Step step, int n) {
        const bool through = step.plane == kPlanes;
        const auto from = through ? gates : plane_of<T>(planes, step.plane, all_tokens, pitch);
        const int first = step.tile * kTile, tokens = tokens_of(step.chunk);
        const auto* line = from.first + (sequence.first + step.chunk * kTile) * from.pitch + first;
#pragma unroll
        for (int p = 0; p < Coefficients<T>::kParts; ++p) {
            tiles.coefficients[n % 2][p].load(
                rows_of(step.chunk), (through ? sequence.tokens : slots) - first, from.first, true,
                [&](int row) { return row < tokens ? line + p * from.part + row * from.pitch : nullptr; });
        }
        const auto slot_of = [&](const Rows<T>& x, int row) { return first + row < slots ? x[first + row] : nullptr; };
        if (step.plane == kAddress && step.chunk == chunk) {
            tiles.memory.load(kTile, key_extent, memory, memory_vectors, [&](int row) { return slot_of(of_memory, row); });
        }
        if (step.plane == kGate) {
            tiles.gradient.load(kTile, extent, g, gradient_vectors, [&](int row) { return slot_of(of_gradient, row); });
        }
        if (through) {
            of_carried(step.tile).load(kTile, extent, rows[kRead].first, vectors[kRead],
                                       [&](int row) { return row_of(rows[kRead], step.tile, row); });
        }
#pragma unroll
        for (int p = 0; p < kGate; ++p) {
            // With one chunk they stay.
            if (step.plane != p || !owns(step.tile) || (chunks == 1 && step.tile != begin)) continue;
            tiles.rows[p].load(rows_of(step.chunk), p == kRead ? extent : key_extent, rows[p].first, vectors[p],
                               [&](int row) { return row_of(rows[p], step.chunk, row); });
        }
    };

    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int first_row = warp % 4 * 16, first_column = warp / 4 * (kColumns / 2);  // of tokens, and of slots
    const int row = first_row + lane / 4, column = block_column + first_column + lane % 4 * 2;
    const bool pairs = is_aligned<2>(d_memory, width);
    float d_address[kFragments][4] = {}, d_strength[kFragments][4] = {}, d_value[kFragments][4] = {};
    float d_slots[kFragments][4];
    // d_slots += the slot's factor·x
    const auto add_slots = [&](const float* factors, const Panel<T, kColumns>& x, int tile) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int slot = tile * kTile + row + 8 * h;
            const float factor = slot < slots ? factors[of_sequence + slot] : 0.0f;
#pragma unroll
            for (int n = 0; n < kFragments; ++n) {
                float pair[2];
                load(x.at(row + 8 * h, first_column + lane % 4 * 2 + n * 8), pair);
#pragma unroll
                for (int i = 0; i < 2; ++i) d_slots[n][2 * h + i] += factor * pair[i];
            }
        }
    };

    Step step{begin, kAddress, chunk};
    start(step, 0);
    for (int n = 0; exists(step); ++n) {
        const Step next = behind(step);
        ptx::cp_async_wait_all();
        __syncthreads();  // this step is there for all, and the one before has been used
        if (exists(next)) start(next, n + 1);

        const auto& factors = tiles.coefficients[n % 2];
        if (step.chunk == chunk && first_row < tokens_of(chunk) && takes_part(step.plane)) {
            if (step.plane == kAddress) multiply<false>(d_address, factors, first_row, tiles.memory, first_column, kTile);
            if (step.plane == kStrength) multiply<false>(d_strength, factors, first_row, tiles.memory, first_column, kTile);
            if (step.plane >= kGate) {
                const auto& others = step.plane == kGate ? tiles.gradient : of_carried(step.tile);
                multiply<false>(d_value, factors, first_row, others, first_column, kTile);
            }
        }
        if (step.plane < kPlanes && owns(step.tile)) {
            if (step.plane == kAddress && step.chunk == chunk) {
#pragma unroll
                for (int f = 0; f < kFragments; ++f) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) d_slots[f][e] = 0.0f;
                }
                add_slots(slopes, tiles.memory, step.tile);
            }
            if (step.plane == kGate) {
                add_slots(keep, tiles.gradient, step.tile);
            } else if (takes_part(step.plane)) {
                multiply<true>(d_slots, factors, first_row, tiles.rows[step.plane], first_column, rows_of(step.chunk));
            }
            if (next.plane == kPlanes || next.tile != step.tile) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int slot = step.tile * kTile + row + 8 * h;
                    if (slot >= slots) continue;
                    T* to = d_memory + (of_sequence + slot) * width + column;
#pragma unroll
                    for (int f = 0; f < kFragments; ++f) {
                        const float pair[2] = {d_slots[f][2 * h], d_slots[f][2 * h + 1]};
                        if (pairs) {
                            if (column + f * 8 < width) store(pair, to + f * 8);
                            continue;
                        }
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            if (column + f * 8 + i < width) narrow(pair[i], to[f * 8 + i]);
                        }
                    }
                }
            }
        }
        step = next;
    }

    const int share_pitch = gridDim.x * kColumns;
    const auto keep_share = [&](int of, const float (&d)[kFragments][4]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (row + 8 * h >= tokens_of(chunk)) continue;
            const int64_t token = sequence.first + chunk * kTile + row + 8 * h;
            float* to = shares + ((split * kShared + of) * all_tokens + token) * share_pitch + column;
#pragma unroll
            for (int f = 0; f < kFragments; ++f) {
                const float pair[2] = {d[f][2 * h], d[f][2 * h + 1]};
                store(pair, to + f * 8);
            }
        }
    };
    keep_share(0, d_address);
    keep_share(1, d_strength);
    keep_share(2, d_value);
}

// The gradients of one token, from their shares: blocks of slots, and tiles of slots for dκ and the slope of |a|. One block
// behind all tokens does it for db.
template <typename T>
__device__ inline void sums(const float* shares, const float* token_shares, const float* bias_shares,
                            const float* norms, const int32_t* offsets, Rows<T> keys, T* d_kappa, T* d_keys,
                            T* d_strength_keys, T* d_value, float* d_bias, int tokens, int slots, int sequences,
                            int width, int key_width, int pitch, int splits, int d_stride, int d_strength_stride,
                            int d_value_stride) {
    __shared__ float exchange[kWarps];
    const int tiles = (slots + kTile - 1) / kTile;
    if (d_bias != nullptr && blockIdx.x + 1 == gridDim.x) {
        if (blockIdx.y != 0) return;
        float sum = 0.0f;
        for (int n = threadIdx.x; n < sequences * tiles; n += kThreads) sum += bias_shares[n];
        sum = sum_again(sum, exchange);
        if (threadIdx.x == 0) *d_bias += sum;
        return;
    }
    const Sequence sequence(offsets, blockIdx.y);
    if (static_cast<int>(blockIdx.x) >= sequence.tokens) return;
    const int64_t token = sequence.first + blockIdx.x;
    float slope = 0.0f;
    if (d_kappa != nullptr) {
        float sum[2] = {};
        for (int n = threadIdx.x; n < tiles * kShares; n += kThreads) {
            float share[2];
            load(token_shares + (n * static_cast<int64_t>(tokens) + token) * 2, share);
            sum[0] += share[0];
            sum[1] += share[1];
        }
        const float d_factor = sum_again(sum[0], exchange);
        slope = sum_again(sum[1], exchange) / norms[token];
        if (threadIdx.x == 0) narrow(d_factor, d_kappa[token]);
    }
    for (int column = threadIdx.x; column < width; column += kThreads) {
        float sum[kShared] = {};
        for (int n = 0; n < splits; ++n) {
#pragma unroll
            for (int of = 0; of < kShared; ++of) {
                sum[of] += shares[((n * kShared + of) * static_cast<int64_t>(tokens) + token) * pitch + column];
            }
        }
        narrow(sum[2], d_value[token * d_value_stride + column]);
        if (column >= key_width) continue;
        narrow(sum[0] + slope * widen(keys[token][column]), d_keys[token * d_stride + column]);
        narrow(sum[1], d_strength_keys[token * d_strength_stride + column]);
    }
}

}  // namespace

// keep, the product of all factors (1 − erased); from R·M (dw) and G·v (d_gate) to dw and dβ; means[share, t] = Σ w·dw and
// Σ β·dβ over 32 slots. A thread has a slot and a fourth of the tokens. With write_then_read (cross not null)
//   dw_ti = keep_i·dw_ti + Σ_u cross_ut·w_ui·β_ui,  d_gate_ti += Σ_u cross_tu·w_ui,  and wᵀ·R·M joins G·M
extern "C" __global__ void __launch_bounds__(kThreads) content_memory_slots(
    const float* w, const float* beta, const float* dots, const float* cross, const int32_t* offsets, float* before,
    float* keep, float* dw, float* d_gate, float* means, int32_t all_tokens, int32_t slots, int32_t pitch,
    int32_t paper) {
    __shared__ Product<float>::Panels panels;
    __shared__ float products[kGroups][kTile];
    __shared__ float seen[kGroups][kTile];
    const Sequence sequence(offsets, blockIdx.y);
    const SlotOwner owner(slots);
    const int tokens = sequence.tokens, first_slot = blockIdx.x * kTile, mine = owner.mine;
    if (tokens < 0) return;
    const int64_t of_slot = static_cast<int64_t>(blockIdx.y) * slots + owner.slot;
    const int each = (tokens + kGroups - 1) / kGroups, begin = min(owner.group * each, tokens);
    const int end = min(begin + each, tokens);
    const auto place = [&](int t) { return (sequence.first + t) * slots + owner.slot; };

    float product = 1.0f, read = 0.0f;
    for (int t = begin; t < end && owner.real; ++t) {
        const int64_t at = place(t);
        product *= 1.0f - erased(w[at], beta[at], paper != 0);
        if (cross != nullptr) read += w[at] * dw[at];
    }
    products[owner.group][mine] = product;
    seen[owner.group][mine] = read;
    __syncthreads();
    // Of the factors before and behind this thread's tokens; ∂/∂(1 − erased) is −(G·M) times both.
    float ahead = 1.0f, after = 1.0f, whole = 1.0f, slope = 0.0f;
    for (int n = 0; n < kGroups; ++n) {
        whole *= products[n][mine];
        if (n < owner.group) ahead *= products[n][mine];
        if (n > owner.group) after *= products[n][mine];
        slope -= seen[n][mine];
    }
    if (owner.real && owner.group == 0) keep[of_slot] = whole;
    if (owner.real && tokens > 0) after *= slope - dots[of_slot];

    for (int first_token = 0; cross != nullptr && first_token < tokens; first_token += kTile) {
        const auto each_of = [&](const Product<float>& product, const auto& give) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int t = first_token + product.row(i, j), in_tile = product.column(i, j);
                    if (t >= tokens || first_slot + in_tile >= slots) continue;
                    give((sequence.first + t) * slots + first_slot + in_tile, in_tile, product.sums[i][j]);
                }
            }
        };
        Product<float> to_address;
        to_address.add(panels, tokens,
                       computed<Layout::kRowsFirst>([=](int t, int u) {
                           t += first_token;
                           return t < tokens ? cross[(sequence.first + u) * pitch + t] : 0.0f;
                       }),
                       computed<Layout::kRowsFirst>([=](int slot, int u) {
                           slot += first_slot;
                           const int64_t at = (sequence.first + u) * slots + slot;
                           return slot < slots ? w[at] * beta[at] : 0.0f;
                       }));
        each_of(to_address, [&](int64_t at, int in_tile, float sum) {
            float kept = 1.0f;
            for (int n = 0; n < kGroups; ++n) kept *= products[n][in_tile];
            dw[at] = kept * dw[at] + sum;
        });
        Product<float> to_gate;
        to_gate.add(panels, tokens,
                    computed<Layout::kDepthFirst>([=](int t, int u) {
                        t += first_token;
                        return t < tokens ? cross[(sequence.first + t) * pitch + u] : 0.0f;
                    }),
                    computed<Layout::kRowsFirst>([=](int slot, int u) {
                        slot += first_slot;
                        return slot < slots ? w[(sequence.first + u) * slots + slot] : 0.0f;
                    }));
        each_of(to_gate, [&](int64_t at, int, float sum) { d_gate[at] += sum; });
    }
    if (cross != nullptr) __syncthreads();

    for (int t = begin; t < end && owner.real; ++t) {
        const int64_t at = place(t);
        before[at] = ahead;
        ahead *= 1.0f - erased(w[at], beta[at], paper != 0);
    }
    for (int t = end - 1; t >= begin; --t) {
        float sums[2] = {};
        if (owner.real) {
            const int64_t at = place(t);
            const float address = w[at], strength = beta[at], of_gate = d_gate[at];
            const float d_erased = before[at] * after;
            after *= 1.0f - erased(address, strength, paper != 0);
            const float of_address =
                dw[at] + (paper != 0 ? of_gate * strength + d_erased * (1.0f - strength) : (of_gate + d_erased) * strength);
            const float of_strength = (paper != 0 ? of_gate - d_erased : of_gate + d_erased) * address;
            dw[at] = of_address;
            d_gate[at] = of_strength;
            sums[0] = address * of_address;
            sums[1] = strength * of_strength;
        }
        sums[0] = warp_sum(sums[0]);
        sums[1] = warp_sum(sums[1]);
        if (threadIdx.x % kWarpSize == 0) {
            store(sums, means + (static_cast<int64_t>(owner.share) * all_tokens + sequence.first + t) * 2);
        }
    }
}

#define CONTENT_MEMORY_BACKWARD(NAME, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(kThreads) content_memory_coefficients_##NAME(                         \
        const float* w, const float* beta, const float* similarity, const float* dw, const float* d_beta,              \
        const float* keep, const float* squares, const float* norms, const float* means, const T* kappa,               \
        const float* bias, const int32_t* offsets, float* planes, float* gates, float* slopes, float* token_shares,    \
        float* bias_shares, int32_t tokens, int32_t slots, int32_t longest, int32_t pitch, int32_t gate_pitch,         \
        float scale, float epsilon) {                                                                                  \
        __shared__ Product<float>::Panels panels;                                                                      \
        const int tiles = (slots + kTile - 1) / kTile, tile = static_cast<int>(blockIdx.x) - tiles;                    \
        if (tile >= 0) {                                                                                               \
            const Coefficients<T> to = plane_of<T>(gates, 0, tokens, gate_pitch);                                      \
            gate_products(w, beta, Sequence(offsets, blockIdx.y), to, panels, tile, slots, longest);                   \
        } else {                                                                                                       \
            coefficients({w, beta, similarity, dw, d_beta, keep, squares, norms, means}, kappa, bias, offsets, planes, \
                         slopes, token_shares, bias_shares, tokens, slots, pitch, gates != nullptr, scale, epsilon);   \
        }                                                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) content_memory_gradients_##NAME(                         \
        const T* memory, const T* g, const T* keys, const T* strength_keys, const T* r, const float* planes, const float* gates,  \
        const float* keep, const float* slopes, const int32_t* offsets, T* d_memory, float* shares, int32_t tokens,    \
        int32_t slots, int32_t width, int32_t key_width, int32_t stride, int32_t strength_stride, int32_t pitch,       \
        int32_t gate_pitch, int32_t splits) {                                                                          \
        extern __shared__ __align__(16) unsigned char shared[];                                                        \
        gradients<T>(memory, g, {{keys, stride}, {strength_keys, strength_stride}, {r, width}}, planes,                \
                     plane_of<T>(gates, 0, tokens, gate_pitch), keep, slopes, offsets, d_memory, shares,               \
                     shared, tokens, slots, width, key_width, pitch, splits);                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads) content_memory_sums_##NAME(                                 \
        const float* shares, const float* token_shares, const float* bias_shares, const float* norms,                  \
        const int32_t* offsets, const T* keys, T* d_kappa, T* d_keys, T* d_strength_keys, T* d_value, float* d_bias,   \
        int32_t tokens, int32_t slots, int32_t sequences, int32_t width, int32_t key_width, int32_t pitch,             \
        int32_t splits, int32_t stride, int32_t d_stride, int32_t d_strength_stride, int32_t d_value_stride) {         \
        sums<T>(shares, token_shares, bias_shares, norms, offsets, {keys, stride}, d_kappa, d_keys, d_strength_keys,   \
                d_value, d_bias, tokens, slots, sequences, width, key_width, pitch, splits, d_stride, d_strength_stride,\
                d_value_stride);                                                                                       \
    }

CONTENT_MEMORY_BACKWARD(f32, float)
CONTENT_MEMORY_BACKWARD(bf16, bf16)
CONTENT_MEMORY_BACKWARD(f16, f16)
