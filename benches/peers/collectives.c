/* What an MPI does with the collectives that Pillion offers, timed as `collbench` and nccl-tests time theirs.
 *
 *   mpirun -n 2 collectives OP... -b MINBYTES -e MAXBYTES -f FACTOR -n ITERS -w WARMUP -t f32|f64
 *                                 [--in-place] [--overlap] [--json FILE]
 *
 * A size is that of the full buffer: reduce-scatter's input, all-gather's output, all of all-to-all's blocks. It is
 * rounded down to whole elements a rank. Every iteration starts at a barrier and takes as long as its slowest rank.
 * Before it is timed, each size runs once on inputs whose results are exact, and `wrong` counts the elements that
 * differ, over all ranks. `--overlap` times the nonblocking collective alone, then with as much compute between
 * start and wait, and prints how much of it that hid: 100 (1 - (both - compute) / communication), negative where
 * the two together took longer than one after the other. */
#define _GNU_SOURCE
#include <getopt.h>
#include <limits.h>
#include <mpi.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
enum { ROOT = 0, PAGE = 4096, MOST_SAMPLES = 1000000 };

static int rank, ranks;
static bool in_place, overlap, f64;
static MPI_Datatype type;
static void *in, *out;       /* MAXBYTES each */
static int count, chunk;     /* elements of the full buffer, and of one rank's part of it */
static int *chunks;          /* `chunk`, once for each rank */
static MPI_Request request;  /* of the nonblocking collective in flight */

static void fail(const char *format, ...) {
    va_list values;
    va_start(values, format);
    if (rank == ROOT) vfprintf(stderr, format, values), fputc('\n', stderr);
    va_end(values);
    MPI_Finalize();
    exit(2);
}

/* Inputs and results: whole numbers that f32 holds exactly for up to MOST_RANKS ranks, in any order of summing. The
 * period is a prime, so that a chunk in another's place is seen. */
enum { PERIOD = 1021, MOST_RANKS = 180 };
static double input(int of, long i) { return (double)(i % PERIOD + 1) * (of + 1); }
static double sum(long i) { return (double)(i % PERIOD + 1) * ranks * (ranks + 1) / 2; }

/* In place, `out` holds the input beforehand. */
static void *from(void) { return in_place ? MPI_IN_PLACE : in; }
static void *from_at_root(void) { return in_place && rank == ROOT ? MPI_IN_PLACE : in; }

static void barrier(void) { MPI_Barrier(MPI_COMM_WORLD); }
static void all_reduce(void) { MPI_Allreduce(from(), out, count, type, MPI_SUM, MPI_COMM_WORLD); }
static void reduce_scatter_block(void) { MPI_Reduce_scatter_block(from(), out, chunk, type, MPI_SUM, MPI_COMM_WORLD); }
static void reduce_scatter(void) { MPI_Reduce_scatter(from(), out, chunks, type, MPI_SUM, MPI_COMM_WORLD); }
static void all_gather(void) { MPI_Allgather(from(), chunk, type, out, chunk, type, MPI_COMM_WORLD); }
static void broadcast(void) { MPI_Bcast(out, count, type, ROOT, MPI_COMM_WORLD); }
static void reduce(void) { MPI_Reduce(from_at_root(), out, count, type, MPI_SUM, ROOT, MPI_COMM_WORLD); }
static void gather(void) { MPI_Gather(from_at_root(), chunk, type, out, chunk, type, ROOT, MPI_COMM_WORLD); }
static void scatter(void) {
    bool stays = in_place && rank == ROOT;
    MPI_Scatter(stays ? out : in, chunk, type, stays ? MPI_IN_PLACE : out, chunk, type, ROOT, MPI_COMM_WORLD);
}
static void all_to_all(void) { MPI_Alltoall(from(), chunk, type, out, chunk, type, MPI_COMM_WORLD); }
static void send_recv(void) {
    int next = (rank + 1) % ranks, previous = (rank + ranks - 1) % ranks;
    MPI_Sendrecv(in, count, type, next, 0, out, count, type, previous, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
}
/* Produce, gather, consume, as collbench's window does it: every rank writes its part, and reads all of them in blocks. */
static volatile float zero = 0;
static void window(void) {
    static char block[4096];
    float nothing = zero;
    size_t bytes = (size_t)count * (f64 ? 8 : 4);
    for (long i = 0; i < chunk; i++) if (f64) ((double *)in)[i] += nothing; else ((float *)in)[i] += nothing;
    MPI_Allgather(in, chunk, type, out, chunk, type, MPI_COMM_WORLD);
    for (size_t at = 0; at < bytes; at += sizeof block) {
        memcpy(block, (char *)out + at, bytes - at < sizeof block ? bytes - at : sizeof block);
        __asm__ volatile("" : : "r"(block) : "memory");
    }
}
static void start_reduce_scatter(void) {
    MPI_Ireduce_scatter_block(from(), out, chunk, type, MPI_SUM, MPI_COMM_WORLD, &request);
}
static void start_all_gather(void) {
    MPI_Iallgather(from(), chunk, type, out, chunk, type, MPI_COMM_WORLD, &request);
}
static void finish(void) { MPI_Wait(&request, MPI_STATUS_IGNORE); }

/* What this rank's output must be at `i`. */
static double sum_of_chunk_at(long i) { return sum((long)rank * chunk + i); }
static double gathered_at(long i) { return input((int)(i / chunk), i % chunk); }
static double of_root_at(long i) { return input(ROOT, i); }
static double scattered_at(long i) { return input(ROOT, (long)rank * chunk + i); }
static double exchanged_at(long i) { return input((int)(i / chunk), (long)rank * chunk + i % chunk); }
static double of_previous_at(long i) { return input((rank + ranks - 1) % ranks, i); }

/* Its output: one rank's CHUNK or FULL, maybe only AT_ROOT. Its buffer is DIVIDED into chunks; it can be IN_PLACE. */
enum { CHUNK = 1, FULL = 2, AT_ROOT = 4, DIVIDED = 8, IN_PLACE = 16, NONBLOCKING = 32 };

typedef struct {
    const char *op, *name;
    void (*run)(void); /* all of it or, of a nonblocking one, its start */
    double (*expected)(long i);
    int is;
} Algorithm;

static const Algorithm algorithms[] = {
    {"barrier", "MPI_Barrier", barrier, NULL, 0},
    {"all-reduce", "MPI_Allreduce", all_reduce, sum, FULL | IN_PLACE},
    {"reduce-scatter", "MPI_Reduce_scatter_block", reduce_scatter_block, sum_of_chunk_at, CHUNK | DIVIDED | IN_PLACE},
    {"reduce-scatter", "MPI_Reduce_scatter", reduce_scatter, sum_of_chunk_at, CHUNK | DIVIDED | IN_PLACE},
    {"reduce-scatter", "MPI_Ireduce_scatter_block", start_reduce_scatter, sum_of_chunk_at,
     CHUNK | DIVIDED | IN_PLACE | NONBLOCKING},
    {"all-gather", "MPI_Allgather", all_gather, gathered_at, FULL | DIVIDED | IN_PLACE},
    {"all-gather", "MPI_Iallgather", start_all_gather, gathered_at, FULL | DIVIDED | IN_PLACE | NONBLOCKING},
    {"window", "MPI_Allgather", window, gathered_at, FULL | DIVIDED},
    {"broadcast", "MPI_Bcast", broadcast, of_root_at, FULL},
    {"reduce", "MPI_Reduce", reduce, sum, FULL | AT_ROOT | IN_PLACE},
    {"gather", "MPI_Gather", gather, gathered_at, FULL | AT_ROOT | DIVIDED | IN_PLACE},
    {"scatter", "MPI_Scatter", scatter, scattered_at, CHUNK | DIVIDED | IN_PLACE},
    {"all-to-all", "MPI_Alltoall", all_to_all, exchanged_at, FULL | DIVIDED | IN_PLACE},
    {"send-recv", "MPI_Sendrecv", send_recv, of_previous_at, FULL},
    {0},
};

static void put(void *buffer, long i, double value) {
    if (f64) ((double *)buffer)[i] = value; else ((float *)buffer)[i] = (float)value;
}
static double get(const void *buffer, long i) { return f64 ? ((double *)buffer)[i] : ((float *)buffer)[i]; }

/* Runs `it` once on known inputs; elements that came out wrong, over all ranks. */
static long verify(const Algorithm *it) {
    bool starts_in_out = in_place || it->run == broadcast;
    for (long i = 0; i < count; i++) {
        put(in, i, input(rank, i));
        put(out, i, starts_in_out ? input(rank, i) : -1.0);
    }
    if (in_place && it->expected == gathered_at) /* the own part lies where it belongs in the result */
        for (long i = 0; i < chunk; i++) put(out, (it->is & AT_ROOT ? 0 : (long)rank * chunk) + i, input(rank, i));
    it->run();
    if (it->is & NONBLOCKING) finish();
    long wrong = 0, total, outputs = it->is & FULL ? count : it->is & CHUNK ? chunk : 0;
    if (it->is & AT_ROOT && rank != ROOT) outputs = 0;
    for (long i = 0; i < outputs; i++) wrong += get(out, i) != it->expected(i);
    MPI_Allreduce(&wrong, &total, 1, MPI_LONG, MPI_SUM, MPI_COMM_WORLD);
    /* Sums in place would otherwise grow to infinity over the iterations. */
    if (in_place) for (long i = 0; i < count; i++) put(out, i, 0.0);
    return total;
}

/* A dependent chain in registers: takes the processor and no memory bandwidth. Volatile, so that no compiler sees
 * where the chain starts, which it could fold, or that nobody wants its end. */
static volatile double chain = 0.5;
static void compute(long units) {
    double x = chain;
    for (long i = 0; i < units; i++) x = x * 0.999999 + 1e-6;
    chain = x;
}

static int ascending(const void *a, const void *b) {
    return *(double *)a < *(double *)b ? -1 : *(double *)a > *(double *)b;
}

/* The least sample that `percent` of the sorted samples don't exceed. */
static double percentile(const double *sorted, int samples, int percent) {
    return sorted[(samples * percent + 99) / 100 - 1];
}

/* Fills `samples` with microseconds of the slowest rank, in the order taken. `it` may be absent: compute alone. */
static void measure(const Algorithm *it, long units, int iterations, int warmup, double *samples) {
    for (int i = -warmup; i < iterations; i++) {
        MPI_Barrier(MPI_COMM_WORLD);
        double start = MPI_Wtime();
        if (it) it->run();
        if (units) compute(units);
        if (it && it->is & NONBLOCKING) finish();
        double elapsed = MPI_Wtime() - start, slowest;
        MPI_Allreduce(&elapsed, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
        if (i >= 0) samples[i] = slowest * 1e6;
    }
}

static double median_of(const Algorithm *it, long units, int iterations, int warmup, double *scratch) {
    measure(it, units, iterations, warmup, scratch);
    qsort(scratch, (size_t)iterations, sizeof *scratch, ascending);
    return percentile(scratch, iterations, 50);
}

static void report(const Algorithm *it, const char *library, int iterations, int warmup, FILE *json, bool *all_right) {
    long wrong = verify(it);
    *all_right &= wrong == 0;
    double *samples = malloc(2 * (size_t)iterations * sizeof *samples), *sorted = samples + iterations;
    measure(it, 0, iterations, warmup, samples);
    memcpy(sorted, samples, (size_t)iterations * sizeof *samples);
    qsort(sorted, (size_t)iterations, sizeof *sorted, ascending);
    double least = *sorted, p50 = percentile(sorted, iterations, 50), p95 = percentile(sorted, iterations, 95),
           p99 = percentile(sorted, iterations, 99), computing = 0, both = 0, hidden = 0;
    if (overlap) {
        const long trial = 200000;
        long units = (long)((double)trial * p50 / median_of(NULL, trial, iterations, warmup, sorted)) + 1;
        MPI_Bcast(&units, 1, MPI_LONG, ROOT, MPI_COMM_WORLD);
        computing = median_of(NULL, units, iterations, warmup, sorted);
        both = median_of(it, units, iterations, warmup, sorted);
        hidden = 100 * (1 - (both - computing) / p50);
    }
    size_t size = it->expected == NULL ? 0 : (size_t)count * (f64 ? 8 : 4);
    const char *dtype = f64 ? "f64" : "f32", *placed = in_place || it->run == broadcast ? "true" : "false";
    if (rank == ROOT) {
        printf("%-26s %11zu %5s %10.2f %10.2f %10.2f %10.2f %8.2f %6ld", it->name, size, dtype, least, p50, p95, p99,
               (double)size / p50 / 1e3, wrong);
        if (overlap) printf(" %10.2f %10.2f %7.0f%%", computing, both, hidden);
        puts("");
    }
    if (json) {
        fprintf(json, "{\"library\": \"%s\", \"op\": \"%s\", \"algorithm\": \"%s\", ", library, it->op, it->name);
        fprintf(json, "\"dtype\": \"%s\", \"size\": %zu, \"ranks\": %d, \"in_place\": %s, ", dtype, size, ranks,
                placed);
        fprintf(json, "\"wrong\": %ld, \"p50_us\": %.3f, \"p95_us\": %.3f, \"p99_us\": %.3f, ", wrong, p50, p95, p99);
        if (overlap) fprintf(json, "\"compute_us\": %.3f, \"both_us\": %.3f, ", computing, both);
        if (overlap) fprintf(json, "\"hidden_percent\": %.1f, ", hidden);
        fprintf(json, "\"min_us\": %.3f, \"samples_us\": [", least);
        for (int i = 0; i < iterations; i++) fprintf(json, "%s%.3f", i ? ", " : "", samples[i]);
        fprintf(json, "]}\n");
    }
    free(samples);
}

/* Whole bytes, with K, M or G (1024s) behind them as nccl-tests has it. */
static size_t bytes(const char *text) {
    char *end;
    unsigned long long value = strtoull(text, &end, 10);
    const char *letters = "KMG", *letter = *end ? strchr(letters, *end) : NULL;
    if (end == text || *text == '-' || (letter ? end[1] : *end)) fail("'%s' is no size; write bytes, or 8M", text);
    return (size_t)value << (letter ? 10 * (letter - letters + 1) : 0);
}

static int whole(const char *what, const char *text, int least) {
    char *end;
    long value = strtol(text, &end, 10);
    if (end == text || *end || value < least || value > MOST_SAMPLES)
        fail("%s is '%s'; it must be a whole number from %d to %d", what, text, least, MOST_SAMPLES);
    return (int)value;
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    size_t least = 8, most = 64 << 20;
    int factor = 2, iterations = 20, warmup = 5;
    const char *path = NULL;
    static const struct option names[] = {{"in-place", no_argument, NULL, 'i'}, {"overlap", no_argument, NULL, 'o'},
                                          {"json", required_argument, NULL, 'j'}, {0}};
    opterr = rank == ROOT;
    for (int option; (option = getopt_long(argc, argv, "b:e:f:n:w:t:", names, NULL)) != -1;) switch (option) {
        case 'b': least = bytes(optarg); break;
        case 'e': most = bytes(optarg); break;
        case 'f': factor = whole("-f", optarg, 2); break;
        case 'n': iterations = whole("-n", optarg, 1); break;
        case 'w': warmup = whole("-w", optarg, 0); break;
        case 't':
            if (!(f64 = !strcmp(optarg, "f64")) && strcmp(optarg, "f32")) fail("-t '%s' must be f32 or f64", optarg);
            break;
        case 'i': in_place = true; break;
        case 'o': overlap = true; break;
        case 'j': path = optarg; break;
        default: fail("usage: OP... [-b MINBYTES] [-e MAXBYTES] [-f FACTOR] [-n ITERS] [-w WARMUP] [-t f32|f64] "
                      "[--in-place] [--overlap] [--json FILE]");
    }
    if (optind == argc) fail("name at least one operation, for example all-reduce");
    if (least > most || (least == 0 && most > 0)) fail("-b %zu must be above 0 and at most -e, %zu", least, most);
    if (ranks > MOST_RANKS) fail("%d ranks, but results are exact in f32 only up to %d", ranks, MOST_RANKS);
    if (most / (f64 ? 8 : 4) > INT_MAX) fail("%zu bytes hold more elements than an MPI count", most);
    type = f64 ? MPI_DOUBLE : MPI_FLOAT;
    in = aligned_alloc(PAGE, (most / PAGE + 1) * PAGE);
    out = aligned_alloc(PAGE, (most / PAGE + 1) * PAGE);
    chunks = malloc((size_t)ranks * sizeof *chunks);
    if (!in || !out || !chunks) fail("no memory for two buffers of %zu bytes a rank", most);
    FILE *json = rank == ROOT && path ? fopen(path, "w") : NULL;
    int unwritable = rank == ROOT && path && !json;
    MPI_Bcast(&unwritable, 1, MPI_INT, ROOT, MPI_COMM_WORLD);
    if (unwritable) fail("cannot write %s", path);

    char library[MPI_MAX_LIBRARY_VERSION_STRING];
    int length;
    MPI_Get_library_version(library, &length);
    library[strcspn(library, "\n\"\\")] = '\0';
    for (char *c = library; *c; c++) if (*c == '\t') *c = ' '; /* which a JSON string may not hold */
    if (rank == ROOT) {
        printf("# %s; %d ranks%s; microseconds of the slowest rank, %d iterations after %d\n", library, ranks,
               in_place ? ", in place" : "", iterations, warmup);
        printf("%-26s %11s %5s %10s %10s %10s %10s ", "# algorithm", "bytes", "type", "min", "p50", "p95", "p99");
        printf("%8s %6s%s\n", "GB/s", "wrong", overlap ? "    compute       both   hidden" : "");
    }
    bool all_right = true;
    for (int a = optind; a < argc; a++) {
        bool known = false;
        for (const Algorithm *it = algorithms; it->op; it++) {
            if (strcmp(it->op, argv[a]) || !(it->is & NONBLOCKING) == overlap) continue;
            known = true;
            if (in_place && !(it->is & IN_PLACE)) fail("%s has no form in place of its own", it->op);
            for (size_t size = least; size <= most; size *= (size_t)factor) {
                chunk = (int)(size / (f64 ? 8 : 4) / (size_t)ranks);
                count = it->is & DIVIDED ? chunk * ranks : (int)(size / (f64 ? 8 : 4));
                for (int r = 0; r < ranks; r++) chunks[r] = chunk;
                report(it, library, iterations, warmup, json, &all_right);
                if (size == 0 || it->expected == NULL) break;
            }
        }
        if (!known) fail("no operation '%s'%s", argv[a], overlap ? "; --overlap: reduce-scatter, all-gather" : "");
    }
    if (json) fclose(json);
    MPI_Finalize();
    return all_right ? 0 : 1;
}
