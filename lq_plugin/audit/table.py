"""An audit for people: what it says of itself, its formats, who would load it, and what is wrong last."""

import math

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lq_plugin.audit.facts import BROKEN, NOTE, UNKNOWN, Audit, Row
from lq_plugin.audit.tensors import decibels

_TABLE_WIDTH = 120  # columns of a terminal, below which cells would be cut
_STYLES = {BROKEN: "bold red", UNKNOWN: "yellow", NOTE: ""}


def show(audit: Audit, console: Console) -> None:
    console.print(_pairs({"what": audit.path, "kind": audit.kind, **audit.facts}))
    if audit.rows:
        console.print(_formats(audit.rows) if console.width >= _TABLE_WIDTH else _lines(audit.rows))
        console.print(Text("\n".join(filter(None, [_lowest(audit.rows), _share(audit.rows)]))))
    if audit.readers:
        console.print(_pairs({f"{reader} loads it": verdict for reader, verdict in audit.readers.items()}))
    for finding in audit.findings:
        console.print(Text(f"{finding.level}: {finding.text}", style=_STYLES[finding.level]))
    console.print(Text(verdict(audit), style="bold"))


def verdict(audit: Audit) -> str:
    return {0: "Whole.", 1: "Broken.", 2: "Not understood."}[audit.exit_code]


def _pairs(pairs: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(Text(name), Text(value))
    return table


def _formats(rows: list[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("", "format", "block", "codes"):
        table.add_column(title, overflow="fold", min_width=18 if title == "codes" else None)  # the name of a map
    numbers = ["tensors", "values", "bytes", "bits/value"]
    compared = any(row.worst for row in rows)
    for title in numbers + (["SQNR"] if compared else []):
        table.add_column(title, justify="right", overflow="fold")
    for row in rows:
        bits = f"{8 * row.bytes / row.values:.2f}" if row.values else ""
        cells = [f"{row.tensors:,}", f"{row.values:,}", f"{row.bytes:,}", bits]
        table.add_row(row.where, row.format, row.block, row.codes, *cells, *([_noise(row)] if compared else []))
    return table


def _lines(rows: list[Row]) -> Text:
    """The same for a narrow terminal."""
    said = []
    for row in rows:
        block = f", blocks of {row.block}" if row.block else ""
        noise = f", SQNR {_noise(row)}" if row.worst else ""
        sizes = f"{row.tensors:,} tensors, {row.values:,} values, {row.bytes:,} bytes"
        codes = f" ({row.codes})" if row.codes != row.format else ""
        said.append(f"{row.where}: {row.format}{codes}{block}: {sizes}{noise}")
    return Text("\n".join(said))


def _noise(row: Row) -> str:
    return "" if row.worst is None else _decibels(decibels(row.signal, row.noise))


def _lowest(rows: list[Row]) -> str:
    """The tensor that lost most."""
    lowest = min((row.worst for row in rows if row.worst), default=(math.inf, ""))
    return "" if math.isinf(lowest[0]) else f"The lowest SQNR is {_decibels(lowest[0])}, of {lowest[1]}."


def _decibels(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.1f} dB"


def _share(rows: list[Row]) -> str:
    weights = [row for row in rows if row.where == "weights"]
    total, few_bits = sum(row.values for row in weights), sum(row.values for row in weights if row.is_quantized)
    if not total:
        return ""
    return f"{few_bits / total:.1%} of its {total:,} values are quantised, embeddings and norms counted."
