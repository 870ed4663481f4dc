"""Adapters on disk: whole or absent, checked when they are read, and never half loaded."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lq_plugin.adapter_files import CONFIG, WEIGHTS
from lq_plugin.adapters import add_lora, load_adapter, lora_layers, merge_lora, save_adapter
from lq_plugin.formats import FORMATS
from lq_plugin.lora_config import LoRAConfig

WIDTH = 32
X = torch.linspace(-1, 1, 5 * WIDTH).view(5, WIDTH)


class Net(nn.Module):
    def __init__(self, format: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, WIDTH)
        self.up: nn.Module = nn.Linear(WIDTH, 48)
        self.down: nn.Module = nn.Linear(48, WIDTH, bias=False)
        self.norm, self.score = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        if format:
            self.up, self.down = (FORMATS[format].freeze(layer) for layer in (self.up, self.down))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.embed(torch.arange(len(x)))
        return self.score(self.norm(self.down(self.up(x).relu())))


CONFIGS = {
    "plain": LoRAConfig(r=3, target_modules=["up", "down"]),
    "ranks": LoRAConfig(r=3, lora_alpha=5, target_modules=["up", "down"], rank_pattern={"up": 2}, use_rslora=True),
    "lengths": LoRAConfig(r=3, target_modules=["up", "down"], use_dora=True),
    "biases": LoRAConfig(r=3, target_modules=["up", "down"], bias="all"),
    "biases of layers": LoRAConfig(r=3, target_modules=["up", "down"], bias="lora_only"),
    "saved whole": LoRAConfig(r=3, target_modules=["up"], modules_to_save=["score", "norm"]),
    "embedding": LoRAConfig(r=3, target_modules=["up", "embed"]),
}


def trained(name: str = "plain", format: str | None = None) -> nn.Module:
    model = Net(format)
    add_lora(model, CONFIGS[name])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("format", [None, "nf4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_comes_back(name: str, format: str | None, tmp_path: Path) -> None:
    model = trained(name, format)
    save_adapter(model, tmp_path / "a")
    fresh = Net(format)
    assert set(load_adapter(fresh, tmp_path / "a")) == set(lora_layers(model))
    assert torch.equal(fresh(X), model(X))
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    again = Net(format)
    add_lora(again, CONFIGS[name])
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again(X), model(X))
    save_adapter(fresh, tmp_path / "b")
    assert load_file(tmp_path / "a" / WEIGHTS).keys() == load_file(tmp_path / "b" / WEIGHTS).keys()


def test_an_adapter_of_a_part_of_a_model(tmp_path: Path) -> None:
    outer = nn.ModuleDict({"model": Net()})
    add_lora(outer, LoRAConfig(r=3, target_modules=["up", "down"], rank_pattern={"^model.up": 2}))
    for layer in lora_layers(outer).values():
        nn.init.normal_(layer.lora_B)
    save_adapter(outer["model"], tmp_path / "a")
    fresh = Net()
    load_adapter(fresh, tmp_path / "a")
    assert lora_layers(fresh)["up"].r == 2
    assert torch.equal(fresh(X), outer["model"](X))


def test_the_folder_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    save_adapter(model, tmp_path / "a")
    with pytest.raises(FileExistsError, match="left as it is"):
        save_adapter(model, tmp_path / "a")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lq_plugin.adapter_files.save_file", fails)
    with pytest.raises(OSError, match="No space"):
        save_adapter(model, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_saved_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_adapter(Net(), tmp_path / "a")
    model = trained()
    merge_lora(model)
    with pytest.raises(ValueError, match="merged"):
        save_adapter(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def edit(**options: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = path.parent / CONFIG
        config.write_text(json.dumps(json.loads(config.read_text()) | options))

    return change


def rewrite(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    """The tensors changed, in a file as PEFT writes it, without our notes."""

    def rewritten(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"format": "pt"})

    return rewritten


def copy_of_up(tensors: dict[str, Tensor], name: str) -> None:
    tensors |= {f"base_model.model.{name}.lora_{f}.weight": tensors[f"{UP}{f}.weight"] for f in "AB"}


def nothing_of_lora(tensors: dict[str, Tensor]) -> None:
    tensors.clear()
    tensors["base_model.model.norm.weight"] = X


UP = "base_model.model.up.lora_"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip_a_byte, "differ from their hash"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut short or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "cut short or damaged"),
    "no weights": (lambda path: path.unlink(), "has no adapter_model"),
    "no config": (lambda path: (path.parent / CONFIG).unlink(), "has no adapter_config"),
    "config no JSON": (lambda path: (path.parent / CONFIG).write_text("{"), "not JSON"),
    "config a list": (lambda path: (path.parent / CONFIG).write_text("[]"), "JSON object"),
    "another alpha": (edit(lora_alpha=16), "lora_alpha was 8 and is 16"),
    "lengths forgotten": (edit(use_dora=True), "use_dora"),
    "another method": (edit(peft_type="IA3"), "another method"),
    "what we cannot": (edit(use_qalora=True), "use_qalora"),
    "an init that changed the base": (edit(init_lora_weights="pissa"), "changed the base"),
    "half an adapter": (rewrite(lambda t: t.pop(f"{UP}A.weight")), "not the other factor"),
    "another shape": (rewrite(lambda t: t.update({f"{UP}A.weight": torch.zeros(3, 9)})), r"\(3, 9\) in the adapter"),
    "another rank": (
        rewrite(lambda t: t.update({f"{UP}A.weight": torch.zeros(2, WIDTH), f"{UP}B.weight": torch.zeros(48, 2)})),
        r"\(2, 32\) in the adapter and \(3, 32\)",
    ),
    "a layer that is not there": (rewrite(lambda t: copy_of_up(t, "x")), "'x', which this model does not have"),
    "a layer that is no linear": (rewrite(lambda t: copy_of_up(t, "norm")), "'norm', which is a LayerNorm here"),
    "a stray tensor": (rewrite(lambda t: t.update({"base_model.model.norm.weight": X})), r"norm\.weight"),
    "a bias that does not train": (
        rewrite(lambda t: t.update({"base_model.model.up.base_layer.bias": torch.ones(48)})),
        "no part of it",
    ),
    "a stray name": (rewrite(lambda t: t.update({"up.weight": X})), "start with"),
    "nothing of LoRA": (rewrite(nothing_of_lora), "no LoRA"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_damaged_adapter_is_named_and_changes_nothing(case: str, adapted: bool, tmp_path: Path) -> None:
    change, message = DAMAGE[case]
    save_adapter(trained(), tmp_path / "a")
    change(tmp_path / "a" / WEIGHTS)
    model = Net()
    if adapted:
        add_lora(model, CONFIGS["plain"])
    before = copy.deepcopy(model.state_dict())
    trained_before = [p.requires_grad for p in model.parameters()]
    if adapted and case.startswith("a layer"):
        message = "different layers"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_adapter(model, tmp_path / "a")
    after = model.state_dict()
    assert [p.requires_grad for p in model.parameters()] == trained_before
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled"):
        load_adapter(Net(), tmp_path / "a")


def test_another_base_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    model = trained(format="nf4")
    save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="another base"):
        load_adapter(Net(), tmp_path / "a")
    with pytest.raises(ValueError, match="another base"):
        load_adapter(Net("fp4"), tmp_path / "a")
    other = Net("nf4")
    other.norm.weight.data *= 2
    with pytest.raises(ValueError, match=r"'norm\.weight' has the same shape"):
        load_adapter(other, tmp_path / "a")
    plain = Net()
    assert set(load_adapter(plain, tmp_path / "a", check_fingerprint=False)) == {"up", "down"}
    assert torch.equal(lora_layers(plain)["up"].lora_B, lora_layers(model)["up"].lora_B)


def test_adapters_on_other_layers_are_not_mixed(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "a")
    model = Net()
    add_lora(model, LoRAConfig(r=3, target_modules=["up"]))
    with pytest.raises(ValueError, match="different layers: down"):
        load_adapter(model, tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="has no adapter_config"):
        load_adapter(model, tmp_path / "a")


def test_lengths_that_are_missing_are_named(tmp_path: Path) -> None:
    save_adapter(trained("lengths"), tmp_path / "a")
    rewrite(lambda t: t.pop("base_model.model.up.lora_magnitude_vector"))(tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError, match="no lengths for 'up'"):
        load_adapter(Net(), tmp_path / "a")


def test_modules_that_are_missing_are_named(tmp_path: Path) -> None:
    save_adapter(trained("saved whole"), tmp_path / "a")
    rewrite(lambda t: [t.pop(f"base_model.model.score.{n}") for n in ("weight", "bias")])(tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError, match="'score' in modules_to_save"):
        load_adapter(Net(), tmp_path / "a")


@pytest.mark.parametrize("other", [{"lora_alpha": 16}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_an_adapter_is_not_put_into_one_of_another_scale(other: dict[str, Any], tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "a")
    model = Net()
    add_lora(model, replace(CONFIGS["plain"], **other))
    with pytest.raises(ValueError, match="'up' has"):
        load_adapter(model, tmp_path / "a")
