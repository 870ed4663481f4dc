"""What a person sees of a run: progress, picture, and errors before the training rather than after it."""

import io

import pytest
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from rich.console import Console

from lq_plugin.recipes.reports import progress
from lq_plugin.recipes.reports.figure import TrainingFigure, draw, read_series
from lq_plugin.recipes.reports.sample import TextSample


@pytest.mark.integration
def test_in_a_file_progress_is_a_few_lines_with_loss_speed_and_memory(train):
    run = train("trainer.max_steps=20", "trainer.val_check_interval=10", "callbacks.progress.lines=5")
    lines = [line for line in run.printed.splitlines() if line.startswith("step ")]
    assert [line.removeprefix("step ").split("  ")[0].strip() for line in lines] == [
        "4/20",
        "8/20",
        "12/20",
        "16/20",
        "20/20",
    ]
    assert "\x1b" not in run.printed
    for word in ("loss ", "val ", " tokens/s", "peak ", " MB", " s left"):
        assert word in lines[-1]


@pytest.mark.integration
def test_in_a_terminal_progress_is_one_bar_of_eighty_columns(train, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(progress, "get_console", lambda: console)
    monkeypatch.setattr("rich.progress.get_console", lambda: console)
    train()
    bars = [line for line in console.file.getvalue().splitlines() if "6/6" in line]  # type: ignore[attr-defined]
    assert all(word in bars[-1] for word in ("loss ", "val ", " tokens/s", "peak ", " MB", " left"))


def test_a_figure_is_drawn_from_whatever_was_logged(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/bits_per_byte,val/bits_per_byte\n0,8.0,\n0,,7.5\n9,4.0,\n")
    series = read_series(tmp_path / "metrics.csv")
    assert series == {"train/bits_per_byte": ([1, 10], [8.0, 4.0]), "val/bits_per_byte": ([1], [7.5])}
    draw(series, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size[1] > 1000


def test_parts_that_do_not_fit_say_so_before_training(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, max_steps=1, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="pass logger=csv or logger=wandb"):
        TrainingFigure("figure.png").setup(trainer, LightningModule(), "fit")
    with pytest.raises(TypeError, match="asks a language model to write, got LightningModule"):
        TextSample("sample.txt", prompt="a", length=1, temperature=1.0).setup(trainer, LightningModule(), "fit")
