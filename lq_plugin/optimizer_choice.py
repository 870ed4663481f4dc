"""What the plugin does with a model's optimizers: which become 8-bit, with which clipping, and what it says of them."""

from dataclasses import dataclass, replace

from torch import nn
from torch.optim import Optimizer

from lq_plugin.optim import TWINS, Options, Swap, become
from lq_plugin.optim.base import PARAMETER_DTYPES, LowBitOptimizer
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
        is_auto = percentile_clipping == "auto"
        if isinstance(percentile_clipping, str) and not is_auto:
            raise ValueError(
                f"percentile_clipping={percentile_clipping!r}: expected a percentile from 1 to 99, 'auto' or None"
            )
        if optimizer is None:
            if not is_auto and percentile_clipping is not None:
                raise ValueError(
                    f"percentile_clipping={percentile_clipping} is done by the optimizer, and optimizer=None leaves it "
                    "alone; pass optimizer='auto', or percentile_clipping=None"
                )
            return cls(None, False, False)
        options = _options(optimizer)
        if not is_auto:
            options = replace(options, percentile_clipping=percentile_clipping)  # type: ignore[arg-type]
        return cls(options, optimizer != "auto", is_auto and options.percentile_clipping is None)

    def swap(
        self, model: nn.Module, optimizers: list[Optimizer], embeddings: set[int], gradient_clip_val: float | None
    ) -> OptimizerReport:
        """Swaps in place, so that schedulers and the user's references stay valid; done again, it changes nothing."""
        if self.options is None:
            lines = [f"optimizer: {type(o).__name__}, left alone (optimizer=None)" for o in optimizers]
            return OptimizerReport({}, lines)
        _check_parameters(model, optimizers)
        names = {id(p): name.removeprefix("module.") for name, p in model.named_parameters()}  # DDP's level
        report = OptimizerReport({}, [])
        for optimizer in optimizers:
            reason = self._reason_to_leave_alone(optimizer)
            if reason is not None:
                self._refuse_if_asked_for(optimizer, reason)
                report.lines.append(f"optimizer: {type(optimizer).__name__}, left alone: {reason}")
                continue
            options, clipping = self._with_clipping(self.options, gradient_clip_val)
            swap = become(optimizer, options, names, embeddings)
            report.lines.append(_told(swap, options, clipping))
            report.state_bytes.update(_state_bytes(optimizer))
        return report

    def _reason_to_leave_alone(self, optimizer: Optimizer) -> str | None:
        if isinstance(optimizer, LowBitOptimizer):
            return None
        if type(optimizer) not in TWINS:
            return f"no 8-bit twin (those that have: {', '.join(twin.__name__ for twin in TWINS.values())})"
        for group in optimizer.param_groups:
            for option in ("amsgrad", "differentiable"):
                if group.get(option):
                    return f"its twin has no {option}"
            for p in group["params"]:
                if p.requires_grad and p.dtype not in PARAMETER_DTYPES:
                    return f"it holds {p.dtype} parameters, its twin takes float32, bfloat16 and float16"
        return None

    def _refuse_if_asked_for(self, optimizer: Optimizer, reason: str) -> None:
        assert self.options is not None
        name = type(optimizer).__name__
        if self.strict:
            raise ValueError(f"{name} cannot have {self.options.state} state: {reason}; pass optimizer='auto'")
        if not self.clipping_is_auto and self.options.percentile_clipping not in (None, 100):
            raise ValueError(
                f"percentile_clipping={self.options.percentile_clipping} was asked for, and {name} is left alone: "
                f"{reason}; pass percentile_clipping='auto' or None"
            )

    def _with_clipping(self, options: Options, gradient_clip_val: float | None) -> tuple[Options, str]:
        if not self.clipping_is_auto:
            percentile = options.percentile_clipping
            return options, f"percentile clipping {percentile}" if percentile not in (None, 100) else "no clipping"
        if gradient_clip_val:
            return options, f"percentile clipping off: the Trainer clips at gradient_clip_val={gradient_clip_val}"
        clipped = replace(options, percentile_clipping=DEFAULT_PERCENTILE)
        return clipped, f"percentile clipping {DEFAULT_PERCENTILE} (auto)"


def _options(optimizer: str | Options) -> Options:
    states = ", ".join(map(repr, STATES))
    if isinstance(optimizer, Options):
        return optimizer
    if not isinstance(optimizer, str):
        raise TypeError(f"optimizer takes 'auto', {states}, lq_plugin.optim.Options or None, got {optimizer!r}")
    if optimizer not in ("auto", *STATES):
        raise ValueError(
            f"optimizer={optimizer!r} is not known; expected 'auto', {states}, lq_plugin.optim.Options(...) or None"
        )
    return Options(state="8bit" if optimizer == "auto" else optimizer)


def _state_bytes(optimizer: Optimizer) -> dict[int, tuple[int, int]]:
    """By id of the parameter, as the optimizer itself decides; what is frozen gets no state."""
    assert isinstance(optimizer, LowBitOptimizer)
    held = [(group, p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return {id(p): optimizer.state_bytes(group, p) for group, p in held}


def _told(swap: Swap, options: Options, clipping: str) -> str:
    if not swap.changed:
        return f"optimizer: {swap.after.__name__}, kept with the options it was built with"
    parts = [f"optimizer: {swap.before.__name__} -> {swap.after.__name__} ({options.state} state, {clipping})"]
    if options.offload:
        parts.append("large states in the CPU's memory")
    if options.gradient_release:
        parts.append("each gradient used and freed in the backward pass")
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
