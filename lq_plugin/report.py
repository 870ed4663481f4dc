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

_WIDTH = 200

# id of a parameter -> bytes of its optimizer state before and after
StateBytes = Mapping[int, tuple[int, int]]


@dataclass
class _Row:
    name: str
    shape: str
    outcome: str
    count: int = 0
    weight_bytes: list[int] = field(default_factory=lambda: [0, 0])
    state_bytes: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, weight_bytes: tuple[int, int], parameters: Iterable[nn.Parameter], states: StateBytes) -> None:
        self.count += 1
        for position, size in enumerate(weight_bytes):
            self.weight_bytes[position] += size
        for parameter in parameters:
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
        cells = row.weight_bytes + (row.state_bytes if states is not None else [])
        table.add_row(name, row.shape, row.outcome, *map(_size, cells))
    return "\n".join([_render(table), *conversion.notes, _share(conversion)])


def _rows(conversion: Conversion, states: StateBytes) -> list[_Row]:
    """A row for each kind of layer, one for all other parameters and one for the sum."""
    rows: dict[tuple[str, ...], _Row] = {}
    total = _Row("total", "", "")
    seen: set[int] = set()
    for layer in conversion.layers:
        new = [p for p in layer.parameters if id(p) not in seen]
        seen |= {id(p) for p in new}
        size = (layer.bytes_before, layer.bytes_after) if new else (0, 0)
        key = _kind(layer)
        rows.setdefault(key, _Row(*key)).add(size, new, states)
        total.add(size, new, states)
    others = _Row("everything else", "", "not a linear layer")
    rest = sum(p.numel() * p.element_size() for p in conversion.rest)
    for row in (others, total):
        row.add((rest, rest), conversion.rest, states)
    adapters = _Row("adapters", "", f"LoRA beside {len(conversion.adapted)} layers")
    added = sum(p.numel() * p.element_size() for p in conversion.adapters)
    for row in (adapters, total):
        row.add((0, added), conversion.adapters, states)
    more = [row for row, there in ((others, conversion.rest), (adapters, conversion.adapters)) if there]
    return [*rows.values(), *more, total]


def _kind(layer: Layer) -> tuple[str, str, str]:
    name = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", layer.name) or "(the model)"
    shape = "×".join(map(str, layer.shape))
    reason = re.sub(r"\.\d+(?=\.|$)", ".*", layer.reason)
    if layer.formats is None:
        return name, shape, reason
    return name, shape, f"{layer.formats.name} ({reason})" if reason else layer.formats.name


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
