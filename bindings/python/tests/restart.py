"""A rank that dies in the first attempt of a job, which torchrun starts again.

`torchrun --standalone --nproc-per-node 2 --max-restarts 1 restart.py`
"""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist


def main() -> None:
    dist.init_process_group("pillion", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    tensor = torch.ones(10)
    for step in range(20):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and step == 10 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        tensor.fill_(rank + 1)
        dist.all_reduce(tensor)
        assert tensor[0] == world * (world + 1) / 2
    dist.destroy_process_group()
    if rank == 0:
        print(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}: well")


if __name__ == "__main__":
    main()
