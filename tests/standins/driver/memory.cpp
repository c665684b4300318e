// Memory of devices and pinned memory, copies and memsets. Device memory is memory of the host.
//
// Fresh memory is filled with 0xff, which is a NaN and a token beyond any vocabulary. Freed memory
// keeps its addresses but loses all access, so that a late use of it is seen.
#include <string.h>
#include <sys/mman.h>

#include "../driver.h"

namespace standin {

std::mutex memory_lock;

static auto& regions = *new std::map<Pointer, Region>;   // by start
static size_t in_use[64];                                // by device

void add_region(const Region& region) { regions[region.start] = region; }

int take_memory(int device, size_t bytes) {
    if (in_use[device] + bytes > device_memory())
        return refuse(OUT_OF_MEMORY, "device %d has %zu of %zu bytes left, not %zu", device,
                      device_memory() - in_use[device], device_memory(), bytes);
    in_use[device] += bytes;
    counters.bytes_in_use += bytes;
    return OK;
}
void give_memory(int device, size_t bytes) {
    in_use[device] -= bytes;
    counters.bytes_in_use -= bytes;
}

Region* region_of(Pointer address) {
    auto after = regions.upper_bound(address);
    if (after == regions.begin()) return nullptr;
    Region& region = std::prev(after)->second;
    return address < region.start + region.bytes ? &region : nullptr;
}

bool is_host_memory_of_cuda(Pointer address, size_t bytes) {
    std::lock_guard<std::mutex> guard(memory_lock);
    Region* region = region_of(address);
    return region && region->kind == Kind::HOST && !region->freed &&
           address + bytes <= region->start + region->bytes;
}

int check_access(Context* context, Pointer address, size_t bytes, const char* what) {
    std::lock_guard<std::mutex> guard(memory_lock);
    // Allocations that are mapped side by side may be accessed as one.
    for (Pointer at = address, end = address + bytes; at < end;) {
        Region* region = region_of(at);
        if (!region)
            return refuse(ILLEGAL_ADDRESS, "%s: %#llx + %zu: no memory of CUDA at %#llx", what,
                          address, bytes, at);
        if (region->freed)
            return refuse(ILLEGAL_ADDRESS, "%s: %#llx + %zu: the memory was freed", what, address,
                          bytes);
        if (region->kind == Kind::MAPPED && !(region->accessible >> context->device & 1))
            return refuse(ILLEGAL_ADDRESS,
                          "%s: %#llx + %zu: device %d has no access (cuMemSetAccess)", what,
                          address, bytes, context->device);
        at = region->start + region->bytes;
    }
    return OK;
}

}  // namespace standin

using namespace standin;

namespace {

constexpr size_t ALIGN = 512;

// A page without access follows the memory, as close to its end as the alignment allows.
void* allocate(size_t bytes, Kind kind, int device) {
    size_t size = pages(bytes);
    void* memory = mmap(nullptr, size + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, size, PROT_READ | PROT_WRITE)) return nullptr;
    char* start = static_cast<char*>(memory) + (size - bytes) / ALIGN * ALIGN;
    memset(start, 0xff, bytes);
    std::lock_guard<std::mutex> guard(memory_lock);
    Region region;
    region.start = reinterpret_cast<Pointer>(start);
    region.bytes = bytes;
    region.kind = kind;
    region.device = device;
    add_region(region);
    return start;
}
int free_region(Pointer address, Kind kind) {
    std::lock_guard<std::mutex> guard(memory_lock);
    Region* region = region_of(address);
    if (!region || region->start != address || region->kind != kind)
        return refuse(INVALID_VALUE, "%#llx is freed, but no allocation starts there", address);
    if (region->freed) return refuse(INVALID_VALUE, "%#llx is freed twice", address);
    region->freed = true;
    void* start = reinterpret_cast<void*>(address / PAGE * PAGE);
    madvise(start, pages(region->bytes), MADV_DONTNEED);
    mprotect(start, pages(region->bytes), PROT_NONE);
    if (kind == Kind::DEVICE) give_memory(region->device, region->bytes);
    counters.frees++;
    return OK;
}

struct Side {
    Pointer address;
    bool device;   // memory of CUDA, which must be live when the copy runs
};

int copy_later(Guard& guard, void* handle, Side to, Side from, size_t bytes, const char* name) {
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    counters.copies++;
    counters.copied_bytes += bytes;
    if (bytes == 0) return OK;
    // Pageable memory: the driver reads it during the call. Pinned memory is read when the copy
    // runs.
    std::shared_ptr<std::vector<char>> staged;
    if (!from.device) {
        auto* start = reinterpret_cast<const char*>(from.address);
        staged = std::make_shared<std::vector<char>>(start, start + bytes);
    }
    Context* context = stream->context;
    Point point = enqueue(stream, {"copy", name, {}, {}, [=]() -> int {
        if (from.device)
            if (int error = check_access(context, from.address, bytes, "the source of a copy"))
                return error;
        if (to.device)
            if (int error = check_access(context, to.address, bytes, "the destination of a copy"))
                return error;
        memmove(reinterpret_cast<void*>(to.address),
                staged ? staged->data() : reinterpret_cast<const char*>(from.address), bytes);
        return OK;
    }});
    if (to.device) return OK;
    counters.host_waits++;   // a copy to pageable memory returns when it is done
    return run_until(guard, point, name);
}

bool known_to_cuda(Pointer address) {
    std::lock_guard<std::mutex> guard(memory_lock);
    return region_of(address) != nullptr;
}

int set_later(void* handle, Pointer to, size_t count, size_t width, uint32_t value) {
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (to % width) return INVALID_VALUE;
    counters.memsets++;
    Context* context = stream->context;
    enqueue(stream, {"memset", "a memset", {}, {}, [=]() -> int {
        if (int error = check_access(context, to, count * width, "the destination of a memset"))
            return error;
        if (width == 1) {
            memset(reinterpret_cast<void*>(to), (int)value, count);
        } else {
            auto* words = reinterpret_cast<uint32_t*>(to);
            for (size_t i = 0; i < count; i++) words[i] = value;
        }
        return OK;
    }});
    return OK;
}

}  // namespace

CUDA(cuMemGetInfo_v2, size_t* free, size_t* total) {
    CALL_IN_CONTEXT();
    *total = device_memory();
    *free = *total - in_use[current->device];
    return OK;
}
CUDA(cuMemAlloc_v2, Pointer* address, size_t bytes) {
    CALL_IN_CONTEXT();
    if (!bytes) return INVALID_VALUE;
    if (int error = take_memory(current->device, bytes)) return error;
    *address = reinterpret_cast<Pointer>(allocate(bytes, Kind::DEVICE, current->device));
    counters.allocations++;
    return *address ? OK : OUT_OF_MEMORY;
}
// Does not wait for the streams. CUDA's does, but a program must not rely on it.
CUDA(cuMemFree_v2, Pointer address) {
    CALL_IN_CONTEXT();
    return address ? free_region(address, Kind::DEVICE) : OK;
}
CUDA(cuMemHostAlloc, void** address, size_t bytes, unsigned) {
    CALL_IN_CONTEXT();
    if (!bytes) return INVALID_VALUE;
    *address = allocate(bytes, Kind::HOST, 0);
    counters.allocations++;
    return *address ? OK : OUT_OF_MEMORY;
}
CUDA(cuMemFreeHost, void* address) {
    CALL_IN_CONTEXT();
    return free_region(reinterpret_cast<Pointer>(address), Kind::HOST);
}
CUDA(cuMemHostRegister_v2, void* address, size_t bytes, unsigned) {
    CALL_IN_CONTEXT();
    if (!address || !bytes) return INVALID_VALUE;
    std::lock_guard<std::mutex> memory_guard(memory_lock);
    Region region;
    region.start = reinterpret_cast<Pointer>(address);
    region.bytes = bytes;
    region.kind = Kind::HOST;
    auto after = regions.lower_bound(region.start);
    if (region_of(region.start) ||
        (after != regions.end() && after->first < region.start + bytes))
        return HOST_MEMORY_ALREADY_REGISTERED;
    add_region(region);
    counters.allocations++;
    return OK;
}
CUDA(cuMemHostUnregister, void* address) {
    CALL_IN_CONTEXT();
    std::lock_guard<std::mutex> memory_guard(memory_lock);
    auto found = regions.find(reinterpret_cast<Pointer>(address));
    if (found == regions.end() || found->second.kind != Kind::HOST)
        return HOST_MEMORY_NOT_REGISTERED;
    regions.erase(found);
    counters.frees++;
    return OK;
}
CUDA(cuMemHostGetDevicePointer_v2, Pointer* device, void* host, unsigned) {
    CALL_IN_CONTEXT();
    if (!is_host_memory_of_cuda(reinterpret_cast<Pointer>(host), 1)) return INVALID_VALUE;
    *device = reinterpret_cast<Pointer>(host);
    return OK;
}
CUDA(cuPointerGetAttribute, void* data, int attribute, Pointer address) {
    CALL_IN_CONTEXT();
    std::lock_guard<std::mutex> memory_guard(memory_lock);
    Region* region = region_of(address);
    if (!region || region->freed) return INVALID_VALUE;
    switch (attribute) {
        case 2: *static_cast<unsigned*>(data) = region->kind == Kind::HOST ? 1 : 2; return OK;
        case 3: *static_cast<Pointer*>(data) = address; return OK;
        case 9: *static_cast<int*>(data) = region->device; return OK;
        default: return NOT_SUPPORTED;
    }
}

CUDA(cuMemcpyHtoDAsync_v2, Pointer to, const void* from, size_t bytes, void* stream) {
    CALL_IN_CONTEXT();
    auto host = reinterpret_cast<Pointer>(from);
    return copy_later(guard, stream, {to, true}, {host, is_host_memory_of_cuda(host, bytes)}, bytes,
                      "a copy from the host");
}
CUDA(cuMemcpyDtoHAsync_v2, void* to, Pointer from, size_t bytes, void* stream) {
    CALL_IN_CONTEXT();
    auto host = reinterpret_cast<Pointer>(to);
    return copy_later(guard, stream, {host, is_host_memory_of_cuda(host, bytes)}, {from, true},
                      bytes, "a copy to the host");
}
CUDA(cuMemcpyDtoDAsync_v2, Pointer to, Pointer from, size_t bytes, void* stream) {
    CALL_IN_CONTEXT();
    return copy_later(guard, stream, {to, true}, {from, true}, bytes, "a copy on the device");
}
CUDA(cuMemcpyAsync, Pointer to, Pointer from, size_t bytes, void* stream) {
    CALL_IN_CONTEXT();
    return copy_later(guard, stream, {to, known_to_cuda(to)}, {from, known_to_cuda(from)}, bytes,
                      "a copy");
}
// The synchronous copies, for programs that are not Pillion.
CUDA(cuMemcpyHtoD_v2, Pointer to, const void* from, size_t bytes) {
    CALL_IN_CONTEXT();
    if (int error = copy_later(guard, nullptr, {to, true}, {reinterpret_cast<Pointer>(from), false},
                               bytes, "a copy from the host"))
        return error;
    counters.host_waits++;
    return run_until(guard, {current->null_stream, current->null_stream->enqueued}, __func__);
}
CUDA(cuMemcpyDtoH_v2, void* to, Pointer from, size_t bytes) {
    CALL_IN_CONTEXT();
    return copy_later(guard, nullptr, {reinterpret_cast<Pointer>(to), false}, {from, true}, bytes,
                      "a copy to the host");
}
CUDA(cuMemsetD8Async, Pointer to, unsigned char value, size_t count, void* stream) {
    CALL_IN_CONTEXT();
    return set_later(stream, to, count, 1, value);
}
CUDA(cuMemsetD32Async, Pointer to, unsigned value, size_t count, void* stream) {
    CALL_IN_CONTEXT();
    return set_later(stream, to, count, 4, value);
}
