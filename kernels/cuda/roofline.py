#!/usr/bin/env python3
"""Rewrites the tables in README.md: what kernels move, and what the compiler makes of them.

    roofline.py [--check]

What the compiler makes of a kernel comes from resources.txt, which `ci/cuda_static.py` checks. With
--check the tables are only compared, and the exit status tells whether README.md is up to date.
"""

import math
import pathlib
import sys

FOLDER = pathlib.Path(__file__).parent
BEGIN, END = "<!-- roofline.py: begin -->\n", "<!-- roofline.py: end -->\n"
BEGIN_ATTENTION = "<!-- roofline.py: begin attention -->\n"

# Bandwidth of a copy, in bytes a second, as others have measured it.
H100, H200 = 3.0e12, 4.3e12

# FLOP/s of tensor cores, and bytes/s of shared memory: 128 bytes a clock and multiprocessor, of 108
# at 1.41 GHz and 132 at 1.83 GHz (data sheets of A100 and H100).
A100_TENSOR, A100_SHARED = 312e12, 128 * 108 * 1.41e9
H100_TENSOR, H100_SHARED = 989.4e12, 128 * 132 * 1.83e9

# The shapes: one rank's parameters, and a micro-batch of an 8B model.
PARAMETERS = 10**9
TOKENS, WIDTH, HIDDEN, VOCAB, HEADS, DIM = 8192, 4096, 14336, 128256, 32, 128
ROWS, KEYS = 512, 4096  # a block of queries of one sequence
PARTS = TOKENS // 16
SIZE = {"f32": 4, "bf16": 2}


def kernels():
    """(name, grid, bytes an element, elements, their shape)"""
    flat = f"{PARAMETERS:.0e}".replace("e+0", "e") + " parameters"
    for copy in ("none", "f32", "bf16"):
        for grad in SIZE:
            size = 24 + SIZE[grad] + SIZE.get(copy, 0)
            yield f"adamw_{copy}_{grad}", "n / 2048", size, PARAMETERS, flat
    for name, size in (("cast_f32_bf16", 6), ("cast_bf16_f32", 6), ("accumulate", 12)):
        yield name, "n / 4096", size, PARAMETERS, flat
    yield "copy", "bytes / 16384", 2, 10**9, "1e9 bytes"
    yield "zero", "bytes / 16384", 1, 10**9, "1e9 bytes"
    for x in SIZE:
        yield f"square_norm_parts_{x}", "n / 65536", SIZE[x], PARAMETERS, flat
    parts = math.ceil(PARAMETERS / 65536)
    yield "square_norm_total", "1", 12, parts, f"{parts} parts"
    for x in SIZE:
        for out in SIZE:
            size = 8 * SIZE[x] + SIZE[out]
            yield f"reduce_{x}_{out}", "n / 2048", size, PARAMETERS // 8, "8 inputs of 1.25e8"
    stream = TOKENS * WIDTH, f"{TOKENS} x {WIDTH}"
    for weight in SIZE:
        yield f"embedding_{weight}", "tokens", SIZE[weight] + 4, *stream
    yield "embedding_backward", "tokens", 12, *stream
    for out in SIZE:
        for weight in SIZE:
            yield f"rms_norm_{out}_{weight}", "rows", 4 + SIZE[out], *stream
    for weight in SIZE:
        # The partial sums of 16 rows are written once.
        yield f"rms_norm_backward_{weight}", "rows / rows_per_part", 16.25, *stream
    yield "sum_rows", "width / 32", 4, PARTS * WIDTH, f"{PARTS} x {WIDTH}"
    for x in SIZE:
        yield f"rope_{x}", "tokens / 4", 2 * SIZE[x], *stream
    hidden = TOKENS * HIDDEN, f"{TOKENS} x {HIDDEN}"
    for x in SIZE:
        yield f"swiglu_{x}", "n / 4096", 3 * SIZE[x], *hidden
    for x in SIZE:
        yield f"swiglu_backward_{x}", "n / 4096", 6 * SIZE[x], *hidden
    logits = TOKENS * VOCAB, f"{TOKENS} x {VOCAB}"
    for x in SIZE:
        yield f"cross_entropy_{x}", "rows", 4 + SIZE[x], *logits
    yield "sum_losses", "1", 8, TOKENS, f"{TOKENS}"
    scores = HEADS * ROWS * KEYS, f"{HEADS} x {ROWS} x {KEYS}"
    for x in SIZE:
        yield f"attention_softmax_{x}", "rows, heads", 4 + SIZE[x], *scores
    tile = HEADS * ROWS * DIM, f"{HEADS} x {ROWS} x {DIM}"
    for x in SIZE:
        yield f"attention_output_{x}", "rows", 4 + SIZE[x], *tile
    for x in SIZE:
        yield f"attention_projection_{x}", "tokens * heads / 32", 2 * SIZE[x], *stream
    for x in SIZE:
        yield f"attention_gradient_{x}", "rows, heads", 8 + 2 * SIZE[x], *scores
    yield "sum_numbers", "n / 256", 8 * 9, 64, "64, of 8 ranks"
    yield "follow_event", "1", 4, 1, "one word"
    yield "follow_latch", "1", 4, 1, "one word"
    yield "follow_marks", "1", 8, 8, "two words of 8 ranks"
    yield "write_rider", "1", 16, 12, "a rider of 12 numbers"
    yield "follow_riders", "1", 8, 64, "riders of 64 ranks"


# Causal attention: sequences of a micro-batch, and how many pairs of a query and a key there are.
SEQUENCES, SEQ = TOKENS // 4096, 4096
SCORES = SEQUENCES * HEADS * SEQ * SEQ // 2


def attention():
    """(name, grid, matrix products, bytes that one mma loads from shared memory)

    A warp's ldmatrix moves 512 bytes. For each set of 16 columns (forward: 32 rows; backward: 16),
    a product of two tiles loads both operands, one with a left operand in registers the right one.
    """
    forward = {64: (4 * (2 + 4) + 4 * 4, 128), 128: (8 * (2 + 2) + 2 * 8, 128)}
    for width, (loads, products) in forward.items():
        grid = "seq / 128 * heads * sequences"
        yield f"flash_attention_{width}", width, grid, 2, 512 * loads / products
    for width in (64, 128):
        steps = width // 16
        # Two tiles of scores, of 16 x 32; then two sums or one.
        for name, heads, sums in (("keys", "kv_heads", 2), ("queries", "heads", 1)):
            loads = 2 * steps * (1 + 2) + sums * 2 * steps
            products = 2 * steps * 4 + sums * 2 * 2 * steps
            grid = f"seq / 64 * {heads} * sequences"
            yield f"flash_attention_{name}_{width}", width, grid, 2 + sums, 512 * loads / products


def attention_table(compiled):
    columns = ["kernel", "grid", "block", "GFLOP", "bytes / mma", "A100", "H100", "H100 by shared"]
    lines = [columns + ["registers", "shared", "occupancy"]]
    lines.append(["---"] * len(lines[0]))
    for name, width, grid, products, size in attention():
        row = compiled[name]
        flop = 2 * DIM * products * SCORES  # heads of 64 are twice as many
        shared = flop / (2 * 16 * 8 * 16) * size
        times = [time(max(flop / A100_TENSOR, shared / A100_SHARED))]
        times += [time(flop / H100_TENSOR), time(shared / H100_SHARED)]
        cells = [f"`{name}`", grid, row["threads"], round(flop / 1e9), round(size), *times]
        shared = f"{row['shared']} + {row['dynamic']}"
        lines.append([*cells, row["registers"], shared, f"{row['occupancy%']}%"])
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def compiled():
    """Returns {kernel: what `resources.txt` says of it for sm_90, by its columns' names}."""
    lines = (FOLDER / "resources.txt").read_text().splitlines()
    columns = next(line for line in lines if line.startswith("# kernel "))[2:].split()
    rows = [dict(zip(columns, line.split())) for line in lines if not line.startswith("#")]
    return {row["kernel"]: row for row in rows if row["arch"] == "sm_90"}


def time(seconds):
    if seconds < 1e-6:
        return "< 1 us"
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def table(compiled):
    columns = ["kernel", "grid", "block", "bytes / element", "elements", "H100", "H200"]
    columns += ["registers", "shared", "occupancy"]
    lines = [columns, ["---"] * len(columns)]
    names = set()
    for name, grid, size, elements, shape in kernels():
        names.add(name)
        row = compiled[name]
        shared = row["shared"] if row["dynamic"] == "0" else f"{row['shared']} + {row['dynamic']}"
        times = [time(size * elements / speed) for speed in (H100, H200)]
        cells = [f"`{name}`", grid, row["threads"], size, shape, *times]
        lines.append([*cells, row["registers"], shared, f"{row['occupancy%']}%"])
    names |= {name for name, *_ in attention()}
    if missing := set(compiled) - names:
        sys.exit(f"no shapes for {sorted(missing)}")
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def main():
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    readme = FOLDER / "README.md"
    old = readme.read_text()
    new, rows = old, compiled()
    for begin, text in ((BEGIN, table(rows)), (BEGIN_ATTENTION, attention_table(rows))):
        before, rest = new.split(begin)
        new = before + begin + text + END + rest.split(END, 1)[1]
    if "--check" in sys.argv:
        sys.exit(0 if new == old else "README.md is not up to date: run roofline.py")
    readme.write_text(new)


main()
