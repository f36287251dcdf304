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
    shared_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(1024, kSharedBytes)));
    void* stacks = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (shared_ == nullptr || stacks == MAP_FAILED) std::abort();
    stacks_ = static_cast<char*>(stacks);
    shared_shadow_.resize(kSharedBytes);
}

Machine::~Machine() { munmap(stacks_, kMaxThreads * kStackBytes); }

uint3 Machine::index_of(unsigned thread) const {
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
        shared_shadow_.resize(kSharedBytes);
        for (auto& allocation : allocations_) {
            allocation->shadow.history.reset(zeroed<History>((allocation->bytes + kGranule - 1) / kGranule));
        }
    }
    launch_epoch_ = next_epoch();
    block_epochs_.clear();
    map(arguments, count);
    values_.clear();
    for (std::size_t i = 0; i < count; ++i) {
        const Argument& argument = arguments[i];
        values_.push_back(const_cast<void*>(argument.kind == Parameter::kValue ? argument.value : &argument.address));
    }

    const std::uint64_t blocks = std::uint64_t{grid_extent.x} * grid_extent.y * grid_extent.z;
    std::vector<std::uint64_t> order;
    if (shape.order == 2) {
        for (std::uint64_t i = 0; i < blocks; ++i) order.push_back(i);
        shuffle(order, random_);
    }
    machine = this;
    for (std::uint64_t i = 0; i < blocks && !failed_; ++i) {
        const std::uint64_t b = shape.order == 2 ? order[i] : shape.order == 1 ? blocks - 1 - i : i;
        block = {static_cast<unsigned>(b % grid_extent.x), static_cast<unsigned>(b / grid_extent.x % grid_extent.y),
                 static_cast<unsigned>(b / grid_extent.x / grid_extent.y)};
        run_block(block_extent.x * block_extent.y * block_extent.z);
    }
    machine = nullptr;
    return !failed_;
}

void Machine::run_block(unsigned thread_count) {
    thread_count_ = thread_count;
    std::fill_n(shared_shadow_.state.get(), shared_top_ / kGranule + 1, std::uint8_t{0});
    shared_top_ = static_shared_ = 0;
    variables_.clear();
    dynamic_ = nullptr;
    block_epoch_ = floor = next_epoch();
    block_epochs_.emplace_back(block_epoch_, block);
    const unsigned warps = (thread_count + kWarp - 1) / kWarp;
    for (unsigned w = 0; w < warps; ++w) {
        const unsigned lanes = std::min(kWarp, thread_count - w * kWarp);
        warps_[w].lanes = lanes == kWarp ? ~0u : (1u << lanes) - 1;
        warps_[w].epoch = block_epoch_;
        warps_[w].seen.fill(0);
        warps_[w].gatherings.clear();
    }
    barriers_.fill({});
    if (fibers_.size() < thread_count) fibers_.resize(thread_count);
    ready_.clear();
    next_ready_.clear();
    for (unsigned i = 0; i < thread_count; ++i) {
        const unsigned t = shape_->order == 1 ? thread_count - 1 - i : i;
        start(fibers_[t], t);
        next_ready_.push_back(t);
    }
    unsigned running = thread_count;
    while (running > 0) {
        if (next_ready_.empty()) return report_divergence(thread_count);
        ready_.swap(next_ready_);
        next_ready_.clear();
        if (shape_->order == 2) shuffle(ready_, random_);
        for (unsigned t : ready_) {
            Fiber& fiber = fibers_[t];
            current = &fiber;
            thread = fiber.index;
            switch_to(scheduler_, fiber.context);
            if (!failed_ && *reinterpret_cast<std::uint64_t*>(fiber.stack) != kCanary) {
                failed_ = true;
                finding_->check = Check::kLocal;
                finding_->where = where(t, block_epoch_, nullptr);
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
    current->done = true;
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
    Barrier& barrier = barriers_[id];
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
    barrier.warps |= 1u << current->thread / kWarp;
    current->barrier = id;
    if (++barrier.arrived < barrier.expected) return wait(Wait::kBarrier, instruction, site);
    complete(id);
}

void Machine::arrive(unsigned id, unsigned threads, const char* instruction, const void* site) {
    if (omits(site)) return;
    together(~0u, instruction, nullptr, site, [&](auto&, unsigned lanes) {
        Barrier& barrier = barriers_[id % kBarriers];
        if (id >= kBarriers || threads % kWarp != 0 || (barrier.arrived != 0 && barrier.expected != threads)) {
            fail(Check::kCollective, site, "%s %u with %u threads", instruction, id, threads);
        }
        Warp& warp = warps_[current->thread / kWarp];
        for (unsigned w = 0; w < kMaxWarps; ++w) barrier.joined[w] = std::max(barrier.joined[w], warp.seen[w]);
        barrier.joined[current->thread / kWarp] = warp.epoch;
        warp.epoch = next_epoch();
        barrier.expected = threads;
        barrier.arrived += static_cast<unsigned>(__builtin_popcount(lanes));
        if (barrier.arrived >= barrier.expected) complete(id);
    });
}

void Machine::complete(unsigned id) {
    Barrier& barrier = barriers_[id];
    if (barrier.expected == thread_count_) {
        floor = next_epoch();
        for (unsigned w = 0; w * kWarp < thread_count_; ++w) warps_[w].epoch = floor;
    } else {
        Clock joined = barrier.joined;
        for (unsigned p = 0; p < kMaxWarps; ++p) {
            if ((barrier.warps >> p & 1) == 0) continue;
            for (unsigned w = 0; w < kMaxWarps; ++w) joined[w] = std::max(joined[w], warps_[p].seen[w]);
            joined[p] = std::max(joined[p], warps_[p].epoch);
        }
        const std::uint32_t epoch = next_epoch();
        for (unsigned p = 0; p < kMaxWarps; ++p) {
            if ((barrier.warps >> p & 1) == 0) continue;
            warps_[p].seen = joined;
            warps_[p].epoch = epoch;
        }
    }
    barrier = {};
    for (unsigned i = 0; i < thread_count_; ++i) {
        Fiber& fiber = fibers_[shape_->order == 1 ? thread_count_ - 1 - i : i];
        if (fiber.wait == Wait::kBarrier && fiber.barrier == id && !fiber.done) wake(fiber);
    }
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
    for (const auto& [start, index] : block_epochs_) {
        if (start <= epoch) b = index;
    }
    const uint3 index = index_of(t);
    return {{b.x, b.y, b.z}, {index.x, index.y, index.z}, locate(site)};
}

void Machine::report_divergence(unsigned thread_count) {
    failed_ = true;
    finding_->check = Check::kDivergence;
    struct Group {
        const char* instruction;  // null: ended
        Location location;
        unsigned first, count;
    };
    std::vector<Group> groups;
    const Fiber* waiting = nullptr;
    for (unsigned t = 0; t < thread_count; ++t) {
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
        add("%s%u of %u threads, from (%u, %u, %u), ", used == 0 ? "" : "; ", group.count, thread_count, first.x,
            first.y, first.z);
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
