"""benchmark=generation on a tiny model: what is timed computes the same, and what does not is not timed."""

import pytest
import torch

from lq_plugin.recipes.benchmarks import generation
from lq_plugin.recipes.benchmarks.generation import SMALL, GenerationBenchmark, generate, llama

pytest.importorskip("transformers")
pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
QUICK = GenerationBenchmark(sizes="small", batches=(1, 2), prompt=4, length=2, repeat=1)


def test_each_batch_has_a_line_with_its_peers(monkeypatch):
    monkeypatch.setitem(generation.CHANGES, "bitsandbytes", generation.CHANGES["nf4"])  # its CPU path warns
    lines = list(QUICK.run(CPU))
    assert [line.shape for line in lines] == ["tiny Llama, batch 1", "tiny Llama, batch 2"]
    for line, batch in zip(lines, (1, 2), strict=True):
        assert line.problem is None
        assert line.peers.keys() == {"bf16", "bitsandbytes"}
        assert line.more["tokens_per_second"] == pytest.approx(batch / line.ms * 1e3)
        assert "generate, nf4" in line.row()


def test_a_model_that_computes_something_else_is_not_timed(monkeypatch):
    def wrong(model):
        model.lm_head.weight.data.mul_(2.0)
        return model

    monkeypatch.setitem(generation.CHANGES, "bitsandbytes", wrong)
    (line,) = GenerationBenchmark(sizes="small", batches=(1,), prompt=4, length=2, repeat=1).run(CPU)
    assert line.ms is None
    assert line.problem.startswith("logits differ from bitsandbytes' by")


def test_a_peer_that_fails_is_named(monkeypatch):
    def fails(model):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(generation.CHANGES, "bitsandbytes", fails)
    (line,) = GenerationBenchmark(sizes="small", batches=(1,), prompt=4, length=2, repeat=1).run(CPU)
    assert line.ms is not None
    assert line.peer_problems == {"bitsandbytes": "no such kernel"}


def test_generation_is_greedy_and_as_long_as_asked():
    model = llama(SMALL, CPU)
    prompt = torch.arange(3, 8)[None]
    out = generate(model, prompt, 5)
    assert out.shape == (1, 10)
    whole = model(input_ids=out[:, :-1], use_cache=False).logits[:, -5:].argmax(-1)
    assert torch.equal(out[:, -5:], whole)
