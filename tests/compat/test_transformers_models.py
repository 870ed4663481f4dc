"""What transformers does with a model that convert() froze: flash attention's dtype, and save_pretrained."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import lq_plugin
from lq_plugin.lora_config import LoRAConfig

transformers = pytest.importorskip("transformers")
IDS = torch.arange(12).reshape(2, 6)


def mixtral() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()


def test_flash_attention_does_not_cast_to_the_dtype_of_the_codes() -> None:
    from transformers.integrations.flash_attention import get_target_dtype

    model = mixtral().to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    attention, query = model.model.layers[0].self_attn, torch.zeros(1)
    before = get_target_dtype(query, attention)
    lq_plugin.convert(model, "nf4")
    assert get_target_dtype(query, attention) == before == torch.bfloat16


def test_a_model_with_frozen_experts_is_saved_as_its_state_dict(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = mixtral()
    lq_plugin.convert(model, "nf4", lora=LoRAConfig(r=2))
    model.save_pretrained(tmp_path / "saved")
    saved, expected = load_file(tmp_path / "saved" / "model.safetensors"), model.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)
    assert "_is_quantized" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("loaded", [False, True])
def test_its_export_has_the_names_of_the_files_nevertheless(loaded: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plain = mixtral()
    plain.save_pretrained(tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain") if loaded else plain
    lq_plugin.convert(model, "nf4")
    copied = copy.deepcopy(model)
    for place, exported in enumerate((model, copied)):
        lq_plugin.export_merged(exported, tmp_path / str(place), dtype=torch.float32)
        written = load_file(tmp_path / str(place) / "model.safetensors")
        assert written.keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()
    model.save_pretrained(tmp_path / "after")  # the export has put the names back
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "0")
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_the_functions_of_files_are_public_names() -> None:
    for name in ("load_pretrained", "load_weights", "export_merged", "save_quantized"):
        assert name in lq_plugin.__all__
        assert callable(getattr(lq_plugin, name))
