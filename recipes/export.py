"""Merges an adapter into its base and writes plain safetensors: `lq-export adapter=<folder> output=<folder>`.

The result loads in transformers without this project. The base is the one that the adapter was trained beside, read
back from its quantised form; linear=null merges into the base's own 16-bit weights instead.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from lq_plugin.recipes.launch.console import quieten
from lq_plugin.recipes.launch.settings import check_settings, hints_on_exit
from lq_plugin.recipes.tasks.causal_lm import DTYPES
from lq_plugin.recipes.tasks.finetuned import Finetuned

MODEL_KEYS = ("source", "adapter", "linear", "skip", "device")
KEYS = (*MODEL_KEYS, "dtype", "output", "max_shard_size")


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="export")
def export(config: DictConfig) -> None:
    from lq_plugin.checkpoint import export_merged
    from lq_plugin.new_folder import refuse_existing

    quieten()
    check_settings(config, KEYS)
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {config.dtype!r}")
    folder = Path(config.output)
    refuse_existing(folder.absolute())  # before minutes of loading
    model, encoder = Finetuned(**{key: config[key] for key in MODEL_KEYS}).load()
    export_merged(model, folder, dtype=DTYPES[config.dtype], max_shard_size=config.max_shard_size)
    encoder.tokenizer.save_pretrained(str(folder))
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files) / 1e9
    print(f"{folder}: {len(files)} safetensors files, {size:.3g} GB in {config.dtype}, and the tokenizer")


def main() -> None:
    with hints_on_exit(KEYS):
        export()


if __name__ == "__main__":
    main()
