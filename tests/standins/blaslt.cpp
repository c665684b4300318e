// Stand-in for libcublasLt: the part of its interface that Pillion uses, computed on the CPU.
//
// Matrices are f32 or bf16. Each element of the result is a sum in f32, in order of the inner
// index, so results do not depend on anything but the inputs. Work runs on the streams of libcuda's
// stand-in.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "product.h"
#include "standin.h"

namespace {

enum Status : int { OK = 0, NOT_INITIALIZED = 1, ALLOC_FAILED = 3, INVALID_VALUE = 7,
                    EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum { F32 = 0, BF16 = 14 };                                  // cudaDataType_t
enum { COMPUTE_32F = 68, COMPUTE_32F_PEDANTIC = 69, COMPUTE_32F_TF32 = 77 };
enum { NOT_TRANSPOSED = 0, TRANSPOSED = 1, CONJUGATED = 2 };  // cublasOperation_t

int refuse(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));
int refuse(int status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "[stand-in for libcublasLt, no GPU] ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    return status;
}

struct Handle { bool destroyed = false; };

// Attributes are set by number. Each table says where an attribute lives and how many bytes it has.
struct Description {   // cublasLtMatmulDesc
    int compute, scale, pointer_mode = 0, transpose_a = 0, transpose_b = 0, transpose_c = 0;
    int epilogue = 1;
};
struct Layout {   // cublasLtMatrixLayout
    int type, order = 0;
    uint64_t rows, columns;
    int64_t leading;
    int batch = 1;
    int64_t batch_stride = 0;
};
struct Preference {
    uint64_t workspace = 0;
    uint32_t align[4] = {256, 256, 256, 256};   // of A, B, C, D: cuBLASLt's default too
};
// What the heuristic stores in a cublasLtMatmulAlgo_t.
struct Algorithm {
    uint64_t mark;
    uint32_t align[4];
    int types[4];
    int transpose_a, transpose_b;
    uint64_t rest[2];
};
constexpr uint64_t MARK = 0x50494c4c494f4e21;
struct HeuristicResult {
    Algorithm algorithm;
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Algorithm) == 64 && sizeof(HeuristicResult) == 96, "as in cublasLt.h");

struct Attribute {
    int number;
    void* at;
    size_t bytes;
};
int set_attribute(std::initializer_list<Attribute> known, int number, const void* from,
                  size_t bytes) {
    for (const Attribute& attribute : known)
        if (attribute.number == number) {
            if (bytes != attribute.bytes)
                return refuse(INVALID_VALUE, "attribute %d has %zu bytes, not %zu", number,
                              attribute.bytes, bytes);
            memcpy(attribute.at, from, bytes);
            return OK;
        }
    return refuse(NOT_SUPPORTED, "attribute %d is not modelled", number);
}

size_t size_of(int type) { return type == F32 ? 4 : 2; }

struct Operand {
    const char* name;
    const Layout* layout;
    const void* address;
};

int check_layout(const char* name, const Layout& layout) {
    if (layout.type != F32 && layout.type != BF16)
        return refuse(NOT_SUPPORTED, "%s: type %d is not modelled", name, layout.type);
    if (layout.order != 0 && layout.order != 1)
        return refuse(NOT_SUPPORTED, "%s: order %d is not modelled", name, layout.order);
    int64_t least = (int64_t)(layout.order == 0 ? layout.rows : layout.columns);
    if (layout.leading < least)
        return refuse(INVALID_VALUE, "%s: leading dimension %ld is less than %ld", name,
                      (long)layout.leading, (long)least);
    if (layout.batch < 1) return refuse(INVALID_VALUE, "%s: batch count %d", name, layout.batch);
    return OK;
}

// Elements from the first to behind the last one.
uint64_t extent(const Layout& layout) {
    if (!layout.rows || !layout.columns) return 0;
    uint64_t lines = layout.order == 0 ? layout.columns : layout.rows;
    uint64_t line = layout.order == 0 ? layout.rows : layout.columns;
    return (layout.batch - 1) * layout.batch_stride + (lines - 1) * layout.leading + line;
}

product::Matrix matrix(const Layout& layout, bool transposed) {
    bool by_column = (layout.order == 0) != transposed;
    return {layout.type == BF16, by_column ? 1 : layout.leading, by_column ? layout.leading : 1};
}

// What is the same for all products of these layouts.
int check_product(const Description& description, const Layout& a, const Layout& b, const Layout& c,
                  const Layout& d) {
    const Layout* layouts[] = {&a, &b, &c, &d};
    for (int i = 0; i < 4; i++)
        if (int status = check_layout(&"A\0B\0C\0D"[i * 2], *layouts[i])) return status;
    if ((description.compute != COMPUTE_32F && description.compute != COMPUTE_32F_PEDANTIC &&
         description.compute != COMPUTE_32F_TF32) || description.scale != F32)
        return refuse(NOT_SUPPORTED, "compute type %d, scale type %d", description.compute,
                      description.scale);
    if (description.transpose_c || description.epilogue != 1 || description.pointer_mode)
        return refuse(NOT_SUPPORTED, "a transposed C, an epilogue or scalars on the device");
    if (a.type != b.type || c.type != d.type || (a.type == F32 && c.type != F32))
        return refuse(NOT_SUPPORTED, "types %d x %d + %d -> %d", a.type, b.type, c.type, d.type);
    bool ta = description.transpose_a, tb = description.transpose_b;
    uint64_t m = ta ? a.columns : a.rows, k = ta ? a.rows : a.columns;
    uint64_t k_of_b = tb ? b.columns : b.rows, n = tb ? b.rows : b.columns;
    if (k != k_of_b || c.rows != m || c.columns != n || d.rows != m || d.columns != n)
        return refuse(INVALID_VALUE,
                      "shapes differ: (%lu x %lu) (%lu x %lu), C %lu x %lu, D %lu x %lu",
                      m, k, k_of_b, n, c.rows, c.columns, d.rows, d.columns);
    for (const Layout* layout : layouts)
        if (layout->batch != d.batch) return refuse(INVALID_VALUE, "batch counts differ");
    return OK;
}

// A product that waits in a stream.
struct Job {
    void* stream;
    Layout a, b, c, d;
    product::Product product;
    const char *at_a, *at_b, *at_c;
    char* at_d;
    void* workspace;
    size_t workspace_bytes;
};

int run(void* state) {
    Job& job = *static_cast<Job*>(state);
    struct { const char* what; const void* at; const Layout* layout; } sides[] = {
        {"matrix A", job.at_a, &job.a}, {"matrix B", job.at_b, &job.b},
        {"matrix D", job.at_d, &job.d}, {"matrix C", job.at_c, &job.c}};
    for (auto& side : sides) {
        if (side.at == job.at_c && job.product.beta == 0) continue;
        size_t bytes = extent(*side.layout) * size_of(side.layout->type);
        if (int error = standin_check(job.stream, side.at, bytes, side.what)) return error;
    }
    if (job.workspace_bytes) {
        if (int error = standin_check(job.stream, job.workspace, job.workspace_bytes,
                                      "a workspace"))
            return error;
        // cuBLASLt may write all of it. Its two ends stand for that, because all takes too long.
        size_t end = std::min<size_t>(job.workspace_bytes, 64 << 10);
        char* workspace = static_cast<char*>(job.workspace);
        memset(workspace, 0xff, end);
        memset(workspace + job.workspace_bytes - end, 0xff, end);
    }
    for (int i = 0; i < job.d.batch; i++) {
        auto part = [&](const char* at, const Layout& layout) {
            return at + i * layout.batch_stride * (int64_t)size_of(layout.type);
        };
        product::multiply(job.product, part(job.at_a, job.a), part(job.at_b, job.b),
                          part(job.at_c, job.c), const_cast<char*>(part(job.at_d, job.d)));
    }
    return 0;
}
void drop(void* state) { delete static_cast<Job*>(state); }

}  // namespace

#define BLASLT(name, ...) STANDIN_API int name(__VA_ARGS__)

BLASLT(cublasLtCreate, Handle** handle) {
    if (int status = standin_call(__func__)) return status;
    *handle = new Handle;
    return OK;
}
BLASLT(cublasLtDestroy, Handle* handle) {
    if (!handle || handle->destroyed) return NOT_INITIALIZED;
    handle->destroyed = true;   // kept, so that a late use is seen
    return OK;
}
STANDIN_API size_t cublasLtGetVersion() { return 120900; }
STANDIN_API const char* cublasLtGetStatusName(int status) {
    switch (status) {
        case OK: return "CUBLAS_STATUS_SUCCESS";
        case NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
        case INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
        default: return "CUBLAS_STATUS_UNKNOWN";
    }
}
STANDIN_API const char* cublasLtGetStatusString(int status) {
    return cublasLtGetStatusName(status);
}

BLASLT(cublasLtMatmulDescCreate, Description** description, int compute, int scale) {
    *description = new Description{compute, scale};
    return OK;
}
BLASLT(cublasLtMatmulDescDestroy, Description* description) {
    delete description;
    return OK;
}
BLASLT(cublasLtMatmulDescSetAttribute, Description* d, int number, const void* from, size_t bytes) {
    return set_attribute({{0, &d->compute, 4}, {1, &d->scale, 4}, {2, &d->pointer_mode, 4},
                          {3, &d->transpose_a, 4}, {4, &d->transpose_b, 4}, {5, &d->transpose_c, 4},
                          {7, &d->epilogue, 4}}, number, from, bytes);
}
BLASLT(cublasLtMatrixLayoutCreate, Layout** layout, int type, uint64_t rows, uint64_t columns,
       int64_t leading) {
    *layout = new Layout{type, 0, rows, columns, leading};
    return OK;
}
BLASLT(cublasLtMatrixLayoutDestroy, Layout* layout) {
    delete layout;
    return OK;
}
BLASLT(cublasLtMatrixLayoutSetAttribute, Layout* l, int number, const void* from, size_t bytes) {
    return set_attribute({{0, &l->type, 4}, {1, &l->order, 4}, {2, &l->rows, 8},
                          {3, &l->columns, 8}, {4, &l->leading, 8}, {5, &l->batch, 4},
                          {6, &l->batch_stride, 8}},
                         number, from, bytes);
}
BLASLT(cublasLtMatmulPreferenceCreate, Preference** preference) {
    *preference = new Preference;
    return OK;
}
BLASLT(cublasLtMatmulPreferenceDestroy, Preference* preference) {
    delete preference;
    return OK;
}
BLASLT(cublasLtMatmulPreferenceSetAttribute, Preference* p, int number, const void* from,
       size_t bytes) {
    uint32_t ignored;   // search mode, masks and the like choose among algorithms; there is one
    return set_attribute({{0, &ignored, 4}, {1, &p->workspace, 8}, {3, &ignored, 4},
                          {5, &p->align[0], 4}, {6, &p->align[1], 4}, {7, &p->align[2], 4},
                          {8, &p->align[3], 4}}, number, from, bytes);
}

BLASLT(cublasLtMatmulAlgoGetHeuristic, Handle* handle, Description* description, Layout* a,
       Layout* b, Layout* c, Layout* d, Preference* preference, int wanted,
       HeuristicResult* results, int* found) {
    if (int status = standin_call(__func__)) return status;
    *found = 0;
    if (!handle || handle->destroyed) return NOT_INITIALIZED;
    if (!preference || wanted < 1) return INVALID_VALUE;
    if (int status = check_product(*description, *a, *b, *c, *d)) return status;
    HeuristicResult result = {};
    Algorithm& algorithm = result.algorithm;
    algorithm.mark = MARK;
    const Layout* layouts[] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        algorithm.align[i] = preference->align[i];
        algorithm.types[i] = layouts[i]->type;
    }
    algorithm.transpose_a = description->transpose_a;
    algorithm.transpose_b = description->transpose_b;
    result.waves = 1;
    results[0] = result;
    *found = 1;
    return OK;
}

BLASLT(cublasLtMatmul, Handle* handle, Description* description, const float* alpha,
       const void* at_a, Layout* a, const void* at_b, Layout* b, const float* beta,
       const void* at_c, Layout* c,
       void* at_d, Layout* d, const Algorithm* algorithm, void* workspace, size_t workspace_bytes,
       void* stream) {
    if (int status = standin_call(__func__)) return status;
    if (!handle || handle->destroyed) return NOT_INITIALIZED;
    if (int status = check_product(*description, *a, *b, *c, *d)) return status;
    const void* addresses[] = {at_a, at_b, at_c, at_d};
    const Layout* layouts[] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        if (i == 2 && *beta == 0) continue;
        size_t align = algorithm ? std::max<size_t>(algorithm->align[i], 1) : 1;
        align = std::max(align, size_of(layouts[i]->type));
        if (reinterpret_cast<uintptr_t>(addresses[i]) % align)
            return refuse(INVALID_VALUE, "matrix %c is at %p, but the algorithm was chosen for "
                          "multiples of %zu (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT)",
                          "ABCD"[i], addresses[i], align);
        if (algorithm && algorithm->types[i] != layouts[i]->type)
            return refuse(INVALID_VALUE, "the algorithm was chosen for other types");
    }
    if (algorithm && algorithm->mark != MARK)
        return refuse(INVALID_VALUE, "the algorithm does not come from the heuristic");
    if (algorithm && (algorithm->transpose_a != description->transpose_a ||
                      algorithm->transpose_b != description->transpose_b))
        return refuse(INVALID_VALUE, "the algorithm was chosen for other transpositions");
    bool ta = description->transpose_a, tb = description->transpose_b;
    auto* job = new Job{stream, *a, *b, *c, *d, {}, (const char*)at_a, (const char*)at_b,
                        (const char*)at_c, (char*)at_d, workspace, workspace_bytes};
    job->product = {d->rows, d->columns, ta ? a->rows : a->columns, *alpha, *beta,
                    matrix(*a, ta), matrix(*b, tb), matrix(*c, false), matrix(*d, false)};
    return standin_enqueue(stream, "product", nullptr, run, drop, job) ? EXECUTION_FAILED : OK;
}
