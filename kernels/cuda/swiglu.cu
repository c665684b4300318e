// SwiGLU, forward and backward; kernels/src/cpu/mlp.rs has the formulas.
//
// A block handles 4096 elements, 16 a thread: four vectors of f32 or two of bf16. If the block is
// not whole, or the addresses are not aligned, it handles them one by one.

namespace swiglu {

constexpr u32 BLOCK = 4096;

DEVICE u32 elements_of_block(u64 n) { return (u32)min((u64)BLOCK, n - (u64)blockIdx.x * BLOCK); }

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <class A, int COUNT>
DEVICE void forward_vector(A* out, Vector<A, COUNT> gates, Vector<A, COUNT> ups) {
    Vector<A, COUNT> outs;
    for (int i = 0; i < COUNT; i++) {
        float gate = widen(gates.at[i]), up = widen(ups.at[i]);
        outs.at[i] = narrow<A>(gate * sigmoid(gate) * up);
    }
    store(out, outs);
}

template <class A>
DEVICE void forward(A* out, const A* gate, const A* up, u64 n) {
    constexpr int COUNT = 16 / sizeof(A), VECTORS = BLOCK / THREADS / COUNT;
    u64 first = (u64)blockIdx.x * BLOCK;
    u32 count = elements_of_block(n);
    out += first, gate += first, up += first;
    if (count < BLOCK || !take_vectors<COUNT>(out, gate, up)) {
        for (u32 at = threadIdx.x; at < count; at += THREADS)
            forward_vector(out + at, load<1>(gate + at), load<1>(up + at));
        return;
    }
    Vector<A, COUNT> gates[VECTORS], ups[VECTORS];
    load_batch(gates, gate, 0, BLOCK, A{});
    load_batch(ups, up, 0, BLOCK, A{});
#pragma unroll
    for (int k = 0; k < VECTORS; k++)
        forward_vector(out + place_in_batch<COUNT>(0, k), gates[k], ups[k]);
}

template <class A>
struct Gradients {
    A *out, *gate, *up;
};

template <class A, int COUNT>
DEVICE void backward_vector(Gradients<A> to, u32 at, Vector<A, COUNT> grads,
                            Vector<A, COUNT> gates, Vector<A, COUNT> ups) {
    Vector<A, COUNT> outs, grad_gates, grad_ups;
    for (int i = 0; i < COUNT; i++) {
        float grad = widen(grads.at[i]), gate = widen(gates.at[i]), up = widen(ups.at[i]);
        float s = sigmoid(gate);
        outs.at[i] = narrow<A>(gate * s * up);
        grad_gates.at[i] = narrow<A>(grad * up * s * (1.0f + gate * (1.0f - s)));
        grad_ups.at[i] = narrow<A>(grad * gate * s);
    }
    store(to.out + at, outs);
    store(to.gate + at, grad_gates);
    store(to.up + at, grad_ups);
}

template <class A>
DEVICE void backward(Gradients<A> to, const A* grad_out, const A* gate, const A* up, u64 n) {
    // Eight elements a thread at a time, because sixteen would take too many registers.
    constexpr int COUNT = 16 / sizeof(A), VECTORS = 8 / COUNT;
    u64 first = (u64)blockIdx.x * BLOCK;
    u32 count = elements_of_block(n);
    to.out += first, to.gate += first, to.up += first;
    grad_out += first, gate += first, up += first;
    if (count < BLOCK || !take_vectors<COUNT>(to.out, to.gate, to.up, grad_out, gate, up)) {
        for (u32 at = threadIdx.x; at < count; at += THREADS)
            backward_vector(to, at, load<1>(grad_out + at), load<1>(gate + at), load<1>(up + at));
        return;
    }
#pragma unroll 1
    for (u32 start = 0; start < BLOCK; start += 8 * THREADS) {
        Vector<A, COUNT> grads[VECTORS], gates[VECTORS], ups[VECTORS];
        load_batch(grads, grad_out, start, BLOCK, A{});
        load_batch(gates, gate, start, BLOCK, A{});
        load_batch(ups, up, start, BLOCK, A{});
#pragma unroll
        for (int k = 0; k < VECTORS; k++)
            backward_vector(to, place_in_batch<COUNT>(start, k), grads[k], gates[k], ups[k]);
    }
}

}  // namespace swiglu

// Grid of all kernels here: ceil(n / 4096).
#define SWIGLU(name, A)                                                                          \
    KERNEL_OF(THREADS, name)                                                                     \
    (Latch* latch, A* __restrict__ out, const A* __restrict__ gate, const A* __restrict__ up,    \
     u64 n) {                                                                                    \
        RETURN_IF_LATCHED(latch);                                                                \
        swiglu::forward(out, gate, up, n);                                                       \
    }                                                                                            \
    EXPORT_KERNEL(name)

SWIGLU(swiglu_f32, float)
SWIGLU(swiglu_bf16, bf16)
#undef SWIGLU

// `out` becomes the output of the forward pass again, so that the caller need not keep it.
#define SWIGLU_BACKWARD(name, A)                                                                 \
    KERNEL_OF(THREADS, name)                                                                     \
    (Latch* latch, A* __restrict__ out, A* __restrict__ grad_gate, A* __restrict__ grad_up,      \
     const A* __restrict__ grad_out, const A* __restrict__ gate, const A* __restrict__ up,       \
     u64 n) {                                                                                    \
        RETURN_IF_LATCHED(latch);                                                                \
        swiglu::backward<A>({out, grad_gate, grad_up}, grad_out, gate, up, n);                   \
    }                                                                                            \
    EXPORT_KERNEL(name)

SWIGLU_BACKWARD(swiglu_backward_f32, float)
SWIGLU_BACKWARD(swiglu_backward_bf16, bf16)
#undef SWIGLU_BACKWARD
