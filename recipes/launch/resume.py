"""`resume=auto`: go on from the newest checkpoint that is whole, or begin if there is none.

Newest is the one written last, by the modification time of its file. Where every run has a folder of its own (the
default), those of the runs beside it count that have the same settings (SAME); where hydra.run.dir is fixed, and in a
multirun, those in the run's own folder.
"""

import pickle
import sys
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lq_plugin.checkpoint_io import DamagedCheckpointError, check

AUTO = "auto"
CHECKPOINTS = "checkpoints"
SAME = ("name", "seed", "lr", "quant", "optim", "model", "data")  # what makes two runs one that was interrupted
CONFIG = ".hydra/config.yaml"


class OccupiedFolderError(CompactHydraException):
    """Hydra prints the message of this one without a stack trace."""


def checkpoint_to_resume(config: DictConfig) -> str | None:
    """What `resume` names, the newest whole checkpoint for `auto`, None for a beginning; says which one and why.

    A run that begins does not write among the checkpoints of another one: that is an error.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    if config.resume == AUTO:
        path = newest_whole(checkpoints_for(config, folder))
        _tell_processes_of_this_run(path)
        return None if path is None else str(path)
    if config.resume is None and not config.trainer.fast_dev_run:
        _refuse_to_begin_among(sorted((folder / CHECKPOINTS).glob("*.ckpt")), folder)
    return config.resume


def checkpoints_for(config: DictConfig, folder: Path) -> list[Path]:
    """All checkpoints that the run in `folder` may go on from, the one written last first."""
    folders = [folder]
    if _has_folder_of_its_own():
        folders += [run for run in folder.parent.iterdir() if run != folder and _is_same(run / CONFIG, config)]
    paths = [path for run in folders for path in (run / CHECKPOINTS).glob("*.ckpt")]
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def newest_whole(paths: list[Path]) -> Path | None:
    """The first that a run can go on from; those before it are named with what is wrong with them."""
    for path in paths:
        try:
            step = _step(path)
        except (DamagedCheckpointError, OSError, ValueError) as error:
            _say(f"resume=auto: passing over {path}: {error}")
        else:
            _say(f"resume=auto: going on from {path} (step {step})")
            return path
    _say("resume=auto: no whole checkpoint" + (" among these" if paths else "") + ", starting from the beginning")
    return None


def _step(path: Path) -> int:
    """The step of a whole checkpoint; DamagedCheckpointError, OSError or ValueError for anything else."""
    check(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"it holds more than tensors and plain values ({error})") from error
    if not isinstance(checkpoint, dict) or not {"global_step", "loops", "optimizer_states"} <= checkpoint.keys():
        raise ValueError("it holds weights and no state of a run: give it as resume=<path> to an evaluation")
    return checkpoint["global_step"]


def _has_folder_of_its_own() -> bool:
    """Whether hydra.run.dir has the time in it; jobs of a multirun stand beside jobs with other values."""
    run = _plain(HydraConfig.get(), "run")
    return HydraConfig.get().mode is RunMode.RUN and "${now:" in run["dir"]


def _is_same(saved: Path, config: DictConfig) -> bool:
    if not saved.exists():
        return False
    theirs, ours = OmegaConf.load(saved), config
    return all(_plain(theirs, key) == _plain(ours, key) for key in SAME)


def _plain(config: Any, key: str) -> Any:
    """A value as it is written, with interpolations as such."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=False)).get(key)


def _tell_processes_of_this_run(path: Path | None) -> None:
    """Lightning starts them with this process's command line, and they must not look for themselves."""
    found = "resume=null" if path is None else f'resume="{path}"'
    sys.argv = [*(word for word in sys.argv if word.lstrip("+") != f"resume={AUTO}"), found]


@rank_zero_only
def _refuse_to_begin_among(checkpoints: list[Path], folder: Path) -> None:
    if checkpoints:
        raise OccupiedFolderError(
            f"{folder} holds {len(checkpoints)} checkpoints of an earlier run, and this one would begin at step 0: go "
            "on with resume=auto, or choose another folder: hydra.run.dir=/path/to/folder"
        )


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)
