"""Muon against torch.optim.Muon, and the split of a model's parameters."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lq_kernels.codebooks import dynamic_map
from lq_kernels.optimizer_state import load_moment
from lq_kernels.optimizer_step import Job, launch_step
from torch import Tensor, nn
from torch.nn import Parameter

from lq_plugin.optim import AdamW8bit, muon
from lq_plugin.optim.muon import COEFFICIENTS, Muon, Muon8bit, Muon32bit, orthogonalize, split_parameters
from lq_plugin.recipes.tasks.gpt import GPT

# Wide, tall, rows that are no whole blocks, twice the same, a row, nothing.
SHAPES = [(64, 256), (256, 48), (33, 130), (64, 256), (1, 5), (0, 3)]
BFLOAT16_ULP = 2.0**-8  # of a value, at most
HALF_CODE = float(dynamic_map("dynamic_symmetric").diff().max()) / 2  # of the scale of a block


def parameters(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, int]] = SHAPES) -> list[Parameter]:
    return [Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in shapes]


def copies(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(param.detach().clone()) for param in params]


def set_gradients(step: int, *models: list[Parameter]) -> None:
    """Seeded gradients of very different sizes, the same but for their type in each of the models."""
    for same in zip(*models, strict=True):
        generator = torch.Generator().manual_seed(1000 * step + same[0].numel())
        grad = torch.randn(same[0].shape, generator=generator) * 10.0 ** -(step % 3)
        for param in same:
            param.grad = grad.to(param.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(step, params)
        optimizer.step()


def assert_equal(a: list[Parameter], b: list[Parameter]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (50, 50), (37, 1000), (1, 5), (5, 1)])
@pytest.mark.parametrize("steps", [1, 5])
def test_matrices_are_orthogonalised_as_by_torch(shape: tuple[int, int], steps: int) -> None:
    grads = torch.randn(3, *shape)
    params = [Parameter(torch.zeros(shape)) for _ in grads]
    alone = torch.optim.Muon(params, lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, ns_steps=steps)
    alone.param_groups[0]["adjust_lr_fn"] = "match_rms_adamw"
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    alone.step()
    together = orthogonalize(grads.bfloat16(), COEFFICIENTS, steps, 1e-7)
    ratio = 0.2 * max(shape) ** 0.5
    for param, matrix in zip(params, together, strict=True):
        torch.testing.assert_close(-param.detach(), ratio * matrix.float(), rtol=1e-6, atol=0)


def test_singular_values_become_nearly_one_whatever_the_scale() -> None:
    x = torch.randn(3, 64, 256) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    values = torch.linalg.svdvals(orthogonalize(x.bfloat16(), COEFFICIENTS, 5, 1e-30).float())
    assert values.min() > 0.6  # the interval of the iteration with these coefficients is about 0.68 .. 1.13
    assert values.max() < 1.2


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(2, 3, 4).bfloat16(), COEFFICIENTS, 5, 1e-7).any()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"nesterov": False, "momentum": 0.8, "weight_decay": 0.5},
        {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
        {"adjust_lr_fn": "original", "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
        {"momentum": 0.0, "lr": torch.tensor(1e-2)},
    ],
    ids=str,
)
def test_float32_state_computes_what_torch_computes(arguments: dict[str, Any]) -> None:
    arguments = {"lr": 1e-2} | arguments
    mine = parameters()
    reference = copies(mine)
    optimizer, torch_optimizer = Muon(mine, **arguments), torch.optim.Muon(reference, **arguments)
    for step in range(8):
        set_gradients(step, mine, reference)
        if step == 3:
            mine[0].grad = reference[0].grad = None
        optimizer.step()
        torch_optimizer.step()
        assert_equal(mine, reference)
        for param, expected in zip(mine, reference, strict=True):
            assert torch.equal(optimizer.state[param]["state1"], torch_optimizer.state[expected]["momentum_buffer"])
    assert optimizer.state[mine[0]]["step"] == 7


def test_param_groups_have_their_own_hyper_parameters() -> None:
    mine = parameters(shapes=[(64, 256)] * 4)
    reference = copies(mine)
    arguments: list[dict[str, Any]] = [
        {"params": [0, 1], "lr": 0.1, "momentum": 0.5},
        {"params": [2], "weight_decay": 0.7, "nesterov": False, "ns_steps": 2},
        {"params": [3], "adjust_lr_fn": "match_rms_adamw"},
    ]
    optimizer, torch_optimizer = (
        cls([group | {"params": [model[i] for i in group["params"]]} for group in arguments])
        for cls, model in ((Muon, mine), (torch.optim.Muon, reference))
    )
    for step in range(3):
        set_gradients(step, mine, reference)
        optimizer.step()
        torch_optimizer.step()
    assert_equal(mine, reference)


def test_8bit_weights_move_by_the_momentum_before_it_is_rounded() -> None:
    mine = parameters(shapes=[(64, 256), (64, 300)])
    optimizer = Muon8bit(mine, lr=1e-2)
    for step in range(5):
        exact = copies(mine)
        exact_optimizer = Muon32bit(exact, lr=1e-2)
        for param, other in zip(mine, exact, strict=True):
            if optimizer.state.get(param):
                momentum = load_moment(optimizer.state[param], 1, signed=True).clone()
                exact_optimizer.state[other] = {"step": torch.tensor(float(step)), "state1": momentum}
        set_gradients(step, mine, exact)
        optimizer.step()
        exact_optimizer.step()
        assert_equal(mine, exact)
        for param, other in zip(mine, exact, strict=True):
            state, momentum = optimizer.state[param], exact_optimizer.state[other]["state1"]
            assert state["codes1"].dtype == torch.uint8
            scale = state["scale1"].repeat_interleave(256, dim=1)[:, : momentum.shape[1]]
            assert torch.equal(state["scale1"][:, 0], momentum[:, :256].abs().amax(dim=1))
            error = (load_moment(state, 1, signed=True) - momentum).abs()
            assert (error <= scale * HALF_CODE * 1.0001).all()
            assert error.any()


def test_8bit_momentum_follows_torch_over_many_steps() -> None:
    mine = parameters(shapes=[(64, 256)])
    reference = copies(mine)
    optimizer, torch_optimizer = Muon8bit(mine, lr=1e-2), torch.optim.Muon(reference, lr=1e-2)
    start = mine[0].detach().clone()
    for step in range(40):
        set_gradients(step, mine, reference)
        optimizer.step()
        torch_optimizer.step()
    moved = reference[0] - start
    assert (mine[0] - reference[0]).norm() < 0.03 * moved.norm()  # measured 0.012


@pytest.mark.parametrize("options", [{}, {"percentile_clipping": 5}, {"master_weights": "32bit"}], ids=str)
def test_half_precision_weights_are_rounded_once(options: dict[str, Any]) -> None:
    mine = parameters(torch.bfloat16)
    reference = [Parameter(param.detach().float()) for param in mine]
    optimizer, exact = Muon(mine, lr=1e-2, **options), Muon(reference, lr=1e-2, **options)
    for step in range(3):
        set_gradients(step, mine, reference)
        for param, other in zip(mine, reference, strict=True):
            other.grad = param.grad.float()
        optimizer.step()
        exact.step()
        for param, other in zip(mine, reference, strict=True):
            assert torch.equal(param, other.bfloat16())
            if "master" not in optimizer.state[param]:
                other.data.copy_(param)


def test_stochastic_rounding_keeps_the_mean_and_depends_on_the_step() -> None:
    weights = torch.full((64, 256), 1.0)
    seen = []
    for seed in range(20):
        param = Parameter(weights.bfloat16())
        optimizer = Muon8bit([param], lr=1e-3, weight_decay=0.0, stochastic_rounding=True, rounding_seed=seed)
        set_gradients(0, [param])
        optimizer.step()
        seen.append(param.detach().float())
    exact = Parameter(weights)
    exact_optimizer = Muon([exact], lr=1e-3, weight_decay=0.0)
    set_gradients(0, [exact])
    exact.grad = param.grad.float()
    exact_optimizer.step()
    mean = torch.stack(seen).mean(0)
    # Of the 16384 x 20 draws between neighbours that lie 2^-8 or 2^-7 apart: 5 standard deviations.
    assert (mean - exact.detach()).mean().abs() < 5 * 2**-8 / (weights.numel() * 20) ** 0.5
    assert len({round(float(x.double().sum()), 6) for x in seen}) > 10


@pytest.mark.parametrize(
    "options",
    [{"percentile_clipping": 5}, {"stochastic_rounding": True, "rounding_seed": 3}, {"master_weights": "8bit"}],
    ids=str,
)
@pytest.mark.parametrize("state", ["8bit", "fp8"])
def test_resuming_from_a_state_dict_changes_nothing(options: dict[str, Any], state: str) -> None:
    straight = parameters(torch.bfloat16)
    half = copies(straight)
    train(Muon(straight, lr=1e-2, state=state, **options), straight, range(6))
    first = Muon(half, lr=1e-2, state=state, **options)
    train(first, half, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = copies(half)
    optimizer = Muon(resumed, state=state, **options)
    train(optimizer, resumed, range(1))  # something to replace
    for param, other in zip(resumed, half, strict=True):
        param.data.copy_(other)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    train(optimizer, resumed, range(3, 6))
    assert_equal(resumed, straight)


def test_random_bits_are_those_of_the_steps_that_were_taken() -> None:
    options = {"stochastic_rounding": True, "percentile_clipping": 5}
    params = parameters(torch.bfloat16, [(64, 256), (64, 256)])
    optimizer = Muon8bit(params, lr=1e-2, **options)
    set_gradients(0, params)
    params[0].grad[0, 0] = torch.nan  # skipped: the first parameter has taken no step yet
    optimizer.step()
    again = copies(params)
    resumed = Muon8bit(again, **options)
    resumed.load_state_dict(optimizer.state_dict())
    train(optimizer, params, range(1, 2))
    train(resumed, again, range(1, 2))
    assert_equal(params, again)


def test_torch_state_is_converted_on_load() -> None:
    params = parameters()
    plain = torch.optim.Muon(params, lr=0.5)
    train(plain, params, range(3))
    optimizer = Muon8bit(params)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    momentum = plain.state[params[0]]["momentum_buffer"]
    assert optimizer.state[params[0]]["codes1"].dtype == torch.uint8
    assert torch.equal(optimizer.state[params[0]]["scale1"][:, 0], momentum.abs().amax(dim=1))
    assert torch.equal(optimizer.state[params[4]]["state1"], plain.state[params[4]]["momentum_buffer"])


def test_a_gradient_that_is_not_finite_is_skipped_with_clipping_and_only_then() -> None:
    params = parameters(shapes=[(64, 256)] * 3)
    other = copies(params)
    optimizer, without = Muon8bit(params, percentile_clipping=5), Muon8bit(other)
    train(optimizer, params, range(2))
    train(without, other, range(2))
    before, state = copies(params), copy.deepcopy(optimizer.state[params[1]])
    set_gradients(2, params, other)
    params[1].grad[3, 4] = other[1].grad[3, 4] = torch.inf
    optimizer.step()
    without.step()
    assert torch.equal(params[1], before[1])
    assert optimizer.state[params[1]].pop("gnorm_counts").tolist()[2] == 1
    state.pop("gnorm_counts")
    torch.testing.assert_close(optimizer.state[params[1]], state, rtol=0, atol=0)
    for i in (0, 2):
        assert params[i].isfinite().all()
        assert not torch.equal(params[i], before[i])
    assert other[1].isnan().any()
    assert other[0].isfinite().all()


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_surge_enters_the_momentum_clipped(scope: str) -> None:
    params = parameters(shapes=[(64, 256), (48, 256)])
    optimizer = Muon(params, percentile_clipping=5, clip_scope=scope, momentum=0.5)
    for factor in (1.0, 1000.0):
        for param in params:
            param.grad = torch.full_like(param, factor)
        optimizer.step()
    for param in params:  # 0.5 of 0.5 of the first, and 0.5 of the second, which is clipped to the norm of the first
        torch.testing.assert_close(optimizer.state[param]["state1"], torch.full_like(param, 0.75))


@pytest.mark.parametrize("limit", [1, 64 * 256, 3 * 64 * 256])
@pytest.mark.parametrize("options", [{}, {"percentile_clipping": 5, "clip_scope": "global"}], ids=str)
def test_what_goes_together_does_not_matter(
    limit: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = parameters(torch.bfloat16, [*SHAPES, (64, 256)])
    apart = copies(together)
    train(Muon8bit(together, stochastic_rounding=True, **options), together, range(3))
    monkeypatch.setattr(muon, "ELEMENTS_TOGETHER", limit)
    train(Muon8bit(apart, stochastic_rounding=True, **options), apart, range(3))
    assert_equal(together, apart)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("state", "options", "dtype"),
    [
        ("8bit", {"weight_decay": 5.0}, torch.float32),
        ("8bit", {"percentile_clipping": 5, "nesterov": False}, torch.float32),
        ("fp8", {"percentile_clipping": 5}, torch.bfloat16),
        ("32bit", {"weight_decay": 5.0}, torch.bfloat16),
    ],
    ids=str,
)
def test_the_kernels_compute_what_torch_computes(
    state: str, options: dict[str, Any], dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(8, 256), (5, 300), (8, 256), (40, 7)]
    mine = parameters(dtype, shapes)
    kernels = [Parameter(param.detach().to(device, copy=True)) for param in mine]
    arguments = {"lr": 1e-2, "state": state, "min_8bit_size": 0, **options}
    optimizer, launched = Muon(mine, **arguments), Muon(kernels, **arguments)
    for step in range(3):
        before = copies(mine)
        set_gradients(step, mine)
        if step == 2:
            mine[0].grad[0, 0] = torch.nan if "percentile_clipping" in options else 1.0
        for param, other in zip(mine, kernels, strict=True):
            other.grad = param.grad.to(device)
        optimizer.step()
        with monkeypatch.context() as patched:
            patched.setattr(muon, "optimizer_step", launch_step)
            launched.step()
        for param, other, start in zip(mine, kernels, before, strict=True):
            moved = (param - start).float().norm()
            error = (param.float() - other.cpu().float()).detach()
            rounding = BFLOAT16_ULP * param.float().norm() if dtype == torch.bfloat16 else 0.0
            assert error.norm() <= 2 * BFLOAT16_ULP * moved + rounding
            ours, theirs = (load_moment(s.state[p], 1, True).cpu() for s, p in ((optimizer, param), (launched, other)))
            scale = ours.abs().max()
            assert ((ours - theirs).abs() <= scale * (1e-6 if state == "32bit" else 0.13)).all()  # one code
            other.data.copy_(param)


def test_kernels_find_the_hyper_parameters_of_each_group_in_every_piece(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "ELEMENTS_TOGETHER", 1)
    torch_params = parameters(shapes=[(4, 256), (8, 64), (4, 256)])
    kernel_params = [Parameter(param.detach().to(device, copy=True)) for param in torch_params]
    before = copies(torch_params)
    models = []
    for params in (torch_params, kernel_params):
        groups = [{"params": [param], "lr": 0.1 * 2**i, "momentum": 0.3 * i} for i, param in enumerate(params)]
        models.append(Muon8bit(groups, min_8bit_size=0))
    set_gradients(0, torch_params)
    for param, other in zip(torch_params, kernel_params, strict=True):
        other.grad = param.grad.to(device)
    models[0].step()
    monkeypatch.setattr(muon, "optimizer_step", launch_step)
    models[1].step()
    for param, other, start in zip(torch_params, kernel_params, before, strict=True):
        assert (param - other.cpu()).norm() <= 2 * BFLOAT16_ULP * (param - start).norm()


def test_the_step_is_repeatable_and_survives_pickling_and_copying() -> None:
    params = parameters()
    optimizer = Muon8bit(params)
    train(optimizer, params, range(2))
    for same in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        of_same = [param for group in same.param_groups for param in group["params"]]
        before = copies(of_same)
        train(same, of_same, range(2, 4))
        again = Muon8bit(before)
        again.load_state_dict(optimizer.state_dict())
        train(again, before, range(2, 4))
        assert_equal(of_same, before)


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    param = Parameter(torch.randn(4, 3))
    optimizer = Muon8bit([param])
    calls: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls.append(param.square().sum())
        calls[-1].backward()
        return calls[-1]

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1


def test_nothing_moves_when_there_are_no_gradients() -> None:
    params = parameters()
    before = copies(params)
    Muon8bit(params, weight_decay=0.5).step()
    assert_equal(params, before)


MATRIX, VECTOR = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Muon8bit([("a.weight", MATRIX), ("a.bias", VECTOR)]), r"'a.bias' has shape \(2,\): split_parameters"),
        (lambda: Muon8bit([MATRIX, VECTOR]), r"a parameter has shape \(2,\)"),
        (lambda: Muon8bit([Parameter(torch.ones(2, 2, 2))]), r"shape \(2, 2, 2\)"),
        (lambda: Muon8bit([MATRIX], lr=-1.0), "Learning rate"),
        (lambda: Muon8bit([MATRIX], momentum=-1.0), "momentum"),
        (lambda: Muon8bit([MATRIX], weight_decay=-1.0), "weight decay"),
        (lambda: Muon8bit([MATRIX], adjust_lr_fn="other"), "other"),
        (lambda: Muon8bit([MATRIX], ns_steps=100), "up to 99 ns_steps with 3 ns_coefficients, got 100"),
        (lambda: Muon8bit([MATRIX], ns_coefficients=(1.0, 2.0)), r"got 5 with \(1.0, 2.0\)"),
        (lambda: Muon8bit([MATRIX], state="4bit"), "state is one of '8bit', 'fp8', '32bit'"),
        (lambda: Muon8bit([MATRIX], update_clip="rms"), "Muon8bit has no update_clip"),
        (lambda: Muon8bit([{"params": [MATRIX], "adjust_lr_fn": "other"}]), "adjust_lr_fn is 'original' or"),
    ],
)
def test_what_cannot_be_computed_is_an_error(make: Callable[[], Muon], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_param_group_added_later_is_checked_and_left_out_when_it_does_not_fit() -> None:
    optimizer = Muon8bit([MATRIX])
    for group in ({"params": [VECTOR]}, {"params": [Parameter(torch.ones(2, 2))], "ns_steps": 200}):
        with pytest.raises(ValueError, match=r"matrices|ns_steps"):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [Parameter(torch.ones(3, 3))], "lr": 0.5})
    assert optimizer.param_groups[1]["state"] == "8bit"


def small_gpt() -> GPT:
    return GPT(vocabulary=16, width=16, depth=2, heads=2, context=16)


def test_the_matrices_of_a_gpt_go_to_muon_and_the_rest_does_not() -> None:
    model = small_gpt()
    matrices, rest = split_parameters(model)
    inside = ("attention.qkv", "attention.proj", "up", "down")
    assert [name for name, _ in matrices] == [f"blocks.{i}.{name}.weight" for i in range(2) for name in inside]
    assert {"embedding.weight", "lm_head.weight", "norm.weight"} < {name for name, _ in rest}
    together = [*matrices, *rest]
    assert {name: id(param) for name, param in together} == {n: id(p) for n, p in model.named_parameters()}


def test_tied_frozen_and_other_parameters_are_told_apart() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(20, 8)
            self.output = nn.Linear(8, 20, bias=False)
            self.output.weight = self.wte.weight
            self.pos_embed = Parameter(torch.zeros(4, 8))
            self.convolution = nn.Conv1d(8, 8, 3)
            self.frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
            self.inside = nn.Linear(8, 8)
            self.classifier = nn.Linear(8, 3, bias=False)

        def get_output_embeddings(self) -> nn.Module:
            return self.classifier

    matrices, rest = split_parameters(Model())
    assert [name for name, _ in matrices] == ["inside.weight"]
    assert {name for name, _ in rest} == {
        "wte.weight", "pos_embed", "convolution.weight", "convolution.bias", "inside.bias", "classifier.weight"
    }  # fmt: skip
    compiled, _ = split_parameters(torch.compile(Model(), backend="eager"))
    assert [name for name, _ in compiled] == ["inside.weight"]


def test_a_small_gpt_learns_with_muon_and_adamw() -> None:
    model = small_gpt()
    matrices, rest = split_parameters(model)
    optimizers = [Muon8bit(matrices, lr=0.02, min_8bit_size=0), AdamW8bit(rest, lr=1e-2)]
    tokens = torch.randint(16, (2, 16))
    losses = []
    for _ in range(8):
        logits = model(tokens)
        loss = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 16), tokens[:, 1:].reshape(-1))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_jobs_hold_no_directions_after_the_step() -> None:
    param = Parameter(torch.randn(64, 256))
    optimizer = Muon8bit([param])
    train(optimizer, [param], range(1))
    assert all(work._memory.numel() == 0 for work in optimizer._work)
    assert isinstance(optimizer._work[0].direction_job(optimizer, [param.grad]), Job)
