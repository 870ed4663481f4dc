"""metrics.csv that a killed run leaves behind and a resumed one goes on with.

Lightning's CSVLogger keeps a hundred steps in memory and deletes the file that it finds in its folder.
"""

import csv
from collections.abc import Collection
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from torch import Tensor

from lq_plugin.checkpoint_io import replacing

Row = dict[str, Any]


class MetricsFile(CSVLogger):
    """A CSVLogger that writes each row at once, with every digit, and keeps the rows of the run that it goes on with.

    Rows from the first step that is logged again are of steps after the checkpoint: the new ones take their place.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = RowWriter(self.log_dir)
        return self._experiment  # type: ignore[return-value]  # the base class names its own writer

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if step is None:
            raise ValueError("metrics.csv is in the order of the steps, got no step: call log_metrics(metrics, step=n)")
        super().log_metrics(metrics, step)


class RowWriter(ExperimentWriter):
    """Appends rows to log_dir/metrics.csv; a new column rewrites the file, which is whole at every moment."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.path = Path(log_dir) / self.NAME_METRICS_FILE
        self._newest: tuple[int, set[str]] | None = None
        self.before = read_rows(self.path)  # of the run that this one goes on with, until the first row comes

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        assert step is not None, "MetricsFile checks it"
        if self._has(metrics_dict.keys(), step):
            return
        self._newest = (step, set(metrics_dict))
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics_dict.items()}
        row = {**values, "step": step}
        new = row.keys() - set(self.metrics_keys)
        if new or self.before:
            kept = self._rows_until(step)
            self.metrics_keys = sorted({*self.metrics_keys, *row, *(name for earlier in kept for name in earlier)})
            self._rewrite([*kept, row])
        else:
            with self.path.open("a", newline="") as file:
                file.write(self._text([row]))

    def _has(self, names: Collection[str], step: int) -> bool:
        """Whether the last row says the same: a step with a checkpoint is logged before it and after it."""
        return not names or self._newest == (step, set(names))

    def save(self) -> None:
        """Nothing is held back."""

    def _rows_until(self, step: int) -> list[Row]:
        if not self.before:
            return read_rows(self.path)
        kept = [row for row in self.before if int(row["step"]) < step]
        self.before = []
        return kept

    def _rewrite(self, rows: list[Row]) -> None:
        header = ",".join(self.metrics_keys) + "\r\n"
        with replacing(self.path) as file:
            file.write((header + self._text(rows)).encode())

    def _text(self, rows: list[Row]) -> str:
        text = StringIO(newline="")
        csv.DictWriter(text, self.metrics_keys).writerows(rows)
        return text.getvalue()

    def _check_log_dir_exists(self) -> None:
        """What is there is kept."""


def read_rows(path: Path) -> list[Row]:
    """The rows of metrics.csv; none without the file, and none of a last line that was cut short."""
    if not path.exists():
        return []
    text = path.read_bytes().decode()
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return list(csv.DictReader(lines))
