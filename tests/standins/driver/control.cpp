// Settings, messages, counters, and the functions by which tests steer the stand-in.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../driver.h"

namespace standin {

std::mutex lock;
std::condition_variable changed;
StandinCounters counters;
uint64_t seed = setting("PILLION_STANDIN_SEED", 1);

namespace {

uint64_t state = seed;
// These are never deleted, because the idle thread may use them while the process exits.
auto& calls = *new std::map<std::string, uint64_t>;

struct Failure {
    uint64_t left;   // calls before the one that fails
    int error;
};
auto& failures = *new std::map<std::string, Failure>;

struct Skip {
    uint64_t seen = 0;
    int64_t left = -1;   // negative: skip none
};
auto& skips = *new std::map<std::string, Skip>{{"event wait", {}},
                                               {"event record", {}},
                                               {"value wait", {}},
                                               {"value write", {}},
                                               {"host wait", {}}};
// Of the calling thread alone.
thread_local std::map<std::string, Skip> skips_here;

bool is_skipped(Skip& skip) {
    skip.seen++;
    return skip.left >= 0 && skip.left-- == 0;
}
uint64_t set_skip(Skip& skip, int64_t n) {
    uint64_t seen = skip.seen;
    skip = {0, n};
    return seen;
}

int take_failure(const std::string& what) {
    auto found = failures.find(what);
    if (found == failures.end()) return OK;
    if (found->second.left > 0) {
        found->second.left--;
        return OK;
    }
    int error = found->second.error;
    failures.erase(found);
    say("%s fails with error %d, because the test asked for it", what.c_str(), error);
    return error;
}

}  // namespace

long setting(const char* name, long otherwise) {
    const char* value = getenv(name);
    return value && *value ? atol(value) : otherwise;
}

uint64_t random_number() {
    state += 0x9e3779b97f4a7c15;
    uint64_t x = state;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

static void print(const char* format, va_list arguments) {
    char text[1024];
    vsnprintf(text, sizeof text, format, arguments);
    fprintf(stderr, "[stand-in for libcuda, no GPU] %s\n", text);
}
void say(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    print(format, arguments);
    va_end(arguments);
}
int refuse(int error, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    print(format, arguments);
    va_end(arguments);
    return error;
}

int begin_call(const char* function) {
    if (in_host_function)
        return refuse(NOT_PERMITTED, "%s: a host function may not call CUDA", function);
    counters.calls++;
    calls[function]++;
    return take_failure(function);
}

bool skipped(const char* kind) {
    bool skipped = is_skipped(skips[kind]);
    return is_skipped(skips_here[kind]) || skipped;
}

int failure_of(const std::string& kind) {
    if (int error = take_failure(kind)) return error;
    return take_failure("operation");
}

}  // namespace standin

using namespace standin;

void standin_reset(uint64_t new_seed) {
    Guard guard(lock);
    seed = state = new_seed;
    failures.clear();
    for (auto& [kind, skip] : skips) skip = {};
    calls.clear();
    uint64_t bytes = counters.bytes_in_use;
    counters = {};
    counters.bytes_in_use = bytes;
}

uint64_t standin_skip(const char* kind, int64_t n) {
    Guard guard(lock);
    auto found = skips.find(kind);
    return found == skips.end() ? UINT64_MAX : set_skip(found->second, n);
}

uint64_t standin_skip_here(const char* kind, int64_t n) {
    Guard guard(lock);
    return skips.count(kind) ? set_skip(skips_here[kind], n) : UINT64_MAX;
}

void standin_fail(const char* what, int64_t n, int error) {
    Guard guard(lock);
    failures.erase(what);
    if (n >= 0) failures[what] = {(uint64_t)n, error};
}

void standin_counters(StandinCounters* out, size_t bytes) {
    Guard guard(lock);
    memcpy(out, &counters, bytes < sizeof counters ? bytes : sizeof counters);
}

uint64_t standin_calls(const char* function) {
    Guard guard(lock);
    auto found = calls.find(function);
    return found == calls.end() ? 0 : found->second;
}

int standin_call(const char* function) {
    Guard guard(lock);
    return begin_call(function);
}
