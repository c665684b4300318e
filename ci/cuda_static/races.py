"""Runs the verifier `sentryward` over a kernel and over its mutants, each with one barrier removed.

The verifier proves for one launch that no two threads touch the same memory without a barrier between
them, in any schedule, and that all threads reach the same barriers. It stops at a branch whose
condition it does not know. The verifier knows no addresses, so it does not know whether an address is a
multiple of 16. Both outcomes of such a comparison are verified in turn, as two cases.
"""

import json
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

    def verify(self, kernel: Kernel, family: Family, launch: Launch,
               removed: int | None = None, with_race: bool = False) -> Verdict:
        """Verifies one launch, in as many cases as there are outcomes of comparisons of addresses."""
        request = request_of(kernel, family, launch)
        text = kernel.variant(launch.reductions, removed, with_race)
        names = family.parameters.split()
        slices = Slices(text, {parameter.name for name, parameter in zip(names, kernel.parameters)
                               if name.startswith("*") or name.endswith("[]")})
        waiting: list[dict[int, bool]] = [{}]
        cases = 0
        undecided = None
        while waiting:
            outcomes = waiting.pop()
            report = self.run(slices.decide(outcomes), request)
            cases += 1
            passed = [report["checks"][check] for check in ("synchronization", "memory")]
            if report["result"] == "race_free" and passed == ["passed", "passed"]:
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
                [str(self.program), str(ptx), "--input", str(config), "--timeout", str(self.timeout),
                 "--memory-limit-mib", str(MEMORY_MIB)],
                capture_output=True, text=True,
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
                raise ValueError(f"{kernel.name}: parameter {name} is no pointer but {parameter.type}")
            declarations.append({"parameter": index, "type": "pointer", "space": "global",
                                 "object": launch.same.get(name, name)})
            known = launch.data.get(name, LATCH if name == "latch" else None)
            if known:
                arrays.append({"parameter": index, "element_type": "u32", "shapes": [known]})
        elif name.endswith("[]"):
            for i in range(launch.pointers):
                declarations.append({"parameter": index, "offset": 8 * i, "type": "pointer",
                                     "space": "global", "object": f"{name[:-2]}{i}"})
        else:
            value = launch.values.get(name, 0.5 if parameter.type.startswith("f") else None)
            if value is None:
                raise ValueError(f"{kernel.name}, launch {launch.name}: {name} has no value")
            arguments.append({"parameter": index, "type": parameter.type, "value": value})
    grid = launch.grid if isinstance(launch.grid, tuple) else (launch.grid, 1, 1)
    return {
        "schema": "spverify.kernel-input/v1",
        "entry": kernel.name,
        "launch": {"grid_dim": list(grid), "block_dim": [family.threads, 1, 1],
                   "dynamic_shared_bytes": launch.dynamic},
        "declarations": declarations,
        "arguments": arguments,
        "shape_arrays": arrays,
    }


def check_kernel(verifier: Verifier, kernel: Kernel, family: Family, label: str = "",
                 long: bool = False, verbose: bool = False) -> list[list[str]]:
    """Rows of the table of proofs: one for each launch, then one for each removed barrier.

    Mutants run the first two launches only, unless there is more time. The label tells rows of
    different architectures apart; rows with a label have no mutants.
    """
    rows = []

    def note(name: str, started: float, verdict: Verdict) -> None:
        rows.append([kernel.name, label + name, verdict.result, str(verdict.cases), verdict.reason])
        if verbose:
            print(f"{time.monotonic() - started:7.1f} s  {' '.join(rows[-1])}", flush=True)

    proved = []
    for launch in launches_of(family, kernel.name, long):
        started = time.monotonic()
        verdict = verifier.verify(kernel, family, launch)
        note(launch.name.replace(" ", "-"), started, verdict)
        if verdict.result == "proved":
            proved.append(launch)
    for number in range(len(kernel.barriers) if not label else 0):
        started = time.monotonic()
        verdict = check_mutant(verifier, kernel, number, family, proved if long else proved[:2])
        note(f"barrier-{number + 1}/{len(kernel.barriers)}", started, verdict)
    return rows


def check_mutant(verifier: Verifier, kernel: Kernel, number: int, family: Family,
                 launches: list[Launch]) -> Verdict:
    """Only launches that are proved with the barrier say something about its removal."""
    if not launches:
        return Verdict("undecided", "no launch is proved with the barrier", 0)
    undecided = None
    reached = False
    cases = 0
    for launch in launches:
        verdict = verifier.verify(kernel, family, launch, number)
        cases += verdict.cases
        if verdict.result == "failed":
            return Verdict("flagged", verdict.reason, cases)
        if verdict.result == "undecided":
            undecided = verdict
        if not reached:
            reached = verifier.verify(kernel, family, launch, number, True).result == "failed"
    if undecided:
        return Verdict("undecided", undecided.reason, cases)
    if not reached:
        return Verdict("undecided", "no launch reaches the barrier", cases)
    return Verdict("redundant", "", cases)


def check_all(verifier: Verifier, work: list[tuple[Kernel, Family, str]], long: bool, jobs: int,
              verbose: bool) -> list[list[str]]:
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda item: check_kernel(verifier, *item, long, verbose), work)
        return [row for rows in found for row in rows]
