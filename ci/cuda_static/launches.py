"""The small launches at which `races.py` checks each kernel.

The verifier needs every number that decides a branch or an address. So a launch names the grid, the
scalars and the contents of arrays of integers. Floats in arrays and all addresses stay unknown.
The sizes cover a whole block, a partial block, one element and a row that ends within 16 bytes.
"""

import re
from dataclasses import dataclass, field


@dataclass
class Launch:
    name: str
    grid: int | tuple[int, int, int] = 1
    # Scalars by name. A float that is missing here is 0.5; an integer must be given.
    values: dict[str, int | float] = field(default_factory=dict)
    # Contents of arrays of 32-bit integers that decide branches or addresses.
    data: dict[str, list[int]] = field(default_factory=dict)
    # Pointers that name the same memory as another pointer, for kernels that work in place.
    same: dict[str, str] = field(default_factory=dict)
    # How many pointers an array of pointers holds.
    pointers: int = 0
    dynamic: int = 0
    # For each `__syncthreads_or` in the PTX, the blocks in which it yields true. The verifier does
    # not check this.
    reductions: list[list[int]] = field(default_factory=list)
    # The kernels of the family that this launch is for.
    kernels: str = ".*"
    # Takes too long for every run of CI.
    long: bool = False

    @property
    def key(self) -> str:
        """The name as one word, for tables."""
        return self.name.replace(" ", "-")


@dataclass
class Family:
    """Kernels that differ only in types. A star marks a pointer, brackets a struct of pointers."""

    kernels: str
    parameters: str
    launches: list[Launch]
    threads: int = 256
    # Dynamic shared memory for the table of resources.
    dynamic: int = 0


def family_of(kernel: str) -> Family | None:
    for family in FAMILIES:
        if re.fullmatch(family.kernels, kernel):
            return family
    return None


def launches_of(family: Family, kernel: str, long: bool) -> list[Launch]:
    return [
        launch
        for launch in family.launches
        if re.fullmatch(launch.kernels, kernel) and (long or not launch.long)
    ]


def sizes(per_block: int) -> list[Launch]:
    """Launches of a kernel whose only sizes are its number of elements and its grid."""
    return [
        Launch("one", 1, {"n": 1}),
        # A whole block, and one that ends in the middle of a vector.
        Launch("two blocks", 2, {"n": per_block + 1003}),
    ]


# What both kernels of attention's backward pass read.
BACKWARD = "*grad_out *q *k *v *log_sum *projection"


def flash(kernel: str, width: int, parameters: str, beside: int, longer: str) -> Family:
    """Attention of heads of `width` elements, with `beside` bytes of shared memory beside tiles."""
    dynamic = 768 * width + beside
    of_keys = kernel.endswith("_keys")

    def launch(name: str, grid: int, seq: int, long: bool) -> Launch:
        sizes = {"seq": seq, "heads": 1, "kv_heads": 1}
        return Launch(name, grid, sizes, dynamic=dynamic, long=long)

    launches = [launch("short", 1, 5, long=width == 128 or of_keys)]
    # The gradients of keys of 128 elements need more memory than the verifier allows itself.
    if not (of_keys and width == 128):
        launches.append(launch(longer, 1 if longer == "two tiles" else 2, 65, long=True))
    return Family(
        f"{kernel}_{width}",
        f"*latch {parameters} seq heads kv_heads scale",
        launches,
        threads=128,
        dynamic=dynamic,
    )


# Code and unused word of a latch that is not set. The pointer behind them is not read then.
LATCH = [0, 0]

FAMILIES: list[Family] = [
    Family(
        r"adamw_.*",
        "*latch *weights *master *m *v *grad *scale n keep rate root beta1 beta2 epsilon",
        sizes(2048),
    ),
    Family(r"cast_f32_bf16|cast_bf16_f32", "*latch *out *x n", sizes(4096)),
    Family(r"accumulate", "*latch *out *x n", sizes(4096)),
    Family(r"copy", "*latch *out *x n", sizes(16384)),
    Family(r"zero", "*latch *out n", sizes(16384)),
    Family(
        r"square_norm_parts_.*",
        "*latch *sums *counts *x n",
        [
            Launch("one", 1, {"n": 1}),
            Launch("two lanes", 1, {"n": 1027}),
            Launch("two parts", 2, {"n": 65536 + 1027}, long=True),
        ],
    ),
    Family(
        r"square_norm_total",
        "*latch *out *sums *counts parts weight",
        [
            Launch("one", 1, {"parts": 1}),
            Launch("many", 1, {"parts": 300}),
        ],
    ),
    Family(
        r"sum_numbers",
        "*latch sources[] count *out n accumulate",
        [
            Launch("one", 1, {"count": 1, "n": 1, "accumulate": 0}, pointers=1),
            Launch("two blocks", 2, {"count": 5, "n": 300, "accumulate": 1}, pointers=5),
        ],
    ),
    Family(
        r"reduce_.*",
        "*latch sources[] count groups *out n accumulate divisor has_factor factor",
        [
            Launch(
                "one",
                1,
                {"count": 1, "groups": 1, "n": 1, "accumulate": 0, "divisor": 0, "has_factor": 0},
                pointers=1,
            ),
            Launch(
                "two groups",
                2,
                {
                    "count": 6,
                    "groups": 2,
                    "n": 3001,
                    "accumulate": 1,
                    "divisor": 4,
                    "has_factor": 1,
                },
                pointers=6,
            ),
            Launch(
                "three",
                1,
                {
                    "count": 3,
                    "groups": 1,
                    "n": 2048,
                    "accumulate": 0,
                    "divisor": 3,
                    "has_factor": 0,
                },
                pointers=3,
            ),
        ],
    ),
    Family(
        r"rms_norm_(f32|bf16)_(f32|bf16)",
        "*latch *out *inverse_rms *x *weight width epsilon",
        [
            Launch("narrow", 2, {"width": 24}),
            Launch("odd", 2, {"width": 301}),
            Launch("wide", 1, {"width": 1028}),
        ],
    ),
    Family(
        r"rms_norm_backward_.*",
        "*latch *grad_x *partial *grad_out *x *inverse_rms *weight rows width rows_per_part",
        [
            Launch("narrow", 1, {"rows": 2, "width": 24, "rows_per_part": 2}, dynamic=96),
            Launch("odd", 2, {"rows": 3, "width": 301, "rows_per_part": 2}, dynamic=1204),
            Launch("wide", 1, {"rows": 1, "width": 1028, "rows_per_part": 1}, dynamic=4112),
            Launch(
                "no shared memory", 1, {"rows": 2, "width": 12292, "rows_per_part": 2}, long=True
            ),
            Launch(
                "odd and wide", 1, {"rows": 1, "width": 12289, "rows_per_part": 1}, long=True
            ),
        ],
        dynamic=4 * 4096,
    ),
    Family(
        r"sum_rows",
        "*latch *out *partial parts width",
        [
            Launch("one", 1, {"parts": 1, "width": 1}),
            Launch("odd", 2, {"parts": 3, "width": 33}),
            Launch("many", 2, {"parts": 21, "width": 64}),
        ],
    ),
    Family(
        r"rope_.*",
        "*latch *x *cos *sin tokens seq heads half sign",
        [
            Launch("narrow", 2, {"tokens": 6, "seq": 3, "heads": 2, "half": 4}),
            Launch("wide", 1, {"tokens": 4, "seq": 2, "heads": 3, "half": 32}),
            Launch("odd", 2, {"tokens": 5, "seq": 5, "heads": 1, "half": 3}),
        ],
    ),
    Family(r"swiglu_(f32|bf16)", "*latch *out *gate *up n", sizes(2048)),
    Family(
        r"swiglu_backward_.*", "*latch *out *grad_gate *grad_up *grad_out *gate *up n", sizes(2048)
    ),
    Family(
        r"embedding_(f32|bf16)",
        "*latch *out *table *tokens width vocab",
        [
            Launch("odd", 4, {"width": 301, "vocab": 10}, {"tokens": [3, 4, 3, 9]}),
            Launch("wide", 2, {"width": 1280, "vocab": 10}, {"tokens": [9, 0]}),
        ],
    ),
    Family(
        r"embedding_backward",
        "*latch *grad_table *grad_out *tokens count width vocab",
        [
            Launch(
                "repeated",
                5,
                {"count": 5, "width": 301, "vocab": 10},
                {"tokens": [3, 4, 3, 9, 3]},
                reductions=[[2, 4], [0, 1, 3]],
            ),
            # Two of 1030 blocks. A block looks at 1024 positions at a time, and the tokens of these
            # two occur again behind the first 1024.
            Launch(
                "far",
                2,
                {"count": 1030, "width": 8, "vocab": 2000},
                {"tokens": [1998, 1999, *range(1022), 1998, 1999, 1998, 1999, 1998, 1999]},
                reductions=[[], [0, 1]],
            ),
        ],
    ),
    Family(
        r"cross_entropy_.*",
        "*latch *grad *logits *losses *targets vocab z_loss",
        [
            Launch("odd", 2, {"vocab": 301}, {"targets": [0, 300]}),
            Launch("ignored", 2, {"vocab": 301}, {"targets": [0xFFFFFFFF, 300]}),
            Launch("wide", 1, {"vocab": 1280}, {"targets": [1279]}),
            Launch("many batches", 1, {"vocab": 2 * 16384 + 1}, {"targets": [0]}, long=True),
            Launch(
                "in place",
                1,
                {"vocab": 1280},
                {"targets": [1279]},
                {"grad": "logits"},
                kernels=".*_f32",
            ),
        ],
        threads=1024,
    ),
    Family(
        r"sum_losses",
        "*latch *loss *losses count",
        [
            Launch("one", 1, {"count": 1}),
            Launch("many", 1, {"count": 300}),
        ],
    ),
    Family(
        r"attention_softmax_.*",
        "*latch *p *sums *log_sum *scores rows keys first seq",
        [
            Launch("later", (1, 2, 1), {"rows": 1, "keys": 301, "first": 290, "seq": 301}),
            Launch("first", (2, 1, 1), {"rows": 2, "keys": 40, "first": 0, "seq": 40}),
            Launch(
                "in place",
                (1, 1, 1),
                {"rows": 1, "keys": 40, "first": 20, "seq": 40},
                same={"p": "scores"},
                kernels=".*_f32",
            ),
        ],
    ),
    Family(
        r"attention_output_.*",
        "*latch *out *tile *sums rows heads dim first",
        [
            Launch("small", 2, {"rows": 3, "heads": 2, "dim": 8, "first": 2}),
            Launch("wide", 2, {"rows": 3, "heads": 2, "dim": 64, "first": 0}),
        ],
    ),
    Family(
        r"attention_projection_.*",
        "*latch *projection *grad_out *out tokens seq heads dim",
        [
            Launch("small", 2, {"tokens": 6, "seq": 3, "heads": 2, "dim": 8}),
            Launch("wide", 2, {"tokens": 4, "seq": 2, "heads": 2, "dim": 64}),
        ],
    ),
    Family(
        r"attention_gradient_.*",
        "*latch *p *grad_scores *scores *grad_p *log_sum *projection rows keys first seq",
        [
            Launch("first", (3, 2, 1), {"rows": 3, "keys": 40, "first": 0, "seq": 40}),
            Launch("later", (2, 2, 1), {"rows": 2, "keys": 301, "first": 290, "seq": 301}),
            Launch(
                "in place",
                (2, 2, 1),
                {"rows": 2, "keys": 40, "first": 20, "seq": 40},
                same={"p": "scores", "grad_scores": "grad_p"},
                kernels=".*_f32",
            ),
        ],
    ),
    *(
        flash(kernel, width, parameters, beside, launch)
        for kernel, parameters, beside, launch in (
            ("flash_attention", "*out *log_sum *q *k *v", 0, "two tiles"),
            ("flash_attention_keys", f"*grad_k *grad_v {BACKWARD}", 1024, "two blocks"),
            ("flash_attention_queries", f"*grad_q {BACKWARD}", 0, "two blocks"),
        )
        for width in (64, 128)
    ),
    Family(
        r"follow_latch",
        "*latch *other",
        [
            Launch("open", 1, {}, {"other": [0]}),
            Launch("set", 1, {}, {"other": [3]}),
        ],
        threads=32,
    ),
    Family(
        r"follow_marks",
        "*latch codes[] count *words stride mark own",
        [
            Launch(
                "wrapped",
                1,
                {"count": 3, "stride": 2, "mark": 0xFFFFFFFF, "own": 2},
                {"words": [0xFFFFFFFF, 0, 0, 0, 1, 0]},
                pointers=3,
            ),
            Launch(
                "given up",
                1,
                {"count": 2, "stride": 1, "mark": 7, "own": 0},
                {"words": [7, 7 + (1 << 30)]},
                pointers=2,
            ),
        ],
        threads=32,
    ),
    Family(
        r"write_rider",
        "*latch *out *own n",
        [
            Launch("one", 1, {"n": 0}),
            Launch("many", 1, {"n": 300}),
        ],
    ),
    Family(
        r"follow_riders",
        "*latch *riders count stride",
        [
            Launch("one", 1, {"count": 1, "stride": 1}),
            Launch("many", 1, {"count": 40, "stride": 5}),
        ],
        threads=32,
    ),
    Family(
        r"follow_event",
        "*latch *word",
        [
            Launch("happened", 1, {}, {"word": [1]}),
            Launch("failed", 1, {}, {"word": [2]}),
        ],
        threads=32,
    ),
]
