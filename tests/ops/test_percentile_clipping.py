"""The clipping rule by hand-computed examples, and the kernels against the reference."""

import math

import pytest
import torch
from lq_kernels import optimizer_batch, percentile_clipping
from lq_kernels.adam_rules import Adam
from lq_kernels.multi_tensor import State
from lq_kernels.optimizer_batch import Batch
from lq_kernels.optimizer_facts import Clipping, Facts, launch_prepare, prepare
from lq_kernels.optimizer_state import new_state
from lq_kernels.percentile_clipping import launch_squares, new_history, percentile_factor
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


def rule(betas: tuple[float, float] = (0.9, 0.999), maximize: bool = False) -> Adam:
    return Adam(lr=1e-2, betas=betas, eps=1e-8, weight_decay=0.0, maximize=maximize)


def batch(device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
    params = [torch.zeros(shape, dtype=dtype, device=device) for shape in SHAPES]
    states = [new_state(param, "float32", (True, False)) | new_history(device) for param in params]
    return Batch(params, states, dtype)


def launched(of: Batch, grads: list[Tensor | None], how: Adam, clipping: Clipping) -> list[list[float]]:
    """The rows of facts that the kernels write."""
    table = of.launch_data().addresses.refresh(of.params, grads)
    if clipping.percentile is not None:
        launch_squares(of, table)
    return launch_prepare(of, table, [how], [0], clipping, None).tolist()


def gradients(step: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Heavy tails; at some steps one is absent, zero or not finite."""
    grads: list[Tensor | None] = [torch.randn(shape) * math.exp(torch.randn(()).item()) for shape in SHAPES]
    if step == 0:
        grads[0] = torch.zeros(SHAPES[0])
    if step == 2:
        grads[1] = None
        grads[3][16383] = math.nan
        grads[4][8192] = -math.inf
    return [None if grad is None else grad.to(dtype) for grad in grads]


def assert_facts_agree(row: list[float], want: Facts) -> None:
    assert row[0] == want.active
    if want.active:
        # float32 against float64; norms are sums of 2^14 squares, added in another order: 15 roundings
        assert row[1] == pytest.approx(want.factor, rel=2.0**-20)
        assert row[4 : 4 + len(want.numbers)] == pytest.approx(want.numbers, rel=2.0**-20)


@pytest.mark.parametrize(
    ("percentile", "dtype"),
    [*((percentile, torch.float32) for percentile in (None, 1, 50, 99)), (50, torch.bfloat16), (50, torch.float16)],
)
def test_kernels_give_the_facts_of_the_reference(
    percentile: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    how, clipping = rule(maximize=percentile == 50), Clipping(percentile)
    expected, got = batch(CPU, dtype), batch(device, dtype)
    for step in range(5):
        grads = gradients(step, dtype)
        reference = prepare(expected, grads, [how], clipping)
        on_device = [None if grad is None else grad.to(device) for grad in grads]
        for want, row in zip(reference, launched(got, on_device, how, clipping), strict=True):
            assert_facts_agree(row, want)
        for ours, theirs in zip(got.states, expected.states, strict=True):
            assert torch.equal(ours["step"].cpu(), theirs["step"])
            assert torch.equal(ours["gnorm_counts"].cpu(), theirs["gnorm_counts"])
            torch.testing.assert_close(
                ours["gnorm_history"].cpu(), theirs["gnorm_history"], rtol=2.0**-20, atol=0, equal_nan=False
            )


def test_factors_are_the_quotients_of_float32(device: torch.device) -> None:
    """Of norms that are exact, those of single integers; a product with the reciprocal is another float32 for each."""
    pairs = [(5, 6), (3, 7), (9, 10), (9, 11), (7, 12), (6, 13), (13, 14), (7, 15)]
    params = [torch.zeros(1, device=device) for _ in pairs]
    states = [new_state(param, "float32", (True, False)) | new_history(device) for param in params]
    of = Batch(params, states, torch.float32)
    for norms in zip(*pairs, strict=True):
        rows = launched(of, [torch.full((1,), float(n), device=device) for n in norms], rule(), Clipping(5))
    factors = torch.tensor([row[1] for row in rows])
    expected = torch.tensor([limit / norm for limit, norm in pairs], dtype=torch.float64).float()
    assert torch.equal(factors, expected)


def single(device: torch.device, grad: Tensor) -> Batch:
    state = new_state(grad, "float32", (True, False)) | new_history(device)
    return Batch([grad], [state], torch.float32)


def test_bias_correction_is_exact_where_beta_to_the_step_is_close_to_one(device: torch.device) -> None:
    one = single(device, torch.zeros(1, device=device))
    for step in range(1, 4):
        (row,) = launched(one, one.params, rule(betas=(0.0, 0.999999)), Clipping())
        assert row[10:12] == pytest.approx([1, (1 - 0.999999**step) ** -0.5], rel=1e-6)


def test_the_norm_adds_up_more_chunks_than_it_reads_at_a_time(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_batch, "_CHUNK", 256)
    monkeypatch.setattr(percentile_clipping, "_TILE", 256)
    monkeypatch.setattr(percentile_clipping, "_SUMS_AT_A_TIME", percentile_clipping.tl.constexpr(16))
    grad = torch.ones(256 * 40 + 17, device=device)
    one = single(device, grad)
    launched(one, [grad], rule(), Clipping(5))
    assert one.states[0]["gnorm_history"][0].item() == pytest.approx(math.sqrt(256 * 40 + 17))


@pytest.mark.parametrize("numel", [1, 255, 8192, 8193, 3 * 8192 + 5])
def test_programs_add_up_all_tiles_of_their_chunk(
    numel: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_batch, "_CHUNK", 2 * 8192)
    grad = torch.arange(1, numel + 1, device=device).remainder(7).float()
    one = single(device, grad)
    launched(one, [grad], rule(), Clipping(5))
    assert one.states[0]["gnorm_history"][0].item() == pytest.approx(float(grad.square().sum()) ** 0.5, rel=1e-6)


def test_norms_repeat_to_the_bit(device: torch.device) -> None:
    grad = torch.randn(100_000, device=device)
    one = single(device, grad)
    for _ in range(3):
        launched(one, [grad], rule(), Clipping(99))
    assert len(one.states[0]["gnorm_history"][:3].unique()) == 1
