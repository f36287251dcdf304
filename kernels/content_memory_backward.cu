// Content-addressed memory, backward: gradients of Σ dM′·M′ + Σ dy·y for one segment of each of B packed sequences.
// Reference: content_memory.rs; SPEC section 4. Shapes, symbols and layouts are those of content_memory.cu.
//
// Nothing of the forward pass is kept: w and β are computed again by its kernels. With G = dM′ and R = dy:
//   ∂keep_i/∂(1 − erased_it) = (product of the factors before t)·(product of those after t), which stays right where a
//   factor is 0. With write_then_read everything has G + wᵀ·R in the place of G; that sum is never formed, so it is
//   not rounded: v·Rᵀ and (w·β)·wᵀ, two matrices of tokens × tokens, carry its second part.
//
// dM [B, N, D] contiguous; da, ds, dv rows of D with a stride of their own; dκ [tokens], all overwritten; db [1] in f32,
// added to. No gradient may lie in the storage of an input.
//
// Workspace, f32: six planes [tokens, N] (similarity → d(M·a); β; R·M → dw → d|M|; w; before; dβ → d(M·s)), squares,
// slopes and keep [B, N], norms, token_slopes and db_shares [tokens]; with write_then_read also cross and gates
// [tokens, longest]: 4·(N·(6·tokens + 3·B) + 3·tokens (+ 2·tokens·longest)) bytes.
//
// Launches, in order, all with 256 threads; those marked * only with write_then_read:
//   scores (forward's)      (tiles(N), max(1, tiles(3·longest)), B)   M·a, M·s, M·R and |M|²
//   scores                  (tiles(N), max(1, tiles(longest)), B)     G·v into the sixth plane, G·M into slopes
//   address (forward's)     (longest, B)
//   prefix                  (⌈N/256⌉, B)                  products of the factors before each token
//   cross *                 (tiles(longest), tiles(longest), B)      v·Rᵀ
//   gates *                 (tiles(longest), tiles(longest), B)      (w·β)·wᵀ
//   spread *                (tiles(N), tiles(longest), B)  what R brings to dw and dgate through M′
//   value_gradient          (tiles(D), tiles(longest), B)
//   suffix                  (⌈N/256⌉, B)                  products of the factors after each token: dw, dβ
//   slopes                  (longest, B)                  through softmax, sigmoid and norms, one token per block
//   memory_gradient         (tiles(N), tiles(D), B)
//   key_gradient            (tiles(D), max(1, tiles(2·longest)), B)
//   bias_gradient           (1)                           with sigmoid strength
//
// Bound by memory for short segments: M is read three times (scores, memory_gradient, key_gradient) and once more by
// the second scores, G four times, dM written once, 8·N·D elements a sequence; 20·N·T·D operations.
//
// History
//   1  the tiles of content_memory.cuh, one kernel per step
//   2  bf16 (all) and f16 (products without gradients): panels in the storage type by cp.async, m16n8k16

#include "content_memory.cuh"

namespace {

// y[t, u] = v_t·r_u
template <typename T>
__device__ inline void cross(const T* v, const T* r, const int32_t* offsets, float* y, int width, int stride,
                             int pitch) {
    using Tiles = Product<T, kUnits<T>>;
    using Panels = typename Tiles::Panels;
    __shared__ Panels panels;
    const Sequence sequence(offsets, blockIdx.z);
    const int tokens = sequence.tokens;
    const int first_row = blockIdx.y * kTile, first_column = blockIdx.x * kTile;
    if (first_row >= tokens || first_column >= tokens) return;
    Tiles product;
    product.add(panels, width,
                stored<Layout::kDepthFirst>(v, width, in_vectors(v, stride), [=](int t) -> const T* {
                    t += first_row;
                    return t < tokens ? v + (sequence.first + t) * stride : nullptr;
                }),
                stored<Layout::kDepthFirst>(r, width, in_vectors(r, width), [=](int u) -> const T* {
                    u += first_column;
                    return u < tokens ? r + (sequence.first + u) * width : nullptr;
                }));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int t = first_row + product.row(i, j), u = first_column + product.column(i, j);
            if (t < tokens && u < tokens) y[(sequence.first + t) * pitch + u] = product.sums[i][j];
        }
    }
}

// da, ds = d(M·a)·M + slope·a, d(M·s)·M; both tokens' rows stand one below the other, so that M is read once.
template <typename T>
__device__ inline void key_gradient(const float* d_address, const float* d_strength, const T* memory, const T* keys,
                                    const float* token_slopes, const int32_t* offsets, T* d_keys, T* d_strength_keys,
                                    int slots, int width, int stride, int d_stride, int d_strength_stride) {
    using Tiles = Product<T, kUnitsOfGradients<T>>;
    using Panels = typename Tiles::Panels;
    __shared__ Panels panels;
    const Sequence sequence(offsets, blockIdx.z);
    const int tokens = sequence.tokens, rows = 2 * tokens;
    const int first_column = blockIdx.x * kTile, first_row = blockIdx.y * kTile;
    if (first_row >= rows) return;
    memory += static_cast<int64_t>(blockIdx.z) * slots * width;
    Tiles product;
    product.add(panels, slots,
                computed<Layout::kDepthFirst>([=](int row, int slot) {
                    row += first_row;
                    if (row >= rows) return 0.0f;
                    const float* p = row < tokens ? d_address : d_strength;
                    return p[(sequence.first + (row < tokens ? row : row - tokens)) * slots + slot];
                }),
                stored<Layout::kRowsFirst>(memory, width - first_column, in_vectors(memory, width),
                                           [=](int slot) { return memory + slot * width + first_column; }));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = first_row + product.row(i, j), column = first_column + product.column(i, j);
            if (row >= rows || column >= width) continue;
            if (row < tokens) {
                const int64_t token = sequence.first + row;
                const float key = widen(keys[token * stride + column]);
                narrow(product.sums[i][j] + token_slopes[token] * key, d_keys[token * d_stride + column]);
            } else {
                const int64_t token = sequence.first + row - tokens;
                narrow(product.sums[i][j], d_strength_keys[token * d_strength_stride + column]);
            }
        }
    }
}

// dv = (w·β)·G, and with write_then_read (gates not null) + gates·R
template <typename T>
__device__ inline void value_gradient(const float* w, const float* beta, const T* g, const float* gates, const T* r,
                                      const int32_t* offsets, T* d_value, int slots, int width, int pitch,
                                      int d_stride) {
    using Tiles = Product<T, kUnits<T>>;
    using Panels = typename Tiles::Panels;
    __shared__ Panels panels;
    const Sequence sequence(offsets, blockIdx.z);
    const int tokens = sequence.tokens;
    const int first_column = blockIdx.x * kTile, first_token = blockIdx.y * kTile;
    if (first_token >= tokens) return;
    g += static_cast<int64_t>(blockIdx.z) * slots * width;
    Tiles product;
    product.add(panels, slots,
                computed<Layout::kDepthFirst>([=](int t, int slot) {
                    t += first_token;
                    const int64_t at = (sequence.first + t) * slots + slot;
                    return t < tokens ? w[at] * beta[at] : 0.0f;
                }),
                stored<Layout::kRowsFirst>(g, width - first_column, in_vectors(g, width),
                                           [=](int slot) { return g + slot * width + first_column; }));
    if (gates != nullptr) {
        product.add(panels, tokens,
                    computed<Layout::kDepthFirst>([=](int t, int u) {
                        t += first_token;
                        return t < tokens ? gates[(sequence.first + t) * pitch + u] : 0.0f;
                    }),
                    stored<Layout::kRowsFirst>(r, width - first_column, in_vectors(r, width), [=](int u) {
                        return r + (sequence.first + u) * width + first_column;
                    }));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int t = first_token + product.row(i, j), column = first_column + product.column(i, j);
            if (t < tokens && column < width) {
                narrow(product.sums[i][j], d_value[(sequence.first + t) * d_stride + column]);
            }
        }
    }
}

// dM = keep·G + slope·M + d(M·a)ᵀ·a + d(M·s)ᵀ·s + wᵀ·R, the last one times keep with write_then_read. With cosine
// addressing slope_i = Σ_t d_norms_ti / √(|M_i|²+ε), otherwise (d_norms null) 0.
template <typename T>
__device__ inline void memory_gradient(const T* memory, const T* g, const float* keep, const float* squares,
                                       const float* d_norms, const float* d_address, const float* d_strength,
                                       const float* w, const T* keys, const T* strength_keys, const T* r,
                                       const int32_t* offsets, T* d_memory, int slots, int width, int stride,
                                       int strength_stride, bool write_then_read, float epsilon) {
    using Tiles = Product<T, kUnitsOfGradients<T>>;
    using Panels = typename Tiles::Panels;
    __shared__ Panels panels;
    __shared__ float shares[kGroups][kTile];
    const Sequence sequence(offsets, blockIdx.z);
    const int tokens = sequence.tokens;
    const int first_slot = blockIdx.x * kTile, first_column = blockIdx.y * kTile;
    const int64_t of_sequence = static_cast<int64_t>(blockIdx.z) * slots;
    memory += of_sequence * width;
    g += of_sequence * width;
    d_memory += of_sequence * width;
    keep += of_sequence;
    squares += of_sequence;

    float slope = 0.0f;
    const int mine = threadIdx.x % kTile, slot = first_slot + mine;
    if (d_norms != nullptr && slot < slots) {
        for (int t = threadIdx.x / kTile; t < tokens; t += kGroups) slope += d_norms[(sequence.first + t) * slots + slot];
        slope /= sqrtf(squares[slot] + epsilon);
    }
    shares[threadIdx.x / kTile][mine] = slope;

    const bool vectors =
        in_vectors(keys, stride) && in_vectors(strength_keys, strength_stride) && in_vectors(r, width);
    Tiles product;
    product.add(panels, 3 * tokens,
                computed<Layout::kRowsFirst>([=](int row, int k) {
                    row += first_slot;
                    if (row >= slots) return 0.0f;
                    const int part = (k >= tokens) + (k >= 2 * tokens);
                    const float* p = part == 0 ? d_address : part == 1 ? d_strength : w;
                    const float x = p[(sequence.first + k - part * tokens) * slots + row];
                    return part == 2 && write_then_read ? x * keep[row] : x;
                }),
                stored<Layout::kRowsFirst>(keys, width - first_column, vectors, [=](int k) {
                    const int part = (k >= tokens) + (k >= 2 * tokens);
                    const T* x = part == 0 ? keys : part == 1 ? strength_keys : r;
                    const int pitch = part == 0 ? stride : part == 1 ? strength_stride : width;
                    return x + (sequence.first + k - part * tokens) * pitch + first_column;
                }));
    __syncthreads();  // the shares, where there was no token
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = product.row(i, j), column = first_column + product.column(i, j);
            if (first_slot + row >= slots || column >= width) continue;
            float sum = 0.0f;
            for (int n = 0; n < kGroups; ++n) sum += shares[n][row];
            const int at = (first_slot + row) * width + column;
            const float kept = keep[first_slot + row] * widen(g[at]);
            narrow(kept + sum * widen(memory[at]) + product.sums[i][j], d_memory[at]);
        }
    }
}

// One token: from dw and dβ (in `d_strength`) to the gradients of M·s (in `d_strength`), M·a (`similarity`), of the
// norm of each slot (`dw`, cosine only), of κ and of the norm of a, divided by it (`token_slopes`).
template <typename T>
__device__ inline void slopes(const T* kappa, const float* bias, const int32_t* offsets, const float* squares,
                              const float* norms, const float* w, const float* beta, float* similarity, float* dw,
                              float* d_strength, T* d_kappa, float* token_slopes, float* d_bias_shares, int slots,
                              float scale, float epsilon) {
    __shared__ float exchange[kWarps];
    const Sequence sequence(offsets, blockIdx.y);
    if (static_cast<int>(blockIdx.x) >= sequence.tokens) return;
    const int64_t token = sequence.first + blockIdx.x, row = token * slots;
    squares += static_cast<int64_t>(blockIdx.y) * slots;

    float d_beta_mean = 0.0f, d_score_mean = 0.0f;
    for (int slot = threadIdx.x; slot < slots; slot += kThreads) {
        d_score_mean += w[row + slot] * dw[row + slot];
        d_beta_mean += beta[row + slot] * d_strength[row + slot];
    }
    d_score_mean = sum_again(d_score_mean, exchange);
    d_beta_mean = sum_again(d_beta_mean, exchange);

    const float factor = kappa != nullptr ? widen(kappa[token]) : 0.0f;
    const float norm = kappa != nullptr ? norms[token] : 0.0f;
    float d_bias = 0.0f, d_factor = 0.0f, d_norm = 0.0f;
    for (int slot = threadIdx.x; slot < slots; slot += kThreads) {
        const float b = beta[row + slot], d = d_strength[row + slot];
        const float d_logit = bias != nullptr ? d * b * (1.0f - b) : b * (d - d_beta_mean);
        d_bias += d_logit;
        d_strength[row + slot] = scale * d_logit;

        const float d_score = w[row + slot] * (dw[row + slot] - d_score_mean);
        if (kappa == nullptr) {
            similarity[row + slot] = scale * d_score;
            continue;
        }
        const float slot_norm = sqrtf(squares[slot] + epsilon), of = similarity[row + slot];
        const float d_dot = factor * d_score / (slot_norm * norm + epsilon);
        d_factor += d_score * of;
        d_norm -= d_dot * of * slot_norm;
        dw[row + slot] = -d_dot * of * norm;
        similarity[row + slot] = d_dot;
    }
    d_bias = sum_again(d_bias, exchange);
    d_factor = sum_again(d_factor, exchange);
    d_norm = sum_again(d_norm, exchange);
    if (threadIdx.x != 0) return;
    d_bias_shares[token] = d_bias;
    token_slopes[token] = kappa != nullptr ? d_norm / norm : 0.0f;
    if (kappa != nullptr) narrow(d_factor, d_kappa[token]);
}

}  // namespace

// One slot per thread. before[t] = Π_{u<t} (1 − erased_u); keep the whole product; `slopes` G·M → −G·M, and with
// write_then_read −(G + wᵀ·R)·M.
extern "C" __global__ void __launch_bounds__(kThreads) content_memory_prefix(
    const float* w, const float* beta, const float* dw, const int32_t* offsets, float* before, float* keep,
    float* slopes, int32_t slots, int32_t paper, int32_t write_then_read) {
    const Sequence sequence(offsets, blockIdx.y);
    const int slot = blockIdx.x * kThreads + threadIdx.x;
    if (slot >= slots) return;
    const int64_t of_sequence = static_cast<int64_t>(blockIdx.y) * slots;
    float product = 1.0f, seen = 0.0f;
    for (int t = 0; t < sequence.tokens; ++t) {
        const int64_t at = (sequence.first + t) * slots + slot;
        before[at] = product;
        product *= 1.0f - erased(w[at], beta[at], paper != 0);
        if (write_then_read != 0) seen += w[at] * dw[at];
    }
    keep[of_sequence + slot] = product;
    slopes[of_sequence + slot] = -(slopes[of_sequence + slot] + seen);
}

// One slot per thread, tokens backwards: dw += …, and dgate → dβ.
extern "C" __global__ void __launch_bounds__(kThreads) content_memory_suffix(
    const float* w, const float* beta, const float* before, const float* slopes, const int32_t* offsets, float* dw,
    float* d_strength, int32_t slots, int32_t paper) {
    const Sequence sequence(offsets, blockIdx.y);
    const int slot = blockIdx.x * kThreads + threadIdx.x;
    if (slot >= slots) return;
    float after = slopes[static_cast<int64_t>(blockIdx.y) * slots + slot];
    for (int t = sequence.tokens - 1; t >= 0; --t) {
        const int64_t at = (sequence.first + t) * slots + slot;
        const float address = w[at], strength = beta[at], d_gate = d_strength[at];
        const float d_erased = before[at] * after;
        after *= 1.0f - erased(address, strength, paper != 0);
        dw[at] += paper != 0 ? d_gate * strength + d_erased * (1.0f - strength) : (d_gate + d_erased) * strength;
        d_strength[at] = (paper != 0 ? d_gate - d_erased : d_gate + d_erased) * address;
    }
}

// gates[t, u] = Σ_i w_ti·β_ti·w_ui
extern "C" __global__ void __launch_bounds__(kThreads) content_memory_gates(
    const float* w, const float* beta, const int32_t* offsets, float* gates, int32_t slots, int32_t pitch) {
    using Tiles = Product<float, Units::kThreads>;
    using Panels = Tiles::Panels;
    __shared__ Panels panels;
    const Sequence sequence(offsets, blockIdx.z);
    const int tokens = sequence.tokens;
    const int first_row = blockIdx.y * kTile, first_column = blockIdx.x * kTile;
    if (first_row >= tokens || first_column >= tokens) return;
    Tiles product;
    product.add(panels, slots,
                computed<Layout::kDepthFirst>([=](int t, int slot) {
                    t += first_row;
                    const int64_t at = (sequence.first + t) * slots + slot;
                    return t < tokens ? w[at] * beta[at] : 0.0f;
                }),
                computed<Layout::kDepthFirst>([=](int u, int slot) {
                    u += first_column;
                    return u < tokens ? w[(sequence.first + u) * slots + slot] : 0.0f;
                }));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int t = first_row + product.row(i, j), u = first_column + product.column(i, j);
            if (t < tokens && u < tokens) gates[(sequence.first + t) * pitch + u] = product.sums[i][j];
        }
    }
}

// With cross = v·Rᵀ: dw_ti (R_t·M_i on entry) = keep_i·dw_ti + Σ_u cross_ut·w_ui·β_ui, d_gate_ti += Σ_u cross_tu·w_ui.
extern "C" __global__ void __launch_bounds__(kThreads) content_memory_spread(
    const float* cross, const float* w, const float* beta, const float* keep, const int32_t* offsets, float* dw,
    float* d_gate, int32_t slots, int32_t pitch) {
    using Tiles = Product<float, Units::kThreads>;
    using Panels = Tiles::Panels;
    __shared__ Panels panels;
    const Sequence sequence(offsets, blockIdx.z);
    const int tokens = sequence.tokens;
    const int first_slot = blockIdx.x * kTile, first_token = blockIdx.y * kTile;
    if (first_token >= tokens) return;
    Tiles to_address, to_gate;
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
    to_gate.add(panels, tokens,
                computed<Layout::kDepthFirst>([=](int t, int u) {
                    t += first_token;
                    return t < tokens ? cross[(sequence.first + t) * pitch + u] : 0.0f;
                }),
                computed<Layout::kRowsFirst>([=](int slot, int u) {
                    slot += first_slot;
                    return slot < slots ? w[(sequence.first + u) * slots + slot] : 0.0f;
                }));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int t = first_token + to_gate.row(i, j), slot = first_slot + to_gate.column(i, j);
            if (t >= tokens || slot >= slots) continue;
            const int64_t at = (sequence.first + t) * slots + slot;
            dw[at] = keep[static_cast<int64_t>(blockIdx.z) * slots + slot] * dw[at] + to_address.sums[i][j];
            d_gate[at] += to_gate.sums[i][j];
        }
    }
}

// db += Σ over all tokens of the pack.
extern "C" __global__ void __launch_bounds__(kThreads)
    content_memory_bias_gradient(const float* d_bias_shares, float* d_bias, int32_t tokens) {
    __shared__ float exchange[kWarps];
    float sum = 0.0f;
    for (int t = threadIdx.x; t < tokens; t += kThreads) sum += d_bias_shares[t];
    sum = sum_again(sum, exchange);
    if (threadIdx.x == 0) *d_bias += sum;
}

#define CONTENT_MEMORY_BACKWARD(NAME, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(kThreads) content_memory_cross_##NAME(                                \
        const T* v, const T* r, const int32_t* offsets, float* y, int32_t width, int32_t stride, int32_t pitch) {      \
        cross(v, r, offsets, y, width, stride, pitch);                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads) content_memory_key_gradient_##NAME(                         \
        const float* d_address, const float* d_strength, const T* memory, const T* keys, const float* token_slopes,    \
        const int32_t* offsets, T* d_keys, T* d_strength_keys, int32_t slots, int32_t width, int32_t stride,           \
        int32_t d_stride, int32_t d_strength_stride) {                                                                 \
        key_gradient(d_address, d_strength, memory, keys, token_slopes, offsets, d_keys, d_strength_keys, slots,       \
                     width, stride, d_stride, d_strength_stride);                                                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads) content_memory_value_gradient_##NAME(                       \
        const float* w, const float* beta, const T* g, const float* gates, const T* r, const int32_t* offsets,         \
        T* d_value, int32_t slots, int32_t width, int32_t pitch, int32_t d_stride) {                                   \
        value_gradient(w, beta, g, gates, r, offsets, d_value, slots, width, pitch, d_stride);                         \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads) content_memory_memory_gradient_##NAME(                      \
        const T* memory, const T* g, const float* keep, const float* squares, const float* d_norms,                    \
        const float* d_address, const float* d_strength, const float* w, const T* keys, const T* strength_keys,        \
        const T* r, const int32_t* offsets, T* d_memory, int32_t slots, int32_t width, int32_t stride,                 \
        int32_t strength_stride, int32_t write_then_read, float epsilon) {                                             \
        memory_gradient(memory, g, keep, squares, d_norms, d_address, d_strength, w, keys, strength_keys, r, offsets,  \
                        d_memory, slots, width, stride, strength_stride, write_then_read != 0, epsilon);               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads) content_memory_slopes_##NAME(                               \
        const T* kappa, const float* bias, const int32_t* offsets, const float* squares, const float* norms,           \
        const float* w, const float* beta, float* similarity, float* dw, float* d_strength, T* d_kappa,                \
        float* token_slopes, float* d_bias_shares, int32_t slots, float scale, float epsilon) {                        \
        slopes(kappa, bias, offsets, squares, norms, w, beta, similarity, dw, d_strength, d_kappa, token_slopes,       \
               d_bias_shares, slots, scale, epsilon);                                                                  \
    }

CONTENT_MEMORY_BACKWARD(f32, float)
CONTENT_MEMORY_BACKWARD(bf16, bf16)
CONTENT_MEMORY_BACKWARD(f16, f16)
