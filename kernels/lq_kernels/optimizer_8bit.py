"""Adam and AdamW over many tensors in one launch, with 8-bit or float32 state.

A parameter with 8-bit state keeps uint8 codes of its shape and float32 scales (rows, ceil(columns / 256)) for each
moment: blocks of 256 values that never cross rows. The first moment is coded in the map dynamic_symmetric, the second
in dynamic_unsigned. The arithmetic is float32; the parameter moves by the new moments before they are quantised.

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
from lq_kernels.blockwise import BLOCK_SIZE, block_scale, dequantize_rows, quantize_rows
from lq_kernels.codebooks import dynamic_map, zero_code
from lq_kernels.dynamic_map import (
    SIGNED_MAP,
    UNSIGNED_MAP,
    constants,
    decode,
    encode_signed,
    encode_unsigned,
    load_tables,
)
from lq_kernels.multi_tensor import (
    GRAD,
    NUMEL,
    PARAM,
    ROW_LENGTH,
    SCALE1,
    SCALE2,
    STATE1,
    STATE2,
    Batch,
    State,
    address,
    blocks_per_program,
    pointer,
)
from lq_kernels.percentile_clipping import Facts, Preparation, launch_prepare, prepare, triton_type

CODE_NAMES = {"1": SIGNED_MAP, "2": UNSIGNED_MAP}  # the map of the first and of the second moment

_BLOCK = tl.constexpr(BLOCK_SIZE)


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


def new_state(param: Tensor, eight_bit: bool) -> State:
    """Zero moments for `param`, in 8 bits by rows or in float32, and a step of 0."""
    step = torch.zeros((), device=param.device)
    if not eight_bit:
        moments = {f"state{i}": torch.zeros(param.shape, device=param.device) for i in CODE_NAMES}
        return {"step": step, **moments}
    scale_shape = (param.shape[0], -(-(param.numel() // param.shape[0]) // BLOCK_SIZE))
    state = {"step": step}
    for i, name in CODE_NAMES.items():
        state[f"codes{i}"] = torch.full(param.shape, zero_code(name), dtype=torch.uint8, device=param.device)
        state[f"scale{i}"] = torch.zeros(scale_shape, device=param.device)
    return state


def load_moment(state: State, i: str) -> Tensor:
    """The first ("1") or second ("2") moment as float32; float32 state itself, not a copy."""
    if f"state{i}" in state:
        return state[f"state{i}"]
    codes = state[f"codes{i}"]
    return dequantize_rows(codes, state[f"scale{i}"], dynamic_map(CODE_NAMES[i]).to(codes.device))


def store_moment(state: State, i: str, moment: Tensor) -> None:
    """Writes a float32 moment into the state, in place."""
    if f"state{i}" in state:
        state[f"state{i}"].copy_(moment)
        return
    codes, scale = quantize_rows(moment, dynamic_map(CODE_NAMES[i]))
    state[f"codes{i}"].copy_(codes)
    state[f"scale{i}"].copy_(scale)


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
    numbers = [float(x) for x in (0.0 if on_device else adam.lr, *adam.betas, adam.eps, adam.weight_decay)]
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
def block_tile(table_ptr, tensor, first_block, active, BLOCKS: tl.constexpr, FLAT: tl.constexpr):
    """Offsets and mask (BLOCKS * 256,) of the values of neighbouring blocks, and the mask (BLOCKS,) of the blocks."""
    row_length = address(table_ptr, tensor, ROW_LENGTH)
    numel = tl.where(active != 0, address(table_ptr, tensor, NUMEL), 0)
    lane = tl.arange(0, BLOCKS * _BLOCK)
    block = first_block + tl.arange(0, BLOCKS)
    if FLAT:
        offset = first_block * _BLOCK + lane
        return offset, lane // _BLOCK < numel // _BLOCK - first_block, block < numel // _BLOCK
    else:
        blocks_per_row = tl.cdiv(row_length, _BLOCK)
        column = (block % blocks_per_row)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        offset = (block // blocks_per_row)[:, None] * row_length + column
        mask = (column < row_length) & (offset < numel)
        return tl.ravel(offset), tl.ravel(mask), block < numel // row_length * blocks_per_row


@triton.jit
def _spread(scale, BLOCKS: tl.constexpr):
    """(BLOCKS,) -> (BLOCKS * 256,): each block's number for each of its values."""
    return tl.ravel(tl.broadcast_to(scale[:, None], [BLOCKS, _BLOCK]))


@triton.jit
def load_codes(codes_ptr, scale_ptr, first_block, offset, mask, block_mask, values, BLOCKS: tl.constexpr):
    """The float32 values of an 8-bit state."""
    block = first_block + tl.arange(0, BLOCKS)
    scale = tl.load(scale_ptr + block, mask=block_mask, other=0.0)
    return decode(tl.load(codes_ptr + offset, mask=mask, other=0), values) * _spread(scale, BLOCKS)


@triton.jit
def scaled_to_blocks(x, mask, BLOCKS: tl.constexpr):
    """x divided by the amax of its block (a zero block stays zero), and the scales (BLOCKS,)."""
    # Beyond the mask x is not zero: codes were loaded as 0 there, which stands for -1.
    scale = block_scale(tl.reshape(tl.where(mask, x, 0.0), [BLOCKS, _BLOCK]), axis=1)
    inverse = 1.0 / tl.where(scale == 0, float("inf"), scale)
    return x * _spread(inverse, BLOCKS), scale


@triton.jit
def adam_update(p, g, m, v, lr, beta1, beta2, eps, weight_decay, bias1, sqrt_bias2, DECOUPLED: tl.constexpr):
    """The formulas at the head of this file, on float32 values."""
    if DECOUPLED:
        p *= 1.0 - lr * weight_decay
    else:
        g += weight_decay * p
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * (g * g)
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

    if EIGHT_BIT:
        codes1_ptr = pointer(table_ptr, tensor, STATE1, tl.uint8, ALIGNED)
        codes2_ptr = pointer(table_ptr, tensor, STATE2, tl.uint8, ALIGNED)
        scale1_ptr = pointer(table_ptr, tensor, SCALE1, tl.float32, False)
        scale2_ptr = pointer(table_ptr, tensor, SCALE2, tl.float32, False)
        values1, bounds1, slopes1, offsets1 = load_tables(constants_ptr, True)
        values2, bounds2, slopes2, offsets2 = load_tables(constants_ptr, False)
        m = load_codes(codes1_ptr, scale1_ptr, first_block, offset, mask, block_mask, values1, BLOCKS)
        v = load_codes(codes2_ptr, scale2_ptr, first_block, offset, mask, block_mask, values2, BLOCKS)
    else:
        state1_ptr = pointer(table_ptr, tensor, STATE1, tl.float32, ALIGNED) + offset
        state2_ptr = pointer(table_ptr, tensor, STATE2, tl.float32, ALIGNED) + offset
        m = tl.load(state1_ptr, mask=mask, other=0.0)
        v = tl.load(state2_ptr, mask=mask, other=0.0)

    p, m, v = adam_update(p, g, m, v, lr, beta1, beta2, eps, weight_decay, bias1, sqrt_bias2, DECOUPLED)
    tl.store(param_ptr, p.to(PARAM_TYPE), mask=mask)

    if EIGHT_BIT:
        block = first_block + tl.arange(0, BLOCKS)
        m, scale1 = scaled_to_blocks(m, mask, BLOCKS)
        tl.store(codes1_ptr + offset, encode_signed(m, bounds1, slopes1, offsets1), mask=mask)
        tl.store(scale1_ptr + block, scale1, mask=block_mask)
        v, scale2 = scaled_to_blocks(v, mask, BLOCKS)
        tl.store(codes2_ptr + offset, encode_unsigned(v, bounds2, slopes2, offsets2), mask=mask)
        tl.store(scale2_ptr + block, scale2, mask=block_mask)
    else:
        tl.store(state1_ptr, m, mask=mask)
        tl.store(state2_ptr, v, mask=mask)
