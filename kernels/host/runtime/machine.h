// The state of one executor: global memory, and the cluster of blocks that is running (one block, unless the launch asks
// for more). Clusters run one after another; the threads of a cluster are fibers, switched only where they wait for each
// other.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_host.h"
#include "fiber.h"
#include "finding.h"

namespace dtmem_host {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxWarps = kMaxThreads / kWarp;
constexpr unsigned kMaxCluster = 16;
constexpr unsigned kBarriers = 16;
constexpr unsigned kRegisters = 64 << 10;               // of a multiprocessor
constexpr std::size_t kStackBytes = 64 << 10;
constexpr std::size_t kSharedBytes = 256 << 10;          // of address space: the variables and the gaps between them
constexpr std::size_t kStaticSharedLimit = 48 << 10;
constexpr std::size_t kSharedLimit = 227 << 10;          // of compute capability 9.0
constexpr std::uint8_t kPoison = 0xff;                   // a NaN in f32, bf16 and f16; −1 as an integer

// Memory is followed in granules of two bytes. State, two bits each: which of its bytes exist, which are initialised,
// and whether an asynchronous copy is under way to it.
constexpr std::size_t kGranule = 2;
constexpr std::uint8_t kValid = 0x03, kInitialised = 0x0c, kPending = 0x10;

// Who touched a granule last, and when: `epoch` counts synchronisations, `site` is the code address, `fences` how many
// fences of the asynchronous proxy the thread had behind it. Two readers are kept, so that a write finds one that is not
// itself.
struct Access {
    std::uint32_t epoch = 0;
    std::uint32_t site = 0;
    std::uint16_t thread = 0;
    std::uint16_t fences = 0;
};
struct History {
    Access write, read, other_read;
};
constexpr std::uint16_t kByProxy = UINT16_MAX;  // for `fences`: the asynchronous proxy wrote it itself

struct FreeDeleter {
    void operator()(void* memory) const;
};

// The state and the histories of a piece of memory.
struct Shadow {
    std::unique_ptr<std::uint8_t[], FreeDeleter> state;
    std::unique_ptr<History[], FreeDeleter> history;  // zero pages until touched

    void resize(std::size_t bytes);
};

struct Allocation {
    std::unique_ptr<std::uint8_t[], FreeDeleter> data;
    std::size_t bytes = 0;
    bool initialised = false;  // every byte, from the beginning
    Shadow shadow;

    std::uintptr_t begin() const { return reinterpret_cast<std::uintptr_t>(data.get()); }
};

// What a launch may touch of global memory. Ranges do not overlap.
struct Range {
    std::uintptr_t begin, end;
    Allocation* allocation;
    int argument;
    bool writable;
};

struct SharedVariable {
    const void* site;
    const char* name;
    std::size_t offset, bytes;
};

struct AsyncCopy {
    std::uint32_t group;
    std::size_t offset;  // in shared memory
    const std::uint8_t* source;
    unsigned bytes, source_bytes;
    const void* site;
};

// One entry per warp of the cluster, and one for bulk copies: up to when those are seen that have been waited for.
using Clock = std::vector<std::uint32_t>;

// Adds to a clock what another one has seen.
inline void join(Clock& clock, const Clock& other) {
    clock.resize(std::max(clock.size(), other.size()));
    for (std::size_t w = 0; w < other.size(); ++w) clock[w] = std::max(clock[w], other[w]);
}

// A bulk copy from shared memory.
struct BulkStore {
    std::uint32_t group;
    std::size_t offset, bytes;
    const void* site;
};

// A bulk copy to shared memory, with the bytes that it brings.
struct BulkLoad {
    std::size_t offset;
    std::vector<std::uint8_t> content;
    std::uint16_t thread;
    const void* site;
};

// An mbarrier, which counts arrivals and bytes, phase after phase.
struct ByteBarrier {
    std::size_t offset;                  // in shared memory
    unsigned arrivals, missing;          // of a phase; still to come in this one
    std::uint32_t phases = 0;            // that are over
    std::uint32_t landed = 0;            // when somebody last waited for one
    std::size_t announced = 0, begun = 0;  // bytes of this phase
    std::vector<BulkLoad> loads = {};    // of this phase
    std::vector<BulkLoad> complete = {};  // of phases that are over, and nobody has waited for them yet
    Clock joined = {};                   // what those have seen that arrived
    Clock released = {};                 // the same of the last phase that is over
};

// A product of a warpgroup, as one of its threads gives it.
struct GroupProduct {
    const char* instruction;
    float* d;
    unsigned columns;
    const std::uint32_t* a;  // four registers; null: by descriptor
    std::uint64_t a_descriptor, b_descriptor;
    bool transposed, adds;
    float (*widen)(std::uint32_t);
};

// Registers of a thread that belong to products under way, the last of them in `group`.
struct Accumulators {
    std::uint32_t group;
    float* d;
    std::vector<float> values;  // that they will have
    const void* site;           // of the last product

    std::size_t bytes() const { return values.size() * sizeof(float); }
};
struct Fragment {
    std::uint32_t group;
    const std::uint32_t* a;
};

// What a product under way reads of shared memory, in pieces of 16 bytes, until each of the warps has waited.
struct Reading {
    std::uint32_t group;
    unsigned warps;
    std::vector<std::uint32_t> offsets;
};

enum class Wait : std::uint8_t { kNothing, kBarrier, kWarp, kWarpgroup, kCluster, kBytes, kRegisters };

struct Fiber {
    Context context;
    char* stack = nullptr;
    unsigned thread = 0;           // in the cluster; every block begins with a new warp
    uint3 index{};                 // in the block
    bool done = false;
    Wait wait = Wait::kNothing;
    unsigned barrier = 0;          // its number, or of an mbarrier the offset
    const char* instruction = "";  // that it waits in
    const void* site = nullptr;
    std::uint32_t committed = 0;   // groups of asynchronous copies
    std::vector<AsyncCopy> copies;
    std::uint32_t store_groups = 0;
    std::vector<BulkStore> stores;
    std::vector<std::uint32_t> proxy_fences;  // the epoch of each
    // Products: the groups committed, what is under way, and for each word of the stack (which has the registers) the
    // number of the fence behind which the program used it last. Followed from the block's first fence on.
    std::uint32_t product_groups = 0;
    std::vector<Accumulators> accumulators;
    std::vector<Fragment> fragments;
    bool fenced = false;
    std::uint32_t register_fence = 0;
    std::vector<std::uint32_t> used;
};

// An instruction that the lanes of `mask` execute together. The last to arrive does the work of all.
struct Gathering {
    unsigned mask = 0, arrived = 0;
    const char* instruction = "";
    std::array<void*, kWarp> operands{};
};


struct Warp {
    unsigned lanes = 0;        // that exist
    std::uint32_t epoch = 0;   // stamp of what its threads do now
    Clock seen;                // up to which epoch of each other warp all is known to have happened before
    std::uint32_t arrived = 0, awaited = 0;  // phase of the cluster's barrier: arrived at and not awaited yet, awaited
    unsigned registers = 0;    // of a thread
    std::vector<Gathering> gatherings;
};

// Four warps at a product, which is done when all are there.
struct Warpgroup {
    unsigned arrived = 0;      // warps
    std::uint32_t turn = 0;
    std::array<std::array<GroupProduct, kWarp>, 4> operands;
    std::vector<Reading> readings;
};

struct Barrier {
    unsigned expected = 0, arrived = 0;
    unsigned line = 0;         // of the first to arrive; 0 where barriers of several lines may meet
    const void* site = nullptr;
    std::uint32_t warps = 0;   // of the block, that take part
    Clock joined;              // what the warps that only arrive have seen; empty: none
};

// The barrier of all threads of the cluster, phase after phase.
struct ClusterBarrier {
    std::uint32_t completed = 0;  // phases
    unsigned arrived = 0, ended = 0;
    Clock joined;                 // what those have seen that arrived in this phase
    Clock released;               // the same of the last complete phase
};

struct Block {
    uint3 index{};
    unsigned running = 0;      // threads
    // The warps' clock just after the last barrier of the whole block: what is older has happened before.
    std::uint32_t floor = 0;
    std::array<Barrier, kBarriers> barriers;
};

// One argument: a value's bytes, or a view of global memory, or both for a tensor's map.
struct Argument {
    const void* value;
    std::uint64_t address;
    std::uint64_t bytes;
    std::uint32_t kind;        // Parameter::Kind
};

struct LaunchShape {
    std::uint32_t grid[3];
    std::uint32_t block[3];
    std::uint32_t shared_bytes;
    std::uint32_t cluster;     // blocks, neighbours along x
    std::uint32_t order;       // 0 forward, 1 reversed, 2 shuffled
    std::uint64_t seed;
    std::uint64_t budget;      // memory accesses before the launch counts as a runaway
    const char* omitted_file;  // barriers and waits of this line are left out; null: none
    std::uint32_t omitted_line;
};

class Machine {
public:
    Machine();
    ~Machine();

    std::uint8_t* allocate(std::size_t bytes, const void* content);
    void write(std::uint64_t address, const void* content, std::size_t bytes);
    void release(std::uint8_t* data);
    Allocation* find(std::uint64_t address, std::uint64_t bytes);
    bool launch(const Kernel& kernel, const LaunchShape& shape, const Argument* arguments, std::size_t count,
                Finding& finding);

    // Called by the kernel, on a fiber.
    template <bool kWrite> void access(const void* address, std::size_t bytes, const void* site);
    void* shared_variable(const void* site, const char* name, std::size_t bytes, std::size_t alignment,
                          const void* caller);
    void* dynamic_shared(std::size_t alignment, const void* caller);
    void synchronise(unsigned barrier, unsigned threads, unsigned line, const char* instruction, const void* site);
    void arrive(unsigned barrier, unsigned threads, const char* instruction, const void* site);
    void synchronise_warp(unsigned mask, const void* site);
    void arrive_cluster(const void* site);
    void await_cluster(const void* site);
    // The same place in the shared memory of another block of the cluster.
    void* map_shared(const void* address, unsigned rank, const void* site);
    // Fails where another block has used this one's shared memory, and nobody here waited for that.
    void require_shared_memory_unused(unsigned rank);
    // Waits for the lanes of `mask`, then calls `perform` once with the operands of all of them.
    template <typename Perform>
    void together(unsigned mask, const char* instruction, void* operand, const void* site, Perform perform);
    void require_alignment(const void* address, std::size_t alignment, bool write, const void* site);
    void require_full_warp(const char* instruction, const void* site);
    std::size_t shared_offset(const void* address, std::size_t bytes, bool write, const void* site);
    // Reads a row of shared memory for the lanes of the warp.
    void read_rows(const void* address, std::size_t bytes, const void* site);
    void begin_copy(void* shared, const void* source, unsigned bytes, unsigned source_bytes, const void* site);
    void commit_copies() { ++current->committed; }
    void await_copies(std::uint32_t still_running, const void* site);
    // The asynchronous proxy and its bulk copies (bulk.cpp).
    void fence_proxy(const void* site);
    void init_bytes(void* barrier, unsigned arrivals, const void* site);
    void arrive_bytes(void* barrier, unsigned bytes, const void* site);
    void load_box(void* shared, const ptx::TensorMap& map, int column, int row, void* barrier, const void* site);
    void require_map(const ptx::TensorMap& map, const void* site);
    void await_bytes(void* barrier, unsigned parity, const void* site);
    void load_bulk(void* shared, const void* global, unsigned bytes, void* barrier, const void* site);
    void store_bulk(void* global, const void* shared, unsigned bytes, const void* site);
    void commit_stores() { ++current->store_groups; }
    void await_stores(std::uint32_t still_running, const void* site);
    // Products of warpgroups (warpgroup.cpp).
    std::uint32_t shared_address(const void* address, const void* site);
    void set_registers(unsigned count, bool more, const void* site);
    void fence_registers(const void* site);
    void multiply(const GroupProduct& product, const void* site);
    void commit_products(const void* site);
    void await_products(std::uint32_t still_running, const void* site);
    // Whether this launch leaves out the barrier or wait of this place.
    bool omits(const void* site) const;
    // Reports about the thread of a lane other than the running one.
    struct Blame {
        Machine& machine;
        Fiber* before;
        Blame(Machine& machine, unsigned lane);
        ~Blame() { machine.current = before; }
    };

    [[noreturn]] void fail(Check check, const void* site, const char* format = "", ...)
        __attribute__((format(printf, 4, 5)));
    [[noreturn]] void fail_at(Check check, const void* address, std::size_t bytes, bool write, const void* site,
                              const char* format = "", ...) __attribute__((format(printf, 7, 8)));

    Fiber* current = nullptr;
    uint3 thread, block, block_extent, grid_extent;

private:
    void run_cluster(uint3 first, unsigned blocks, unsigned thread_count);
    void start(Fiber& fiber, unsigned thread);
    void wait(Wait wait, const char* instruction, const void* site);
    void wake(Fiber& fiber);
    void report_divergence();
    template <typename Visit> void each_thread(Visit visit) const;
    unsigned rank_of(unsigned thread) const { return thread / threads_per_block_; }
    std::uint8_t* shared_of(unsigned rank) const { return shared_.get() + rank * kSharedBytes; }
    void complete_cluster_if_all_arrived();
    void finish_thread();
    void complete(unsigned barrier);
    Gathering& gathering(Warp& warp, unsigned mask);
    uint3 index_of(unsigned thread) const;
    Where where(unsigned thread, std::uint32_t epoch, const void* site) const;
    void describe_address(const void* address, std::size_t bytes, bool write);
    void map(const Argument* arguments, std::size_t count);
    const Range* range_of(std::uintptr_t address) const;
    bool before_now(const Access& access) const;
    template <bool kWrite> void access_global(std::uintptr_t address, std::size_t bytes, const void* site);
    template <bool kWrite> void use_registers(std::uintptr_t address, std::size_t bytes, const void* site);
    void require_registers(const void* registers, std::size_t bytes, const GroupProduct& product, const void* site);
    void perform(Warpgroup& group, unsigned first_thread, const void* site);
    void require_fenced(std::size_t offset, std::size_t bytes, const void* site);
    void require_fence_behind(const Access& write, const void* at, const void* site);
    void require_units(const void* shared, const void* global, unsigned bytes, bool load, const void* site);
    std::size_t barrier_offset(const void* barrier, const void* site);
    ByteBarrier& byte_barrier(const void* barrier, const void* site);
    void complete_bytes(ByteBarrier& barrier, const void* site);
    std::vector<std::uint8_t>& begin_load(void* shared, std::size_t bytes, ByteBarrier& barrier, const void* site);
    void require_no_bulk_copies(bool last);
    std::size_t clock_size() const { return warps_.size() + 1; }
    template <bool kWrite>
    void touch(Shadow& shadow, std::size_t offset, std::size_t bytes, const std::uint8_t* base, const void* site);
    [[noreturn]] void race(const Access& earlier, bool earlier_write, const void* address, std::size_t bytes, bool write,
                           const void* site);
    std::uint32_t next_epoch() { return ++epoch_; }
    static void enter();

    std::vector<std::unique_ptr<Allocation>> allocations_;
    std::vector<Range> ranges_;
    const Range* last_range_ = nullptr;

    std::unique_ptr<std::uint8_t[], FreeDeleter> shared_;
    Shadow shared_shadow_;
    std::unique_ptr<std::uint8_t[], FreeDeleter> readers_;  // products and copies under way that read a granule of shared memory
    std::vector<SharedVariable> variables_;
    std::size_t shared_top_ = 0, static_shared_ = 0, dynamic_shared_ = 0;

    char* stacks_ = nullptr;
    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    std::vector<Warpgroup> warpgroups_;
    std::vector<Block> blocks_;
    std::vector<ByteBarrier> byte_barriers_;
    ClusterBarrier cluster_barrier_;
    std::vector<unsigned> ready_, next_ready_;
    unsigned thread_count_ = 0;       // of a block
    unsigned threads_per_block_ = 0;  // the same in whole warps

    std::uint32_t epoch_ = 0, launch_epoch_ = 0, cluster_epoch_ = 0;
    std::vector<std::pair<std::uint32_t, uint3>> cluster_epochs_;  // of this launch, with the first block, for reports
    Context scheduler_;
    const Kernel* kernel_ = nullptr;
    const LaunchShape* shape_ = nullptr;
    const Argument* arguments_ = nullptr;
    std::vector<void*> values_;
    Finding* finding_ = nullptr;
    bool failed_ = false;
    std::uint64_t budget_ = 0, random_ = 0;
};

// The machine whose kernel this system thread is running, if any.
extern thread_local Machine* machine;

// 16 bits as f32.
inline float from_bf16(std::uint32_t bits) { return __bfloat162float({static_cast<std::uint16_t>(bits)}); }
inline float from_f16(std::uint32_t bits) { return __half2float({static_cast<std::uint16_t>(bits)}); }

Location locate(const void* site);
std::uint32_t code_offset(const void* site);  // for Access
const Kernel* kernels();

template <typename Visit>
void Machine::each_thread(Visit visit) const {
    const bool reversed = shape_->order == 1;
    const auto blocks = static_cast<unsigned>(blocks_.size());
    for (unsigned r = 0; r < blocks; ++r) {
        const unsigned first = (reversed ? blocks - 1 - r : r) * threads_per_block_;
        for (unsigned t = 0; t < thread_count_; ++t) visit(first + (reversed ? thread_count_ - 1 - t : t));
    }
}

template <typename Perform>
void Machine::together(unsigned mask, const char* instruction, void* operand, const void* site, Perform perform) {
    const unsigned lane = current->thread % kWarp;
    Warp& warp = warps_[current->thread / kWarp];
    if ((mask >> lane & 1) == 0) {
        fail(Check::kCollective, site, "%s: lane %u is not in its own mask %08x", instruction, lane, mask);
    }
    Gathering& here = gathering(warp, mask);
    if (here.arrived == 0) {
        here.instruction = instruction;
    } else if (here.instruction != instruction) {
        fail(Check::kDivergence, site, "lane %u executes %s where other lanes of its warp execute %s", lane,
             instruction, here.instruction);
    }
    here.operands[lane] = operand;
    here.arrived |= 1u << lane;
    if (here.arrived != (mask & warp.lanes)) {
        wait(Wait::kWarp, instruction, site);
        return;
    }
    perform(here.operands, here.arrived);
    const unsigned others = here.arrived & ~(1u << lane);
    here.arrived = 0;
    const unsigned first = current->thread - lane;
    const bool reversed = shape_->order == 1;
    for (unsigned i = 0; i < kWarp; ++i) {
        const unsigned other = reversed ? kWarp - 1 - i : i;
        if (others >> other & 1) wake(fibers_[first + other]);
    }
}

}  // namespace dtmem_host
