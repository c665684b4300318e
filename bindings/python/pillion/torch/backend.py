"""The collectives of a process group, on the C library.

A call that need not return before it is complete becomes `UnderWay`; one that must is complete
when it returns, and returns nothing, as PyTorch's own backends do.
"""

from __future__ import annotations

import ctypes
from datetime import timedelta
from typing import Any, Callable, Sequence

import torch
import torch.distributed as dist

from .. import _library
from .._connection import milliseconds
from .._library import lib
from . import sparse
from .arena import Arena
from .late_ranks import LateRanks
from .operands import Operands, copied
from .works import Done, Several, UnderWay, completer, failure

_C10d = torch._C._distributed_c10d
_Op = _C10d.ReduceOp.RedOpType
_OPS = {
    _Op.SUM: _library.SUM,
    _Op.AVG: _library.AVG,
    _Op.PRODUCT: _library.PROD,
    _Op.MIN: _library.MIN,
    _Op.MAX: _library.MAX,
    _Op.BAND: _library.BIT_AND,
    _Op.BOR: _library.BIT_OR,
    _Op.BXOR: _library.BIT_XOR,
    _Op.PREMUL_SUM: _library.PREMUL_SUM,
}
Tensors = Sequence[torch.Tensor]

# The library's functions, and what the profiler calls them.
_LABELS = {
    "all_reduce": "all_reduce",
    "reduce": "reduce",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_v": "reduce_scatter",
    "all_gather": "all_gather",
    "all_gather_v": "all_gather",
    "broadcast": "broadcast",
    "gather_v": "gather",
    "scatter_v": "scatter",
    "all_to_all": "all_to_all",
    "all_to_all_v": "all_to_all",
    "send": "send",
    "receive": "recv",
    "receive_any": "recvAnySource",
}
_CALLS = {name: (getattr(lib, f"pillion_{name}"), label) for name, label in _LABELS.items()}


def _reduction(op: Any) -> tuple[int, float]:
    """An operator of PyTorch's: the library's, and its factor."""
    kind = getattr(op, "op", op)
    factor = 0.0
    if kind == _Op.PREMUL_SUM:
        factor = float(op.factor)
    return _OPS[kind], factor


class Collectives:
    """What both kinds of process group do: `connect` them before, and `shutdown` after."""

    # What the profiler's entries begin with.
    label = "pillion"

    def connect(self, connection: Any, store: dist.Store, timeout: timedelta) -> None:
        self._connection, self._store, self._timeout = connection, store, timeout
        self._ranks = connection.handle
        self._rank, self._world = connection.rank, connection.world
        self._limit = milliseconds(timeout.total_seconds())
        self._calls, self._in_entry = 0, False
        self._arena = Arena(connection)
        self._late_ranks = LateRanks(store, self._rank, self._world)
        completer.open()

    # --- Calls ---------------------------------------------------------------------------------

    def _run(self, name: str, arguments: tuple, operands: Operands, outputs: Tensors, opts: Any) -> Any:
        """Calls a function of the library; `arguments` are its own but for the limit and the place
        for work."""
        call, label = _CALLS[name]
        limit = self._limit
        timeout = getattr(opts, "timeout", None)
        if timeout is not None and timeout > timedelta(0):
            limit = milliseconds(timeout.total_seconds())
        self._calls += 1
        blocks = opts is not None and not getattr(opts, "asyncOp", True)
        if completer.orphans:
            completer.sweep()
        entry = self._enter(label, operands.given)
        if blocks and entry is None:
            code = call(self._ranks, *arguments, limit, None)
            if code:
                raise failure(code)
            if operands.after:
                with torch.no_grad():
                    for after in operands.after:
                        after()
            return Done(outputs) if self._always_works else None
        handle = ctypes.c_void_p()
        code = call(self._ranks, *arguments, limit, ctypes.byref(handle))
        if code:
            error = failure(code)
            if entry is not None:
                torch.autograd._record_function_with_args_exit(entry)
            raise error
        work = UnderWay(handle.value, outputs, operands.keep, operands.after)
        if entry is not None:
            work.record(entry)
            if blocks:
                work.wait()
        return work

    def _each(self, label: str, call: Callable, groups: Sequence[tuple], outputs: Tensors, opts: Any) -> Any:
        """One call for each group of arguments, and one work for all."""
        entry = self._enter(label, [group[0][0] if isinstance(group[0], list) else group[0] for group in groups])
        self._in_entry = True
        try:
            works = [work for work in (call(*group, opts) for group in groups) if work is not None]
        except BaseException:
            if entry is not None:
                torch.autograd._record_function_with_args_exit(entry)
            raise
        finally:
            self._in_entry = False
        work = Several(works, outputs)
        if entry is not None:
            work.record(entry)
        blocks = opts is not None and not getattr(opts, "asyncOp", True)
        if blocks:
            work.wait()
        return None if blocks and not self._always_works else work

    def _enter(self, label: str, tensors: Tensors) -> Any:
        """An entry of the profiler, where one is at work."""
        if not torch.autograd.profiler._is_profiler_enabled or self._in_entry:
            return None
        return torch.autograd._record_function_with_args_enter(f"{self.label}:{label}", *tensors)

    # --- Reductions ----------------------------------------------------------------------------

    def allreduce(self, tensors: Tensors, opts: Any = None) -> Any:
        if len(tensors) != 1:
            return self.allreduce_coalesced(tensors, opts)
        operator, factor = _reduction(opts.reduceOp if opts is not None else _Op.SUM)
        if tensors[0].layout is torch.sparse_coo and operator == _library.SUM:
            sparse.all_reduce(self, tensors[0])
            return Done(tensors)
        operands = Operands(operator)
        operand = operands.write(tensors[0])
        return self._run("all_reduce", (operand, operand, operator, factor), operands, tensors, opts)

    def allreduce_sparse(self, tensors: Tensors, opts: Any = None) -> Any:
        return self.allreduce(tensors, opts)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Any:
        return self._each("all_reduce", self.allreduce, [([tensor],) for tensor in tensors], tensors, opts)

    def reduce(self, tensors: Tensors, opts: Any) -> Any:
        operator, factor = _reduction(opts.reduceOp)
        operands, root = Operands(operator), opts.rootRank
        (tensor,) = tensors
        if self._rank == root:
            given, result = operands.read(copied(tensor)), operands.write(tensor)
        else:
            given, result = operands.read(tensor), _library.Tensor(None, 0, _library.U8)
        return self._run("reduce", (given, result, operator, factor, root), operands, tensors, opts)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Any:
        operator, factor = _reduction(opts.reduceOp if opts is not None else _Op.SUM)
        operands = Operands(operator)
        given, result = operands.read(input), operands.write(output)
        return self._run("reduce_scatter", (given, result, operator, factor), operands, [output], opts)

    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> Any:
        operator, factor = _reduction(opts.reduceOp if opts is not None else _Op.SUM)
        operands = Operands(operator)
        given, result = operands.read_all(inputs[0], self._world), operands.write(outputs[0])
        return self._run("reduce_scatter_v", (given, result, operator, factor), operands, outputs, opts)

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        return self._each("reduce_scatter", self.reduce_scatter_single, list(zip(outputs, inputs)), outputs, opts)

    # --- Moves ---------------------------------------------------------------------------------

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Any:
        operands = Operands()
        given, result = operands.read(input), operands.write(output)
        return self._run("all_gather", (given, result), operands, [output], opts)

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        return self._each("all_gather", self.all_gather_single, list(zip(outputs, inputs)), outputs, opts)

    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> Any:
        operands = Operands()
        given, results = operands.read(inputs[0]), operands.write_all(outputs[0], self._world)
        return self._run("all_gather_v", (given, results), operands, outputs[0], opts)

    def allgather_coalesced(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> Any:
        # outputs[p] has what rank p's inputs are.
        def one(given: torch.Tensor, results: Tensors, opts: Any) -> Any:
            return self.allgather([results], [given], opts)

        groups = [(given, list(results)) for results, given in zip(zip(*outputs), inputs)]
        return self._each("all_gather", one, groups, [tensor for rank in outputs for tensor in rank], opts)

    def broadcast(self, tensors: Tensors, opts: Any) -> Any:
        (tensor,), operands = tensors, Operands()
        return self._run("broadcast", (operands.write(tensor), opts.rootRank), operands, tensors, opts)

    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: Any) -> Any:
        operands, (tensor,) = Operands(), inputs
        results = None
        if self._rank == opts.rootRank:
            if tensor.data_ptr() == outputs[0][self._rank].data_ptr():
                tensor = copied(tensor)
            results = operands.write_all(outputs[0], self._world)
        arguments = (operands.read(tensor), results, opts.rootRank)
        return self._run("gather_v", arguments, operands, outputs[0] if outputs else [], opts)

    def gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any) -> Any:
        is_root = self._rank == opts.rootRank
        if is_root and (output.dim() == 0 or output.size(0) % self._world):
            raise ValueError(
                f"an output of shape {list(output.shape)} for {self._world} ranks: give a multiple of rows"
            )
        outputs = [list(output.chunk(self._world))] if is_root else []
        return self.gather(outputs, [input], opts)

    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: Any) -> Any:
        operands, (tensor,) = Operands(), outputs
        given = None
        if self._rank == opts.rootRank:
            own = tensor.data_ptr()
            given = operands.read_all(
                [part.clone() if part.data_ptr() == own else part for part in inputs[0]], self._world
            )
        arguments = (given, operands.write(tensor), opts.rootRank)
        return self._run("scatter_v", arguments, operands, outputs, opts)

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Any:
        operands = Operands()
        arguments = (operands.read_all(inputs, self._world), operands.write_all(outputs, self._world))
        return self._run("all_to_all_v", arguments, operands, outputs, opts)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = None,
    ) -> Any:
        operands = Operands()
        given, result = operands.read(input), operands.write(output)
        if not output_splits and not input_splits:
            return self._run("all_to_all", (given, result), operands, [output], opts)
        arguments = (self._rows(given, input, input_splits), self._rows(result, output, output_splits))
        return self._run("all_to_all_v", arguments, operands, [output], opts)

    def _rows(self, operand: _library.Tensor, tensor: torch.Tensor, splits: Sequence[int]) -> Any:
        """The parts of a tensor: of `splits` rows each, or of as many each."""
        rows = tensor.size(0)
        if not splits:
            if rows % self._world:
                raise ValueError(f"{rows} rows among {self._world} ranks: give split sizes, or a multiple")
            splits = [rows // self._world] * self._world
        if len(splits) != self._world or sum(splits) != rows or min(splits) < 0:
            raise ValueError(
                f"split sizes {list(splits)} of {rows} rows among {self._world} ranks: give sizes that add up"
            )
        row = operand.count // rows if rows else 0
        parts, start, item = [], operand.data or 0, _library.ITEM_BYTES[operand.dtype]
        for split in splits:
            parts.append(_library.Tensor(start, split * row, operand.dtype))
            start += split * row * item
        return (_library.Tensor * self._world)(*parts)

    # --- Messages ------------------------------------------------------------------------------

    def send(self, tensors: Tensors, to: int, tag: int = 0) -> Any:
        (tensor,), operands = tensors, Operands()
        return self._run("send", (operands.read(tensor), to, tag), operands, tensors, None)

    def recv(self, tensors: Tensors, source: int, tag: int = 0) -> Any:
        (tensor,), operands = tensors, Operands()
        return self._run("receive", (operands.write(tensor), source, tag), operands, tensors, None)

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Any:
        (tensor,), operands, sender = tensors, Operands(), ctypes.c_size_t()
        arguments = (operands.write(tensor), tag, ctypes.byref(sender))
        work = self._run("receive_any", arguments, operands, tensors, None)
        work._sender = sender
        return work

    # --- The group -----------------------------------------------------------------------------

    def barrier(self, opts: Any = None) -> Any:
        # A reduction of one byte, because a barrier may be under way, too.
        operands = Operands(_library.MAX)
        operand = operands.write(torch.zeros(1, dtype=torch.uint8))
        return self._run("all_reduce", (operand, operand, _library.MAX, 0.0), operands, [], opts)

    def monitored_barrier(self, opts: Any = None, wait_all_ranks: bool = False) -> None:
        timeout = opts if isinstance(opts, timedelta) else getattr(opts, "timeout", self._timeout)
        if timeout < timedelta(0):
            timeout = self._timeout
        self._late_ranks.barrier(timeout)

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout, self._limit = timeout, milliseconds(timeout.total_seconds())

    _set_default_timeout = set_timeout

    def _set_sequence_number_for_group(self) -> None:
        self._calls = 0

    def _get_sequence_number_for_group(self) -> int:
        return self._calls

    def supports_tensor_alloc(self, device: Any) -> bool:
        # PyTorch's C++ asks by an index, of the device that the group is for.
        return getattr(device, "type", "cpu") == "cpu"

    def allocate_tensor(self, size: int, *, dtype: torch.dtype, device: Any = None) -> torch.Tensor:
        """A tensor in memory that the other ranks of the host read in place."""
        return self._arena.tensor(size, dtype)

    def abort(self) -> None:
        if self._connection.handle is not None:
            lib.pillion_abort(self._ranks, b"the process group was aborted")

    def shutdown(self) -> None:
        if self._connection.handle is not None:
            self._ranks = None
            try:
                self._connection.close()
            finally:
                completer.close()
