"""How the ranks of a process group meet, through PyTorch's store."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Optional

import torch.distributed as dist

from .._connection import Connection
from .._library import PillionError

_FAILED = "pillion/failed"


class _Store:
    """What `pillion.Store` asks for, of a store of PyTorch's. It fails once a rank has said that it
    cannot connect, so that nobody waits for that one."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def set(self, key: str, value: bytes) -> None:
        # As text, because stores take bytes in some versions of PyTorch only.
        self._store.set(key, value.hex())

    def get(self, key: str) -> Optional[bytes]:
        if self._store.check([_FAILED]):
            raise RuntimeError(self._store.get(_FAILED).decode())
        if self._store.check([key]):
            return bytes.fromhex(self._store.get(key).decode())
        return None

    def add(self, key: str, amount: int) -> int:
        return self._store.add(key, amount)


class Meeting:
    """The ranks of one group. All call `connect`, and agree on its outcome where they are on several
    hosts."""

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: timedelta) -> None:
        self._store, self._rank, self._world, self._timeout = store, rank, world, timeout

    def connect(self, seconds: float) -> Optional[Connection]:
        """The ranks, connected, or None where they are on several hosts that cannot be.

        Raises this rank's error where all are on one host."""
        failure: Optional[PillionError] = None
        connection: Optional[Connection] = None
        try:
            connection = Connection.through(_Store(self._store), self._rank, self._world, seconds, seconds)
        except PillionError as error:
            # Its traceback would keep the frames of PyTorch that make this group, and the group.
            failure = error.with_traceback(None)
            # The first one is the reason.
            self._store.compare_set(_FAILED, "", f"rank {self._rank}: {error}")
        text = "" if failure is None else str(failure)
        self._store.set(f"pillion/met/{self._rank}", json.dumps([_host(), text]))
        if connection is not None and connection.hosts == 1:
            return connection
        met = self._wait_for_all()
        failed = {rank: text for rank, (_, text) in met.items() if text}
        if not failed and len(met) == self._world:
            return connection
        if connection is not None:
            connection.close()
        if len({host for host, _ in met.values()}) < 2:
            raise failure if failure is not None else RuntimeError("a rank did not say whether it has connected")
        if self._rank == min(failed, default=0):
            why = str(self._store.get(_FAILED).decode()) if failed else "a rank did not come in time"
            print(
                f"pillion: ranks of several hosts cannot connect, so gloo moves their data. {why}",
                file=sys.stderr,
                flush=True,
            )
        return None

    def _wait_for_all(self) -> dict[int, tuple[str, str]]:
        """What each rank has said, of those that came in time."""
        end = time.monotonic() + self._timeout.total_seconds()
        met: dict[int, tuple[str, str]] = {}
        while len(met) < self._world and time.monotonic() < end:
            for rank in set(range(self._world)) - set(met):
                if self._store.check([f"pillion/met/{rank}"]):
                    met[rank] = tuple(json.loads(self._store.get(f"pillion/met/{rank}").decode()))
            time.sleep(0.002)
        return met


def _host() -> str:
    """What tells this host from others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = os.environ.get("PILLION_HOST", platform.node())
    return name + (boot.read_text().strip() if boot.exists() else "")
