// The twins of CUDA's built-in functions and of ptx.cuh: those that touch memory or other lanes.
#include "../../ptx.cuh"

#include <cstring>

#include "machine.h"

#define SITE __builtin_return_address(0)

namespace dtmem_host {

uint3 thread_index() { return machine->thread; }
uint3 block_index() { return machine->block; }
uint3 block_extent() { return machine->block_extent; }
uint3 grid_extent() { return machine->grid_extent; }

void* shared_variable(const void* site, const char* name, std::size_t bytes, std::size_t alignment) {
    return machine->shared_variable(site, name, bytes, alignment, SITE);
}
void* dynamic_shared(std::size_t alignment) { return machine->dynamic_shared(alignment, SITE); }

namespace {

using Operands = std::array<void*, kWarp>;

unsigned lane_of(const Machine& machine) { return machine.current->thread % kWarp; }

// What `source(lane)` had; −1: the lane keeps its own value.
template <typename T, typename Source>
T shuffle(unsigned mask, T value, int width, const char* instruction, const void* site, Source source) {
    struct Exchange {
        T value;
        T result;
        int from;
    } mine{value, value, -1};
    Machine& m = *machine;
    if (width <= 0 || width > int{kWarp} || (width & (width - 1)) != 0) {
        m.fail(Check::kCollective, site, "%s: width %d", instruction, width);
    }
    const int lane = static_cast<int>(lane_of(m));
    mine.from = source(lane, lane / width * width, lane / width * width + width);
    m.together(mask, instruction, &mine, site, [&](Operands& operands, unsigned lanes) {
        for (unsigned l = 0; l < kWarp; ++l) {
            if ((lanes >> l & 1) == 0) continue;
            auto& exchange = *static_cast<Exchange*>(operands[l]);
            if (exchange.from < 0) continue;
            if ((lanes >> exchange.from & 1) == 0) {
                Machine::Blame blame(m, l);
                m.fail(Check::kCollective, site, "%s reads lane %d, which takes no part (mask %08x)", instruction,
                       exchange.from, lanes);
            }
            exchange.result = static_cast<Exchange*>(operands[exchange.from])->value;
        }
    });
    return mine.result;
}

unsigned ballot(unsigned mask, int predicate, const char* instruction, const void* site) {
    struct Vote {
        int predicate;
        unsigned result;
    } mine{predicate, 0};
    machine->together(mask, instruction, &mine, site, [](Operands& operands, unsigned lanes) {
        unsigned result = 0;
        for (unsigned l = 0; l < kWarp; ++l) {
            if ((lanes >> l & 1) != 0 && static_cast<Vote*>(operands[l])->predicate != 0) result |= 1u << l;
        }
        for (unsigned l = 0; l < kWarp; ++l) {
            if ((lanes >> l & 1) != 0) static_cast<Vote*>(operands[l])->result = result;
        }
    });
    return mine.result;
}

template <int kMatrices, bool kTranspose>
void ldmatrix(std::uint32_t (&r)[kMatrices], const void* row, const char* instruction, const void* site) {
    struct Load {
        const void* row;
        std::uint32_t* registers;
    } mine{row, r};
    Machine& m = *machine;
    m.require_full_warp(instruction, site);
    m.together(~0u, instruction, &mine, site, [&](Operands& operands, unsigned) {
        std::uint16_t matrices[kMatrices][8][8];
        for (unsigned l = 0; l < kMatrices * 8; ++l) {
            const Machine::Blame blame(m, l);
            const void* row = static_cast<Load*>(operands[l])->row;
            m.require_alignment(row, 16, false, site);
            m.read_rows(row, 16, site);
            std::memcpy(matrices[l / 8][l % 8], row, 16);
        }
        for (unsigned l = 0; l < kWarp; ++l) {
            for (int i = 0; i < kMatrices; ++i) {
                const unsigned major = l / 4, minor = l % 4 * 2;
                const auto& matrix = matrices[i];
                const std::uint32_t low = kTranspose ? matrix[minor][major] : matrix[major][minor];
                const std::uint32_t high = kTranspose ? matrix[minor + 1][major] : matrix[major][minor + 1];
                static_cast<Load*>(operands[l])->registers[i] = low | high << 16;
            }
        }
    });
}

struct Product {
    float* d;
    const std::uint32_t *a, *b;
};

// d (16×8) += a (16×depth) · b (depth×8), the terms of each sum from first to last.
template <int kDepth>
void multiply(const Operands& operands, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
    for (int i = 0; i < 16; ++i) {
        float sums[8];
        for (int n = 0; n < 8; ++n) {
            sums[n] = static_cast<Product*>(operands[i % 8 * 4 + n / 2])->d[i / 8 * 2 + n % 2];
        }
        for (int k = 0; k < kDepth; ++k) {
            for (int n = 0; n < 8; ++n) sums[n] += a[i][k] * b[k][n];
        }
        for (int n = 0; n < 8; ++n) {
            static_cast<Product*>(operands[i % 8 * 4 + n / 2])->d[i / 8 * 2 + n % 2] = sums[n];
        }
    }
}

template <float (*kWiden)(std::uint32_t)>
void mma_16(Product mine, const char* instruction, const void* site) {
    machine->require_full_warp(instruction, site);
    machine->together(~0u, instruction, &mine, site, [](Operands& operands, unsigned) {
        float a[16][16], b[16][8];
        for (int l = 0; l < int{kWarp}; ++l) {
            const auto& operand = *static_cast<Product*>(operands[l]);
            const int g = l / 4, c = l % 4 * 2;
            for (int r = 0; r < 4; ++r) {
                const int row = g + r % 2 * 8, column = c + r / 2 * 8;
                a[row][column] = kWiden(operand.a[r] & 0xffff);
                a[row][column + 1] = kWiden(operand.a[r] >> 16);
            }
            for (int r = 0; r < 2; ++r) {
                b[c + r * 8][g] = kWiden(operand.b[r] & 0xffff);
                b[c + r * 8 + 1][g] = kWiden(operand.b[r] >> 16);
            }
        }
        multiply<16>(operands, a, b);
    });
}

void copy(void* shared, const void* global, unsigned bytes, int source_bytes, const void* site) {
    machine->begin_copy(shared, global, bytes, static_cast<unsigned>(source_bytes), site);
}

}  // namespace
}  // namespace dtmem_host

using dtmem_host::machine;

void __syncthreads(unsigned line) {
    const uint3 n = machine->block_extent;
    machine->synchronise(0, n.x * n.y * n.z, line, "__syncthreads", SITE);
}
void __syncwarp(unsigned mask) { machine->synchronise_warp(mask, SITE); }

template <typename T> T __shfl_sync(unsigned mask, T value, int lane, int width) {
    return dtmem_host::shuffle(mask, value, width, "__shfl_sync", SITE,
                               [=](int, int first, int) { return first + (lane & (width - 1)); });
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width) {
    return dtmem_host::shuffle(mask, value, width, "__shfl_xor_sync", SITE,
                               [=](int lane, int, int end) { return (lane ^ lanes) < end ? lane ^ lanes : -1; });
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width) {
    return dtmem_host::shuffle(mask, value, width, "__shfl_up_sync", SITE, [=](int lane, int first, int) {
        return lane - static_cast<int>(lanes) >= first ? lane - static_cast<int>(lanes) : -1;
    });
}
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width) {
    return dtmem_host::shuffle(mask, value, width, "__shfl_down_sync", SITE, [=](int lane, int, int end) {
        return lane + static_cast<int>(lanes) < end ? lane + static_cast<int>(lanes) : -1;
    });
}
#define SHUFFLES(T)                                        \
    template T __shfl_sync(unsigned, T, int, int);         \
    template T __shfl_xor_sync(unsigned, T, int, int);     \
    template T __shfl_up_sync(unsigned, T, unsigned, int); \
    template T __shfl_down_sync(unsigned, T, unsigned, int);
SHUFFLES(int)
SHUFFLES(unsigned)
SHUFFLES(long)
SHUFFLES(unsigned long)
SHUFFLES(long long)
SHUFFLES(unsigned long long)
SHUFFLES(float)
SHUFFLES(double)

unsigned __ballot_sync(unsigned mask, int predicate) {
    return dtmem_host::ballot(mask, predicate, "__ballot_sync", SITE);
}
int __any_sync(unsigned mask, int predicate) {
    return dtmem_host::ballot(mask, predicate, "__any_sync", SITE) != 0;
}
int __all_sync(unsigned mask, int predicate) {
    return dtmem_host::ballot(mask, predicate == 0, "__all_sync", SITE) == 0;
}

namespace ptx {

#define LDMATRIX(NAME, MATRICES, TRANSPOSE)                                 \
    void NAME(std::uint32_t (&r)[MATRICES], const void* row) {              \
        dtmem_host::ldmatrix<MATRICES, TRANSPOSE>(r, row, #NAME, SITE);     \
    }
LDMATRIX(ldmatrix_x1, 1, false)
LDMATRIX(ldmatrix_x2, 2, false)
LDMATRIX(ldmatrix_x4, 4, false)
LDMATRIX(ldmatrix_x1_trans, 1, true)
LDMATRIX(ldmatrix_x2_trans, 2, true)
LDMATRIX(ldmatrix_x4_trans, 4, true)

void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    dtmem_host::mma_16<dtmem_host::from_bf16>({d, a, b}, "mma_m16n8k16_bf16", SITE);
}
void mma_m16n8k16_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    dtmem_host::mma_16<dtmem_host::from_f16>({d, a, b}, "mma_m16n8k16_f16", SITE);
}
void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    using namespace dtmem_host;
    Product mine{d, a, b};
    machine->require_full_warp("mma_m16n8k8_tf32", SITE);
    machine->together(~0u, "mma_m16n8k8_tf32", &mine, SITE, [](Operands& operands, unsigned) {
        float a[16][8], b[8][8];
        auto widen = [](std::uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); };
        for (int l = 0; l < int{kWarp}; ++l) {
            const auto& operand = *static_cast<Product*>(operands[l]);
            const int g = l / 4, c = l % 4;
            for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][c + r / 2 * 4] = widen(operand.a[r]);
            for (int r = 0; r < 2; ++r) b[c + r * 4][g] = widen(operand.b[r]);
        }
        multiply<8>(operands, a, b);
    });
}

void cp_async_4(void* shared, const void* global) { dtmem_host::copy(shared, global, 4, 4, SITE); }
void cp_async_8(void* shared, const void* global) { dtmem_host::copy(shared, global, 8, 8, SITE); }
void cp_async_16(void* shared, const void* global) { dtmem_host::copy(shared, global, 16, 16, SITE); }
void cp_async_4_zfill(void* shared, const void* global, int bytes) { dtmem_host::copy(shared, global, 4, bytes, SITE); }
void cp_async_8_zfill(void* shared, const void* global, int bytes) { dtmem_host::copy(shared, global, 8, bytes, SITE); }
void cp_async_16_zfill(void* shared, const void* global, int bytes) {
    dtmem_host::copy(shared, global, 16, bytes, SITE);
}
void cp_async_commit() { machine->commit_copies(); }
template <int kStillRunning> void cp_async_wait() { machine->await_copies(kStillRunning, SITE); }
template void cp_async_wait<0>();
template void cp_async_wait<1>();
template void cp_async_wait<2>();
template void cp_async_wait<3>();
template void cp_async_wait<4>();
template void cp_async_wait<5>();
template void cp_async_wait<6>();
template void cp_async_wait<7>();
void cp_async_wait_all() {
    machine->commit_copies();
    machine->await_copies(0, SITE);
}

uint4 load_16_once(const void* global) {
    machine->require_alignment(global, 16, false, SITE);
    machine->access<false>(global, 16, SITE);
    uint4 value;
    std::memcpy(&value, global, 16);
    return value;
}
void store_16_once(void* global, uint4 value) {
    machine->require_alignment(global, 16, true, SITE);
    machine->access<true>(global, 16, SITE);
    std::memcpy(global, &value, 16);
}

void barrier_sync(int id, int threads) {
    machine->synchronise(static_cast<unsigned>(id), static_cast<unsigned>(threads), 0, "barrier_sync", SITE);
}
void barrier_arrive(int id, int threads) {
    machine->arrive(static_cast<unsigned>(id), static_cast<unsigned>(threads), "barrier_arrive", SITE);
}

void cluster_arrive() { machine->arrive_cluster(SITE); }
void cluster_wait() { machine->await_cluster(SITE); }
void* map_shared(void* shared, unsigned rank) { return machine->map_shared(shared, rank, SITE); }

}  // namespace ptx
