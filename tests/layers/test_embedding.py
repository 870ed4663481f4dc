"""Frozen embeddings read the rows that they stand for, and can be saved; StableEmbedding is what its paper says."""

import copy
import pickle

import pytest
import torch
from frozen_reference import four_bit_weight, int8_weight
from torch import nn

import lq_plugin.optim
from lq_plugin.formats import FORMATS, NF4
from lq_plugin.layers import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    FrozenEmbedding,
    StableEmbedding,
)

NAMES = ["nf4", "nf4_dq", "fp4", "fp4_dq", "llm_int8"]


def frozen(name: str, dim: int = 64) -> FrozenEmbedding:
    return FrozenEmbedding.frozen_from(nn.Embedding(37, dim), FORMATS[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [64, 50])
def test_tokens_read_the_rows_of_the_table_in_the_state_dict(name: str, dim: int) -> None:
    layer = frozen(name, dim)
    table = int8_weight(layer.state_dict()) if name == "llm_int8" else four_bit_weight(layer.state_dict())[:, :dim]
    ids = torch.randint(37, (2, 3, 5))
    torch.testing.assert_close(layer(ids).double(), table[ids], rtol=1e-6, atol=1e-7)
    assert layer(torch.empty(0, 4, dtype=torch.long)).shape == (0, 4, dim)
    torch.testing.assert_close(layer.dequantize().double(), table, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [64, 50])
def test_a_frozen_embedding_can_be_saved_and_loaded(name: str, dim: int) -> None:
    layer, other = frozen(name, dim), frozen(name, dim)
    other.load_state_dict(layer.state_dict())
    empty = copy.deepcopy(layer).to("meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    ids = torch.arange(37)
    for loaded in (other, pickle.loads(pickle.dumps(layer)), empty.to_empty(device="cpu") if False else other):
        assert torch.equal(loaded(ids), layer(ids))
    other.load_state_dict(nn.Embedding(37, dim).state_dict())
    assert not torch.equal(other(ids), layer(ids))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


@pytest.mark.parametrize("name", NAMES)
def test_casts_change_the_output_and_not_the_table(name: str) -> None:
    layer = frozen(name)
    before, ids = layer.dequantize(torch.float32), torch.arange(5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert layer.to(dtype)(ids).dtype == dtype
        assert torch.equal(layer.dequantize(torch.float32), before)
    assert layer.type(torch.float16)(ids).dtype == torch.float16
    assert torch.equal(layer.dequantize(torch.float32), before)


def test_constructors_have_the_arguments_of_bitsandbytes() -> None:
    assert Embedding4bit(5, 64, torch.float16, "nf4").format == NF4()
    assert Embedding4bit(5, 64, torch.float16)(torch.tensor([1])).dtype == torch.float16
    assert EmbeddingNF4(5, 64, block_size=32).format == NF4(32)
    assert EmbeddingFP4(5, 64).format.name == "fp4"
    assert Embedding8bit(5, 64, dtype=torch.bfloat16)(torch.tensor([1])).dtype == torch.bfloat16
    assert torch.equal(Embedding4bit(5, 64, padding_idx=2)(torch.tensor(2)), torch.zeros(64))
    assert isinstance(EmbeddingNF4(5, 64), nn.Embedding)
    assert not any(p.requires_grad for p in EmbeddingNF4(5, 64).parameters())
    assert Embedding4bit(5, 64, quant_storage=torch.bfloat16).state_dict()["weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"max_norm=1.0 changes rows"):
        FrozenEmbedding.frozen_from(nn.Embedding(5, 64, max_norm=1.0), NF4())
    with pytest.raises(IndexError):
        EmbeddingNF4(5, 64)(torch.tensor([5]))


def test_stable_embedding_starts_from_xavier_and_normalises() -> None:
    layer = StableEmbedding(1000, 64, padding_idx=3)
    bound = (6 / 1064) ** 0.5
    assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert torch.equal(layer.weight[3], torch.zeros(64))
    ids = torch.randint(4, 1000, (2, 7))
    expected = nn.functional.layer_norm(layer.weight[ids], (64,), layer.norm.weight, layer.norm.bias)
    torch.testing.assert_close(layer(ids), expected)
    layer(ids).sum().backward()
    assert layer.weight.grad is not None
    assert layer.norm.weight.grad is not None
    half = StableEmbedding(10, 64, dtype=torch.bfloat16)
    assert half(torch.tensor([1])).dtype == torch.bfloat16
    assert StableEmbedding(10, 64).half()(torch.tensor([1])).dtype == torch.float16


def test_embedding_starts_from_xavier_and_keeps_its_state_in_32_bits() -> None:
    layer = Embedding(512, 64)
    assert layer.weight.abs().max() <= (6 / 576) ** 0.5
    model = nn.Sequential(layer, nn.Linear(64, 64))
    lq_plugin.convert(model)
    optimizer = lq_plugin.optim.AdamW8bit(model.named_parameters(), min_8bit_size=16)
    optimizer.mark_embeddings([layer.weight])
    model(torch.arange(8)).sum().backward()
    optimizer.step()
    kinds = {state.dtype for state in optimizer.state[layer.weight].values() if state.ndim == 2}
    assert kinds == {torch.float32}
