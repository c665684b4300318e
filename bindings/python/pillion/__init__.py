"""Pillion: collectives between ranks, on memory of the caller.

    ranks = pillion.connect()
    ranks.all_reduce(array)

`pillion.torch` is the backend of `torch.distributed`, and `pillion.batch` chooses batch sizes.
"""

from ._connection import Store
from ._library import InvalidArgument, PeerLost, PillionError, TimedOut
from .communicator import Bfloat16, Communicator, Work, connect

__all__ = [
    "Bfloat16",
    "Communicator",
    "InvalidArgument",
    "PeerLost",
    "PillionError",
    "Store",
    "TimedOut",
    "Work",
    "connect",
]
