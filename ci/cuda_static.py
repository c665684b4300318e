#!/usr/bin/env python3
"""Checks the CUDA kernels without a GPU, and compares what the tools report with tables.

1. Every kernel compiles for every architecture without a warning and without spills.
2. Registers, shared memory and occupancy equal those of `resources.txt`.
3. The machine code has the promised 16-byte accesses, no local memory and no float atomics.
4. A verifier proves small launches free of races. With one barrier removed it must find a race; the
   exceptions are listed with their reasons in `proofs.txt`.

Both tables lie in the folder of the kernels and change only with `--update`. The table of proofs
needs `--long` as well, because only a long run does all proofs. With `--only`, the rows of other
kernels stay as they are.
Needs `ci/install-cuda-tools`. Exits with 1 if a check fails, with 3 without the tools.
"""

import argparse
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_static import launches, nvrtc, ptx, races, remarks, resources, sass, selftest, table

ROOT = Path(__file__).resolve().parent.parent
# The verifier reads the PTX of this architecture. The compiler unrolls loops further for sm_100, so
# `--long` verifies that PTX as well. The PTX for sm_80 differs from the first only in its header.
VERIFIED = "sm_90"
ALSO_VERIFIED = "sm_100"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser.add_argument(
        "--kernels", type=Path, default=ROOT / "kernels/cuda", help="folder of the sources"
    )
    parser.add_argument(
        "--tools",
        type=Path,
        default=target / "cuda-tools",
        help="as given to ci/install-cuda-tools",
    )
    parser.add_argument(
        "--update", action="store_true", help="rewrite resources.txt, and with --long proofs.txt"
    )
    parser.add_argument(
        "--long", action="store_true", help="all launches, barriers and architectures"
    )
    parser.add_argument(
        "--only", metavar="NAME", help="kernels whose name matches this regular expression"
    )
    parser.add_argument("--no-proofs", action="store_true", help="leave the verifier out")
    parser.add_argument("--jobs", type=int, default=2, help="runs of the verifier side by side")
    parser.add_argument("--verbose", action="store_true", help="print each proof with its seconds")
    parser.add_argument("--timeout", type=float, help="seconds for one run of the verifier")
    return parser.parse_args()


class Clock:
    """Prints what each stage took: seconds, and seconds of processor time."""

    def __init__(self) -> None:
        self.last = self.now()

    def now(self) -> tuple[float, float]:
        return time.monotonic(), sum(os.times()[:4])

    def stage(self, text: str) -> None:
        now = self.now()
        wall, cpu = (after - before for after, before in zip(now, self.last))
        print(f"{wall:7.1f} s  {cpu:7.1f} s of CPU  {text}", flush=True)
        self.last = now


def main() -> int:
    options = arguments()
    failures: list[str] = []
    clock = Clock()
    try:
        compiler = nvrtc.Nvrtc(options.tools)
        verifier = races.Verifier(options.tools, options.timeout or (600 if options.long else 120))
    except FileNotFoundError as error:
        print(f"SKIPPED: {error}")
        return 3

    failures += selftest.run(compiler, verifier, options.tools, VERIFIED)
    clock.stage("self-test: known faults are found")
    try:
        source = nvrtc.source_of(options.kernels)
        with ThreadPoolExecutor(options.jobs) as pool:
            programs = list(
                pool.map(lambda name: compiler.compile(source, name), nvrtc.ARCHITECTURES)
            )
    except nvrtc.CompileError as error:
        print(error)
        return 1
    kernels = ptx.kernels_of(next(p for p in programs if p.architecture == VERIFIED).ptx)
    names = [name for name in sorted(kernels) if not options.only or re.search(options.only, name)]
    clock.stage(f"compiled {len(kernels)} kernels for {', '.join(nvrtc.ARCHITECTURES)}")

    machine_code = {p.architecture: sass.disassemble(options.tools, p.cubin) for p in programs}
    for name in names:
        family = launches.family_of(name)
        if not family:
            failures.append(f"{name}: no family in ci/cuda_static/launches.py")
        elif family.threads > kernels[name].max_threads:
            failures.append(f"{name}: {kernels[name].max_threads} threads, not {family.threads}")
    for architecture, code in machine_code.items():
        for name in names:
            failures += sass.lint(name, architecture, code.get(name, []))
    clock.stage("lint of the machine code")

    resource_file = options.kernels / "resources.txt"
    resource_rows = resource_table(names, programs)
    if options.update:
        rows = table.merge(resource_file, resource_rows, set(kernels), len(resources.HEADER))
        resource_file.write_text(table.render(RESOURCES, resources.HEADER, rows))
    resource_text = table.render(RESOURCES, resources.HEADER, resource_rows)
    failures += table.compare(resource_file, resource_text, keys=2, whole=not options.only)
    for name in names:
        for program in programs:
            usage = program.usage[name]
            if usage.stack or usage.spills:
                failures.append(
                    f"{name} {program.architecture}: {usage.stack} bytes of stack,"
                    f" {usage.spills} of spills"
                )
    clock.stage("table of resources")

    proof_rows: list[list[str]] = []
    if not options.no_proofs:
        proof_file = options.kernels / "proofs.txt"
        work = work_of(
            [name for name in names if launches.family_of(name)],
            programs,
            kernels,
            options.long,
            table.read(proof_file, keys=2),
        )
        proof_rows = races.check_all(verifier, work, options.long, options.jobs, options.verbose)
        whole = options.long and not options.only
        failures += explain(proof_rows, whole)
        if options.update and options.long:
            rows = table.merge(proof_file, proof_rows, set(kernels), len(PROOF_HEADER))
            proof_file.write_text(table.render(PROOFS, PROOF_HEADER, rows))
        proof_text = table.render(PROOFS, PROOF_HEADER, proof_rows)
        failures += table.compare(proof_file, proof_text, keys=2, whole=whole)
        listed = table.read(proof_file, keys=2)
        for name in names:
            failures += races.unknown_barriers(kernels[name], listed)
        clock.stage("proofs and mutants")

    summary(names, programs, machine_code, proof_rows)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"{len(names)} kernels, {len(failures)} failures")
    return 1 if failures else 0


def work_of(
    names: list[str],
    programs: list[nvrtc.Program],
    kernels: dict[str, ptx.Kernel],
    long: bool,
    listed: dict[tuple[str, ...], str],
) -> list[races.Work]:
    """All launches and mutants, or those that a short run has time for.

    A short run takes one kernel of each family, because the others differ only in types, and repeats
    only mutants that the table lists as flagged.
    """
    work = []
    seen = set()
    also = (
        ptx.kernels_of(next(p for p in programs if p.architecture == ALSO_VERIFIED).ptx)
        if long
        else {}
    )
    for name in names:
        kernel, family = kernels[name], launches.family_of(name)
        if long:
            work.append(races.Work(kernel, family, mutants=races.all_mutants(kernel, family)))
            work.append(races.Work(also[name], family, f"{ALSO_VERIFIED}:"))
        else:
            if family.kernels not in seen:
                mutants = races.known_mutants(kernel, family, listed)
                work.append(races.Work(kernel, family, mutants=mutants))
        seen.add(family.kernels)
    return work


RESOURCES = """
What the assembler reports for each kernel, and the occupancy at its block size.
`ci/cuda_static.py --update` writes this file; `ci/cuda_static.py` compares it.
"""

PROOF_HEADER = ["kernel", "what", "result", "cases", "reason"]
PROOFS = """
What the verifier `sentryward` reports for the small launches of ci/cuda_static/launches.py, and for
the same launches with one barrier removed. `proved`: no race, and no barrier that only some threads
reach, in any schedule. `flagged`: the barrier is needed. `redundant`: proved without the barrier.
`undecided`: the verifier cannot tell.
The verifier assumes that different arguments are different memory, unless a launch says otherwise.
`cases` counts the outcomes of comparisons of addresses. The reason of `flagged` names the launch
and the verifier's word for the fault.
`ci/cuda_static.py --long --update` writes this file; `ci/cuda_static.py` compares the rows that it
has time for, and `ci/cuda_static.py --long` compares all.
"""


def resource_table(names: list[str], programs: list[nvrtc.Program]) -> list[list[str]]:
    rows = []
    for name in names:
        family = launches.family_of(name)
        threads, dynamic = (family.threads, family.dynamic) if family else (256, 0)
        for program in programs:
            rows.append(
                resources.row(name, program.architecture, program.usage[name], threads, dynamic)
            )
    return rows


def explain(rows: list[list[str]], whole: bool) -> list[str]:
    """Adds the remarks to the rows that need one. Failed proofs stay failures."""
    failures = []
    used: set[int] = set()
    for row in rows:
        kernel, what, result, _, reason = row
        remark = remarks.remark_for(kernel, what, result, used)
        if remark:
            row[4] = f"{reason}; {remark}" if reason else remark
        elif result not in ("proved", "flagged"):
            failures.append(f"{kernel} {what}: {result}: {reason}")
    if whole:
        for index, remark in enumerate(remarks.REMARKS):
            if index not in used:
                failures.append(f"ci/cuda_static/remarks.py: nothing matches {remark[:3]}")
    return failures


def summary(
    names: list[str],
    programs: list[nvrtc.Program],
    code: dict[str, dict[str, list[str]]],
    proofs: list[list[str]],
) -> None:
    """One line a kernel. Wide accesses are counted as loads/stores in the verified architecture."""
    print(
        f"\n{'kernel':34} {'registers':>12} {'occupancy':>12} {'wide':>7}  {'launches':12} barriers"
    )
    for name in names:
        family = launches.family_of(name)
        threads, dynamic = (family.threads, family.dynamic) if family else (256, 0)
        registers = "/".join(str(p.usage[name].registers) for p in programs)
        shares = "/".join(
            str(resources.occupancy(p.architecture, p.usage[name], threads, dynamic))
            for p in programs
        )
        counts = {True: {}, False: {}}
        for row in proofs:
            if row[0] == name:
                of = counts[row[1].startswith("barrier-")]
                of[row[2]] = of.get(row[2], 0) + 1
        said = [
            ", ".join(f"{n} {result}" for result, n in counts[key].items()) or "-"
            for key in (False, True)
        ]
        print(
            f"{name:34} {registers:>12} {shares:>12} {sass.wide(code[VERIFIED][name]):>7}  "
            f"{said[0]:12} {said[1]}"
        )
    print()


if __name__ == "__main__":
    sys.exit(main())
