"""A Llama whose linears are frozen in few bits, with LoRA beside them: ours, or PEFT's on bitsandbytes' layers.

PEFT's adapters train in one of three ways:

    peft            adapters in bfloat16, as TRL casts them: no step casts anything
    peft_autocast   adapters in float32 inside autocast to bfloat16: PEFT's default beside Trainer(bf16=True)
    peft_prepared   the same after prepare_model_for_kbit_training, which casts all that is not quantised to float32
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from lq_plugin.conversion import convert, frozen_plan
from lq_plugin.formats import LLMInt8, format_named
from lq_plugin.formats.four_bit import FourBit, four_bit_format
from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.lora_config import LoRAConfig
from lq_plugin.recipes.benchmarks.training_steps_cases import Case
from lq_plugin.recipes.benchmarks.training_steps_model import checkpoint, fill, llama

RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LORA: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}


def adapted_llama(case: Case, device: torch.device) -> nn.Module:
    """The model of a case with `lora` set; only its adapters train. For equal shapes the weights before freezing are
    equal, whoever freezes them and however."""
    model = llama(case.shape, torch.device("meta"))
    adapted = _ours(model, frozen_format(case), device) if case.lora == "ours" else _peft(model, case, device)
    checkpoint(model, case.shape)
    return adapted


def training_context(case: Case, device: torch.device) -> AbstractContextManager[Any]:
    """What the forward pass of a step runs in."""
    inside = case.lora in ("peft_autocast", "peft_prepared")
    return torch.autocast(device.type, torch.bfloat16) if inside else nullcontext()


def frozen_format(case: Case) -> FrozenFormat:
    """The format of `case.linear` that multiplies as `case.compute` says."""
    named = format_named(str(case.linear))
    if not isinstance(named, FrozenFormat):
        raise ValueError(f"LoRA needs a frozen base, got linear={case.linear!r}: expected nf4, nf4_dq or llm_int8")
    if case.compute is None:
        return named
    if not isinstance(named, FourBit):
        raise ValueError(f"{named.name} multiplies in int8 always, got compute={case.compute!r}: expected None")
    compute: Any = case.compute
    return four_bit_format(named.quant_type, named.block_size, named.double_quantization, compute)


def _ours(model: nn.Module, format: FrozenFormat, device: torch.device) -> nn.Module:
    plan = frozen_plan(model, format)
    fill(model, device, lambda name, linear: plan[name].freeze(linear) if name in plan else linear)
    convert(model, format, lora=LoRAConfig(target_modules=TARGETS, **_LORA))
    return model


def _peft(model: nn.Module, case: Case, device: torch.device) -> nn.Module:
    peft = import_module("peft")
    if case.linear is not None:
        make = partial(bitsandbytes_layer, kind=case.linear)
        fill(model, device, lambda name, linear: make(linear) if name.endswith(TARGETS) else linear)
        bits = 8 if case.linear == "llm_int8" else 4
        setattr(model, f"is_loaded_in_{bits}bit", True)  # transformers' quantizers set it, and PEFT reads it
    else:
        fill(model, device, lambda name, linear: linear)
    if case.lora == "peft_prepared":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(TARGETS), **_LORA))
    if case.lora == "peft":
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return adapted.train()


def bitsandbytes_layer(linear: nn.Linear, kind: str) -> nn.Module:
    """bitsandbytes' layer with the weight of `linear`, quantised on the device where it is.

    As transformers makes them with BitsAndBytesConfig(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    or load_in_8bit=True.
    """
    modules, functional = import_module("bitsandbytes.nn"), import_module("bitsandbytes.functional")
    weight, sizes = linear.weight.detach(), (linear.in_features, linear.out_features)
    layer: nn.Module
    if kind == "llm_int8":
        options = {"requires_grad": False, "has_fp16_weights": False}
        layer = modules.Linear8bitLt(
            *sizes, bias=False, has_fp16_weights=False, threshold=LLMInt8().threshold, device="meta"
        )
        codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
        layer.weight = modules.Int8Params(codes, CB=codes, SCB=scale, **options)
        return layer
    four_bit: dict[str, Any] = {"compress_statistics": kind == "nf4_dq", "quant_type": "nf4"}
    layer = modules.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, device="meta", **four_bit)
    layer.weight = modules.Params4bit(weight, requires_grad=False, module=layer, **four_bit).to(weight.device)
    return layer
