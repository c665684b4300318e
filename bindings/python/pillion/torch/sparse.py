"""The sum of sparse tensors: every rank gathers the others' elements, and adds them up."""

from __future__ import annotations

from typing import Any

import torch


def all_reduce(group: Any, tensor: torch.Tensor) -> None:
    """tensor = the sum of the ranks' tensors, in order of rank. All have the same shape."""
    with torch.no_grad():
        own = tensor.coalesce()
        indices, values = own.indices().contiguous(), own.values().contiguous()
        counts = [torch.empty(1, dtype=torch.int64) for _ in range(group._world)]
        group.allgather([counts], [torch.tensor([values.size(0)])]).wait()
        lengths = [int(count) for count in counts]
        all_indices = [torch.empty((indices.size(0), length), dtype=indices.dtype) for length in lengths]
        all_values = [torch.empty((length, *values.shape[1:]), dtype=values.dtype) for length in lengths]
        group.allgather([all_indices], [indices]).wait()
        group.allgather([all_values], [values]).wait()
        total = torch.sparse_coo_tensor(torch.cat(all_indices, 1), torch.cat(all_values), tensor.shape)
        tensor.copy_(total.coalesce())
