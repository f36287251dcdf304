// lora_linear.cu's product for compute capability 9.0, by products of warpgroups: bf16 and f16, without dropout. That
// file's head has the equations, the two layouts of the weight and the parameters; for other targets than sm_90a the
// kernels are empty.
//
// A block owns 128 rows × 256 columns of y, a warpgroup 64 of the rows: 128 sums a thread, and 32 for h. The depth goes
// by in steps of 64, four stages deep in shared memory in the layout of warpgroup.cuh; the weight's tile is extended by
// the columns of the adapter, 16 or 64. The products of a step are still under way when the copies of a later step go
// to the place of what was read two steps ago: one barrier a step. When a range of the depth is over, h goes to shared
// memory in the place of x, `up` in that of the weight, and their product, half of the columns at a time, is added
// times s. The result leaves through shared memory, by 16 bytes.
//
// grid (tiles of columns, tiles of rows); block 256; dynamic shared memory 4·57344 bytes.
//
// Bytes and operations: as there, but ranks from 17 to 63 count as 64. A step is 4.2 million operations, 1024 cycles
// of a multiprocessor's matrix units at their dense rate, and 64 more for a rank up to 16: 1.063 of the plain product.
// Each warpgroup reads its rows twice, and the weight once: 2·(2·8 + 32) KiB, 768 of the 1024 cycles at 128 bytes.
//
// History (not measured: no GPU has run it yet; the executor of kernels/host has, with a model of the products)
//   1  this version

#include "lora_product.cuh"
#include "warpgroup.cuh"

namespace {

using namespace lora;

constexpr int kThreads = 2 * warpgroup::kThreads;

// `kRanks`: columns of an adapter, 16 or 64; those of its ranks and zeros.
template <int kRanks, bool kAcross, typename T>
__device__ inline void product(const Product<T>& p) {
#if defined(DTMEM_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr int kDepth = warpgroup::kPanel;  // of a step
    constexpr int kHalves = 2;                 // of the columns: an instruction has half of them
    constexpr int kStages = 4, kRows = 2 * warpgroup::kRows, kColumns = 256, kExtended = kColumns + kMaxRank;
    constexpr int kStage = (kRows + kExtended) * kDepth, kHalf = kColumns / kHalves, kTiles = kHalf / 8;
    extern __shared__ __align__(1024) unsigned char memory[];
    T* stages = reinterpret_cast<T*>(memory);

    int first_row = static_cast<int>(blockIdx.y) * kRows, last_row = p.rows, set = 0;
    if (p.groups.offsets != nullptr) {
        const int block = static_cast<int>(blockIdx.y);
        const int group = find_sequence(p.groups.offsets, p.groups.count, kRows, block, first_row);
        first_row += p.groups.offsets[group];
        last_row = p.groups.offsets[group + 1];
        set = p.groups.sets[group];
    }
    const int rows = min(kRows, last_row - first_row);
    if (rows <= 0) return;
    int tile = static_cast<int>(blockIdx.x);
    const Range columns = p.backward ? Range{0, p.columns, kNone} : p.adapters.find_tile(p.columns, kColumns, tile);
    const Place place{first_row, rows, columns, columns.begin + tile * kColumns, set};

    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int group_row = warp / 4 * warpgroup::kRows;

    const auto x_of = [&](int step) { return stages + step % kStages * kStage; };
    const auto weight_of = [&](int step) { return x_of(step) + kRows * kDepth; };
    // The weight's columns from `column` on, a multiple of 64, for 16 of the depth from k on.
    const auto weight_at = [&](const T* weight, int column, int k) {
        if constexpr (kAcross) {
            return warpgroup::of_rows<kDepth>(weight + column * kDepth, k);
        } else {
            return warpgroup::of_columns<kExtended>(weight, column, k);
        }
    };

    Steps<T, kDepth> coming(p, columns.adapter), here(p, columns.adapter);
    int loaded = 0;
    const auto load_next = [&] {
        if (!coming.done()) {
            T *x = x_of(loaded), *weight = weight_of(loaded);
            ++loaded;
            load_step<kThreads, kRows, kColumns, kAcross>(
                p, coming, place, kRanks, [&](int a, int b) { return warpgroup::place<kRows>(x, a, b); },
                [&](int a, int b) { return warpgroup::place<kAcross ? kDepth : kExtended>(weight, a, b); });
            coming.advance();
        }
        ptx::cp_async_commit();
    };

    float sums[kHalves][kTiles][4] = {};
    float h[kRanks / 8][4] = {};

    const auto multiply_step = [&](int step, auto with_h) {
        ptx::wgmma_fence();
        const T *x = x_of(step), *weight = weight_of(step);
#pragma unroll
        for (int k = 0; k < kDepth; k += warpgroup::kDepth) {
            const uint64_t left = warpgroup::of_columns<kRows>(x, group_row, k);
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                warpgroup::multiply<kAcross>(sums[half], left, weight_at(weight, half * kHalf, k), true, p.x);
            }
            if constexpr (decltype(with_h)::value) {
                warpgroup::multiply<kAcross>(h, left, weight_at(weight, kColumns, k), true, p.x);
            }
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();  // what the step before has read may be overwritten behind the next barrier
    };
    // The step of ranks, once h is complete: it goes to the place of x, rounded.
    const auto add_ranks = [&](int step) {
        const int count = here.ranks, adapter = here.range.adapter;
        T* x = x_of(step);
#pragma unroll
        for (int n = 0; n < kRanks / 8; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float pair[2] = {h[n][half * 2], h[n][half * 2 + 1]};
                store<2>(pair, warpgroup::place<kRows>(x, warp * 16 + lane / 4 + half * 8, n * 8 + lane % 4 * 2));
                h[n][half * 2] = h[n][half * 2 + 1] = 0.0f;
            }
        }
        ptx::fence_proxy_async();
        __syncthreads();  // h is there
        if (place.first_column == columns.begin) {
            const int all = p.adapters.ranks();
            T* out = p.h + int64_t{first_row} * all + p.adapters.ranks(adapter);
            for (int i = threadIdx.x; i < kRows * kRanks; i += kThreads) {
                const int row = i / kRanks, column = i % kRanks;
                if (row < rows && column < count) {
                    out[int64_t{row} * all + column] = *warpgroup::place<kRows>(x, row, column);
                }
            }
        }
        if (set < 0) return;
        const float scaling = pick(p.scaling, adapter);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            float part[kTiles][4];
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < kRanks; k += warpgroup::kDepth) {
                warpgroup::multiply<kAcross>(part, warpgroup::of_columns<kRows>(x, group_row, k),
                                             weight_at(weight_of(step), half * kHalf, k), k > 0, p.x);
            }
            ptx::wgmma_commit();
            ptx::wgmma_wait<0>();
            ptx::keep(part);
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[half][n][i] += scaling * part[n][i];
            }
        }
    };

    int step = 0;
    const auto begin_step = [&] {
        ptx::cp_async_wait<kStages - 3>();
        ptx::fence_proxy_async();
        __syncthreads();  // this step is there, and nobody reads the one before the last
        load_next();
    };
    // The steps of a range: only inside of this are products under way behind the end of a step.
    const auto multiply_range = [&](auto with_h) {
        const int number = here.number;
        do {
            begin_step();
            multiply_step(step, with_h);
            ++step;
            here.advance();
        } while (here.number == number && !here.is_of_ranks());
        ptx::wgmma_wait<0>();
        ptx::keep(sums);
        ptx::keep(h);
    };
#pragma unroll 1
    for (int i = 0; i < kStages - 2; ++i) load_next();
#pragma unroll 1
    while (!here.done()) {
        if (here.is_of_ranks()) {
            begin_step();
            add_ranks(step);
            ++step;
            here.advance();
        } else if (here.ranks > 0 && set >= 0) {
            multiply_range(std::true_type());
        } else {
            multiply_range(std::false_type());
        }
    }

    // Through shared memory, so that whole vectors are written: 16 rows of 64 columns of a warp at a time.
    __syncthreads();  // nobody works on the last step
    constexpr int kPart = 64, kPitch = kPart + 4, kSize = kVectorSize<T>, kVectors = kPart / kSize;
    float* out = reinterpret_cast<float*>(memory) + warp * 16 * kPitch;
#pragma unroll
    for (int part = 0; part < kColumns / kPart; ++part) {
#pragma unroll
        for (int n = 0; n < kPart / 8; ++n) {
            const int at = part * kPart / 8 + n;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const auto& from = sums[at / kTiles][at % kTiles];
                const float pair[2] = {from[half * 2], from[half * 2 + 1]};
                store<2>(pair, out + (lane / 4 + half * 8) * kPitch + n * 8 + lane % 4 * 2);
            }
        }
        __syncwarp();  // 16 rows are there
        for (int i = lane; i < 16 * kVectors; i += kWarpSize) {
            const int row = warp * 16 + i / kVectors, within = i % kVectors * kSize;
            const int column = place.first_column + part * kPart + within;
            if (row >= rows || column >= columns.end) continue;
            float values[kSize];
#pragma unroll
            for (int e = 0; e < kSize; e += 4) {
                float four[4];
                load(out + i / kVectors * kPitch + within + e, four);
#pragma unroll
                for (int j = 0; j < 4; ++j) values[e + j] = four[j];
            }
            store_piece(p, values, first_row + row, column);
        }
        __syncwarp();  // nobody reads these rows
    }
#endif
}

}  // namespace

#define LORA_HOPPER(KERNEL, TYPE, RANKS, ACROSS)                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) KERNEL(LORA_PARAMETERS(TYPE)) {                          \
        product<RANKS, ACROSS>(LORA_PRODUCT(TYPE));                                                                    \
    }
#define LORA_HOPPER_KERNELS(NAME, T)                                                                                   \
    LORA_HOPPER(lora_linear_hopper_16_##NAME, T, 16, false)                                                            \
    LORA_HOPPER(lora_linear_hopper_64_##NAME, T, 64, false)                                                            \
    LORA_HOPPER(lora_linear_transposed_hopper_16_##NAME, T, 16, true)                                                  \
    LORA_HOPPER(lora_linear_transposed_hopper_64_##NAME, T, 64, true)

LORA_HOPPER_KERNELS(bf16, bf16)
LORA_HOPPER_KERNELS(f16, f16)
