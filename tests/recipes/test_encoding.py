"""Which tokens are learned: answers as the chat template writes them, never prompts."""

import pytest

from lq_plugin.recipes.tasks.encoding import Encoded, Encoder, cut
from lq_plugin.recipes.tasks.samples import Dialogue, Text

pytest.importorskip("transformers")

TURNS = Dialogue(
    (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is it ?"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "the number ?"},
        {"role": "assistant", "content": "two"},
    )
)
# Writes thoughts before the last answer only, as Qwen 3 does.
DROPS_THOUGHTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
)
OPENS_THOUGHTS = DROPS_THOUGHTS.replace("<|assistant|>{% endif %}", "<|assistant|><think>hm{% endif %}")


def texts(encoder: Encoder, encoded: Encoded) -> tuple[str, str]:
    """The whole text, and what of it is learned."""
    learned = [token for token, counts in zip(encoded.tokens, encoded.counted, strict=True) if counts]
    return encoder.tokenizer.decode(encoded.tokens), encoder.tokenizer.decode(learned)


def test_answers_are_learned_with_the_token_that_ends_them(make_tokenizer):
    encoder = Encoder(make_tokenizer())
    (encoded,) = encoder.encode(TURNS)
    whole, learned = texts(encoder, encoded)
    assert whole == (
        "<|system|>be brief<|end|><|user|>what is it ?<|end|><|assistant|>blue<|end|>"
        "<|user|>the number ?<|end|><|assistant|>two<|end|>"
    )
    assert learned == "blue<|end|>two<|end|>"


def test_the_prompt_of_an_answer_is_what_stood_before_it_in_training(make_tokenizer):
    encoder = Encoder(make_tokenizer())
    (encoded,) = encoder.encode(TURNS)
    prompt = encoder.prompt(list(TURNS.messages[:-1]))
    assert encoded.tokens[: len(prompt)] == prompt
    assert all(encoded.counted[len(prompt) :])


def test_a_template_that_marks_answers_is_believed(make_tokenizer):
    encoder = Encoder(make_tokenizer(MARKED))
    (encoded,) = encoder.encode(TURNS)
    assert texts(encoder, encoded)[1] == "blue<|end|>two<|end|>"


def test_a_template_that_renders_earlier_answers_in_another_way_gives_a_sequence_for_each(make_tokenizer):
    encoder = Encoder(make_tokenizer(DROPS_THOUGHTS))
    first, second = (texts(encoder, encoded) for encoded in encoder.encode(TURNS))
    assert first[1] == "<think></think>blue<|end|>"
    assert second[0].endswith(
        "<|assistant|>blue<|end|><|user|>the number ?<|end|><|assistant|><think></think>two<|end|>"
    )
    assert second[1] == "<think></think>two<|end|>"


def test_a_template_whose_answers_cannot_be_told_is_an_error(make_tokenizer):
    with pytest.raises(ValueError, match=r"does not put an answer after its generation prompt"):
        Encoder(make_tokenizer(OPENS_THOUGHTS)).encode(TURNS)


def test_a_model_without_a_template_is_an_error_that_says_what_to_pass(make_tokenizer):
    with pytest.raises(ValueError, match=r"has no chat template, .* data.template=plain"):
        Encoder(make_tokenizer(None)).encode(TURNS)


def test_plain_puts_an_empty_line_after_questions_and_ends_answers(make_tokenizer):
    encoder = Encoder(make_tokenizer(None), template="plain")
    (encoded,) = encoder.encode(Dialogue(TURNS.messages[1:3]))
    assert texts(encoder, encoded) == ("what is it ?\n\nblue<|end|>", "blue<|end|>")
    assert encoded.tokens[: encoded.counted.index(True)] == encoder.prompt([dict(TURNS.messages[1])])


def test_a_template_can_come_from_a_file(make_tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    encoder = Encoder(make_tokenizer(), template=str(path))
    assert texts(encoder, encoder.encode(Dialogue(TURNS.messages[1:3]))[0]) == ("[what is it ?][blue]", "[blue]")
    with pytest.raises(ValueError, match=r"a file that ends in .jinja, got 'chatml'"):
        Encoder(make_tokenizer(), template="chatml")


def test_of_a_text_everything_is_learned_and_its_end_too(make_tokenizer):
    encoder = Encoder(make_tokenizer())
    (encoded,) = encoder.encode(Text("the sky"))
    assert texts(encoder, encoded) == ("the sky<|end|>", "the sky<|end|>")


def test_the_loss_can_be_on_all_tokens(make_tokenizer):
    (encoded,) = Encoder(make_tokenizer(), loss_on="all").encode(TURNS)
    assert all(encoded.counted)
    with pytest.raises(ValueError, match="loss_on is one of answers, all, got 'some'"):
        Encoder(make_tokenizer(), loss_on="some")


def test_a_dialogue_without_an_answer_is_an_error(make_tokenizer):
    with pytest.raises(ValueError, match="a dialogue without an answer: its roles are user, none 'assistant'"):
        Encoder(make_tokenizer()).encode(Dialogue(TURNS.messages[1:2]))


def test_long_sequences_are_cut_or_split_and_parts_without_an_answer_left_out():
    prompt_and_answer = Encoded(list(range(10)), [False] * 6 + [True] * 4)
    assert list(cut(prompt_and_answer, 8, "truncate")) == [prompt_and_answer.slice(0, 8)]
    assert list(cut(prompt_and_answer, 6, "truncate")) == []
    assert list(cut(prompt_and_answer, 4, "split")) == [prompt_and_answer.slice(4, 8), prompt_and_answer.slice(8, 10)]
    assert list(cut(Encoded([1], [True]), 4, "split")) == [], "the first token has nothing before it"
