// Copies by a tensor's map for tests/tensor.rs: a right kernel with one defect at a time.

#include "ptx.cuh"

namespace {

constexpr int kRows = 16, kColumns = 32;  // of a box
constexpr int kPlaces = 2;

enum Defect : int32_t {
    kGood, kNoWait, kNoWaitForRelease, kNoSyncwarp, kReleasesTwice, kMisplaced, kTooFewBytes, kNoMap, kEndsEarly, kWritesEarly,
};

}  // namespace

// y [tiles, 16, 32] = 1 + boxes of x: tile t has that with the corner in row 16·t − 3, column 32·(t % 2) − 8. Warp 1 loads
// them into two places, warp 0 uses them.
extern "C" __global__ void __launch_bounds__(64)
    test_tensor(const __grid_constant__ ptx::TensorMap x, float* y, int32_t tiles, int32_t defect) {
    __shared__ __align__(1024) float places[kPlaces + 1][kRows * kColumns];
    __shared__ uint64_t filled[kPlaces];
    __shared__ uint64_t emptied[kPlaces];
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (threadIdx.x == 0) {
        for (int place = 0; place < kPlaces; ++place) {
            ptx::mbarrier_init(&filled[place], 1);
            ptx::mbarrier_init(&emptied[place], 1);
        }
        ptx::fence_proxy_async();
    }
    __syncthreads();
    const ptx::TensorMap no_map = {};
    if (threadIdx.x >= 32) {
        if (defect != kNoMap) ptx::tensor_prefetch(x);
        for (int t = 0; t < tiles; ++t) {
            const int place = t % kPlaces;
            if (defect != kNoWaitForRelease) ptx::mbarrier_wait(&emptied[place], (t / kPlaces + 1) % 2);
            if (lane != 0) continue;
            const unsigned bytes = sizeof places[0];
            ptx::mbarrier_arrive(&filled[place], defect == kTooFewBytes ? bytes - 128 : bytes);
            ptx::tensor_load(places[place] + (defect == kMisplaced ? 32 : 0), defect == kNoMap ? no_map : x,
                             t % 2 * 32 - 8, t * kRows - 3, &filled[place]);
            if (defect == kWritesEarly) places[place][0] = 0.0f;
        }
        return;
    }
    if (defect == kEndsEarly) return;
    for (int t = 0; t < tiles; ++t) {
        const int place = t % kPlaces;
        if (defect != kNoWait) ptx::mbarrier_wait(&filled[place], t / kPlaces % 2);
        for (int row = 0; row < kRows; ++row) {
            const int at = (lane / 4 ^ row % 8) * 4 + lane % 4;
            y[(t * kRows + row) * kColumns + lane] = 1.0f + places[place][row * kColumns + at];
        }
        if (defect != kNoSyncwarp) __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&emptied[place]);
        if (defect == kReleasesTwice && lane == 0) ptx::mbarrier_arrive(&emptied[place]);
    }
}
