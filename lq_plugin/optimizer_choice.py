"""What the plugin does with a model's optimizers: which become 8-bit, with which clipping, and what it says of them."""

from dataclasses import dataclass, replace

from torch import nn
from torch.optim import Optimizer

from lq_plugin.optim import TWINS, Options, Swap, become, state_bytes
from lq_plugin.optim.base import LowBitOptimizer
from lq_plugin.optim.options import STATES

DEFAULT_PERCENTILE = 5


@dataclass(frozen=True)
class OptimizerReport:
    """state_bytes: id of a parameter -> bytes of its optimizer state before and after. lines: what was done."""

    state_bytes: dict[int, tuple[int, int]]
    lines: list[str]


@dataclass(frozen=True)
class OptimizerChoice:
    """options: None leaves every optimizer alone. strict: an optimizer without a twin is an error."""

    options: Options | None
    strict: bool
    clipping_is_auto: bool

    @classmethod
    def of(cls, optimizer: str | Options | None, percentile_clipping: int | str | None) -> "OptimizerChoice":
        clipping_is_auto = percentile_clipping == "auto"
        if isinstance(percentile_clipping, str) and not clipping_is_auto:
            raise ValueError(
                f"percentile_clipping={percentile_clipping!r}: expected a percentile from 1 to 99, 'auto' or None"
            )
        if optimizer is None:
            if not clipping_is_auto and percentile_clipping is not None:
                raise ValueError(
                    f"percentile_clipping={percentile_clipping} is done by the optimizer, and optimizer=None leaves it "
                    "alone; pass optimizer='auto', or percentile_clipping=None"
                )
            return cls(None, False, False)
        if isinstance(optimizer, str):
            if optimizer not in ("auto", *STATES):
                raise ValueError(
                    f"optimizer={optimizer!r} is not known; expected 'auto', {', '.join(map(repr, STATES))}, "
                    "lq_plugin.optim.Options(...) or None"
                )
            options = Options(state="8bit" if optimizer == "auto" else optimizer)
        elif isinstance(optimizer, Options):
            options = optimizer
            clipping_is_auto = clipping_is_auto and options.percentile_clipping is None
        else:
            raise TypeError(f"optimizer takes 'auto', 'state', lq_plugin.optim.Options or None, got {optimizer!r}")
        if isinstance(percentile_clipping, int):
            options = replace(options, percentile_clipping=percentile_clipping)
        return cls(options, optimizer != "auto", clipping_is_auto)

    def swap(
        self, model: nn.Module, optimizers: list[Optimizer], embeddings: set[int], gradient_clip_val: float | None
    ) -> OptimizerReport:
        """Swaps in place, so that schedulers and the user's references stay valid; done again, it changes nothing."""
        _check_parameters(model, optimizers)
        names = {id(p): name for name, p in model.named_parameters()}
        report = OptimizerReport({}, [])
        for optimizer in optimizers:
            self._swap_one(optimizer, names, embeddings, gradient_clip_val, report)
        return report

    def _swap_one(
        self,
        optimizer: Optimizer,
        names: dict[int, str],
        embeddings: set[int],
        gradient_clip_val: float | None,
        report: OptimizerReport,
    ) -> None:
        before = type(optimizer).__name__
        if self.options is None:
            report.lines.append(f"optimizer: {before}, left alone (optimizer=None)")
            return
        if type(optimizer) not in TWINS and not isinstance(optimizer, LowBitOptimizer):
            known = ", ".join(twin.__name__ for twin in TWINS.values())
            if self.strict:
                raise ValueError(
                    f"optimizer {before} has no twin with {self.options.state} state; those that have: {known}"
                )
            report.lines.append(f"optimizer: {before}, left alone: no 8-bit twin (those that have: {known})")
            return
        options, clipping = self._with_clipping(gradient_clip_val)
        swap = become(optimizer, options, names, embeddings)
        report.lines.append(_told(swap, options, clipping))
        for group in optimizer.param_groups:
            for p in group["params"]:
                report.state_bytes[id(p)] = state_bytes(p, options, id(p) in embeddings)

    def _with_clipping(self, gradient_clip_val: float | None) -> tuple[Options, str]:
        assert self.options is not None
        if not self.clipping_is_auto:
            percentile = self.options.percentile_clipping
            return self.options, f"percentile clipping {percentile}" if percentile else "no percentile clipping"
        if gradient_clip_val:
            return self.options, f"percentile clipping off: the Trainer clips at gradient_clip_val={gradient_clip_val}"
        return replace(
            self.options, percentile_clipping=DEFAULT_PERCENTILE
        ), f"percentile clipping {DEFAULT_PERCENTILE} (auto)"


def _told(swap: Swap, options: Options, clipping: str) -> str:
    if not swap.changed:
        return f"optimizer: {swap.after.__name__}, kept with the options it was built with"
    parts = [f"optimizer: {swap.before.__name__} -> {swap.after.__name__} ({options.state} state, {clipping})"]
    if swap.dropped:
        parts.append(f"dropped {' and '.join(swap.dropped)}: one launch updates all tensors")
    if swap.converted:
        parts.append(f"converted the state of {swap.converted} tensors")
    return "; ".join(parts)


def _check_parameters(model: nn.Module, optimizers: list[Optimizer]) -> None:
    live = {id(p) for p in model.parameters()}
    for optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            stale = sum(id(p) not in live for p in group["params"])
            if stale:
                raise ValueError(
                    f"{type(optimizer).__name__} holds {stale} parameters in group {number} that are not in the model; "
                    "build it from model.parameters() in configure_optimizers, not from a list kept earlier"
                )
