// Causal grouped-query attention in bf16 on tensor cores, for heads of 64 and 128 elements; scores
// stay in registers. kernels/src/cpu/attention.rs has the formulas.
//
// The forward pass meets the keys tile by tile and keeps, for each query, the largest score so far;
// when a larger one comes, it rescales what it has summed (Milakov and Gimelshein 2018, "Online
// normalizer calculation for softmax"; Dao 2023, "FlashAttention-2"). The backward pass computes
// the scores again, in two kernels: one whose blocks own keys, and one whose blocks own queries.
// So each sum has one owner, which adds in a fixed order, and no atomics are needed.
//
// A key that a query does not see has the weight 0. Where it shares a tile with keys that are seen,
// its value is multiplied with that weight all the same, so an infinite one makes the result NaN.
//
// While a warp computes with one pair of tiles, the block loads the next pair.

namespace flash {

constexpr u32 WARPS = 4;
constexpr u32 BLOCK = WARPS * WARP;
// Rows of a tile that a block meets.
constexpr u32 TILE = 64;
// Sets of 16 rows that a warp owns in the forward pass: two, because each operand that a warp loads
// from shared memory then serves two products.
constexpr int LEFTS = 2;
constexpr u32 QUERIES = 16 * LEFTS * WARPS;
// Sets of 8 keys or queries whose scores a warp has at once: as many as its registers hold.
template <int WIDTH>
constexpr int FORWARD_SETS = WIDTH == 64 ? 8 : 4;
constexpr int BACKWARD_SETS = 4;

constexpr float LOG2_E = 1.4426950408889634f;

// What a block works on: a tile of one head of one sequence.
struct Place {
    u32 tile, head, sequence;
};

// Blocks of one tile are neighbours. The blocks with the most work come first, because the last
// blocks to start are those that others wait for.
DEVICE Place place_of_block(u32 tiles, u32 heads, bool last_tile_first) {
    u32 pairs = gridDim.x / tiles, tile = blockIdx.x / pairs, pair = blockIdx.x % pairs;
    return {last_tile_first ? tiles - 1 - tile : tile, pair % heads, pair / heads};
}

DEVICE u32 tiles_of(u32 seq, u32 rows) { return seq / rows + (seq % rows != 0); }

// Where rows of a head start in a tensor [sequences, seq, heads, WIDTH].
template <int WIDTH>
DEVICE u64 start_of(u32 sequence, u32 seq, u32 heads, u32 head) {
    return ((u64)sequence * seq * heads + head) * WIDTH;
}

// The sum over the four lanes that share a row.
DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
DEVICE float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// --- Forward ------------------------------------------------------------------------------------

// Turns the scores of 16 queries into weights, 2^(factor * (score - largest)), rounded, where the
// factor is log2(e) / sqrt(WIDTH). Of rows g and g + 8 a lane knows the largest score so far, its
// share of the sum of the weights, and its part of the outputs, which is rescaled. `query` is the
// number of row g, `key` that of the first column.
template <int WIDTH, int SETS>
DEVICE void soften(float (&largest)[2], float (&total)[2], float (&out)[WIDTH / 8][4],
                   u32 (&weights)[SETS / 2][4], float (&scores)[SETS][4], float factor, bool masked,
                   u32 query, u32 key) {
    u32 member = threadIdx.x % 4;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        float larger = largest[half];
#pragma unroll
        for (u32 column = 0; column < SETS; column++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float& score = scores[column][2 * half + i];
                if (masked && key + 8 * column + 2 * member + i > query + 8 * half)
                    score = minus_infinity();
                larger = fmaxf(larger, score);
            }
        larger = row_max(larger);
        float shift = factor * softmax_shift(larger);
        float rescale = exp2f(fmaf(factor, largest[half], -shift));
        largest[half] = larger;
        total[half] *= rescale;
#pragma unroll
        for (u32 column = 0; column < WIDTH / 8; column++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) out[column][2 * half + i] *= rescale;
#pragma unroll
        for (u32 column = 0; column < SETS; column++) {
            const float* pair = &scores[column][2 * half];
            u32 both = pack(exp2f(fmaf(factor, pair[0], -shift)), exp2f(fmaf(factor, pair[1], -shift)));
            total[half] += low_half(both) + high_half(both);
            weights[column / 2][column % 2 * 2 + half] = both;
        }
    }
}

template <int WIDTH>
DEVICE void forward(bf16* out, float* log_sum, const bf16* q, const bf16* k, const bf16* v, u32 seq,
                    u32 heads, u32 kv_heads, float scale) {
    DYNAMIC_SHARED(bf16, shared);
    constexpr u32 SIZE = TILE * WIDTH;
    constexpr int SETS = FORWARD_SETS<WIDTH>;
    Tile<WIDTH> queries = {shared};
    bf16* pairs = shared + QUERIES * WIDTH;
    bool aligned = take_vectors<8>(out, q, k, v);
    Place at = place_of_block(tiles_of(seq, QUERIES), heads, true);
    u64 of_head = start_of<WIDTH>(at.sequence, seq, heads, at.head);
    u64 of_keys = start_of<WIDTH>(at.sequence, seq, kv_heads, at.head / (heads / kv_heads));
    u64 stride = (u64)heads * WIDTH, key_stride = (u64)kv_heads * WIDTH;
    u32 first = at.tile * QUERIES, tiles = tiles_of(min(first + QUERIES, seq), TILE);
    auto load_pair = [&](u32 tile) {
        bf16* pair = pairs + tile % 2 * 2 * SIZE;
        Tile<WIDTH>{pair}.template start_load<TILE, BLOCK>(k + of_keys, key_stride, tile * TILE, seq,
                                                           aligned);
        Tile<WIDTH>{pair + SIZE}.template start_load<TILE, BLOCK>(v + of_keys, key_stride,
                                                                  tile * TILE, seq, aligned);
    };
    queries.template start_load<QUERIES, BLOCK>(q + of_head, stride, first, seq, aligned);
    load_pair(0);
    cp_async_commit();

    u32 lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16 * LEFTS, query = first + row;
    float factor = scale * LOG2_E;
    float largest[LEFTS][2], total[LEFTS][2] = {}, sums[LEFTS][WIDTH / 8][4] = {};
    for (int i = 0; i < LEFTS; i++) largest[i][0] = largest[i][1] = minus_infinity();
    for (u32 tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) load_pair(tile + 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();   // until all threads have loaded their parts of the tile
        bf16* pair = pairs + tile % 2 * 2 * SIZE;
#pragma unroll 1
        for (u32 part = 0; part < TILE; part += 8 * SETS) {
            u32 key = tile * TILE + part;
            if (key >= query + 16 * LEFTS) break;
            float scores[LEFTS][SETS][4] = {};
            u32 weights[LEFTS][SETS / 2][4];
            add_scores(scores, queries, row, Tile<WIDTH>{pair}, part);
#pragma unroll
            for (u32 i = 0; i < LEFTS; i++)
                soften<WIDTH>(largest[i], total[i], sums[i], weights[i], scores[i], factor,
                              key + 8 * SETS - 1 > query, query + 16 * i + lane / 4, key);
            add_product(sums, weights, Tile<WIDTH>{pair + SIZE}, part);
        }
        __syncthreads();   // until no thread reads the tile any more
    }
#pragma unroll
    for (u32 i = 0; i < LEFTS; i++) {
        float inverse[2];
        for (u32 half = 0; half < 2; half++) {
            float sum = row_sum(total[i][half]);
            inverse[half] = 1.0f / sum;
            u32 token = query + 16 * i + lane / 4 + 8 * half;
            if (lane % 4 == 0 && token < seq)
                log_sum[((u64)at.sequence * heads + at.head) * seq + token] =
                    scale * largest[i][half] + logf(sum);
        }
        store_rows<WIDTH>(out + of_head, stride, query + 16 * i, seq, aligned, sums[i], inverse,
                          queries, row + 16 * i);
    }
}

// --- Backward -----------------------------------------------------------------------------------

// Weights p = exp(score - log_sum) and gradients of scores p * (grad_p - projection), both rounded,
// as left operands; 0 where a query does not see a key. `of(half, column)` has the log_sum and the
// projection of the query in row g + 8 * half and this column, and `sees` tells whether it sees the
// key there.
template <class Of, class Sees>
DEVICE void weigh(u32 (&weights)[1][BACKWARD_SETS / 2][4], u32 (&grads)[1][BACKWARD_SETS / 2][4],
                  const float (&scores)[1][BACKWARD_SETS][4], const float (&grad_p)[1][BACKWARD_SETS][4],
                  float factor, Of of, Sees sees) {
    u32 member = threadIdx.x % 4;
#pragma unroll
    for (u32 column = 0; column < BACKWARD_SETS; column++)
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float p[2], grad[2];
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 at = 8 * column + 2 * member + i;
                auto [log_sum, projection] = of(half, at);
                float exact = exp2f(fmaf(factor, scores[0][column][2 * half + i], -LOG2_E * log_sum));
                bool seen = sees(half, at);
                p[i] = seen ? exact : 0.0f;
                grad[i] = seen ? exact * (grad_p[0][column][2 * half + i] - projection) : 0.0f;
            }
            weights[0][column / 2][column % 2 * 2 + half] = pack(p[0], p[1]);
            grads[0][column / 2][column % 2 * 2 + half] = pack(grad[0], grad[1]);
        }
}

struct OfQuery {
    float log_sum, projection;
};

// The gradients of a tile of keys and values, over all query heads that share them, in order.
template <int WIDTH>
DEVICE void keys(bf16* grad_k, bf16* grad_v, const bf16* grad_out, const bf16* q, const bf16* k,
                 const bf16* v, const float* log_sum, const float* projection, u32 seq, u32 heads,
                 u32 kv_heads, float scale) {
    DYNAMIC_SHARED(bf16, shared);
    constexpr u32 SIZE = TILE * WIDTH;
    Tile<WIDTH> own_keys = {shared}, own_values = {shared + SIZE};
    bf16* pairs = shared + 2 * SIZE;
    float* numbers = reinterpret_cast<float*>(shared + 6 * SIZE);
    bool aligned = take_vectors<8>(grad_k, grad_v, grad_out, q, k, v);
    u32 tiles = tiles_of(seq, TILE), group = heads / kv_heads;
    Place at = place_of_block(tiles, kv_heads, false);
    u64 of_keys = start_of<WIDTH>(at.sequence, seq, kv_heads, at.head);
    u64 stride = (u64)heads * WIDTH, key_stride = (u64)kv_heads * WIDTH;
    u32 first = at.tile * TILE, of_member = tiles - at.tile, steps = group * of_member;
    auto load_pair = [&](u32 step) {
        u32 head = at.head * group + step / of_member, rows = (at.tile + step % of_member) * TILE;
        u64 of_head = start_of<WIDTH>(at.sequence, seq, heads, head);
        bf16* pair = pairs + step % 2 * 2 * SIZE;
        Tile<WIDTH>{pair}.template start_load<TILE, BLOCK>(q + of_head, stride, rows, seq, aligned);
        Tile<WIDTH>{pair + SIZE}.template start_load<TILE, BLOCK>(grad_out + of_head, stride, rows,
                                                                  seq, aligned);
        // One number a thread: half of the block loads log_sum, the other half the projections.
        static_assert(BLOCK == 2 * TILE, "");
        const float* from = threadIdx.x < TILE ? log_sum : projection;
        u32 token = rows + threadIdx.x % TILE;
        from += ((u64)at.sequence * heads + head) * seq + (token < seq ? token : 0);
        cp_async<4>(numbers + step % 2 * BLOCK + threadIdx.x, from, token < seq);
    };
    own_keys.template start_load<TILE, BLOCK>(k + of_keys, key_stride, first, seq, aligned);
    own_values.template start_load<TILE, BLOCK>(v + of_keys, key_stride, first, seq, aligned);
    load_pair(0);
    cp_async_commit();

    u32 lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16;
    float factor = scale * LOG2_E;
    float of_keys_sums[1][WIDTH / 8][4] = {}, of_values_sums[1][WIDTH / 8][4] = {};
    for (u32 step = 0; step < steps; step++) {
        if (step + 1 < steps) load_pair(step + 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();   // until all threads have loaded their parts of the tile
        Tile<WIDTH> queries = {pairs + step % 2 * 2 * SIZE};
        Tile<WIDTH> grads = {queries.elements + SIZE};
        const float* of_tile = numbers + step % 2 * BLOCK;
        bool diagonal = step % of_member == 0;
#pragma unroll 1
        for (u32 part = 0; part < TILE; part += 8 * BACKWARD_SETS) {
            // On the diagonal, the last query of a part may come before the warp's first key.
            if (diagonal && part + 8 * BACKWARD_SETS <= row) continue;
            float scores[1][BACKWARD_SETS][4] = {}, grad_p[1][BACKWARD_SETS][4] = {};
            add_scores(scores, own_keys, row, queries, part);
            add_scores(grad_p, own_values, row, grads, part);
            u32 weights[1][BACKWARD_SETS / 2][4], grad_scores[1][BACKWARD_SETS / 2][4];
            weigh(
                weights, grad_scores, scores, grad_p, factor,
                [&](u32, u32 column) {
                    u32 query = part + column;
                    return OfQuery{of_tile[query], of_tile[TILE + query]};
                },
                [&](u32 half, u32 column) {
                    return !diagonal || part + column >= row + lane / 4 + 8 * half;
                });
            add_product(of_values_sums, weights, grads, part);
            add_product(of_keys_sums, grad_scores, queries, part);
        }
        __syncthreads();   // until no thread reads the tile any more
    }
    const float by_scale[2] = {scale, scale}, by_one[2] = {1.0f, 1.0f};
    store_rows<WIDTH>(grad_k + of_keys, key_stride, first + row, seq, aligned, of_keys_sums[0],
                      by_scale, own_keys, row);
    store_rows<WIDTH>(grad_v + of_keys, key_stride, first + row, seq, aligned, of_values_sums[0],
                      by_one, own_values, row);
}

// The gradients of a tile of queries.
template <int WIDTH>
DEVICE void queries(bf16* grad_q, const bf16* grad_out, const bf16* q, const bf16* k, const bf16* v,
                    const float* log_sum, const float* projection, u32 seq, u32 heads, u32 kv_heads,
                    float scale) {
    DYNAMIC_SHARED(bf16, shared);
    constexpr u32 SIZE = TILE * WIDTH;
    Tile<WIDTH> own_queries = {shared}, own_grads = {shared + SIZE};
    bf16* pairs = shared + 2 * SIZE;
    bool aligned = take_vectors<8>(grad_q, grad_out, q, k, v);
    Place at = place_of_block(tiles_of(seq, TILE), heads, true);
    u64 of_head = start_of<WIDTH>(at.sequence, seq, heads, at.head);
    u64 of_keys = start_of<WIDTH>(at.sequence, seq, kv_heads, at.head / (heads / kv_heads));
    u64 stride = (u64)heads * WIDTH, key_stride = (u64)kv_heads * WIDTH;
    u32 first = at.tile * TILE, tiles = at.tile + 1;
    auto load_pair = [&](u32 tile) {
        bf16* pair = pairs + tile % 2 * 2 * SIZE;
        Tile<WIDTH>{pair}.template start_load<TILE, BLOCK>(k + of_keys, key_stride, tile * TILE, seq,
                                                           aligned);
        Tile<WIDTH>{pair + SIZE}.template start_load<TILE, BLOCK>(v + of_keys, key_stride,
                                                                  tile * TILE, seq, aligned);
    };
    own_queries.template start_load<TILE, BLOCK>(q + of_head, stride, first, seq, aligned);
    own_grads.template start_load<TILE, BLOCK>(grad_out + of_head, stride, first, seq, aligned);
    load_pair(0);
    cp_async_commit();

    u32 lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16, query = first + row + lane / 4;
    float factor = scale * LOG2_E;
    OfQuery of[2] = {};
    for (u32 half = 0; half < 2; half++) {
        u64 place = ((u64)at.sequence * heads + at.head) * seq + query + 8 * half;
        if (query + 8 * half < seq) of[half] = {log_sum[place], projection[place]};
    }
    float sums[1][WIDTH / 8][4] = {};
    for (u32 tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) load_pair(tile + 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();   // until all threads have loaded their parts of the tile
        Tile<WIDTH> keys = {pairs + tile % 2 * 2 * SIZE}, values = {keys.elements + SIZE};
        bool diagonal = tile == at.tile;
#pragma unroll 1
        for (u32 part = 0; part < TILE; part += 8 * BACKWARD_SETS) {
            // On the diagonal, the first key of a part may come behind the warp's last query.
            if (diagonal && part > row + 15) continue;
            float scores[1][BACKWARD_SETS][4] = {}, grad_p[1][BACKWARD_SETS][4] = {};
            add_scores(scores, own_queries, row, keys, part);
            add_scores(grad_p, own_grads, row, values, part);
            u32 weights[1][BACKWARD_SETS / 2][4], grad_scores[1][BACKWARD_SETS / 2][4];
            weigh(
                weights, grad_scores, scores, grad_p, factor,
                [&](u32 half, u32) { return of[half]; },
                [&](u32 half, u32 column) {
                    return !diagonal || part + column <= row + lane / 4 + 8 * half;
                });
            add_product(sums, grad_scores, keys, part);
        }
        __syncthreads();   // until no thread reads the tile any more
    }
    const float by_scale[2] = {scale, scale};
    store_rows<WIDTH>(grad_q + of_head, stride, first + row, seq, aligned, sums[0], by_scale,
                      own_queries, row);
}

}  // namespace flash

// q, out [sequences, seq, heads, WIDTH]; k, v [sequences, seq, kv_heads, WIDTH]; log_sum
// [sequences, heads, seq]. `scale` is 1 / sqrt(WIDTH).
//
// Grid: ceil(seq / 128) * heads * sequences. Dynamic shared memory: 768 * WIDTH bytes.
#define FLASH_ATTENTION(name, WIDTH)                                                             \
    KERNEL_OF(flash::BLOCK, name)                                                                \
    (Latch* latch, bf16* __restrict__ out, float* __restrict__ log_sum,                          \
     const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,         \
     u32 seq, u32 heads, u32 kv_heads, float scale) {                                            \
        RETURN_IF_LATCHED(latch);                                                                \
        flash::forward<WIDTH>(out, log_sum, q, k, v, seq, heads, kv_heads, scale);               \
    }                                                                                            \
    EXPORT_KERNEL(name)

FLASH_ATTENTION(flash_attention_64, 64)
FLASH_ATTENTION(flash_attention_128, 128)
#undef FLASH_ATTENTION

// grad_k, grad_v like k; grad_out like q; projection like log_sum.
//
// Grid: ceil(seq / 64) * kv_heads * sequences. Dynamic shared memory: 768 * WIDTH + 1024 bytes.
#define FLASH_ATTENTION_KEYS(name, WIDTH)                                                        \
    KERNEL_OF(flash::BLOCK, name)                                                                \
    (Latch* latch, bf16* __restrict__ grad_k, bf16* __restrict__ grad_v,                         \
     const bf16* __restrict__ grad_out, const bf16* __restrict__ q, const bf16* __restrict__ k,  \
     const bf16* __restrict__ v, const float* __restrict__ log_sum,                              \
     const float* __restrict__ projection, u32 seq, u32 heads, u32 kv_heads, float scale) {      \
        RETURN_IF_LATCHED(latch);                                                                \
        flash::keys<WIDTH>(grad_k, grad_v, grad_out, q, k, v, log_sum, projection, seq, heads,   \
                           kv_heads, scale);                                                     \
    }                                                                                            \
    EXPORT_KERNEL(name)

FLASH_ATTENTION_KEYS(flash_attention_keys_64, 64)
FLASH_ATTENTION_KEYS(flash_attention_keys_128, 128)
#undef FLASH_ATTENTION_KEYS

// grad_q like q.
//
// Grid: ceil(seq / 64) * heads * sequences. Dynamic shared memory: 768 * WIDTH bytes.
#define FLASH_ATTENTION_QUERIES(name, WIDTH)                                                     \
    KERNEL_OF(flash::BLOCK, name)                                                                \
    (Latch* latch, bf16* __restrict__ grad_q, const bf16* __restrict__ grad_out,                 \
     const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,         \
     const float* __restrict__ log_sum, const float* __restrict__ projection, u32 seq,           \
     u32 heads, u32 kv_heads, float scale) {                                                     \
        RETURN_IF_LATCHED(latch);                                                                \
        flash::queries<WIDTH>(grad_q, grad_out, q, k, v, log_sum, projection, seq, heads,        \
                              kv_heads, scale);                                                  \
    }                                                                                            \
    EXPORT_KERNEL(name)

FLASH_ATTENTION_QUERIES(flash_attention_queries_64, 64)
FLASH_ATTENTION_QUERIES(flash_attention_queries_128, 128)
#undef FLASH_ATTENTION_QUERIES
