// Threads of execution that are switched by hand: each has a stack, and runs until it switches to another.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(__aarch64__)
#define DTMEM_UCONTEXT
#endif
#ifdef DTMEM_UCONTEXT
#include <ucontext.h>
#endif

namespace dtmem_host {

// Where a suspended fiber goes on.
struct Context {
#ifdef DTMEM_UCONTEXT
    ucontext_t context;
#else
    void* stack_pointer = nullptr;
#endif
};

// Makes `context` enter `entry`, which must not return, on the given stack.
void prepare(Context& context, char* stack, std::size_t bytes, void (*entry)());

// Suspends the running fiber into `from` and resumes `to`.
void switch_to(Context& from, Context& to);

}  // namespace dtmem_host
