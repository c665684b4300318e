// What all kernels share: types, how kernels are declared, the latch, vector accesses and sums.
//
// The host program hands common.cuh and all .cu files to NVRTC as one source, so no file includes
// another. Tests compile each file with g++ as well: with PILLION_HOST, their own header in front
// of this file defines the macros of the first section.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// --- Declarations -------------------------------------------------------------------------------

#ifndef PILLION_HOST
// KERNEL(name)(parameters) { body }
#define KERNEL(name) extern "C" __global__ void name
// A kernel whose blocks have at most `threads` threads, so the compiler may use more registers.
#define KERNEL_OF(threads, name) extern "C" __global__ void __launch_bounds__(threads) name
// Makes a kernel known to the tests' host build.
#define EXPORT_KERNEL(name)
// An array in shared memory. Its contents are undefined when a block starts.
#define SHARED(type, name, count) __shared__ type name[count]
// The shared memory whose size the launch gives.
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

#define DEVICE __device__ __forceinline__

// The threads of a block, in all kernels that do not say otherwise.
constexpr u32 THREADS = 256;
constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// --- Elements -----------------------------------------------------------------------------------

struct bf16 {
    u16 bits;
};

constexpr u32 INFINITY_BITS = 0x7f800000u;

DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// The nearest value of type T, ties to even. NaN stays NaN.
//
// The conversion instruction of the GPU would replace the bits of a NaN. The CPU kernels keep the
// upper bits, so this code does too.
template <class T>
DEVICE T narrow(float x);
template <>
DEVICE float narrow<float>(float x) {
    return x;
}
template <>
DEVICE bf16 narrow<bf16>(float x) {
    u32 bits = __float_as_uint(x);
    u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    u32 quiet = (bits >> 16) | 0x40;
    bool is_nan = (bits & 0x7fffffffu) > INFINITY_BITS;
    return bf16{(u16)(is_nan ? quiet : rounded)};
}

// Whether x is neither infinite nor NaN. A comparison with NaN is false.
DEVICE bool is_finite(float x) { return fabsf(x) < __uint_as_float(INFINITY_BITS); }

// --- The latch ----------------------------------------------------------------------------------

// The first error on a device. Once `code` is set, later kernels do nothing, so that no kernel
// works on data that an error has left incomplete. The host reads the copy in `mirror`.
struct Latch {
    u32 code;
    u32 unused;
    u32* mirror;
};

constexpr u32 EVENT_FAILED = 1;
constexpr u32 TOKEN_OUT_OF_RANGE = 2;
constexpr u32 TARGET_OUT_OF_RANGE = 3;
constexpr u32 PEER_FAILED = 4;

// Sets the latch, unless it is set. Call it from one thread of a block.
DEVICE void set_latch(Latch* latch, u32 code) {
    if (*const_cast<const volatile u32*>(&latch->code) != 0) return;
    // The mirror first: whoever sees the code, and so does nothing, finds the host told already.
    *const_cast<volatile u32*>(latch->mirror) = code;
    __threadfence_system();
    atomicCAS(&latch->code, 0u, code);
}

// Whether the latch was set when thread 0 looked. One thread looks for the whole block, because
// another block may set the latch meanwhile, and a barrier needs all threads of a block or none.
DEVICE bool is_latched(const Latch* latch) {
    SHARED(u32, code, 1);
    if (threadIdx.x == 0) code[0] = *const_cast<const volatile u32*>(&latch->code);
    __syncthreads();
    return code[0] != 0;
}

#define RETURN_IF_LATCHED(latch) \
    if (is_latched(latch)) return

// --- Vector accesses ----------------------------------------------------------------------------

// COUNT neighbouring elements, which the GPU reads or writes with one instruction. The widest
// access is 16 bytes: 4 floats or 8 bf16. The address must be a multiple of the vector's size.
template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT) Vector {
    static_assert(sizeof(T) * COUNT <= 16, "no access is wider than 16 bytes");
    T at[COUNT];
};

// Unless ALIGNED, the elements are accessed one by one. Kernels that add up elements use this where
// the address is no multiple: a thread then has the same elements as otherwise, so the sum has the
// same bits wherever a tensor lies.
template <int COUNT, bool ALIGNED = true, class T>
DEVICE Vector<T, COUNT> load(const T* from) {
    if constexpr (ALIGNED) {
        return *reinterpret_cast<const Vector<T, COUNT>*>(from);
    } else {
        Vector<T, COUNT> values;
#pragma unroll
        for (int i = 0; i < COUNT; i++) values.at[i] = from[i];
        return values;
    }
}

template <bool ALIGNED = true, class T, int COUNT>
DEVICE void store(T* to, const Vector<T, COUNT>& values) {
    if constexpr (ALIGNED) {
        *reinterpret_cast<Vector<T, COUNT>*>(to) = values;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) to[i] = values.at[i];
    }
}

// Whether vectors of COUNT elements can be read from and written to all these addresses.
template <int COUNT, class... T>
DEVICE bool take_vectors(const T*... addresses) {
    return ((reinterpret_cast<u64>(addresses) % (sizeof(T) * COUNT) == 0) && ...);
}

// Where vector `index` of the calling thread begins in a batch that begins at element `start`. In a
// batch each thread of a block has several vectors; neighbouring threads have neighbouring vectors.
template <int COUNT, u32 BLOCK = THREADS>
DEVICE u32 place_in_batch(u32 start, u32 index) {
    return start + COUNT * (index * BLOCK + threadIdx.x);
}

// Reads a batch. A thread starts all its loads before it uses the first, so that many bytes are in
// flight; a loop with one load in each iteration would often wait for each. Vectors that begin at
// or behind `end` are not read, and hold `otherwise`.
template <bool ALIGNED = true, u32 BLOCK = THREADS, class T, int COUNT, u32 VECTORS>
DEVICE void load_batch(Vector<T, COUNT> (&batch)[VECTORS], const T* from, u32 start, u32 end,
                       T otherwise) {
#pragma unroll
    for (u32 index = 0; index < VECTORS; index++) {
        u32 at = place_in_batch<COUNT, BLOCK>(start, index);
        for (int i = 0; i < COUNT; i++) batch[index].at[i] = otherwise;
        if (at < end) batch[index] = load<COUNT, ALIGNED>(from + at);
    }
}

// --- Sums and maxima ----------------------------------------------------------------------------

// The sum over the lanes of a warp. All lanes call it, and all get the same bits, because in each
// round the two lanes of a pair add the same two numbers. T is float, double, u32 or u64.
template <class T>
DEVICE T warp_sum(T x) {
#pragma unroll
    for (u32 distance = 1; distance < WARP; distance *= 2)
        x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

// The largest over the lanes of a warp. NaN counts as smaller than all numbers.
DEVICE float warp_max(float x) {
#pragma unroll
    for (u32 distance = 1; distance < WARP; distance *= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

// The sum over the threads of a block of whole warps. All threads call it, and all get the same
// bits. Neighbours are added first, then neighbouring pairs, and so on.
template <class T>
DEVICE T block_sum(T x) {
    SHARED(T, sums, WARP);
    x = warp_sum(x);
    __syncthreads();   // until no thread reads the sums of an earlier call
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
    __syncthreads();
    u32 lane = threadIdx.x % WARP;
    return warp_sum(lane < blockDim.x / WARP ? sums[lane] : T(0));
}

// The largest over the threads of a block of whole warps, likewise.
DEVICE float block_max(float x) {
    SHARED(float, largest, WARP);
    x = warp_max(x);
    __syncthreads();   // until no thread reads the maxima of an earlier call
    if (threadIdx.x % WARP == 0) largest[threadIdx.x / WARP] = x;
    __syncthreads();
    u32 lane = threadIdx.x % WARP;
    return warp_max(largest[lane < blockDim.x / WARP ? lane : 0]);
}

// The maximum of no numbers.
DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// What a softmax subtracts before it takes exponentials: the largest number. If all numbers are
// -infinity it subtracts 0, because the difference of two infinities is NaN.
DEVICE float softmax_shift(float largest) { return largest == minus_infinity() ? 0.0f : largest; }
