// Tensor cores: the instructions that attention uses, and tiles of matrices in shared memory.
//
// An operand of mma.m16n8k16 is spread over the registers of a warp. With g = lane / 4 and
// t = lane % 4, a lane has of
//   the left operand [16, 16]:  left[i], columns 2t and 2t + 1 of row g (i = 0), g + 8 (i = 1); the
//     same rows with columns 2t + 8 and 2t + 9 (i = 2, 3);
//   the right operand [16, 8]:  right[i], rows 2t + 8i and 2t + 8i + 1 of column g;
//   the sums [16, 8]:           sums[i], column 2t + i % 2 of row g + 8 (i / 2).
// (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".)

// --- Instructions -------------------------------------------------------------------------------

#ifndef PILLION_HOST
// Of each of these, the header of the tests' host build has its own.

DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// Starts to copy BYTES bytes, 4 or 16, to shared memory. Where `exists` is false it writes zeros
// and reads nothing. Both addresses are multiples of BYTES.
template <int BYTES>
DEVICE void cp_async(void* to, const void* from, bool exists) {
    u64 global = __cvta_generic_to_global(from);
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                     "l"(global), "r"(exists ? 16 : 0)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                     "l"(global), "r"(exists ? 4 : 0)
                     : "memory");
}

// Ends a group of this thread's copies.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until no more than the last NEWEST groups of this thread's copies are under way.
template <int NEWEST>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
}

// Loads four matrices [8, 8] of 16-bit elements. Lanes 8i to 8i + 7 give the addresses of the rows
// of matrix i, multiples of 16. A lane gets elements 2t and 2t + 1 of row g of each.
DEVICE void ldmatrix(u32 (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, transposed: a lane gets rows 2t and 2t + 1 of column g of each matrix.
DEVICE void ldmatrix_transposed(u32 (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// sums += left * right. Products are exact and sums are f32.
DEVICE void mma(float (&sums)[4], const u32 (&left)[4], u32 right_low, u32 right_high) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_low), "r"(right_high));
}

// Both numbers rounded to bf16, ties to even.
DEVICE u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
#else
DEVICE u32 pack(float low, float high) {
    return narrow<bf16>(low).bits | (u32)narrow<bf16>(high).bits << 16;
}
#endif

DEVICE float low_half(u32 both) { return __uint_as_float(both << 16); }
DEVICE float high_half(u32 both) { return __uint_as_float(both & 0xffff0000u); }

// --- Tiles --------------------------------------------------------------------------------------

// Rows of WIDTH bf16, which is 64 or 128. The vectors of 8 elements in a row change places by the
// row's number, so that the same vector of 8 neighbouring rows lies in different banks.
template <int WIDTH>
struct Tile {
    static_assert(WIDTH % 64 == 0, "the places of 8 vectors are exchanged");
    static constexpr u32 VECTORS = WIDTH / 8;
    bf16* elements;

    DEVICE bf16* vector(u32 row, u32 vector) const {
        return elements + row * WIDTH + 8 * (vector ^ (row % 8));
    }

    // Starts to load ROWS rows of a matrix, from row `first` on, with all threads of a block of
    // SIZE threads. Rows at or behind `end` become zeros. `aligned`: `from` is a multiple of 16.
    template <u32 ROWS, u32 SIZE>
    DEVICE void start_load(const bf16* from, u64 stride, u32 first, u32 end, bool aligned) const {
        if (aligned) start_load_as<ROWS, SIZE, true>(from, stride, first, end);
        else start_load_as<ROWS, SIZE, false>(from, stride, first, end);
    }

    template <u32 ROWS, u32 SIZE, bool ALIGNED>
    DEVICE void start_load_as(const bf16* from, u64 stride, u32 first, u32 end) const {
        constexpr u32 COUNT = ROWS * VECTORS / SIZE;
#pragma unroll(ALIGNED ? COUNT : 1)
        for (u32 i = 0; i < COUNT; i++) {
            u32 place = i * SIZE + threadIdx.x, row = place / VECTORS, at = place % VECTORS;
            bool exists = first + row < end;
            const bf16* source = from + (exists ? (first + row) * stride + 8 * at : 0);
            if constexpr (ALIGNED) {
                cp_async<16>(vector(row, at), source, exists);
            } else {
                Vector<bf16, 8> values = {};
                if (exists) values = load<8, false>(source);
                store(vector(row, at), values);
            }
        }
    }

    // The left operand whose rows are rows `row` to row + 15, and whose columns are 16 * step to
    // 16 * step + 15.
    DEVICE void left(u32 (&to)[4], u32 row, u32 step) const {
        u32 lane = threadIdx.x % WARP;
        ldmatrix(to, vector(row + lane % 16, 2 * step + lane / 16));
    }

    // Two right operands, whose columns are rows `row` to row + 7 and row + 8 to row + 15, and
    // whose rows are columns 16 * step to 16 * step + 15: registers 0 and 1, and 2 and 3.
    DEVICE void right_of_rows(u32 (&to)[4], u32 row, u32 step) const {
        u32 lane = threadIdx.x % WARP;
        ldmatrix(to, vector(row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
    }

    // Two right operands, whose rows are rows `row` to row + 15, and whose columns are 16 * step to
    // 16 * step + 7 and the next 8.
    DEVICE void right_of_columns(u32 (&to)[4], u32 row, u32 step) const {
        u32 lane = threadIdx.x % WARP;
        ldmatrix_transposed(to, vector(row + lane % 16, 2 * step + lane / 16));
    }
};

// sums [16 * LEFTS, 8 * COLUMNS] += left * rightᵀ, over the width of the tiles. The left operand is
// 16 * LEFTS rows of a tile, the right one 8 * COLUMNS rows.
template <int LEFTS, int COLUMNS, int WIDTH>
DEVICE void add_scores(float (&sums)[LEFTS][COLUMNS][4], Tile<WIDTH> left, u32 left_row,
                       Tile<WIDTH> right, u32 right_row) {
#pragma unroll
    for (u32 step = 0; step < WIDTH / 16; step++) {
        u32 lefts[LEFTS][4];
#pragma unroll
        for (int i = 0; i < LEFTS; i++) left.left(lefts[i], left_row + 16 * i, step);
#pragma unroll
        for (int column = 0; column < COLUMNS; column += 2) {
            u32 rights[4];
            right.right_of_rows(rights, right_row + 8 * column, step);
#pragma unroll
            for (int i = 0; i < LEFTS; i++) {
                mma(sums[i][column], lefts[i], rights[0], rights[1]);
                mma(sums[i][column + 1], lefts[i], rights[2], rights[3]);
            }
        }
    }
}

// sums [16 * LEFTS, WIDTH] += left * right. The left operand [16 * LEFTS, 16 * STEPS] is in
// registers, the right one is 16 * STEPS rows of a tile.
template <int LEFTS, int STEPS, int WIDTH>
DEVICE void add_product(float (&sums)[LEFTS][WIDTH / 8][4], const u32 (&left)[LEFTS][STEPS][4],
                        Tile<WIDTH> right, u32 right_row) {
#pragma unroll
    for (u32 step = 0; step < STEPS; step++) {
#pragma unroll
        for (int column = 0; column < WIDTH / 16; column++) {
            u32 rights[4];
            right.right_of_columns(rights, right_row + 16 * step, column);
#pragma unroll
            for (int i = 0; i < LEFTS; i++) {
                mma(sums[i][2 * column], left[i][step], rights[0], rights[1]);
                mma(sums[i][2 * column + 1], left[i][step], rights[2], rights[3]);
            }
        }
    }
}

// Copies rows `row` to row + 15 of a tile, with one warp, to rows `first` to first + 15 of a
// matrix. Rows at or behind `end` are not written.
template <int WIDTH, bool ALIGNED>
DEVICE void move_rows(bf16* to, u64 stride, u32 first, u32 end, Tile<WIDTH> tile, u32 row) {
    constexpr u32 VECTORS = Tile<WIDTH>::VECTORS;
#pragma unroll(ALIGNED ? 16 * VECTORS / WARP : 1)
    for (u32 i = 0; i < 16 * VECTORS / WARP; i++) {
        u32 place = i * WARP + threadIdx.x % WARP, r = place / VECTORS, at = place % VECTORS;
        if (first + r >= end) break;
        bf16* target = to + (u64)(first + r) * stride + 8 * at;
        if constexpr (ALIGNED)
            // The compiler takes a copy of a Vector apart here.
            *reinterpret_cast<uint4*>(target) =
                *reinterpret_cast<const uint4*>(tile.vector(row + r, at));
        else
            store<false>(target, load<8>(tile.vector(row + r, at)));
    }
}

// Writes 16 rows of sums, row r times factor[0] or, from row 8 on, factor[1], as bf16 to rows
// first + r of a matrix. Rows at or behind `end` are not written. The rows `row` to row + 15 of the
// tile are used for that by this warp alone.
template <int WIDTH>
DEVICE void store_rows(bf16* to, u64 stride, u32 first, u32 end, bool aligned,
                       const float (&sums)[WIDTH / 8][4], const float (&factor)[2],
                       Tile<WIDTH> tile, u32 row) {
    constexpr u32 VECTORS = Tile<WIDTH>::VECTORS;
    u32 lane = threadIdx.x % WARP, group = lane / 4, member = lane % 4;
#pragma unroll
    for (u32 column = 0; column < VECTORS; column++)
#pragma unroll
        for (u32 half = 0; half < 2; half++)
            reinterpret_cast<u32*>(tile.vector(row + group + 8 * half, column))[member] =
                pack(sums[column][2 * half] * factor[half], sums[column][2 * half + 1] * factor[half]);
    __syncwarp();
    if (aligned) move_rows<WIDTH, true>(to, stride, first, end, tile, row);
    else move_rows<WIDTH, false>(to, stride, first, end, tile, row);
}
