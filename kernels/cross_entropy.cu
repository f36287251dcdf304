// The losses of action heads: softmax cross-entropy of integer targets, and the squared error of real numbers, each with
// its gradient. Reference: cross_entropy.rs, squared_error.rs.
//
//   p = softmax(logits_r),  loss_r = −log p[target_r],  dlogits_r = scale·(p − onehot(target_r))
//   metrics = [Σ loss_r, number of rows whose largest logit, the first of equals, is the target]
//
//   squared error: loss_r = (1/size) · Σ_c (y_rc − t_rc)²,  dy = scale · (2/size) · (y − t),  metrics = [Σ loss_r, 0]
//
// logits, dlogits [rows, classes] in the storage type; targets [rows], i32: a row with a negative one counts for nothing
// and has a gradient of 0 (padding), one beyond the classes makes the loss NaN, as do logits that are NaN. scale [1] and
// metrics [2] in f32 in device memory, so that a captured graph can be replayed with another batch's scale.
//
// A group of 1 to 32 lanes, the power of two that holds the classes, owns a row; its lanes take every so many of the
// classes. A block adds up the losses and hits of its rows and writes one pair of partial sums; cross_entropy_metrics adds
// those of all blocks.
//
// Bound by memory, and at the sizes of an action head by the time of a launch: logits read (two or three times, out of
// the cache from the second on) and dlogits written, 2 elements a class, ≈ 10 operations each.
//
// History (not measured on a GPU yet)
//   1  this version; the squared error came later, in the same way

#include "reduce.cuh"
#include "types.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr unsigned kAllLanes = 0xffffffffu;

// A reduction over the groups of `lanes` neighbours of a warp, in every lane.
template <typename X, typename F>
__device__ inline X over_group(X x, int lanes, F combine) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, distance));
    return x;
}

struct Sums {
    float loss, correct;
};

// The loss of one row, and its gradient. All lanes of a warp come here; those of a row that counts for nothing have a
// `target` below 0, and `classes` 0 if they have no row at all.
template <typename T>
__device__ inline Sums row_loss(const T* logits, T* dlogits, int target, float scale, int classes, int lanes) {
    const int lane = threadIdx.x % lanes;
    const auto larger = [](float x, float y) { return fmaxf(x, y); };
    float largest = -INFINITY, chosen = NAN;
    for (int c = lane; c < classes; c += lanes) {
        const float logit = widen(logits[c]);
        largest = fmaxf(largest, logit);
        if (c == target) chosen = logit;
    }
    largest = over_group(largest, lanes, larger);
    chosen = over_group(chosen, lanes, larger);  // all but one are NaN, which a maximum leaves out

    float total = 0.0f;
    int first = 1;
    for (int c = lane; c < classes; c += lanes) {
        const float logit = widen(logits[c]);
        total += expf(logit - largest);
        if (!(c < target ? logit < chosen : logit <= chosen)) first = 0;
    }
    total = over_group(total, lanes, [](float x, float y) { return x + y; });
    first = over_group(first, lanes, [](int x, int y) { return x & y; });

    for (int c = lane; c < classes; c += lanes) {
        const float p = expf(widen(logits[c]) - largest) / total;
        narrow(target < 0 ? 0.0f : scale * (c == target ? p - 1.0f : p), dlogits[c]);
    }
    if (target < 0 || classes == 0) return {0.0f, 0.0f};
    return {logf(total) - (chosen - largest), static_cast<float>(first)};
}

template <typename T>
__device__ inline void cross_entropy(const T* logits, const int32_t* targets, const float* scale, T* dlogits,
                                     float* partial, int rows, int classes, int lanes) {
    __shared__ float exchange[2][kWarps];
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
    const bool inside = row < rows;
    const Sums sums = row_loss(logits + row * classes, dlogits + row * classes, inside ? targets[row] : -1, *scale,
                               inside ? classes : 0, lanes);
    const bool speaks = threadIdx.x % lanes == 0;
    const float loss = block_sum(speaks ? sums.loss : 0.0f, exchange[0]);
    const float correct = block_sum(speaks ? sums.correct : 0.0f, exchange[1]);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = loss;
        partial[gridDim.x + blockIdx.x] = correct;
    }
}

// y, dy [rows, size] in the storage type, targets [rows, size] in f32; known [rows]: a row with a negative number counts for
// nothing. The rows' lanes as above.
template <typename T>
__device__ inline void squared_error(const T* y, const float* targets, const int32_t* known, const float* scale, T* dy,
                                     float* partial, int rows, int size, int lanes) {
    __shared__ float exchange[kWarps];
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
    const bool inside = row < rows;
    const bool counts = inside && known[row] >= 0;
    const float each = 1.0f / static_cast<float>(size);
    float loss = 0.0f;
    for (int c = threadIdx.x % lanes; inside && c < size; c += lanes) {
        const float difference = counts ? widen(y[row * size + c]) - targets[row * size + c] : 0.0f;
        loss += each * difference * difference;
        narrow(*scale * 2.0f * each * difference, dy[row * size + c]);
    }
    loss = block_sum(loss, exchange);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = loss;
        partial[gridDim.x + blockIdx.x] = 0.0f;
    }
}

}  // namespace

// grid ⌈rows·lanes/256⌉, block 256; lanes = 1, 2, … or 32. partial [2, grid]. dlogits may be logits.
#define CROSS_ENTROPY(NAME, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads) cross_entropy_##NAME(                                       \
        const T* logits, const int32_t* targets, const float* scale, T* dlogits, float* partial, int32_t rows,         \
        int32_t classes, int32_t lanes) {                                                                              \
        cross_entropy(logits, targets, scale, dlogits, partial, rows, classes, lanes);                                 \
    }
CROSS_ENTROPY(f32, float)
CROSS_ENTROPY(bf16, bf16)
CROSS_ENTROPY(f16, f16)

// As cross_entropy, for the squared error.
#define SQUARED_ERROR(NAME, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads) squared_error_##NAME(                                       \
        const T* y, const float* targets, const int32_t* known, const float* scale, T* dy, float* partial,             \
        int32_t rows, int32_t size, int32_t lanes) {                                                                   \
        squared_error(y, targets, known, scale, dy, partial, rows, size, lanes);                                       \
    }
SQUARED_ERROR(f32, float)
SQUARED_ERROR(bf16, bf16)
SQUARED_ERROR(f16, f16)

// metrics[i] = Σ_b partial[i, b] over `blocks` pairs of partial sums. grid 2, block 256.
extern "C" __global__ void __launch_bounds__(kThreads)
    cross_entropy_metrics(const float* partial, float* metrics, int32_t blocks) {
    __shared__ float exchange[kWarps];
    float sum = 0.0f;
    for (int b = threadIdx.x; b < blocks; b += kThreads) sum += partial[static_cast<int64_t>(blockIdx.x) * blocks + b];
    sum = block_sum(sum, exchange);
    if (threadIdx.x == 0) metrics[blockIdx.x] = sum;
}
