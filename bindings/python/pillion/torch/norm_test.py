"""The norm test for an unmodified job of PyTorch's, over any backend."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from torch import nn

from ..batch import Controller, Decision, settings
from .taps import taps_of

_LARGEST = 1 << 53


class NormTest:
    """Says how large the next batch should be, from the gradients that a job reduces anyway.

        test = NormTest(model, eta=0.5)
        …
        loss.backward()
        test.clip_grad_norm_(1.0)       # in place of torch.nn.utils.clip_grad_norm_
        optimizer.step()
        batch = test.step(samples)      # samples of this step, over all ranks

    `model` is sharded by `fully_shard` (FSDP2, HSDP) or wrapped in `DistributedDataParallel`. No
    collective is added, but for one of a few numbers in HSDP with a single shard, which clips
    without any. Gradients are those of a job without it, bit for bit, as far as the backend
    sums each element in an order that does not depend on how many there are: Pillion's does, and
    all do on two ranks. The loss of a rank is the mean over its samples, of which
    each rank has as many, divided by the number of rounds where gradients accumulate.

    Without `rule`, it is the norm test with `eta`; `batch.settings` lists other rules and limits.
    `base` is the smallest batch, and without it that of the first step. With `log`, rank 0 appends a
    line of JSON for each step.
    """

    def __init__(
        self,
        model: nn.Module,
        eta: Optional[float] = None,
        *,
        base: Optional[int] = None,
        cap: int = _LARGEST,
        log: Union[str, Path, None] = None,
        **others: Any,
    ) -> None:
        self._settings = {"eta": eta, "base": base, "cap": cap, **others}
        # Settings that cannot be are refused here, also those that wait for a base.
        first = self._make(others.get("round_to", 1) if base is None else base, None)
        self._controller: Optional[Controller] = None if base is None else first
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._taps = taps_of(model)
        self._log = Path(log) if log is not None and dist.get_rank() == 0 else None
        if self._log is not None:
            self._log.open("a").close()
        self._sums: Optional[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = None
        self._steps = 0
        self.decision: Optional[Decision] = None

    def _make(self, base: int, state: Optional[dict[str, Any]]) -> Controller:
        given = {**self._settings, "base": base}
        if given["cap"] == _LARGEST:
            step = max(1, given.get("round_to", 1))
            given["cap"] = _LARGEST // step * step
        return Controller(settings(**given), state)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float = float("inf"), error_if_nonfinite: bool = False) -> torch.Tensor:
        """Clips the gradients as `torch.nn.utils.clip_grad_norm_` does, and returns their norm
        before. To be called once in a step, also where nothing is to be clipped."""
        if self._sums is not None:
            raise RuntimeError("clip_grad_norm_ was called twice in a step: call step() after it, or reset()")
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if not grads:
            raise RuntimeError("no parameter has a gradient: call this after backward()")
        self._sums = self._taps.reduce(grads)
        norm = self._sums[0]
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(f"the norm of the gradients is {norm.item()}: nothing was clipped")
        local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
        torch._foreach_mul_(local, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def step(self, samples: int) -> int:
        """Takes in the step that just ran, of `samples` samples over all ranks; returns the batch of
        the next one. All ranks get the same."""
        if self._sums is None:
            raise RuntimeError("call clip_grad_norm_ in every step, before step(); without clipping, with no limit")
        norm, square, groups_sum, groups = self._sums
        self._sums = None
        if self._controller is None:
            self._controller = self._make(samples, None)
        square, total = torch.stack([square.double(), groups_sum.to(square.device)]).tolist()
        finite = math.isfinite(square) and math.isfinite(total)
        self._steps += 1
        sums = {
            "groups": groups,
            # A group's gradient of summed loss is samples · its share of the mean: see `observe`.
            "group_square_norms": float(groups) * samples * total,
            "square_norm": float(samples) * samples * square,
        }
        self.decision = self._controller.observe(samples=samples, non_finite=0 if finite else 1, **sums)
        if self._log is not None:
            self._write(samples, norm.item(), sums)
        return self.decision.batch

    def reset(self) -> None:
        """Forgets what a step has reduced so far: for a step that failed, whose gradients go nowhere."""
        self._sums = None
        self._taps.forget()

    def _write(self, samples: int, norm: float, sums: dict[str, float]) -> None:
        # JSON has no number that is not finite.
        finite = lambda number: number if math.isfinite(number) else None
        line = {
            "step": self._steps,
            "grad_norm": finite(norm),
            "batch_samples": samples,
            "batch_tokens": samples,
            "groups": sums["groups"],
            "group_square_norms": finite(sums["group_square_norms"]),
            "sum_square_norm": finite(sums["square_norm"]),
            "noise_scale": self.decision.noise_scale,
            "wanted_batch": self.decision.wanted,
            "decision": self.decision.reason,
        }
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @property
    def batch(self) -> Optional[int]:
        """Samples of the next step; None before the first one where no `base` was given."""
        return None if self._controller is None else self._controller.batch

    def state_dict(self) -> dict[str, Any]:
        """What to save with a checkpoint: numbers and texts."""
        state = None if self._controller is None else self._controller.state_dict()
        base = None if self._controller is None else self._controller.settings["base"]
        return {"steps": self._steps, "base": base, "controller": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state; later batches are those of a run that was not interrupted."""
        controller = None
        if state["controller"] is not None:
            controller = self._make(state["base"], state["controller"])
        self._steps, self._controller = state["steps"], controller

    def remove(self) -> None:
        """Gives the model back as it was; DDP keeps its hook, and says so."""
        self._taps.remove()
