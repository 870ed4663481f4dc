"""Whole training steps in miniature: every way to train computes the same loss, and a case that ends badly is told."""

import json
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from lq_plugin.optim import AdamW8bit
from lq_plugin.recipes.benchmark import main
from lq_plugin.recipes.benchmarks import training_steps
from lq_plugin.recipes.benchmarks.training_steps import TrainingStepsBenchmark, run_case
from lq_plugin.recipes.benchmarks.training_steps_case import case_from, change_linears, make_optimizer, measure
from lq_plugin.recipes.benchmarks.training_steps_cases import SHAPES, SMALL, Case, cases
from lq_plugin.recipes.benchmarks.training_steps_model import checkpoint, llama

CASE = Case("M1", "torch AdamW", SMALL["E2"])
HELD = {"transformers", "torch", "hardware", "command", "ms", "tokens_per_second", "peak_bytes", "parameters", "losses"}


@pytest.mark.parametrize(("name", "parameters"), [("E1", 1_498_482_688), ("E2", 8_030_261_248), ("E4", 70_553_706_496)])
def test_the_shapes_are_those_of_llama_3(name: str, parameters: int) -> None:
    """8.03e9 and 70.6e9 as published; 1.24e9 for the small one, and 128256 x 2048 more where the head is not tied."""
    model = llama(SHAPES[name], torch.device("meta"))
    checkpoint(model, SHAPES[name])
    assert sum(p.numel() for p in model.parameters()) == parameters == SHAPES[name].parameters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    checkpointing = [getattr(layer, "gradient_checkpointing", None) for layer in model.model.layers]
    assert set(checkpointing) == {name != "E1"}
    assert model.config._attn_implementation == "sdpa"


def test_8b_adamw_state_is_two_bytes_a_parameter_and_embeddings_cost_six_more() -> None:
    """Goal M1: weight 2, gradient 2, state 2.03; the embedding keeps float32 state unless it is told otherwise."""
    model = llama(SHAPES["E2"], torch.device("meta"))
    sizes = {}
    for embedding_state in ("8bit", "32bit"):
        optimizer = AdamW8bit(model.named_parameters(), embedding_state=embedding_state)
        groups = optimizer.param_groups
        sizes[embedding_state] = sum(optimizer.state_bytes(group, p)[1] for group in groups for p in group["params"])
    parameters = sum(p.numel() for p in model.parameters())
    assert sizes["8bit"] / parameters == pytest.approx(2.03125, abs=1e-3)
    assert sizes["32bit"] - sizes["8bit"] == 128256 * 4096 * (8 - 2.03125)


@pytest.mark.integration
def test_every_way_to_train_starts_from_the_same_loss_and_lowers_it() -> None:
    def losses(**changes) -> tuple[float, float]:
        return measure(replace(CASE, **changes), steps=2).losses

    first, last = losses()
    assert last < first
    ours = losses(optimizer="ours")
    assert ours == pytest.approx((first, last), rel=1e-3)
    assert losses(optimizer="ours", options={"gradient_release": True}) == ours
    assert losses(optimizer="ours", options={"offload": True}) == ours
    assert losses(optimizer="ours", loss="chunked") == pytest.approx(ours, rel=1e-3)
    int8 = losses(optimizer="ours", linear="int8_switchback")
    assert int8 != ours
    assert int8 == pytest.approx(ours, rel=1e-2)


def test_formats_go_to_every_linear_but_the_head() -> None:
    model = llama(SMALL["E1"], torch.device("cpu"))
    change_linears(model, replace(CASE, linear="int8_switchback"))
    formats = {name: getattr(module, "formats", None) for name, module in model.named_modules() if "proj" in name}
    assert len(formats) == 14
    assert {f.name for f in formats.values()} == {"int8_switchback"}
    assert type(model.lm_head) is torch.nn.Linear


def test_the_optimizer_is_the_one_that_the_case_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    options = {"embedding_state": "8bit", "gradient_release": True}
    ours = make_optimizer(model, replace(CASE, optimizer="ours", options=options))
    assert isinstance(ours, AdamW8bit)
    assert ours.releases_gradients
    assert ours.param_groups[0]["embedding_state"] == "8bit"
    assert type(make_optimizer(model, CASE)) is torch.optim.AdamW


def test_cases_hold_the_goals_and_their_peers() -> None:
    listed = list(cases(SHAPES))
    keys = [(case.name, case.what) for case in listed]
    assert len(set(keys)) == len(keys)
    assert {case.name for case in listed} == {"E1", "E2", "E3", "E4", "M1"}
    assert {case.optimizer for case in listed if case.name == "M1"} == {"torch", "bitsandbytes", "ours"}
    for compiled in (False, True):
        same = [case for case in listed if case.name == "E1" and case.compiled == compiled]
        assert {case.torchao_recipe for case in same} >= {"tensorwise", "rowwise", "int8_mixed_precision"}
        assert {case.linear for case in same} >= {"int8_switchback", "fp8_rowwise_with_gw_hp", None}
    chosen = TrainingStepsBenchmark(only=("M1 ours AdamW8bit, gradient",)).cases(full=True)
    assert [case.options.get("embedding_state") for case in chosen] == [None, "8bit"]
    assert all(case_from(json.loads(json.dumps(asdict(case)))) == case for case in listed)


@pytest.mark.integration
def test_a_case_runs_in_a_process_of_its_own_and_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "steps.jsonl"
    words = ["lq-benchmark", "benchmark=training_steps", f"hydra.run.dir={tmp_path / 'run'}", f"output={output}"]
    only = "benchmark.only=[E4 our nf4_dq, chunked]".replace(",", r"\,")
    monkeypatch.setattr(sys, "argv", [*words, "benchmark.sizes=small", "benchmark.steps=1", only])
    main()
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["name"], r["what"]) for r in records] == [("E4", "our nf4_dq, chunked loss, 1 x 48, eager")]
    assert records[0].keys() >= HELD
    assert records[0]["problem"] is None
    assert records[0]["tokens"] == 48
    assert "our nf4_dq, chunked loss" in capsys.readouterr().out


def test_a_case_that_ends_badly_has_a_problem_in_place_of_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = run_case(CASE, 1, patience=0.01, gpu="0")
    assert slow.problem == "not done after 0.01 s"
    monkeypatch.setattr(training_steps, "_CHILD", "no_such_module")
    failed = run_case(CASE, 1, patience=60, gpu="0")
    assert "exit code 1" in (failed.problem or "")
    assert "no_such_module" in failed.row()
    assert failed.record()["what"] == "torch AdamW"


def test_the_message_is_that_of_the_exception_not_the_advice_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = (
        "Traceback (most recent call last):\n  File ...\ntorch._dynamo.exc.Unsupported: a call\n  Hint: none\n\n"
        'Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace.\n  (advice: "more")\n'
    )
    ended = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    assert run_case(CASE, 1, 1.0, "0").problem == "exit code 1: torch._dynamo.exc.Unsupported: a call"
    ended.stderr = "Killed\n"
    assert run_case(CASE, 1, 1.0, "0").problem == "exit code 1: Killed"
    ended.stderr = ""
    assert run_case(CASE, 1, 1.0, "0").problem == "exit code 1: no message"


def test_a_loss_that_is_not_finite_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"losses": [5.0, float("nan")], "ms": 1.0}
    ended = subprocess.CompletedProcess([], 0, stdout=f"some words\n{json.dumps(measured)}\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    assert run_case(CASE, 1, 1.0, "0").problem == "the loss went from 5.0 to nan"


def test_several_gpus_share_the_cases_and_each_process_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    both_at_work = threading.Barrier(2)  # breaks if one process had to end before the other began

    def child(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess:
        case = json.loads(command[-1])["case"]["what"]
        if len(seen) < 2:
            seen.append((case, env["CUDA_VISIBLE_DEVICES"]))
            both_at_work.wait(timeout=20)
        measured = {"losses": [5.0, 4.0], "ms": 1.0, "what": case}
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(measured), stderr="")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(subprocess, "run", child)
    suite = TrainingStepsBenchmark(sizes="small", only=("M1",), gpus=2)
    results = list(suite.run(torch.device("cpu")))
    assert {gpu for _, gpu in seen} == {"2", "5"}
    assert [result.case for result in results] == list(suite.cases(full=False))
    assert all(result.measured["what"] == result.case.what for result in results)
    with pytest.raises(ValueError, match="from 1 to 2"):
        list(replace(suite, gpus=3).run(torch.device("cpu")))


def test_memory_is_shown_in_bytes_for_each_parameter() -> None:
    measured = {"losses": [5.0, 4.0], "ms": 100.0, "tokens_per_second": 20480.0, "parameters": 8e9, "peak_bytes": 40e9}
    assert training_steps.StepResult(CASE, measured).row().split()[-6:] == [
        "20480",
        "40.00",
        "5.00",
        "5.000",
        "->",
        "4.000",
    ]


def test_the_configuration_is_that_of_the_class() -> None:
    with initialize_config_module("lq_plugin.conf", version_base="1.3"):
        config = compose("benchmark", ["benchmark=training_steps"])
    suite = instantiate(config.benchmark, _convert_="all")
    assert replace(suite, only=()) == TrainingStepsBenchmark()
