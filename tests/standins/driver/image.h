// What the stand-in reads in a module: which kernels it holds, and how large their parameters are.
#pragma once
#include <stddef.h>

#include <map>
#include <string>
#include <vector>

namespace standin {

struct Entry {
    std::vector<size_t> parameters;   // bytes of each
    size_t static_shared = 0;         // bytes; known for cubins only
};

// Reads PTX or a cubin, as NVRTC writes them. Empty if `image` is neither, or holds no kernel.
std::map<std::string, Entry> read_image(const void* image);

}  // namespace standin
