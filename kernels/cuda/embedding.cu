// Rows of a table by token, and the gradient of that.

namespace embedding {

// Copies one row, widened, with accesses of WIDTH elements.
template <int WIDTH, class W>
DEVICE void copy_row(float* out, const W* row, u32 width) {
    constexpr int VECTORS = 4;   // in flight for each thread
    constexpr u64 STRIDE = THREADS * WIDTH;
    for (u64 first = threadIdx.x * WIDTH; first < width; first += VECTORS * STRIDE) {
        Vector<W, WIDTH> values[VECTORS];
#pragma unroll
        for (int k = 0; k < VECTORS; k++) {
            u64 at = first + k * STRIDE;
            if (at < width) values[k] = load<WIDTH>(row + at);
        }
#pragma unroll
        for (int k = 0; k < VECTORS; k++) {
            u64 at = first + k * STRIDE;
            Vector<float, WIDTH> wide;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) wide.at[i] = widen(values[k].at[i]);
            if (at < width) store(out + at, wide);
        }
    }
}

template <class W>
DEVICE void forward(Latch* latch, float* out, const W* table, const u32* tokens, u32 width,
                    u32 vocab) {
    u32 token = tokens[blockIdx.x];
    if (token >= vocab) {
        if (threadIdx.x == 0) set_latch(latch, TOKEN_OUT_OF_RANGE);
        return;
    }
    bool vectors = width % 4 == 0 && take_vectors<4>(out) && take_vectors<4>(table);
    out += (u64)blockIdx.x * width;
    const W* row = table + (u64)token * width;
    if (vectors)
        copy_row<4>(out, row, width);
    else
        copy_row<1>(out, row, width);
}

// Positions that a block compares with its token at a time, 4 for each thread.
constexpr u32 STEP_PER_THREAD = 4;
constexpr u32 STEP = THREADS * STEP_PER_THREAD;
constexpr u32 WARPS = THREADS / WARP;

// Adds the gradients of `found` positions to the table's row, in order of `positions`.
template <int WIDTH>
DEVICE void add_rows(float* row, const float* grad_out, const u32* positions, u32 found,
                     u32 width) {
    constexpr u32 BATCH = 4;   // rows in flight
    for (u64 at = threadIdx.x * WIDTH; at < width; at += THREADS * WIDTH) {
        Vector<float, WIDTH> sum = load<WIDTH>(row + at);
        for (u32 first = 0; first < found; first += BATCH) {
            Vector<float, WIDTH> grads[BATCH];
#pragma unroll
            for (u32 b = 0; b < BATCH; b++)
                if (first + b < found)
                    grads[b] = load<WIDTH>(grad_out + (u64)positions[first + b] * width + at);
#pragma unroll
            for (u32 b = 0; b < BATCH; b++)
                if (first + b < found)
#pragma unroll
                    for (int i = 0; i < WIDTH; i++) sum.at[i] += grads[b].at[i];
        }
        store(row + at, sum);
    }
}

}  // namespace embedding

// out[n] = table[tokens[n]], widened. Grid: a block of 256 threads for each token.

KERNEL_OF(THREADS, embedding_f32)
(Latch* latch, float* out, const float* table, const u32* tokens, u32 width, u32 vocab) {
    RETURN_IF_LATCHED(latch);
    embedding::forward(latch, out, table, tokens, width, vocab);
}
EXPORT_KERNEL(embedding_f32)

KERNEL_OF(THREADS, embedding_bf16)
(Latch* latch, float* out, const bf16* table, const u32* tokens, u32 width, u32 vocab) {
    RETURN_IF_LATCHED(latch);
    embedding::forward(latch, out, table, tokens, width, vocab);
}
EXPORT_KERNEL(embedding_bf16)

// grad_table[tokens[n]] += grad_out[n] for each position n, in order of n.
// Grid: a block of 256 threads for each of `count` positions.
//
// Several positions may have the same token, and float atomics would add them in any order. So the
// block of a token's first position adds the gradients of all its positions, and the blocks of its
// other positions do nothing. To find out, each block reads tokens from the caches, up to all.
KERNEL_OF(THREADS, embedding_backward)
(Latch* latch, float* grad_table, const float* grad_out, const u32* tokens, u32 count, u32 width,
 u32 vocab) {
    using namespace embedding;
    RETURN_IF_LATCHED(latch);
    SHARED(u32, matches, STEP / WARP);   // bit i of word w: position first + 32 w + i has the token
    SHARED(u32, positions, STEP);        // those that have it, in order
    u32 position = blockIdx.x, token = tokens[position];
    if (token >= vocab) {
        if (threadIdx.x == 0) set_latch(latch, TOKEN_OUT_OF_RANGE);
        return;
    }
    for (u64 first = 0; first < position; first += STEP) {
        bool earlier = false;
#pragma unroll
        for (u32 k = 0; k < STEP_PER_THREAD; k++) {
            u64 at = first + k * THREADS + threadIdx.x;
            if (at < position && tokens[at] == token) earlier = true;
        }
        if (__syncthreads_or(earlier)) return;
    }

    float* row = grad_table + (u64)token * width;
    bool vectors = width % 4 == 0 && take_vectors<4>(grad_table, grad_out);
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (u64 first = position; first < count; first += STEP) {
        bool match[STEP_PER_THREAD], any = false;
#pragma unroll
        for (u32 k = 0; k < STEP_PER_THREAD; k++) {
            u64 at = first + k * THREADS + threadIdx.x;
            match[k] = at < count && tokens[at] == token;
            any = any || match[k];
        }
        if (!__syncthreads_or(any)) continue;
#pragma unroll
        for (u32 k = 0; k < STEP_PER_THREAD; k++) {
            u32 bits = __ballot_sync(ALL_LANES, match[k]);
            if (lane == 0) matches[k * WARPS + warp] = bits;
        }
        __syncthreads();
        // Each thread counts all matches, and writes its own behind those before them.
        u32 found = 0;
#pragma unroll
        for (u32 k = 0; k < STEP_PER_THREAD; k++) {
            for (u32 w = 0; w < WARPS; w++) {
                u32 bits = matches[k * WARPS + w];
                if (w == warp && match[k])
                    positions[found + __popc(bits & ((1u << lane) - 1))] =
                        (u32)(first + k * THREADS + threadIdx.x);
                found += __popc(bits);
            }
        }
        __syncthreads();
        if (vectors)
            add_rows<4>(row, grad_out, positions, found, width);
        else
            add_rows<1>(row, grad_out, positions, found, width);
    }
}
EXPORT_KERNEL(embedding_backward)
