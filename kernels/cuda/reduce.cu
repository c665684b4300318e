// The sum of up to 32 inputs, as reduce-scatter, all-reduce and reduce need it. Reads every input
// once and writes every result once.
//
// The results equal those of the CPU kernel bit for bit: elements are added in f32, in the order of
// groups and inputs, and rounded once.

namespace reduce {

struct Sources {
    const void* at[32];
};

struct Job {
    u32 count, groups, accumulate, divisor;
    float factor;
};

// A block sums 2048 elements, a thread 8 of them.
constexpr int PER_THREAD = 8;
constexpr u64 PER_BLOCK = THREADS * PER_THREAD;

template <int WIDTH>
using Sums = float[PER_THREAD / WIDTH][WIDTH];

template <int WIDTH, class Function>
DEVICE void for_each(Function function) {
#pragma unroll
    for (int k = 0; k < PER_THREAD / WIDTH; k++)
#pragma unroll
        for (int i = 0; i < WIDTH; i++) function(k, i);
}

// Sums the elements of this block with accesses of WIDTH elements. A block with WIDTH > 1 must be
// whole; a block with WIDTH 1 may reach behind the end.
template <int WIDTH, class In, class Out>
DEVICE void block(const Sources& sources, const Job& job, Out* out, u64 n) {
    constexpr int VECTORS = PER_THREAD / WIDTH;
    // Inputs that a thread reads before it adds the first of them. They may lie in another GPU's
    // memory, which takes long to answer.
    constexpr u32 BATCH = WIDTH > 1 ? 4 : 2;
    u64 first = blockIdx.x * PER_BLOCK + threadIdx.x * WIDTH;
    auto place = [&](int k) { return first + k * THREADS * WIDTH; };
    auto exists = [&](int k) { return WIDTH > 1 || place(k) < n; };

    Sums<WIDTH> total, partial;   // of all groups, of this group
    u32 in_group = job.count / job.groups, in_partial = 0, in_total = 0;
    for (u32 batch = 0; batch < job.count; batch += BATCH) {
        Vector<In, WIDTH> x[BATCH][VECTORS] = {};
#pragma unroll
        for (u32 b = 0; b < BATCH; b++) {
            if (batch + b < job.count) {
                const In* source = static_cast<const In*>(sources.at[batch + b]);
#pragma unroll
                for (int k = 0; k < VECTORS; k++)
                    if (exists(k)) x[b][k] = load<WIDTH>(source + place(k));
            }
        }
#pragma unroll
        for (u32 b = 0; b < BATCH; b++) {
            if (batch + b < job.count) {
                auto value = [&](int k, int i) { return widen(x[b][k].at[i]) * job.factor; };
                // The first value replaces the sum, because 0 + −0 would lose the sign.
                if (in_partial == 0)
                    for_each<WIDTH>([&](int k, int i) { partial[k][i] = value(k, i); });
                else
                    for_each<WIDTH>([&](int k, int i) { partial[k][i] += value(k, i); });
                if (++in_partial == in_group) {
                    if (in_total == 0)
                        for_each<WIDTH>([&](int k, int i) { total[k][i] = partial[k][i]; });
                    else
                        for_each<WIDTH>([&](int k, int i) { total[k][i] += partial[k][i]; });
                    in_total++;
                    in_partial = 0;
                }
            }
        }
    }

    if (job.divisor != 0) {
        float divisor = (float)job.divisor;
        for_each<WIDTH>([&](int k, int i) { total[k][i] /= divisor; });
    }
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        if (!exists(k)) continue;
        Vector<Out, WIDTH> results;
        if (job.accumulate) {
            results = load<WIDTH>(out + place(k));
#pragma unroll
            for (int i = 0; i < WIDTH; i++) total[k][i] = widen(results.at[i]) + total[k][i];
        }
#pragma unroll
        for (int i = 0; i < WIDTH; i++) results.at[i] = narrow<Out>(total[k][i]);
        store(out + place(k), results);
    }
}

template <class In, class Out>
DEVICE void all(const Sources& sources, const Job& job, Out* out, u64 n) {
    // 16 bytes of the wider of the two types.
    constexpr int WIDTH = 16 / (sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out));
    u64 bits = 0;
    for (u32 k = 0; k < job.count; k++) bits |= reinterpret_cast<u64>(sources.at[k]);
    bool vectors = bits % (sizeof(In) * WIDTH) == 0 && take_vectors<WIDTH>(out);
    if (vectors && (blockIdx.x + 1) * PER_BLOCK <= n)
        block<WIDTH, In>(sources, job, out, n);
    else
        block<1, In>(sources, job, out, n);
}

}  // namespace reduce

// out = (old out, if `accumulate`) + (sum over k of factor · sources[k]) / divisor.
// - `count` inputs, at least 1, in `groups` equal groups: each group is summed first to last, and
//   the groups' sums are added first to last.
// - Without `has_factor` the factor is 1, which changes no bit. Divisor 0: no division.
// - The output may be exactly an input of the same type. It overlaps no other input.
// Grid: ceil(n / 2048) blocks of 256 threads.
#define REDUCE(name, In, Out)                                                                   \
    KERNEL_OF(THREADS, name)                                                                    \
    (Latch* latch, const __grid_constant__ reduce::Sources sources, u32 count, u32 groups,      \
     Out* out, u64 n, u32 accumulate, u32 divisor, u32 has_factor, float factor) {              \
        RETURN_IF_LATCHED(latch);                                                               \
        reduce::Job job = {count, groups, accumulate, divisor, has_factor ? factor : 1.0f};     \
        reduce::all<In>(sources, job, out, n);                                                  \
    }                                                                                           \
    EXPORT_KERNEL(name)

REDUCE(reduce_f32_f32, float, float)
REDUCE(reduce_bf16_bf16, bf16, bf16)
REDUCE(reduce_bf16_f32, bf16, float)
REDUCE(reduce_f32_bf16, float, bf16)
#undef REDUCE

// out = (old out, if `accumulate`) + the sum of f64 inputs, first to last: the few numbers that
// ride with a reduction. Grid: ceil(n / 256) blocks of 256 threads.
KERNEL_OF(THREADS, sum_numbers)
(Latch* latch, const __grid_constant__ reduce::Sources sources, u32 count, double* out, u64 n,
 u32 accumulate) {
    RETURN_IF_LATCHED(latch);
    u64 at = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (at >= n) return;
    double sum = static_cast<const double*>(sources.at[0])[at];
    for (u32 k = 1; k < count; k++) sum += static_cast<const double*>(sources.at[k])[at];
    out[at] = accumulate ? out[at] + sum : sum;
}
EXPORT_KERNEL(sum_numbers)
