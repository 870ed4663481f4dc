"""A process of `benchmark=loading`: writes the checkpoint, or loads it in one way.

    python -m lq_plugin.recipes.benchmarks.loading_case '{"folder": ..., "write": {a Shape}}'
    python -m lq_plugin.recipes.benchmarks.loading_case '{"folder": ..., "load": {a LoadCase}}'

Each prints a line of JSON.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lq_plugin.conversion import convert
from lq_plugin.formats import format_named
from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.loading import load_pretrained
from lq_plugin.recipes.benchmarks.loading import LoadCase
from lq_plugin.recipes.benchmarks.records import installed
from lq_plugin.recipes.benchmarks.training_steps_cases import Shape
from lq_plugin.recipes.benchmarks.training_steps_lora import bitsandbytes_layer
from lq_plugin.recipes.benchmarks.training_steps_model import fill, llama

SHARD = "5GB"  # as Llama 3's files are
TOKENS = 32
_LATE = {
    "ours": ("lq_plugin.pretrained_source",),
    "bitsandbytes": ("transformers.integrations.bitsandbytes",),
    "convert": (),
}
_KILOBYTE = 1024  # ru_maxrss counts in it on Linux
_IN_4_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": _IN_4_BITS,
    "nf4_dq": _IN_4_BITS | {"bnb_4bit_use_double_quant": True},
    "llm_int8": {"load_in_8bit": True},
}


def write(folder: Path, shape: Shape, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    model: Any = llama(shape, torch.device("meta"))
    fill(model, device, lambda name, linear: linear)
    began = time.perf_counter()
    model.save_pretrained(folder / "model", max_shard_size=SHARD)
    return {"seconds": time.perf_counter() - began}


def load(case: LoadCase, folder: Path, device: torch.device) -> dict[str, Any]:
    """seconds: from the call to a model whose weights are there, kernels compiled before. loss: on the same random
    tokens for all. host_peak_bytes: of the whole process, with those pages of mapped files that were in memory."""
    loader = LOADERS[case.who]
    _compile_kernels(case, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    model = loader(case, folder, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    on_gpu = device.type == "cuda"
    return {
        "seconds": seconds,
        "model_bytes": torch.cuda.memory_allocated(device) if on_gpu else None,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KILOBYTE,
        "loss": _loss(model, device),
        "transformers": installed("transformers"),
    }


def _ours(case: LoadCase, folder: Path, device: torch.device) -> nn.Module:
    cache = folder / "cache" if case.cache else None
    return load_pretrained(folder / "model", case.linear, device=device, cache=cache, progress=False)


def _bitsandbytes(case: LoadCase, folder: Path, device: torch.device) -> nn.Module:
    config = import_module("transformers").BitsAndBytesConfig(**BITSANDBYTES[case.linear])
    return _from_pretrained(folder, device, quantization_config=config)


def _converted(case: LoadCase, folder: Path, device: torch.device) -> nn.Module:
    model = _from_pretrained(folder, device)
    convert(model, case.linear)
    return model


LOADERS: dict[str, Callable[[LoadCase, Path, torch.device], nn.Module]] = {
    "ours": _ours,
    "bitsandbytes": _bitsandbytes,
    "convert": _converted,
}


def _from_pretrained(folder: Path, device: torch.device, **options: Any) -> nn.Module:
    model_class = import_module("transformers").AutoModelForCausalLM
    place = device.index or 0 if device.type == "cuda" else device.type
    loaded: nn.Module = model_class.from_pretrained(
        folder / "model", device_map={"": place}, dtype=torch.bfloat16, **options
    )
    return loaded


def _compile_kernels(case: LoadCase, device: torch.device) -> None:
    """And imports what is imported late: neither belongs to the time of loading."""
    for module in ("transformers.models.llama.modeling_llama", *_LATE[case.who]):
        import_module(module)
    linear = nn.Linear(256, 256, bias=False, device=device, dtype=torch.bfloat16)
    if case.who == "bitsandbytes":
        bitsandbytes_layer(linear, case.linear)
        return
    format = format_named(case.linear)
    assert isinstance(format, FrozenFormat)
    format.freeze(linear)


@torch.no_grad()
def _loss(model: Any, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, TOKENS), device=device, generator=generator)
    return float(model.eval()(input_ids=tokens, labels=tokens).loss)


def main() -> None:
    asked = json.loads(sys.argv[1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(asked["folder"])
    if "write" in asked:
        result = write(folder, Shape(**asked["write"]), device)
    else:
        result = load(LoadCase(**asked["load"]), folder, device)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
