// Causal attention: the steps between its matrix products; kernels/src/cpu/attention.rs has the
// formulas.
//
// The host cuts a sequence into blocks of `rows` queries. Query row r of a block is token first + r
// of the sequence and sees the keys 0..=first + r. The products write scores of
// [heads, rows, keys], where `keys` counts at least the keys that the block's last query sees.
// Scores of keys that a query does not see may be anything, NaN included, because no kernel uses
// them.
//
// The kernels over scores have a block of threads for each row and head. In f32 a result may take
// the place of an input: a thread reads a vector before it writes the vector at the same place, and
// no other thread uses that place any more.

namespace attention {

constexpr int VECTORS = 4;
template <int COUNT>
constexpr u32 BATCH = VECTORS * COUNT * THREADS;

// The keys that the query of this block sees.
DEVICE u32 keys_seen(u32 keys, u32 first) { return min(first + blockIdx.x + 1, keys); }

// The place of this block's row in a tensor [heads, rows].
DEVICE u64 row_of_head(u32 rows) { return (u64)blockIdx.y * rows + blockIdx.x; }

// --- Forward ------------------------------------------------------------------------------------

// The largest score that this thread reads. The vectors that the query sees whole come first, and
// then the scores behind them, one by one.
template <int COUNT>
DEVICE float largest_score(const float* scores, u32 seen) {
    float largest = minus_infinity();
    u32 rest = seen % COUNT, whole = seen - rest;
    for (u32 start = 0; start < whole; start += BATCH<COUNT>) {
        Vector<float, COUNT> batch[VECTORS];
        load_batch(batch, scores, start, whole, minus_infinity());
#pragma unroll
        for (int k = 0; k < VECTORS; k++)
            for (int i = 0; i < COUNT; i++) largest = fmaxf(largest, batch[k].at[i]);
    }
    if (threadIdx.x < rest) largest = fmaxf(largest, scores[whole + threadIdx.x]);
    return largest;
}

// p = exp(score - shift), rounded, and 0 for keys that the query does not see. Returns this
// thread's share of the sum of the rounded p, because the products use the rounded p.
template <int COUNT, class A>
DEVICE float exponentials(A* p, const float* scores, float shift, u32 seen, u32 keys) {
    float total = 0;
    for (u32 at = COUNT * threadIdx.x; at < keys; at += COUNT * THREADS) {
        Vector<A, COUNT> ps = {};
        if (at < seen) {
            Vector<float, COUNT> s = load<COUNT>(scores + at);
            for (int i = 0; i < COUNT; i++) {
                float score = at + i < seen ? s.at[i] : minus_infinity();
                ps.at[i] = narrow<A>(expf(score - shift));
                total += widen(ps.at[i]);
            }
        }
        store(p + at, ps);
    }
    return total;
}

template <int COUNT, class A>
DEVICE void softmax(A* p, float* sum, float* log_sum, const float* scores, u32 seen, u32 keys) {
    float largest = block_max(largest_score<COUNT>(scores, seen));
    float total = block_sum(exponentials<COUNT>(p, scores, softmax_shift(largest), seen, keys));
    if (threadIdx.x == 0) {
        *sum = total;
        *log_sum = largest + logf(total);
    }
}

// out[first + r][h] = tile[h][r] / sums[h][r], for all heads h of the block's row r.
template <int COUNT, class A>
DEVICE void output(A* out, const float* tile, const float* sums, u32 rows, u32 heads, u32 dim,
                   u32 first) {
    u32 row = blockIdx.x, width = heads * dim;
    out += ((u64)first + row) * width;
    for (u32 start = 0; start < width; start += BATCH<COUNT>) {
        Vector<float, COUNT> values[VECTORS];
        float of_sums[VECTORS];
#pragma unroll
        for (int k = 0; k < VECTORS; k++) {
            u32 at = place_in_batch<COUNT>(start, k);
            if (at >= width) break;
            u64 of_head = (u64)(at / dim) * rows + row;
            of_sums[k] = sums[of_head];
            values[k] = load<COUNT>(tile + of_head * dim + at % dim);
        }
#pragma unroll
        for (int k = 0; k < VECTORS; k++) {
            u32 at = place_in_batch<COUNT>(start, k);
            if (at >= width) break;
            float inverse = 1.0f / of_sums[k];
            Vector<A, COUNT> outs;
            for (int i = 0; i < COUNT; i++) outs.at[i] = narrow<A>(values[k].at[i] * inverse);
            store(out + at, outs);
        }
    }
}

// --- Backward -----------------------------------------------------------------------------------

// Lanes that share a head of a token. With 128 elements in bf16, each reads two vectors of each
// tensor.
constexpr u32 LANES = 8;
constexpr u32 HEADS_OF_BLOCK = THREADS / LANES;

// This lane's share of the sum of grad_out * out over one head of one token.
template <int COUNT, bool ALIGNED, class A>
DEVICE float share_of_projection(const A* grad_out, const A* out, u32 dim) {
    float sum = 0;
    for (u32 start = COUNT * (threadIdx.x % LANES); start < dim; start += 2 * COUNT * LANES) {
        Vector<A, COUNT> grads[2] = {}, outs[2] = {};
#pragma unroll
        for (u32 k = 0; k < 2; k++) {
            u32 at = start + k * COUNT * LANES;
            if (at >= dim) break;
            grads[k] = load<COUNT, ALIGNED>(grad_out + at);
            outs[k] = load<COUNT, ALIGNED>(out + at);
        }
#pragma unroll
        for (int k = 0; k < 2; k++)
            for (int i = 0; i < COUNT; i++)
                sum = fmaf(widen(grads[k].at[i]), widen(outs[k].at[i]), sum);
    }
    return sum;
}

template <class A>
DEVICE void projection(float* projection, const A* grad_out, const A* out, u64 tokens, u32 seq,
                       u32 heads, u32 dim) {
    constexpr int COUNT = 16 / sizeof(A);
    // 32 bits suffice: tensors of 2^32 heads would not fit into the memory of a GPU.
    u32 row = blockIdx.x * HEADS_OF_BLOCK + threadIdx.x / LANES;
    bool exists = row < tokens * heads;
    bool whole = dim % COUNT == 0, aligned = take_vectors<COUNT>(grad_out, out);
    grad_out += (u64)row * dim, out += (u64)row * dim;
    float sum = 0;
    if (exists)
        sum = !whole    ? share_of_projection<1, true>(grad_out, out, dim)
              : aligned ? share_of_projection<COUNT, true>(grad_out, out, dim)
                        : share_of_projection<COUNT, false>(grad_out, out, dim);
    // All lanes of a warp shuffle, also those whose row does not exist.
#pragma unroll
    for (u32 distance = 1; distance < LANES; distance *= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    if (exists && threadIdx.x % LANES == 0) {
        u32 token = row / heads, head = row % heads;
        projection[((u64)(token / seq) * heads + head) * seq + token % seq] = sum;
    }
}

// p = exp(score - log_sum) and grad_score = p * (grad_p - projection), both rounded, and 0 for keys
// that the query does not see.
template <int COUNT, class A>
DEVICE void gradient(A* p, A* grad_scores, const float* scores, const float* grad_p, float log_sum,
                     float projection, u32 seen, u32 keys) {
    for (u32 at = COUNT * threadIdx.x; at < keys; at += COUNT * THREADS) {
        Vector<A, COUNT> ps = {}, grads = {};
        if (at < seen) {
            Vector<float, COUNT> s = load<COUNT>(scores + at), of_p = load<COUNT>(grad_p + at);
            for (int i = 0; i < COUNT; i++) {
                bool sees = at + i < seen;
                float exact = expf(s.at[i] - log_sum);
                ps.at[i] = narrow<A>(sees ? exact : 0.0f);
                grads.at[i] = narrow<A>(sees ? exact * (of_p.at[i] - projection) : 0.0f);
            }
        }
        store(p + at, ps);
        store(grad_scores + at, grads);
    }
}

}  // namespace attention

// sums [heads, rows]: the sums of the rounded p. log_sum [heads, seq]: the logarithms of the sums
// of exp(score), at the places of the block's tokens. `p` may be the scores themselves.
//
// Grid: (rows, heads).
#define ATTENTION_SOFTMAX(name, A)                                                               \
    KERNEL_OF(THREADS, name)                                                                     \
    (Latch* latch, A* p, float* sums, float* log_sum, const float* scores, u32 rows, u32 keys,   \
     u32 first, u32 seq) {                                                                       \
        RETURN_IF_LATCHED(latch);                                                                \
        bool vectors = keys % 4 == 0 && take_vectors<4>(p, scores);                              \
        u32 seen = attention::keys_seen(keys, first);                                            \
        u64 row = attention::row_of_head(rows);                                                  \
        p += row * keys, scores += row * keys, sums += row;                                      \
        log_sum += attention::row_of_head(seq) + first;                                          \
        if (vectors)                                                                             \
            attention::softmax<4>(p, sums, log_sum, scores, seen, keys);                         \
        else                                                                                     \
            attention::softmax<1>(p, sums, log_sum, scores, seen, keys);                         \
    }                                                                                            \
    EXPORT_KERNEL(name)

ATTENTION_SOFTMAX(attention_softmax_f32, float)
ATTENTION_SOFTMAX(attention_softmax_bf16, bf16)
#undef ATTENTION_SOFTMAX

// tile [heads, rows, dim]: the products of p and the values. out [seq, heads, dim]: the output of
// the sequence.
//
// Grid: rows.
#define ATTENTION_OUTPUT(name, A)                                                                \
    KERNEL_OF(THREADS, name)                                                                     \
    (Latch* latch, A* __restrict__ out, const float* __restrict__ tile,                          \
     const float* __restrict__ sums, u32 rows, u32 heads, u32 dim, u32 first) {                  \
        RETURN_IF_LATCHED(latch);                                                                \
        if (dim % 4 == 0 && take_vectors<4>(out, tile))                                          \
            attention::output<4>(out, tile, sums, rows, heads, dim, first);                      \
        else                                                                                     \
            attention::output<1>(out, tile, sums, rows, heads, dim, first);                      \
    }                                                                                            \
    EXPORT_KERNEL(name)

ATTENTION_OUTPUT(attention_output_f32, float)
ATTENTION_OUTPUT(attention_output_bf16, bf16)
#undef ATTENTION_OUTPUT

// projection [batch, heads, seq] = the sums over dim of grad_out * out, both [tokens, heads, dim].
//
// Grid: ceil(tokens * heads / 32).
#define ATTENTION_PROJECTION(name, A)                                                            \
    KERNEL_OF(THREADS, name)                                                                     \
    (Latch* latch, float* __restrict__ projection, const A* __restrict__ grad_out,               \
     const A* __restrict__ out, u64 tokens, u32 seq, u32 heads, u32 dim) {                       \
        RETURN_IF_LATCHED(latch);                                                                \
        attention::projection(projection, grad_out, out, tokens, seq, heads, dim);               \
    }                                                                                            \
    EXPORT_KERNEL(name)

ATTENTION_PROJECTION(attention_projection_f32, float)
ATTENTION_PROJECTION(attention_projection_bf16, bf16)
#undef ATTENTION_PROJECTION

// `scores` and `grad_p` [heads, rows, keys] are a block's; `log_sum` and `projection` [heads, seq]
// are the sequence's. `p` may be the scores, and `grad_scores` may be `grad_p`.
//
// Grid: (rows, heads).
#define ATTENTION_GRADIENT(name, A)                                                              \
    KERNEL_OF(THREADS, name)                                                                     \
    (Latch* latch, A* p, A* grad_scores, const float* scores, const float* grad_p,               \
     const float* log_sum, const float* projection, u32 rows, u32 keys, u32 first, u32 seq) {    \
        RETURN_IF_LATCHED(latch);                                                                \
        bool vectors = keys % 4 == 0 && take_vectors<4>(p, grad_scores, scores, grad_p);         \
        u32 seen = attention::keys_seen(keys, first);                                            \
        u64 start = attention::row_of_head(rows) * keys;                                         \
        u64 token = attention::row_of_head(seq) + first;                                         \
        p += start, grad_scores += start, scores += start, grad_p += start;                      \
        if (vectors)                                                                             \
            attention::gradient<4>(p, grad_scores, scores, grad_p, log_sum[token],               \
                                   projection[token], seen, keys);                               \
        else                                                                                     \
            attention::gradient<1>(p, grad_scores, scores, grad_p, log_sum[token],               \
                                   projection[token], seen, keys);                               \
    }                                                                                            \
    EXPORT_KERNEL(name)

ATTENTION_GRADIENT(attention_gradient_f32, float)
ATTENTION_GRADIENT(attention_gradient_bf16, bf16)
#undef ATTENTION_GRADIENT
