"""Numbers that ride on a sum of tensors, exactly, in any floating type.

A number of f64 travels as its eight bytes, each an element from 0 to 255. Every rank has a place of
its own and gives 0 in the others', so a sum over ranks changes nothing: x + 0 is exact.
"""

from __future__ import annotations

import torch

ROOM = 8


def put(number: torch.Tensor, rank: int, world: int, dtype: torch.dtype) -> torch.Tensor:
    """What rank `rank` gives: `world * ROOM` elements. `number`: one f64, of any device."""
    elements = torch.zeros(world, ROOM, dtype=dtype, device=number.device)
    elements[rank] = number.reshape(1).view(torch.uint8).to(dtype)
    return elements.view(-1)


def total(elements: torch.Tensor, world: int) -> torch.Tensor:
    """The sum of the ranks' numbers in order of rank, from the sum of what they gave: one f64."""
    return elements.view(world, ROOM).to(torch.uint8).view(torch.float64).sum()
