// What a check found: the first finding of a launch, handed to Rust as it is (ffi.rs mirrors these structures).
#pragma once

#include <cstdint>

namespace dtmem_host {

enum class Check : std::uint32_t {
    kNone,
    kOutOfBounds,
    kReadOnly,
    kUninitialised,
    kPending,     // a word that an asynchronous copy is still on its way to
    kUnawaited,   // a thread ends with an asynchronous copy, or a product of its warpgroup, under way
    kMisaligned,
    kRace,
    kDivergence,  // threads that wait for others that never come
    kCollective,  // a warp instruction with the wrong lanes
    kArithmetic,  // what C++ leaves undefined: array index, shift, division, signed overflow
    kSharedSize,
    kLocal,       // stack overflow, or another thread's local memory
    kRunaway,
    kEnded,       // the shared memory of a block of the cluster that has ended
    kInFlight,    // registers or shared memory that a product of a warpgroup, or a bulk copy, still works on
    kUnfenced,    // the same, used before it without a fence in between
};

enum class Space : std::uint32_t { kNone, kGlobal, kShared };

struct Location {
    const char* file;  // null: not known
    std::uint32_t line;
    std::uint32_t column;
};

struct Where {
    std::uint32_t block[3];
    std::uint32_t thread[3];
    Location location;
};

struct Finding {
    Check check;
    Space space;
    std::uint64_t address;
    std::uint64_t bytes;
    std::uint64_t offset;    // from the start of the argument or variable
    std::uint64_t extent;    // bytes of the argument or variable
    std::int32_t argument;   // index among the kernel's arguments, or −1
    std::uint8_t is_write;
    std::uint8_t other_is_write;
    std::uint8_t has_other;
    std::uint8_t has_address;
    Where where;
    Where other;             // of a race
    char variable[48];
    char detail[512];
};

}  // namespace dtmem_host
