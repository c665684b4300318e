// Modules, functions and launches. The image says which kernels there are; the code that runs is
// the host build of the same sources.
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "../driver.h"
#include "../engine.h"
#include "image.h"

using namespace standin;

namespace {

struct Module {
    Context* context;
    std::map<std::string, Entry> entries;
    bool unloaded = false;
};
struct Function {
    std::string name;
    Module* module;
    const shim::Kernel* kernel;
    size_t static_shared;
    int most_dynamic_shared = 48 << 10;
};
// Never deleted, so that a late use is reported.
auto& functions = *new std::vector<Function*>;

Function* function_of(void* handle) {
    for (Function* function : functions)
        if (function == handle) {
            if (function->module->unloaded)
                say("the module of kernel %s was unloaded", function->name.c_str());
            return function->module->unloaded ? nullptr : function;
        }
    say("%p is no function", handle);
    return nullptr;
}

// The order in which a kernel's threads run: PILLION_STANDIN_ORDER, or else chosen for each launch.
shim::Options order_of_threads() {
    static const char* order = getenv("PILLION_STANDIN_ORDER");
    shim::Options options;
    options.seed = random_number();
    std::string name = order ? order : "";
    if (name == "forward") options.order = shim::Order::FORWARD;
    else if (name == "backward") options.order = shim::Order::BACKWARD;
    else if (name == "random") options.order = shim::Order::RANDOM;
    else options.order = static_cast<shim::Order>(options.seed % 3);
    return options;
}

int error_of(shim::Fault fault) {
    switch (fault) {
        case shim::Fault::NONE: return OK;
        case shim::Fault::ILLEGAL_ADDRESS: return ILLEGAL_ADDRESS;
        case shim::Fault::MISALIGNED: return MISALIGNED_ADDRESS;
        default: return LAUNCH_FAILED;
    }
}

int load(void** module, const void* image) {
    auto entries = read_image(image);
    if (entries.empty())
        return refuse(INVALID_IMAGE, "the image is neither PTX nor a cubin, or has no kernels");
    *module = new Module{current, std::move(entries)};
    counters.modules++;
    return OK;
}

// Both compilers must agree on the parameters, or the host would pass arguments that the device
// reads otherwise.
int check_parameters(const std::string& name, const Entry& entry, const shim::Kernel& kernel) {
    bool same = entry.parameters.size() == kernel.parameters.size();
    std::string image, host;
    for (size_t bytes : entry.parameters) image += " " + std::to_string(bytes);
    for (const shim::Parameter& parameter : kernel.parameters)
        host += " " + std::to_string(parameter.bytes);
    if (same && image == host) return OK;
    return refuse(INVALID_IMAGE, "kernel %s: bytes of its parameters in the image:%s, in the host "
                  "build:%s", name.c_str(), image.c_str(), host.c_str());
}

}  // namespace

CUDA(cuModuleLoadData, void** module, const void* image) {
    CALL_IN_CONTEXT();
    return load(module, image);
}
CUDA(cuModuleLoadDataEx, void** module, const void* image, unsigned, void*, void**) {
    CALL_IN_CONTEXT();
    return load(module, image);
}
CUDA(cuModuleUnload, void* module) {
    CALL_IN_CONTEXT();
    static_cast<Module*>(module)->unloaded = true;
    return OK;
}
CUDA(cuModuleGetFunction, void** function, void* module_handle, const char* name) {
    CALL_IN_CONTEXT();
    auto* module = static_cast<Module*>(module_handle);
    auto entry = module->entries.find(name);
    if (entry == module->entries.end())
        return refuse(NOT_FOUND, "the image has no kernel %s", name);
    const shim::Kernel* kernel = shim::find_kernel(name);
    if (!kernel)
        return refuse(NOT_FOUND, "the host build has no kernel %s (no EXPORT_KERNEL?)", name);
    if (int error = check_parameters(name, entry->second, *kernel)) return error;
    functions.push_back(new Function{name, module, kernel, entry->second.static_shared});
    *function = functions.back();
    return OK;
}

enum { MAX_THREADS = 0, SHARED_BYTES = 1, LOCAL_BYTES = 3, REGISTERS = 4, MAX_DYNAMIC_SHARED = 8 };

CUDA(cuFuncSetAttribute, void* handle, int attribute, int value) {
    CALL_IN_CONTEXT();
    Function* function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    if (attribute == MAX_DYNAMIC_SHARED) {
        if (value < 0 || value + function->static_shared > shim::SHARED_LIMIT) return INVALID_VALUE;
        function->most_dynamic_shared = value;
    }
    return OK;
}
CUDA(cuFuncGetAttribute, int* value, int attribute, void* handle) {
    CALL_IN_CONTEXT();
    Function* function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    switch (attribute) {
        case MAX_THREADS: *value = (int)function->kernel->most_threads; break;
        case SHARED_BYTES: *value = (int)function->static_shared; break;
        case REGISTERS: *value = 32; break;
        case MAX_DYNAMIC_SHARED: *value = function->most_dynamic_shared; break;
        case LOCAL_BYTES: default: *value = 0;
    }
    return OK;
}
// By threads and shared memory. The stand-in does not know registers.
CUDA(cuOccupancyMaxActiveBlocksPerMultiprocessor, int* blocks, void* handle, int threads,
     size_t dynamic_shared) {
    CALL_IN_CONTEXT();
    Function* function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    if (threads <= 0) return INVALID_VALUE;
    size_t shared = function->static_shared + dynamic_shared + 1024;
    size_t most = std::min<size_t>(2048 / (size_t)threads, (228 << 10) / shared);
    *blocks = (int)std::min<size_t>(most, 32);
    return OK;
}

CUDA(cuLaunchKernel, void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z,
     unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared, void* stream_handle,
     void** arguments, void** extra) {
    CALL_IN_CONTEXT();
    Function* function = function_of(handle);
    Stream* stream = stream_of(stream_handle);
    if (!function || !stream) return INVALID_HANDLE;
    const char* name = function->name.c_str();
    if (function->module->context != stream->context)
        return refuse(INVALID_CONTEXT, "%s: the contexts of module and stream differ", name);
    if (extra || (!arguments && !function->kernel->parameters.empty()))
        return refuse(INVALID_VALUE, "%s: arguments must be an array of pointers", name);
    if (!grid_x || grid_x > 0x7fffffff || !grid_y || grid_y > 65535 || !grid_z || grid_z > 65535)
        return refuse(INVALID_VALUE, "%s: a grid of (%u, %u, %u)", name, grid_x, grid_y, grid_z);
    if (!block_x || block_x > 1024 || !block_y || block_y > 1024 || !block_z || block_z > 64 ||
        block_x * block_y * block_z > 1024)
        return refuse(INVALID_VALUE, "%s: a block of (%u, %u, %u)", name, block_x, block_y,
                      block_z);
    if (block_x * block_y * block_z > function->kernel->most_threads)
        return refuse(LAUNCH_OUT_OF_RESOURCES,
                      "%s: a block of %u threads, but the kernel was compiled for %u", name,
                      block_x * block_y * block_z, function->kernel->most_threads);
    if ((int)shared > function->most_dynamic_shared)
        return refuse(INVALID_VALUE, "%s: %u bytes of dynamic shared memory, but %d are allowed "
                      "(cuFuncSetAttribute)", name, shared, function->most_dynamic_shared);
    counters.launches++;
    shim::Shape shape = {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared};
    shim::Body body = function->kernel->bind(arguments);
    shim::Options options = order_of_threads();
    enqueue(stream, {"kernel", function->name, {}, {}, [=] {
        shim::Outcome outcome = shim::run(shape, body, options);
        if (outcome.fault != shim::Fault::NONE)
            say("kernel %s: %s", function->name.c_str(), outcome.message.c_str());
        return error_of(outcome.fault);
    }});
    return OK;
}
