"""Dense bf16 matrix throughput of accelerators, by the name that torch.cuda.get_device_name gives."""

import re

# FLOP/s with float32 accumulation and without sparsity, from the vendors' data sheets:
# https://www.nvidia.com/en-us/data-center/ (h200, h100, a100, l40s, l4, a10, b200), NVIDIA's Ada and Ampere GA102
# whitepapers for the GeForce and RTX cards, https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
BF16_PEAK = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H100": 989.4e12,
    "H100 PCIe": 756.5e12,
    "H100 NVL": 835.5e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307.4e12,
}


def bf16_peak(device_name: str) -> float | None:
    """FLOP/s of the longest name in the table that is part of the device's name as whole words, or None."""
    known = [name for name in BF16_PEAK if re.search(rf"\b{re.escape(name)}\b", device_name)]
    return BF16_PEAK[max(known, key=len)] if known else None
