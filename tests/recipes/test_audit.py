"""`lq-audit` tells what is in a model or a checkpoint, finds what is broken, and runs nothing that it holds."""

import json
import math
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lq_kernels.blockwise_4bit import dequantize_4bit, quantize_4bit
from lq_kernels.codebooks import four_bit_map
from lq_kernels.quant_state import QuantState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lq_plugin import convert, record
from lq_plugin.adapter_checkpoint import keep_trained
from lq_plugin.adapters import add_lora, save_adapter
from lq_plugin.audit import Audit, audit_path
from lq_plugin.audit.table import verdict
from lq_plugin.checkpoint import save_quantized
from lq_plugin.formats import NF4
from lq_plugin.layers import FrozenLinear
from lq_plugin.loading import load_pretrained
from lq_plugin.lora_config import LoRAConfig
from lq_plugin.optim import AdamW8bit
from lq_plugin.recipes.audit import audit as lq_audit

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Path]) -> Path:
    """plain, nf4, nf4_dq, llm_int8, cache/*, adapter, run.ckpt, optimizer.pt: one model in every form."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("made")
    plain = save_llama(folder / "plain", num_hidden_layers=1)
    for linear in ("nf4", "nf4_dq", "llm_int8"):
        save_quantized(load_pretrained(plain, linear, progress=False), folder / linear)
    model = load_pretrained(plain, "nf4", cache=folder / "cache", progress=False)
    add_lora(model, LoRAConfig(r=4, target_modules=("q_proj", "v_proj")))
    save_adapter(model, folder / "adapter")
    torch.save(checkpoint(), folder / "run.ckpt")
    torch.save(checkpoint()["optimizer_states"][0], folder / "optimizer.pt")
    return folder


def checkpoint() -> dict[str, Any]:
    """What Lightning writes of a model that trained two steps in int8 with 8-bit state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    conversion = convert(model, "int8_switchback")
    optimizer = AdamW8bit(model.named_parameters(), lr=1e-3)
    for _ in range(2):
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = {"pytorch-lightning_version": "2.6.0", "epoch": 1, "global_step": 2, "state_dict": model.state_dict()}
    saved["optimizer_states"] = [optimizer.state_dict()]
    record.write(saved, conversion, "bf16-mixed")
    return saved


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """copy(name) -> a file or folder of `made` that may be broken."""

    def of(name: str) -> Path:
        source = next((made / "cache").iterdir()) if name == "cache" else made / name
        target = tmp_path / name
        return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))

    return of


def change(path: Path, how: Callable[[dict[str, Tensor]], Any]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def broken(audit: Audit) -> str:
    assert audit.exit_code == 1, audit
    assert verdict(audit) == "Broken."
    return "; ".join(audit.of("broken"))


def unknown(audit: Audit) -> str:
    assert audit.exit_code == 2, audit
    return "; ".join(audit.of("not understood"))


def rows(audit: Audit) -> dict[str, tuple[str, str, int]]:
    return {row.format: (row.block, row.codes, row.tensors) for row in audit.rows}


# What is whole


def test_a_plain_model(made: Path) -> None:
    audit = audit_path(made / "plain")
    assert (audit.exit_code, audit.kind, audit.findings) == (0, "transformers model", [])
    tensors = load_file(made / "plain" / "model.safetensors")
    assert rows(audit) == {"float32": ("", "float32", len(tensors))}
    assert audit.rows[0].values == sum(t.numel() for t in tensors.values())
    assert audit.rows[0].bytes == sum(t.nbytes for t in tensors.values())
    assert audit.readers == {
        "transformers": "yes",
        "lq_plugin": "yes: load_pretrained(folder, 'nf4')",
        "PEFT": "yes: beside what transformers loads",
    }


@pytest.mark.parametrize(
    ("name", "block", "codes", "bits"),
    [
        ("nf4", "64", "NF4, float32 scales", 4 + 32 / 64),
        ("nf4_dq", "64", "NF4, 8-bit scales", 4 + 8 / 64 + 32 / 64 / 256),
        ("llm_int8", "row", "int8, float32 scales", 8),
    ],
)
def test_a_model_of_bitsandbytes(name: str, block: str, codes: str, bits: float, made: Path) -> None:
    audit = audit_path(made / name, made / "plain")
    assert (audit.exit_code, audit.findings) == (0, [])
    assert rows(audit)[name] == (block, codes, 7)
    quantized = next(row for row in audit.rows if row.is_quantized)
    # Maps, and the JSON of each layer, count as well: the layers are small.
    assert bits <= 8 * quantized.bytes / quantized.values < bits + 2.5
    # nf4 of normal values: 20.5 dB; int8 by row: 20 log10(127 sqrt(12) / amax) with an amax of about 2.5 deviations
    signal, noise = quantized.signal, quantized.noise
    assert 10 * math.log10(signal / noise) == pytest.approx(20.5 if "nf4" in name else 44.0, abs=1.5)
    assert quantized.worst is not None
    assert quantized.worst[0] <= 10 * math.log10(signal / noise)
    plain = next(row for row in audit.rows if not row.is_quantized)
    assert plain.noise == 0
    assert audit.readers["transformers"] == "yes, with bitsandbytes"
    assert audit.readers["bitsandbytes"].startswith("yes")
    assert audit.readers["lq_plugin"] == f"yes: load_pretrained(folder, {name!r})"


def test_the_noise_is_that_of_the_values_read_back(made: Path) -> None:
    audit = audit_path(made / "nf4", made / "plain")
    model = load_pretrained(made / "nf4", "nf4", progress=False)
    plain = load_file(made / "plain" / "model.safetensors")
    noise = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, FrozenLinear):
            back = layer(torch.eye(layer.in_features)).t()
            noise += float((back.double() - plain[f"{name}.weight"].double()).square().sum())
    assert noise > 0
    assert next(row for row in audit.rows if row.is_quantized).noise == pytest.approx(noise, rel=1e-6)


def test_values_are_read_back_in_float32_whatever_the_model_is_in(tmp_path: Path) -> None:
    packed, scale = quantize_4bit(torch.randn(8, 64))
    state = QuantState(scale, torch.Size((8, 64)), four_bit_map("nf4"), 64, "nf4", torch.bfloat16)
    entries = {f"a.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    save_file(entries | {"a.weight": packed}, tmp_path / "a.safetensors")
    save_file(
        {"a.weight": dequantize_4bit(packed, scale, 64, "nf4", [8, 64], torch.float32)}, tmp_path / "b.safetensors"
    )
    audit = audit_path(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert audit.exit_code == 0
    assert (audit.rows[0].format, audit.rows[0].noise) == ("nf4", 0.0)


def test_a_cache(copy: Callable[[str], Path], made: Path) -> None:
    audit = audit_path(copy("cache"), made / "plain")
    assert (audit.exit_code, audit.kind) == (0, "quantised cache of load_pretrained")
    assert rows(audit)["nf4"][2] == 7
    assert audit.readers["transformers"].startswith("no: its quantised layers")


def test_rows_that_are_padded(made: Path, tmp_path: Path, copy: Callable[[str], Path]) -> None:
    """Rows of 64 in blocks of 128: bitsandbytes has no form for them."""
    load_pretrained(made / "plain", NF4(128), cache=tmp_path / "padded", progress=False)
    cache = next((tmp_path / "padded").iterdir())
    audit = audit_path(cache, made / "plain")
    assert (audit.exit_code, audit.findings) == (0, [])
    padded, whole = (row for row in audit.rows if row.is_quantized)
    assert {padded.block, whole.block} == {"128, rows padded", "128"}
    for row in (padded, whole):
        assert 10 * math.log10(row.signal / row.noise) == pytest.approx(20.5, abs=1.5)
    folder = copy("nf4")
    save_file(
        {name: tensor for file in cache.glob("*.safetensors") for name, tensor in load_file(file).items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    audit = audit_path(folder)
    assert audit.exit_code == 0
    assert "are padded" in audit.readers["bitsandbytes"]
    assert audit.readers["transformers"].startswith("no: rows of")


def test_an_adapter(made: Path) -> None:
    audit = audit_path(made / "adapter")
    assert (audit.exit_code, audit.kind, audit.findings) == (0, "LoRA adapter", [])
    assert audit.facts["adapter"] == "r 4, lora_alpha 8, beside 2 layers"
    assert audit.facts["checksums"].startswith("right; the base is known by")
    assert audit.readers["PEFT"] == "yes: PeftModel.from_pretrained"
    assert rows(audit)["float32"][2] == 4


def test_a_checkpoint_of_lightning(made: Path) -> None:
    audit = audit_path(made / "run.ckpt")
    assert (audit.exit_code, audit.kind, audit.findings) == (0, "checkpoint of Lightning", [])
    assert audit.facts["written by"] == "Lightning 2.6.0, epoch 1, step 2"
    assert audit.facts["trained in"] == "int8_switchback in 2 layers; bf16-mixed elsewhere"
    assert audit.facts["optimizer 0"].startswith("lq_plugin.optim; 4 tensors in ")
    assert audit.facts["optimizer 0"].endswith("at step 2")
    found = {(row.where, row.format): row for row in audit.rows}
    state = found["optimizer 0", "8 bits, dynamic map"]
    assert (state.tensors, state.values) == (2, 2 * 2 * 64 * 128)
    assert (state.block, state.codes) == ("256, within rows", "dynamic_symmetric, dynamic_unsigned")
    assert found["optimizer 0", "float32"].tensors == 2  # the biases
    assert found["weights", "float32"].tensors == 4


def test_what_was_clipped(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(8, 8))
    optimizer = AdamW8bit([weight], percentile_clipping=50)
    for size in (1.0, 0.5, 4.0, math.nan):
        weight.grad = torch.full((8, 8), size)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    said = audit_path(tmp_path / "optimizer.pt").facts["optimizer, clipping"]
    assert said == "percentile 50; 1 of 3 gradients were clipped, 1 were not finite"


def test_a_checkpoint_without_its_base(made: Path, tmp_path: Path) -> None:
    model = load_pretrained(made / "plain", "nf4", progress=False)
    add_lora(model, LoRAConfig(r=4, target_modules=("q_proj",)))
    state_dict = model.state_dict()
    keep_trained(state_dict, model)
    torch.save({"state_dict": state_dict}, tmp_path / "run.ckpt")
    audit = audit_path(tmp_path / "run.ckpt")
    assert audit.exit_code == 0
    assert audit.facts["frozen base"].startswith("not in the file; the fingerprint of ")
    assert "load the base first" in audit.of("note")[0]
    assert sum(row.tensors for row in audit.rows) == 2  # the factors; the fingerprint is no tensor of the model


def test_the_state_of_an_optimizer(made: Path) -> None:
    audit = audit_path(made / "optimizer.pt")
    assert (audit.exit_code, audit.kind, audit.findings) == (0, "state of an optimizer", [])
    assert audit.readers["lq_plugin.optim"].startswith("yes")
    assert audit.readers["torch.optim"].startswith("no")


def test_the_state_of_other_optimizers(tmp_path: Path) -> None:
    model = nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "torch.pt")
    audit = audit_path(tmp_path / "torch.pt")
    assert audit.facts["optimizer"] == "torch; 2 tensors in 1 groups, at step 1"
    assert audit.readers["torch.optim"] == "yes"
    state = {"step": 7, "state1": torch.zeros(64, 64, dtype=torch.uint8), "absmax1": torch.zeros(16)}
    state |= {"qmap1": torch.linspace(-1, 1, 256)}
    torch.save({"state": {0: state}, "param_groups": [{"params": [0], "lr": 1e-3}]}, tmp_path / "bnb.pt")
    audit = audit_path(tmp_path / "bnb.pt")
    assert audit.facts["optimizer"] == "bitsandbytes; 1 tensors in 1 groups, at step 7"
    assert rows(audit) == {"8 bits of bitsandbytes": ("256, flat", "its dynamic maps", 1)}


def test_a_state_dict_and_a_tensor_file_compare_by_their_names(tmp_path: Path) -> None:
    weight = torch.randn(8, 8)
    torch.save({"model.a.weight": weight}, tmp_path / "a.pt")
    save_file({"a.weight": weight * 1.1}, tmp_path / "a.safetensors")
    audit = audit_path(tmp_path / "a.safetensors", tmp_path / "a.pt")
    assert audit.exit_code == 0
    assert audit.rows[0].worst == (pytest.approx(20.0, abs=1e-4), "a.weight")


# What is broken


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize(
    "name", ["plain/model.safetensors", "run.ckpt", "cache/model.safetensors", "adapter/adapter_model.safetensors"]
)
def test_a_file_cut_short(name: str, share: float, copy: Callable[[str], Path]) -> None:
    root = copy(name.partition("/")[0])
    file = root / name.partition("/")[2] if root.is_dir() else root
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert broken(audit_path(root))


def test_a_flipped_bit_in_a_checkpoint_and_in_an_adapter(copy: Callable[[str], Path]) -> None:
    for path in (copy("run.ckpt"), copy("adapter") / "adapter_model.safetensors"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        assert broken(audit_path(path if path.suffix == ".ckpt" else path.parent))


def test_a_missing_shard(tmp_path: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("plain")
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    half = len(tensors) // 2
    save_file(dict(tensors[:half]), folder / "one.safetensors", metadata={"format": "pt"})
    save_file(dict(tensors[half:]), folder / "two.safetensors", metadata={"format": "pt"})
    names = {name: "one.safetensors" if i < half else "two.safetensors" for i, (name, _) in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert audit_path(folder).exit_code == 0
    save_file({"a": torch.ones(1)}, folder / "three.safetensors")
    assert audit_path(folder).of("note") == ["nobody reads three.safetensors: the index does not name it"]
    (folder / "two.safetensors").unlink()
    assert "two.safetensors are missing" in broken(audit_path(folder))
    (folder / "model.safetensors.index.json").write_text("{")
    assert "is not an index" in broken(audit_path(folder))


def test_tensors_that_are_missing_unknown_and_of_another_shape(copy: Callable[[str], Path]) -> None:
    folder = copy("plain")
    change(folder, lambda t: t.pop("model.norm.weight"))
    assert "1 tensors of LlamaForCausalLM are missing: model.norm.weight" in broken(audit_path(folder))
    change(folder, lambda t: t.update({"model.norm.weight": torch.ones(3), "more": torch.ones(2)}))
    audit = audit_path(folder)
    assert "1 tensors are none of LlamaForCausalLM: more" in broken(audit)
    assert "model.norm.weight is (3,), LlamaForCausalLM has (64,)" in broken(audit)
    assert audit.readers["transformers"] == "no: it is broken"


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("nf4", lambda t: t.pop(f"{Q}.absmax"), "absmax"),
        ("nf4", lambda t: t.pop(f"{Q}.quant_state.bitsandbytes__nf4"), "whose other entries are missing"),
        ("nf4", lambda t: t.pop(Q), "its codes are missing"),
        ("nf4", lambda t: t.update({Q: t[Q][:-1].clone()}), "2047 bytes of codes, and its shape (64, 64) needs 2048"),
        ("nf4", lambda t: t[f"{Q}.absmax"].fill_(math.nan), "NaN or infinities: " + Q),
        ("nf4", lambda t: t[f"{Q}.quant_map"].fill_(0.5), Q),
        ("llm_int8", lambda t: t.pop(Q.replace("weight", "SCB")), Q),
        ("llm_int8", lambda t: t.update({Q.replace("weight", "SCB"): torch.ones(3)}), "beside 3 scales"),
        ("llm_int8", lambda t: t[Q.replace("weight", "weight_format")].fill_(2), "layout of old versions"),
        ("llm_int8", lambda t: t.update({Q: t[Q].float()}), "torch.float32 (64, 64) beside 64 scales; expected int8"),
        ("plain", lambda t: t["model.norm.weight"].fill_(math.inf), "1 tensors hold NaN or infinities"),
    ],
)
def test_a_weight_that_is_not_what_it_says(
    name: str, how: Callable[[Any], Any], said: str, copy: Callable[[str], Path]
) -> None:
    folder = copy(name)
    change(folder, how)
    audit = audit_path(folder)
    assert said in broken(audit)
    assert audit.readers["transformers"].startswith("no")
    assert audit.readers["lq_plugin"] == "no"


def test_a_config_that_says_something_else(copy: Callable[[str], Path]) -> None:
    folder = copy("nf4")
    config = json.loads((folder / "config.json").read_text())
    described = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json has no quantization_config" in broken(audit_path(folder))
    wrong = described | {"load_in_4bit": False, "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": wrong}))
    assert "8-bit layers, and the files hold nf4" in broken(audit_path(folder))
    (folder / "config.json").write_text("[1]")
    assert "holds a list" in broken(audit_path(folder))
    plain = copy("plain")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": described}))
    assert "speaks of quantised layers, and the files hold none" in broken(audit_path(plain))
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "gptq" in unknown(audit_path(plain))


def test_an_unknown_architecture_is_whole_and_is_not_loaded(copy: Callable[[str], Path]) -> None:
    folder = copy("plain")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NewForCausalLM"]}))
    audit = audit_path(folder)
    assert audit.exit_code == 0
    assert "NewForCausalLM" in audit.readers["transformers"]
    assert audit.readers["lq_plugin"] == "no"


def test_a_cache_that_is_not_whole(copy: Callable[[str], Path]) -> None:
    folder = copy("cache")
    frozen = next(folder.glob("frozen*.safetensors"))
    frozen.unlink()
    assert f"{frozen.name} is missing" in broken(audit_path(folder))
    (folder / "complete.json").write_text("{}")
    assert "lists no files" in broken(audit_path(folder))


def test_an_adapter_that_is_not_what_its_config_says(copy: Callable[[str], Path]) -> None:
    folder = copy("adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    assert "r was 4 and is 8" in broken(audit_path(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors")  # as PEFT writes it, without our note
    assert "has rank 4, the config says 8" in broken(audit_path(folder))
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, folder / "adapter_model.safetensors")
    assert "not the other factor" in broken(audit_path(folder))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    assert "IA3" in unknown(audit_path(folder))


def test_a_state_that_does_not_fit_together(tmp_path: Path) -> None:
    for key, value, said in (
        ("scale1", torch.zeros(3, 1), "expected (128, 1)"),
        ("scale1", torch.full((128, 1), math.nan), "scale1 not finite"),
        ("scale1", None, "codes1 without a scale"),
    ):
        saved = checkpoint()
        state = next(s for s in saved["optimizer_states"][0]["state"].values() if "codes1" in s)
        state.pop(key) if value is None else state.update({key: value})
        torch.save(saved, tmp_path / "run.ckpt")
        assert said in broken(audit_path(tmp_path / "run.ckpt"))


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}, "optimizer_states": [{"state": 3, "param_groups": [1]}]},
        {"state_dict": {}, "optimizer_states": 3},
        {"state_dict": [1]},
        {"state_dict": {}, "lq_plugin": 3},
        {"state_dict": {}, "lq_plugin": {"linear": 3}},
        {"state_dict": {"a.SCB": torch.ones(2), "a.weight": torch.ones((), dtype=torch.int8)}},
        {"state_dict": {"lora_base_fingerprint": torch.ones(3, dtype=torch.uint8)}},
        {"state": {0: {"codes1": torch.ones(())}}, "param_groups": [{"params": [0]}]},
    ],
)
def test_contents_of_another_form(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "run.ckpt")
    assert broken(audit_path(tmp_path / "run.ckpt"))


def test_a_record_of_another_version(tmp_path: Path) -> None:
    saved = checkpoint()
    saved["lq_plugin"]["version"] = 99
    saved["optimizer_states"][0]["param_groups"][0]["format_version"] = 98
    torch.save(saved, tmp_path / "run.ckpt")
    said = unknown(audit_path(tmp_path / "run.ckpt"))
    assert "record has version 99" in said
    assert "format_version [98]" in said


# What is not understood, and nothing of it runs


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["run.ckpt", "model.bin"])
def test_nothing_is_unpickled(name: str, tmp_path: Path) -> None:
    attack = Attack(tmp_path / "attacked")
    torch.save({"state_dict": {}, "callbacks": attack}, tmp_path / name)
    assert "Python objects" in unknown(audit_path(tmp_path / name))
    (tmp_path / name).write_bytes(pickle.dumps(attack))
    assert "nothing is unpickled" in unknown(audit_path(tmp_path / name))
    assert "pickle" in unknown(audit_path(tmp_path / name))
    assert not (tmp_path / "attacked").exists()


def test_what_is_something_else(tmp_path: Path) -> None:
    assert "no file or folder" in unknown(audit_path(tmp_path / "nowhere"))
    assert "nothing in it" in unknown(audit_path(tmp_path))
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a.txt", "text")
    assert "none that torch.save wrote" in unknown(audit_path(tmp_path / "a.pt"))
    (tmp_path / "a.txt").write_text("text")
    assert "got a.txt" in unknown(audit_path(tmp_path / "a.txt"))
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    assert "holds a Tensor" in unknown(audit_path(tmp_path / "tensor.pt"))
    torch.save({"epoch": 1}, tmp_path / "numbers.pt")
    assert "no tensors by name" in unknown(audit_path(tmp_path / "numbers.pt"))
    (tmp_path / "run").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "run" / "last.ckpt")
    assert "name one of them, last.ckpt" in unknown(audit_path(tmp_path / "run"))
    (tmp_path / "run" / ".metadata").write_bytes(b"")
    assert "distributed checkpoint" in unknown(audit_path(tmp_path / "run"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text("{}")
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "pytorch_model.bin, which is not read" in unknown(audit_path(tmp_path / "bin"))


def test_a_reference_of_another_model(made: Path, tmp_path: Path) -> None:
    save_file({"other": torch.ones(2)}, tmp_path / "a.safetensors")
    assert "is it the same model" in unknown(audit_path(made / "plain", tmp_path / "a.safetensors"))
    assert "cannot be read" in unknown(audit_path(made / "plain", tmp_path / "nowhere"))
    tensors = load_file(made / "plain" / "model.safetensors")
    tensors.pop("model.norm.weight")
    tensors[Q] = tensors[Q][:5].clone()
    save_file(tensors, tmp_path / "a.safetensors")
    audit = audit_path(made / "plain", tmp_path / "a.safetensors")
    assert audit.exit_code == 0
    different = f"{Q} is (64, 64), and (5, 64) in the reference"
    assert audit.of("note") == ["1 tensors here are not in the reference: model.norm.weight", different]
    # Of a file nothing but the reference says what belongs into it.
    said = broken(audit_path(tmp_path / "a.safetensors", made / "plain"))
    assert "1 tensors of the reference are not here: model.norm.weight" in said
    assert f"{Q} is (5, 64), and (64, 64) in the reference" in said


# The command


def test_the_command_prints_and_exits(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lq_audit([str(made / "nf4"), "--reference", str(made / "plain")]) == 0
    printed = capsys.readouterr().out
    for text in ("transformers model", "NF4", " dB", "The lowest SQNR is", "of its", "bitsandbytes loads it", "Whole."):
        assert text in printed
    assert lq_audit([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().out.rstrip().endswith("Not understood.")
    (tmp_path / "last.ckpt").write_bytes(b"")
    assert lq_audit([str(tmp_path / "last.ckpt")]) == 1
    assert "broken: the file is empty" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 120])
def test_nothing_is_cut_off_in_a_narrow_terminal(
    columns: int, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert lq_audit([str(made / "run.ckpt")]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "dynamic_symmetric," in printed
    assert "dynamic_unsigned" in printed
    assert max(map(len, printed.splitlines())) <= columns


def test_without_transformers_it_says_what_it_does_not_know(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lq_plugin.audit.readers.find_spec", lambda name: None)
    audit = audit_path(made / "nf4")
    assert audit.exit_code == 0
    assert audit.readers["transformers"] == "unknown: transformers and accelerate are not installed here"
    assert audit.readers["bitsandbytes"] == "yes, which is not installed here"


def test_brackets_in_a_name_are_printed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    save_file({"[bold]a[/bold].weight": torch.tensor([math.nan])}, tmp_path / "a.safetensors")
    assert lq_audit([str(tmp_path / "a.safetensors")]) == 1
    assert "hold NaN or infinities: [bold]a[/bold].weight" in capsys.readouterr().out


def test_help_explains_itself() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "lq_plugin.recipes.audit", "--help"], capture_output=True, text=True, check=True
    )
    assert "Exit code 0: whole; 1: broken; 2: not understood." in child.stdout
