// What the kernels of the backward pass share: their parameters, and the gradient of the memory loss into the scores.
// Equations: attention_backward.cu.
#pragma once

#include "attention.cuh"

namespace attention {

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

// What the gradient of a query's loss into its scores needs. It is 0 where the weight is, as it is where a key is hidden.
struct LossRow {
    int peak;
    float shift, at_peak;

    __device__ float gradient(float weight, int key, bool paired) const {
        return key == peak ? -weight * at_peak : loss_slope(weight, paired) - weight * shift;
    }
};

template <typename T>
__device__ inline LossRow loss_row(const Backward<T>& x, int64_t token, int slot) {
    const int64_t at = token * x.supervision.count + slot;
    return {x.peak[at], x.shift[at], x.at_peak[at]};
}

// exp(scale·score − lse) = 2^(score·factor − centre)
__device__ inline float centre_of(float lse) { return lse * kLog2E; }

// The slot of the head if it is supervised and the sequence annotated, or −1.
template <bool kSupervised, typename T>
__device__ inline int active_slot(const Backward<T>& x, const Sequence& sequence, int head) {
    const int slot = slot_of<kSupervised>(x.supervision, head);
    return slot >= 0 && x.supervision.annotated[sequence.index] != 0 ? slot : -1;
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

}  // namespace attention
