// Carries a failure from one stream to the next.

namespace latch_words {
constexpr u32 HAS_FAILED = 2;   // 1: the event has happened
}

// Sets the latch if the event behind `word` has failed. The host launches this kernel behind a wait
// for `word` to change, so the kernel itself never waits. It does not ask whether the latch is set,
// because the first code stays. Grid: 1 block of 1 thread or more.
KERNEL(follow_event)(Latch* latch, const volatile u32* word) {
    if (threadIdx.x == 0 && *word == latch_words::HAS_FAILED) set_latch(latch, EVENT_FAILED);
}
EXPORT_KERNEL(follow_event)

// Sets the latch if the latch of another rank is set, whose work this rank's stream has waited for:
// `other` is its code. Grid: 1 block of 1 thread or more.
KERNEL(follow_latch)(Latch* latch, const volatile u32* other) {
    if (threadIdx.x == 0 && *other != 0) set_latch(latch, PEER_FAILED);
}
EXPORT_KERNEL(follow_latch)

// Where the code of each rank's latch is, in order of rank.
struct Codes {
    const u32* at[32];
};

// Sets the latch if a rank has given up whose word this rank's stream has waited for, or if that
// rank's latch is set. `own` is this rank, for which it has not waited. Rank r has the word
// r * stride of `words`. A word goes up, and wraps; one that is at `mark` or a little beyond says
// that the rank's work has run. One that is far beyond is of a host that gave up. One that is below
// was written after that, by a stream that is late. Grid: 1 block of 1 warp; count <= 32.
KERNEL(follow_marks)(Latch* latch, Codes codes, u32 count, const volatile u32* words, u32 stride,
                     u32 mark, u32 own) {
    constexpr u32 FAR = 1u << 29;
    u32 rank = threadIdx.x;
    bool has_failed = false;
    if (rank < count && rank != own) {
        bool has_run = words[rank * stride] - mark < FAR;
        // The word before the latch: a rank sets its latch before its stream writes the word.
        __threadfence_system();
        has_failed = !has_run || *const_cast<const volatile u32*>(codes.at[rank]) != 0;
    }
    if (__any_sync(ALL_LANES, has_failed) && rank == 0) set_latch(latch, PEER_FAILED);
}
EXPORT_KERNEL(follow_marks)

// What rides along with each operation of NCCL: the code of the rank's latch, then n numbers of its
// own. It is written also where the latch is set, because the other ranks learn of that by it.
// Grid: 1 block.
KERNEL(write_rider)(Latch* latch, double* out, const double* own, u32 n) {
    if (threadIdx.x == 0) out[0] = *const_cast<const volatile u32*>(&latch->code);
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) out[1 + i] = own[i];
}
EXPORT_KERNEL(write_rider)

// Sets the latch if a rank's rider says that its latch was set. Rank r has the rider that starts at
// r * stride. Grid: 1 block of 1 warp.
KERNEL(follow_riders)(Latch* latch, const double* riders, u32 count, u32 stride) {
    bool has_failed = false;
    for (u32 rank = threadIdx.x; rank < count; rank += WARP) {
        if (riders[(u64)rank * stride] != 0) has_failed = true;
    }
    if (__any_sync(ALL_LANES, has_failed) && threadIdx.x == 0) set_latch(latch, PEER_FAILED);
}
EXPORT_KERNEL(follow_riders)
