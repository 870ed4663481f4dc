"""A run that is killed at any moment and started again is, to the last bit, the run that nobody disturbed."""

import json

import pytest

from lq_plugin.recipes.benchmarks.faults import line, run_faults


@pytest.mark.integration
def test_a_run_survives_two_kills(tmp_path):
    *kills, finished = run_faults(tmp_path, kills=2, seed=0)
    assert [kill["kill"] for kill in kills] == [1, 2]
    assert {kill["phase"] for kill in kills} >= {"save"}
    assert max(kill["resumes_from_step"] for kill in kills) > 0
    assert finished["losses_equal"] == finished["steps"]
    assert all(line(record) and json.dumps(record) for record in (*kills, finished))


@pytest.mark.slow
def test_a_run_survives_ten_kills(tmp_path):
    *kills, finished = run_faults(tmp_path, kills=10, seed=1)
    assert {kill["phase"] for kill in kills} == {"start-up", "step", "save"}
    assert finished["losses_equal"] == finished["steps"]
