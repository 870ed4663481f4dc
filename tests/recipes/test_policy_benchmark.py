"""benchmark=policy in miniature: what it times and refuses, and the table that comes of it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

import lq_plugin
from lq_plugin import Auto
from lq_plugin.auto_format import Device
from lq_plugin.recipes.benchmark import main
from lq_plugin.recipes.benchmarks import policy, train_linear
from lq_plugin.recipes.benchmarks.policy import Case, PolicyBenchmark, Speed, in_turns, measured
from lq_plugin.recipes.benchmarks.timing import Stopwatch, Timing
from lq_plugin.recipes.reports import policy_table
from lq_plugin.recipes.reports.policy_table import table_of
from lq_plugin.speed_table import SpeedTable

CPU = torch.device("cpu")
INT8, FP8 = "int8_switchback", "fp8_rowwise_with_gw_hp"


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """benchmark(override, ...) -> its records; the table is tmp_path/run/table.json."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> list[dict[str, Any]]:
        output = tmp_path / "times.jsonl"
        words = ["lq-benchmark", "benchmark=policy", f"hydra.run.dir={tmp_path / 'run'}", f"output={output}"]
        monkeypatch.setattr(sys, "argv", [*words, "benchmark.seconds=0.001", "benchmark.noise=null", *overrides])
        main()
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


EAGER = "benchmark.modes=[eager]"


def test_it_writes_lines_and_a_table_that_auto_takes(benchmark, tmp_path: Path, capsys) -> None:
    records = benchmark(EAGER)
    cases = [(r["in_features"], r["out_features"], r["format"], r["mode"]) for r in records]
    assert cases == [(*shape, name, "eager") for shape in policy.SMALL for name in (INT8, FP8)]
    for record in records:
        assert record.keys() >= {"hardware", "torch", "triton", "command", "device", "architecture", "tokens"}
        slowest = record["ms"] * (1 + record["spread"])
        assert record["speedup"] == pytest.approx(record["nn_linear_ms"] / slowest, rel=2e-3)
    path = tmp_path / "run" / "table.json"
    assert f"QuantPlugin(linear=Auto(table={str(path)!r}))" in capsys.readouterr().out
    table = SpeedTable.read(path)
    assert (table.tokens, table.modes) == (policy.SMALL_TOKENS, ("eager",))
    assert [row.speedup["eager"] for row in table.rows] == [record["speedup"] for record in records]
    assert table.measured["command"] == records[0]["command"]
    conversion = lq_plugin.convert(torch.nn.Linear(64, 64), Auto(path), device="cpu")
    assert "at 32 -> 64" in conversion.layers[0].reason


def test_the_command_makes_the_same_table_of_the_lines(benchmark, tmp_path: Path, capsys) -> None:
    benchmark(EAGER, "benchmark.formats=[int8_switchback]")
    policy_table.main([str(tmp_path / "times.jsonl"), str(tmp_path / "again.json")])
    assert "2 rows of " in capsys.readouterr().out
    assert (tmp_path / "again.json").read_text() == (tmp_path / "run" / "table.json").read_text()
    with pytest.raises(SystemExit, match=r"usage: .*LINES.jsonl TABLE.json"):
        policy_table.main(["one"])


@pytest.mark.integration
def test_compiled_stands_beside_eager(benchmark, tmp_path: Path) -> None:
    records = benchmark("benchmark.only=[32x64]")
    assert {(record["out_features"], record["mode"]) for record in records} == {(64, "eager"), (64, "compiled")}
    assert {record["problem"] for record in records} == {None}
    assert SpeedTable.read(tmp_path / "run" / "table.json").modes == ("eager", "compiled")


def test_a_format_that_computes_something_else_gets_no_time_and_no_table(
    benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(train_linear, "LARGEST_DIFFERENCE", 0.02)  # between int8 and fp8
    with pytest.raises(SystemExit, match=r"failed: fp8_rowwise_with_gw_hp, eager, 32x32"):
        benchmark(EAGER)
    assert "no table: 2 of 4 cases have no time" in capsys.readouterr().out
    assert not (tmp_path / "run" / "table.json").exists()
    lines = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    with pytest.raises(ValueError, match=r"fp8_rowwise_with_gw_hp at 32 -> 32, eager, has no time: .* is off by"):
        table_of(lines)


def test_a_format_that_auto_may_not_choose_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'fp8_tensorwise'; 'auto' chooses among .*: int8_switchback, "):
        list(PolicyBenchmark("table.json", formats=("fp8_tensorwise",)).run(CPU))


def test_nn_linear_that_fails_leaves_the_formats_without_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise NotImplementedError("no compiler")

    monkeypatch.setattr(policy, "training_step", broken)
    cases = [Case((32, 32), 24, name, "compiled") for name in (INT8, FP8)]
    first, second = measured(cases, Stopwatch(CPU, 0.001), None)
    assert "nn.Linear: NotImplementedError: no compiler" in (first.problem or "")
    assert first.speedup is None
    assert "no compiler" in second.row()
    assert list(measured([], Stopwatch(CPU, 0.001), None)) == []


def test_any_of_the_words_is_enough(tmp_path: Path) -> None:
    words, table = ("32x64", "absent"), str(tmp_path / "table.json")
    suite = PolicyBenchmark(table, only=words, formats=(INT8,), modes=("eager",), seconds=0.001, noise=None)
    assert [speed.op for speed in suite.run(CPU)] == ["int8_switchback, eager, 32x64"]


def test_each_step_is_that_of_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str | None] = []

    def training_step(module: torch.nn.Module, *args: Any) -> Any:
        formats = getattr(module.get_submodule("linear"), "formats", None)
        timed.append(formats and formats.name)
        return lambda: ()

    monkeypatch.setattr(policy, "training_step", training_step)
    cases = [Case((32, 32), 24, name, "eager") for name in (INT8, FP8)]
    assert [speed.case.format for speed in measured(cases, Stopwatch(CPU, 0.001), None)] == [INT8, FP8]
    assert timed == [None, INT8, FP8]


def test_noise_counts_against_8_bits() -> None:
    case = Case((512, 512), 8192, INT8, "eager")
    speed = Speed(case, Device("NVIDIA H200", "sm_90"), Timing(2.2, 0.5), Timing(2.0, 0.1))
    assert speed.speedup == pytest.approx(1.0)
    assert "1.000x" in speed.row()


class Rehearsed(Stopwatch):
    """Takes the milliseconds of a step from the step."""

    def time(self, calls: Sequence[Any], queued: bool = True) -> Timing:
        assert not queued
        return Timing(calls[0](), 9.0)


def steps(**times: list[float]) -> dict[str, Any]:
    return {name: iter(values).__next__ for name, values in times.items()}


def test_rounds_go_on_until_two_of_each_step_agree() -> None:
    problems: dict[str, str] = {}
    given = steps(plain=[3.0, 1.0, 1.04, 7.0], int8=[2.0, 2.0, 9.0, 7.0])
    times = in_turns(given, Rehearsed(CPU), 0.05, problems)
    assert {name: (time.ms, round(time.spread, 3)) for name, time in times.items()} == {
        "plain": (1.0, 0.04),
        "int8": (2.0, 0.0),
    }
    assert not problems
    assert given["plain"]() == 7.0  # three rounds, not more


def test_a_step_that_is_all_noise_has_no_time() -> None:
    problems: dict[str, str] = {}
    given = steps(plain=[1.0] * 9, int8=[2.0**i for i in range(9)])
    times = in_turns(given, Rehearsed(CPU), 0.05, problems)
    assert times == {"plain": Timing(1.0, 0.0)}
    assert problems["int8"].startswith("no two of 6 rounds agree within 5%: 1, 2, 4, 8, 16, 32 ms; measure again")
    assert in_turns(steps(int8=[1.0, 2.0]), Rehearsed(CPU), None, {}) == {"int8": Timing(1.0, 1.0)}


def test_a_step_that_fails_does_not_keep_others_from_their_times() -> None:
    problems: dict[str, str] = {}
    times = in_turns(steps(plain=[1.0, 1.0], int8=[2.0]), Rehearsed(CPU), 0.05, problems)
    assert times == {"plain": Timing(1.0, 0.0)}
    assert problems == {"int8": "StopIteration:"}


def line(**changes: Any) -> dict[str, Any]:
    case = Case((512, 512), 8192, INT8, "eager")
    record = Speed(case, Device("NVIDIA H200", "sm_90"), Timing(2.0, 0.0), Timing(1.0, 0.0)).record()
    circumstances = dict.fromkeys(("hardware", "driver", "python", "torch", "triton", "command", "commit", "date"), "1")
    return record | circumstances | changes


def test_lines_become_rows_by_shape_and_format() -> None:
    table = table_of([line(), line(mode="compiled", speedup=1.5), {"name": "copy"}])
    (row,) = table.rows
    assert (row.shape, row.format, row.speedup) == ((512, 512), INT8, {"eager": 2.0, "compiled": 1.5})
    assert (table.device, table.architecture, table.tokens) == ("NVIDIA H200", "sm_90", 8192)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no lines of benchmark=policy"),
        ([line(), line()], "int8_switchback at 512 -> 512, eager, was measured twice"),
        ([line(), line(format=FP8, mode="compiled")], r"was measured \['eager'\] only, others \['eager', 'compiled'\]"),
        ([line(), line(format=FP8, device="NVIDIA A100")], "device is 'NVIDIA H200' and 'NVIDIA A100'; give one run"),
        ([line(), line(format=FP8, torch="2")], "several runs: torch is '1' and '2'"),
        ([line(), line(format=FP8, tokens=1)], "tokens is 8192 and 1"),
        ([line(format="fp8_tensorwise")], "weight gradient stays in 16 bits"),
        ([line(speedup=0.0)], "speed-ups that cannot be"),
    ],
)
def test_lines_that_make_no_table_are_refused(lines: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_of(lines)


def test_the_full_shapes_are_on_both_sides_of_the_rule() -> None:
    assert len(set(policy.FULL)) == len(policy.FULL)
    assert all(side % 256 == 0 for shape in policy.FULL for side in shape)
    assert {min(shape) >= 2048 for shape in policy.FULL} == {True, False}


def test_the_choice_composes_and_can_be_made() -> None:
    with initialize_config_module("lq_plugin.conf", version_base="1.3"):
        config = compose("benchmark", ["benchmark=policy", "benchmark.table=table.json"])
    suite = instantiate(config.benchmark, _convert_="all")
    assert (suite.sizes, suite.modes, suite.tokens) == ("auto", ["eager", "compiled"], 8192)
