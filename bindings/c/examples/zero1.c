/* ZeRO-1 in the manner of llm.c: a trainer that has its parameters in one array and their gradients
 * in another gives both away once, and calls pillion_step in place of its own update.
 *
 *     cc -O2 zero1.c -lpillion -lm && torchrun --no-python --nproc-per-node 2 ./a.out
 *     mpirun -n 2 ./a.out
 *
 * The model is a network with one hidden layer that learns the sine of its input. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pillion.h"

#define HIDDEN 32
#define POINTS 64 /* of a rank in a step */
#define STEPS 600

static void check(int32_t code, const char *what) {
    if (code != PILLION_OK) {
        fprintf(stderr, "%s: %s\n", what, pillion_last_error());
        exit(1);
    }
}

/* A number in [0, 1) that is the same wherever it is drawn. */
static float chance(unsigned n) {
    n = (n ^ 61) ^ (n >> 16);
    n *= 9;
    n ^= n >> 4;
    n *= 0x27d4eb2du;
    n ^= n >> 15;
    return (float)(n >> 8) / 16777216.0f;
}

/* y = out . tanh(in * x + bias); three arrays in one. Returns the sum of the square errors, and adds
 * its gradient. */
static double learn(const float *params, float *grads, unsigned seed) {
    const float *in = params, *bias = params + HIDDEN, *out = params + 2 * HIDDEN;
    double loss = 0;
    for (unsigned point = 0; point < POINTS; point++) {
        float x = 6 * chance(seed + point) - 3, h[HIDDEN], y = 0;
        for (int i = 0; i < HIDDEN; i++) h[i] = tanhf(in[i] * x + bias[i]), y += out[i] * h[i];
        float error = y - sinf(x);
        loss += error * error;
        for (int i = 0; i < HIDDEN; i++) {
            float before = 2 * error * out[i] * (1 - h[i] * h[i]);
            grads[i] += before * x;
            grads[HIDDEN + i] += before;
            grads[2 * HIDDEN + i] += 2 * error * h[i];
        }
    }
    return loss;
}

int main(void) {
    static float params[3 * HIDDEN], grads[3 * HIDDEN];
    pillion_communicator *ranks = NULL;
    check(pillion_connect(NULL, &ranks), "connecting");
    unsigned rank = (unsigned)pillion_rank(ranks), world = (unsigned)pillion_world(ranks);
    for (int i = 0; i < 3 * HIDDEN; i++) params[i] = 2 * chance((unsigned)i + 1) - 1;

    pillion_adamw settings = {0.9f, 0.95f, 1e-8f, 0.0f, 1.0};
    pillion_zero1 *optimizer = NULL;
    check(pillion_zero1_new(ranks, params, grads, 3 * HIDDEN, &settings, &optimizer), "dividing the optimizer");

    pillion_report report;
    memset(&report, 0, sizeof report);
    for (unsigned step = 0; step < STEPS; step++) {
        memset(grads, 0, sizeof grads);
        double loss = learn(params, grads, (step * world + rank) * POINTS);
        check(pillion_step(optimizer, 0.01f, loss, POINTS, &report), "a step");
        if (rank == 0 && step % 100 == 0) printf("step %3u  loss %.6f\n", step, report.loss_sum / report.tokens);
    }
    double last = report.loss_sum / report.tokens;
    if (rank == 0) printf("step %3d  loss %.6f\n", STEPS, last);
    check(pillion_zero1_free(optimizer), "freeing");
    check(pillion_close(ranks), "closing");
    return last < 0.01 ? 0 : 1;
}
