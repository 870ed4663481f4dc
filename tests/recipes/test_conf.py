"""Every file of conf/ composes, and every object in it can be made."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import lq_plugin.conf
from lq_plugin.recipes.launch.settings import check_settings

CONF = Path(lq_plugin.conf.__file__).parent
# test_benchmark.py composes those of conf/benchmark
CHOICES = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name != "benchmark")


@pytest.fixture
def composed(tmp_path: Path):
    """composed("group=choice", ...) -> the whole configuration, its output folder in tmp_path."""

    def compose_with(*overrides: str) -> DictConfig:
        with initialize_config_module("lq_plugin.conf", version_base="1.3"):
            config = compose("train", ["hydra.run.dir=.", *overrides], return_hydra_config=True)
        OmegaConf.update(config, "hydra.runtime.output_dir", str(tmp_path), force_add=True)
        HydraConfig.instance().set_config(config)
        return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])

    return compose_with


def test_all_groups_have_choices():
    groups = {choice.split("=")[0] for choice in CHOICES}
    assert groups == {"quant", "optim", "model", "data", "trainer", "logger", "callbacks", "experiment"}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_composes_and_its_objects_can_be_made(composed, choice, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = composed(choice, "model.width=96", "model.depth=1", "trainer.accelerator=cpu", "data.roots=[stdlib]")
    check_settings(config)
    group = choice.split("=")[0]
    for key in config if group == "experiment" else [group]:
        if key in ("logger", "callbacks"):
            assert all(instantiate(entry) is not None for entry in config[key].values())
        elif isinstance(config[key], DictConfig):
            assert instantiate(config[key], **({"logger": False} if key == "trainer" else {})) is not None


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
