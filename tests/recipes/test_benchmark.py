"""The benchmark recipe: what it measures, what it refuses to, and what it writes."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor

from lq_plugin import optim
from lq_plugin.recipes.benchmark import main
from lq_plugin.recipes.benchmarks import optimizers
from lq_plugin.recipes.benchmarks.cases import Case, assert_close, assert_equal, ends, measure
from lq_plugin.recipes.benchmarks.optimizers import Setup, setups
from lq_plugin.recipes.benchmarks.records import Result, circumstances, row
from lq_plugin.recipes.benchmarks.timing import Ceilings, Stopwatch, Timing

CPU = torch.device("cpu")
KEYS = {
    *("name", "op", "shape", "dtype", "ms", "spread", "bytes", "ops", "rate", "unit", "share_of_floor"),
    *("peers", "ratio", "peer_problems", "problem", "hardware", "driver", "python", "torch", "triton"),
    *("bitsandbytes", "torchao", "command", "commit", "date"),
}


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """benchmark(override, ...) -> (what it printed, its records)."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> tuple[str, list[dict[str, Any]]]:
        output = tmp_path / "results" / "times.jsonl"
        words = ["lq-benchmark", f"hydra.run.dir={tmp_path / 'run'}", f"output={output}", "benchmark.sizes=small"]
        monkeypatch.setattr(sys, "argv", [*words, "benchmark.seconds=0.001", *overrides])
        main()
        return capsys.readouterr().out, [json.loads(line) for line in output.read_text().splitlines()]

    return run


@pytest.mark.integration
@pytest.mark.parametrize("suite", ["ops", "optimizers", "matmul"])
def test_every_case_is_timed_and_written(benchmark, suite: str) -> None:
    printed, records = benchmark(f"benchmark={suite}")
    assert [record["problem"] for record in records] == [None] * len(records)
    assert all(record.keys() >= KEYS and record["ms"] > 0 for record in records)
    names = {record["name"] for record in records}
    goals = {
        "ops": {"Q1", "Q2", "I1", "I2", "F1", "L1", "G1", "G2", "G3", "G4"},
        "optimizers": {"O1", "O2", "O3", "O4", "O5", "O6"},
        "matmul": {f"B{number}" for number in range(1, 9)},
    }
    assert names == goals[suite] | {"copy", "bf16"}
    assert "PyTorch references" in printed or torch.cuda.is_available()
    assert all(record["op"] in printed for record in records)


def test_only_the_cases_that_are_asked_for_are_run(benchmark) -> None:
    _, records = benchmark("benchmark.only=[quantize_rowwise]")
    assert {record["op"] for record in records[2:]} == {"quantize_rowwise", "quantize_rowwise_outliers"}
    assert "'benchmark.only=[quantize_rowwise]'" in records[0]["command"]


@pytest.mark.parametrize("choice", ["ops", "optimizers", "matmul"])
def test_each_choice_composes_and_can_be_made(choice: str) -> None:
    where = ["benchmark.figure=matmul.png"] if choice == "matmul" else []  # in a run: its own folder
    with initialize_config_module("lq_plugin.conf", version_base="1.3"):
        config = compose("benchmark", [f"benchmark={choice}", *where])
    suite = instantiate(config.benchmark, _convert_="all")
    assert (suite.sizes, suite.only) == ("auto", [])


def case(**changes: Any) -> Case:
    """Doubling of a vector."""

    def check(inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert_equal(output, 2 * inputs[0])

    doubling = Case(
        name="X1",
        op="double",
        shape="5",
        dtype="float32",
        make=lambda: (torch.randn(5),),
        ours=lambda x: x * 2,
        check=check,
        bytes=40,
    )
    return replace(doubling, **changes)


def measured(one: Case) -> Result:
    watch = Stopwatch(CPU, 0.001)
    return measure(one, watch, Ceilings.measured(watch, 1024, 8))


def test_a_kernel_that_computes_something_else_gets_no_time() -> None:
    result = measured(case(ours=lambda x: x * 3))
    assert result.ms is None
    assert "differ from the reference's" in (result.problem or "")
    assert "differ from the reference's" in row(result.record())


def test_a_kernel_that_leaves_values_unwritten_is_found_out() -> None:
    kept = torch.zeros(5)

    def half(x: Tensor) -> Tensor:
        kept[:3] = 2 * x[:3]
        return kept

    result = measured(case(make=lambda: (torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0]),), ours=half))
    assert "bytes differ" in (result.problem or "")


def test_a_peer_that_fails_is_named_and_the_others_are_timed() -> None:
    def broken(x: Tensor) -> Callable[[], object]:
        raise NotImplementedError("no such GPU")

    record = measured(case(peers={"broken": broken, "torch": lambda x: lambda: x + x})).record()
    assert record["peer_problems"] == {"broken": "NotImplementedError: no such GPU"}
    assert record["peers"].keys() == record["ratio"].keys() == {"torch"}
    assert "no such GPU" in row(record)


def test_the_run_fails_when_a_case_does(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "_CHECKED_STEPS", "not a number")
    with pytest.raises(SystemExit, match="AdamW8bit"):
        benchmark("benchmark=optimizers", "benchmark.only=[O5]")


def test_a_record_has_rate_share_and_ratios() -> None:
    result = Result("Q1", "op", "4", "bf16", bytes=2 * 10**9, ms=2.0, spread=0.01, floor_ms=0.5, peers={"torch": 3.0})
    record = result.record()
    assert (record["rate"], record["unit"], record["share_of_floor"]) == (1e12, "bytes/s", 0.25)
    assert record["ratio"] == {"torch": 1.5}
    assert "1.000 TB/s" in row(record)
    assert "torch 3 (1.50x)" in row(record)
    product = replace(result, operations=4 * 10**12, floor_ms=None).record()
    assert (product["rate"], product["unit"], product["share_of_floor"]) == (2e15, "operations/s", None)


def test_the_floor_is_the_larger_of_memory_and_arithmetic() -> None:
    ceilings = Ceilings(copied=1000, side=10, copy=Timing(1.0, 0.0), product=Timing(2.0, 0.0))
    assert ceilings.floor_ms(500) == 0.5
    assert ceilings.floor_ms(500, operations=4000) == 4.0  # twice the 2000 of the product that took 2 ms
    assert ceilings.floor_ms(500, operations=4000, bits=8) == 2.0


def test_a_stopwatch_takes_the_median_and_its_repetition() -> None:
    calls = []
    timing = Stopwatch(CPU, 0.0).time([lambda: calls.append(1), lambda: calls.append(2)])
    assert timing.ms > 0
    assert timing.spread >= 0
    assert set(calls) == {1, 2}
    assert Stopwatch(CPU).sets_of(10**9) == 1
    assert Stopwatch(CPU).host_ms(lambda: None) < 100


def test_where_it_ran_is_in_every_line() -> None:
    around = circumstances(CPU, "python -m recipes.benchmark")
    assert around["torch"] == torch.__version__
    assert around["hardware"]
    assert around["date"].count("-") == 2


@pytest.mark.parametrize(("size", "checked"), [(1000, 128), (100, 100), (3, 3), (0, 0)])
def test_both_ends_are_checked(size: int, checked: int) -> None:
    rows = torch.arange(size)
    assert len({int(row) for some in ends(size) for row in rows[some]}) == checked
    assert size == 0 or int(rows[ends(size)[1]][-1]) == size - 1


def test_comparisons_notice() -> None:
    x = torch.randn(5)
    assert_equal(x.to(torch.float8_e4m3fn), x.to(torch.float8_e4m3fn))
    assert_equal(torch.tensor(torch.nan), torch.tensor(torch.nan))
    with pytest.raises(AssertionError, match="differ"):
        assert_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert_close(x, x * (1 + 1e-4), 1e-3)
    with pytest.raises(AssertionError, match="relative error is nan"):
        assert_close(torch.tensor([torch.nan]), torch.ones(1), 1e-3)


def test_the_model_of_the_first_goal_is_sixteen_layers_of_an_8b_llama() -> None:
    of = {(setup.name, setup.what): setup for setup in setups(*optimizers.FULL)}
    llama, small, one = of["O1", "AdamW8bit"], of["O2", "AdamW8bit"], of["O5", "AdamW8bit"]
    assert (len(llama.shapes), llama.values) == (144, 3_489_792_000)
    assert llama.bytes / llama.values == pytest.approx(10.06, abs=0.01)
    assert (len(small.shapes), round(small.values / 1e9, 2)) == (3000, 0.39)
    assert (one.values, round(one.bytes / one.values, 2)) == (10**9, 16.06)


def test_every_algorithm_is_timed_on_the_same_model() -> None:
    of = {setup.algorithm: setup for setup in setups(*optimizers.FULL) if setup.name in ("O1", "O6")}
    names = {name.removesuffix("8bit") for name in optim.__all__ if name.endswith("8bit") and "Paged" not in name}
    assert of.keys() == names
    assert {setup.values for name, setup in of.items() if name != "Muon"} == {3_489_792_000}
    assert of["Lion"].bytes / of["Lion"].values == pytest.approx(8.03, abs=0.01)
    assert of["AdEMAMix"].bytes / of["AdEMAMix"].values == pytest.approx(12.09, abs=0.01)
    assert {name for name, setup in of.items() if setup.operations} == {"Muon"}
    square = replace(of["Muon"], shapes=[(8, 8)])  # five times three products of 8 x 8 x 8
    assert square.operations == 5 * 3 * 2 * 8**3


def test_an_optimizer_that_steps_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup("X1", "AdamW8bit", [(4, 64)])
    optimizers.check_parity(setup, CPU)
    steps = iter((1e-3, 2e-3))  # of the reference and of the kernels
    monkeypatch.setattr(optimizers, "ours", lambda _: lambda params: torch.optim.SGD(params, lr=1e3 * next(steps)))
    with pytest.raises(AssertionError, match="off"):
        optimizers.check_parity(setup, CPU)
