"""Runs the verifier `sentryward` over a kernel and over its mutants, each with one barrier removed.

The verifier proves two properties of one launch, for all schedules. No two threads touch the same
memory without a barrier between them, and all threads reach the same barriers.

It stops at a branch whose condition it does not know. It knows no addresses, so it does not know
whether an address is a multiple of 16. This file therefore verifies both outcomes of such a
comparison, as two cases.
"""

import json
import re
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .launches import LATCH, Family, Launch, launches_of
from .ptx import Kernel, Slices

FAILED = ("potential_race", "not_wellsynced", "invalid_lifecycle")
# Diagnostics that the verifier files under `unsupported`, although they describe faults.
FAULTS = (
    # A value in shared memory decides a branch, and no barrier orders its write before the read.
    "shared_constant_dependency_unproven",
    # No thread can go on: some wait at a barrier that others never reach.
    "shared_control_blocked",
)
MEMORY_MIB = 4096
# A kernel has few conditions of this kind; more of them show that the splitting goes wrong.
MOST_CASES = 64


@dataclass
class Verdict:
    """`proved`, `failed` or `undecided`, with the verifier's own word for the reason."""

    result: str
    reason: str = ""
    cases: int = 1


class Verifier:
    def __init__(self, tools: Path, timeout: float):
        self.program = tools / "bin" / "sentryward"
        if not self.program.exists():
            raise FileNotFoundError(f"no {self.program}: run ci/install-cuda-tools {tools}")
        self.timeout = timeout

    def verify(
        self,
        kernel: Kernel,
        family: Family,
        launch: Launch,
        removed: int | None = None,
        with_race: bool = False,
    ) -> Verdict:
        """Verifies one launch, in one case for each outcome of its comparisons of addresses."""
        request = request_of(kernel, family, launch)
        text = kernel.variant(launch.reductions, removed, with_race)
        names = family.parameters.split()
        slices = Slices(
            kernel.text,
            {
                parameter.name
                for name, parameter in zip(names, kernel.parameters)
                if name.startswith("*") or name.endswith("[]")
            },
        )
        waiting: list[dict[int, bool]] = [{}]
        cases = 0
        undecided = None
        while waiting:
            outcomes = waiting.pop()
            report = self.run(slices.decide(text, outcomes), request)
            cases += 1
            checks = report.get("checks", {})
            passed = all(checks.get(name) == "passed" for name in ("synchronization", "memory"))
            if report["result"] == "race_free" and passed:
                continue
            diagnostic = (report.get("diagnostics") or [{}])[0]
            code = diagnostic.get("code", report["result"])
            if report["result"] in FAILED or code in FAULTS:
                return Verdict("failed", code, cases)
            line = diagnostic.get("details", {}).get("location", {}).get("line")
            if code == "control_predicate_not_static" and line:
                tests = [test for test in slices.address_tests(line) if test not in outcomes]
                if tests and cases + len(waiting) < MOST_CASES:
                    waiting += [{**outcomes, tests[0]: False}, {**outcomes, tests[0]: True}]
                    cases -= 1
                    continue
                code += f" ({' '.join(sorted(slices.origins(line)))})"
            undecided = undecided or Verdict("undecided", code, cases)
        return undecided or Verdict("proved", "", cases)

    def run(self, text: str, request: dict) -> dict:
        """One run of the verifier. Its exit status says nothing about the result."""
        with tempfile.TemporaryDirectory() as folder:
            ptx, config = Path(folder) / "kernel.ptx", Path(folder) / "input.json"
            ptx.write_text(text)
            config.write_text(json.dumps(request))
            done = subprocess.run(
                [
                    str(self.program),
                    str(ptx),
                    "--input",
                    str(config),
                    "--timeout",
                    str(self.timeout),
                    "--memory-limit-mib",
                    str(MEMORY_MIB),
                ],
                capture_output=True,
                text=True,
            )
        try:
            return json.loads(done.stdout)
        except json.JSONDecodeError:
            return {"result": "tool_failure", "diagnostics": [{"code": done.stderr[-200:]}]}


def request_of(kernel: Kernel, family: Family, launch: Launch) -> dict:
    """The verifier's input for a launch. Fails if the family's parameters are not the kernel's."""
    names = family.parameters.split()
    if len(names) != len(kernel.parameters):
        raise ValueError(
            f"{kernel.name} has {len(kernel.parameters)} parameters, launches.py names {len(names)}"
        )
    declarations, arguments, arrays = [], [], []
    for index, (name, parameter) in enumerate(zip(names, kernel.parameters)):
        if name.startswith("*"):
            name = name[1:]
            if parameter.type != "u64":
                raise ValueError(
                    f"{kernel.name}: parameter {name} is no pointer but {parameter.type}"
                )
            declarations.append(
                {
                    "parameter": index,
                    "type": "pointer",
                    "space": "global",
                    "object": launch.same.get(name, name),
                }
            )
            known = launch.data.get(name, LATCH if name == "latch" else None)
            if known:
                arrays.append({"parameter": index, "element_type": "u32", "shapes": [known]})
        elif name.endswith("[]"):
            for i in range(launch.pointers):
                declarations.append(
                    {
                        "parameter": index,
                        "offset": 8 * i,
                        "type": "pointer",
                        "space": "global",
                        "object": f"{name[:-2]}{i}",
                    }
                )
        else:
            value = launch.values.get(name, 0.5 if parameter.type.startswith("f") else None)
            if value is None:
                raise ValueError(f"{kernel.name}, launch {launch.name}: {name} has no value")
            arguments.append({"parameter": index, "type": parameter.type, "value": value})
    grid = launch.grid if isinstance(launch.grid, tuple) else (launch.grid, 1, 1)
    return {
        "schema": "spverify.kernel-input/v1",
        "entry": kernel.name,
        "launch": {
            "grid_dim": list(grid),
            "block_dim": [family.threads, 1, 1],
            "dynamic_shared_bytes": launch.dynamic,
        },
        "declarations": declarations,
        "arguments": arguments,
        "shape_arrays": arrays,
    }


@dataclass
class Work:
    """What to verify of one kernel. The label tells rows of different architectures apart."""

    kernel: Kernel
    family: Family
    label: str = ""
    # Number of a barrier and the launches that may show that it is needed.
    mutants: dict[int, list[Launch]] = field(default_factory=dict)


def barrier_name(kernel: Kernel, number: int) -> str:
    return f"barrier-{number + 1}/{len(kernel.barriers)}"


def check_kernel(
    verifier: Verifier, work: Work, long: bool = False, verbose: bool = False
) -> list[list[str]]:
    """Rows of the table of proofs: one for each launch, then one for each removed barrier."""
    kernel = work.kernel
    rows = []

    def note(name: str, started: float, verdict: Verdict) -> None:
        rows.append(
            [kernel.name, work.label + name, verdict.result, str(verdict.cases), verdict.reason]
        )
        if verbose:
            print(f"{time.monotonic() - started:7.1f} s  {' '.join(rows[-1])}", flush=True)

    proved = []
    for launch in launches_of(work.family, kernel.name, long):
        started = time.monotonic()
        verdict = verifier.verify(kernel, work.family, launch)
        note(launch.key, started, verdict)
        if verdict.result == "proved":
            proved.append(launch)
    for number, launches in work.mutants.items():
        started = time.monotonic()
        # Only launches that are proved with the barrier say something about its removal.
        launches = [launch for launch in launches if launch in proved]
        verdict = check_mutant(verifier, kernel, number, work.family, launches)
        note(barrier_name(kernel, number), started, verdict)
    return rows


def check_mutant(
    verifier: Verifier, kernel: Kernel, number: int, family: Family, launches: list[Launch]
) -> Verdict:
    """Removes one barrier and looks for a launch that shows a fault without it."""
    undecided = None
    reached = False
    cases = 0
    for launch in launches:
        verdict = verifier.verify(kernel, family, launch, number)
        if verdict.result == "failed":
            return Verdict("flagged", f"{launch.key}: {verdict.reason}", verdict.cases)
        cases += verdict.cases
        if verdict.result == "undecided":
            undecided = verdict
        if not reached:
            reached = verifier.verify(kernel, family, launch, number, True).result == "failed"
    if undecided:
        return Verdict("undecided", undecided.reason, cases)
    if not reached:
        return Verdict("undecided", "no launch reaches the barrier", cases)
    return Verdict("redundant", "", cases)


def check_all(
    verifier: Verifier, work: list[Work], long: bool, jobs: int, verbose: bool
) -> list[list[str]]:
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda item: check_kernel(verifier, item, long, verbose), work)
        return [row for rows in found for row in rows]


def all_mutants(kernel: Kernel, family: Family) -> dict[int, list[Launch]]:
    """Each barrier removed in turn, with all launches."""
    launches = launches_of(family, kernel.name, long=True)
    return {number: launches for number in range(len(kernel.barriers))}


def known_mutants(
    kernel: Kernel, family: Family, table: dict[tuple[str, ...], str]
) -> dict[int, list[Launch]]:
    """Only the launch that showed that a barrier is needed when the table was written."""
    launches = {launch.key: launch for launch in launches_of(family, kernel.name, long=False)}
    mutants = {}
    for number in range(len(kernel.barriers)):
        row = table.get((kernel.name, barrier_name(kernel, number)), "")
        match = re.match(r"flagged \d+ (\S+): ", row)
        if match and match[1] in launches:
            mutants[number] = [launches[match[1]]]
    return mutants


def unknown_barriers(kernel: Kernel, table: dict[tuple[str, ...], str]) -> list[str]:
    """Differences between a kernel's barriers and those of the table."""
    found = {barrier_name(kernel, number) for number in range(len(kernel.barriers))}
    listed = {what for name, what in table if name == kernel.name and what.startswith("barrier-")}
    return [
        f"{kernel.name} {what}: only in {'the kernel' if what in found else 'the table'}"
        for what in sorted(found ^ listed)
    ]
