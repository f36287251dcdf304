// Gradients of the factors of low-rank adapters, each added to. Reference: lora_linear.rs; SPEC section 5.
//
//   factor of the inputs (A; B of a transposed map)    += s·gᵀ·(x∘keep)    over the rows of each set
//   factor of the outputs (B; A of a transposed map)   += s·hᵀ·dy          over the outputs of each adapter
//
// x [rows, inputs], dy [rows, outputs]: rows with a stride, aligned to 16 bytes, as are widths and outputs of adapters;
// h, g [rows, Σ rank] and groups as lora_linear.cu leaves and takes them. Gradients in f32 lie as the factors, set
// after set.
//
// factors: a block owns 128 columns of x or dy, all ranks up to 64, the rows of one set in one part of all rows, and
// writes its sums to `partial` [splits, sets, elements], where elements are the factors of the inputs [Σ rank, inputs]
// and after them those of the outputs [rank, outputs], adapter after adapter. A warp owns 32 columns: mma.sync takes
// columns of x as its rows, steps of 64 bytes of rows come three stages deep. Rows of other sets are passed over by
// whole groups.
// add: a thread owns an element and adds the splits in their order.
//
// Bytes: x and dy once (x again for each further 64 of Σ rank), h and g once for each tile: bound by memory; x and dy
// of q, k, v at width 512 are 4 KiB a row. Operations: 2·rank for each element. The partial sums are small beside that:
// their number of splits is what fills the GPU.
//
// History (not measured on a GPU yet)
//   1  this version

#include "lora_linear.cuh"

namespace {

using namespace lora;

constexpr int kStages = 3;
constexpr int kColumns = 128;  // of x or dy, for one block
constexpr int kWarpColumns = 32;
constexpr int kThreads = kColumns / kWarpColumns * kWarpSize;
constexpr int kAddThreads = 256;

template <typename T>
constexpr int kStepRows = 64 / static_cast<int>(sizeof(T));

template <typename T>
struct Factors {
    const T *x, *dy, *h, *g;
    const uint32_t* keep;
    Layout adapters;
    Groups groups;
    float* partial;
    int32_t rows, inputs, x_stride, dy_stride;
};

template <typename T>
struct Stage {
    static constexpr int kRightAt = kStepRows<T> * kColumns * static_cast<int>(sizeof(T));
    static constexpr int kKeepAt = kRightAt + kStepRows<T> * kMaxRank * static_cast<int>(sizeof(T));
    static constexpr int kWords = kColumns / 32;
    static constexpr int kBytes = kKeepAt + kStepRows<T> * kWords * static_cast<int>(sizeof(uint32_t));

    Swizzled<T, kColumns> left;   // rows of x or dy
    Swizzled<T, kMaxRank> right;  // rows of g or h
    uint32_t* keep;               // kWords for each row

    __device__ Stage(unsigned char* memory, int number)
        : left{reinterpret_cast<T*>(memory + number * kBytes)},
          right{reinterpret_cast<T*>(memory + number * kBytes + kRightAt)},
          keep(reinterpret_cast<uint32_t*>(memory + number * kBytes + kKeepAt)) {}
};

// The rows of a set from `row` up to `end`, in steps of rows of one group.
struct RowSteps {
    const Groups& groups;
    int set, row, end, step;
    int group = 0, group_end;

    __device__ RowSteps(const Groups& groups, int set, int begin, int end, int step)
        : groups(groups), set(set), row(begin), end(end), step(step), group_end(end) {
        if (groups.offsets == nullptr || done()) return;
        int within;
        group = find_token(groups.offsets, groups.count, row, within);
        group_end = groups.offsets[group + 1];
        settle();
    }

    __device__ bool done() const { return row >= end; }
    __device__ int count() const { return min(step, min(group_end, end) - row); }

    __device__ void advance() {
        row = min(row + step, group_end);
        if (groups.offsets != nullptr) settle();
    }

    __device__ void settle() {
        while (!done() && (row >= group_end || groups.sets[group] != set)) {
            row = group_end;
            if (++group == groups.count) {
                row = end;
            } else {
                group_end = groups.offsets[group + 1];
            }
        }
    }
};

// d [16·kM columns of the left tile, 8·kN ranks] += leftᵀ·right over a step of rows.
template <typename T, int kM, int kN>
__device__ inline void multiply(float (&d)[kM][kN][4], const Stage<T>& stage, int ranks, bool masked) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int first = warp * kWarpColumns, pair = lane % 4 * 2, column = lane / 4;
    const auto kept = [&](int row, int column) {
        return (stage.keep[row * Stage<T>::kWords + warp] >> column & 1u) != 0;
    };
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int k = 0; k < kStepRows<T>; k += 16) {
            uint32_t columns[kM][4];
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                const int row = k + lane / 16 * 8 + lane % 8, at = first + m * 16 + lane / 8 % 2 * 8;
                ptx::ldmatrix_x4_trans(columns[m], stage.left.at(row, at));
                if (!masked) continue;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = k + pair + i / 2 * 8, at = m * 16 + column + i % 2 * 8;
                    columns[m][i] &= (kept(row, at) ? 0xffffu : 0u) | (kept(row + 1, at) ? 0xffff0000u : 0u);
                }
            }
#pragma unroll
            for (int n = 0; n < kN; n += 2) {
                if (n * 8 >= ranks) continue;
                uint32_t factor[4];
                ptx::ldmatrix_x4_trans(factor, stage.right.at(k + lane % 16, n * 8 + lane / 16 * 8));
#pragma unroll
                for (int m = 0; m < kM; ++m) {
                    mma(d[m][n], columns[m], factor[0], factor[1], stage.left.memory);
                    mma(d[m][n + 1], columns[m], factor[2], factor[3], stage.left.memory);
                }
            }
        }
    } else {
#pragma unroll 2
        for (int k = 0; k < kStepRows<T>; ++k) {
            float columns[kM][2];
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int at = m * 16 + half * 8 + column;
                    columns[m][half] = masked && !kept(k, at) ? 0.0f : *stage.left.at(k, first + at);
                }
            }
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                if (n * 8 >= ranks) continue;
                float factor[2];
                load<2>(stage.right.at(k, n * 8 + pair), factor);
#pragma unroll
                for (int m = 0; m < kM; ++m) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) d[m][n][i] += columns[m][i / 2] * factor[i % 2];
                }
            }
        }
    }
}

// Which product a block does a part of: left [rows, columns]ᵀ · right [rows, ranks].
template <typename T>
struct Job {
    const T *left, *right;
    int64_t partial;  // where the result begins among the partial sums
    int stride, columns, ranks, tile;  // the stride of `left`
    bool of_inputs;

    __device__ Job(const Factors<T>& p, int block) {
        const int all = p.adapters.ranks(), tiles = ceil_divide(p.inputs, kColumns);
        of_inputs = block < tiles * ceil_divide(all, kMaxRank);
        if (of_inputs) {
            const int rank = block / tiles * kMaxRank;
            left = p.x;
            right = p.g + rank;
            stride = p.x_stride;
            partial = int64_t{rank} * p.inputs;
            columns = p.inputs;
            ranks = min(all - rank, kMaxRank);
            tile = block % tiles;
            return;
        }
        tile = block - tiles * ceil_divide(all, kMaxRank);
        partial = int64_t{all} * p.inputs;
        int adapter = 0;
#pragma unroll
        for (int i = 0; i < kMaxAdapters - 1; ++i) {
            const int tiles = ceil_divide(p.adapters.count[i], kColumns);
            if (adapter != i || tile < tiles) continue;
            tile -= tiles;
            partial += int64_t{p.adapters.rank[i]} * p.adapters.count[i];
            ++adapter;
        }
        left = p.dy + pick(p.adapters.first, adapter);
        right = p.h + p.adapters.ranks(adapter);
        stride = p.dy_stride;
        columns = pick(p.adapters.count, adapter);
        ranks = pick(p.adapters.rank, adapter);
    }
};

template <typename T>
__device__ inline void factors(const Factors<T>& p) {
    constexpr int kM = kWarpColumns / 16, kN = kMaxRank / 8;
    extern __shared__ __align__(128) unsigned char memory[];
    const Job<T> job(p, static_cast<int>(blockIdx.x));
    const int splits = static_cast<int>(gridDim.y), split = static_cast<int>(blockIdx.y);
    const int set = static_cast<int>(blockIdx.z);
    const int first = job.tile * kColumns, all = p.adapters.ranks();
    const bool masked = p.keep != nullptr && job.of_inputs;
    const int words = ceil_divide(p.inputs, 32);

    const int share = round_up(ceil_divide(p.rows, splits), kStepRows<T>);
    RowSteps coming(p.groups, set, min(split * share, p.rows), min((split + 1) * share, p.rows), kStepRows<T>);
    int loaded = 0;
    const auto load_next = [&] {
        if (!coming.done()) {
            const Stage<T> stage(memory, loaded++ % kStages);
            const int64_t row = coming.row;
            const int count = coming.count();
            copy<kThreads, kStepRows<T>, kColumns>([&](int a, int b) { return stage.left.at(a, b); },
                                                   job.left + row * job.stride + first, job.stride, count,
                                                   job.columns - first);
            copy_factor<kThreads, kStepRows<T>, kMaxRank>([&](int a, int b) { return stage.right.at(a, b); },
                                                          job.right + row * all, all, count, job.ranks, kStepRows<T>,
                                                          round_up(job.ranks, 16));
            if (masked && threadIdx.x < kStepRows<T> * Stage<T>::kWords) {
                const int within = min(static_cast<int>(threadIdx.x) / Stage<T>::kWords, count - 1);
                const int word = min(first / 32 + static_cast<int>(threadIdx.x) % Stage<T>::kWords, words - 1);
                ptx::cp_async_4(stage.keep + threadIdx.x, p.keep + (row + within) * words + word);
            }
            coming.advance();
        }
        ptx::cp_async_commit();
    };

    float sums[kM][kN][4] = {};
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) load_next();
    for (int step = 0; step < loaded; ++step) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // this step is there, and nobody works on the last one
        load_next();
        multiply(sums, Stage<T>(memory, step % kStages), job.ranks, masked);
    }

    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    int64_t elements = int64_t{all} * p.inputs;
#pragma unroll
    for (int i = 0; i < kMaxAdapters; ++i) elements += int64_t{p.adapters.rank[i]} * p.adapters.count[i];
    float* out = p.partial + (int64_t{split} * gridDim.z + set) * elements + job.partial;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = first + warp * kWarpColumns + m * 16 + lane / 4 + i / 2 * 8;
                const int rank = n * 8 + lane % 4 * 2 + i % 2;
                if (column < job.columns && rank < job.ranks) out[int64_t{rank} * job.columns + column] = sums[m][n][i];
            }
        }
    }
}

}  // namespace

// grid (tiles, splits, sets): ⌈inputs/128⌉·⌈Σ rank/64⌉ tiles of the inputs, then ⌈count/128⌉ of each adapter's outputs;
// block 128; dynamic shared memory 3·12800 bytes.
#define LORA_FACTORS(NAME, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads) lora_linear_factors_##NAME(                                 \
        const T* x, const uint32_t* keep, const T* dy, const T* h, const T* g, int32_t first0, int32_t count0,         \
        int32_t rank0, int32_t first1, int32_t count1, int32_t rank1, int32_t first2, int32_t count2, int32_t rank2,   \
        int32_t first3, int32_t count3, int32_t rank3, const int32_t* offsets, const int32_t* sets, float* partial,    \
        int32_t rows, int32_t inputs, int32_t groups, int32_t x_stride, int32_t dy_stride) {                           \
        factors(Factors<T>{x, dy, h, g, keep,                                                                          \
                           {{first0, first1, first2, first3}, {count0, count1, count2, count3},                        \
                            {rank0, rank1, rank2, rank3}},                                                             \
                           {offsets, sets, groups}, partial, rows, inputs, x_stride, dy_stride});                      \
    }

LORA_FACTORS(f32, float)
LORA_FACTORS(bf16, bf16)
LORA_FACTORS(f16, f16)

// Each gradient += scaling · Σ over the splits. grid (⌈elements/256⌉, sets); block 256. The gradients lie as the
// factors.
extern "C" __global__ void __launch_bounds__(kAddThreads) lora_linear_add(
    const float* partial, float* down0, float* up0, int32_t count0, int32_t rank0, float scaling0, float* down1,
    float* up1, int32_t count1, int32_t rank1, float scaling1, float* down2, float* up2, int32_t count2, int32_t rank2,
    float scaling2, float* down3, float* up3, int32_t count3, int32_t rank3, float scaling3, int32_t inputs,
    int32_t splits, int32_t transposed) {
    float* const downs[] = {down0, down1, down2, down3};
    float* const ups[] = {up0, up1, up2, up3};
    const int counts[] = {count0, count1, count2, count3}, ranks[] = {rank0, rank1, rank2, rank3};
    const float scalings[] = {scaling0, scaling1, scaling2, scaling3};
    const int64_t set = blockIdx.y, sets = gridDim.y;

    int64_t elements = 0;
#pragma unroll
    for (int p = 0; p < kMaxAdapters; ++p) elements += int64_t{ranks[p]} * (inputs + counts[p]);
    int64_t at = int64_t{blockIdx.x} * kAddThreads + threadIdx.x;
    if (at >= elements) return;
    float sum = 0.0f;
    for (int split = 0; split < splits; ++split) sum += partial[(split * sets + set) * elements + at];

    // The factors of the inputs [Σ rank, inputs], then those of the outputs [rank, count], one after another.
    bool found = false;
#pragma unroll
    for (int i = 0; i < 2 * kMaxAdapters; ++i) {
        const int p = i % kMaxAdapters;
        const bool of_inputs = i < kMaxAdapters;
        const int64_t width = of_inputs ? inputs : counts[p], size = ranks[p] * width;
        if (!found && at < size) {
            const int64_t rank = at / width, column = at % width;
            float* gradient = (of_inputs ? downs[p] : ups[p]) + set * size;
            gradient[of_inputs == (transposed == 0) ? at : column * ranks[p] + rank] += scalings[p] * sum;
            found = true;
        }
        at -= size;
    }
}
