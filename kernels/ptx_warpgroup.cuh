// The instructions of warpgroups, as ptx.cuh has the others: one function each, with a twin in
// host/runtime/warpgroup.cpp. Compile calls for sm_90a only.
//
// A warpgroup is the 128 threads of four warps, the first of which has a number that is a multiple of four. All of them
// execute these together. Products run beside the program: from the instruction to the wait for its group, the
// registers d and a belong to it, and so does what it reads of shared memory. Around them:
//
//   fence_proxy_async  (ptx.cuh) takes what this thread has written to shared memory to products
//   wgmma_fence        what the program has done to registers comes before the products that follow. Again after each
//                      use of a register that a product takes; not between products of one shape that add to the same
//   wgmma_commit       makes a group of the products since the last one
//   wgmma_wait         waits until no more than the newest `kStillRunning` groups are under way
//
// wgmma: d [64, N] (+)= a [64, 16] · b [16, N]; overwrites d unless `adds`. Warp w of the four has the rows from 16w on,
// as fragments A 16×16 and, for each 8 columns, D 16×8 of ptx.cuh. A matrix in shared memory is given by a descriptor
// (warpgroup.cuh). There the 16 numbers of a row of a are neighbours, and those of a column of b; if b is `kTransposed`,
// the N numbers of a row of b are.
//
// give_registers, take_registers: from here on each thread of the warpgroup has `kCount` registers, fewer or more than
// before. What is given can be taken by other warpgroups of the block, which wait for it.
#pragma once

#include "ptx.cuh"

namespace ptx {

#ifdef DTMEM_HOST

uint32_t shared_address(const void* shared);
template <int kCount> void give_registers();  // 24 … 256, a multiple of 8
template <int kCount> void take_registers();
void wgmma_fence();
void wgmma_commit();
template <int kStillRunning> void wgmma_wait();  // 0 … 7
template <int kStillRunning> void wgmma_wait_behind(float x);
template <typename T> inline void keep(T&) {}

#define PTX_WGMMA(N, TYPE)                                                                                             \
    template <int kTransposed>                                                                                         \
    void wgmma_m64n##N##k16_##TYPE(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool adds);                           \
    template <int kTransposed>                                                                                         \
    void wgmma_m64n##N##k16_##TYPE(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool adds);
PTX_WGMMA(16, bf16)
PTX_WGMMA(16, f16)
PTX_WGMMA(64, bf16)
PTX_WGMMA(64, f16)
PTX_WGMMA(128, bf16)
PTX_WGMMA(128, f16)
#undef PTX_WGMMA

#else

#define PTX_FUNCTION __device__ __forceinline__

template <int kCount>
PTX_FUNCTION void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(kCount)); }
template <int kCount>
PTX_FUNCTION void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(kCount)); }

PTX_FUNCTION void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX_FUNCTION void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kStillRunning>
PTX_FUNCTION void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(kStillRunning) : "memory"); }
// The same, and not before x is there. Without it ptxas (13.0) moves the wait up past the arithmetic that is meant to go on
// beside the products; a sleep of no time, for a bit pattern that x does not have, holds it back.
template <int kStillRunning>
PTX_FUNCTION void wgmma_wait_behind(float x) {
    asm volatile("{\n\t.reg .pred odd;\n\tsetp.eq.b32 odd, %0, 0x7fc0dead;\n\t@odd nanosleep.u32 0;\n\t}"
                 :: "r"(__float_as_uint(x)) : "memory");
    wgmma_wait<kStillRunning>();
}

// Behind a wait: the compiler must not move uses of these registers, which the products have had, to before it.
PTX_FUNCTION void keep(float& x) { asm volatile("" : "+f"(x) :: "memory"); }
PTX_FUNCTION void keep(uint32_t& x) { asm volatile("" : "+r"(x) :: "memory"); }
template <typename T, int kN>
PTX_FUNCTION void keep(T (&x)[kN]) {
#pragma unroll
    for (int i = 0; i < kN; ++i) keep(x[i]);
}

#define PTX_D_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PTX_D_64                                                                                                        \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PTX_D_128                                                                                                        \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                 \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PTX_D8(I)                                                                                                      \
    "+f"(d[I][0]), "+f"(d[I][1]), "+f"(d[I][2]), "+f"(d[I][3]), "+f"(d[I + 1][0]), "+f"(d[I + 1][1]),                  \
        "+f"(d[I + 1][2]), "+f"(d[I + 1][3])
#define PTX_OPERANDS_16 PTX_D8(0)
#define PTX_OPERANDS_64 PTX_D8(0), PTX_D8(2), PTX_D8(4), PTX_D8(6)
#define PTX_OPERANDS_128 PTX_OPERANDS_64, PTX_D8(8), PTX_D8(10), PTX_D8(12), PTX_D8(14)

// `A`, `B`, `ADDS`, `TRANSPOSED`: the numbers of these operands. `SCALES`: neither a nor b is negated, and a is not
// transposed (where it could be).
#define PTX_PRODUCT(N, TYPE, A, B, ADDS, SCALES, TRANSPOSED)                                                           \
    "{\n\t.reg .pred adds;\n\tsetp.ne.b32 adds, " ADDS ", 0;\n\t"                                                       \
    "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" PTX_D_##N "}, " A ", " B ", adds, " SCALES  \
    ", " TRANSPOSED ";\n\t}"

#define PTX_WGMMA(N, TYPE, A, B, ADDS, TRANSPOSED, A4, B4, ADDS4, TRANSPOSED4)                                         \
    template <int kTransposed>                                                                                         \
    PTX_FUNCTION void wgmma_m64n##N##k16_##TYPE(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool adds) {             \
        asm volatile(PTX_PRODUCT(N, TYPE, A, B, ADDS, "1, 1, 0", TRANSPOSED)                                           \
                     : PTX_OPERANDS_##N                                                                                \
                     : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(kTransposed)                                   \
                     : "memory");                                                                                      \
    }                                                                                                                  \
    template <int kTransposed>                                                                                         \
    PTX_FUNCTION void wgmma_m64n##N##k16_##TYPE(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool adds) { \
        asm volatile(PTX_PRODUCT(N, TYPE, A4, B4, ADDS4, "1, 1", TRANSPOSED4)                                          \
                     : PTX_OPERANDS_##N                                                                                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)),                \
                       "n"(kTransposed)                                                                                \
                     : "memory");                                                                                      \
    }
PTX_WGMMA(16, bf16, "%8", "%9", "%10", "%11", "{%8, %9, %10, %11}", "%12", "%13", "%14")
PTX_WGMMA(16, f16, "%8", "%9", "%10", "%11", "{%8, %9, %10, %11}", "%12", "%13", "%14")
PTX_WGMMA(64, bf16, "%32", "%33", "%34", "%35", "{%32, %33, %34, %35}", "%36", "%37", "%38")
PTX_WGMMA(64, f16, "%32", "%33", "%34", "%35", "{%32, %33, %34, %35}", "%36", "%37", "%38")
PTX_WGMMA(128, bf16, "%64", "%65", "%66", "%67", "{%64, %65, %66, %67}", "%68", "%69", "%70")
PTX_WGMMA(128, f16, "%64", "%65", "%66", "%67", "{%64, %65, %66, %67}", "%68", "%69", "%70")

#undef PTX_WGMMA
#undef PTX_PRODUCT
#undef PTX_OPERANDS_16
#undef PTX_OPERANDS_64
#undef PTX_OPERANDS_128
#undef PTX_D8
#undef PTX_D_16
#undef PTX_D_64
#undef PTX_D_128
#undef PTX_FUNCTION

#endif

}  // namespace ptx
