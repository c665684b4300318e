/* Two copies of the library in one process, as when a program and a package of Python each bring
 * one; signals that stay as they are; forks before and after use. argv[1] and argv[2] are the copies. */
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pillion.h"

#define CHECK(condition)                                                        \
    do {                                                                        \
        if (!(condition)) {                                                     \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);     \
            exit(1);                                                            \
        }                                                                       \
    } while (0)

struct library {
    int32_t (*connect)(const pillion_options *, pillion_communicator **);
    size_t (*rank)(const pillion_communicator *);
    int32_t (*all_reduce)(const pillion_communicator *, pillion_tensor, pillion_tensor, int32_t, double, uint64_t, pillion_work **);
    int32_t (*close)(pillion_communicator *);
    const char *(*last_error)(void);
};

static void load(struct library *library, const char *path) {
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    CHECK(handle);
    *(void **)&library->connect = dlsym(handle, "pillion_connect");
    *(void **)&library->rank = dlsym(handle, "pillion_rank");
    *(void **)&library->all_reduce = dlsym(handle, "pillion_all_reduce");
    *(void **)&library->close = dlsym(handle, "pillion_close");
    *(void **)&library->last_error = dlsym(handle, "pillion_last_error");
    CHECK(library->connect && library->rank && library->all_reduce && library->close && library->last_error);
}

static float sum(struct library *library, pillion_communicator *ranks) {
    float value = (float)library->rank(ranks) + 1;
    pillion_tensor tensor = {&value, 1, PILLION_F32};
    int32_t code = library->all_reduce(ranks, tensor, tensor, PILLION_SUM, 0, 0, NULL);
    return code ? -(float)code : value;
}

static int handlers(int found[65]) {
    for (int number = 1; number < 65; number++) {
        struct sigaction action;
        found[number] = sigaction(number, NULL, &action) == 0 && action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN;
    }
    return 0;
}

int main(int count, char **arguments) {
    static int before[65], after[65];
    CHECK(count == 3);
    struct library first, second;
    handlers(before);
    load(&first, arguments[1]);
    load(&second, arguments[2]);
    CHECK(first.connect != second.connect);
    /* A child of a process that has not used the library uses it, here as the rank itself. */
    pid_t child = fork();
    if (child) {
        int status = 0;
        CHECK(waitpid(child, &status, 0) == child);
        return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
    }
    char job[256];
    pillion_communicator *one = NULL, *other = NULL;
    CHECK(first.connect(NULL, &one) == PILLION_OK);
    /* Another job, because a job has one rank of each number. */
    snprintf(job, sizeof job, "%s-other", getenv("TORCHELASTIC_RUN_ID"));
    setenv("TORCHELASTIC_RUN_ID", job, 1);
    CHECK(second.connect(NULL, &other) == PILLION_OK);
    for (int i = 0; i < 100; i++) CHECK(sum(&first, one) == 3 && sum(&second, other) == 3);
    handlers(after);
    CHECK(!memcmp(before, after, sizeof before));

    child = fork();
    if (child == 0) {
        int refused = sum(&first, one) == -(float)PILLION_FORKED && strstr(first.last_error(), "forked");
        _exit(refused && first.close(one) == PILLION_OK ? 0 : 1);
    }
    int status = 1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(sum(&second, other) == 3 && sum(&first, one) == 3);
    CHECK(first.close(one) == PILLION_OK && second.close(other) == PILLION_OK);
    return 0;
}
