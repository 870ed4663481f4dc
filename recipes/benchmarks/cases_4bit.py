"""G1 to G4: products with a weight frozen in NF4, by one row, a small batch and a large one, and with a gradient."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from lq_kernels.packed_4bit import Packed4bit, matmul_4bit
from torch import Tensor

from lq_plugin.recipes.benchmarks import peers
from lq_plugin.recipes.benchmarks.cases import Case, Inputs, Outputs, assert_close, ends, normal
from lq_plugin.recipes.benchmarks.timing import Call

# Relative errors: of map values and results rounded to bfloat16; of rows of int8 and e4m3 codes on both sides.
BF16_ERROR, ERRORS_8BIT = 2.0**-8, {"int8": 0.03, "fp8": 0.06}
BLOCK_SIZE = 64

Weight = tuple[int, int]  # in_features, out_features


def four_bit_cases(device: torch.device, weights: list[Weight], rows: list[int], tokens: list[int]) -> Iterator[Case]:
    """`rows` for each weight; `tokens` for the first, forward and with a gradient to the input."""
    for M in rows:
        for K, N in weights:
            yield _product("G1" if M == 1 else "G2", device, M, K, N)
    K, N = weights[0]
    for M in tokens:
        yield _product("G3", device, M, K, N)
    for M in tokens[1:]:
        for compute in (None, "int8", "fp8"):
            if compute != "fp8" or _has_fp8(device):
                yield _with_gradient(device, M, K, N, compute)


def _has_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _inputs(device: torch.device, M: int, K: int, N: int) -> Inputs:
    """x, a weight in 16 bits, and the same in 4."""
    weight = normal(device, N, K)
    packed = Packed4bit.quantize(weight, BLOCK_SIZE)
    assert packed.scale is not None
    return normal(device, M, K), weight, packed.packed, packed.scale


def packed_of(weight: Tensor, packed: Tensor, scale: Tensor) -> Packed4bit:
    return Packed4bit(packed, scale, BLOCK_SIZE, "nf4", tuple(weight.shape), weight.dtype)


def _ours(x: Tensor, *weight: Tensor) -> Tensor:
    return matmul_4bit(x, packed_of(*weight))


def exact(x: Tensor, weight: Packed4bit) -> Tensor:
    """In float64, on the CPU."""
    return x.cpu().double() @ weight.dequantize(torch.float32).cpu().double().t()


def _check(inputs: Inputs, out: Outputs) -> None:
    x, *weight = inputs
    for some in ends(len(x)):
        assert_close(out[some], exact(x[some], packed_of(*weight)), BF16_ERROR)


def _product(name: str, device: torch.device, M: int, K: int, N: int) -> Case:
    return Case(
        name=name,
        op="matmul_4bit",
        shape=f"{M} x {N} x {K}",
        dtype="nf4, bf16",
        make=partial(_inputs, device, M, K, N),
        ours=_ours,
        check=_check,
        bytes=_bytes(M, K, N),
        operations=2 * M * N * K if M > 1 else 0,
        peers={**peers.bitsandbytes(peers.matmul_nf4), "bf16": peers.linear},
    )


def _bytes(M: int, K: int, N: int) -> int:
    return N * K // 2 + 4 * N * K // BLOCK_SIZE + 2 * M * (N + K)


def forward_and_backward(multiply: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient to x."""
    x = x.detach().requires_grad_()
    out = multiply(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


def _with_gradient(device: torch.device, M: int, K: int, N: int, compute: str | None) -> Case:
    def ours(x: Tensor, weight: Tensor, packed: Tensor, scale: Tensor, grad: Tensor) -> Outputs:
        base = packed_of(weight, packed, scale)
        return forward_and_backward(partial(matmul_4bit, weight=base, compute=compute), x, grad)

    def check(inputs: Inputs, outputs: Outputs) -> None:
        x, *weight, grad = inputs
        base, (out, grad_x) = packed_of(*weight), outputs
        relative = BF16_ERROR if compute is None else ERRORS_8BIT[compute]
        transposed = base.dequantize(torch.float32).cpu().double()
        for some in ends(M):
            assert_close(out[some], exact(x[some], base), relative)
            assert_close(grad_x[some], grad[some].cpu().double() @ transposed, relative)

    def bfloat16(x: Tensor, weight: Tensor, packed: Tensor, scale: Tensor, grad: Tensor) -> Call:
        return partial(forward_and_backward, partial(torch.nn.functional.linear, weight=weight), x, grad)

    def theirs(functional: object, x: Tensor, weight: Tensor, packed: Tensor, scale: Tensor, grad: Tensor) -> Call:
        return partial(forward_and_backward, peers.frozen_nf4(functional, weight, packed, scale), x, grad)

    return Case(
        name="G4",
        op="matmul_4bit and gradient" + (f", {compute}" if compute else ""),
        shape=f"{M} x {N} x {K}",
        dtype="nf4, bf16",
        make=lambda: (*_inputs(device, M, K, N), normal(device, M, N)),
        ours=ours,
        check=check,
        bytes=2 * _bytes(M, K, N),
        operations=4 * M * N * K,
        bits=16 if compute is None else 8,
        peers={**peers.bitsandbytes(theirs), "bf16": bfloat16},
    )
