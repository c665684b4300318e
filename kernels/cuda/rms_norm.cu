// RMSNorm, forward and backward; kernels/src/cpu/norm.rs has the formulas.
//
// Both kernels pass over a row twice: first for a sum over the row, then for the results. Memory is
// read once, because the second pass finds the row in the cache of its SM. Vectors hold four
// elements, so a warp reads 512 neighbouring bytes of f32.

namespace rms_norm {

// A thread starts this many loads from memory before it uses the first. Loads of single elements of
// a vector are many already. The order of a thread's elements does not depend on it.
template <bool ALIGNED>
constexpr int VECTORS = ALIGNED ? 4 : 1;
template <int COUNT, bool ALIGNED>
constexpr u32 BATCH = VECTORS<ALIGNED> * COUNT * THREADS;

// --- Forward ------------------------------------------------------------------------------------

template <int COUNT, bool ALIGNED, class A, class W>
DEVICE void forward_row(A* out, float* inverse_rms, const float* x, const W* weight, u32 width,
                        float epsilon) {
    float squares = 0;
    for (u32 start = 0; start < width; start += BATCH<COUNT, ALIGNED>) {
        Vector<float, COUNT> xs[VECTORS<ALIGNED>];
        load_batch<ALIGNED>(xs, x, start, width, 0.0f);
#pragma unroll
        for (int k = 0; k < VECTORS<ALIGNED>; k++)
            for (int i = 0; i < COUNT; i++) squares = fmaf(xs[k].at[i], xs[k].at[i], squares);
    }
    float mean_square = block_sum(squares) / (float)width;
    float inverse = 1.0f / sqrtf(mean_square + epsilon);
    if (threadIdx.x == 0) *inverse_rms = inverse;
    for (u32 at = COUNT * threadIdx.x; at < width; at += COUNT * THREADS) {
        Vector<float, COUNT> xs = load<COUNT, ALIGNED>(x + at);
        Vector<W, COUNT> weights = load<COUNT, ALIGNED>(weight + at);
        Vector<A, COUNT> outs;
        for (int i = 0; i < COUNT; i++)
            outs.at[i] = narrow<A>(xs.at[i] * inverse * widen(weights.at[i]));
        store<ALIGNED>(out + at, outs);
    }
}

template <class A, class W>
DEVICE void forward(A* out, float* inverse_rms, const float* x, const W* weight, u32 width,
                    float epsilon) {
    u64 start = (u64)blockIdx.x * width;
    bool aligned = take_vectors<4>(out, x, weight);
    out += start, x += start, inverse_rms += blockIdx.x;
    if (width % 4 != 0)
        forward_row<1, true>(out, inverse_rms, x, weight, width, epsilon);
    else if (aligned)
        forward_row<4, true>(out, inverse_rms, x, weight, width, epsilon);
    else
        forward_row<4, false>(out, inverse_rms, x, weight, width, epsilon);
}

// --- Backward -----------------------------------------------------------------------------------

// The widest row whose sums fit into the 48 KiB of shared memory that any launch may ask for, less
// 512 bytes for the arrays of this kernel itself.
constexpr u32 WIDEST_IN_SHARED = 12160;

// `sums` collects the gradient of the weight over the rows of a part. A thread touches only the
// sums of its own columns, so they need no barrier.
template <int COUNT, bool ALIGNED, class W>
DEVICE void backward_row(float* grad_x, float* sums, bool is_first, const float* grad_out,
                         const float* x, float inverse, const W* weight, u32 width) {
    float product = 0;
    for (u32 start = 0; start < width; start += BATCH<COUNT, ALIGNED>) {
        Vector<float, COUNT> grads[VECTORS<ALIGNED>], xs[VECTORS<ALIGNED>];
        load_batch<ALIGNED>(grads, grad_out, start, width, 0.0f);
        load_batch<ALIGNED>(xs, x, start, width, 0.0f);
#pragma unroll
        for (int k = 0; k < VECTORS<ALIGNED>; k++) {
            u32 at = place_in_batch<COUNT>(start, k);
            if (at >= width) break;
            Vector<W, COUNT> weights = load<COUNT, ALIGNED>(weight + at);
            for (int i = 0; i < COUNT; i++)
                product = fmaf(grads[k].at[i] * widen(weights.at[i]), xs[k].at[i], product);
        }
    }
    float projection = block_sum(product) * inverse * inverse * inverse / (float)width;
    for (u32 start = 0; start < width; start += BATCH<COUNT, ALIGNED>) {
        // Only grad_x comes from memory; the first pass has brought the rest into the cache.
        Vector<float, COUNT> grad_xs[VECTORS<ALIGNED>];
        load_batch<ALIGNED>(grad_xs, grad_x, start, width, 0.0f);
#pragma unroll
        for (int k = 0; k < VECTORS<ALIGNED>; k++) {
            u32 at = place_in_batch<COUNT>(start, k);
            if (at >= width) break;
            Vector<float, COUNT> grads = load<COUNT, ALIGNED>(grad_out + at);
            Vector<float, COUNT> xs = load<COUNT, ALIGNED>(x + at);
            Vector<W, COUNT> weights = load<COUNT, ALIGNED>(weight + at);
            Vector<float, COUNT> column_sums = {};
            if (!is_first) column_sums = load<COUNT, ALIGNED>(sums + at);
            for (int i = 0; i < COUNT; i++) {
                float weighted = grads.at[i] * widen(weights.at[i]);
                grad_xs[k].at[i] += weighted * inverse - xs.at[i] * projection;
                column_sums.at[i] += grads.at[i] * xs.at[i] * inverse;
            }
            store<ALIGNED>(grad_x + at, grad_xs[k]);
            store<ALIGNED>(sums + at, column_sums);
        }
    }
}

template <int COUNT, bool ALIGNED, class W>
DEVICE void backward_rows(float* grad_x, float* sums, const float* grad_out, const float* x,
                          const float* inverse_rms, const W* weight, u32 rows, u32 width) {
    for (u32 row = 0; row < rows; row++) {
        u64 start = (u64)row * width;
        backward_row<COUNT, ALIGNED>(grad_x + start, sums, row == 0, grad_out + start, x + start,
                            inverse_rms[row], weight, width);
    }
}

template <int COUNT, bool ALIGNED, class W>
DEVICE void backward(float* grad_x, float* partial, const float* grad_out, const float* x,
                     const float* inverse_rms, const W* weight, u32 rows, u32 width,
                     u32 rows_per_part) {
    DYNAMIC_SHARED(float, sums);
    u64 first = (u64)blockIdx.x * rows_per_part, start = first * width;
    rows = (u32)min((u64)rows_per_part, rows - first);
    grad_x += start, grad_out += start, x += start, inverse_rms += first;
    partial += (u64)blockIdx.x * width;
    if (width > WIDEST_IN_SHARED) {
        backward_rows<COUNT, ALIGNED>(grad_x, partial, grad_out, x, inverse_rms, weight, rows,
                                      width);
        return;
    }
    backward_rows<COUNT, ALIGNED>(grad_x, sums, grad_out, x, inverse_rms, weight, rows, width);
    for (u32 at = COUNT * threadIdx.x; at < width; at += COUNT * THREADS)
        store<ALIGNED>(partial + at, load<COUNT, ALIGNED>(sums + at));
}

template <class W>
DEVICE void backward_of_width(float* grad_x, float* partial, const float* grad_out, const float* x,
                              const float* inverse_rms, const W* weight, u32 rows, u32 width,
                              u32 rows_per_part) {
    if (width % 4 != 0)
        backward<1, true>(grad_x, partial, grad_out, x, inverse_rms, weight, rows, width,
                          rows_per_part);
    else if (take_vectors<4>(grad_x, partial, grad_out, x, weight))
        backward<4, true>(grad_x, partial, grad_out, x, inverse_rms, weight, rows, width,
                          rows_per_part);
    else
        backward<4, false>(grad_x, partial, grad_out, x, inverse_rms, weight, rows, width,
                           rows_per_part);
}

}  // namespace rms_norm

// Grid: one block for each row.
#define RMS_NORM(name, A, W)                                                                     \
    KERNEL_OF(THREADS, name)                                                                     \
    (Latch* latch, A* __restrict__ out, float* __restrict__ inverse_rms,                         \
     const float* __restrict__ x, const W* __restrict__ weight, u32 width, float epsilon) {      \
        RETURN_IF_LATCHED(latch);                                                                \
        rms_norm::forward(out, inverse_rms, x, weight, width, epsilon);                          \
    }                                                                                            \
    EXPORT_KERNEL(name)

RMS_NORM(rms_norm_f32_f32, float, float)
RMS_NORM(rms_norm_f32_bf16, float, bf16)
RMS_NORM(rms_norm_bf16_f32, bf16, float)
RMS_NORM(rms_norm_bf16_bf16, bf16, bf16)
#undef RMS_NORM

// Grid: one block for each part of `rows_per_part` rows. Small parts give more blocks, which hide
// each other's waits for memory; large parts write fewer partial sums. 16 suits 8192 rows.
//
// Dynamic shared memory: 4 * width bytes. A width above WIDEST_IN_SHARED needs none, because the
// sums then lie in `partial` from the start, which costs traffic to the L2 cache.
#define RMS_NORM_BACKWARD(name, W)                                                               \
    KERNEL_OF(THREADS, name)                                                                     \
    (Latch* latch, float* __restrict__ grad_x, float* __restrict__ partial,                      \
     const float* __restrict__ grad_out, const float* __restrict__ x,                            \
     const float* __restrict__ inverse_rms, const W* __restrict__ weight, u32 rows, u32 width,   \
     u32 rows_per_part) {                                                                        \
        RETURN_IF_LATCHED(latch);                                                                \
        rms_norm::backward_of_width(grad_x, partial, grad_out, x, inverse_rms, weight, rows,     \
                                    width, rows_per_part);                                       \
    }                                                                                            \
    EXPORT_KERNEL(name)

RMS_NORM_BACKWARD(rms_norm_backward_f32, float)
RMS_NORM_BACKWARD(rms_norm_backward_bf16, bf16)
#undef RMS_NORM_BACKWARD

// out[column] += the column's sum over all parts. A block has 32 columns, one for each lane. Warp w
// of the eight adds the parts w, w + 8, w + 16... in order. Then the sums of the warps are added
// in order.
//
// Grid: ceil(width / 32).
KERNEL_OF(THREADS, sum_rows)
(Latch* latch, float* out, const float* __restrict__ partial, u32 parts, u32 width) {
    RETURN_IF_LATCHED(latch);
    constexpr u32 WARPS = THREADS / WARP;
    SHARED(float, sums, THREADS);
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, column = blockIdx.x * WARP + lane;
    float sum = 0;
    for (u32 first = warp; first < parts; first += 8 * WARPS) {
        float batch[8];
#pragma unroll
        for (u32 k = 0; k < 8; k++) {
            u32 part = first + k * WARPS;
            bool exists = part < parts && column < width;
            batch[k] = exists ? partial[(u64)part * width + column] : 0.0f;
        }
#pragma unroll
        for (u32 k = 0; k < 8; k++) sum += batch[k];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && column < width) {
        for (u32 other = 1; other < WARPS; other++) sum += sums[other * WARP + lane];
        out[column] += sum;
    }
}
EXPORT_KERNEL(sum_rows)
