// Every inline-PTX instruction of the kernels, one function each. For a C++ compiler (DTMEM_HOST) those that touch
// memory or other lanes are only declared here; host/runtime/instructions.cpp is their twin.
//
// All are for sm_80 and up, but for those of clusters and bulk copies. A fragment's registers hold, per lane, what the PTX manual assigns to it; with g = lane/4 and
// c = lane%4, by (row, column):
//   A 16×16 (b16)  a0 (g, 2c) a1 (g+8, 2c) a2 (g, 2c+8) a3 (g+8, 2c+8), two neighbours of a row in a register
//   B 16×8  (b16)  b0 (2c, g) b1 (2c+8, g), two neighbours of a column in a register
//   A 16×8 (tf32)  a0 (g, c) a1 (g+8, c) a2 (g, c+4) a3 (g+8, c+4)
//   B 8×8  (tf32)  b0 (c, g) b1 (c+4, g)
//   C, D 16×8      d0 (g, 2c) d1 (g, 2c+1) d2 (g+8, 2c) d3 (g+8, 2c+1)
#pragma once

#include <cstdint>

#ifdef DTMEM_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace ptx {

// What the driver (on the host: the executor) made of a matrix in global memory and of a box of it; a parameter of a
// kernel, `const __grid_constant__ ptx::TensorMap`. Only tensor_load looks inside.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

#ifdef DTMEM_HOST

void ldmatrix_x1(uint32_t (&r)[1], const void* row);
void ldmatrix_x2(uint32_t (&r)[2], const void* row);
void ldmatrix_x4(uint32_t (&r)[4], const void* row);
void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row);
void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row);

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

void cp_async_4(void* shared, const void* global);
void cp_async_8(void* shared, const void* global);
void cp_async_16(void* shared, const void* global);
void cp_async_4_zfill(void* shared, const void* global, int bytes);
void cp_async_8_zfill(void* shared, const void* global, int bytes);
void cp_async_16_zfill(void* shared, const void* global, int bytes);
void cp_async_commit();
template <int kStillRunning> void cp_async_wait();  // 0 … 7
void cp_async_wait_all();

uint4 load_16_once(const void* global);
void store_16_once(void* global, uint4 value);

void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);

void cluster_arrive();
void cluster_wait();
void* map_shared(void* shared, unsigned rank);

void fence_proxy_async();
void mbarrier_init(uint64_t* barrier, unsigned arrivals);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_arrive(uint64_t* barrier, unsigned bytes);
void mbarrier_wait(uint64_t* barrier, unsigned parity);
void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier);
void tensor_load(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier);
void tensor_prefetch(const TensorMap& map);
void bulk_store(void* global, const void* shared, unsigned bytes);
void bulk_commit();
template <int kStillRunning> void bulk_wait_read();  // 0 … 7

inline float exp2_approx(float x) { return std::exp2(x); }
inline uint32_t pack_bf16(float low, float high) {
    return __float2bfloat16_rn(low).bits | static_cast<uint32_t>(__float2bfloat16_rn(high).bits) << 16;
}
inline uint32_t pack_f16(float low, float high) {
    return __float2half_rn(low).bits | static_cast<uint32_t>(__float2half_rn(high).bits) << 16;
}
inline uint32_t to_tf32(float x) {
    const uint32_t bits = __float_as_uint(x);
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffe000u : (bits + 0x1000u) & 0xffffe000u;
}

#else

#define PTX_FUNCTION __device__ __forceinline__

PTX_FUNCTION uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- 8×8 matrices of b16 from shared memory: lanes 0–7 (x1), 0–15 (x2) or all (x4) give the address of one row each,
// 16 bytes that are aligned to 16; register i receives matrix i. `trans` transposes each matrix. All 32 lanes take part.

PTX_FUNCTION void ldmatrix_x1(uint32_t (&r)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
}
PTX_FUNCTION void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
PTX_FUNCTION void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
PTX_FUNCTION void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0]) : "r"(shared_address(row)) : "memory");
}
PTX_FUNCTION void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
PTX_FUNCTION void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// --- d += a·b, accumulated in f32. All 32 lanes take part.

PTX_FUNCTION void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
PTX_FUNCTION void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Reads the upper 19 bits of each operand: round with to_tf32 first, or lose half a unit.
PTX_FUNCTION void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- Asynchronous copies from global to shared memory, both aligned to the size. They land at the issuing thread's wait
// at the latest; other threads see them after a barrier that follows. `zfill` copies the first `bytes` bytes and fills
// the rest with zeros; with 0 the source is not read.

PTX_FUNCTION void cp_async_4(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(shared_address(shared)), "l"(global) : "memory");
}
PTX_FUNCTION void cp_async_8(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(shared_address(shared)), "l"(global) : "memory");
}
PTX_FUNCTION void cp_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared_address(shared)), "l"(global) : "memory");
}
PTX_FUNCTION void cp_async_4_zfill(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
PTX_FUNCTION void cp_async_8_zfill(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
PTX_FUNCTION void cp_async_16_zfill(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
// Makes a group of this thread's copies since the last one.
PTX_FUNCTION void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until no more than the newest `kStillRunning` groups are under way.
template <int kStillRunning>
PTX_FUNCTION void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(kStillRunning) : "memory"); }
PTX_FUNCTION void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// --- 16 bytes that are read or written once: they need not stay in a cache. The load wants memory that nobody writes
// during the launch.

PTX_FUNCTION uint4 load_16_once(const void* global) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(global));
    return value;
}
PTX_FUNCTION void store_16_once(void* global, uint4 value) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(global), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) : "memory");
}

// --- Barriers 1–15 (0 is __syncthreads) for a multiple of 32 threads: `sync` arrives and waits, `arrive` only arrives.

PTX_FUNCTION void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
PTX_FUNCTION void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// --- Clusters of blocks, sm_90: compile calls only for that. The barrier of all threads of the cluster: what they did
// before they arrive, to shared memory of any block as well, is seen by all behind the wait.

PTX_FUNCTION void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
PTX_FUNCTION void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The same place in the shared memory of the block with this number in the cluster. That block must not end before its
// memory has been used.
PTX_FUNCTION void* map_shared(void* shared, unsigned rank) {
    void* mapped;
    asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(shared), "r"(rank));
    return mapped;
}

// --- The asynchronous proxy, sm_90: what copies in bulk and multiplies for warpgroups, and sees shared memory on its own.
// What this thread has written there (also by cp_async, once it waited) is seen by it behind this fence; only a barrier
// takes that to what other threads start.

PTX_FUNCTION void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- Bulk copies, sm_90: one instruction of one thread moves a run of bytes beside the program. Its size and both
// addresses are multiples of 16.
//
// A load counts its bytes at an mbarrier, eight bytes of shared memory. That goes from phase to phase: each ends when its
// arrivals have come and, with them, as many bytes as they announced. After mbarrier_init the asynchronous proxy needs the
// fence, and other threads a barrier. A wait for phase n has the parity n % 2; who waits sees the bytes, and what those
// that arrived had done before.
//
// A tensor's map says where the rows of a matrix are, how many rows and columns it has, and the size of a box. A load by
// it brings the box whose corner it names, in rows of 128 bytes with the swizzle of warpgroup.cuh, zeros for what is
// outside of the matrix; its bytes are always those of a whole box. The tile begins at a multiple of 1024.
//
// A store reads shared memory until its group (bulk_commit) is waited for, at the latest before the thread ends.

PTX_FUNCTION void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
PTX_FUNCTION void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}
// The same, announcing bytes.
PTX_FUNCTION void mbarrier_arrive(uint64_t* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
PTX_FUNCTION void mbarrier_wait(uint64_t* barrier, unsigned parity) {
    asm volatile("{\n\t.reg .pred over;\nagain:\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n\t@!over bra again;\n\t}"
                 :: "r"(shared_address(barrier)), "r"(parity) : "memory");
}
PTX_FUNCTION void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
PTX_FUNCTION void tensor_load(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(shared_address(shared)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}
// Ahead of the first load, that it does not wait for the map.
PTX_FUNCTION void tensor_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
}
PTX_FUNCTION void bulk_store(void* global, const void* shared, unsigned bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 :: "l"(global), "r"(shared_address(shared)), "r"(bytes) : "memory");
}
PTX_FUNCTION void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until no more than the newest `kStillRunning` groups still read shared memory.
template <int kStillRunning>
PTX_FUNCTION void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(kStillRunning) : "memory"); }

// --- Arithmetic.

// 2^x, within 2 units of the last place; subnormal results become 0.
PTX_FUNCTION float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Two numbers rounded to the nearest, the first in the low half.
PTX_FUNCTION uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
PTX_FUNCTION uint32_t pack_f16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
PTX_FUNCTION uint32_t to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

#undef PTX_FUNCTION

#endif

}  // namespace ptx
