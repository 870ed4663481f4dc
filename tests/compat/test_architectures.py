"""Tiny random models of many architectures, taken from files through freezing, training, saving and back to files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lq_plugin import convert
from lq_plugin.adapters import load_adapter, save_adapter
from lq_plugin.checkpoint import export_merged
from lq_plugin.conversion import Conversion
from lq_plugin.formats import NF4
from lq_plugin.loading import load_pretrained
from lq_plugin.lora_config import LoRAConfig
from lq_plugin.safetensors_files import TensorFiles

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

IDS = torch.arange(1, 25).reshape(2, 12)
NF4_32 = NF4(block_size=32)  # the hidden size: whole blocks, as export to bitsandbytes asks for
LEAST_SHARE = 0.95
HIDDEN = 32

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", _COMMON),
    "Mistral": ("MistralForCausalLM", _COMMON),
    "Qwen2": ("Qwen2ForCausalLM", _COMMON | {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3ForCausalLM", _COMMON | {"head_dim": 8}),
    "Gemma": ("GemmaForCausalLM", _COMMON | {"head_dim": 8}),
    "Phi": ("PhiForCausalLM", _COMMON | {"num_key_value_heads": 4}),
    "GPT-2": (
        "GPT2LMHeadModel",
        {
            "n_embd": HIDDEN,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "vocab_size": 100,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "resid_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
    ),
    "Mixtral": ("MixtralForCausalLM", _COMMON | _EXPERTS | {"num_local_experts": 4}),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        _COMMON | _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8},
    ),
    "gpt-oss": ("GptOssForCausalLM", _COMMON | _EXPERTS | {"num_local_experts": 4, "head_dim": 8}),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        _COMMON
        | _EXPERTS
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}
_FAST = ("Llama", "Mixtral")


@pytest.fixture(scope="module")
def shares() -> Iterator[dict[str, tuple[int, int]]]:
    """Quantised and all weights of each architecture, printed as a table when all of them are through."""
    found: dict[str, tuple[int, int]] = {}
    yield found
    lines = [
        f"{name:12} {quantized:8,} of {weights:8,} {quantized / weights:8.1%}"
        for name, (quantized, weights) in found.items()
    ]
    print("", "weights in linears, Conv1D and fused experts that are quantised", *lines, sep="\n")


@pytest.fixture(
    params=[name if name in _FAST else pytest.param(name, marks=pytest.mark.thorough) for name in ARCHITECTURES]
)
def plain(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """The name of an architecture and a random model of it, whose biases and routers are not zero."""
    class_name, options = ARCHITECTURES[request.param]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return request.param, model


def weights_to_quantize(model: Any) -> dict[str, int]:
    """Elements of each linear, Conv1D and fused expert weight by name, counted from the plain model.

    Left out are the output embedding and routers, which always are; routers of these models are parameters (`gate`,
    `router`) of modules of their own, no linear layers.
    """
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D):
            found[name] = module.weight.numel()
        found |= {f"{name}.{key}": p.numel() for key, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return found


def quantized(conversion: Conversion) -> set[str]:
    return {layer.name for layer in conversion.converted}


def lora() -> LoRAConfig:
    return LoRAConfig(r=4, lora_alpha=8)


def train_a_step(model: Any) -> None:
    """One step of AdamW, large enough to change every output."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(2):  # with B = 0 the first gradient of A is zero
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def test_a_model_goes_from_files_through_training_and_back(plain, shares, tmp_path: Path):
    name, model = plain
    model.save_pretrained(tmp_path / "plain")
    expected = weights_to_quantize(model)
    original = logits(model)

    conversion = convert(model, NF4_32, lora=lora())
    reached = sum(count for key, count in expected.items() if key in quantized(conversion))
    shares[name] = (reached, sum(expected.values()))
    assert reached / sum(expected.values()) >= LEAST_SHARE, sorted(expected.keys() - quantized(conversion))
    frozen = logits(model)
    assert not torch.equal(frozen, original)

    train_a_step(model.train())
    trained = logits(model)
    assert (trained - frozen).abs().max() > 0.01
    save_adapter(model, tmp_path / "adapter")

    loaded = load_pretrained(tmp_path / "plain", NF4_32)
    assert torch.equal(logits(loaded), frozen), "freezing while loading gives what freezing the loaded model gave"
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded), trained)

    before = {key: tensor.clone() for key, tensor in loaded.state_dict().items()}
    export_merged(loaded, tmp_path / "merged", dtype=torch.float32, max_shard_size="20KB")
    assert torch.equal(logits(loaded), trained)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in before.items())

    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert type(back).__name__ == ARCHITECTURES[name][0]
    # float32 sums in another order: the change of LoRA is in the weight now
    torch.testing.assert_close(logits(back), trained, rtol=1e-3, atol=1e-4)
    assert layout(tmp_path / "merged") == layout(tmp_path / "plain")


@pytest.mark.parametrize("name", ["Mixtral", pytest.param("gpt-oss", marks=pytest.mark.thorough)])
def test_adapters_of_fused_experts_are_merged_into_them(name, tmp_path: Path):
    class_name, options = ARCHITECTURES[name]
    model = getattr(transformers, class_name)(getattr(transformers, class_name).config_class(**options))
    config = LoRAConfig(
        r=4, target_modules=("o_proj",), target_parameters=("experts.gate_up_proj", "experts.down_proj")
    )
    convert(model, NF4_32, lora=config)
    frozen = logits(model)
    train_a_step(model.train())
    trained = logits(model)
    assert (trained - frozen).abs().max() > 0.01
    export_merged(model, tmp_path / "merged", dtype=torch.float32)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(back), trained, rtol=1e-3, atol=1e-4)


def layout(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder."""
    return {name: info.shape for name, info in TensorFiles.of(folder).tensors.items()}
