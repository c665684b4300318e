// The parts of the stand-in of libcuda share these types. driver/*.cpp each handle one subject.
#pragma once
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "standin.h"

namespace standin {

// Numbers of CUDA's errors.
enum Result : int {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    STUB_LIBRARY = 34,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    PEER_ACCESS_UNSUPPORTED = 217,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    LAUNCH_TIMEOUT = 702,
    PEER_ACCESS_ALREADY_ENABLED = 704,
    PRIMARY_CONTEXT_ACTIVE = 708,
    HOST_MEMORY_ALREADY_REGISTERED = 712,
    HOST_MEMORY_NOT_REGISTERED = 713,
    MISALIGNED_ADDRESS = 716,
    LAUNCH_FAILED = 719,
    NOT_PERMITTED = 800,
    NOT_SUPPORTED = 801,
};

using Pointer = unsigned long long;   // CUdeviceptr

struct Stream;

// A point in a stream: it is reached when the stream has done `count` operations.
struct Point {
    Stream* stream = nullptr;
    uint64_t count = 0;
};

struct Operation {
    std::string kind;                // "kernel", "copy", ..., for standin_fail and messages
    std::string name;                // for messages
    std::vector<Point> after;        // these points come first
    std::function<bool()> ready;     // if there is one: called with the lock held
    std::function<int()> run;        // called without the lock
    uint64_t number = 0;             // operations are numbered as they are enqueued
};

struct Context {
    int device;
    int error = OK;                  // sticky: once set, all work of the context is lost
    int references = 0;
    unsigned flags = 0;
    Stream* null_stream = nullptr;
    std::vector<int> peers;          // devices whose memory kernels may access
};

// Streams and events are never deleted, so that a late use of one can be reported.
struct Stream {
    Context* context = nullptr;
    int number = 0;                  // for messages
    bool blocking = false;           // waits for the null stream, and the null stream for it
    bool destroyed = false;
    bool running = false;            // some thread runs an operation of it
    std::deque<Operation> queue;
    uint64_t enqueued = 0, done = 0;
};
struct Event {
    Context* context = nullptr;
    bool timed = true;
    bool destroyed = false;
    Point recorded;                  // by the latest cuEventRecord
    std::shared_ptr<std::chrono::steady_clock::time_point> time;
};

// One lock guards everything but memory's table. Work runs without it.
extern std::mutex lock;
extern std::condition_variable changed;
using Guard = std::unique_lock<std::mutex>;

// --- control.cpp ---
extern StandinCounters counters;
extern uint64_t seed;
uint64_t random_number();
void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
int refuse(int error, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Counts the call. Returns an error that standin_fail asked for, or 0.
int begin_call(const char* function);
// True if standin_skip asks to drop this one.
bool skipped(const char* kind);
// The error that standin_fail wants for work of this kind, or 0.
int failure_of(const std::string& kind);
long setting(const char* name, long otherwise);   // a number from the environment

// --- device.cpp ---
constexpr int MULTIPROCESSORS = 132;
extern bool initialized;
extern thread_local Context* current;
int devices();
size_t device_memory();
Context* context_of(int device);
// 0 if a call may go on: cuInit was called, a context is current, and it has no error.
int check_current();

// --- streams.cpp ---
extern thread_local bool in_host_function;
// The stream that a handle names, or null (after a message) if it names none.
Stream* stream_of(void* handle);
Stream* new_stream(Context* context, bool blocking);
// These need the lock. `run_until` may give it up for a while.
Point enqueue(Stream* stream, Operation operation);
int run_until(Guard& guard, Point goal, const char* who);
int run_context(Guard& guard, Context* context, const char* who);
// Runs a few operations at random, as time that passes would.
void run_some(Guard& guard);
void start_idle_thread();

// --- memory.cpp, vmm.cpp ---
enum class Kind { DEVICE, MAPPED, HOST };
struct Region {
    Pointer start = 0;
    size_t bytes = 0;
    Kind kind = Kind::DEVICE;
    int device = 0;
    uint64_t accessible = 0;         // MAPPED: bit d is set if device d may access it
    bool freed = false;
};
extern std::mutex memory_lock;
// These two need memory_lock. Freed regions stay known, for messages.
void add_region(const Region& region);
// The region, freed or not, that holds the address.
Region* region_of(Pointer address);
bool is_host_memory_of_cuda(Pointer address, size_t bytes);
int check_access(Context* context, Pointer address, size_t bytes, const char* what);
int take_memory(int device, size_t bytes);   // OK or OUT_OF_MEMORY
void give_memory(int device, size_t bytes);
constexpr size_t PAGE = 4096;
inline size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

}  // namespace standin

#define CUDA(name, ...) STANDIN_API int name(__VA_ARGS__)
// The start of every function: counts the call, and lets standin_fail make it fail.
#define CALL()                                                    \
    Guard guard(lock);                                            \
    if (int error = begin_call(__func__)) return error;           \
    if (!initialized) return NOT_INITIALIZED
#define CALL_IN_CONTEXT() \
    CALL();               \
    if (int error = check_current()) return error
