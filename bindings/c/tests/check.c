/* Every operation over small numbers, errors that leave the communicator as it was, groups and a
 * store of the program's own. Run by programs.rs on several ranks; argv[1], if given, is a folder
 * that serves as the store: then RANK and WORLD_SIZE say who this is. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/expect.h"

static pillion_tensor of(void *data, size_t count, int32_t dtype) {
    pillion_tensor tensor = {data, count, dtype};
    return tensor;
}

/* --- A store in a folder -------------------------------------------------------------------- */

static void path_of(char *path, size_t size, void *folder, const char *key) {
    size_t used = (size_t)snprintf(path, size, "%s/", (const char *)folder);
    for (; *key && used + 3 < size; key++) used += (size_t)snprintf(path + used, size - used, "%02x", (unsigned char)*key);
}
static int32_t set(void *folder, const char *key, const uint8_t *value, size_t length) {
    char path[4096], draft[4200];
    path_of(path, sizeof path, folder, key);
    snprintf(draft, sizeof draft, "%s.%s", path, getenv("RANK"));
    FILE *file = fopen(draft, "wb");
    if (!file || fwrite(value, 1, length, file) != length || fclose(file)) return 1;
    return rename(draft, path);
}
static int32_t get(void *folder, const char *key, void (*found)(void *, const uint8_t *, size_t), void *answer) {
    char path[4096];
    static const size_t most = 1 << 20;
    path_of(path, sizeof path, folder, key);
    FILE *file = fopen(path, "rb");
    if (!file) return 0;
    uint8_t *value = malloc(most);
    size_t length = fread(value, 1, most, file);
    fclose(file);
    found(answer, value, length);
    free(value);
    return 0;
}
/* Only of one rank at a time: a file that exists is the lock. */
static int32_t add(void *folder, const char *key, int64_t amount, int64_t *sum) {
    char path[4096], lock[4200];
    path_of(path, sizeof path, folder, key);
    snprintf(lock, sizeof lock, "%s.lock", path);
    FILE *held;
    while (!(held = fopen(lock, "wx"))) continue;
    long long before = 0;
    FILE *file = fopen(path, "r");
    if (file) {
        if (fscanf(file, "%lld", &before) != 1) before = 0;
        fclose(file);
    }
    *sum = before + amount;
    file = fopen(path, "w");
    fprintf(file, "%lld", (long long)*sum);
    fclose(file);
    fclose(held);
    return remove(lock);
}

static int released;
static void release(void *folder) {
    (void)folder;
    released++;
}

/* --- Operations ------------------------------------------------------------------------------ */

static void moves(pillion_communicator *ranks, size_t rank, size_t world) {
    int64_t shard[3], all[24], back[3];
    for (int i = 0; i < 3; i++) shard[i] = (int64_t)rank * 10 + i;
    OK(pillion_all_gather(ranks, of(shard, 3, PILLION_I64), of(all, 3 * world, PILLION_I64), 0, NULL));
    for (size_t p = 0; p < world; p++)
        for (int i = 0; i < 3; i++) CHECK(all[3 * p + i] == (int64_t)p * 10 + i);
    memset(all, 0, sizeof all);
    memcpy(all + 3 * rank, shard, sizeof shard);
    OK(pillion_all_gather(ranks, of(all + 3 * rank, 3, PILLION_I64), of(all, 3 * world, PILLION_I64), 0, NULL));
    CHECK(all[3 * (world - 1)] == (int64_t)(world - 1) * 10);
    OK(pillion_scatter(ranks, of(all, rank ? 0 : 3 * world, PILLION_I64), of(back, 3, PILLION_I64), 0, 0, NULL));
    CHECK(!memcmp(back, shard, sizeof back));
    memset(all, 0, sizeof all);
    OK(pillion_gather(ranks, of(shard, 3, PILLION_I64), of(all, rank ? 0 : 3 * world, PILLION_I64), 0, 0, NULL));
    CHECK(all[3 * (world - 1)] == (rank ? 0 : (int64_t)(world - 1) * 10));
    OK(pillion_broadcast(ranks, of(all, 3 * world, PILLION_I64), 0, 0, NULL));
    CHECK(all[3 * (world - 1)] == (int64_t)(world - 1) * 10);
    uint8_t to[8], from[8];
    for (size_t p = 0; p < world; p++) to[p] = (uint8_t)(10 * rank + p);
    OK(pillion_all_to_all(ranks, of(to, world, PILLION_U8), of(from, world, PILLION_U8), 0, NULL));
    for (size_t p = 0; p < world; p++) CHECK(from[p] == 10 * p + rank);
    if (rank == 0 && world > 1) {
        size_t sender = 99;
        OK(pillion_receive_any(ranks, of(back, 3, PILLION_I64), 7, &sender, 0, NULL));
        CHECK(sender == world - 1 && back[0] == (int64_t)(world - 1) * 10);
        OK(pillion_send(ranks, of(back, 3, PILLION_I64), world - 1, 8, 0, NULL));
    } else if (rank == world - 1 && world > 1) {
        OK(pillion_send(ranks, of(shard, 3, PILLION_I64), 0, 7, 0, NULL));
        OK(pillion_receive(ranks, of(back, 3, PILLION_I64), 0, 8, 0, NULL));
        CHECK(!memcmp(back, shard, sizeof back));
    }
    OK(pillion_barrier(ranks, 0));
}

static void sums(pillion_communicator *ranks, size_t rank, size_t world) {
    float own[16], sum[16], part[2];
    double expected = 0;
    for (size_t p = 0; p < world; p++) expected += (double)p + 1;
    for (size_t i = 0; i < 2 * world; i++) own[i] = (float)(rank + 1) * (float)(i + 1);
    OK(pillion_all_reduce(ranks, of(own, 2 * world, PILLION_F32), of(sum, 2 * world, PILLION_F32), PILLION_SUM, 0, 0, NULL));
    for (size_t i = 0; i < 2 * world; i++) CHECK(sum[i] == (float)(expected * (double)(i + 1)));
    OK(pillion_reduce_scatter(ranks, of(own, 2 * world, PILLION_F32), of(part, 2, PILLION_F32), PILLION_PREMUL_SUM, 0.5, 0, NULL));
    CHECK(part[1] == (float)(0.5 * expected * (double)(2 * rank + 2)));
    OK(pillion_reduce(ranks, of(own, 2 * world, PILLION_F32), of(sum, 2 * world, PILLION_F32), PILLION_MAX, 0, world - 1, 0, NULL));
    if (rank == world - 1) CHECK(sum[0] == (float)world);
    OK(pillion_reduce_scatter(ranks, of(own, 2 * world, PILLION_F32), of(own + 2 * rank, 2, PILLION_F32), PILLION_AVG, 0, 0, NULL));
    CHECK(own[2 * rank] == (float)(expected * (double)(2 * rank + 1) / (double)world));
}

/* Rank p gives p + 1 elements to each rank, or 2 * p + r + 1 to rank r. */
static void lists(pillion_communicator *ranks, size_t rank, size_t world) {
    int32_t own[8], all[8][32], given[8][32];
    pillion_tensor outputs[8] = {{0}}, inputs[8] = {{0}};
    for (size_t i = 0; i < 8; i++) own[i] = (int32_t)(100 * rank + i);
    for (size_t p = 0; p < world; p++) outputs[p] = of(all[p], p + 1, PILLION_I32);
    OK(pillion_all_gather_v(ranks, of(own, rank + 1, PILLION_I32), outputs, 0, NULL));
    for (size_t p = 0; p < world; p++) CHECK(all[p][p] == (int32_t)(100 * p + p));
    outputs[rank] = of(own, rank + 1, PILLION_I32);
    OK(pillion_all_gather_v(ranks, outputs[rank], outputs, 0, NULL));
    CHECK(all[world - 1][0] == (int32_t)(100 * (world - 1)) || rank == world - 1);
    outputs[rank] = of(all[rank], rank + 1, PILLION_I32);
    memset(all, 0, sizeof all);
    OK(pillion_gather_v(ranks, of(own, rank + 1, PILLION_I32), rank ? NULL : outputs, 0, 0, NULL));
    if (rank == 0) CHECK(all[world - 1][world - 1] == (int32_t)(101 * (world - 1)));
    memset(own, 0, sizeof own);
    OK(pillion_scatter_v(ranks, rank ? NULL : outputs, of(own, rank + 1, PILLION_I32), 0, 0, NULL));
    CHECK(own[rank] == (int32_t)(101 * rank));
    for (size_t p = 0; p < world; p++) {
        for (int i = 0; i < 32; i++) given[p][i] = (int32_t)(100 * rank + 10 * p);
        inputs[p] = of(given[p], 2 * rank + p + 1, PILLION_I32);
        outputs[p] = of(all[p], 2 * p + rank + 1, PILLION_I32);
    }
    OK(pillion_all_to_all_v(ranks, inputs, outputs, 0, NULL));
    for (size_t p = 0; p < world; p++) CHECK(all[p][2 * p + rank] == (int32_t)(100 * p + 10 * rank));
    for (size_t p = 0; p < world; p++) inputs[p].count = p + 2;
    OK(pillion_reduce_scatter_v(ranks, inputs, of(own, rank + 2, PILLION_I32), PILLION_SUM, 0, 0, NULL));
    CHECK(own[rank + 1] == (int32_t)(50 * world * (world - 1) + 10 * rank * world));
    CHECK(pillion_all_to_all_v(ranks, inputs, inputs, 0, NULL) == PILLION_INVALID);
    CHECK(pillion_all_to_all_v(ranks, NULL, outputs, 0, NULL) == PILLION_INVALID);
}

/* Memory of one rank alone, of any size, outlives its communicator. */
static void memory(pillion_communicator *ranks, size_t rank, size_t world, float **kept) {
    void *shared = NULL;
    float own[4096], *values;
    size_t count = 4096;
    if (rank % 2 == 0) {
        OK(pillion_allocate(ranks, count * sizeof(float) * (rank + 1), &shared));
        values = shared;
        for (size_t i = 0; i < count; i++) CHECK(values[i] == 0.0f);
    } else {
        values = own;
    }
    for (size_t i = 0; i < count; i++) values[i] = (float)(rank + i);
    pillion_tensor tensor = of(values, count, PILLION_F32);
    OK(pillion_all_reduce(ranks, tensor, tensor, PILLION_SUM, 0, 0, NULL));
    CHECK(values[count - 1] == (float)(world * (world - 1) / 2 + world * (count - 1)));
    OK(pillion_free(shared));
    CHECK(!shared || pillion_free(shared) == PILLION_INVALID);
    CHECK(pillion_allocate(ranks, SIZE_MAX, &shared) == PILLION_OUT_OF_MEMORY && pillion_health(ranks) == PILLION_OK);
    OK(pillion_allocate(ranks, 4 * (rank + 1), &shared));
    *kept = shared;
    **kept = 3.0f;
}

static void queues(pillion_communicator *ranks, size_t rank, size_t world) {
    pillion_completions *ended = NULL;
    pillion_work *works[4];
    pillion_message message;
    uint64_t token = 99;
    int32_t code;
    float values[4];
    OK(pillion_completions_new(&ended));
    CHECK(pillion_next(ended, 1, &token) == PILLION_UNDER_WAY && token == 99);
    for (size_t i = 0; i < 4; i++) {
        values[i] = (float)rank;
        OK(pillion_all_reduce(ranks, of(values + i, 1, PILLION_F32), of(values + i, 1, PILLION_F32), PILLION_MAX, 0, 0, &works[i]));
        OK(pillion_notify(works[i], ended, 10 + i));
    }
    unsigned seen = 0;
    for (size_t i = 0; i < 4; i++) {
        OK(pillion_next(ended, 60000, &token));
        CHECK(token >= 10 && token < 14 && values[token - 10] == (float)(world - 1));
        seen |= 1u << (token - 10);
    }
    CHECK(seen == 15);
    OK(pillion_notify(works[0], ended, 20));
    CHECK(pillion_next(ended, 0, &token) == PILLION_OK && token == 20);
    for (size_t i = 0; i < 4; i++) OK(pillion_release(works[i]));
    OK(pillion_wake(ended, 21));
    CHECK(pillion_next(ended, 0, &token) == PILLION_OK && token == 21);
    /* A receive from any rank as work: the sender is known once that has been waited for. */
    size_t sender = 99;
    if (world > 1 && rank == 0) {
        OK(pillion_receive_any(ranks, of(values, 2, PILLION_F32), 57, &sender, 0, &works[0]));
        OK(pillion_notify(works[0], ended, 22));
        CHECK(pillion_next(ended, 60000, &token) == PILLION_OK && token == 22);
        OK(pillion_wait(works[0], 0));
        CHECK(sender == 1);
        OK(pillion_release(works[0]));
    }
    if (rank == 1) OK(pillion_send(ranks, of(values, 2, PILLION_F32), 0, 57, 0, NULL));
    CHECK(pillion_probe(ranks, SIZE_MAX, 56, &message) == PILLION_UNDER_WAY);
    if (world > 1 && rank == 0) OK(pillion_send(ranks, of(values, 3, PILLION_F32), 1, 55, 0, NULL));
    if (rank == 1) {
        while ((code = pillion_probe(ranks, SIZE_MAX, 55, &message)) == PILLION_UNDER_WAY) continue;
        CHECK(code == PILLION_OK && message.from == 0 && message.count == 3 && message.dtype == PILLION_F32);
        OK(pillion_receive(ranks, of(values, 3, PILLION_F32), 0, 55, 0, NULL));
    }
    CHECK(pillion_probe(ranks, 99, 55, &message) == PILLION_MISUSE);
    CHECK(pillion_notify(NULL, ended, 1) == PILLION_INVALID && pillion_next(ended, 0, NULL) == PILLION_INVALID);
    OK(pillion_completions_free(ended));
    OK(pillion_completions_free(NULL));
}

static void statistics(void) {
    /* Two groups of a sample and a token each, with gradients 1 and 3: variance 2, mean^2 4. */
    pillion_observation sums = {2, 2, 2, 10.0, 16.0, 0};
    const char *settings = "{\"base\": 2, \"cap\": 64, \"round_to\": 1, \"growth_limit\": 100, \"rule\": {\"norm-test\": {\"eta\": 0.25}}}";
    pillion_controller *controller = NULL, *again = NULL;
    pillion_decision decision;
    CHECK(pillion_controller_new("{\"base\": 2}", NULL, &controller) == PILLION_INVALID);
    CHECK(pillion_controller_new(NULL, NULL, &controller) == PILLION_INVALID && !controller);
    OK(pillion_controller_new(settings, NULL, &controller));
    CHECK(pillion_controller_batch(controller) == 2 && pillion_controller_batch(NULL) == 0);
    OK(pillion_observe(controller, sums, &decision));
    CHECK(decision.variance == 2.0 && decision.square_norm == 4.0 && decision.debiased_square_norm == 3.0);
    /* 2 / (0.25^2 * 4) */
    CHECK(decision.wanted == 8.0 && decision.batch == 8 && !strcmp(decision.reason, "grown") && !decision.unusable);
    OK(pillion_controller_new(settings, pillion_controller_state(controller), &again));
    CHECK(pillion_controller_batch(again) == 8);
    float elements[5] = {1.0f, -2.0f, 3.0f, 1.0f / 0.0f, 0.0f / 0.0f};
    uint64_t non_finite;
    double square;
    OK(pillion_square_norm(of(elements, 5, PILLION_F32), &square, &non_finite));
    CHECK(square == 14.0 && non_finite == 2);
    CHECK(pillion_square_norm(of(elements, 5, PILLION_I32), &square, &non_finite) == PILLION_INVALID);
    CHECK(pillion_square_norm(of(elements, 5, PILLION_F32), NULL, &non_finite) == PILLION_INVALID);
    sums.groups = 1;
    OK(pillion_observe(again, sums, &decision));
    CHECK(decision.batch == 8 && !strcmp(decision.reason, "unusable") && strstr(decision.unusable, "two groups"));
    CHECK(decision.variance != decision.variance && decision.wanted != decision.wanted);
    OK(pillion_controller_skip(again, 100));
    CHECK(strstr(pillion_controller_state(again), "\"samples\":104"));
    CHECK(pillion_controller_state(NULL) == NULL && pillion_observe(NULL, sums, NULL) == PILLION_INVALID);
    OK(pillion_controller_free(controller));
    OK(pillion_controller_free(again));
}

static void note(void *context, int32_t code) { *(volatile int32_t *)context = code + 1000; }

static void works(pillion_communicator *ranks, size_t rank, size_t world) {
    pillion_work *first = NULL, *second = NULL;
    float values[1000];
    volatile int32_t said = 0;
    for (int i = 0; i < 1000; i++) values[i] = (float)rank;
    pillion_tensor tensor = of(values, 1000, PILLION_F32);
    OK(pillion_all_reduce(ranks, tensor, tensor, PILLION_MAX, 0, 60000, &first));
    OK(pillion_on_complete(first, note, (void *)&said));
    int32_t code = pillion_wait(first, 60000);
    CHECK(code == PILLION_OK && pillion_test(first) == PILLION_OK && pillion_wait(first, 0) == PILLION_OK);
    CHECK(values[999] == (float)(world - 1));
    OK(pillion_release(first));
    /* A callback comes soon after the end. */
    for (int i = 0; i < 100000000 && !said; i++) continue;
    CHECK(said == 1000 + PILLION_OK);
    /* Rank 0 waits for one that comes later. */
    if (world > 1) {
        if (rank == 0) {
            OK(pillion_receive(ranks, of(values, 10, PILLION_F32), 1, 0, 0, &second));
            code = pillion_test(second);
            CHECK(code == PILLION_UNDER_WAY || code == PILLION_OK);
            OK(pillion_barrier(ranks, 0));
            OK(pillion_release(second));
            CHECK(values[9] == 5.0f);
        } else {
            values[9] = 5.0f;
            OK(pillion_barrier(ranks, 0));
            if (rank == 1) OK(pillion_send(ranks, of(values, 10, PILLION_F32), 0, 0, 0, NULL));
        }
    }
    OK(pillion_release(NULL));
}

static void errors(pillion_communicator *ranks) {
    float values[8] = {0};
    pillion_tensor whole = of(values, 8, PILLION_F32);
    CHECK(pillion_all_reduce(NULL, whole, whole, PILLION_SUM, 0, 0, NULL) == PILLION_INVALID);
    CHECK(strstr(pillion_last_error(), "communicator is NULL"));
    CHECK(pillion_all_reduce(ranks, of(NULL, 8, PILLION_F32), of(NULL, 8, PILLION_F32), PILLION_SUM, 0, 0, NULL) == PILLION_INVALID);
    CHECK(pillion_all_reduce(ranks, of(values, 8, 77), of(values, 8, 77), PILLION_SUM, 0, 0, NULL) == PILLION_INVALID);
    CHECK(pillion_all_reduce(ranks, whole, whole, 77, 0, 0, NULL) == PILLION_INVALID);
    CHECK(pillion_all_reduce(ranks, of(values, 7, PILLION_F32), of(values + 1, 7, PILLION_F32), PILLION_SUM, 0, 0, NULL) == PILLION_INVALID);
    CHECK(strstr(pillion_last_error(), "share memory"));
    CHECK(pillion_all_reduce(ranks, of((char *)values + 1, 2, PILLION_F32), of((char *)values + 1, 2, PILLION_F32), PILLION_SUM, 0, 0, NULL) == PILLION_INVALID);
    CHECK(pillion_all_reduce(ranks, of(values, SIZE_MAX / 2, PILLION_F32), of(values, SIZE_MAX / 2, PILLION_F32), PILLION_SUM, 0, 0, NULL) == PILLION_INVALID);
    CHECK(pillion_all_gather(ranks, of(values, SIZE_MAX, PILLION_F32), of(values, 8, PILLION_F32), 0, NULL) == PILLION_INVALID);
    CHECK(pillion_reduce_scatter(ranks, whole, of(values, SIZE_MAX / 4, PILLION_F32), PILLION_SUM, 0, 0, NULL) == PILLION_INVALID);
    CHECK(pillion_reduce_scatter(ranks, whole, of(values, 0, PILLION_F32), PILLION_SUM, 0, 0, NULL) == PILLION_INVALID);
    CHECK(strstr(pillion_last_error(), "times as many"));
    CHECK(pillion_broadcast(ranks, whole, 99, 0, NULL) == PILLION_MISUSE);
    CHECK(pillion_all_reduce(ranks, whole, whole, PILLION_BIT_OR, 0, 0, NULL) == PILLION_MISUSE);
    CHECK(pillion_wait(NULL, 0) == PILLION_INVALID && pillion_free(values) == PILLION_INVALID);
    /* Nothing of that has reached another rank. */
    OK(pillion_health(ranks));
    OK(pillion_barrier(ranks, 0));
    OK(pillion_all_reduce(ranks, of(NULL, 0, PILLION_F32), of(NULL, 0, PILLION_F32), PILLION_SUM, 0, 0, NULL));
}

int main(int count, char **arguments) {
    pillion_communicator *ranks = NULL, *group = NULL;
    pillion_options options;
    memset(&options, 0, sizeof options);
    CHECK(pillion_connect(&options, &ranks) == PILLION_INVALID);
    options.size = sizeof options;
    options.timeout_ms = 60000;
    CHECK(pillion_abi_version() == 1 && pillion_connect(&options, NULL) == PILLION_INVALID);
    if (count > 1) {
        pillion_store store = {arguments[1], set, get, add, release}, broken = {arguments[1], set, NULL, add, NULL};
        size_t rank = (size_t)atoi(getenv("RANK")), world = (size_t)atoi(getenv("WORLD_SIZE"));
        CHECK(pillion_connect_through(broken, rank, world, &options, &ranks) == PILLION_INVALID);
        OK(pillion_connect_through(store, rank, world, &options, &ranks));
        for (int i = 0; i < 2000000000 && !*(volatile int *)&released; i++) continue;
        CHECK(released == 1);
    } else {
        OK(pillion_connect(&options, &ranks));
    }
    size_t rank = pillion_rank(ranks), world = pillion_world(ranks);
    moves(ranks, rank, world);
    sums(ranks, rank, world);
    lists(ranks, rank, world);
    works(ranks, rank, world);
    statistics();
    queues(ranks, rank, world);
    float *kept = NULL;
    memory(ranks, rank, world, &kept);
    CHECK(pillion_hosts(ranks) == 1 && pillion_hosts(NULL) == 0);
    errors(ranks);
    /* The ranks but the first, in the other order. */
    if (rank > 0) {
        size_t members[8];
        for (size_t i = 0; i + 1 < world; i++) members[i] = world - 1 - i;
        OK(pillion_group(ranks, members, world - 1, &group));
        CHECK(pillion_rank(group) == world - 1 - rank && pillion_world(group) == world - 1);
        moves(group, world - 1 - rank, world - 1);
        OK(pillion_close(group));
    }
    OK(pillion_barrier(ranks, 0));
    OK(pillion_close(ranks));
    OK(pillion_close(NULL));
    CHECK(*kept == 3.0f);
    OK(pillion_free(kept));
    printf("well\n");
    return 0;
}
