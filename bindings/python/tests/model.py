"""A Llama in the manner of its paper, of any size."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // 64) * 64
        self.heads = heads
        self.before_attention, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.query_key_value(self.before_attention(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attention = functional.scaled_dot_product_attention(
            rotate(query, turn), rotate(key, turn), value, is_causal=True
        )
        x = x + self.attended(attention.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.before_mlp(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class Llama(nn.Module):
    def __init__(self, vocabulary: int = 512, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.before_head, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.half = width // heads // 2

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean loss of tokens [batch, length + 1] in nats."""
        given, wanted = tokens[:, :-1], tokens[:, 1:]
        speed = 10000.0 ** (-torch.arange(self.half, dtype=torch.float32) / self.half)
        turn = torch.polar(torch.ones(()), torch.arange(given.shape[1])[:, None] * speed)
        x = self.embedding(given)
        for block in self.blocks:
            x = block(x, turn)
        logits = self.head(self.before_head(x))
        return functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())
