"""How a job's gradients are looked at on their way into a reduction. Nothing that is reduced changes."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import nn

from .. import _library, batch
from . import riders

_CODES = {torch.float32: _library.F32, torch.bfloat16: _library.BF16}


def square_norm(flat: torch.Tensor) -> torch.Tensor:
    """|x|², one f64 on the tensor's device; NaN where an element is not finite."""
    code = _CODES.get(flat.dtype)
    if flat.device.type == "cpu" and code is not None and flat.is_contiguous():
        total, others = batch._square_norm(flat.data_ptr(), flat.numel(), code)
        return torch.tensor(float("nan") if others else total, dtype=torch.float64)
    # Short blocks in f32, and their sums in f64: in f32 alone the difference that the test needs is
    # lost in a sum of millions.
    flat = flat.detach().reshape(-1)
    whole = flat.numel() // 1024 * 1024
    wide = torch.promote_types(flat.dtype, torch.float32)
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, 1024), dim=1, dtype=wide)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=wide)
    return blocks.double().square().sum() + rest.double().square()


class FsdpTap:
    """Takes the place of how one group of FSDP2's parameters reduces its gradients, and has that do
    the work."""

    def __init__(self, group: Any, owner: "FsdpTaps") -> None:
        self._inner, self._group, self._owner = group._reduce_scatter_comm, group, owner
        self._allocated: list[torch.Tensor] = []
        self.rounds = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        tensor = self._inner.allocate(size, dtype=dtype, device=device)
        if self._owner.shards == 1:
            # FSDP2 reduces nothing then, so nobody calls this. It asks for the input, fills it, and
            # asks for the output.
            self._allocated.append(tensor)
            if len(self._allocated) == 2:
                self._add(self._allocated[0])
                self._allocated = []
        return tensor

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False) -> Any:
        self._add(input_tensor)
        return self._inner(output_tensor, input_tensor, group, op, async_op)

    def _add(self, gradient: torch.Tensor) -> None:
        if gradient.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"FSDP2 scales gradients that it reduces in {gradient.dtype}, so the norm test cannot tell "
                "their sizes: set reduce_dtype=torch.bfloat16 or torch.float32"
            )
        self.rounds += 1
        factor = self._group.gradient_divide_factor or self._owner.world
        self._owner.add(square_norm(gradient) / factor**2)

    def remove(self) -> None:
        self._group._reduce_scatter_comm = self._inner


class FsdpTaps:
    """Of a model with FSDP2. The sum over ranks rides on the reduction that clipping makes."""

    def __init__(self, model: nn.Module, groups: list[Any]) -> None:
        mesh = groups[0].mesh_info.mesh
        for group in groups:
            if group.mesh_info.mesh != mesh:
                raise ValueError("NormTest needs one device mesh for all of the model")
            if not hasattr(group, "_reduce_scatter_comm"):
                raise RuntimeError(f"NormTest needs FSDP2 of PyTorch 2.9 or newer, and this is {torch.__version__}")
        if any(getattr(p, "device_mesh", mesh).ndim != mesh.ndim for p in model.parameters()):
            raise ValueError("NormTest does not support tensor parallelism beside FSDP2")
        self.world = mesh.size()
        self.shards = mesh.size(mesh.ndim - 1) if hasattr(groups[0].mesh_info, "shard_mesh_size") else 1
        # Only the first replica counts; without shards, each rank is one.
        self._replica = mesh.get_local_rank(0) if mesh.ndim == 2 or self.shards == 1 else 0
        if mesh.ndim == 1:
            self._process_group = mesh.get_group()
        elif self.world == dist.get_world_size():
            self._process_group = dist.group.WORLD
        else:
            self._process_group = mesh._flatten().get_group()
        self._taps = [FsdpTap(group, self) for group in groups]
        for tap in self._taps:
            tap._group._reduce_scatter_comm = tap
        self._local: Optional[torch.Tensor] = None

    def add(self, number: torch.Tensor) -> None:
        self._local = number if self._local is None else self._local + number

    def reduce(self, grads: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """(norm of the gradient as PyTorch's clipping computes it, its square to decide by, sum over
        groups of |their share|², number of groups), by the one reduction that clipping makes anyway."""
        local = [grad.to_local() for grad in grads]
        # The operations of DTensor's norms: of each tensor, squared, summed over shards, and its root.
        own = torch.stack(torch._foreach_norm(local, 2.0)) ** 2
        if self._replica:
            own = torch.zeros_like(own)
        rank, number = dist.get_rank(self._process_group), self._local
        if number is None:
            number = torch.zeros((), dtype=torch.float64, device=own.device)
        both = torch.cat([own, riders.put(number, rank, self.world, own.dtype)])
        dist.all_reduce(both, group=self._process_group)
        norm = torch.linalg.vector_norm(both[: own.numel()] ** 0.5, 2.0)
        groups = self.world * max(tap.rounds for tap in self._taps)
        groups_sum = riders.total(both[own.numel() :], self.world)
        self.forget()
        return norm, norm.double().square(), groups_sum, groups

    def forget(self) -> None:
        self._local = None
        for tap in self._taps:
            tap.rounds, tap._allocated = 0, []

    def remove(self) -> None:
        for tap in self._taps:
            tap.remove()


class DdpTaps:
    """Of a model with DDP. The sum over ranks rides on the last bucket."""

    def __init__(self, model: nn.parallel.DistributedDataParallel) -> None:
        self._process_group = model.process_group
        self.world, self._rank = dist.get_world_size(self._process_group), dist.get_rank(self._process_group)
        self._local: Optional[torch.Tensor] = None
        self._total: Optional[torch.Tensor] = None
        self._reductions = 0
        model.register_comm_hook(self, DdpTaps._hook)

    @staticmethod
    def _hook(self, bucket):  # DDP compares annotations with classes, and these would be texts.
        flat = bucket.buffer()
        # As DDP does without a hook: divided before it is summed.
        flat.mul_(1.0 / self.world)
        number = square_norm(flat)
        self._local = number if self._local is None else self._local + number
        sum_ = lambda tensor: dist.all_reduce(tensor, group=self._process_group, async_op=True).get_future()
        if not bucket.is_last():
            return sum_(flat).then(lambda future: future.value()[0])
        self._reductions += 1
        rider = riders.put(self._local.to(flat.device), self._rank, self.world, flat.dtype)
        both = torch.cat([flat, rider])

        def done(future: torch.futures.Future) -> torch.Tensor:
            summed = future.value()[0]
            self._total = riders.total(summed[flat.numel() :], self.world)
            return flat.copy_(summed[: flat.numel()])

        return sum_(both).then(done)

    def reduce(self, grads: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2.0)), 2.0)
        # Its order may depend on a rank's threads; ranks must decide alike.
        square = torch.stack([square_norm(grad) for grad in grads]).sum()
        total, reductions = self._total, self._reductions
        self.forget()
        if reductions > 1:
            raise RuntimeError(
                f"DDP has reduced {reductions} times in this step, each time with the mean of the rounds before, so "
                "the norm test cannot tell the groups apart: wrap all rounds but the last in model.no_sync()"
            )
        if total is None:
            total = torch.zeros((), dtype=torch.float64)
        return norm, square, total, self.world

    def forget(self) -> None:
        self._local = self._total = None
        self._reductions = 0

    def remove(self) -> None:
        raise RuntimeError("DDP keeps its hook: wrap the model anew to be rid of the norm test")


def taps_of(model: nn.Module) -> Any:
    """How the gradients of this model are looked at."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return DdpTaps(model)
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        FSDPModule = ()  # type: ignore[assignment,misc]
    groups = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups += getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group])
    if groups:
        return FsdpTaps(model, groups)
    raise TypeError(f"{type(model).__name__} is neither sharded by fully_shard nor a DistributedDataParallel")
