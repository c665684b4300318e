// What the stand-in of libcuda offers beside the functions of CUDA: to tests, which find these
// functions by dlsym, and to the stand-ins of other libraries, which enqueue work on its streams.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define STANDIN_API extern "C" __attribute__((visibility("default")))

// --- For tests --------------------------------------------------------------------------------

// Starts a new series of random choices, forgets what standin_skip and standin_fail had asked for,
// and sets all counters to 0. Work, memory and errors stay.
STANDIN_API void standin_reset(uint64_t seed);

// The n-th `kind` from now on (0: the next) is dropped, as if the program lacked it. A negative n
// drops none. Returns how many of the kind there were since the last standin_skip of that kind, or
// since standin_reset. Kinds:
//   "event wait"    cuStreamWaitEvent
//   "event record"  cuEventRecord: the event keeps what it recorded before
//   "value wait"    cuStreamWaitValue32_v2
//   "value write"   cuStreamWriteValue32_v2
//   "host wait"     cuStreamSynchronize, cuEventSynchronize and cuCtxSynchronize return at once
// An unknown kind returns UINT64_MAX.
STANDIN_API uint64_t standin_skip(const char* kind, int64_t n);

// The same for calls of this thread alone, which standin_reset does not change.
STANDIN_API uint64_t standin_skip_here(const char* kind, int64_t n);

// The n-th call of `what` from now on (0: the next) fails with this error of CUDA. A negative n
// withdraws that. `what` is the name of a function of CUDA, such as "cuMemAlloc_v2". Or it is a
// kind of work, which then fails when it runs, so that its context is lost: "kernel", "copy",
// "memset", "product", "operation" (any of them).
STANDIN_API void standin_fail(const char* what, int64_t n, int error);

// Counters since the start or the last standin_reset.
struct StandinCounters {
    uint64_t calls;             // of all functions of CUDA
    uint64_t allocations;       // cuMemAlloc, cuMemCreate, cuMemHostAlloc, cuMemHostRegister
    uint64_t frees;
    uint64_t launches;          // of kernels
    uint64_t products;          // of matrices
    uint64_t copies;
    uint64_t copied_bytes;
    uint64_t memsets;
    uint64_t host_waits;        // calls that block until a stream has finished work
    uint64_t queries;           // cuStreamQuery, cuEventQuery
    uint64_t event_waits, event_records, value_waits, value_writes;
    uint64_t modules;           // loaded
    uint64_t operations_run;    // on all streams
    uint64_t bytes_in_use;      // device memory of all devices, now; standin_reset keeps it
};
STANDIN_API void standin_counters(StandinCounters* counters, size_t bytes);
// How often one function of CUDA was called since the start or the last standin_reset.
STANDIN_API uint64_t standin_calls(const char* function);

// --- For the stand-ins of other libraries ------------------------------------------------------

// Appends work to a stream. `run` returns an error of CUDA, or 0; it may take long. If there is a
// `ready`, the work waits until `ready` returns true; it is called often and must be quick. `drop`
// frees `state`, whether the work ran or not. `kind` counts in standin_counters and standin_fail.
STANDIN_API int standin_enqueue(void* stream, const char* kind, bool (*ready)(void*),
                                int (*run)(void*), void (*drop)(void*), void* state);
// 0 if work on this stream may access these bytes of device memory now. Otherwise prints why not
// and returns an error of CUDA. `bytes` may be 0.
STANDIN_API int standin_check(void* stream, const void* memory, size_t bytes, const char* what);
// Wakes whoever waits for a stream, because some `ready` may have changed.
STANDIN_API void standin_wake();
// Counts a call of `function`. Returns the error that standin_fail asked for, or 0.
STANDIN_API int standin_call(const char* function);
