"""The tokenizer of a model, from its folder or its name on the hub."""

from typing import Any


def tokenizer_of(source: str) -> Any:
    """transformers' AutoTokenizer of a folder or hub name; FileNotFoundError says what is missing."""
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("models of the hub need transformers: pip install 'lq-plugin[hf]'") from error
    from lq_plugin.model_folder import model_folder

    folder = model_folder(source)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise FileNotFoundError(
            f"{folder} has no tokenizer (tokenizer.json): save it there with tokenizer.save_pretrained, or name the "
            "model that has it as data.tokenizer"
        )
    return AutoTokenizer.from_pretrained(str(folder))
