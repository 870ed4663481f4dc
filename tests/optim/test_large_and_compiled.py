"""AdamW8bit beside a compiled model, with gradients of any layout, and for more than 2^31 elements."""

import copy

import pytest
import torch
from lq_kernels.multi_tensor import all_there
from lq_kernels.optimizer_step import _contiguous
from torch import Tensor, nn
from torch.nn import Parameter

from lq_plugin.optim import AdamW8bit


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 300), nn.GELU(), nn.Linear(300, 64, bias=False))


def train(compute: nn.Module, owner: nn.Module) -> list[float]:
    optimizer = AdamW8bit(owner.parameters(), lr=1e-2, percentile_clipping=5)
    x, y = torch.randn(8, 100), torch.randn(8, 64)
    losses = []
    for _ in range(4):
        loss = (compute(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_compiled_model_trains_as_an_eager_one() -> None:
    eager = model()
    compiled = copy.deepcopy(eager)
    torch.manual_seed(1)
    expected = train(eager, eager)
    torch.manual_seed(1)
    losses = train(torch.compile(compiled, backend="aot_eager"), compiled)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]


def test_gradients_that_are_not_contiguous_are_copied_and_others_are_not() -> None:
    whole = [torch.zeros(3, 4), torch.zeros(0), torch.zeros(())]
    assert _contiguous(whole) is whole
    mixed: list[Tensor | None] = [torch.arange(6.0).view(2, 3).t(), None, whole[0]]
    assert all_there(whole)
    assert not all_there(mixed)
    copied = _contiguous(mixed)
    assert copied[0] is not None
    assert copied[0].is_contiguous()
    assert torch.equal(copied[0], torch.arange(6.0).view(2, 3).t())
    assert copied[1] is None
    assert copied[2] is whole[0]


@pytest.mark.gpu
def test_elements_beyond_the_two_billionth_are_updated_like_the_others() -> None:
    rows, columns = (1 << 19) + 3, 4096  # 2^31 elements and three rows
    large = Parameter(torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda"))
    small = Parameter(torch.zeros(6, columns, dtype=torch.bfloat16, device="cuda"))
    optimizer = AdamW8bit([large, small], lr=1e-2)
    for _ in range(2):
        small.grad = torch.randn_like(small)
        large.grad = torch.zeros_like(large)
        large.grad[:3], large.grad[-3:] = small.grad[:3], small.grad[3:]
        optimizer.step()
    assert torch.equal(large[:3], small[:3])
    assert torch.equal(large[-3:], small[3:])
    assert not large[3:-3].any()
    for key in ("codes1", "codes2", "scale1", "scale2"):
        ends = torch.cat([optimizer.state[large][key][:3], optimizer.state[large][key][-3:]])
        assert torch.equal(ends, optimizer.state[small][key])
