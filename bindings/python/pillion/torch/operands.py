"""PyTorch's tensors, as the library takes them.

The library takes elements side by side, at a multiple of their size, of the types it knows. Most
tensors are so, and operations read and write them where they lie. Of others they take a copy, and
write a result back once the operation has ended.
"""

from __future__ import annotations

import ctypes
from typing import Any, Callable, Optional, Sequence

import torch

from .. import _library
from .._library import Tensor

_CODES = {
    torch.float32: _library.F32,
    torch.bfloat16: _library.BF16,
    torch.float16: _library.F16,
    torch.float64: _library.F64,
    torch.int8: _library.I8,
    torch.uint8: _library.U8,
    torch.int32: _library.I32,
    torch.int64: _library.I64,
    torch.bool: _library.BOOL,
}
for _name, _code in (("uint32", _library.U32), ("uint64", _library.U64)):
    if hasattr(torch, _name):
        _CODES[getattr(torch, _name)] = _code

# Types that are reduced as a wider one. Integers wrap around alike, since the wider one's low bits
# are the sum's.
_WIDER = {torch.int16: torch.int32}
if hasattr(torch, "uint16"):
    _WIDER[torch.uint16] = torch.int32


# Reductions of complex numbers that are those of their parts.
_OF_PARTS = (_library.SUM, _library.AVG, _library.PREMUL_SUM)


def _move_bytes(to: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copies elements that lie side by side in both, of one type."""
    ctypes.memmove(to.data_ptr(), tensor.data_ptr(), tensor.numel() * tensor.dtype.itemsize)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements in other memory."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    move = (
        _move_bytes if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg() else torch.Tensor.copy_
    )
    with torch.no_grad():
        move(copy, tensor)
    return copy


def _check_count(tensors: Sequence[torch.Tensor], world: int) -> None:
    if len(tensors) != world:
        raise ValueError(f"a list of {len(tensors)} tensors among {world} ranks: give one for each")


class Operands:
    """The tensors of one operation."""

    def __init__(self, reduction: Optional[int] = None) -> None:
        # None of an operation that moves.
        self._reduction = reduction
        # What the operation's memory belongs to.
        self.keep: list[torch.Tensor] = []
        # What the profiler is told.
        self.given: list[torch.Tensor] = []
        # What is to be done once it has ended well.
        self.after: list[Callable[[], None]] = []

    def read(self, tensor: torch.Tensor) -> Tensor:
        """A tensor that the operation reads."""
        self.given.append(tensor)
        return self._take(tensor, False)

    def write(self, tensor: torch.Tensor) -> Tensor:
        """A tensor that the operation writes; of a reduction in place, also reads."""
        if not self.given:
            self.given.append(tensor)
        return self._take(tensor, True)

    def read_all(self, tensors: Sequence[torch.Tensor], world: int) -> Any:
        """A tensor for each rank, which the operation reads; some may be the same memory."""
        _check_count(tensors, world)
        seen: set[int] = set()
        apart = []
        for tensor in tensors:
            if tensor.numel() and tensor.data_ptr() in seen:
                tensor = copied(tensor)
            seen.add(tensor.data_ptr())
            apart.append(self._take(tensor, False))
        return (Tensor * len(apart))(*apart)

    def write_all(self, tensors: Sequence[torch.Tensor], world: int) -> Any:
        """A tensor for each rank, which the operation writes."""
        _check_count(tensors, world)
        return (Tensor * len(tensors))(*[self._take(tensor, True) for tensor in tensors])

    def _take(self, tensor: torch.Tensor, writes: bool) -> Tensor:
        code = _CODES.get(tensor.dtype)
        address = tensor.data_ptr() if tensor.layout is torch.strided and tensor.device.type == "cpu" else None
        if code is not None and address is not None and tensor.is_contiguous():
            if address % _library.ITEM_BYTES[code] == 0 and not tensor.is_conj() and not tensor.is_neg():
                self.keep.append(tensor)
                return Tensor(address, tensor.numel(), code)
        return self._copy(tensor, code, writes)

    def _copy(self, tensor: torch.Tensor, code: Optional[int], writes: bool) -> Tensor:
        if tensor.device.type != "cpu":
            raise ValueError(
                f"pillion moves memory of the host, and this tensor is on {tensor.device}: "
                'use init_process_group("cpu:pillion,cuda:nccl")'
            )
        if tensor.layout is not torch.strided:
            raise ValueError(f"a tensor of layout {tensor.layout}: pillion moves dense tensors; use to_dense()")
        dtype = tensor.dtype
        copy = torch.empty(tensor.shape, dtype=dtype)
        plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        # PyTorch's own copies may crash on an odd address.
        move = _move_bytes if plain else torch.Tensor.copy_
        with torch.no_grad():
            move(copy, tensor)
        if code is not None:
            operand = Tensor(copy.data_ptr(), copy.numel(), code)
        elif self._reduction is None:
            operand = Tensor(copy.data_ptr(), copy.numel() * dtype.itemsize, _library.U8)
        elif dtype in _WIDER:
            copy = copy.to(_WIDER[dtype])
            move = torch.Tensor.copy_
            operand = Tensor(copy.data_ptr(), copy.numel(), _CODES[copy.dtype])
        elif dtype in (torch.complex64, torch.complex128) and self._reduction in _OF_PARTS:
            parts = torch.view_as_real(copy)
            operand = Tensor(parts.data_ptr(), parts.numel(), _CODES[parts.dtype])
        else:
            raise TypeError(f"pillion has no such reduction of {dtype}: reduce a copy of another type")
        self.keep.append(copy)
        if writes:
            self.after.append(lambda: move(tensor, copy))
        return operand
