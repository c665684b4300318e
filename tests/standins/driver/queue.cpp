// CUDA's functions for streams and events, and stream memory operations.
#include <stdio.h>

#include "../driver.h"

#include <algorithm>

using namespace standin;

namespace {

std::vector<Event*>& events = *new std::vector<Event*>;

Event* event_of(void* handle) {
    auto found = std::find(events.begin(), events.end(), handle);
    if (found == events.end()) {
        say("%p is no event", handle);
        return nullptr;
    }
    if ((*found)->destroyed) {
        say("an event was used after it was destroyed");
        return nullptr;
    }
    return *found;
}

constexpr unsigned NON_BLOCKING = 1, DISABLE_TIMING = 2;

}  // namespace

CUDA(cuStreamCreate, void** handle, unsigned flags) {
    CALL_IN_CONTEXT();
    if (flags > 1) return INVALID_VALUE;
    *handle = new_stream(current, !(flags & NON_BLOCKING));
    return OK;
}
CUDA(cuStreamCreateWithPriority, void** handle, unsigned flags, int) {
    CALL_IN_CONTEXT();
    if (flags > 1) return INVALID_VALUE;
    *handle = new_stream(current, !(flags & NON_BLOCKING));
    return OK;
}
// Work that is in the stream still runs.
CUDA(cuStreamDestroy_v2, void* handle) {
    CALL();
    if (!handle) return INVALID_HANDLE;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    stream->destroyed = true;
    return OK;
}
CUDA(cuStreamQuery, void* handle) {
    CALL_IN_CONTEXT();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    counters.queries++;
    run_some(guard);
    if (stream->context->error) return stream->context->error;
    return stream->done >= stream->enqueued ? OK : NOT_READY;
}
CUDA(cuStreamSynchronize, void* handle) {
    CALL_IN_CONTEXT();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    counters.host_waits++;
    if (skipped("host wait")) return OK;
    return run_until(guard, {stream, stream->enqueued}, __func__);
}
CUDA(cuCtxSynchronize) {
    CALL_IN_CONTEXT();
    counters.host_waits++;
    if (skipped("host wait")) return OK;
    return run_context(guard, current, __func__);
}

CUDA(cuEventCreate, void** handle, unsigned flags) {
    CALL_IN_CONTEXT();
    auto* event = new Event;
    event->context = current;
    event->timed = !(flags & DISABLE_TIMING);
    events.push_back(event);
    *handle = event;
    return OK;
}
CUDA(cuEventDestroy_v2, void* handle) {
    CALL();
    Event* event = event_of(handle);
    if (!event) return INVALID_HANDLE;
    event->destroyed = true;
    return OK;
}
CUDA(cuEventRecord, void* event_handle, void* stream_handle) {
    CALL_IN_CONTEXT();
    Event* event = event_of(event_handle);
    Stream* stream = stream_of(stream_handle);
    if (!event || !stream) return INVALID_HANDLE;
    if (event->context != stream->context)
        return refuse(INVALID_HANDLE, "an event is recorded in a stream of another context");
    counters.event_records++;
    if (skipped("event record")) return OK;
    auto time = std::make_shared<std::chrono::steady_clock::time_point>();
    Operation operation{"event record", "cuEventRecord", {}, {}, {}};
    operation.run = [time] {
        *time = std::chrono::steady_clock::now();
        return OK;
    };
    event->recorded = enqueue(stream, std::move(operation));
    event->time = time;
    return OK;
}
// Waits for what the event has recorded by now. A later record does not count.
CUDA(cuStreamWaitEvent, void* stream_handle, void* event_handle, unsigned flags) {
    CALL_IN_CONTEXT();
    Event* event = event_of(event_handle);
    Stream* stream = stream_of(stream_handle);
    if (!event || !stream) return INVALID_HANDLE;
    if (flags > 1) return INVALID_VALUE;
    counters.event_waits++;
    if (skipped("event wait") || !event->recorded.stream) return OK;
    enqueue(stream, {"event wait", "cuStreamWaitEvent for stream " +
                                       std::to_string(event->recorded.stream->number),
                     {event->recorded}, {}, {}});
    return OK;
}
CUDA(cuEventQuery, void* handle) {
    CALL_IN_CONTEXT();
    Event* event = event_of(handle);
    if (!event) return INVALID_HANDLE;
    counters.queries++;
    run_some(guard);
    if (event->context->error) return event->context->error;
    const Point& point = event->recorded;
    return !point.stream || point.stream->done >= point.count ? OK : NOT_READY;
}
CUDA(cuEventSynchronize, void* handle) {
    CALL_IN_CONTEXT();
    Event* event = event_of(handle);
    if (!event) return INVALID_HANDLE;
    counters.host_waits++;
    if (skipped("host wait")) return OK;
    return run_until(guard, event->recorded, __func__);
}
static int elapsed(float* milliseconds, void* from_handle, void* to_handle) {
    Event *from = event_of(from_handle), *to = event_of(to_handle);
    if (!from || !to || !from->timed || !to->timed) return INVALID_HANDLE;
    for (Event* event : {from, to}) {
        if (!event->recorded.stream) return INVALID_HANDLE;
        if (event->recorded.stream->done < event->recorded.count) return NOT_READY;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(*to->time - *from->time).count();
    return OK;
}
CUDA(cuEventElapsedTime, float* milliseconds, void* from, void* to) {
    CALL_IN_CONTEXT();
    return elapsed(milliseconds, from, to);
}
CUDA(cuEventElapsedTime_v2, float* milliseconds, void* from, void* to) {
    CALL_IN_CONTEXT();
    return elapsed(milliseconds, from, to);
}

CUDA(cuLaunchHostFunc, void* handle, void (*function)(void*), void* data) {
    CALL_IN_CONTEXT();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    enqueue(stream, {"host function", "a host function", {}, {}, [=] {
                         in_host_function = true;
                         function(data);
                         in_host_function = false;
                         return OK;
                     }});
    return OK;
}

// Bits of the flags of cuStreamWaitValue32.
enum { AT_LEAST = 0, EQUAL = 1, ANY_BIT = 2, NOT_ALL_BITS = 3 };

static bool satisfied(uint32_t word, uint32_t value, unsigned flags) {
    switch (flags & 3) {
        case AT_LEAST: return (int32_t)(word - value) >= 0;   // cyclic
        case EQUAL: return word == value;
        case ANY_BIT: return (word & value) != 0;
        default: return ~(word | value) != 0;
    }
}

CUDA(cuStreamWaitValue32_v2, void* handle, Pointer address, uint32_t value, unsigned flags) {
    CALL_IN_CONTEXT();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (address % 4) return refuse(INVALID_VALUE, "a stream waits for a value at an odd address");
    if (check_access(stream->context, address, 4, "cuStreamWaitValue32")) return INVALID_VALUE;
    counters.value_waits++;
    start_idle_thread();
    if (skipped("value wait")) return OK;
    Context* context = stream->context;
    char name[100];
    snprintf(name, sizeof name, "cuStreamWaitValue32 at %#llx for %u", address, value);
    Operation operation{"value wait", name, {}, {}, {}};
    operation.ready = [=] {
        {
            std::lock_guard<std::mutex> guard(memory_lock);
            Region* region = region_of(address);
            if (!region || region->freed) return true;   // `run` reports it
        }
        auto* word = reinterpret_cast<uint32_t*>(address);
        return satisfied(__atomic_load_n(word, __ATOMIC_ACQUIRE), value, flags);
    };
    operation.run = [=] { return check_access(context, address, 4, "cuStreamWaitValue32"); };
    enqueue(stream, std::move(operation));
    return OK;
}
CUDA(cuStreamWriteValue32_v2, void* handle, Pointer address, uint32_t value, unsigned) {
    CALL_IN_CONTEXT();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (address % 4) return refuse(INVALID_VALUE, "a stream writes a value at an odd address");
    if (check_access(stream->context, address, 4, "cuStreamWriteValue32")) return INVALID_VALUE;
    counters.value_writes++;
    start_idle_thread();
    if (skipped("value write")) return OK;
    Context* context = stream->context;
    char name[100];
    snprintf(name, sizeof name, "cuStreamWriteValue32 of %u at %#llx", value, address);
    enqueue(stream, {"value write", name, {}, {}, [=]() -> int {
                         if (int error = check_access(context, address, 4, "cuStreamWriteValue32"))
                             return error;
                         __atomic_store_n(reinterpret_cast<uint32_t*>(address), value,
                                          __ATOMIC_RELEASE);
                         return OK;
                     }});
    return OK;
}

// --- For the stand-ins of other libraries ---

int standin_enqueue(void* handle, const char* kind, bool (*ready)(void*), int (*run)(void*),
                    void (*drop)(void*), void* state) {
    Guard guard(lock);
    std::shared_ptr<void> owner(state, drop ? drop : [](void*) {});
    if (int error = check_current()) return error;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (std::string(kind) == "product") counters.products++;
    Operation operation{kind, kind, {}, {}, {}};
    if (ready) operation.ready = [=] { return ready(owner.get()); };
    operation.run = [=] { return run(owner.get()); };
    enqueue(stream, std::move(operation));
    return OK;
}
int standin_check(void* handle, const void* memory, size_t bytes, const char* what) {
    Context* context;
    {
        Guard guard(lock);
        Stream* stream = stream_of(handle);
        if (!stream) return INVALID_HANDLE;
        context = stream->context;
    }
    return check_access(context, reinterpret_cast<Pointer>(memory), bytes, what);
}
void standin_wake() { changed.notify_all(); }
