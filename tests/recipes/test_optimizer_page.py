"""docs/optimizers.md: its table is made from the stored results, and its examples run."""

import re
from pathlib import Path

import pytest

from lq_plugin import optim
from lq_plugin.recipes.benchmarks.records import read_lines
from lq_plugin.recipes.reports.optimizer_table import (
    BEGIN,
    END,
    ENTRIES,
    NOT_MEASURED,
    RUNS,
    TIMES,
    main,
    replaced,
    state_bytes,
    table,
)

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "optimizers.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
BY_NAME = {entry.name: entry for entry in ENTRIES}


def test_the_table_is_that_of_the_stored_results() -> None:
    """If not: python -m lq_plugin.recipes.reports.optimizer_table docs."""
    new = table(read_lines(DOCS / "results" / TIMES), read_lines(DOCS / "results" / RUNS))
    assert replaced(PAGE, new) == PAGE


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_an_example_runs(number: int) -> None:
    exec(compile(BLOCKS[number], f"example {number}", "exec"), {})


def test_every_algorithm_has_a_line() -> None:
    classes = {name.removesuffix("8bit") for name in optim.__all__ if name.endswith("8bit")}
    assert {name for name in classes if not name.startswith("Paged")} == BY_NAME.keys()


@pytest.mark.parametrize(
    ("name", "moments"),
    [("AdamW", 2), ("AdEMAMix", 3), ("Lion", 1), ("SGD", 1), ("RMSprop", 1), ("Adagrad", 1), ("LAMB", 2), ("Muon", 1)],
)
def test_a_moment_takes_a_byte_and_a_scale_for_256(name: str, moments: int) -> None:
    assert state_bytes(BY_NAME[name], "8bit") == moments * (1 + 4 / 256)
    assert state_bytes(BY_NAME[name], "fp8") == moments * (1 + 4 / 256)
    assert state_bytes(BY_NAME[name], "32bit") == 4 * moments


def test_a_line_shows_what_was_measured() -> None:
    times = [{"name": "O1", "op": "AdamW8bit", "ms": 11.62, "ratio": {"bitsandbytes": 8.61, "torch": 1.53}}]
    times[0]["peer_problems"] = {}
    times += [{"name": "O6", "op": "LAMB8bit", "ms": 19.4, "ratio": {}, "peer_problems": {"bitsandbytes": "no"}}]
    times += [{"name": "O2", "op": "Lion8bit", "ms": 1.0, "ratio": {}}]
    percent = {"mean": 0.04, "low": -0.1, "high": 0.18}
    runs = [{"kind": "summary", "variant": "AdamW 8bit", "difference_percent": percent, "n": 5}]
    adamw, _, _, lion, _, _, _, lamb, *_ = table(times, runs).splitlines()[2:]
    assert "| 19.4 ms; bitsandbytes raises |" in lamb
    assert adamw.endswith("| 2.03 (8) | 11.6 ms; bitsandbytes 8.6x, torch 1.5x | +0.04 % (-0.10 .. +0.18), n = 5 |")
    assert lion.endswith(f"| 1.02 (4) | {NOT_MEASURED} | {NOT_MEASURED} |")


def test_the_table_goes_between_its_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "optimizers.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    main(str(tmp_path))
    text = page.read_text()
    assert text == f"above\n{BEGIN}\n{capsys.readouterr().out.strip()}\n{END}\nbelow\n"
    assert "old" not in text
    with pytest.raises(ValueError, match="put them in"):
        replaced("a page without marks", "x")
