"""Formats as values: what one costs to add, which devices have it, options, and the noise of its three products."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from lq_kernels.rowwise import quantize_rowwise
from omegaconf import OmegaConf
from torch import Tensor, nn

import lq_plugin.conf
from lq_plugin import convert
from lq_plugin.formats import (
    FORMATS,
    SPELLINGS,
    TRAINABLE_FORMATS,
    Fp8Rowwise,
    Fp8Tensorwise,
    Int8Rowwise,
    devices,
    format_named,
)
from lq_plugin.formats.gemm import GemmFormats, HighPrecision, high_precision, matmul
from lq_plugin.formats.operands import Lines
from lq_plugin.layers.linear import QuantLinear, linear

CONF = Path(lq_plugin.conf.__file__).parent / "quant"
INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize("name", TRAINABLE_FORMATS)
def test_each_format_has_a_file_of_settings_that_makes_a_plugin(name: str) -> None:
    settings = OmegaConf.load(CONF / f"{name}.yaml")
    assert settings.linear == name == FORMATS[name].name
    instantiate(settings)


@pytest.mark.parametrize("meant", [name for name in SPELLINGS.values() if name in TRAINABLE_FORMATS])
def test_other_projects_spellings_are_answered_with_the_name_here(meant: str) -> None:
    for spelling in (key for key, value in SPELLINGS.items() if value == meant):
        with pytest.raises(ValueError, match=f"use '{meant}'"):
            format_named(spelling)


@dataclasses.dataclass(frozen=True)
class Ternary:
    """What a new kind of operand costs: values rounded to -1, 0 or 1 times the largest of their row."""

    def lines(self, x: Tensor) -> Lines:
        amax = x.abs().amax(1, keepdim=True)
        return Lines(torch.round(x / amax) * amax)


def test_a_new_format_is_a_value_a_line_and_a_file_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the format, its line in FORMATS, its YAML, and the row of a test: what is in the layer and in the
    plugin stays as it is."""
    ternary = GemmFormats("ternary", 2, HighPrecision(Ternary(), Ternary()), high_precision, high_precision)
    monkeypatch.setitem(FORMATS, "ternary", ternary)
    (tmp_path / "ternary.yaml").write_text(
        (CONF / "int8_switchback.yaml").read_text().replace("int8_switchback", "ternary")
    )
    model = nn.Sequential(nn.Linear(8, 8))
    weight = model[0].weight.detach()
    assert instantiate(OmegaConf.load(tmp_path / "ternary.yaml")) is not None
    convert(model, "ternary")
    assert repr(model[0]).endswith("format=ternary)")
    x = torch.randn(3, 8, requires_grad=True)
    output = model(x)
    output.sum().backward()
    exact = Ternary().lines(x.detach()).values @ Ternary().lines(weight).values.t() + model[0].bias
    torch.testing.assert_close(output, exact)
    torch.testing.assert_close(model[0].weight.grad, torch.ones(8, 3) @ x.detach())


@pytest.mark.parametrize(
    ("types", "architecture", "advice"),
    [
        ((INT8,), "sm_75", "use linear=None"),
        ((E4M3,), "sm_75", "use linear=None"),
        ((INT8,), "sm_80", ""),
        ((INT8,), "sm_90", ""),
        ((INT8,), "sm_100", ""),
        ((INT8,), "sm_103", "use fp8_rowwise_with_gw_hp"),
        ((INT8,), "sm_120", ""),
        ((INT8,), "gfx942", ""),
        ((E4M3,), "sm_80", "use int8_switchback"),
        ((E4M3, E5M2), "sm_86", "use int8_switchback"),
        ((E4M3, E5M2), "sm_89", ""),
        ((E4M3,), "sm_103", ""),
        ((E5M2,), "gfx942", "use int8_switchback"),
        ((E4M3,), "gfx90a", "use int8_switchback"),
        ((E4M3,), "gfx950", ""),
    ],
)
def test_what_a_gpu_lacks_is_named_with_what_to_use(types: tuple, architecture: str, advice: str) -> None:
    missing = devices.lacking(types, architecture)
    assert advice in missing if advice else not missing


def test_a_format_that_the_gpu_lacks_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    said = devices.lacking((E4M3,), "sm_80")
    monkeypatch.setattr(devices, "_lacking", lambda types, index: (said if types else "", "sm_80", "NVIDIA A100"))
    with pytest.raises(RuntimeError, match=r"fp8_rowwise does not run on NVIDIA A100 \(sm_80\): fp8 needs sm_89"):
        devices.require_device(FORMATS["fp8_rowwise"], torch.device("cuda", 0))
    for name in ("sim_fp8_mixed", "sim_fp8_global"):
        devices.require_device(FORMATS[name], torch.device("cuda", 0))
    devices.require_device(FORMATS["fp8_rowwise"], torch.device("cpu"))


def test_formats_know_which_types_they_need() -> None:
    assert {name: formats.element_types for name, formats in TRAINABLE_FORMATS.items()} == {
        "int8_switchback": (INT8,),
        "int8_switchback_vectorwise": (INT8,),
        "int8_switchback_mem_efficient": (INT8,),
        "int8_rowwise": (INT8,),
        "fp8_tensorwise": (E4M3, E5M2),
        "fp8_rowwise": (E4M3,),
        "fp8_rowwise_with_gw_hp": (E4M3,),
        "sim_fp8_mixed": (),
        "sim_fp8_global": (),
    }


def test_a_format_with_options_has_a_name_of_its_own_and_equals_its_likes() -> None:
    made = [Int8Rowwise(True), Fp8Tensorwise(True), Fp8Rowwise(power_of_two=True), Fp8Rowwise("high_precision", True)]
    assert len({formats.name for formats in [*made, *TRAINABLE_FORMATS.values()]}) == 4 + len(TRAINABLE_FORMATS)
    assert Fp8Rowwise() == FORMATS["fp8_rowwise"]
    assert Fp8Rowwise("high_precision") == FORMATS["fp8_rowwise_with_gw_hp"]
    with pytest.raises(ValueError, match="grad_weight 'fp8' or 'high_precision', got 'bf16'"):
        Fp8Rowwise("bf16")


def test_stochastic_rounding_makes_the_gradients_right_in_expectation() -> None:
    """Values of 0.1 beside a 1 have the code 12.7: nearest is off by 2.4 % always, by chance by nothing on average."""
    torch.manual_seed(0)
    weight, x = torch.eye(32), torch.eye(32)
    grad = torch.full((32, 32), 0.1)
    grad[:, 0] = 1.0
    exact = grad[:, 1:].mean()

    def mean_gradients(formats: GemmFormats, repeats: int) -> tuple[float, float]:
        sums = torch.zeros(2, dtype=torch.float64)
        for _ in range(repeats):
            leaf, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
            linear(leaf, w, None, formats).backward(grad)
            # grad_weight takes its columns, whose values are all alike: their codes are 127
            sums += torch.stack([leaf.grad[:, 1:].double().mean(), w.grad[0, :].double().mean()])
        return float(sums[0] / repeats / exact - 1), float(sums[1] / repeats - 1)

    nearest, _ = mean_gradients(Int8Rowwise(), 1)
    assert nearest == pytest.approx(13 / 127 / 0.1 - 1, rel=1e-4)
    # 20 * 992 roundings of variance 0.21 / 12.7^2: a standard error of 2.6e-4
    by_chance, of_weight = mean_gradients(Int8Rowwise(stochastic_gradient=True), 20)
    assert abs(by_chance) < 1.3e-3
    assert of_weight == pytest.approx(0.0, abs=1e-6)


def test_stochastic_rounding_follows_torchs_generator() -> None:
    layer = QuantLinear(24, 40)
    layer.formats = Int8Rowwise(stochastic_gradient=True)
    grad, gradients = torch.randn(7, 40), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        x = torch.ones(7, 24, requires_grad=True)
        layer(x).backward(grad)
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("formats", [Fp8Tensorwise(True), Fp8Rowwise(power_of_two=True)], ids=lambda f: f.name)
def test_scales_are_powers_of_two_where_they_are_asked_for(formats: GemmFormats) -> None:
    x = torch.randn(13, 40)
    _, scale = formats.output.a.lines(x)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    plain = x.abs().amax() / 448 if scale.numel() == 1 else x.abs().amax(1, keepdim=True) / 448
    assert (scale >= plain).all()
    assert (scale < 2 * plain).all()
    assert formats.output.a.lines(torch.full((1, 3), 448.0)).scale.item() == 1.0


def signal_to_noise(got: Tensor, exact: Tensor) -> float:
    """In decibels."""
    return float(20 * torch.log10(exact.double().norm() / (got.double() - exact.double()).norm()))


# Of normal values, in decibels: 6.02 for each bit, see BOUNDS in test_linear.py. (output, grad_input, grad_weight)
SIGNAL_TO_NOISE = {
    "int8_switchback": (39, 39, None),
    "int8_switchback_vectorwise": (39, 39, None),
    "int8_rowwise": (39, 39, 37),
    "fp8_tensorwise": (28, 24, 24),
    "fp8_rowwise": (28, 28, 28),
    "fp8_rowwise_with_gw_hp": (28, 28, None),
    "sim_fp8_mixed": (28, 24, None),
    "sim_fp8_global": (28, 24, 24),
}


@pytest.mark.parametrize("name", SIGNAL_TO_NOISE)
def test_the_noise_of_each_product_is_that_of_its_types(name: str) -> None:
    torch.manual_seed(0)
    x, weight, grad = torch.randn(384, 256), torch.rand(192, 256) - 0.5, torch.randn(384, 192)
    formats = TRAINABLE_FORMATS[name]
    products = {"output": (x, weight.t()), "grad_input": (grad, weight), "grad_weight": (grad.t(), x)}
    for (product, (a, b)), decibels in zip(products.items(), SIGNAL_TO_NOISE[name], strict=True):
        got = signal_to_noise(matmul(getattr(formats, product), a, b), a.double() @ b.double())
        if decibels is None:
            assert got > 100
        else:
            assert decibels < got < decibels + 7


def test_a_row_of_codes_is_the_same_alone_and_among_others() -> None:
    """What makes a format with a scale for each token independent of the batch."""
    x = torch.randn(6, 40) * torch.exp(3 * torch.randn(6, 1))
    codes, scale = quantize_rowwise(x, E4M3)
    for row in range(6):
        one, its = quantize_rowwise(x[row : row + 1], E4M3)
        assert torch.equal(one.view(torch.uint8), codes[row : row + 1].view(torch.uint8))
        assert torch.equal(its, scale[row : row + 1])
