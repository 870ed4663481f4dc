"""The random bits of stochastic rounding: uniform, unrelated, and the same in torch and in Triton."""

import torch
from lq_kernels._triton import tl, triton
from lq_kernels.rounding import hashed_seed, random_bits, random_word


@triton.jit
def _bits_kernel(seed_ptr, out_ptr, high, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = random_word(hashed_seed(tl.load(seed_ptr), high), index)
    tl.store(out_ptr + index, word.to(tl.int64), mask=index < n)


def test_kernels_and_the_reference_draw_the_same_bits(device: torch.device) -> None:
    seed = torch.tensor([0x1234_5678_9ABC], device=device)
    for high in (0, 1, 5):
        bits = torch.empty(1000, dtype=torch.int64, device=device)
        _bits_kernel[(4,)](seed, bits, high, 1000, BLOCK=256)
        index = torch.arange(1000) + (high << 32)
        torch.testing.assert_close(bits.cpu(), random_bits(seed.cpu(), index), rtol=0, atol=0)


def test_bits_are_uniform_and_change_with_seed_and_index() -> None:
    index = torch.arange(1 << 20)
    draws = [random_bits(torch.tensor(seed), index) for seed in (0, 1, 2**31)]
    draws.append(random_bits(torch.tensor(0), index + (1 << 32)))
    for bits in draws:
        assert int(bits.min()) >= 0
        assert int(bits.max()) < 2**32
        # Of n uniform bits the share of ones is 1/2 with a standard deviation of 1 / (2 sqrt(n)); six of them.
        ones = torch.stack([(bits >> bit & 1).double().mean() for bit in range(32)])
        assert float((ones - 0.5).abs().max()) < 3 / 1024
        assert len(bits.unique()) == len(bits)
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]).double())[0, 1])) < 6 / 1024
