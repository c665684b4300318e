"""What survivors learn when a rank dies, is late, or calls something else.

`python failures.py [--kills N] [--ranks N]`. The ranks are forked, because a program that has yet to
make a process group may be.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from datetime import timedelta
from typing import Callable

import pillion.torch  # noqa: F401  (before 2.15, PyTorch does not find it by itself)
import torch
import torch.distributed as dist


def ranks(world: int, body: Callable[[int, int], str], variables: Callable[[int], dict] = lambda rank: {}) -> list[str]:
    """What each rank says, or how it died. `variables` are those of a rank's environment."""
    folder, ends = tempfile.mkdtemp(), []
    for rank in range(world):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            code = 1
            os.environ.update(variables(rank))
            try:
                dist.init_process_group(
                    "pillion",
                    init_method=f"file://{folder}/store",
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=30),
                )
                said = body(rank, world)
                code = 0
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(write, said.encode()[:60_000])
            os._exit(code)
        os.close(write)
        ends.append((child, read))
    said = []
    for child, read in ends:
        with os.fdopen(read, "rb") as pipe:
            text = pipe.read().decode()
        _, status = os.waitpid(child, 0)
        said.append(f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else text)
    return said


def operations(rank: int, world: int, seed: int, stop: Callable[[], None]) -> None:
    """Operations of any kind without end; `stop` is called now and then."""
    chance, own = random.Random(seed), torch.rand(20_000)
    groups = [dist.group.WORLD, dist.new_group(list(range(world)))]
    gathered = torch.empty(world * 20_000)
    while True:
        stop()
        group, kind = groups[chance.randrange(2)], chance.randrange(8)
        count = chance.choice([1, 100, 20_000])
        tensor = own[:count].clone()
        if kind == 0:
            dist.all_reduce(tensor, group=group)
        elif kind == 1:
            works = [dist.all_reduce(tensor.clone(), group=group, async_op=True) for _ in range(3)]
            stop()
            [work.wait() for work in works]
        elif kind == 2:
            dist.all_gather_into_tensor(gathered[: world * count], tensor, group=group)
        elif kind == 3:
            dist.reduce_scatter_tensor(tensor, gathered[: world * count].clone(), group=group)
        elif kind == 4:
            dist.broadcast(tensor, chance.randrange(world), group=group)
        elif kind == 5:
            dist.barrier(group)
        elif kind == 6:
            dist.all_reduce(tensor, group=group, async_op=True).get_future().wait()
        else:
            ring = [
                dist.P2POp(dist.isend, tensor, (rank + 1) % world),
                dist.P2POp(dist.irecv, tensor.clone(), (rank - 1) % world),
            ]
            for work in dist.batch_isend_irecv(ring):
                work.wait()


def killed(world: int, seed: int) -> None:
    """One rank is killed at any moment; each survivor names it, though others leave before."""
    victim = random.Random(seed).randrange(world)

    def body(rank: int, world: int) -> str:
        dies_at = time.monotonic() + 0.01 + random.Random(seed + 1).random() * 0.1

        def stop() -> None:
            if rank == victim and time.monotonic() > dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            operations(rank, world, seed, stop)
        except dist.DistBackendError as error:
            return str(error)
        return "nothing was noticed"

    said = ranks(world, body)
    for rank, text in enumerate(said):
        if rank == victim:
            assert text == "signal 9", text
        else:
            assert f"rank {victim}" in text, f"rank {victim} was killed, and rank {rank} says: {text}"


def killed_in_ddp(world: int) -> None:
    """A job under DDP, whose C++ waits for the futures of works, fails with the same words."""

    def body(rank: int, world: int) -> str:
        torch.manual_seed(1)
        layers = [torch.nn.Linear(50, 50) for _ in range(4)]
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=0.01)
        try:
            for step in range(6):
                if rank == 1 and step == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                model(torch.rand(4, 50)).sum().backward()
        except RuntimeError as error:
            return str(error)
        return "nothing was noticed"

    said = ranks(world, body)
    assert all("lost rank 1" in text for rank, text in enumerate(said) if rank != 1), said


def late(world: int) -> None:
    """A group's limit ends its operations, and the late rank is named, also by those that see another
    leave first."""

    def body(rank: int, world: int) -> str:
        group = dist.new_group(list(range(world)), timeout=timedelta(milliseconds=500))
        if rank == 1:
            time.sleep(2)
            return "late"
        began = time.monotonic()
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except dist.DistBackendError as error:
            assert time.monotonic() - began < 1.8
            return str(error)
        return "nothing was noticed"

    said = ranks(world, body)
    assert all("rank 1" in text for rank, text in enumerate(said) if rank != 1), said
    assert any("timeout" in text for text in said), said


def late_at_a_barrier(world: int) -> None:
    """A monitored barrier names every rank that is late, on all that are not."""

    def body(rank: int, world: int) -> str:
        if rank in (1, world - 1):
            time.sleep(2)
            return "late"
        try:
            dist.monitored_barrier(timeout=timedelta(milliseconds=500))
        except dist.DistBackendError as error:
            return str(error)
        return "nothing was noticed"

    said = ranks(world, body)
    names = f"Ranks 1, {world - 1}" if world > 2 else "Rank 1"
    assert all(names in text for rank, text in enumerate(said) if rank not in (1, world - 1)), said


def mismatched(world: int) -> None:
    """A rank that calls something else is named."""

    def body(rank: int, world: int) -> str:
        try:
            dist.all_reduce(torch.ones(4 if rank == 1 else 5))
        except dist.DistBackendError as error:
            return str(error)
        return "nothing was noticed"

    said = ranks(world, body)
    assert all("4 × f32" in text and "5 × f32" in text for text in said), said


def others_run(world: int) -> None:
    """While a rank waits in a call, its other threads run."""
    import threading

    def body(rank: int, world: int) -> str:
        turns = [0]
        thread = threading.Thread(target=lambda: [turns.__setitem__(0, n) or time.sleep(0.001) for n in range(200)])
        if rank == 0:
            thread.start()
            dist.all_reduce(torch.ones(1))
            return f"turns {turns[0]}"
        time.sleep(1)
        dist.all_reduce(torch.ones(1))
        return ""

    said = ranks(world, body)
    assert int(said[0].split()[1]) > 10, said


def forked(world: int) -> None:
    """A forked child is refused by name, and its parent goes on."""

    def body(rank: int, world: int) -> str:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                dist.all_reduce(torch.ones(1))
            except dist.DistBackendError as error:
                code = 0 if "forked" in str(error) else 2
            os._exit(code)
        _, status = os.waitpid(child, 0)
        dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()
        return f"status {status}"

    assert ranks(world, body) == ["status 0"] * world


def several_hosts(world: int) -> None:
    """Ranks of several hosts are connected over TCP; where one cannot be, gloo moves their data, and
    all agree."""

    total = world * (world + 1) / 2
    kinds = []
    for broken in (False, True):

        def variables(rank: int) -> dict:
            own = {"PILLION_HOST": f"host-{2 * rank // world}", "PILLION_INTERFACE": "lo"}
            return {**own, "PILLION_INTERFACE": "nonesuch0"} if broken and rank == 1 else own

        def kind(rank: int, world: int) -> str:
            name = type(dist.group.WORLD).__name__
            tensor = torch.full((1000,), float(rank + 1))
            dist.all_reduce(tensor)
            dist.destroy_process_group()
            return f"{name} {tensor[0].item()}"

        kinds.append(ranks(world, kind, variables))
    assert kinds[0] == [f"PillionProcessGroup {total}"] * world, kinds[0]
    assert kinds[1] == [f"ProcessGroup {total}"] * world, kinds[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for check in (killed_in_ddp, late, late_at_a_barrier, mismatched, others_run, forked, several_hosts):
        check(options.ranks)
    for kill in range(options.kills):
        killed(options.ranks, options.seed + kill)
    print(f"failures of {options.ranks} ranks, {options.kills} kills: well")


if __name__ == "__main__":
    main()
