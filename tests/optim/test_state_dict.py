"""Saving and loading: exact to the last bit, checked, and never cast."""

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lq_plugin.optim import Adam8bit, AdamW8bit

StateDict = dict[str, Any]


class Run:
    """Two matrices, one embedding and a bias, trained on seeded gradients."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        torch.manual_seed(7)
        shapes = {"a": (64, 256), "b": (33, 130), "embed": (100, 64), "bias": (64,)}
        self.params = {name: Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}
        self.optimizer = AdamW8bit(self.params.items(), lr=1e-2, **options)

    def train(self, steps: range) -> "Run":
        for step in steps:
            for i, param in enumerate(self.params.values()):
                generator = torch.Generator().manual_seed(100 * step + i)
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            self.optimizer.step()
        return self

    def equals(self, other: "Run") -> bool:
        return all(torch.equal(self.params[name], other.params[name]) for name in self.params)


def through_a_file(state_dict: StateDict) -> StateDict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(a: StateDict, b: StateDict) -> None:
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert a["param_groups"] == b["param_groups"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("percentile", [None, 5])
def test_resuming_from_a_state_dict_changes_nothing(dtype: torch.dtype, percentile: int | None) -> None:
    straight = Run(dtype, percentile_clipping=percentile).train(range(6))
    half = Run(dtype, percentile_clipping=percentile).train(range(3))
    resumed = Run(dtype)
    resumed.optimizer.load_state_dict(through_a_file(half.optimizer.state_dict()))
    for name, param in resumed.params.items():
        param.data.copy_(half.params[name])
    assert resumed.train(range(3, 6)).equals(straight)
    assert_same(resumed.optimizer.state_dict(), straight.optimizer.state_dict())


def test_codes_stay_bytes_and_scales_stay_float32_for_bfloat16_parameters() -> None:
    saved = Run(torch.bfloat16, percentile_clipping=5).train(range(1)).optimizer.state_dict()
    resumed = Run(torch.bfloat16)
    resumed.optimizer.load_state_dict(saved)
    types = {key: value.dtype for key, value in resumed.optimizer.state[resumed.params["a"]].items()}
    assert types == {
        "step": torch.float32,
        "codes1": torch.uint8,
        "scale1": torch.float32,
        "codes2": torch.uint8,
        "scale2": torch.float32,
        "gnorm_history": torch.float32,
        "gnorm_counts": torch.int32,
    }
    assert resumed.optimizer.state[resumed.params["bias"]]["state1"].dtype == torch.float32


def test_a_loaded_optimizer_shares_no_memory_with_the_state_dict() -> None:
    saved = Run().train(range(2)).optimizer.state_dict()
    before = copy.deepcopy(saved)
    resumed = Run()
    resumed.optimizer.load_state_dict(saved)
    resumed.train(range(2))
    assert_same(saved, before)


def test_the_format_is_in_the_groups() -> None:
    group = Run().optimizer.state_dict()["param_groups"][0]
    expected = {"format_version": 1, "block_size": 256, "code1": "dynamic_symmetric", "code2": "dynamic_unsigned"}
    assert expected.items() <= group.items()
    assert group["state"] == "8bit"


def test_a_plain_torch_optimizer_refuses_the_file() -> None:
    run = Run().train(range(1))
    plain = torch.optim.AdamW(run.params.values())
    plain.load_state_dict(run.optimizer.state_dict())
    for param in run.params.values():
        param.grad = torch.ones_like(param)
    with pytest.raises(KeyError, match="exp_avg"):
        plain.step()


def change(path: tuple[Any, ...], value: Any) -> Callable[[StateDict], None]:
    def apply(saved: StateDict) -> None:
        for key in path[:-1]:
            saved = saved[key]
        if value is KeyError:
            del saved[path[-1]]
        else:
            saved[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(("param_groups", 0, "format_version"), 2), "format_version=2, this version reads 1"),
        (change(("param_groups", 0, "block_size"), 2048), "block_size=2048"),
        (change(("param_groups", 0, "code1"), "dynamic"), "code1='dynamic', this version reads 'dynamic_symmetric'"),
        (change(("param_groups", 0, "amsgrad"), True), "amsgrad=True"),
        (change(("param_groups", 0, "params"), [0, 1]), r"groups of \[2\] parameters, AdamW8bit has \[4\]"),
        (change(("param_groups", 0, "params"), [0, 1, 2, 2]), "twice"),
        (change(("state", 0, "scale1"), KeyError), r"'a': the state_dict lacks \['scale1'\]"),
        (change(("state", 3, "step"), KeyError), r"'bias': the state_dict lacks \['step'\]"),
        (change(("state", 1, "unorm"), torch.zeros(1)), r"'b': .*unknown \['unorm'\]"),
        (change(("state", 0, "scale1"), torch.zeros(64, 2)), r"'a': scale1 has shape \(64, 2\), expected \(64, 1\)"),
        (change(("state", 0, "codes2"), torch.zeros(8, 8, dtype=torch.uint8)), r"'a': codes2 has shape \(8, 8\)"),
        (change(("state", 0, "codes1"), torch.zeros(64, 256)), "'a': codes1 is torch.float32, expected torch.uint8"),
        (change(("state", 0, "scale1"), torch.zeros(64, 1).bfloat16()), "scale1 is torch.bfloat16"),
        (change(("state", 3, "codes1"), torch.zeros(64, dtype=torch.uint8)), "'bias': .*two dimensions or more"),
        (change(("state", 9), {}), "state for parameter 9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_dict_that_does_not_fit_is_refused_and_nothing_changes(
    damage: Callable[[StateDict], None], message: str
) -> None:
    saved = copy.deepcopy(Run().train(range(2)).optimizer.state_dict())
    damage(saved)
    run = Run().train(range(1))
    before = copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        run.optimizer.load_state_dict(saved)
    assert_same(run.optimizer.state_dict(), before)


@pytest.mark.parametrize(("ours", "theirs"), [(AdamW8bit, torch.optim.AdamW), (Adam8bit, torch.optim.Adam)])
def test_torch_state_is_converted_and_it_says_so(
    ours: type[AdamW8bit], theirs: type[torch.optim.AdamW], caplog: pytest.LogCaptureFixture
) -> None:
    params = [Parameter(torch.randn(64, 300)), Parameter(torch.randn(7))]
    plain = theirs(params, lr=0.5, foreach=True)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        plain.step()
    optimizer = ours(params, percentile_clipping=7)
    with caplog.at_level(logging.INFO, logger="lq_plugin"):
        optimizer.load_state_dict(through_a_file(plain.state_dict()))
    assert "converted torch's state of 2 tensors" in caplog.text
    group, matrix, bias = optimizer.param_groups[0], optimizer.state[params[0]], optimizer.state[params[1]]
    assert (group["lr"], group["foreach"], group["percentile_clipping"], group["state"]) == (0.5, None, 7, "8bit")
    assert matrix["step"] == 3
    assert matrix["codes1"].dtype == torch.uint8
    assert torch.equal(bias["state1"], plain.state[params[1]]["exp_avg"])
    amax = plain.state[params[0]]["exp_avg_sq"].split(256, dim=1)
    assert torch.equal(matrix["scale2"], torch.stack([block.amax(1) for block in amax], dim=1))
    optimizer.step()


def test_hooks_of_torch_run_and_may_replace_the_state_dict() -> None:
    saved = Run().train(range(2)).optimizer.state_dict()
    run = Run()
    seen: list[Any] = []
    run.optimizer.register_load_state_dict_pre_hook(lambda _, loaded: loaded["wrapped"])
    run.optimizer.register_load_state_dict_post_hook(lambda optimizer: seen.append(optimizer))
    run.optimizer.load_state_dict(state_dict={"wrapped": saved})
    assert seen == [run.optimizer]
    assert run.optimizer.state[run.params["a"]]["step"] == 2


def test_a_state_dict_from_before_the_first_step_loads() -> None:
    run = Run().train(range(1))
    run.optimizer.load_state_dict(Run().optimizer.state_dict())
    assert len(run.optimizer.state) == 0
    run.train(range(1, 2))
