// Softmax cross-entropy: a row's loss and its gradient; kernels/src/cpu/loss.rs has the formulas.
//
// A block passes over its row twice. The first pass finds the largest logit and the sum of the
// exponentials at once; the second writes the gradient. A row of a large vocabulary (500 KB)
// exceeds the cache of an SM, and the rows that all SMs work on may exceed the L2 cache. So the
// second pass goes backwards: it begins with what the first pass has read last, which the caches
// still hold. Blocks are large, so that few rows share the caches.

namespace cross_entropy {

constexpr u32 ROW_THREADS = 1024;

// Logits that are NaN count as smaller than all numbers, but their exponentials make the sum NaN,
// and so the loss and the gradient.
template <int COUNT, bool ALIGNED, class A>
DEVICE void row(A* grad, const float* logits, double* loss, u32 target, u32 vocab, float z_loss) {
    constexpr int VECTORS = COUNT == 1 ? 8 : 4;
    constexpr u32 BATCH = VECTORS * COUNT * ROW_THREADS;
    Vector<float, COUNT> batch[VECTORS];
    // Before the second pass overwrites it.
    float target_logit = logits[target];

    float largest = minus_infinity(), total = 0;
    u32 start = 0;
    for (; start < vocab; start += BATCH) {
        // The exponential of -infinity is 0, so places behind the row's end add nothing.
        load_batch<ALIGNED, ROW_THREADS>(batch, logits, start, vocab, minus_infinity());
        float larger = largest;
#pragma unroll
        for (int k = 0; k < VECTORS; k++)
            for (int i = 0; i < COUNT; i++) larger = fmaxf(larger, batch[k].at[i]);
        float shift = softmax_shift(larger);
        total *= expf(largest - shift);
        largest = larger;
#pragma unroll
        for (int k = 0; k < VECTORS; k++)
            for (int i = 0; i < COUNT; i++) total += expf(batch[k].at[i] - shift);
    }
    float of_row = block_max(largest);
    total = block_sum(total * expf(largest - softmax_shift(of_row)));
    if (threadIdx.x == 0) *loss = (double)(logf(total) - (target_logit - of_row));

    float factor = (1.0f + 2.0f * z_loss * (of_row + logf(total))) / total;
    while (start > 0) {
        start -= BATCH;
        load_batch<ALIGNED, ROW_THREADS>(batch, logits, start, vocab, minus_infinity());
#pragma unroll
        for (int k = 0; k < VECTORS; k++) {
            u32 at = place_in_batch<COUNT, ROW_THREADS>(start, k);
            if (at >= vocab) continue;
            Vector<A, COUNT> grads;
            for (int i = 0; i < COUNT; i++) {
                float p = expf(batch[k].at[i] - of_row) * factor;
                grads.at[i] = narrow<A>(at + i == target ? p - 1.0f : p);
            }
            store<ALIGNED>(grad + at, grads);
        }
    }
}

// A target that is none.
constexpr u32 IGNORED = 0xffffffff;

// The gradient of a row that is not to be learned.
template <class A>
DEVICE void ignore(A* grad, double* loss, u32 vocab) {
    if (threadIdx.x == 0) *loss = 0;
    for (u32 at = threadIdx.x; at < vocab; at += ROW_THREADS) grad[at] = narrow<A>(0.0f);
}

template <class A>
DEVICE void rows(Latch* latch, A* grad, const float* logits, double* losses, const u32* targets,
                 u32 vocab, float z_loss) {
    u32 target = targets[blockIdx.x];
    if (target == IGNORED) {
        ignore(grad + (u64)blockIdx.x * vocab, losses + blockIdx.x, vocab);
        return;
    }
    if (target >= vocab) {
        if (threadIdx.x == 0) set_latch(latch, TARGET_OUT_OF_RANGE);
        return;
    }
    u64 start = (u64)blockIdx.x * vocab;
    bool aligned = take_vectors<4>(grad, logits);
    grad += start, logits += start, losses += blockIdx.x;
    if (vocab % 4 != 0)
        row<1, true>(grad, logits, losses, target, vocab, z_loss);
    else if (aligned)
        row<4, true>(grad, logits, losses, target, vocab, z_loss);
    else
        row<4, false>(grad, logits, losses, target, vocab, z_loss);
}

}  // namespace cross_entropy

// `grad` may be the logits themselves. A row whose target is IGNORED has a gradient of zero. A target beyond the vocabulary sets the latch, and the
// kernel leaves that row as it is.
//
// Grid: one block of 1024 threads for each row.
#define CROSS_ENTROPY(name, A)                                                                   \
    KERNEL_OF(cross_entropy::ROW_THREADS, name)                                                  \
    (Latch* latch, A* grad, const float* logits, double* losses, const u32* targets,             \
     u32 vocab, float z_loss) {                                                                  \
        RETURN_IF_LATCHED(latch);                                                                \
        cross_entropy::rows(latch, grad, logits, losses, targets, vocab, z_loss);                \
    }                                                                                            \
    EXPORT_KERNEL(name)

CROSS_ENTROPY(cross_entropy_f32, float)
CROSS_ENTROPY(cross_entropy_bf16, bf16)
#undef CROSS_ENTROPY

// loss[0] += the sum of all losses. Loss i belongs to thread i mod 256. A thread adds its losses in
// order, and block_sum adds the threads, because one thread would take 50 microseconds for 8192
// losses.
//
// Grid: one block.
KERNEL_OF(THREADS, sum_losses)
(Latch* latch, double* loss, const double* __restrict__ losses, u32 count) {
    RETURN_IF_LATCHED(latch);
    double sum = 0;
    for (u32 start = 0; start < count; start += 8 * THREADS) {
        Vector<double, 1> batch[8];
        load_batch(batch, losses, start, count, 0.0);
#pragma unroll
        for (int k = 0; k < 8; k++) sum += batch[k].at[0];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) loss[0] += sum;
}
EXPORT_KERNEL(sum_losses)
