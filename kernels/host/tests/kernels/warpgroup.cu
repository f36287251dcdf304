// Products of warpgroups for tests/warpgroup.rs: single ones on shared memory that the test laid out, and a right kernel
// with one defect at a time.

#include "ptx_warpgroup.cuh"
#include "types.cuh"
#include "warpgroup.cuh"

namespace {

constexpr int kImage = 32768;  // bytes of shared memory that a test fills

// d [128 threads, kTiles·4] (+)= a·b, a from the image or (a_descriptor 0) from registers [128, 4]. The descriptors say
// where in the image the matrices begin.
template <int kTiles, int kTransposed, typename T>
__device__ inline void product(const uint16_t* image, const uint32_t* a, float* d, int64_t a_descriptor,
                               int64_t b_descriptor, int32_t adds) {
    __shared__ __align__(1024) uint16_t shared[kImage / 2];
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < kImage / 2; i += 128) shared[i] = image[i];
    float sums[kTiles][4];
    uint32_t registers[4];
    for (int i = 0; i < kTiles * 4; ++i) sums[i / 4][i % 4] = d[thread * kTiles * 4 + i];
    for (int i = 0; i < 4; ++i) registers[i] = a[thread * 4 + i];
    ptx::fence_proxy_async();
    __syncthreads();
    ptx::wgmma_fence();
    const uint64_t start = ptx::shared_address(shared) >> 4;
    const T* type = nullptr;
    const uint64_t b = static_cast<uint64_t>(b_descriptor) + start;
    if (a_descriptor != 0) {
        warpgroup::multiply<kTransposed>(sums, static_cast<uint64_t>(a_descriptor) + start, b, adds != 0, type);
    } else {
        warpgroup::multiply<kTransposed>(sums, registers, b, adds != 0, type);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    for (int i = 0; i < kTiles * 4; ++i) d[thread * kTiles * 4 + i] = sums[i / 4][i % 4];
}

}  // namespace

#define TEST_WGMMA(N, TYPE)                                                                                            \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        test_wgmma_##N##_##TYPE(const uint16_t* image, const uint32_t* a, float* d, int64_t a_descriptor,              \
                                int64_t b_descriptor, int32_t transposed, int32_t adds) {                              \
        if (transposed != 0) {                                                                                         \
            product<N / 8, 1, TYPE>(image, a, d, a_descriptor, b_descriptor, adds);                                    \
        } else {                                                                                                       \
            product<N / 8, 0, TYPE>(image, a, d, a_descriptor, b_descriptor, adds);                                    \
        }                                                                                                              \
    }
TEST_WGMMA(16, bf16)
TEST_WGMMA(16, f16)
TEST_WGMMA(64, bf16)
TEST_WGMMA(128, bf16)
TEST_WGMMA(64, f16)
TEST_WGMMA(128, f16)

// y [128, 32]: the accumulators of x · xᵀ for x [64, 64], and of it times the tile again from registers. Right if
// `defect` is 0.
extern "C" __global__ void __launch_bounds__(128) test_warpgroup(const bf16* x, float* y, int32_t defect) {
    __shared__ __align__(1024) bf16 tile[2][64 * 64];
    const int thread = static_cast<int>(threadIdx.x);
    const auto copy = [&](int to) {
        for (int i = thread; i < 512; i += 128) {
            ptx::cp_async_16(warpgroup::place<64>(tile[to], i / 8, i % 8 * 8), x + i * 8);
        }
    };
    if (defect == 1) {
        for (int i = thread; i < 4096; i += 128) *warpgroup::place<64>(tile[0], i / 64, i % 64) = x[i];
    } else {
        copy(0);
        if (defect == 2) ptx::fence_proxy_async();
        ptx::cp_async_wait_all();
        if (defect != 2 && defect != 3) ptx::fence_proxy_async();
    }
    if (defect != 4) __syncthreads();
    if (defect == 3) ptx::fence_proxy_async();

    float sums[8][4] = {}, more[8][4] = {};
    uint32_t left[4];
    if (defect != 5) ptx::wgmma_fence();
    if (defect == 6) sums[3][1] = 0.0f;
    if (defect == 7 && thread >= 96) return;
    const bf16* from = tile[0] + (defect == 8 ? 64 : defect == 9 ? 2 * 64 * 64 : 0);
    for (int column = 0; column < 64; column += 16) {
        const int own = defect == 10 && thread == 77 ? 0 : column;
        ptx::wgmma_m64n64k16_bf16<0>(sums, warpgroup::of_columns<64>(from, 0, own),
                                     warpgroup::of_columns<64>(tile[0], 0, column), true);
    }
    if (defect != 11) ptx::wgmma_commit();
    if (defect == 12) return;
    if (defect == 13) y[thread] = sums[0][0];
    if (defect == 14) sums[7][3] = 1.0f;
    if (defect == 15) tile[0][thread] = x[thread];
    if (defect == 16) copy(0);
    if (defect == 17) {
        ptx::wgmma_wait<1>();
    } else {
        ptx::wgmma_wait<0>();
    }
    for (int i = 0; i < 4; ++i) left[i] = ptx::pack_bf16(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);

    if (defect != 18) ptx::wgmma_fence();
    ptx::wgmma_m64n64k16_bf16<1>(more, left, warpgroup::of_rows<64>(tile[0], 16), false);
    ptx::wgmma_commit();
    if (defect == 19) left[2] = 0;
    ptx::wgmma_wait<0>();
    if (defect == 20) tile[0][(thread + 64) % 128] = x[thread];
    for (int i = 0; i < 32; ++i) y[thread * 32 + i] = sums[i / 4][i % 4] + more[i / 4][i % 4];
}

// Three warpgroups, 168 registers a thread: two take what the last gives. Right if `defect` is 0.
extern "C" __global__ void __launch_bounds__(384) test_registers(float* y, int32_t defect) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= 256) {
        if (defect == 1) {
            ptx::give_registers<176>();
        } else if (defect != 2) {
            ptx::give_registers<40>();
        }
    } else if (defect == 3) {
        ptx::take_registers<240>();
    } else if (defect != 4 || thread % 32 < 16) {
        ptx::take_registers<232>();
    }
    y[thread] = 1.0f;
}
