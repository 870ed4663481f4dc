"""Merged and quantised models on their way into folders, which appear whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lq_plugin import convert
from lq_plugin.adapters import lora_layers, merge_lora
from lq_plugin.checkpoint import export_merged, save_quantized
from lq_plugin.formats import NF4, LLMInt8
from lq_plugin.loading import load_pretrained, load_weights
from lq_plugin.lora_config import LoRAConfig
from lq_plugin.new_folder import new_folder
from lq_plugin.safetensors_files import TensorFiles
from lq_plugin.safetensors_shards import ShardWriter, size_in_bytes

IDS = torch.arange(12).reshape(2, 6)


def llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **options)
    return transformers.LlamaForCausalLM(config).eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))


def adapt(model: nn.Module, **options: Any) -> nn.Module:
    """Frozen in NF4 with LoRA whose B is not zero."""
    convert(model, NF4(block_size=32), lora=LoRAConfig(r=4, **options))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A, std=0.1)
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def contents(folder: Path) -> set[str]:
    """What is in a folder, without what other tests keep beside it."""
    return {path.name for path in folder.iterdir()}


# export_merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merged", [False, True])
def test_a_merged_weight_is_the_base_read_back_and_the_change(tmp_path, dtype, merged):
    model = adapt(mlp(), use_rslora=True, lora_alpha=3)
    base, layer = model[0].base_layer, model[0]
    expected = base.dequantize().double() + 3 / 4**0.5 * layer.lora_B.double() @ layer.lora_A.double()
    if merged:
        merge_lora(model)
        expected = base.dequantize().double()  # quantised anew
    export_merged(model, tmp_path / "out", dtype=dtype)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == {"0.weight", "0.bias", "2.weight"}
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    # one rounding to dtype of a sum in float32
    torch.testing.assert_close(written["0.weight"].double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_any_module_comes_back_from_its_export(tmp_path):
    model = adapt(mlp())
    x = torch.randn(3, 64)
    expected = model(x)
    export_merged(model, tmp_path / "out", dtype=torch.float32)
    assert contents(tmp_path / "out") == {"model.safetensors"}
    with torch.device("meta"):
        back = mlp()
    load_weights(back, tmp_path / "out", None)
    torch.testing.assert_close(back(x), expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_model_is_exported_as_the_model_it_was(tmp_path):
    model = adapt(mlp())
    export_merged(torch.compile(model, backend="eager"), tmp_path / "compiled")
    export_merged(model, tmp_path / "plain")
    written = [load_file(tmp_path / name / "model.safetensors") for name in ("compiled", "plain")]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


def test_shards_stay_below_their_size_and_the_index_finds_all(tmp_path):
    export_merged(adapt(llama()), tmp_path / "out", max_shard_size="40KB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name[-13:] for file in files] == [f"{len(files):05d}.safetensors"[-13:] for _ in files]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = TensorFiles.of(tmp_path / "out").tensors
    assert index["weight_map"] == {name: info.file.name for name, info in found.items()}
    sizes = {file: sum(x.numel() * x.itemsize for x in load_file(file).values()) for file in files}
    assert all(size <= 40_000 for size in sizes.values())
    assert index["metadata"]["total_size"] == sum(sizes.values())


def test_the_model_and_its_config_stay_what_they_are(tmp_path):
    model = adapt(llama())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, classes = model.config.to_json_string(), [type(module) for module in model.modules()]
    with torch.no_grad():
        expected = model(IDS).logits
        export_merged(model, tmp_path / "out", dtype=torch.float16)
        assert torch.equal(model(IDS).logits, expected)
    assert model.config.to_json_string() == config
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_the_tokenizer_and_the_generation_config_come_along(tmp_path):
    llama().save_pretrained(tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"):
        (tmp_path / "plain" / name).write_text(f"{{}} {name}")
    (tmp_path / "plain" / "training_args.bin").write_bytes(b"not this")
    (tmp_path / "plain" / "tokenizer.pkl").write_bytes(b"nor this")
    model = load_pretrained(tmp_path / "plain", NF4(block_size=32))
    export_merged(model, tmp_path / "merged")
    save_quantized(model, tmp_path / "quantized")
    expected = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"}
    for folder in ("merged", "quantized"):
        assert contents(tmp_path / folder) == expected | {"config.json", "generation_config.json", "model.safetensors"}
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{} tokenizer.json"


def test_tied_embeddings_are_written_once(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = adapt(llama(tie_word_embeddings=True))
    export_merged(model, tmp_path / "out", dtype=torch.float32)
    assert "lm_head.weight" not in TensorFiles.of(tmp_path / "out").tensors
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert torch.equal(back.lm_head.weight, model.lm_head.weight)


def test_an_adapter_on_one_side_of_a_tie_cannot_be_merged(tmp_path):
    model = adapt(llama(tie_word_embeddings=True), target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match=r"are one weight, and only one of them has an adapter"):
        export_merged(model, tmp_path / "out")
    assert not contents(tmp_path)


def test_what_transformers_keeps_in_float32_and_buffers_stay(tmp_path):
    model = llama()
    model._keep_in_fp32_modules_strict = {"input_layernorm"}
    model.model.register_buffer("counted", torch.ones(3))
    export_merged(model, tmp_path / "out", dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    wide = {name for name, tensor in written.items() if tensor.dtype == torch.float32}
    assert wide == {"model.counted", *(f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))}


def test_a_model_from_the_cache_is_exported_as_one_from_its_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "plain")
    for name in ("first", "second"):
        model = load_pretrained(tmp_path / "plain", "nf4", cache=tmp_path / "cache")
        export_merged(model, tmp_path / name, dtype=torch.float32)
    plain, first, second = (load_file(tmp_path / x / "model.safetensors") for x in ("plain", "first", "second"))
    assert plain.keys() == first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_folder_with_something_in_it_is_left_as_it_is(tmp_path):
    model = adapt(mlp())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is left as it is"):
        export_merged(model, tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is left as it is"):
        export_merged(model, tmp_path / "file")
    with pytest.raises(FileExistsError), new_folder(tmp_path / "out"):
        pytest.fail("a folder that cannot be taken is filled in vain")
    assert contents(tmp_path) == {"out", "file"}
    assert contents(tmp_path / "out") == {"mine.txt"}
    (tmp_path / "empty").mkdir()
    export_merged(model, tmp_path / "empty")
    assert contents(tmp_path / "empty") == {"model.safetensors"}


def test_a_broken_adapter_leaves_nothing_behind(tmp_path):
    model = adapt(llama())
    model.model.layers[1].mlp.down_proj.lora_B.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.weight is not finite"):
        export_merged(model, tmp_path / "out", max_shard_size="30KB")
    assert not contents(tmp_path)


def test_a_weight_that_its_new_dtype_cannot_hold_is_an_error(tmp_path):
    model = mlp()
    nn.init.constant_(model[0].bias, 1e6)
    with pytest.raises(ValueError, match=r"0.bias is not finite in torch.float16"):
        export_merged(model, tmp_path / "out", dtype=torch.float16)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_adapters_of_another_library_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"q_proj.* an adapter of another library.*merge_and_unload"):
        export_merged(model.get_base_model(), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "bfloat16"])
def test_only_float_dtypes_are_written(tmp_path, dtype):
    with pytest.raises(ValueError, match="export_merged writes"):
        export_merged(mlp(), tmp_path / "out", dtype=dtype)


@pytest.mark.parametrize(("size", "expected"), [(7, 7), ("12", 12), ("5GB", 5 * 10**9), ("2 kb", 2000)])
def test_sizes_are_read(size, expected):
    assert size_in_bytes(size) == expected


@pytest.mark.parametrize("size", [0, -1, "5 apples", "GB", 1.5])
def test_sizes_that_are_none_are_errors(size, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size"):
        export_merged(mlp(), tmp_path / "out", max_shard_size=size)
    assert not contents(tmp_path)


def test_a_view_is_written_without_its_neighbours(tmp_path):
    writer = ShardWriter(tmp_path)
    whole = torch.arange(1000.0).reshape(10, 100)
    writer.add("row", whole[3])
    writer.add("column", whole[:, 3])
    writer.finish()
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written["row"], whole[3])
    assert torch.equal(written["column"], whole[:, 3])
    assert (tmp_path / "model.safetensors").stat().st_size < 1000


# save_quantized


def test_what_bitsandbytes_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    padded = llama()
    convert(padded, "nf4")
    with pytest.raises(ValueError, match=r"down_proj' cannot be saved for bitsandbytes: .*block sizes that fit: 32"):
        save_quantized(padded, tmp_path / "out")
    with pytest.raises(ValueError, match=r"LoRA layers.*save_adapter.*export_merged"):
        save_quantized(adapt(llama()), tmp_path / "out")
    with pytest.raises(ValueError, match="no frozen layer"):
        save_quantized(llama(), tmp_path / "out")
    mixed = llama()
    convert(mixed, {"*.mlp.*": "llm_int8", "*": NF4(block_size=32)})
    with pytest.raises(ValueError, match="4-bit and 8-bit layers"):
        save_quantized(mixed, tmp_path / "out")
    thresholds = llama()
    convert(thresholds, {"*.mlp.*": LLMInt8(3.0), "*": LLMInt8(6.0)})
    with pytest.raises(ValueError, match=r"thresholds \[3.0, 6.0\]"):
        save_quantized(thresholds, tmp_path / "out")
    plain = mlp()
    convert(plain, "nf4")
    with pytest.raises(TypeError, match="takes a transformers model, got Sequential"):
        save_quantized(plain, tmp_path / "out")
    assert not contents(tmp_path)


def test_fused_experts_are_saved_as_they_are_read_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100}
    config = transformers.MixtralConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, bos_token_id=0, eos_token_id=0
    )
    model = transformers.MixtralForCausalLM(config).eval()
    convert(model, NF4(block_size=32))
    save_quantized(model, tmp_path / "out")
    back = load_pretrained(tmp_path / "out", NF4(block_size=32))
    assert type(back.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    with torch.no_grad():
        torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


# What torch.compile wraps


def test_a_model_with_compiled_layers_is_written_under_the_names_of_its_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = llama()
    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = torch.compile(layer, backend="aot_eager")
    adapt(model)
    with torch.no_grad():
        expected = model(IDS).logits
    export_merged(model, tmp_path / "merged", dtype=torch.float32)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_quantised_model_with_compiled_layers_is_read_back(tmp_path):
    model = llama()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="aot_eager")
    convert(model, NF4(block_size=32))
    save_quantized(model, tmp_path / "out")
    back = load_pretrained(tmp_path / "out", "nf4", progress=False)
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, model(IDS).logits)
