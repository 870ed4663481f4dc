"""Quantising while files are read: equal to converting afterwards, in less memory, with clear errors."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lq_plugin import convert
from lq_plugin.formats import FP4, NF4
from lq_plugin.layers import FrozenLinear, Linear4bit
from lq_plugin.layers.packed_rows import PackedRows
from lq_plugin.loading import load_pretrained, load_weights
from lq_plugin.lora_config import LoRAConfig

IDS = torch.arange(12).reshape(2, 6)


def llama(layers: int = 2, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A model in float32 and its folder, in several shards."""
    model = llama().eval()
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return model, tmp_path / "model"


def single_file(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def changed(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype, key
        assert torch.equal(tensor, two[key]), key


# load_pretrained


@pytest.mark.parametrize("linear", ["nf4", "nf4_dq", "llm_int8", {"*.mlp.*": FP4(32), "self_attn.o_proj": "llm_int8"}])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_gives_what_converting_the_loaded_model_gives(saved, linear, dtype):
    _, folder = saved
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    convert(model, linear)
    loaded = load_pretrained(folder, linear, dtype=dtype)
    assert_same_state(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not any(module.training for module in loaded.modules())


def test_buffers_that_no_file_holds_have_their_values(saved):
    model, folder = saved
    loaded = load_pretrained(folder)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("written", ["once", "twice"])
def test_tied_embeddings_stay_tied_and_in_16_bits(tmp_path, written):
    file = single_file(tmp_path, llama(tie_word_embeddings=True))
    if written == "twice":
        changed(file, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    for linear in ("nf4", {"lm_head": "nf4", "*": "nf4"}):
        loaded = load_pretrained(tmp_path, linear)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert loaded.lm_head.weight.dtype == torch.float32


def test_skip_patterns_and_lora_are_those_of_convert(saved):
    _, folder = saved
    loaded = load_pretrained(folder, skip=["k_proj"], lora=LoRAConfig(r=2, target_modules=("q_proj",)))
    assert type(loaded.model.layers[0].self_attn.k_proj) is nn.Linear
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {f"model.layers.{i}.self_attn.q_proj.lora_{x}" for i in (0, 1) for x in "AB"}
    with pytest.raises(ValueError, match="no_such_layer"):
        load_pretrained(folder, skip=["no_such_layer"])


def test_the_model_is_an_ordinary_one_of_transformers_afterwards(saved):
    _, folder = saved
    loaded = load_pretrained(folder)
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.name_or_path == str(folder)
    loaded.to(torch.bfloat16)
    loaded.generate(IDS[:1], max_new_tokens=2, do_sample=False, pad_token_id=0)


def peak_beyond_the_model(folder: Path) -> int:
    """Bytes that loading in bfloat16 held at its peak, less those that it still holds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = load_pretrained(folder, "nf4", dtype=torch.bfloat16)
    mapped = (folder / "model.safetensors").stat().st_size  # of the file into the address space, which is no memory
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events = [e for e in events if not mapped - 4096 < abs(e.nbytes()) <= mapped]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    held = sum(tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers()))
    assert live >= 0.9 * held, "the count sees the model"
    return peak - live


def test_the_peak_is_the_quantised_model_and_one_layer(tmp_path):
    """What is held beyond the model does not grow with the layers: 2 layers or 12, 48 times the floats of one."""
    for layers in (2, 12):
        llama(layers).save_pretrained(tmp_path / str(layers))
    few, many = (peak_beyond_the_model(tmp_path / str(layers)) for layers in (2, 12))
    one_layer = 96 * 64 * 4
    assert many <= few + one_layer
    assert many <= 12 * one_layer  # the reference of the quantiser makes temporaries of the size of the layer


def test_a_bar_is_shown_where_somebody_watches(saved, capsys, monkeypatch):
    _, folder = saved
    load_pretrained(folder)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    load_pretrained(folder, progress=False)
    assert capsys.readouterr() == ("", "")
    load_pretrained(folder)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "14/14 layers" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.err)  # without colours


# Bad input


def test_a_missing_shard_is_named(saved):
    _, folder = saved
    (folder / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    gone = sorted(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()))[1]
    (folder / gone).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=gone):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "..\\x.safetensors", "a.bin", 3])
def test_an_index_cannot_name_files_outside_the_folder(saved, name):
    _, folder = saved
    save_file({"x": torch.zeros(1)}, folder.parent / "secret.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"expected a .safetensors file in its own folder"):
        load_pretrained(folder)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": "y"'])
def test_an_index_that_is_none_is_an_error(saved, index):
    _, folder = saved
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="is not an index"):
        load_pretrained(folder)


def test_an_index_that_places_a_tensor_wrongly_is_an_error(saved):
    _, folder = saved
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    index["weight_map"][name] = next(other for other in index["weight_map"].values() if other != file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which it does not"):
        load_pretrained(folder)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_file_that_is_cut_short_is_an_error(tmp_path, length):
    file = single_file(tmp_path, llama())
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model.safetensors is cut short or damaged"):
        load_pretrained(tmp_path)


def test_tensors_that_are_missing_or_unknown_are_named(tmp_path):
    file = single_file(tmp_path, llama())

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.other.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
        del tensors["model.norm.weight"]

    changed(file, change)
    with pytest.raises(ValueError, match=r"lacks model.layers.0.mlp.up_proj.weight, model.norm.weight") as error:
        load_pretrained(tmp_path)
    assert "holds model.layers.0.mlp.other.weight, which the model does not have" in str(error.value)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_tensor_of_another_shape_is_named(tmp_path, name):
    file = single_file(tmp_path, llama())
    changed(file, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    with pytest.raises(ValueError, match=rf"{name} has shape \(3, 5\), the model has \("):
        load_pretrained(tmp_path)


def rewritten(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": None}, "names no architectures"),
        ({"architectures": ["NoSuchModel"]}, "'NoSuchModel', which transformers"),
        ({"architectures": ["AutoModel"]}, "'AutoModel', which transformers"),
        ({"model_type": "no_such_type"}, "not the config of a model"),
    ],
)
def test_a_config_that_does_not_say_which_model_it_is_is_an_error(saved, values, message):
    _, folder = saved
    rewritten(folder, **values)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_folders_that_hold_no_model_say_what_is_missing(saved, tmp_path):
    model, _ = saved
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_pretrained(tmp_path / "empty")
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors .* it has pytorch_model.bin: pickled"):
        load_pretrained(tmp_path / "pickled")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match="is a file"):
        load_pretrained(single_file(tmp_path / "one", model))


def test_an_adapter_is_not_a_model(saved):
    _, folder = saved
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else", "peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"holds an adapter.*load_adapter"):
        load_pretrained(folder)


def test_a_config_cannot_name_another_file(saved):
    """transformers would read it in the place of those that were checked."""
    model, folder = saved
    save_file({"x": torch.zeros(1)}, folder.parent / "secret.safetensors")
    rewritten(folder, transformers_weights="../secret.safetensors")
    convert(model, "nf4")
    assert_same_state(load_pretrained(folder), model)


def test_a_hub_name_without_a_network_says_so(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="could not be fetched from the Hugging Face hub"):
        load_pretrained("nobody/no-such-model-xyz")
    with pytest.raises(ValueError, match="neither a folder nor a name on the hub"):
        load_pretrained("a/b/c/d")


@pytest.mark.parametrize("sharded", [True, False])
def test_of_a_hub_name_no_more_is_fetched_than_is_read(saved, tmp_path, monkeypatch, sharded):
    """Some repositories hold their weights twice, and pickled a third time."""
    hub = pytest.importorskip("huggingface_hub")
    model, remote = saved
    if not sharded:
        remote = tmp_path / "one"
        model.save_pretrained(remote)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "modeling.py"):
        (remote / name).write_bytes(b"never fetched")
    snapshot = tmp_path / "0123abcd"

    def snapshot_download(name: str, allow_patterns: list[str], revision: str | None = None) -> str:
        assert name == "someone/a-model"
        assert revision == ("0123abcd" if snapshot.exists() else None)
        snapshot.mkdir(exist_ok=True)
        for file in {file for pattern in allow_patterns for file in remote.glob(pattern)}:
            shutil.copyfile(file, snapshot / file.name)
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    loaded = load_pretrained("someone/a-model")
    expected = {file.name for file in remote.iterdir() if file.name.startswith(("model", "config", "generation"))}
    assert {file.name for file in snapshot.iterdir()} == expected - {"modeling.py"}
    assert loaded.name_or_path == "someone/a-model"
    convert(model, "nf4")
    assert_same_state(loaded, model)


def test_a_format_that_trains_is_refused(saved):
    _, folder = saved
    with pytest.raises(ValueError, match="int8_switchback"):
        load_pretrained(folder, "int8_switchback")


def test_a_model_without_layers_to_freeze_is_an_error(saved):
    _, folder = saved
    with pytest.raises(ValueError, match="no linear layer to freeze"):
        load_pretrained(folder, {})


# The cache


@pytest.fixture
def nothing_is_quantised(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and a weight that is quantised is an error."""

    def quantize(rows: PackedRows, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        assert weight.is_meta, "a weight was quantised"
        return original(rows, weight)

    original = PackedRows.quantize
    return lambda: monkeypatch.setattr(PackedRows, "quantize", quantize)


@pytest.mark.parametrize("linear", ["nf4_dq", NF4(block_size=128)])  # rows of 64 and 96 are padded to 128
def test_the_second_load_reads_the_quantised_model(saved, tmp_path, linear, nothing_is_quantised):
    _, folder = saved
    first = load_pretrained(folder, linear, cache=tmp_path / "cache")
    nothing_is_quantised()
    second = load_pretrained(folder, linear, cache=tmp_path / "cache")
    assert_same_state(second, first)
    assert second.config._name_or_path == str(folder)
    with torch.no_grad():
        assert torch.equal(second(IDS).logits, first(IDS).logits)


def test_the_cache_knows_what_made_it(saved, tmp_path):
    _, folder = saved
    cache = tmp_path / "cache"
    for options in ({}, {"dtype": torch.bfloat16}, {"skip": ["k_proj"]}, {"linear": "fp4"}):
        load_pretrained(folder, cache=cache, **options)
    assert len(list(cache.iterdir())) == 4
    file = sorted(folder.glob("*.safetensors"))[0]
    os.utime(file, ns=(1, 1))
    load_pretrained(folder, cache=cache)
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("file", ["complete.json", "frozen.safetensors", "model.safetensors", "config.json"])
@pytest.mark.parametrize("harm", ["cut", "removed"])
def test_a_broken_cache_is_made_again_and_a_line_says_so(saved, tmp_path, caplog, file, harm):
    _, folder = saved
    first = load_pretrained(folder, cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    broken = entry / file
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2]) if harm == "cut" else broken.unlink()
    with caplog.at_level(logging.WARNING):
        second = load_pretrained(folder, cache=tmp_path / "cache")
    assert "is made again" in caplog.text
    assert_same_state(second, first)
    assert broken.read_bytes() == content


def test_a_load_that_fails_leaves_no_cache(tmp_path):
    file = single_file(tmp_path / "model", llama())
    changed(file, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"lacks model.norm.weight"):
        load_pretrained(tmp_path / "model", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# load_weights


class Tied(nn.Module):
    """Linears, a norm, a tie, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 64)
        self.inner = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 37, bias=False))
        self.last = nn.Linear(37, 64)
        self.head = nn.Linear(64, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.inner(self.embedding(x))))


def on_meta() -> Tied:
    with torch.device("meta"):
        return Tied()


def without_ties(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "head.weight"}


@pytest.mark.parametrize("linear", ["nf4", "fp4_dq", "llm_int8"])
def test_any_module_loads_as_convert_would_make_it(tmp_path, linear):
    model = Tied()
    tensors = without_ties(model)
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "a.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "b.safetensors")
    loaded = on_meta()
    inner = loaded.inner[0]
    assert load_weights(loaded, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], linear) is loaded
    convert(model, linear)
    assert_same_state(loaded, model)
    assert loaded.head.weight is loaded.embedding.weight
    assert isinstance(loaded.inner[0], FrozenLinear)
    assert inner is not None
    assert torch.equal(loaded(IDS[:, :5] % 11), model(IDS[:, :5] % 11))
    assert loaded.inner[1].weight.requires_grad
    assert loaded.inner[0].bias.requires_grad


def test_what_was_not_to_train_does_not(tmp_path):
    save_file(without_ties(Tied()), tmp_path / "model.safetensors")
    loaded = load_weights(on_meta().requires_grad_(False), tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_layer_that_stands_twice_stays_one(tmp_path):
    def twice() -> nn.Module:
        linear = nn.Linear(64, 64)
        return nn.Sequential(linear, nn.ReLU(), linear)

    model = twice()
    save_file({"0.weight": model[0].weight, "0.bias": model[0].bias}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        loaded = twice()
    load_weights(loaded, tmp_path)
    assert loaded[0] is loaded[2]
    convert(model, "nf4")
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), model(x))


def test_a_model_that_is_a_linear_itself_loads(tmp_path):
    model = nn.Linear(64, 37)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_weights(nn.Linear(64, 37, device="meta"), tmp_path)
    convert(model, "nf4")
    assert_same_state(loaded, model)


def test_hooks_of_the_user_stay(tmp_path):
    save_file(without_ties(Tied()), tmp_path / "model.safetensors")
    model, seen = on_meta(), []
    model.last.register_forward_hook(lambda module, x, y: seen.append(type(module)))
    load_weights(model, tmp_path, skip="inner.2")(IDS[:, :5] % 11)
    assert seen == [Linear4bit]
    assert type(model.inner[2]) is nn.Linear


def test_frozen_entries_in_a_file_are_read_and_checked(tmp_path):
    model = Tied()
    convert(model, "nf4")
    save_file(without_ties(model), tmp_path / "model.safetensors")
    loaded = load_weights(on_meta(), tmp_path, "nf4")
    assert_same_state(loaded, model)
    for other in ("fp4", "nf4_dq", NF4(block_size=128), "llm_int8"):
        untouched = on_meta()
        with pytest.raises(ValueError, match=r"inner.0"):
            load_weights(untouched, tmp_path, other)
        assert all(parameter.is_meta for parameter in untouched.parameters())
        assert not any(isinstance(module, FrozenLinear) for module in untouched.modules())


def test_dtype_is_that_of_parameters(tmp_path):
    save_file(without_ties(Tied()), tmp_path / "model.safetensors")
    loaded = load_weights(on_meta(), tmp_path, dtype=torch.bfloat16)
    assert loaded.embedding.weight.dtype == torch.bfloat16
    assert loaded.offset.dtype == torch.float32
    assert isinstance(loaded.last, Linear4bit)
    assert loaded.last.weight_dtype == torch.bfloat16
    plain = load_weights(on_meta(), tmp_path, None)
    assert_same_state(plain, load_weights(Tied(), tmp_path, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("inner.0.weight"), "lack inner.0.weight"),
        (lambda t: t.pop("inner.0.bias"), "lack inner.0.bias"),
        (lambda t: t.pop("embedding.weight"), "lack embedding.weight, head.weight"),
        (lambda t: t.pop("offset"), "lack offset"),
        (lambda t: t.update(other=torch.zeros(1)), "hold other, which the model does not have"),
        (lambda t: t.update({"last.other": torch.zeros(1)}), "last"),
        (lambda t: t.update({"offset": torch.zeros(4)}), r"offset has shape \(4,\), the model has \(3,\)"),
        (lambda t: t.update({"last.weight": torch.zeros(4, 4)}), r"last.weight has shape \(4, 4\)"),
        (lambda t: t.update({"head.weight": torch.zeros(11, 64)}), "are one tensor of the model"),
    ],
)
def test_files_that_do_not_fit_change_nothing(tmp_path, change, message):
    tensors = without_ties(Tied())
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    model = on_meta()
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not any(isinstance(module, FrozenLinear) for module in model.modules())


def test_buffers_on_meta_that_are_not_saved_are_named(tmp_path):
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.register_buffer("angles", torch.ones(3), persistent=False)

    save_file(Rotary().state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Rotary()
    with pytest.raises(ValueError, match="the buffers angles are on the meta device"):
        load_weights(model, tmp_path)


def test_a_tensor_in_two_files_is_an_error(tmp_path):
    tensors = without_ties(Tied())
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"offset": torch.zeros(3)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"'offset' stands in .*a.safetensors and in .*b.safetensors"):
        load_weights(on_meta(), [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    with pytest.raises(ValueError, match="no file was given"):
        load_weights(on_meta(), [])
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_weights(on_meta(), tmp_path / "c.safetensors")
    (tmp_path / "d.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected .safetensors files"):
        load_weights(on_meta(), tmp_path / "d.bin")


@pytest.mark.parametrize("hindrance", ["a full disk", "a file in the place of the folder"])
def test_a_cache_that_cannot_be_written_costs_a_warning_and_not_the_model(
    saved, tmp_path, caplog, monkeypatch, hindrance
):
    _, folder = saved
    if hindrance == "a full disk":

        def full(*_: Any, **__: Any) -> None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("lq_plugin.safetensors_shards.save_file", full)
    else:
        (tmp_path / "cache").write_text("")
    with caplog.at_level(logging.WARNING, "lq_plugin"):
        model = load_pretrained(folder, cache=tmp_path / "cache")
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit)
    assert "the next load quantises again" in caplog.text
    assert not list(tmp_path.glob("cache/*"))


def test_what_save_pretrained_left_of_a_frozen_model_is_named_and_can_be_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    init_empty_weights = pytest.importorskip("accelerate").init_empty_weights
    model = llama().eval()
    convert(model, NF4(32))
    model.save_pretrained(tmp_path / "left")
    with pytest.raises(ValueError, match=r"its config.json says nothing, .*: read it with lq_plugin.load_weights"):
        load_pretrained(tmp_path / "left", NF4(32))
    with init_empty_weights(include_buffers=False):
        back = transformers.LlamaForCausalLM(model.config).eval()
    load_weights(back, tmp_path / "left", NF4(32))
    assert torch.equal(back(IDS).logits, model(IDS).logits)


def test_a_lora_that_is_none_is_refused_before_anything_is_read(saved, monkeypatch):
    _, folder = saved
    monkeypatch.setattr("lq_plugin.pretrained_source.PretrainedSource.load", lambda *_: pytest.fail("it was read"))
    with pytest.raises(TypeError, match="expected LoRAConfig"):
        load_pretrained(folder, lora=4)


def test_other_weights_of_the_same_size_and_time_are_another_model_to_the_cache(tmp_path):
    torch.manual_seed(0)
    first, second = llama().eval(), llama().eval()
    for model in (first, second):
        file = single_file(tmp_path / "model", model)
        os.utime(file, ns=(0, 0))  # the time of change is equal
        loaded = load_pretrained(tmp_path / "model", cache=tmp_path / "cache")
        assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
