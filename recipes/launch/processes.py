"""Multirun beside Lightning's own launcher of DDP processes.

The launcher starts the other processes with this process's command line. In a multirun that is the whole sweep: each
of them would run a sweep of its own, in folders of its own. Here the command line becomes that of the current job, and
what the job before it left behind is removed. https://github.com/facebookresearch/hydra/issues/2070
"""

import os
import sys

import torch.distributed
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import read_write

EXTERNAL_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS")
LEFT_BY_LIGHTNING = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")


def prepare_multirun_job() -> None:
    """Call first in the task function; it does nothing outside of a multirun."""
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return
    config = HydraConfig.get()
    sys.argv = [sys.argv[0], *hydra_options(sys.argv[1:]), *config.overrides.task]
    with read_write(config):  # type: ignore[arg-type]  # a DictConfig of that schema
        config.run.dir = config.runtime.output_dir  # Lightning passes it to the processes that it starts
    if not any(name in os.environ for name in EXTERNAL_LAUNCHERS):
        for name in LEFT_BY_LIGHTNING:
            os.environ.pop(name, None)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def hydra_options(arguments: list[str]) -> list[str]:
    """Hydra's own options (--config-dir x) among words that also hold overrides (key=value, ~key) and perhaps -m."""
    options = [word for word in arguments if word.startswith("--") or not ("=" in word or word.startswith("~"))]
    return [word for word in options if word not in ("-m", "--multirun")]
