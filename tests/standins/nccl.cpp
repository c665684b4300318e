// Stand-in for libnccl: the part of its interface that Pillion uses, between threads and processes.
//
// The ranks of a communicator share a folder, which is named after its id. An operation has two
// parts on a stream: one writes what the rank sends into a file there, and one waits for the files
// of all ranks and reads them. Calls return before anything is enqueued, as those of a communicator
// that does not block may: that happens when ncclCommGetAsyncError is asked for the last time.
#include <dirent.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "standin.h"

extern "C" int cuCtxGetDevice(int* device);
extern "C" int cuCtxGetCurrent(void** context);
extern "C" int cuCtxSetCurrent(void* context);
extern "C" int cuDeviceGetUuid_v2(void* uuid, int device);

namespace {

enum Result : int { OK = 0, CUDA_ERROR = 1, SYSTEM = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5,
                    REMOTE = 6, IN_PROGRESS = 7 };
enum Type : int { UINT8 = 1, FLOAT32 = 7, FLOAT64 = 8 };
enum Kind : int { ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, BROADCAST };

struct Id { char bytes[128]; };
struct Config { size_t size; unsigned magic, version; int blocking; };

size_t size_of(int type) { return type == UINT8 ? 1 : type == FLOAT32 ? 4 : 8; }

int refuse(int result, const char* format, ...) __attribute__((format(printf, 2, 3)));
int refuse(int result, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "[stand-in for libnccl, no GPU] ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    return result;
}

struct Communicator {
    std::string folder;
    int world, rank;
    void* context = nullptr;
    bool connected = false;
    std::atomic<bool> aborted{false};
    uint64_t operations = 0;         // enqueued so far
    uint64_t kept = 0;               // this rank's files of operations before are gone
    std::vector<struct Operation*> waiting;   // called, and not enqueued yet
    int questions = 0;               // that are answered by "in progress" before that
    std::vector<std::pair<char*, size_t>> registered;
    std::atomic<int> inside{0};      // calls under way
};

struct Operation {
    Communicator* communicator;
    Kind kind;
    const char* from;
    char* to;
    size_t count;                    // elements that a rank sends, or receives of a sum
    int type, root;
    void* stream;
    uint64_t number = 0;             // of the communicator
    uint64_t done = 0;               // operations before this one belong to groups before

    bool sends() const { return kind != BROADCAST || communicator->rank == root; }
    size_t sent() const {
        return count * (kind == REDUCE_SCATTER ? communicator->world : 1) * size_of(type);
    }
    size_t received() const {
        return count * (kind == ALL_GATHER ? communicator->world : 1) * size_of(type);
    }
    std::string file(int rank) const { return file(number, rank); }
    std::string file(uint64_t number, int rank) const {
        return communicator->folder + "/" + std::to_string(number) + "-" + std::to_string(rank);
    }
};
// What a file begins with, so that ranks which call other operations are told apart.
struct Head { int kind, type; uint64_t count; };

thread_local int depth;
thread_local std::vector<Operation*> grouped;
std::atomic<uint64_t> calls{1};

bool exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

int send(void* state) {
    auto& operation = **static_cast<std::shared_ptr<Operation>*>(state);
    if (operation.communicator->aborted || !operation.sends()) return 0;
    size_t bytes = operation.sent();
    if (int error = standin_check(operation.stream, operation.from, bytes, "what NCCL sends"))
        return error;
    std::string path = operation.file(operation.communicator->rank), unfinished = path + ".new";
    FILE* file = fopen(unfinished.c_str(), "w");
    Head head = {operation.kind, operation.type, operation.count};
    bool written = file && fwrite(&head, sizeof head, 1, file) == 1 &&
                   fwrite(operation.from, 1, bytes, file) == bytes;
    if (file && fclose(file)) written = false;
    if (!written || rename(unfinished.c_str(), path.c_str()))
        return refuse(719, "%s cannot be written", path.c_str());
    standin_wake();
    return 0;
}

bool is_ready(void* state) {
    auto& operation = **static_cast<std::shared_ptr<Operation>*>(state);
    if (operation.communicator->aborted) return true;
    for (int rank = 0; rank < operation.communicator->world; rank++)
        if ((operation.kind != BROADCAST || rank == operation.root) && !exists(operation.file(rank)))
            return false;
    return true;
}

template <class T>
void add(char* sums, const char* terms, size_t count, bool is_first) {
    auto* to = reinterpret_cast<T*>(sums);
    auto* from = reinterpret_cast<const T*>(terms);
    for (size_t i = 0; i < count; i++) to[i] = is_first ? from[i] : to[i] + from[i];
}

int receive(void* state) {
    auto& operation = **static_cast<std::shared_ptr<Operation>*>(state);
    Communicator& communicator = *operation.communicator;
    size_t bytes = operation.received(), each = operation.count * size_of(operation.type);
    if (int error = standin_check(operation.stream, operation.to, bytes, "what NCCL receives"))
        return error;
    // What a broken-off operation leaves is nothing.
    if (communicator.aborted) { memset(operation.to, 0xff, bytes); return 0; }
    bool is_sum = operation.kind == REDUCE_SCATTER || operation.kind == ALL_REDUCE;
    std::vector<char> sums(is_sum ? bytes : 0);
    for (int i = 0; i < communicator.world; i++) {
        // Not in order of rank: sums of NCCL's are in an order of its own.
        int rank = (i + 1 + (int)operation.number) % communicator.world;
        if (operation.kind == BROADCAST && rank != operation.root) continue;
        std::string path = operation.file(rank);
        FILE* file = fopen(path.c_str(), "r");
        Head head = {};
        if (!file || fread(&head, sizeof head, 1, file) != 1 || head.kind != operation.kind ||
            head.type != operation.type || head.count != operation.count) {
            if (file) fclose(file);
            return refuse(719, "rank %d called another operation, or its file is gone", rank);
        }
        if (operation.kind == REDUCE_SCATTER) fseek(file, each * communicator.rank, SEEK_CUR);
        std::vector<char> data(each);
        bool read = fread(data.data(), 1, each, file) == each;
        fclose(file);
        if (!read) return refuse(719, "%s is too short", path.c_str());
        if (!is_sum) {
            memcpy(operation.to + (operation.kind == ALL_GATHER ? rank * each : 0), data.data(), each);
        } else if (operation.type == FLOAT32) {
            add<float>(sums.data(), data.data(), operation.count, i == 0);
        } else {
            add<double>(sums.data(), data.data(), operation.count, i == 0);
        }
    }
    if (is_sum) memcpy(operation.to, sums.data(), bytes);
    // Whoever has sent for this group has received all groups before.
    while (operation.kind != BROADCAST && communicator.kept < operation.done)
        unlink(operation.file(communicator.kept++, communicator.rank).c_str());
    return 0;
}
void forget(void* state) { delete static_cast<std::shared_ptr<Operation>*>(state); }

// All operations of a group run as one: every rank sends before it waits for anything. A rank that
// receives has received everything before, so files of the group before are not read any more.
int enqueue(Communicator& communicator) {
    std::vector<std::shared_ptr<Operation>> group;
    for (Operation* operation : communicator.waiting) group.emplace_back(operation);
    communicator.waiting.clear();
    uint64_t done = communicator.operations;
    for (auto& operation : group) {
        operation->number = communicator.operations++;
        operation->done = done;
    }
    for (bool sends : {true, false})
        for (auto& operation : group) {
            auto* state = new std::shared_ptr<Operation>(operation);
            if (standin_enqueue(operation->stream, "collective", sends ? nullptr : is_ready,
                                sends ? send : receive, forget, state))
                return CUDA_ERROR;
        }
    return OK;
}

// NCCL is not made for two calls at once on one communicator.
struct Entered {
    Communicator* communicator;
    bool alone;
    explicit Entered(Communicator* c) : communicator(c), alone(c->inside++ == 0) {}
    ~Entered() { communicator->inside--; }
};
#define ENTER(communicator)                                                                      \
    Entered entered(communicator);                                                               \
    if (!entered.alone) return refuse(INVALID_USAGE, "%s beside another call", __func__);        \
    if ((communicator)->aborted) return refuse(INVALID_USAGE, "%s after ncclCommAbort", __func__)

int call(const char* name, Communicator* communicator, Operation operation) {
    ENTER(communicator);
    if (standin_call(name)) return CUDA_ERROR;
    if (!communicator->connected || !communicator->waiting.empty())
        return refuse(INVALID_USAGE, "%s while an earlier call is in progress", name);
    if (operation.type != UINT8 && operation.type != FLOAT32 && operation.type != FLOAT64)
        return refuse(INVALID_ARGUMENT, "%s: the stand-in has no type %d", name, operation.type);
    operation.communicator = communicator;
    grouped.push_back(new Operation(operation));
    if (depth > 0) return OK;
    return refuse(INVALID_USAGE, "%s outside a group: the stand-in has only groups", name);
}

int own_version() {
    const char* said = getenv("PILLION_STANDIN_NCCL");
    return said ? atoi(said) : 23203;
}

}  // namespace

#define NCCL(name, ...) STANDIN_API int name(__VA_ARGS__)

NCCL(ncclGetVersion, int* version) {
    *version = own_version();
    return OK;
}
STANDIN_API const char* ncclGetErrorString(int result) {
    switch (result) {
        case OK: return "no error";
        case CUDA_ERROR: return "unhandled cuda error";
        case REMOTE: return "remote process exited or there was a network error";
        case IN_PROGRESS: return "NCCL operation in progress";
        default: return "an error";
    }
}
STANDIN_API const char* ncclGetLastError(void*) { return ""; }

NCCL(ncclGetUniqueId, Id* id) {
    if (standin_call(__func__)) return SYSTEM;
    const char* temporary = getenv("TMPDIR");
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "%s/pillion-nccl-XXXXXX", temporary ? temporary : "/tmp");
    return mkdtemp(id->bytes) ? OK : refuse(SYSTEM, "no folder %s", id->bytes);
}
NCCL(ncclCommInitRankConfig, Communicator** out, int world, Id id, int rank, Config* config) {
    if (standin_call(__func__)) return CUDA_ERROR;
    if (config->magic != 0xcafebeef || config->size < 44)
        return refuse(INVALID_ARGUMENT, "this is no ncclConfig_t");
    if (config->blocking != 0)
        return refuse(INVALID_ARGUMENT, "the stand-in has only communicators that do not block");
    const char* nvls = getenv("NCCL_NVLS_ENABLE");
    if (!nvls || strcmp(nvls, "0"))
        fprintf(stderr, "[stand-in for libnccl, no GPU] NVLS is on: sums may vary\n");
    int device;
    unsigned char uuid[16];
    if (cuCtxGetDevice(&device) || cuDeviceGetUuid_v2(uuid, device)) return CUDA_ERROR;
    auto* communicator = new Communicator;   // never deleted, so that a late use can be reported
    cuCtxGetCurrent(&communicator->context);
    communicator->folder = id.bytes;
    communicator->world = world;
    communicator->rank = rank;
    std::string mark = communicator->folder + "/rank-" + std::to_string(rank);
    FILE* file = fopen(mark.c_str(), "w");
    if (!file) return refuse(SYSTEM, "%s cannot be written", mark.c_str());
    fwrite(uuid, sizeof uuid, 1, file);
    fclose(file);
    *out = communicator;
    return IN_PROGRESS;
}
NCCL(ncclCommGetAsyncError, Communicator* communicator, int* result) {
    ENTER(communicator);
    *result = IN_PROGRESS;
    if (standin_call("asynchronous error of NCCL")) {
        *result = REMOTE;
        return OK;
    }
    if (!communicator->connected) {
        std::vector<std::string> uuids;
        for (int rank = 0; rank < communicator->world; rank++) {
            char uuid[16];
            std::string mark = communicator->folder + "/rank-" + std::to_string(rank);
            FILE* file = fopen(mark.c_str(), "r");
            bool read = file && fread(uuid, sizeof uuid, 1, file) == 1;
            if (file) fclose(file);
            if (!read) return OK;
            uuids.emplace_back(uuid, sizeof uuid);
        }
        const char* shared = getenv("NCCL_MULTI_RANK_GPU_ENABLE");
        bool may_share = shared && !strcmp(shared, "1") && own_version() >= 23000;
        for (size_t a = 0; a < uuids.size() && !may_share; a++)
            for (size_t b = 0; b < a; b++)
                if (uuids[a] == uuids[b]) {
                    *result = INVALID_USAGE;
                    return refuse(OK, "Duplicate GPU detected: ranks %zu and %zu", b, a);
                }
        communicator->connected = true;
    }
    if (!communicator->waiting.empty()) {
        if (communicator->questions-- > 0) return OK;
        // NCCL has threads of its own for this.
        void* current = nullptr;
        cuCtxGetCurrent(&current);
        cuCtxSetCurrent(communicator->context);
        int error = enqueue(*communicator);
        cuCtxSetCurrent(current);
        if (error) return error;
    }
    *result = OK;
    return OK;
}
NCCL(ncclCommFinalize, Communicator* communicator) {
    ENTER(communicator);
    if (standin_call(__func__)) return CUDA_ERROR;
    communicator->questions = 1;
    return IN_PROGRESS;
}
// The last rank removes the folder. A rank that was killed leaves it.
NCCL(ncclCommDestroy, Communicator* communicator) {
    ENTER(communicator);
    std::string mark = communicator->folder + "/gone-" + std::to_string(communicator->rank);
    if (FILE* file = fopen(mark.c_str(), "w")) fclose(file);
    for (int rank = 0; rank < communicator->world; rank++)
        if (!exists(communicator->folder + "/gone-" + std::to_string(rank))) return OK;
    if (DIR* folder = opendir(communicator->folder.c_str())) {
        while (dirent* entry = readdir(folder))
            unlink((communicator->folder + "/" + entry->d_name).c_str());
        closedir(folder);
    }
    rmdir(communicator->folder.c_str());
    return OK;
}
NCCL(ncclCommAbort, Communicator* communicator) {
    if (communicator->aborted.exchange(true)) {
        refuse(INVALID_USAGE, "ncclCommAbort of what is gone");
        abort();
    }
    standin_wake();
    return OK;
}
NCCL(ncclGroupStart) {
    depth++;
    return OK;
}
NCCL(ncclGroupEnd) {
    if (depth <= 0) return refuse(INVALID_USAGE, "ncclGroupEnd without ncclGroupStart");
    if (--depth > 0 || grouped.empty()) return OK;
    Communicator* communicator = grouped[0]->communicator;
    for (Operation* operation : grouped)
        if (operation->communicator != communicator)
            return refuse(INVALID_USAGE, "a group of two communicators");
    ENTER(communicator);
    communicator->waiting = std::move(grouped);
    grouped.clear();
    communicator->questions = calls++ % 3;
    return IN_PROGRESS;
}
NCCL(ncclAllGather, const char* from, char* to, size_t count, int type, Communicator* communicator,
     void* stream) {
    return call(__func__, communicator, {nullptr, ALL_GATHER, from, to, count, type, 0, stream});
}
NCCL(ncclReduceScatter, const char* from, char* to, size_t count, int type, int sum,
     Communicator* communicator, void* stream) {
    if (sum != 0) return INVALID_ARGUMENT;
    return call(__func__, communicator, {nullptr, REDUCE_SCATTER, from, to, count, type, 0, stream});
}
NCCL(ncclAllReduce, const char* from, char* to, size_t count, int type, int sum,
     Communicator* communicator, void* stream) {
    if (sum != 0) return INVALID_ARGUMENT;
    return call(__func__, communicator, {nullptr, ALL_REDUCE, from, to, count, type, 0, stream});
}
NCCL(ncclBroadcast, const char* from, char* to, size_t count, int type, int root,
     Communicator* communicator, void* stream) {
    return call(__func__, communicator, {nullptr, BROADCAST, from, to, count, type, root, stream});
}

NCCL(ncclCommRegister, Communicator* communicator, char* start, size_t bytes, void** handle) {
    ENTER(communicator);
    if (standin_call(__func__)) return CUDA_ERROR;
    for (auto& [other, length] : communicator->registered)
        if (start < other + length && other < start + bytes)
            return refuse(INVALID_USAGE, "memory is registered twice");
    communicator->registered.push_back({start, bytes});
    *handle = communicator;
    return OK;
}
