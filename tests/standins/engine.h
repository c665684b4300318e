// The engine that runs kernels, as the driver stand-in and the checks use it.
#pragma once
#include "shim.h"

namespace shim {

enum class Order { FORWARD, BACKWARD, RANDOM };

struct Options {
    Order order = Order::FORWARD;   // of the threads in a block and of the blocks in a grid
    uint64_t seed = 1;              // of Order::RANDOM
    unsigned char poison = 0xff;    // what shared memory holds before a block
};

enum class Fault {
    NONE,
    LAUNCH_FAILED,     // a barrier or a warp operation that not all threads reach, or a deadlock
    ILLEGAL_ADDRESS,   // a read or write of memory that is not mapped
    MISALIGNED,        // a vector access at an address that is no multiple of its size
};
struct Outcome {
    Fault fault = Fault::NONE;
    std::string message;
};

struct Shape {
    dim3 grid, block;
    size_t shared = 0;   // bytes of dynamic shared memory
};
constexpr size_t STATIC_SHARED_LIMIT = 48 << 10, SHARED_LIMIT = 227 << 10;

// Runs all blocks on the calling thread, one at a time. Other threads wait for their turn.
Outcome run(const Shape& shape, const Body& body, const Options& options = {});

const Kernel* find_kernel(const std::string& name);
std::vector<const Kernel*> all_kernels();

}  // namespace shim
