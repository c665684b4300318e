"""Memory that the ranks of a host read in place, as tensors."""

from __future__ import annotations

import collections
import ctypes
import threading
import weakref
from typing import Any

import torch

from .._library import check, lib

# Memory is asked for in steps of as many bytes.
_STEP = 1 << 16


class Arena:
    """Hands out tensors, and keeps the memory of those that are gone for the next ones: at most as
    much as was in use at once."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._spare: dict[int, list[int]] = {}
        # Memory of tensors that have gone: addresses and sizes. Finalizers put it here, which takes
        # no lock.
        self._gone: collections.deque[tuple[int, int]] = collections.deque()
        self._spare_bytes = self._used_bytes = self._most_bytes = 0

    def tensor(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """`size` elements, of any value."""
        if size == 0:
            return torch.empty(0, dtype=dtype)
        count = size * dtype.itemsize
        room = -(-count // _STEP) * _STEP
        with self._lock:
            self._sort()
            spare = self._spare.get(room)
            address = spare.pop() if spare else None
            if address is not None:
                self._spare_bytes -= room
            self._used_bytes += room
            self._most_bytes = max(self._most_bytes, self._used_bytes)
        if address is None:
            place = ctypes.c_void_p()
            try:
                check(lib.pillion_allocate(self._connection.handle, room, ctypes.byref(place)))
            except BaseException:
                with self._lock:
                    self._used_bytes -= room
                raise
            address = place.value
        memory = (ctypes.c_ubyte * count).from_address(address)
        # A tensor of this memory keeps it, and so do views.
        weakref.finalize(memory, self._take_back, address, room).atexit = False
        return torch.frombuffer(memory, dtype=dtype)

    def _take_back(self, address: int, room: int) -> None:
        if self._connection.handle is None:
            lib.pillion_free(address)
        else:
            self._gone.append((address, room))

    def _sort(self) -> None:
        """Keeps or frees the memory of tensors that have gone; the caller holds the lock."""
        while self._gone:
            address, room = self._gone.popleft()
            self._used_bytes -= room
            if self._spare_bytes + room <= self._most_bytes:
                self._spare.setdefault(room, []).append(address)
                self._spare_bytes += room
            else:
                lib.pillion_free(address)

    def clear(self) -> None:
        """Frees what no tensor has, once the group has gone. The rest is freed as tensors go."""
        with self._lock:
            self._sort()
            spare, self._spare, self._spare_bytes = self._spare, {}, 0
        for address in (address for addresses in spare.values() for address in addresses):
            lib.pillion_free(address)
