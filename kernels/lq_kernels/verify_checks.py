"""What is compared by `python -m lq_kernels.verify`, and how far a kernel's results may be from its reference's."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lq_kernels._op import OPS, Op
from lq_kernels.adam_rules import Adam
from lq_kernels.blockwise_4bit import dequantize_4bit
from lq_kernels.momentum_rules import Lion
from lq_kernels.optimizer_batch import Batch
from lq_kernels.optimizer_facts import Clipping
from lq_kernels.optimizer_rules import Rule
from lq_kernels.optimizer_state import new_state
from lq_kernels.optimizer_step import Job, launch_step, step_reference
from lq_kernels.percentile_clipping import new_history
from lq_kernels.verify_inputs import Arguments, cases, hostile

Results = tuple[Tensor, ...]
# The arguments and what the reference made of them -> what each result may differ by, as a number or for each element.
Allowed = Callable[[Arguments, Results], Sequence[Tensor | float]]


@dataclass(frozen=True)
class Check:
    """One op and its arguments, on the CPU. kernel and reference return what they computed and what they wrote."""

    op: str
    name: str
    arguments: Arguments
    kernel: Callable[..., Results]
    dispatched: Callable[..., Results]
    reference: Callable[..., Results]
    allowed: Allowed

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.arguments[0].shape)) or "1"

    @property
    def dtype(self) -> str:
        return str(self.arguments[0].dtype).removeprefix("torch.")

    def uses(self, *dtypes: torch.dtype) -> bool:
        given = [argument.dtype if isinstance(argument, Tensor) else argument for argument in self.arguments]
        return any(value is dtype for value in given for dtype in dtypes)

    def on(self, device: torch.device) -> Arguments:
        """The arguments in memory of their own, with their strides and the memory around them."""
        return tuple(_copied(value, device) for value in self.arguments)


def checks(names: Sequence[str] = ()) -> Iterator[Check]:
    """Of the ops of these names, of all by default, and of the optimizers' update.

    ValueError: a name that no op has, with those that there are.
    """
    known = [*sorted(OPS), UPDATE]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no op {unknown[0]!r}; the ops are {', '.join(known)}")
    for name in names or known:
        yield from _updates() if name == UPDATE else _of_op(OPS[name])


def difference(value: Tensor, expected: Tensor, allowed: Tensor | float) -> tuple[float, float]:
    """The difference that passes the most of what is allowed, and what is allowed there; 0 and 0 for empty tensors.

    It is infinite where shape, dtype or strides differ, and where one is NaN or infinite and the other is not alike.
    """
    value = value.cpu()
    described = [(t.shape, t.dtype, t.stride()) for t in (value, expected)]
    if described[0] != described[1]:
        return math.inf, 0.0
    if not value.numel():
        return 0.0, 0.0
    ours, theirs = value.double(), expected.double()
    alike = (ours == theirs) | (ours.isnan() & theirs.isnan())
    apart = torch.where(alike, 0.0, (ours - theirs).abs().nan_to_num(math.inf, math.inf)).flatten()
    limit = torch.as_tensor(allowed, dtype=torch.float64).expand(value.shape).flatten()
    limit = torch.where(theirs.flatten().isfinite(), limit, 0.0)
    worst = int((apart - limit).argmax()) if bool((apart > limit).any()) else int(apart.argmax())
    return float(apart[worst]), float(limit[worst])


def _copied(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    memory = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).to(device, copy=True)
    view = torch.empty(0, dtype=value.dtype, device=device)
    return view.set_(memory.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def _of_op(op: Op[..., Any]) -> Iterator[Check]:
    def results(function: Callable[..., Any]) -> Callable[..., Results]:
        def run(*arguments: Any) -> Results:
            returned = function(*arguments)
            tensors = (returned,) if isinstance(returned, Tensor) else returned or ()
            return (*tensors, *(op.written(*arguments) if op.outputs else ()))

        return run

    assert op.launcher is not None
    functions = results(op.launcher), results(op), results(op.reference)
    for name, arguments in cases(op.name):
        yield Check(op.name, name, arguments, *functions, BOUNDS.get(op.name, exact))


def exact(arguments: Arguments, expected: Results) -> Sequence[Tensor | float]:
    return [0.0] * len(expected)


def rounded(magnitude: Tensor, dtype: torch.dtype, terms: int) -> list[Tensor]:
    """For sums of so many terms, whose absolute values sum to `magnitude`, in two orders.

    Each is off by at most `terms` units of 2^-23, 2^-22 where matrix units cut off what they align. A factor is rounded
    to the dtype once in one of them and twice in the other, and both sums are rounded to it.
    """
    finfo = torch.finfo(dtype)
    return [magnitude * (3 * finfo.eps + terms * 2.0**-21) + finfo.smallest_normal]


def of_scaled_product(arguments: Arguments, expected: Results) -> Sequence[Tensor | float]:
    """The sums are exact (`scaled_products`), and in int8 everything is: what is left are scales and bias."""
    a, b, scale_a, scale_b, bias, dtype = arguments
    if a.dtype == torch.int8:
        return [0.0]
    return rounded((a.double() @ b.double()).abs() * scale_a * scale_b + bias.double().abs(), dtype, 4)


def of_mixed_product(arguments: Arguments, expected: Results) -> Sequence[Tensor | float]:
    x, codes, scale, weight_codes, weight_scale, columns, count, bias, dtype = arguments
    found = columns[: int(count)].long()
    held = codes.double().abs() * scale
    held[:, found] = x[:, found].double().abs()
    magnitude = held @ (weight_codes.double().abs() * weight_scale).t() + bias.double().abs()
    return rounded(magnitude, dtype, x.shape[1] + 4)


def of_4bit_product(arguments: Arguments, expected: Results) -> Sequence[Tensor | float]:
    x, packed, scale, block_size, quant_type, shape, *bias = arguments
    weight = dequantize_4bit.reference(packed, scale, block_size, quant_type, shape, torch.float32).double().abs()
    is_gradient = not bias
    magnitude = x.double().abs() @ (weight if is_gradient else weight.t())
    return rounded(magnitude + (0 if is_gradient else bias[0].double().abs()), x.dtype, x.shape[1] + 4)


def of_norm(arguments: Arguments, expected: Results) -> Sequence[Tensor | float]:
    """Sums of n squares, pairs first: log2(n) + 20 roundings of each; norms and squares are at most 2."""
    roundings = 2 * (math.ceil(math.log2(arguments[0].numel() + 1)) + 20)
    return [4 * roundings * 2.0**-24] * len(expected)


BOUNDS: dict[str, Allowed] = {
    "scaled_mm": of_scaled_product,
    "mixed_scaled_mm": of_mixed_product,
    "gemv_4bit": of_4bit_product,
    "small_batch_4bit": of_4bit_product,
    "linear_4bit": of_4bit_product,
    "linear_4bit_grad_input": of_4bit_product,
    "record_gradient_norm": of_norm,
}

UPDATE = "optimizer_step"  # no op: a launch over many tensors
_MOMENTS: dict[str, Any] = {"eps": 1e-8, "weight_decay": 0.1}
_UPDATES: tuple[tuple[str, Rule, str, torch.dtype], ...] = (
    ("AdamW, 8-bit state", Adam(lr=1e-2, betas=(0.9, 0.999), decoupled=True, **_MOMENTS), "dynamic", torch.float32),
    ("AdamW, e4m3 state", Adam(lr=1e-2, betas=(0.9, 0.999), decoupled=True, **_MOMENTS), "e4m3", torch.float32),
    ("AdamW, float32 state", Adam(lr=1e-2, betas=(0.9, 0.999), decoupled=True, **_MOMENTS), "float32", torch.bfloat16),
    ("Lion, 8-bit state", Lion(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1), "dynamic", torch.bfloat16),
)


def _updates() -> Iterator[Check]:
    """One step after one of the reference, clipped at a percentile."""
    for name, rule, kind, dtype in _UPDATES:
        param, grad = (hostile(rows, 300, dtype).contiguous().clamp(-1, 1)[:37] for rows in (37, 38))
        state = new_state(param, kind, rule.signs) | new_history(param.device)
        keys = list(state)
        _stepping(step_reference, rule, keys)(param, grad.flip(0), *state.values())
        run, reference = (_stepping(step, rule, keys) for step in (launch_step, step_reference))
        yield Check(UPDATE, name, (param, grad, *state.values()), run, run, reference, _of_update(keys))


def _stepping(step: Callable[[Sequence[Job]], None], rule: Rule, keys: Sequence[str]) -> Callable[..., Results]:
    def run(param: Tensor, grad: Tensor, *state: Tensor) -> Results:
        batch = Batch([param], [dict(zip(keys, state, strict=True))], grad.dtype)
        step([Job(batch, [grad], [rule], Clipping(5))])
        codes = [
            value.view(torch.uint8) if key.startswith("codes") else value for key, value in batch.states[0].items()
        ]
        return param, *codes

    return run


def _of_update(keys: Sequence[str]) -> Allowed:
    """A unit of the parameter and 2^-15 of its largest step; codes one apart; sums of two rounded terms elsewhere."""

    def allowed(arguments: Arguments, expected: Results) -> Sequence[Tensor | float]:
        before, after = arguments[0].double(), expected[0].double()
        unit = torch.finfo(arguments[0].dtype).eps * torch.maximum(before.abs(), after.abs())
        limits: list[Tensor | float] = [unit + 2.0**-15 * (after - before).abs().max() + 1e-12]
        for key, value in zip(keys, expected[1:], strict=True):
            if key.startswith("codes"):
                limits.append(1.0)
            elif key in ("step", "gnorm_counts"):
                limits.append(0.0)
            else:
                limits.append(2.0**-18 * value.double().abs() + 2.0**-22 * float(value.abs().max()))
        return limits

    return allowed
