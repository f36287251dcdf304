// C [M, N] += A [M, K] · B [K, N] by ldmatrix and mma, one warp per 16×8 tile: the twins of ptx.cuh at work.
// M, N, K multiples of 16, 8, 16.

#include "ptx.cuh"
#include "types.cuh"

namespace {

__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
    ptx::mma_m16n8k16_bf16(d, a, b);
}
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
    ptx::mma_m16n8k16_f16(d, a, b);
}

template <typename T>
__device__ inline void product(const T* a, const T* b, float* c, int n, int k) {
    __shared__ __align__(16) T a_tile[16][16];
    __shared__ __align__(16) T b_tile[16][8];
    const int lane = threadIdx.x, row = blockIdx.y * 16, column = blockIdx.x * 8;
    float d[4] = {};
    for (int start = 0; start < k; start += 16) {
        // A by 16 bytes a lane, B by 8.
        ptx::cp_async_16(&a_tile[lane / 2][lane % 2 * 8], a + (row + lane / 2) * k + start + lane % 2 * 8);
        ptx::cp_async_8(&b_tile[lane / 2][lane % 2 * 4], b + (start + lane / 2) * n + column + lane % 2 * 4);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        __syncwarp();
        uint32_t a_fragment[4], b_fragment[2];
        ptx::ldmatrix_x4(a_fragment, &a_tile[lane % 16][lane / 16 * 8]);
        ptx::ldmatrix_x2_trans(b_fragment, &b_tile[lane % 16][0]);
        multiply(d, a_fragment, b_fragment, T{});
        __syncwarp();
    }
    for (int i = 0; i < 4; ++i) c[(row + lane / 4 + i / 2 * 8) * n + column + lane % 4 * 2 + i % 2] += d[i];
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32)
    test_product_bf16(const bf16* a, const bf16* b, float* c, int32_t n, int32_t k) {
    product(a, b, c, n, k);
}
extern "C" __global__ void __launch_bounds__(32)
    test_product_f16(const f16* a, const f16* b, float* c, int32_t n, int32_t k) {
    product(a, b, c, n, k);
}

// The same in TF32, from registers; K a multiple of 8.
extern "C" __global__ void __launch_bounds__(32)
    test_product_tf32(const float* a, const float* b, float* c, int32_t n, int32_t k) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4, row = blockIdx.y * 16, column = blockIdx.x * 8;
    float d[4] = {};
    for (int start = 0; start < k; start += 8) {
        uint32_t a_fragment[4], b_fragment[2];
        for (int i = 0; i < 4; ++i) {
            a_fragment[i] = ptx::to_tf32(a[(row + g + i % 2 * 8) * k + start + t + i / 2 * 4]);
        }
        for (int i = 0; i < 2; ++i) b_fragment[i] = ptx::to_tf32(b[(start + t + i * 4) * n + column + g]);
        ptx::mma_m16n8k8_tf32(d, a_fragment, b_fragment);
    }
    for (int i = 0; i < 4; ++i) c[(row + g + i / 2 * 8) * n + column + t * 2 + i % 2] += d[i];
}

// Each 8×8 matrix of four, loaded without and with transposition and stored as the lanes hold it.
extern "C" __global__ void __launch_bounds__(32) test_ldmatrix(const f16* x, uint32_t* plain, uint32_t* transposed) {
    __shared__ __align__(16) f16 tile[32][8];
    const int lane = threadIdx.x;
    for (int i = 0; i < 8; ++i) tile[lane][i] = x[lane * 8 + i];
    __syncwarp();
    uint32_t r4[4], r1[1];
    ptx::ldmatrix_x4(r4, tile[lane]);
    for (int i = 0; i < 4; ++i) plain[i * 32 + lane] = r4[i];
    ptx::ldmatrix_x4_trans(r4, tile[lane]);
    for (int i = 0; i < 4; ++i) transposed[i * 32 + lane] = r4[i];
    ptx::ldmatrix_x1(r1, lane < 8 ? tile[lane] : nullptr);
    plain[4 * 32 + lane] = r1[0];
}

// Every conversion of types.cuh and ptx.cuh: n numbers to bf16, then to f16, and back.
extern "C" __global__ void __launch_bounds__(32)
    test_conversions(const float* x, uint16_t* narrowed, float* widened, uint32_t* packed, uint32_t* tf32, int32_t n) {
    const int i = blockIdx.x * 32 + threadIdx.x;
    if (i >= n) return;
    bf16 b;
    f16 h;
    narrow(x[i], b);
    narrow(x[i], h);
    reinterpret_cast<bf16*>(narrowed)[i] = b;
    reinterpret_cast<f16*>(narrowed)[n + i] = h;
    widened[i] = widen(b);
    widened[n + i] = widen(h);
    packed[i] = ptx::pack_bf16(x[i], 1.0f);
    packed[n + i] = ptx::pack_f16(1.0f, x[i]);
    tf32[i] = ptx::to_tf32(x[i]);
}
