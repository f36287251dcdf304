// What the kernels of the forward pass share: their parameters, the softmax of a tile and the memory loss of a row.
//
// The loss needs lse, so it is one more pass over the keys. 1 − A of a row's largest entry (its peak) is the sum of the
// others, never a subtraction; every other entry has A ≤ 1/2. While a row goes by, the largest entry so far is held back
// and all others are added up; what a larger one displaces is added then. For the backward pass a row keeps three
// numbers: with ĝ = ∂row_loss/∂A and p the peak,
//   at_peak = Σ_k A_k (ĝ_k − ĝ_p),  shift = ĝ_p + at_peak,  so that  dS_j = A_j ĝ_j − A_j·shift,  dS_p = −A_p·at_peak
// in which nothing cancels when A_p rounds to 1.
#pragma once

#include "attention.cuh"

namespace attention {

constexpr float kLeastFactor = 1e-30f;
constexpr float kLogFloor = -100.0f;
// A is added up times e^40, so that the sum without the peak reaches e^−100 and below.
constexpr float kLift = 40.0f;
constexpr float kLower = 4.2483543e-18f;  // e^−40

// Unlike fmaxf, this lets a NaN through.
__device__ inline float floored(float log) { return log < kLogFloor ? kLogFloor : log > 0.0f ? 0.0f : log; }

// Sums over the entries of a row but for its largest so far. Logarithms of A come in.
struct RowLoss {
    float peak_log = -kInfinity;
    int peak = 0x7fffffff;
    int peak_paired = 0;
    float rest = 0.0f;        // Σ A·e^40
    float slope = 0.0f;       // Σ A·ĝ
    float complement = 0.0f;  // 1 − Π (1 − A) over what is not paired: A ≤ 1/2 there, one logarithm does for all
    float loss = 0.0f;        // of the pairs

    __device__ void add(float log, int key, int paired) {
        if (log > peak_log || (log == peak_log && key < peak)) {
            settle(peak_log, peak_paired);
            peak_log = log;
            peak = key;
            peak_paired = paired;
        } else {
            settle(log, paired);
        }
    }

    __device__ void settle(float log, int paired) {
        const float lifted = expf(log + kLift), weight = lifted * kLower;
        rest += lifted;
        slope += loss_slope(weight, paired != 0);
        if (paired != 0) {
            loss -= floored(log);
        } else {
            complement += weight * (1.0f - complement);
        }
    }

    // Adds the sums of the lane that is `lanes` away.
    __device__ void join(int lanes) {
        const auto other = [lanes](auto x) { return __shfl_xor_sync(0xffffffffu, x, lanes); };
        const float other_complement = other(complement);
        rest += other(rest);
        slope += other(slope);
        complement += other_complement * (1.0f - complement);
        loss += other(loss);
        const float log = other(peak_log);
        const int key = other(peak), paired = other(peak_paired);
        add(log, key, paired);
    }

    // The row's loss, and what the backward pass wants to know.
    __device__ float finish(float& at_peak, float& shift) const {
        const float others = rest * kLower;
        const float own_log = others < 0.5f ? log1pf(-others) : peak_log;
        const float own = expf(own_log);
        const float peak_slope = (peak_paired != 0 ? -others : own) / fmaxf(own * others, kVarianceFloor);
        at_peak = slope - others * peak_slope;
        shift = peak_slope + at_peak;
        return loss - floored(peak_paired != 0 ? own_log : logf(rest) - kLift) - log1pf(-complement);
    }
};

template <typename T>
struct Forward {
    const T *q, *k, *v;
    T* out;
    float* lse;
    Pack pack;
    Mask mask;
    Supervision supervision;
    int32_t* peak;  // these four [tokens_q, supervised heads]
    float *shift, *at_peak, *row_loss;
    int32_t heads, key_heads, q_stride, k_stride, v_stride, out_stride;
    float scale;
};

// `half` 0 or 1: of the two rows that a lane has in an accumulator.

// Scores of the keys from `key` on that the row does not see become −∞. `negative`: the others change their sign.
template <int kTiles, typename Owner>
__device__ inline void hide(float (&scores)[kTiles][4], int half, Run run, int key, const Owner& owner, bool negative) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; ++i) {
            if (negative) scores[t][i] = -scores[t][i];
            if (!run.holds(key + owner.column(t, i))) scores[t][i] = -kInfinity;
        }
    }
}

// Scores become weights exp(score − maximum), with the larger of the maximum so far (of scores times `factor`, which is
// |scale|·log₂ e) and theirs; gives the factor of what was weighed so far.
template <int kTiles>
__device__ inline float weigh(float (&scores)[kTiles][4], int half, float factor, float& maximum, float& sum) {
    float largest = -kInfinity;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) largest = fmaxf(largest, fmaxf(scores[t][half * 2], scores[t][half * 2 + 1]));
    largest = fmaxf(maximum, row_maximum(largest) * factor);
    const float centre = largest == -kInfinity ? 0.0f : largest;  // nothing seen yet
    const float shrink = ptx::exp2_approx(maximum - centre);
    maximum = largest;
    float total = 0.0f;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; ++i) {
            scores[t][i] = ptx::exp2_approx(fmaf(scores[t][i], factor, -centre));
            total += scores[t][i];
        }
    }
    sum = sum * shrink + total;
    return shrink;
}

// Adds a row's scores of the keys from `key` on, of which bit j of `pairs` is that of key j.
template <int kTiles, typename Owner>
__device__ inline void add_losses(RowLoss& losses, const float (&scores)[kTiles][4], int half, Run run, int key,
                                  const Owner& owner, float scale, float lse, uint64_t pairs) {
    static_assert(kTiles * kColumns <= 64);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; ++i) {
            const int column = owner.column(t, i);
            if (!run.holds(key + column)) continue;
            losses.add(scores[t][i] * scale - lse, key + column, pairs >> column & 1);
        }
    }
}

// Writes what a row of a supervised head keeps; nothing `counts` of sequences that are not annotated.
template <typename T>
__device__ inline void store_loss(const Forward<T>& x, int64_t token, int slot, bool counts, const RowLoss& losses) {
    const int64_t at = token * x.supervision.count + slot;
    float at_peak = 0.0f, shift = 0.0f;
    x.row_loss[at] = counts ? losses.finish(at_peak, shift) : 0.0f;
    x.peak[at] = counts ? losses.peak : -1;
    x.shift[at] = shift;
    x.at_peak[at] = at_peak;
}

// `mask`: 0 none, 1 causal, 2 sliding window (`window`), 3 grouped causal (`groups` [tokens_k]); else groups is null.
// Without supervision the pointers from `slots` to `row_loss` are null.
#define ATTENTION_FORWARD_PARAMETERS(T)                                                                                \
    const T *q, const T *k, const T *v, T *out, float *lse, const int32_t *cu_seqlens_q, const int32_t *cu_seqlens_k,  \
        const int32_t *groups, const int32_t *slots, const uint8_t *annotated, const int32_t *pair_offsets,            \
        const int32_t *pair_keys, int32_t *peak, float *shift, float *at_peak, float *row_loss, int32_t sequences,     \
        int32_t heads, int32_t key_heads, int32_t supervised, int32_t q_stride, int32_t k_stride, int32_t v_stride,    \
        int32_t out_stride, int32_t mask, int32_t window, float scale

#define ATTENTION_FORWARD_ARGUMENTS(T)                                                                                 \
    Forward<T> {                                                                                                       \
        q, k, v, out, lse, {cu_seqlens_q, cu_seqlens_k, sequences}, {mask, window, groups},                            \
            {slots, annotated, pair_offsets, pair_keys, supervised}, peak, shift, at_peak, row_loss, heads, key_heads, \
            q_stride, k_stride, v_stride, out_stride, scale                                                            \
    }

}  // namespace attention
