// What the forward and the backward kernels of content_memory share: sequences of a pack, and a tile of a matrix product.
#pragma once

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

// The tokens of one sequence of a pack.
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

// How a product is multiplied: f32 on the ordinary units; TF32 (which holds bf16 and f16 exactly) on matrix units, for
// f32 numbers of any size times f16; narrow operands, rounded to the storage type, on matrix units.
enum class Units { kThreads, kTf32, kNarrow };

template <typename T>
constexpr Units kUnits = sizeof(T) < sizeof(float) ? Units::kNarrow : Units::kThreads;
// Gradients keep the range of f32: bf16 has it, f16 has not.
template <typename T>
constexpr Units kUnitsOfGradients = kUnits<T>;
template <>
constexpr Units kUnitsOfGradients<f16> = Units::kTf32;

// Which elements of an operand are neighbours in memory, and so in a panel: terms of one sum, or rows of the tile.
enum class Layout { kDepthFirst, kRowsFirst };

// An operand that is computed: `at(row, k)` for row < kTile and k < depth.
template <Layout kOrder, typename At>
struct Computed {
    static constexpr Layout kLayout = kOrder;
    // A narrow product takes it in two parts, rounded and what rounding left: sums may cancel.
    static constexpr int kParts = 2;
    At at;

    __device__ float operator()(int row, int k) const { return at(row, k); }
};

template <Layout kOrder, typename At>
__device__ inline Computed<kOrder, At> computed(const At& at) {
    return {at};
}

// An operand that lies in memory: `line(n)` points to row n (depth first), or to term n of row 0 (rows first); null where
// there is none. `extent` elements of a line exist. With `vectors` lines are aligned to 16 bytes.
template <typename T, Layout kOrder, typename Line>
struct Stored {
    static constexpr Layout kLayout = kOrder;
    static constexpr int kParts = 1;
    Line line;
    const T* any;  // a place in the same tensor, aligned as its lines
    int extent;
    bool vectors;

    __device__ float operator()(int row, int k) const {
        const int n = kLayout == Layout::kDepthFirst ? row : k, at = kLayout == Layout::kDepthFirst ? k : row;
        const T* of = line(n);
        return of != nullptr && at < extent ? widen(of[at]) : 0.0f;
    }
};

template <Layout kOrder, typename T, typename Line>
__device__ inline Stored<T, kOrder, Line> stored(const T* any, int extent, bool vectors, const Line& line) {
    return {line, any, extent, vectors};
}

// Whether rows of `x`, `stride` elements apart, are aligned to 16 bytes.
template <typename T>
__device__ inline bool in_vectors(const T* x, int stride) {
    return is_aligned<kVectorSize<T>>(x, stride);
}

// A tile of a·bᵀ, 16 elements per thread.
template <Units kHow>
struct Accumulators {
    float sums[4][4] = {};

    // Of sums[i][j] in the tile.
    __device__ static int row(int i, int j) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        return kHow != Units::kThreads ? warp % 4 * 16 + j / 2 * 8 + lane / 4
                                       : i * 16 + static_cast<int>(threadIdx.x) / 16;
    }
    __device__ static int column(int i, int j) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        return kHow != Units::kThreads ? warp / 4 * 32 + i * 8 + lane % 4 * 2 + j % 2
                                       : j * 16 + static_cast<int>(threadIdx.x) % 16;
    }
};

// Every thread calls `add`, which adds Σ_k a(row, k)·b(column, k) over k < depth. Operands give 0 outside of their rows.
template <typename T, Units kHow>
struct Product;

// With panels of f32, fetched through registers one step ahead.
template <typename T, Units kHow>
struct WideProduct : Accumulators<kHow> {
    using Accumulators<kHow>::sums;
    using Accumulators<kHow>::row;
    using Accumulators<kHow>::column;

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
            if constexpr (kHow == Units::kTf32) {
                by_matrix_units(panels);
            } else {
                by_threads(panels);
            }
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
            panel[row][k] = kHow == Units::kTf32 ? __uint_as_float(ptx::to_tf32(values[n])) : values[n];
        }
    }

    __device__ void by_threads(const Panels& panels) {
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

    __device__ void by_matrix_units(const Panels& panels) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        const int g = lane / 4, c = lane % 4;
        const int first_row = warp % 4 * 16 + g, first_column = warp / 4 * 32 + g;
#pragma unroll
        for (int k = c; k < kDepth; k += 8) {
            const uint32_t a[4] = {__float_as_uint(panels.a[first_row][k]), __float_as_uint(panels.a[first_row + 8][k]),
                                   __float_as_uint(panels.a[first_row][k + 4]),
                                   __float_as_uint(panels.a[first_row + 8][k + 4])};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&row)[kPitch] = panels.b[first_column + 8 * i];
                const uint32_t b[2] = {__float_as_uint(row[k]), __float_as_uint(row[k + 4])};
                ptx::mma_m16n8k8_tf32(sums[i], a, b);
            }
        }
    }
};

template <typename T>
struct Product<T, Units::kThreads> : WideProduct<T, Units::kThreads> {};
template <typename T>
struct Product<T, Units::kTf32> : WideProduct<T, Units::kTf32> {};

__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
    ptx::mma_m16n8k16_bf16(d, a, {b0, b1});
}
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
    ptx::mma_m16n8k16_f16(d, a, {b0, b1});
}
// With panels of T, two stages of 64 terms: while one is multiplied, what lies in memory is copied to the other, and what
// is computed waits in registers. A panel has a line per row or per term, as the operand lies in memory. Only `a` may be
// computed.
template <typename T>
struct Product<T, Units::kNarrow> : Accumulators<Units::kNarrow> {
    static constexpr int kTerms = 64;
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
        static_assert(B::kParts == 1);
        const int steps = (depth + kTerms - 1) / kTerms * A::kParts;
        if (steps == 0) return;
        Waiting values;
        __syncthreads();  // what used the panels before has done so
        begin(a, 0, depth, panels.a[0], values);
        begin(b, 0, depth, panels.b[0], values);
        end(a, 0, values, panels.a[0]);
        for (int step = 0; step < steps; ++step) {
            ptx::cp_async_wait_all();
            __syncthreads();  // what this step takes is there for all, and what the one before took has been used
            const int next = step + 1, part = next % A::kParts, start = next / A::kParts * kTerms;
            if (next < steps && part == 0) {
                begin(a, start, depth, panels.a[next % 2], values);
                begin(b, start, depth, panels.b[next / A::kParts % 2], values);
            }
            const int first = step / A::kParts * kTerms;
            for (int k = 0; k < min(kTerms, depth - first); k += 16) {
                multiply_terms<A::kLayout, B::kLayout>(panels.a[step % 2], panels.b[step / A::kParts % 2], k);
            }
            if (next < steps) end(a, part, values, panels.a[next % 2]);
        }
    }

private:
    using Waiting = float[kPairs][2];

    // Pair n of this thread stands in line `line` from element `at`.
    __device__ static void place(int n, int& line, int& at) {
        line = n * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
        at = static_cast<int>(threadIdx.x) % kWarpSize * 2;
    }

    template <Layout kLayout, typename At>
    __device__ static void begin(const Computed<kLayout, At>& operand, int start, int depth, Panel&, Waiting& values) {
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
    template <Layout kLayout, typename At>
    __device__ static void end(const Computed<kLayout, At>&, int part, const Waiting& values, Panel& panel) {
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

    template <Layout kLayout, typename Line>
    __device__ static void begin(const Stored<T, kLayout, Line>& operand, int start, int depth, Panel& panel, Waiting&) {
        constexpr int kPieces = kTile / kVectorSize<T>;
        for (int n = threadIdx.x; n < kTile * kPieces; n += kThreads) {
            const int line = n / kPieces, at = n % kPieces * kVectorSize<T>;
            const T* source;
            int exist;
            if constexpr (kLayout == Layout::kDepthFirst) {
                source = operand.line(line);
                exist = min(operand.extent, depth) - start - at;
                if (source != nullptr) source += start + at;
            } else {
                source = start + line < depth ? operand.line(start + line) : nullptr;
                exist = operand.extent - at;
                if (source != nullptr) source += at;
            }
            if (source == nullptr) exist = 0;
            exist = min(max(exist, 0), kVectorSize<T>);
            if (operand.vectors) {
                ptx::cp_async_16_zfill(&panel[line][at], exist > 0 ? source : operand.any,
                                       exist * static_cast<int>(sizeof(T)));
            } else {
                for (int i = 0; i < kVectorSize<T>; ++i) {
                    panel[line][at + i] = i < exist ? source[i] : T();
                }
            }
        }
    }
    template <Layout kLayout, typename Line>
    __device__ static void end(const Stored<T, kLayout, Line>&, int, const Waiting&, Panel&) {}

    template <Layout kLayoutA, Layout kLayoutB>
    __device__ void multiply_terms(const Panel& a_panel, const Panel& b_panel, int k) {
        const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
        const int first_row = warp % 4 * 16, first_column = warp / 4 * 32;
        uint32_t a[4];
        if constexpr (kLayoutA == Layout::kDepthFirst) {
            ptx::ldmatrix_x4(a, &a_panel[first_row + lane % 16][k + lane / 16 * 8]);
        } else {
            ptx::ldmatrix_x4_trans(a, &a_panel[k + lane / 16 * 8 + lane % 8][first_row + lane / 8 % 2 * 8]);
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            uint32_t b[4];
            const int column = first_column + i * 8;
            if constexpr (kLayoutB == Layout::kDepthFirst) {
                ptx::ldmatrix_x4(b, &b_panel[column + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
            } else {
                ptx::ldmatrix_x4_trans(b, &b_panel[k + lane % 16][column + lane / 16 * 8]);
            }
            multiply(sums[i], a, b[0], b[1], T());
            multiply(sums[i + 1], a, b[2], b[3], T());
        }
    }
};

}  // namespace
