"""What ranks tell each other through the store: refusals that name the rank, and no waiting for one that is gone."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lq_plugin import ranks

pytestmark = pytest.mark.integration

SHORT = timedelta(seconds=0.5)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def on_rank(folder: Path) -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    found: dict[str, Any] = {}
    found["same"] = error_of(lambda: ranks.check_same("facts", {"a": "1", "b": "2"}))
    found["another"] = error_of(lambda: ranks.check_same("facts", {"a": "1" if rank < last else "2", "b": "2"}))
    found["same again"] = error_of(lambda: ranks.check_same("facts", {"a": "2"}))
    found["gathered"] = ranks.gathered_on_first("value", bytes([rank, 7]), SHORT)
    began = time.monotonic()
    found["alone"] = ranks.gathered_on_first("only first", b"x", SHORT) if rank == 0 else None
    found["waited"] = time.monotonic() - began
    dist.barrier()
    found["together after alone"] = ranks.gathered_on_first("another name", bytes([rank]), SHORT)
    if rank < last:  # one never comes
        found["gone"] = error_of(lambda: ranks.check_same("gone", {}, SHORT))
    dist.barrier()
    torch.save(found, folder / f"store.{rank}.pt")


def test_ranks_with_the_same_facts_go_on(of_ranks):
    assert [found["same"] for found in of_ranks("store")] == ["none"] * len(of_ranks("store"))


def test_every_rank_is_told_which_rank_differs_and_in_what(of_ranks, world_size):
    expected = (
        f"ValueError: rank {world_size - 1} differs from rank 0: a is 2 (rank 0: 1). Start every process with the same "
        "configuration, on the same versions"
    )
    assert [found["another"] for found in of_ranks("store")] == [expected] * world_size
    assert {found["same again"] for found in of_ranks("store")} == {"none"}


def test_the_first_rank_gathers_values_in_order(of_ranks, world_size):
    first, *others = (found["gathered"] for found in of_ranks("store"))
    assert first == ([bytes([rank, 7]) for rank in range(world_size)], [])
    assert others == [([], [])] * (world_size - 1)


def test_a_rank_that_is_alone_waits_its_time_and_no_longer(of_ranks, world_size):
    first = of_ranks("store")[0]
    assert first["alone"] == ([], list(range(1, world_size)))
    assert SHORT.total_seconds() <= first["waited"] < 10 * SHORT.total_seconds()
    assert first["together after alone"] == ([bytes([rank]) for rank in range(world_size)], [])


def test_ranks_that_give_no_answer_are_named(of_ranks, world_size):
    for found in of_ranks("store")[:-1]:
        assert found["gone"].startswith(f"TimeoutError: no answer from rank {world_size - 1} within 0 s")


def test_many_differences_are_cut_short():
    facts = {f"option {i}": "1" for i in range(9)}
    told = ranks.differences([facts, {}, facts, facts | {"new": "2"}])
    assert told.startswith("rank 1 differs from rank 0: option 0 is absent (rank 0: 1); ")
    assert "option 4" in told
    assert "option 5" not in told
    assert "; and 4 more. rank 3 differs from rank 0: new is 2 (rank 0: absent)." in told


def test_one_process_has_nothing_to_compare():
    assert ranks.world_size() == 1
    assert ranks.rank() == 0
    ranks.check_same("facts", {"a": "1"})
