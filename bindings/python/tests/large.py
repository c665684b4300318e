"""Tensors of 3 GiB, a thousand process groups, and what is left when all are gone.

`torchrun --standalone --nproc-per-node 2 large.py`
"""

import os
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist


def threads() -> list[str]:
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            names.append(open(f"/proc/self/task/{task}/comm").read().strip())
        except FileNotFoundError:
            pass  # It has just ended.
    return sorted(names)


def descriptors() -> list[str]:
    return sorted(
        os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{name}")
    )


def pages() -> int:
    return int(open("/proc/self/statm").read().split()[1])


def use(group: dist.ProcessGroup) -> None:
    world = dist.get_world_size(group)
    tensor = torch.ones(1000)
    dist.all_reduce(tensor, group=group)
    dist.all_reduce(tensor, group=group, async_op=True).get_future().wait()
    assert tensor[0] == world * world


def many_groups(rank: int, world: int) -> None:
    for _ in range(20):
        group = dist.new_group(list(range(world)))
        use(group)
        dist.destroy_process_group(group)
    before = (len(threads()), len(descriptors()), pages())
    for _ in range(1000):
        group = dist.new_group(list(range(world)))
        use(group)
        dist.destroy_process_group(group)
    after = (len(threads()), len(descriptors()), pages())
    assert after[:2] == before[:2], f"{before} threads, descriptors and pages, and then {after}"
    # PyTorch's own records of a group stay, some kilobytes each.
    assert after[2] - before[2] < 8192, f"{before} threads, descriptors and pages, and then {after}"


def three_gib(rank: int, world: int) -> None:
    count = 3 * (1 << 30) // 4
    tensor = torch.full((count,), float(rank + 1))
    dist.all_reduce(tensor)
    assert (
        tensor[0] == tensor[-1] == world * (world + 1) / 2
        and tensor.sum(dtype=torch.float64) == count * tensor[0].item()
    )
    tensor[-1] = rank
    dist.broadcast(tensor, world - 1)
    assert tensor[-1] == world - 1
    if rank == 0:
        dist.send(tensor, 1)
    elif rank == 1:
        tensor.zero_()
        dist.recv(tensor, 0)
        assert tensor[-1] == world - 1


def main() -> None:
    dist.init_process_group("pillion", timeout=timedelta(seconds=120))
    rank, world = dist.get_rank(), dist.get_world_size()
    use(dist.group.WORLD)
    many_groups(rank, world)
    three_gib(rank, world)
    dist.destroy_process_group()
    time.sleep(0.5)
    # What PyTorch has for its own store stays.
    left = [name for name in threads() if "pillion" in name] + [
        name for name in descriptors() if "memfd" in name or "event" in name
    ]
    assert not left, left
    folder = tempfile.gettempdir()
    for number in range(50):
        meeting = f"file://{folder}/pillion-large-{os.environ['TORCHELASTIC_RUN_ID']}-{number}"
        dist.init_process_group(
            "pillion", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        use(dist.group.WORLD)
        dist.destroy_process_group()
    if rank == 0:
        print("large tensors and many groups: well")


if __name__ == "__main__":
    main()
