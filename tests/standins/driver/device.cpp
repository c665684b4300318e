// Devices and contexts. A device looks like an H100, and its name says that it is not one.
#include <stdio.h>
#include <string.h>
#include <stdlib.h>

#include <algorithm>

#include "../driver.h"

namespace standin {

bool initialized;
thread_local Context* current;

static Context* contexts[64];

int devices() {
    static int count = std::clamp(setting("PILLION_STANDIN_DEVICES", 2), 0L, 64L);
    return count;
}
size_t device_memory() {
    static size_t bytes = setting("PILLION_STANDIN_MEMORY", 1L << 30);
    return bytes;
}
Context* context_of(int device) { return contexts[device]; }

int check_current() {
    if (!current) return refuse(INVALID_CONTEXT, "no context is current on this thread");
    return current->error;
}

static bool is_device(int device) { return device >= 0 && device < devices(); }

static int attribute(int number) {
    switch (number) {
        case 1: return 1024;          // threads per block
        case 2: case 3: return 1024;  // block x, y
        case 4: return 64;            // block z
        case 5: return 0x7fffffff;    // grid x
        case 6: case 7: return 65535; // grid y, z
        case 8: return 48 << 10;      // shared memory per block
        case 10: return 32;           // warp
        case 12: return 65536;        // registers per block
        case 13: return 1980000;      // clock in kHz
        case 16: return MULTIPROCESSORS;
        case 19: return 1;            // can map host memory
        case 31: return 1;            // concurrent kernels
        case 34: return 0;            // PCI device
        case 36: return 2619000;      // memory clock in kHz
        case 37: return 5120;         // memory bus in bits
        case 38: return 50 << 20;     // L2
        case 39: return 2048;         // threads per multiprocessor
        case 40: return 3;            // copy engines
        case 41: return 1;            // unified addressing
        case 75: return 9;            // compute capability 9.0
        case 76: return 0;
        case 78: return 1;            // stream priorities
        case 81: return 228 << 10;    // shared memory per multiprocessor
        case 82: return 65536;        // registers per multiprocessor
        case 91: return 1;            // host pointers of registered memory work on the device
        case 92: case 93: case 122: return 1;   // stream memory operations
        case 94: case 123: return 1;  // CU_STREAM_WAIT_VALUE_NOR
        case 95: return 1;            // cooperative launch
        case 97: return 227 << 10;    // shared memory per block, on request
        case 99: return 1;            // host registration
        case 102: return 1;           // virtual memory management
        case 103: return 1;           // its handles as file descriptors
        case 106: return 32;          // blocks per multiprocessor
        case 115: return 0;           // memory pools: the stand-in has none
        case 120: return 1;           // clusters
        default: return 0;
    }
}

}  // namespace standin

using namespace standin;

CUDA(cuInit, unsigned flags) {
    Guard guard(lock);
    const char* allowed = getenv("PILLION_STANDIN");
    if (!allowed || strcmp(allowed, "1"))
        return refuse(STUB_LIBRARY,
                      "cuInit refuses: this library is for tests of Pillion and computes on the "
                      "CPU. Remove it from LD_LIBRARY_PATH to use a GPU. Tests set "
                      "PILLION_STANDIN=1.");
    if (int error = begin_call(__func__)) return error;
    if (flags) return INVALID_VALUE;
    if (devices() == 0) return NO_DEVICE;
    initialized = true;
    return OK;
}
CUDA(cuDriverGetVersion, int* version) {
    *version = 12090;
    return OK;
}
CUDA(cuDeviceGetCount, int* count) {
    CALL();
    *count = devices();
    return OK;
}
CUDA(cuDeviceGet, int* device, int ordinal) {
    CALL();
    if (!is_device(ordinal)) return INVALID_DEVICE;
    *device = ordinal;
    return OK;
}
CUDA(cuDeviceGetName, char* name, int bytes, int device) {
    CALL();
    if (!is_device(device)) return INVALID_DEVICE;
    snprintf(name, bytes, "stand-in (not a GPU) %d", device);
    return OK;
}
// The same in all processes of a machine, and different on each of its devices.
CUDA(cuDeviceGetUuid_v2, void* uuid, int device) {
    CALL();
    if (!is_device(device)) return INVALID_DEVICE;
    memcpy(uuid, "pillion standin", 15);
    static_cast<char*>(uuid)[14] = (char)setting("PILLION_STANDIN_HOST", 0);
    static_cast<char*>(uuid)[15] = (char)device;
    return OK;
}
CUDA(cuDeviceTotalMem_v2, size_t* bytes, int device) {
    CALL();
    if (!is_device(device)) return INVALID_DEVICE;
    *bytes = device_memory();
    return OK;
}
CUDA(cuDeviceGetAttribute, int* value, int number, int device) {
    CALL();
    if (!is_device(device)) return INVALID_DEVICE;
    *value = number == 33 ? device + 1 : attribute(number);   // 33: PCI bus
    return OK;
}
// PILLION_STANDIN_PEERS=0 models devices that cannot reach each other's memory.
CUDA(cuDeviceCanAccessPeer, int* can, int device, int peer) {
    CALL();
    if (!is_device(device) || !is_device(peer)) return INVALID_DEVICE;
    *can = device != peer && setting("PILLION_STANDIN_PEERS", 1) != 0;
    return OK;
}
CUDA(cuCtxEnablePeerAccess, void* peer, unsigned flags) {
    CALL_IN_CONTEXT();
    auto* other = static_cast<Context*>(peer);
    if (!other || other == current) return INVALID_CONTEXT;
    if (flags) return INVALID_VALUE;
    if (setting("PILLION_STANDIN_PEERS", 1) == 0) return PEER_ACCESS_UNSUPPORTED;
    for (int device : current->peers)
        if (device == other->device) return PEER_ACCESS_ALREADY_ENABLED;
    current->peers.push_back(other->device);
    return OK;
}

CUDA(cuDevicePrimaryCtxRetain, void** context, int device) {
    CALL();
    if (!is_device(device)) return INVALID_DEVICE;
    Context*& primary = contexts[device];
    if (!primary) {
        primary = new Context;
        primary->device = device;
        primary->null_stream = new_stream(primary, false);
    }
    primary->references++;
    *context = primary;
    return OK;
}
// The last release destroys the context: the next one to retain it gets a new one without errors.
CUDA(cuDevicePrimaryCtxRelease_v2, int device) {
    CALL();
    if (!is_device(device) || !contexts[device]) return INVALID_CONTEXT;
    if (--contexts[device]->references == 0) contexts[device] = nullptr;
    return OK;
}
CUDA(cuDevicePrimaryCtxSetFlags_v2, int device, unsigned flags) {
    CALL();
    if (!is_device(device)) return INVALID_DEVICE;
    if (contexts[device]) contexts[device]->flags = flags;
    return OK;
}
CUDA(cuDevicePrimaryCtxGetState, int device, unsigned* flags, int* active) {
    CALL();
    if (!is_device(device)) return INVALID_DEVICE;
    *active = contexts[device] != nullptr;
    *flags = contexts[device] ? contexts[device]->flags : 0;
    return OK;
}
CUDA(cuCtxSetCurrent, void* context) {
    CALL();
    current = static_cast<Context*>(context);
    return OK;
}
CUDA(cuCtxGetCurrent, void** context) {
    CALL();
    *context = current;
    return OK;
}
CUDA(cuCtxGetDevice, int* device) {
    CALL();
    if (!current) return INVALID_CONTEXT;
    *device = current->device;
    return OK;
}
CUDA(cuCtxSetFlags, unsigned flags) {
    CALL_IN_CONTEXT();
    current->flags = flags;
    return OK;
}
CUDA(cuCtxGetStreamPriorityRange, int* least, int* greatest) {
    CALL_IN_CONTEXT();
    *least = 0;
    *greatest = -5;
    return OK;
}

struct ErrorText {
    int error;
    const char *name, *text;
};
static const ErrorText errors[] = {
    {OK, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {STUB_LIBRARY, "CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {PEER_ACCESS_UNSUPPORTED, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "peer access is not supported"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in this state"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested"},
    {LAUNCH_TIMEOUT, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out"},
    {PEER_ACCESS_ALREADY_ENABLED, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED",
     "peer access is enabled already"},
    {HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the memory is registered already"},
    {HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "the memory is not registered"},
    {MISALIGNED_ADDRESS, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};
static const ErrorText* find_error(int error) {
    for (const ErrorText& known : errors)
        if (known.error == error) return &known;
    return nullptr;
}
CUDA(cuGetErrorName, int error, const char** name) {
    const ErrorText* known = find_error(error);
    *name = known ? known->name : nullptr;
    return known ? OK : INVALID_VALUE;
}
CUDA(cuGetErrorString, int error, const char** text) {
    const ErrorText* known = find_error(error);
    *text = known ? known->text : nullptr;
    return known ? OK : INVALID_VALUE;
}
