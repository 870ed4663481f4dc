"""What a rule's kernels read of its hyper-parameters: the reference's numbers at every step."""

import math
from dataclasses import replace

import pytest
import torch
from lq_kernels.adam_rules import Adam, AdEMAMix
from lq_kernels.optimizer_batch import FACTS, Batch
from lq_kernels.optimizer_facts import NO_CLIPPING, RULE_NUMBERS, launch_prepare
from lq_kernels.optimizer_rules import Rule
from lq_kernels.optimizer_state import new_state
from optimizer_cases import ADAMW, RULES

STEPS = (1, 2, 3, 4, 7, 10_000)
FURTHER: dict[str, Rule] = {
    "adam, beta1 of 0": replace(ADAMW, betas=(0.0, 0.999)),
    "adam, learning rate of 0": replace(ADAMW, lr=0.0),
    "ademamix, no warm-up": AdEMAMix(lr=0.3, betas=(0.9, 0.99, 0.9999), eps=1e-3, weight_decay=0.1, alpha=5.0),
    "ademamix, beta1 of 0": AdEMAMix(
        lr=0.3, betas=(0.0, 0.99, 0.9999), eps=1e-3, weight_decay=0.1, alpha=5.0, t_alpha=4, t_beta3=5
    ),
}


def facts_of(rule: Rule, step: int, device: torch.device, seed: int = 0) -> list[float]:
    """What the kernel writes for a tensor that takes this step."""
    param = torch.ones(1, device=device)
    state = new_state(param, "float32", rule.signs) | {"step": torch.tensor(step - 1.0, device=device)}
    batch = Batch([param], [state], torch.float32)
    batch.launch_data().facts.zero_()
    table = batch.launch_data().addresses.refresh([param], [param])
    (row,) = launch_prepare(batch, table, [rule], [seed], NO_CLIPPING, None).tolist()
    assert state["step"] == step
    return row


@pytest.mark.parametrize("name", [*RULES, *FURTHER])
def test_kernels_write_the_numbers_of_the_reference(name: str, device: torch.device) -> None:
    rule = (RULES | FURTHER)[name]
    for step in STEPS:
        row = facts_of(rule, step, device)
        assert len(row) == FACTS
        expected = rule.numbers(float(rule.lr), step)
        # both in float64, as a power and as an exponential, then one rounding to float32
        assert row[RULE_NUMBERS : RULE_NUMBERS + len(expected)] == pytest.approx(expected, rel=2.0**-22, abs=0), step


def test_numbers_of_a_learning_rate_of_zero_are_finite(device: torch.device) -> None:
    rule: Adam = replace(ADAMW, lr=0.0)
    assert all(map(math.isfinite, facts_of(rule, 1, device)[RULE_NUMBERS : RULE_NUMBERS + 11]))
