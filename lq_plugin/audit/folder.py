"""Folders: a transformers model, plain or quantised by bitsandbytes, a cache of `load_pretrained`, a LoRA adapter."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lq_plugin.adapter_files import CONFIG as ADAPTER_CONFIG
from lq_plugin.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from lq_plugin.adapter_files import SavedAdapter
from lq_plugin.audit.facts import BROKEN, NOTE, TENSOR_FOLDER, UNKNOWN, Audit, few
from lq_plugin.audit.tensors import StoredTensors, StoredWeight, quantized
from lq_plugin.bitsandbytes_config import Prequantized
from lq_plugin.lora_config import LoRAConfig
from lq_plugin.safetensors_files import INDEX, WEIGHTS, TensorFiles

MODEL_CONFIG, CACHE = "config.json", "complete.json"
_PICKLED = (".bin", ".pt", ".pth")


def read_folder(folder: Path, audit: Audit, stack: ExitStack) -> StoredTensors | None:
    """What kind of folder it is, and what it says of itself; returns its tensors if it has any."""
    if (folder / ADAPTER_CONFIG).exists() or (folder / ADAPTER_WEIGHTS).exists():
        return _adapter(folder, audit)
    if (folder / CACHE).exists():
        return _cache(folder, audit, stack)
    names = sorted(path.name for path in folder.iterdir())
    if MODEL_CONFIG in names or any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        audit.kind = "transformers model" if MODEL_CONFIG in names else TENSOR_FOLDER
        return _model(folder, names, audit, stack)
    audit.add(UNKNOWN, _hint(names))
    return None


def open_files(source: Any, audit: Audit, stack: ExitStack) -> StoredTensors | None:
    """source: as `TensorFiles.of` takes it."""
    try:
        files = TensorFiles.of(source)
    except (ValueError, FileNotFoundError) as error:
        audit.add(BROKEN, str(error))
        return None
    size = sum(path.stat().st_size for path in files.files)
    audit.facts["files"] = f"{len(files.files)} of safetensors, {size:,} bytes, headers and lengths right"
    return StoredTensors.of_files(files, stack.enter_context(files.reader()))


def check_config(folder: Path, found: Mapping[str, StoredWeight], audit: Audit) -> None:
    """Whether config.json says of the weights what they are."""
    config = _json(folder / MODEL_CONFIG, audit)
    if config is None:
        return
    names = config.get("architectures") or ["no architecture"]
    audit.facts["model"] = f"{', '.join(map(str, names))}, model_type {config.get('model_type')}"
    described = config.get("quantization_config")
    formats = sorted({weight.format for weight in quantized(found)})
    if described is None:
        if formats:
            audit.add(BROKEN, f"its weights are in {', '.join(formats)}, and {MODEL_CONFIG} has no quantization_config")
        return
    try:
        bits = Prequantized.of(described, lambda _: None).bits
    except ValueError as error:
        audit.add(UNKNOWN, str(error))
        return
    audit.facts["quantised by"] = f"bitsandbytes, {bits} bits, as {MODEL_CONFIG} says"
    if not formats:
        audit.add(BROKEN, f"{MODEL_CONFIG} speaks of quantised layers, and the files hold none")
    elif any((format == "llm_int8") != (bits == 8) for format in formats):
        audit.add(BROKEN, f"{MODEL_CONFIG} speaks of {bits}-bit layers, and the files hold {', '.join(formats)}")


def _model(folder: Path, names: list[str], audit: Audit, stack: ExitStack) -> StoredTensors | None:
    files = [name for name in names if name.endswith(".safetensors")]
    if not files and INDEX not in names:
        pickled = [name for name in names if name.endswith(_PICKLED)]
        level = UNKNOWN if pickled else BROKEN
        audit.add(level, f"its weights are in {few(pickled)}, which is not read" if pickled else "it has no weights")
        return None
    if WEIGHTS in files and INDEX in names:
        audit.add(NOTE, f"it has {WEIGHTS} and {INDEX}: the first is read, by transformers too")
    if WEIGHTS not in files and INDEX not in names:
        audit.add(NOTE, f"it has no {INDEX}, so that a missing file would not be seen")
        return open_files([folder / name for name in files], audit, stack)
    stored = open_files(folder, audit, stack)
    if stored is not None:
        used = {path.name for path in TensorFiles.of(folder).files}
        if spare := sorted(set(files) - used):
            audit.add(NOTE, f"nobody reads {few(spare)}: the index does not name it")
    return stored


def _cache(folder: Path, audit: Audit, stack: ExitStack) -> StoredTensors | None:
    audit.kind = "quantised cache of load_pretrained"
    sizes = _json(folder / CACHE, audit)
    if sizes is None:
        return None
    wrong = []
    for name, size in sizes.items():
        path = folder / str(name)
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            wrong.append(f"{name} is missing" if found is None else f"{name} has {found:,} bytes of {size:,}")
    if wrong or not sizes:
        audit.add(BROKEN, f"{few(wrong) or f'{CACHE} lists no files'}; it is made again when it is next asked for")
        return None
    audit.readers["lq_plugin"] = "yes: load_pretrained(..., cache=<the folder above>)"
    audit.readers["transformers"] = "no: its quantised layers are in frozen-*.safetensors; export with save_quantized"
    return open_files(sorted(folder.glob("*.safetensors")), audit, stack)


def _adapter(folder: Path, audit: Audit) -> StoredTensors | None:
    audit.kind = "LoRA adapter"
    options = _json(folder / ADAPTER_CONFIG, audit)
    if options is None:
        return None
    audit.facts["base"] = str(options.get("base_model_name_or_path") or "not named")
    if options.get("peft_type", "LORA") != "LORA":
        audit.kind = "adapter of PEFT"
        audit.add(UNKNOWN, f"it is a {options['peft_type']} adapter; expected LORA")
        return None
    try:
        config = LoRAConfig.of_saved(options)
    except (ValueError, TypeError) as error:
        audit.add(UNKNOWN, f"{ADAPTER_CONFIG}: {error}")
        return None
    try:
        saved = SavedAdapter.read(folder)
        layers = saved.layers()
    except (ValueError, FileNotFoundError) as error:
        audit.add(BROKEN, str(error))
        return None
    audit.facts["adapter"] = f"r {config.r}, lora_alpha {config.lora_alpha}, beside {len(layers)} layers"
    note = f"right; the base is known by {len(saved.base)} fingerprints" if saved.base else "none: PEFT wrote it"
    audit.facts["checksums"] = note
    _check_ranks(saved, config, audit)
    audit.readers["PEFT"] = "yes: PeftModel.from_pretrained" if audit.is_whole else "no"
    audit.readers["lq_plugin"] = "yes: lq_plugin.adapters.load_adapter" if audit.is_whole else "no"
    return StoredTensors.of_dict(saved.tensors)


def _check_ranks(saved: SavedAdapter, config: LoRAConfig, audit: Audit) -> None:
    """A factor of another rank than the config gives its layer is another adapter's."""
    if config.target_parameters:  # their factors hold all experts
        return
    wrong = []
    for name, tensor in saved.tensors.items():
        layer, found, _ = name.partition(".lora_A.weight")
        if found and tensor.shape[0] != config.rank(layer):
            wrong.append(f"{layer} has rank {tensor.shape[0]}, the config says {config.rank(layer)}")
    if wrong:
        audit.add(BROKEN, few(wrong))


def _json(path: Path, audit: Audit) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        audit.add(BROKEN, f"{path.name} cannot be read as JSON ({error})")
        return None
    if not isinstance(value, dict):
        audit.add(BROKEN, f"{path.name} holds a {type(value).__name__}, expected an object")
        return None
    return value


def _hint(names: list[str]) -> str:
    if ".metadata" in names:
        return "it is a distributed checkpoint, whose index is a pickle: load it with the strategy that wrote it"
    checkpoints = [name for name in names if name.endswith(".ckpt")]
    if checkpoints:
        return f"it is a folder of checkpoints: name one of them, {few(checkpoints)}"
    return f"expected a model, an adapter, a cache or a checkpoint; the folder has {few(names) or 'nothing in it'}"
