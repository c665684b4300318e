"""The package without PyTorch: ranks that are forked, and batch sizes. `python plain.py`."""

import array
import math
import os
import tempfile
from pathlib import Path
from typing import Optional

import pillion
from pillion import batch


class Folder:
    """A store in a folder, for one count at a time."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def _file(self, key: str) -> Path:
        return self._path / key.encode().hex()

    def set(self, key: str, value: bytes) -> None:
        draft = self._file(key).with_suffix(f".{os.getpid()}")
        draft.write_bytes(value)
        draft.rename(self._file(key))

    def get(self, key: str) -> Optional[bytes]:
        try:
            return self._file(key).read_bytes()
        except FileNotFoundError:
            return None

    def add(self, key: str, amount: int) -> int:
        lock = self._file(key).with_suffix(".lock")
        while True:
            try:
                os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
                break
            except FileExistsError:
                continue
        total = int(self.get(key) or b"0") + amount
        self.set(key, str(total).encode())
        lock.unlink()
        return total


def of(code: str, *numbers: float) -> array.array:
    return array.array(code, numbers)


def raises(kind: type, words: str, call) -> None:
    try:
        call()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nothing was refused; expected {words!r}")


def body(ranks: pillion.Communicator) -> None:
    rank, world = ranks.rank, ranks.world
    own, total = of("d", rank + 1, 2), of("d", 0, 0)
    ranks.all_reduce(own, total)
    assert total[0] == world * (world + 1) / 2 and own[0] == rank + 1
    ranks.all_reduce(own, op="max")
    assert own[0] == world
    raises(pillion.InvalidArgument, "times as many", lambda: ranks.reduce_scatter(of("f", *range(8)), of("f", 0)[:0]))
    raises(pillion.InvalidArgument, "root is -1", lambda: ranks.broadcast(own, root=-1))
    raises(ValueError, "no reduction", lambda: ranks.all_reduce(own, op="median"))
    raises(ValueError, "read-only", lambda: ranks.all_reduce(b"abcd"))
    raises(TypeError, "format", lambda: ranks.all_reduce(of("h", 1)))
    raises(pillion.InvalidArgument, "share memory", lambda: ranks.all_to_all(own, own))
    shard, gathered = of("i", rank, -rank), of("i", *[9] * (2 * world))
    work = ranks.all_gather(shard, gathered, wait=False)
    assert work.wait(30) and work.done()
    assert list(gathered) == [number for p in range(world) for number in (p, -p)]
    half = array.array("H", [0x3F80, 0x4000])  # 1 and 2 in bfloat16
    ranks.all_reduce(pillion.Bfloat16(half))
    assert half[0] == {1: 0x3F80, 2: 0x4000, 3: 0x4040}[world]
    part = of("f", 0)
    ranks.reduce_scatter(of("f", *range(world)), part, op="premul-sum", factor=0.5)
    assert part[0] == 0.5 * world * rank
    text = bytearray(b"from rank 0" if rank == 0 else b"...........")
    ranks.broadcast(text)
    assert text == b"from rank 0"
    if rank == 0:
        came = of("q", 0)
        assert sorted(ranks.receive_any(came, tag=5, timeout=30) for _ in range(world - 1)) == list(range(1, world))
    else:
        ranks.send(of("q", rank), 0, tag=5)
    group = ranks.group(list(reversed(range(world))))
    assert group.rank == world - 1 - rank
    group.barrier(30)
    group.close()
    empty = of("f")
    ranks.all_reduce(empty)
    ranks.barrier()


def lost(ranks: pillion.Communicator) -> None:
    """A rank that leaves with an error is named, with its words."""
    if ranks.rank == 0:
        with ranks:
            raise KeyError("a rank's own mistake")
    raises(pillion.PillionError, "rank 0", lambda: [ranks.barrier() for _ in range(1000)])


def run(world: int, program) -> None:
    folder, children = tempfile.mkdtemp(), []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                program(pillion.connect(Folder(folder), rank, world, timeout=60))
                code = 0
            except KeyError:
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world, program


def batches() -> None:
    # Gradients 1 and 3 of two groups of a sample: variance 2, square norm of the mean 4.
    controller = batch.Controller(batch.settings(2, 64, eta=0.25, growth_limit=100))
    decision = controller.observe_means(groups=2, samples=2, mean_group_square_norm=5.0, square_norm=4.0)
    assert decision.variance == 2.0 and decision.square_norm == 4.0 and decision.debiased_square_norm == 3.0
    assert decision.wanted == 8.0 and decision.batch == controller.batch == 8 and decision.reason == "grown"
    again = batch.Controller(controller.settings, controller.state_dict())
    decision = again.observe(groups=1, samples=8, group_square_norms=1.0, square_norm=1.0)
    assert decision.reason == "unusable" and decision.variance is None and "two groups" in decision.unusable
    for rule in (
        "constant",
        {"noise-scale": {"ratio": 0.5}},
        {"linear-ramp": {"end": 64, "samples": 1000}},
        {"stagewise": {"stages": [{"batch": 2, "share": 0.5}, {"batch": 8, "share": 0.5}], "horizon": 100}},
    ):
        batch.Controller(batch.settings(2, 64, rule=rule)).skip(60)
    raises(pillion.InvalidArgument, "samples is -1", lambda: controller.skip(-1))
    raises(pillion.InvalidArgument, "finite", lambda: batch.Controller(batch.settings(8, 64, eta=math.nan)))
    raises(pillion.InvalidArgument, "`cap`", lambda: batch.Controller(batch.settings(8, 4)))
    raises(pillion.InvalidArgument, "eta", lambda: batch.Controller(batch.settings(8, 64, eta=1.5)))
    raises(pillion.InvalidArgument, "unknown field", lambda: batch.Controller({"basis": 1}))
    elements = of("f", 1, 2, math.inf, -3, math.nan)
    assert batch.square_norm(elements) == (14.0, 2)
    raises(TypeError, "float32", lambda: batch.square_norm(of("d", 1)))


def main() -> None:
    batches()
    for world in (1, 2, 3):
        run(world, body)
    run(2, lost)
    raises(ValueError, "store", lambda: pillion.connect(rank=1))
    print("the package without PyTorch: well")


if __name__ == "__main__":
    main()
