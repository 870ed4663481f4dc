from lightning.pytorch import Trainer


def is_rehearsal(trainer: Trainer) -> bool:
    """With fast_dev_run one batch of everything goes through, and nothing of it is kept."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # a connector sets it
