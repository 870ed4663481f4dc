"""What torchrun starts on every rank: the runs of all test modules of this folder, into the folder that it is given."""

import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for module in sorted(Path(__file__).parent.glob("test_*.py")):
        import_module(module.stem).on_rank(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
