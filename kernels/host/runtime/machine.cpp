// Launches: blocks, threads, barriers, and what is reported when threads wait in vain.
#include "machine.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

namespace dtmem_host {

thread_local Machine* machine = nullptr;

namespace {

constexpr std::uint64_t kCanary = 0x5ca1ab1e0ddba115;

template <typename T>
T* zeroed(std::size_t count) {
    void* memory = std::calloc(count + 1, sizeof(T));
    if (memory == nullptr) std::abort();
    return static_cast<T*>(memory);
}

std::uint64_t next_random(std::uint64_t& state) {  // SplitMix64
    std::uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

template <typename T>
void shuffle(std::vector<T>& items, std::uint64_t& state) {
    for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next_random(state) % i]);
}

}  // namespace

void FreeDeleter::operator()(void* memory) const { std::free(memory); }

void Shadow::resize(std::size_t bytes) {
    const std::size_t granules = (bytes + kGranule - 1) / kGranule;
    state.reset(zeroed<std::uint8_t>(granules));
    history.reset(zeroed<History>(granules));
}

Machine::Machine() {
    shared_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(1024, kMaxCluster * kSharedBytes)));
    void* stacks = mmap(nullptr, kMaxCluster * kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (shared_ == nullptr || stacks == MAP_FAILED) std::abort();
    stacks_ = static_cast<char*>(stacks);
    shared_shadow_.resize(kMaxCluster * kSharedBytes);
    readers_.reset(zeroed<std::uint8_t>(kMaxCluster * kSharedBytes / kGranule));
}

Machine::~Machine() { munmap(stacks_, kMaxCluster * kMaxThreads * kStackBytes); }

uint3 Machine::index_of(unsigned thread) const {
    thread %= threads_per_block_;
    return {thread % block_extent.x, thread / block_extent.x % block_extent.y,
            thread / (block_extent.x * block_extent.y)};
}

bool Machine::launch(const Kernel& kernel, const LaunchShape& shape, const Argument* arguments, std::size_t count,
                     Finding& finding) {
    kernel_ = &kernel;
    shape_ = &shape;
    arguments_ = arguments;
    finding_ = &finding;
    finding = {};
    finding.argument = -1;
    failed_ = false;
    budget_ = shape.budget;
    random_ = shape.seed;
    grid_extent = {shape.grid[0], shape.grid[1], shape.grid[2]};
    block_extent = {shape.block[0], shape.block[1], shape.block[2]};
    dynamic_shared_ = shape.shared_bytes;
    if (epoch_ > UINT32_MAX / 2) {  // all history is older than this launch anyway
        epoch_ = 0;
        shared_shadow_.resize(kMaxCluster * kSharedBytes);
        for (auto& allocation : allocations_) {
            allocation->shadow.history.reset(zeroed<History>((allocation->bytes + kGranule - 1) / kGranule));
        }
    }
    launch_epoch_ = next_epoch();
    cluster_epochs_.clear();
    map(arguments, count);
    values_.clear();
    for (std::size_t i = 0; i < count; ++i) {
        const Argument& argument = arguments[i];
        const bool is_pointer = argument.kind == Parameter::kInput || argument.kind == Parameter::kOutput;
        values_.push_back(const_cast<void*>(is_pointer ? &argument.address : argument.value));
    }

    const unsigned wide = grid_extent.x / shape.cluster;
    const std::uint64_t clusters = std::uint64_t{wide} * grid_extent.y * grid_extent.z;
    std::vector<std::uint64_t> order;
    if (shape.order == 2) {
        for (std::uint64_t i = 0; i < clusters; ++i) order.push_back(i);
        shuffle(order, random_);
    }
    machine = this;
    for (std::uint64_t i = 0; i < clusters && !failed_; ++i) {
        const std::uint64_t c = shape.order == 2 ? order[i] : shape.order == 1 ? clusters - 1 - i : i;
        const uint3 first = {static_cast<unsigned>(c % wide) * shape.cluster,
                             static_cast<unsigned>(c / wide % grid_extent.y),
                             static_cast<unsigned>(c / wide / grid_extent.y)};
        run_cluster(first, shape.cluster, block_extent.x * block_extent.y * block_extent.z);
    }
    machine = nullptr;
    return !failed_;
}

void Machine::run_cluster(uint3 first, unsigned blocks, unsigned thread_count) {
    for (unsigned rank = 0; rank < blocks_.size(); ++rank) {  // of the cluster before
        for (std::uint8_t* all : {shared_shadow_.state.get(), readers_.get()}) {
            std::fill_n(all + rank * kSharedBytes / kGranule, shared_top_ / kGranule + 1, std::uint8_t{0});
        }
    }
    shared_top_ = static_shared_ = 0;
    variables_.clear();
    const unsigned warps = (thread_count + kWarp - 1) / kWarp;
    thread_count_ = thread_count;
    threads_per_block_ = warps * kWarp;
    cluster_epoch_ = next_epoch();
    cluster_epochs_.emplace_back(cluster_epoch_, first);
    blocks_.assign(blocks, {});
    warps_.resize(blocks * warps);
    warpgroups_.assign(blocks * warps / 4 + 1, {});
    cluster_barrier_ = {};
    cluster_barrier_.joined.assign(clock_size(), 0);
    byte_barriers_.clear();
    for (unsigned rank = 0; rank < blocks; ++rank) {
        blocks_[rank].index = {first.x + rank, first.y, first.z};
        blocks_[rank].running = thread_count;
        blocks_[rank].floor = cluster_epoch_;
        for (unsigned w = 0; w < warps; ++w) {
            Warp& warp = warps_[rank * warps + w];
            const unsigned lanes = std::min(kWarp, thread_count - w * kWarp);
            warp.lanes = lanes == kWarp ? ~0u : (1u << lanes) - 1;
            warp.epoch = cluster_epoch_;
            warp.seen.assign(clock_size(), 0);
            warp.arrived = warp.awaited = 0;
            warp.registers = kRegisters / (warps * kWarp) / 8 * 8;
            warp.gatherings.clear();
        }
    }
    if (fibers_.size() < blocks * threads_per_block_) fibers_.resize(blocks * threads_per_block_);
    ready_.clear();
    next_ready_.clear();
    each_thread([this](unsigned t) {
        start(fibers_[t], t);
        next_ready_.push_back(t);
    });
    unsigned running = blocks * thread_count;
    while (running > 0) {
        if (next_ready_.empty()) return report_divergence();
        ready_.swap(next_ready_);
        next_ready_.clear();
        if (shape_->order == 2) shuffle(ready_, random_);
        for (unsigned t : ready_) {
            Fiber& fiber = fibers_[t];
            current = &fiber;
            thread = fiber.index;
            block = blocks_[rank_of(t)].index;
            switch_to(scheduler_, fiber.context);
            if (!failed_ && *reinterpret_cast<std::uint64_t*>(fiber.stack) != kCanary) {
                failed_ = true;
                finding_->check = Check::kLocal;
                finding_->where = where(t, cluster_epoch_, nullptr);
                std::snprintf(finding_->detail, sizeof finding_->detail, "more than %zu bytes of stack", kStackBytes);
            }
            if (failed_) return;
            if (fiber.done) --running;
        }
    }
}

void Machine::start(Fiber& fiber, unsigned t) {
    fiber.stack = stacks_ + t * kStackBytes;
    fiber.thread = t;
    fiber.index = index_of(t);
    fiber.done = false;
    fiber.wait = Wait::kNothing;
    fiber.committed = 0;
    fiber.copies.clear();
    fiber.store_groups = 0;
    fiber.stores.clear();
    fiber.proxy_fences.clear();
    fiber.product_groups = 0;
    fiber.accumulators.clear();
    fiber.fragments.clear();
    fiber.fenced = false;
    *reinterpret_cast<std::uint64_t*>(fiber.stack) = kCanary;
    prepare(fiber.context, fiber.stack, kStackBytes, &Machine::enter);
}

void Machine::enter() {
    machine->kernel_->invoke(machine->kernel_->function, machine->values_.data());
    machine->finish_thread();
}

void Machine::finish_thread() {
    for (const AsyncCopy& copy : current->copies) {
        fail_at(Check::kUnawaited, shared_.get() + copy.offset, copy.bytes, true, copy.site);
    }
    for (const Accumulators& product : current->accumulators) {
        fail(Check::kUnawaited, product.site, "a product of the warpgroup");
    }
    const unsigned rank = rank_of(current->thread);
    require_no_bulk_copies(blocks_[rank].running == 1);
    current->done = true;
    if (blocks_[rank].running == 1 && blocks_.size() > 1) require_shared_memory_unused(rank);
    --blocks_[rank].running;
    ++cluster_barrier_.ended;
    complete_cluster_if_all_arrived();
    switch_to(current->context, scheduler_);
    std::abort();  // a thread that has ended is never resumed
}

void Machine::wait(Wait reason, const char* instruction, const void* site) {
    if (--budget_ == 0) fail(Check::kRunaway, site);
    Fiber& fiber = *current;
    fiber.wait = reason;
    fiber.instruction = instruction;
    fiber.site = site;
    switch_to(fiber.context, scheduler_);
}

void Machine::wake(Fiber& fiber) {
    fiber.wait = Wait::kNothing;
    next_ready_.push_back(fiber.thread);
}

bool Machine::omits(const void* site) const {
    if (shape_->omitted_file == nullptr) return false;
    const Location location = locate(site);
    return location.file != nullptr && location.line == shape_->omitted_line &&
           std::strcmp(location.file, shape_->omitted_file) == 0;
}

void Machine::synchronise(unsigned id, unsigned threads, unsigned line, const char* instruction, const void* site) {
    if (omits(site)) return;
    if (id >= kBarriers || threads == 0 || threads % kWarp != 0) {
        if (threads != thread_count_) fail(Check::kCollective, site, "%s %u with %u threads", instruction, id, threads);
    }
    Barrier& barrier = blocks_[rank_of(current->thread)].barriers[id];
    if (barrier.arrived == 0) {
        barrier.expected = threads;
        barrier.line = line;
        barrier.site = site;
    } else if (barrier.expected != threads) {
        fail(Check::kDivergence, site, "%s %u for %u threads, where others wait for %u", instruction, id, threads,
             barrier.expected);
    } else if (barrier.line != line) {
        const Location there = locate(barrier.site);
        fail(Check::kDivergence, site, "other threads of the block wait in another %s, at %s:%u", instruction,
             there.file != nullptr ? there.file : "line", barrier.line);
    }
    barrier.warps |= 1u << current->thread % threads_per_block_ / kWarp;
    current->barrier = id;
    if (++barrier.arrived < barrier.expected) return wait(Wait::kBarrier, instruction, site);
    complete(id);
}

void Machine::arrive(unsigned id, unsigned threads, const char* instruction, const void* site) {
    if (omits(site)) return;
    together(~0u, instruction, nullptr, site, [&](auto&, unsigned lanes) {
        Barrier& barrier = blocks_[rank_of(current->thread)].barriers[id % kBarriers];
        if (id >= kBarriers || threads % kWarp != 0 || (barrier.arrived != 0 && barrier.expected != threads)) {
            fail(Check::kCollective, site, "%s %u with %u threads", instruction, id, threads);
        }
        Warp& warp = warps_[current->thread / kWarp];
        barrier.joined.resize(clock_size());
        join(barrier.joined, warp.seen);
        barrier.joined[current->thread / kWarp] = warp.epoch;
        warp.epoch = next_epoch();
        barrier.expected = threads;
        barrier.arrived += static_cast<unsigned>(__builtin_popcount(lanes));
        if (barrier.arrived >= barrier.expected) complete(id);
    });
}

void Machine::complete(unsigned id) {
    const unsigned rank = rank_of(current->thread), first_warp = rank * threads_per_block_ / kWarp;
    Block& here = blocks_[rank];
    Barrier& barrier = here.barriers[id];
    const bool whole = barrier.expected == thread_count_;
    const std::uint32_t epoch = next_epoch();
    if (whole) here.floor = epoch;
    if (!whole || blocks_.size() > 1 || !byte_barriers_.empty()) {
        Clock joined = std::move(barrier.joined);
        joined.resize(clock_size());
        auto each_warp = [&](auto visit) {
            for (unsigned w = 0; w < threads_per_block_ / kWarp; ++w) {
                if ((barrier.warps >> w & 1) != 0) visit(first_warp + w);
            }
        };
        each_warp([&](unsigned w) {
            join(joined, warps_[w].seen);
            joined[w] = std::max(joined[w], warps_[w].epoch);
        });
        each_warp([&](unsigned w) { warps_[w].seen = joined; });
    }
    for (unsigned w = 0; w < threads_per_block_ / kWarp; ++w) {
        if (whole || (barrier.warps >> w & 1) != 0) warps_[first_warp + w].epoch = epoch;
    }
    barrier = {};
    each_thread([&](unsigned t) {
        Fiber& fiber = fibers_[t];
        if (rank_of(t) == rank && fiber.wait == Wait::kBarrier && fiber.barrier == id && !fiber.done) wake(fiber);
    });
}

void Machine::arrive_cluster(const void* site) {
    if (omits(site)) return;
    together(~0u, "cluster_arrive", nullptr, site, [&](auto&, unsigned lanes) {
        Warp& warp = warps_[current->thread / kWarp];
        if (warp.arrived != 0) fail(Check::kCollective, site, "cluster_arrive twice without cluster_wait in between");
        warp.arrived = cluster_barrier_.completed + 1;
        join(cluster_barrier_.joined, warp.seen);
        cluster_barrier_.joined[current->thread / kWarp] = warp.epoch;
        warp.epoch = next_epoch();
        cluster_barrier_.arrived += static_cast<unsigned>(__builtin_popcount(lanes));
        complete_cluster_if_all_arrived();
    });
}

// Threads that have ended count as arrived.
void Machine::complete_cluster_if_all_arrived() {
    ClusterBarrier& barrier = cluster_barrier_;
    if (barrier.arrived == 0 || barrier.arrived + barrier.ended < blocks_.size() * thread_count_) return;
    ++barrier.completed;
    barrier.arrived = 0;
    barrier.released = barrier.joined;
    each_thread([this](unsigned t) {
        if (fibers_[t].wait == Wait::kCluster && !fibers_[t].done) wake(fibers_[t]);
    });
}

void Machine::await_cluster(const void* site) {
    if (omits(site)) return;
    Warp& warp = warps_[current->thread / kWarp];
    together(~0u, "cluster_wait", nullptr, site, [&](auto&, unsigned) {
        if (warp.arrived == 0) fail(Check::kCollective, site, "cluster_wait without cluster_arrive before");
        warp.awaited = warp.arrived;
        warp.arrived = 0;
    });
    if (cluster_barrier_.completed < warp.awaited) wait(Wait::kCluster, "cluster_wait", site);
    join(warp.seen, cluster_barrier_.released);
}

void Machine::synchronise_warp(unsigned mask, const void* site) {
    if (omits(site)) return;
    together(mask, "__syncwarp", nullptr, site,
             [this](auto&, unsigned) { warps_[current->thread / kWarp].epoch = next_epoch(); });
}

Gathering& Machine::gathering(Warp& warp, unsigned mask) {
    Gathering* free = nullptr;
    for (Gathering& open : warp.gatherings) {
        if (open.arrived == 0) free = &open;
        else if (open.mask == mask) return open;
    }
    if (free == nullptr) free = &warp.gatherings.emplace_back();
    free->mask = mask;
    return *free;
}

void Machine::require_full_warp(const char* instruction, const void* site) {
    const unsigned lanes = warps_[current->thread / kWarp].lanes;
    if (lanes != ~0u) fail(Check::kCollective, site, "%s needs 32 lanes, this warp has mask %08x", instruction, lanes);
}

Where Machine::where(unsigned t, std::uint32_t epoch, const void* site) const {
    uint3 b = block;
    for (const auto& [start, first] : cluster_epochs_) {
        if (start <= epoch) b = {first.x + rank_of(t), first.y, first.z};
    }
    const uint3 index = index_of(t);
    return {{b.x, b.y, b.z}, {index.x, index.y, index.z}, locate(site)};
}

void Machine::report_divergence() {
    failed_ = true;
    finding_->check = Check::kDivergence;
    struct Group {
        const char* instruction;  // null: ended
        Location location;
        unsigned first, count;
    };
    std::vector<Group> groups;
    const Fiber* waiting = nullptr;
    for (unsigned t = 0; t < blocks_.size() * threads_per_block_; ++t) {
        if (t % threads_per_block_ >= thread_count_) continue;
        const Fiber& fiber = fibers_[t];
        if (!fiber.done && waiting == nullptr) waiting = &fiber;
        const char* instruction = fiber.done ? nullptr : fiber.instruction;
        const Location location = fiber.done ? Location{} : locate(fiber.site);
        auto same = [&](const Group& group) {
            return group.instruction == instruction && group.location.file == location.file &&
                   group.location.line == location.line && group.location.column == location.column;
        };
        const auto found = std::find_if(groups.begin(), groups.end(), same);
        if (found == groups.end()) groups.push_back({instruction, location, t, 1});
        else ++found->count;
    }
    finding_->where = where(waiting->thread, epoch_, waiting->site);
    std::size_t used = 0;
    auto add = [&](const char* format, auto... arguments) {
        const std::size_t left = sizeof finding_->detail - used;
        const int written = std::snprintf(finding_->detail + used, left, format, arguments...);
        used += std::min(left - 1, static_cast<std::size_t>(std::max(written, 0)));
    };
    for (const Group& group : groups) {
        const uint3 first = index_of(group.first);
        add("%s%u of %zu threads, from ", used == 0 ? "" : "; ", group.count, blocks_.size() * thread_count_);
        if (blocks_.size() > 1) add("block %u of the cluster ", rank_of(group.first));
        add("(%u, %u, %u), ", first.x, first.y, first.z);
        if (group.instruction == nullptr) add("%s", "have ended");
        else if (group.location.file == nullptr) add("wait in %s", group.instruction);
        else add("wait in %s at %s:%u", group.instruction, group.location.file, group.location.line);
    }
}

Machine::Blame::Blame(Machine& machine, unsigned lane) : machine(machine), before(machine.current) {
    machine.current = &machine.fibers_[before->thread / kWarp * kWarp + lane];
}

void Machine::fail(Check check, const void* site, const char* format, ...) {
    finding_->check = check;
    finding_->where = where(current->thread, epoch_, site);
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(finding_->detail, sizeof finding_->detail, format, arguments);
    va_end(arguments);
    failed_ = true;
    Context abandoned;
    switch_to(abandoned, scheduler_);
    std::abort();
}

void Machine::fail_at(Check check, const void* address, std::size_t bytes, bool write, const void* site,
                      const char* format, ...) {
    describe_address(address, bytes, write);
    std::va_list arguments;
    va_start(arguments, format);
    char detail[sizeof finding_->detail];
    std::vsnprintf(detail, sizeof detail, format, arguments);
    va_end(arguments);
    fail(check, site, "%s", detail);
}

}  // namespace dtmem_host
