"""Whether transformers and bitsandbytes would load a model's folder, and what does not fit its architecture."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lq_plugin.audit.facts import BROKEN, Audit, few
from lq_plugin.audit.tensors import StoredWeight, quantized


def add_readers(folder: Path, found: Mapping[str, StoredWeight], audit: Audit) -> None:
    """Builds the model on the meta device, where transformers is installed, and tells who would load it."""
    problem = _transformers_problem(folder, found, audit)
    if problem is None and not audit.is_whole:
        problem = "no: it is broken"
    low_bit = list(quantized(found))
    bitsandbytes = _bitsandbytes_problem(low_bit)
    if problem is None and bitsandbytes:
        problem = f"no: {bitsandbytes}"
    audit.readers["transformers"] = problem or ("yes, with bitsandbytes" if low_bit else "yes")
    if low_bit:
        here = "" if find_spec("bitsandbytes") else ", which is not installed here"
        audit.readers["bitsandbytes"] = f"no: {bitsandbytes}" if bitsandbytes else f"yes{here}"
    formats = sorted({weight.format for weight in low_bit})
    linear = repr(formats[0] if formats else "nf4")
    can = audit.is_whole and not (problem or "").startswith("no")
    audit.readers["lq_plugin"] = f"yes: load_pretrained(folder, {linear})" if can else "no"
    audit.readers["PEFT"] = (
        "yes: beside what transformers loads" if can and problem is None else "not without transformers"
    )


def _bitsandbytes_problem(weights: list[StoredWeight]) -> str:
    padded = [weight.name for weight in weights if weight.padded]
    return f"rows of {few(padded)} are padded, which its format does not know" if padded else ""


def _transformers_problem(folder: Path, found: Mapping[str, StoredWeight], audit: Audit) -> str | None:
    """None where transformers would take the tensors; what does not fit the architecture becomes a finding."""
    if find_spec("transformers") is None or find_spec("accelerate") is None:
        return "unknown: transformers and accelerate are not installed here"
    from lq_plugin.pretrained_source import PretrainedSource

    try:
        source = PretrainedSource.of(folder, None)
    except (ValueError, FileNotFoundError) as error:
        return f"no: {error}"
    try:
        info = _loading_info(source, found)
    except Exception as error:  # of any of its models, whatever it is
        return f"unknown: {type(error).__name__}: {error}"
    model = source.model_class.__name__
    if missing := sorted(info["missing_keys"]):
        audit.add(BROKEN, f"{len(missing)} tensors of {model} are missing: {few(missing)}")
    if unexpected := sorted(info["unexpected_keys"]):
        audit.add(BROKEN, f"{len(unexpected)} tensors are none of {model}: {few(unexpected)}")
    wrong = [
        f"{name} is {tuple(shape)}, {model} has {tuple(expected)}"
        for name, shape, expected in sorted(info["mismatched_keys"])
        if not (name in found and found[name].padded and shape[-1] >= expected[-1])
    ]
    if wrong:
        audit.add(BROKEN, few(wrong))
    return None


def _loading_info(source: Any, found: Mapping[str, StoredWeight]) -> dict[str, Any]:
    """What transformers says of tensors of these names and shapes; nothing has values."""
    from lq_plugin.pretrained_source import quiet

    tensors = {w.name: torch.empty(w.shape, dtype=_float(w.format), device="meta") for w in found.values()}
    with quiet():
        _, info = source.model_class.from_pretrained(
            None,
            config=source.config,
            state_dict=tensors,
            dtype="auto",
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    return info


def _float(format: str) -> torch.dtype:
    """Of a tensor when it is read back."""
    dtype = getattr(torch, format, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
