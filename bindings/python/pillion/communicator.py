"""Collectives on any memory that Python lends: arrays of NumPy or `array`, `bytearray`, `mmap`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Optional, Sequence

from . import _library
from ._connection import Connection, Store, milliseconds
from ._library import UNDER_WAY, Tensor, check, lib

_FORMATS = {"f": _library.F32, "d": _library.F64, "e": _library.F16, "?": _library.BOOL}
_SIGNED = {1: _library.I8, 4: _library.I32, 8: _library.I64}
_UNSIGNED = {1: _library.U8, 4: _library.U32, 8: _library.U64}
_OPS = {
    "sum": _library.SUM,
    "avg": _library.AVG,
    "prod": _library.PROD,
    "min": _library.MIN,
    "max": _library.MAX,
    "and": _library.BIT_AND,
    "or": _library.BIT_OR,
    "xor": _library.BIT_XOR,
    "premul-sum": _library.PREMUL_SUM,
}


@dataclass(frozen=True)
class Bfloat16:
    """A buffer of 16-bit integers that is to be taken for bfloat16, which buffers have no name for."""

    buffer: Any


def _operand(buffer: Any, writes: bool) -> tuple[Tensor, Any]:
    """A buffer as the library takes it, and what keeps its memory."""
    is_bfloat16 = isinstance(buffer, Bfloat16)
    view = memoryview(buffer.buffer if is_bfloat16 else buffer)
    if not view.c_contiguous:
        raise ValueError("a buffer whose elements do not lie side by side: give a contiguous one")
    if view.readonly:
        if writes:
            raise ValueError("a buffer that is read-only: give one that the operation may write to")
        view = memoryview(bytearray(view.tobytes())).cast(view.format)
    name = view.format.lstrip("@=")
    if is_bfloat16:
        code = _library.BF16 if view.itemsize == 2 else None
    elif name in _FORMATS:
        code = _FORMATS[name]
    elif name in "bhilqn":
        code = _SIGNED.get(view.itemsize)
    elif name in "cBHILQN":
        code = _UNSIGNED.get(view.itemsize)
    else:
        code = None
    if code is None:
        raise TypeError(f"elements of format {view.format!r} and {view.itemsize} bytes, which pillion does not know")
    count = view.nbytes // view.itemsize
    if count == 0:
        return Tensor(None, 0, code), view
    memory = (ctypes.c_char * view.nbytes).from_buffer(view)
    return Tensor(ctypes.addressof(memory), count, code), memory


class Work:
    """An operation under way. Its buffers stay as they are until it has ended."""

    def __init__(self, handle: int, keep: Any) -> None:
        self._handle, self._keep = handle, keep

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Waits until the operation has ended, or for `timeout` seconds: then False, and the
        operation goes on. Raises the operation's error."""
        code = lib.pillion_wait(self._handle, milliseconds(timeout))
        if code == UNDER_WAY:
            return False
        self._keep = None
        check(code)
        return True

    def done(self) -> bool:
        """Whether the operation has ended. Raises its error."""
        code = lib.pillion_test(self._handle)
        if code == UNDER_WAY:
            return False
        check(code)
        return True

    def __del__(self) -> None:
        # Waits where it is under way, because the memory must stay until then.
        if lib is not None:
            lib.pillion_release(self._handle)


class Communicator:
    """Ranks that talk. Every rank makes the same calls in the same order, unless a method says
    otherwise. After an error every call raises that first error. Calls release the interpreter lock
    while they wait.

    `timeout` is in seconds, of this call; by default, the communicator's. With `wait=False` a call
    returns `Work` at once.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def rank(self) -> int:
        """This rank's number, from 0."""
        return self._connection.rank

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self._connection.world

    @property
    def hosts(self) -> int:
        """The number of hosts that they are on."""
        return self._connection.hosts

    def group(self, ranks: Sequence[int]) -> Communicator:
        """A communicator of some of the ranks, in this order. Only they call."""
        self._handle  # noqa: B018  (raises where it is closed)
        return Communicator(self._connection.group([_library.count("a rank", rank) for rank in ranks]))

    def abort(self, reason: str) -> None:
        """Gives up: later calls here, and those of other ranks once they wait, raise this reason.
        Only this rank calls."""
        check(lib.pillion_abort(self._handle, reason.encode()))

    def close(self) -> None:
        """Waits for the operations under way, and leaves. May be called again."""
        self._connection.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None and self._connection.handle is not None:
            lib.pillion_abort(self._handle, f"{kind.__name__}: {error}".encode())
        self.close()

    @property
    def _handle(self) -> int:
        if self._connection.handle is None:
            raise ValueError("this communicator is closed")
        return self._connection.handle

    def _run(self, call: Any, arguments: Sequence[Any], keep: Any, timeout: Optional[float], wait: bool) -> Any:
        limit = milliseconds(timeout)
        if wait:
            check(call(self._handle, *arguments, limit, None))
            return None
        handle = ctypes.c_void_p()
        check(call(self._handle, *arguments, limit, ctypes.byref(handle)))
        return Work(handle.value, keep)

    def barrier(self, timeout: Optional[float] = None) -> None:
        """Blocks until every rank has called."""
        check(lib.pillion_barrier(self._handle, milliseconds(timeout)))

    def all_reduce(
        self,
        input: Any,
        output: Any = None,
        op: str = "sum",
        factor: float = 0.0,
        timeout: Optional[float] = None,
        wait: bool = True,
    ) -> Optional[Work]:
        """output = the ranks' inputs combined, in order of rank; without `output`, in place.

        Both: n elements; an output of f32 may take 16-bit floats. `op`: sum, avg, prod, min, max,
        and, or, xor, or premul-sum, the sum of elements times `factor`."""
        given, own = _operand(input, output is None)
        result, other = (given, own) if output is None else _operand(output, True)
        return self._run(lib.pillion_all_reduce, (given, result, _op(op), factor), (own, other), timeout, wait)

    def reduce_scatter(
        self,
        input: Any,
        output: Any,
        op: str = "sum",
        factor: float = 0.0,
        timeout: Optional[float] = None,
        wait: bool = True,
    ) -> Optional[Work]:
        """output = part r of the ranks' inputs combined, on rank r. input: world · n elements;
        output: n."""
        (given, own), (result, other) = _operand(input, False), _operand(output, True)
        return self._run(lib.pillion_reduce_scatter, (given, result, _op(op), factor), (own, other), timeout, wait)

    def all_gather(self, shard: Any, output: Any, timeout: Optional[float] = None, wait: bool = True) -> Optional[Work]:
        """output[p · n …] = the shard of rank p. shard: n elements; output: world · n."""
        (given, own), (result, other) = _operand(shard, False), _operand(output, True)
        return self._run(lib.pillion_all_gather, (given, result), (own, other), timeout, wait)

    def broadcast(
        self, buffer: Any, root: int = 0, timeout: Optional[float] = None, wait: bool = True
    ) -> Optional[Work]:
        """The buffer = that of rank `root`."""
        operand, own = _operand(buffer, True)
        return self._run(lib.pillion_broadcast, (operand, _library.count("root", root)), own, timeout, wait)

    def all_to_all(self, input: Any, output: Any, timeout: Optional[float] = None, wait: bool = True) -> Optional[Work]:
        """output[p · n …] = part r of the input of rank p, on rank r. Both: world · n elements."""
        (given, own), (result, other) = _operand(input, False), _operand(output, True)
        return self._run(lib.pillion_all_to_all, (given, result), (own, other), timeout, wait)

    def send(
        self, buffer: Any, to: int, tag: int = 0, timeout: Optional[float] = None, wait: bool = True
    ) -> Optional[Work]:
        """Sends a buffer to a rank, which receives as many elements with this tag. Only these two
        ranks call."""
        operand, own = _operand(buffer, False)
        return self._run(lib.pillion_send, (operand, _library.count("to", to), _tag(tag)), own, timeout, wait)

    def receive(
        self, buffer: Any, source: int, tag: int = 0, timeout: Optional[float] = None, wait: bool = True
    ) -> Optional[Work]:
        """The buffer = what rank `source` sends with this tag. Only these two ranks call."""
        operand, own = _operand(buffer, True)
        return self._run(
            lib.pillion_receive,
            (operand, _library.count("source", source), _tag(tag)),
            own,
            timeout,
            wait,
        )

    def receive_any(self, buffer: Any, tag: int = 0, timeout: Optional[float] = None) -> int:
        """The buffer = the first message with this tag from any rank, whose number is returned."""
        operand, _own = _operand(buffer, True)
        sender = ctypes.c_size_t()
        check(
            lib.pillion_receive_any(self._handle, operand, _tag(tag), ctypes.byref(sender), milliseconds(timeout), None)
        )
        return sender.value


def _tag(tag: int) -> int:
    return _library.count("tag", tag, 2**32 - 1)


def _op(name: str) -> int:
    if name not in _OPS:
        raise ValueError(f"there is no reduction {name!r}: give one of {', '.join(_OPS)}")
    return _OPS[name]


def connect(
    store: Optional[Store] = None,
    rank: Optional[int] = None,
    world: Optional[int] = None,
    *,
    timeout: Optional[float] = None,
    startup_timeout: Optional[float] = None,
) -> Communicator:
    """Joins the ranks that a launcher has started (torchrun, mpirun, srun), or one rank alone; with
    a store, `world` ranks of which this is rank `rank`.

    Limits are in seconds: `timeout` of operations, 300 by default, and `startup_timeout`, 60, within
    which all ranks come."""
    if store is None:
        if rank is not None or world is not None:
            raise ValueError("a rank or a world without a store: give a store, or neither")
        return Communicator(Connection.launched(timeout, startup_timeout))
    if rank is None or world is None:
        raise ValueError("a store without a rank and a world: give all three")
    rank, world = _library.count("rank", rank), _library.count("world", world)
    return Communicator(Connection.through(store, rank, world, timeout, startup_timeout))
