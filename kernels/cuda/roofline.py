#!/usr/bin/env python3
"""Rewrites the table in README.md: what each kernel moves, and what the compiler makes of it.

    roofline.py LIBNVRTC [--check]

LIBNVRTC is the path of libnvrtc.so. No GPU is needed. With --check the table is only compared, and
the exit status tells whether README.md is up to date. Other versions of the compiler use other
numbers of registers.
"""

import ctypes
import math
import pathlib
import re
import sys

FOLDER = pathlib.Path(__file__).parent
BEGIN, END = "<!-- roofline.py: begin -->\n", "<!-- roofline.py: end -->\n"

# Bandwidth of a copy, in bytes a second, as others have measured it.
H100, H200 = 3.0e12, 4.3e12

# Limits of an SM of sm_90.
WARPS, REGISTERS, BLOCKS, SHARED = 64, 65536, 32, 228 << 10
SHARED_FOR_SYSTEM = 1 << 10  # of each block

# The shapes: one rank's parameters, and a micro-batch of an 8B model.
PARAMETERS = 10**9
TOKENS, WIDTH, HIDDEN, VOCAB, HEADS, DIM = 8192, 4096, 14336, 128256, 32, 128
ROWS, KEYS = 512, 4096  # a block of queries of one sequence
PARTS = TOKENS // 16
SIZE = {"f32": 4, "bf16": 2}


def kernels():
    """(name, grid, bytes an element, elements, their shape, threads, dynamic shared memory)"""

    def row(name, grid, size, elements, shape, threads=256, shared=0):
        return (name, grid, size, elements, shape, threads, shared)

    flat = f"{PARAMETERS:.0e}".replace("e+0", "e") + " parameters"
    for copy in ("none", "f32", "bf16"):
        for grad in SIZE:
            size = 24 + SIZE[grad] + SIZE.get(copy, 0)
            yield row(f"adamw_{copy}_{grad}", "n / 2048", size, PARAMETERS, flat)
    for name, size in (("cast_f32_bf16", 6), ("cast_bf16_f32", 6), ("accumulate", 12)):
        yield row(name, "n / 4096", size, PARAMETERS, flat)
    yield row("copy", "bytes / 16384", 2, 10**9, "1e9 bytes")
    yield row("zero", "bytes / 16384", 1, 10**9, "1e9 bytes")
    for x in SIZE:
        yield row(f"square_norm_parts_{x}", "n / 65536", SIZE[x], PARAMETERS, flat)
    parts = math.ceil(PARAMETERS / 65536)
    yield row("square_norm_total", "1", 12, parts, f"{parts} parts")
    for x in SIZE:
        for out in SIZE:
            size = 8 * SIZE[x] + SIZE[out]
            yield row(f"reduce_{x}_{out}", "n / 2048", size, PARAMETERS // 8, "8 inputs of 1.25e8")
    stream = TOKENS * WIDTH, f"{TOKENS} x {WIDTH}"
    for weight in SIZE:
        yield row(f"embedding_{weight}", "tokens", SIZE[weight] + 4, *stream)
    yield row("embedding_backward", "tokens", 12, *stream)
    for out in SIZE:
        for weight in SIZE:
            yield row(f"rms_norm_{out}_{weight}", "rows", 4 + SIZE[out], *stream)
    for weight in SIZE:
        # The partial sums of 16 rows are written once.
        name, grid = f"rms_norm_backward_{weight}", "rows / rows_per_part"
        yield row(name, grid, 16.25, *stream, shared=4 * WIDTH)
    yield row("sum_rows", "width / 32", 4, PARTS * WIDTH, f"{PARTS} x {WIDTH}")
    for x in SIZE:
        yield row(f"rope_{x}", "tokens / 4", 2 * SIZE[x], *stream)
    hidden = TOKENS * HIDDEN, f"{TOKENS} x {HIDDEN}"
    for x in SIZE:
        yield row(f"swiglu_{x}", "n / 4096", 3 * SIZE[x], *hidden)
    for x in SIZE:
        yield row(f"swiglu_backward_{x}", "n / 4096", 6 * SIZE[x], *hidden)
    logits = TOKENS * VOCAB, f"{TOKENS} x {VOCAB}"
    for x in SIZE:
        yield row(f"cross_entropy_{x}", "rows", 4 + SIZE[x], *logits, threads=1024)
    yield row("sum_losses", "1", 8, TOKENS, f"{TOKENS}")
    scores = HEADS * ROWS * KEYS, f"{HEADS} x {ROWS} x {KEYS}"
    for x in SIZE:
        yield row(f"attention_softmax_{x}", "rows, heads", 4 + SIZE[x], *scores)
    tile = HEADS * ROWS * DIM, f"{HEADS} x {ROWS} x {DIM}"
    for x in SIZE:
        yield row(f"attention_output_{x}", "rows", 4 + SIZE[x], *tile)
    for x in SIZE:
        yield row(f"attention_projection_{x}", "tokens * heads / 32", 2 * SIZE[x], *stream)
    for x in SIZE:
        yield row(f"attention_gradient_{x}", "rows, heads", 8 + 2 * SIZE[x], *scores)
    yield row("sum_numbers", "n / 256", 8 * 9, 64, "64, of 8 ranks")
    yield row("follow_event", "1", 4, 1, "one word", threads=1)
    yield row("follow_latch", "1", 4, 1, "one word", threads=1)


def compile_kernels(path):
    """Returns {kernel: (registers, bytes of static shared memory)} for sm_90."""
    nvrtc = ctypes.CDLL(path)
    files = [FOLDER / "common.cuh", *sorted(FOLDER.glob("*.cu"))]
    source = "".join(f'#line 1 "{file.name}"\n{file.read_text()}\n' for file in files)
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"pillion.cu", 0, None, None)
    options = ["--std=c++17", "--fmad=false", "--gpu-architecture=sm_90", "--ptxas-options=-v"]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    error = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    log = log.value.decode()
    if error:
        sys.exit(f"the kernels do not compile (NVRTC error {error}):\n{log}")
    report = {}
    for part in log.split("Compiling entry function '")[1:]:
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        if "0 bytes spill stores, 0 bytes spill loads" not in part:
            sys.exit(f"{part.split(chr(39))[0]} spills registers")
        report[part.split("'")[0]] = (registers, int(shared[1]) if shared else 0)
    return report


def occupancy(threads, registers, shared):
    """The share of an SM's 64 warps that blocks of this kernel can fill."""
    warps = math.ceil(threads / 32)
    of_warp = math.ceil(registers * 32 / 256) * 256
    of_block = math.ceil(shared / 128) * 128 + SHARED_FOR_SYSTEM
    # Each quarter of an SM has its own registers.
    by_registers = REGISTERS // 4 // of_warp * 4 // warps
    return min(BLOCKS, WARPS // warps, by_registers, SHARED // of_block) * warps / WARPS


def time(seconds):
    if seconds < 1e-6:
        return "< 1 us"
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def table(report):
    columns = ["kernel", "grid", "block", "bytes / element", "elements", "H100", "H200"]
    columns += ["registers", "shared", "occupancy"]
    lines = [columns, ["---"] * len(columns)]
    names = set()
    for name, grid, size, elements, shape, threads, dynamic in kernels():
        names.add(name)
        registers, shared = report[name]
        used = f"{shared} + {dynamic}" if dynamic else f"{shared}"
        share = occupancy(threads, registers, shared + dynamic)
        times = [time(size * elements / speed) for speed in (H100, H200)]
        compiled = [registers, used, f"{share:.0%}"]
        lines.append([f"`{name}`", grid, threads, size, shape, *times, *compiled])
    if missing := set(report) - names:
        sys.exit(f"no shapes for {sorted(missing)}")
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
    if len(arguments) != 1:
        sys.exit(__doc__)
    readme = FOLDER / "README.md"
    old = readme.read_text()
    before, rest = old.split(BEGIN)
    new = before + BEGIN + table(compile_kernels(arguments[0])) + END + rest.split(END)[1]
    if "--check" in sys.argv:
        sys.exit(0 if new == old else "README.md is not up to date: run roofline.py")
    readme.write_text(new)


main()
