// CUDA C++ for g++: what a kernel of kernels/cuda may use, on a CPU.
//
// A kernel is compiled by g++ with this header in front of it. Each CUDA thread becomes a fiber,
// and one block runs at a time. The engine (shim.cpp) switches fibers at barriers and warp
// operations. Only tests use this. It proves what a kernel computes, not how fast a GPU computes
// it.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// --- Words of CUDA that mean nothing on a CPU -------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// --- Vector types. Their alignment matters: a GPU traps on a misaligned access ----------------

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 { unsigned x, y, z; };

#define SHIM_VECTORS(type, name, align2, align4)                                     \
    struct alignas(align2) name##2 { type x, y; };                                   \
    struct alignas(align4) name##4 { type x, y, z, w; };                             \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                 \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SHIM_VECTORS(float, float, 8, 16)
SHIM_VECTORS(int, int, 8, 16)
SHIM_VECTORS(unsigned, uint, 8, 16)
SHIM_VECTORS(unsigned short, ushort, 4, 8)
SHIM_VECTORS(unsigned char, uchar, 2, 4)
#undef SHIM_VECTORS
struct alignas(16) double2 { double x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
inline double2 make_double2(double x, double y) { return {x, y}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

// --- The engine, as kernels see it --------------------------------------------------------------

namespace shim {

// A line of a kernel, for messages and to compare where threads wait.
struct Place {
    const char* file;
    int line;
};

// A copy to shared memory that has started and has moved nothing yet.
struct Copy {
    void* to;
    const void* from;   // null: zeros
    unsigned bytes;
    unsigned group;     // number of the group that it belongs to
};

// The thread that runs now.
struct Thread {
    uint3 index;       // threadIdx
    unsigned number;   // index in the block, x fastest
    unsigned lane;     // number mod 32
    std::vector<Copy> copies;
    unsigned groups;   // groups of copies that have ended
};
extern Thread* current;
extern dim3 grid, block;
extern uint3 block_index;

// One declaration of shared memory. Before a block's first use the engine fills it with poison.
struct SharedSite {
    size_t bytes, align;
    void* memory;
    uint64_t block;   // the block (counted from the start of the process) that `memory` belongs to
};
void* shared_memory(SharedSite& site);
void* dynamic_shared_memory();

enum Vote { NONE, OR, AND, COUNT };
int wait_for_block(Vote vote, int value, Place place);

enum WarpOperation { SYNC, SHUFFLE, BALLOT, LOAD_MATRICES, MULTIPLY };
struct WarpValues {
    uint64_t value[32];   // by lane
    unsigned mask;        // lanes that took part
};
// Waits until all lanes of `mask` have called. The lane that comes last calls `combine`. The result
// is valid until this lane's next call.
const WarpValues& wait_for_warp(WarpOperation operation, unsigned mask, uint64_t value, Place place,
                                void (*combine)(const WarpValues&) = nullptr);
void lane_is_missing(unsigned lane, Place place);
bool copy_lands_at_once();   // a choice, other ones for each launch
void address_is_misaligned(const void* address, unsigned alignment, Place place);

template <class T, size_t COUNT, class Site>
T (&shared_array(Site))[COUNT] {
    // The type of a lambda is different at each place and in each instantiation of a template, so
    // each declaration has a site of its own, as on a GPU.
    static SharedSite site = {sizeof(T) * COUNT, alignof(T), nullptr, 0};
    return *reinterpret_cast<T(*)[COUNT]>(shared_memory(site));
}

template <class T>
T shuffle(unsigned mask, T value, unsigned from, Place place) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "the shim shuffles values of 4 and 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    const WarpValues& values = wait_for_warp(SHUFFLE, mask, bits, place);
    if (!(values.mask >> (from & 31) & 1)) lane_is_missing(from & 31, place);
    T result;
    memcpy(&result, &values.value[from & 31], sizeof(T));
    return result;
}
// A lane that would read behind the last lane keeps its own value.
template <class T>
T shuffle_down(unsigned mask, T value, unsigned distance, Place place) {
    unsigned from = current->lane + distance;
    return shuffle(mask, value, from < 32 ? from : current->lane, place);
}
template <class T>
T shuffle_up(unsigned mask, T value, unsigned distance, Place place) {
    unsigned lane = current->lane;
    return shuffle(mask, value, lane >= distance ? lane - distance : lane, place);
}
inline unsigned ballot(unsigned mask, int predicate, Place place) {
    const WarpValues& values = wait_for_warp(BALLOT, mask, predicate != 0, place);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if (values.mask >> lane & 1) votes |= (unsigned)values.value[lane] << lane;
    return votes;
}
inline void synchronise_warp(Place place, unsigned mask = 0xffffffffu) {
    wait_for_warp(SYNC, mask, 0, place);
}

template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace shim

#define SHIM_HERE (shim::Place{__FILE__, __LINE__})
#define SHIM_LANE (shim::current->lane)

// --- Built-in variables and functions ------------------------------------------------------------

#define threadIdx (shim::current->index)
#define blockIdx (shim::block_index)
#define blockDim (shim::block)
#define gridDim (shim::grid)

#define __syncthreads() ((void)shim::wait_for_block(shim::NONE, 0, SHIM_HERE))
#define __syncthreads_or(value) (shim::wait_for_block(shim::OR, (value), SHIM_HERE))
#define __syncthreads_and(value) (shim::wait_for_block(shim::AND, (value), SHIM_HERE))
#define __syncthreads_count(value) (shim::wait_for_block(shim::COUNT, (value), SHIM_HERE))
#define __syncwarp(...) (shim::synchronise_warp(SHIM_HERE __VA_OPT__(, ) __VA_ARGS__))
#define __shfl_sync(mask, value, from) (shim::shuffle((mask), (value), (from), SHIM_HERE))
#define __shfl_xor_sync(mask, value, bits) \
    (shim::shuffle((mask), (value), SHIM_LANE ^ (unsigned)(bits), SHIM_HERE))
#define __shfl_down_sync(mask, value, n) (shim::shuffle_down((mask), (value), (n), SHIM_HERE))
#define __shfl_up_sync(mask, value, n) (shim::shuffle_up((mask), (value), (n), SHIM_HERE))
#define __ballot_sync(mask, predicate) (shim::ballot((mask), (predicate), SHIM_HERE))
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(unsigned x) { return shim::same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return shim::same_bits<unsigned>(x); }
inline float __int_as_float(int x) { return shim::same_bits<float>(x); }
inline int __float_as_int(float x) { return shim::same_bits<int>(x); }
inline double __longlong_as_double(long long x) { return shim::same_bits<double>(x); }
inline long long __double_as_longlong(double x) { return shim::same_bits<long long>(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline unsigned umin(unsigned a, unsigned b) { return b < a ? b : a; }

template <class T> inline T __ldg(const T* from) { return *from; }
inline void __threadfence_block() { asm volatile("" ::: "memory"); }
inline void __threadfence() { asm volatile("mfence" ::: "memory"); }
inline void __threadfence_system() { asm volatile("mfence" ::: "memory"); }

// --- Copies to shared memory, and tensor cores: the functions of tensor.cuh ----------------------

// A copy moves its bytes as early as it may, at once, or as late, when its thread waits for its
// group.
namespace shim {
inline void land(const Copy& copy) {
    if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
    else memset(copy.to, 0, copy.bytes);
}
}  // namespace shim

template <int BYTES>
void cp_async(void* to, const void* from, bool exists,
              shim::Place place = {__builtin_FILE(), __builtin_LINE()}) {
    static_assert(BYTES == 4 || BYTES == 16, "this shim copies 4 or 16 bytes");
    for (const void* address : {(const void*)to, from})
        if ((uintptr_t)address % BYTES) shim::address_is_misaligned(address, BYTES, place);
    shim::Copy copy = {to, exists ? from : nullptr, BYTES, shim::current->groups};
    if (shim::copy_lands_at_once()) shim::land(copy);
    else shim::current->copies.push_back(copy);
}
inline void cp_async_commit() { shim::current->groups++; }
template <int NEWEST>
void cp_async_wait() {
    auto& copies = shim::current->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group + NEWEST < shim::current->groups; done++)
        shim::land(copies[done]);
    copies.erase(copies.begin(), copies.begin() + done);
}

namespace shim {

// `row` is the address that this lane gives. Matrix i has its rows from lanes 8i to 8i + 7.
inline void load_matrices(unsigned (&to)[4], const void* row, bool transposed, Place place) {
    if ((uintptr_t)row % 16) address_is_misaligned(row, 16, place);
    const WarpValues& values = wait_for_warp(LOAD_MATRICES, 0xffffffffu, (uint64_t)row, place);
    unsigned group = current->lane / 4, member = current->lane % 4;
    for (unsigned matrix = 0; matrix < 4; matrix++) {
        uint16_t two[2];
        for (unsigned i = 0; i < 2; i++) {
            unsigned from = transposed ? 2 * member + i : group;
            unsigned column = transposed ? group : 2 * member + i;
            if (!(values.mask >> (8 * matrix + from) & 1)) lane_is_missing(8 * matrix + from, place);
            two[i] = ((const uint16_t*)values.value[8 * matrix + from])[column];
        }
        memcpy(&to[matrix], two, 4);
    }
}

// What a lane has of a product [16, 16] x [16, 8].
struct Product {
    float (&sums)[4];
    const unsigned (&left)[4];
    unsigned right[2];
};
inline void multiply(const WarpValues& values) {
    float left[16][16], right[16][8];
    auto spread = [](unsigned both, float& low, float& high) {
        low = same_bits<float>(both << 16), high = same_bits<float>(both & 0xffff0000u);
    };
    for (unsigned lane = 0; lane < 32; lane++) {
        const Product& product = *(const Product*)values.value[lane];
        unsigned group = lane / 4, member = lane % 4;
        for (unsigned i = 0; i < 4; i++) {
            float* at = &left[group + 8 * (i % 2)][2 * member + 8 * (i / 2)];
            spread(product.left[i], at[0], at[1]);
        }
        for (unsigned i = 0; i < 2; i++) {
            unsigned row = 2 * member + 8 * i;
            spread(product.right[i], right[row][group], right[row + 1][group]);
        }
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        Product& product = *(Product*)values.value[lane];
        for (unsigned i = 0; i < 4; i++) {
            unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            // A product of two bf16 is exact in f32.
            for (unsigned k = 0; k < 16; k++) product.sums[i] += left[row][k] * right[k][column];
        }
    }
}

}  // namespace shim

inline void ldmatrix(unsigned (&to)[4], const void* row,
                     shim::Place place = {__builtin_FILE(), __builtin_LINE()}) {
    shim::load_matrices(to, row, false, place);
}
inline void ldmatrix_transposed(unsigned (&to)[4], const void* row,
                                shim::Place place = {__builtin_FILE(), __builtin_LINE()}) {
    shim::load_matrices(to, row, true, place);
}
inline void mma(float (&sums)[4], const unsigned (&left)[4], unsigned right_low,
                unsigned right_high, shim::Place place = {__builtin_FILE(), __builtin_LINE()}) {
    shim::Product product = {sums, left, {right_low, right_high}};
    shim::wait_for_warp(shim::MULTIPLY, 0xffffffffu, (uint64_t)&product, place, shim::multiply);
}

// Atomics of integers only: the order of float atomics is not fixed, so no kernel may use them.
inline unsigned atomicAdd(unsigned* to, unsigned x) {
    return __atomic_fetch_add(to, x, __ATOMIC_RELAXED);
}
inline unsigned atomicExch(unsigned* to, unsigned x) {
    return __atomic_exchange_n(to, x, __ATOMIC_RELAXED);
}
inline unsigned atomicCAS(unsigned* to, unsigned expected, unsigned x) {
    __atomic_compare_exchange_n(to, &expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

// --- Kernels -------------------------------------------------------------------------------------

namespace shim {

using Body = std::function<void()>;

struct Parameter {
    size_t bytes, align;
};
struct Kernel {
    std::string name;
    std::vector<Parameter> parameters;
    unsigned most_threads = 1024;                 // of a block; KERNEL_OF lowers it
    std::function<Body(void** arguments)> bind;   // copies the arguments, as a launch does
};

template <class... A, size_t... I>
Body bind_arguments(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    std::tuple<A...> copies(*static_cast<A*>(arguments[I])...);
    return [kernel, copies] { std::apply(kernel, copies); };
}
template <class... A>
Kernel describe(const char* name, void (*kernel)(A...)) {
    return {name, {Parameter{sizeof(A), alignof(A)}...}, 1024, [kernel](void** arguments) {
                return bind_arguments(kernel, arguments, std::index_sequence_for<A...>{});
            }};
}

struct Register {
    explicit Register(Kernel kernel);
    Register(const char* name, unsigned most_threads);
};

}  // namespace shim

#define KERNEL(name) extern "C" void name
#define KERNEL_OF(threads, name)                                        \
    static const shim::Register shim_bounds_##name(#name, threads);     \
    extern "C" void name
#define EXPORT_KERNEL(name) \
    static const shim::Register shim_kernel_##name(shim::describe(#name, name));
#define SHARED(type, name, count) type(&name)[count] = shim::shared_array<type, (count)>([] {})
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(shim::dynamic_shared_memory())
