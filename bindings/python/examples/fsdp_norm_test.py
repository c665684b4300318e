"""A Llama of `transformers`, sharded by FSDP2, whose batch grows with the noise of its gradient.

    torchrun --standalone --nproc-per-node 2 fsdp_norm_test.py

The test of the norm (Lau et al. 2025) needs no collective of its own: its sums ride on the one that
clips the gradient. The batch grows by more rounds of gradient accumulation.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from pillion.torch import NormTest
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM


def sharded() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if dist.get_backend() == "pillion":
        # The other ranks read gathered weights and gradients in place.
        model.set_allocate_memory_from_process_group_for_comm(True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="pillion", help="gloo, to compare")
    parser.add_argument("--samples", type=int, default=3000, help="of the whole run")
    parser.add_argument("--eta", type=float, default=0.6, help="the smaller, the larger the batches")
    parser.add_argument("--log", default=None, help="a file for a line of JSON a step")
    options = parser.parse_args()

    dist.init_process_group(options.backend)
    rank, world = dist.get_rank(), dist.get_world_size()
    text = torch.tensor(list(Path(__file__).read_bytes()))
    micro_batch, length = 2, 64
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    unit = micro_batch * world
    test = NormTest(model, options.eta, base=2 * unit, cap=64 * unit, round_to=unit, log=options.log)
    chance = torch.Generator().manual_seed(100 + rank)
    seen = step = 0
    while seen < options.samples:
        rounds = test.batch // unit
        total = torch.zeros(())
        for number in range(rounds):
            # Reduced in every round: each micro-batch is a group, and many groups measure well.
            starts = torch.randint(len(text) - length, (micro_batch,), generator=chance)
            tokens = torch.stack([text[start : start + length] for start in starts])
            loss = model(input_ids=tokens, labels=tokens).loss / rounds
            loss.backward()
            total += loss.detach()
        test.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        batch = rounds * unit
        test.step(batch)
        seen, step = seen + batch, step + 1
        if step % 20 == 1:
            mean = total / world
            dist.all_reduce(mean)
            if rank == 0:
                scale = test.decision.noise_scale
                scale = "unknown" if scale is None else f"{scale:.0f}"
                print(f"step {step:4}  samples {seen:5}  batch {batch:4}  noise scale {scale}  loss {mean.item():.6f}")
    if rank == 0:
        print(f"{step} steps of {seen} samples; the batch grew from {2 * unit} to {batch}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    main()
