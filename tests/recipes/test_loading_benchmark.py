"""`benchmark=loading` in miniature: whoever loads the checkpoint, and however, it is the same model."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from lq_plugin.recipes.benchmarks import loading
from lq_plugin.recipes.benchmarks.loading import LoadCase, LoadingBenchmark, LoadResult, load_cases
from lq_plugin.recipes.benchmarks.loading_case import load, main, write
from lq_plugin.recipes.benchmarks.training_steps_cases import SMALL, Shape

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
SHAPE = SMALL["E3, one row"]
HELD = {"name", "what", "who", "linear", "cache", "shape", "parameters", "seconds", "model_bytes", "peak_bytes", "loss"}


def here(_: str, asked: Mapping[str, Any], *__: object) -> tuple[dict[str, Any], str | None]:
    """What the process of a case does, in this one."""
    folder = Path(asked["folder"])
    if "write" in asked:
        return write(folder, Shape(**asked["write"]), CPU), None
    return load(LoadCase(**asked["load"]), folder, CPU), None


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
def test_every_way_to_load_gives_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "run_process", here)
    results = list(LoadingBenchmark(folder=str(tmp_path / "new")).run(CPU))
    assert [result.case for result in results] == list(load_cases())
    assert [result.problem for result in results] == [None] * len(results)
    assert all(json.loads(json.dumps(result.record())).keys() >= HELD for result in results)
    losses = {result.case.what: result.measured["loss"] for result in results}
    ours = losses["our nf4"]
    for what in ("bfloat16, then our convert to nf4", "our nf4, filling the cache", "our nf4, from the cache"):
        assert losses[what] == ours, what
    for linear in ("nf4", "nf4_dq", "llm_int8"):
        assert losses[f"transformers + bitsandbytes {linear}"] == pytest.approx(losses[f"our {linear}"], rel=5e-4)
    assert len({losses[f"our {linear}"] for linear in ("nf4", "nf4_dq", "llm_int8")}) == 3
    assert list((tmp_path / "new").iterdir()) == []  # 16 GB at full size


def test_what_cannot_be_loaded_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(_: str, asked: Mapping[str, Any], *__: object) -> tuple[dict[str, Any], str | None]:
        if asked.get("load", {}).get("who") == "bitsandbytes":
            return {}, "exit code 1: no bitsandbytes"
        loss = float("nan") if asked.get("load", {}).get("linear") == "llm_int8" else 5.5
        return {"seconds": 2.0, "model_bytes": 6e9, "peak_bytes": 6.2e9, "loss": loss}, None

    monkeypatch.setattr(loading, "run_process", end)
    results = list(LoadingBenchmark(only=("nf4_dq", "our llm_int8")).run(CPU))
    assert [result.problem for result in results] == [
        None,
        "exit code 1: no bitsandbytes",
        "the loss of the model is nan",
    ]
    assert results[0].row().split() == ["M4", "our", "nf4_dq", "2.00", "6.00", "6.20", "200", "5.500"]
    assert "no bitsandbytes" in results[1].row()
    assert results[1].op == "M4 transformers + bitsandbytes nf4_dq"

    monkeypatch.setattr(loading, "run_process", lambda *_: ({}, "not done after 1 s"))
    results = list(LoadingBenchmark(only=("our nf4_dq",)).run(CPU))
    assert [result.problem for result in results] == ["the checkpoint could not be written: not done after 1 s"]


def test_a_case_takes_json_and_prints_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"folder": str(tmp_path), "write": asdict(replace(SHAPE, layers=1))}
    monkeypatch.setattr(sys, "argv", ["loading_case", json.dumps(asked)])
    main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"] > 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["dtype"]) == (1, "bfloat16")


def test_a_case_on_a_cpu_has_no_peak_and_a_row() -> None:
    measured = {"seconds": 1.0, "model_bytes": None, "peak_bytes": None, "loss": 5.0}
    assert LoadResult(LoadCase("our nf4", "ours", "nf4"), SHAPE, measured).row().split() == [
        "M4",
        "our",
        "nf4",
        "1.00",
        "5.000",
    ]


def test_the_configuration_is_that_of_the_class() -> None:
    with initialize_config_module("lq_plugin.conf", version_base="1.3"):
        config = compose("benchmark", ["benchmark=loading"])
    suite = instantiate(config.benchmark, _convert_="all")
    assert replace(suite, only=()) == LoadingBenchmark()
