"""Loss and gradients against torch's cross entropy of whole logits in float64, and the memory that is never taken."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lq_plugin.layers.chunked_cross_entropy import _add_gradients, linear_cross_entropy, losses_and_gradients

T, H, V = 37, 16, 61
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"softcap": 3.0, "label_smoothing": 0.2, "scale": 0.25},
    {"ignore_index": 7},
]
# Relative rounding: bfloat16 keeps 8 bits; gradients add the rounding of the logits' gradient and of the result.
BF16 = 2.0**-7


def inputs(dtype: torch.dtype = torch.float64, tokens: int = T) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, H).to(dtype)
    weight, bias = torch.randn(V, H).to(dtype), torch.randn(V).to(dtype)
    target = torch.randint(V, (tokens,))
    target[::5] = -100
    return hidden, weight, target, bias


def plain(hidden, weight, target, bias=None, *, softcap=None, scale=1.0, **options) -> Tensor:
    """The definition, on whole logits in float64."""
    logits = scale * (hidden.double() @ weight.double().t())
    logits = logits if bias is None else logits + bias.double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target, **options)


def gradients(function, tensors, upstream=None, **options) -> list[Tensor]:
    """The loss, then the gradients of hidden, weight and bias."""
    hidden, weight, target, bias = tensors
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    loss = function(leaves[0], leaves[1], target, leaves[2], **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def assert_close(ours: list[Tensor], expected: list[Tensor], relative: float) -> None:
    """Within a share of the largest value of each tensor."""
    for got, wanted in zip(ours, expected, strict=True):
        assert (got.double() - wanted.double()).abs().max() <= relative * wanted.double().abs().max()


def with_a_known_ignore_index(tensors, options):
    """-100 is what `inputs` marks; another index needs targets of that value."""
    hidden, weight, target, bias = tensors
    return hidden, weight, target.where(target != -100, options.get("ignore_index", -100)), bias


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(options, reduction, chunk):
    tensors = with_a_known_ignore_index(inputs(), options)
    ours = gradients(linear_cross_entropy, tensors, chunk=chunk, reduction=reduction, **options)
    assert_close(ours, gradients(plain, tensors, reduction=reduction, **options), 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_gradient_from_above_scales_each_loss(reduction):
    tensors = inputs()
    upstream = torch.randn(T) if reduction == "none" else torch.tensor(-3.0)
    ours = gradients(linear_cross_entropy, tensors, upstream, chunk=8, reduction=reduction)
    assert_close(ours, gradients(plain, tensors, upstream, reduction=reduction), 1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_as_near_to_float64_as_their_rounding_allows(dtype, options):
    tensors = with_a_known_ignore_index(inputs(dtype), options)
    ours = gradients(linear_cross_entropy, tensors, chunk=8, **options)
    expected = gradients(plain, tensors, **options)
    assert [t.dtype for t in ours] == [torch.float32, dtype, dtype, dtype]
    assert_close(ours[:1], expected[:1], 1e-6)  # the logits keep their accumulator
    assert_close(ours[1:], expected[1:], {torch.float32: 1e-6, torch.bfloat16: BF16, torch.float16: BF16 / 8}[dtype])


def test_small_float16_gradients_survive_a_loss_scale():
    """The mean over many tokens would flush them to zero before the scale arrives from above."""
    hidden, weight, target, bias = inputs(torch.float16, tokens=4000)
    tensors = (hidden, weight * 0.01, target, bias)
    ours = gradients(linear_cross_entropy, tensors, torch.tensor(2.0**12), chunk=512)
    assert_close(ours[1:], gradients(plain, tensors, torch.tensor(2.0**12))[1:], 0.01)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_what_is_trained_gets_a_gradient(trained):
    hidden, weight, target, bias = inputs()
    leaves = [hidden, weight, bias]
    leaves[trained].requires_grad_()
    linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], chunk=9).backward()
    expected = gradients(plain, inputs_of(leaves, target))[1 + trained]
    assert_close([leaves[trained].grad], [expected], 1e-12)
    assert [leaf.grad is None for leaf in leaves] == [index != trained for index in range(3)]


def inputs_of(leaves: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return leaves[0].detach(), leaves[1].detach(), target, leaves[2].detach()


def test_without_a_bias_and_with_strided_inputs():
    hidden, weight, target, _ = inputs()
    hidden = hidden.t().contiguous().t().requires_grad_()
    weight = torch.stack((weight, weight), dim=2)[:, :, 0].requires_grad_()
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, chunk=10), (hidden, weight))
    assert_close(list(ours), list(torch.autograd.grad(plain(hidden, weight, target), (hidden, weight))), 1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none", "mean"])
def test_no_token_and_no_counted_token(reduction):
    hidden, weight, _, bias = inputs()
    for count in (0, 3):
        ignored = torch.full((count,), -100)
        ours = linear_cross_entropy(hidden[:count], weight, ignored, bias, reduction=reduction)
        assert torch.equal(ours, plain(hidden[:count], weight, ignored, bias, reduction=reduction).to(ours)) or (
            reduction == "mean" and ours.isnan()
        )


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_that_of_the_parameters():
    tensors = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(linear_cross_entropy, tensors, chunk=8)
    rounded = tuple(t.bfloat16() if t.is_floating_point() else t for t in tensors)
    expected = gradients(linear_cross_entropy, rounded, chunk=8)
    assert ours[0] == expected[0]
    assert all(t.dtype == torch.float32 for t in ours)
    assert all(torch.equal(got.bfloat16(), wanted) for got, wanted in zip(ours[1:], expected[1:], strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_it_is_one_operator_with_the_same_numbers(reduction):
    tensors = inputs(torch.float32)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    ours = gradients(compiled, tensors, chunk=8, reduction=reduction)
    expected = gradients(linear_cross_entropy, tensors, chunk=8, reduction=reduction)
    assert all(torch.equal(got, wanted) for got, wanted in zip(ours, expected, strict=True))


def test_the_operator_keeps_its_promises_to_the_compiler():
    hidden, weight, target, bias = inputs(torch.float32)
    arguments = (hidden, weight, bias, target, None, -100, 0.1, 3.0, 1.0, 8, [True, True, True])
    torch.library.opcheck(losses_and_gradients, arguments)


def test_a_second_backward_gives_the_same_and_a_second_derivative_is_refused():
    hidden, weight, target, bias = inputs()
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, bias)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="has no gradient of its gradient"):
        torch.autograd.grad(loss, hidden, create_graph=True)


class LiveFloats(TorchDispatchMode):
    """The most floating-point numbers that tensors other than the inputs held at one time."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self._count(tensor.untyped_storage(), tensor.element_size())
        return result

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self.alive and key not in self.inputs:
            self.alive[key] = storage.nbytes() // size
            weakref.finalize(storage, self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_a_chunk_of_logits_lives_at_a_time(dtype, softcap):
    tokens, words, chunk = 512, 4096, 24
    hidden, weight = torch.randn(tokens, H).to(dtype), torch.randn(words, H).to(dtype)
    arguments = (hidden, weight, None, torch.randint(words, (tokens,)), None, -100, 0.1, softcap, 1.0, chunk)
    with LiveFloats(hidden, weight) as floats:
        losses_and_gradients._init_fn(*arguments, [True, False, False])
    results = tokens * (H + 1)
    wide_slice = 0 if dtype == torch.float32 else chunk * words // 8 + chunk * H
    assert chunk * words // 2 < floats.most <= chunk * words + wide_slice + results + 64 * chunk
    assert floats.most < tokens * words / 8


def test_a_frozen_weight_takes_no_memory_for_its_gradient():
    hidden, weight, target, bias = inputs(torch.float32)
    results = losses_and_gradients(hidden, weight, bias, target, None, -100, 0.0, None, 1.0, 8, [True, False, False])
    assert [result.numel() for result in results] == [T, T * H, 0, 0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, ValueError, r"got \(2, 3, 4\).*flatten batch and sequence first"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"expected hidden \(T, H\)"),
        ({"target": torch.zeros(T)}, TypeError, "word numbers in int64, got torch.float32"),
        ({"weight": torch.zeros(V, H, dtype=torch.uint8)}, TypeError, "dequantise a quantised output layer"),
        ({"reduction": "average"}, ValueError, "mean, sum, none"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
        ({"softcap": 0.0}, ValueError, "softcap positive"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing in"),
    ],
)
def test_what_cannot_be_is_refused_with_what_came(change, error, message):
    hidden, weight, target, _ = inputs(torch.float32)
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "target": target, **change})


def test_a_gradient_of_the_weight_is_accumulated_in_float32():
    """In bfloat16 a sum of many small terms stops growing."""
    tokens = 4096
    hidden, grad_logits = torch.ones(1, 1).bfloat16(), torch.full((1, 1), 2.0**-9)
    sums = [torch.zeros(0), torch.zeros(1, 1), torch.zeros(0)]
    for _ in range(tokens):
        _add_gradients(
            grad_logits.clone(), hidden, torch.ones(1, 1).bfloat16(), (torch.ones(1), 1.0), slice(0, 1), sums
        )
    assert sums[1].item() == tokens * 2.0**-9
