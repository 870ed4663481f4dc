"""The W&B logger of the recipes: offline unless WANDB_MODE says otherwise, and silent."""

import os

from lightning.pytorch.loggers import WandbLogger


class WandbRun(WandbLogger):
    """Writes its run folder to save_dir/wandb; nothing is sent anywhere unless WANDB_MODE=online."""

    def __init__(self, *, project: str, name: str, save_dir: str) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("logger=wandb needs wandb: pip install wandb, or pass logger=csv") from error
        mode = os.environ.get("WANDB_MODE", "offline")
        settings = wandb.Settings(silent=True, console="off")
        super().__init__(project=project, name=name, save_dir=save_dir, mode=mode, settings=settings)
        # Lightning passes it always; W&B ignores it and warns about it.
        self._wandb_init.pop("anonymous", None)
