"""benchmark=train_linear and benchmark=switchback in miniature: what they check, measure and write."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from lq_plugin.formats import TRAINABLE_FORMATS
from lq_plugin.recipes.benchmark import main
from lq_plugin.recipes.benchmarks import switchback, train_linear
from lq_plugin.recipes.benchmarks.format_noise import OPERANDS, PRODUCTS
from lq_plugin.recipes.benchmarks.switchback import Comparison, Size
from lq_plugin.recipes.benchmarks.timing import Ceilings, Stopwatch
from lq_plugin.recipes.benchmarks.train_linear import Attention, Measurement, Mlp, Peers, Shape, measure

CPU = torch.device("cpu")


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """benchmark(override, ...) -> its records."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> list[dict[str, Any]]:
        output = tmp_path / "times.jsonl"
        words = ["lq-benchmark", f"hydra.run.dir={tmp_path / 'run'}", f"output={output}", "benchmark.sizes=small"]
        monkeypatch.setattr(sys, "argv", [*words, *overrides])
        main()
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


@pytest.mark.integration
def test_every_format_is_timed_beside_nn_linear(benchmark) -> None:
    records = benchmark("benchmark=train_linear", "benchmark.seconds=0.001", "benchmark.modes=[eager]")[2:]
    assert [record["problem"] for record in records] == [None] * len(records)
    formats = {name for name in TRAINABLE_FORMATS if not name.startswith("sim_")}
    shapes = {str(shape) for shape in train_linear.SMALL}
    assert {(record["op"], record["shape"]) for record in records} == {
        (f"{name}, eager", shape) for name in formats for shape in shapes
    }
    for record in records:
        assert record["peers"].keys() == {"bf16, eager"}
        assert record["ratio"]["bf16, eager"] > 0
        assert record["name"] == {"int8": "I4", "fp8_": "F1"}[record["op"][:4]]
        assert record.keys() >= {"hardware", "torch", "triton", "torchao", "command", "device_ms", "ops"}


def test_what_is_asked_for_is_measured(benchmark) -> None:
    words = "benchmark.formats=[fp8_rowwise]", "benchmark.only=[Mlp]", "benchmark.modes=[eager]"
    records = benchmark("benchmark=train_linear", "benchmark.seconds=0.001", *words)[2:]
    assert [(record["op"], record["shape"]) for record in records] == [("fp8_rowwise, eager", "Mlp 32, 64; 24")]


def test_operations_are_those_of_three_products_for_each_weight() -> None:
    for shape in (Shape(Mlp, 32, 64, 24), Shape(Attention, 32, 16, 24)):
        weights = sum(parameter.numel() for parameter in shape.make(CPU).parameters())
        assert shape.operations == 3 * 2 * 24 * weights


def test_a_format_that_computes_something_else_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch(CPU, 0.001)
    shape = train_linear.SMALL[0]
    monkeypatch.setattr(train_linear, "LARGEST_DIFFERENCE", 1e-4)
    what = Measurement(shape, TRAINABLE_FORMATS["int8_switchback"], "eager")
    result = measure(what, watch, Ceilings.measured(watch, 1024, 8), Peers(shape, watch))
    assert result.ms is None
    assert "output is off by" in (result.problem or "")


def test_a_peer_that_fails_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise NotImplementedError("no compiler")

    peers = Peers(train_linear.SMALL[0], Stopwatch(CPU, 0.001))
    monkeypatch.setattr(train_linear, "training_step", broken)
    assert peers.bf16("compiled") == peers.bf16("compiled") == "bf16, compiled"
    assert peers.problems == {"bf16, compiled": "NotImplementedError: no compiler"}
    assert peers.torchao("int8_switchback") == ""


KEYS = {
    *("repeat", "batch_size", "dim_out", "dim_in", "wm", "switch"),
    *("standard_fwd", "standard_gw", "standard_gx", "rowwise_fwd", "rowwise_bwd", "global_fwd", "global_bwd"),
    *("x_quantize_rowwise", "g_quantize_rowwise", "w_quantize_rowwise", "w_quantize_colwise_transpose"),
    *("w_quantize_global", "w_quantize_global_transpose", "time_standard", "time_rowwise", "time_global"),
}


def test_switchback_writes_the_keys_of_bitsandbytes_with_hardware_and_versions(benchmark) -> None:
    records = benchmark("benchmark=switchback", "benchmark.repeat=2")
    assert len(records) == 2
    for record, switch in zip(records, (False, True), strict=True):
        assert record.keys() >= KEYS | {"hardware", "torch", "triton", "command", "saved_rowwise", "saved_global"}
        assert (record["switch"], record["wm"], record["repeat"], record["problem"]) == (switch, 4, 2, None)
        assert (record["dim_in"], record["dim_out"]) == ((128, 32) if switch else (32, 128))
        for name, parts in switchback.PARTS.items():
            assert record[name] == pytest.approx(sum(record[part] for part in parts), rel=1e-2)


def test_the_grid_is_bitsandbytes() -> None:
    assert len(switchback.GRID) == 60
    assert {size.batch_size for size in switchback.GRID} == {8192, 16384, 32768, 65536, 131072}
    assert Size(8192, 1024, False).dims == (1024, 4096)
    assert Size(8192, 1024, True).dims == (4096, 1024)


def test_time_saved_is_a_share_of_the_standard_time() -> None:
    ms = dict.fromkeys([part for parts in switchback.PARTS.values() for part in parts], 0.0)
    ms |= {"standard_fwd": 3.0, "standard_gw": 1.0, "rowwise_fwd": 2.0, "global_bwd": 1.0}
    record = Comparison(Size(8, 4, False), 1, ms).record()
    assert (record["time_standard"], record["time_rowwise"], record["time_global"]) == (4.0, 3.0, 2.0)
    assert (record["saved_rowwise"], record["saved_global"]) == (0.25, 0.5)


def test_a_product_with_a_wrong_scale_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = switchback.scaled_mm
    monkeypatch.setattr(switchback, "scaled_mm", lambda *args: right(*args) * 1.01)
    (first, _) = switchback.SwitchbackBenchmark("small", repeat=1).run(CPU)
    assert first.ms == {}
    assert "not that of its codes" in (first.problem or "")
    assert "not that of its codes" in first.row()


def test_the_noise_of_every_format_is_written(benchmark) -> None:
    records = benchmark("benchmark=format_noise")
    assert [(r["format"], r["operands"]) for r in records] == [
        (name, operands) for operands in OPERANDS for name in TRAINABLE_FORMATS
    ]
    by = {(r["format"], r["operands"]): r for r in records}
    assert all(r["problem"] is None and min(r[name] for name in PRODUCTS) > 10 for r in records)
    # Eight bits with a scale for each row are 37 dB or more of normal values, a mantissa of three bits 28 dB.
    assert by["int8_rowwise", "normal"]["grad_weight"] > by["fp8_rowwise", "normal"]["grad_weight"] + 5
    # What int8 has one scale for over all tokens suffers from those that are larger; fp8 does not.
    assert by["int8_rowwise", "tokens"]["grad_weight"] < by["int8_rowwise", "normal"]["grad_weight"] - 5
    assert by["fp8_rowwise", "tokens"]["grad_weight"] > by["fp8_rowwise", "normal"]["grad_weight"] - 3


@pytest.mark.parametrize("choice", ["train_linear", "switchback", "format_noise"])
def test_each_choice_composes_and_can_be_made(choice: str) -> None:
    with initialize_config_module("lq_plugin.conf", version_base="1.3"):
        config = compose("benchmark", [f"benchmark={choice}"])
    assert instantiate(config.benchmark, _convert_="all").sizes == "auto"
