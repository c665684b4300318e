"""A barrier that names every rank that is late."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist


class LateRanks:
    """Barriers of a group, through its store, so that they also work where ranks cannot talk.

    A rank says that it has come by a key with the number of its call. Rank 0 takes one call of
    each rank for each of its own, so a rank that missed a barrier comes in time for the next."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world
        # Of this rank; on rank 0, the calls of each rank that have been taken.
        self._calls = 0
        self._taken = [0] * world

    def barrier(self, timeout: timedelta) -> None:
        """Returns once all ranks have called. Rank 0 waits for the others, and tells them who is
        late."""
        late = self._wait_for_all(timeout) if self._rank == 0 else self._wait_for_rank_zero(timeout)
        if late:
            names = ("Rank " if len(late) == 1 else "Ranks ") + ", ".join(map(str, late))
            text = f"{names} failed to pass monitoredBarrier within the timeout of {timeout}"
            raise dist.DistBackendError(f"Rank 0 timed out in monitoredBarrier: {text}" if self._rank == 0 else text)

    def _wait_for_all(self, timeout: timedelta) -> list[int]:
        keys = {rank: f"barrier/{rank}/{self._taken[rank] + 1}" for rank in range(1, self._world)}
        late = self._wait(keys, timeout)
        came = [rank for rank in keys if rank not in late]
        for rank in came:
            self._taken[rank] += 1
            self._store.set(f"{keys[rank]}/late", ",".join(map(str, late)))
        return late

    def _wait_for_rank_zero(self, timeout: timedelta) -> list[int]:
        self._calls += 1
        key = f"barrier/{self._rank}/{self._calls}"
        self._store.set(key, "here")
        # Rank 0 waits as long for the others, and begins when it comes.
        if self._wait({0: f"{key}/late"}, timeout * 2 + timedelta(seconds=1)):
            text = f"Rank 0 failed to pass monitoredBarrier within the timeout of {timeout}"
            raise dist.DistBackendError(f"Rank {self._rank} timed out in monitoredBarrier: {text}")
        return [int(rank) for rank in self._store.get(f"{key}/late").decode().split(",") if rank]

    def _wait(self, keys: dict[int, str], timeout: timedelta) -> list[int]:
        """Waits for keys of ranks; returns the ranks whose keys do not come in time."""
        end, nap = time.monotonic() + timeout.total_seconds(), 0.001
        missing = dict(keys)
        while True:
            # The store's own wait is coarse: a file's looks once a second.
            missing = {rank: key for rank, key in missing.items() if not self._store.check([key])}
            left = end - time.monotonic()
            if not missing or left <= 0:
                return list(missing)
            time.sleep(min(nap, left))
            nap = min(nap * 1.5, 0.02)
