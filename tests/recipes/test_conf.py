"""Every file of conf/ composes, and every object in it can be made."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import lq_plugin.conf
from lq_plugin.recipes.launch.settings import MissingSettingError, check_settings

CONF = Path(lq_plugin.conf.__file__).parent
# test_benchmark.py composes those of conf/benchmark
CHOICES = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name != "benchmark")
ONLY_FINETUNE = {
    "model": {"causal_lm", "classifier", "gpt_docs"},
    "data": {"text", "labels", "pydoc_topics"},
    "callbacks": {"finetune"},
    "experiment": {"qlora_docs", "qlora_hf", "llm_int8_lora", "classify_hf"},
    "quant": {"frozen"},
    "optim": {"adamw_lora"},
}
CLASSIFIES = ("model=classifier", "data=labels", "experiment=classify_hf")
SMALL_GPT = ["model.width=96", "model.depth=1"]


@pytest.fixture
def composed(tmp_path: Path):
    """composed("group=choice", ...) -> the whole configuration, its output folder in tmp_path."""

    def compose_with(*overrides: str, primary: str = "train") -> DictConfig:
        with initialize_config_module("lq_plugin.conf", version_base="1.3"):
            config = compose(primary, ["hydra.run.dir=.", *overrides], return_hydra_config=True)
        OmegaConf.update(config, "hydra.runtime.output_dir", str(tmp_path), force_add=True)
        HydraConfig.instance().set_config(config)
        return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])

    return compose_with


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory, save_llama) -> tuple[Path, Path]:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model_and_data")
    data = folder / "data.jsonl"
    records = [{"prompt": f"number {i} ?", "answer": "two", "text": "sky", "label": i % 2} for i in range(40)]
    data.write_text("\n".join(map(json.dumps, records)))
    return save_llama(folder / "model"), data


def overrides_for(choice: str, model_and_data: tuple[Path, Path]) -> tuple[str, list[str]]:
    """The primary configuration that a choice belongs to, and what it needs to be made quickly."""
    group, name = choice.split("=")
    if name not in ONLY_FINETUNE.get(group, ()):
        return "train", [choice, *SMALL_GPT, "data.roots=[stdlib]"]
    model, data = model_and_data
    if choice in ("model=gpt_docs", "data=pydoc_topics", "experiment=qlora_docs") or group not in (
        "model",
        "data",
        "experiment",
    ):
        return "finetune", ["experiment=qlora_docs", *([choice] if group != "experiment" else []), *SMALL_GPT]
    experiment = (
        choice if group == "experiment" else f"experiment={'classify_hf' if choice in CLASSIFIES else 'qlora_hf'}"
    )
    sources = [f"model.source={model}", f"data.source={data}", "data.context=64", "data.batch_size=1"]
    return "finetune", [experiment, *sources, *(["data.labels=[no,yes]"] if choice in CLASSIFIES else [])]


def test_all_groups_have_choices():
    groups = {choice.split("=")[0] for choice in CHOICES}
    assert groups == {"quant", "optim", "model", "data", "trainer", "logger", "callbacks", "experiment"}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_composes_and_its_objects_can_be_made(composed, choice, model_and_data, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    primary, overrides = overrides_for(choice, model_and_data)
    config = composed(*overrides, "trainer.accelerator=cpu", primary=primary)
    check_settings(config)
    group = choice.split("=")[0]
    for key in config if group == "experiment" else [group]:
        if key in ("logger", "callbacks"):
            assert all(instantiate(entry) is not None for entry in config[key].values() if entry is not None)
        elif isinstance(config[key], DictConfig):
            arguments = {"logger": False} if key == "trainer" else {}
            assert instantiate(config[key], _convert_="all", **arguments) is not None


@pytest.mark.parametrize("primary", ["evaluate", "export", "generate"])
def test_a_command_without_groups_composes_and_says_what_it_needs(composed, primary):
    config = composed(primary=primary)
    with pytest.raises(MissingSettingError, match=r"no value for (test|output|prompt): pass"):
        check_settings(config, list(config))


@pytest.mark.parametrize("choice", CHOICES)
def test_interpolations_are_one_level_deep(choice):
    """What an interpolation names is a value, not another interpolation."""
    text = OmegaConf.load(CONF / f"{choice.replace('=', '/')}.yaml")
    everything = OmegaConf.merge(*(OmegaConf.load(path) for path in [CONF / "train.yaml", *CONF.glob("model/*.yaml")]))
    for value in _leaves(OmegaConf.to_container(text, resolve=False)):
        if isinstance(value, str) and value.startswith("${") and ":" not in value:
            named = OmegaConf.select(everything, value[2:-1].removeprefix("model."))
            assert "${" not in str(named), f"{choice}: {value} names {named}"


def test_the_baseline_differs_from_the_default_in_the_linears_only(composed):
    default, baseline = composed().quant, composed("quant=none").quant
    assert baseline.linear is None
    assert {**baseline, "linear": default.linear} == default


def _leaves(node):
    for value in node.values() if isinstance(node, dict) else node:
        if isinstance(value, dict | list):
            yield from _leaves(value)
        else:
            yield value
