"""Packing loses no token and mixes no samples; errors and notes say what became of samples that do not fit."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from lq_plugin.recipes.tasks.encoding import Encoded
from lq_plugin.recipes.tasks.text_data import TextData, hold_out
from lq_plugin.recipes.tasks.token_rows import TokenRows, packed
from lq_plugin.recipes.tasks.windows import TrainingBatches

CONTEXT = 32


def sequences(lengths: list[int]) -> list[Encoded]:
    """Sequence n has the tokens 100 n, 100 n + 1, ...; of each the second half is learned."""
    return [Encoded([100 * n + i for i in range(k)], [2 * i >= k for i in range(k)]) for n, k in enumerate(lengths)]


def random_lengths(number: int) -> list[int]:
    return torch.randint(2, CONTEXT + 1, (number,)).tolist()


def test_every_sequence_is_in_one_row_and_no_row_is_too_long():
    lengths = random_lengths(500)
    rows = packed(lengths, CONTEXT, seed=0)
    assert sorted(number for row in rows for number in row) == list(range(500))
    assert max(sum(lengths[number] for number in row) for row in rows) <= CONTEXT
    assert sum(lengths) / (len(rows) * CONTEXT) > 0.95


def test_packing_depends_on_the_seed_only():
    lengths = random_lengths(100)
    assert packed(lengths, CONTEXT, 0) == packed(lengths, CONTEXT, 0) != packed(lengths, CONTEXT, 1)


def test_a_row_holds_its_sequences_with_positions_and_labels_of_their_own():
    rows = TokenRows(
        torch.tensor([0, 1, 2, 3, 100, 101], dtype=torch.int32),
        torch.tensor([False, False, True, True, True, True]),
        [0, 4, 6],
        [[1, 0]],
    )
    batch = {name: tensor[0].tolist() for name, tensor in rows.batch(torch.tensor([0])).items()}
    padding = 16 - 6
    assert batch["input_ids"] == [100, 101, 0, 1, 2, 3] + [0] * padding
    assert batch["labels"] == [-100, 101, -100, -100, 2, 3] + [-100] * padding
    assert batch["position_ids"] == [0, 1, 0, 1, 2, *range(3, 4 + padding)]


def test_a_batch_of_whole_rows_needs_no_mask():
    """transformers makes one as soon as a position does not follow the one before it."""
    rows = TokenRows.of(sequences([5, 30]), CONTEXT, packing=False, seed=0)
    positions = rows.batch(torch.tensor([0, 1]))["position_ids"]
    assert torch.equal(positions, torch.arange(positions.shape[1]).expand(2, -1))


def test_batches_hold_every_learned_token_once_in_a_pass():
    lengths = random_lengths(60)
    rows = TokenRows.of(sequences(lengths), CONTEXT, packing=True, seed=0)
    batches = islice(TrainingBatches(rows, batch_size=1, seed=3), len(rows))
    learned = torch.cat([batch["labels"][batch["labels"] != -100] for batch in batches])
    expected = [
        token
        for sequence in sequences(lengths)
        for token, counts in list(zip(sequence.tokens, sequence.counted, strict=True))[1:]
        if counts
    ]
    assert sorted(learned.tolist()) == sorted(expected)


def test_a_resumed_run_gets_the_batches_that_were_left():
    rows = TokenRows.of(sequences(random_lengths(40)), CONTEXT, packing=True, seed=0)
    whole = list(islice(TrainingBatches(rows, 2, seed=1), 30))
    rest = list(islice(TrainingBatches(rows, 2, seed=1, first=17), 13))
    for a, b in zip(whole[17:], rest, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_held_out_is_always_the_same_and_never_everything():
    samples = list(range(40))
    training, held_out = hold_out(samples, 0.1)
    assert (len(training), len(held_out)) == (36, 4)
    assert sorted(training + held_out) == samples
    assert hold_out(samples, 0.1) == (training, held_out)
    assert [len(part) for part in hold_out([1, 2], 0.9)] == [1, 1]
    assert [len(part) for part in hold_out([1], 0.5)] == [1, 0]
    assert hold_out(samples, 0.0) == (samples, [])


@pytest.fixture(scope="module")
def words(tmp_path_factory, make_tokenizer) -> str:
    """A folder with a tokenizer."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("words")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def questions(folder: Path, lengths: list[int]) -> str:
    path = folder / "data.jsonl"
    records = [{"prompt": f"number {i} ?", "answer": "it " * length} for i, length in enumerate(lengths)]
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def test_the_first_line_says_what_is_learned(tmp_path, words, capsys):
    TextData(questions(tmp_path, [3] * 40), tokenizer=words, context=CONTEXT, batch_size=2)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("38 training samples of ")
    assert "of them learned, in" in first
    assert second.startswith("2 held-out samples: ")


def test_too_long_samples_are_cut_and_counted(tmp_path, words, capsys):
    data = TextData(
        questions(tmp_path, [3] * 20 + [200]), tokenizer=words, context=CONTEXT, batch_size=1, validation_share=0
    )
    assert "; 1 longer than that and cut" in capsys.readouterr().out
    assert data.val_dataloader() == []
    assert max(data._training.batch(torch.tensor([n]))["input_ids"].shape[1] for n in range(len(data._training))) == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"long": "error"},
            r"a sample has \d+ tokens, more than data.context=32: raise it, or pass data.long=truncate",
        ),
        ({"context": 4}, r"none of the 3 training samples of .* has a token to learn .*; 3 left out"),
        ({"batch_size": 50}, r"make \d rows of 32 tokens, fewer than data.batch_size=50: lower data.batch_size"),
        ({"long": "drop"}, "long is one of auto, truncate, split, error, got 'drop'"),
        ({"context": 1}, "context must be at least 2"),
    ],
)
def test_data_that_cannot_be_trained_on_is_an_error(tmp_path, words, options, message):
    settings = {"context": CONTEXT, "batch_size": 1, "validation_share": 0.0, **options}
    with pytest.raises(ValueError, match=message):
        TextData(questions(tmp_path, [3, 3, 200]), tokenizer=words, **settings)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer \(tokenizer.json\)"):
        TextData(questions(tmp_path, [3]), tokenizer=str(tmp_path), context=CONTEXT)
