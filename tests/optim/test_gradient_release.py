"""gradient_release: the numbers of an ordinary step, without the gradients, and errors where it could not keep them."""

import copy
import functools
import gc
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.data import DataLoader

from lq_plugin import QuantPlugin, optim
from lq_plugin.optim import AdamW8bit, Options
from lq_plugin.optim.base import LowBitOptimizer

SHAPES = [(64, 256), (33, 130), (5, 7, 11), (100,), (1, 1)]
ALGORITHMS: list[tuple[Any, dict[str, Any]]] = [
    (optim.AdamW, {"update_clip": "rms"}),
    (optim.Adam, {"weight_decay": 0.1}),
    (optim.AdEMAMix, {}),
    (optim.Lion, {}),
    (optim.SGD, {"momentum": 0.9}),
    (optim.SGD, {}),
    (optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (optim.Adagrad, {}),
    (optim.LAMB, {}),
    (optim.LARS, {}),
]


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    torch.manual_seed(5)
    return [Parameter((torch.randn(shape) * 0.1).to(dtype)) for shape in SHAPES]


def backward(params: Sequence[Tensor], step: int) -> None:
    """The same gradients for the same step and shapes."""
    generator = torch.Generator().manual_seed(step)
    loss = torch.zeros((), device=params[0].device)
    for param in params:
        loss = loss + (param.float() * torch.randn(param.shape, generator=generator).to(param.device) * 0.01).sum()
    loss.backward()


def loss_and_backward(params: Sequence[Tensor], step: int) -> float:
    backward(params, step)
    return 3.0


def train(params: list[Parameter], optimizer: LowBitOptimizer, steps: Sequence[int]) -> None:
    for step in steps:
        backward(params, step)
        optimizer.step()
        optimizer.zero_grad()


def assert_same(a: LowBitOptimizer, b: LowBitOptimizer) -> None:
    """Parameters, states and param_groups, to the bit."""
    first, second = a.state_dict(), b.state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for number, state in first["state"].items():
        assert state.keys() == second["state"][number].keys()
        for key, value in state.items():
            other = second["state"][number][key]
            assert value.dtype == other.dtype
            assert torch.equal(
                value.view(torch.uint8) if value.ndim else value, other.view(torch.uint8) if other.ndim else other
            )
    for group, other_group in zip(a.param_groups, b.param_groups, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(group["params"], other_group["params"], strict=True))


@pytest.mark.parametrize("state", ["8bit", "fp8", "32bit"])
@pytest.mark.parametrize(("cls", "arguments"), ALGORITHMS, ids=lambda value: getattr(value, "__name__", ""))
def test_updates_in_the_backward_pass_are_those_of_a_step(cls: Any, arguments: dict[str, Any], state: str) -> None:
    arguments = arguments | {"state": state, "percentile_clipping": 10}
    params, released_params = parameters(), parameters()
    ordinary, released = cls(params, **arguments), cls(released_params, gradient_release=True, **arguments)
    train(params, ordinary, range(5))
    train(released_params, released, range(5))
    assert_same(ordinary, released)


@pytest.mark.parametrize("how", [{"stochastic_rounding": True}, {"master_weights": "8bit"}, {"offload": True}], ids=str)
def test_bfloat16_weights_take_the_same_bits(how: dict[str, Any]) -> None:
    params, released_params = parameters(torch.bfloat16), parameters(torch.bfloat16)
    groups = [[{"params": p[:2], "lr": 0.1}, {"params": p[2:], "rounding_seed": 7}] for p in (params, released_params)]
    ordinary, released = AdamW8bit(groups[0], **how), AdamW8bit(groups[1], gradient_release=True, **how)
    train(params, ordinary, range(5))
    train(released_params, released, range(5))
    assert_same(ordinary, released)


def test_no_gradient_is_left_and_never_two_are_there() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    optimizer = AdamW8bit(model.parameters(), gradient_release=True)
    alive: list[int] = []
    for param in model.parameters():
        param.register_hook(lambda _: alive.append(sum(p.grad is not None for p in model.parameters())))
    before = copy.deepcopy(list(model.parameters()))
    model(torch.randn(4, 64)).square().mean().backward()
    assert len(alive) == 8
    assert max(alive) == 0
    assert all(param.grad is None for param in model.parameters())
    assert all(not torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
    optimizer.step()
    assert all(optimizer.state[param]["step"] == 1 for param in model.parameters())


def test_a_second_backward_pass_before_the_step_is_an_error_and_changes_nothing() -> None:
    params = parameters()
    optimizer = AdamW8bit(params, gradient_release=True)
    backward(params, 0)
    after_first = copy.deepcopy(params)
    with pytest.raises(RuntimeError, match=r"second gradient.*cannot be accumulated"):
        backward(params, 1)
    assert all(torch.equal(param, old) for param, old in zip(params, after_first, strict=True))
    optimizer.step()
    optimizer.zero_grad()
    backward(params, 2)


def test_a_closure_is_evaluated_once() -> None:
    params, expected_params = parameters(), parameters()
    optimizer, expected = AdamW8bit(params, gradient_release=True), AdamW8bit(expected_params)
    for step in range(3):
        assert optimizer.step(functools.partial(loss_and_backward, params, step)) == 3.0
    train(expected_params, expected, range(3))
    assert_same(optimizer, expected)
    with pytest.raises(RuntimeError, match="closure be evaluated twice"):
        optimizer.step(lambda: (backward(params, 3), backward(params, 4)))


def test_the_step_updates_what_the_backward_pass_did_not() -> None:
    params, expected_params = parameters(), parameters()
    params[0].requires_grad_(False)
    optimizer, expected = AdamW8bit(params, gradient_release=True), AdamW8bit(expected_params)
    for step in range(4):
        params[0].requires_grad_(True)  # after the hooks were made: it has none
        backward(params, step)
        assert [param.grad is None for param in params] == [False, True, True, True, True]
        optimizer.step()
        optimizer.zero_grad()
    train(expected_params, expected, range(4))
    assert_same(optimizer, expected)


def test_a_weight_used_twice_is_updated_once() -> None:
    weights = [Parameter(torch.eye(64)), Parameter(torch.eye(64))]
    optimizers = [AdamW8bit([weights[0]], gradient_release=True), AdamW8bit([weights[1]])]
    x = torch.randn(3, 64)
    for weight, optimizer in zip(weights, optimizers, strict=True):
        (x @ weight @ weight.t()).square().mean().backward()
        optimizer.step()
    assert_same(*optimizers)


def test_what_needs_all_gradients_is_refused() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="clip_scope='global' needs the norm over all"):
        AdamW8bit(params, gradient_release=True, clip_scope="global")
    with pytest.raises(ValueError, match="clip_scope='global' needs the norm over all"):
        Options(gradient_release=True, clip_scope="global")
    optimizer = AdamW8bit(params[:2], gradient_release=True)
    with pytest.raises(ValueError, match="clip_scope='global' needs the norm over all"):
        optimizer.add_param_group({"params": params[2:], "clip_scope": "global"})
    with pytest.raises(ValueError, match="Muon8bit updates tensors together"):
        optim.Muon8bit(params[:1], gradient_release=True)
    plain = torch.optim.Muon(params[:1])
    with pytest.raises(ValueError, match="Muon8bit updates tensors together"):
        optim.become(plain, Options(gradient_release=True))
    assert type(plain) is torch.optim.Muon


def test_gradients_of_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = AdamW8bit(params, gradient_release=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="before its gradient is averaged over 2 processes"):
        backward(params, 0)
    assert not optimizer.state


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    embedding = nn.Embedding(200, 64, sparse=True)
    optimizer = AdamW8bit(embedding.parameters(), gradient_release=True)
    before = embedding.weight.detach().clone()
    with pytest.raises(TypeError, match="dense float32"):
        embedding(torch.tensor([1, 2])).sum().backward()
    assert torch.equal(embedding.weight, before)
    assert not optimizer.state
    embedding.sparse = False
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    before = embedding.weight.detach().clone()
    embedding.sparse = True
    with pytest.raises(TypeError, match="dense float32"):
        embedding(torch.tensor([1, 2])).sum().backward()
    assert torch.equal(embedding.weight, before)


def test_options_and_states_may_change_between_steps() -> None:
    params, released_params = parameters(), parameters()
    ordinary, released = optim.SGD8bit(params), optim.SGD8bit(released_params, gradient_release=True)
    for own, optimizer in ((params, ordinary), (released_params, released)):
        train(own, optimizer, range(2))
        optimizer.param_groups[0]["momentum"] = 0.9
        train(own, optimizer, range(2, 4))
        optimizer.param_groups[0]["percentile_clipping"] = 10
        train(own, optimizer, range(4, 6))
        for param in own:
            optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}
        train(own, optimizer, range(6, 8))
    assert_same(ordinary, released)


def test_the_state_dict_is_that_of_an_ordinary_optimizer() -> None:
    params, released_params, straight_params = parameters(), parameters(), parameters()
    ordinary, released = AdamW8bit(params), AdamW8bit(released_params, gradient_release=True)
    straight = AdamW8bit(straight_params)
    train(straight_params, straight, range(6))
    train(params, ordinary, range(3))
    train(released_params, released, range(3))
    saved, released_saved = copy.deepcopy(ordinary.state_dict()), copy.deepcopy(released.state_dict())
    ordinary.load_state_dict(released_saved)
    released.load_state_dict(saved)
    assert [len(param._post_accumulate_grad_hooks) for param in released_params] == [1] * len(SHAPES)
    train(params, ordinary, range(3, 6))
    for step in range(3, 6):
        backward(released_params, step)
        assert all(param.grad is None for param in released_params)
        released.step()
    assert_same(ordinary, straight)
    assert_same(released, straight)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_has_hooks_of_its_own(duplicate: Any) -> None:
    params, straight_params = parameters(), parameters()
    optimizer, straight = AdamW8bit(params, gradient_release=True), AdamW8bit(straight_params)
    train(params, optimizer, range(2))
    copied_params, copied = duplicate((params, optimizer))
    train(straight_params, straight, range(4))
    for step in range(2, 4):
        backward(copied_params, step)
        assert all(param.grad is None for param in copied_params)
        copied.step()
    assert_same(copied, straight)
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_new_parameters_are_released_too() -> None:
    params = parameters()
    optimizer = AdamW8bit(params[:2], gradient_release=True)
    optimizer.add_param_group({"params": params[2:]})
    backward(params, 0)
    assert all(param.grad is None for param in params)


def test_hooks_end_with_the_optimizer_or_when_told() -> None:
    params = parameters()
    optimizer = AdamW8bit(params, gradient_release=True)
    optimizer.stop_gradient_release()
    backward(params, 0)
    assert all(param.grad is not None for param in params)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.start_gradient_release()
    backward(params, 1)
    assert all(param.grad is None for param in params)
    del optimizer
    gc.collect()
    backward(params, 2)
    assert all(param.grad is not None for param in params)


def test_two_optimizers_cannot_release_one_gradient() -> None:
    params = parameters()
    kept = [AdamW8bit(params, gradient_release=True) for _ in range(2)]
    with pytest.raises(RuntimeError, match="two optimizers with gradient_release"):
        backward(params, 0)
    kept[0].stop_gradient_release()


class Tiny(LightningModule):
    """Records the learning rates and whether gradients were left when the step began."""

    def __init__(self, automatic: bool = True, clip: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 32))
        self.automatic_optimization, self.clip = automatic, clip
        self.left: list[bool] = []
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor | None:
        loss = self.net(batch).square().mean()
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, self.clip)
        optimizer.step()
        optimizer.zero_grad()
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.left.append(any(param.grad is not None for param in self.parameters()))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(tmp_path: Path, model: Tiny, options: Options, precision: str | None = None, **kwargs: Any) -> Tiny:
    plugin = QuantPlugin(linear=None, optimizer=options, precision=precision, percentile_clipping=None)
    arguments: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_progress_bar": False}
    arguments |= {"enable_model_summary": False, "enable_checkpointing": False, "accelerator": "cpu"}
    data: DataLoader[Any] = DataLoader(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)), batch_size=16)
    Trainer(default_root_dir=tmp_path, plugins=[plugin], **(arguments | kwargs)).fit(model, data)
    return model


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("offload", [True, False])
def test_lightning_trains_to_the_same_weights(tmp_path: Path, offload: bool, automatic: bool) -> None:
    released = fit(tmp_path, Tiny(automatic), Options(gradient_release=True, offload=offload))
    ordinary = fit(tmp_path, Tiny(automatic), Options())
    assert len(ordinary.left) == 4
    assert not any(released.left)
    assert all(ordinary.left)
    assert released.rates == ordinary.rates
    for param, expected in zip(released.parameters(), ordinary.parameters(), strict=True):
        assert torch.equal(param, expected)
        assert not param._post_accumulate_grad_hooks


class Kept(Tiny):
    """Gives Lightning the same optimizer of ours at every fit."""

    def __init__(self, release: bool) -> None:
        super().__init__()
        self.kept = AdamW8bit(self.parameters(), lr=1e-2, gradient_release=release)

    def configure_optimizers(self) -> Any:
        return self.kept


def test_a_second_fit_with_the_same_optimizer_releases_again(tmp_path: Path) -> None:
    released, ordinary = Kept(True), Kept(False)
    for model in (released, ordinary):
        for _ in range(2):
            fit(tmp_path, model, Options())
            assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    assert released.left == [False] * 8
    assert ordinary.left == [True] * 8
    assert_same(released.kept, ordinary.kept)
    with pytest.raises(ValueError, match="accumulate_grad_batches=1"):
        fit(tmp_path, released, Options(), accumulate_grad_batches=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=1"),
        ({"callbacks": [GradientAccumulationScheduler({1: 2})]}, "accumulate_grad_batches=1"),
        ({"gradient_clip_val": 1.0}, "clipping at 1.0 needs all gradients"),
        ({"precision": "16-mixed"}, "16-mixed unscales gradients"),
    ],
    ids=["accumulation", "scheduled accumulation", "clipping", "scaled gradients"],
)
def test_lightning_refuses_what_needs_gradients_later(tmp_path: Path, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Tiny(), Options(gradient_release=True), **arguments)


def test_clipping_by_hand_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clipping at 0\.5 needs all gradients"):
        fit(tmp_path, Tiny(automatic=False, clip=0.5), Options(gradient_release=True))


@pytest.mark.gpu
def test_peak_memory_falls_by_the_gradients() -> None:
    peaks = []
    for release in (False, True):
        params = [Parameter(torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16)) for _ in range(16)]
        optimizer = AdamW8bit(params, gradient_release=release)
        for step in range(3):
            torch.cuda.reset_peak_memory_stats()
            for_loss = [(param * 0.5).sum() for param in params]
            torch.stack(for_loss).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            peaks.append(torch.cuda.max_memory_allocated() if step == 2 else 0)
        del params, optimizer, for_loss
        torch.cuda.empty_cache()
    gradients, largest = 16 * 1024 * 4096 * 2, 1024 * 4096 * 2
    assert max(peaks[:3]) - max(peaks[3:]) >= gradients - 4 * largest
