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
