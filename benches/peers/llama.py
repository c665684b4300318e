#!/usr/bin/env python3
"""PyTorch's side of `train`: a Llama by Hugging Face on random tokens, sharded by FSDP2 over gloo, or whole in one process.
Started by torchrun for the one, as it is (--single) for the other. Rank 0 writes a JSON object to --json."""

import argparse
import json
import statistics
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM


def pss():
    """Bytes of this process, shared pages counted in parts."""
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", required=True)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--single", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="samples of a rank")
    parser.add_argument("--seq", type=int, default=256)
    given = parser.parse_args()

    imported = pss()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    rank, world = 0, 1
    if not given.single:
        dist.init_process_group("gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    # The preset peer-30m.
    config = LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=8, vocab_size=4096, max_position_embeddings=given.seq,
                         tie_word_embeddings=False, attn_implementation="sdpa")
    model = LlamaForCausalLM(config)
    narrow = given.dtype == "bf16"
    if not given.single:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if narrow else None,
                                      reduce_dtype=torch.float32 if narrow else None)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, config.vocab_size, (given.batch, given.seq))
    times, peak = [], 0
    for _ in range(given.steps):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow and given.single):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
        peak = max(peak, pss())
    # The first step allocates.
    step = statistics.median(times[1:])
    if rank == 0:
        result = {"tokens_per_s": world * given.batch * given.seq / step, "pss": peak, "imports": imported}
        with open(given.json, "w") as file:
            json.dump(result, file)
    if not given.single:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
