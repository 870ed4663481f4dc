"""`benchmark=matmul` in one picture: the time of each product against the number of rows, ours beside bitsandbytes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_WIDTH = 4  # panels in a row
OURS, THEIRS, SIXTEEN = "#2f6db5", "#d9662b", "#777777"

Line = tuple[list[int], list[float]]  # rows of x, milliseconds


def draw(records: Iterable[dict[str, Any]], path: Path) -> None:
    """A panel for each product that was timed; fp16, where it was, is in all of them. No products: no picture."""
    products = [record for record in records if record["ms"] and record["shape"].count("x") == 2]
    names = [name for name in sorted({record["name"] for record in products}) if name != "B1"]
    if not names:
        return
    figure = Figure(figsize=(13, 3.2 * -(-len(names) // _WIDTH)), dpi=130, layout="constrained")
    for axes, name in zip(figure.subplots(-(-len(names) // _WIDTH), _WIDTH, squeeze=False).flat, names, strict=False):
        _draw_product(axes, [record for record in products if record["name"] in (name, "B1")])
    for axes in figure.axes:
        axes.set_visible(bool(axes.lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_product(axes: Axes, records: list[dict[str, Any]]) -> None:
    ops = [record["op"] for record in records if ":" not in record["op"]]
    op = next((op for op in ops if op != "fp16"), "fp16")
    for line, color, label in (
        (_line(records, "fp16"), SIXTEEN, "fp16"),
        (_line(records, op, "bitsandbytes"), THEIRS, "bitsandbytes"),
        (_line(records, op), OURS, "ours"),
    ):
        if line[0]:
            axes.plot(*line, color=color, marker="o", markersize=4, linewidth=1.6, label=label)
    axes.set_title(op, loc="left", fontsize=11, fontweight="bold")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({_rows(record) for record in records}))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("rows of x")
    axes.set_ylabel("ms")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _rows(record: dict[str, Any]) -> int:
    return int(record["shape"].partition(" ")[0])


def _line(records: list[dict[str, Any]], op: str, peer: str | None = None) -> Line:
    points = sorted(
        (_rows(record), record["peers"][peer] if peer else record["ms"])
        for record in records
        if record["op"] == op and (peer is None or peer in record["peers"])
    )
    return [rows for rows, _ in points], [ms for _, ms in points]
