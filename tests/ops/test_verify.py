"""`python -m lq_kernels.verify` finds what is wrong, says what it did, and has inputs for every op."""

import importlib
import json
import math
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lq_kernels
import pytest
import torch
from lq_kernels import verify
from torch import Tensor

for module in pkgutil.iter_modules(lq_kernels.__path__):
    importlib.import_module(f"lq_kernels.{module.name}")

from lq_kernels._op import OPS  # noqa: E402 - full only once every module is imported
from lq_kernels.verify_checks import UPDATE, checks, difference  # noqa: E402
from lq_kernels.verify_inputs import INPUTS, MATRICES, hostile  # noqa: E402

CPU = torch.device("cpu")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted in this process")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """broken(name, launcher) gives an op another launcher."""

    def replace_launcher(name: str, launcher: Callable[..., Any]) -> None:
        monkeypatch.setattr(OPS[name], "launcher", launcher)

    return replace_launcher


def test_every_op_has_inputs_of_each_kind() -> None:
    assert set(INPUTS) == set(OPS)
    kinds = {name: {check.name.partition(",")[0] for check in checks([name])} for name in OPS}
    assert {name: found for name, found in kinds.items() if found != set(MATRICES)} == {"small_batch_4bit": {"large"}}


def test_the_matrices_are_hostile() -> None:
    x = hostile(37, 1000)
    assert not x[0].any()
    assert x[1, 0] == 127
    assert set((x[1, 1:] % 1).tolist()) == {0.5}
    assert 0 < x[2].abs().max() < 2.0**-118
    assert x.stride(0) > 1000
    whole = torch.empty(0).set_(x.untyped_storage())
    assert whole.isinf().sum() == whole.numel() - x.numel()
    copy = next(checks(["quantize_rowwise"])).on(CPU)[0]
    assert copy.stride() == x.stride()
    assert copy.data_ptr() != x.data_ptr()
    assert torch.equal(copy, x)


@INTERPRETED
@pytest.mark.parametrize("name", ["quantize_rowwise", "rescale_int32", "record_gradient_norm"])
def test_a_right_op_passes(name: str, device: torch.device, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify.main([name, "--interpret"]) == 0
    printed = capfd.readouterr().out
    assert "1 op, 3 ok. Kernels and references agree." in printed
    assert f"torch    {torch.__version__}" in printed
    assert len([line for line in printed.splitlines() if line.startswith(name) and line.endswith("ok")]) == 3


@pytest.mark.thorough
def test_all_ops_pass_in_the_interpreter(
    device: torch.device, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert verify.main(["--interpret", "--json", str(tmp_path / "out.json")]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["mode"] == "interpreter"
    ops = {outcome["op"] for outcome in record["outcomes"]}
    assert ops == {*OPS, UPDATE} - {"small_batch_4bit"}  # which takes 16 bits only


@INTERPRETED
def test_one_wrong_code_fails(
    broken: Callable[..., None], device: torch.device, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    right = OPS["quantize_rowwise"].launcher
    assert right is not None

    def wrong(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = right(x)
        codes[-1:, -1:] += 1
        return codes, scale

    broken("quantize_rowwise", wrong)
    assert verify.main(["quantize_rowwise", "--interpret", "--json", str(tmp_path / "out.json")]) == 1
    assert "2 FAILED. Wrong: quantize_rowwise. Please report" in capfd.readouterr().out
    outcomes = json.loads((tmp_path / "out.json").read_text())["outcomes"]
    assert [(o["result"], o["difference"], o["allowed"]) for o in outcomes] == [
        ("FAILED", 1.0, 0.0),
        ("FAILED", 1.0, 0.0),
        ("ok", 0.0, 0.0),  # no rows
    ]


@INTERPRETED
def test_an_op_that_raises_is_told_and_the_others_run(
    broken: Callable[..., None], device: torch.device, capfd: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: Any) -> None:
        raise IndexError("out of shared memory")

    broken("quantize_rowwise", wrong)
    assert verify.main(["quantize_rowwise", "rescale_int32", "--interpret"]) == 1
    printed = capfd.readouterr().out
    assert printed.count("IndexError: out of shared memory") == 3
    assert "2 ops, 3 ok, 3 ERROR. Wrong: quantize_rowwise." in printed


@INTERPRETED
def test_what_a_gpu_does_not_have_is_no_failure(
    broken: Callable[..., None], device: torch.device, capfd: pytest.CaptureFixture[str]
) -> None:
    def without_fp8(*_: Any) -> None:
        raise RuntimeError("quantize_rowwise got float8_e4m3fn, which needs sm_89: sm_80 has no fp8; use int8")

    broken("quantize_rowwise", without_fp8)
    assert verify.main(["quantize_rowwise", "--interpret"]) == 0
    assert "3 not on this GPU" in capfd.readouterr().out


@INTERPRETED
def test_nothing_runs_on_a_gpu_that_does_not_answer(
    broken: Callable[..., None], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    broken("quantize_rowwise", wrong)
    monkeypatch.setattr(verify, "_answers", lambda device: False)
    outcomes = list(verify.verify("interpreter", ["quantize_rowwise", "rescale_int32"]))
    assert [outcome.result for outcome in outcomes] == ["ERROR", "ERROR"]
    assert "does not answer" in outcomes[1].problem


def test_without_a_gpu_references_run_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert verify.main([]) == 0
    printed = capfd.readouterr().out
    assert "only the PyTorch references run: kernels are not verified." in printed
    assert f"{len(OPS) + 1} ops, " in printed
    assert "agree" not in printed


def test_arguments_that_nobody_understands(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["quantise_rowwise"]) == 2
    assert "there is no op 'quantise_rowwise'; the ops are dequantize_4bit" in capfd.readouterr().out
    assert verify.main(["--json", str(tmp_path / "nowhere" / "out.json")]) == 2
    assert "there is no folder" in capfd.readouterr().out


def test_without_triton_there_is_nothing_to_verify(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "HAS_TRITON", False)
    assert verify.main(["--interpret"]) == 2
    assert "pip install 'triton" in capfd.readouterr().out


def off_by_a_little(value: Tensor) -> Tensor:
    """3 %, two codes, or the next fp8 value at least."""
    if not value.is_floating_point():
        return value + 2
    return (value.double() * (1.3 if value.itemsize == 1 else 1.03)).to(value.dtype)


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted({*OPS, UPDATE}))
def test_no_bound_is_so_wide_that_it_lets_everything_pass(name: str) -> None:
    for check in checks([name]):
        if check.name.startswith(("no rows", "not finite")):
            continue
        expected = check.reference(*check.on(CPU))
        limits = check.allowed(check.arguments, expected)
        for value, limit in zip(expected, limits, strict=True):
            assert difference(value.clone(), value, limit)[0] == 0
            if value.double().any():
                worst, allowed = difference(off_by_a_little(value), value, limit)
                assert worst > allowed, check.name


@pytest.mark.parametrize(
    ("value", "expected", "apart"),
    [
        (torch.ones(3), torch.ones(3), 0.0),
        (torch.tensor([1.0, 1.5]), torch.ones(2), 0.5),
        (torch.tensor([math.nan]), torch.tensor([math.nan]), 0.0),
        (torch.tensor([math.nan]), torch.tensor([1.0]), math.inf),
        (torch.tensor([1.0]), torch.tensor([math.nan]), math.inf),
        (torch.tensor([math.inf]), torch.tensor([math.inf]), 0.0),
        (torch.tensor([math.inf]), torch.tensor([-math.inf]), math.inf),
        (torch.tensor([3e38]), torch.tensor([math.inf]), math.inf),
        (torch.tensor([255], dtype=torch.uint8), torch.tensor([0], dtype=torch.uint8), 255.0),
        (torch.ones(3).double(), torch.ones(3), math.inf),
        (torch.ones(3, 2), torch.ones(2, 3).t(), math.inf),
        (torch.ones(2), torch.ones(1), math.inf),
        (torch.empty(0, 3), torch.empty(0, 3), 0.0),
    ],
)
def test_difference(value: Tensor, expected: Tensor, apart: float) -> None:
    assert difference(value, expected, 0.0)[0] == apart


def test_the_worst_difference_is_the_one_that_passes_what_is_allowed() -> None:
    allowed = torch.tensor([10.0, 0.25])
    assert difference(torch.tensor([9.0, 0.5]), torch.zeros(2), allowed) == (0.5, 0.25)
    assert difference(torch.tensor([9.0, 0.25]), torch.zeros(2), allowed) == (9.0, 10.0)
    # What is not finite has to be so in both, whatever is allowed.
    assert difference(torch.tensor([1.0]), torch.tensor([math.inf]), math.inf) == (math.inf, 0.0)


def test_a_check_is_chosen_by_the_types_it_holds() -> None:
    check = next(checks(["quantize_rowwise"]))
    assert check.uses(torch.float32)
    assert not check.uses(torch.bfloat16)
    assert replace(check, arguments=(check.arguments[0], torch.bfloat16)).uses(torch.float16, torch.bfloat16)


def test_what_an_op_writes_is_compared(device: torch.device) -> None:
    written = [check for check in checks(["quantize_values_out"]) if check.name == "odd"]
    expected = written[0].reference(*written[0].on(CPU))
    assert [value.dtype for value in expected] == [torch.uint8]
    assert not (expected[0] == 77).all()
