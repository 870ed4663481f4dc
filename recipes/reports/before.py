"""What the model can do before it is trained, so that the end of a run says what was gained."""

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lq_plugin.recipes.reports.rehearsal import is_rehearsal


def validate_before(trainer: Trainer, model: LightningModule, data: LightningDataModule) -> None:
    """Prints and logs, at step 0, each validation metric of the untrained adapter, which is the base model."""
    if is_rehearsal(trainer):
        return
    found = trainer.validate(model, data, verbose=False)
    _say([f"{name} {value:.4f}" for metrics in found for name, value in metrics.items()])


@rank_zero_only
def _say(texts: list[str]) -> None:
    if texts:
        print(f"before training: {', '.join(texts)}", flush=True)
