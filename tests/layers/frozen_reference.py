"""What a frozen layer's state_dict says its weight is, in float64, by bitsandbytes' format (no code of ours)."""

import json

import torch
from torch import Tensor

# Written out anew: QLoRA, appendix E, and bitsandbytes' float of a sign and three bits.
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
_FP4 = [0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
MAPS = {"nf4": NF4, "fp4": [*_FP4, *(-value for value in _FP4)]}


def four_bit_weight(state: dict[str, Tensor], prefix: str = "") -> Tensor:
    """The entries of one layer -> its weight in float64, padding included where rows are padded."""
    (key,) = [k for k in state if k.startswith(f"{prefix}weight.quant_state.")]
    facts = json.loads(bytes(state[key].tolist()))
    scale = state[f"{prefix}weight.absmax"]
    if "nested_offset" in facts:
        scales = state[f"{prefix}weight.nested_absmax"].double().repeat_interleave(facts["nested_blocksize"])
        values = state[f"{prefix}weight.nested_quant_map"].double()[scale.long()]
        scale = values * scales[: len(values)] + facts["nested_offset"]
    packed = state[f"{prefix}weight"].view(torch.uint8).flatten().long()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    values = torch.tensor(MAPS[facts["quant_type"]], dtype=torch.float64)[codes]
    return (values * scale.double().repeat_interleave(facts["blocksize"])[: len(values)]).view(facts["shape"])


def int8_weight(state: dict[str, Tensor], prefix: str = "") -> Tensor:
    return state[f"{prefix}weight"].double() * state[f"{prefix}SCB"].double()[:, None] / 127
