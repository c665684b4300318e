"""PyTorch's own tests of process groups, which come with it, over gloo or Pillion.

`torchrun --standalone --nproc-per-node 2 pytorch_suite.py gloo|pillion [--only REGEX] [--out FILE]`

The ranks stay for all tests; each test has a process group of its own. Over Pillion, our backend is
registered under gloo's name, because many tests run for nobody else. FILE gets the results as JSON;
`--expect FILE` compares with an earlier run, and fails where a test of that passed and does not here,
unless `EXPECTED` below says why.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import unittest
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# A test that gloo passes and Pillion does not, and the reason. The second list holds with
# PILLION_TORCH=backend alone.
EXPECTED = {
    "test_ddp_logging_data_cpu": "asks that the backend's name in DDP's log is gloo",
}
EXPECTED_OF_BACKEND = {
    name: "PyTorch's C++ does not ask works of Python whether they are complete, and says no"
    for name in ("test_irecv", "test_isend", "test_isend_autograd_profiler", "test_isend_torch_profiler")
}
LIMIT_S = 60


def take_gloos_name() -> None:
    """Registers Pillion's backend under the name gloo."""
    import pillion.torch
    from pillion.torch.backend import Collectives

    pillion.torch.register()
    dist.Backend._plugins["GLOO"] = dist.Backend._plugins["PILLION"]
    dist.Backend.backend_type_map["gloo"] = dist.ProcessGroup.BackendType.CUSTOM
    Collectives.label = "gloo"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backend", choices=["gloo", "pillion"])
    parser.add_argument("--only", default="")
    parser.add_argument("--out")
    parser.add_argument("--expect")
    options = parser.parse_args()
    sys.argv[1:] = []  # The suite reads them when it is imported.
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.PrefixStore(
        "suite",
        dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, False, timedelta(seconds=300)),
    )
    if rank == 0:
        store.set("folder", tempfile.mkdtemp())
    folder = Path(store.get("folder").decode())
    os.environ.update(BACKEND="gloo", TEMP_DIR=str(folder))
    (folder / "barrier").mkdir(exist_ok=True)
    if options.backend == "pillion":
        take_gloos_name()

    import torch.testing._internal.distributed.distributed_test as suite
    from torch.testing._internal.common_distributed import TEST_SKIPS

    base = suite.DistributedTest._DistTestBase
    skips = {skip.exit_code: skip.message for skip in TEST_SKIPS.values()}

    class Case(suite.TestDistBackend, base):
        pass

    def meet(place: str) -> None:
        """Waits until every rank is here, without a process group."""
        store.add(place, 1)
        end = time.monotonic() + 2 * LIMIT_S
        while store.add(place, 0) < world:
            if time.monotonic() > end:
                raise SystemExit(f"rank {rank}: another rank does not come to {place}")
            time.sleep(0.002)

    def overdue(*_: object) -> None:
        raise TimeoutError(f"not over within {LIMIT_S} s")

    signal.signal(signal.SIGALRM, overdue)
    results: dict[str, list[str]] = {}
    for name in filter(re.compile(options.only).search, [name for name in dir(base) if name.startswith("test_")]):
        if rank == 0:
            for part in ("barrier", "test_dir", "init_dir"):
                shutil.rmtree(folder / part, ignore_errors=True)
                (folder / part).mkdir()
        meet(f"{name}/begin")
        suite.Barrier.barrier_id = 0
        case = Case.__new__(Case)
        unittest.TestCase.__init__(case, name)
        case.rank, case.file_name, case.skip_return_code_checks = rank, str(folder / "meeting"), []
        limit = timedelta(seconds=suite.CUSTOM_PG_TIMEOUT.get(name, 20))
        signal.alarm(LIMIT_S)
        try:
            torch.manual_seed(0)
            meeting = f"file://{folder}/{name}"
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=limit)
            getattr(base, name)(case)
            said = ["passed", ""]
        except unittest.SkipTest as skip:
            said = ["skipped", str(skip)]
        except SystemExit as end:
            said = ["skipped", skips[end.code]] if end.code in skips else ["failed", f"exit {end.code}"]
        except BaseException as error:
            first = (str(error).strip().splitlines() or [""])[0]
            said = ["failed", f"{type(error).__name__}: {first[:200]}"]
        signal.alarm(0)
        store.set(f"{name}/{rank}", json.dumps(said))
        meet(f"{name}/end")
        try:
            if dist.is_initialized():
                dist.destroy_process_group()
        except Exception:
            pass  # It failed in the test, which has said so.
        meet(f"{name}/gone")
        if rank == 0:
            of_ranks = [json.loads(store.get(f"{name}/{other}")) for other in range(world)]
            worst = min(of_ranks, key=lambda said: ["failed", "passed", "skipped"].index(said[0]))
            results[name] = worst
            print(f"{worst[0]:8} {name} {worst[1]}", flush=True)
    code = 0
    if rank == 0:
        count = {kind: sum(said[0] == kind for said in results.values()) for kind in ("passed", "failed", "skipped")}
        print(f"{options.backend}, {world} ranks: {count}")
        if options.out:
            Path(options.out).write_text(json.dumps(results, indent=1))
        if options.expect:
            code = compare(json.loads(Path(options.expect).read_text()), results)
        shutil.rmtree(folder)
    meet("all")
    os._exit(code)


def compare(gloo: dict[str, list[str]], ours: dict[str, list[str]]) -> int:
    known = dict(EXPECTED)
    if os.environ.get("PILLION_TORCH") == "backend":
        known.update(EXPECTED_OF_BACKEND)
    passed = [name for name, said in gloo.items() if said[0] == "passed" and name in ours]
    missed = [name for name in passed if ours[name][0] != "passed"]
    print(f"of {len(passed)} tests that gloo passes, Pillion passes {len(passed) - len(missed)}")
    for name in missed:
        print(f"  {name}: {known.get(name, 'UNEXPECTED: ' + ours[name][1])}")
    return int(any(name not in known for name in missed))


if __name__ == "__main__":
    main()
