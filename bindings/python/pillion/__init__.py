"""Pillion: collectives between ranks, on memory of the caller.

`pillion.torch` is the backend of `torch.distributed`, and `pillion.batch` chooses batch sizes.
"""

from ._library import InvalidArgument, PeerLost, PillionError, TimedOut

__all__ = ["InvalidArgument", "PeerLost", "PillionError", "TimedOut"]
