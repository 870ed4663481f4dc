"""transformers' Llama with random bfloat16 weights, as a whole or a module at a time.

A model that is filled a module at a time begins on the meta device: each module gets its weights, a layer that is to
be frozen is frozen at once, and its 16-bit weight is dropped before the next one is made. So the peak is the quantised
model and one layer, as it is for files that are quantised while they are read.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from lq_plugin.recipes.benchmarks.training_steps_cases import Shape

DEVIATION = 0.02  # LlamaConfig's initializer_range
Freeze = Callable[[str, nn.Linear], nn.Module]


def llama(shape: Shape, device: torch.device) -> nn.Module:
    """transformers' Llama in bfloat16 with random weights, attention by SDPA, ready to train but for checkpointing."""
    transformers = import_module("transformers")
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.length,
        use_cache=False,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: nn.Module = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.train()


def checkpoint(model: nn.Module, shape: Shape) -> None:
    """Switches on the checkpointing of activations where the shape asks for it; after adapters are in their places."""
    if not shape.checkpointing:
        return
    new_name = hasattr(model, "activation_checkpointing_enable")  # the old name warns since transformers 5.23
    enable: Any = model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # transformers makes the embeddings' output need a gradient, as PEFT does with a model that is checkpointed already.
    # Only reentrant checkpointing needs that, and torch.compile cannot trace it.
    disable: Any = model.disable_input_require_grads
    disable()


def fill(model: nn.Module, device: torch.device, freeze: Freeze) -> None:
    """Gives a Llama on the meta device its weights, in place; freeze(name, linear) is what takes a linear's place.

    Matrices are normal with a deviation of DEVIATION, vectors, which are weights of norms, ones. The random numbers are
    the same whatever `freeze` makes of them. RuntimeError: something is left on the meta device.
    """
    names = [name for name, _ in model.named_modules() if name]  # a list of modules would keep what they held
    for name in names:
        _fill_module(model, name, device, freeze)
    rotary: Any = model.get_submodule("model.rotary_emb")
    with device:
        model.set_submodule("model.rotary_emb", type(rotary)(config=rotary.config))  # one whose buffers have values
    left = [name for name, x in (*model.named_parameters(), *model.named_buffers()) if x.is_meta]
    if left:
        raise RuntimeError(f"expected a model that is filled, got {left[0]} and {len(left) - 1} more without values")


@torch.no_grad()
def _fill_module(model: nn.Module, name: str, device: torch.device, freeze: Freeze) -> None:
    module = model.get_submodule(name)
    for key, empty in list(module.named_parameters(recurse=False)):
        value = torch.empty_like(empty, device=device)
        value = value.normal_(0.0, DEVIATION) if value.ndim > 1 else value.fill_(1.0)
        setattr(module, key, nn.Parameter(value, requires_grad=empty.requires_grad))
    if isinstance(module, nn.Linear):
        model.set_submodule(name, freeze(name, module))
