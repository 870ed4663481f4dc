"""AdamW8bit and Adam8bit against torch.optim and against the quantised arithmetic written out naively."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from lq_kernels.codebooks import dynamic_map
from lq_kernels.optimizer_state import load_moment
from torch import Tensor
from torch.nn import Parameter

from lq_plugin.optim import Adam8bit, AdamW8bit, Options, state_bytes
from lq_plugin.optim.base import LowBitOptimizer

PAIRS = [(AdamW8bit, torch.optim.AdamW), (Adam8bit, torch.optim.Adam)]
SHAPES = [(64, 256), (33, 130), (5, 7, 11), (100,), (), (0, 3), (1, 1)]


def parameters(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> list[Parameter]:
    return [Parameter((torch.randn(shape) * 0.1).to(dtype)) for shape in shapes]


def copies(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(param.detach().clone()) for param in params]


def set_gradients(*models: list[Parameter], scale: float = 0.01) -> None:
    """The same gradients, but for their type, to every list of parameters."""
    for same in zip(*models, strict=True):
        grad = torch.randn(same[0].shape) * scale
        for param in same:
            param.grad = grad.to(param.dtype)


def assert_equal(a: list[Parameter], b: list[Parameter]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "arguments", [{}, {"maximize": True, "weight_decay": 0.1}, {"lr": torch.tensor(1e-2)}], ids=str
)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_float32_state_computes_what_torch_computes(
    ours: type[AdamW8bit], theirs: type[torch.optim.AdamW], arguments: dict[str, Any]
) -> None:
    mine = parameters()
    reference = copies(mine)
    optimizer, torch_optimizer = ours(mine, state="32bit", **arguments), theirs(reference, **arguments)
    for _ in range(20):
        set_gradients(mine, reference)
        optimizer.step()
        torch_optimizer.step()
    for param, expected in zip(mine, reference, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)
        state, torch_state = optimizer.state[param], torch_optimizer.state[expected]
        torch.testing.assert_close(state["state1"], torch_state["exp_avg"], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(state["state2"], torch_state["exp_avg_sq"], rtol=1e-5, atol=1e-10)
        assert state["step"] == 20


@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"), [(torch.bfloat16, 1e-3, 1e-2), (torch.float16, 1e-4, 1e-3)], ids=str
)
def test_half_precision_follows_float32_from_step_to_step(dtype: torch.dtype, atol: float, rtol: float) -> None:
    mine = parameters(dtype)
    optimizer = AdamW8bit(mine, state="32bit")
    reference = [Parameter(param.detach().float()) for param in mine]
    torch_optimizer = torch.optim.AdamW(reference)
    for _ in range(20):
        set_gradients(mine, reference)
        for param, expected in zip(mine, reference, strict=True):
            expected.grad = param.grad.float()
        optimizer.step()
        torch_optimizer.step()
        for param, expected in zip(mine, reference, strict=True):
            torch.testing.assert_close(param.float(), expected.detach(), rtol=rtol, atol=atol)
            assert torch.equal(optimizer.state[param]["state1"], torch_optimizer.state[expected]["exp_avg"]) or (
                (optimizer.state[param]["state1"] - torch_optimizer.state[expected]["exp_avg"]).abs().max() < 1e-7
            )
            expected.data.copy_(param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8bit_state_stays_as_close_to_torch_as_published(dtype: torch.dtype) -> None:
    params = [Parameter((torch.randn(64, 1000) * 0.1).to(dtype))]
    reference = [Parameter(params[0].detach().float())]
    optimizer, torch_optimizer = AdamW8bit(params), torch.optim.AdamW(reference)
    mean, relative, atol, rtol = (6e-5, 6e-4, 1e-5, 1e-3) if dtype == torch.float32 else (1.7e-4, 1.6e-3, 1e-4, 1e-2)
    for step in range(50):
        set_gradients(reference, params)
        reference[0].grad = params[0].grad.float()
        optimizer.step()
        torch_optimizer.step()
        error = (params[0].float() - reference[0]).detach().abs()
        assert error.mean() < mean
        assert (error / reference[0].abs()).mean() < relative
        torch.testing.assert_close(params[0].float(), reference[0].detach(), rtol=rtol, atol=atol)
        state, torch_state = optimizer.state[params[0]], torch_optimizer.state[reference[0]]
        for i, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
            close = torch.isclose(load_moment(state, i, signed=i == 1), torch_state[name], rtol=1e-3, atol=3e-3)
            assert (~close).sum() < 20
            torch_state[name].copy_(load_moment(state, i, signed=i == 1))
        reference[0].data.copy_(params[0])
        if step % 10 == 9:
            saved = optimizer.state_dict()
            optimizer = AdamW8bit(params)
            optimizer.load_state_dict(saved)


class NaiveAdam:
    """The quantised arithmetic by its definition: one row and one block at a time, nearest by the smallest distance."""

    def __init__(self, params: list[Parameter], lr: float, decay: float, decoupled: bool) -> None:
        self.params, self.lr, self.decay, self.decoupled = params, lr, decay, decoupled
        self.moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in params]
        self.t = 0

    def round_trip(self, moment: Tensor, name: str) -> Tensor:
        code = dynamic_map(name)
        rows = [
            torch.cat([self.block(block, code) for block in row.split(256)])
            for row in moment.reshape(moment.shape[0], -1)
        ]
        return torch.stack(rows).view(moment.shape)

    def block(self, block: Tensor, code: Tensor) -> Tensor:
        scale = block.abs().max()
        if scale == 0:
            return torch.zeros_like(block)
        nearest = ((block / scale)[:, None].double() - code.double()).abs().argmin(dim=1)
        if code[0] == 0:  # of what is never negative, only zero has the code of zero
            nearest = torch.where(block > 0, nearest.clamp(min=1), nearest)
        return code[nearest] * scale

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        c1, c2 = 1 - 0.9**self.t, (1 - 0.999**self.t) ** 0.5
        for p, moments in zip(self.params, self.moments, strict=True):
            assert p.grad is not None
            g = p.grad if self.decoupled else p.grad + self.decay * p
            if self.decoupled:
                p.mul_(1 - self.lr * self.decay)
            m = 0.9 * moments[0] + 0.1 * g
            v = 0.999 * moments[1] + 0.001 * g * g
            p.sub_(self.lr * (c2 / c1) * m / (v.sqrt() + 1e-8 * c2))
            moments[:] = self.round_trip(m, "dynamic_symmetric"), self.round_trip(v, "dynamic_unsigned")


@pytest.mark.parametrize(("ours", "decoupled"), [(AdamW8bit, True), (Adam8bit, False)])
def test_8bit_state_computes_the_quantised_arithmetic(ours: type[AdamW8bit], decoupled: bool) -> None:
    mine = parameters(shapes=[(5, 300), (3, 7, 100), (64, 256)])
    naive = copies(mine)
    optimizer, reference = (
        ours(mine, lr=1e-2, weight_decay=0.1, min_8bit_size=0),
        NaiveAdam(naive, 1e-2, 0.1, decoupled),
    )
    for _ in range(5):
        set_gradients(mine, naive, scale=1.0)
        optimizer.step()
        reference.step()
        for param, expected, moments in zip(mine, naive, reference.moments, strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)
            # Equal but where a rounding moved a value over a midpoint.
            for i, moment in enumerate(moments, 1):
                close = torch.isclose(load_moment(optimizer.state[param], i, signed=i == 1), moment, rtol=1e-5, atol=0)
                assert (~close).sum() <= 1
                moment.copy_(load_moment(optimizer.state[param], i, signed=i == 1))
            expected.data.copy_(param)


def test_golden_run_of_an_independent_implementation() -> None:
    # bitsandbytes' AdamW8bit, three steps; codes but for those near zero, which its CPU code gets wrong
    param = Parameter(torch.linspace(-1, 1, 4096).view(1, 4096))
    optimizer = AdamW8bit([param], lr=1e-2, weight_decay=0.1)
    for t in (1, 2, 3):
        param.grad = t * torch.linspace(-2, 2, 4096).view(1, 4096)
        optimizer.step()
    indices = [0, 1, 1000, 3000, 4095]
    expected = torch.tensor([-0.967863, -0.967375, -0.4808347, 0.4345465, 0.9678009])
    torch.testing.assert_close(param.detach()[0, indices], expected, rtol=0, atol=1e-4)
    state = optimizer.state[param]
    assert state["codes2"][0, indices].tolist() == [255, 255, 208, 235, 255]
    assert state["codes1"][0, [1000, 3000, 4095]].tolist() == [12, 250, 255]
    torch.testing.assert_close(state["scale1"][0, :3], torch.tensor([1.117199, 0.977515, 0.837831]), rtol=1e-2, atol=0)


def test_which_tensors_keep_float32_state_is_seen_in_their_state() -> None:
    model = torch.nn.ModuleDict(
        {
            "tok_embedding": torch.nn.Embedding(100, 64),
            "wte": torch.nn.Embedding(100, 64),
            "ensemble": torch.nn.Linear(64, 64),
            "small": torch.nn.Linear(63, 63),
            "marked": torch.nn.Embedding(100, 64),
        }
    )
    optimizer = AdamW8bit(model.named_parameters())
    named = dict(model.named_parameters())
    optimizer.mark_embeddings([named["marked.weight"]])
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert {name for name, param in named.items() if "codes1" in optimizer.state[param]} == {"ensemble.weight"}
    assert optimizer.state[named["ensemble.weight"]]["scale1"].shape == (64, 1)
    assert optimizer.state[named["wte.weight"]]["state1"].dtype == torch.float32


def test_embeddings_and_single_groups_can_be_told_otherwise() -> None:
    embedding, other = Parameter(torch.ones(100, 64)), Parameter(torch.ones(100, 64))
    optimizer = AdamW8bit(
        [{"params": [("emb.weight", embedding)]}, {"params": [("w", other)], "state": "32bit"}], embedding_state="8bit"
    )
    embedding.grad, other.grad = torch.ones_like(embedding), torch.ones_like(other)
    optimizer.step()
    assert "codes1" in optimizer.state[embedding]
    assert "state1" in optimizer.state[other]


@pytest.mark.parametrize(
    ("shape", "embedding", "after"),
    [
        ((64, 256), False, 2 * (64 * 256 + 4 * 64)),
        ((64, 257), False, 2 * (64 * 257 + 4 * 64 * 2)),
        ((64, 256), True, 8 * 64 * 256),
        ((5000,), False, 8 * 5000),
        ((63, 64), False, 8 * 63 * 64),
    ],
)
def test_state_bytes_are_those_of_the_state(shape: tuple[int, ...], embedding: bool, after: int) -> None:
    param = Parameter(torch.ones(shape, dtype=torch.bfloat16))
    assert state_bytes(param, Options(), embedding) == (4 * param.numel(), after)
    optimizer = AdamW8bit([param])
    optimizer.mark_embeddings([param] if embedding else [])
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert sum(v.numel() * v.element_size() for k, v in optimizer.state[param].items() if k != "step") == after


def test_tensors_without_a_gradient_stay_as_they_are() -> None:
    params = parameters(shapes=[(64, 64), (64, 64), (8,)])
    optimizer = AdamW8bit(params)
    before = copies(params)
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert set(optimizer.state) == {params[1]}
    params[0].grad, params[1].grad = torch.ones_like(params[0]), None
    optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params[:2]] == [1, 1]
    assert torch.equal(params[2], before[2])
    assert not torch.equal(params[0], before[0])


def test_a_step_of_zeros_with_no_learning_rate_changes_no_parameter() -> None:
    params = parameters()
    optimizer = AdamW8bit(params, lr=0.0, percentile_clipping=5)
    before = copies(params)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step(closure=None)
    assert_equal(params, before)
    assert (optimizer.state[params[0]]["codes1"] == 127).all()
    assert optimizer.state[params[0]]["gnorm_counts"].tolist() == [0, 0, 0]


def test_clipping_is_that_of_the_gradient() -> None:
    clipped, scaled = parameters(shapes=[(64, 64)]), parameters(shapes=[(64, 64)])
    scaled[0].data.copy_(clipped[0])
    optimizer, reference = AdamW8bit(clipped, percentile_clipping=5), AdamW8bit(scaled)
    for norm, factor in ((2.0, 1.0), (8.0, 0.25), (2.0, 1.0)):
        grad = torch.full((64, 64), norm / 64)  # ||grad|| = norm
        clipped[0].grad, scaled[0].grad = grad.clone(), grad * factor
        optimizer.step()
        reference.step()
        assert torch.equal(clipped[0], scaled[0])
        assert optimizer.clip_statistics()["clip/factor"] == factor
    statistics = optimizer.clip_statistics()
    assert statistics["clip/share_clipped"] == pytest.approx(1 / 3)
    assert statistics["clip/skipped_nonfinite"] == 0


def test_without_clipping_nan_propagates_and_with_it_the_tensor_is_skipped_and_named() -> None:
    for percentile in (None, 5):
        layer = torch.nn.Linear(64, 64)
        optimizer = AdamW8bit(layer.named_parameters(), percentile_clipping=percentile)
        layer(torch.randn(3, 64)).sum().backward()
        optimizer.step()
        before = layer.weight.detach().clone()
        layer.weight.grad[3, 5] = torch.nan
        optimizer.step()
        if percentile is None:
            assert layer.weight.isnan().any()
            assert optimizer.clip_statistics() == {}
            continue
        assert torch.equal(layer.weight, before)
        assert optimizer.state[layer.weight]["step"] == 1
        assert optimizer.state[layer.bias]["step"] == 2
        with pytest.warns(UserWarning, match=r"skipped.*'weight' \(1x\)"):
            statistics = optimizer.read_clip_statistics()
        assert statistics == {"clip/share_clipped": 0.0, "clip/skipped_nonfinite": 1, "clip/factor": 1.0}
        assert optimizer.read_clip_statistics()["clip/skipped_nonfinite"] == 1  # and no second warning


def test_closures_hooks_groups_and_late_parameters_work_as_in_torch() -> None:
    mine = parameters(shapes=[(64, 64), (8, 8), (100, 50)])
    reference = copies(mine)
    calls: list[str] = []
    optimizers = []
    for params, cls in ((mine, AdamW8bit), (reference, torch.optim.AdamW)):
        options: dict[str, Any] = {"state": "32bit"} if cls is AdamW8bit else {}
        optimizer = cls([{"params": params[:1]}, {"params": params[1:2], "lr": 1e-2, "betas": (0.5, 0.9)}], **options)
        optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
        optimizers.append(optimizer)
    for step in range(4):
        if step == 2:
            for params, optimizer in zip((mine, reference), optimizers, strict=True):
                optimizer.add_param_group({"params": params[2:], "weight_decay": 0.5})
        set_gradients(mine, reference)
        for optimizer in optimizers:
            assert optimizer.step(lambda: calls.append("closure") or 3.5) == 3.5
    assert calls.count("hook") == calls.count("closure") == 8
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_mixed_types_layouts_and_strides_are_updated_in_place() -> None:
    shapes: list[tuple[int, ...]] = [(64, 66), (66, 64), (64, 128), (2, 3, 40, 40)]
    params = parameters(shapes=shapes)
    params[1].data = params[1].data.to(torch.bfloat16)
    params[2].data = params[2].data.t().contiguous().t().half()
    params[3].data = params[3].data.to(memory_format=torch.channels_last)
    strides = [param.stride() for param in params]
    plain = [Parameter(param.detach().contiguous()) for param in params]
    optimizer, reference = AdamW8bit(params), AdamW8bit(plain)
    for _ in range(3):
        set_gradients(plain, params)
        for param in params:
            assert param.grad is not None
            param.grad = param.grad.mT.contiguous().mT
        optimizer.step()
        reference.step()
    assert_equal(params, plain)
    assert [param.stride() for param in params] == strides


def test_copies_and_pickles_go_on_as_the_original() -> None:
    layer = torch.nn.Linear(64, 64)
    optimizer = AdamW8bit(layer.named_parameters(), percentile_clipping=5)
    optimizer.mark_embeddings([layer.bias])
    optimizer.name_parameters({id(layer.bias): "told"})
    set_gradients(list(layer.parameters()))
    optimizer.step()
    for copied_layer, copied in (copy.deepcopy((layer, optimizer)), pickle.loads(pickle.dumps((layer, optimizer)))):
        assert type(copied) is AdamW8bit
        assert copied.param_groups[0]["params"][0] is copied_layer.weight
        straight = copy.deepcopy((layer, optimizer))
        for _ in range(3):
            set_gradients(list(straight[0].parameters()), list(copied_layer.parameters()))
            straight[1].step()
            copied.step()
        assert_equal(list(straight[0].parameters()), list(copied_layer.parameters()))
        assert copied.parameter_name(copied_layer.weight) == "weight"
        assert copied.parameter_name(copied_layer.bias) == "told"
        assert copied._embeddings[0] is copied_layer.bias


def batches(optimizer: AdamW8bit) -> list[Any]:
    return [planned.batch for planned in optimizer._plan.batches]


def test_batches_are_made_once_and_again_when_parameters_come() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    set_gradients(params)
    optimizer.step()
    first = batches(optimizer)
    set_gradients(params)
    params[0].grad = None
    optimizer.step()
    assert all(a is b for a, b in zip(batches(optimizer), first, strict=True))
    late = parameters(shapes=[(8, 8)])
    optimizer.add_param_group({"params": late})
    set_gradients(params, params)
    set_gradients(late)
    optimizer.step()
    assert all(a is not b for a, b in zip(batches(optimizer), first, strict=True))
    assert sum(len(batch.params) for batch in batches(optimizer)) == len(params) + 1


def test_state_that_was_replaced_from_outside_is_used() -> None:
    """As Lightning does when it moves an optimizer between devices: new tensors in the same dicts."""
    mine = parameters(shapes=[(64, 64)])
    other = copies(mine)
    optimizer, straight = AdamW8bit(mine), AdamW8bit(other)
    before: list[Any] = []
    for _ in range(3):
        set_gradients(mine, other)
        optimizer.step()
        straight.step()
        assert batches(optimizer)[0] not in before  # whose addresses are stale
        before = batches(optimizer)
        for state in optimizer.state.values():
            for key in list(state):
                old, state[key] = state[key], state[key].clone()
                old.zero_()
    assert_equal(mine, other)


def sparse(param: Parameter) -> Tensor:
    return torch.ones_like(param).to_sparse()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: setattr(p, "grad", sparse(p)), "torch.sparse_coo torch.float32"),
        (lambda p: setattr(p, "data", p.data.double()) or setattr(p, "grad", torch.ones_like(p)), "torch.float64"),
        (lambda p: setattr(p, "data", p.data.cfloat()) or setattr(p, "grad", torch.ones_like(p)), "torch.complex64"),
    ],
    ids=["sparse", "double", "complex"],
)
@pytest.mark.parametrize("first_step", [True, False])
def test_gradients_it_cannot_take_raise_before_anything_is_modified(make: Any, message: str, first_step: bool) -> None:
    params = {"good": Parameter(torch.ones(64, 64)), "bad": Parameter(torch.ones(8, 8))}
    optimizer = AdamW8bit([{"params": [named]} for named in params.items()])
    if not first_step:
        set_gradients(list(params.values()))
        optimizer.step()
    params["good"].grad = torch.ones(64, 64)
    params["bad"].grad = None
    make(params["bad"])
    good, states = params["good"].detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(TypeError, match=rf"'bad' has {message}.*Nothing was updated"):
        optimizer.step()
    assert torch.equal(params["good"], good)
    torch.testing.assert_close(optimizer.state_dict()["state"], states, rtol=0, atol=0)


def test_frozen_weights_of_any_type_may_be_in_its_groups() -> None:
    codes = Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    trained = Parameter(torch.ones(8, 8))
    optimizer = AdamW8bit([codes, trained])
    trained.grad = torch.ones(8, 8)
    optimizer.step()
    assert set(optimizer.state) == {trained}


@pytest.mark.parametrize("cls", [AdamW8bit, Adam8bit])
@pytest.mark.parametrize("argument", ["amsgrad", "differentiable", "foreach", "fused"])
def test_arguments_of_torch_that_are_not_computed_raise(cls: type[AdamW8bit], argument: str) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__} got {argument}=True, expected False: "):
        cls(parameters(), **{argument: True})
    with pytest.raises(ValueError, match=f"got {argument}=True"):
        cls([{"params": parameters(), argument: True}])
    optimizer = cls(parameters())
    with pytest.raises(ValueError, match=f"got {argument}=True"):
        optimizer.add_param_group({"params": parameters(), argument: True})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": "4bit"}, "state is one of '8bit', 'fp8', '32bit', got '4bit'"),
        ({"embedding_state": "4bit"}, "embedding_state is one of '8bit', 'fp8', '32bit'"),
        ({"clip_scope": "layer"}, "clip_scope is one of 'tensor', 'global', got 'layer'"),
        ({"update_clip": "norm"}, "update_clip is one of None, 'rms', got 'norm'"),
        ({"master_weights": "fp8"}, "master_weights is one of None, '8bit', '32bit', got 'fp8'"),
        ({"stochastic_rounding": True, "master_weights": "8bit"}, "choose one of them"),
        ({"percentile_clipping": 0}, "from 1 to 99, or None for no clipping, got 0"),
        ({"percentile_clipping": 101}, "got 101"),
        ({"percentile_clipping": 5.0}, "got 5.0"),
        ({"min_8bit_size": -1}, "got -1"),
        ({"block_size": 2048}, "blocks of 256, got block_size=2048"),
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"betas": (torch.tensor(0.9), torch.tensor(0.9))}, "expected floats"),
    ],
    ids=str,
)
def test_wrong_options_say_what_exists(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW8bit(parameters(), **arguments)


def test_a_percentile_of_100_is_off() -> None:
    assert AdamW8bit(parameters(), percentile_clipping=100).param_groups[0]["percentile_clipping"] is None


def test_the_optimizer_is_what_schedulers_and_lightning_expect() -> None:
    optimizer = AdamW8bit(parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert isinstance(optimizer, LowBitOptimizer)
    assert not hasattr(optimizer, "optimizer")
    assert optimizer.__dict__
    assert type("Wrapped", (AdamW8bit,), {})(parameters())
    with warnings.catch_warnings():
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 5e-4


def on_a_gpu(dtype: torch.dtype, **options: Any) -> tuple[list[Parameter], AdamW8bit]:
    torch.manual_seed(5)
    params = [Parameter(param.cuda()) for param in parameters(dtype, [(64, 256), (33, 130), (100,)])]
    return params, AdamW8bit(params, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_follows_the_cpu(dtype: torch.dtype) -> None:
    on_gpu, optimizer = on_a_gpu(dtype, percentile_clipping=5)
    on_cpu = [Parameter(param.detach().cpu()) for param in on_gpu]
    reference = AdamW8bit(on_cpu, percentile_clipping=5)
    for _ in range(10):
        set_gradients(on_cpu)
        for param, expected in zip(on_gpu, on_cpu, strict=True):
            param.grad = expected.grad.cuda()
        optimizer.step()
        reference.step()
        for param, expected in zip(on_gpu, on_cpu, strict=True):
            # A code that rounding moved over a midpoint shows in the parameter, one in 2^14 at most at each step.
            close = torch.isclose(param.detach().cpu(), expected, rtol=torch.finfo(dtype).eps * 8, atol=1e-6)
            assert (~close).sum() <= 2 + 10 * close.numel() * 2.0**-14
    saved = optimizer.state_dict()
    moved = AdamW8bit(on_cpu)
    moved.load_state_dict(saved)
    assert {value.device.type for state in moved.state.values() for value in state.values()} == {"cpu"}


@pytest.mark.gpu
def test_a_captured_optimizer_reads_a_changed_learning_rate() -> None:
    rate = torch.tensor(1e-3, device="cuda")
    captured, optimizer = on_a_gpu(torch.bfloat16, lr=rate, capturable=True, percentile_clipping=5)
    eager, reference = on_a_gpu(torch.bfloat16, lr=rate.clone(), percentile_clipping=5)
    graph = torch.cuda.CUDAGraph()
    for step in range(4):
        for a, b in zip(captured, eager, strict=True):
            b.grad = torch.randn_like(b)
            a.grad = b.grad.clone() if a.grad is None else a.grad.copy_(b.grad)
        reference.step()
        if step == 0:
            optimizer.step()
            with torch.cuda.graph(graph):
                optimizer.step()
        else:
            graph.replay()
        rate.fill_(1e-2 * step)
        reference.param_groups[0]["lr"].fill_(1e-2 * step)
        assert_equal(captured, eager)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capturing_before_there_is_state_says_what_to_do() -> None:
    params, optimizer = on_a_gpu(torch.float32)
    for param in params:
        param.grad = torch.ones_like(param)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run one step before CUDA graph capture"), torch.cuda.graph(graph):
        optimizer.step()
