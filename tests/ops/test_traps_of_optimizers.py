"""Defects of bitsandbytes' optimizer updates: for each a test that the functions of the same name do not share it.

Formulas: g is the gradient times gnorm_scale, in float32; moments begin as zeros.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from lq_kernels import functional as F
from lq_kernels.codebooks import dynamic_map
from torch import Tensor

NAMES = ("adam", "ademamix", "lamb", "lars", "lion", "momentum", "rmsprop", "adagrad")
TWO_STATES = ("adam", "ademamix", "lamb")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Numbers:
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    beta3: float = 0.999
    alpha: float = 3.0
    eps: float = 1e-6
    weight_decay: float = 0.0
    gnorm_scale: float = 1.0


class Optimizer:
    """The states of one parameter, as bitsandbytes lays them out, and steps on it."""

    def __init__(self, name: str, p: Tensor, eight_bit: bool, numbers: Numbers) -> None:
        self.name, self.p, self.eight_bit, self.numbers, self.step_count = name, p, eight_bit, numbers, 0
        shape = (2, *p.shape) if name == "ademamix" else p.shape
        dtype = torch.uint8 if eight_bit else torch.float32
        self.state1 = torch.zeros(shape, dtype=dtype)
        self.state2 = torch.zeros(p.shape, dtype=dtype) if name in TWO_STATES else None
        blocks = -(-p.numel() // 256)
        self.absmax1 = torch.zeros((2, blocks) if name == "ademamix" else blocks)
        self.absmax2 = None if self.state2 is None else torch.zeros(blocks)

    def step(self, g: Tensor) -> None:
        self.step_count += 1
        n, step = self.numbers, self.step_count
        if not self.eight_bit:
            F.optimizer_update_32bit(
                self.name, g, self.p, self.state1, n.beta1, n.eps, step, n.lr, self.state2, n.beta2, n.beta3, n.alpha,
                n.weight_decay, n.gnorm_scale,
            )  # fmt: skip
            return
        maps = dynamic_map("dynamic"), None if self.state2 is None else dynamic_map("dynamic_unsigned")
        F.optimizer_update_8bit_blockwise(
            self.name, g, self.p, self.state1, self.state2, n.beta1, n.beta2, n.beta3, n.alpha, n.eps, step, n.lr,
            *maps, self.absmax1, self.absmax2, n.weight_decay, n.gnorm_scale,
        )  # fmt: skip


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_never_has_a_gradient_never_moves(name: str, eight_bit: bool) -> None:
    """bitsandbytes 0.50 on a CPU: in 8 bits Lion moves by lr in each step, Adam by 2e-4 in 100."""
    p = torch.randn(600)
    before = p.clone()
    optimizer = Optimizer(name, p, eight_bit, Numbers())
    for _ in range(100):
        g = torch.randn(600)
        g[::2] = 0
        optimizer.step(g)
    assert torch.equal(p[::2], before[::2])
    assert (p[1::2] != before[1::2]).float().mean() > 0.8  # Lion's steps of one size may add up to nothing


def first_step(name: str, p: Tensor, grad: Tensor, n: Numbers) -> Tensor:
    """p after one step from moments of zero, float64; bias corrections undo what beta takes from the gradient."""
    p, g = p.double(), grad.double() * n.gnorm_scale
    decayed, coupled = p * (1 - n.lr * n.weight_decay), g + n.weight_decay * p
    if name in ("adam", "lamb"):
        return decayed - n.lr * g / (g.abs() + n.eps)
    if name == "ademamix":
        return decayed - n.lr * (g + n.alpha * (1 - n.beta3) * g) / (g.abs() + n.eps)
    if name == "lion":
        return decayed - n.lr * g.sign()
    if name in ("momentum", "lars"):
        return p - n.lr * coupled
    share = 1 - n.beta1 if name == "rmsprop" else 1.0
    return p - n.lr * coupled / (coupled.abs() * math.sqrt(share) + n.eps)


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_decay_comes_before_the_update_and_the_step_takes_the_whole_gradient(name: str, eight_bit: bool) -> None:
    """With a decay of a quarter, which side of the update it is on shows, and whether it is coupled.

    bitsandbytes: after the update on CUDA, before it elsewhere; 8-bit RMSprop and Adagrad step with neither weight
    decay nor gnorm_scale in the gradient on CUDA; Lion's decay is coupled and Adagrad's is not on XPU.
    """
    n = Numbers(lr=0.5, weight_decay=0.5, gnorm_scale=0.25)
    p, g = torch.randn(600), torch.randn(600)
    g = g + g.sign() * 0.1
    expected = first_step(name, p, g, n)
    Optimizer(name, p, eight_bit, n).step(g)
    # quotients near 1 of float32 values, a dozen roundings; bias corrections of 1 - beta are off by beta's rounding
    torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_nan_in_a_gradient_reaches_the_parameter(name: str, eight_bit: bool) -> None:
    p, g = torch.randn(600), torch.randn(600)
    g[7] = torch.nan
    optimizer = Optimizer(name, p, eight_bit, Numbers())
    optimizer.step(g)
    assert p[7].isnan()
    assert p.isfinite().sum() == 599


@pytest.mark.parametrize("n", [256, 300, 1000])
def test_both_averages_of_ademamix_have_scales_of_their_own(n: int) -> None:
    """bitsandbytes: the 32-bit class allocates one; in 8 bits the last block of one shares a scale with the other."""
    p32 = torch.randn(n)
    p8 = p32.clone()
    exact, coded = (Optimizer("ademamix", p, bits, Numbers()) for p, bits in ((p32, False), (p8, True)))
    for _ in range(5):
        g = torch.randn(n)
        exact.step(g)
        coded.step(g)
    assert exact.state1.shape == (2, n)
    for row in range(2):
        codes, absmax = coded.state1[row], coded.absmax1[row]
        restored = F.dequantize_blockwise(codes, absmax=absmax, blocksize=256)
        scale = absmax.repeat_interleave(256)[:n]
        # 5 steps, each off by half of the widest gap between neighbours, 0.7 % of absmax
        assert ((restored - exact.state1[row]).abs() <= 5 * 0.008 * scale).all()
    torch.testing.assert_close(p8, p32, rtol=0, atol=5e-4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_update_takes_every_dtype_and_thousands_of_values(name: str, eight_bit: bool, dtype: torch.dtype) -> None:
    """bitsandbytes: no 8-bit LAMB and LARS from 4096 values on, and no 32-bit SGD, RMSprop and Adagrad in bfloat16."""
    p, g = torch.randn(4097).to(dtype), torch.randn(4097).to(dtype)
    expected = p.float()
    Optimizer(name, expected, eight_bit, Numbers(lr=0.1)).step(g.float())
    Optimizer(name, p, eight_bit, Numbers(lr=0.1)).step(g)
    torch.testing.assert_close(p.float(), expected.to(dtype).float(), rtol=0, atol=0)


GOLDEN = (0, 1, 1000, 3000, 4095)  # not around the middle, where the 8-bit table of bitsandbytes' CPU code decides


@pytest.mark.parametrize(
    ("name", "numbers", "values"),
    [
        ("adam", Numbers(lr=1e-2, beta2=0.999, eps=1e-8), (-0.967863, -0.967375, -0.4808347, 0.4345465, 0.9678009)),
        ("lion", Numbers(lr=1e-2), (-0.9670331, None, None, None, 0.9670331)),
        ("momentum", Numbers(lr=1e-2), (-0.8049412, None, None, None, 0.8043107)),
    ],
)
def test_three_steps_give_the_values_of_bitsandbytes(name: str, numbers: Numbers, values: tuple[float | None]) -> None:
    numbers.weight_decay = 0.1
    p = torch.linspace(-1, 1, 4096)
    optimizer = Optimizer(name, p, True, numbers)
    for t in (1, 2, 3):
        optimizer.step(t * torch.linspace(-2, 2, 4096))
    for index, value in zip(GOLDEN, values, strict=True):
        assert value is None or p[index].item() == pytest.approx(value, abs=1e-4)
    if name == "adam":
        assert optimizer.state1[list(GOLDEN)].tolist() == [0, 0, 12, 250, 255]
        assert optimizer.state2[list(GOLDEN)].tolist() == [255, 255, 208, 235, 255]
        assert optimizer.absmax1[:3].tolist() == pytest.approx([1.117199, 0.977515, 0.837831], rel=1e-5)
