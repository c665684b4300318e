"""Kernels with known faults: a check that cannot fail proves nothing."""

from pathlib import Path

from . import nvrtc, ptx, races, sass
from .launches import Family, Launch

SOURCE = r"""
typedef unsigned int u32;
typedef unsigned long long u64;

extern "C" __global__ void float_atomic(float* out) { atomicAdd(out, 1.0f); }

extern "C" __global__ void local_memory(float* out, u32 n) {
  float values[64];
  for (u32 i = 0; i < 64; i++) values[i] = out[i];
  for (u32 i = 0; i < n; i++) values[(i * 7) % 64] += values[(i * 3) % 64];
  for (u32 i = 0; i < 64; i++) out[i] = values[i];
}

// Needs its first barrier. The second one is redundant because a thread reads only what it wrote.
extern "C" __global__ void barriers(float* out, const float* x) {
  __shared__ float values[256];
  values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float other = values[255 - threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = other;
}

// No launch with a whole block reaches the barrier.
extern "C" __global__ void unreached(float* out, const float* x) {
  if (blockDim.x == 32) {
    out[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
  }
}

// Both outcomes of the comparison of the address must be verified, because the scalar path has the
// race. Threads from 200 on take the scalar path in both cases.
extern "C" __global__ void race_where_misaligned(float* out, const float* x) {
  u32 i = threadIdx.x;
  if (((u64)out & 15) == 0 && i < 200) {
    *(float4*)(out + 4 * i) = *(const float4*)(x + 4 * i);
  } else {
    for (u32 j = 0; j < 5; j++) out[4 * i + j] = x[4 * i + j];
  }
}

// The threads may disagree about this condition, so no case stands for all of them.
extern "C" __global__ void condition_on_data(float* out, const float* x) {
  if (x[threadIdx.x] > 0.0f) out[x[threadIdx.x] > 1.0f ? 1 : 0] = 1.0f;
}
"""


def run(
    compiler: nvrtc.Nvrtc, verifier: races.Verifier, tools: Path, architecture: str
) -> list[str]:
    program = compiler.compile(SOURCE, architecture)
    code = sass.disassemble(tools, program.cubin)
    kernels = ptx.kernels_of(program.ptx)
    failures = []

    def expect(what: str, found: object, wanted: object) -> None:
        if found != wanted:
            failures.append(f"self-test: {what}: found {found}, not {wanted}")

    expect(
        "float atomic",
        [f.split(": ")[1] for f in sass.lint("float_atomic", architecture, code["float_atomic"])],
        ["adds floats atomically"],
    )
    expect(
        "local memory",
        [f.split(": ")[1] for f in sass.lint("local_memory", architecture, code["local_memory"])],
        ["uses local memory"],
    )
    expect("stack", program.usage["local_memory"].stack > 0, True)
    expect("promise", len(sass.lint("accumulate", architecture, code["float_atomic"])), 3)

    family = Family(".*", "*out *x", [Launch("only")])
    for name, wanted in {
        "barriers": ["proved", "flagged", "redundant"],
        "unreached": ["proved", "undecided"],
        "race_where_misaligned": ["failed"],
        "condition_on_data": ["undecided"],
    }.items():
        kernel = kernels[name]
        work = races.Work(kernel, family, mutants=races.all_mutants(kernel, family))
        rows = races.check_kernel(verifier, work)
        expect(name, [row[2] for row in rows], wanted)
    return failures
