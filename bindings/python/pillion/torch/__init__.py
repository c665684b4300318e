"""Pillion as a backend of `torch.distributed`: `init_process_group("pillion")`.

From PyTorch 2.15 on, no import is needed. Before, `import pillion.torch` comes first.
"""

from __future__ import annotations

import torch.distributed as _dist

from .groups import any_source as _any_source
from .groups import create
from .norm_test import NormTest

__all__ = ["NormTest", "register"]


def register() -> None:
    """Tells PyTorch of the backend. Importing this module has done it."""
    if "PILLION" not in _dist.Backend._plugins:
        _dist.Backend.register_backend("pillion", create, extended_api=True, devices=["cpu"])
        _any_source()


register()
