"""Fine-tunes LoRA on a frozen, quantised model: `python -m recipes.finetune experiment=qlora_docs`, or `lq-finetune`.

`lq-finetune experiment=qlora_hf model.source=<folder or hub name> data.source=<file, folder or data set>` takes any
causal language model; the adapter lands in the output folder, for lq-generate, lq-evaluate, lq-export, and for PEFT.
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
from lq_plugin.recipes.reports.before import validate_before
from lq_plugin.recipes.reports.summary import summary_of

build = partial(instantiate, _convert_="all")  # plain lists and dicts: OmegaConf's would end up in checkpoints


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="finetune")
def finetune(config: DictConfig) -> float | None:
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
        if resume is None:
            validate_before(trainer, model, data)
        trainer.fit(model, data, ckpt_path=resume)
    loss = trainer.callback_metrics.get("val/loss", trainer.callback_metrics.get("val/bits_per_byte"))
    return None if loss is None else float(loss)


def main() -> None:
    with hints_on_exit():
        finetune()


if __name__ == "__main__":
    main()
