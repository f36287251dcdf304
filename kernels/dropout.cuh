// Dropout by Philox4x32-10: the mask is a function of seed, step, site and index, the same bits on every machine, so that
// nothing of it is kept. Reference: dropout.rs.
#pragma once

#include <cstdint>

// Four uniform words for a counter and a key.
__device__ inline uint4 philox(uint4 counter, uint32_t key0, uint32_t key1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(counter.x) * 0xd2511f53u;
        const uint64_t product1 = static_cast<uint64_t>(counter.z) * 0xcd9e8d57u;
        counter = make_uint4(static_cast<uint32_t>(product1 >> 32) ^ counter.y ^ key0, static_cast<uint32_t>(product1),
                             static_cast<uint32_t>(product0 >> 32) ^ counter.w ^ key1, static_cast<uint32_t>(product0));
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    return counter;
}

// One mask, or none where `step` is null. The step lies in device memory: it is all that changes between the replays of a
// captured graph. Row r is drawn at row origins[r] of the whole tensor, at r without origins.
struct Dropout {
    const uint32_t* step;
    const int32_t* origins;
    uint64_t seed;
    uint32_t site, threshold;
    float scale;

    // x ← 0 or x·scale, for `kSize` neighbours from `column` of a row of `width`, a multiple of 4, as is the column unless
    // kSize is 1.
    template <int kSize>
    __device__ void apply(float (&x)[kSize], int row, int column, int width) const {
        if (step == nullptr) return;
        const int64_t origin = origins != nullptr ? origins[row] : row;
        const uint64_t index = static_cast<uint64_t>(origin * width + column);
        const auto words = [this](uint64_t quad) {
            return philox(make_uint4(static_cast<uint32_t>(quad), *step, site, static_cast<uint32_t>(quad >> 32)),
                          static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
        };
        if constexpr (kSize == 1) {
            const uint4 four = words(index / 4);
            const uint32_t low = index % 2 == 0 ? four.x : four.y, high = index % 2 == 0 ? four.z : four.w;
            keep(x[0], index % 4 < 2 ? low : high);
        } else {
#pragma unroll
            for (int i = 0; i < kSize; i += 4) {
                const uint4 four = words(index / 4 + i / 4);
                keep(x[i], four.x);
                keep(x[i + 1], four.y);
                keep(x[i + 2], four.z);
                keep(x[i + 3], four.w);
            }
        }
    }

    __device__ void keep(float& x, uint32_t word) const { x = word < threshold ? 0.0f : x * scale; }
};
