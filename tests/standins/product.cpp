// A product of matrices on the CPU: see product.h.
//
// A and B are copied into panels of f32, 16 rows and 4 columns wide. A tile of 16 x 4 sums stays in
// registers while the inner index runs from first to last, so the order of each sum is fixed.
#include "product.h"

#include <string.h>

#include <algorithm>
#include <vector>

namespace product {

namespace {

constexpr size_t ROWS = 16, COLUMNS = 4;

float widen(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}
uint16_t narrow(float value) {   // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T> float load(const T* at);
template <> float load(const float* at) { return *at; }
template <> float load(const uint16_t* at) { return widen(*at); }

// Panels of `width` lines each: panel[p][x][l] is element x of line p * width + l. Lines that are
// missing in the last panel are 0.
template <class T>
void pack(std::vector<float>& panels, const T* from, size_t lines, size_t line_step, size_t inner,
          size_t inner_step, size_t width) {
    size_t count = (lines + width - 1) / width;
    panels.assign(count * inner * width, 0.0f);
    auto copy = [&](size_t line, size_t x) {
        panels[(line / width * inner + x) * width + line % width] =
            load(from + line * line_step + x * inner_step);
    };
    if (line_step < inner_step) {   // in the order of the addresses that are read
        for (size_t x = 0; x < inner; x++)
            for (size_t line = 0; line < lines; line++) copy(line, x);
    } else {
        for (size_t line = 0; line < lines; line++)
            for (size_t x = 0; x < inner; x++) copy(line, x);
    }
}
void pack(std::vector<float>& panels, const void* from, bool bf16, size_t lines, size_t line_step,
          size_t inner, size_t inner_step, size_t width) {
    if (bf16)
        pack(panels, static_cast<const uint16_t*>(from), lines, line_step, inner, inner_step,
             width);
    else
        pack(panels, static_cast<const float*>(from), lines, line_step, inner, inner_step, width);
}

// 16 floats, in as many registers as the processor needs. Wider registers compute the same bits:
// each sum is one lane, and nothing is fused.
typedef float Lanes __attribute__((vector_size(4 * ROWS)));

__attribute__((target_clones("avx512f", "avx2", "default")))
void tile(const float* a, const float* b, size_t inner, float (*sums)[ROWS]) {
    Lanes local[COLUMNS] = {};
    for (size_t x = 0; x < inner; x++) {
        Lanes column;
        memcpy(&column, a + x * ROWS, sizeof column);
        for (size_t j = 0; j < COLUMNS; j++) local[j] += column * b[x * COLUMNS + j];
    }
    memcpy(sums, local, sizeof local);
}

float read(const void* at, const Matrix& matrix, size_t row, size_t column) {
    size_t index = row * matrix.row_step + column * matrix.column_step;
    return matrix.bf16 ? widen(static_cast<const uint16_t*>(at)[index])
                       : static_cast<const float*>(at)[index];
}
void write(void* at, const Matrix& matrix, size_t row, size_t column, float value) {
    size_t index = row * matrix.row_step + column * matrix.column_step;
    if (matrix.bf16) static_cast<uint16_t*>(at)[index] = narrow(value);
    else static_cast<float*>(at)[index] = value;
}

}  // namespace

void multiply(const Product& p, const void* a, const void* b, const void* c, void* d) {
    std::vector<float> left, right;
    pack(left, a, p.a.bf16, p.rows, p.a.row_step, p.inner, p.a.column_step, ROWS);
    pack(right, b, p.b.bf16, p.columns, p.b.column_step, p.inner, p.b.row_step, COLUMNS);
    float sums[COLUMNS][ROWS];
    // A panel of A, which is the larger one, stays in the cache while the panels of B pass by.
    for (size_t row = 0; row < p.rows; row += ROWS)
        for (size_t column = 0; column < p.columns; column += COLUMNS) {
            tile(left.data() + row * p.inner, right.data() + column * p.inner, p.inner, sums);
            for (size_t j = 0; j < std::min(COLUMNS, p.columns - column); j++)
                for (size_t i = 0; i < std::min(ROWS, p.rows - row); i++) {
                    float value = p.alpha * sums[j][i];
                    if (p.beta != 0) value += p.beta * read(c, p.c, row + i, column + j);
                    write(d, p.d, row + i, column + j, value);
                }
        }
}

}  // namespace product
