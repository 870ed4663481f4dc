"""Which GPUs have the arithmetic of a format; a format that cannot run is an error, never 16 bits in its place."""

from functools import cache

import torch

from lq_plugin.formats.gemm import GemmFormats

_NO_INT8 = "sm_103"  # B300 and GB300: its int8 rate is a small part of its fp8 rate


def require_device(formats: GemmFormats, device: torch.device) -> None:
    """RuntimeError where a GPU lacks an 8-bit type of the format, with its name and the formats that it has."""
    if device.type != "cuda" or not formats.element_types:
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    lacking, architecture, name = _lacking(formats.element_types, index)
    if lacking:
        raise RuntimeError(f"{formats.name} does not run on {name} ({architecture}): {lacking}")


@cache
def _lacking(types: tuple[torch.dtype, ...], index: int) -> tuple[str, str, str]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        architecture = properties.gcnArchName.partition(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return lacking(types, architecture), architecture, properties.name


def lacking(types: tuple[torch.dtype, ...], architecture: str) -> str:
    """What an architecture, sm_90 or gfx942 for example, lacks of these types, and what to use there; or nothing."""
    fp8, int8 = any(dtype.is_floating_point for dtype in types), torch.int8 in types
    if not architecture.startswith("sm_"):
        if fp8 and not architecture.startswith(("gfx95", "gfx12")):
            return "its fp8 is another encoding, or it has none; use int8_switchback"
        return ""
    number = int(architecture.removeprefix("sm_"))
    if number < 80:
        return "8-bit training needs sm_80 or newer; use linear=None, the optimizer has 8 bits here too"
    if fp8 and number < 89:
        return "fp8 needs sm_89 or newer; use int8_switchback"
    if int8 and architecture == _NO_INT8:
        return "it has no int8 matrix units worth the name; use fp8_rowwise_with_gw_hp"
    return ""
