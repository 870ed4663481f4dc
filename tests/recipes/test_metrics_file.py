"""metrics.csv outlives its process, keeps what was logged before, and takes back only what is logged again."""

import math
import os
from pathlib import Path

import pytest
import torch

from lq_plugin.checkpoint_io import AtomicCheckpointIO
from lq_plugin.recipes.reports.metrics_file import MetricsFile, read_rows

LOSSES = [8.0, math.pi, 1 / 3, 0.1]


def logger(folder: Path) -> MetricsFile:
    return MetricsFile(folder, name="", version="metrics")


def logged(folder: Path) -> list[tuple[int, float]]:
    rows = read_rows(folder / "metrics" / "metrics.csv")
    return [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]


def test_each_row_is_in_the_file_at_once_with_every_digit(tmp_path):
    run = logger(tmp_path)
    for step, loss in enumerate(LOSSES):
        run.log_metrics({"loss": torch.tensor(loss)}, step)
        assert logged(tmp_path)[-1] == (step, torch.tensor(loss).item())


def test_a_resumed_run_keeps_earlier_rows_and_replaces_those_after_its_checkpoint(tmp_path):
    killed = logger(tmp_path)
    for step, loss in enumerate(LOSSES):
        killed.log_metrics({"loss": loss}, step)
    resumed = logger(tmp_path)
    assert resumed.experiment
    assert [step for step, _ in logged(tmp_path)] == [0, 1, 2, 3]
    for step in (2, 3, 4):
        resumed.log_metrics({"loss": step + 0.5}, step)
    resumed.finalize("success")
    assert logged(tmp_path) == [(0, LOSSES[0]), (1, LOSSES[1]), (2, 2.5), (3, 3.5), (4, 4.5)]
    assert os.listdir(tmp_path / "metrics") == ["metrics.csv"]


def test_a_new_column_keeps_all_rows(tmp_path):
    for start in (0, 2):
        run = logger(tmp_path)
        run.log_metrics({"loss": 1.0}, start)
        run.log_metrics({"val": 2.0}, start)
        run.log_metrics({"loss": 3.0, "speed": 4.0}, start + 1)
    assert logged(tmp_path) == [(0, 1.0), (1, 3.0), (2, 1.0), (3, 3.0)]
    rows = read_rows(tmp_path / "metrics" / "metrics.csv")
    assert [row["val"] for row in rows] == ["", "2.0", "", "", "2.0", ""]
    assert [row["speed"] for row in rows] == ["", "", "4.0", "", "", "4.0"]


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    run = logger(tmp_path)
    for step, loss in enumerate(LOSSES):
        run.log_metrics({"loss": loss}, step)
    path = tmp_path / "metrics" / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-3])
    resumed = logger(tmp_path)
    resumed.log_metrics({"loss": 7.0}, 3)
    assert logged(tmp_path) == [*enumerate(LOSSES[:3]), (3, 7.0)]


def test_rows_without_a_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got no step"):
        logger(tmp_path).log_metrics({"loss": 1.0})


def test_what_is_logged_twice_is_written_once(tmp_path):
    run = logger(tmp_path)
    for metrics in ({"loss": 1.0}, {"loss": 1.0}, {"val": 2.0}, {"loss": 1.0}):
        run.log_metrics(metrics, 0)
    run.log_metrics({"loss": 1.0}, 1)
    assert logged(tmp_path) == [(0, 1.0), (0, 1.0), (1, 1.0)]


@pytest.mark.integration
def test_a_step_is_in_the_file_before_its_checkpoint_is_written(train, tmp_path, monkeypatch):
    """A run that is killed in between goes on after this step and never logs it again."""
    saved = {}
    save = AtomicCheckpointIO.save_checkpoint

    def noting(self: AtomicCheckpointIO, checkpoint: dict, path: Path, **options: object) -> None:
        rows = read_rows(tmp_path / "outputs" / "run_0" / "metrics" / "metrics.csv")
        saved[checkpoint["global_step"]] = [int(row["step"]) for row in rows if row["train/bits_per_byte"]]
        save(self, checkpoint, path, **options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", noting)
    train("trainer.log_every_n_steps=1")
    assert saved == {step: list(range(step)) for step in (2, 4, 6)}
