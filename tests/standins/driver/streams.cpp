// Lazy streams: which operation runs, and when.
//
// A GPU may run an operation at once or much later. The stand-in runs it as late as it can: when
// some host thread waits for it. Then a kernel that lacks an event wait reads what its producer has
// not written, or finds its input overwritten, under most seeds.
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "../driver.h"

namespace standin {

thread_local bool in_host_function;

namespace {

using Clock = std::chrono::steady_clock;

std::vector<Stream*>& streams = *new std::vector<Stream*>;
Clock::time_point last_step = Clock::now();

bool reached(const Point& point) { return !point.stream || point.stream->done >= point.count; }

bool can_start(const Operation& operation) {
    for (const Point& point : operation.after)
        if (!reached(point)) return false;
    return !operation.ready || operation.ready();
}
bool can_run(Stream* stream) {
    if (stream->running || stream->queue.empty()) return false;
    // Work of a lost context is dropped, so it waits for nothing.
    return stream->context->error || can_start(stream->queue.front());
}
// The number of the last operation that the stream can run before it must wait for others.
uint64_t reach(Stream* stream) {
    constexpr int FAR = 64;
    int looked_at = 0;
    uint64_t number = 0;
    for (const Operation& operation : stream->queue) {
        if (++looked_at > FAR || !can_start(operation)) break;
        number = operation.number;
    }
    return number;
}

// A stream that can run and that `stream` waits for, directly or not. Null if there is none: then
// another thread runs it, or it waits for a value or for another rank.
Stream* needed_by(Stream* stream) {
    if (can_run(stream)) return stream;
    if (stream->running || stream->queue.empty()) return nullptr;
    for (const Point& point : stream->queue.front().after)
        if (!reached(point))
            if (Stream* needed = needed_by(point.stream)) return needed;
    return nullptr;
}

// How a wait chooses what to run. Each way finds other faults:
// NEEDED runs only what the wait needs. It finds data that the host reads without having waited.
// FURTHEST runs the stream that gets to the work that was enqueued last. Work that lacks a wait was
// enqueued after the work that it should have waited for, so it runs too early. This finds most
// missing waits between streams.
// FAVOURITE runs one stream as far as it gets, then another. ANY mixes them.
enum class Choice { FURTHEST, NEEDED, FAVOURITE, ANY };

Choice choice_of_a_wait() {
    switch (random_number() % 8) {
        case 0: return Choice::ANY;
        case 1: return Choice::FAVOURITE;
        case 2: case 3: return Choice::NEEDED;
        default: return Choice::FURTHEST;
    }
}

Stream* choose(Choice choice, uint64_t salt, Stream* wanted) {
    if (choice == Choice::NEEDED)
        if (Stream* needed = needed_by(wanted)) return needed;
    std::vector<Stream*> able;
    for (Stream* stream : streams)
        if (can_run(stream)) able.push_back(stream);
    if (able.empty()) return nullptr;
    if (choice == Choice::FURTHEST || choice == Choice::FAVOURITE) {
        std::pair<uint64_t, Stream*> best = {0, nullptr};
        for (Stream* stream : able) {
            uint64_t rank = (stream->number + salt) * 0x9e3779b97f4a7c15;
            if (choice == Choice::FURTHEST) rank = reach(stream);
            best = std::max(best, {rank, stream});
        }
        return best.second;
    }
    return able[random_number() % able.size()];
}

void step(Guard& guard, Stream* stream) {
    static const bool trace = setting("PILLION_STANDIN_TRACE", 0) != 0;
    Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    stream->running = true;
    bool lost = stream->context->error != OK;
    int error = lost ? OK : failure_of(operation.kind);
    if (trace)
        say("device %d, stream %d, operation %lu: %s%s", stream->context->device, stream->number,
            (unsigned long)stream->done, operation.name.c_str(), lost ? " (dropped)" : "");
    guard.unlock();
    if (!lost && !error && operation.run) error = operation.run();
    std::string name = std::move(operation.name);
    operation = {};   // frees what it holds while others may go on
    guard.lock();
    if (error && !stream->context->error) {
        stream->context->error = error;
        say("device %d, stream %d: %s failed with error %d. The context is lost.",
            stream->context->device, stream->number, name.c_str(), error);
    }
    stream->running = false;
    stream->done++;
    counters.operations_run++;
    last_step = Clock::now();
    changed.notify_all();
}

void describe_blocked() {
    for (Stream* stream : streams)
        if (!stream->queue.empty())
            say("device %d, stream %d: %zu operations wait, first %s", stream->context->device,
                stream->number, stream->queue.size(), stream->queue.front().name.c_str());
}

}  // namespace

Stream* new_stream(Context* context, bool blocking) {
    auto* stream = new Stream;
    stream->context = context;
    stream->blocking = blocking;
    stream->number = (int)streams.size();
    streams.push_back(stream);
    return stream;
}

Stream* stream_of(void* handle) {
    // 0 and 1: the legacy null stream. 2: the null stream of a thread, taken for the same.
    if (reinterpret_cast<uintptr_t>(handle) <= 2) {
        if (!current) return refuse(INVALID_CONTEXT, "no context is current"), nullptr;
        return current->null_stream;
    }
    for (Stream* stream : streams)
        if (stream == handle) {
            if (stream->destroyed) say("stream %d was destroyed", stream->number);
            return stream->destroyed ? nullptr : stream;
        }
    say("%p is no stream", handle);
    return nullptr;
}

Point enqueue(Stream* stream, Operation operation) {
    Context* context = stream->context;
    if (stream == context->null_stream) {
        for (Stream* other : streams)
            if (other->context == context && other->blocking)
                operation.after.push_back({other, other->enqueued});
    } else if (stream->blocking) {
        operation.after.push_back({context->null_stream, context->null_stream->enqueued});
    }
    static uint64_t operations;
    operation.number = operations++;
    stream->queue.push_back(std::move(operation));
    stream->enqueued++;
    changed.notify_all();
    return {stream, stream->enqueued};
}

int run_until(Guard& guard, Point goal, const char* who) {
    static const auto patience = std::chrono::seconds(setting("PILLION_STANDIN_PATIENCE", 60));
    if (!goal.stream) return OK;
    Choice choice = choice_of_a_wait();
    uint64_t salt = random_number();
    auto start = Clock::now();
    while (!reached(goal)) {
        if (Stream* stream = choose(choice, salt, goal.stream)) {
            step(guard, stream);
            continue;
        }
        // Another thread runs it, or a value must change. Another process may change it silently.
        changed.wait_for(guard, std::chrono::microseconds(200));
        auto now = Clock::now();
        if (now - start > patience && now - last_step > patience) {
            describe_blocked();
            goal.stream->context->error = LAUNCH_TIMEOUT;
            return refuse(LAUNCH_TIMEOUT, "%s waits for stream %d, and nothing has run for %ld s",
                          who, goal.stream->number, (long)patience.count());
        }
    }
    return goal.stream->context->error;
}

int run_context(Guard& guard, Context* context, const char* who) {
    std::vector<Point> goals;
    for (Stream* stream : streams)
        if (stream->context == context) goals.push_back({stream, stream->enqueued});
    for (const Point& goal : goals)
        if (int error = run_until(guard, goal, who)) return error;
    return context->error;
}

void run_some(Guard& guard) {
    for (uint64_t n = random_number() % 4; n > 0; n--)
        if (Stream* stream = choose(Choice::ANY, 0, nullptr)) step(guard, stream);
}

// Another process may wait for a value that a stream of this process writes, while no thread of
// this process waits for that stream. So a thread runs work when nothing has run for a while. It
// starts with the first stream memory operation, because ranks in one process need none of it.
// Processes differ in how long they wait, so that one runs ahead of the other.
void start_idle_thread() {
    static bool started;
    static const long setting_ms = setting("PILLION_STANDIN_IDLE_MS", 2);
    if (started || setting_ms <= 0) return;
    started = true;
    const auto period = std::chrono::milliseconds(setting_ms << (seed * 7 + getpid()) % 4);
    std::thread([period] {
        for (;;) {
            std::this_thread::sleep_for(period);
            Guard guard(lock);
            if (Clock::now() - last_step < period) continue;
            for (uint64_t burst = 1 + random_number() % 64; burst > 0; burst--)
                if (Stream* stream = choose(Choice::ANY, 0, nullptr)) step(guard, stream);
        }
    }).detach();
}

}  // namespace standin
