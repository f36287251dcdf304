// Content-addressed memory, backward, for segments of up to 64 tokens in bf16 or f16, order read_then_write, with compute
// capability 9.0: the same gradients as content_memory_backward.cu, which has the definition and serves everything else.
//
// Shapes and alignment are those of content_memory_short.cu; dM [B, N, V] aligned to 16 bytes; da, ds rows of D, dv of V,
// each with a stride of its own; dκ [tokens]: all overwritten. Shares of db [B, C] go to the workspace, for one block of
// content_memory_sums to add up. With G = dM′ and R = dy:
//   products  M·a, M·s, M·R and G·v of the tile's slots with all tokens; |M|², G·M: all of it from one pass over the columns
//   weights   w and β;  others_it = Π over u ≠ t of (1 − erased_iu), a product without division: a factor may be 0
//   slopes    dw = M·R + ∂(w·β, erased)/∂w, dβ likewise, with d(w·β) = G·v and d(erased) = −others·(G·M)
//   factors   through softmax, sigmoid and norms:  A = d(M·a),  S = d(M·s),  and of each slot and token |M|'s and |a|'s part
//   columns   dM = keep·G + slope·M + A·a + S·s + w·R;   da = Aᵀ·M + (slope of |a|)·a,  ds = Sᵀ·M,  dv = (w·β)ᵀ·G
// Blocks hear of each other four times: of max and Σ exp of each token; of the means that the softmaxes subtract; of
// what each token has from all slots (dκ, the slope of |a|); and of da, ds and dv, 32 columns at a time.
//
// Precision: products of a lane's slots and tokens stay in f32 registers up to their factors. A and S, whose sums over
// slots cancel behind a softmax, are kept as two parts of bf16, which f16 storage is split to as well; w and w·β are rounded
// to the storage type, as the forward pass rounds them. With two softmaxes w·β is about 1/N², which f16 does not resolve, and
// dv is made of nothing else: content_memory_backward.cu serves these.
//
// Launch: short_backward (C, B) in clusters of C blocks, tile = ⌈N/C⌉ slots each, with 384 threads: a warp has 16 slots ×
// half of the tokens. With padded = ⌈tile/16⌉·16, rows = ⌈longest/16⌉·16 and V₆₄ = ⌈V/64⌉·64, dynamic shared memory in bytes:
//   tile·(2·V₆₄ + 16)                                      M, by bulk copies
//   and the greater of 288·(4·rows + padded)               two steps of 64 columns of a, s, R, v and G
//   and 12·padded·(rows + 8)                               A and S in two parts, w, w·β
//       + 160·(3·rows + padded) + 128·C·⌈3·rows/C⌉         two steps of 32 columns of a, s, R and G; shares of da, ds, dv
// which may be 216 KiB. C as in the forward pass: 16, unless there are few slots.
//
// What has to move: M and G once from device memory and dM once to it, 3·N·V elements a sequence (the general version: 5, and
// nine planes [tokens, N] of f32). G comes a second time, for the columns, when 2·N·V elements of each of the few clusters
// under way have been used in between: from the L2 cache, as the rows of tokens do. Shares of da, ds and dv go to the
// block that adds them up, 12·T·V bytes from each, and stay there: nothing of them is written to memory. N 1290, D 512, T 39,
// bf16: 4.0 MB of device memory, and for each of 16 blocks 83 kB of G and 280 kB of rows from L2, 240 kB to other blocks;
// 201 KiB of shared memory, one block on a multiprocessor. 4 + 5 (parts counted) products of 51 MFLOP before and behind the
// factors, each way once, 0.75 GFLOP in all.
//
// History (not measured on a GPU yet)
//   1  one launch of clusters

#include "content_memory_short.cuh"

namespace {

constexpr int kGroupsOfSlots = kMostTile / kRows;
constexpr int kCrew = kGroupsOfSlots * kHalves;  // warps: each has 16 slots × half of the tokens
constexpr int kCrewThreads = kCrew * kWarpSize;

// What a lane holds of each slot and token: first the products.
enum Operand { kKeys, kStrengthKeys, kReads, kValues, kOperands };
// What tokens have from all slots: da, ds, dv.
enum Sum { kOfKeys, kOfStrengthKeys, kOfValues, kSums };

template <typename T>
struct Segment {
    const T *memory, *gradient;
    Rows<T> rows[kOperands];
    const T* kappa;
    const float* bias;
    const int32_t* offsets;
};

template <typename T>
struct Gradients {
    T* memory;
    T* rows[kSums];
    int strides[kSums];
    T* kappa;
    float* bias_shares;
};

#if defined(DTMEM_HOST) || __CUDA_ARCH__ >= 900

constexpr int kStepPitch = kStep + kGap;
constexpr int kChunk = 32;  // columns of gradients at a time
constexpr int kChunkPitch = kChunk + kGap;

// Which slots and tokens a lane has: slots slot(0) and slot(1), of fragment i tokens token(i, 0) and token(i, 1). Element
// 2h + n of an accumulator belongs to slot(h) and token(i, n).
struct Holder {
    int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    int group = warp / kHalves, half = warp % kHalves;
    int fragments;
    bool some;  // whether its slots are in the tile

    __device__ explicit Holder(const Place& place)
        : fragments(place.rows / kRows), some(group * kRows < place.tile) {}
    __device__ int slot(int h) const { return group * kRows + lane / 4 + 8 * h; }
    __device__ int first_token(int i) const { return (half * fragments + i) * 8; }
    __device__ int token(int i, int n) const { return first_token(i) + lane % 4 * 2 + n; }
};

// Starts to copy so many rows, each the next `extent` of kColumns elements: `line(row)` points to them, null for zeros.
template <int kColumns, typename T, typename Line>
__device__ inline void copy_rows(T* to, int rows, int extent, const T* any, const Line& line) {
    constexpr int kPieces = kColumns / 8;
    for (int n = threadIdx.x; n < rows * kPieces; n += kCrewThreads) {
        const int row = n / kPieces, column = n % kPieces * 8;
        if (column >= extent) continue;
        const T* source = line(row);
        ptx::cp_async_16_zfill(to + row * (kColumns + kGap) + column, source != nullptr ? source + column : any,
                               source != nullptr ? kVectorBytes : 0);
    }
}

// The tile's factors of all further products, [tile, pitch] each: d(M·a) and d(M·s) in two parts, w and w·β.
template <typename T>
struct Factors {
    bf16* parts[kParts][2];
    T *read, *gate;
    int pitch;

    __device__ Factors(void* shared, int tile, int pitch) : pitch(pitch) {
        auto* first = static_cast<bf16*>(shared);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
#pragma unroll
            for (int part = 0; part < 2; ++part) parts[p][part] = first + (2 * p + part) * tile * pitch;
        }
        read = reinterpret_cast<T*>(first + 2 * kParts * tile * pitch);
        gate = read + tile * pitch;
    }
    __device__ T* end(int tile) const { return gate + tile * pitch; }

    __device__ void set_pair(int at, uint32_t w, uint32_t gates) const {
        *reinterpret_cast<uint32_t*>(read + at) = w;
        *reinterpret_cast<uint32_t*>(gate + at) = gates;
    }
    __device__ void set_parts(int p, int at, const float (&pair)[2]) const {
        uint32_t high, low;
        split(pair[0], pair[1], high, low);
        *reinterpret_cast<uint32_t*>(parts[p][0] + at) = high;
        *reinterpret_cast<uint32_t*>(parts[p][1] + at) = low;
    }
};

#endif

template <typename T>
__device__ inline void short_backward(const Segment<T>& x, const Gradients<T>& d, unsigned char* shared, int slots,
                                      int width, int key_width, int tile_slots, int most_rows, float scale,
                                      float epsilon, bool paper) {
#if defined(DTMEM_HOST) || __CUDA_ARCH__ >= 900
    __shared__ Norms norms;
    __shared__ float dots[kMostTile];
    __shared__ float of_score[kMostTokens];  // κ, or the scale
    __shared__ float exchange[kParts][kGroupsOfSlots][kMostTokens];
    __shared__ float of_warps[kCrew];
    __shared__ StatsOfTokens my_stats;
    __shared__ StatsOfTokens stats;
    __shared__ float my_means[kParts][kMostTokens];
    __shared__ float means[kParts][kMostTokens];
    __shared__ float my_sums[kParts][kMostTokens];
    __shared__ float sums[kParts][kMostTokens];
    __shared__ float keep[kHalves][kMostTile];
    __shared__ float slopes[kHalves][kMostTile];
    __shared__ uint64_t fetched[kMostFetches];
    const Place place(x.offsets, slots, tile_slots);
    const int blocks = gridDim.x, rank = blockIdx.x;
    float* bias_share = d.bias_shares + static_cast<int64_t>(blockIdx.y) * blocks + rank;
    if (place.tokens < 0) {
        if (x.bias != nullptr && threadIdx.x == 0) *bias_share = 0.0f;
        return;
    }
    const Holder holder(place);
    const int lane = holder.lane;
    const bool cosine = x.kappa != nullptr, sigmoid = x.bias != nullptr;
    const Tile<T> tile{reinterpret_cast<T*>(shared), (width + kStep - 1) / kStep, width, width};
    // Slots to fill the last matrix have no place: in theirs stands any other one, and their weights are 0.
    const auto memory_at = [&](int slot, int column) { return tile.at(min(slot, tile_slots - 1), column); };
    T* steps = tile.at(tile_slots, 0);
    const Factors<T> factors(steps, place.tile, most_rows + kGap);
    T* chunks = factors.end(place.tile);
    const int step_size = (kOperands * most_rows + place.tile) * kStepPitch;
    const int chunk_size = (kValues * most_rows + place.tile) * kChunkPitch;
    auto* received = reinterpret_cast<float*>(chunks + 2 * chunk_size);

    const auto row_of = [&](int operand, int token, int column) -> const T* {
        return token < place.tokens ? x.rows[operand][place.first_token + token] + column : nullptr;
    };
    const auto gradient_of = [&](int slot, int column) -> const T* {
        return slot < place.slots ? x.gradient + (place.first_slot + slot) * width + column : nullptr;
    };
    const auto extent_of = [&](int operand) { return operand <= kStrengthKeys ? key_width : width; };
    const auto start_step = [&](int step) {
        const int column = step * kStep;
        if (column >= width) return;
        T* to = steps + step % 2 * step_size;
#pragma unroll
        for (int n = 0; n < kOperands; ++n) {
            copy_rows<kStep>(to + n * most_rows * kStepPitch, place.rows, extent_of(n) - column, x.rows[n].first,
                             [&](int token) { return row_of(n, token, column); });
        }
        copy_rows<kStep>(to + kOperands * most_rows * kStepPitch, place.tile, width - column, x.gradient,
                         [&](int slot) { return gradient_of(slot, column); });
    };
    const auto start_chunk = [&](int column) {
        if (column >= width) return;
        T* to = chunks + column / kChunk % 2 * chunk_size;
#pragma unroll
        for (int n = 0; n < kValues; ++n) {
            copy_rows<kChunk>(to + n * most_rows * kChunkPitch, place.rows, extent_of(n) - column, x.rows[n].first,
                              [&](int token) { return row_of(n, token, column); });
        }
        copy_rows<kChunk>(to + kValues * most_rows * kChunkPitch, place.tile, width - column, x.gradient,
                          [&](int slot) { return gradient_of(slot, column); });
    };

    // --- products
    start_step(0);
    fetch_tile<kCrew>(x.memory, place, tile, tile_slots, fetched);
    float of[kFragments][kOperands][4] = {};
    {
        const int mine = threadIdx.x / 4, first = threadIdx.x % 4 * (kStep / 4);  // a fourth of a row, for the norms
        float square = 0.0f, dot = 0.0f, of_token = 0.0f;
        for (int step = 0; step * kStep < width; ++step) {
            const int column = step * kStep, depth = min(kStep, width - column);
            ptx::cp_async_wait_all();
            ptx::mbarrier_wait(fetched + column / kFetchColumns, 0);
            __syncthreads();  // this step is there for all, and the one before has been used
            start_step(step + 1);
            const T* rows = steps + step % 2 * step_size;
            const T* gradient = rows + kOperands * most_rows * kStepPitch;
            if (first < depth) {
                const bool in_keys = column + first < key_width;
#pragma unroll
                for (int k = 0; k < kStep / 4; k += 8) {
                    float m[8], g[8];
                    if (mine < place.tile) {
                        load(memory_at(mine, column + first + k), m);
                        load(gradient + mine * kStepPitch + first + k, g);
#pragma unroll
                        for (int i = 0; i < 8; ++i) {
                            if (in_keys) square += m[i] * m[i];
                            dot += g[i] * m[i];
                        }
                    }
                    if (mine < place.rows && in_keys) {
                        load(rows + mine * kStepPitch + first + k, m);
#pragma unroll
                        for (int i = 0; i < 8; ++i) of_token += m[i] * m[i];
                    }
                }
            }
            if (!holder.some) continue;
            for (int k = 0; k < depth; k += 16) {
                uint32_t a[2][4];
                const int row = holder.group * kRows + lane % 16, piece = k + lane / 16 * 8;
                ptx::ldmatrix_x4(a[0], memory_at(row, column + piece));
                ptx::ldmatrix_x4(a[1], gradient + row * kStepPitch + piece);
#pragma unroll
                for (int i = 0; i < kFragments; ++i) {
                    if (i >= holder.fragments) continue;
                    // Two halves of the depth of an operand, then of the next.
                    const int token = holder.first_token(i) + lane % 8;
                    const T* from = rows + (lane / 16 * most_rows + token) * kStepPitch + k + lane / 8 % 2 * 8;
                    uint32_t b[4];
                    ptx::ldmatrix_x4(b, from + kReads * most_rows * kStepPitch);
                    mma(of[i][kReads], a[0], b[0], b[1], x.memory);
                    mma(of[i][kValues], a[1], b[2], b[3], x.memory);
                    if (column + k >= key_width) continue;
                    ptx::ldmatrix_x4(b, from);
                    mma(of[i][kKeys], a[0], b[0], b[1], x.memory);
                    mma(of[i][kStrengthKeys], a[0], b[2], b[3], x.memory);
                }
            }
        }
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
            square += __shfl_xor_sync(0xffffffffu, square, lanes);
            dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
            of_token += __shfl_xor_sync(0xffffffffu, of_token, lanes);
        }
        if (threadIdx.x % 4 == 0 && mine < place.tile) {
            norms.slots[mine] = sqrtf(square + epsilon);
            dots[mine] = dot;
        }
        if (threadIdx.x % 4 == 0 && mine < place.rows) {
            norms.tokens[mine] = sqrtf(of_token + epsilon);
            of_score[mine] = cosine && mine < place.tokens ? widen(x.kappa[place.first_token + mine]) : scale;
        }
    }
    __syncthreads();
    start_chunk(0);

    // `give(i, n, h)` for all that this lane holds; of a slot from the first token to the last, or back.
    const auto each = [&](const auto& give) {
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
            if (!holder.some || i >= holder.fragments) continue;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int h = 0; h < 2; ++h) give(i, n, h);
            }
        }
    };
    // Thread p·64 + t receives `join` over all slots of the tile of `give(p, i, n, h)` at token t. Others: nothing that counts.
    const auto over_slots = [&](float none, const auto& give, const auto& join) {
        __syncthreads();  // the exchange before has been used
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
            if (!holder.some || i >= holder.fragments) continue;
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    float all = join(give(p, i, n, 0), give(p, i, n, 1));
#pragma unroll
                    for (int lanes = 4; lanes < kWarpSize; lanes *= 2) {
                        all = join(all, __shfl_xor_sync(0xffffffffu, all, lanes));
                    }
                    if (lane < 4) exchange[p][holder.group][holder.token(i, n)] = all;
                }
            }
        }
        __syncthreads();
        const int p = threadIdx.x / kMostTokens, token = threadIdx.x % kMostTokens;
        float all = none;
        for (int g = 0; p < kParts && token < place.rows && g < place.tile / kRows; ++g) {
            all = join(all, exchange[p][g][token]);
        }
        return all;
    };
    const auto add = [](float x, float y) { return x + y; };
    // Of part `part` and token `token` this thread has a number for the cluster.
    const int part = threadIdx.x / kMostTokens, token = threadIdx.x % kMostTokens;
    const bool of_tokens = part < kParts && token < place.tokens;
    const auto over_cluster = [&](float (&mine)[kParts][kMostTokens], float share) {
        if (of_tokens) mine[part][token] = share;
        ptx::cluster_arrive();
        ptx::cluster_wait();
        float sum = 0.0f;
        for (int b = 0; of_tokens && b < blocks; ++b) {
            sum += *static_cast<const float*>(ptx::map_shared(&mine[part][token], b));
        }
        return sum;
    };

    // --- weights. What is held becomes: the similarity, β, M·R, G·v.
    const float offset = sigmoid ? *x.bias : 0.0f;
    each([&](int i, int n, int h) {
        float& similarity = of[i][kKeys][2 * h + n];
        float& logit = of[i][kStrengthKeys][2 * h + n];
        if (cosine) similarity /= norms.slots[holder.slot(h)] * norms.tokens[holder.token(i, n)] + epsilon;
        logit = scale * logit + offset;
    });
    const auto real = [&](int h) { return holder.slot(h) < place.slots; };
    const auto logit_of = [&](int p, int i, int n, int h) {
        const float logit = of[i][p][2 * h + n];
        return p == 0 ? of_score[holder.token(i, n)] * logit : logit;
    };
    {
        const float most = over_slots(
            -INFINITY, [&](int p, int i, int n, int h) { return real(h) ? logit_of(p, i, n, h) : -INFINITY; },
            [](float x, float y) { return fmaxf(x, y); });
        if (part < kParts && token < place.rows) my_stats[part][token].most = most;
        const float sum = over_slots(
            0.0f,
            [&](int p, int i, int n, int h) {
                return real(h) ? expf(logit_of(p, i, n, h) - my_stats[p][holder.token(i, n)].most) : 0.0f;
            },
            add);
        if (of_tokens) my_stats[part][token].sum = sum;
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    combine(blocks, place, stats, [&](int n, int p, int token) {
        const auto* share = static_cast<const Stats*>(ptx::map_shared(&my_stats[p][token], n));
        return Stats{share->most, share->sum};
    });
    // 0 where there is no slot or no token, and so all that it is a factor of.
    const auto exists = [&](int i, int n, int h) { return real(h) && holder.token(i, n) < place.tokens; };
    const auto weight = [&](int i, int n, int h) {
        if (!exists(i, n, h)) return 0.0f;
        const Stats* of_token = &stats[0][holder.token(i, n)];
        return expf(logit_of(0, i, n, h) - of_token->most) * of_token->sum;
    };
    each([&](int i, int n, int h) {
        float& beta = of[i][kStrengthKeys][2 * h + n];
        if (!exists(i, n, h)) {
            beta = 0.0f;
        } else if (sigmoid) {
            beta = 1.0f / (1.0f + expf(-beta));
        } else {
            const Stats* of_token = &stats[1][holder.token(i, n)];
            beta = expf(beta - of_token->most) * of_token->sum;
        }
    });
    float before[kFragments][2][2], rest[2] = {1.0f, 1.0f};  // products of factors 1 − erased
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
        if (!holder.some || i >= holder.fragments) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float w[2], gate[2];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float beta = of[i][kStrengthKeys][2 * h + n];
                w[n] = weight(i, n, h);
                gate[n] = w[n] * beta;
                before[i][n][h] = rest[h];
                rest[h] *= 1.0f - erased(w[n], beta, paper);
            }
            factors.set_pair(holder.slot(h) * factors.pitch + holder.token(i, 0), pack(w[0], w[1], x.memory),
                             pack(gate[0], gate[1], x.memory));
        }
    }
    // Of the tokens of other lanes, and of the other half.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float next = __shfl_xor_sync(0xffffffffu, rest[h], 1), pair = rest[h] * next;
        const float others = __shfl_xor_sync(0xffffffffu, pair, 2);
        if (holder.some && lane % 4 == 0) keep[holder.half][holder.slot(h)] = pair * others;
        rest[h] = next * others;
    }
    __syncthreads();

    // --- slopes. What is held becomes: the similarity, β, dw, dβ.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if (holder.some) rest[h] *= -dots[holder.slot(h)] * keep[1 - holder.half][holder.slot(h)];
    }
#pragma unroll
    for (int i = kFragments - 1; i >= 0; --i) {
        if (!holder.some || i >= holder.fragments) continue;
#pragma unroll
        for (int n = 1; n >= 0; --n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int e = 2 * h + n;
                const float w = weight(i, n, h), beta = of[i][kStrengthKeys][e], of_gate = of[i][kValues][e];
                const float d_erased = before[i][n][h] * rest[h];
                rest[h] *= 1.0f - erased(w, beta, paper);
                of[i][kReads][e] += paper ? of_gate * beta + d_erased * (1.0f - beta) : (of_gate + d_erased) * beta;
                of[i][kValues][e] = (paper ? of_gate - d_erased : of_gate + d_erased) * w;
            }
        }
    }
    {
        const float mean = over_slots(
            0.0f,
            [&](int p, int i, int n, int h) {
                const int e = 2 * h + n;
                return p == 0 ? weight(i, n, h) * of[i][kReads][e] : of[i][kStrengthKeys][e] * of[i][kValues][e];
            },
            add);
        const float all = over_cluster(my_means, mean);
        if (part < kParts && token < place.rows) means[part][token] = all;
        __syncthreads();
    }

    // --- factors. dw and dβ become what dκ and the slope of |a| have of them.
    float slope[2] = {}, d_bias = 0.0f;
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
        if (!holder.some || i >= holder.fragments) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float d_address[2], d_strength[2];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int t = holder.token(i, n), e = 2 * h + n;
                const float similarity = of[i][kKeys][e], beta = of[i][kStrengthKeys][e];
                const float d_beta = of[i][kValues][e];
                const float d_score = weight(i, n, h) * (of[i][kReads][e] - means[0][t]);
                const float d_logit = beta * (sigmoid ? d_beta * (1.0f - beta) : d_beta - means[1][t]);
                d_bias += d_logit;
                d_strength[n] = scale * d_logit;
                d_address[n] = of_score[t] * d_score;
                if (!cosine) continue;
                const float of_slot = norms.slots[holder.slot(h)], of_token = norms.tokens[t];
                d_address[n] /= of_slot * of_token + epsilon;
                const float through = d_address[n] * similarity;
                slope[h] -= through * of_token;
                of[i][kReads][e] = d_score * similarity;
                of[i][kValues][e] = -through * of_slot;
            }
            const int at = holder.slot(h) * factors.pitch + holder.token(i, 0);
            factors.set_parts(0, at, d_address);
            factors.set_parts(1, at, d_strength);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) slope[h] += __shfl_xor_sync(0xffffffffu, slope[h], lanes);
        if (holder.some && lane % 4 == 0) slopes[holder.half][holder.slot(h)] = slope[h];
    }
    d_bias = warp_sum(d_bias);
    if (lane == 0) of_warps[holder.warp] = d_bias;
    if (cosine) {
        const float share = over_slots(
            0.0f, [&](int p, int i, int n, int h) { return of[i][kReads + p][2 * h + n]; }, add);
        const float sum = over_cluster(my_sums, share);
        if (of_tokens) sums[part][token] = part == 0 ? sum : sum / norms.tokens[token];
        if (of_tokens && part == 0 && rank == 0) narrow(sum, d.kappa[place.first_token + token]);
    }
    if (sigmoid) {
        __syncthreads();
        float sum = 0.0f;
        for (int w = 0; w < kCrew; ++w) sum += of_warps[w];
        if (threadIdx.x == 0) *bias_share = sum;
    }

    // --- columns. Row n of da, ds, dv (all tokens of one, then of the next) is added up by block n % C.
    const int places = (kSums * most_rows + blocks - 1) / blocks;
    const int row = holder.group * kRows + lane % 16;
    ptx::cluster_arrive();
    for (int chunk = 0; chunk < width; chunk += kChunk) {
        const T* rows = chunks + chunk / kChunk % 2 * chunk_size;
        T* gradient = chunks + chunk / kChunk % 2 * chunk_size + kValues * most_rows * kChunkPitch;
        ptx::cp_async_wait_all();
        __syncthreads();  // this chunk is there for all, and the one before has been used
        start_chunk(chunk + kChunk);
        ptx::cluster_wait();  // what was received before has been added up
        for (int unit = holder.warp; unit < kSums * place.rows / 8; unit += kCrew) {
            const int n = unit / (place.rows / 8), first_row = unit % (place.rows / 8) / 2 * kRows;
            const int in_chunk = unit % 2 * 16;
            if (chunk + in_chunk >= extent_of(n)) continue;
            float y[2][4] = {};
            for (int k = 0; k < place.tile; k += 16) {
                uint32_t a[2][4], b[4];
                const int at = (k + lane / 16 * 8 + lane % 8) * factors.pitch + first_row + lane / 8 % 2 * 8;
                const int slot = k + lane % 16, column = in_chunk + lane / 16 * 8;
                if (n == kOfValues) {
                    ptx::ldmatrix_x4_trans(b, gradient + slot * kChunkPitch + column);
                    ptx::ldmatrix_x4_trans(a[0], factors.gate + at);
                    mma(y[0], a[0], b[0], b[1], x.memory);
                    mma(y[1], a[0], b[2], b[3], x.memory);
                } else {
                    ptx::ldmatrix_x4_trans(b, memory_at(slot, chunk + column));
                    ptx::ldmatrix_x4_trans(a[0], factors.parts[0][0] + 2 * n * place.tile * factors.pitch + at);
                    ptx::ldmatrix_x4_trans(a[1], factors.parts[0][1] + 2 * n * place.tile * factors.pitch + at);
                    multiply_parts(y[0], a, b[0], b[1], x.memory);
                    multiply_parts(y[1], a, b[2], b[3], x.memory);
                }
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int t = first_row + lane / 4 + 8 * h, of_sums = n * most_rows + t;
                if (t >= place.tokens) continue;
                float* at = received + (of_sums / blocks * blocks + rank) * kChunk + in_chunk + lane % 4 * 2;
                auto* to = static_cast<float*>(ptx::map_shared(at, of_sums % blocks));
#pragma unroll
                for (int f = 0; f < 2; ++f) {
                    const float pair[2] = {y[f][2 * h], y[f][2 * h + 1]};
                    store(pair, to + f * 8);
                }
            }
        }
        ptx::cluster_arrive();

        // dM: 16 slots × 16 columns of a warp, in the place of G, which others may still be reading.
        const int in_chunk = holder.half * 16, first_column = chunk + in_chunk;
        const bool some = holder.some && first_column < width, in_keys = first_column < key_width;
        float y[2][4] = {};
        for (int k = 0; some && k < place.rows; k += 16) {
            uint32_t a[2][4], b[4];
            const int at = row * factors.pitch + k + lane / 16 * 8;
            const T* from = rows + (k + lane % 16) * kChunkPitch + in_chunk + lane / 16 * 8;
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
                if (!in_keys) continue;
                ptx::ldmatrix_x4_trans(b, from + p * most_rows * kChunkPitch);
                ptx::ldmatrix_x4(a[0], factors.parts[p][0] + at);
                ptx::ldmatrix_x4(a[1], factors.parts[p][1] + at);
                multiply_parts(y[0], a, b[0], b[1], x.memory);
                multiply_parts(y[1], a, b[2], b[3], x.memory);
            }
            ptx::ldmatrix_x4_trans(b, from + kReads * most_rows * kChunkPitch);
            ptx::ldmatrix_x4(a[0], factors.read + at);
            mma(y[0], a[0], b[0], b[1], x.memory);
            mma(y[1], a[0], b[2], b[3], x.memory);
        }
        ptx::cluster_wait();  // all shares of this chunk are there
        if (some) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int slot = holder.slot(h);
                const float kept = keep[0][slot] * keep[1][slot];
                const float of_memory = cosine && in_keys ? (slopes[0][slot] + slopes[1][slot]) / norms.slots[slot] : 0.0f;
#pragma unroll
                for (int f = 0; f < 2; ++f) {
                    const int column = in_chunk + f * 8 + lane % 4 * 2;
                    float pair[2], m[2];
                    load(gradient + slot * kChunkPitch + column, pair);
                    load(memory_at(slot, chunk + column), m);
#pragma unroll
                    for (int i = 0; i < 2; ++i) pair[i] = kept * pair[i] + of_memory * m[i] + y[f][2 * h + i];
                    store(pair, gradient + slot * kChunkPitch + column);
                }
            }
            __syncwarp();
            const int slot = holder.group * kRows + lane / 2, piece = lane % 2 * 8;
            if (slot < place.slots) {
                const auto& of_slot = *reinterpret_cast<const uint4*>(gradient + slot * kChunkPitch + in_chunk + piece);
                ptx::store_16_once(d.memory + (place.first_slot + slot) * width + first_column + piece,
                                   make_uint4(of_slot.x, of_slot.y, of_slot.z, of_slot.w));
            }
        }
        for (int n = threadIdx.x; n < places * kChunk; n += kCrewThreads) {
            const int of_sums = n / kChunk * blocks + rank, in_chunk = n % kChunk;
            const int which = of_sums / most_rows, t = of_sums % most_rows, column = chunk + in_chunk;
            if (which >= kSums || t >= place.tokens || column >= extent_of(which)) continue;
            float sum = 0.0f;
            for (int b = 0; b < blocks; ++b) sum += received[(n / kChunk * blocks + b) * kChunk + in_chunk];
            if (cosine && which == kOfKeys) sum += sums[1][t] * widen(rows[t * kChunkPitch + in_chunk]);
#pragma unroll
            for (int of_rows = 0; of_rows < kSums; ++of_rows) {
                if (which == of_rows) narrow(sum, d.rows[of_rows][(place.first_token + t) * d.strides[of_rows] + column]);
            }
        }
        if (chunk + kChunk < width) ptx::cluster_arrive();
    }
#endif
}

}  // namespace

#define CONTENT_MEMORY_SHORT_BACKWARD(NAME, T)                                                                         \
    extern "C" __global__ void __launch_bounds__(kCrewThreads, 1) content_memory_short_backward_##NAME(                \
        const T* memory, const T* g, const T* keys, const T* strength_keys, const T* r, const T* value,                \
        const T* kappa, const float* bias, const int32_t* offsets, T* d_memory, T* d_keys, T* d_strength_keys,         \
        T* d_value, T* d_kappa, float* bias_shares, int32_t slots, int32_t width, int32_t key_width, int32_t stride,   \
        int32_t strength_stride, int32_t value_stride, int32_t d_stride, int32_t d_strength_stride,                    \
        int32_t d_value_stride, int32_t tile, int32_t rows, float scale, float epsilon, int32_t paper) {               \
        extern __shared__ __align__(16) unsigned char shared[];                                                        \
        short_backward<T>({memory,                                                                                     \
                           g,                                                                                          \
                           {{keys, stride}, {strength_keys, strength_stride}, {r, width}, {value, value_stride}},      \
                           kappa,                                                                                      \
                           bias,                                                                                       \
                           offsets},                                                                                   \
                          {d_memory,                                                                                   \
                           {d_keys, d_strength_keys, d_value},                                                         \
                           {d_stride, d_strength_stride, d_value_stride},                                              \
                           d_kappa,                                                                                    \
                           bias_shares},                                                                               \
                          shared, slots, width, key_width, tile, rows, scale, epsilon, paper != 0);                    \
    }

CONTENT_MEMORY_SHORT_BACKWARD(bf16, bf16)
CONTENT_MEMORY_SHORT_BACKWARD(f16, f16)
