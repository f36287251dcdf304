// What nvcc knows without being told, for a C++ compiler: keywords, built-in variables and functions, vector types.
// Included before every kernel by build.rs. Everything that the executor has to see is only declared here and defined
// in runtime/, so that a finding names the line of the kernel that called it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// Words that build.rs looks for in the preprocessed source, and removes or replaces (see build/translate.rs).
#define __global__ __dtmem_global__
#define __launch_bounds__(...) __dtmem_bounds__(__VA_ARGS__)
#define __shared__ __dtmem_shared__

#define __device__
#define __host__
#define __forceinline__ inline
#define __align__(bytes) alignas(bytes)
#define __grid_constant__

struct uint3 { unsigned x, y, z; };

#define DTMEM_VECTOR2(NAME, T, ALIGN) struct alignas(ALIGN) NAME { T x, y; };                                          \
    inline NAME make_##NAME(T x, T y) { return {x, y}; }
#define DTMEM_VECTOR4(NAME, T, ALIGN) struct alignas(ALIGN) NAME { T x, y, z, w; };                                    \
    inline NAME make_##NAME(T x, T y, T z, T w) { return {x, y, z, w}; }
DTMEM_VECTOR2(float2, float, 8)
DTMEM_VECTOR4(float4, float, 16)
DTMEM_VECTOR2(int2, int, 8)
DTMEM_VECTOR4(int4, int, 16)
DTMEM_VECTOR2(uint2, unsigned, 8)
DTMEM_VECTOR4(uint4, unsigned, 16)
#undef DTMEM_VECTOR2
#undef DTMEM_VECTOR4

namespace ptx {
struct TensorMap;
}

namespace dtmem_host {

// Constant for one thread of one block, so the compiler may keep them in registers.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) uint3 block_extent();
__attribute__((const)) uint3 grid_extent();

// The block's copy of a shared variable; `site` tells its declaration.
void* shared_variable(const void* site, const char* name, std::size_t bytes, std::size_t alignment);
void* dynamic_shared(std::size_t alignment);

// `Site` is a lambda's type, different for each declaration and each instantiation of a template around it.
template <typename T, typename Site>
inline T& shared(Site, const char* name, std::size_t alignment = alignof(T)) {
    static const char site = 0;
    return *static_cast<T*>(shared_variable(&site, name, sizeof(T), std::max(alignment, alignof(T))));
}

// A kernel's parameters as the caller must pass them.
struct Parameter {
    enum Kind : std::uint32_t { kValue, kInput, kOutput, kMap };
    std::uint32_t kind;
    std::uint32_t bytes;
};

struct Kernel {
    const char* name;
    int max_threads;
    const Parameter* parameters;
    std::size_t parameter_count;
    void (*invoke)(void (*function)(), void* const* arguments);
    void (*function)();
    const Kernel* next;
};

void add_kernel(Kernel& kernel);

template <typename T>
constexpr Parameter parameter() {
    if constexpr (std::is_pointer_v<T>) {
        return {std::is_const_v<std::remove_pointer_t<T>> ? Parameter::kInput : Parameter::kOutput, sizeof(T)};
    } else if constexpr (std::is_same_v<T, ptx::TensorMap>) {
        return {Parameter::kMap, sizeof(T)};
    } else {
        return {Parameter::kValue, sizeof(T)};
    }
}

// One per kernel, made by the code that build.rs adds to each file.
template <typename... P>
struct Registration {
    Parameter parameters[sizeof...(P) + 1];
    Kernel kernel;

    Registration(const char* name, void (*function)(P...), int max_threads, int = 0)
        : parameters{parameter<P>()..., {}},
          kernel{name, max_threads, parameters, sizeof...(P), &invoke, reinterpret_cast<void (*)()>(function), nullptr} {
        add_kernel(kernel);
    }

    static void invoke(void (*function)(), void* const* arguments) {
        unpack(reinterpret_cast<void (*)(P...)>(function), arguments, std::index_sequence_for<P...>());
    }

    // The arguments are the executor's own memory.
    template <std::size_t... I>
    __attribute__((noipa, no_sanitize("thread", "undefined"))) static void
    unpack(void (*function)(P...), void* const* arguments, std::index_sequence<I...>) {
        function(*static_cast<std::remove_cv_t<P>*>(arguments[I])...);
    }
};

}  // namespace dtmem_host

#define threadIdx (dtmem_host::thread_index())
#define blockIdx (dtmem_host::block_index())
#define blockDim (dtmem_host::block_extent())
#define gridDim (dtmem_host::grid_extent())

constexpr int warpSize = 32;

// The line tells apart barriers that the compiler would merge.
void __syncthreads(unsigned line = __builtin_LINE());
void __syncwarp(unsigned mask = 0xffffffffu);
template <typename T> T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize);
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize);
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = warpSize);
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = warpSize);
unsigned __ballot_sync(unsigned mask, int predicate);
int __any_sync(unsigned mask, int predicate);
int __all_sync(unsigned mask, int predicate);
inline void __threadfence_block() {}

template <typename T> inline T __ldg(const T* address) { return *address; }

template <typename A, typename B> constexpr std::common_type_t<A, B> min(A a, B b) {
    std::common_type_t<A, B> x = a, y = b;
    return y < x ? y : x;
}
template <typename A, typename B> constexpr std::common_type_t<A, B> max(A a, B b) {
    std::common_type_t<A, B> x = a, y = b;
    return x < y ? y : x;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

#ifndef DTMEM_RUNTIME
// The executor does not see what these touch; kernels have no need of them.
#pragma GCC poison memcpy memset memmove
#endif
