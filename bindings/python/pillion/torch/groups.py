"""Process groups: how their ranks meet, and the two ways in which PyTorch takes a backend.

Since 2.15 a backend in Python can be one of several of a process group, which is what
"cpu:pillion,cuda:nccl" needs. Before, it is the whole process group.
"""

from __future__ import annotations

import os
from typing import Any, Optional

import torch
import torch.distributed as dist

from .._connection import Connection
from .._library import PillionError
from .backend import Collectives
from .meeting import Meeting

_C10d = torch._C._distributed_c10d

# The group of all ranks, of which others are made.
_root: Optional[Connection] = None
# C++ does not always keep the Python half of a backend.
_alive: set[Any] = set()


def _is_one_of_several() -> bool:
    """Whether a process group is made with Pillion as one of its backends.

    PyTorch loses some of what works in Python say then (`is_completed`), and each call costs it
    some microseconds more. So Pillion is the whole group where there is no other memory than the
    host's. PILLION_TORCH=backend or group chooses, for tests and measurements."""
    version = [int("".join(filter(str.isdigit, part)) or 0) for part in torch.__version__.split(".")[:2]]
    if version < [2, 15]:
        return False
    choice = os.environ.get("PILLION_TORCH", "")
    if choice not in ("", "backend", "group"):
        raise ValueError(f"PILLION_TORCH is {choice!r}: give backend or group, or leave it out")
    return choice == "backend" or (choice == "" and torch.accelerator.is_available())


def connect(opts: Any) -> Optional[Connection]:
    """The ranks of a group that PyTorch makes, connected; None where they are on several hosts and
    have no way to each other but gloo's."""
    global _root
    seconds = opts.timeout.total_seconds()
    members = list(getattr(opts, "global_ranks_in_group", None) or [])
    if members and _root is not None and _root.handle is not None:
        try:
            return _root.group(members)
        except PillionError as error:
            text = (
                f"ranks {members} cannot make a group, because they do not come, or the group of all ranks has failed"
            )
            raise dist.DistBackendError(f"{text}: {error}") from error
    meeting = Meeting(opts.store, opts.group_rank, opts.group_size, opts.timeout)
    connection = meeting.connect(seconds)
    if not members:
        _root = connection
    return connection


class _Group(Collectives):
    # Whether a call that is complete returns work all the same: older versions of PyTorch wait for
    # what a process group returns, and for nothing of a backend's.
    _always_works = True

    def shutdown(self) -> None:
        super().shutdown()
        self._arena.clear()
        _alive.discard(self)


if hasattr(_C10d, "Backend"):

    class PillionBackend(_Group, _C10d.Backend):
        """One backend of a process group."""

        _always_works = False

        def __init__(self, opts: Any, connection: Connection) -> None:
            _C10d.Backend.__init__(self, opts.group_rank, opts.group_size)
            self.connect(connection, opts.store, opts.timeout)
            self._options = _C10d.Backend.Options("pillion", timeout=opts.timeout)

        def getBackendName(self) -> str:
            return "pillion"

        @property
        def options(self) -> Any:
            return self._options

        # PyTorch asks for each of them, and takes an inherited property for an endless call.
        supports_coalescing = supports_splitting = supports_shrinking = property(lambda self: False)
        supports_reconfigure = supports_window = supports_abort_hooks = property(lambda self: False)
        _supports_time_estimate = property(lambda self: False)


class PillionProcessGroup(_Group, dist.ProcessGroup):
    """A whole process group."""

    def __init__(self, opts: Any, connection: Connection) -> None:
        dist.ProcessGroup.__init__(self, opts.group_rank, opts.group_size)
        self.connect(connection, opts.store, opts.timeout)
        self._name = self._desc = ""

    # The names of these before 2.15, or of the methods that C++ calls.
    _allgather_base = Collectives.all_gather_single
    _reduce_scatter_base = Collectives.reduce_scatter_single
    allgather_into_tensor_coalesced = Collectives.all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = Collectives.reduce_scatter_single_coalesced
    alltoall_base = Collectives.all_to_all_single

    def getBackendName(self) -> str:
        return "pillion"

    name = getBackendName

    # Python reads the properties, and C++ calls the methods.

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupDesc(self) -> str:
        return self._desc

    def setGroupDesc(self, desc: str) -> None:
        self._desc = desc

    group_name, group_desc = property(getGroupName), property(getGroupDesc)
    _set_group_name, _set_group_desc = setGroupName, setGroupDesc

    @property
    def _device_types(self) -> list[torch.device]:
        # While it makes a group, PyTorch asks this to know whether its flight recorder may be
        # attached, and that needs a backend in C++. Later, whether the group is for the host's
        # memory.
        is_made = self in dist.distributed_c10d._world.pg_map
        return [torch.device("cpu")] if is_made else []

    def _get_backend(self, device: Any) -> Any:
        return self


def create(opts: Any, _: Any) -> Any:
    """What PyTorch calls for a group of which this rank is a member."""
    connection = connect(opts)
    if connection is None:
        return _C10d.ProcessGroupGloo(opts.store, opts.group_rank, opts.group_size, timeout=opts.timeout)
    kind = PillionBackend if _is_one_of_several() else PillionProcessGroup
    group = kind(opts, connection)
    _alive.add(group)
    return group


def any_source() -> None:
    """Lets a receive from any rank say whose message it was: PyTorch loses this of works in Python,
    unless its process group returns them itself."""
    original = dist.ProcessGroup.recv_anysource

    def recv_anysource(self: Any, tensors: Any, tag: int) -> Any:
        backend = None
        if tensors and tensors[0].device.type == "cpu":
            try:
                backend = self._get_backend(torch.device("cpu"))
            except RuntimeError:
                pass  # A group without a backend for the host's memory.
        if isinstance(backend, Collectives):
            return backend.recv_anysource(tensors, tag)
        return original(self, tensors, tag)

    dist.ProcessGroup.recv_anysource = recv_anysource
