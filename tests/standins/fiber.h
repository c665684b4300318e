// Fibers: stacks that one thread of the operating system switches between.
//
// The sanitizers are told of each switch. Without that, AddressSanitizer reports nonsense about
// stacks and ThreadSanitizer takes all fibers of a block for one thread.
#pragma once
#include <stddef.h>

#ifndef __x86_64__
#error "write switch_stacks and prepare for this processor"
#endif

namespace shim {

struct Fiber {
    void* stack_pointer = nullptr;   // where the fiber goes on; valid while it does not run
    char* stack = nullptr;
    void* tsan = nullptr;            // ThreadSanitizer's name for this fiber
    void* asan_fake_stack = nullptr;
};

// Gives the fiber a stack, the first time, and lets it start in `entry`. `entry` never returns: it
// calls `finish`. `number` spreads the stacks over the sets of the caches.
void prepare(Fiber& fiber, unsigned number, void (*entry)());
// Forgets what an unfinished fiber had on its stack.
void abandon(Fiber& fiber);

// Edges for ThreadSanitizer: all that happened before `release` of an address happened before what
// follows an `acquire` of it. Without ThreadSanitizer they do nothing.
#ifdef SHIM_TSAN
constexpr bool RACES_ARE_SOUGHT = true;
void acquire(void* address);
void release(void* address);
#else
constexpr bool RACES_ARE_SOUGHT = false;
inline void acquire(void*) {}
inline void release(void*) {}
#endif

// What the sanitizers are told before and after a switch.
#if defined(SHIM_ASAN) || defined(SHIM_TSAN)
void before_enter(Fiber& fiber);
void after_enter();
void before_leave(Fiber& fiber, bool forever);
void after_leave(Fiber& fiber);
#else
inline void before_enter(Fiber&) {}
inline void after_enter() {}
inline void before_leave(Fiber&, bool) {}
inline void after_leave(Fiber&) {}
#endif

extern void* scheduler_stack_pointer;   // while a fiber runs

// Leaves this stack, so that a later switch to *save goes on here, and goes on where `to` was left.
// It is inlined and ends in a jump, because the processor predicts returns by the calls before
// them. The 128 bytes below the stack pointer may be in use.
__attribute__((always_inline)) inline void switch_stacks(void** save, void* to) {
    asm volatile(
        "leaq -128(%%rsp), %%rsp\n\t"
        "pushq %%rbp\n\t"
        "leaq 1f(%%rip), %%rax\n\t"
        "pushq %%rax\n\t"
        "movq %%rsp, (%0)\n\t"
        "movq %1, %%rsp\n\t"
        "popq %%rax\n\t"
        "jmp *%%rax\n"
        "1:\n\t"
        "popq %%rbp\n\t"
        "leaq 128(%%rsp), %%rsp"
        : "+D"(save), "+S"(to)
        :
        : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0",
          "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
          "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");
}

// The scheduler runs `fiber` until the fiber calls `leave` or `finish`.
__attribute__((always_inline)) inline void enter(Fiber& fiber) {
    before_enter(fiber);
    switch_stacks(&scheduler_stack_pointer, fiber.stack_pointer);
    after_enter();
}
__attribute__((always_inline)) inline void leave(Fiber& fiber) {
    before_leave(fiber, false);
    switch_stacks(&fiber.stack_pointer, scheduler_stack_pointer);
    after_leave(fiber);
}
[[noreturn]] inline void finish(Fiber& fiber) {
    before_leave(fiber, true);
    switch_stacks(&fiber.stack_pointer, scheduler_stack_pointer);
    __builtin_trap();
}

}  // namespace shim
