"""An op is its PyTorch reference with a Triton launcher attached.

    @op
    def negate(x: Tensor) -> Tensor: ...        # the reference: contract, formula, a few lines of torch

    @negate.fake
    def _negate_fake(x: Tensor) -> Tensor: ...  # shapes and dtypes for torch.compile

    @negate.triton
    def _launch(x: Tensor) -> Tensor: ...       # CUDA and ROCm

An op that writes into tensors it is given returns None and is declared with `@op_with_out("codes", "scale")`, the
names of those arguments.

PyTorch's dispatcher picks by the device of the tensors: CUDA tensors (ROCm's too) go to the launcher, all others
to the reference. The op is `torch.ops.lq.negate`, registered with `torch.library.Library`, whose dispatch costs a
third of `custom_op`'s. No gradient flows through an op: layers define theirs.
"""

import inspect
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from lq_kernels._triton import HAS_TRITON

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARY = torch.library.Library("lq", "DEF")

OPS: dict[str, "Op[Any, Any]"] = {}


class Op(Generic[P, R]):
    """A reference, its fake and its launcher under one name; calling it dispatches on the device of its tensors."""

    def __init__(self, reference: Callable[P, R], outputs: tuple[str, ...] = ()) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.outputs = outputs
        self.launcher: Callable[P, R] | None = None
        self._signature = inspect.signature(reference)
        self.__doc__ = reference.__doc__
        schema = torch.library.infer_schema(reference, mutates_args=outputs)
        _LIBRARY.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, torch.library.fallthrough_kernel, "Autograd")
        _LIBRARY.impl(self.name, torch.no_grad()(reference), "CompositeExplicitAutograd")
        _LIBRARY.impl(self.name, self._launch, "CUDA")
        self.overload = getattr(torch.ops.lq, self.name).default
        OPS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return cast(R, self.overload(*args, **kwargs))

    def __repr__(self) -> str:
        return f"<op lq::{self.name}>"

    def fake(self, function: Callable[P, R]) -> Callable[P, R]:
        torch.library.register_fake(f"lq::{self.name}", function, lib=_LIBRARY)
        return function

    def triton(self, launcher: Callable[P, R]) -> Callable[P, R]:
        self.launcher = launcher
        return launcher

    def _launch(self, *args: P.args, **kwargs: P.kwargs) -> R:
        require_triton(f"lq::{self.name}")
        assert self.launcher is not None, f"{self.name} has no launcher"
        device = cast(Tensor, args[0]).device
        if device.index == torch.cuda.current_device():  # entering a device costs as much as a launch
            result = self.launcher(*args, **kwargs)
        else:
            with torch.cuda.device(device):
                result = self.launcher(*args, **kwargs)
        if self.outputs:
            written = self.written(*args, **kwargs)
            torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])
        return result

    def written(self, *args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, ...]:
        """The arguments that the op writes into."""
        bound = self._signature.bind(*args, **kwargs).arguments
        return tuple(bound[name] for name in self.outputs)


def op(reference: Callable[P, R]) -> Op[P, R]:
    """Registers a reference as `torch.ops.lq.<its name>`; its first argument is a tensor."""
    return Op(reference)


def op_with_out(*outputs: str) -> Callable[[Callable[P, None]], Op[P, None]]:
    """Registers a reference that returns None and writes into the tensors given as its arguments `outputs`."""
    return lambda reference: Op(reference, outputs)


def require_triton(what: str) -> None:
    if not HAS_TRITON:
        raise RuntimeError(f"{what} got CUDA tensors, but Triton is not installed: pip install 'triton>=3.6'")
