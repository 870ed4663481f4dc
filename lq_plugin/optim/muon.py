"""Muon with state in few bits: torch.optim.Muon's arithmetic for the matrices inside a network.

The direction of a matrix, its gradient averaged with momentum, is replaced by a matrix whose singular values are all
near 1, by a few Newton-Schulz iterations in bfloat16. One launch brings all momenta up to date and writes the
directions, matrices of one shape are orthogonalised together, and one launch moves all weights: that is how stochastic
rounding, master weights and percentile clipping come to be the same as for other optimizers.

Sources: torch.optim.Muon, https://kellerjordan.github.io/posts/muon/, https://arxiv.org/abs/2502.16982
"""

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lq_kernels.muon_rules import MuonDirection, MuonWeight
from lq_kernels.optimizer_batch import Batch
from lq_kernels.optimizer_facts import Clipping
from lq_kernels.optimizer_step import Job, optimizer_step
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lq_plugin.optim.base import _EMBEDDING_NAME, LowBitOptimizer
from lq_plugin.optim.plan import Planned
from lq_plugin.structure import embedding_parameters

Group = dict[str, Any]
Kind = tuple[int, tuple[int, ...]]  # param group and shape: what is orthogonalised together
Coefficients = tuple[float, float, float]
NamedParameters = list[tuple[str, nn.Parameter]]

COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # torch's: the steepest slope at zero, https://kellerjordan.github.io/posts/muon/
MOST_NS_STEPS = 99  # torch's limit

# Matrices go together up to so many elements, or one at a time: small products do not fill a GPU alone, and directions
# of all weights at once would take as much memory as 16-bit gradients.
ELEMENTS_TOGETHER = 1 << 25


def orthogonalize(x: Tensor, coefficients: Coefficients, steps: int, eps: float) -> Tensor:
    """x (B, m, n) bfloat16, overwritten -> matrices with the same singular vectors and singular values near 1.

    x / max(||x||, eps), then so many times a x + (b x x' + c (x x')^2) x, on the shorter side; torch's arithmetic.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x.div_(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps))
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def learning_rate_ratio(adjust_lr_fn: str | None, shape: tuple[int, ...]) -> float:
    """What the learning rate of a matrix is multiplied by: None and "original" are Jordan's rule, see the sources."""
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / max(columns, 1)))


def split_parameters(model: nn.Module) -> tuple[NamedParameters, NamedParameters]:
    """The trainable parameters for Muon, and the rest, for AdamW8bit, each as (name, parameter).

    The rest are embeddings and the output head, by structure or name, and what is not a matrix. A weight that is tied
    to an embedding is one.
    """
    embeddings = embedding_parameters(model)
    matrices: NamedParameters = []
    rest: NamedParameters = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            name = name.replace("_orig_mod.", "")
            is_embedding = id(param) in embeddings or any(map(_EMBEDDING_NAME.search, name.split(".")))
            (matrices if param.ndim == 2 and not is_embedding else rest).append((name, param))
    return matrices, rest


class Muon(LowBitOptimizer, torch.optim.Muon):
    """torch.optim.Muon, for matrices; see `split_parameters`. The arguments after torch's are those of `Options`."""

    updates_tensors_apart = False

    _planned: list[Planned]
    _work: list["_Work"]
    _captured: list["_Work"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **options: Any,
    ) -> None:
        chosen = self.options_of(options)
        super().__init__(params, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn)  # type: ignore[arg-type]
        self.adopt(chosen)

    def _set_up(self) -> None:
        super()._set_up()
        for name in ("_planned", "_work", "_captured"):
            self.__dict__.setdefault(name, [])

    def rule(self, group: Group) -> MuonDirection:
        return MuonDirection(lr=group["lr"], momentum=group["momentum"], nesterov=group["nesterov"])

    def weight_rule(self, group: Group, shape: tuple[int, ...], clipping: Clipping) -> MuonWeight:
        return MuonWeight(
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            ratio=learning_rate_ratio(group["adjust_lr_fn"], shape),
            skips=clipping.percentile is not None,
        )

    def moment_names(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if not 0 <= group["ns_steps"] <= MOST_NS_STEPS or len(group["ns_coefficients"]) != 3:
            raise ValueError(
                f"Muon takes up to {MOST_NS_STEPS} ns_steps with 3 ns_coefficients, "
                f"got {group['ns_steps']} with {group['ns_coefficients']}"
            )
        if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
            raise ValueError(f"adjust_lr_fn is 'original' or 'match_rms_adamw', got {group['adjust_lr_fn']!r}")

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.ndim != 2:
                name = self._constructor_name(param)
                self.param_groups.pop()
                raise ValueError(
                    f"Muon updates matrices, {'a parameter' if name is None else repr(name)} has shape "
                    f"{tuple(param.shape)}: split_parameters(model) gives those for Muon and the rest"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` may compute the loss, which is returned. Raises before anything is modified."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [param.grad for group in self.param_groups for param in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        self._plan_for(params, grads, list(map(self.rule, self.param_groups)))
        self._plan_work()
        together = any(work.planned.how.clipping.is_global for work in self._work)
        for works in [self._work] if together else [[work] for work in self._work]:
            optimizer_step([work.direction_job(self, grads) for work in works])
            for work in works:
                work.orthogonalize(self)
            optimizer_step([work.weight_job(self, grads) for work in works])
        return loss

    def _plan_work(self) -> None:
        """Follows the plan; work that a CUDA graph refers to stays alive."""
        planned_batches = self._plan.batches
        if len(planned_batches) != len(self._planned) or any(map(operator.is_not, planned_batches, self._planned)):
            self._captured += [work for work in self._work if work.captured]
            self._planned = list(planned_batches)
            self._work = [_Work(planned, piece) for planned in planned_batches for piece in _pieces(planned)]


class Muon8bit(Muon):
    """Muon whose momentum is kept in 8 bits unless `state` says otherwise."""

    default_state = "8bit"


class Muon32bit(Muon):
    """Muon whose momentum is kept in float32 unless `state` says otherwise."""


def _kind(planned: Planned, place: int) -> Kind:
    batch = planned.batch
    return planned.groups[batch.groups[place]], tuple(batch.params[place].shape)


def _pieces(planned: Planned) -> Iterator[list[int]]:
    """Places in a batch by kind, cut before they pass ELEMENTS_TOGETHER."""
    piece: list[int] = []
    elements = 0
    for place in sorted(range(len(planned.members)), key=lambda place: _kind(planned, place)):
        numel = planned.batch.params[place].numel()
        if piece and elements + numel > ELEMENTS_TOGETHER:
            yield piece
            piece, elements = [], 0
        piece.append(place)
        elements += numel
    yield piece


class _Work:
    """Some matrices of a planned batch, as two batches: one writes the directions, one moves the weights along them."""

    def __init__(self, planned: Planned, places: list[int]) -> None:
        batch = planned.batch
        self.planned = planned
        self._members = [planned.members[place] for place in places]
        self._kinds = [_kind(planned, place) for place in places]
        self._kinds_once = list(dict.fromkeys(self._kinds))
        params = [batch.params[place] for place in places]
        states = [batch.states[place] for place in places]
        own = [{key: value for key, value in state.items() if key != "master"} for state in states]
        # The step is counted where the direction is written, which may be skipped; this one only seeds the rounding.
        moved = [
            {key: state[key] for key in ("master",) if key in state} | {"step": state["step"].clone()}
            for state in states
        ]
        self._groups = sorted({group for group, _ in self._kinds})
        groups = [self._groups.index(group) for group, _ in self._kinds]
        kinds = [self._kinds_once.index(kind) for kind in self._kinds]
        self._directions = Batch(params, own, batch.grad_type, groups, self._members)
        self._weights = Batch(params, moved, torch.bfloat16, kinds, self._members)
        self._memory = torch.empty(0)

    @property
    def captured(self) -> bool:
        return self._directions.captured or self._weights.captured

    def direction_job(self, optimizer: Muon, grads: list[Tensor | None]) -> Job:
        """Writes directions into new memory; those of gradients that clipping skips stay NaN."""
        clipping = self.planned.how.clipping
        sizes = [math.prod(shape) for _, shape in self._kinds]
        self._memory = torch.empty(sum(sizes), dtype=torch.bfloat16, device=self._weights.device)
        if clipping.percentile is not None:
            self._memory.fill_(torch.nan)
        pieces = zip(self._memory.split(sizes), self._kinds, strict=True)
        self._directions.params = [piece.view(shape) for piece, (_, shape) in pieces]
        rules = [optimizer.rule(optimizer.param_groups[i]) for i in self._groups]
        return Job(self._directions, [grads[i] for i in self._members], rules, clipping)

    def orthogonalize(self, optimizer: Muon) -> None:
        """Matrices of one kind together, in place."""
        counts = [self._kinds.count(kind) for kind in self._kinds_once]
        sizes = [count * math.prod(shape) for count, (_, shape) in zip(counts, self._kinds_once, strict=True)]
        for memory, count, (i, shape) in zip(self._memory.split(sizes), counts, self._kinds_once, strict=True):
            group, x = optimizer.param_groups[i], memory.view(count, *shape)
            x.copy_(orthogonalize(x, group["ns_coefficients"], group["ns_steps"], group["eps"]))

    def weight_job(self, optimizer: Muon, grads: list[Tensor | None]) -> Job:
        """Moves the weights that have a gradient; the memory of the directions goes with the job."""
        groups, how = optimizer.param_groups, self.planned.how
        rules = [optimizer.weight_rule(groups[i], shape, how.clipping) for i, shape in self._kinds_once]
        seeds = [groups[i]["rounding_seed"] for i, _ in self._kinds_once] if how.stochastic else None
        if how.stochastic:
            own, counted = ([state["step"] for state in batch.states] for batch in (self._weights, self._directions))
            torch._foreach_copy_(own, counted)
        directions = [
            None if grads[i] is None else direction
            for i, direction in zip(self._members, self._directions.params, strict=True)
        ]
        self._directions.params, self._memory = self._weights.params, torch.empty(0)
        return Job(self._weights, directions, rules, seeds=seeds)
