"""Roots, reciprocals and copied signs, as kernels compute them on the device at hand."""

import torch
from lq_kernels._triton import tl, triton
from lq_kernels.approximate import ptx_arch, reciprocal, square_root, with_sign

SIZE = 1024


@triton.jit
def _approximations_kernel(x_ptr, y_ptr, out_ptr, PTX: tl.constexpr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + lane), tl.load(y_ptr + lane)
    tl.store(out_ptr + lane, square_root(tl.abs(x), PTX))
    tl.store(out_ptr + SIZE + lane, reciprocal(x, PTX))
    tl.store(out_ptr + 2 * SIZE + lane, with_sign(tl.abs(y), x, PTX))


def test_they_have_22_good_bits_and_signs_are_copied_to_the_bit(device: torch.device) -> None:
    x = torch.randn(SIZE) * torch.exp2(torch.linspace(-120, 120, SIZE))
    y = torch.randn(SIZE)
    out = torch.empty(3, SIZE, device=device)
    _approximations_kernel[(1,)](x.to(device), y.to(device), out, PTX=ptx_arch(), SIZE=SIZE)
    roots, reciprocals, signed = out.cpu()
    torch.testing.assert_close(roots, x.abs().sqrt(), rtol=2.0**-22, atol=0)
    torch.testing.assert_close(reciprocals, 1 / x, rtol=2.0**-22, atol=0)
    assert torch.equal(signed.view(torch.int32), torch.copysign(y, x).view(torch.int32))


def test_zero_and_infinity_are_exact(device: torch.device) -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf]).repeat(SIZE // 4)
    out = torch.empty(3, SIZE, device=device)
    _approximations_kernel[(1,)](x.to(device), x.to(device), out, PTX=ptx_arch(), SIZE=SIZE)
    assert out[0, :4].tolist() == [0.0, 0.0, torch.inf, torch.inf]
    assert torch.equal(out[1, :4].cpu().view(torch.int32), (1 / x[:4]).view(torch.int32))
    assert torch.equal(out[2].cpu().view(torch.int32), x.view(torch.int32))
