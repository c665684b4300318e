"""`NormTest` beside gradients that are computed one by one, and beside jobs without it.

`torchrun --standalone --nproc-per-node 2 norm_test.py [BACKEND]`
"""

import json
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Optional

import torch
import torch.distributed as dist
from model import Llama
from pillion.batch import Controller, settings
from pillion.torch import NormTest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

STEPS = 3


def seeded(frozen: bool = False, dtype: torch.dtype = torch.float32) -> Llama:
    torch.manual_seed(7)
    model = Llama(blocks=2).to(dtype)
    if frozen:
        model.embedding.requires_grad_(False)
        model.blocks[0].down.requires_grad_(False)
    return model


def tokens(step: int, rank: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + number)
    return torch.randint(512, (2, 17), generator=generator)


class Counted:
    """Counts the collectives of this process while it is open."""

    NAMES = [
        "all_reduce",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
        "all_gather_into_tensor",
        "all_gather_single",
        "broadcast",
        "barrier",
    ]

    def __enter__(self) -> "Counted":
        self.profile = torch.profiler.profile()
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        names = [event.name for event in self.profile.events()]
        self.count = sum(":" in name and name.split(":")[0] in ("gloo", "pillion") for name in names)


def train(
    wrap: Callable[[nn.Module], nn.Module],
    rounds: int,
    synced: bool,
    test: Optional[dict],
    frozen: bool = False,
    dtype: torch.dtype = torch.float32,
    limit: float = 0.5,
) -> tuple[list[torch.Tensor], list[dict], int]:
    """The gradients of each step, clipped; what the norm test decided; collectives of the last step."""
    model = wrap(seeded(frozen, dtype))
    norm_test = NormTest(model, **test) if test is not None else None
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    rank, world = dist.get_rank(), dist.get_world_size()
    gradients, decisions, counted = [], [], Counted()
    for step in range(STEPS):
        with counted:
            for number in range(rounds):
                last = number + 1 == rounds
                if isinstance(model, FSDPModule):
                    model.set_requires_gradient_sync(synced or last)
                    (model(tokens(step, rank, number)) / rounds).backward()
                elif last:
                    (model(tokens(step, rank, number)) / rounds).backward()
                else:
                    with model.no_sync():
                        (model(tokens(step, rank, number)) / rounds).backward()
            if norm_test is None:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
                norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            else:
                norm = norm_test.clip_grad_norm_(limit)
        for parameter in model.parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                gradients.append((grad.to_local() if isinstance(grad, DTensor) else grad).clone())
        gradients.append(norm.clone())
        if norm_test is not None:
            norm_test.step(2 * rounds * world)
            decisions.append(norm_test.decision)
        optimizer.step()
        optimizer.zero_grad()
    return gradients, decisions, counted.count


def brute_force(
    rounds: int, synced: bool, frozen: bool, dtype: torch.dtype, reduced: torch.dtype
) -> list[tuple[float, float]]:
    """(variance of a sample's gradient, square norm of the mean) of each step, from the gradient of
    each group alone, in f64."""
    model, world = seeded(frozen, dtype), dist.get_world_size()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, results = torch.optim.SGD(trained, lr=0.05), []
    for step in range(STEPS):
        groups = []
        for rank in range(world):
            sums = [torch.zeros(p.shape, dtype=p.dtype) for p in trained]
            for number in range(rounds):
                loss = model(tokens(step, rank, number)) / rounds
                for total, grad in zip(sums, torch.autograd.grad(loss, trained)):
                    total += grad
                if synced or number + 1 == rounds:
                    groups.append([total.to(reduced).double() for total in sums])
                    sums = [torch.zeros(p.shape, dtype=p.dtype) for p in trained]
        flat = torch.stack([torch.cat([part.flatten() for part in group]) for group in groups])
        # The step's gradient is the mean over ranks of their sums over rounds.
        mean, count, samples = flat.sum(0) / world, len(groups), 2 * rounds * world
        # A group's mean gradient is count/world of what it gives; of samples/count samples.
        own = flat * count / world
        variance = (own - mean).square().sum().item() / (count - 1) * samples / count
        results.append((variance, mean.square().sum().item()))
        norm = mean.norm()
        offset = 0
        for parameter in trained:
            part = mean[offset : offset + parameter.numel()].view_as(parameter)
            parameter.grad = (part * min(1.0, 0.5 / (norm + 1e-6))).to(parameter.dtype)
            offset += parameter.numel()
        optimizer.step()
    return results


def sharded(shape: tuple[int, ...], names: tuple[str, ...], reduced: torch.dtype = torch.float32) -> Callable:
    def wrap(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        policy = MixedPrecisionPolicy(reduce_dtype=reduced)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    return wrap


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, bucket_cap_mb=0.1)


def compiled(model: nn.Module) -> nn.Module:
    """FSDP2 whose blocks are compiled. By the compiler that changes no number."""
    for block in model.blocks:
        block.compile(backend="eager")
    return sharded((dist.get_world_size(),), ("shard",))(model)


def scaled(model: nn.Module) -> nn.Module:
    """FSDP2 with a divisor of its own, which only Pillion's backend has an operator for."""
    wrapped = sharded((dist.get_world_size(),), ("shard",))(model)
    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(dist.get_world_size()))
    return wrapped


def check(
    name: str,
    wrap: Callable,
    rounds: int = 1,
    synced: bool = True,
    frozen: bool = False,
    dtype: torch.dtype = torch.float32,
    reduced: torch.dtype = torch.float32,
    added: int = 0,
) -> None:
    world = dist.get_world_size()
    given = dict(eta=0.3, base=2 * rounds * world, cap=1 << 20, ema_decay=0.0, growth_limit=1e9)
    stock, _, stock_count = train(wrap, rounds, synced, None, frozen, dtype)
    ours, decisions, count = train(wrap, rounds, synced, given, frozen, dtype)
    assert count == stock_count + added, f"{name}: {count} collectives, and {stock_count} without the test"
    exact = world == 2 or dist.get_backend() == "pillion"
    for mine, plain in zip(ours, stock, strict=True):
        if exact:
            assert torch.equal(mine, plain), f"{name}: gradients differ by {(mine - plain).abs().max()}"
    # Relative to the sums themselves, because the variance is a difference of two. An element of a
    # gradient differs from the reference's by the roundings of its sums over rounds and ranks and of
    # the weights that earlier steps updated: at most 16 units of 2^-24 here, twice of a square. What
    # travels in bf16 is rounded to 2^-9, the reference's summands and the reduced sum once each.
    bound = 32 * 2**-24 if dtype.itemsize >= 4 and reduced.itemsize >= 4 else 4 * 2**-9
    for decision, (variance, square) in zip(decisions, brute_force(rounds, synced, frozen, dtype, reduced)):
        assert decision.unusable is None, f"{name}: {decision}"
        assert abs(decision.variance - variance) <= bound * (variance + square), f"{name}: {decision}, {variance}"
        assert abs(decision.square_norm - square) <= bound * square, f"{name}: {decision}, {square}"
        wanted = decision.variance / (0.3**2 * decision.square_norm)
        assert abs(decision.wanted - wanted) <= 1e-12 * wanted


def saved_and_logged() -> None:
    """A state goes on as if nothing had been; the log has the sums that lead to each decision."""
    world, folder = dist.get_world_size(), [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    log = Path(folder[0], "log.jsonl")
    model = ddp(seeded())
    test = NormTest(model, eta=0.3, cap=512, log=log, rule=None)
    batches, states = [], []
    for step in range(4):
        model.zero_grad()
        model(tokens(step, dist.get_rank(), 0)).backward()
        test.clip_grad_norm_(1.0)
        states.append(json.loads(json.dumps(test.state_dict())))
        batches.append(test.step(2 * world))
    assert batches == sorted(batches) and test.batch == batches[-1]
    dist.barrier()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    again = Controller(settings(2 * world, 512, eta=0.3))
    for line, batch in zip(lines, batches):
        decided = again.observe(
            groups=line["groups"],
            samples=line["batch_samples"],
            tokens=line["batch_tokens"],
            group_square_norms=line["group_square_norms"],
            square_norm=line["sum_square_norm"],
        )
        assert decided.batch == batch and decided.reason == line["decision"], (decided, line)
    resumed = Controller(settings(2 * world, 512, eta=0.3), states[2]["controller"])
    line = lines[2]
    decided = resumed.observe(
        groups=line["groups"],
        samples=line["batch_samples"],
        tokens=line["batch_tokens"],
        group_square_norms=line["group_square_norms"],
        square_norm=line["sum_square_norm"],
    )
    assert decided.batch == batches[2]


def refusals() -> None:
    def refused(call: Callable, words: str) -> None:
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"nothing was refused; expected {words!r}")

    refused(lambda: NormTest(seeded(), eta=0.5), "fully_shard")
    refused(lambda: NormTest(ddp(seeded()), eta=1.5), "eta")
    model = ddp(seeded())
    test = NormTest(model, eta=0.5)
    model(tokens(0, dist.get_rank(), 0)).backward()
    test.clip_grad_norm_(1.0)
    refused(lambda: test.clip_grad_norm_(1.0), "twice")
    test.step(8)
    model = ddp(seeded())
    test = NormTest(model, eta=0.5)
    refused(lambda: test.step(8), "clip_grad_norm_")
    for number in range(2):
        model(tokens(0, dist.get_rank(), number)).backward()
    refused(lambda: test.clip_grad_norm_(1.0), "no_sync")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group(sys.argv[1] if sys.argv[1:] else "pillion", timeout=timedelta(seconds=120))
    world = dist.get_world_size()
    flat, bf16 = sharded((world,), ("shard",)), torch.bfloat16
    check("FSDP2", flat)
    check("FSDP2, reducing in every round", flat, rounds=3)
    check("FSDP2, reducing in the last round", flat, rounds=3, synced=False)
    check("FSDP2, frozen parameters", flat, frozen=True)
    check("FSDP2, reducing in bf16", sharded((world,), ("shard",), bf16), reduced=bf16)
    check("HSDP of one replica", sharded((1, world), ("replicate", "shard")))
    check("HSDP of one shard", sharded((world, 1), ("replicate", "shard")), rounds=2, added=1)
    if world == 4:
        check("HSDP", sharded((2, 2), ("replicate", "shard")), rounds=2)
    check("DDP", ddp)
    check("DDP, accumulating", ddp, rounds=3, synced=False)
    check("DDP, frozen parameters", ddp, frozen=True)
    check("DDP in bf16", ddp, dtype=bf16, reduced=bf16)
    check("DDP in f64", ddp, dtype=torch.float64, reduced=torch.float64)
    check("FSDP2 with a divisor", scaled)
    check("FSDP2, compiled", compiled)
    saved_and_logged()
    refusals()
    dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        print(f"NormTest of {world} ranks: well")


if __name__ == "__main__":
    main()
