// Small kernels with one defect each, chosen by an argument: what a person would plant. And a few without, which the
// checks must leave alone.

#include <cstdint>

#include "ptx.cuh"
#include "types.cuh"

// y = factor·x, n elements.
extern "C" __global__ void __launch_bounds__(32) test_scale_f32(const float* x, float* y, int32_t n, float factor) {
    const int i = blockIdx.x * 32 + threadIdx.x;
    if (i < n) y[i] = factor * x[i];
}

// y[i] = x[i + offset], without a look at the end of either.
extern "C" __global__ void __launch_bounds__(64) test_offset(const float* x, float* y, int32_t offset) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    y[i] = x[i + offset];
}

// y[i] += 1: reads what it writes.
extern "C" __global__ void __launch_bounds__(64) test_increment(float* y) { y[threadIdx.x] += 1.0f; }

// Writes to memory that the caller passed as an input.
extern "C" __global__ void __launch_bounds__(32) test_write_input(const float* x) {
    const_cast<float*>(x)[threadIdx.x] = 0.0f;
}

enum Defect : int32_t { kNone, kNoBarrier, kUninitialised, kPastTheEnd, kHalfSkips, kHalfEnds, kElsewhere };

// Reverses 64 numbers by way of shared memory.
extern "C" __global__ void __launch_bounds__(64) test_reverse(const float* x, float* y, int32_t defect) {
    __shared__ float tile[64];
    const int i = threadIdx.x;
    float* cell = tile + i;
    if (defect == kPastTheEnd) cell += 8;
    if (defect != kUninitialised || i != 17) *cell = x[i];
    if (defect == kHalfEnds && i >= 32) return;
    if (defect == kElsewhere && i >= 32) {
        __syncthreads();
    } else if (defect != kNoBarrier && !(defect == kHalfSkips && i < 32)) {
        __syncthreads();
    }
    if (defect == kHalfSkips) {
        __syncwarp();
        y[i] = x[i];
    } else {
        y[i] = tile[63 - i];
    }
}

// Two warps write one word, with or without a barrier in between.
extern "C" __global__ void __launch_bounds__(64) test_two_warps(float* y, int32_t with_barrier) {
    __shared__ float word;
    if (threadIdx.x == 0) word = 1.0f;
    if (with_barrier != 0) __syncthreads();
    if (threadIdx.x == 32) word = 2.0f;
    __syncthreads();
    if (threadIdx.x == 0) y[0] = word;
}

// Lane 0 writes for its warp; the others read with or without __syncwarp.
extern "C" __global__ void __launch_bounds__(32) test_one_lane(float* y, int32_t synchronised) {
    __shared__ float word;
    if (threadIdx.x == 0) word = 1.0f;
    if (synchronised != 0) __syncwarp();
    y[threadIdx.x] = word;
}

// Every block writes y[0].
extern "C" __global__ void __launch_bounds__(32) test_two_blocks(float* y) {
    if (threadIdx.x == 0) y[0] = 1.0f;
}

// Two warps pass numbers to the other two through a named barrier, or without.
extern "C" __global__ void __launch_bounds__(128) test_producer(const float* x, float* y, int32_t synchronised) {
    __shared__ float tile[64];
    const int i = threadIdx.x % 64;
    if (threadIdx.x < 64) {
        tile[i] = x[i];
        if (synchronised != 0) ptx::barrier_arrive(1, 128);
    } else {
        if (synchronised != 0) ptx::barrier_sync(1, 128);
        y[i] = tile[63 - i];
    }
}

enum CopyDefect : int32_t { kCopyGood, kNoWait, kWaitForOlder, kCopyNoBarrier, kNeverAwaited, kCopyMisaligned };

// 32·4 numbers through asynchronous copies, the last `missing` of each four filled with zeros.
extern "C" __global__ void __launch_bounds__(32)
    test_async_copy(const float* x, float* y, int32_t missing, int32_t defect) {
    __shared__ __align__(16) float tile[33 * 4];
    const int lane = threadIdx.x;
    const int shift = defect == kCopyMisaligned ? 1 : 0;
    ptx::cp_async_16_zfill(tile + lane * 4 + shift, x + lane * 4, 16 - 4 * missing);
    if (defect == kNeverAwaited) return;
    ptx::cp_async_commit();
    if (defect == kWaitForOlder) ptx::cp_async_wait<1>();
    else if (defect != kNoWait) ptx::cp_async_wait<0>();
    const int source = defect == kNoWait || defect == kWaitForOlder ? lane : 31 - lane;
    if (defect != kCopyNoBarrier) __syncwarp();
    for (int i = 0; i < 4; ++i) y[lane * 4 + i] = tile[source * 4 + i];
}

enum Odd : int32_t { kMisalignedVector, kArrayIndex, kLaneAbsent, kDifferentShuffles, kEndless, kTooMuchShared, kDivision };

extern "C" __global__ void __launch_bounds__(32) test_odd(const float* x, float* y, int32_t which) {
    const int i = threadIdx.x;
    float local[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    switch (which) {
    case kMisalignedVector: {
        float values[4];
        load<4>(x + 1, values);
        y[i] = values[0];
        break;
    }
    case kArrayIndex: y[i] = local[i]; break;
    case kLaneAbsent: y[i] = i < 16 ? __shfl_sync(0x0000ffffu, x[i], 20) : 0.0f; break;
    case kDifferentShuffles: y[i] = i < 16 ? __shfl_sync(~0u, x[i], 0) : __shfl_xor_sync(~0u, x[i], 1); break;
    case kEndless:
        while (x[0] < 1e30f) y[i] = x[0];
        break;
    case kTooMuchShared: {
        __shared__ float large[13 * 1024];
        large[i] = 0.0f;
        break;
    }
    case kDivision: y[i] = static_cast<float>(12 / (i - 3)); break;
    default: break;
    }
}

// Numbers that every lane finds by each of the warp's functions.
extern "C" __global__ void __launch_bounds__(64) test_warp_functions(int32_t* y) {
    const int lane = threadIdx.x % 32;
    int32_t* mine = y + threadIdx.x * 8;
    mine[0] = __shfl_sync(~0u, lane, 5);
    mine[1] = __shfl_sync(~0u, lane, 3, 8);
    mine[2] = __shfl_xor_sync(~0u, lane, 9);
    mine[3] = __shfl_up_sync(~0u, lane, 3);
    mine[4] = __shfl_down_sync(~0u, lane, 3, 16);
    mine[5] = static_cast<int32_t>(__ballot_sync(~0u, lane % 3 == 0));
    mine[6] = __any_sync(~0u, lane == 31) * 2 + __all_sync(~0u, lane < 31);
    mine[7] = lane < 8 ? __shfl_xor_sync(0x000000ffu, lane, 1) : __shfl_xor_sync(0xffffff00u, lane, 1);
}

enum ClusterDefect : int32_t {
    kClusterGood, kNoClusterBarrier, kEndsEarly, kReadsBeforeTheWait, kNoArrival, kOneBlockSkips, kNoSuchBlock, kTooFar,
    kUnwritten, kOnlyOwnBlock, kWritesWhatIsRead,
};

// y = x, where each block takes the numbers of the next block of its cluster from that block's shared memory.
extern "C" __global__ void __launch_bounds__(64) test_cluster(const float* x, float* y, int32_t blocks, int32_t defect) {
    __shared__ float numbers[64];
    const int i = threadIdx.x, rank = static_cast<int>(blockIdx.x) % blocks;
    const int next = defect == kNoSuchBlock ? blocks : (rank + 1) % blocks;
    if (defect != kUnwritten || rank != 0 || i != 5) numbers[i] = x[blockIdx.x * 64 + i];
    const float* others = static_cast<const float*>(ptx::map_shared(numbers, next));
    if (defect == kTooFar) others += 64;
    float taken = 0.0f;
    if (defect == kOnlyOwnBlock) {
        __syncthreads();
    } else if (defect != kNoClusterBarrier && !(defect == kOneBlockSkips && rank == 0)) {
        if (defect != kNoArrival) ptx::cluster_arrive();
        if (defect == kReadsBeforeTheWait) taken = others[63 - i];
        ptx::cluster_wait();
    }
    if (defect != kReadsBeforeTheWait) taken = others[63 - i];
    if (defect == kWritesWhatIsRead) numbers[i] = 0.0f;
    if (defect != kEndsEarly) {
        ptx::cluster_arrive();
        ptx::cluster_wait();
    }
    y[(blockIdx.x - rank + next) * 64 + 63 - i] = taken;
}

// Dynamic shared memory: sums of n numbers per block of 32 threads.
extern "C" __global__ void __launch_bounds__(32) test_dynamic(const float* x, float* y, int32_t n) {
    extern __shared__ __align__(16) unsigned char bytes[];
    float* values = reinterpret_cast<float*>(bytes);
    for (int i = threadIdx.x; i < n; i += 32) values[i] = x[blockIdx.x * n + i];
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (int i = 0; i < n; ++i) sum += values[i];
        y[blockIdx.x] = sum;
    }
}
