"""Operations under way, as PyTorch knows them: `Work` and `Future`."""

from __future__ import annotations

import collections
import ctypes
import itertools
import logging
import os
import threading
from datetime import timedelta
from typing import Any, Callable, Optional, Sequence

import torch
import torch.distributed as dist

from .._connection import milliseconds
from .._library import UNDER_WAY, last_error, lib

_log = logging.getLogger("pillion")
_Work = torch._C._distributed_c10d.Work


def failure(code: int) -> Exception:
    """The error of this thread's last call of the library, as PyTorch expects it."""
    error = last_error(code)
    # PyTorch, and programs around it, look for this word among others.
    text = f"a timeout of the operation: {error}" if isinstance(error, TimeoutError) else str(error)
    raised = dist.DistBackendError(text)
    raised.code = error.code
    raised.__cause__ = error
    return raised


class _Completer:
    """A thread that waits, without the interpreter's lock, for works whose end somebody wants to
    hear of. It runs from the first such work to the last `close`; the queue stays."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._queue: Optional[ctypes.c_void_p] = None
        self._thread: Optional[threading.Thread] = None
        self._called: dict[int, Callable[[int], None]] = {}
        self._tokens = itertools.count(1)
        # Works that nobody holds any more and that had not ended: handles, and what keeps their
        # memory. Finalizers put them here, which takes no lock.
        self.orphans: collections.deque[tuple[int, Any]] = collections.deque()

    def open(self) -> None:
        with self._lock:
            self._users += 1

    def close(self) -> None:
        """A group has gone, and nothing of it is under way."""
        self.sweep()
        with self._lock:
            self._users -= 1
            if self._users or self._thread is None:
                return
            thread, self._thread = self._thread, None
            # Behind all that has ended: the thread comes to those first.
            lib.pillion_wake(self._queue, 0)
        if thread is not threading.current_thread():
            thread.join()

    def sweep(self) -> None:
        """Releases orphans that have ended."""
        for _ in range(len(self.orphans)):
            try:
                handle, keep = self.orphans.popleft()
            except IndexError:
                return  # Another thread sweeps, too.
            if lib.pillion_test(handle) == UNDER_WAY:
                self.orphans.append((handle, keep))
            else:
                lib.pillion_release(handle)

    def is_here(self) -> bool:
        """Whether this is the completer's thread, which must not wait for itself."""
        return threading.current_thread() is self._thread

    def call(self, handle: int, then: Callable[[int], None]) -> None:
        """Calls `then` with the result's code once the work has ended."""
        self._give(then, lambda queue, token: lib.pillion_notify(handle, queue, token))

    def soon(self, then: Callable[[int], None]) -> None:
        """Calls `then` on the completer's thread."""
        self._give(then, lib.pillion_wake)

    def _give(self, then: Callable[[int], None], put: Callable[[ctypes.c_void_p, int], int]) -> None:
        with self._lock:
            if self._queue is None:
                queue = ctypes.c_void_p()
                if code := lib.pillion_completions_new(ctypes.byref(queue)):
                    raise failure(code)
                self._queue = queue
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="pillion-completer", daemon=True)
                thread.start()
                self._thread = thread
            token = next(self._tokens)
            self._called[token] = then
        if code := put(self._queue, token):
            del self._called[token]
            raise failure(code)

    def _run(self) -> None:
        token = ctypes.c_uint64()
        while True:
            code = lib.pillion_next(self._queue, 2**40, ctypes.byref(token))
            if code == UNDER_WAY:
                continue
            if token.value == 0:
                return
            try:
                self._called.pop(token.value)(code)
            except Exception as error:  # A callback's error is its own; others wait for theirs.
                _log.error("a callback that follows a collective failed: %s", error)


completer = _Completer()
# A forked child has none of the parent's threads.
os.register_at_fork(after_in_child=completer._reset)


def _leave(entry: Any, recorded: threading.Event) -> None:
    """Ends an entry of the profiler: on the completer's thread, by which the profiler knows work
    beside the program."""
    torch.autograd._record_function_with_args_exit(entry)
    recorded.set()


class Done(_Work):
    """Work that ended within its call."""

    def __init__(self, outputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._outputs = list(outputs)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def result(self) -> list[torch.Tensor]:
        return self._outputs

    def synchronize(self) -> None:
        pass

    def get_future(self) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self._outputs)
        return future


class UnderWay(_Work):
    """Work that the library does beside the program. `keep` is what its memory belongs to, and
    `after` is called once it has ended well, before anybody learns of it."""

    def __init__(
        self,
        handle: int,
        outputs: Sequence[torch.Tensor],
        keep: Any,
        after: Sequence[Callable[[], None]] = (),
        sender: Optional[ctypes.c_size_t] = None,
    ) -> None:
        super().__init__()
        # It lives as long as this object, because several threads may ask for it at once.
        self._handle = handle
        self._outputs, self._keep, self._after, self._sender = list(outputs), keep, after, sender
        self._ended, self._error = False, None
        self._lock = threading.Lock()
        # What becomes of the work, and what says that it has: see `get_future`.
        self._future: Optional[torch.futures.Future] = None
        self._source: Optional[torch.futures.Future] = None
        self._recorded: Optional[threading.Event] = None

    def record(self, entry: Any) -> None:
        """Ends an entry of the profiler once the work has ended."""
        if completer.is_here():
            self._end(lib.pillion_wait(self._handle, 0))
            torch.autograd._record_function_with_args_exit(entry)
            return
        self._recorded = threading.Event()
        completer.call(self._handle, lambda _: _leave(entry, self._recorded))

    def _end(self, code: int) -> None:
        """Takes in that the work has ended; an error's text is this thread's last."""
        with self._lock:
            if self._ended:
                return
            try:
                if code:
                    raise failure(code)
                with torch.no_grad():
                    for after in self._after:
                        after()
            except Exception as error:
                self._error = error
            self._keep, self._after, self._ended = None, (), True

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if not self._ended:
            limit = 0 if timeout <= timedelta(0) else milliseconds(timeout.total_seconds())
            code = lib.pillion_wait(self._handle, limit)
            if code == UNDER_WAY:
                text = f"a timeout of the wait: the work has not ended within {limit} ms, and goes on"
                raise dist.DistBackendError(text)
            self._end(code)
        if self._recorded is not None:
            self._recorded.wait()
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        if not self._ended:
            if lib.pillion_test(self._handle) == UNDER_WAY:
                return False
            self._end(lib.pillion_wait(self._handle, 0))
        return True

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None

    def exception(self) -> Optional[Exception]:
        return self._error if self.is_completed() else None

    def result(self) -> list[torch.Tensor]:
        return self._outputs

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        if self._sender is None:
            raise RuntimeError("only a receive from any rank has a source to ask for")
        self.wait()
        return self._sender.value

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future:
        if self._future is None:
            # An error that is set on a future of Python's is lost where C++ takes the future. One
            # that a callback raises is not.
            self._source = torch.futures.Future()
            self._future = self._source.then(lambda _: self._outcome())
            if completer.is_here():
                # A callback may wait for this future, and nobody else would settle it.
                self._end(lib.pillion_wait(self._handle, 0))
                self._source.set_result(None)
            elif self._recorded is None and self.is_completed():
                self._source.set_result(None)
            else:  # The profiler's entry ends first.
                completer.call(self._handle, lambda _: self.is_completed() and self._source.set_result(None))
        return self._future

    def _outcome(self) -> list[torch.Tensor]:
        if self._error is not None:
            raise self._error
        return self._outputs

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is None:
            return
        if self._ended or lib.pillion_test(handle) != UNDER_WAY:
            lib.pillion_release(handle)
        else:
            # Nobody waits for it, but its memory must stay until it has ended.
            completer.orphans.append((handle, (self._keep, self._outputs)))


class Several(_Work):
    """Works of one call, which end together."""

    def __init__(self, works: Sequence[_Work], outputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._works, self._outputs = list(works), list(outputs)
        self._recorded: Optional[threading.Event] = None

    def record(self, entry: Any) -> None:
        """Ends an entry of the profiler once the works have ended."""
        if completer.is_here():
            self.wait()
            torch.autograd._record_function_with_args_exit(entry)
            return
        self._recorded = threading.Event()
        last = next((work for work in reversed(self._works) if isinstance(work, UnderWay)), None)
        end = lambda _: _leave(entry, self._recorded)
        completer.soon(end) if last is None else completer.call(last._handle, end)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        for work in self._works:
            work.wait(timeout)
        if self._recorded is not None:
            self._recorded.wait()
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return all(work.is_success() for work in self._works)

    def exception(self) -> Optional[Exception]:
        return next((error for error in (work.exception() for work in self._works) if error), None)

    def result(self) -> list[torch.Tensor]:
        return self._outputs

    def synchronize(self) -> None:
        self.wait()

    def get_future(self) -> torch.futures.Future:
        all_of_them = torch.futures.collect_all([work.get_future() for work in self._works])

        def outputs(futures: torch.futures.Future) -> list[torch.Tensor]:
            for future in futures.value():
                future.value()  # Raises where that work failed.
            return self._outputs

        return all_of_them.then(outputs)
