"""The C library: its functions, as `pillion.h` declares them. `tests/header.py` compares the two.

A call releases the interpreter lock.
"""

from __future__ import annotations

import ctypes
import operator
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

ABI_VERSION = 1


class Tensor(Structure):
    """`count` elements of a type at an address."""

    _fields_ = [("data", c_void_p), ("count", c_size_t), ("dtype", c_int32)]


class Options(Structure):
    _fields_ = [
        ("size", c_size_t),
        ("timeout_ms", c_uint64),
        ("startup_timeout_ms", c_uint64),
        ("warn_after_ms", c_uint64),
        ("reduce_groups", c_uint64),
    ]


class Message(Structure):
    _fields_ = [("from_", c_size_t), ("count", c_size_t), ("dtype", c_int32)]


Found = CFUNCTYPE(None, c_void_p, c_void_p, c_size_t)
Set = CFUNCTYPE(c_int32, c_void_p, c_char_p, c_void_p, c_size_t)
Get = CFUNCTYPE(c_int32, c_void_p, c_char_p, Found, c_void_p)
Add = CFUNCTYPE(c_int32, c_void_p, c_char_p, c_int64, POINTER(c_int64))
Release = CFUNCTYPE(None, c_void_p)
OnComplete = CFUNCTYPE(None, c_void_p, c_int32)


class Store(Structure):
    _fields_ = [("context", c_void_p), ("set", Set), ("get", Get), ("add", Add), ("release", Release)]


class Observation(Structure):
    _fields_ = [
        ("groups", c_uint64),
        ("samples", c_uint64),
        ("tokens", c_uint64),
        ("group_square_norms", c_double),
        ("square_norm", c_double),
        ("non_finite", c_uint64),
    ]


class Decision(Structure):
    _fields_ = [
        ("batch", c_uint64),
        ("noise_scale", c_double),
        ("wanted", c_double),
        ("variance", c_double),
        ("square_norm", c_double),
        ("debiased_square_norm", c_double),
        ("reason", c_char_p),
        ("unusable", c_char_p),
    ]


F32, BF16, F16, F64, I8, U8, I32, U32, I64, U64, BOOL = range(11)
SUM, AVG, PROD, MIN, MAX, BIT_AND, BIT_OR, BIT_XOR, PREMUL_SUM = range(9)
ITEM_BYTES = {F32: 4, BF16: 2, F16: 2, F64: 8, I8: 1, U8: 1, I32: 4, U32: 4, I64: 8, U64: 8, BOOL: 1}

OK, PEER_LOST, TIMEOUT, MISMATCH, ABORTED = 0, 1, 2, 5, 6
BAD_OPTIONS, MISUSE, RENDEZVOUS, OUT_OF_MEMORY, SYSTEM, STORE = 7, 8, 9, 10, 11, 13
INVALID, FORKED, UNDER_WAY, DEFECT, NO_UPDATE, FILE, STEP = 100, 101, 102, 103, 104, 105, 106

_COMMUNICATOR = _WORK = _COMPLETIONS = _CONTROLLER = c_void_p
_LATER = [c_uint64, POINTER(c_void_p)]
_REDUCTION = [c_int32, c_double]
_LIST = POINTER(Tensor)

# Arguments of each function. Without another result below, it returns a code.
ARGUMENTS: dict[str, list] = {
    "last_error": [],
    "abi_version": [],
    "connect": [POINTER(Options), POINTER(c_void_p)],
    "connect_through": [Store, c_size_t, c_size_t, POINTER(Options), POINTER(c_void_p)],
    "group": [_COMMUNICATOR, POINTER(c_size_t), c_size_t, POINTER(c_void_p)],
    "rank": [_COMMUNICATOR],
    "world": [_COMMUNICATOR],
    "hosts": [_COMMUNICATOR],
    "health": [_COMMUNICATOR],
    "abort": [_COMMUNICATOR, c_char_p],
    "close": [_COMMUNICATOR],
    "barrier": [_COMMUNICATOR, c_uint64],
    "completions_new": [POINTER(c_void_p)],
    "notify": [_WORK, _COMPLETIONS, c_uint64],
    "wake": [_COMPLETIONS, c_uint64],
    "next": [_COMPLETIONS, c_uint64, POINTER(c_uint64)],
    "completions_free": [_COMPLETIONS],
    "allocate": [_COMMUNICATOR, c_size_t, POINTER(c_void_p)],
    "free": [c_void_p],
    "all_gather": [_COMMUNICATOR, Tensor, Tensor, *_LATER],
    "broadcast": [_COMMUNICATOR, Tensor, c_size_t, *_LATER],
    "gather": [_COMMUNICATOR, Tensor, Tensor, c_size_t, *_LATER],
    "scatter": [_COMMUNICATOR, Tensor, Tensor, c_size_t, *_LATER],
    "all_to_all": [_COMMUNICATOR, Tensor, Tensor, *_LATER],
    "send": [_COMMUNICATOR, Tensor, c_size_t, c_uint32, *_LATER],
    "receive": [_COMMUNICATOR, Tensor, c_size_t, c_uint32, *_LATER],
    "receive_any": [_COMMUNICATOR, Tensor, c_uint32, POINTER(c_size_t), *_LATER],
    "probe": [_COMMUNICATOR, c_size_t, c_uint32, POINTER(Message)],
    "all_gather_v": [_COMMUNICATOR, Tensor, _LIST, *_LATER],
    "gather_v": [_COMMUNICATOR, Tensor, _LIST, c_size_t, *_LATER],
    "scatter_v": [_COMMUNICATOR, _LIST, Tensor, c_size_t, *_LATER],
    "all_to_all_v": [_COMMUNICATOR, _LIST, _LIST, *_LATER],
    "reduce_scatter_v": [_COMMUNICATOR, _LIST, Tensor, *_REDUCTION, *_LATER],
    "all_reduce": [_COMMUNICATOR, Tensor, Tensor, *_REDUCTION, *_LATER],
    "reduce_scatter": [_COMMUNICATOR, Tensor, Tensor, *_REDUCTION, *_LATER],
    "reduce": [_COMMUNICATOR, Tensor, Tensor, *_REDUCTION, c_size_t, *_LATER],
    "square_norm": [Tensor, POINTER(c_double), POINTER(c_uint64)],
    "controller_new": [c_char_p, c_char_p, POINTER(c_void_p)],
    "controller_batch": [_CONTROLLER],
    "observe": [_CONTROLLER, Observation, POINTER(Decision)],
    "controller_skip": [_CONTROLLER, c_uint64],
    "controller_state": [_CONTROLLER],
    "controller_free": [_CONTROLLER],
    "wait": [_WORK, c_uint64],
    "test": [_WORK],
    "on_complete": [_WORK, OnComplete, c_void_p],
    "release": [_WORK],
}
RESULTS = {
    "last_error": c_char_p,
    "abi_version": c_uint32,
    "rank": c_size_t,
    "world": c_size_t,
    "hosts": c_size_t,
    "controller_batch": c_uint64,
    "controller_state": c_char_p,
}


class PillionError(RuntimeError):
    """A call failed. `code` is one of `pillion.h`'s."""

    code: int = DEFECT


class PeerLost(PillionError):
    """A rank died, or left while others still needed it."""

    code = PEER_LOST


class TimedOut(PillionError, TimeoutError):
    """A rank did not come in time."""

    code = TIMEOUT


class InvalidArgument(PillionError, ValueError):
    """An argument that cannot be. Nothing was sent."""

    code = INVALID


_CLASSES = {PEER_LOST: PeerLost, TIMEOUT: TimedOut, INVALID: InvalidArgument, MISUSE: InvalidArgument}


def last_error(code: int) -> PillionError:
    """The error of this thread's last call, which returned this code."""
    text = lib.pillion_last_error().decode(errors="replace")
    error = _CLASSES.get(code, PillionError)(text)
    error.code = code
    return error


def check(code: int) -> None:
    """Raises the error of a call that returned this code, unless it went well."""
    if code:
        raise last_error(code)


def count(name: str, value: int, most: int = 2**53) -> int:
    """A number of things that C can count, which `ctypes` would wrap around otherwise."""
    try:
        whole = operator.index(value)
    except TypeError:
        raise InvalidArgument(f"{name} is {value!r}: give a whole number") from None
    if not 0 <= whole <= most:
        raise InvalidArgument(f"{name} is {value}: give a number from 0 to {most}")
    return whole


def load(path: Path) -> ctypes.CDLL:
    """Loads the library from this file, with its functions' types."""
    library = ctypes.CDLL(str(path))
    for name, arguments in ARGUMENTS.items():
        function = getattr(library, f"pillion_{name}")
        function.argtypes = arguments
        function.restype = RESULTS.get(name, c_int32)
    version = library.pillion_abi_version()
    if version != ABI_VERSION:
        raise ImportError(f"{path} has ABI version {version}, and this package {ABI_VERSION}: install it again")
    return library


lib = load(Path(__file__).with_name("libpillion.so"))
