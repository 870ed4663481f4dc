"""bitsandbytes' percentile clipping, which it has removed, by its name."""

from torch import Tensor

from lq_kernels.functional_arguments import check_float
from lq_kernels.gradient_percentile import clip_at_percentile


def percentile_clipping(
    grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, its history gnorm_vec (100,) float32 -> its norm, the percentile of the history, the factor to clip it by.

    The history holds squared norms, begins as zeros and is updated in place; step counts from 1, percentile is 0 .. 99.
    All three are float32 without dimensions, on the device of grad; nothing waits for it.
    """
    check_float(grad, "percentile_clipping")
    return clip_at_percentile(grad, gnorm_vec, step, percentile)
