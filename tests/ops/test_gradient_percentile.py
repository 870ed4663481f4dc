"""bitsandbytes' percentile clipping against its rule in float64, and over many steps."""

import math
from typing import Any

import pytest
import torch
from hostile import FLOATS, heavy_tailed
from lq_kernels.gradient_percentile import clip_at_percentile, record_gradient_norm
from torch import Tensor


class Rule:
    """The rule on Python numbers."""

    def __init__(self) -> None:
        self.squares = [0.0] * 100

    def step(self, grad: Tensor, step: int, percentile: int) -> tuple[float, float, float]:
        square = sum(value * value for value in grad.double().flatten().tolist())
        self.squares[step % 100] = 0.0
        for slot in range(100) if step == 1 else [step % 100]:
            self.squares[slot] += square
        norm = math.sqrt(self.squares[step % 100])
        limit = math.sqrt(sorted(self.squares)[percentile])
        return norm, limit, limit / norm if norm > limit else 1.0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("percentile", [0, 5, 99])
def test_norm_limit_and_scale_follow_the_rule_over_many_steps(percentile: int, dtype: torch.dtype) -> None:
    rule, gnorm_vec, clipped = Rule(), torch.zeros(100), 0
    for step in range(1, 230):
        grad = (torch.randn(3, 7) * torch.randn(()).exp()).to(dtype)
        expected = rule.step(grad, step, percentile)
        got = clip_at_percentile(grad, gnorm_vec, step, percentile)
        torch.testing.assert_close([value.item() for value in got], list(expected), rtol=1e-6, atol=0)
        assert torch.equal(got[2], torch.where(got[0] > got[1], got[1] / got[0], 1.0))
        clipped += expected[2] < 1
        torch.testing.assert_close(gnorm_vec, torch.tensor(rule.squares), rtol=1e-6, atol=0)
    assert (clipped == 0) == (percentile == 99)


def test_the_published_case_twenty_steps_of_four_values() -> None:
    gnorm_vec = torch.zeros(100)
    norms: list[Tensor] = []
    for step in range(1, 21):
        grad = torch.randn(4) * 0.1
        norm, limit, scale = clip_at_percentile(grad, gnorm_vec, step, percentile=5)
        norms = [grad.norm()] * 100 if step == 1 else norms
        norms[step % 100] = grad.norm()
        expected = torch.stack(norms).sort().values[5]
        torch.testing.assert_close(norm, grad.norm())
        torch.testing.assert_close(limit, expected)
        torch.testing.assert_close(scale, torch.clamp(expected / grad.norm(), max=1.0))
        torch.testing.assert_close(gnorm_vec.sqrt(), torch.stack(norms))


def test_results_are_0_d_float32_and_the_history_is_written_in_place() -> None:
    gnorm_vec = torch.zeros(100)
    version = gnorm_vec._version
    results = clip_at_percentile(torch.tensor([3.0, 4.0]).half(), gnorm_vec, 1)
    assert [(value.shape, value.dtype) for value in results] == [(torch.Size([]), torch.float32)] * 3
    assert [value.item() for value in results] == [5, 5, 1]
    assert gnorm_vec.tolist() == [25.0] * 100
    assert gnorm_vec._version > version


def test_only_the_slot_of_a_later_step_is_written() -> None:
    gnorm_vec = torch.arange(100.0)
    clip_at_percentile(torch.tensor([2.0]), gnorm_vec, 205, 5)
    expected = torch.arange(100.0)
    expected[5] = 4.0
    assert torch.equal(gnorm_vec, expected)
    norm, limit, scale = clip_at_percentile(torch.tensor([9.0]), gnorm_vec, 300, 5)
    assert norm.item() == 9
    assert limit.item() == pytest.approx(math.sqrt(6))  # of 1 2 3 4 4 6 7 ...
    assert scale.item() == pytest.approx(math.sqrt(6) / 9)


def test_zeros_and_infinities_enter_the_history_and_a_nan_sorts_last() -> None:
    gnorm_vec = torch.zeros(100)
    assert [value.item() for value in clip_at_percentile(torch.zeros(3), gnorm_vec, 1)] == [0, 0, 1]
    assert [value.item() for value in clip_at_percentile(torch.ones(4), gnorm_vec, 2)] == [2, 0, 0]
    norm, limit, scale = clip_at_percentile(torch.tensor([float("inf")]), gnorm_vec, 3, 98)
    assert (norm.item(), limit.item(), scale.item()) == (float("inf"), 2, 0)
    norm, limit, scale = clip_at_percentile(torch.tensor([float("nan")]), gnorm_vec, 4, 98)
    assert norm.isnan()
    assert (limit.item(), scale.item()) == (float("inf"), 1)
    assert clip_at_percentile(torch.ones(1), gnorm_vec, 5, 99)[1].isnan()


@pytest.mark.parametrize("n", [1, 37, 1000, 30_000])
def test_the_norm_of_heavy_tails_is_that_of_float64(n: int, device: torch.device) -> None:
    grad = heavy_tailed(11, n)
    gnorm_vec, result = torch.zeros(100, device=device), torch.empty(3, device=device)
    assert record_gradient_norm.launcher is not None
    record_gradient_norm.launcher(grad.to(device), gnorm_vec, result, 1, 5)
    # Pairs, then 1024 partial sums in pairs, each step rounded, after at most 3 tiles in a row.
    roundings = math.log2(4096) + math.log2(1024) + 3 + 1
    exact = grad.double().square().sum()
    norm, limit, scale = result.cpu()
    assert (norm, limit, scale) == (gnorm_vec[0].cpu().sqrt(), norm, 1)
    assert abs(gnorm_vec[0].double().cpu() - exact) <= roundings * 2.0**-24 * exact


def test_the_scale_is_the_quotient_of_limit_and_norm_to_the_bit(device: torch.device) -> None:
    assert record_gradient_norm.launcher is not None
    for norm in torch.rand(20) + 2:
        gnorm_vec, result = torch.rand(100, device=device), torch.empty(3, device=device)
        record_gradient_norm.launcher(norm.to(device), gnorm_vec, result, 2, 5)
        got, limit, scale = result.cpu()
        assert torch.equal(scale, limit / got)


def test_the_same_gradient_gives_the_same_bits(device: torch.device) -> None:
    grad, bits = heavy_tailed(50, 2000).to(device), set()
    assert record_gradient_norm.launcher is not None
    for _ in range(3):
        gnorm_vec, result = torch.zeros(100, device=device), torch.empty(3, device=device)
        record_gradient_norm.launcher(grad, gnorm_vec, result, 1, 5)
        bits.add((gnorm_vec[7].item(), *result.tolist()))
    assert len(bits) == 1


def test_a_compiled_step_gives_what_it_gives_in_eager() -> None:
    compiled = torch.compile(clip_at_percentile, backend="aot_eager", fullgraph=True)
    of_compiled, of_eager = torch.zeros(100), torch.zeros(100)
    for step in range(1, 4):
        grad = torch.randn(5, 7)
        got, expected = compiled(grad, of_compiled, step, 5), clip_at_percentile(grad, of_eager, step, 5)
        assert torch.equal(torch.stack(got), torch.stack(expected))
        assert torch.equal(of_compiled, of_eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": 0}, ValueError, "from 1"),
        ({"step": -3}, ValueError, "from 1"),
        ({"percentile": -1}, ValueError, "0 to 99"),
        ({"percentile": 100}, ValueError, "do not call it"),
        ({"grad": torch.zeros(3, dtype=torch.float64)}, TypeError, "float64"),
        ({"gnorm_vec": torch.zeros(99)}, ValueError, "gnorm_vec"),
        ({"gnorm_vec": torch.zeros(100, 1)}, ValueError, "gnorm_vec"),
        ({"gnorm_vec": torch.zeros(100).half()}, ValueError, "float16"),
        ({"gnorm_vec": torch.zeros(100, device="meta")}, ValueError, "meta"),
    ],
)
def test_arguments_that_are_refused(change: dict, error: type[Exception], message: str) -> None:
    args: dict[str, Any] = {"grad": torch.zeros(3), "gnorm_vec": torch.zeros(100), "step": 1, "percentile": 5} | change
    with pytest.raises(error, match=message):
        clip_at_percentile(**args)
    assert record_gradient_norm.launcher is not None
    with pytest.raises(error, match=message):
        record_gradient_norm.launcher(**args, result=torch.empty(3))


@pytest.mark.gpu
def test_a_gradient_of_more_than_two_to_the_31_values() -> None:
    grad = torch.zeros(2**31 + 4097, device="cuda", dtype=torch.bfloat16)
    grad[-1], grad[0], grad[2**31] = 3.0, 4.0, 12.0
    gnorm_vec = torch.zeros(100, device="cuda")
    norm, _, _ = clip_at_percentile(grad, gnorm_vec, 1)
    assert norm.item() == 13
