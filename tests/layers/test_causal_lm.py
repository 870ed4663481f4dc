"""The loss without logits is the one that transformers computes from them, whatever the model does to its logits."""

import pytest
import torch

from lq_plugin.layers.causal_lm import causal_lm_loss, check_output_layer, keeps_documents_apart, output_layer

transformers = pytest.importorskip("transformers")

WORDS, TOKENS = 67, 11
TINY = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Phi": {},  # a bias in the output layer
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
    "Mixtral": {"num_local_experts": 4, "output_router_logits": True},
}


def model_of(name: str, **changes):
    config = getattr(transformers, f"{name}Config")(**{**TINY, **MODELS.get(name, {}), **changes})
    return transformers.AutoModelForCausalLM.from_config(config)


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, WORDS, (2, TOKENS))
    labels = tokens.clone()
    labels[:, :4] = -100
    return {"input_ids": tokens, "labels": labels}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own(name):
    model = model_of(name).eval()  # GPT-2 has dropout
    inputs = batch()
    theirs = model(**inputs).loss
    expected = torch.autograd.grad(theirs, list(model.parameters()), allow_unused=True)
    ours = causal_lm_loss(model, chunk=5, **inputs)
    gradients = torch.autograd.grad(ours, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for parameter, got, wanted in zip(model.parameters(), gradients, expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        else:
            assert got is None, tuple(parameter.shape)


@pytest.mark.parametrize("name", MODELS)
def test_the_check_accepts_models_whose_logits_it_computes(name):
    model = model_of(name).train()
    check_output_layer(model)
    assert model.training


def test_the_check_refuses_a_model_that_does_more_to_its_logits():
    model = model_of("Granite")
    model.config.logits_scaling = 8.0
    unexplained = model.forward

    def forward(*args, **kwargs):
        outputs = unexplained(*args, **kwargs)
        outputs.logits = outputs.logits * 3.0
        return outputs

    model.forward = forward
    with pytest.raises(ValueError, match=r"does more to its logits .* whole logits"):
        check_output_layer(model)


def test_each_token_has_its_loss():
    model, inputs = model_of("Llama"), batch()
    losses = causal_lm_loss(model, reduction="none", **inputs)
    assert losses.shape == (2, TOKENS - 1)
    assert not losses[:, :3].any()
    torch.testing.assert_close(losses.sum() / (2 * (TOKENS - 4)), causal_lm_loss(model, **inputs))


@pytest.mark.parametrize("name", MODELS)
def test_documents_in_a_row_are_kept_apart_by_their_positions(name):
    assert keeps_documents_apart(model_of(name))


def test_a_model_that_lets_documents_see_each_other_is_recognised():
    assert not keeps_documents_apart(model_of("OPT", ffn_dim=48, word_embed_proj_dim=32))


def test_gradients_of_a_document_do_not_depend_on_its_neighbour():
    model = model_of("Llama")
    tokens = torch.randint(3, WORDS, (1, 10))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    labels = tokens.clone()
    labels[:, :5] = -100  # a loss in the second document, but on its first token
    other = tokens.clone()
    other[:, :4] = tokens[:, :4].flip(1) + 1
    parameters = [p for name, p in model.named_parameters() if "embed" not in name]

    def gradients(x, y, **positions_or_none):
        return torch.autograd.grad(causal_lm_loss(model, x, y, **positions_or_none), parameters)

    packed = gradients(tokens, labels, position_ids=positions)
    beside_another = gradients(other % WORDS, labels, position_ids=positions)
    alone = gradients(tokens[:, 4:], labels[:, 4:])
    for first, second, third in zip(packed, beside_another, alone, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, third, rtol=0, atol=1e-6)


def test_an_output_layer_that_is_no_plain_linear_is_named():
    model = model_of("Llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match="output layer of LlamaForCausalLM is a Sequential"):
        output_layer(model)
    with pytest.raises(TypeError, match="expected a transformers causal language model, got a Linear"):
        causal_lm_loss(torch.nn.Linear(2, 2), **batch())
