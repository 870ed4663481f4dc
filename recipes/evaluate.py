"""Measures a model on a held-out file: `lq-evaluate source=<folder or hub name> test=<file, folder or data set>`.

Perplexity and bits per byte of the answers (of all tokens of texts), and the share of questions whose answer the model
writes word for word. The figures are printed and left in evaluation.json.
"""

import json
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from lq_plugin.recipes.launch.console import quieten
from lq_plugin.recipes.launch.settings import check_settings, hints_on_exit
from lq_plugin.recipes.tasks.evaluation import exact_match, likelihood
from lq_plugin.recipes.tasks.finetuned import Finetuned
from lq_plugin.recipes.tasks.samples import read_samples

MODEL_KEYS = ("source", "adapter", "linear", "skip", "dtype", "device", "template")
KEYS = (*MODEL_KEYS, "test", "split", "columns", "limit", "context", "batch_size", "answers", "length", "output")


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="evaluate")
def evaluate(config: DictConfig) -> float:
    quieten()
    check_settings(config, KEYS)
    columns = OmegaConf.to_container(config.columns) if config.columns else None
    samples = read_samples(config.test, split=config.split, columns=columns)[: config.limit]  # type: ignore[arg-type]
    model, encoder = Finetuned(**{key: config[key] for key in MODEL_KEYS}).load()
    figures = likelihood(model, encoder, samples, context=config.context, batch_size=config.batch_size)
    figures |= exact_match(
        model, encoder, samples[: config.answers], length=config.length, batch_size=config.batch_size
    )
    for name, value in figures.items():
        print(f"{name:14} {value:,.4f}" if isinstance(value, float) else f"{name:14} {value:,}")
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: str(config[key]) for key in ("source", "adapter", "linear", "test")}
    path.write_text(json.dumps(settings | figures, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return float(figures["loss"])


def main() -> None:
    with hints_on_exit(KEYS):
        evaluate()


if __name__ == "__main__":
    main()
