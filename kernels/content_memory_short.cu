// Content-addressed memory, forward, for segments of up to 64 tokens in bf16 or f16: the same results as
// content_memory.cu, which has the equations and serves everything else (f32, top_k, longer segments, odd shapes).
//
// M, M′ [B, N, V] and y [tokens, V] contiguous; a and s rows of D ≤ V, v of V, with a stride of their own; κ [tokens]; b [1]
// in f32; `offsets` [B + 1]. D and V are multiples of 16, the strides of 8, all of these tensors aligned to 16 bytes. Keys
// are compared with the first D columns of a slot; the others are written and read like them.
//
// A block owns `tile` slots (at most 96) of one sequence with all their columns, and works on them in shared memory, where
// `padded` = ⌈tile/16⌉·16 of them stand (the others 0), in steps:
//   scores   M·a, M·s: A = the tile, B = both keys of the tokens in panels of 64 columns. They stay in registers: a warp
//            has 16 slots × half of the tokens, and of each (slot, token) both products lie in the same lane.
//   stats    of each token max and Σ exp(x − max) over the tile's slots
//   weights  from the stats of all tiles: w and w·β, rounded to the storage type, and keep in f32
//   columns  a warp owns 16 columns at a time: y = w·M and M′ = keep·M + w·β·v, in the order that is asked for
// Tiles of a sequence have to hear of each other twice: of the stats, and of their shares of y.
//
// With compute capability 9.0, where N ≤ 16·96 and the tile fits, they are a cluster and that is one launch: stats and
// shares of y are read from each other's shared memory.
//   short_cluster  (C, B) in clusters of C, tile = ⌈N/C⌉. C 16 (a cluster of more than 8 has to be allowed) is best: it
//                  keeps most multiprocessors busy when B is small, and leaves room for the rest of shared memory.
//                  M comes and M′ goes by bulk copies, row by row: all of the tile is on its way before the first product.
// Elsewhere they are three, tiles = ⌈N/tile⌉:
//   short_scores   (tiles, B)  scores, stats → workspace; the tile is a ring of three steps
//   short_update   (tiles, B)  weights, columns; y of this tile's slots → workspace
//   short_read     (⌈longest·V/1024⌉, B)  y = Σ over tiles, first to last
// All with 256 threads. Dynamic shared memory in bytes, with rows = ⌈longest/16⌉·16 and V₆₄ = ⌈V/64⌉·64:
//   short_scores   padded·400 + rows·864
//   short_update   padded·(2·V₆₄ + 48 + 4·rows) + rows·384
//   short_cluster  padded·(2·V₆₄ + 48 + 4·rows) + rows·1408; less than 227 KiB less 8 KiB of static shared memory
// Workspace of the three, f32, each aligned to 16 bytes: products [B, tiles, padded, rows, 2], stats [B, tiles, 2, 64, 2],
// shares of y [tiles, tokens, V].
//
// What has to move: with V = D and e = 2, N·D·e bytes read and written per sequence; N 1290, D 512, T 39: 1.3 MB each way and
// 206 MFLOP, 78 per byte: a sixth of what the matrix units can do by mma.sync in that time, so memory is the limit.
//   cluster  M once from and once to device memory, keys and values once per block from the L2 cache (120 kB each), 80 kB
//            of y per block between multiprocessors. One launch. B 8 takes 128 multiprocessors, one round; a block
//            fetches 83 kB by 162 bulk copies of 512 bytes, while it multiplies what has come, and writes them by 324 of
//            256, of which each waits for the end of the next chunk of columns and for no barrier of its own.
//   three    M twice from and once to device memory, and through the L2 cache w and β 16·N·T and y 8·tiles·T·V bytes:
//            4.0 MB and 0.8 + 2.2 MB a sequence. content_memory.cu moves 5.3 and 3.2 MB, in four launches.
//
// History (not measured on a GPU yet)
//   1  a tile of slots with all columns in shared memory (cp.async), bf16/f16 operands (ldmatrix, m16n8k16), M read twice
//      instead of three times, no launch for the softmax
//   2  clusters: M read once
//   3  slots wider than keys, which content_memory.cu served before
//   4  clusters: bulk copies in the place of copies of 16 bytes by each thread, of which 48 kB were under way at most. 167
//      registers and 10 900 instructions for sm_90a, 202 and 12 400 before

#include "content_memory_short.cuh"

namespace {

constexpr int kItems = kHalves * kMostTile / kRows / kWarps + 1;  // (16 slots, half of the tokens) of a warp, at most
constexpr int kStages = 3;                         // panels of keys
constexpr int kPanelPitch = kStep + kGap;
constexpr int kWarpColumns = 16;
constexpr int kValuePitch = kWarpColumns + kGap;
constexpr int kChunk = kWarps * kWarpColumns;
constexpr int kSharers = kWarps / kHalves;         // warps that have the same half of the tokens

// Which slots and tokens a lane has: of item j slots slot(j, 0) and slot(j, 1), of fragment i tokens token(i, 0) and
// token(i, 1). Elements 2h + n of an accumulator are those of slot(j, h) and token(i, n).
struct Owner {
    int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    int half = warp % kHalves;
    int items, fragments;  // of this warp

    __device__ explicit Owner(const Place& place)
        : items((place.tile / kRows - warp / kHalves + kSharers - 1) / kSharers), fragments(place.rows / 16) {}
    __device__ int first_slot(int j) const { return (warp / kHalves + j * kSharers) * kRows; }
    __device__ int slot(int j, int h) const { return first_slot(j) + lane / 4 + 8 * h; }
    __device__ int first_token(int i) const { return (half * fragments + i) * 8; }
    __device__ int token(int i, int n) const { return first_token(i) + lane % 4 * 2 + n; }
};

using Products = float[kItems][kFragments][kParts][4];

template <typename T>
__device__ inline float sum_of_squares(const T* x, int count) {
    float sum = 0.0f;
    for (int k = 0; k < count; k += 8) {
        float values[8];
        load(x + k, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += values[i] * values[i];
    }
    return sum;
}

// products = M·a and M·s of the tile; √(|M|²+ε) and √(|a|²+ε). Every thread calls `fetch(step)` two steps ahead, to start
// copies, and `fetched(step)` before the columns of a step are used.
template <typename T, typename Fetch, typename Fetched>
__device__ inline void scores(Rows<T> keys, Rows<T> strength_keys, const Place& place, const Tile<T>& tile, T* panels,
                              Products& products, Norms& norms, int key_width, float epsilon, const Fetch& fetch,
                              const Fetched& fetched) {
    const Owner owner(place);
    const int lane = owner.lane;
    const int steps = (key_width + kStep - 1) / kStep, panel = kParts * place.rows * kPanelPitch;
    auto start = [&](int step) {
        fetch(step);
        for (int n = threadIdx.x; n < kParts * place.rows * (kStep / 8); n += kThreads) {
            const int row = n / (kStep / 8), piece = n % (kStep / 8) * 8, column = step * kStep + piece;
            if (column >= key_width) continue;
            const bool address = row < place.rows;
            const int token = address ? row : row - place.rows;
            const bool real = token < place.tokens;
            const T* source = (address ? keys : strength_keys)[real ? place.first_token + token : 0];
            ptx::cp_async_16_zfill(panels + step % kStages * panel + row * kPanelPitch + piece,
                                   real ? source + column : source, real ? kVectorBytes : 0);
        }
        ptx::cp_async_commit();
    };
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) start(step);

    const int mine = threadIdx.x / 2, first = threadIdx.x % 2 * (kStep / 2);  // half of a row, for its norm
    float of_slot = 0.0f, of_token = 0.0f;
    for (int step = 0; step < steps; ++step) {
        ptx::cp_async_wait<kStages - 2>();
        fetched(step);
        __syncthreads();  // this step is there for all, and the one before has been used
        start(step + kStages - 1);
        const T* keys_now = panels + step % kStages * panel;
        const int column = tile.column(step);
        const int depth = min(kStep, key_width - step * kStep), part = min(depth - first, kStep / 2);
        if (mine < place.tile) of_slot += sum_of_squares(tile.at(mine, column + first), part);
        if (mine < place.rows) of_token += sum_of_squares(keys_now + mine * kPanelPitch + first, part);
        for (int k = 0; k < depth; k += 16) {
            uint32_t a[kItems][4];
#pragma unroll
            for (int j = 0; j < kItems; ++j) {
                if (j >= owner.items) continue;
                ptx::ldmatrix_x4(a[j], tile.at(owner.first_slot(j) + lane % 16, column + k + lane / 16 * 8));
            }
#pragma unroll
            for (int i = 0; i < kFragments; ++i) {
                if (i >= owner.fragments) continue;
                uint32_t b[4];  // two halves of the depth of a, then of s
                const int row = lane / 16 * place.rows + owner.first_token(i) + lane % 8;
                ptx::ldmatrix_x4(b, keys_now + row * kPanelPitch + k + lane / 8 % 2 * 8);
#pragma unroll
                for (int j = 0; j < kItems; ++j) {
                    if (j >= owner.items) continue;
                    mma(products[j][i][0], a[j], b[0], b[1], keys.first);
                    mma(products[j][i][1], a[j], b[2], b[3], keys.first);
                }
            }
        }
    }
    of_slot += __shfl_xor_sync(0xffffffffu, of_slot, 1);
    of_token += __shfl_xor_sync(0xffffffffu, of_token, 1);
    if (threadIdx.x % 2 == 0 && mine < place.tile) norms.slots[mine] = sqrtf(of_slot + epsilon);
    if (threadIdx.x % 2 == 0 && mine < place.rows) norms.tokens[mine] = sqrtf(of_token + epsilon);
    __syncthreads();
}

// Products become what the softmax and the sigmoid take; −∞ where there is no slot.
template <typename T>
__device__ inline void score(Products& products, const Place& place, const Norms& norms, const T* kappa,
                             const float* bias, float scale, float epsilon) {
    const Owner owner(place);
    const float offset = bias != nullptr ? *bias : 0.0f;
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
        if (i >= owner.fragments) continue;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int token = owner.token(i, n);
            const bool cosine = kappa != nullptr && token < place.tokens;
            const float factor = cosine ? widen(kappa[place.first_token + token]) : scale;
            const float norm = norms.tokens[token];
#pragma unroll
            for (int j = 0; j < kItems; ++j) {
                if (j >= owner.items) continue;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float(&sums)[kParts][4] = products[j][i];
                    const int slot = owner.slot(j, h), e = 2 * h + n;
                    const bool real = slot < place.slots;
                    const float by = cosine ? norms.slots[slot] * norm + epsilon : 1.0f;
                    sums[0][e] = real ? sums[0][e] / by * factor : -INFINITY;
                    sums[1][e] = real ? scale * sums[1][e] + offset : -INFINITY;
                }
            }
        }
    }
}

struct Exchange {
    float most[kParts][kSharers][kMostTokens];
    float sum[kParts][kSharers][kMostTokens];
};

// Thread p·64 + t gives those of part p and token t; what others give means nothing.
__device__ inline Stats stats(const Products& x, const Place& place, Exchange& exchange) {
    const Owner owner(place);
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
        if (i >= owner.fragments) continue;
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                float most = -INFINITY;
#pragma unroll
                for (int j = 0; j < kItems; ++j) {
                    if (j < owner.items) most = fmaxf(most, fmaxf(x[j][i][p][n], x[j][i][p][n + 2]));
                }
#pragma unroll
                for (int lanes = 4; lanes < kWarpSize; lanes *= 2) {
                    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lanes));
                }
                if (owner.lane < 4) exchange.most[p][owner.warp / kHalves][owner.token(i, n)] = most;
            }
        }
    }
    __syncthreads();
    auto most_of = [&](int p, int token) {
        float most = exchange.most[p][0][token];
        for (int w = 1; w < kSharers; ++w) most = fmaxf(most, exchange.most[p][w][token]);
        return most;
    };
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
        if (i >= owner.fragments) continue;
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float most = most_of(p, owner.token(i, n));
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < kItems; ++j) {
                    if (j >= owner.items) continue;
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        if (owner.slot(j, h) < place.slots) sum += expf(x[j][i][p][2 * h + n] - most);
                    }
                }
#pragma unroll
                for (int lanes = 4; lanes < kWarpSize; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
                if (owner.lane < 4) exchange.sum[p][owner.warp / kHalves][owner.token(i, n)] = sum;
            }
        }
    }
    __syncthreads();
    const int p = threadIdx.x / kMostTokens, token = threadIdx.x % kMostTokens;
    if (p >= kParts || token >= place.rows) return {0.0f, 0.0f};
    float sum = 0.0f;
    for (int w = 0; w < kSharers; ++w) sum += exchange.sum[p][w][token];
    return {most_of(p, token), sum};
}

// w and w·β of the tile [tile, rows], and what is left of each slot: the product over either half of the tokens.
template <typename T>
struct Weights {
    T *address, *gate;
    int pitch;
    float (*keep)[kMostTile];
};

// `of(j, i, x)` fetches the lane's products of item j and fragment i.
template <typename T, typename Of>
__device__ inline void weigh(const Place& place, const StatsOfTokens& stats, const Weights<T>& weights, bool sigmoid,
                             bool paper, const Of& of) {
    const Owner owner(place);
    float keep[kItems][2];
#pragma unroll
    for (int j = 0; j < kItems; ++j) keep[j][0] = keep[j][1] = 1.0f;
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
        if (i >= owner.fragments) continue;
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
            if (j >= owner.items) continue;
            float x[kParts][4];
            of(j, i, x);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float w[2] = {}, gate[2] = {};
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const int token = owner.token(i, n);
                    if (token >= place.tokens) continue;
                    const Stats address = stats[0][token], strength = stats[1][token];
                    const float logit = x[1][2 * h + n];
                    w[n] = expf(x[0][2 * h + n] - address.most) * address.sum;
                    const float beta =
                        sigmoid ? 1.0f / (1.0f + expf(-logit)) : expf(logit - strength.most) * strength.sum;
                    gate[n] = w[n] * beta;
                    keep[j][h] *= 1.0f - erased(w[n], beta, paper);
                }
                const int at = owner.slot(j, h) * weights.pitch + owner.token(i, 0);
                *reinterpret_cast<uint32_t*>(weights.address + at) = pack(w[0], w[1], weights.address);
                *reinterpret_cast<uint32_t*>(weights.gate + at) = pack(gate[0], gate[1], weights.address);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
        if (j >= owner.items) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            keep[j][h] *= __shfl_xor_sync(0xffffffffu, keep[j][h], 1);
            keep[j][h] *= __shfl_xor_sync(0xffffffffu, keep[j][h], 2);
            if (owner.lane % 4 == 0) weights.keep[owner.half][owner.slot(j, h)] = keep[j][h];
        }
    }
    __syncthreads();
}

// Values of the segment, 16 columns for each warp: while it works on some it copies the next.
template <typename T>
struct Values {
    Rows<T> rows;
    T* mine;

    __device__ Values(Rows<T> values, T* shared, int most_rows)
        : rows(values), mine(shared + threadIdx.x / kWarpSize * most_rows * kValuePitch) {}

    __device__ void load(const Place& place, int first_column, int width) const {
        if (first_column >= width) return;
        for (int n = threadIdx.x % kWarpSize; n < place.rows * 2; n += kWarpSize) {
            const int token = n / 2, piece = n % 2 * 8;
            const bool real = token < place.tokens;
            const T* source = rows[real ? place.first_token + token : 0];
            ptx::cp_async_16_zfill(mine + token * kValuePitch + piece, real ? source + first_column + piece : source,
                                   real ? kVectorBytes : 0);
        }
    }
};

// y = w·M in the tile of columns; `give(token, column, y, y of the next column)` takes it.
template <typename T, typename Give>
__device__ inline void read_columns(const Place& place, const Tile<T>& tile, const Weights<T>& weights,
                                    int first_column, const Give& give) {
    const int lane = threadIdx.x % kWarpSize;
    float y[kMostTokens / kRows][2][4] = {};
#pragma unroll 1
    for (int slot = 0; slot < place.tile; slot += 16) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, tile.at(slot + lane % 16, first_column) + lane / 16 * 8);
#pragma unroll
        for (int i = 0; i < kMostTokens / kRows; ++i) {
            if (i * kRows >= place.rows) continue;
            uint32_t a[4];
            const int row = slot + lane / 16 * 8 + lane % 8;
            ptx::ldmatrix_x4_trans(a, weights.address + row * weights.pitch + i * kRows + lane / 8 % 2 * 8);
            mma(y[i][0], a, b[0], b[1], tile.first);
            mma(y[i][1], a, b[2], b[3], tile.first);
        }
    }
#pragma unroll
    for (int i = 0; i < kMostTokens / kRows; ++i) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int token = i * kRows + lane / 4 + 8 * h;
                if (token >= place.tokens) continue;
                give(token, first_column + n * 8 + lane % 4 * 2, y[i][n][2 * h], y[i][n][2 * h + 1]);
            }
        }
    }
}

// M′ = keep·M + w·β·v in the tile of columns, in the place of M.
template <typename T>
__device__ inline void write_columns(const Place& place, const Tile<T>& tile, const Weights<T>& weights,
                                     const uint32_t (&values)[kMostTokens / 16][4], int first_column) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int slot = 0; slot < place.tile; slot += kRows) {
        float add[2][4] = {};
#pragma unroll
        for (int k = 0; k < kMostTokens / 16; ++k) {
            if (k * 16 >= place.rows) continue;
            uint32_t a[4];
            ptx::ldmatrix_x4(a, weights.gate + (slot + lane % 16) * weights.pitch + k * 16 + lane / 16 * 8);
            mma(add[0], a, values[k][0], values[k][1], tile.first);
            mma(add[1], a, values[k][2], values[k][3], tile.first);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = slot + lane / 4 + 8 * h;
            const float keep = weights.keep[0][row] * weights.keep[1][row];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                T* at = tile.at(row, first_column + n * 8 + lane % 4 * 2);
                float pair[2];
                load(at, pair);
                pair[0] = keep * pair[0] + add[n][2 * h];
                pair[1] = keep * pair[1] + add[n][2 * h + 1];
                store(pair, at);
            }
        }
    }
    __syncwarp();
}

// The warp's columns of the tile to memory.
template <typename T>
__device__ inline void store_columns(const Place& place, const Tile<T>& tile, T* memory_next, int first_column) {
    for (int n = threadIdx.x % kWarpSize; n < place.slots * 2; n += kWarpSize) {
        const int column = first_column + n % 2 * 8;
        const auto& row = *reinterpret_cast<const uint4*>(tile.at(n / 2, column));
        ptx::store_16_once(memory_next + (place.first_slot + n / 2) * tile.width + column,
                           make_uint4(row.x, row.y, row.z, row.w));
    }
}

// Both, in the order that is asked for, 128 columns at a time. Every thread of a warp calls `written(column)` when M′ stands
// in the warp's columns, `given(chunk)` when it has given its y of a chunk, and `done(chunk)` behind the chunk.
template <typename T, typename Written, typename Give, typename Given, typename Done>
__device__ inline void columns(const Place& place, const Tile<T>& tile, const Weights<T>& weights,
                               const Values<T>& values, bool write_then_read, const Written& written, const Give& give,
                               const Given& given, const Done& done) {
    const int lane = threadIdx.x % kWarpSize, mine = threadIdx.x / kWarpSize * kWarpColumns, width = tile.width;
    const auto write = [&](const uint32_t (&v)[kMostTokens / 16][4], int column) {
        write_columns(place, tile, weights, v, column);
        written(column);
    };
    values.load(place, mine, width);
    for (int chunk = 0; chunk < width; chunk += kChunk) {
        const int column = chunk + mine;
        const bool some = column < width;
        uint32_t v[kMostTokens / 16][4];
        if (some) {
            ptx::cp_async_wait_all();
            __syncwarp();
#pragma unroll
            for (int k = 0; k < kMostTokens / 16; ++k) {
                if (k * 16 >= place.rows) continue;
                ptx::ldmatrix_x4_trans(v[k], values.mine + (k * 16 + lane % 16) * kValuePitch + lane / 16 * 8);
            }
            __syncwarp();
            values.load(place, column + kChunk, width);
        }
        if (some && write_then_read) write(v, column);
        if (some) read_columns(place, tile, weights, column, give);
        given(chunk);
        if (some && !write_then_read) {
            __syncwarp();
            write(v, column);
        }
        done(chunk);
    }
}

// --- Two launches and a sum

// Where a lane keeps its products from one launch to the next, in vectors of four.
__device__ inline int64_t place_of(const Owner& owner, const Place& place, int most_rows, int j, int i, int p) {
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    const int item = owner.first_slot(j) / kRows * kHalves + owner.half;
    const int64_t fragment = (block * (place.tile / kRows * kHalves) + item) * (most_rows / 16) + i;
    return (fragment * kParts + p) * kWarpSize + owner.lane;
}

template <typename T>
__device__ inline void short_scores(const T* memory, Rows<T> keys, Rows<T> strength_keys, const T* kappa,
                                    const float* bias, const int32_t* offsets, float* products, Stats* stats_of_tiles,
                                    unsigned char* shared, int slots, int width, int key_width, int tile_slots,
                                    int most_rows, float scale, float epsilon) {
    __shared__ Norms norms;
    __shared__ Exchange exchange;
    const Place place(offsets, slots, tile_slots);
    if (place.tokens < 0) return;
    const Owner owner(place);
    const Tile<T> tile{reinterpret_cast<T*>(shared), kStages, key_width, width};
    Products x = {};
    scores(
        keys, strength_keys, place, tile, tile.end(place), x, norms, key_width, epsilon,
        [&](int step) { tile.load(memory, place, step); }, [](int) {});
    score(x, place, norms, kappa, bias, scale, epsilon);
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
        if (j >= owner.items) continue;
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
            if (i >= owner.fragments) continue;
#pragma unroll
            for (int p = 0; p < kParts; ++p) store(x[j][i][p], products + 4 * place_of(owner, place, most_rows, j, i, p));
        }
    }
    const Stats mine = stats(x, place, exchange);
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    if (threadIdx.x < kParts * kMostTokens) stats_of_tiles[block * kParts * kMostTokens + threadIdx.x] = mine;
}

template <typename T>
__device__ inline void short_update(const T* memory, const float* products, const Stats* stats_of_tiles,
                                    Rows<T> values, const int32_t* offsets, T* memory_next, float* shares,
                                    unsigned char* shared, int64_t all_tokens, int slots, int width, int tile_slots,
                                    int most_rows, bool sigmoid, bool paper, bool write_then_read) {
    __shared__ StatsOfTokens all;
    __shared__ float keep[kHalves][kMostTile];
    const Place place(offsets, slots, tile_slots);
    if (place.tokens < 0) return;
    const Owner owner(place);
    const int steps = (width + kStep - 1) / kStep;
    const Tile<T> tile{reinterpret_cast<T*>(shared), steps, width, width};
    const int weight_pitch = most_rows + kGap;
    T* address = tile.end(place);
    T* gate = address + place.tile * weight_pitch;
    const Weights<T> weights{address, gate, weight_pitch, keep};
    const Values<T> value(values, gate + place.tile * weight_pitch, most_rows);

    for (int step = 0; step < steps; ++step) tile.load(memory, place, step);
    ptx::cp_async_commit();
    combine(gridDim.x, place, all, [&](int n, int p, int token) {
        const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + n;
        return stats_of_tiles[(block * kParts + p) * kMostTokens + token];
    });
    ptx::cp_async_wait_all();
    // It ends with a barrier, behind which all of the tile is there.
    weigh(place, all, weights, sigmoid, paper, [&](int j, int i, float (&x)[kParts][4]) {
#pragma unroll
        for (int p = 0; p < kParts; ++p) load(products + 4 * place_of(owner, place, most_rows, j, i, p), x[p]);
    });
    const int64_t first = blockIdx.x * all_tokens + place.first_token;
    columns(
        place, tile, weights, value, write_then_read,
        [&](int column) { store_columns(place, tile, memory_next, column); },
        [&](int token, int column, float y0, float y1) {
            *reinterpret_cast<float2*>(shares + (first + token) * width + column) = make_float2(y0, y1);
        },
        [](int) {}, [](int) {});
}

// y = Σ over tiles, four columns per thread.
template <typename T>
__device__ inline void short_read(const float* shares, const int32_t* offsets, T* y, int tiles, int all_tokens,
                                  int width) {
    const Sequence sequence(offsets, blockIdx.y);
    const int64_t size = static_cast<int64_t>(all_tokens) * width;
    const int in_sequence = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * 4;
    if (in_sequence >= sequence.tokens * width) return;
    const int64_t at = sequence.first * width + in_sequence;
    float sum[4] = {};
#pragma unroll 4
    for (int n = 0; n < tiles; ++n) {
        float share[4];
        load(shares + n * size + at, share);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += share[i];
    }
    store(sum, y + at);
}

// --- One launch: the tiles of a sequence are a cluster

template <typename T>
__device__ inline void short_cluster(const T* memory, Rows<T> keys, Rows<T> strength_keys, Rows<T> values,
                                     const T* kappa, const float* bias, const int32_t* offsets, T* memory_next, T* y,
                                     unsigned char* shared, int slots, int width, int key_width, int tile_slots,
                                     int most_rows, float scale, float epsilon, bool paper, bool write_then_read) {
#if defined(DTMEM_HOST) || __CUDA_ARCH__ >= 900
    __shared__ Norms norms;
    __shared__ Exchange exchange;
    __shared__ StatsOfTokens mine;
    __shared__ StatsOfTokens all;
    __shared__ float keep[kHalves][kMostTile];
    __shared__ uint64_t fetched[kMostFetches];
    const Place place(offsets, slots, tile_slots);
    if (place.tokens < 0) return;
    const Tile<T> tile{reinterpret_cast<T*>(shared), (width + kStep - 1) / kStep, width, width};
    const int weight_pitch = most_rows + kGap;
    T* address = tile.end(place);
    T* gate = address + place.tile * weight_pitch;
    const Weights<T> weights{address, gate, weight_pitch, keep};
    T* of_values = gate + place.tile * weight_pitch;
    const Values<T> value(values, of_values, most_rows);
    // First the panels of keys, then two chunks of this block's share of y.
    T* panels = of_values + kWarps * most_rows * kValuePitch;
    auto* shares = reinterpret_cast<float*>(panels);
    auto share_of = [=](int chunk, int token) {
        return shares + (chunk / kChunk % 2 * most_rows + token) * kChunk;
    };

    fetch_tile<kWarps>(memory, place, tile, place.tile, fetched);
    Products x = {};
    scores(
        keys, strength_keys, place, tile, panels, x, norms, key_width, epsilon, [](int) {},
        [&](int step) { ptx::mbarrier_wait(fetched + step * kStep / kFetchColumns, 0); });
    for (int n = (key_width - 1) / kFetchColumns + 1; n * kFetchColumns < width; ++n) ptx::mbarrier_wait(fetched + n, 0);
    score(x, place, norms, kappa, bias, scale, epsilon);
    const Stats of_tile = stats(x, place, exchange);
    if (threadIdx.x < kParts * kMostTokens) mine[threadIdx.x / kMostTokens][threadIdx.x % kMostTokens] = of_tile;
    ptx::cluster_arrive();
    ptx::cluster_wait();
    combine(gridDim.x, place, all, [&](int n, int p, int token) {
        const auto* of = static_cast<const Stats*>(ptx::map_shared(&mine[p][token], n));
        return Stats{of->most, of->sum};
    });
    weigh(place, all, weights, bias != nullptr, paper, [&](int j, int i, float (&of)[kParts][4]) {
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
#pragma unroll
            for (int e = 0; e < 4; ++e) of[p][e] = x[j][i][p][e];
        }
    });
    // M′ of a chunk goes to memory when all warps have come to the end of the next one.
    const auto store_chunk = [&](int chunk) {
        const int bytes = min(kChunk, width - chunk) * static_cast<int>(sizeof(T));
        each_slot<kWarps>(place, [&](int slot) {
            ptx::bulk_store(memory_next + (place.first_slot + slot) * width + chunk, tile.at(slot, chunk), bytes);
        });
    };
    columns(
        place, tile, weights, value, write_then_read, [](int) { ptx::fence_proxy_async(); },
        [&](int token, int column, float y0, float y1) {
            *reinterpret_cast<float2*>(share_of(column, token) + column % kChunk) = make_float2(y0, y1);
        },
        [](int) { ptx::cluster_arrive(); },
        [&](int chunk) {
            ptx::cluster_wait();
            if (chunk > 0) store_chunk(chunk - kChunk);
            // Each block adds up an equal part of the chunk, four columns per thread.
            const int vectors = min(kChunk, width - chunk) / 4, blocks = gridDim.x;
            const int part = (place.tokens * vectors + blocks - 1) / blocks, first = blockIdx.x * part;
            for (int n = first + threadIdx.x; n < min(first + part, place.tokens * vectors); n += kThreads) {
                const int token = n / vectors, column = n % vectors * 4;
                float sum[4] = {};
#pragma unroll 4
                for (int b = 0; b < blocks; ++b) {
                    float share[4];
                    load(static_cast<const float*>(ptx::map_shared(share_of(chunk, token) + column, b)), share);
#pragma unroll
                    for (int i = 0; i < 4; ++i) sum[i] += share[i];
                }
                store(sum, y + (place.first_token + token) * width + chunk + column);
            }
        });
    ptx::cluster_arrive();  // others may still read this block's shares
    ptx::cluster_wait();
    store_chunk((width - 1) / kChunk * kChunk);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
#endif
}

}  // namespace

#define CONTENT_MEMORY_SHORT(NAME, T)                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) content_memory_short_scores_##NAME(                         \
        const T* memory, const T* keys, const T* strength_keys, const T* kappa, const float* bias,                     \
        const int32_t* offsets, float* products, float* stats, int32_t slots, int32_t width, int32_t key_width,        \
        int32_t stride, int32_t strength_stride, int32_t tile, int32_t rows, float scale, float epsilon) {             \
        extern __shared__ __align__(16) unsigned char shared[];                                                        \
        short_scores<T>(memory, {keys, stride}, {strength_keys, strength_stride}, kappa, bias, offsets, products,      \
                        reinterpret_cast<Stats*>(stats), shared, slots, width, key_width, tile, rows, scale, epsilon); \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) content_memory_short_update_##NAME(                         \
        const T* memory, const float* products, const float* stats, const T* value, const int32_t* offsets,            \
        T* memory_next, float* shares, int32_t tokens, int32_t slots, int32_t width, int32_t stride, int32_t tile,     \
        int32_t rows, int32_t sigmoid, int32_t paper, int32_t write_then_read) {                                                     \
        extern __shared__ __align__(16) unsigned char shared[];                                                        \
        short_update<T>(memory, products, reinterpret_cast<const Stats*>(stats), {value, stride}, offsets,             \
                        memory_next, shares, shared, tokens, slots, width, tile, rows, sigmoid != 0, paper != 0,               \
                        write_then_read != 0);                                                                         \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads) content_memory_short_read_##NAME(                           \
        const float* shares, const int32_t* offsets, T* y, int32_t tiles, int32_t tokens, int32_t width) {             \
        short_read(shares, offsets, y, tiles, tokens, width);                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) content_memory_short_cluster_##NAME(                     \
        const T* memory, const T* keys, const T* strength_keys, const T* value, const T* kappa, const float* bias,     \
        const int32_t* offsets, T* memory_next, T* y, int32_t slots, int32_t width, int32_t key_width, int32_t stride, \
        int32_t strength_stride, int32_t value_stride, int32_t tile, int32_t rows, float scale, float epsilon,         \
        int32_t paper, int32_t write_then_read) {                                                                      \
        extern __shared__ __align__(16) unsigned char shared[];                                                        \
        short_cluster<T>(memory, {keys, stride}, {strength_keys, strength_stride}, {value, value_stride}, kappa, bias, \
                         offsets, memory_next, y, shared, slots, width, key_width, tile, rows, scale, epsilon,         \
                         paper != 0, write_then_read != 0);                                                            \
    }

CONTENT_MEMORY_SHORT(bf16, bf16)
CONTENT_MEMORY_SHORT(f16, f16)
