"""Trains what a Hydra configuration describes: `python -m recipes.train experiment=bytes_gpt`, or `lq-train`.

Each part is a class named by a `_target_` in conf/, of this project or of yours.
"""

from functools import partial

import hydra
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf

from lq_plugin.checkpoint_io import AtomicCheckpointIO
from lq_plugin.recipes.launch.console import quieten
from lq_plugin.recipes.launch.processes import prepare_multirun_job
from lq_plugin.recipes.launch.resume import checkpoint_to_resume
from lq_plugin.recipes.launch.settings import check_settings, hints_on_exit
from lq_plugin.recipes.reports.summary import summary_of

build = partial(instantiate, _convert_="all")  # plain lists and dicts: OmegaConf's would end up in checkpoints


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="train")
def train(config: DictConfig) -> float | None:
    quieten()
    prepare_multirun_job()
    check_settings(config)
    resume = checkpoint_to_resume(config)
    seed_everything(config.seed, workers=True, verbose=False)
    data = build(config.data)
    model = build(config.model, optimizer=build(config.optim))
    trainer = build(
        config.trainer,
        plugins=[build(config.quant), AtomicCheckpointIO()],
        logger=[build(logger) for logger in config.logger.values() if logger],
        callbacks=[build(callback) for callback in config.callbacks.values() if callback],
    )
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))
    with summary_of(trainer):
        trainer.fit(model, data, ckpt_path=resume)
    bits = trainer.callback_metrics.get("val/bits_per_byte")
    return None if bits is None else float(bits)


def main() -> None:
    with hints_on_exit():
        train()


if __name__ == "__main__":
    main()
