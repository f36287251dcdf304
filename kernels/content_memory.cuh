// What the kernels of content_memory share: sequences of a pack, products of whose operands one is computed, and panels of
// operands that lie in memory.
#pragma once

#include "mma.cuh"
#include "ptx.cuh"
#include "reduce.cuh"
#include "types.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;

// A block computes kTile × kTile elements of a product, kDepth terms of each sum at a time.
constexpr int kTile = 64;
constexpr int kDepth = 32;
// Floats from row to row of a panel: float4 reads of 8 rows, and the reads of a fragment, hit every bank once.
constexpr int kPitch = kDepth + 4;
constexpr int kFetches = kTile * kDepth / kThreads;
// Four groups of threads share the tokens of a sum or product over tokens, one slot of the tile per thread.
constexpr int kGroups = kThreads / kTile;

// The tokens of one sequence of a pack. If its end lies before its start it takes no part.
struct Sequence {
    int64_t first;
    int tokens;

    __device__ Sequence(const int32_t* offsets, int index)
        : first(offsets[index]), tokens(offsets[index + 1] - offsets[index]) {}
};

// The share of a slot that a token erases.
__device__ inline float erased(float w, float beta, bool paper) { return paper ? w * (1.0f - beta) : w * beta; }

// Σ over the block, in every thread, by an exchange that may just have been used.
__device__ inline float sum_again(float x, float (&exchange)[kWarps]) {
    __syncthreads();
    return block_sum(x, exchange);
}

// Which elements of an operand are neighbours in memory, and so in a panel: terms of one sum, or rows of the tile.
enum class Layout { kDepthFirst, kRowsFirst };

// An operand that is computed: `at(row, k)` for row < kTile and k < depth.
template <Layout kOrder, typename At>
struct Computed {
    static constexpr Layout kLayout = kOrder;
    At at;

    __device__ float operator()(int row, int k) const { return at(row, k); }
};

template <Layout kOrder, typename At>
__device__ inline Computed<kOrder, At> computed(const At& at) {
    return {at};
}

// An operand that lies in memory, rows first: `line(k)` points to term k of row 0. `extent` rows exist. With `vectors` lines
// are aligned to 16 bytes.
template <typename T, typename Line>
struct Stored {
    static constexpr Layout kLayout = Layout::kRowsFirst;
    Line line;
    const T* any;  // a place in the same tensor, aligned as its lines
    int extent;
    bool vectors;

    __device__ float operator()(int row, int k) const { return row < extent ? widen(line(k)[row]) : 0.0f; }
};

template <typename T, typename Line>
__device__ inline Stored<T, Line> stored(const T* any, int extent, bool vectors, const Line& line) {
    return {line, any, extent, vectors};
}

// Rows of a matrix in memory.
template <typename T>
struct Rows {
    const T* first;
    int stride;

    __device__ const T* operator[](int64_t row) const { return first + row * stride; }
    // Whether they are aligned to 16 bytes.
    __device__ bool in_vectors() const { return is_aligned<kVectorSize<T>>(first, stride); }
};

// A tile of a·bᵀ, 16 elements per thread: as mma leaves them, and f32 by threads in rows and columns of 16.
template <bool kNarrow>
struct Accumulators {
    float sums[4][4] = {};

    // Of sums[i][j] in the tile.
    __device__ static int row(int i, int j) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        return kNarrow ? warp % 4 * 16 + j / 2 * 8 + lane / 4 : i * 16 + static_cast<int>(threadIdx.x) / 16;
    }
    __device__ static int column(int i, int j) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        return kNarrow ? warp / 4 * 32 + i * 8 + lane % 4 * 2 + j % 2 : j * 16 + static_cast<int>(threadIdx.x) % 16;
    }
};

// Every thread calls `add`, which adds Σ_k a(row, k)·b(column, k) over k < depth. Operands give 0 outside of their rows.
template <typename T>
struct Product;

// f32: panels are fetched through registers one step ahead, and multiplied on the ordinary units.
template <>
struct Product<float> : Accumulators<false> {
    struct alignas(16) Panels {
        float a[kTile][kPitch];
        float b[kTile][kPitch];
    };

    template <typename A, typename B>
    __device__ void add(Panels& panels, int depth, const A& a, const B& b) {
        float next_a[kFetches], next_b[kFetches];
        fetch(a, 0, depth, next_a);
        fetch(b, 0, depth, next_b);
        for (int start = 0; start < depth; start += kDepth) {
            __syncthreads();  // the panels before have been used
            keep<A::kLayout>(next_a, panels.a);
            keep<B::kLayout>(next_b, panels.b);
            __syncthreads();
            if (start + kDepth < depth) {
                fetch(a, start + kDepth, depth, next_a);
                fetch(b, start + kDepth, depth, next_b);
            }
            multiply_terms(panels);
        }
    }

private:
    // Element `n` of this thread in a panel. With rows first a warp takes 8 rows × 4 terms: whole sectors of memory, and
    // every bank once.
    template <Layout kLayout>
    __device__ static void place(int n, int& row, int& k) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        row = kLayout == Layout::kDepthFirst ? n * kWarps + warp : warp * 8 + lane % 8;
        k = kLayout == Layout::kDepthFirst ? lane : n * 4 + lane / 8;
    }

    // The terms from `start` of a panel's rows; 0 from `depth` on.
    template <typename Operand>
    __device__ static void fetch(const Operand& operand, int start, int depth, float (&values)[kFetches]) {
#pragma unroll
        for (int n = 0; n < kFetches; ++n) {
            int row, k;
            place<Operand::kLayout>(n, row, k);
            values[n] = start + k < depth ? operand(row, start + k) : 0.0f;
        }
    }

    template <Layout kLayout>
    __device__ static void keep(const float (&values)[kFetches], float (&panel)[kTile][kPitch]) {
#pragma unroll
        for (int n = 0; n < kFetches; ++n) {
            int row, k;
            place<kLayout>(n, row, k);
            panel[row][k] = values[n];
        }
    }

    __device__ void multiply_terms(const Panels& panels) {
#pragma unroll
        for (int k = 0; k < kDepth; k += 4) {
            float4 b[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) b[j] = *reinterpret_cast<const float4*>(&panels.b[column(0, j)][k]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float4 a = *reinterpret_cast<const float4*>(&panels.a[row(i, 0)][k]);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sums[i][j] += a.x * b[j].x;
                    sums[i][j] += a.y * b[j].y;
                    sums[i][j] += a.z * b[j].z;
                    sums[i][j] += a.w * b[j].w;
                }
            }
        }
    }
};

__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
    ptx::mma_m16n8k16_bf16(d, a, {b0, b1});
}
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
    ptx::mma_m16n8k16_f16(d, a, {b0, b1});
}

// bf16 and f16: panels of the type, two stages of 64 terms: while one is multiplied, b, which lies in memory, is copied to
// the other, and a, which is computed, waits in registers. It is taken in two parts, rounded and what rounding left: sums
// may cancel. A panel of b has a line per term, one of a per row or per term. Panels take one `add`.
template <typename T>
struct Product : Accumulators<true> {
    static constexpr int kTerms = 64;
    static constexpr int kParts = 2;
    static constexpr int kLine = kTile + kVectorSize<T>;  // rows of a matrix then lie in different banks
    static constexpr int kPairs = kTile * kTerms / 2 / kThreads;
    static_assert(kTerms == kTile, "lines of both layouts are as long and as many");

    using Panel = T[kTile][kLine];
    struct alignas(16) Panels {
        Panel a[2];
        Panel b[2];
    };

    template <typename A, typename B>
    __device__ void add(Panels& panels, int depth, const A& a, const B& b) {
        const int steps = (depth + kTerms - 1) / kTerms * kParts;
        if (steps == 0) return;
        float values[kPairs][2];
        fetch(a, 0, depth, values);
        copy(b, 0, depth, panels.b[0]);
        keep(0, values, panels.a[0]);
        for (int step = 0; step < steps; ++step) {
            ptx::cp_async_wait_all();
            __syncthreads();  // what this step takes is there for all, and what the one before took has been used
            const int next = step + 1, part = next % kParts, start = next / kParts * kTerms;
            if (next < steps && part == 0) {
                fetch(a, start, depth, values);
                copy(b, start, depth, panels.b[next / kParts % 2]);
            }
            const int first = step / kParts * kTerms;
            for (int k = 0; k < min(kTerms, depth - first); k += 16) {
                multiply_terms<A::kLayout>(panels.a[step % 2], panels.b[step / kParts % 2], k);
            }
            if (next < steps) keep(part, values, panels.a[next % 2]);
        }
    }

private:
    // Pair n of this thread stands in line `line` from element `at`.
    __device__ static void place(int n, int& line, int& at) {
        line = n * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
        at = static_cast<int>(threadIdx.x) % kWarpSize * 2;
    }

    template <Layout kLayout, typename At>
    __device__ static void fetch(const Computed<kLayout, At>& operand, int start, int depth, float (&values)[kPairs][2]) {
#pragma unroll
        for (int n = 0; n < kPairs; ++n) {
            int line, at;
            place(n, line, at);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = kLayout == Layout::kDepthFirst ? line : at + i;
                const int k = start + (kLayout == Layout::kDepthFirst ? at + i : line);
                values[n][i] = k < depth ? operand(row, k) : 0.0f;
            }
        }
    }
    __device__ static void keep(int part, const float (&values)[kPairs][2], Panel& panel) {
#pragma unroll
        for (int n = 0; n < kPairs; ++n) {
            int line, at;
            place(n, line, at);
            float pair[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                T rounded;
                narrow(values[n][i], rounded);
                pair[i] = part == 0 ? values[n][i] : values[n][i] - widen(rounded);
            }
            store(pair, &panel[line][at]);
        }
    }

    template <typename Line>
    __device__ static void copy(const Stored<T, Line>& operand, int start, int depth, Panel& panel) {
        constexpr int kPieces = kTile / kVectorSize<T>;
        for (int n = threadIdx.x; n < kTile * kPieces; n += kThreads) {
            const int line = n / kPieces, at = n % kPieces * kVectorSize<T>;
            const int exist = start + line < depth ? min(max(operand.extent - at, 0), kVectorSize<T>) : 0;
            const T* source = exist > 0 ? operand.line(start + line) + at : operand.any;
            if (operand.vectors) {
                ptx::cp_async_16_zfill(&panel[line][at], source, exist * static_cast<int>(sizeof(T)));
            } else {
                for (int i = 0; i < kVectorSize<T>; ++i) panel[line][at + i] = i < exist ? source[i] : T();
            }
        }
    }

    template <Layout kLayout>
    __device__ void multiply_terms(const Panel& a_panel, const Panel& b_panel, int k) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        const int first_row = warp % 4 * 16, first_column = warp / 4 * 32;
        uint32_t a[4];
        if constexpr (kLayout == Layout::kDepthFirst) {
            ptx::ldmatrix_x4(a, &a_panel[first_row + lane % 16][k + lane / 16 * 8]);
        } else {
            ptx::ldmatrix_x4_trans(a, &a_panel[k + lane / 16 * 8 + lane % 8][first_row + lane / 8 % 2 * 8]);
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            uint32_t b[4];
            ptx::ldmatrix_x4_trans(b, &b_panel[k + lane % 16][first_column + i * 8 + lane / 16 * 8]);
            mma(sums[i], a, b[0], b[1], &b_panel[0][0]);
            mma(sums[i + 1], a, b[2], b[3], &b_panel[0][0]);
        }
    }
};

// Rows of kColumns elements in shared memory. A piece of 16 bytes stands at another place in each of eight rows, so that
// the eight of a matrix lie in different banks.
template <typename T, int kColumns>
struct alignas(16) Panel {
    static constexpr int kPieces = kColumns / kVectorSize<T>;
    static_assert(kPieces == 4 || kPieces % 8 == 0, "rows of 64 bytes, two of which share all banks, or of 128 and more");
    T values[kTile * kColumns];

    __device__ const T* at(int row, int column) const {
        const int turn = kPieces == 4 ? row / 2 % 4 : row % 8;
        return values + row * kColumns + (column / kVectorSize<T> ^ turn) * kVectorSize<T> + column % kVectorSize<T>;
    }

    // Starts to copy so many rows: `line(row)` points to the first of `extent` elements, null for zeros. With `vectors`
    // lines are aligned to 16 bytes, as `any` is.
    template <typename Line>
    __device__ void load(int rows, int extent, const T* any, bool vectors, const Line& line) {
        for (int n = threadIdx.x; n < rows * kPieces; n += kThreads) {
            const int row = n / kPieces, column = n % kPieces * kVectorSize<T>;
            const T* source = line(row);
            const int exist = source == nullptr ? 0 : min(max(extent - column, 0), kVectorSize<T>);
            source = exist > 0 ? source + column : any;
            T* to = const_cast<T*>(at(row, column));
            if (vectors) {
                ptx::cp_async_16_zfill(to, source, exist * static_cast<int>(sizeof(T)));
            } else {
                for (int i = 0; i < kVectorSize<T>; ++i) to[i] = i < exist ? source[i] : T();
            }
        }
    }
};

// One part of two, or both, of a matrix instruction's rows, times columns as they lie in memory.
__device__ inline void multiply_parts(float (&d)[4], const uint32_t (&rows)[2][4], uint32_t b0, uint32_t b1,
                                      const bf16* type) {
    mma(d, rows[0], b0, b1, type);
    mma(d, rows[1], b0, b1, type);
}
// Two numbers, each as the sum of two bf16: rounded, and what the rounding left.
__device__ inline void split(float first, float second, uint32_t& high, uint32_t& low) {
    high = ptx::pack_bf16(first, second);
    low = ptx::pack_bf16(first - __uint_as_float(high << 16), second - __uint_as_float(high & 0xffff0000u));
}
// Two f16 are two pairs of bf16, exactly.
__device__ inline void multiply_parts(float (&d)[4], const uint32_t (&rows)[2][4], uint32_t b0, uint32_t b1,
                                      const f16*) {
    const bf16* type = nullptr;
    uint32_t high[2], low[2];
    const uint32_t columns[2] = {b0, b1};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float x[2];
        load(reinterpret_cast<const f16*>(&columns[i]), x);
        split(x[0], x[1], high[i], low[i]);
    }
    mma(d, rows[0], high[0], high[1], type);
    mma(d, rows[1], high[0], high[1], type);
    mma(d, rows[0], low[0], low[1], type);
}

// The next two are for warps that own 16·kM rows (or 16) and 8·kN columns of a product, as mma leaves them.

// d[m][n] += the first 16·count rows of a · 8·kN rows of b from `first`, transposed.
template <int kM, int kN, typename T, int kColumns>
__device__ inline void multiply_rows(float (&d)[kM][kN][4], const Panel<T, kColumns>& a, const Panel<T, kColumns>& b,
                                     int first, int count) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int k = 0; k < kColumns; k += 16) {
        uint32_t columns[kN / 2][4];
#pragma unroll
        for (int n = 0; n < kN / 2; ++n) {
            ptx::ldmatrix_x4(columns[n], b.at(first + n * 16 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            if (m >= count) continue;
            uint32_t rows[4];
            ptx::ldmatrix_x4(rows, a.at(m * 16 + lane % 16, k + lane / 16 * 8));
#pragma unroll
            for (int n = 0; n < kN / 2; ++n) {
                mma(d[m][2 * n], rows, columns[n][0], columns[n][1], a.values);
                mma(d[m][2 * n + 1], rows, columns[n][2], columns[n][3], a.values);
            }
        }
    }
}

template <int kM, int kN, int kColumns>
__device__ inline void multiply_rows(float (&d)[kM][kN][4], const Panel<float, kColumns>& a,
                                     const Panel<float, kColumns>& b, int first, int count) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
#pragma unroll 1
    for (int k = 0; k < kColumns; k += 4) {
        float columns[kN][2][4];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) load(b.at(first + n * 8 + 2 * c + i, k), columns[n][i]);
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            if (m >= count) continue;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float row[4];
                load(a.at(m * 16 + g + 8 * h, k), row);
#pragma unroll
                for (int n = 0; n < kN; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        d[m][n][2 * h] += row[i] * columns[n][0][i];
                        d[m][n][2 * h + 1] += row[i] * columns[n][1][i];
                    }
                }
            }
        }
    }
}

}  // namespace
