// AdamW in one pass over a shard: reads 16 bytes a parameter (14 with gradients in bf16) and writes
// 12, and the copy that the next all-gather sends, where weights are kept apart from their masters.
//
// The results equal those of the CPU kernel bit for bit. That is why the operations and their order
// are fixed, and why nothing is multiplied by a reciprocal.

namespace adamw {

// A block updates 2048 parameters, a thread 8 of them.
constexpr int PER_THREAD = 8;
constexpr u64 PER_BLOCK = THREADS * PER_THREAD;

// In place of the weights' type: the master weights are the weights.
struct NoCopy {};
template <class W>
constexpr bool is_copied = true;
template <>
constexpr bool is_copied<NoCopy> = false;

// The state of the optimizer, one element a parameter.
struct State {
    float *master, *m, *v;
};

// Constants of one update. `rate` and `root` contain the bias corrections.
struct Update {
    float scale, keep, rate, root, beta1, beta2, epsilon;
};

DEVICE void update_one(float& master, float& m, float& v, float grad, const Update& update) {
    float g = grad * update.scale;
    m = update.beta1 * m + (1.0f - update.beta1) * g;
    v = update.beta2 * v + (1.0f - update.beta2) * g * g;
    master = master * update.keep - update.rate * (m / (sqrtf(v) / update.root + update.epsilon));
}

// Updates the parameters of this block with accesses of WIDTH elements. A block with WIDTH > 1 must
// be whole; a block with WIDTH 1 may reach behind the end.
template <int WIDTH, class W, class G>
DEVICE void update_block(W* weights, State state, const G* grad, u64 n, const Update& update) {
    constexpr int VECTORS = PER_THREAD / WIDTH;
    u64 first = blockIdx.x * PER_BLOCK + threadIdx.x * WIDTH;
    Vector<float, WIDTH> master[VECTORS], m[VECTORS], v[VECTORS];
    Vector<G, WIDTH> g[VECTORS];
    // All loads come before the first store, so that they are in flight together.
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        u64 at = first + k * THREADS * WIDTH;
        if (WIDTH > 1 || at < n) {
            g[k] = load<WIDTH>(grad + at);
            m[k] = load<WIDTH>(state.m + at);
            v[k] = load<WIDTH>(state.v + at);
            master[k] = load<WIDTH>(state.master + at);
        }
    }
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        u64 at = first + k * THREADS * WIDTH;
        if (WIDTH > 1 || at < n) {
#pragma unroll
            for (int i = 0; i < WIDTH; i++)
                update_one(master[k].at[i], m[k].at[i], v[k].at[i], widen(g[k].at[i]), update);
            store(state.m + at, m[k]);
            store(state.v + at, v[k]);
            store(state.master + at, master[k]);
            if constexpr (is_copied<W>) {
                Vector<W, WIDTH> copy;
#pragma unroll
                for (int i = 0; i < WIDTH; i++) copy.at[i] = narrow<W>(master[k].at[i]);
                store(weights + at, copy);
            }
        }
    }
}

template <class W, class G>
DEVICE void update_all(W* weights, State state, const G* grad, u64 n, const Update& update) {
    bool vectors = take_vectors<4>(state.master, state.m, state.v, grad);
    if constexpr (is_copied<W>) vectors = vectors && take_vectors<4>(weights);
    if (vectors && (blockIdx.x + 1) * PER_BLOCK <= n)
        update_block<4>(weights, state, grad, n, update);
    else
        update_block<1>(weights, state, grad, n, update);
}

}  // namespace adamw

// Grid: ceil(n / 2048) blocks of 256 threads. `scale` is a number in device memory that gradients
// are multiplied by. `weights`, unless W is NoCopy, becomes a rounded copy of the master weights.
#define ADAMW(name, W, G)                                                                        \
    KERNEL_OF(THREADS, name)                                                                     \
    (Latch* latch, W* weights, float* master, float* m, float* v, const G* grad,                 \
     const float* scale, u64 n, float keep, float rate, float root, float beta1, float beta2,    \
     float epsilon) {                                                                            \
        RETURN_IF_LATCHED(latch);                                                                \
        adamw::Update update = {*scale, keep, rate, root, beta1, beta2, epsilon};                \
        adamw::update_all<W, G>(weights, {master, m, v}, grad, n, update);                       \
    }                                                                                            \
    EXPORT_KERNEL(name)

ADAMW(adamw_none_f32, adamw::NoCopy, float)
ADAMW(adamw_none_bf16, adamw::NoCopy, bf16)
ADAMW(adamw_f32_f32, float, float)
ADAMW(adamw_f32_bf16, float, bf16)
ADAMW(adamw_bf16_f32, bf16, float)
ADAMW(adamw_bf16_bf16, bf16, bf16)
#undef ADAMW
