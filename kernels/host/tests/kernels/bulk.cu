// Bulk copies for tests/bulk.rs: a right kernel with one defect at a time.

#include "ptx.cuh"

namespace {

constexpr int kNumbers = 256;  // of a part: four for each thread
constexpr int kParts = 3;

enum Defect : int32_t {
    kGood, kNoFenceOfBarrier, kNoBarrierOfThreads, kNoInit, kInitTwice, kNoWait, kWrongParity, kWaitOfOthers, kTooFewBytes,
    kTooManyBytes, kNoArrival, kOddBytes, kSharedMisaligned, kGlobalMisaligned, kEndsEarly, kWritesWhatArrives,
    kWritesBarrier, kPastGlobal, kPastShared, kNoFenceOfNumbers, kFenceTooLate, kNoBarrierOfNumbers, kNoWaitForRead,
    kNoCommit, kWritesWhatIsRead, kLoadsOverNumbers, kHalfAWarpWaits,
};

}  // namespace

// y = x + 1 in kParts parts, each of which goes through the same shared memory: by one bulk copy there, and by four back.
extern "C" __global__ void __launch_bounds__(64) test_bulk(const float* x, float* y, int32_t defect) {
    __shared__ __align__(16) float numbers[kNumbers];
    __shared__ uint64_t barrier;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
        if (defect != kNoInit) ptx::mbarrier_init(&barrier, defect == kNoArrival ? 2 : 1);
        if (defect == kInitTwice) ptx::mbarrier_init(&barrier, 1);
        if (defect != kNoFenceOfBarrier) ptx::fence_proxy_async();
    }
    if (defect != kNoBarrierOfThreads) __syncthreads();
    for (int part = 0; part < kParts; ++part) {
        const float* source = x + part * kNumbers + (defect == kGlobalMisaligned ? 1 : 0);
        if (defect == kPastGlobal && part == kParts - 1) source += 4;
        if (defect == kLoadsOverNumbers) numbers[thread] = 0.0f;
        if (defect == kLoadsOverNumbers) __syncthreads();
        if (thread == 32) {
            const int off = defect == kSharedMisaligned ? 1 : defect == kPastShared ? 4 : 0;
            const unsigned bytes = kNumbers * sizeof(float) - (defect == kSharedMisaligned ? 16 : defect == kOddBytes ? 8 : 0);
            ptx::bulk_load(numbers + off, source, bytes, &barrier);
            ptx::mbarrier_arrive(&barrier, bytes + (defect == kTooFewBytes ? -16 : defect == kTooManyBytes ? 16 : 0));
        }
        if (defect == kEndsEarly) return;
        if (defect == kWritesWhatArrives && thread == 32) numbers[5] = 0.0f;
        if (defect == kWritesBarrier && thread == 32) barrier = 0;
        const int parity = defect == kWrongParity ? 1 - part % 2 : part % 2;
        if (defect == kWaitOfOthers) {
            if (thread >= 32) ptx::mbarrier_wait(&barrier, parity);
        } else if (defect == kHalfAWarpWaits) {
            if (thread % 32 < 16) ptx::mbarrier_wait(&barrier, parity);
        } else if (defect != kNoWait) {
            ptx::mbarrier_wait(&barrier, parity);
        }
        for (int i = 0; i < 4; ++i) numbers[i * 64 + thread] += 1.0f;
        if (defect != kNoFenceOfNumbers && defect != kFenceTooLate) ptx::fence_proxy_async();
        if (defect != kNoBarrierOfNumbers) __syncthreads();
        if (defect == kFenceTooLate) ptx::fence_proxy_async();
        if (thread < 4) {
            const int first = thread * 64;
            ptx::bulk_store(y + part * kNumbers + first, numbers + first, 64 * sizeof(float));
            if (defect != kNoCommit) ptx::bulk_commit();
            if (defect == kWritesWhatIsRead) numbers[first] = 0.0f;
            if (defect != kNoWaitForRead) ptx::bulk_wait_read<0>();
        }
        __syncthreads();
    }
}
