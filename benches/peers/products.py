#!/usr/bin/env python3
"""PyTorch's side of `kernels`: reads the name of a case of kernelbench on a line, answers with the median seconds of the same work."""

import argparse
import statistics
import sys
import time

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def random(rows, columns, dtype):
    return (2 * torch.rand(rows, columns) - 1).to(dtype)


def product(kernel, dtype, rows, inputs, outputs):
    """The call of a product of a linear layer, with operands of its own."""
    if kernel == "linear":
        x, w = random(rows, inputs, dtype), random(outputs, inputs, dtype)
        y = torch.empty(rows, outputs, dtype=dtype)
        return lambda: torch.mm(x, w.t(), out=y)
    if kernel == "linear_backward_input":
        grad_y, w = random(rows, outputs, dtype), random(outputs, inputs, dtype)
        grad_x = torch.empty(rows, inputs, dtype=dtype)
        return lambda: torch.mm(grad_y, w, out=grad_x)
    if kernel == "linear_backward_weight":
        grad_y, x = random(rows, outputs, dtype), random(rows, inputs, dtype)
        grad_w = random(outputs, inputs, torch.float32)
        if dtype == torch.float32:
            return lambda: grad_w.addmm_(grad_y.t(), x)
        # A product of bf16 has no f32 result to add to.
        rounded = torch.empty(outputs, inputs, dtype=dtype)
        return lambda: grad_w.add_(torch.mm(grad_y.t(), x, out=rounded))
    raise SystemExit(f"no kernel is called '{kernel}'")


def adamw(count):
    parameter = torch.nn.Parameter(2 * torch.rand(count) - 1)
    parameter.grad = 2 * torch.rand(count) - 1
    return torch.optim.AdamW([parameter], lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True).step


def call_of(name):
    kernel, variant = name.split("/")
    if kernel == "adamw":
        return adamw(int(variant.split()[0]) << 20)
    dtype, sizes = variant.split()
    return product(kernel, DTYPES[dtype], *map(int, sizes.split("x")))


@torch.no_grad()
def median(call, seconds):
    """Of three calls at least, after one that does not count."""
    call()
    began, samples = time.perf_counter(), []
    while len(samples) < 3 or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--milliseconds", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    ready, call = None, None
    for line in sys.stdin:
        if line.strip() != ready:
            # Two cases' operands together may be more than there is memory.
            call = None
            ready = line.strip()
            call = call_of(ready)
        print(median(call, given.milliseconds / 1000), flush=True)


if __name__ == "__main__":
    main()
