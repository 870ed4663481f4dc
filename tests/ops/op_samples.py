"""Arguments for every op, made to find what a kernel forgets; one table beside each family of ops."""

from collections.abc import Callable

import samples_blockwise
import samples_blockwise_4bit
import samples_fake_quantize
import samples_gradient_percentile
import samples_outliers
import samples_products_4bit
import samples_rowwise
import samples_scaled_mm
from hostile import SampleTable
from torch import Tensor

SAMPLES: SampleTable = {
    **samples_rowwise.SAMPLES,
    **samples_scaled_mm.SAMPLES,
    **samples_blockwise.SAMPLES,
    **samples_blockwise_4bit.SAMPLES,
    **samples_products_4bit.SAMPLES,
    **samples_outliers.SAMPLES,
    **samples_fake_quantize.SAMPLES,
    **samples_gradient_percentile.SAMPLES,
}

# The largest difference between kernel and reference, for the same arguments: derived from the sizes and the type of
# the sums. Ops that are not here are exact.
BOUNDS: dict[str, Callable[..., Tensor]] = {
    **samples_scaled_mm.BOUNDS,
    **samples_products_4bit.BOUNDS,
    **samples_outliers.BOUNDS,
    **samples_gradient_percentile.BOUNDS,
}
