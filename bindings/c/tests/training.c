/* The engine with every placement, and ZeRO-1 over two arrays, give the same parameters bit for bit;
 * checkpoints; wrong calls. Run by programs.rs on several ranks; argv[1] is a folder. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/expect.h"

enum { FIRST = 30, SECOND = 7, THIRD = 64, ALL = FIRST + SECOND + THIRD };

/* Two units: one of two tensors, one of one. */
static const size_t shape_a[] = {6, 5}, shape_b[] = {7}, shape_c[] = {8, 8};
static const pillion_tensor_spec body[] = {{"a", shape_a, 2, 1, 0}, {"b", shape_b, 1, 1, 0}}, head[] = {{"c", shape_c, 2, 1, 0}};
static const pillion_unit_spec units[] = {{"body", body, 2}, {"head", head, 1}};
static const pillion_adamw settings = {0.9f, 0.95f, 1e-8f, 0.1f, 0.0};

static float value(void *context, const char *name, size_t index) {
    (void)context;
    return (float)(name[0] - 'a') + (float)index / 64.0f;
}
static float gradient(size_t step, size_t rank, size_t index) {
    return (float)((index * 7 + rank * 13 + step * 29) % 101) / 50.0f - 1.0f;
}

static void forward(pillion_engine *engine, float *read) {
    const void *weights[2];
    OK(pillion_engine_forward(engine, 0, weights));
    memcpy(read, weights[0], FIRST * sizeof(float));
    memcpy(read + FIRST, weights[1], SECOND * sizeof(float));
    OK(pillion_engine_forward(engine, 1, weights));
    memcpy(read + FIRST + SECOND, weights[0], THIRD * sizeof(float));
}

static void step(pillion_engine *engine, size_t number, size_t rank, pillion_report *report) {
    const void *weights[2];
    float *gradients[2], read[ALL];
    double *loss;
    OK(pillion_engine_begin(engine, 1, 0));
    OK(pillion_engine_round(engine, 3));
    forward(engine, read);
    OK(pillion_engine_backward(engine, 1, weights, gradients, &loss));
    *loss += 1.5;
    for (size_t i = 0; i < THIRD; i++) gradients[0][i] += gradient(number, rank, FIRST + SECOND + i);
    OK(pillion_engine_backward(engine, 0, weights, gradients, NULL));
    for (size_t i = 0; i < FIRST; i++) gradients[0][i] += gradient(number, rank, i);
    for (size_t i = 0; i < SECOND; i++) gradients[1][i] += gradient(number, rank, FIRST + i);
    OK(pillion_engine_finish(engine, 0.01f, report));
}

static void read_all(pillion_engine *engine, float *read) {
    OK(pillion_engine_begin(engine, 1, 1));
    OK(pillion_engine_round(engine, 1));
    forward(engine, read);
    OK(pillion_engine_finish(engine, 0, NULL));
}

static void refused(pillion_communicator *ranks, pillion_engine *engine) {
    const void *weights[2];
    float *gradients[2];
    uint64_t number;
    pillion_engine *none = NULL;
    pillion_policy policy;
    memset(&policy, 0, sizeof policy);
    CHECK(pillion_engine_new(ranks, units, 2, &policy, &settings, &none) == PILLION_INVALID);
    policy.size = sizeof policy;
    policy.sharded = 9;
    CHECK(pillion_engine_new(ranks, units, 2, &policy, &settings, &none) == PILLION_INVALID);
    policy.sharded = PILLION_SHARD_EVERYTHING;
    policy.weights = PILLION_I8;
    CHECK(pillion_engine_new(ranks, units, 2, &policy, &settings, &none) == PILLION_INVALID);
    policy.weights = PILLION_F32;
    CHECK(pillion_engine_new(ranks, units, 0, &policy, &settings, &none) == PILLION_INVALID);
    CHECK(pillion_engine_new(ranks, NULL, 2, &policy, &settings, &none) == PILLION_INVALID);
    CHECK(pillion_engine_new(ranks, units, 2, &policy, NULL, &none) == PILLION_INVALID && !none);
    pillion_unit_spec twice[] = {units[1], units[1]};
    CHECK(pillion_engine_new(ranks, twice, 2, &policy, &settings, &none) == PILLION_INVALID);
    CHECK(strstr(pillion_last_error(), "two tensors are called c"));
    pillion_adamw bad = settings;
    bad.beta1 = 1.0f;
    CHECK(pillion_engine_new(ranks, units, 2, &policy, &bad, &none) == PILLION_INVALID);
    CHECK(strstr(pillion_last_error(), "beta1 is 1"));

    CHECK(pillion_engine_forward(engine, 0, weights) == PILLION_INVALID);
    CHECK(strstr(pillion_last_error(), "no step is under way"));
    CHECK(pillion_engine_begin(engine, SIZE_MAX, 0) == PILLION_INVALID);
    CHECK(pillion_engine_begin(engine, 0, 0) == PILLION_INVALID && pillion_engine_begin(NULL, 1, 0) == PILLION_INVALID);
    CHECK(pillion_engine_load(engine, "/nonexistent", &number) == PILLION_FILE);
    OK(pillion_engine_begin(engine, 1, 1));
    CHECK(pillion_engine_begin(engine, 1, 0) == PILLION_INVALID);
    CHECK(strstr(pillion_last_error(), "a step is under way"));
    CHECK(pillion_engine_save(engine, "/tmp", 1) == PILLION_INVALID);
    OK(pillion_engine_round(engine, 1));
    CHECK(pillion_engine_forward(engine, 9, weights) == PILLION_INVALID);
    CHECK(pillion_engine_forward(engine, 1, weights) == PILLION_STEP);
    CHECK(pillion_engine_backward(engine, 0, weights, gradients, NULL) == PILLION_STEP);
    float read[ALL];
    forward(engine, read);
    OK(pillion_engine_finish(engine, 0, NULL));
}

int main(int count, char **arguments) {
    CHECK(count == 2);
    pillion_communicator *ranks = NULL;
    OK(pillion_connect(NULL, &ranks));
    size_t rank = pillion_rank(ranks), world = pillion_world(ranks);
    pillion_report report, other;

    static float params[ALL], grads[ALL];
    for (size_t i = 0; i < ALL; i++) {
        size_t in_c = FIRST + SECOND;
        params[i] = i < FIRST ? value(NULL, "a", i) : i < in_c ? value(NULL, "b", i - FIRST) : value(NULL, "c", i - in_c);
        params[i] += (float)rank; /* Those of rank 0 count. */
    }
    pillion_zero1 *optimizer = NULL;
    CHECK(pillion_zero1_new(ranks, params, params + 1, 50, &settings, &optimizer) == PILLION_INVALID);
    OK(pillion_zero1_new(ranks, params, grads, ALL, &settings, &optimizer));
    CHECK(pillion_step(optimizer, -1.0f, 0, 1, NULL) == PILLION_INVALID);
    CHECK(pillion_step(optimizer, 0.01f, 0, 0, NULL) == PILLION_NO_UPDATE);
    for (size_t number = 0; number < 3; number++) {
        for (size_t i = 0; i < ALL; i++) grads[i] = gradient(number, rank, i);
        OK(pillion_step(optimizer, 0.01f, 1.5, 3, &report));
    }
    size_t first, own;
    float *m, *v;
    uint64_t updates = 0;
    OK(pillion_zero1_state(optimizer, &first, &own, &m, &v, &updates));
    CHECK(updates == 3 && first + own <= ALL && (own == 0 || (m[0] != 0 && v[0] > 0)));
    CHECK(report.tokens == 3.0 * (double)world && report.loss_sum == 1.5 * (double)world);

    for (int32_t sharded = 0; sharded < 4; sharded++)
        for (int32_t window = 0; window <= (sharded == PILLION_SHARD_EVERYTHING); window++) {
            pillion_policy policy = {sizeof policy, sharded, PILLION_F32, PILLION_F32, window, 0, 1, 0};
            pillion_engine *engine = NULL, *again = NULL;
            float read[ALL], loaded[ALL];
            uint64_t number = 0;
            OK(pillion_engine_new(ranks, units, 2, &policy, &settings, &engine));
            OK(pillion_engine_initialize(engine, value, NULL));
            for (size_t i = 0; i < 3; i++) step(engine, i, rank, &other);
            read_all(engine, read);
            CHECK(!memcmp(read, params, sizeof read));
            CHECK(other.tokens == report.tokens && other.loss_sum == report.loss_sum);
            /* Sums of the same squares in f64, in another order. */
            double apart = other.group_square_norms / report.group_square_norms - 1;
            CHECK(apart < 1e-12 && apart > -1e-12);
            OK(pillion_engine_save(engine, arguments[1], 10 + (uint64_t)sharded));
            refused(ranks, engine);
            OK(pillion_engine_new(ranks, units, 2, &policy, &settings, &again));
            OK(pillion_engine_load(again, arguments[1], &number));
            CHECK(number == 10 + (uint64_t)sharded);
            step(engine, 3, rank, &other);
            step(again, 3, rank, &other);
            read_all(engine, read);
            read_all(again, loaded);
            CHECK(!memcmp(read, loaded, sizeof read));
            OK(pillion_engine_free(engine));
            OK(pillion_engine_free(again));
        }
    OK(pillion_engine_free(NULL));
    OK(pillion_zero1_resume(optimizer, updates));
    OK(pillion_zero1_free(optimizer));
    OK(pillion_zero1_free(NULL));
    OK(pillion_close(ranks));
    printf("well\n");
    return 0;
}
