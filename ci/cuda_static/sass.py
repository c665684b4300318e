"""A lint of the machine code: wide accesses where promised, no local memory, no float atomics."""

import re
import subprocess
import tempfile
from pathlib import Path

# Instructions that a kernel's machine code must contain on every architecture. A kernel may match
# several rows. 32 bytes count as wide as well, because newer architectures can move them at once.
WIDE_LOAD = r"LDG\.\S*(128|256)\b"
WIDE_STORE = r"STG\.\S*(128|256)\b"
# Four elements of bf16, beside four of f32 in the same kernel.
HALF_LOAD = r"LDG\.\S*\.64\b"
HALF_STORE = r"STG\.\S*\.64\b"

PROMISES: list[tuple[str, list[str]]] = [
    (r"adamw_.*", [WIDE_LOAD, WIDE_STORE]),
    (r"adamw_.*_bf16", [HALF_LOAD]),
    (r"adamw_bf16_.*", [HALF_STORE]),
    (r"cast_f32_bf16", [WIDE_LOAD, HALF_STORE]),
    (r"cast_bf16_f32", [HALF_LOAD, WIDE_STORE]),
    (r"accumulate|copy", [WIDE_LOAD, WIDE_STORE]),
    (r"zero", [WIDE_STORE]),
    (r"square_norm_parts_f32", [WIDE_LOAD]),
    (r"square_norm_parts_bf16", [HALF_LOAD]),
    (r"reduce_(f32_f32|bf16_bf16)", [WIDE_LOAD, WIDE_STORE]),
    (r"reduce_f32_bf16", [WIDE_LOAD, HALF_STORE]),
    (r"reduce_bf16_f32", [HALF_LOAD, WIDE_STORE]),
    (r"rms_norm_(f32|bf16)_.*", [WIDE_LOAD]),
    (r"rms_norm_f32_.*", [WIDE_STORE]),
    (r"rms_norm_bf16_.*", [HALF_STORE]),
    (r"rms_norm_.*_bf16", [HALF_LOAD]),
    (r"rms_norm_backward_.*", [WIDE_LOAD, WIDE_STORE]),
    (r"rope_.*", [WIDE_LOAD, WIDE_STORE]),
    (r"swiglu_.*", [WIDE_LOAD, WIDE_STORE]),
    (r"embedding_f32|embedding_backward", [WIDE_LOAD, WIDE_STORE]),
    (r"embedding_bf16", [HALF_LOAD, WIDE_STORE]),
    (
        r"(cross_entropy|attention_softmax|attention_output|attention_gradient)_f32",
        [WIDE_LOAD, WIDE_STORE],
    ),
    (
        r"(cross_entropy|attention_softmax|attention_output|attention_gradient)_bf16",
        [WIDE_LOAD, HALF_STORE],
    ),
    (r"attention_projection_.*", [WIDE_LOAD]),
]

# Tensor cores, matrices loaded for them, and copies to shared memory that need no registers.
TENSOR = [r"HMMA\.16816\.F32\.BF16", r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", r"LDGSTS\.\S*128"]
PROMISES.append((r"flash_attention_.*", [*TENSOR, WIDE_STORE]))

FORBIDDEN = [
    (r"(LDL|STL)\b", "uses local memory"),
    # A sum of floats by atomics depends on the order in which the threads arrive.
    (r"(RED|REDG|ATOM|ATOMG|ATOMS)\.\S*(F16|BF16|F32|F64)", "adds floats atomically"),
]


def disassemble(tools: Path, cubin: bytes) -> dict[str, list[str]]:
    """The instructions of each kernel, without predicates."""
    found = sorted(tools.glob("lib/python3*/site-packages/nvidia/*/bin/nvdisasm"))
    if not found:
        raise FileNotFoundError(f"no nvdisasm under {tools}: run ci/install-cuda-tools {tools}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [str(found[0]), "--print-code", file.name], text=True, check=True, capture_output=True
        ).stdout
    kernels: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in listing.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            current = kernels.setdefault(match[1], [])
        elif re.match(r"\s*\.section\b", line) or line.startswith("//-"):
            if ".text." not in line:
                current = None
        elif current is not None and (
            match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*.*?);", line)
        ):
            current.append(match[1])
    return kernels


def lint(kernel: str, architecture: str, instructions: list[str]) -> list[str]:
    failures = []
    if not instructions:
        failures.append(f"{kernel} {architecture}: no machine code found")
    for pattern, why in FORBIDDEN:
        for instruction in instructions:
            if re.match(pattern, instruction):
                failures.append(f"{kernel} {architecture}: {why}: {instruction}")
                break
    for names, promised in PROMISES:
        if re.fullmatch(names, kernel):
            for pattern in promised:
                if not any(re.match(pattern, instruction) for instruction in instructions):
                    failures.append(f"{kernel} {architecture}: promised but absent: {pattern}")
    return failures


def wide(instructions: list[str]) -> str:
    """Counts of wide loads and stores, for the table at the end."""
    loads = sum(bool(re.match(WIDE_LOAD, i)) for i in instructions)
    stores = sum(bool(re.match(WIDE_STORE, i)) for i in instructions)
    return f"{loads}/{stores}"
