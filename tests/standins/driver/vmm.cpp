// Virtual memory management: addresses and memory apart. Memory is a memfd, so that its handle can
// go to another process as a file descriptor.
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../driver.h"

using namespace standin;

namespace {

struct Location {
    int type, id;
};
struct Properties {   // the start of CUmemAllocationProp
    int type, handle_types;
    Location location;
};
struct Access {   // CUmemAccessDesc
    Location location;
    int flags;
};
constexpr int DEVICE = 1, PINNED = 1, FILE_DESCRIPTOR = 1, READ_WRITE = 3;

struct Memory {
    int descriptor;
    size_t bytes;
    int device;
    bool counted;       // against its device: not if imported
    bool exportable;
    int references;     // the handle and each mapping
};
// All three are guarded by the driver's lock. A handle is never used again for other memory.
auto& memories = *new std::map<unsigned long long, Memory>;
auto& reserved = *new std::map<Pointer, size_t>;
auto& mapped = *new std::map<Pointer, unsigned long long>;   // the memory of each mapping
unsigned long long next_handle = 0x5000;

size_t granularity() {
    static size_t bytes = setting("PILLION_STANDIN_GRANULARITY", 2 << 20);
    return bytes;
}
bool whole(size_t bytes) { return bytes && bytes % granularity() == 0; }

void drop_reference(unsigned long long handle) {
    Memory& memory = memories[handle];
    if (--memory.references) return;
    if (memory.counted) give_memory(memory.device, memory.bytes);
    close(memory.descriptor);
    memories.erase(handle);
}

}  // namespace

CUDA(cuMemGetAllocationGranularity, size_t* bytes, const Properties*, int) {
    CALL();
    *bytes = granularity();
    return OK;
}
CUDA(cuMemAddressReserve, Pointer* address, size_t bytes, size_t align, Pointer,
     unsigned long long) {
    CALL();
    if (!whole(bytes) || (align & (align - 1))) return INVALID_VALUE;
    if (align < granularity()) align = granularity();
    void* memory = mmap(nullptr, bytes + align, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return OUT_OF_MEMORY;
    *address = (reinterpret_cast<Pointer>(memory) + align - 1) / align * align;
    reserved[*address] = bytes;
    return OK;
}
// The addresses stay without access, for the life of the process.
CUDA(cuMemAddressFree, Pointer address, size_t bytes) {
    CALL();
    auto found = reserved.find(address);
    if (found == reserved.end() || found->second != bytes) return INVALID_VALUE;
    auto inside = mapped.lower_bound(address);
    if (inside != mapped.end() && inside->first < address + bytes)
        return refuse(INVALID_VALUE, "cuMemAddressFree: memory is still mapped there");
    reserved.erase(found);
    return OK;
}
CUDA(cuMemCreate, unsigned long long* handle, size_t bytes, const Properties* properties,
     unsigned long long flags) {
    CALL();
    if (!whole(bytes) || flags || properties->type != PINNED || properties->location.type != DEVICE)
        return INVALID_VALUE;
    int device = properties->location.id;
    if (device < 0 || device >= devices()) return INVALID_DEVICE;
    if (int error = take_memory(device, bytes)) return error;
    int descriptor = memfd_create("pillion-standin", MFD_CLOEXEC);
    if (descriptor < 0 || ftruncate(descriptor, bytes)) return OUT_OF_MEMORY;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (memory == MAP_FAILED) return OUT_OF_MEMORY;
    memset(memory, 0xff, bytes);
    munmap(memory, bytes);
    *handle = next_handle++;
    memories[*handle] = {descriptor, bytes, device, true,
                         (properties->handle_types & FILE_DESCRIPTOR) != 0, 1};
    counters.allocations++;
    return OK;
}
CUDA(cuMemRelease, unsigned long long handle) {
    CALL();
    if (!memories.count(handle)) return INVALID_VALUE;
    drop_reference(handle);
    counters.frees++;
    return OK;
}
CUDA(cuMemMap, Pointer address, size_t bytes, size_t offset, unsigned long long handle,
     unsigned long long flags) {
    CALL();
    auto memory = memories.find(handle);
    if (memory == memories.end() || flags || offset || bytes != memory->second.bytes)
        return INVALID_VALUE;
    auto after = reserved.upper_bound(address);
    if (after == reserved.begin()) return INVALID_VALUE;
    auto& [start, size] = *std::prev(after);
    if (address % granularity() || address + bytes > start + size) return INVALID_VALUE;
    std::lock_guard<std::mutex> memory_guard(memory_lock);
    Region* old = region_of(address);
    if (old && !old->freed) return INVALID_VALUE;
    if (mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED,
             memory->second.descriptor, 0) == MAP_FAILED)
        return OUT_OF_MEMORY;
    Region region;
    region.start = address;
    region.bytes = bytes;
    region.kind = Kind::MAPPED;
    region.device = memory->second.device;
    add_region(region);
    mapped[address] = handle;
    memory->second.references++;
    return OK;
}
CUDA(cuMemSetAccess, Pointer address, size_t bytes, const Access* access, size_t count) {
    CALL();
    std::lock_guard<std::mutex> memory_guard(memory_lock);
    for (Pointer at = address; at < address + bytes;) {
        Region* region = region_of(at);
        if (!region || region->freed || region->kind != Kind::MAPPED || region->start != at)
            return INVALID_VALUE;
        for (size_t i = 0; i < count; i++) {
            int device = access[i].location.id;
            if (access[i].location.type != DEVICE || device < 0 || device >= devices())
                return INVALID_VALUE;
            if (device != region->device && setting("PILLION_STANDIN_PEERS", 1) == 0)
                return refuse(INVALID_DEVICE, "device %d cannot access memory of device %d", device,
                              region->device);
            uint64_t bit = 1ull << device;
            if (access[i].flags == READ_WRITE) region->accessible |= bit;
            else region->accessible &= ~bit;
        }
        mprotect(reinterpret_cast<void*>(region->start), region->bytes,
                 region->accessible ? PROT_READ | PROT_WRITE : PROT_NONE);
        at = region->start + region->bytes;
    }
    return OK;
}
CUDA(cuMemUnmap, Pointer address, size_t bytes) {
    CALL();
    auto found = mapped.find(address);
    std::lock_guard<std::mutex> memory_guard(memory_lock);
    Region* region = region_of(address);
    if (found == mapped.end() || !region || region->bytes != bytes) return INVALID_VALUE;
    mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    region->freed = true;
    drop_reference(found->second);
    mapped.erase(found);
    return OK;
}
CUDA(cuMemExportToShareableHandle, void* out, unsigned long long handle, int type,
     unsigned long long flags) {
    CALL();
    auto memory = memories.find(handle);
    if (memory == memories.end() || flags) return INVALID_VALUE;
    if (type != FILE_DESCRIPTOR) return NOT_SUPPORTED;
    if (!memory->second.exportable)
        return refuse(INVALID_VALUE, "cuMemCreate was not asked for memory that can be exported");
    int descriptor = dup(memory->second.descriptor);
    if (descriptor < 0) return OUT_OF_MEMORY;
    *static_cast<int*>(out) = descriptor;
    return OK;
}
// The caller keeps its file descriptor and closes it.
CUDA(cuMemImportFromShareableHandle, unsigned long long* handle, void* system_handle, int type) {
    CALL();
    if (type != FILE_DESCRIPTOR) return NOT_SUPPORTED;
    int descriptor = dup((int)reinterpret_cast<intptr_t>(system_handle));
    struct stat status;
    if (descriptor < 0 || fstat(descriptor, &status)) return INVALID_VALUE;
    *handle = next_handle++;
    int device = current ? current->device : 0;
    memories[*handle] = {descriptor, (size_t)status.st_size, device, false, true, 1};
    return OK;
}
