"""Adapters between PEFT and us, both ways, on models that transformers builds: equal tensors, equal outputs."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lq_plugin import convert
from lq_plugin.adapters import add_lora, load_adapter, lora_layers, merge_lora, save_adapter
from lq_plugin.layers import Linear4bit
from lq_plugin.layers.frozen import FrozenWeight
from lq_plugin.structure import named_modules

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]

VOCABULARY = 61
IDS = torch.arange(18).view(2, 9)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def classifier() -> nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(llama().config)
    config.num_labels, config.pad_token_id = 3, 0
    return transformers.LlamaForSequenceClassification(config).eval()


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "all linears": (llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "ranks and rsLoRA": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
            "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 3},
        },
    ),
    "DoRA": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "DoRA of Conv1D": (gpt2, {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "all biases": (gpt2, {"target_modules": ["c_attn", "c_proj"], "bias": "all", "fan_in_fan_out": True}),
    "biases of layers": (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "saved whole": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "one layer": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "excluded": (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]}),
    "expression": (llama, {"target_modules": r".*layers\.1.*\.(q|v)_proj"}),
    "classifier": (classifier, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
}


def config_of(case: str) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=6, **CASES[case][1])


def shake(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("case", CASES)
def test_our_adapters_load_in_peft(case: str, tmp_path: Path) -> None:
    build, _ = CASES[case]
    model = build()
    add_lora(model, config_of(case))
    save_adapter(shake(model), tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), logits(model))
    assert not torch.allclose(logits(model), logits(build()))


@pytest.mark.parametrize("case", CASES)
def test_their_adapters_load_here(case: str, tmp_path: Path) -> None:
    build, _ = CASES[case]
    theirs = shake(peft.get_peft_model(build(), config_of(case)))
    theirs.save_pretrained(tmp_path / "a")
    model = build()
    load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(logits(model.eval()), logits(theirs))
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    merge_lora(model)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)


def test_peft_finds_our_layers_and_no_others_that_end_alike(tmp_path: Path) -> None:
    """`a` is also the end of another name, for which PEFT would take it."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "x": nn.ModuleDict({"a": nn.Linear(4, 4)})})
    original = copy.deepcopy(model)
    add_lora(model, {"r": 2, "target_modules": "a|nothing"})
    save_adapter(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(original, tmp_path / "a")
    adapted = {name.partition(".lora_")[0] for name, _ in theirs.named_parameters() if ".lora_" in name}
    assert adapted == {"base_model.model.a"}


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.MixtralForCausalLM(config).eval()


def gpt_oss() -> nn.Module:
    """Its experts keep their weights as (E, I, O), and have biases."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.GptOssForCausalLM(config).eval()


def thawed(model: nn.Module, like: nn.Module) -> nn.Module:
    """`like` with the weights that the quantised model has."""
    read = {name: module.dequantize() for name, module in named_modules(model) if isinstance(module, FrozenWeight)}
    for name, weight in read.items():
        module = like.get_submodule(name) if name in dict(like.named_modules()) else None
        target = like.get_parameter(name) if module is None else module.weight
        target.data.copy_(weight if target.shape == weight.shape and not is_transposed(like, name) else weight.mT)
    return like


def is_transposed(model: nn.Module, name: str) -> bool:
    return bool(getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False))


PROJECTIONS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("names", [PROJECTIONS, PROJECTIONS[:1], PROJECTIONS[1:]], ids=str)
@pytest.mark.parametrize("build", [mixtral, gpt_oss])
def test_adapters_of_experts_go_both_ways(build: Callable[[], nn.Module], names: list[str], tmp_path: Path) -> None:
    ours, targets = build(), {"target_modules": ["q_proj"], "target_parameters": names}
    convert(ours, "nf4", lora={"r": 4, "lora_dropout": 0.1, **targets})
    save_adapter(shake(ours), tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(thawed(ours, build()), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "b")
    fresh = build()
    convert(fresh, "nf4")
    load_adapter(fresh, tmp_path / "b")
    assert torch.equal(logits(fresh.eval()), logits(ours))


def factors(model: nn.Module) -> list[Tensor]:
    """A, B (and lengths) by layer, in ours and in PEFT's model."""
    found = []
    for module in model.modules():
        if hasattr(module, "base_layer"):
            for name in ("lora_A", "lora_B", "lora_magnitude", "lora_magnitude_vector"):
                value = getattr(module, name, None)
                if isinstance(value, nn.ModuleDict) and "default" in value:
                    value = value["default"].weight
                if isinstance(value, Tensor):
                    found.append(value)
    return found


def trained_on(model: nn.Module, steps: int = 4) -> list[float]:
    """The losses of a few steps of AdamW with dropout drawn from one seed."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        torch.manual_seed(100 + step)
        ids = torch.randint(0, VOCABULARY, (2, 16))
        loss = model.train()(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


CONVERTED = [
    (llama, "nf4", False),
    (gpt2, "nf4_dq", False),
    (llama, "llm_int8", False),
    (gpt2, "llm_int8", False),
    (llama, "int8_switchback", False),
    (llama, "int8_switchback", True),
    (llama, "nf4", True),
    (gpt2, "nf4", True),
    (llama, "llm_int8", True),
]


@pytest.mark.parametrize(("build", "format", "dora"), CONVERTED)
def test_peft_trains_what_we_converted_as_we_do(build: Callable[[], nn.Module], format: str, dora: bool) -> None:
    """Same A and B, same data, same dropout: the arithmetic is the same up to the order of float32 sums.

    DoRA goes without dropout: PEFT's drops the input of a product with the weight as well.
    With int8 an ulp of an input may move a code, so its losses may differ by a code's step.
    """
    names = ["q_proj", "up_proj", "down_proj"] if build is llama else ["c_attn", "c_fc"]
    config = peft.LoraConfig(r=4, target_modules=names, lora_dropout=0.0 if dora else 0.1, use_dora=dora)
    ours, base = build(), build()
    convert(ours, format, partial=True)
    convert(base, format, partial=True)
    add_lora(ours, config)
    theirs = peft.get_peft_model(base, config)
    share_factors(ours, theirs)
    torch.testing.assert_close(logits(theirs.eval()), logits(ours.eval()), rtol=1e-3, atol=1e-4)
    a, b = trained_on(ours), trained_on(theirs)
    assert a == pytest.approx(b, rel=1e-3 if "int8" in format else 1e-5)
    assert a[-1] != a[0]


@pytest.mark.parametrize("format", ["nf4", "fp4", "nf4_dq"])
def test_qlora_trains_as_with_peft_and_bitsandbytes(format: str) -> None:
    """bitsandbytes' own layers on the CPU with our codes, A, B and data: losses differ by rounding only."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    ours, theirs = llama(), llama()
    convert(ours, format)
    for name, layer in list(ours.named_modules()):
        if isinstance(layer, Linear4bit):
            parent, _, child = name.rpartition(".")
            setattr(theirs.get_submodule(parent), child, of_bitsandbytes(layer))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    add_lora(ours, config)
    theirs = peft.get_peft_model(theirs, config)
    share_factors(ours, theirs)
    a, b = trained_on(ours, 6), trained_on(theirs, 6)
    assert a == pytest.approx(b, rel=1e-4)
    assert a[-1] != a[0]


def of_bitsandbytes(layer: Linear4bit) -> nn.Module:
    """bitsandbytes' layer with the codes of ours, taken from our state_dict."""
    nn4bit = pytest.importorskip("bitsandbytes").nn
    state = layer.state_dict()
    theirs = nn4bit.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32)
    entries = {key: value for key, value in state.items() if key.startswith("weight.")}
    theirs.weight = nn4bit.Params4bit.from_prequantized(state["weight"], entries, device="cpu")
    return theirs


def share_factors(ours: nn.Module, theirs: nn.Module) -> None:
    for mine, other in zip(factors(ours), factors(theirs), strict=True):
        other.data.copy_(mine.data)


def test_hugging_faces_trainer_trains_a_model_that_we_converted(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = llama()
    convert(model, "nf4", lora={"r": 4, "target_modules": "all-linear"})
    before = copy.deepcopy({n: p for n, p in model.named_parameters() if not p.requires_grad})
    torch.manual_seed(1)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 7, (32, 12))]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        max_steps=20,
        learning_rate=2e-2,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_steps=10,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]  # the frozen random head leaves no more
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert (tmp_path / "checkpoint-20").is_dir()
    resumed = llama()
    convert(resumed, "nf4", lora={"r": 4, "target_modules": "all-linear"})
    transformers.Trainer(model=resumed, args=arguments, train_dataset=data).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-10")
    )
    for name, layer in lora_layers(model).items():
        assert torch.equal(lora_layers(resumed)[name].lora_B, layer.lora_B), name
