// Global and shared memory: what exists, what is initialised, and who touched it last.
#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace dtmem_host {

namespace {

constexpr std::size_t kAllocationAlignment = 256;  // as cudaMalloc
constexpr std::size_t kSharedGap = 32;             // between shared variables

const void* code_address(std::uint32_t offset) {
    return reinterpret_cast<const char*>(&locate) + static_cast<std::int32_t>(offset);
}

std::size_t round_up(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

std::uint32_t code_offset(const void* site) {
    return static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(site) -
                                      reinterpret_cast<std::uintptr_t>(&locate));
}

// Null content: the memory is poisoned and counts as uninitialised. Null when there is not enough memory.
std::uint8_t* Machine::allocate(std::size_t bytes, const void* content) {
    const std::size_t padded = round_up(bytes, kAllocationAlignment) + kAllocationAlignment;
    auto allocation = std::make_unique<Allocation>();
    allocation->data.reset(static_cast<std::uint8_t*>(std::aligned_alloc(kAllocationAlignment, padded)));
    if (allocation->data == nullptr) return nullptr;
    allocation->bytes = bytes;
    allocation->initialised = content != nullptr;
    allocation->shadow.resize(bytes);
    const std::uint8_t state = allocation->initialised ? kValid | kInitialised : kValid;
    std::fill_n(allocation->shadow.state.get(), (bytes + kGranule - 1) / kGranule, state);
    std::uint8_t* data = allocation->data.get();
    std::memset(data, kPoison, padded);
    if (content != nullptr) std::memcpy(data, content, bytes);
    allocations_.push_back(std::move(allocation));
    return data;
}

// By the host, between launches.
void Machine::write(std::uint64_t address, const void* content, std::size_t bytes) {
    if (bytes == 0) return;
    Allocation* allocation = find(address, bytes);
    const std::size_t offset = address - allocation->begin();
    std::memcpy(allocation->data.get() + offset, content, bytes);
    std::uint8_t* state = allocation->shadow.state.get();
    for (std::size_t at = offset; at < offset + bytes; ++at) state[at / kGranule] |= 4u << at % kGranule;
}

void Machine::release(std::uint8_t* data) {
    std::erase_if(allocations_, [&](const auto& allocation) { return allocation->data.get() == data; });
}

Allocation* Machine::find(std::uint64_t address, std::uint64_t bytes) {
    for (auto& allocation : allocations_) {
        const std::uint64_t offset = address - allocation->begin();
        if (offset <= allocation->bytes && bytes <= allocation->bytes - offset) return allocation.get();
    }
    return nullptr;
}

void Machine::map(const Argument* arguments, std::size_t count) {
    ranges_.clear();
    last_range_ = nullptr;
    std::vector<std::uintptr_t> ends;
    for (std::size_t i = 0; i < count; ++i) {
        if (arguments[i].kind == Parameter::kValue || arguments[i].bytes == 0) continue;
        ends.push_back(arguments[i].address);
        ends.push_back(arguments[i].address + arguments[i].bytes);
    }
    std::sort(ends.begin(), ends.end());
    for (std::size_t e = 1; e < ends.size(); ++e) {
        if (ends[e - 1] == ends[e]) continue;
        Range range{ends[e - 1], ends[e], nullptr, -1, false};
        for (std::size_t i = 0; i < count; ++i) {
            const Argument& argument = arguments[i];
            if (argument.kind == Parameter::kValue || range.begin < argument.address ||
                range.end > argument.address + argument.bytes) {
                continue;
            }
            if (range.argument < 0) range.argument = static_cast<int>(i);
            range.writable |= argument.kind == Parameter::kOutput;
        }
        if (range.argument < 0) continue;
        range.allocation = find(range.begin, range.end - range.begin);
        ranges_.push_back(range);
    }
}

const Range* Machine::range_of(std::uintptr_t address) const {
    for (const Range& range : ranges_) {
        if (address >= range.begin && address < range.end) return &range;
    }
    return nullptr;
}

void* Machine::shared_variable(const void* site, const char* name, std::size_t bytes, std::size_t alignment,
                               const void* caller) {
    for (const SharedVariable& variable : variables_) {
        if (variable.site == site) return shared_of(rank_of(current->thread)) + variable.offset;
    }
    // Aligned as declared and not better, so that code which relies on more is found.
    std::size_t offset = round_up(shared_top_ + kSharedGap, 2 * alignment) + (alignment < 1024 ? alignment : 0);
    if (site != &dynamic_shared_) static_shared_ += bytes;
    if (static_shared_ > kStaticSharedLimit || static_shared_ + dynamic_shared_ > kSharedLimit ||
        offset + bytes > kSharedBytes) {
        fail(Check::kSharedSize, caller, "`%s` makes %zu bytes of static and %zu of dynamic shared memory", name,
             static_shared_, dynamic_shared_);
    }
    variables_.push_back({site, name, offset, bytes});
    // In all blocks of the cluster: others may use it before this one's owner gets here.
    for (unsigned rank = 0; rank < blocks_.size(); ++rank) {
        std::memset(shared_of(rank) + offset, kPoison, bytes);
        std::uint8_t* state = shared_shadow_.state.get() + rank * kSharedBytes / kGranule;
        for (std::size_t at = offset; at < offset + bytes; ++at) state[at / kGranule] |= 1u << at % kGranule;
    }
    shared_top_ = offset + bytes;
    return shared_of(rank_of(current->thread)) + offset;
}

void* Machine::dynamic_shared(std::size_t alignment, const void* caller) {
    return shared_variable(&dynamic_shared_, "(dynamic)", dynamic_shared_, alignment, caller);
}

bool Machine::before_now(const Access& access) const {
    if (access.fences == kByProxy) return access.epoch <= warps_[current->thread / kWarp].seen.back();
    const unsigned rank = rank_of(current->thread);
    if (rank_of(access.thread) == rank && access.epoch < blocks_[rank].floor) return true;
    const unsigned warp = current->thread / kWarp, other = access.thread / kWarp;
    if (warp == other) return access.thread == current->thread || access.epoch < warps_[warp].epoch;
    return access.epoch <= warps_[warp].seen[other];
}

template <bool kWrite>
void Machine::touch(Shadow& shadow, std::size_t offset, std::size_t bytes, const std::uint8_t* base, const void* site) {
    const bool shared = &shadow == &shared_shadow_;
    const Access now{warps_[current->thread / kWarp].epoch, code_offset(site),
                     static_cast<std::uint16_t>(current->thread),
                     static_cast<std::uint16_t>(current->proxy_fences.size())};
    auto concurrent = [&](const Access& access) {
        if (access.epoch < cluster_epoch_) return !shared && access.epoch >= launch_epoch_;  // another cluster's
        return !before_now(access);
    };
    const std::size_t end = offset + bytes;
    for (std::size_t at = offset; at < end; at = (at / kGranule + 1) * kGranule) {
        const std::size_t granule = at / kGranule;
        const unsigned mask = at % kGranule != 0 ? 2 : end - at == 1 ? 1 : 3;
        std::uint8_t& state = shadow.state[granule];
        if ((state & mask) != mask) fail_at(Check::kOutOfBounds, base + offset, bytes, kWrite, site);
        if ((state & kPending) != 0) fail_at(Check::kPending, base + offset, bytes, kWrite, site);
        if constexpr (kWrite) {
            if (shared && readers_[granule] != 0) {
                fail_at(Check::kInFlight, base + offset, bytes, kWrite, site, "a product or a copy still needs it");
            }
            state |= mask << 2;
        } else if ((state >> 2 & mask) != mask) {
            fail_at(Check::kUninitialised, base + offset, bytes, kWrite, site);
        }
        if (mask != 3) continue;  // two threads may own one byte each
        History& history = shadow.history[granule];
        if (concurrent(history.write)) race(history.write, true, base + offset, bytes, kWrite, site);
        if constexpr (kWrite) {
            if (concurrent(history.read)) race(history.read, false, base + offset, bytes, kWrite, site);
            if (concurrent(history.other_read)) race(history.other_read, false, base + offset, bytes, kWrite, site);
            history.write = now;
        } else {
            (concurrent(history.read) ? history.other_read : history.read) = now;
        }
    }
}

template void Machine::touch<false>(Shadow&, std::size_t, std::size_t, const std::uint8_t*, const void*);
template void Machine::touch<true>(Shadow&, std::size_t, std::size_t, const std::uint8_t*, const void*);

void Machine::race(const Access& earlier, bool earlier_write, const void* address, std::size_t bytes, bool write,
                   const void* site) {
    finding_->has_other = 1;
    finding_->other_is_write = earlier_write;
    finding_->other = where(earlier.thread, earlier.epoch, code_address(earlier.site));
    fail_at(Check::kRace, address, bytes, write, site);
}

template <bool kWrite>
void Machine::access(const void* address, std::size_t bytes, const void* site) {
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    if (at - reinterpret_cast<std::uintptr_t>(current->stack) < kStackBytes) {
        if (current->fenced) use_registers<kWrite>(at, bytes, site);
        return;
    }
    if (--budget_ == 0) fail(Check::kRunaway, site);
    const std::uintptr_t offset = at - reinterpret_cast<std::uintptr_t>(shared_.get());
    if (offset < blocks_.size() * kSharedBytes) {
        if (bytes > kSharedBytes - offset % kSharedBytes) fail_at(Check::kOutOfBounds, address, bytes, kWrite, site);
        if (blocks_[offset / kSharedBytes].running == 0) fail_at(Check::kEnded, address, bytes, kWrite, site);
        touch<kWrite>(shared_shadow_, offset, bytes, shared_.get(), site);
    } else {
        access_global<kWrite>(at, bytes, site);
    }
}
template void Machine::access<false>(const void*, std::size_t, const void*);
template void Machine::access<true>(const void*, std::size_t, const void*);

template <bool kWrite>
void Machine::access_global(std::uintptr_t at, std::size_t bytes, const void* site) {
    const auto address = reinterpret_cast<const void*>(at);
    if (at - reinterpret_cast<std::uintptr_t>(stacks_) < fibers_.size() * kStackBytes) {
        fail_at(Check::kLocal, address, bytes, kWrite, site, "local memory of another thread");
    }
    const std::uintptr_t end = at + bytes;
    while (at < end) {
        if (last_range_ == nullptr || at < last_range_->begin || at >= last_range_->end) {
            const Range* found = range_of(at);
            if (found == nullptr) fail_at(Check::kOutOfBounds, address, bytes, kWrite, site);
            last_range_ = found;
        }
        const Range& range = *last_range_;
        if (kWrite && !range.writable) fail_at(Check::kReadOnly, address, bytes, kWrite, site);
        const std::size_t piece = std::min(end, range.end) - at;
        Allocation& allocation = *range.allocation;
        if (range.writable || !allocation.initialised) {
            touch<kWrite>(allocation.shadow, at - allocation.begin(), piece, allocation.data.get(), site);
        }
        at += piece;
    }
}

void Machine::describe_address(const void* address, std::size_t bytes, bool write) {
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    finding_->has_address = 1;
    finding_->address = at;
    finding_->bytes = bytes;
    finding_->is_write = write;
    std::uintptr_t in_shared = at - reinterpret_cast<std::uintptr_t>(shared_.get());
    if (in_shared < blocks_.size() * kSharedBytes) {
        in_shared %= kSharedBytes;
        finding_->space = Space::kShared;
        const SharedVariable* nearest = nullptr;
        for (const SharedVariable& variable : variables_) {
            if (variable.offset <= in_shared || nearest == nullptr) nearest = &variable;
        }
        if (nearest == nullptr) return;
        finding_->offset = in_shared - nearest->offset;
        finding_->extent = nearest->bytes;
        std::strncpy(finding_->variable, nearest->name, sizeof finding_->variable - 1);
        return;
    }
    finding_->space = Space::kGlobal;
    std::uintptr_t least = 1 << 20;  // what is further away from every argument is a wild address
    for (std::size_t i = 0; i < values_.size(); ++i) {
        const Argument& argument = arguments_[i];
        if (argument.kind == Parameter::kValue || argument.bytes == 0) continue;
        const std::uintptr_t distance = at < argument.address                    ? argument.address - at
                                        : at >= argument.address + argument.bytes ? at - argument.address - argument.bytes + 1
                                                                                  : 0;
        if (distance >= least) continue;
        least = distance;
        finding_->argument = static_cast<std::int32_t>(i);
        finding_->offset = at - argument.address;
        finding_->extent = argument.bytes;
    }
}

void Machine::require_alignment(const void* address, std::size_t alignment, bool write, const void* site) {
    if (reinterpret_cast<std::uintptr_t>(address) % alignment != 0) {
        fail_at(Check::kMisaligned, address, alignment, write, site);
    }
}

std::size_t Machine::shared_offset(const void* address, std::size_t bytes, bool write, const void* site) {
    const std::uintptr_t offset =
        reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(shared_.get());
    const unsigned rank = rank_of(current->thread);
    if (offset - rank * kSharedBytes >= kSharedBytes || bytes > kSharedBytes - offset % kSharedBytes) {
        fail_at(Check::kOutOfBounds, address, bytes, write, site, "not shared memory of this block");
    }
    return offset;
}

void Machine::read_rows(const void* address, std::size_t bytes, const void* site) {
    const std::size_t offset = shared_offset(address, bytes, false, site);
    touch<false>(shared_shadow_, offset, bytes, shared_.get(), site);
    // The row goes to other lanes: what this lane itself wrote also has to be synchronised with them.
    const std::uint32_t epoch = warps_[current->thread / kWarp].epoch;
    for (std::size_t granule = offset / kGranule; granule < (offset + bytes) / kGranule; ++granule) {
        const Access& write = shared_shadow_.history[granule].write;
        if (write.epoch == epoch && write.thread == current->thread) {
            race(write, true, address, bytes, false, site);
        }
    }
}

void Machine::require_shared_memory_unused(unsigned rank) {
    const unsigned first_warp = rank * threads_per_block_ / kWarp;
    const std::size_t first = rank * kSharedBytes / kGranule;
    for (std::size_t granule = first; granule < first + shared_top_ / kGranule; ++granule) {
        const History& history = shared_shadow_.history[granule];
        for (const Access& access : {history.write, history.read, history.other_read}) {
            if (access.epoch < cluster_epoch_ || rank_of(access.thread) == rank) continue;
            bool awaited = false;
            for (unsigned w = 0; w < threads_per_block_ / kWarp; ++w) {
                awaited |= access.epoch <= warps_[first_warp + w].seen[access.thread / kWarp];
            }
            if (awaited) continue;
            current = &fibers_[access.thread];
            fail_at(Check::kEnded, shared_.get() + granule * kGranule, kGranule, false, code_address(access.site),
                    "nothing keeps block %u of the cluster from ending before this", rank);
        }
    }
}

void* Machine::map_shared(const void* address, unsigned rank, const void* site) {
    const auto offset = reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(shared_.get());
    if (offset >= blocks_.size() * kSharedBytes) fail(Check::kCollective, site, "map_shared: not shared memory");
    if (rank >= blocks_.size()) {
        fail(Check::kCollective, site, "map_shared: block %u of a cluster of %zu", rank, blocks_.size());
    }
    return shared_of(rank) + offset % kSharedBytes;
}

// The bytes are poisoned now and come at the wait. Until then nobody may touch them, as the copy may happen at any time.
void Machine::begin_copy(void* shared, const void* source, unsigned bytes, unsigned source_bytes, const void* site) {
    require_alignment(shared, bytes, true, site);
    require_alignment(source, bytes, false, site);
    if (source_bytes > bytes) fail(Check::kCollective, site, "a copy of %u bytes out of %u", bytes, source_bytes);
    const std::size_t offset = shared_offset(shared, bytes, true, site);
    if (source_bytes != 0) access<false>(source, source_bytes, site);
    touch<true>(shared_shadow_, offset, bytes, shared_.get(), site);
    std::memset(shared, kPoison, bytes);
    for (std::size_t granule = offset / kGranule; granule < (offset + bytes) / kGranule; ++granule) {
        shared_shadow_.state[granule] = kValid | kPending;
    }
    current->copies.push_back(
        {current->committed, offset, static_cast<const std::uint8_t*>(source), bytes, source_bytes, site});
}

void Machine::await_copies(std::uint32_t still_running, const void* site) {
    if (omits(site)) return;
    auto landed = [&](const AsyncCopy& copy) {
        if (copy.group + still_running >= current->committed) return false;
        for (std::size_t granule = copy.offset / kGranule; granule < (copy.offset + copy.bytes) / kGranule; ++granule) {
            shared_shadow_.state[granule] = kValid;
        }
        touch<true>(shared_shadow_, copy.offset, copy.bytes, shared_.get(), site);
        std::uint8_t* target = shared_.get() + copy.offset;
        std::memset(target, 0, copy.bytes);
        if (copy.source_bytes != 0) std::memcpy(target, copy.source, copy.source_bytes);
        return true;
    };
    std::erase_if(current->copies, landed);
}

}  // namespace dtmem_host
