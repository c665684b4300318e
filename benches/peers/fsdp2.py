#!/usr/bin/env python3
"""PyTorch's side of `ci/gpu`: a Llama of its own layers, sharded by FSDP2, on random tokens; prints
tokens a second as JSON.

    python3 benches/peers/fsdp2.py                               # the preset micro-llama-300m on one GPU
    torchrun --nproc-per-node 2 benches/peers/fsdp2.py           # on two
    python3 benches/peers/fsdp2.py --device cpu --model tiny --seq 16

Needs PyTorch 2.6 or newer, as it is found, and nothing else. Eager, attention by
scaled_dot_product_attention, weights in f32 that are gathered in bf16, reductions in f32, fused AdamW
and clipping. Exits with 3 where there is no PyTorch, or no GPU that it can use.
"""

import argparse
import json
import os
import statistics
import sys
import time

try:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn import functional
except ImportError as error:
    print(f"no PyTorch with FSDP2: {error}", file=sys.stderr)
    sys.exit(3)

# vocabulary, width, hidden width, blocks, heads, key heads
MODELS = {"micro-llama-300m": (32000, 1024, 5632, 12, 16, 4), "tiny": (256, 64, 192, 2, 4, 2)}


class Block(nn.Module):
    def __init__(self, width, hidden, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.norm, self.norm2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.dim, bias=False)
        self.v = nn.Linear(width, kv_heads * self.dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x, cos, sin):
        def heads(y, count):
            return y.unflatten(-1, (count, self.dim)).transpose(1, 2)

        def rotate(y):
            low, high = y.chunk(2, -1)
            return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

        y = self.norm(x)
        q, k = rotate(heads(self.q(y), self.heads)), rotate(heads(self.k(y), self.kv_heads))
        v = heads(self.v(y), self.kv_heads)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, vocabulary, width, hidden, blocks, heads, kv_heads):
        super().__init__()
        self.half = width // heads // 2
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, hidden, heads, kv_heads) for _ in range(blocks))
        self.norm = nn.RMSNorm(width, 1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        frequencies = 10000.0 ** (-torch.arange(self.half, device=x.device) / self.half)
        angles = torch.arange(tokens.shape[1], device=x.device)[:, None] * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="micro-llama-300m")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=4, help="samples of a rank")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} sees no GPU", file=sys.stderr)
        sys.exit(3)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    on_gpu = given.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)
    model = Llama(*MODELS[given.model]).to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh(given.device, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    vocabulary = MODELS[given.model][0]
    tokens = torch.randint(0, vocabulary, (given.micro_batch, given.seq + 1), device=device)
    times = []
    for _ in range(given.steps):
        started = time.perf_counter()
        logits = model(tokens[:, :-1]).float()
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # The loss reaches the host once in a step, as ours does.
        value = loss.item()
        times.append(time.perf_counter() - started)
    # The first steps allocate.
    step = statistics.median(times[min(3, given.steps - 1):])
    if dist.get_rank() == 0:
        speed = dist.get_world_size() * given.micro_batch * given.seq / step
        print(json.dumps({"tokens_per_s": speed, "step_ms": 1e3 * step, "loss": value, "torch": torch.__version__}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
