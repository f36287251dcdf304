// Products of warpgroups: what ptx_warpgroup.cuh has, for a CPU.
//
// A product is computed when all four warps have arrived, but nobody sees it before the wait: until then its registers
// are poisoned, any use of them is a finding, and so is a write to what it reads. Registers are variables on the stack of
// a thread, which the compiler announces as soon as their address has been taken. Where a matrix lies in shared memory is
// computed as the PTX manual describes it, bit for bit, and not by the code that fills the tiles.
#include "../../ptx_warpgroup.cuh"

#include <cstring>

#include "machine.h"

#define SITE __builtin_return_address(0)

namespace dtmem_host {

namespace {

constexpr unsigned kGroupWarps = 4, kGroupThreads = kGroupWarps * kWarp;
constexpr unsigned kDepth = 16, kRowsOfWarp = 16, kPiece = 16;

struct Matrix {
    std::uint32_t start, leading, stride;  // bytes
};

bool overlap(std::uintptr_t a, std::size_t a_bytes, const void* b, std::size_t b_bytes) {
    const auto at = reinterpret_cast<std::uintptr_t>(b);
    return a < at + b_bytes && at < a + a_bytes;
}

// The 128-byte swizzle: pieces of 16 bytes change places by the row of 128 bytes that they are in.
std::uint32_t swizzled(std::uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Where piece `column` of row `row` of a matrix is whose rows have the depth: two pieces.
std::uint32_t piece_along_depth(const Matrix& matrix, unsigned row, unsigned column) {
    return swizzled(matrix.start + row / 8 * matrix.stride + row % 8 * 128 + column * kPiece);
}

// Where piece `column` of row `row` of a matrix is whose columns have the depth: 16 rows of so many pieces as there are,
// eight next to each other.
std::uint32_t piece_across_depth(const Matrix& matrix, unsigned row, unsigned column) {
    return swizzled(matrix.start + column / 8 * matrix.leading + row / 8 * matrix.stride + row % 8 * 128 +
                    column % 8 * kPiece);
}

}  // namespace

std::uint32_t Machine::shared_address(const void* address, const void* site) {
    return static_cast<std::uint32_t>(shared_offset(address, 1, false, site) % kSharedBytes);
}

// Whoever takes registers waits until others have given as many: in vain, where that is more than there are.
void Machine::set_registers(unsigned count, bool more, const void* site) {
    const char* instruction = more ? "take_registers" : "give_registers";
    require_full_warp(instruction, site);
    together(~0u, instruction, nullptr, site, [](auto&, unsigned) {});
    const unsigned rank = rank_of(current->thread), warps = threads_per_block_ / kWarp;
    Warp& own = warps_[current->thread / kWarp];
    if (count < 24 || count > 256 || count % 8 != 0 || (more ? count < own.registers : count > own.registers)) {
        fail(Check::kCollective, site, "%s: from %u to %u", instruction, own.registers, count);
    }
    const auto fits = [&] {
        unsigned all = (count - own.registers) * kWarp;
        for (unsigned w = 0; w < warps; ++w) all += warps_[rank * warps + w].registers * kWarp;
        return all <= kRegisters;
    };
    while (!fits()) wait(Wait::kRegisters, instruction, site);
    own.registers = count;
    each_thread([&](unsigned t) {
        if (rank_of(t) == rank && fibers_[t].wait == Wait::kRegisters && !fibers_[t].done) wake(fibers_[t]);
    });
}

void Machine::fence_registers(const void* site) {
    if (omits(site)) return;
    require_full_warp("wgmma_fence", site);
    together(~0u, "wgmma_fence", nullptr, site, [](auto&, unsigned) {});
    current->fenced = true;
    current->used.resize(kStackBytes / sizeof(float));
    ++current->register_fence;
}

template <bool kWrite>
void Machine::use_registers(std::uintptr_t address, std::size_t bytes, const void* site) {
    for (const Accumulators& accumulators : current->accumulators) {
        if (overlap(address, bytes, accumulators.d, accumulators.bytes())) {
            fail(Check::kInFlight, site, "%s of its result", kWrite ? "write" : "read");
        }
    }
    for (const Fragment& fragment : current->fragments) {
        if (kWrite && overlap(address, bytes, fragment.a, 16)) {
            fail(Check::kInFlight, site, "write to registers that it reads");
        }
    }
    const std::uintptr_t offset = address - reinterpret_cast<std::uintptr_t>(current->stack);
    for (std::size_t word = offset / 4; word < std::min((offset + bytes + 3) / 4, current->used.size()); ++word) {
        current->used[word] = current->register_fence;
    }
}
template void Machine::use_registers<false>(std::uintptr_t, std::size_t, const void*);
template void Machine::use_registers<true>(std::uintptr_t, std::size_t, const void*);

void Machine::require_registers(const void* registers, std::size_t bytes, const GroupProduct& product, const void* site) {
    const std::uintptr_t offset =
        reinterpret_cast<std::uintptr_t>(registers) - reinterpret_cast<std::uintptr_t>(current->stack);
    if (offset >= kStackBytes || bytes > kStackBytes - offset) {
        fail(Check::kCollective, site, "%s: registers that are no variables of the thread", product.instruction);
    }
    for (std::size_t word = offset / 4; word < (offset + bytes) / 4; ++word) {
        if (current->used[word] == current->register_fence) {
            fail(Check::kUnfenced, site, "%s: its registers were used behind the last wgmma_fence", product.instruction);
        }
    }
}

void Machine::multiply(const GroupProduct& product, const void* site) {
    const unsigned thread = current->thread % threads_per_block_, warp = thread / kWarp;
    Warpgroup& group = warpgroups_[current->thread / kGroupThreads];
    if (thread_count_ < (warp / kGroupWarps + 1) * kGroupThreads || threads_per_block_ % kGroupThreads != 0) {
        fail(Check::kCollective, site, "%s needs 128 threads", product.instruction);
    }
    if (!current->fenced) fail(Check::kUnfenced, site, "%s: no wgmma_fence before it", product.instruction);
    require_registers(product.d, product.columns / 2 * sizeof(float), product, site);
    if (product.a != nullptr) {
        require_registers(product.a, 4 * sizeof *product.a, product, site);
        for (const Accumulators& other : current->accumulators) {
            if (overlap(reinterpret_cast<std::uintptr_t>(product.a), 16, other.d, other.bytes())) {
                fail(Check::kInFlight, site, "%s: a is the result of another", product.instruction);
            }
        }
    }
    GroupProduct mine = product;
    const std::uint32_t turn = group.turn;
    together(~0u, product.instruction, &mine, site, [&](std::array<void*, kWarp>& operands, unsigned) {
        for (unsigned l = 0; l < kWarp; ++l) {
            group.operands[warp % kGroupWarps][l] = *static_cast<GroupProduct*>(operands[l]);
        }
        if (++group.arrived < kGroupWarps) return;
        const unsigned first = current->thread / kGroupThreads * kGroupThreads;
        perform(group, first, site);
        group.arrived = 0;
        ++group.turn;
        for (unsigned t = first; t < first + kGroupThreads; ++t) {
            if (fibers_[t].wait == Wait::kWarpgroup) wake(fibers_[t]);
        }
    });
    if (group.turn == turn) wait(Wait::kWarpgroup, product.instruction, site);
}

void Machine::perform(Warpgroup& group, unsigned first, const void* site) {
    const GroupProduct& one = group.operands[0][0];
    const std::uint32_t own_group = fibers_[first].product_groups;
    for (unsigned t = 0; t < kGroupThreads; ++t) {
        const GroupProduct& other = group.operands[t / kWarp][t % kWarp];
        if (other.instruction != one.instruction || other.transposed != one.transposed || other.adds != one.adds ||
            (other.a == nullptr) != (one.a == nullptr) || other.a_descriptor != one.a_descriptor ||
            other.b_descriptor != one.b_descriptor || fibers_[first + t].product_groups != own_group) {
            current = &fibers_[first + t];
            fail(Check::kCollective, site, "%s: the threads of the warpgroup do not give the same", one.instruction);
        }
    }

    // Bits 0–13 address, 16–29 leading, 32–45 stride, each without its low four bits; 49–51 offset of the pattern;
    // 62–63 swizzle, of which 1 is that of 128 bytes.
    const auto matrix = [&](std::uint64_t descriptor, bool across, const char* name) {
        const auto field = [descriptor](unsigned low) {
            return static_cast<std::uint32_t>(descriptor >> low & 0x3fff) << 4;
        };
        const Matrix matrix{field(0), field(16), field(32)};
        if (descriptor >> 62 != 1 || (descriptor >> 46 & 0xffff) != 0) {
            fail(Check::kCollective, site, "%s: %s: only the swizzle of 128 bytes is modelled", one.instruction, name);
        }
        // The pattern repeats every 1024 bytes; a matrix begins in its first row, and where rows have the depth, its
        // two pieces do not go over the row's end.
        const bool in_first_row = matrix.start % 1024 <= (across ? 0 : 96);
        if (!in_first_row || matrix.stride % 1024 != 0 || (across && matrix.leading % 1024 != 0)) {
            fail(Check::kMisaligned, site, "%s: %s begins at byte %u of shared memory, with a stride of %u and %u",
                 one.instruction, name, matrix.start, matrix.leading, matrix.stride);
        }
        return matrix;
    };
    const std::size_t base = rank_of(first) * kSharedBytes;
    Reading reading{own_group, (1u << kGroupWarps) - 1, {}};
    const auto read = [&](std::uint32_t address, auto store) {
        const std::size_t offset = base + address % kSharedBytes;
        Fiber* const before = current;
        for (unsigned w = 0; w < kGroupWarps; ++w) {
            current = &fibers_[first + w * kWarp];
            require_fenced(offset, kPiece, site);
        }
        current = before;
        reading.offsets.push_back(static_cast<std::uint32_t>(offset));
        std::uint16_t numbers[kPiece / 2];
        std::memcpy(numbers, shared_.get() + offset, kPiece);
        for (unsigned i = 0; i < kPiece / 2; ++i) store(i, one.widen(numbers[i]));
    };

    static thread_local float a[kGroupWarps * kRowsOfWarp][kDepth], b[kDepth][256];
    if (one.a == nullptr) {
        const Matrix at = matrix(one.a_descriptor, false, "a");
        for (unsigned row = 0; row < kGroupWarps * kRowsOfWarp; ++row) {
            for (unsigned p = 0; p < kDepth / 8; ++p) {
                read(piece_along_depth(at, row, p), [&](unsigned i, float x) { a[row][p * 8 + i] = x; });
            }
        }
    } else {
        for (unsigned t = 0; t < kGroupThreads; ++t) {
            const GroupProduct& product = group.operands[t / kWarp][t % kWarp];
            for (unsigned r = 0; r < 4; ++r) {
                const unsigned row = t / kWarp * kRowsOfWarp + t % kWarp / 4 + r % 2 * 8;
                const unsigned column = t % 4 * 2 + r / 2 * 8;
                a[row][column] = one.widen(product.a[r] & 0xffff);
                a[row][column + 1] = one.widen(product.a[r] >> 16);
            }
        }
    }
    const Matrix at = matrix(one.b_descriptor, one.transposed, "b");
    if (one.transposed) {
        for (unsigned k = 0; k < kDepth; ++k) {
            for (unsigned p = 0; p < one.columns / 8; ++p) {
                read(piece_across_depth(at, k, p), [&](unsigned i, float x) { b[k][p * 8 + i] = x; });
            }
        }
    } else {
        for (unsigned n = 0; n < one.columns; ++n) {
            for (unsigned p = 0; p < kDepth / 8; ++p) {
                read(piece_along_depth(at, n, p), [&](unsigned i, float x) { b[p * 8 + i][n] = x; });
            }
        }
    }
    for (std::uint32_t offset : reading.offsets) {
        for (std::size_t granule = offset / kGranule; granule < (offset + kPiece) / kGranule; ++granule) {
            ++readers_[granule];
        }
    }
    group.readings.push_back(std::move(reading));

    for (unsigned t = 0; t < kGroupThreads; ++t) {
        const GroupProduct& product = group.operands[t / kWarp][t % kWarp];
        Fiber& fiber = fibers_[first + t];
        const std::size_t count = one.columns / 2;
        Accumulators* own = nullptr;
        for (Accumulators& other : fiber.accumulators) {
            const auto d = reinterpret_cast<std::uintptr_t>(product.d);
            if (!overlap(d, count * sizeof(float), other.d, other.bytes())) continue;
            if (other.d != product.d || other.values.size() != count) {
                current = &fiber;
                fail(Check::kInFlight, site, "%s: d belongs to a product of another shape", one.instruction);
            }
            own = &other;
        }
        if (own == nullptr) {
            own = &fiber.accumulators.emplace_back(Accumulators{0, product.d, {}, nullptr});
            own->values.assign(product.d, product.d + count);
            std::memset(product.d, kPoison, count * sizeof(float));
        }
        own->group = own_group;
        own->site = site;
        if (product.a != nullptr) fiber.fragments.push_back({own_group, product.a});
        for (std::size_t i = 0; i < count; ++i) {
            const std::size_t row = t / kWarp * kRowsOfWarp + t % kWarp / 4 + i / 2 % 2 * 8;
            const std::size_t column = i / 4 * 8 + t % 4 * 2 + i % 2;
            float sum = product.adds ? own->values[i] : 0.0f;
            for (unsigned k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
            own->values[i] = sum;
        }
    }
}

void Machine::commit_products(const void* site) {
    require_full_warp("wgmma_commit", site);
    together(~0u, "wgmma_commit", nullptr, site, [](auto&, unsigned) {});
    ++current->product_groups;
}

void Machine::await_products(std::uint32_t still_running, const void* site) {
    if (omits(site)) return;
    require_full_warp("wgmma_wait", site);
    const auto complete = [&](std::uint32_t group) { return group + still_running < current->product_groups; };
    Warpgroup& group = warpgroups_[current->thread / kGroupThreads];
    together(~0u, "wgmma_wait", nullptr, site, [&](auto&, unsigned) {
        const unsigned warp = current->thread / kWarp;
        std::erase_if(group.readings, [&](Reading& reading) {
            const unsigned own = 1u << warp % kGroupWarps;
            if (!complete(reading.group) || (reading.warps & own) == 0) return false;
            reading.warps &= ~own;
            for (std::uint32_t offset : reading.offsets) {
                touch<false>(shared_shadow_, offset, kPiece, shared_.get(), site);
                for (std::size_t granule = offset / kGranule; granule < (offset + kPiece) / kGranule; ++granule) {
                    if (reading.warps == 0) --readers_[granule];
                }
            }
            return reading.warps == 0;
        });
    });
    std::erase_if(current->accumulators, [&](const Accumulators& accumulators) {
        if (!complete(accumulators.group)) return false;
        std::memcpy(accumulators.d, accumulators.values.data(), accumulators.bytes());
        return true;
    });
    std::erase_if(current->fragments, [&](const Fragment& fragment) { return complete(fragment.group); });
}

}  // namespace dtmem_host

using dtmem_host::machine;

namespace ptx {

uint32_t shared_address(const void* shared) { return machine->shared_address(shared, SITE); }
template <int kCount> void give_registers() { machine->set_registers(kCount, false, SITE); }
template <int kCount> void take_registers() { machine->set_registers(kCount, true, SITE); }
#define REGISTERS(COUNT)                       \
    template void give_registers<COUNT>();     \
    template void take_registers<COUNT>();
REGISTERS(24) REGISTERS(32) REGISTERS(40) REGISTERS(48) REGISTERS(56) REGISTERS(64) REGISTERS(72) REGISTERS(80)
REGISTERS(88) REGISTERS(96) REGISTERS(104) REGISTERS(112) REGISTERS(120) REGISTERS(128) REGISTERS(136) REGISTERS(144)
REGISTERS(152) REGISTERS(160) REGISTERS(168) REGISTERS(176) REGISTERS(184) REGISTERS(192) REGISTERS(200) REGISTERS(208)
REGISTERS(216) REGISTERS(224) REGISTERS(232) REGISTERS(240) REGISTERS(248) REGISTERS(256)
void wgmma_fence() { machine->fence_registers(SITE); }
void wgmma_commit() { machine->commit_products(SITE); }
template <int kStillRunning> void wgmma_wait() { machine->await_products(kStillRunning, SITE); }
template <int kStillRunning> void wgmma_wait_behind(float) { machine->await_products(kStillRunning, SITE); }

#define WGMMA_WAIT(N)                \
    template void wgmma_wait<N>();   \
    template void wgmma_wait_behind<N>(float);
WGMMA_WAIT(0)
WGMMA_WAIT(1)
WGMMA_WAIT(2)
WGMMA_WAIT(3)
WGMMA_WAIT(4)
WGMMA_WAIT(5)
WGMMA_WAIT(6)
WGMMA_WAIT(7)

#define WGMMA(N, TYPE)                                                                                                 \
    template <int kTransposed>                                                                                         \
    void wgmma_m64n##N##k16_##TYPE(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool adds) {                          \
        machine->multiply({"wgmma_m64n" #N "k16_" #TYPE, d[0], N, nullptr, a, b, kTransposed != 0, adds,               \
                           dtmem_host::from_##TYPE},                                                                   \
                          SITE);                                                                                       \
    }                                                                                                                  \
    template <int kTransposed>                                                                                         \
    void wgmma_m64n##N##k16_##TYPE(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool adds) {              \
        machine->multiply({"wgmma_m64n" #N "k16_" #TYPE, d[0], N, a, 0, b, kTransposed != 0, adds,                     \
                           dtmem_host::from_##TYPE},                                                                   \
                          SITE);                                                                                       \
    }                                                                                                                  \
    template void wgmma_m64n##N##k16_##TYPE<0>(float (&)[N / 8][4], uint64_t, uint64_t, bool);                         \
    template void wgmma_m64n##N##k16_##TYPE<1>(float (&)[N / 8][4], uint64_t, uint64_t, bool);                         \
    template void wgmma_m64n##N##k16_##TYPE<0>(float (&)[N / 8][4], const uint32_t (&)[4], uint64_t, bool);            \
    template void wgmma_m64n##N##k16_##TYPE<1>(float (&)[N / 8][4], const uint32_t (&)[4], uint64_t, bool);
WGMMA(16, bf16)
WGMMA(16, f16)
WGMMA(64, bf16)
WGMMA(64, f16)
WGMMA(128, bf16)
WGMMA(128, f16)

}  // namespace ptx
