"""Samples -> tokens, and which of them are learned: a text as a whole, of a dialogue the answers.

A dialogue goes through the tokenizer's chat template. An answer is what the template puts after the generation
prompt, so that the model learns to write exactly what it is asked for later, end-of-turn token included.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lq_plugin.recipes.tasks.samples import Dialogue, Message, Sample

TEMPLATES = ("chat", "plain")
LOSSES = ("answers", "all")
MARKS_ANSWERS = "{% generation %}"  # a template with these marks says itself which tokens are the answers
PLAIN_SEPARATOR = "\n\n"
JINJA = (".jinja", ".j2")


@dataclass(frozen=True)
class Encoded:
    """Token numbers, and for each whether it is learned."""

    tokens: list[int]
    counted: list[bool]

    def __len__(self) -> int:
        return len(self.tokens)

    def slice(self, begin: int, end: int) -> "Encoded":
        return Encoded(self.tokens[begin:end], self.counted[begin:end])


class Encoder:
    """tokenizer: of transformers. template: "chat" is the tokenizer's own, "plain" puts an empty line between messages
    and the end-of-text token after answers, and a file that ends in .jinja is a chat template. loss_on: "answers" or
    "all" tokens.
    """

    def __init__(self, tokenizer: Any, template: str = "chat", loss_on: str = "answers") -> None:
        if loss_on not in LOSSES:
            raise ValueError(f"loss_on is one of {', '.join(LOSSES)}, got {loss_on!r}")
        self.tokenizer = tokenizer
        self.plain = template == "plain"
        self.loss_on = loss_on
        if template not in TEMPLATES:
            self._template: str | None = _template_file(template)
        else:
            self._template = getattr(tokenizer, "chat_template", None)

    def encode(self, sample: Sample) -> list[Encoded]:
        """One sequence, or of a dialogue whose template renders earlier turns in another way one for each answer."""
        if not isinstance(sample, Dialogue):
            return [self._encode_text(sample.text)]
        self._check(sample)
        encoded = self._encode_plain(sample) if self.plain else self._encode_chat(list(sample.messages))
        if self.loss_on == "answers":
            return encoded
        return [Encoded(each.tokens, [True] * len(each)) for each in encoded]

    def prompt(self, messages: list[Message]) -> list[int]:
        """The tokens after which the model is to write the next answer."""
        if self.plain:
            text = "".join(message["content"] + PLAIN_SEPARATOR for message in messages)
            return [*self._begin(), *self._tokens(text)]
        return self._tokens(self._render(messages, prompt=True))

    def text_prompt(self, text: str) -> list[int]:
        """The tokens of a text that the model is to continue."""
        return [*self._begin(), *self._tokens(text)]

    def _encode_text(self, text: str) -> Encoded:
        tokens = [*self.text_prompt(text), *self._end()]
        return Encoded(tokens, [True] * len(tokens))

    def _encode_plain(self, dialogue: Dialogue) -> list[Encoded]:
        tokens, counted = self._begin(), [False] * len(self._begin())
        for message in dialogue.messages:
            answer = message["role"] == "assistant"
            ending = self._end() if answer else []
            part = [*self._tokens(message["content"] + (PLAIN_SEPARATOR if not ending else "")), *ending]
            tokens, counted = tokens + part, counted + [answer] * len(part)
        return [Encoded(tokens, counted)]

    def _encode_chat(self, messages: list[Message]) -> list[Encoded]:
        if MARKS_ANSWERS in self._needed_template().replace("{%-", "{%").replace("-%}", "%}"):
            return [self._marked(messages)]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        whole = self._render(messages[: answers[-1] + 1])
        turns = [self._turn(messages[: i + 1]) for i in answers]
        if all(whole.startswith(prompt + answer) for prompt, answer in turns):
            return [self._joined(turns, whole)]
        return [self._joined([turn], "".join(turn)) for turn in turns]

    def _marked(self, messages: list[Message]) -> Encoded:
        out = self.tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return Encoded(list(out["input_ids"]), [bool(mark) for mark in out["assistant_masks"]])

    def _turn(self, messages: list[Message]) -> tuple[str, str]:
        """What the template writes before the last message, which is an answer, and as this answer."""
        prompt, whole = self._render(messages[:-1], prompt=True), self._render(messages)
        if not whole.startswith(prompt):
            raise ValueError(
                "the chat template does not put an answer after its generation prompt, so that its tokens cannot be "
                f"told: pass data.template=<file.jinja> with {MARKS_ANSWERS} around the answers, or data.loss_on=all. "
                f"The prompt ends in {prompt[-60:]!r}"
            )
        return prompt, whole[len(prompt) :]

    def _joined(self, turns: list[tuple[str, str]], whole: str) -> Encoded:
        """Tokens of the parts of `whole`, each tokenised by itself as it is when the model writes."""
        tokens: list[int] = []
        counted: list[bool] = []
        done = 0
        for prompt, answer in turns:
            for text, learned in ((whole[done : len(prompt)], False), (answer, True)):
                part = self._tokens(text)
                tokens, counted = tokens + part, counted + [learned] * len(part)
            done = len(prompt) + len(answer)
        return Encoded(tokens, counted)

    def _render(self, messages: list[Message], prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self._needed_template(), tokenize=False, add_generation_prompt=prompt
        )

    def _needed_template(self) -> str:
        if not self._template:
            raise ValueError(
                f"the tokenizer of {self.tokenizer.name_or_path or 'this model'} has no chat template, which dialogues "
                "need: pass data.template=plain (prompt, empty line, answer), data.template=<file.jinja>, or take an "
                "instruction-tuned model"
            )
        return self._template

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _begin(self) -> list[int]:
        """The beginning-of-text token, if this tokenizer puts one before a text."""
        first = self.tokenizer("a")["input_ids"][:1]
        return first if first == [self.tokenizer.bos_token_id] else []

    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    def _check(self, dialogue: Dialogue) -> None:
        roles = [message["role"] for message in dialogue.messages]
        if "assistant" not in roles:
            raise ValueError(
                f"a dialogue without an answer: its roles are {', '.join(roles) or 'none'}, none 'assistant'"
            )


def _template_file(name: str) -> str:
    path = Path(name).expanduser()
    if path.suffix not in JINJA or not path.is_file():
        raise ValueError(f"template is {', '.join(TEMPLATES)} or a file that ends in .jinja, got {name!r}")
    return path.read_text(encoding="utf-8")


def cut(encoded: Encoded, context: int, long: str) -> Iterator[Encoded]:
    """A sequence in parts of at most `context` tokens: all of them ("split") or the first ("truncate").

    Parts without a token to learn are left out; the first token of a part is never predicted.
    """
    end = len(encoded) if long == "split" else min(context, len(encoded))
    for begin in range(0, end, context):
        part = encoded.slice(begin, begin + context)
        if any(part.counted[1:]):
            yield part
