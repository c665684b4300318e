"""Pillion under PyTorch beside gloo: collectives, steps of FSDP2, the cost of a call, the norm test.

    torchrun --standalone --nproc-per-node 2 benches/peers/under_pytorch.py [collectives] [edge] [steps] [norm-test]

The two take turns within one process; a ratio is that of medians of one run. Needs the package
pillion and PyTorch, which `ci/python` installs.
"""

import os
import platform
import sys
import time
from pathlib import Path
from statistics import median
from typing import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[2] / "bindings" / "python" / "tests"))
from model import Llama  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "15"))


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def alternate(programs: dict[str, Callable[[], None]], rounds: int, each: int = 1) -> dict[str, float]:
    """Median seconds of each program, of the slowest rank, the programs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 2):
        for name, program in programs.items():
            dist.barrier()
            began = time.perf_counter()
            for _ in range(each):
                program()
            slowest = torch.tensor((time.perf_counter() - began) / each)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if number >= 2:
                times[name].append(slowest.item())
    return {name: median(values) for name, values in times.items()}


def collectives(groups: dict[str, dist.ProcessGroup]) -> None:
    world, count = dist.get_world_size(), 3_200_000
    backend = groups["pillion"]._get_backend(torch.device("cpu"))
    arena = lambda size: backend.allocate_tensor(size, dtype=torch.float32)
    memory = {"gloo": torch.empty, "pillion": torch.empty, "arena": arena}
    say(f"\n12.8 MB, {world} ranks            gloo    pillion      arena   gloo/pillion   gloo/arena")
    # FSDP2 gathers in place: the shard is a part of what it is gathered into.
    for name in ("all_gather", "all_gather in place", "reduce_scatter", "all_reduce"):
        programs = {}
        for kind, make in memory.items():
            whole, part = make(count), make(count // world)
            whole.fill_(1.0), part.fill_(1.0)
            group = groups["gloo" if kind == "gloo" else "pillion"]
            rank = dist.get_rank()
            placed = whole[rank * (count // world) : (rank + 1) * (count // world)]
            programs[kind] = {
                "all_gather in place": lambda w=whole, p=placed, g=group: dist.all_gather_into_tensor(w, p, group=g),
                "all_gather": lambda w=whole, p=part, g=group: dist.all_gather_into_tensor(w, p, group=g),
                "reduce_scatter": lambda w=whole, p=part, g=group: dist.reduce_scatter_tensor(p, w, group=g),
                "all_reduce": lambda w=whole, g=group: dist.all_reduce(w, dist.ReduceOp.MAX, group=g),
            }[name]
        took = alternate(programs, ROUNDS, each=3)
        gloo, ours, placed = (1e3 * took[kind] for kind in memory)
        say(f"{name:24} {gloo:8.2f} ms {ours:7.2f} ms {placed:7.2f} ms {gloo / ours:12.2f} {gloo / placed:12.2f}")


def edge(groups: dict[str, dist.ProcessGroup]) -> None:
    """A call on a group of this rank alone, in which nobody waits."""
    tensor = torch.ones(1)
    alone = {name: dist.new_group([dist.get_rank()], backend=name, use_local_synchronization=True) for name in groups}
    calls = {name: lambda g=group: dist.all_reduce(tensor, group=g) for name, group in alone.items()}
    calls["pillion, async"] = lambda: dist.all_reduce(tensor, group=alone["pillion"], async_op=True).wait()
    took = alternate(calls, ROUNDS, each=2000)
    say(
        "\na call of dist.all_reduce on one element and one rank: "
        + ", ".join(f"{name} {1e6 * value:.1f} us" for name, value in took.items())
    )


class Trainer:
    """A sharded Llama of 29.9 million parameters, over one group."""

    def __init__(
        self, group: dist.ProcessGroup, batch: int, length: int, arena: bool, clip: bool = False, test: bool = False
    ) -> None:
        torch.manual_seed(1)
        self.model = Llama(vocabulary=10368, width=512, heads=8, blocks=6)
        mesh = DeviceMesh.from_group(group, "cpu")
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        if arena:
            self.model.set_allocate_memory_from_process_group_for_comm(True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.tokens = torch.randint(
            10368, (batch, length + 1), generator=torch.Generator().manual_seed(dist.get_rank())
        )
        self.clip = clip
        self.test = None
        if test:
            from pillion.torch import NormTest

            self.test = NormTest(self.model, eta=0.5)

    def step(self) -> None:
        self.model(self.tokens).backward()
        if self.test is not None:
            self.test.clip_grad_norm_(1.0)
            self.test.step(len(self.tokens) * dist.get_world_size())
        elif self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def steps(groups: dict[str, dist.ProcessGroup]) -> None:
    say("\na step of FSDP2, Llama of 29.9 M    gloo    pillion      arena   gloo/pillion   gloo/arena")
    for batch, length in ((1, 128), (1, 256), (4, 256)):
        trainers = {
            "gloo": Trainer(groups["gloo"], batch, length, False),
            "pillion": Trainer(groups["pillion"], batch, length, False),
            "arena": Trainer(groups["pillion"], batch, length, True),
        }
        took = alternate({name: trainer.step for name, trainer in trainers.items()}, ROUNDS)
        gloo, ours, placed = (1e3 * took[name] for name in trainers)
        tokens = f"{batch} x {length} tokens a rank"
        say(f"{tokens:31} {gloo:6.0f} ms {ours:7.0f} ms {placed:7.0f} ms {gloo / ours:12.2f} {gloo / placed:12.2f}")


def norm_test(groups: dict[str, dist.ProcessGroup]) -> None:
    trainers = {
        "clip_grad_norm_": Trainer(groups["pillion"], 1, 256, True, clip=True),
        "NormTest": Trainer(groups["pillion"], 1, 256, True, test=True),
    }
    took = alternate({name: trainer.step for name, trainer in trainers.items()}, 2 * ROUNDS)
    plain, tested = took.values()
    cost = 100 * (tested / plain - 1)
    say(f"\na step of 1 x 256 tokens: {1e3 * plain:.1f} ms clipped by PyTorch, {1e3 * tested:.1f} ms with NormTest")
    say(f"NormTest costs {cost:+.2f} % of the step")
    # What it adds, by itself: the square norm of each reduced gradient.
    model = trainers["NormTest"].model
    flat = [torch.rand(sum(p.numel() for p in block.parameters())) for block in (*model.blocks, model)]
    from pillion.torch.taps import square_norm

    took = alternate({"norms": lambda: [square_norm(gradient) for gradient in flat]}, ROUNDS)
    say(f"the square norms alone: {1e3 * took['norms']:.2f} ms, {100 * took['norms'] / plain:.2f} % of the step")


def main() -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"]))
    torch.set_num_threads(threads)
    dist.init_process_group("gloo")
    groups = {"gloo": dist.group.WORLD, "pillion": dist.new_group(backend="pillion")}
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    isa = open("/proc/cpuinfo").read().split("flags", 1)[1].split("\n", 1)[0].split()
    best = "AVX-512" if "avx512f" in isa else "AVX2"
    say(f"# {model}, {best}, {os.cpu_count()} processors, {threads} threads a rank")
    say(f"# kernel {platform.release()}, torch {torch.__version__}")
    wanted = sys.argv[1:] or ["collectives", "edge", "steps", "norm-test"]
    for name in wanted:
        {"collectives": collectives, "edge": edge, "steps": steps, "norm-test": norm_test}[name](groups)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
