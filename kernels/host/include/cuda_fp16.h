// f16 for a C++ compiler: the part of the toolkit's header of this name that the kernels use.
#pragma once

#include <cstdint>

struct __half { std::uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };

inline float __half2float(__half value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return __builtin_bit_cast(float, sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // The exponents of the two types differ by 112; the product also puts subnormal numbers right.
    const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
    return __builtin_bit_cast(float, sign | __builtin_bit_cast(std::uint32_t, scaled));
}

// To the nearest, ties to even; NaN becomes the canonical NaN.
inline __half __float2half_rn(float value) {
    const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, value);
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    std::uint32_t rounded;
    if (magnitude > 0x7f800000u) {
        return {0x7fff};
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
        rounded = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2⁻¹⁴: adding ½ leaves the multiples of 2⁻²⁴ in the lowest bits
        const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
        rounded = __builtin_bit_cast(std::uint32_t, shifted) - 0x3f000000u;
    } else {
        rounded = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    }
    return {static_cast<std::uint16_t>(sign | rounded)};
}
inline __half __float2half(float value) { return __float2half_rn(value); }

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
