// The engine: runs the threads of one block as fibers, and finds threads that do not meet.
//
// A pass over the threads runs each thread that can run until it waits or returns. The thread that
// arrives last at a barrier or a warp operation releases the others and goes on without a switch.
// This file is compiled without sanitizers, so that they see the kernels' accesses only.
#include "engine.h"

#include <algorithm>
#include <memory>
#include <map>
#include <mutex>

#include "faults.h"
#include "fiber.h"

namespace shim {

Thread* current;
dim3 grid, block;
uint3 block_index;

// Not anonymous: the compiler would assume that a switch to another stack leaves these variables
// alone.
inline namespace engine {

enum class State { READY, AT_BARRIER, IN_WARP, RETURNED };

// One warp operation in progress, or done and not yet read by all lanes.
struct Group {
    WarpOperation operation;
    Place place;
    unsigned wanted = 0, arrived = 0, unread = 0;   // lanes
    void* edge = nullptr;
    WarpValues values;
};

struct Lane : Thread, Fiber {
    State state = State::READY;
    Place place = {};
    Group* group = nullptr;   // the last warp operation of this lane
};

struct Warp {
    // Each lane holds at most one group, so one of these is always free.
    Group groups[33];
    unsigned lanes = 0, returned = 0;
    uint64_t pending = 0;   // groups that wait for lanes
};

struct Barrier {
    Place place = {};
    Vote vote = NONE;
    unsigned waiting = 0, phase = 0, yes = 0;
    int result[2] = {0, 0};   // by phase: nobody is more than one phase ahead
    void* edge[2] = {nullptr, nullptr};
};

std::mutex one_kernel_at_a_time;
std::vector<std::unique_ptr<Lane>> lanes;
std::vector<std::unique_ptr<Warp>> warps;
std::vector<Lane*> threads;   // of the block, by number
Barrier barrier;
unsigned threads_returned;
const Body* body;
Options options;
Outcome outcome;
bool stopped;
uint64_t block_serial;
size_t static_shared, dynamic_shared;
std::unique_ptr<char[]> dynamic_memory;
char* dynamic_start;

// Blocks of a grid are not ordered by anything. For ThreadSanitizer a few blocks form a wave.
// Nothing orders the blocks of a wave, so a race between two of them is seen. Each block of a wave
// has fresh shared memory, and each barrier has a fresh address to attach its order to.
constexpr unsigned WAVE = 8;
constexpr size_t WAVE_EDGES = 1 << 16;
std::unique_ptr<char[]> wave_edges, wave_shared;
size_t edges_used, shared_used;
char start_of_wave, end_of_wave;

void* new_edge() {
    if (!RACES_ARE_SOUGHT) return nullptr;
    return &wave_edges[edges_used++ % WAVE_EDGES];
}

char* aligned(char* address, size_t align) {
    uintptr_t number = reinterpret_cast<uintptr_t>(address);
    return address + (align - number % align) % align;
}

// ThreadSanitizer and the compiler replace memset, which would count as an access of the kernel.
void fill_with_poison(void* memory, size_t bytes) {
    asm volatile("rep stosb" : "+D"(memory), "+c"(bytes) : "a"(options.poison) : "memory");
}

uint64_t random_state;
uint64_t random_number() {
    random_state += 0x9e3779b97f4a7c15;
    uint64_t x = random_state;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}
template <class T>
void shuffle_order(std::vector<T>& order) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
}

std::string text(Place place) {
    if (!place.file) return "?";
    const char* slash = strrchr(place.file, '/');
    return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}
bool same(Place a, Place b) {
    return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file));
}

void stop(Fault fault, const std::string& message) {
    if (!stopped) {
        outcome.fault = fault;
        outcome.message = message + ", in block (" + std::to_string(block_index.x) + ", " +
                          std::to_string(block_index.y) + ", " + std::to_string(block_index.z) +
                          ")";
    }
    stopped = true;
}
// The running fiber stops the kernel and never goes on.
[[noreturn]] void stop_here(Fault fault, const std::string& message) {
    Lane& lane = static_cast<Lane&>(*current);
    stop(fault, "thread " + std::to_string(lane.number) + ": " + message);
    release(&end_of_wave);   // the caller of `run` reads the message
    for (;;) leave(lane);
}

void wait_as(State state, Place place) {
    Lane& lane = static_cast<Lane&>(*current);
    lane.state = state;
    lane.place = place;
    leave(lane);
}

void run_thread() {
    acquire(&start_of_wave);
    (*body)();
    Lane& lane = static_cast<Lane&>(*current);
    if (!lane.copies.empty())
        stop_here(Fault::LAUNCH_FAILED, "returns before it has waited for its copies");
    release(&end_of_wave);
    lane.state = State::RETURNED;
    warps[lane.number / 32]->returned |= 1u << lane.lane;
    threads_returned++;
    finish(lane);
}

}  // namespace engine

int wait_for_block(Vote vote, int value, Place place) {
    if (barrier.waiting == 0) {
        barrier.place = place;
        barrier.vote = vote;
        barrier.yes = 0;
        barrier.edge[barrier.phase & 1] = new_edge();
    } else if (!same(barrier.place, place) || barrier.vote != vote) {
        stop_here(Fault::LAUNCH_FAILED, "divergent barrier: this thread is at " + text(place) +
                                            ", other threads of the block are at " +
                                            text(barrier.place));
    }
    unsigned phase = barrier.phase & 1;
    release(barrier.edge[phase]);
    barrier.yes += value != 0;
    barrier.waiting++;
    if (barrier.waiting == threads.size()) {
        barrier.result[phase] = vote == OR    ? barrier.yes != 0
                                : vote == AND ? barrier.yes == threads.size()
                                              : (int)barrier.yes;
        barrier.waiting = 0;
        barrier.phase++;
        for (Lane* lane : threads) lane->state = State::READY;
    } else {
        wait_as(State::AT_BARRIER, place);
    }
    acquire(barrier.edge[phase]);
    return barrier.result[phase];
}

const WarpValues& wait_for_warp(WarpOperation operation, unsigned mask, uint64_t value, Place place,
                                void (*combine)(const WarpValues&)) {
    Lane& lane = static_cast<Lane&>(*current);
    Warp& warp = *warps[lane.number / 32];
    unsigned bit = 1u << lane.lane;
    if (lane.group) lane.group->unread &= ~bit;
    if (!(mask & bit))
        stop_here(Fault::LAUNCH_FAILED, text(place) + ": the mask lacks the lane that calls");
    // A full mask in a block's short last warp means the lanes that there are.
    if (mask == 0xffffffffu) mask = warp.lanes;
    if (mask & (warp.returned | ~warp.lanes))
        stop_here(Fault::LAUNCH_FAILED, text(place) + ": lanes of the mask are missing (" +
                                            "they have returned or the block lacks them)");
    Group* group = nullptr;
    for (uint64_t left = warp.pending; left; left &= left - 1) {
        Group& other = warp.groups[__builtin_ctzll(left)];
        if (other.operation == operation && other.wanted == mask && same(other.place, place))
            group = &other;
    }
    if (!group) {
        unsigned i = 0;
        while (warp.groups[i].unread) i++;
        group = &warp.groups[i];
        warp.pending |= 1ull << i;
        group->operation = operation;
        group->place = place;
        group->wanted = group->unread = group->values.mask = mask;
        group->arrived = 0;
        group->edge = new_edge();
    }
    lane.group = group;
    group->arrived |= bit;
    group->values.value[lane.lane] = value;
    release(group->edge);
    if (group->arrived == group->wanted) {
        if (combine) {
            if (mask != 0xffffffffu) lane_is_missing(__builtin_ctz(~mask), place);
            acquire(group->edge);
            combine(group->values);
            release(group->edge);
        }
        warp.pending &= ~(1ull << (group - warp.groups));
        for (unsigned left = mask; left; left &= left - 1)
            threads[(lane.number & ~31u) + __builtin_ctz(left)]->state = State::READY;
    } else {
        wait_as(State::IN_WARP, place);
    }
    acquire(group->edge);
    return group->values;
}

void lane_is_missing(unsigned lane, Place place) {
    stop_here(Fault::LAUNCH_FAILED, text(place) + ": reads the value of lane " +
                                        std::to_string(lane) + ", which does not take part");
}

bool copy_lands_at_once() { return random_number() & 1; }

void address_is_misaligned(const void* address, unsigned alignment, Place place) {
    char number[32];
    snprintf(number, sizeof number, "%p", address);
    stop_here(Fault::MISALIGNED, text(place) + ": address " + number + " is no multiple of " +
                                     std::to_string(alignment));
}

void* shared_memory(SharedSite& site) {
    if (site.block == block_serial) return site.memory;
    static_shared += site.bytes;
    if (static_shared > STATIC_SHARED_LIMIT || static_shared + dynamic_shared > SHARED_LIMIT)
        stop_here(Fault::LAUNCH_FAILED, "too much shared memory");
    // The address has exactly the alignment of the type, because a GPU promises no more.
    if (RACES_ARE_SOUGHT) {
        char* from = aligned(&wave_shared[shared_used], 16) + site.align % 16;
        site.memory = from;
        shared_used = from + site.bytes - &wave_shared[0];
    } else if (!site.memory) {
        // malloc aligns to 16. The array ends where the heap block ends, for AddressSanitizer.
        site.memory = static_cast<char*>(malloc(site.align % 16 + site.bytes)) + site.align % 16;
    }
    site.block = block_serial;
    fill_with_poison(site.memory, site.bytes);
    return site.memory;
}

void* dynamic_shared_memory() { return dynamic_start; }

namespace {

void describe_waiting(std::string& message) {
    std::map<std::string, std::string> who;   // by place
    for (Lane* lane : threads)
        if (lane->state == State::AT_BARRIER || lane->state == State::IN_WARP) {
            std::string& list = who[(lane->state == State::AT_BARRIER ? "the barrier at " : "the "
                                     "warp operation at ") + text(lane->place)];
            if (list.size() < 40) list += " " + std::to_string(lane->number);
            else if (list.back() != '.') list += " ...";
        }
    for (auto& [place, list] : who) message += "; at " + place + " wait threads" + list;
    message += "; " + std::to_string(threads_returned) + " threads have returned";
}

void set_up_block(unsigned rotation) {
    unsigned count = threads.size();
    for (unsigned i = 0; i < count; i++) {
        // Another fiber for each block: two accesses of one fiber are never a race.
        Lane& lane = *lanes[(i + rotation) % count];
        threads[i] = &lane;
        lane.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        lane.number = i;
        lane.lane = i % 32;
        lane.state = State::READY;
        lane.group = nullptr;
        lane.copies.clear();
        lane.groups = 0;
        prepare(lane, (i + rotation) % count, run_thread);
    }
    for (unsigned i = 0; i < (count + 31) / 32; i++) {
        Warp& warp = *warps[i];
        for (Group& group : warp.groups) group.unread = 0;
        unsigned size = std::min(32u, count - i * 32);
        warp.lanes = size == 32 ? 0xffffffffu : (1u << size) - 1;
        warp.returned = 0;
        warp.pending = 0;
    }
    barrier = {};
    threads_returned = 0;
    block_serial++;
    static_shared = 0;
    if (RACES_ARE_SOUGHT) {
        dynamic_start = aligned(&wave_shared[shared_used], 16);
        shared_used = dynamic_start + dynamic_shared - &wave_shared[0];
    }
    fill_with_poison(dynamic_start, dynamic_shared);
}

// Runs these threads once each, if they can run. Returns whether one could.
bool run_threads(Lane** from, Lane** to) {
    bool progress = false;
    for (; from < to && !stopped; from++) {
        if ((*from)->state != State::READY) continue;
        progress = true;
        current = *from;
        enter(**from);
    }
    return progress;
}

void run_block(std::vector<Lane*>& order, unsigned rotation) {
    set_up_block(rotation);
    order = threads;
    if (options.order == Order::BACKWARD) std::reverse(order.begin(), order.end());
    Lane **first = order.data(), **last = first + order.size();
    while (threads_returned < threads.size()) {
        bool progress = false;
        if (options.order == Order::RANDOM) {
            shuffle_order(order);
            progress = run_threads(first, last);
        } else {
            // Each warp until it waits for others: its stacks stay in the cache.
            for (Lane** warp = first; warp < last; warp += 32)
                while (run_threads(warp, std::min(warp + 32, last))) progress = true;
        }
        if (stopped) return;
        if (barrier.waiting && threads_returned &&
            barrier.waiting + threads_returned == threads.size()) {
            std::string message = "divergent barrier: not all threads reach it";
            describe_waiting(message);
            return stop(Fault::LAUNCH_FAILED, message);
        }
        if (!progress) {
            std::string message = "deadlock";
            describe_waiting(message);
            return stop(Fault::LAUNCH_FAILED, message);
        }
    }
}

void fault_in_kernel(Fault fault, const char* what) { stop_here(fault, what); }

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

}  // namespace

Outcome run(const Shape& shape, const Body& the_body, const Options& the_options) {
    std::lock_guard<std::mutex> lock(one_kernel_at_a_time);
    grid = shape.grid;
    block = shape.block;
    body = &the_body;
    options = the_options;
    outcome = {};
    stopped = false;
    random_state = options.seed;
    unsigned count = block.x * block.y * block.z;
    while (lanes.size() < count) lanes.push_back(std::make_unique<Lane>());
    while (warps.size() < (count + 31) / 32) warps.push_back(std::make_unique<Warp>());
    threads.resize(count);
    dynamic_shared = shape.shared;
    if (!RACES_ARE_SOUGHT) {
        dynamic_memory.reset(new char[dynamic_shared + 16]);
        dynamic_start = aligned(dynamic_memory.get(), 16);
    }
    uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    std::vector<uint64_t> block_order;
    if (options.order == Order::RANDOM) {
        for (uint64_t i = 0; i < blocks; i++) block_order.push_back(i);
        shuffle_order(block_order);
    }
    watch_for_faults(fault_in_kernel);
    std::vector<Lane*> order;
    for (uint64_t i = 0; i < blocks && !stopped; i++) {
        if (RACES_ARE_SOUGHT && i % WAVE == 0) {
            acquire(&end_of_wave);
            wave_edges.reset(new char[WAVE_EDGES]);
            wave_shared.reset(new char[WAVE * (STATIC_SHARED_LIMIT + dynamic_shared + 16)]);
            edges_used = shared_used = 0;
            release(&start_of_wave);
        }
        uint64_t at = options.order == Order::FORWARD    ? i
                      : options.order == Order::BACKWARD ? blocks - 1 - i
                                                         : block_order[i];
        block_index = {(unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y),
                       (unsigned)(at / grid.x / grid.y)};
        run_block(order, RACES_ARE_SOUGHT ? i * 5 % count : 0);
    }
    ignore_faults();
    acquire(&end_of_wave);
    if (stopped)
        for (Lane* lane : threads) abandon(*lane);
    return outcome;
}

Register::Register(Kernel kernel) {
    Kernel& entry = kernels()[kernel.name];
    kernel.most_threads = std::min(kernel.most_threads, entry.most_threads);
    entry = std::move(kernel);
}
Register::Register(const char* name, unsigned most_threads) {
    Kernel& entry = kernels()[name];
    entry.name = name;
    entry.most_threads = most_threads;
}

const Kernel* find_kernel(const std::string& name) {
    auto found = kernels().find(name);
    return found == kernels().end() || !found->second.bind ? nullptr : &found->second;
}
std::vector<const Kernel*> all_kernels() {
    std::vector<const Kernel*> all;
    for (auto& [name, kernel] : kernels())
        if (kernel.bind) all.push_back(&kernel);
    return all;
}

}  // namespace shim
