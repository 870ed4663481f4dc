"""The table of docs/optimizers.md, from what benchmarks stored in docs/results.

    python -m lq_plugin.recipes.reports.optimizer_table docs

puts it between the two marks of docs/optimizers.md.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lq_plugin import optim
from lq_plugin.recipes.benchmarks.records import read_lines

BEGIN, END = "<!-- begin: optimizer_table -->", "<!-- end: optimizer_table -->"
TIMES, RUNS = "optimizers_h200.jsonl", "convergence_optimizers_h200.jsonl"
SHAPE = (4096, 4096)  # rows of whole blocks of 256
NOT_MEASURED = "not measured"
CASES = ("O1", "O6")

Record = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A class by its name in lq_plugin.optim, whose arithmetic it is, and arguments without which it has no state."""

    name: str
    source: str
    arguments: dict[str, Any] = field(default_factory=dict)


def _torch(name: str) -> str:
    return f"[`torch.optim.{name}`](https://docs.pytorch.org/docs/stable/generated/torch.optim.{name}.html)"


ENTRIES = (
    Entry("AdamW", f"{_torch('AdamW')}; [StableAdamW](https://arxiv.org/abs/2304.13013) with `update_clip`"),
    Entry("Adam", _torch("Adam")),
    Entry("AdEMAMix", "[paper](https://arxiv.org/abs/2409.03137)"),
    Entry("Lion", "[paper](https://arxiv.org/abs/2302.06675)"),
    Entry("SGD", _torch("SGD"), {"momentum": 0.9}),
    Entry("RMSprop", _torch("RMSprop")),
    Entry("Adagrad", _torch("Adagrad")),
    Entry("LAMB", "[paper](https://arxiv.org/abs/1904.00962), algorithm 2"),
    Entry("LARS", "[paper](https://arxiv.org/abs/1708.03888), algorithm 1"),
    Entry("Muon", f"{_torch('Muon')}; [Jordan](https://kellerjordan.github.io/posts/muon/)"),
)


def table(times: Iterable[Record], runs: Iterable[Record]) -> str:
    """Markdown, a line for each optimizer."""
    measured = {record["op"]: record for record in times if record["name"] in CASES}
    compared = {record["variant"]: record for record in runs if record["kind"] == "summary"}
    lines = [
        "| optimizer | computes | state, bytes per parameter: 8 bits (32 bits) | step in 8 bits | trains in 8 bits |",
        "|---|---|---|---|---|",
    ]
    for entry in ENTRIES:
        few, full = (state_bytes(entry, state) for state in ("8bit", "32bit"))
        cells = (
            f"`{entry.name}8bit`",
            entry.source,
            f"{few:.2f} ({full:g})",
            _time(measured.get(f"{entry.name}8bit")),
            _difference(compared.get(f"{entry.name} 8bit")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def state_bytes(entry: Entry, state: str) -> float:
    """Of a matrix whose rows are whole blocks, for each of its elements."""
    param = torch.nn.Parameter(torch.empty(SHAPE, device="meta"))
    optimizer = getattr(optim, entry.name)([param], state=state, **entry.arguments)
    _, size = optimizer.state_bytes(optimizer.param_groups[0], param)
    return float(size / param.numel())


def _time(record: Record | None) -> str:
    """Milliseconds, and how many times longer the others take, or that they cannot."""
    if record is None or record["ms"] is None:
        return NOT_MEASURED
    peers = [f"{peer} {ratio:.1f}x" for peer, ratio in record["ratio"].items()]
    peers += [f"{peer} raises" for peer in record["peer_problems"]]
    return "; ".join((f"{record['ms']:.1f} ms", *filter(None, [", ".join(peers)])))


def _difference(record: Record | None) -> str:
    """In percent of the bits per byte, with the interval and the number of pairs."""
    percent = record and record["difference_percent"]
    if not record or not percent:
        return NOT_MEASURED
    between = "" if percent["low"] is None else f" ({percent['low']:+.2f} .. {percent['high']:+.2f})"
    return f"{percent['mean']:+.2f} %{between}, n = {record['n']}"


def replaced(page: str, new: str) -> str:
    """The page with another table between its marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN!r} and {END!r} for the table to stand between: put them in")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main(docs: str) -> None:
    results, page = Path(docs, "results"), Path(docs, "optimizers.md")
    new = table(read_lines(results / TIMES), read_lines(results / RUNS))
    page.write_text(replaced(page.read_text(), new))
    print(new)


if __name__ == "__main__":
    main(*sys.argv[1:])
