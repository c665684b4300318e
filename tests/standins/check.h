// How a check of a kernel describes one launch of it.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "engine.h"

namespace check {

using u32 = unsigned;
using u64 = unsigned long long;

enum Type { NONE, F32, BF16, F64, U32, U8 };
inline size_t size_of(Type type) {
    return type == F64 ? 8 : type == BF16 ? 2 : type == U8 ? 1 : 4;
}
inline u32 ceil_div(u64 a, u64 b) { return (u32)((a + b - 1) / b); }

// A heap block that ends where the kernel's buffer ends, so that AddressSanitizer sees an access
// one element too far. The buffer starts at any multiple of its element's size.
struct Buffer {
    enum Use { IN, OUT, IN_OUT } use;
    size_t bytes, offset;
    std::unique_ptr<char[]> heap;
    std::vector<char> contents;   // before each launch; not of OUT
    char* start() const { return heap.get() + offset; }
};

struct Launch {
    shim::Shape shape;
    std::vector<std::vector<char>> arguments;   // bytes of each, the latch excepted
};

class Case {
  public:
    Case(const std::string& kernel, uint64_t seed);

    // The types at the end of the kernel's name: 0 is the first. adamw_none_bf16 has NONE and BF16.
    Type type(size_t i) const { return types[i]; }
    const std::string kernel;
    std::string base;   // the name without its types

    // A random number from `least` to `most`; often one of the two, or a multiple of 8.
    u64 number(u64 least, u64 most);
    bool coin() { return random() & 1; }
    // Whether all buffers from now on start at multiples of 16.
    void align(bool all) { aligned = all; }

    // Buffers, which become arguments. Numbers are small, and some are 0. `special` adds infinities
    // and NaN. A buffer of type NONE is a null pointer.
    void* in(Type type, u64 count, bool special = false);
    void* in_out(Type type, u64 count);
    void* out(Type type, u64 count);   // the kernel must write all of it
    // Numbers below `limit`, and with a small chance one that is not.
    void* indices(u64 count, u32 limit);
    void* words(std::vector<u32> values);

    template <class... A>
    Launch launch(dim3 grid, size_t shared, A... arguments) {
        Launch launch;
        launch.shape = {grid, dim3(threads), shared};
        (launch.arguments.push_back(bytes_of(arguments)), ...);
        return launch;
    }

    std::vector<Buffer> buffers;
    u32 threads = 256;           // of a block
    bool latch_matters = true;   // if it is set, the kernel must write nothing
    bool may_latch = false;      // the input is bad, so the kernel sets the latch

  private:
    template <class A> static std::vector<char> bytes_of(const A& argument) {
        auto* bytes = reinterpret_cast<const char*>(&argument);
        return std::vector<char>(bytes, bytes + sizeof argument);
    }
    uint64_t random();
    Buffer& add(Buffer::Use use, Type type, u64 count);
    std::vector<Type> types;
    uint64_t state;
    bool aligned;   // all buffers of the case start at multiples of 16
};

// How to launch a kernel, by the base of its name. Null if calls.cpp has no line for it.
using Call = Launch (*)(Case&);
Call call_of(const std::string& base);

}  // namespace check
