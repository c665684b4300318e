// Fibers: see fiber.h. This file is compiled without sanitizers; SHIM_ASAN or SHIM_TSAN says which
// sanitizer the kernels are compiled with.
#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#ifdef SHIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SHIM_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#ifdef SHIM_TSAN
// Called for volatile accesses (--param tsan-distinguish-volatile). Kernels use them for words that
// others may change at any time, so they are no race.
#define VOLATILE(bytes)                                                                           \
    extern "C" __attribute__((visibility("default"))) void __tsan_volatile_read##bytes(void*) {}  \
    extern "C" __attribute__((visibility("default"))) void __tsan_volatile_write##bytes(void*) {}
VOLATILE(1)
VOLATILE(2)
VOLATILE(4)
VOLATILE(8)
VOLATILE(16)
#endif

namespace shim {

namespace {
#ifdef SHIM_ASAN
constexpr size_t STACK = 256 << 10;   // instrumented frames are larger
#else
constexpr size_t STACK = 96 << 10;
#endif
constexpr size_t PAGE = 4096;

#ifdef SHIM_ASAN
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;

void (*entry_of_all)();
void first_entry() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
    entry_of_all();
}
#endif
#ifdef SHIM_TSAN
void* scheduler_tsan;
// 1: a switch orders nothing. Only barriers do, so a race in shared memory is seen.
constexpr unsigned NO_ORDER = 1;
#endif
}  // namespace

void* scheduler_stack_pointer;

void prepare(Fiber& fiber, unsigned number, void (*entry)()) {
    if (!fiber.stack) {
        void* memory = mmap(nullptr, PAGE + STACK, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, PAGE, PROT_NONE)) {
            perror("shim: a stack for a fiber");
            abort();
        }
        fiber.stack = static_cast<char*>(memory) + PAGE;   // a page without access ends the stack
#ifdef SHIM_TSAN
        fiber.tsan = __tsan_create_fiber(0);
#endif
    }
#ifdef SHIM_ASAN
    entry_of_all = entry;
    entry = first_entry;
#endif
    // Stacks whose addresses differ by a power of two would all fall into the same few cache sets.
    char* top = fiber.stack + STACK - number % 64 * 192;
    void** slots = reinterpret_cast<void**>(top);
    slots[-1] = nullptr;   // `entry` has no caller
    slots[-2] = reinterpret_cast<void*>(entry);
    fiber.stack_pointer = slots - 2;
}

#ifdef SHIM_TSAN
void before_enter(Fiber& fiber) {
    scheduler_tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber.tsan, NO_ORDER);
}
void after_enter() {}
void before_leave(Fiber&, bool) { __tsan_switch_to_fiber(scheduler_tsan, NO_ORDER); }
void after_leave(Fiber&) {}

void acquire(void* address) { __tsan_acquire(address); }
void release(void* address) { __tsan_release(address); }
#endif

#ifdef SHIM_ASAN
void before_enter(Fiber& fiber) {
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, STACK);
}
void after_enter() { __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr); }
void before_leave(Fiber& fiber, bool forever) {
    // Without a place to save the fake stack, AddressSanitizer frees it.
    __sanitizer_start_switch_fiber(forever ? nullptr : &fiber.asan_fake_stack, scheduler_stack,
                                   scheduler_stack_size);
}
void after_leave(Fiber& fiber) {
    __sanitizer_finish_switch_fiber(fiber.asan_fake_stack, &scheduler_stack, &scheduler_stack_size);
}
#endif

void abandon(Fiber& fiber) {
#ifdef SHIM_ASAN
    __asan_unpoison_memory_region(fiber.stack, STACK);
#else
    (void)fiber;
#endif
}

}  // namespace shim
