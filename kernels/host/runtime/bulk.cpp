// The asynchronous proxy's copies in bulk, as ptx.cuh has them, and its fence.
//
// A load's bytes are poisoned when it begins and arrive when somebody waits for the phase of its barrier: until then any
// access to them is a finding. A phase ends when its arrivals have come and all bytes that they announced are on their
// way. It orders nothing but these bytes: what the program itself wrote wants a barrier of threads.
#include <cstring>

#include "../../ptx.cuh"
#include "machine.h"

#define SITE __builtin_return_address(0)

namespace dtmem_host {

namespace {

constexpr unsigned kUnit = 16;            // of sizes and addresses
constexpr std::size_t kBarrierBytes = 8;
constexpr unsigned kMostArrivals = (1u << 20) - 1;

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
    barrier.complete.insert(barrier.complete.end(), barrier.loads.begin(), barrier.loads.end());
    barrier.loads.clear();
    each_thread([&](unsigned t) {
        Fiber& fiber = fibers_[t];
        if (fiber.wait == Wait::kBytes && fiber.barrier == barrier.offset && !fiber.done) wake(fiber);
    });
}

void Machine::await_bytes(void* barrier, unsigned parity, const void* site) {
    if (omits(site)) return;
    require_full_warp("mbarrier_wait", site);
    together(~0u, "mbarrier_wait", nullptr, site, [](auto&, unsigned) {});
    const std::size_t offset = byte_barrier(barrier, site).offset;
    const auto over = [&] { return byte_barrier(barrier, site).phases % 2 != (parity & 1); };
    while (!over()) {
        current->barrier = static_cast<unsigned>(offset);
        wait(Wait::kBytes, "mbarrier_wait", site);
    }
    ByteBarrier& here = byte_barrier(barrier, site);
    if (!here.complete.empty()) {
        here.landed = next_epoch();
        for (const BulkLoad& load : here.complete) {
            const Access write{here.landed, code_offset(load.site), load.thread, kByProxy};
            each_granule(load.offset, load.bytes, [&](std::size_t granule) {
                shared_shadow_.state[granule] = kValid | kInitialised;
                shared_shadow_.history[granule].write = write;
            });
            std::memcpy(shared_.get() + load.offset, load.source, load.bytes);
        }
        here.complete.clear();
    }
    std::uint32_t& seen = warps_[current->thread / kWarp].seen.back();
    seen = std::max(seen, here.landed);
}

void Machine::load_bulk(void* shared, const void* global, unsigned bytes, void* barrier, const void* site) {
    require_units(shared, global, bytes, true, site);
    ByteBarrier& here = byte_barrier(barrier, site);
    require_fenced(here.offset, kBarrierBytes, site);
    const std::size_t offset = shared_offset(shared, bytes, true, site);
    if (bytes != 0) access<false>(global, bytes, site);
    each_granule(offset, bytes, [&](std::size_t granule) {
        const std::uint8_t* at = shared_.get() + granule * kGranule;
        if ((shared_shadow_.state[granule] & kPending) != 0) fail_at(Check::kPending, at, kGranule, true, site);
        require_fence_behind(shared_shadow_.history[granule].write, at, site);
    });
    touch<true>(shared_shadow_, offset, bytes, shared_.get(), site);
    std::memset(shared, kPoison, bytes);
    std::fill_n(shared_shadow_.state.get() + offset / kGranule, bytes / kGranule, std::uint8_t{kValid | kPending});
    here.begun += bytes;
    here.loads.push_back({offset, static_cast<const std::uint8_t*>(global), bytes,
                          static_cast<std::uint16_t>(current->thread), site});
    complete_bytes(here, site);
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
                fail_at(Check::kUnawaited, shared_.get() + load.offset, load.bytes, true, load.site);
            }
        }
    }
}

}  // namespace dtmem_host

using dtmem_host::machine;

namespace ptx {

void fence_proxy_async() { machine->fence_proxy(SITE); }
void mbarrier_init(std::uint64_t* barrier, unsigned arrivals) { machine->init_bytes(barrier, arrivals, SITE); }
void mbarrier_arrive(std::uint64_t* barrier, unsigned bytes) { machine->arrive_bytes(barrier, bytes, SITE); }
void mbarrier_wait(std::uint64_t* barrier, unsigned parity) { machine->await_bytes(barrier, parity, SITE); }
void bulk_load(void* shared, const void* global, unsigned bytes, std::uint64_t* barrier) {
    machine->load_bulk(shared, global, bytes, barrier, SITE);
}
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
