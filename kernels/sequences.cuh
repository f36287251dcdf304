// Where blocks and tokens stand in a pack of sequences: `offsets` [sequences + 1] says where each begins.
#pragma once

#include <cstdint>

// The sequence whose tile of `rows` the block does, and which tile that is. Sequence b begins at block
// offsets[b] / rows + b: it never needs more than the blocks up to the next, and a grid of tokens / rows + sequences
// suits every pack, so that it does not depend on lengths that only the GPU knows.
__device__ inline int find_sequence(const int32_t* offsets, int sequences, int rows, int block, int& first_row) {
    int low = 0, high = sequences - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (offsets[middle] / rows + middle <= block) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    first_row = (block - offsets[low] / rows - low) * rows;
    return low;
}

// The sequence that holds a token, and which of its tokens that is.
__device__ inline int find_token(const int32_t* offsets, int sequences, int token, int& row) {
    int low = 0, high = sequences - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (offsets[middle] <= token) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    row = token - offsets[low];
    return low;
}
