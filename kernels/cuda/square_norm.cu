// The sum of the squares of a vector's finite elements, and the number of its other elements.
//
// The order of the sum is fixed, so the result equals that of the CPU bit for bit, and does not
// depend on the number of multiprocessors:
// - A part is 65536 elements, a chunk 2048. Element i of a chunk belongs to lane i mod 32.
// - A lane adds the squares of its elements in order, from 0, in f64.
// - The 32 lanes of the 32 chunks of a part are added pairwise: neighbours first, then pairs.
// - Part p belongs to lane p mod 256 of the total. A lane adds its parts in order, and the lanes
//   are added pairwise.

namespace square_norm {

constexpr u64 PART = 65536, CHUNK = 2048;
constexpr u32 ROW = 32;   // elements of a chunk that are next to each other in the lanes
constexpr u32 ROWS = CHUNK / ROW;
constexpr u32 LANES = 4;   // that one thread has

// Elements at..at+3, with zeros behind the end. Adding the square of a zero changes no sum here,
// because no sum is −0.
template <bool WHOLE, class T>
DEVICE Vector<T, LANES> read(const T* x, u64 at, u64 n) {
    if constexpr (WHOLE) return load<LANES>(x + at);
    Vector<T, LANES> values = {};
#pragma unroll
    for (u32 i = 0; i < LANES; i++)
        if (at + i < n) values.at[i] = x[at + i];
    return values;
}

// The sum over the lanes of a block of 256: neighbours first, then pairs, and so on.
DEVICE double pairwise(double x) { return block_sum(x); }

// The sum of this thread's four lanes. WHOLE: the part is whole, and can be read as vectors.
template <bool WHOLE, class T>
DEVICE double sum_lanes(const T* x, u64 n, u32& not_finite) {
    // Eight threads have the 32 lanes of a chunk, so they read neighbouring addresses.
    u64 chunk = threadIdx.x / (ROW / LANES);
    u64 first = blockIdx.x * PART + chunk * CHUNK + threadIdx.x % (ROW / LANES) * LANES;
    double lanes[LANES] = {};
#pragma unroll 8
    for (u32 row = 0; row < ROWS; row++) {
        Vector<T, LANES> values = read<WHOLE>(x, first + row * ROW, n);
#pragma unroll
        for (u32 i = 0; i < LANES; i++) {
            float value = widen(values.at[i]);
            bool finite = is_finite(value);
            not_finite += !finite;
            double kept = finite ? value : 0.0f;
            // The square of a float is exact in f64, so fusing it with the addition changes no bit.
            lanes[i] = fma(kept, kept, lanes[i]);
        }
    }
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

template <class T>
DEVICE void part(double* sums, u32* counts, const T* x, u64 n) {
    bool whole = take_vectors<LANES>(x) && (blockIdx.x + 1) * PART <= n;
    u32 not_finite = 0;
    double sum = whole ? sum_lanes<true>(x, n, not_finite) : sum_lanes<false>(x, n, not_finite);
    sum = pairwise(sum);
    not_finite = block_sum(not_finite);
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = sum;
        counts[blockIdx.x] = not_finite;
    }
}

}  // namespace square_norm

// Grid of the next two: ceil(n / 65536) blocks of 256 threads; none for n = 0.

KERNEL_OF(THREADS, square_norm_parts_f32)
(Latch* latch, double* sums, u32* counts, const float* x, u64 n) {
    RETURN_IF_LATCHED(latch);
    square_norm::part(sums, counts, x, n);
}
EXPORT_KERNEL(square_norm_parts_f32)

KERNEL_OF(THREADS, square_norm_parts_bf16)
(Latch* latch, double* sums, u32* counts, const bf16* x, u64 n) {
    RETURN_IF_LATCHED(latch);
    square_norm::part(sums, counts, x, n);
}
EXPORT_KERNEL(square_norm_parts_bf16)

// out = {weight · sum, number of elements that are not finite}. Grid: 1 block of 256 threads.
KERNEL_OF(THREADS, square_norm_total)
(Latch* latch, double* out, const double* sums, const u32* counts, u32 parts, double weight) {
    RETURN_IF_LATCHED(latch);
    double sum = 0.0;
    u64 not_finite = 0;
#pragma unroll 4
    for (u64 part = threadIdx.x; part < parts; part += THREADS) {
        sum += sums[part];
        not_finite += counts[part];
    }
    sum = square_norm::pairwise(sum);
    not_finite = block_sum(not_finite);
    if (threadIdx.x == 0) {
        out[0] = weight * sum;
        out[1] = (double)not_finite;
    }
}
EXPORT_KERNEL(square_norm_total)
