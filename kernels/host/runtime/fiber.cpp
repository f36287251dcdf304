#include "fiber.h"

#ifdef DTMEM_UCONTEXT

namespace dtmem_host {

void prepare(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack;
    context.context.uc_stack.ss_size = bytes;
    context.context.uc_link = nullptr;
    makecontext(&context.context, entry, 0);
}

void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

}  // namespace dtmem_host

#else

extern "C" void dtmem_host_switch(void** from, void* to);

#if defined(__APPLE__)
#define SYMBOL "_dtmem_host_switch"
#else
#define SYMBOL "dtmem_host_switch"
#endif

#if defined(__x86_64__)

// The registers that a function preserves, by the System V convention.
asm(".text\n.globl " SYMBOL "\n" SYMBOL ":\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
constexpr int kSaved = 6;        // words that the switch pops before the return address
constexpr int kEntry = kSaved;   // the word among them (or just above) that it goes on at
constexpr int kFrame = kSaved + 2;

#else

// x19–x30 and d8–d15, by the AAPCS64.
asm(".text\n.globl " SYMBOL "\n" SYMBOL ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
constexpr int kEntry = 11;  // x30
constexpr int kFrame = 20;

#endif

namespace dtmem_host {

void prepare(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<std::uintptr_t>(stack + bytes) & ~std::uintptr_t{63};
    void** frame = reinterpret_cast<void**>(top) - kFrame;
    for (int i = 0; i < kFrame; ++i) frame[i] = nullptr;
    frame[kEntry] = reinterpret_cast<void*>(entry);
    context.stack_pointer = frame;
}

void switch_to(Context& from, Context& to) { dtmem_host_switch(&from.stack_pointer, to.stack_pointer); }

}  // namespace dtmem_host

#endif
