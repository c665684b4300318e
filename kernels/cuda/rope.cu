// Rotary position embedding, in place; kernels/src/cpu/rope.rs has the formula. The operations are
// the same, so the results equal those of the CPU kernel bit for bit.
//
// A head of a token consists of `half` pairs: element i turns with element half + i. A thread turns
// as many neighbouring pairs as a 16-byte vector of x holds elements. The tables of cosines and
// sines are small and stay in the caches.

namespace rope {

// Tokens of a block: one token of a few key heads would leave most of its threads without work.
constexpr u32 TOKENS = 4;

template <int COUNT, class A>
DEVICE void rotate(A* x, const float* cos, const float* sin, u64 tokens, u32 seq, u32 heads,
                   u32 half, float sign) {
    // No vector is wider than 16 bytes, so eight pairs in bf16 take two vectors of each table.
    constexpr int IN_TABLE = COUNT < 4 ? COUNT : 4;
    u64 first = (u64)blockIdx.x * TOKENS;
    u32 of_block = (u32)min((u64)TOKENS, tokens - first);
    u32 first_position = (u32)(first % seq);
    u32 per_head = half / COUNT, per_token = heads * per_head;
    for (u32 item = threadIdx.x; item < of_block * per_token; item += THREADS) {
        u32 token = item / per_token, head = item % per_token / per_head;
        u32 pair = item % per_head * COUNT, position = (first_position + token) % seq;
        A* at = x + ((first + token) * heads + head) * 2 * half + pair;
        Vector<A, COUNT> lower = load<COUNT>(at), upper = load<COUNT>(at + half);
        u64 angle = (u64)position * half + pair;
        for (int k = 0; k < COUNT; k += IN_TABLE) {
            Vector<float, IN_TABLE> cosines = load<IN_TABLE>(cos + angle + k);
            Vector<float, IN_TABLE> sines = load<IN_TABLE>(sin + angle + k);
            for (int i = 0; i < IN_TABLE; i++) {
                float a = widen(lower.at[k + i]), b = widen(upper.at[k + i]);
                float c = cosines.at[i], s = sign * sines.at[i];
                lower.at[k + i] = narrow<A>(a * c - b * s);
                upper.at[k + i] = narrow<A>(b * c + a * s);
            }
        }
        store(at, lower);
        store(at + half, upper);
    }
}

}  // namespace rope

// Grid: ceil(tokens / 4).
#define ROPE(name, A)                                                                            \
    KERNEL_OF(THREADS, name)                                                                     \
    (Latch* latch, A* __restrict__ x, const float* __restrict__ cos,                             \
     const float* __restrict__ sin, u64 tokens, u32 seq, u32 heads, u32 half, float sign) {      \
        RETURN_IF_LATCHED(latch);                                                                \
        constexpr int COUNT = 16 / sizeof(A);                                                    \
        if (half % COUNT == 0 && take_vectors<COUNT>(x) && take_vectors<4>(cos, sin))            \
            rope::rotate<COUNT>(x, cos, sin, tokens, seq, heads, half, sign);                    \
        else                                                                                     \
            rope::rotate<1>(x, cos, sin, tokens, seq, heads, half, sign);                        \
    }                                                                                            \
    EXPORT_KERNEL(name)

ROPE(rope_f32, float)
ROPE(rope_bf16, bf16)
#undef ROPE
