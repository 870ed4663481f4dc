"""The folder of a model: a local one, or what a name on the Hugging Face hub is downloaded to."""

import shutil
from pathlib import Path

from lq_plugin.safetensors_files import INDEX, WEIGHTS, weight_map

# Settings and tokenizers; of the weights those that the index names, and no code.
_SETTINGS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*",
)
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def model_folder(source: str | Path) -> Path:
    """source: a folder with config.json, or a hub name such as "Qwen/Qwen3-8B", which is downloaded when it is new.

    FileNotFoundError: no such folder, or a name that is neither in the local cache nor could be downloaded.
    ValueError: a file, or a text that cannot be a hub name.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file: pass the folder that holds it and config.json")
    if isinstance(source, Path) or path.is_absolute() or str(source).startswith((".", "~")):
        raise FileNotFoundError(f"there is no folder {source}: pass a folder with config.json, or a hub name")
    return _download(str(source))


def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=_SETTINGS))
        index = folder / INDEX
        weights = sorted(set(weight_map(index).values())) if index.is_file() else [WEIGHTS]
        return Path(huggingface_hub.snapshot_download(name, revision=folder.name, allow_patterns=weights))
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder nor a name on the hub: {error}") from error
    except OSError as error:  # what the hub's client raises: offline, no such name, gated
        raise FileNotFoundError(
            f"{name!r} is no local folder, and it could not be fetched from the Hugging Face hub ({error}). Without a "
            "network, pass the folder of a model, or download it before: `hf download " + name + "`"
        ) from error


def copy_tokenizer(source: str | Path | None, target: Path) -> list[str]:
    """Copies the tokenizer's files of `source`, a folder or a hub name that was downloaded; returns their names.

    None, or a source that is not on this machine, copies nothing: no network is used.
    """
    folder = _on_this_machine(source)
    if folder is None:
        return []
    found = {path for pattern in _TOKENIZER for path in folder.glob(pattern)}
    files = sorted(path for path in found if path.is_file() and path.suffix in _TOKENIZER_SUFFIXES)
    for path in files:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in files]


def _on_this_machine(source: str | Path | None) -> Path | None:
    if not source:
        return None
    if Path(source).is_dir():
        return Path(source)
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        folder = huggingface_hub.snapshot_download(str(source), allow_patterns=_SETTINGS, local_files_only=True)
        return Path(folder)
    except (HFValidationError, OSError):
        return None
