"""What unmodified jobs of PyTorch do: each is run over gloo and over Pillion, by the same ranks, and
must give the same numbers: bit for bit with two ranks, whose sums have one order.

`torchrun --standalone --nproc-per-node 2 training.py [NAME …]`
"""

import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as checkpoint
from model import Llama
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

STEPS = 4


def batches(rank: int, rounds: int = 1) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(100 + rank)
    return [[torch.randint(512, (2, 33), generator=generator) for _ in range(rounds)] for _ in range(STEPS)]


def train(model: nn.Module, clip: bool = True, rounds: int = 1) -> list[float]:
    """Losses of a few steps, and the norms of their gradients."""
    optimizer, said = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for batch in batches(dist.get_rank(), rounds):
        for number, tokens in enumerate(batch):
            last = number + 1 == rounds
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
                loss = model(tokens)
                loss.backward()
            elif isinstance(model, DistributedDataParallel) and not last:
                with model.no_sync():
                    loss = model(tokens)
                    loss.backward()
            else:
                loss = model(tokens)
                loss.backward()
        said.append(loss.item())
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            said.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return said


def seeded() -> Llama:
    torch.manual_seed(7)
    return Llama()


def ddp(world: int) -> list[float]:
    return train(DistributedDataParallel(seeded(), bucket_cap_mb=0.1))


def ddp_accumulating(world: int) -> list[float]:
    return train(DistributedDataParallel(seeded(), gradient_as_bucket_view=True), rounds=3)


def ddp_static(world: int) -> list[float]:
    return train(DistributedDataParallel(seeded(), static_graph=True))


def sharded(mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> Llama:
    model, policy = seeded(), MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def fsdp(world: int) -> list[float]:
    return train(sharded(init_device_mesh("cpu", (world,))), rounds=2)


def fsdp_bf16(world: int) -> list[float]:
    return train(sharded(init_device_mesh("cpu", (world,)), torch.bfloat16))


def fsdp_arena(world: int) -> list[float]:
    model = sharded(init_device_mesh("cpu", (world,)))
    if dist.get_backend() == "pillion":
        model.set_allocate_memory_from_process_group_for_comm(True)
    return train(model)


def fsdp_sum(world: int) -> list[float]:
    model = sharded(init_device_mesh("cpu", (world,)))
    model.set_force_sum_reduction_for_comms(True)
    return train(model)


def hsdp(world: int) -> list[float]:
    return train(sharded(init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))))


def hsdp_replicated(world: int) -> list[float]:
    return train(sharded(init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))))


def tensor_parallel(world: int) -> list[float]:
    torch.manual_seed(3)
    mesh = init_device_mesh("cpu", (world,))
    model = nn.Sequential(nn.Linear(16, 12 * world), nn.GELU(), nn.Linear(12 * world, 8))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    given = torch.rand(5, 16, generator=torch.Generator().manual_seed(1))
    loss = model(given).square().mean()
    loss.backward()
    return [loss.item(), *[parameter.grad.full_tensor().square().sum().item() for parameter in model.parameters()]]


def dtensors(world: int) -> list[float]:
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(6.0 * world * 4).reshape(6 * world, 4)
    rows = distribute_tensor(whole, mesh, [Shard(0)])
    columns = distribute_tensor(torch.ones(4, 2 * world), mesh, [Shard(1)])
    product = rows.redistribute(placements=[Replicate()]) @ columns
    moved = product.redistribute(placements=[Shard(0)]).sum()
    return [moved.full_tensor().item(), rows.mean().full_tensor().item()]


def functional_collectives(world: int) -> list[float]:
    rank, group = dist.get_rank(), dist.group.WORLD
    own = torch.arange(4.0 * world) + rank
    scalar = functional.all_reduce(torch.tensor(rank + 1.5), "sum", group)
    several = functional.all_reduce_coalesced([own.clone(), own * 2], "sum", group)
    gathered = functional.all_gather_single(own, 0, group)
    scattered = functional.reduce_scatter_single(own, "sum", 0, group)
    together = functional.all_gather_single_coalesced([own, own[:2]], group)
    parts = functional.reduce_scatter_single_coalesced([own, own * 3], "sum", [0, 0], group)
    turned = functional.all_to_all_single(own, [4] * world, [4] * world, group)
    spread = functional.broadcast(own.clone(), 0, group)
    all = [scalar, *several, gathered, scattered, *together, *parts, turned, spread]
    return [tensor.double().sum().item() * (1 + index) for index, tensor in enumerate(all)]


def checkpoints(world: int) -> list[float]:
    model = sharded(init_device_mesh("cpu", (world,)))
    train(model)
    saved = {name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()}
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    first, second = Path(folder[0], "first"), Path(folder[0], "second")
    checkpoint.save(model.state_dict(), checkpoint_id=first)
    checkpoint.async_save(model.state_dict(), checkpoint_id=second).result()
    for place in (first, second):
        state = {name: torch.zeros_like(parameter) for name, parameter in model.state_dict().items()}
        checkpoint.load(state, checkpoint_id=place)
        for name, tensor in state.items():
            assert torch.equal(tensor.full_tensor(), saved[name]), f"{name} of {place}"
    return [tensor.double().sum().item() for tensor in saved.values()]


JOBS = [
    ddp,
    ddp_accumulating,
    ddp_static,
    fsdp,
    fsdp_bf16,
    fsdp_arena,
    fsdp_sum,
    hsdp,
    hsdp_replicated,
    tensor_parallel,
    dtensors,
    functional_collectives,
    checkpoints,
]


def premul_sum(world: int) -> None:
    """gloo has no PREMUL_SUM, so FSDP2 with a factor of its own is compared with the plain mean."""
    model, mean = sharded(init_device_mesh("cpu", (world,))), sharded(init_device_mesh("cpu", (world,)))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(2.0 * world)
    for tokens in batches(dist.get_rank())[0]:
        model(tokens).backward()
        mean(tokens).backward()
    for scaled, plain in zip(model.parameters(), mean.parameters()):
        # Halves are exact, and with two ranks the mean is one, too.
        bound = 0.0 if world == 2 else 4 * torch.finfo(torch.float32).eps
        error = (2 * scaled.grad.to_local() - plain.grad.to_local()).abs().max().item()
        assert error <= bound * plain.grad.to_local().abs().max().item(), error


def run(backend: str, jobs: list[Callable]) -> list[list[float]]:
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    world = dist.get_world_size()
    results = [job(world) for job in jobs]
    if backend == "pillion":
        premul_sum(world)
    dist.destroy_process_group()
    return results


def main() -> None:
    jobs = [job for job in JOBS if not sys.argv[1:] or job.__name__ in sys.argv[1:]]
    expected, actual, again = run("gloo", jobs), run("pillion", jobs), run("pillion", jobs)
    world = int(os.environ["WORLD_SIZE"])
    for job, gloo, ours, repeated in zip(jobs, expected, actual, again):
        name = job.__name__
        assert ours == repeated, f"{name}: {ours}, and then {repeated}"
        if world <= 2:
            assert ours == gloo, f"{name}: {ours}, and over gloo {gloo}"
        else:
            # Sums of at most 4 numbers in another order: up to 3 roundings of 2^-24 in a step, of as
            # many steps.
            bound = 3 * STEPS * 2**-24
            assert all(abs(a - b) <= bound * max(1.0, abs(b)) for a, b in zip(ours, gloo)), f"{name}: {ours}, {gloo}"
    if int(os.environ["RANK"]) == 0:
        print(f"{len(jobs)} jobs of {world} ranks: well", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
