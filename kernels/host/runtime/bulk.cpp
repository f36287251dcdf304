// The asynchronous proxy's copies in bulk, as ptx.cuh has them, and its fence.
//
// A load's bytes are poisoned when it begins and arrive when somebody waits for the phase of its barrier: until then any
// access to them is a finding. A phase ends when its arrivals have come and all bytes that they announced are on their
// way. Who waits for it has seen these bytes, and what the warps that arrived had done before the __syncwarp that came
// before their arrival: what the arriving thread did since then counts as not seen.
//
// Loads by a tensor's map bring boxes of rows of 128 bytes. The swizzle is computed from the address, as the PTX manual
// has it, and not by the code that reads the tiles.
#include <cstring>
#include <iterator>

#include "../../ptx.cuh"
#include "machine.h"

#define SITE __builtin_return_address(0)

namespace dtmem_host {

namespace {

constexpr unsigned kUnit = 16;            // of sizes and addresses
constexpr std::size_t kBarrierBytes = 8;
constexpr unsigned kMostArrivals = (1u << 20) - 1;
constexpr unsigned kBoxRow = 128;         // bytes
constexpr unsigned kSwizzleBytes = 1024;  // after which its pattern comes again

// What src/map.rs made of a matrix.
struct Map {
    std::uint64_t magic, address, element, columns, rows, stride, box_columns, box_rows;
};
constexpr std::uint64_t kMapMagic = 0x70616d20726f736e;

template <typename Visit>
void each_granule(std::size_t offset, std::size_t bytes, Visit visit) {
    for (std::size_t granule = offset / kGranule; granule < (offset + bytes) / kGranule; ++granule) visit(granule);
}

}  // namespace

void Machine::fence_proxy(const void* site) {
    if (omits(site)) return;
    if (current->proxy_fences.size() == kByProxy - 1) fail(Check::kRunaway, site, "65534 fences");
    current->proxy_fences.push_back(warps_[current->thread / kWarp].epoch);
}

// Whether the proxy sees this write: its thread had a fence behind it, before the barrier that leads here.
void Machine::require_fence_behind(const Access& write, const void* at, const void* site) {
    if (write.epoch < cluster_epoch_) return;
    if (!before_now(write)) race(write, true, at, kGranule, false, site);
    if (write.fences == kByProxy) return;
    const auto& fences = fibers_[write.thread].proxy_fences;
    if (write.fences >= fences.size() || !before_now({fences[write.fences], write.site, write.thread, 0})) {
        fail_at(Check::kUnfenced, at, kGranule, false, site,
                "thread %u wrote it, without fence_proxy_async between that and the barrier",
                write.thread % threads_per_block_);
    }
}

// What the proxy reads has been written before, and is seen by it.
void Machine::require_fenced(std::size_t offset, std::size_t bytes, const void* site) {
    each_granule(offset, bytes, [&](std::size_t granule) {
        const std::uint8_t state = shared_shadow_.state[granule];
        const std::uint8_t* at = shared_.get() + granule * kGranule;
        if ((state & kValid) != kValid) fail_at(Check::kOutOfBounds, at, kGranule, false, site);
        if ((state & kPending) != 0) fail_at(Check::kPending, at, kGranule, false, site);
        if ((state & kInitialised) != kInitialised) fail_at(Check::kUninitialised, at, kGranule, false, site);
        require_fence_behind(shared_shadow_.history[granule].write, at, site);
    });
}

void Machine::require_units(const void* shared, const void* global, unsigned bytes, bool load, const void* site) {
    require_alignment(shared, kUnit, load, site);
    require_alignment(global, kUnit, !load, site);
    if (bytes % kUnit != 0) {
        fail(Check::kMisaligned, site, "%u bytes are no multiple of %u", bytes, kUnit);
    }
}

std::size_t Machine::barrier_offset(const void* barrier, const void* site) {
    require_alignment(barrier, kBarrierBytes, true, site);
    return shared_offset(barrier, kBarrierBytes, true, site);
}

ByteBarrier& Machine::byte_barrier(const void* barrier, const void* site) {
    const std::size_t offset = barrier_offset(barrier, site);
    touch<false>(shared_shadow_, offset, kBarrierBytes, shared_.get(), site);
    for (ByteBarrier& found : byte_barriers_) {
        if (found.offset == offset) return found;
    }
    fail(Check::kCollective, site, "no mbarrier_init of this barrier");
}

void Machine::init_bytes(void* barrier, unsigned arrivals, const void* site) {
    const std::size_t offset = barrier_offset(barrier, site);
    if (arrivals == 0 || arrivals > kMostArrivals) fail(Check::kCollective, site, "mbarrier_init: %u arrivals", arrivals);
    for (const ByteBarrier& other : byte_barriers_) {
        if (other.offset == offset) fail(Check::kCollective, site, "mbarrier_init of a barrier that is one already");
    }
    touch<true>(shared_shadow_, offset, kBarrierBytes, shared_.get(), site);
    each_granule(offset, kBarrierBytes, [&](std::size_t granule) { ++readers_[granule]; });  // for good
    byte_barriers_.push_back({.offset = offset, .arrivals = arrivals, .missing = arrivals});
}

void Machine::arrive_bytes(void* barrier, unsigned bytes, const void* site) {
    if (omits(site)) return;
    ByteBarrier& here = byte_barrier(barrier, site);
    if (here.missing == 0) {
        fail(Check::kCollective, site, "an arrival behind the %u of this phase, which waits for bytes", here.arrivals);
    }
    const Warp& warp = warps_[current->thread / kWarp];
    join(here.joined, warp.seen);
    std::uint32_t& own = here.joined[current->thread / kWarp];
    own = std::max(own, warp.epoch - 1);
    --here.missing;
    here.announced += bytes;
    complete_bytes(here, site);
}

void Machine::complete_bytes(ByteBarrier& barrier, const void* site) {
    if (barrier.missing > 0) return;
    if (barrier.begun > barrier.announced) {
        fail(Check::kCollective, site, "copies of %zu bytes, where %zu were announced", barrier.begun,
             barrier.announced);
    }
    if (barrier.begun < barrier.announced) return;
    ++barrier.phases;
    barrier.missing = barrier.arrivals;
    barrier.announced = barrier.begun = 0;
    std::move(barrier.loads.begin(), barrier.loads.end(), std::back_inserter(barrier.complete));
    barrier.loads.clear();
    barrier.released = barrier.joined;
    each_thread([&](unsigned t) {
        Fiber& fiber = fibers_[t];
        if (fiber.wait == Wait::kBytes && fiber.barrier == barrier.offset && !fiber.done) wake(fiber);
    });
}

void Machine::await_bytes(void* barrier, unsigned parity, const void* site) {
    if (omits(site)) return;
    require_full_warp("mbarrier_wait", site);
    std::uint32_t phases = 0;  // that are to be over: the lanes of a warp look once, together
    together(~0u, "mbarrier_wait", &phases, site, [&](auto& operands, unsigned) {
        const std::uint32_t now = byte_barrier(barrier, site).phases;
        for (void* operand : operands) *static_cast<std::uint32_t*>(operand) = now + (now % 2 == (parity & 1));
    });
    while (byte_barrier(barrier, site).phases < phases) {
        current->barrier = static_cast<unsigned>(byte_barrier(barrier, site).offset);
        wait(Wait::kBytes, "mbarrier_wait", site);
    }
    ByteBarrier& here = byte_barrier(barrier, site);
    if (!here.complete.empty()) {
        here.landed = next_epoch();
        for (const BulkLoad& load : here.complete) {
            const Access write{here.landed, code_offset(load.site), load.thread, kByProxy};
            each_granule(load.offset, load.content.size(), [&](std::size_t granule) {
                shared_shadow_.state[granule] = kValid | kInitialised;
                shared_shadow_.history[granule].write = write;
            });
            std::memcpy(shared_.get() + load.offset, load.content.data(), load.content.size());
        }
        here.complete.clear();
    }
    Clock& seen = warps_[current->thread / kWarp].seen;
    join(seen, here.released);
    seen.back() = std::max(seen.back(), here.landed);
}

void Machine::load_bulk(void* shared, const void* global, unsigned bytes, void* barrier, const void* site) {
    require_units(shared, global, bytes, true, site);
    ByteBarrier& here = byte_barrier(barrier, site);
    shared_offset(shared, bytes, true, site);
    if (bytes != 0) access<false>(global, bytes, site);
    std::memcpy(begin_load(shared, bytes, here, site).data(), global, bytes);
    complete_bytes(here, site);
}

void Machine::require_map(const ptx::TensorMap& map, const void* site) {
    if (reinterpret_cast<const Map&>(map).magic != kMapMagic) {
        fail(Check::kCollective, site, "not a tensor's map, or that of a matrix without elements");
    }
}

void Machine::load_box(void* shared, const ptx::TensorMap& tensor, int column, int row, void* barrier, const void* site) {
    require_map(tensor, site);
    const auto& map = reinterpret_cast<const Map&>(tensor);
    require_alignment(shared, kSwizzleBytes, true, site);
    ByteBarrier& here = byte_barrier(barrier, site);
    const std::size_t bytes = map.box_rows * kBoxRow, offset = shared_offset(shared, bytes, true, site);
    // Those rows and columns of the box that the matrix has.
    const auto within = [](std::int64_t corner, std::uint64_t box, std::uint64_t matrix) {
        const std::int64_t end = std::min<std::int64_t>(corner + static_cast<std::int64_t>(box), matrix);
        return std::pair(std::max<std::int64_t>(corner, 0), end);
    };
    const auto [first_row, end_row] = within(row, map.box_rows, map.rows);
    const auto [first_column, end_column] = within(column, map.box_columns, map.columns);
    const std::size_t run = first_column < end_column ? (end_column - first_column) * map.element : 0;
    const auto source = [&](std::int64_t r) {
        return reinterpret_cast<const std::uint8_t*>(map.address + r * map.stride + first_column * map.element);
    };
    for (std::int64_t r = first_row; r < end_row && run > 0; ++r) access<false>(source(r), run, site);
    std::vector<std::uint8_t>& content = begin_load(shared, bytes, here, site);
    for (std::int64_t r = first_row; r < end_row; ++r) {
        for (std::size_t byte = 0; byte < run; ++byte) {
            const std::size_t plain = offset + (r - row) * kBoxRow + (first_column - column) * map.element + byte;
            content[(plain ^ plain / kBoxRow % 8 * kUnit) - offset] = source(r)[byte];
        }
    }
    complete_bytes(here, site);
}

// Bytes are on their way; gives them, zeros so far. What was there before has been read and written, and the proxy has
// seen that.
std::vector<std::uint8_t>& Machine::begin_load(void* shared, std::size_t bytes, ByteBarrier& here, const void* site) {
    require_fenced(here.offset, kBarrierBytes, site);
    const std::size_t offset = shared_offset(shared, bytes, true, site);
    each_granule(offset, bytes, [&](std::size_t granule) {
        const std::uint8_t* at = shared_.get() + granule * kGranule;
        if ((shared_shadow_.state[granule] & kPending) != 0) fail_at(Check::kPending, at, kGranule, true, site);
        require_fence_behind(shared_shadow_.history[granule].write, at, site);
    });
    touch<true>(shared_shadow_, offset, bytes, shared_.get(), site);
    std::memset(shared, kPoison, bytes);
    std::fill_n(shared_shadow_.state.get() + offset / kGranule, bytes / kGranule, std::uint8_t{kValid | kPending});
    here.begun += bytes;
    here.loads.push_back({offset, std::vector<std::uint8_t>(bytes), static_cast<std::uint16_t>(current->thread), site});
    return here.loads.back().content;
}

// The bytes are taken at once: whoever changes them before the wait is found.
void Machine::store_bulk(void* global, const void* shared, unsigned bytes, const void* site) {
    require_units(shared, global, bytes, false, site);
    const std::size_t offset = shared_offset(shared, bytes, false, site);
    require_fenced(offset, bytes, site);
    touch<false>(shared_shadow_, offset, bytes, shared_.get(), site);
    if (bytes != 0) access<true>(global, bytes, site);
    std::memcpy(global, shared, bytes);
    each_granule(offset, bytes, [&](std::size_t granule) { ++readers_[granule]; });
    current->stores.push_back({current->store_groups, offset, bytes, site});
}

void Machine::await_stores(std::uint32_t still_running, const void* site) {
    if (omits(site)) return;
    std::erase_if(current->stores, [&](const BulkStore& store) {
        if (store.group + still_running >= current->store_groups) return false;
        touch<false>(shared_shadow_, store.offset, store.bytes, shared_.get(), site);
        each_granule(store.offset, store.bytes, [&](std::size_t granule) { --readers_[granule]; });
        return true;
    });
}

// At the end of a thread, and with the last one of its block.
void Machine::require_no_bulk_copies(bool last) {
    for (const BulkStore& store : current->stores) {
        fail_at(Check::kUnawaited, shared_.get() + store.offset, store.bytes, false, store.site);
    }
    if (!last) return;
    for (const ByteBarrier& barrier : byte_barriers_) {
        if (rank_of(current->thread) != barrier.offset / kSharedBytes) continue;
        for (const auto& loads : {barrier.loads, barrier.complete}) {
            for (const BulkLoad& load : loads) {
                fail_at(Check::kUnawaited, shared_.get() + load.offset, load.content.size(), true, load.site);
            }
        }
    }
}

}  // namespace dtmem_host

using dtmem_host::machine;

namespace ptx {

void fence_proxy_async() { machine->fence_proxy(SITE); }
void mbarrier_init(std::uint64_t* barrier, unsigned arrivals) { machine->init_bytes(barrier, arrivals, SITE); }
void mbarrier_arrive(std::uint64_t* barrier) { machine->arrive_bytes(barrier, 0, SITE); }
void mbarrier_arrive(std::uint64_t* barrier, unsigned bytes) { machine->arrive_bytes(barrier, bytes, SITE); }
void mbarrier_wait(std::uint64_t* barrier, unsigned parity) { machine->await_bytes(barrier, parity, SITE); }
void bulk_load(void* shared, const void* global, unsigned bytes, std::uint64_t* barrier) {
    machine->load_bulk(shared, global, bytes, barrier, SITE);
}
void tensor_load(void* shared, const TensorMap& map, int column, int row, std::uint64_t* barrier) {
    machine->load_box(shared, map, column, row, barrier, SITE);
}
void tensor_prefetch(const TensorMap& map) { machine->require_map(map, SITE); }
void bulk_store(void* global, const void* shared, unsigned bytes) { machine->store_bulk(global, shared, bytes, SITE); }
void bulk_commit() { machine->commit_stores(); }
template <int kStillRunning> void bulk_wait_read() { machine->await_stores(kStillRunning, SITE); }
template void bulk_wait_read<0>();
template void bulk_wait_read<1>();
template void bulk_wait_read<2>();
template void bulk_wait_read<3>();
template void bulk_wait_read<4>();
template void bulk_wait_read<5>();
template void bulk_wait_read<6>();
template void bulk_wait_read<7>();

}  // namespace ptx
