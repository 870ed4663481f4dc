"""Errors as bitsandbytes' tests define them, to be compared with the bounds that it publishes."""

from torch import Tensor


def errors(restored: Tensor, x: Tensor) -> tuple[float, float]:
    """Mean absolute and mean relative error."""
    error = (restored.float() - x.float()).abs()
    return float(error.mean()), float((error / (x.float().abs() + 1e-8)).mean())
