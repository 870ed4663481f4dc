"""The table that tells what a conversion did: layers of one kind in one row, and the share that is quantised last."""

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from lq_plugin.conversion import Conversion, Layer

_WIDTH = 160

# id of a parameter -> bytes of its optimizer state before and after
StateBytes = Mapping[int, tuple[int, int]]


@dataclass
class _Row:
    name: str
    shape: str
    outcome: str
    count: int = 0
    weight_bytes: int = 0
    state_bytes: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, parameters: Iterable[nn.Parameter], states: StateBytes) -> None:
        self.count += 1
        for parameter in parameters:
            self.weight_bytes += parameter.numel() * parameter.element_size()
            for position, size in enumerate(states.get(id(parameter), (0, 0))):
                self.state_bytes[position] += size


def conversion_table(conversion: Conversion, states: StateBytes | None = None) -> str:
    """The table as text. states adds the columns of the optimizer state."""
    rows = _rows(conversion, states or {})
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("layer", "shape", "format, or why left alone"):
        table.add_column(title, no_wrap=True)
    titles = ["weight before", "after"] + (["optimizer state before", "after"] if states is not None else [])
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        name = f"{row.name} ({row.count}×)" if row.count > 1 and row is not rows[-1] else row.name
        # Formats that train the parameter keep its bytes.
        cells = [row.weight_bytes] * 2 + (row.state_bytes if states is not None else [])
        table.add_row(name, row.shape, row.outcome, *map(_size, cells))
    return f"{_render(table)}\n{_share(conversion)}"


def _rows(conversion: Conversion, states: StateBytes) -> list[_Row]:
    """A row for each kind of layer, one for all other parameters and one for the sum."""
    rows: dict[tuple[str, ...], _Row] = {}
    total = _Row("total", "", "")
    seen: set[int] = set()
    for layer in conversion.layers:
        new = [p for p in layer.parameters if id(p) not in seen]
        seen |= {id(p) for p in new}
        key = _kind(layer)
        rows.setdefault(key, _Row(*key)).add(new, states)
        total.add(new, states)
    others = _Row("everything else", "", "not a linear layer")
    others.add(conversion.rest, states)
    total.add(conversion.rest, states)
    return [*rows.values(), *([others] if conversion.rest else []), total]


def _kind(layer: Layer) -> tuple[str, str, str]:
    name = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", layer.name) or "(the model)"
    shape = "×".join(map(str, layer.module.weight.shape))  # type: ignore[arg-type]
    reason = re.sub(r"\.\d+(?=\.|$)", ".*", layer.reason)
    return name, shape, layer.formats.name if layer.formats else reason


def _share(conversion: Conversion) -> str:
    names = ", ".join(dict.fromkeys(layer.formats.name for layer in conversion.converted if layer.formats)) or "none"
    return (
        f"{names}: {conversion.share:.1%} of the weights outside the embeddings are quantised "
        f"({conversion.quantized_weights:,} of {conversion.weights:,})"
    )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _render(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=_WIDTH, color_system=None).print(table)
    return "\n".join(line[1:].rstrip() for line in text.getvalue().strip("\n").splitlines())
