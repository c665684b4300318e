// A product of matrices on the CPU, for the stand-in of libcublasLt.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace product {

struct Matrix {
    bool bf16;
    int64_t row_step, column_step;   // elements from one row, or column, to the next
};
// D = alpha * A B + beta * C, where D has `rows` and `columns`.
struct Product {
    size_t rows, columns, inner;
    float alpha, beta;
    Matrix a, b, c, d;
};
void multiply(const Product& product, const void* a, const void* b, const void* c, void* d);

}  // namespace product
