"""Ranks that talk, as handles of the C library: how they meet and part."""

from __future__ import annotations

import ctypes
import threading
from typing import Callable, Optional, Protocol, Sequence

from . import _library
from ._library import Options, check, lib


class Store(Protocol):
    """Values by key that every rank sees. Any thread may call any of the functions."""

    def set(self, key: str, value: bytes) -> None:
        """Sets the value of a key, in place of an older one."""

    def get(self, key: str) -> Optional[bytes]:
        """The value of a key, or None where no rank has set it. Does not wait."""

    def add(self, key: str, amount: int) -> int:
        """Adds to the count of a key, which begins at 0; returns the sum."""


class _Calls:
    """A store's functions as the C library calls them; `failure` is what one of them raised."""

    # Those that the library may still call.
    _alive: set[_Calls] = set()

    def __init__(self, store: Store) -> None:
        self.failure: Optional[BaseException] = None
        self._is_over, self._released = False, threading.Event()

        def guarded(call: Callable[[], None]) -> int:
            if self._is_over:
                return 1
            try:
                call()
                return 0
            except BaseException as error:  # It must not cross into the library.
                self.failure = error
                return 1

        def set_(_, key, value, length):
            return guarded(lambda: store.set(key.decode(), ctypes.string_at(value, length)))

        def get(_, key, found, answer):
            def call() -> None:
                value = store.get(key.decode())
                if value is not None:
                    found(answer, ctypes.cast(ctypes.c_char_p(value), ctypes.c_void_p), len(value))

            return guarded(call)

        def add(_, key, amount, total):
            def call() -> None:
                total[0] = store.add(key.decode(), amount)

            return guarded(call)

        def release(_):
            self._released.set()

        functions = (_library.Set(set_), _library.Get(get), _library.Add(add), _library.Release(release))
        self.store = _library.Store(None, *functions)
        _Calls._alive.add(self)

    def end(self) -> None:
        """Waits until the library calls nothing of this any more: a thread of its that does while
        the interpreter ends would end with it. A call of the store that hangs keeps it."""
        # A rank that could not connect stays for up to 2 s, so that others can read why.
        if not self._released.wait(3.0):
            self._is_over = True
            self._released.wait(2.0)
        if self._released.is_set():
            _Calls._alive.discard(self)


def milliseconds(seconds: Optional[float]) -> int:
    """A limit as the library takes it: 0 is its default."""
    if seconds is None:
        return 0
    if not seconds > 0:
        raise ValueError(f"a limit of {seconds} s: give a positive number")
    return max(1, int(min(seconds * 1000, 2**62)))


def _options(timeout: Optional[float], startup_timeout: Optional[float]) -> Options:
    return Options(ctypes.sizeof(Options), milliseconds(timeout), milliseconds(startup_timeout), 0, 0)


class Connection:
    """The handle of a communicator. `close` is called once; after it there is no handle."""

    def __init__(self, handle: int) -> None:
        self.handle: Optional[int] = handle
        self.rank: int = lib.pillion_rank(handle)
        self.world: int = lib.pillion_world(handle)
        self.hosts: int = lib.pillion_hosts(handle)

    @staticmethod
    def launched(
        timeout: Optional[float] = None,
        startup_timeout: Optional[float] = None,
    ) -> Connection:
        """Joins the ranks that a launcher has started."""
        handle = ctypes.c_void_p()
        options = _options(timeout, startup_timeout)
        check(lib.pillion_connect(ctypes.byref(options), ctypes.byref(handle)))
        return Connection(handle.value)

    @staticmethod
    def through(
        store: Store,
        rank: int,
        world: int,
        timeout: Optional[float] = None,
        startup_timeout: Optional[float] = None,
    ) -> Connection:
        """Joins `world` ranks, of which this is rank `rank`, through a store."""
        handle, options = ctypes.c_void_p(), _options(timeout, startup_timeout)
        calls = _Calls(store)
        code = lib.pillion_connect_through(calls.store, rank, world, ctypes.byref(options), ctypes.byref(handle))
        error = _library.last_error(code) if code else None
        calls.end()
        if error is not None:
            raise error from calls.failure
        return Connection(handle.value)

    def group(self, ranks: Sequence[int]) -> Connection:
        """Some of the ranks, in this order. They alone call this."""
        handle, members = ctypes.c_void_p(), (ctypes.c_size_t * len(ranks))(*ranks)
        check(lib.pillion_group(self.handle, members, len(ranks), ctypes.byref(handle)))
        return Connection(handle.value)

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            check(lib.pillion_close(handle))
