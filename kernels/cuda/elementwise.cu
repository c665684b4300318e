// Conversions, sums and copies, element by element. Memory limits their speed, so each thread reads
// four vectors before it writes the first.

namespace elementwise {

// A block of cast and accumulate takes 4096 elements, a thread 16 of them.
constexpr int PER_THREAD = 16;
constexpr u64 PER_BLOCK = THREADS * PER_THREAD;

// A block of copy and zero takes 16384 bytes, a thread 64 of them.
constexpr u64 BYTES_PER_BLOCK = 16384;

// Calls `function(out, x)` for the elements of this block. OLD: `function` reads the old element of
// `out`. A block with WIDTH > 1 must be whole; a block with WIDTH 1 may reach behind the end.
template <int WIDTH, bool OLD, class Out, class In, class Function>
DEVICE void map_block(Out* out, const In* x, u64 n, Function function) {
    constexpr int VECTORS = PER_THREAD / WIDTH;
    u64 first = blockIdx.x * PER_BLOCK + threadIdx.x * WIDTH;
    Vector<In, WIDTH> values[VECTORS];
    Vector<Out, WIDTH> results[VECTORS];
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        u64 at = first + k * THREADS * WIDTH;
        if (WIDTH > 1 || at < n) {
            values[k] = load<WIDTH>(x + at);
            if constexpr (OLD) results[k] = load<WIDTH>(out + at);
        }
    }
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        u64 at = first + k * THREADS * WIDTH;
        if (WIDTH > 1 || at < n) {
#pragma unroll
            for (int i = 0; i < WIDTH; i++) function(results[k].at[i], values[k].at[i]);
            store(out + at, results[k]);
        }
    }
}

template <bool OLD, class Out, class In, class Function>
DEVICE void map(Out* out, const In* x, u64 n, Function function) {
    if (take_vectors<4>(out) && take_vectors<4>(x) && (blockIdx.x + 1) * PER_BLOCK <= n)
        map_block<4, OLD>(out, x, n, function);
    else
        map_block<1, OLD>(out, x, n, function);
}

// The bytes that this block copies or clears.
struct Range {
    u64 first, end;
};
DEVICE Range range_of_block(u64 bytes) {
    u64 first = blockIdx.x * BYTES_PER_BLOCK, end = first + BYTES_PER_BLOCK;
    return {first, end < bytes ? end : bytes};
}

// Copies this block's bytes as elements of type T.
template <class T>
DEVICE void copy_block(u8* out, const u8* x, Range range) {
    constexpr int BATCH = 4;
    constexpr u64 STRIDE = THREADS * sizeof(T);
    u64 first = range.first + threadIdx.x * sizeof(T);
    for (; first < range.end; first += BATCH * STRIDE) {
        T values[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            u64 at = first + k * STRIDE;
            if (at < range.end) values[k] = *reinterpret_cast<const T*>(x + at);
        }
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            u64 at = first + k * STRIDE;
            if (at < range.end) *reinterpret_cast<T*>(out + at) = values[k];
        }
    }
}

template <class T>
DEVICE void zero_block(u8* out, Range range) {
    u64 at = range.first + threadIdx.x * sizeof(T);
#pragma unroll 4
    for (; at < range.end; at += THREADS * sizeof(T)) *reinterpret_cast<T*>(out + at) = T{};
}

}  // namespace elementwise

// Grid of the next three: ceil(n / 4096) blocks of 256 threads.

KERNEL_OF(THREADS, cast_f32_bf16)(Latch* latch, bf16* out, const float* x, u64 n) {
    RETURN_IF_LATCHED(latch);
    elementwise::map<false>(out, x, n, [](bf16& out, float x) { out = narrow<bf16>(x); });
}
EXPORT_KERNEL(cast_f32_bf16)

KERNEL_OF(THREADS, cast_bf16_f32)(Latch* latch, float* out, const bf16* x, u64 n) {
    RETURN_IF_LATCHED(latch);
    elementwise::map<false>(out, x, n, [](float& out, bf16 x) { out = widen(x); });
}
EXPORT_KERNEL(cast_bf16_f32)

// out += x
KERNEL_OF(THREADS, accumulate)(Latch* latch, float* out, const float* x, u64 n) {
    RETURN_IF_LATCHED(latch);
    elementwise::map<true>(out, x, n, [](float& out, float x) { out += x; });
}
EXPORT_KERNEL(accumulate)

// Grid of the next two: ceil(bytes / 16384) blocks of 256 threads. Each block takes the widest
// elements that its addresses and its number of bytes allow. So a shard that starts at any bf16 is
// still copied 2 bytes at a time, and only the last block of an aligned copy is slower.

// The two ranges do not overlap.
KERNEL_OF(THREADS, copy)(Latch* latch, u8* out, const u8* x, u64 bytes) {
    RETURN_IF_LATCHED(latch);
    elementwise::Range range = elementwise::range_of_block(bytes);
    u64 bits = reinterpret_cast<u64>(out) | reinterpret_cast<u64>(x) | (range.end - range.first);
    if (bits % 16 == 0)
        elementwise::copy_block<uint4>(out, x, range);
    else if (bits % 4 == 0)
        elementwise::copy_block<u32>(out, x, range);
    else if (bits % 2 == 0)
        elementwise::copy_block<u16>(out, x, range);
    else
        elementwise::copy_block<u8>(out, x, range);
}
EXPORT_KERNEL(copy)

KERNEL_OF(THREADS, zero)(Latch* latch, u8* out, u64 bytes) {
    RETURN_IF_LATCHED(latch);
    elementwise::Range range = elementwise::range_of_block(bytes);
    u64 bits = reinterpret_cast<u64>(out) | (range.end - range.first);
    if (bits % 16 == 0)
        elementwise::zero_block<uint4>(out, range);
    else if (bits % 4 == 0)
        elementwise::zero_block<u32>(out, range);
    else if (bits % 2 == 0)
        elementwise::zero_block<u16>(out, range);
    else
        elementwise::zero_block<u8>(out, range);
}
EXPORT_KERNEL(zero)
