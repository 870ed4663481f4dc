"""One case of `benchmark=training_steps`, in a process of its own so that its peak of memory is its own.

    python -m lq_plugin.recipes.benchmarks.training_steps_case '{"case": ..., "steps": 5}'

reads the case and prints a line of JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lq_plugin import optim
from lq_plugin.conversion import convert
from lq_plugin.layers.chunked_cross_entropy import linear_cross_entropy
from lq_plugin.recipes.benchmarks.records import installed
from lq_plugin.recipes.benchmarks.training_steps_cases import Case, Shape
from lq_plugin.recipes.benchmarks.training_steps_lora import adapted_llama, training_context
from lq_plugin.recipes.benchmarks.training_steps_model import checkpoint, llama

WARM_UP_STEPS = 3  # kernels are compiled, states made, and the allocator has its blocks
HYPER: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}
LORA_LR = 2e-4  # QLoRA, table 9, https://arxiv.org/abs/2305.14314
COMPILER = "inductor"
HEAD_NAME = "lm_head"


@dataclass(frozen=True)
class Measured:
    """ms: the mean of the timed steps; peak_bytes: torch.cuda.max_memory_allocated() since the model exists, and
    steady_bytes since the warm-up; losses: of the first and the last step on the same tokens.

    parameters, trained: how many the model has without adapters, and how many train. model_bytes, build_peak_bytes:
    what the model takes before the first step, and at most while it was made.
    """

    parameters: int
    trained: int
    model_bytes: int | None
    build_peak_bytes: int | None
    ms: float
    tokens_per_second: float
    peak_bytes: int | None
    steady_bytes: int | None
    losses: tuple[float, float]
    versions: dict[str, str | None]


def measure(case: Case, steps: int) -> Measured:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    _reset_peak(device)
    model = make_model(case, device)
    build_peak, model_bytes = _peak(device), _held(device)
    step = training_step(model, case, device)
    _reset_peak(device)
    warm_up = [step() for _ in range(WARM_UP_STEPS)]
    peak = _peak(device)
    _reset_peak(device)
    ms, last = _timed(step, steps, device)
    steady = _peak(device)
    return Measured(
        case.shape.parameters,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        model_bytes,
        build_peak,
        ms,
        1e3 * case.shape.tokens / ms,
        None if peak is None or steady is None else max(peak, steady),
        steady,
        (warm_up[0].item(), last.item()),
        {name: installed(name) for name in ("transformers", "peft")},
    )


def make_model(case: Case, device: torch.device) -> nn.Module:
    if case.lora is not None:
        return adapted_llama(case, device)
    model = llama(case.shape, device)
    checkpoint(model, case.shape)
    change_linears(model, case)
    return model


def training_step(model: nn.Module, case: Case, device: torch.device) -> Callable[[], Tensor]:
    """A whole step on random tokens, the same each time and in all cases of a shape; returns the loss."""
    optimizer = make_optimizer(model, case)
    generator = torch.Generator(device).manual_seed(0)
    size = (case.shape.batch, case.shape.length)
    tokens = torch.randint(case.shape.vocabulary, size, device=device, generator=generator)
    loss_of = LOSSES[case.loss]
    if case.compiled:
        # What _chunked_loss calls is the body: a compiled model around it would never run.
        (body_of(model) if case.loss == "chunked" else model).compile(backend=COMPILER)

    def step() -> Tensor:
        with training_context(case, device):
            loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _timed(step: Callable[[], Tensor], steps: int, device: torch.device) -> tuple[float, Tensor]:
    """Milliseconds of a step, and the loss of the last."""
    _wait(device)
    began = time.perf_counter()
    losses = [step() for _ in range(steps)]
    _wait(device)
    return 1e3 * (time.perf_counter() - began) / steps, losses[-1]


def change_linears(model: nn.Module, case: Case) -> None:
    """To our format, or to torchao's, in every linear but the output embedding."""
    if case.linear is not None:
        convert(model, case.linear)
    if case.torchao_recipe == "int8_mixed_precision":
        training = import_module("torchao.prototype.quantized_training")
        quantize = import_module("torchao.quantization").quantize_
        quantize(model, training.int8_mixed_precision_training(), filter_fn=_inner_linear)
    elif case.torchao_recipe is not None:
        float8 = import_module("torchao.float8")
        config = float8.Float8LinearConfig.from_recipe_name(case.torchao_recipe)
        float8.convert_to_float8_training(model, config=config, module_filter_fn=_inner_linear)


def _inner_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and HEAD_NAME not in name


def make_optimizer(model: nn.Module, case: Case) -> Optimizer:
    hyper = HYPER if case.lora is None else HYPER | {"lr": LORA_LR}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if case.optimizer == "ours":
        return optim.AdamW8bit(trained.items(), **hyper, **case.options)
    if case.optimizer == "bitsandbytes":
        made: Optimizer = import_module("bitsandbytes.optim").AdamW8bit(trained.values(), **hyper)
        return made
    return torch.optim.AdamW(trained.values(), fused=True, **hyper)


def _own_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross entropy as transformers computes it, of float32 logits of all tokens."""
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def _chunked_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """By our linear_cross_entropy, from the last hidden states."""
    head = model.get_submodule(HEAD_NAME)
    hidden = body_of(model)(input_ids=tokens).last_hidden_state[:, :-1]
    return linear_cross_entropy(hidden.flatten(0, 1), head.get_parameter("weight"), tokens[:, 1:].flatten())


def body_of(model: nn.Module) -> nn.Module:
    """A Llama without its output embedding."""
    return model.get_submodule("model")


LOSSES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {"transformers": _own_loss, "chunked": _chunked_loss}


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.init()  # without it there are no statistics to reset
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _held(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def case_from(described: dict[str, Any]) -> Case:
    return Case(**described | {"shape": Shape(**described["shape"])})


def main() -> None:
    asked = json.loads(sys.argv[1])
    print(json.dumps(vars(measure(case_from(asked["case"]), asked["steps"]))), flush=True)


if __name__ == "__main__":
    main()
