"""A store of PyTorch's, through which Pillion's ranks meet."""

from __future__ import annotations

from typing import Optional

import torch.distributed as dist


class C10dStore:
    """What `pillion.Store` asks for."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def set(self, key: str, value: bytes) -> None:
        # As text, because stores take bytes in some versions of PyTorch only.
        self._store.set(key, value.hex())

    def get(self, key: str) -> Optional[bytes]:
        if not self._store.check([key]):
            return None
        return bytes.fromhex(self._store.get(key).decode())

    def add(self, key: str, amount: int) -> int:
        return self._store.add(key, amount)
