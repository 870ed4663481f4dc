"""What other packages print on every run and no user can act on is left out of the console."""

import logging
import warnings


def quieten() -> None:
    """Drops what Lightning advertises, what the summary says better, and its use of a deprecated torch function."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_worth_reading)
    # The folder of a run that goes on holds its checkpoints: resume=auto has said so.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # Lightning 2.6 with torch 2.13, once in every run.
    warnings.filterwarnings("ignore", message=".*LeafSpec", module=r"lightning\.pytorch\.utilities\._pytree")


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("💡 Tip", "`Trainer.fit` stopped"))
