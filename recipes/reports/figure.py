"""The run in one picture: loss, speed and memory against the step, drawn from metrics.csv."""

import csv
from pathlib import Path
from statistics import fmean

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lq_plugin.recipes.reports.rehearsal import is_rehearsal

Series = tuple[list[int], list[float]]  # steps, values

SMOOTHED_OVER = 9  # logged steps
BLUE, ORANGE, GREEN, GREY = "#2f6db5", "#d9662b", "#2e8b57", "#777777"
# Dashed: gradients are as large as the weights, and both lines should be seen.
MEMORY = {"rest": (GREY, "-"), "optimizer_state": (GREEN, "-"), "weights": (BLUE, "-"), "gradients": (ORANGE, "--")}


class TrainingFigure(Callback):
    """At the end of training draws `path` (PNG) from what the CSVLogger wrote."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not is_rehearsal(trainer) and not any(isinstance(logger, CSVLogger) for logger in trainer.loggers):
            raise ValueError(
                f"TrainingFigure draws what a CSVLogger wrote, the Trainer has {trainer.loggers}; "
                "pass logger=csv or logger=wandb, or leave the figure out with ~callbacks.figure"
            )

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
                draw(read_series(Path(logger.log_dir) / "metrics.csv"), self.path)


def read_series(metrics: Path) -> dict[str, Series]:
    """Every column of metrics.csv with the steps at which it has a value."""
    series: dict[str, Series] = {}
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name != "step":
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(int(row["step"]) + 1)  # logged under the number of steps before it
                    values.append(float(value))
    return series


def draw(series: dict[str, Series], path: Path) -> None:
    figure = Figure(figsize=(8, 9), dpi=130, layout="constrained")
    loss, speed, memory = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    _draw_loss(loss, series)
    _draw_speed(speed, series)
    _draw_memory(memory, series)
    for axes, title in ((loss, _loss_in(series)[1]), (speed, "tokens per second"), (memory, "memory, MB")):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(color="#999999")
    memory.set_xlabel("step")
    figure.savefig(path)


def _loss_in(series: dict[str, Series]) -> tuple[str, str]:
    """The name of the loss after train/ and val/, and what it is called."""
    bytes_are_known = not {"train/loss", "val/loss"} & series.keys()
    return ("bits_per_byte", "bits per byte") if bytes_are_known else ("loss", "loss, nats per token or sample")


def _draw_loss(axes: Axes, series: dict[str, Series]) -> None:
    name = _loss_in(series)[0]
    if training := series.get(f"train/{name}"):
        axes.plot(*training, color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(training[0], _smoothed(training[1]), color=BLUE, linewidth=1.8, label="training, smoothed")
    if validation := series.get(f"val/{name}"):
        axes.plot(*validation, color=ORANGE, marker="o", markersize=5, linewidth=1.2, label="validation")
        axes.annotate(
            f"{validation[1][-1]:.3f}",
            (validation[0][-1], validation[1][-1]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=ORANGE,
            fontweight="bold",
        )
    if training or validation:
        axes.legend(frameon=False)


def _draw_speed(axes: Axes, series: dict[str, Series]) -> None:
    if tokens := series.get("throughput/tokens_per_second"):
        axes.plot(*tokens, color=GREEN, linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,.0f}")


def _draw_memory(axes: Axes, series: dict[str, Series]) -> None:
    """One line for each kind on a logarithmic axis: on a CPU the process is a hundred times its weights."""
    for kind, (color, style) in MEMORY.items():
        if sizes := series.get(f"memory/{kind}_mb"):
            label = f"{kind.replace('_', ' ')}: {sizes[1][-1]:,.1f}"
            axes.plot(*sizes, color=color, linestyle=style, linewidth=1.8, label=label)
    if axes.lines:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.legend(frameon=False, ncols=2)


def _smoothed(values: list[float]) -> list[float]:
    """Mean over SMOOTHED_OVER values around each; over fewer at both ends, and around the value also at the first."""
    reaches = [min(SMOOTHED_OVER // 2, i) for i in range(len(values))]
    return [fmean(values[i - reach : i + reach + 1]) for i, reach in enumerate(reaches)]
