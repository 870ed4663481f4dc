"""Which format a name gets."""

import pytest

from lq_plugin.formats import FORMATS
from lq_plugin.policy import Policy, matches

SWITCHBACK = FORMATS["int8_switchback"]
VECTORWISE = FORMATS["int8_switchback_vectorwise"]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "layers.0.attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("proj", "layers.0.attn.q_proj", False),
        ("layers.1", "layers.1", True),
        ("layers.1", "layers.10", False),
        ("layers.1", "model.layers.1", True),
        ("layers.1", "layers.1.mlp", False),
        ("layers.1.*", "layers.1.mlp", True),
        ("layers.1.*", "layers.10.mlp", False),
        ("*.mlp.*", "layers.1.mlp.up", True),
        ("all-linear", "anything", True),
    ],
)
def test_patterns_match_whole_segments_or_globs(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_the_first_matching_pattern_wins() -> None:
    policy = Policy.of({"up": "int8_switchback_vectorwise", "mlp.*": None, "*": "int8_switchback"}, ())
    assert policy.decide("layers.0.up")[0] is VECTORWISE
    assert policy.decide("mlp.down") == (None, "'mlp.*' is none")
    assert policy.decide("head")[0] is SWITCHBACK


def test_skip_goes_before_every_pattern() -> None:
    assert Policy.of("int8_switchback", ["head"]).decide("head") == (None, "skip='head'")
    assert Policy.of("int8_switchback", "head").decide("head") == (None, "skip='head'")


def test_layers_without_a_pattern_are_left_alone() -> None:
    assert Policy.of({"up": "int8_switchback"}, ()).decide("down") == (None, "matches no pattern")


def test_a_format_object_serves_as_its_name() -> None:
    assert Policy.of(SWITCHBACK, ()).decide("up")[0] is SWITCHBACK


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        ("int7", r"unknown format 'int7'; formats: int8_switchback, "),
        ("nf4-dq", r"unknown format 'nf4-dq': use 'nf4_dq'; formats: int8_switchback, .*, nf4, nf4_dq, "),
        ("mxfp8", r"unknown format 'mxfp8'; formats: "),
        ("switchback", r"unknown format 'switchback': use 'int8_switchback'"),
        ("int8_switchback_vectorwise_mem_efficient", "cannot be memory-efficient"),
        ({"up": "int7"}, "unknown format 'int7'"),
    ],
)
def test_an_unknown_format_lists_the_known_ones(linear: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy.of(linear, ())


@pytest.mark.parametrize(("linear", "skip"), [(8, ()), ("int8_switchback", (3,)), ("int8_switchback", ("",))])
def test_values_of_another_type_are_refused(linear: object, skip: object) -> None:
    with pytest.raises(TypeError, match=r"linear takes a format name|skip takes name patterns"):
        Policy.of(linear, skip)
