"""What every op gets from its declaration: dispatch, torch.compile, and a launcher that fits its reference."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import samples_rowwise
import torch
from lq_kernels._op import OPS, op_with_out
from lq_kernels.rowwise import quantize_rowwise, quantize_tensorwise_transposed
from lq_kernels.rowwise_training import quantize_transposed
from lq_kernels.scaled_mm import scaled_mm
from samples_scaled_mm import product
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).parents[2]


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A forward pass made of ops and of ordinary torch around them."""
    codes, scale = quantize_rowwise(x * 2)
    weight_codes, weight_scale = quantize_tensorwise_transposed(weight)
    return scaled_mm(codes, weight_codes, scale, weight_scale, bias, x.dtype) + 1


def test_cpu_tensors_go_to_the_reference() -> None:
    x = torch.randn(3, 37)
    torch.testing.assert_close(quantize_rowwise(x), quantize_rowwise.reference(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.ops.lq.quantize_rowwise(x), quantize_rowwise(x), rtol=0, atol=0)


def test_an_op_keeps_the_docstring_of_its_reference() -> None:
    assert "codes (M, K) int8" in (quantize_rowwise.__doc__ or "")
    assert repr(quantize_rowwise) == "<op lq::quantize_rowwise>"
    assert OPS["quantize_rowwise"] is quantize_rowwise


def test_no_gradient_flows_through_an_op() -> None:
    _, scale = quantize_rowwise(torch.randn(3, 5, requires_grad=True))
    assert not scale.requires_grad


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_ops_give_what_they_give_in_eager(dynamic: bool) -> None:
    compiled = torch.compile(int8_linear, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tokens in (5, 6, 1):
        args = torch.randn(tokens, 37), torch.randn(11, 37), torch.randn(11)
        torch.testing.assert_close(compiled(*args), int8_linear(*args), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"a": torch.zeros(37, dtype=torch.int8)}, ValueError),
        ({"a": torch.zeros(37, 99, dtype=torch.int8)}, ValueError),
        ({"b": torch.zeros(100, 129)}, TypeError),
        ({"scale_a": torch.ones(36, 1)}, ValueError),
        ({"scale_a": torch.ones(37)}, ValueError),
        ({"scale_b": torch.ones(129, 1)}, ValueError),
        ({"scale_b": torch.ones(1, 129, dtype=torch.float16)}, ValueError),
        ({"bias": torch.ones(1, 129)}, ValueError),
        ({"bias": torch.ones(129, dtype=torch.int32)}, ValueError),
        ({"out_dtype": torch.float64}, TypeError),
        ({"bias": torch.ones(129, device="meta")}, ValueError),
        ({"a": torch.zeros(1, 131_072, dtype=torch.int8), "b": torch.zeros(131_072, 1, dtype=torch.int8)}, ValueError),
    ],
)
def test_wrong_arguments_of_scaled_mm_are_errors(change: dict[str, Any], error: type[Exception]) -> None:
    arguments = dict(zip(("a", "b", "scale_a", "scale_b", "bias", "out_dtype"), product(37, 100, 129), strict=True))
    scaled_mm(**arguments)
    raises_everywhere(scaled_mm, arguments | change, error)


@pytest.mark.parametrize("name", [name for name in samples_rowwise.SAMPLES if not name.startswith("dequantize")])
@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(3), ValueError),
        (torch.zeros(2, 3, 4), ValueError),
        (torch.zeros(2, 3, dtype=torch.int32), TypeError),
        (torch.zeros(2, 3, dtype=torch.complex64), TypeError),
        (torch.zeros(2, 3, dtype=torch.float64), TypeError),
    ],
)
def test_wrong_arguments_of_quantizers_are_errors(name: str, x: Tensor, error: type[Exception]) -> None:
    known = {"amax": torch.ones(1, 1)} if OPS[name] is quantize_transposed else {}
    raises_everywhere(OPS[name], {"x": x} | known, error)


def raises_everywhere(op: Any, arguments: dict[str, Any], error: type[Exception]) -> None:
    """In the reference, in the launcher, and before anything runs: under torch.compile."""
    with pytest.raises(error, match=op.name):
        op(**arguments)
    with pytest.raises(error, match=op.name):
        op.launcher(**arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(error, match=op.name):
        op(**{k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()})


SNIPPET = """
from torch import Tensor
from lq_kernels._op import op

@op
def negate(x: Tensor, rounding: str = "nearest") -> Tensor: ...

@negate.triton
def _launch({parameters}) -> {result}: ...
"""


@pytest.mark.integration
def test_mypy_rejects_a_launcher_that_differs_from_its_reference(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    signatures = {
        "equal": ("x: Tensor, rounding: str = 'nearest'", "Tensor"),
        "type": ("x: Tensor, rounding: int = 0", "Tensor"),
        "name": ("x: Tensor, mode: str = 'nearest'", "Tensor"),
        "missing": ("x: Tensor", "Tensor"),
        "more": ("x: Tensor, rounding: str, more: int", "Tensor"),
        "result": ("x: Tensor, rounding: str = 'nearest'", "tuple[Tensor, Tensor]"),
    }
    for name, (parameters, result) in signatures.items():
        source = SNIPPET.format(parameters=parameters, result=result).replace(
            ": ...", ":\n    raise NotImplementedError"
        )
        (tmp_path / f"launcher_{name}.py").write_text(source)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--enable-error-code=arg-type",
        str(tmp_path),
    ]
    report = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    rejected = {name for name in signatures if f"launcher_{name}.py" in report}
    assert rejected == set(signatures) - {"equal"}, report


@pytest.mark.gpu
def test_gpu_tensors_go_to_the_launcher() -> None:
    x = torch.randn(300, 700, device="cuda").bfloat16()
    launcher = quantize_rowwise.launcher
    assert launcher is not None
    torch.testing.assert_close(quantize_rowwise(x), launcher(x), rtol=0, atol=0)


@pytest.mark.gpu
def test_inductor_gives_what_eager_gives() -> None:
    args = [torch.randn(*shape, device="cuda").bfloat16() for shape in ((64, 256), (128, 256), (128,))]
    compiled = torch.compile(int8_linear, fullgraph=True)
    torch.testing.assert_close(compiled(*args), int8_linear(*args), rtol=0, atol=0)


def test_an_op_with_out_writes_and_counts_as_a_modification() -> None:
    @op_with_out("out")
    def negate_into(x: Tensor, out: Tensor) -> None:
        out.copy_(-x)

    @negate_into.fake
    def _fake(x: Tensor, out: Tensor) -> None:
        return None

    x, out = torch.randn(5), torch.zeros(5)
    version = out._version
    assert negate_into(x, out) is None
    assert torch.equal(out, -x)
    assert out._version > version
    assert negate_into.written(x, out=out) == (out,)
    compiled = torch.compile(lambda x, out: (negate_into(x, out), out + 1)[1], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, torch.zeros(5)), 1 - x, rtol=0, atol=0)
    del OPS["negate_into"]
