"""QuantPlugin: Lightning's precision plugin that swaps linear layers and optimizers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakSet

from lightning.fabric.utilities.types import Steppable
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.optim import Optimizer

from lq_plugin import ranks, record, run_facts
from lq_plugin.adapter_checkpoint import keep_trained
from lq_plugin.callbacks.early_swap import EarlySwap as EarlySwap
from lq_plugin.conversion import Conversion, checked_lora, convert, has_layers, policy_on, report_of
from lq_plugin.layer_plan import conversion_of
from lq_plugin.layers.experts import FrozenExperts
from lq_plugin.layers.frozen import FrozenLinear
from lq_plugin.layers.linear import QuantConv1D, QuantLinear
from lq_plugin.optim import Options
from lq_plugin.optim.base import LowBitOptimizer
from lq_plugin.optimizer_choice import OptimizerChoice
from lq_plugin.policy import LinearSpec, Policy
from lq_plugin.precision import AnyStrategyPrecision, default_precision, precision_named
from lq_plugin.replicas import leave_frozen_buffers_out, send_frozen_buffers
from lq_plugin.report import conversion_table

_UNSUPPORTED_STRATEGIES = ("DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")
_STEPS_BETWEEN_WARNINGS = 100
_WITHOUT_RELEASE = "leave out gradient_release"
_CHECKPOINTS = ("adapter", "full")


class QuantPlugin(AnyStrategyPrecision):
    """`Trainer(plugins=[QuantPlugin()])` trains the model's linear layers and optimizer in low bits.

    linear: a format name or object, {name pattern: format} of which the first match wins, or None: linears stay.
    "auto", or an lq_plugin.Auto, in place of a format quantises those layers that are faster for it on this device.
    optimizer: "auto" swaps those that have an 8-bit twin and names the rest; "8bit" and "32bit" raise where there is
    no twin; lq_plugin.optim.Options; None leaves optimizers alone.
    percentile_clipping: each tensor's gradient is clipped at this percentile (1..99) of its last 100 norms; "auto" is
    5, or off beside the Trainer's gradient_clip_val; None is off.
    lora: a LoRAConfig or peft.LoraConfig; adapters beside layers in a frozen format, and nothing else trains.
    precision: of all that is not quantised: 32-true, bf16-true, 16-true, bf16-mixed or 16-mixed; None takes bf16-mixed
    on GPUs that have it, 16-mixed on others and 32-true on a CPU.
    skip: patterns of linears to leave alone, on top of those that always are (see `lq_plugin.convert`).
    partial: accept that less than half of the weights are quantised.
    checkpoint: what checkpoints hold of a model with adapters: "adapter" is what trains and a fingerprint of the base,
    "full" everything, as it always is under FSDP, ModelParallelStrategy, WeightAveraging and in save_weights_only.
    """

    alive: ClassVar["WeakSet[QuantPlugin]"] = WeakSet()

    def __init__(
        self,
        linear: LinearSpec = "int8_switchback",
        *,
        optimizer: str | Options | None = "auto",
        percentile_clipping: int | str | None = "auto",
        lora: object | None = None,
        precision: str | None = None,
        skip: Iterable[str] = (),
        partial: bool = False,
        checkpoint: str = "adapter",
    ) -> None:
        super().__init__()
        if checkpoint not in _CHECKPOINTS:
            raise ValueError(f"checkpoint must be one of {', '.join(_CHECKPOINTS)}, got {checkpoint!r}")
        self._checkpoint = checkpoint
        self._module: nn.Module | None = None
        self._replicated: nn.Module | None = None  # under DDP
        self._linear = linear
        self._skip = (skip,) if isinstance(skip, str) else tuple(skip)
        self._policy = Policy.of(linear, self._skip)
        self._lora = checked_lora(lora, self._policy)
        self._partial = partial
        self._optimizer = OptimizerChoice.of(optimizer, percentile_clipping)
        self._asked_precision = None if precision is None else precision_named(precision)
        self._conversion: Conversion | None = None
        self._gradient_clip_val: float | None = None
        self._against_release: str | None = None
        self._fitting = False
        self._rng_at_first_step: dict[str, Any] | None = None
        self._low_bit_optimizers: list[LowBitOptimizer] = []
        # Lightning moves their states to the device, offloaded or not.
        self._moved_optimizers: list[LowBitOptimizer] = []
        self._steps = 0
        self._reported = ""
        self.alive.add(self)

    def freeze_early(self, module: LightningModule) -> bool:
        """Freezes layers and adds adapters, if that is asked for and there are layers; says whether it changed any."""
        is_built_later = is_overridden("configure_model", module) and not has_layers(module)
        if not self._policy.freezes or is_built_later:
            return False
        trainer = _trainer_of(module)
        _check_strategy(trainer.strategy, self._optimizer.options, self._policy)
        before = len(report_of(module).converted)
        return len(self._convert(module, trainer).converted) > before

    def _convert(self, module: nn.Module, trainer: Trainer) -> Conversion:
        return convert(
            module,
            self._linear,
            skip=self._skip,
            lora=self._lora,
            partial=self._partial,
            device=trainer.strategy.root_device,
        )

    def convert_module(self, module: nn.Module) -> nn.Module:
        trainer = _trainer_of(module)
        _check_strategy(trainer.strategy, self._optimizer.options, self._policy)
        self.set_precision(self._asked_precision or default_precision(trainer.strategy.root_device), trainer.strategy)
        self._gradient_clip_val = trainer.gradient_clip_val
        self._against_release = _reason_against_release(trainer, self.precision)
        self._fitting = trainer.state.fn == TrainerFn.FITTING
        self._module = module if self._checkpoint == "adapter" and not _needs_everything(trainer) else None
        self._rng_at_first_step = None
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self._conversion = self._converted_earlier(module)
        else:
            self._conversion = self._convert(module, trainer)
        ranks.check_same("configuration", self._configuration(trainer))
        if self._fitting:
            _check_something_trains(module)
        self._replicated = module if isinstance(trainer.strategy, DDPStrategy) else None
        if self._replicated is not None:
            leave_frozen_buffers_out(module)
        return super().convert_module(module)

    def _configuration(self, trainer: Trainer) -> dict[str, str]:
        assert self._conversion is not None
        options = self._optimizer.options
        settings = {
            "precision": self.precision,
            "lora": self._lora,
            "checkpoint": self._checkpoint,
            "optimizer": "left alone" if options is None else "strict" if self._optimizer.strict else "auto",
            "percentile_clipping is auto": self._optimizer.clipping_is_auto,
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
        } | {f"optimizer option {name}": value for name, value in vars(options or Options()).items()}
        return run_facts.versions() | run_facts.formats(self._conversion) | run_facts.settings(settings)

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        assert self._conversion is not None, "Lightning calls convert_module before connect"
        current = optimizers if self._fitting else []  # Lightning passes those of an earlier fit to validate and test
        swap = self._optimizer.swap(model, current, self._conversion.embeddings, self._gradient_clip_val)
        self._low_bit_optimizers = [o for o in current if isinstance(o, LowBitOptimizer)]
        self._moved_optimizers = list(self._low_bit_optimizers)
        if self._against_release is not None and any(o.releases_gradients for o in self._low_bit_optimizers):
            for optimizer in self._low_bit_optimizers:
                optimizer.stop_gradient_release()
            raise ValueError(f"gradient_release updates in the backward pass, and {self._against_release}")
        ranks.check_same("optimizers", run_facts.optimizers(current))
        if self._replicated is not None and ranks.is_distributed():
            send_frozen_buffers(self._replicated)
        table = conversion_table(self._conversion, swap.state_bytes if current else None)
        report = "\n".join([f"precision: {self.precision}", *swap.lines, "", table])
        if (self._fitting and report != self._reported) or not self._reported:
            _print(report)
            self._reported = report
        return super().connect(model, optimizers, lr_schedulers)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._conversion is not None:
            record.write(checkpoint, self._conversion, self.precision)
        if self._module is not None:
            keep_trained(checkpoint["state_dict"], self._module)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self._conversion is not None, "Lightning sets the model up before it restores a run"
        found = record.check(checkpoint, self._conversion)
        if not self._fitting:
            return
        record.check_optimizers(checkpoint, self._low_bit_optimizers)
        states = None if found is None else record.generators(found)
        if states is None:
            return
        record.restore_generators(states)
        # A loader that goes on in the middle of an epoch draws from the generators as it starts, before the first step.
        fit_loop = checkpoint["loops"]["fit_loop"]
        if "combined_loader" in fit_loop["state_dict"] and not fit_loop["epoch_loop.batch_progress"]["is_last_batch"]:
            self._rng_at_first_step = states

    def optimizer_step(self, optimizer: Any, model: LightningModule, closure: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        result = super().optimizer_step(optimizer, model, closure, **kwargs)
        self._steps += 1
        if self._steps % _STEPS_BETWEEN_WARNINGS == 0:
            self._warn_of_skipped()
        return result

    def clip_gradients(
        self,
        optimizer: Steppable,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        if clip_val and getattr(optimizer, "releases_gradients", False):
            raise ValueError(f"gradient_release updates in the backward pass, and {_clipped_later(clip_val)}")
        super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)  # type: ignore[arg-type]

    def teardown(self) -> None:
        self._warn_of_skipped()
        for optimizer in self._low_bit_optimizers:
            optimizer.stop_gradient_release()  # the next fit starts it again
            optimizer.wait_for_state()
        super().teardown()

    def _warn_of_skipped(self) -> None:
        """Gradients that are not finite leave their tensors alone, but not without a word. Waits for the device.

        Averaged gradients are those of every rank, so the first speaks for all.
        """
        for optimizer in self._low_bit_optimizers if ranks.rank() == 0 else ():
            optimizer.read_clip_statistics()

    @contextmanager
    def train_step_context(self) -> Iterator[None]:
        if self._rng_at_first_step is not None:
            record.restore_generators(self._rng_at_first_step)
            self._rng_at_first_step = None
        for optimizer in self._moved_optimizers:
            optimizer.bring_state_home()
        self._moved_optimizers = []
        with super().train_step_context():
            yield

    def _converted_earlier(self, module: nn.Module) -> Conversion:
        """ModelParallelStrategy has sharded the layers by now: configure_model converted them, or nobody can."""
        converted = any(
            isinstance(m, QuantLinear | QuantConv1D | FrozenLinear | FrozenExperts) for m in module.modules()
        )
        if not converted and self._would_convert(module):
            raise ValueError(
                "under ModelParallelStrategy layers are converted before they are sharded: call "
                "lq_plugin.convert(model, ...) in configure_model ahead of fully_shard, or pass linear=None"
            )
        return report_of(module)

    def _would_convert(self, module: nn.Module) -> bool:
        """False also where "auto" leaves every layer alone."""
        if not self._policy.is_auto:
            return self._policy.converts
        policy = policy_on(module, self._policy, _trainer_of(module).strategy.root_device)
        return bool(conversion_of(module, policy).converted)


def _trainer_of(module: nn.Module) -> Trainer:
    if isinstance(module, LightningModule):
        return module.trainer
    raise TypeError(
        f"QuantPlugin needs lightning.pytorch's Trainer and a LightningModule, it got a {type(module).__name__}. In "
        "Lightning Fabric or a plain loop call lq_plugin.convert(model) and take an optimizer from lq_plugin.optim"
    )


def _needs_everything(trainer: Trainer) -> bool:
    """Sharded checkpoints are restored tensor by tensor, and averages of frozen values differ from them by rounding."""
    averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return averages or isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)


def _check_something_trains(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        raise ValueError(
            "every parameter is frozen, so there is nothing to fit: pass lora=LoRAConfig(...) to train adapters, or "
            "leave some layers out of the frozen formats"
        )


def _check_strategy(strategy: Strategy, options: Options | None, policy: Policy) -> None:
    names = [base.__name__ for base in type(strategy).__mro__]
    for unsupported in _UNSUPPORTED_STRATEGIES:
        if unsupported in names:
            raise ValueError(
                f"QuantPlugin got {unsupported}, which keeps its own precision and optimizer; expected a single "
                "device, ddp, fsdp or ModelParallelStrategy (FSDP2): pass strategy='ddp', or ModelParallelStrategy"
            )
    if policy.freezes and isinstance(strategy, FSDPStrategy):
        raise ValueError(
            f"QuantPlugin got {type(strategy).__name__} and a frozen format, whose integers it cannot flatten and "
            "whose rows it would cut: use ModelParallelStrategy (FSDP2), or strategy='ddp'"
        )
    if options is not None and isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise ValueError(
            f"QuantPlugin got {type(strategy).__name__} and optimizer state in {options.state}, which cannot be "
            "sharded yet; pass optimizer=None, or strategy='ddp'"
        )


def _reason_against_release(trainer: Trainer, precision: str) -> str | None:
    """What in this run needs gradients after the backward pass, or None."""
    accumulates = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if trainer.accumulate_grad_batches > 1 or any(c.going_to_accumulate_grad_batches() for c in accumulates):
        return f"a step here accumulates gradients over batches: pass accumulate_grad_batches=1, or {_WITHOUT_RELEASE}"
    if trainer.gradient_clip_val:
        return _clipped_later(trainer.gradient_clip_val)
    if precision == "16-mixed":
        return f"16-mixed unscales gradients after it: pass precision='bf16-mixed', or {_WITHOUT_RELEASE}"
    if trainer.world_size > 1:
        return f"{trainer.world_size} processes average theirs after it: train in one process, or {_WITHOUT_RELEASE}"
    return None


def _clipped_later(clip_val: int | float) -> str:
    return (
        f"clipping at {clip_val} needs all gradients after it: leave out gradient_clip_val and take "
        f"percentile_clipping, which clips each tensor by its own norms, or {_WITHOUT_RELEASE}"
    )


@rank_zero_only
def _print(text: str) -> None:
    print(text, flush=True)
