"""Adam and AdamW over many tensors in one launch, with 8-bit or float32 state (optimizer_state.py).

The arithmetic is float32; the parameter moves by the new moments before they are quantised.

    g = factor grad                                           (factor: percentile clipping, and the sign of maximize)
    p <- p (1 - lr wd)             if decoupled (AdamW), else g <- g + wd p (Adam's L2)
    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Sources: https://arxiv.org/abs/1412.6980, https://arxiv.org/abs/1711.05101, https://arxiv.org/abs/2110.02861
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lq_kernels._op import require_triton
from lq_kernels._triton import tl, triton
from lq_kernels.dynamic_map import constants
from lq_kernels.multi_tensor import (
    GRAD,
    PARAM,
    SCALE1,
    SCALE2,
    STATE1,
    STATE2,
    Batch,
    State,
    blocks_per_program,
    pointer,
)
from lq_kernels.optimizer_state import block_tile, load_moment, load_moment_tile, store_moment, store_moment_tile
from lq_kernels.percentile_clipping import Facts, Preparation, launch_prepare, prepare, triton_type


@dataclass(frozen=True)
class Adam:
    """The hyper-parameters of a step; `lr` may be a tensor of one element on the device of the parameters."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool = False
    percentile: int | None = None

    @property
    def preparation(self) -> Preparation:
        return Preparation(self.betas, self.percentile, self.maximize)


def adam_step(batch: Batch, grads: Sequence[Tensor | None], adam: Adam) -> None:
    """Updates parameters and states in place: CUDA tensors by one update launch for each layout, others by torch.

    grads[i] belongs to batch.params[i]; None leaves that tensor as it is. Nothing waits for the device.
    """
    if batch.device.type == "cuda":
        require_triton("the 8-bit optimizer")
        with torch.cuda.device(batch.device):
            launch_adam(batch, grads, adam)
    else:
        adam_reference(batch, grads, adam)
    torch.autograd.graph.increment_version(
        [param for param, grad in zip(batch.params, grads, strict=True) if grad is not None]
    )


def adam_reference(batch: Batch, grads: Sequence[Tensor | None], adam: Adam) -> None:
    """The step in torch, one tensor after the other."""
    facts_of = prepare(batch, grads, adam.preparation)
    for param, grad, state, facts in zip(batch.params, grads, batch.states, facts_of, strict=True):
        if grad is not None and facts.active:
            _adam_one(param, grad, state, adam, facts)


def _adam_one(param: Tensor, grad: Tensor, state: State, adam: Adam, facts: Facts) -> None:
    lr, (beta1, beta2) = float(adam.lr), adam.betas
    p = param.float()
    g = grad.float() * facts.factor
    if adam.decoupled:
        p.mul_(1 - lr * adam.weight_decay)
    else:
        g.add_(p, alpha=adam.weight_decay)
    m = load_moment(state, "1").mul_(beta1).add_(g, alpha=1 - beta1)
    v = load_moment(state, "2").mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.addcdiv_(m, v.sqrt().div_(facts.sqrt_bias2).add_(adam.eps), value=-lr / facts.bias1)
    param.copy_(p)
    store_moment(state, "1", m)
    store_moment(state, "2", v)


def launch_adam(batch: Batch, grads: Sequence[Tensor | None], adam: Adam) -> None:
    """The step in Triton: norms and facts, then one launch for each layout of the batch's tensors."""
    params = [param if param.is_contiguous() else param.contiguous() for param in batch.params]
    grads = [grad if grad is None or grad.is_contiguous() else grad.contiguous() for grad in grads]
    data = batch.launch_data()
    table = data.table.refresh(params, grads)
    facts = launch_prepare(batch, grads, table, adam.preparation)
    on_device = isinstance(adam.lr, Tensor) and adam.lr.device == batch.device
    # Floats all: an int would compile the kernel once more.
    # 1 - beta is taken in float64: 1 - 0.999 in float32 is off by 1.3e-5 of itself.
    rests = [1 - beta for beta in adam.betas]
    numbers = [float(x) for x in (0.0 if on_device else adam.lr, *adam.betas, *rests, adam.eps, adam.weight_decay)]
    for layout, work in data.work.items():
        if len(work):
            _adam_kernel[(len(work),)](
                table,
                work,
                facts,
                constants(batch.device),
                adam.lr if on_device else None,
                *numbers,
                PARAM_TYPE=triton_type(batch.params[0].dtype),
                GRAD_TYPE=triton_type(batch.grad_type),
                EIGHT_BIT=layout.eight_bit,
                FLAT=layout.flat,
                ALIGNED=data.table.aligned,
                DECOUPLED=adam.decoupled,
                BLOCKS=blocks_per_program(layout),
            )
    for param, contiguous in zip(batch.params, params, strict=True):
        if contiguous is not param:
            param.copy_(contiguous)


@triton.jit
def adam_update(
    p, g, m, v, lr, beta1, beta2, rest1, rest2, eps, weight_decay, bias1, sqrt_bias2, DECOUPLED: tl.constexpr
):
    """The formulas at the head of this file, on float32 values; rest is 1 - beta."""
    if DECOUPLED:
        p *= 1.0 - lr * weight_decay
    else:
        g += weight_decay * p
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    # m / denominator: two multiplications by rsqrt take five instructions less than a division and are as exact.
    root = tl.rsqrt(tl.sqrt(v) * (1.0 / sqrt_bias2) + eps)
    p -= (lr / bias1) * (m * root * root)
    return p, m, v


@triton.jit
def _adam_kernel(
    table_ptr,
    work_ptr,
    facts_ptr,
    constants_ptr,
    lr_ptr,
    lr,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    weight_decay,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(work_ptr + program * 2)
    first_block = tl.load(work_ptr + program * 2 + 1).to(tl.int64)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float32)
    factor = tl.load(facts_ptr + tensor * 4)
    bias1 = tl.load(facts_ptr + tensor * 4 + 1)
    sqrt_bias2 = tl.load(facts_ptr + tensor * 4 + 2)
    active = tl.load(facts_ptr + tensor * 4 + 3)

    offset, mask, block_mask = block_tile(table_ptr, tensor, first_block, active, BLOCKS, FLAT)
    param_ptr = pointer(table_ptr, tensor, PARAM, PARAM_TYPE, ALIGNED) + offset
    p = tl.load(param_ptr, mask=mask, other=0.0).to(tl.float32)
    grad_ptr = pointer(table_ptr, tensor, GRAD, GRAD_TYPE, ALIGNED) + offset
    g = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32) * factor

    m = load_moment_tile(
        table_ptr, tensor, constants_ptr, first_block, offset, mask, block_mask,
        STATE1, SCALE1, True, EIGHT_BIT, ALIGNED, BLOCKS,
    )  # fmt: skip
    v = load_moment_tile(
        table_ptr, tensor, constants_ptr, first_block, offset, mask, block_mask,
        STATE2, SCALE2, False, EIGHT_BIT, ALIGNED, BLOCKS,
    )  # fmt: skip
    p, m, v = adam_update(p, g, m, v, lr, beta1, beta2, rest1, rest2, eps, weight_decay, bias1, sqrt_bias2, DECOUPLED)
    tl.store(param_ptr, p.to(PARAM_TYPE), mask=mask)
    store_moment_tile(
        m, table_ptr, tensor, constants_ptr, first_block, offset, mask, block_mask,
        STATE1, SCALE1, True, EIGHT_BIT, ALIGNED, BLOCKS,
    )  # fmt: skip
    store_moment_tile(
        v, table_ptr, tensor, constants_ptr, first_block, offset, mask, block_mask,
        STATE2, SCALE2, False, EIGHT_BIT, ALIGNED, BLOCKS,
    )  # fmt: skip
