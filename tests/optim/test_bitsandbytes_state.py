"""Conversion of optimizer state from bitsandbytes and back, against bitsandbytes itself on the CPU."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from float64_optimizers import SGD, Adagrad, AdamW, AdEMAMix, Algorithm, Float64Optimizer, Lion, RMSprop
from lq_kernels.codebooks import dynamic_map
from lq_kernels.optimizer_state import load_moment
from torch import Tensor
from torch.nn import Parameter

from lq_plugin import optim
from lq_plugin.optim import Adam8bit, AdamW8bit
from lq_plugin.optim.base import LowBitOptimizer
from lq_plugin.optim.bitsandbytes_state import NESTED, from_bitsandbytes, to_bitsandbytes
from lq_plugin.optim.muon import Muon8bit

pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes looks for packages that are not here
bitsandbytes = pytest.importorskip("bitsandbytes")

StateDict = dict[str, Any]

# Rows of whole blocks; rows that flat blocks cross; 8-bit there and float32 here (twice); float32 in both.
SHAPES = {"whole": (16, 512), "ragged": (33, 130), "embed": (100, 64), "vector": (5000,), "bias": (7,)}
WHOLE_BLOCKS = SHAPES | {"ragged": (128, 130), "vector": (5120,)}  # 8-bit AdEMAMix converts in whole blocks only
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
SIGNED_STEP, UNSIGNED_STEP = (
    float(dynamic_map(name).diff().max()) for name in ("dynamic_symmetric", "dynamic_unsigned")
)


def parameters(shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Parameter]:
    return {name: Parameter(torch.randn(shape) * 0.1) for name, shape in shapes.items()}


def train(optimizer: torch.optim.Optimizer, params: dict[str, Parameter], steps: range) -> None:
    for step in steps:
        for i, param in enumerate(params.values()):
            generator = torch.Generator().manual_seed(100 * step + i)
            param.grad = torch.randn(param.shape, generator=generator) * 0.01
        optimizer.step()


def theirs(params: dict[str, Parameter], bits: int = 8) -> torch.optim.Optimizer:
    return getattr(bitsandbytes.optim, f"AdamW{bits}bit")(params.values(), **HYPER)


def ours(params: dict[str, Parameter], **options: Any) -> AdamW8bit:
    return AdamW8bit(params.items(), **options)


def through_a_file(state_dict: StateDict) -> StateDict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flat(state_dict: StateDict) -> StateDict:
    """As versions before 0.49 wrote it."""
    state = {i: {k: v for k, v in s.items() if k != NESTED} | s.get(NESTED, {}) for i, s in state_dict["state"].items()}
    return state_dict | {"state": state}


def trained_there(steps: int = 5) -> tuple[dict[str, Parameter], StateDict]:
    params = parameters()
    optimizer = theirs(params)
    train(optimizer, params, range(steps))
    return params, copy.deepcopy(optimizer.state_dict())


def dequantized_there(saved: dict[str, Any], i: str) -> Tensor:
    """By definition; -1 for code 0 of the signed map, what a block's negative extreme was, unless "read" is "there"."""
    if saved[f"state{i}"].dtype == torch.float32:
        return saved[f"state{i}"]
    values = saved[f"qmap{i}"].clone()
    if i == "1" and saved.get("read") != "there":
        values[0] = -1.0
    codes = saved[f"state{i}"].flatten().long()
    scale = saved[f"absmax{i}"].flatten().repeat_interleave(256)[: len(codes)]
    return (values[codes] * scale).view_as(saved[f"state{i}"])


def moments_of(optimizer: LowBitOptimizer, param: Tensor) -> dict[str, Tensor]:
    """By torch's names, in float32."""
    group = optimizer.param_groups[0]
    pairs = zip(optimizer.moment_names(group), optimizer.rule(group).signs, strict=True)
    return {name: load_moment(optimizer.state[param], i, signed) for i, (name, signed) in enumerate(pairs, 1)}


def amax_by_row_blocks(values: Tensor) -> Tensor:
    blocks = [block.abs().amax(1, keepdim=True).expand_as(block) for block in values.split(256, dim=1)]
    return torch.cat(blocks, dim=1)


@pytest.mark.parametrize("form", [flat, lambda state_dict: state_dict], ids=["flat", "nested"])
def test_codes_and_scales_are_copied_where_rows_are_whole_blocks(form: Callable[[StateDict], StateDict]) -> None:
    params, saved = trained_there()
    optimizer = ours(params)
    optimizer.load_state_dict(from_bitsandbytes(through_a_file(form(saved)), optimizer))
    state, expected = optimizer.state[params["whole"]], flat(saved)["state"][0]
    for i in "12":
        assert torch.equal(state[f"codes{i}"], expected[f"state{i}"])
        assert torch.equal(state[f"scale{i}"].flatten(), expected[f"absmax{i}"])
    assert state["step"] == 5
    assert optimizer.param_groups[0].items() >= HYPER.items()


def test_other_tensors_keep_their_values_within_half_a_code() -> None:
    params, saved = trained_there()
    optimizer = ours(params)
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer))
    for n, (name, param) in enumerate(params.items()):
        expected = flat(saved)["state"][n]
        for i, step in (("1", SIGNED_STEP), ("2", UNSIGNED_STEP)):
            value = dequantized_there(expected, i)
            # bitsandbytes computes its maps in float32, 1.5e-7; the product rounds by 6e-8 in each library.
            bound = value.abs() * 3e-7 + (amax_by_row_blocks(value) * step / 2 if name == "ragged" else 0)
            moment = moments_of(optimizer, param)["exp_avg" if i == "1" else "exp_avg_sq"]
            assert ((moment - value).abs() <= bound).all(), (name, i)
    kept = {name for name, param in params.items() if "codes1" in optimizer.state[param]}
    assert kept == {"whole", "ragged"}


COMMON = {"lr": 1e-2, "weight_decay": 0.1}
MOMENTS = {"betas": (0.9, 0.99), "eps": 1e-6}
# Their class without "8bit", what it and ours are made with, and the same in float64.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Algorithm]] = {
    "AdamW": (MOMENTS, MOMENTS, AdamW(1e-2, (0.9, 0.99), 1e-6, 0.1)),
    "Adam": (MOMENTS, MOMENTS | {"decoupled_weight_decay": True}, AdamW(1e-2, (0.9, 0.99), 1e-6, 0.1)),
    "Lion": ({"betas": (0.9, 0.98)}, {"betas": (0.9, 0.98)}, Lion(1e-2, (0.9, 0.98), 0.1)),
    "SGD": ({"momentum": 0.8}, {"momentum": 0.8}, SGD(1e-2, 0.8, 0.0, 0.1)),
    "RMSprop": ({"alpha": 0.9, "eps": 1e-6}, {"alpha": 0.9, "eps": 1e-6}, RMSprop(1e-2, 0.9, 1e-6, 0.1)),
    "Adagrad": ({"eps": 1e-6}, {"eps": 1e-6}, Adagrad(1e-2, 0.0, 0.1, 0.0, 1e-6)),
    "AdEMAMix": (
        {"betas": (0.9, 0.99, 0.999), "eps": 1e-6, "alpha": 3.0, "t_alpha": 9},
        {"betas": (0.9, 0.99, 0.999), "eps": 1e-6, "alpha": 3.0, "t_alpha": 9},
        AdEMAMix(1e-2, (0.9, 0.99, 0.999), 3.0, 1e-6, 0.1, t_alpha=9),
    ),
}


def made_there(case: str, params: dict[str, Parameter]) -> torch.optim.Optimizer:
    return getattr(bitsandbytes.optim, f"{case}8bit")(params.values(), **COMMON, **CASES[case][0])


def made_here(case: str, params: dict[str, Parameter], **arguments: Any) -> LowBitOptimizer:
    necessary = {"momentum": 0.1} if case == "SGD" else {}  # the file says which
    return getattr(optim, f"{case}8bit")(params.items(), **necessary | arguments)


def all_moments_there(state: dict[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
    """By torch's names."""
    buffers = {i: dequantized_there(state, i) for i in "12" if f"state{i}" in state}
    if names == ("exp_avg", "exp_avg_sq", "exp_avg_slow"):
        return dict(zip(names, (buffers["1"][0], buffers["2"], buffers["1"][1]), strict=True))
    return dict(zip(names, buffers.values(), strict=True))


def follow(reference: Float64Optimizer, moments: list[dict[str, Tensor]], t: int) -> None:
    """Lets the reference go on from these moments."""
    reference.steps = [t] * len(moments)
    reference.moments = [{name: value.double() for name, value in of_param.items()} for of_param in moments]


@pytest.mark.parametrize("case", CASES)
def test_state_of_every_algorithm_is_that_of_the_file(case: str) -> None:
    params = parameters(WHOLE_BLOCKS)
    there = made_there(case, params)
    train(there, params, range(5))
    saved = flat(copy.deepcopy(there.state_dict()))
    optimizer = made_here(case, params)
    optimizer.load_state_dict(from_bitsandbytes(through_a_file(there.state_dict()), optimizer))
    assert optimizer.param_groups[0].items() >= (COMMON | CASES[case][1]).items()
    group = optimizer.param_groups[0]
    names = optimizer.moment_names(group)
    for n, (name, param) in enumerate(params.items()):
        expected = all_moments_there(saved["state"][n], names)
        for i, (moment, value) in enumerate(moments_of(optimizer, param).items(), 1):
            same_codes = name != "ragged" and not (name == "whole" and case in ("RMSprop", "Adagrad"))
            widest = dynamic_map(group[f"code{i}"]).diff().max() / 2
            bound = expected[moment].abs() * 3e-7 + (0 if same_codes else amax_by_row_blocks(value) * widest * 1.0001)
            assert ((value - expected[moment]).abs() <= bound).all(), (name, moment)


@pytest.mark.parametrize("case", CASES)
def test_the_next_step_follows_from_the_converted_state(case: str) -> None:
    params = parameters(WHOLE_BLOCKS)
    there = made_there(case, params)
    train(there, params, range(5))
    optimizer = made_here(case, params)
    optimizer.load_state_dict(from_bitsandbytes(there.state_dict(), optimizer))
    reference = Float64Optimizer(list(params.values()), CASES[case][2])
    follow(reference, [copy.deepcopy(moments_of(optimizer, param)) for param in params.values()], 5)
    train(optimizer, params, range(5, 6))
    reference.step([param.grad for param in params.values()])
    for param, expected in zip(params.values(), reference.params, strict=True):
        # Where v is near 0 a step of float32 is off by its 6e-8 relatively, many times.
        torch.testing.assert_close(param.detach().double(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_bitsandbytes_goes_on_from_what_is_written_for_it(case: str) -> None:
    params = parameters(WHOLE_BLOCKS)
    optimizer = made_here(case, params, **COMMON | CASES[case][1])
    train(optimizer, params, range(5))
    there = made_there(case, params)
    there.load_state_dict(through_a_file(to_bitsandbytes(optimizer)))
    read = [copy.deepcopy(there.state[param]) for param in params.values()]
    for state in read:
        assert state["step"] == 5
        state["read"] = "there"
    moments = [all_moments_there(state, optimizer.moment_names(optimizer.param_groups[0])) for state in read]
    reference = Float64Optimizer(list(params.values()), CASES[case][2])
    follow(reference, moments, 5)
    assert {key: value for key, value in there.param_groups[0].items() if key in COMMON} == COMMON
    train(there, params, range(5, 6))
    reference.step([param.grad for param in params.values()])
    for param, expected in zip(params.values(), reference.params, strict=True):
        torch.testing.assert_close(param.detach().double(), expected, rtol=2e-6, atol=1e-7)


def assert_same_step(here: Tensor, there: Tensor, state: dict[str, Any], t: int) -> None:
    """Parameters after one step from one state agree to float32, but where code 0 means -1 here and -0.993 there.

    There the first moment differs by 0.0071 of the scale, and the step with it.
    """
    lr, (beta1, beta2), eps = HYPER["lr"], HYPER["betas"], HYPER["eps"]
    scale = state["absmax1"].repeat_interleave(256).view_as(here)
    least_v = beta2 * dequantized_there(state, "2") / (1 - beta2**t)
    moved = lr * beta1 * 0.0071 * scale / (1 - beta1**t) / (least_v.sqrt() + eps)
    is_extreme = state["state1"] == 0
    assert ((here - there).abs() <= 1e-6 * there.abs() + 1e-7 + moved * is_extreme).all()
    assert is_extreme.any()


def copies(params: dict[str, Parameter]) -> dict[str, Parameter]:
    return {name: Parameter(param.detach().clone()) for name, param in params.items()}


def test_the_next_step_here_is_the_next_step_there() -> None:
    there, saved = trained_there()
    optimizer_there = theirs(there)
    optimizer_there.load_state_dict(saved)
    here = copies(there)
    optimizer = ours(here)
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer))
    state = flat(saved)["state"][0]
    train(optimizer, here, range(5, 6))
    train(optimizer_there, there, range(5, 6))
    assert_same_step(here["whole"].detach(), there["whole"].detach(), state, 6)
    torch.testing.assert_close(here["bias"], there["bias"], rtol=1e-6, atol=1e-7)


def test_the_next_step_there_is_the_next_step_here() -> None:
    here = parameters()
    optimizer = ours(here, **HYPER)
    train(optimizer, here, range(5))
    there = copies(here)
    optimizer_there = theirs(there)
    saved = through_a_file(to_bitsandbytes(optimizer))
    optimizer_there.load_state_dict(copy.deepcopy(saved))
    train(optimizer, here, range(5, 6))
    train(optimizer_there, there, range(5, 6))
    assert_same_step(here["whole"].detach(), there["whole"].detach(), saved["state"][0], 6)
    for name in ("embed", "vector", "bias"):  # float32 in both
        torch.testing.assert_close(here[name], there[name], rtol=1e-6, atol=1e-7)


def test_a_round_trip_changes_nothing_where_rows_are_whole_blocks() -> None:
    params, saved = trained_there()
    optimizer = ours(params)
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer))
    back, expected = to_bitsandbytes(optimizer), flat(saved)
    assert back["param_groups"] == expected["param_groups"]
    for n in (0, 4):  # "whole" and "bias"
        torch.testing.assert_close(back["state"][n], expected["state"][n], rtol=2e-7, atol=0)
    for i in "12":
        assert torch.equal(back["state"][0][f"state{i}"], expected["state"][0][f"state{i}"])
        assert torch.equal(back["state"][0][f"absmax{i}"], expected["state"][0][f"absmax{i}"])


def test_the_other_round_trip_changes_nothing() -> None:
    params = parameters()
    optimizer = ours(params, **HYPER)
    train(optimizer, params, range(5))
    again = ours(copies(params))
    again.load_state_dict(from_bitsandbytes(to_bitsandbytes(optimizer), again))
    for name, state in zip(params, again.state.values(), strict=True):
        if name != "ragged":
            torch.testing.assert_close(state, optimizer.state[params[name]], rtol=0, atol=0)
    assert again.param_groups[0].items() >= HYPER.items()


def test_what_is_written_shares_no_memory() -> None:
    params = parameters()
    optimizer = ours(params)
    train(optimizer, params, range(2))
    written = to_bitsandbytes(optimizer)
    before = copy.deepcopy(written)
    train(optimizer, params, range(2, 4))
    torch.testing.assert_close(written["state"], before["state"], rtol=0, atol=0)


def test_32_bit_state_becomes_what_the_optimizer_keeps() -> None:
    params = parameters()
    optimizer_there = theirs(params, bits=32)
    train(optimizer_there, params, range(5))
    saved = optimizer_there.state_dict()
    exact, quantized = ours(params, state="32bit"), ours(params)
    for optimizer in (exact, quantized):
        optimizer.load_state_dict(from_bitsandbytes(saved, optimizer))
    for n, param in enumerate(params.values()):
        expected = flat(saved)["state"][n]
        assert torch.equal(exact.state[param]["state1"], expected["state1"])
        assert torch.equal(exact.state[param]["state2"], expected["state2"])
    assert quantized.state[params["whole"]]["codes1"].dtype == torch.uint8
    moment, expected = moments_of(quantized, params["ragged"])["exp_avg_sq"], flat(saved)["state"][1]["state2"]
    assert ((moment - expected).abs() <= amax_by_row_blocks(expected) * UNSIGNED_STEP / 2 * 1.00001).all()
    assert set(to_bitsandbytes(exact)["state"][0]) == {"step", "state1", "state2"}


def test_blocks_of_zeros_get_the_code_of_zero() -> None:
    params, saved = trained_there()
    state = flat(saved)["state"][0]
    state["absmax1"][3] = 0.0
    state["state1"][1, 256:] = 255  # as CUDA leaves a block of zeros
    optimizer = ours(params)
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer))
    codes = optimizer.state[params["whole"]]["codes1"]
    assert (codes[1, 256:] == 127).all()
    assert torch.equal(codes[2:], state["state1"][2:])
    assert torch.equal(codes[1, :256], state["state1"][1, :256])


def test_parameters_without_state_and_schedulers_are_carried_over() -> None:
    params = parameters()
    optimizer_there = theirs(params)
    torch.optim.lr_scheduler.LambdaLR(optimizer_there, lambda _: 0.5)
    params["whole"].grad = torch.ones_like(params["whole"])
    optimizer_there.step()
    optimizer = ours(params)
    optimizer.load_state_dict(from_bitsandbytes(optimizer_there.state_dict(), optimizer))
    assert list(optimizer.state) == [params["whole"]]
    written = to_bitsandbytes(optimizer)
    assert list(written["state"]) == [0]
    group = written["param_groups"][0]
    assert (group["lr"], group["initial_lr"], group["params"]) == (HYPER["lr"] / 2, HYPER["lr"], [0, 1, 2, 3, 4])


def history(step: int) -> Tensor:
    """bitsandbytes' squared norms after norms 1, 2, .. step: number n in slot n % 100, the first in all."""
    squared = torch.ones(100)
    for n in range(2, step + 1):
        squared[n % 100] = float(n) ** 2
    return squared


@pytest.mark.parametrize("step", [1, 37, 100, 250])
def test_the_norms_of_old_versions_are_carried_over_and_back(step: int) -> None:
    params, saved = trained_there(1)
    saved = flat(saved)
    for state in saved["state"].values():
        state |= {"step": step, "gnorm_vec": history(step)}
    optimizer = ours(params, percentile_clipping=5)
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer))
    assert torch.equal(to_bitsandbytes(optimizer)["state"][0]["gnorm_vec"], history(step))
    assert optimizer.state[params["bias"]]["gnorm_counts"].tolist() == [step, 0, 0]
    for param in params.values():
        param.grad = torch.zeros_like(param)
        param.grad.view(-1)[0] = step + 1
    optimizer.step()
    newest = optimizer.state[params["bias"]]["gnorm_history"].sort().values
    assert torch.equal(newest, history(step + 1).sqrt().sort().values)


@pytest.mark.parametrize("bad", [0.0, float("inf")])
def test_norms_that_ours_never_has_begin_a_new_history(bad: float) -> None:
    params, saved = trained_there(1)
    saved = flat(saved)
    saved["state"][0]["gnorm_vec"] = history(37)
    saved["state"][0]["gnorm_vec"][5] = bad
    optimizer = ours(params, percentile_clipping=5)
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer))
    assert optimizer.state[params["whole"]]["gnorm_counts"].tolist() == [0, 0, 0]
    assert "gnorm_vec" not in to_bitsandbytes(optimizer)["state"][0]


def test_norms_are_left_behind_without_clipping() -> None:
    params, saved = trained_there(1)
    saved = flat(saved)
    saved["state"][0]["gnorm_vec"] = history(37)
    optimizer = ours(params)
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer))
    assert "gnorm_history" not in optimizer.state[params["whole"]]


def change(*path: Any, to: Any) -> Callable[[StateDict], None]:
    def apply(saved: StateDict) -> None:
        for key in path[:-1]:
            saved = saved[key]
        if to is KeyError:
            del saved[path[-1]]
        else:
            saved[path[-1]] = to

    return apply


BYTES = torch.uint8


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("param_groups", 0, "params", to=[0, 1]), r"groups of \[2\] parameters, AdamW8bit has \[5\]"),
        (change("param_groups", 0, "betas", to=KeyError), r"lacks \['betas'\].*another optimizer"),
        (change("state", to=KeyError), "'state' and 'param_groups'"),
        (change("state", 9, to={"step": 1}), r"parameters \[9\], which are in none"),
        (change("state", 0, "absmax1", to=torch.zeros(4)), "'whole': .*blocks of 2048 .*before 0.44"),
        (change("state", 0, "absmax1", to=torch.zeros(5)), r"'whole': .*absmax1 torch.float32 \(5,\), expected"),
        (change("state", 0, "absmax2", to=torch.zeros(32).half()), "'whole': .*absmax2 torch.float16"),
        (change("state", 0, "qmap1", to=torch.linspace(-1, 1, 256)), "'whole': .*qmap1 that is not .*dynamic map"),
        (change("state", 0, "qmap2", to=torch.zeros(16)), r"'whole': .*qmap2 torch.float32 \(16,\)"),
        (change("state", 0, "state1", to=torch.zeros(4, 4, dtype=BYTES)), r"'whole': .*state1 torch.uint8 \(4, 4\)"),
        (change("state", 0, "state2", to=torch.zeros(16, 512).half()), "'whole': .*state2 torch.float16"),
        (change("state", 1, "state2", to=KeyError), r"'ragged': .*lacks \['state2'\]"),
        (change("state", 4, "step", to=KeyError), r"'bias': .*lacks \['step'\]"),
        (change("state", 4, "step", to="five"), "'bias': .*step 'five'"),
        (change("state", 0, "max1", to=torch.zeros(1)), "'whole': .*block_wise=False"),
        (change("state", 2, "exp_avg", to=torch.zeros(1)), r"'embed': .*unknown \['exp_avg'\]"),
        (change("state", 0, "gnorm_vec", to=torch.zeros(3)), "'whole': .*gnorm_vec"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_state_that_does_not_fit_is_refused_by_name(damage: Callable[[StateDict], None], message: str) -> None:
    params, saved = trained_there(1)
    saved = flat(saved)
    damage(saved)
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes(saved, ours(params, percentile_clipping=5))


def test_what_bitsandbytes_cannot_compute_is_refused() -> None:
    param = Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"L2 weight decay, the optimizer has 0\.1"):
        to_bitsandbytes(Adam8bit([param], weight_decay=0.1))
    for optimizer, message in (
        (AdamW8bit([param], maximize=True), "maximize=False, the optimizer has True"),
        (AdamW8bit([param], update_clip="rms"), "update_clip=None, the optimizer has 'rms'"),
        (optim.SGD8bit([param], momentum=0.9, nesterov=True), "nesterov=False"),
        (optim.SGD8bit([param], momentum=0.9, dampening=0.5), "dampening=0"),
        (optim.RMSprop8bit([param], momentum=0.9), "momentum=0"),
        (optim.RMSprop8bit([param], centered=True), "centered=False"),
        (optim.Adagrad8bit([param], lr_decay=0.1), "lr_decay=0"),
    ):
        with pytest.raises(ValueError, match=f"bitsandbytes computes {message}"):
            to_bitsandbytes(optimizer)


def test_optimizers_whose_state_is_another_there_are_refused_by_name() -> None:
    param = Parameter(torch.ones(2, 2))
    for optimizer in (optim.LARS8bit([param]), Muon8bit([param])):
        with pytest.raises(TypeError, match=f"no state like that of {type(optimizer).__name__}; .* AdEMAMix"):
            to_bitsandbytes(optimizer)
        with pytest.raises(TypeError, match="no state like that"):
            from_bitsandbytes({}, optimizer)


def test_two_averages_that_are_no_whole_blocks_convert_in_32_bits_only() -> None:
    params = {"odd": Parameter(torch.randn(33, 130))}
    there = bitsandbytes.optim.AdEMAMix8bit(params.values())
    train(there, params, range(2))
    optimizer = optim.AdEMAMix8bit(params.items())
    with pytest.raises(ValueError, match=r"'odd': .*two averages of 4290 values"):
        from_bitsandbytes(there.state_dict(), optimizer)
    train(optimizer, params, range(2))
    written = to_bitsandbytes(optimizer)
    assert "codes1" in optimizer.state[params["odd"]]
    state, moments = written["state"][0], moments_of(optimizer, params["odd"])
    assert torch.equal(state["state1"], torch.stack([moments["exp_avg"], moments["exp_avg_slow"]]))
    there.load_state_dict(written)
    train(there, params, range(2, 3))


def test_the_moments_of_lamb_convert() -> None:
    params = {"whole": Parameter(torch.randn(16, 512)), "bias": Parameter(torch.randn(7))}
    there = bitsandbytes.optim.LAMB8bit(params.values(), weight_decay=0.1)
    train(there, params, range(3))
    optimizer = optim.LAMB8bit(params.items())
    optimizer.load_state_dict(from_bitsandbytes(there.state_dict(), optimizer))
    assert torch.equal(optimizer.state[params["whole"]]["codes2"], there.state[params["whole"]]["state2"])
    there.load_state_dict(to_bitsandbytes(optimizer))
    train(there, params, range(3, 4))
    assert there.state[params["whole"]]["step"] == 4


def test_what_is_a_little_below_zero_there_is_zero_here() -> None:
    params = {"vector": Parameter(torch.randn(5120)), "whole": Parameter(torch.randn(16, 512))}
    there = bitsandbytes.optim.RMSprop8bit(params.values())
    train(there, params, range(2))
    saved = flat(copy.deepcopy(there.state_dict()))
    for state in saved["state"].values():
        state["state1"].view(-1)[5] = 126  # CUDA's code of a zero with a sign: -5.5e-7 of the scale
    optimizer = optim.RMSprop8bit(params.items())
    optimizer.load_state_dict(from_bitsandbytes(saved, optimizer))
    for param in params.values():
        moment = moments_of(optimizer, param)["square_avg"]
        assert moment.min() == moment.view(-1)[5] == 0
    train(optimizer, params, range(2, 3))
    assert all(param.isfinite().all() for param in params.values())


def test_param_groups_keep_their_parameters_apart() -> None:
    params = list(parameters().values())
    optimizer = AdamW8bit([{"params": params[:2], "lr": 0.5}, {"params": params[2:]}])
    there = bitsandbytes.optim.AdamW8bit([{"params": params[:2]}, {"params": params[2:]}])
    train(optimizer, dict(enumerate(params)), range(2))
    written = to_bitsandbytes(optimizer)
    assert [group["params"] for group in written["param_groups"]] == [[0, 1], [2, 3, 4]]
    assert [group["lr"] for group in written["param_groups"]] == [0.5, 1e-3]
    there.load_state_dict(written)
    train(there, dict(enumerate(params)), range(2, 3))
    optimizer.load_state_dict(from_bitsandbytes(there.state_dict(), optimizer))
    assert [optimizer.state[param]["step"].item() for param in params] == [3] * 5


def test_a_file_of_another_optimizer_is_refused() -> None:
    params = parameters()
    there = theirs(params)
    train(there, params, range(1))
    saved = there.state_dict()
    with pytest.raises(ValueError, match=r"'whole': .*unknown \['absmax2', 'qmap2', 'state2'\]"):
        from_bitsandbytes(saved, optim.Lion8bit(params.items()))
    del saved["param_groups"][0]["alpha"]
    with pytest.raises(ValueError, match=r"lacks \['alpha'\]"):
        from_bitsandbytes(saved, optim.AdEMAMix8bit(params.items()))


def test_e4m3_state_is_written_in_8_bits_and_read_back() -> None:
    params = parameters()
    optimizer = ours(params, state="fp8")
    train(optimizer, params, range(3))
    written = to_bitsandbytes(optimizer)
    assert written["state"][0]["state1"].dtype == torch.uint8
    before = moments_of(optimizer, params["whole"])
    scale = amax_by_row_blocks(before["exp_avg"])
    assert ((dequantized_there(written["state"][0], "1") - before["exp_avg"]).abs() <= scale * 0.0071).all()
    optimizer.load_state_dict(from_bitsandbytes(written, optimizer))
    assert optimizer.state[params["whole"]]["codes1"].dtype == torch.float8_e4m3fn


def test_adam_of_bitsandbytes_decays_as_adamw_does() -> None:
    param = Parameter(torch.randn(16, 512))
    there = bitsandbytes.optim.Adam8bit([param], weight_decay=0.1)
    optimizer = Adam8bit([param])
    optimizer.load_state_dict(from_bitsandbytes(there.state_dict(), optimizer))
    assert optimizer.param_groups[0]["decoupled_weight_decay"]
    assert to_bitsandbytes(optimizer)["param_groups"][0]["weight_decay"] == 0.1
