/* The mean of a vector over all ranks, blocking and with work under way.
 *
 *     cc mean.c -I bindings/c -L target/release -lpillion -o mean
 *     LD_LIBRARY_PATH=target/release mpirun -n 2 ./mean        (or torchrun --no-python, or srun)
 */
#include <stdio.h>
#include <stdlib.h>

#include "pillion.h"

static void check(int32_t code, const char *what) {
    if (code == PILLION_OK) return;
    fprintf(stderr, "%s: error %d: %s\n", what, (int)code, pillion_last_error());
    exit(1);
}

int main(void) {
    enum { N = 1000 };
    pillion_communicator *ranks = NULL;
    check(pillion_connect(NULL, &ranks), "connecting");
    size_t rank = pillion_rank(ranks), world = pillion_world(ranks);

    /* Memory that other ranks of this host read in place; malloc's works as well. */
    void *memory = NULL;
    check(pillion_allocate(ranks, N * sizeof(float), &memory), "allocating");
    float *values = (float *)memory;
    for (size_t i = 0; i < N; i++) values[i] = (float)(rank * N + i);

    pillion_tensor tensor = {values, N, PILLION_F32};
    pillion_work *work = NULL;
    check(pillion_all_reduce(ranks, tensor, tensor, PILLION_AVG, 0, 0, &work), "starting");
    /* Something else, meanwhile. */
    check(pillion_wait(work, 0), "the mean");
    check(pillion_release(work), "releasing");

    for (size_t i = 0; i < N; i++) {
        float mean = (float)(world - 1) / 2 * N + (float)i;
        if (values[i] != mean) {
            fprintf(stderr, "rank %zu: element %zu is %g, not %g\n", rank, i, values[i], mean);
            return 1;
        }
    }
    if (rank == 0) printf("the mean over %zu ranks is right\n", world);
    check(pillion_free(memory), "freeing");
    check(pillion_close(ranks), "closing");
    return 0;
}
