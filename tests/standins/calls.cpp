// How to launch each kernel: one entry for all types of a kernel. The latch comes first by itself.
// c.type(0) is the first type in the kernel's name. Shapes are small, because the sanitizers are
// slow.
#include "check.h"

#include <map>

namespace check {

namespace {

// struct Sources of reduce.cu.
struct Sources { const void* at[32]; };
Sources sources(Case& c, Type type, u32 count, u64 n) {
    Sources all = {};
    for (u32 i = 0; i < count; i++) all.at[i] = c.in(type, n);
    return all;
}

// A block of queries of one sequence: rows first, first + 1, ... of seq, which see keys up to their
// own.
struct Queries {
    explicit Queries(Case& c)
        : heads((u32)c.number(1, 3)), seq((u32)c.number(1, 300)), first((u32)c.number(0, seq - 1)),
          rows((u32)c.number(1, min(seq - first, 16u))), keys(first + rows) {}
    u64 scores() const { return (u64)heads * rows * keys; }
    dim3 grid() const { return {rows, heads}; }
    u32 heads, seq, first, rows, keys;
};

// Sequences for attention by hand. Half of them span three tiles or more, and half have vectors at
// all addresses, because only then is a tile overwritten by copies that run beside the products.
struct Heads {
    Heads(Case& c, u32 width)
        : width(width), group((u32)c.number(1, 2)), kv_heads((u32)c.number(1, 2)),
          heads(group * kv_heads), seq((u32)(c.coin() ? c.number(129, 260) : c.number(1, 128))),
          batch((u32)c.number(1, 2)) {
        c.align(c.coin());
    }
    u64 queries() const { return (u64)batch * seq * heads * width; }
    u64 keys() const { return (u64)batch * seq * kv_heads * width; }
    u64 rows() const { return (u64)batch * heads * seq; }
    u32 width, group, kv_heads, heads, seq, batch;
};
Launch flash_attention(Case& c, u32 width) {
    Heads h(c, width);
    c.threads = 128;
    return c.launch(ceil_div(h.seq, 128) * h.heads * h.batch, 768 * width, c.out(BF16, h.queries()),
                    c.out(F32, h.rows()), c.in(BF16, h.queries()), c.in(BF16, h.keys()),
                    c.in(BF16, h.keys()), h.seq, h.heads, h.kv_heads, 0.125f);
}
Launch flash_attention_keys(Case& c, u32 width) {
    Heads h(c, width);
    c.threads = 128;
    return c.launch(ceil_div(h.seq, 64) * h.kv_heads * h.batch, 768 * width + 1024,
                    c.out(BF16, h.keys()), c.out(BF16, h.keys()), c.in(BF16, h.queries()),
                    c.in(BF16, h.queries()), c.in(BF16, h.keys()), c.in(BF16, h.keys()),
                    c.in(F32, h.rows()), c.in(F32, h.rows()), h.seq, h.heads, h.kv_heads, 0.125f);
}
Launch flash_attention_queries(Case& c, u32 width) {
    Heads h(c, width);
    c.threads = 128;
    return c.launch(ceil_div(h.seq, 64) * h.heads * h.batch, 768 * width,
                    c.out(BF16, h.queries()), c.in(BF16, h.queries()), c.in(BF16, h.queries()),
                    c.in(BF16, h.keys()), c.in(BF16, h.keys()), c.in(F32, h.rows()),
                    c.in(F32, h.rows()), h.seq, h.heads, h.kv_heads, 0.125f);
}

// Rows of a norm. Rows wider than 12288 have their sums in global memory.
struct Rows {
    explicit Rows(Case& c)
        : rows((u32)c.number(1, 9)), part((u32)c.number(1, rows)), parts(ceil_div(rows, part)),
          width((u32)(c.number(0, 9) ? c.number(1, 1200) : c.number(12289, 12300))) {}
    u64 all() const { return (u64)rows * width; }
    u32 shared() const { return width <= 12288 ? 4 * width : 0; }
    u32 rows, part, parts, width;
};

// Ranks whose words say that their work has run, unless one gave up, is late, or has a latch that
// is set. Their latches begin with a code.
Launch marks(Case& c) {
    u32 count = (u32)c.number(1, 32), stride = (u32)c.number(1, 3), mark = (u32)c.number(0, ~0u);
    u32 odd = (u32)c.number(0, count - 1), own = (u32)c.number(0, count - 1);
    u64 trouble = c.number(0, 5);
    c.may_latch = trouble >= 2 && odd != own;
    Sources codes = {};
    std::vector<u32> words(count * stride, 0x55);
    for (u32 rank = 0; rank < count; rank++) {
        u32 is_odd = rank == odd;
        codes.at[rank] = c.words({is_odd && trouble == 4 ? 3u : 0u});
        words[rank * stride] = mark + (u32)c.number(0, 2);
        if (is_odd && trouble == 1) words[rank * stride] = mark + (1u << 29) - 1;
        if (is_odd && trouble == 2) words[rank * stride] += 1u << 30;
        if (is_odd && trouble == 5) words[rank * stride] = mark + (1u << 29);
        if (is_odd && trouble == 3) words[rank * stride] = mark - 1;
    }
    c.latch_matters = false;
    c.threads = 32;
    return c.launch(1, 0, codes, count, c.words(words), stride, mark, own);
}

// One entry a kernel. `out` is a buffer that the kernel writes in full, `in_out` one that it may
// write.
#define CALL(name, ...) {#name, [](Case& c) -> Launch { __VA_ARGS__ }}
const std::map<std::string, Call> calls = {
    CALL(adamw, u64 n = c.number(1, 5000);
         return c.launch(ceil_div(n, 2048), 0, c.out(c.type(0), n), c.in_out(F32, n),
                         c.in_out(F32, n), c.in_out(F32, n), c.in(c.type(1), n, true),
                         c.in(F32, 1), n, 0.999f, 0.01f, 0.5f, 0.9f, 0.95f, 1e-8f);),
    CALL(cast, u64 n = c.number(1, 10000);
         return c.launch(ceil_div(n, 4096), 0, c.out(c.type(1), n), c.in(c.type(0), n, true),
                         n);),
    CALL(accumulate, u64 n = c.number(1, 10000);
         return c.launch(ceil_div(n, 4096), 0, c.in_out(F32, n), c.in(F32, n, true), n);),
    CALL(copy, u64 n = c.number(1, 40000);
         return c.launch(ceil_div(n, 16384), 0, c.out(U8, n), c.in(U8, n), n);),
    CALL(zero, u64 n = c.number(1, 40000);
         return c.launch(ceil_div(n, 16384), 0, c.out(U8, n), n);),
    CALL(square_norm_parts, u64 n = c.number(1, 150000); u32 parts = ceil_div(n, 65536);
         return c.launch(parts, 0, c.out(F64, parts), c.out(U32, parts), c.in(c.type(0),
                         n, true), n);),
    CALL(square_norm_total, u32 parts = (u32)c.number(0, 1000);
         return c.launch(1, 0, c.out(F64, 2), c.in(F64, parts), c.in(U32, parts), parts, 0.5);),
    CALL(reduce, u64 n = c.number(1, 5000); u32 groups = (u32)c.number(1, 4);
         u32 count = groups * (u32)c.number(1, 8); u32 accumulate = c.coin();
         return c.launch(ceil_div(n, 2048), 0, sources(c, c.type(0), count, n), count, groups,
                         accumulate ? c.in_out(c.type(1), n) : c.out(c.type(1), n), n,
                         accumulate, c.coin() ? count : 0u, (u32)c.coin(), 0.25f);),
    CALL(sum_numbers, u64 n = c.number(1, 600); u32 count = (u32)c.number(1, 32);
         u32 accumulate = c.coin();
         return c.launch(ceil_div(n, 256), 0, sources(c, F64, count, n), count,
                         accumulate ? c.in_out(F64, n) : c.out(F64, n), n, accumulate);),
    CALL(rms_norm, Rows r(c);
         return c.launch(r.rows, 0, c.out(c.type(0), r.all()), c.out(F32, r.rows), c.in(F32,
                         r.all(), true), c.in(c.type(1), r.width), r.width, 1e-5f);),
    CALL(rms_norm_backward, Rows r(c);
         return c.launch(r.parts, r.shared(), c.in_out(F32, r.all()),
                         c.out(F32, (u64)r.parts * r.width), c.in(F32, r.all()), c.in(F32,
                         r.all()), c.in(F32, r.rows), c.in(c.type(0), r.width), r.rows, r.width,
                         r.part);),
    CALL(sum_rows, Rows r(c);
         return c.launch(ceil_div(r.width, 32), 0, c.in_out(F32, r.width), c.in(F32, r.all()),
                         r.rows, r.width);),
    CALL(rope, u32 seq = (u32)c.number(1, 20); u64 tokens = c.number(1, 40);
         u32 heads = (u32)c.number(1, 4); u32 half = (u32)c.number(1, 70);
         return c.launch(ceil_div(tokens, 4), 0, c.in_out(c.type(0), tokens * heads * 2 * half),
                         c.in(F32, (u64)seq * half), c.in(F32, (u64)seq * half), tokens, seq,
                         heads, half, c.coin() ? 1.0f : -1.0f);),
    CALL(swiglu, u64 n = c.number(1, 9000); Type t = c.type(0);
         return c.launch(ceil_div(n, 4096), 0, c.out(t, n), c.in(t, n, true), c.in(t, n), n);),
    CALL(swiglu_backward, u64 n = c.number(1, 9000); Type t = c.type(0);
         return c.launch(ceil_div(n, 4096), 0, c.out(t, n), c.out(t, n), c.out(t, n), c.in(t,
                         n), c.in(t, n, true), c.in(t, n), n);),
    CALL(embedding, u32 tokens = (u32)c.number(1, 20); u32 width = (u32)c.number(1, 600);
         u32 vocab = (u32)c.number(1, 50);
         return c.launch(tokens, 0, c.out(F32, (u64)tokens * width),
                         c.in(c.type(0), (u64)vocab * width), c.indices(tokens, vocab),
                         width, vocab);),
    CALL(embedding_backward, u32 count = (u32)c.number(1, 600);
         u32 width = (u32)c.number(1, 100); u32 vocab = (u32)c.number(1, 400);
         return c.launch(count, 0, c.in_out(F32, (u64)vocab * width),
                         c.in(F32, (u64)count * width), c.indices(count, vocab), count,
                         width, vocab);),
    CALL(cross_entropy, c.threads = 1024; u32 rows = (u32)c.number(1, 5);
         u32 vocab = (u32)c.number(1, 6000);
         return c.launch(rows, 0, c.out(c.type(0), (u64)rows * vocab),
                         c.in(F32, (u64)rows * vocab, true), c.out(F64, rows),
                         c.indices(rows, vocab), vocab, 1e-3f);),
    CALL(sum_losses, u32 count = (u32)c.number(1, 1000);
         return c.launch(1, 0, c.in_out(F64, 1), c.in(F64, count), count);),
    CALL(attention_softmax, Queries q(c);
         return c.launch(q.grid(), 0, c.out(c.type(0), q.scores()),
                         c.out(F32, (u64)q.heads * q.rows), c.in_out(F32, (u64)q.heads * q.seq),
                         c.in(F32, q.scores()), q.rows, q.keys, q.first, q.seq);),
    CALL(attention_output, Queries q(c); u32 dim = (u32)c.number(1, 130);
         return c.launch(q.rows, 0, c.in_out(c.type(0), (u64)q.seq * q.heads * dim),
                         c.in(F32, (u64)q.heads * q.rows * dim),
                         c.in(F32, (u64)q.heads * q.rows), q.rows, q.heads, dim, q.first);),
    CALL(attention_projection, u32 seq = (u32)c.number(1, 40);
         u64 tokens = seq * c.number(1, 3); u32 heads = (u32)c.number(1, 5);
         u32 dim = (u32)c.number(1, 130); u64 all = tokens * heads * dim;
         return c.launch(ceil_div(tokens * heads, 32), 0, c.out(F32, tokens * heads),
                         c.in(c.type(0), all), c.in(c.type(0), all), tokens, seq, heads, dim);),
    CALL(attention_gradient, Queries q(c);
         return c.launch(q.grid(), 0, c.out(c.type(0), q.scores()), c.out(c.type(0),
                         q.scores()), c.in(F32, q.scores()), c.in(F32, q.scores()),
                         c.in(F32, (u64)q.heads * q.seq), c.in(F32, (u64)q.heads * q.seq),
                         q.rows, q.keys, q.first, q.seq);),
    CALL(flash_attention_64, return flash_attention(c, 64);),
    CALL(flash_attention_128, return flash_attention(c, 128);),
    CALL(flash_attention_keys_64, return flash_attention_keys(c, 64);),
    CALL(flash_attention_keys_128, return flash_attention_keys(c, 128);),
    CALL(flash_attention_queries_64, return flash_attention_queries(c, 64);),
    CALL(flash_attention_queries_128, return flash_attention_queries(c, 128);),
    CALL(follow_event, c.latch_matters = false; c.may_latch = c.coin();
         return c.launch(1, 0, c.words({c.may_latch ? 2u : 1u}));),
    CALL(follow_latch, c.latch_matters = false; c.may_latch = c.coin();
         return c.launch(1, 0, c.words({c.may_latch ? 3u : 0u}));),
    CALL(follow_marks, return marks(c);),
    CALL(write_rider, u32 n = (u32)c.number(0, 600); c.latch_matters = false;
         return c.launch(1, 0, c.out(F64, n + 1), c.in(F64, n), n);),
    CALL(follow_riders, u32 count = (u32)c.number(1, 70), stride = (u32)c.number(1, 9);
         c.latch_matters = false; c.threads = 32; c.may_latch = true;
         return c.launch(1, 0, c.in(F64, (u64)count * stride), count, stride);),
};

}  // namespace

Call call_of(const std::string& base) {
    auto found = calls.find(base);
    return found == calls.end() ? nullptr : found->second;
}

}  // namespace check
