// AdamW over a flat arena, and the norm of its gradient. Reference: optimiser.rs.
//
//   g = gradient·scale
//   m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²
//   p ← p·kept − rate·m / (√v·spread + ε),  kept = 1 − lr·decay,  rate = lr/(1−β₁ᵗ),  spread = 1/√(1−β₂ᵗ)
//
// Gradient, parameters and moments are f32 [n], aligned to 16 bytes; `copy` [n] is what the model computes with, the
// parameters rounded to bf16 or f16. Decay applies to the first `decayed` parameters: the arena has them in front. The
// factors of a step, rounded once from f64, and the scale lie in device memory, so that a captured graph can be replayed
// with those of the next step and no norm has to come back to the host. Where the norm is infinite or NaN, so that the
// scale is NaN, a step changes nothing.
//
// Gradients in f16 underflow, so losses are multiplied by a scale S before they are differentiated: scale_losses does it to
// the losses' weights, and clip_scale takes it out again. S lies in device memory, too: it is halved where the gradient
// overflows, and doubled after `growth_steps` steps without that. Powers of two round nothing.
//
// A thread owns four parameters. Bound by memory: gradient, p, m, v read and p, m, v written, 28 bytes a parameter (30
// with a copy), ≈ 15 operations. sum_of_squares reads 4 bytes a number; a fixed number of blocks walks over them, each
// thread in one order, so that the sum depends on n and the grid alone.
//
// History (not measured on a GPU yet)
//   1  one launch for the whole arena
//   2  steps with a scale of NaN are left out
//   3  loss scaling

#include "reduce.cuh"
#include "types.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kSize = kVectorSize<float>;

// Places in `factors`.
enum Factor { kBeta1, kRest1, kBeta2, kRest2, kKept, kRate, kSpread, kEpsilon };

__device__ inline void step(const float* factors, float kept, float g, float& p, float& m, float& v) {
    m = factors[kBeta1] * m + factors[kRest1] * g;
    v = factors[kBeta2] * v + factors[kRest2] * g * g;
    p = p * kept - factors[kRate] * m / (sqrtf(v) * factors[kSpread] + factors[kEpsilon]);
}

template <int kCount, typename T>
__device__ inline void update(const float* factors, float scale, const float* gradient, float* parameter, float* first,
                              float* second, T* copy, int64_t start, int64_t decayed) {
    float g[kCount], p[kCount], m[kCount], v[kCount];
    load<kCount>(gradient + start, g);
    load<kCount>(parameter + start, p);
    load<kCount>(first + start, m);
    load<kCount>(second + start, v);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        step(factors, start + i < decayed ? factors[kKept] : 1.0f, g[i] * scale, p[i], m[i], v[i]);
    }
    store<kCount>(p, parameter + start);
    store<kCount>(m, first + start);
    store<kCount>(v, second + start);
    if (copy != nullptr) store<kCount>(p, copy + start);
}

template <typename T>
__device__ inline void adamw(const float* factors, const float* scale, const float* gradient, float* parameter,
                             float* first, float* second, T* copy, int64_t n, int64_t decayed) {
    const int64_t start = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize;
    const float factor = scale != nullptr ? *scale : 1.0f;
    if (factor != factor) return;
    if (start + kSize <= n) {
        update<kSize>(factors, factor, gradient, parameter, first, second, copy, start, decayed);
    } else {
        for (int64_t i = start; i < n; ++i) {
            update<1>(factors, factor, gradient, parameter, first, second, copy, i, decayed);
        }
    }
}

}  // namespace

// grid ⌈n/1024⌉, block 256. factors [8] in the order of `Factor`; scale [1], or null for 1.
extern "C" __global__ void __launch_bounds__(kThreads)
    adamw_f32(const float* factors, const float* scale, const float* gradient, float* parameter, float* first_moment,
              float* second_moment, int64_t n, int64_t decayed) {
    adamw<float>(factors, scale, gradient, parameter, first_moment, second_moment, nullptr, n, decayed);
}

#define ADAMW_WITH_COPY(NAME, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                             \
        adamw_##NAME(const float* factors, const float* scale, const float* gradient, float* parameter,                \
                     float* first_moment, float* second_moment, T* copy, int64_t n, int64_t decayed) {                 \
        adamw(factors, scale, gradient, parameter, first_moment, second_moment, copy, n, decayed);                     \
    }
ADAMW_WITH_COPY(bf16, bf16)
ADAMW_WITH_COPY(f16, f16)

// partial[b] = Σ x² over what block b owns. block 256, any grid; x aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(kThreads) sum_of_squares(const float* x, float* partial, int64_t n) {
    __shared__ float exchange[kWarps];
    float sums[kSize] = {};
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kSize;
    for (int64_t start = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize; start < n;
         start += stride) {
        float values[kSize] = {};
        if (start + kSize <= n) {
            load<kSize>(x + start, values);
        } else {
            for (int i = 0; i < n - start; ++i) values[i] = x[start + i];
        }
#pragma unroll
        for (int i = 0; i < kSize; ++i) sums[i] += values[i] * values[i];
    }
    const float sum = block_sum((sums[0] + sums[1]) + (sums[2] + sums[3]), exchange);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// weights ← weights·S. grid 1, block 256. loss_scale [2]: S and the good steps since it last changed; weights [count].
extern "C" __global__ void __launch_bounds__(kThreads)
    scale_losses(const float* loss_scale, float* weights, int32_t count) {
    for (int i = threadIdx.x; i < count; i += kThreads) weights[i] *= loss_scale[0];
}

// norm = √Σ partial / S; scale = 1/S where norm ≤ max_norm, else max_norm/norm/S, but NaN where the norm is infinite or
// NaN. Then S is halved, at least to 1, or after `growth_steps` good steps doubled, at most to `largest`.
// grid 1, block 256. norm_and_scale [2]; loss_scale [2], or null for S = 1; used [1]: S before, written where there is one.
extern "C" __global__ void __launch_bounds__(kThreads)
    clip_scale(const float* partial, float* norm_and_scale, float* loss_scale, float* used, int32_t count, float max_norm,
               float growth_steps, float largest) {
    __shared__ float exchange[kWarps];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
    sum = block_sum(sum, exchange);
    if (threadIdx.x == 0) {
        const float losses = loss_scale != nullptr ? loss_scale[0] : 1.0f;
        const float norm = sqrtf(sum) / losses;
        const bool good = norm < INFINITY;
        norm_and_scale[0] = norm;
        norm_and_scale[1] = !good ? NAN : (norm <= max_norm ? 1.0f : max_norm / norm) / losses;
        if (loss_scale != nullptr) {
            const float steps = loss_scale[1] + 1.0f;
            const bool grows = steps >= growth_steps;
            *used = losses;
            loss_scale[0] = !good ? fmaxf(0.5f * losses, 1.0f) : grows ? fminf(2.0f * losses, largest) : losses;
            loss_scale[1] = good && !grows ? steps : 0.0f;
        }
    }
}
