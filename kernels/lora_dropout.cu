// Which elements of a map's input the dropout of its adapters keeps, as bits. Reference: dropout.rs.
//
//   bit c % 32 of keep[r, c / 32] = element c of row r stays; the bits beyond the row are 0
//
// keep [rows, ⌈width/32⌉], width a multiple of 4. The kernels of lora_linear.cu read a mask in every tile: it is drawn once,
// and takes 1/16 of the bytes of x in 16-bit types; the scale 1/(1 − p) goes with that of the adapter.
//
// grid ⌈words/256⌉, block 256; a thread owns a word: eight draws of Philox. Bound by their arithmetic, 60 products of 32 bits
// for four elements; small beside the product that follows, 2·outputs operations for each element.
//
// History (not measured on a GPU yet)
//   1  this version

#include "dropout.cuh"

extern "C" __global__ void __launch_bounds__(256)
    lora_dropout(const uint32_t* step, const int32_t* origins, uint64_t seed, uint32_t site, uint32_t threshold, float scale,
                 uint32_t* keep, int32_t rows, int32_t width) {
    const int words = (width + 31) / 32;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (at >= static_cast<int64_t>(rows) * words) return;
    const int row = static_cast<int>(at / words), first = static_cast<int>(at % words) * 32;
    const Dropout dropout = {step, origins, seed, site, threshold, scale};
    uint32_t bits = 0;
    for (int column = first; column < min(first + 32, width); column += 4) {
        float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        dropout.apply(ones, row, column, width);
#pragma unroll
        for (int i = 0; i < 4; ++i) bits |= (ones[i] != 0.0f ? 1u : 0u) << (column - first + i);
    }
    keep[at] = bits;
}
