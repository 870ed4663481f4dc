"""Launches of every kernel at sizes of real models; one table beside each family of ops.

`python kernel_launches.py sm_90` prints one JSON object for each kernel that the launches would start on that GPU.
"""

import json
import sys

import launches_blockwise
import launches_blockwise_4bit
import launches_fake_quantize
import launches_gradient_percentile
import launches_muon
import launches_optimizer
import launches_outliers
import launches_products_4bit
import launches_rowwise
import launches_scaled_mm
from compile_only import GPUS, LaunchTable, compile_all

LAUNCHES: LaunchTable = {
    **launches_rowwise.LAUNCHES,
    **launches_scaled_mm.LAUNCHES,
    **launches_blockwise.LAUNCHES,
    **launches_blockwise_4bit.LAUNCHES,
    **launches_products_4bit.LAUNCHES,
    **launches_optimizer.LAUNCHES,
    **launches_muon.LAUNCHES,
    **launches_outliers.LAUNCHES,
    **launches_fake_quantize.LAUNCHES,
    **launches_gradient_percentile.LAUNCHES,
}

if __name__ == "__main__":
    for record in compile_all(LAUNCHES, GPUS[sys.argv[1]]):
        print(json.dumps(record))
