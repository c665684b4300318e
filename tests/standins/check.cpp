// Launches every kernel with random shapes, under a sanitizer: build OUT asan, or build OUT tsan.
//   OUT/check-asan [ROUNDS] [KERNEL] [SEED]
// The sanitizer finds accesses outside of buffers, misaligned vectors, or races. This program finds
// results that depend on the order of threads, on what shared memory or an output held before, and
// kernels that write although the latch is set. Whether results are right is for the Rust tests.
#include "check.h"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>

#include "fiber.h"

namespace check {

uint64_t Case::random() {
    state += 0x9e3779b97f4a7c15;
    uint64_t x = state;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

Case::Case(const std::string& name, uint64_t seed) : kernel(name), base(name), state(seed) {
    for (;;) {   // cut the types off the end
        size_t cut = base.rfind('_');
        std::string word = cut == std::string::npos ? "" : base.substr(cut + 1);
        Type type = word == "f32" ? F32 : word == "bf16" ? BF16 : NONE;
        if (type == NONE && word != "none") break;
        types.insert(types.begin(), type);
        base.resize(cut);
    }
    aligned = random() % 3 == 0;
}

u64 Case::number(u64 least, u64 most) {
    u64 x = least + random() % (most - least + 1);
    switch (random() % 6) {
        case 0: return least;
        case 1: return most;
        case 2: case 3: return x / 8 * 8 >= least ? x / 8 * 8 : x;
        default: return x;
    }
}

Buffer& Case::add(Buffer::Use use, Type type, u64 count) {
    size_t offset = aligned ? 0 : random() % 16 * size_of(type) % 32;
    size_t bytes = count * size_of(type);
    buffers.push_back({use, bytes, offset, std::unique_ptr<char[]>(new char[offset + bytes]), {}});
    return buffers.back();
}

static void put(char* at, Type type, double value) {
    float f = (float)value;
    u32 bits = shim::same_bits<u32>(f), word = (u32)(int)value;
    unsigned short half = (unsigned short)(bits >> 16);
    switch (type) {
        case F32: memcpy(at, &f, 4); break;
        case BF16: memcpy(at, &half, 2); break;
        case F64: memcpy(at, &value, 8); break;
        case U32: memcpy(at, &word, 4); break;
        default: *at = (char)word;
    }
}

void* Case::in(Type type, u64 count, bool special) {
    if (type == NONE) return nullptr;
    Buffer& buffer = add(Buffer::IN, type, count);
    buffer.contents.resize(buffer.bytes);
    special = special && random() % 4 == 0;
    for (u64 i = 0; i < count; i++) {
        uint64_t draw = random();
        double value = type == U32 || type == U8 ? (double)(draw % 100)
                       : draw % 16 == 0         ? 0.0
                                                : (double)(draw >> 40) / (1 << 23) - 1.0;
        if (special && draw % 8 == 1) value = draw & 16 ? INFINITY : draw & 32 ? -INFINITY : NAN;
        put(&buffer.contents[i * size_of(type)], type, value);
    }
    return buffer.start();
}
void* Case::in_out(Type type, u64 count) {
    if (type == NONE) return nullptr;
    void* start = in(type, count);
    buffers.back().use = Buffer::IN_OUT;
    return start;
}
void* Case::out(Type type, u64 count) {
    if (type == NONE) return nullptr;
    return add(Buffer::OUT, type, count).start();
}
void* Case::indices(u64 count, u32 limit) {
    std::vector<u32> values(count);
    for (u32& value : values) value = (u32)(random() % limit);
    if (count && random() % 4 == 0) {
        values[random() % count] = coin() ? limit : 0xffffffffu;
        may_latch = true;
    }
    return words(values);
}
void* Case::words(std::vector<u32> values) {
    Buffer& buffer = add(Buffer::IN, U32, values.size());
    buffer.contents.resize(buffer.bytes);
    if (buffer.bytes) memcpy(buffer.contents.data(), values.data(), buffer.bytes);
    return buffer.start();
}

}  // namespace check

using namespace check;

namespace {

struct Latch {   // as in common.cuh
    u32 code, unused;
    u32* mirror;
};

int failures;
void fail(const Case& c, uint64_t seed, const std::string& what) {
    printf("FAILED %s, seed %llu: %s\n", c.kernel.c_str(), (u64)seed, what.c_str());
    failures++;
}

void fill(const Case& c, char poison) {
    for (const Buffer& buffer : c.buffers) {
        if (buffer.use == Buffer::OUT) memset(buffer.start(), poison, buffer.bytes);
        else if (buffer.bytes) memcpy(buffer.start(), buffer.contents.data(), buffer.bytes);
    }
}
std::vector<std::string> results(const Case& c) {
    std::vector<std::string> all;
    for (const Buffer& buffer : c.buffers) all.emplace_back(buffer.start(), buffer.bytes);
    return all;
}

// The latch is parameter 0. Buffers are made in any order, as C++ evaluates arguments.
std::string parameter_of(const Launch& launch, const Buffer& buffer) {
    char* start = buffer.start();
    for (size_t i = 0; i < launch.arguments.size(); i++)
        if (launch.arguments[i].size() == sizeof start &&
            !memcmp(launch.arguments[i].data(), &start, sizeof start))
            return "parameter " + std::to_string(i + 1);
    return "one of the sources";
}

// The sanitizers end the process at the first error. Then this says what ran.
std::string running;
void say_what_ran() { printf("FAILED %s\n", running.c_str()); }

// Runs one case in several ways. Returns the number of blocks that ran.
u64 run_case(const shim::Kernel& kernel, Call call, uint64_t seed) {
    running = kernel.name + ", seed " + std::to_string(seed) + ": see the sanitizer's report";
    Case c(kernel.name, seed);
    Launch launch = call(c);
    auto latch = std::make_unique<Latch>();
    auto mirror = std::make_unique<u32>();
    Latch* latch_address = latch.get();
    std::vector<void*> arguments = {&latch_address};
    for (auto& argument : launch.arguments) arguments.push_back(argument.data());
    bool same = arguments.size() == kernel.parameters.size();
    for (size_t i = 1; same && i < arguments.size(); i++)
        same = launch.arguments[i - 1].size() == kernel.parameters[i].bytes;
    if (!same) return fail(c, seed, "calls.cpp passes other parameters than the kernel has"), 0;
    shim::Body body = kernel.bind(arguments.data());

    auto run = [&](shim::Order order, unsigned char poison, u32 code) {
        fill(c, (char)poison);
        *latch = {code, 0, mirror.get()};
        *mirror = 0;
        shim::Outcome outcome = shim::run(launch.shape, body, {order, seed, poison});
        if (outcome.fault != shim::Fault::NONE) fail(c, seed, outcome.message);
        return results(c);
    };
    auto first = run(shim::Order::FORWARD, 0xff, 0);
    if (latch->code && !c.may_latch) fail(c, seed, "sets the latch for good input");
    if (latch->code != *mirror) fail(c, seed, "the mirror of the latch differs from its code");
    bool latched = latch->code != 0;
    for (size_t i = 0; i < c.buffers.size(); i++)
        if (c.buffers[i].use == Buffer::IN &&
            first[i] != std::string(c.buffers[i].contents.begin(), c.buffers[i].contents.end()))
            fail(c, seed, "writes " + parameter_of(launch, c.buffers[i]) + ", which is an input");
    struct { shim::Order order; unsigned char poison; const char* what; } others[] = {
        {shim::Order::BACKWARD, 0xff, "the order of the threads (backward)"},
        {shim::Order::RANDOM, 0xff, "the order of the threads (random)"},
        {shim::Order::FORWARD, 0x3c, "what shared memory or an output held before"}};
    for (auto& other : others) {
        // Races do not depend on the order, and ThreadSanitizer is slow.
        if (shim::RACES_ARE_SOUGHT && other.order != shim::Order::RANDOM) continue;
        auto again = run(other.order, other.poison, 0);
        for (size_t i = 0; i < again.size() && !latched; i++)
            if (again[i] != first[i]) {
                size_t at = 0;
                while (again[i][at] == first[i][at]) at++;
                fail(c, seed, "byte " + std::to_string(at) + " of " +
                                  std::to_string(first[i].size()) + " of " +
                                  parameter_of(launch, c.buffers[i]) + " depends on " + other.what);
            }
    }
    if (c.latch_matters) {
        auto untouched = run(shim::Order::RANDOM, 0xff, 1);
        fill(c, (char)0xff);
        if (untouched != results(c)) fail(c, seed, "writes although the latch is set");
    }
    return 5 * (u64)launch.shape.grid.x * launch.shape.grid.y * launch.shape.grid.z;
}

}  // namespace

extern "C" void __sanitizer_set_death_callback(void (*callback)());
// Kernels that fail leave fibers behind, whose memory is no leak of interest.
#define FOR_SANITIZER extern "C" __attribute__((visibility("default"))) const char*
FOR_SANITIZER __asan_default_options() { return "detect_leaks=0"; }
FOR_SANITIZER __tsan_default_options() { return "halt_on_error=1"; }

int main(int count, char** arguments) {
    int rounds = count > 1 ? atoi(arguments[1]) : 20;
    std::string only = count > 2 ? arguments[2] : "";
    uint64_t first_seed = count > 3 ? strtoull(arguments[3], nullptr, 10) : 1;
    __sanitizer_set_death_callback(say_what_ran);
    int kernels = 0;
    u64 blocks = 0;
    auto start = std::chrono::steady_clock::now();
    // Large blocks last: ThreadSanitizer is slower once it knows many threads.
    auto all = shim::all_kernels();
    std::stable_sort(all.begin(), all.end(), [](const shim::Kernel* a, const shim::Kernel* b) {
        return a->most_threads < b->most_threads;
    });
    for (const shim::Kernel* kernel : all) {
        if (!only.empty() && kernel->name.rfind(only, 0) != 0) continue;
        kernels++;
        Case names(kernel->name, 0);
        Call call = call_of(names.base);
        if (!call) {
            fail(names, 0, "calls.cpp has no line for " + names.base);
            continue;
        }
        int before = failures;
        for (int i = 0; i < rounds && failures < before + 5; i++)
            blocks += run_case(*kernel, call, first_seed + i);
    }
    double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    printf("%d kernels, %d rounds, %llu blocks in %.1f s, %d failures\n", kernels, rounds, blocks,
           seconds, failures);
    return failures || !kernels;
}
