"""Batch sizes that follow the noise of the gradient, for any trainer.

A step's gradient is a mean over groups: a group is what one rank summed between two reductions. The
noise of the gradient follows from two sums over them (the documentation of the crate `pillion-abs`
derives it). A `Controller` takes them in after every step, and says the batch of the next one.
Every rank asks a controller of its own with the same sums, and decides alike.
"""

from __future__ import annotations

import ctypes
import json
import math
from dataclasses import dataclass
from typing import Any, Optional

from . import _library
from ._library import check, lib


@dataclass(frozen=True)
class Decision:
    """What a controller decided. Numbers that a step does not tell are None."""

    batch: int
    """Samples of the next step."""
    noise_scale: Optional[float]
    """Smoothed gradient noise scale in samples (McCandlish et al. 2018)."""
    wanted: Optional[float]
    """What the rule asked for in samples, before limits."""
    variance: Optional[float]
    """This step's variance of one sample's gradient, summed over parameters."""
    square_norm: Optional[float]
    """This step's square norm of the mean gradient."""
    debiased_square_norm: Optional[float]
    """The same less the noise that it contains."""
    reason: str
    """Why the batch is what it is: scheduled, unusable, between-tests, no-gradient, sufficient,
    waiting, at-cap, grown or shrunk."""
    unusable: Optional[str]
    """Why the step's sums say nothing, where they do not."""


def settings(
    base: int,
    cap: int,
    *,
    round_to: int = 1,
    rule: Any = None,
    eta: Optional[float] = None,
    variant: str = "unbiased",
    growth_limit: float = 2.0,
    patience: int = 1,
    ema_decay: float = 0.9,
    interval: int = 1,
    monotone: bool = True,
) -> dict[str, Any]:
    """Settings of a controller; batches count samples.

    Without `rule` it is the norm test with `eta` (0.9 by default; Lau et al. 2025): the batch grows
    while its gradient's noise exceeds eta times the gradient. Other rules are "constant",
    {"noise-scale": {"ratio": r}}, {"stagewise": {"stages": [{"batch": b, "share": s}, …], "horizon":
    samples}} and {"linear-ramp": {"end": b, "samples": s}}.
    """
    if rule is None:
        rule = {"norm-test": {"eta": 0.9 if eta is None else eta, "variant": variant}}
    elif eta is not None:
        raise ValueError("give eta, or another rule")
    return {
        "base": base,
        "cap": cap,
        "round_to": round_to,
        "growth_limit": growth_limit,
        "patience": patience,
        "ema_decay": ema_decay,
        "interval": interval,
        "monotone": monotone,
        "rule": rule,
    }


class Controller:
    """Chooses the batch of each step."""

    def __init__(self, settings: dict[str, Any], state: Optional[dict[str, Any]] = None) -> None:
        """`state` is that of a saved controller; the settings must allow its batch.

        Raises `pillion.InvalidArgument`, which names the setting and a remedy."""
        handle = ctypes.c_void_p()
        try:
            given = json.dumps(settings, allow_nan=False).encode()
            saved = None if state is None else json.dumps(state, allow_nan=False).encode()
        except ValueError as error:
            raise _library.InvalidArgument(f"a setting is not finite, in {settings}") from error
        check(lib.pillion_controller_new(given, saved, ctypes.byref(handle)))
        self._handle = handle.value
        self.settings = settings

    @property
    def batch(self) -> int:
        """Samples of the next step."""
        return lib.pillion_controller_batch(self._handle)

    def observe(
        self,
        *,
        groups: int,
        samples: int,
        group_square_norms: float,
        square_norm: float,
        tokens: Optional[int] = None,
        non_finite: int = 0,
    ) -> Decision:
        """Takes in a step, and decides on the next one. To be called once for every step.

        `group_square_norms` is the sum over groups of |G|²/n, where G is the gradient of the loss
        summed over the group's n tokens (or samples, without `tokens`); `square_norm` is |sum of
        all G|². Both before clipping."""
        counts = {"groups": groups, "samples": samples, "tokens": samples if tokens is None else tokens}
        whole = [_library.count(name, value) for name, value in counts.items()]
        others = _library.count("non_finite", non_finite)
        given = _library.Observation(*whole, group_square_norms, square_norm, others)
        decided = _library.Decision()
        check(lib.pillion_observe(self._handle, given, ctypes.byref(decided)))
        known = lambda value: None if math.isnan(value) else value
        return Decision(
            decided.batch,
            known(decided.noise_scale),
            known(decided.wanted),
            known(decided.variance),
            known(decided.square_norm),
            known(decided.debiased_square_norm),
            decided.reason.decode(),
            decided.unusable.decode() if decided.unusable else None,
        )

    def observe_means(
        self,
        *,
        groups: int,
        samples: int,
        mean_group_square_norm: float,
        square_norm: float,
        non_finite: int = 0,
    ) -> Decision:
        """As `observe`, for groups of equal size: `mean_group_square_norm` is the mean over groups of
        |g|², where g is the mean gradient of a group's samples, and `square_norm` the |mean of all
        g|², which the optimizer sees."""
        return self.observe(
            groups=groups,
            samples=samples,
            # G = n·g with n = samples/groups: the sum of n·|g|², and |sum of n·g|².
            group_square_norms=samples * mean_group_square_norm,
            square_norm=samples * samples * square_norm,
            non_finite=non_finite,
        )

    def skip(self, samples: int) -> None:
        """Passes over samples that no step has learnt from: schedules go on as if one had."""
        check(lib.pillion_controller_skip(self._handle, _library.count("samples", samples)))

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers, of numbers and texts: a controller made of it decides the same."""
        return json.loads(lib.pillion_controller_state(self._handle))

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None and lib is not None:
            lib.pillion_controller_free(handle)
            self._handle = None


def square_norm(elements: Any) -> tuple[float, int]:
    """The sum of the squares of the finite elements of an f32 buffer (an array of NumPy's, say),
    summed in f64, and the number of the others."""
    view = memoryview(elements)
    if view.format != "f" or not view.contiguous:
        raise TypeError(f"a buffer of format {view.format!r}: give contiguous float32")
    count = view.nbytes // 4
    memory = (ctypes.c_float * count).from_buffer(view) if count and not view.readonly else None
    if memory is None and count:
        raise TypeError("a buffer that is read-only: give a writable one")
    return _square_norm(ctypes.addressof(memory) if memory is not None else None, count, _library.F32)


def _square_norm(address: Optional[int], count: int, dtype: int) -> tuple[float, int]:
    total, others = ctypes.c_double(), ctypes.c_uint64()
    tensor = _library.Tensor(address, count, dtype)
    check(lib.pillion_square_norm(tensor, ctypes.byref(total), ctypes.byref(others)))
    return total.value, others.value
