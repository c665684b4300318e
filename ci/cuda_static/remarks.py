"""Why a proof or a mutant is undecided or redundant. The table of proofs repeats these lines.

Each row names kernels, launches or barriers, and the result that it explains. A result other than
`proved` or `flagged` without a row here is an error. In a long run, a row that explains nothing is
an error as well.
"""

import re

SINGLE_CALL = (
    "block_sum and block_max begin with a barrier that protects the array of an earlier call, "
    "and this kernel makes one call for each array"
)
ATOMIC = "the verifier knows no result of atomicCAS; one thread acts, so nothing can race"

ONE_ROW = "the launch that reaches it has one row, so it makes one call of block_sum"
VOTE = "the verifier knows no vote about memory; one thread acts on it, so nothing can race"

THIRD_TILE = (
    "it protects the buffer that the third tile overwrites, and the launches have two tiles, because "
    "three need more memory than the verifier allows itself; the check of tests/standins flags it"
)

BUDGET = (
    "the verifier runs out of the memory that it allows itself; flash_attention_keys_64, which is "
    "compiled from the same lines, is flagged"
)

REMARKS: list[tuple[str, str, str, str]] = [
    (r"attention_softmax_.*", r"barrier-[2468]/9", "redundant", SINGLE_CALL),
    (r"cross_entropy_.*", r"barrier-([2468]|10|12)/13", "redundant", SINGLE_CALL),
    (r"square_norm_.*", r"barrier-[24]/5", "redundant", SINGLE_CALL),
    (r"rms_norm_(f32|bf16)_.*", r"barrier-[246]/7", "redundant", SINGLE_CALL),
    (r"rms_norm_backward_.*", r"barrier-2/13", "redundant", ONE_ROW),
    (r"sum_losses", r"barrier-2/3", "redundant", SINGLE_CALL),
    (r"flash_attention_keys_128", r"barrier-1/5", "undecided", BUDGET),
    (r"flash_attention_.*", r"barrier-3/[45]", "redundant", THIRD_TILE),
    (r"follow_event", r"(sm_100:)?failed", "undecided", ATOMIC),
    (r"follow_latch", r"(sm_100:)?set", "undecided", ATOMIC),
    (r"follow_marks|follow_riders", r".*", "undecided", VOTE),
]


def remark_for(kernel: str, what: str, result: str, used: set[int]) -> str:
    for index, (kernels, names, expected, text) in enumerate(REMARKS):
        if expected == result and re.fullmatch(kernels, kernel) and re.fullmatch(names, what):
            used.add(index)
            return text
    return ""
