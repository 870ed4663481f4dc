"""Paired training runs: the same data and weights on both sides, intervals by hand, and no run lost or done twice."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor

from lq_plugin.formats import FORMATS
from lq_plugin.recipes.benchmark import main
from lq_plugin.recipes.benchmarks import convergence
from lq_plugin.recipes.benchmarks.convergence import ConvergenceBenchmark, summary
from lq_plugin.recipes.benchmarks.convergence_algorithms import ALGORITHMS, learning_rate
from lq_plugin.recipes.benchmarks.convergence_run import Outcome, Task, Text, bits_of_single_bytes, diverged, train
from lq_plugin.recipes.benchmarks.convergence_statistics import Interval, interval, t_quantile
from lq_plugin.recipes.benchmarks.convergence_studies import OTHERS, SMALL, STUDIES, Variant
from lq_plugin.recipes.benchmarks.convergence_workers import Failure, outcomes
from lq_plugin.recipes.tasks.gpt import GPT
from lq_plugin.recipes.tasks.language_model import cosine_share

Records = list[dict[str, Any]]


@pytest.mark.parametrize(
    ("degrees", "confidence", "t"),  # any table of Student's distribution
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (4, 0.95, 2.776), (9, 0.95, 2.262), (30, 0.95, 2.042), (4, 0.99, 4.604)],
)
def test_quantiles_are_those_of_the_tables(degrees: int, confidence: float, t: float) -> None:
    assert t_quantile(degrees, confidence) == pytest.approx(t, abs=5e-4)


def test_an_interval_is_the_mean_and_t_standard_errors_to_each_side() -> None:
    half = 2.7764 * math.sqrt(2.5) / math.sqrt(5)
    got = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert got is not None
    assert (got.mean, got.low, got.high) == (3.0, pytest.approx(3 - half, abs=1e-3), pytest.approx(3 + half, abs=1e-3))
    assert interval([2.0]) == Interval(2.0, None, None)
    assert interval([]) is None


def run_of(variant: str, seed: int, bits: float, diverged: bool = False, problem: str | None = None) -> dict[str, Any]:
    return {"variant": variant, "seed": seed, "bits_per_byte": bits, "diverged": diverged, "problem": problem}


def test_differences_are_taken_seed_by_seed() -> None:
    """Between the seeds the bits differ far more than within a pair."""
    runs = [run_of("a", 0, 2.0), run_of("a", 1, 4.0), run_of("b", 1, 4.04), run_of("b", 0, 2.02)]
    record = summary(Variant("b", against="a", limit=1.1), runs)
    assert record["n"] == 2
    assert record["difference_percent"] == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0})
    assert record["difference_bits"]["mean"] == pytest.approx(0.03)
    assert record["within_limit"] is True
    assert summary(Variant("b", against="a", limit=0.9), runs)["within_limit"] is False
    alone = summary(Variant("a"), runs)
    assert (alone["n"], alone["bits_per_byte"], alone["difference_percent"]) == (2, 3.0, None)


def test_a_pair_of_which_one_diverged_or_failed_is_counted_and_left_out() -> None:
    runs = [run_of("a", seed, 2.0, diverged=seed == 1) for seed in range(4)]
    runs += [run_of("b", 0, 2.2), run_of("b", 1, 2.2), run_of("b", 2, 9.0, diverged=True)]
    runs += [run_of("b", 3, 0.0, problem="it fell over")]
    record = summary(Variant("b", against="a", limit=0.3), runs)
    assert (record["n"], record["diverged"], record["failed"], record["runs"]) == (1, 1, 1, 4)
    assert record["difference_percent"]["mean"] == pytest.approx(10.0)
    assert record["within_limit"] is None  # one pair has no interval


@pytest.mark.parametrize("study", STUDIES)
def test_a_variant_differs_from_what_it_is_held_against_in_no_learning_rate_and_no_clipping(study: str) -> None:
    variants = {variant.name: variant for variant in STUDIES[study].variants}
    assert len(variants) == len(STUDIES[study].variants)
    for variant in variants.values():
        if variant.against is not None:
            other = variants[variant.against]
            assert (learning_rate(variant), variant.percentile) == (learning_rate(other), other.percentile)
            assert (variant.weights, other.against) == (other.weights, None)
            assert replace(variant, name="", against=None, limit=None) != replace(other, name="", limit=None)


def test_the_studies_hold_what_they_promise() -> None:
    optimizers, formats = STUDIES["optimizers"], STUDIES["formats"]
    assert {v.algorithm for v in optimizers.variants} == ALGORITHMS.keys()
    for algorithm in OTHERS:
        assert {v.state for v in optimizers.variants if v.algorithm == algorithm} == {"8bit", "32bit"}
    for variant in optimizers.variants[:7]:
        assert variant.lr_factor == 1
        assert variant.algorithm.endswith("AdamW")
    factors = {v.lr_factor for v in optimizers.variants if v.name.startswith("AdamW 8bit, lr")}
    assert factors | {1.0} == {0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0}
    assert {name for name in FORMATS if name.startswith("int8_switchback")} <= {v.linear for v in formats.variants}
    assert formats.size.width >= 768
    assert min(optimizers.seeds, formats.seeds) >= 5
    assert min(optimizers.size.steps, formats.size.steps) >= 300


@pytest.fixture(scope="module")
def text() -> Text:
    """Sentences of three words: something to learn in a few steps."""
    generator = torch.Generator().manual_seed(3)
    words = [b"alpha ", b"beta ", b"gamma\n"]
    numbers = torch.randint(3, (3000,), generator=generator).tolist()
    long = torch.frombuffer(bytearray(b"".join(words[i] for i in numbers)), dtype=torch.uint8)
    return Text(long[:-2000], long[-2000:])


def outcome(text: Text, seed: int = 0, **changes: Any) -> Outcome:
    entropy = bits_of_single_bytes(text.validation)
    return train(Task(Variant("x", **changes), SMALL, seed, entropy), text)


def test_two_variants_start_from_the_same_weights_and_read_the_same_bytes(text: Text) -> None:
    """The first loss depends on both and on nothing else."""
    adamw, lion = outcome(text), outcome(text, algorithm="Lion", state="8bit")
    assert adamw.curve[0] == lion.curve[0]
    assert adamw.curve[-1] != lion.curve[-1]
    assert outcome(text, seed=1).curve[0] != adamw.curve[0]
    assert outcome(text).bits_per_byte == adamw.bits_per_byte


def test_a_run_is_the_plain_training_loop(text: Text) -> None:
    """Written anew, with torch's optimizer and scheduler."""
    size, seed, length = SMALL, 4, SMALL.context + 1

    def window(text: Tensor, number: int) -> Tensor:
        return text[number * length : (number + 1) * length].long()

    def loss_of(windows: list[Tensor]) -> Tensor:
        batch = torch.stack(windows)
        return F.cross_entropy(model(batch[:, :-1]).transpose(1, 2), batch[:, 1:]) / math.log(2)

    torch.manual_seed(seed)
    model = GPT(vocabulary=256, width=size.width, depth=size.depth, heads=size.heads, context=size.context)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99))
    share = partial(cosine_share, warmup_steps=size.warmup_steps, steps=size.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    order = torch.randperm(len(text.training) // length, generator=torch.Generator().manual_seed(seed)).tolist()
    losses = []
    for step in range(size.steps):
        numbers = order[step * size.batch_size : (step + 1) * size.batch_size]
        loss = loss_of([window(text.training, number) for number in numbers])
        optimizer.zero_grad()
        (loss * math.log(2)).backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = len(text.validation) // length - 1
    validation = torch.linspace(0, last, size.validation_windows).long().tolist()
    with torch.no_grad():
        bits = loss_of([window(text.validation, number) for number in validation]).item()
    got = outcome(text, seed=seed, algorithm="torch.AdamW", lr_factor=20.0)
    assert got.curve == pytest.approx(losses, abs=1e-4)
    assert got.bits_per_byte == pytest.approx(bits, abs=1e-4)


def test_our_adamw_in_32_bits_trains_as_torchs(text: Text) -> None:
    torchs, ours = outcome(text, algorithm="torch.AdamW"), outcome(text)
    assert ours.bits_per_byte == pytest.approx(torchs.bits_per_byte, abs=1e-5)
    assert outcome(text, state="8bit", lr_factor=30.0).bits_per_byte < torchs.bits_per_byte


@pytest.mark.parametrize(
    "changes",
    [
        {"linear": "int8_switchback"},
        {"percentile": 5},
        {"state": "8bit"},
        {"state": "fp8"},
        {"stochastic_rounding": True},
        {"master_weights": "8bit"},
        {"master_weights": "32bit"},
    ],
    ids=str,
)
def test_what_a_variant_asks_for_happens(text: Text, changes: dict[str, Any]) -> None:
    common = {"lr_factor": 10.0, "weights": "bfloat16"}
    assert outcome(text, **common).bits_per_byte != outcome(text, **common, **changes).bits_per_byte


def test_the_bits_that_bfloat16_lacks_are_kept_by_master_weights(text: Text) -> None:
    exact, nearest, kept = (
        outcome(text, lr_factor=10.0, **changes).bits_per_byte
        for changes in ({}, {"weights": "bfloat16"}, {"weights": "bfloat16", "master_weights": "32bit"})
    )
    assert abs(kept - exact) < abs(nearest - exact)


def test_the_matrices_inside_train_with_muon_and_the_rest_with_adamw(text: Text) -> None:
    assert outcome(text, algorithm="Muon", lr_factor=10.0).curve[-1] < outcome(text, algorithm="Muon").curve[0]


def test_a_run_that_learns_nothing_has_diverged(text: Text) -> None:
    assert outcome(text, lr_factor=1e9).diverged
    assert outcome(text, lr_factor=1e-9).diverged
    assert not train(Task(Variant("x", lr_factor=30.0), replace(SMALL, steps=25), 0, 4.0), text).diverged


def test_a_run_that_is_not_finite_or_has_risen_has_diverged_and_one_that_is_slow_has_not() -> None:
    assert not diverged([8.0, 4.0], 3.9, (8.0, 4.0), bits_of_bytes=4.0)
    assert diverged([8.0, 4.0], 4.0, (8.0, 4.0), bits_of_bytes=4.0)
    assert diverged([8.0, math.nan, 3.0], 3.0, (8.0, 3.0), bits_of_bytes=4.0)
    assert diverged([8.0, 3.0], math.inf, (8.0, 3.0), bits_of_bytes=4.0)
    assert diverged([8.0, 2.0, 2.6], 2.6, (8.0, 2.0, 2.6), bits_of_bytes=4.0)
    assert not diverged([8.0, 2.0, 2.4], 2.4, (8.0, 2.0, 2.4), bits_of_bytes=4.0)


def test_every_window_comes_once_before_any_comes_again() -> None:
    size = replace(SMALL, context=9, batch_size=3, steps=7)
    numbers = torch.arange(107, dtype=torch.uint8)  # 10 windows and a rest
    windows = Text(numbers, numbers).training_windows(size, seed=5)
    assert windows.shape == (7, 3, 10)
    starts = windows[..., 0].flatten().tolist()
    assert sorted(starts[:10]) == sorted(starts[10:20]) == list(range(0, 100, 10))
    assert starts[:10] != starts[10:20]
    assert torch.equal(windows - windows[..., :1], torch.arange(10, dtype=torch.uint8).expand(7, 3, 10))
    assert not torch.equal(windows, Text(numbers, numbers).training_windows(size, seed=6))
    assert Text(numbers, numbers).validation_windows(size)[:, 0].tolist() == [0, 10, 20, 30, 50, 60, 70, 90][:8]


def test_the_entropy_of_single_bytes() -> None:
    assert bits_of_single_bytes(torch.tensor([1, 1, 2, 3], dtype=torch.uint8)) == pytest.approx(1.5)


@pytest.fixture
def benchmark(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """benchmark(override, ...) -> (what it printed, the records of the file)."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs.jsonl"

    def run(*overrides: str) -> tuple[str, Records]:
        words = ["lq-benchmark", "benchmark=convergence", f"hydra.run.dir={tmp_path / 'run'}", f"output={path}"]
        more = ["benchmark.sizes=small", f"benchmark.roots=[{sources}]", "benchmark.validation_share=0.3"]
        monkeypatch.setattr(sys, "argv", [*words, *more, *overrides])
        main()
        return capsys.readouterr().out, [json.loads(line) for line in path.read_text().splitlines()]

    return run


def test_runs_and_summaries_are_written_with_hardware_versions_and_command(benchmark) -> None:
    printed, records = benchmark("benchmark.only=[Lion]", "benchmark.seeds=3")
    runs, summaries = ([r for r in records if r["kind"] == kind] for kind in ("run", "summary"))
    assert [(r["variant"], r["seed"]) for r in runs] == [(f"Lion {s}", i) for i in range(3) for s in ("32bit", "8bit")]
    assert [r["variant"] for r in summaries] == ["Lion 32bit", "Lion 8bit"]
    assert all(r["hardware"] and r["torch"] and "benchmark=convergence" in r["command"] for r in records)
    assert all(r["lr"] == 1e-4 and r["tokens_per_second"] > 0 and len(r["curve"]) == SMALL.steps for r in runs)
    assert printed.count("Lion 8bit") == 4


def test_asking_for_a_variant_brings_what_it_is_held_against(benchmark) -> None:
    _, records = benchmark("benchmark.only=[AdamW fp8]", "benchmark.seeds=1")
    assert {r["variant"] for r in records} == {
        *("AdamW fp8", "torch AdamW", "AdamW fp8, percentile 5", "AdamW 32bit, percentile 5"),
    }


def test_the_sweep_can_be_left_out() -> None:
    words = ("AdamW 8bit",)
    with_sweep, without = (ConvergenceBenchmark(only=words, sweep=s)._sized(torch.device("cpu")) for s in (True, False))
    assert {v.lr_factor for v in without.variants} == {1.0}
    assert len({v.lr_factor for v in with_sweep.variants}) == 7
    assert set(without.variants) < set(with_sweep.variants)


def test_a_benchmark_that_is_started_again_does_not_repeat_its_runs(
    benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = benchmark("benchmark.only=[SGD]", "benchmark.seeds=1")
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"kind": "run", "variant": "cut o')  # killed while it wrote
    _, second = benchmark("benchmark.only=[SGD]", "benchmark.seeds=2")
    runs = [r for r in second if r["kind"] == "run"]
    assert runs[:2] == first[:2]
    assert sorted((r["variant"], r["seed"]) for r in runs) == sorted(
        (f"SGD {s}", i) for s in ("8bit", "32bit") for i in (0, 1)
    )
    assert [r["runs"] for r in second if r["kind"] == "summary"] == [2, 2]
    monkeypatch.setattr(convergence, "train", lambda *_: 1 / 0)
    _, third = benchmark("benchmark.only=[SGD]", "benchmark.seeds=2")
    assert [r for r in third if r["kind"] == "run"] == runs


def test_another_length_is_another_run(benchmark) -> None:
    benchmark("benchmark.only=[SGD 32bit]", "benchmark.seeds=1")
    _, records = benchmark("benchmark.only=[SGD 32bit]", "benchmark.seeds=1", "benchmark.steps=7")
    assert [r["steps"] for r in records if r["kind"] == "run"] == [6, 7]
    assert [(r["steps"], r["runs"]) for r in records if r["kind"] == "summary"] == [(7, 1)]


def test_a_run_that_fails_is_recorded_and_done_again_the_next_time(
    benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(task: Task, text: Text) -> Outcome:
        if task.variant.state == "8bit":
            raise RuntimeError("no such\n  kernel")
        return train(task, text)

    monkeypatch.setattr(convergence, "train", broken)
    with pytest.raises(SystemExit, match="SGD 8bit, seed 0"):
        benchmark("benchmark.only=[SGD]", "benchmark.seeds=1")
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [r["problem"] for r in records] == [None, "RuntimeError: no such kernel", None, None]
    assert records[-1]["failed"] == 1
    monkeypatch.setattr(convergence, "train", train)
    _, records = benchmark("benchmark.only=[SGD]", "benchmark.seeds=1")
    assert [r["problem"] for r in records] == [None] * 4


def test_a_loss_that_is_not_finite_is_null_in_the_file(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "train", lambda *_: Outcome(math.nan, True, 1.0, 1.0, (8.0, math.inf)))
    printed, records = benchmark("benchmark.only=[SGD 32bit]", "benchmark.seeds=1")
    assert (records[0]["bits_per_byte"], records[0]["curve"], records[0]["diverged"]) == (None, [8.0, None], True)
    assert (records[1]["diverged"], records[1]["n"]) == (1, 0)
    assert "1 of 1" in printed


@pytest.mark.integration
def test_processes_share_the_runs_and_agree_with_one_process(benchmark, tmp_path: Path) -> None:
    _, together = benchmark("benchmark.only=[LAMB]", "benchmark.seeds=1", "benchmark.workers=2")
    (tmp_path / "runs.jsonl").unlink()
    _, alone = benchmark("benchmark.only=[LAMB]", "benchmark.seeds=1")
    bits = [{r["variant"]: r["bits_per_byte"] for r in records if r["kind"] == "run"} for records in (together, alone)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)


@pytest.mark.integration
def test_a_process_that_dies_takes_its_own_task_with_it_and_no_other() -> None:
    """A child cannot import this file: the name of the device is an expression that it evaluates with the task."""
    evaluate: Callable[[str], Any] = partial(partial, eval)
    tasks = [{"code": code} for code in (0, 3, 0, 0)]
    done = list(outcomes(tasks, ["__import__('os')._exit(code) if code else 'done'"], evaluate))
    assert [task["code"] for task, _ in done] == [0, 3, 0, 0]
    assert [result for _, result in done] == ["done", "its process ended with exit code 3", "done", "done"]
    assert isinstance(done[1][1], Failure)
    assert [r for _, r in outcomes(tasks[:1], ["1 / 0"], evaluate)] == ["ZeroDivisionError: division by zero"]


@pytest.mark.integration
def test_a_process_whose_task_failed_does_no_more() -> None:
    """A GPU may do nothing for it any more."""
    evaluate: Callable[[str], Any] = partial(partial, eval)
    expression = "(1 / 0) if fails else __import__('os').getpid()"
    done = [result for _, result in outcomes([{"fails": f} for f in (0, 0, 1, 0)], [expression], evaluate)]
    assert done[2] == "ZeroDivisionError: division by zero"
    assert done[0] == done[1] != done[3]


def test_too_little_text_is_an_error_that_says_what_to_add(benchmark, tmp_path: Path, capsys) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.py").write_text("x = 1\n")
    with pytest.raises(SystemExit):
        benchmark(f"benchmark.roots=[{tmp_path / 'few'}]")
    assert "training files hold 6 bytes, a window takes 33: add folders" in capsys.readouterr().err


def test_the_configuration_is_that_of_the_class() -> None:
    with initialize_config_module("lq_plugin.conf", version_base="1.3"):
        config = compose("benchmark", ["benchmark=convergence"])
    suite = instantiate(config.benchmark, _convert_="all")
    default = ConvergenceBenchmark()
    assert (suite.study, suite.sizes, tuple(suite.roots)) == (default.study, default.sizes, default.roots)
    with pytest.raises(ValueError, match="'optimizers', 'formats', got 'optimisers'"):
        ConvergenceBenchmark(study="optimisers")
