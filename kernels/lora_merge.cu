// A weight with an adapter in it: merged = W + s·B·A, in f32, rounded once. Reference: lora_linear.rs; SPEC section 5.
//
// W [rows, columns] of the master (f32, or the type of the result), merged of its own type, each with a stride; A
// [rank, columns], B [rows, rank] as the master. W stays: with rank 0 merged is W again, exactly.
//
// grid (⌈columns/256⌉, rows), block 256; a thread owns an element. Done once before acting: W and merged move once, A
// comes from a cache rank by rank, which is what bounds it.
//
// History (not measured on a GPU yet)
//   1  this version

#include "types.cuh"

namespace {

constexpr int kThreads = 256;

template <typename T, typename Master>
__device__ inline void merge(const Master* weight, const Master* a, const Master* b, T* merged, int64_t weight_stride,
                             int64_t merged_stride, int columns, int rank, float scaling) {
    const int column = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    const int64_t row = blockIdx.y;
    if (column >= columns) return;
    float update = 0.0f;
    for (int r = 0; r < rank; ++r) update += widen(b[row * rank + r]) * widen(a[int64_t{r} * columns + column]);
    narrow(widen(weight[row * weight_stride + column]) + scaling * update, merged[row * merged_stride + column]);
}

}  // namespace

#define LORA_MERGE(NAME, T, MASTER)                                                                                    \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                             \
        lora_merge_##NAME(const MASTER* weight, const MASTER* a, const MASTER* b, T* merged, int32_t weight_stride,    \
                          int32_t merged_stride, int32_t columns, int32_t rank, float scaling) {                       \
        merge(weight, a, b, merged, weight_stride, merged_stride, columns, rank, scaling);                             \
    }

LORA_MERGE(f32, float, float)
LORA_MERGE(bf16, bf16, bf16)
LORA_MERGE(f16, f16, f16)
LORA_MERGE(f32_bf16, bf16, float)
LORA_MERGE(f32_f16, f16, float)
