"""The speed table that linear="auto" decides from, from the lines that `benchmark=policy` wrote.

    python -m lq_plugin.recipes.reports.policy_table docs/results/policy_h200.jsonl lq_plugin/tables/h200.json

A table is whole or not made: every shape and format of the lines has to have a time in every mode.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lq_plugin.recipes.benchmarks.records import read_lines
from lq_plugin.speed_table import MODES, Row, SpeedTable

NAME = "policy"
_EVERYWHERE_THE_SAME = ("device", "architecture", "tokens")
_MEASURED = ("hardware", "driver", "python", "torch", "triton", "command", "commit", "date")

Record = dict[str, Any]


def table_of(records: Sequence[Record]) -> SpeedTable:
    """ValueError: no lines of benchmark=policy; one without a time; lines of several runs or devices."""
    records = [record for record in records if record.get("name") == NAME]
    if not records:
        raise ValueError("no lines of benchmark=policy; `python -m recipes.benchmark benchmark=policy` writes them")
    for record in records:
        if record["problem"]:
            raise ValueError(f"{_case(record)} has no time: {record['problem']}")
    same = {key: _only(key, records) for key in (*_EVERYWHERE_THE_SAME, *_MEASURED)}
    speedups: dict[tuple[int, int, str], dict[str, float]] = defaultdict(dict)
    for record in records:
        key = record["in_features"], record["out_features"], record["format"]
        if record["mode"] in speedups[key]:
            raise ValueError(f"{_case(record)} was measured twice: give one run")
        speedups[key][record["mode"]] = record["speedup"]
    modes = tuple(mode for mode in MODES if any(mode in by_mode for by_mode in speedups.values()))
    for (fan_in, fan_out, name), by_mode in speedups.items():
        if by_mode.keys() != set(modes):
            raise ValueError(f"{name} at {fan_in} -> {fan_out} was measured {list(by_mode)} only, others {list(modes)}")
    table = SpeedTable(
        device=same["device"],
        architecture=same["architecture"],
        tokens=same["tokens"],
        modes=modes,
        measured={key: same[key] for key in _MEASURED},
        rows=tuple(Row(key[:2], key[2], by_mode) for key, by_mode in speedups.items()),
    )
    return SpeedTable.of(table.content(), "the table of these lines")


def _only(key: str, records: Sequence[Record]) -> Any:
    values = list(dict.fromkeys(record.get(key) for record in records))
    if len(values) > 1:
        raise ValueError(f"the lines are of several runs: {key} is {values[0]!r} and {values[1]!r}; give one run")
    return values[0]


def _case(record: Record) -> str:
    return f"{record['format']} at {record['in_features']} -> {record['out_features']}, {record['mode']},"


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2:
        raise SystemExit("usage: python -m lq_plugin.recipes.reports.policy_table LINES.jsonl TABLE.json")
    table = table_of(read_lines(Path(arguments[0])))
    table.write(arguments[1])
    print(f"{len(table.rows)} rows of {table.device} written to {arguments[1]}")


if __name__ == "__main__":
    main()
