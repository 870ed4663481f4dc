"""Files that cross between this project and transformers + bitsandbytes, in both directions, on the CPU."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lq_plugin.checkpoint import export_merged, save_quantized
from lq_plugin.formats import NF4, LLMInt8
from lq_plugin.layers import FrozenLinear
from lq_plugin.loading import load_pretrained

transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

IDS = torch.arange(12).reshape(2, 6)

FORMATS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4_dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "llm_int8": {"load_in_8bit": True},
}


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=100, n_positions=32, **ids)
    return transformers.GPT2LMHeadModel(config)


MODELS = {"llama": llama, "gpt2": gpt2}


@pytest.fixture(autouse=True)
def _quiet_bitsandbytes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Its CPU path looks for kernels on the hub, which is not to be asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    caplog.set_level(logging.ERROR)


@pytest.fixture
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model with random biases in bfloat16, saved by transformers."""
    model = MODELS[request.param]().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def theirs(folder: Path, **options: Any) -> Any:
    """A model that bitsandbytes quantises, or that is quantised already, in transformers."""
    config = {"quantization_config": transformers.BitsAndBytesConfig(**options)} if options else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **config)


def their_weight(layer: Any) -> torch.Tensor:
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    assert isinstance(layer, bnb.nn.Linear4bit)
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def their_layers(model: Any) -> dict[str, Any]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def our_layers(model: Any) -> dict[str, FrozenLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}


def assert_same_weights(ours: Any, other: Any) -> None:
    mine, their = our_layers(ours), their_layers(other)
    assert mine.keys() == their.keys()
    assert mine
    for name, layer in mine.items():
        expected = their_weight(their[name])
        if expected.dtype == torch.float32:  # int8: bitsandbytes multiplies by a rounded 1 / 127
            torch.testing.assert_close(layer.dequantize(torch.float32), expected, rtol=2e-6, atol=0)
        else:
            assert torch.equal(layer.dequantize(expected.dtype), expected), name
        assert (layer.bias is None) == (their[name].bias is None)
        if layer.bias is not None:
            assert torch.equal(layer.bias, their[name].bias)


def assert_same_outputs(ours: Any, other: Any) -> None:
    """Both compute in bfloat16, with other kernels: a few units in its last place, 2^-8 of the largest value."""
    with torch.no_grad():
        mine, expected = ours(IDS).logits.float(), other(IDS).logits.float()
    torch.testing.assert_close(mine, expected, rtol=0, atol=4 * 2**-8 * float(expected.abs().max()))


both_models = pytest.mark.parametrize(
    "plain", ["llama", pytest.param("gpt2", marks=pytest.mark.thorough)], indirect=True
)
every_format = pytest.mark.parametrize(
    "name", ["nf4_dq", "llm_int8", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("nf4", "fp4", "fp4_dq"))]
)


@both_models
@every_format
def test_a_model_that_bitsandbytes_saved_loads_here_with_equal_weights_and_outputs(plain, name, tmp_path):
    other = theirs(plain, **FORMATS[name])
    other.save_pretrained(tmp_path / "saved")
    ours = load_pretrained(tmp_path / "saved", name)
    assert {layer.format.name for layer in our_layers(ours).values()} == {name}
    assert_same_weights(ours, theirs(tmp_path / "saved"))
    assert_same_outputs(ours, theirs(tmp_path / "saved"))


@both_models
@every_format
def test_a_model_that_we_saved_loads_in_bitsandbytes_with_equal_weights_and_outputs(plain, name, tmp_path):
    ours = load_pretrained(plain, name)
    save_quantized(ours, tmp_path / "saved")
    other = theirs(tmp_path / "saved")
    assert_same_weights(ours, other)
    assert_same_outputs(ours, other)


@pytest.mark.parametrize("plain", ["llama"], indirect=True)
@every_format
def test_a_file_that_we_saved_comes_back_to_the_bit(plain, name, tmp_path):
    ours = load_pretrained(plain, name)
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    save_quantized(ours, tmp_path / "saved")
    after = load_pretrained(tmp_path / "saved", name).state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor, after[key]), key
        assert torch.equal(tensor, ours.state_dict()[key]), key


@pytest.mark.parametrize("plain", ["llama"], indirect=True)
def test_the_config_says_what_bitsandbytes_needs(plain, tmp_path):
    ours = load_pretrained(plain, "nf4_dq", skip=["mlp.down_proj"])
    save_quantized(ours, tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "bitsandbytes"
    assert written["load_in_4bit"] is True
    assert written["load_in_8bit"] is False
    assert written["bnb_4bit_quant_type"] == "nf4"
    assert written["bnb_4bit_use_double_quant"] is True
    assert written["bnb_4bit_compute_dtype"] == "bfloat16"
    assert written["llm_int8_skip_modules"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    assert not hasattr(ours.config, "quantization_config")
    assert_same_weights(ours, theirs(tmp_path / "saved"))


@pytest.mark.parametrize("plain", ["llama"], indirect=True)
def test_a_file_in_another_element_type_is_refused_and_named(plain, tmp_path):
    theirs(plain, **FORMATS["nf4_dq"]).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"mlp.down_proj.* is in nf4_dq in the checkpoint, and fp4 was asked for"):
        load_pretrained(tmp_path / "saved", "fp4")
    with pytest.raises(ValueError, match="and llm_int8 was asked for"):
        load_pretrained(tmp_path / "saved", "llm_int8")
    with pytest.raises(ValueError, match="cannot be left in 16 bits"):
        load_pretrained(tmp_path / "saved", "nf4", skip=["up_proj"])
    loaded = load_pretrained(tmp_path / "saved", "nf4")
    assert {layer.format.name for layer in our_layers(loaded).values()} == {"nf4_dq"}


@pytest.mark.parametrize("plain", ["llama"], indirect=True)
def test_a_model_that_bitsandbytes_saved_is_exported_like_any_other(plain, tmp_path):
    theirs(plain, **FORMATS["nf4"]).save_pretrained(tmp_path / "saved")
    ours = load_pretrained(tmp_path / "saved", "nf4", dtype=torch.float32)
    assert {parameter.dtype for parameter in ours.parameters() if parameter.is_floating_point()} == {torch.float32}
    export_merged(ours, tmp_path / "merged", dtype=torch.float32)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plain", ["llama"], indirect=True)
def test_thresholds_and_compute_dtypes_cross(plain, tmp_path):
    theirs(plain, load_in_8bit=True, llm_int8_threshold=2.5).save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs", "llm_int8")
    assert {layer.format for layer in our_layers(ours).values()} == {LLMInt8(2.5)}
    save_quantized(ours, tmp_path / "ours")
    assert {layer.state.threshold for layer in their_layers(theirs(tmp_path / "ours")).values()} == {2.5}
    save_quantized(load_pretrained(plain, NF4(compute=torch.float32)), tmp_path / "wide")
    assert {layer.compute_dtype for layer in their_layers(theirs(tmp_path / "wide")).values()} == {torch.float32}
    back = load_pretrained(tmp_path / "wide", NF4(compute="float16"))
    assert {layer.format for layer in our_layers(back).values()} == {NF4(compute=torch.float16)}


def tampered(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("plain", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("weight.absmax", lambda x: x[:-1].clone(), "absmax must be"),
        ("weight", lambda x: x[:-4].clone(), "number of bytes"),
        ("weight.quant_map", lambda x: x.flip(0).contiguous(), "not the map of"),
        ("weight.quant_state.bitsandbytes__nf4", lambda x: x[:-3].clone(), "JSON object"),
        ("weight.absmax", lambda x: None, "absmax"),
        ("weight.quant_state.bitsandbytes__nf4", lambda x: None, "q_proj"),
    ],
)
def test_tampered_entries_of_a_4_bit_layer_are_errors_that_name_it(plain, entry, value, message, tmp_path):
    theirs(plain, **FORMATS["nf4"]).save_pretrained(tmp_path / "saved")
    key = f"model.layers.0.self_attn.q_proj.{entry}"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        changed = value(tensors.pop(key))
        if changed is not None:
            tensors[key] = changed

    tampered(tmp_path / "saved", change)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(tmp_path / "saved", "nf4")
    assert "self_attn.q_proj" in str(error.value)


@pytest.mark.parametrize("plain", ["llama"], indirect=True)
@pytest.mark.parametrize(("code", "layout"), [(1, "col32"), (2, "col_turing"), (3, "col_ampere")])
def test_the_layouts_of_old_int8_files_are_refused_by_name(plain, code, layout, tmp_path):
    theirs(plain, **FORMATS["llm_int8"]).save_pretrained(tmp_path / "saved")
    key = "model.layers.0.self_attn.q_proj.weight_format"
    tampered(tmp_path / "saved", lambda tensors: tensors.update({key: torch.tensor(code, dtype=torch.uint8)}))
    with pytest.raises(ValueError, match=layout):
        load_pretrained(tmp_path / "saved", "llm_int8")


@pytest.mark.parametrize("plain", ["llama"], indirect=True)
def test_an_int8_weight_without_its_scales_is_an_error(plain, tmp_path):
    theirs(plain, **FORMATS["llm_int8"]).save_pretrained(tmp_path / "saved")
    tampered(tmp_path / "saved", lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.SCB"))
    with pytest.raises(ValueError, match=r"(?s)q_proj.*SCB"):
        load_pretrained(tmp_path / "saved", "llm_int8")


@pytest.mark.parametrize("plain", ["llama"], indirect=True)
def test_a_config_that_speaks_of_layers_that_are_not_quantised_is_an_error(plain, tmp_path):
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its files hold none"):
        load_pretrained(plain, "nf4")
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised with 'gptq'"):
        load_pretrained(plain, "nf4")
