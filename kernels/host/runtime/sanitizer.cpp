// The functions that the compiler calls in instrumented kernels: -fsanitize=thread makes it announce every access to
// memory that is not a register, -fsanitize=alignment,bounds,… every use of what C++ leaves undefined. The sanitizers'
// own libraries are not linked: the executor answers these calls.
#include "machine.h"

using dtmem_host::Check;
using dtmem_host::machine;

namespace {

// Outside of a launch only registrations run.
template <bool kWrite>
inline void access(const void* address, std::size_t bytes, const void* site) {
    if (machine != nullptr) machine->access<kWrite>(address, bytes, site);
}

// What the compiler knows about the place (a fixed layout).
struct Source {
    const char* file;
    std::uint32_t line, column;
};
struct Mismatch {
    Source source;
    const void* type;
    std::uint8_t alignment_bits;
    std::uint8_t kind;  // 0 a load, 1 a store, and other uses of an address
};

[[noreturn]] void undefined(const char* what, const void* site) { machine->fail(Check::kArithmetic, site, "%s", what); }

}  // namespace

extern "C" {

#define ACCESS(BYTES)                                                                                                    \
    void __tsan_read##BYTES(void* p) { access<false>(p, BYTES, __builtin_return_address(0)); }                           \
    void __tsan_write##BYTES(void* p) { access<true>(p, BYTES, __builtin_return_address(0)); }
#define UNALIGNED_ACCESS(BYTES)                                                                                          \
    void __tsan_unaligned_read##BYTES(void* p) { access<false>(p, BYTES, __builtin_return_address(0)); }                 \
    void __tsan_unaligned_write##BYTES(void* p) { access<true>(p, BYTES, __builtin_return_address(0)); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
UNALIGNED_ACCESS(2)
UNALIGNED_ACCESS(4)
UNALIGNED_ACCESS(8)
UNALIGNED_ACCESS(16)

void __tsan_read_range(void* p, std::size_t bytes) { access<false>(p, bytes, __builtin_return_address(0)); }
void __tsan_write_range(void* p, std::size_t bytes) { access<true>(p, bytes, __builtin_return_address(0)); }
void __tsan_init() {}

void __ubsan_handle_type_mismatch_v1(const Mismatch* data, std::uintptr_t address) {
    machine->fail_at(Check::kMisaligned, reinterpret_cast<const void*>(address), std::size_t{1} << data->alignment_bits,
                     data->kind == 1, __builtin_return_address(0));
}

#define UNDEFINED(NAME, WHAT)                                                                                            \
    void __ubsan_handle_##NAME() { undefined(WHAT, __builtin_return_address(0)); }
UNDEFINED(out_of_bounds, "an index outside of its array")
UNDEFINED(shift_out_of_bounds, "a shift by more than the bits, or of a negative number")
UNDEFINED(divrem_overflow, "an integer division by zero, or one that overflows")
UNDEFINED(add_overflow, "a sum that overflows")
UNDEFINED(sub_overflow, "a difference that overflows")
UNDEFINED(mul_overflow, "a product that overflows")
UNDEFINED(negate_overflow, "a negation that overflows")

}  // extern "C"
