"""The clipping rule by hand-computed examples, and the kernels against the reference."""

import math

import pytest
import torch
from lq_kernels import percentile_clipping
from lq_kernels.multi_tensor import Batch, State
from lq_kernels.optimizer_state import new_state
from lq_kernels.percentile_clipping import (
    Preparation,
    launch_prepare,
    new_history,
    percentile_factor,
    prepare,
)
from torch import Tensor

CPU = torch.device("cpu")


def run(norms: list[float], percentile: int) -> tuple[list[float | None], State]:
    state = new_history(CPU)
    factors = [percentile_factor(n, state["gnorm_history"], state["gnorm_counts"], percentile) for n in norms]
    return factors, state


def test_the_first_norm_fills_the_history_and_is_not_clipped() -> None:
    factors, state = run([3.0], 5)
    assert factors == [1.0]
    assert state["gnorm_history"].tolist() == [3.0] * 100
    assert state["gnorm_counts"].tolist() == [1, 0, 0]


def test_a_norm_above_the_percentile_is_clipped_to_it() -> None:
    # 99 slots of 2 and one of 8: sorted[5] = 2, so 8 is clipped by 2 / 8
    factors, state = run([2.0, 8.0], 5)
    assert factors == [1.0, 0.25]
    assert state["gnorm_history"].tolist() == [2.0, 8.0] + [2.0] * 98
    assert state["gnorm_counts"].tolist() == [2, 1, 0]


def test_the_new_norm_takes_part_in_the_percentile() -> None:
    # 99 slots of 2 and the new one of 1: sorted[0] = 1, so nothing is above; at percentile 1 the limit is 2
    assert run([2.0, 1.0], 1)[0] == [1.0, 1.0]
    # six small norms make sorted[5] small: 1, 1, 1, 1, 1, 1, 2 ... so 2 is clipped by 1 / 2
    assert run([2.0] + [1.0] * 6 + [2.0], 5)[0][-1] == 0.5
    # five leave it at 2
    assert run([2.0] + [1.0] * 5 + [2.0], 5)[0][-1] == 1.0


def test_the_hundred_and_first_norm_replaces_the_first() -> None:
    factors, state = run([float(n) for n in range(1, 102)], 99)
    assert set(factors) == {1.0}
    assert state["gnorm_history"].tolist() == [101.0, *(float(n) for n in range(2, 101))]


def test_zero_norms_are_neither_recorded_nor_clipped() -> None:
    # LoRA: B = 0 at first, so the first gradients of A are zero; then 4 is the first norm, not a hundredfold outlier
    factors, state = run([0.0, 0.0, 4.0, 4.0], 5)
    assert factors == [1.0] * 4
    assert state["gnorm_history"].tolist() == [4.0] * 100
    assert state["gnorm_counts"].tolist() == [2, 0, 0]


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_skips_the_step_and_is_counted(norm: float) -> None:
    factors, state = run([2.0, norm, 2.0], 5)
    assert factors == [1.0, None, 1.0]
    assert state["gnorm_history"].tolist() == [2.0] * 100
    assert state["gnorm_counts"].tolist() == [2, 0, 1]


SHAPES = [(300,), (3, 1000), (), (16384,), (8193,), (0,), (5,)]


def batch(device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
    params = [torch.zeros(shape, dtype=dtype, device=device) for shape in SHAPES]
    states = [new_state(param, False) | new_history(device) for param in params]
    return Batch(params, states, dtype)


def gradients(step: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Heavy tails; at some steps one is absent, zero or not finite."""
    grads: list[Tensor | None] = [torch.randn(shape) * math.exp(torch.randn(()).item()) for shape in SHAPES]
    if step == 0:
        grads[0] = torch.zeros(SHAPES[0])
    if step == 2:
        grads[1] = None
        grads[3][16383] = math.nan  # type: ignore[index]
        grads[4][8192] = -math.inf  # type: ignore[index]
    return [None if grad is None else grad.to(dtype) for grad in grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("percentile", [None, 1, 50, 99])
def test_kernels_give_the_facts_of_the_reference(
    percentile: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    how = Preparation((0.9, 0.999), percentile, maximize=percentile == 50)
    expected, got = batch(CPU, dtype), batch(device, dtype)
    for step in range(5):
        grads = gradients(step, dtype)
        reference = prepare(expected, grads, how)
        on_device = [None if grad is None else grad.to(device) for grad in grads]
        table = got.launch_data().table.refresh(got.params, on_device)
        facts = launch_prepare(got, on_device, table, how).cpu()
        for want, row in zip(reference, facts.tolist(), strict=True):
            assert row[3] == want.active
            if want.active:
                # float32 against float64; norms are sums of 2^14 squares, added in another order: 15 roundings
                assert row[:3] == pytest.approx([want.factor, want.bias1, want.sqrt_bias2], rel=2.0**-20)
        for ours, theirs in zip(got.states, expected.states, strict=True):
            assert torch.equal(ours["step"].cpu(), theirs["step"])
            assert torch.equal(ours["gnorm_counts"].cpu(), theirs["gnorm_counts"])
            torch.testing.assert_close(
                ours["gnorm_history"].cpu(), theirs["gnorm_history"], rtol=2.0**-20, atol=0, equal_nan=False
            )


def test_bias_correction_is_exact_where_beta_to_the_step_is_close_to_one(device: torch.device) -> None:
    params = [torch.zeros(1, device=device)]
    states = [new_state(params[0], False)]
    how = Preparation((0.0, 0.999999))
    one = Batch(params, states, torch.float32)
    table = one.launch_data().table.refresh(params, params)
    for step in range(1, 4):
        facts = launch_prepare(one, params, table, how)[0].tolist()
        assert facts == pytest.approx([1, 1, math.sqrt(1 - 0.999999**step), 1], rel=1e-6)


def test_the_norm_adds_up_more_chunks_than_it_reads_at_a_time(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(percentile_clipping, "_CHUNK", 16)
    grad = torch.ones(16 * 1024 + 17, device=device)
    one = Batch([grad], [new_state(grad, False) | new_history(device)], torch.float32)
    launch_prepare(one, [grad], one.launch_data().table.refresh([grad], [grad]), Preparation(percentile=5))
    assert one.states[0]["gnorm_history"][0].item() == pytest.approx(math.sqrt(16 * 1024 + 17))


def test_norms_repeat_to_the_bit(device: torch.device) -> None:
    grad = torch.randn(100_000, device=device)
    one, how = Batch([grad], [new_state(grad, False) | new_history(device)], torch.float32), Preparation(percentile=99)
    table = one.launch_data().table.refresh([grad], [grad])
    for _ in range(3):
        launch_prepare(one, [grad], table, how)
    assert len(one.states[0]["gnorm_history"][:3].unique()) == 1
