"""Low-bit training for PyTorch Lightning: `Trainer(plugins=[QuantPlugin()])`, or `convert(model)` in a plain loop.

Names are imported when they are first used, so that `import lq_plugin` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lq_plugin.auto_format import Auto
    from lq_plugin.callbacks import ClipMonitor, GracefulStop, MemoryMonitor, TokenThroughput
    from lq_plugin.checkpoint import export_merged, save_quantized
    from lq_plugin.conversion import Conversion, convert
    from lq_plugin.loading import load_pretrained, load_weights
    from lq_plugin.lora_config import LoRAConfig
    from lq_plugin.plugin import QuantPlugin

_HOMES = {
    "Auto": "lq_plugin.auto_format",
    "ClipMonitor": "lq_plugin.callbacks",
    "Conversion": "lq_plugin.conversion",
    "GracefulStop": "lq_plugin.callbacks",
    "LoRAConfig": "lq_plugin.lora_config",
    "MemoryMonitor": "lq_plugin.callbacks",
    "QuantPlugin": "lq_plugin.plugin",
    "TokenThroughput": "lq_plugin.callbacks",
    "convert": "lq_plugin.conversion",
    "export_merged": "lq_plugin.checkpoint",
    "load_pretrained": "lq_plugin.loading",
    "load_weights": "lq_plugin.loading",
    "save_quantized": "lq_plugin.checkpoint",
}

_SUBPACKAGES = ("callbacks", "formats", "layers", "optim")

__all__ = [
    "Auto",
    "ClipMonitor",
    "Conversion",
    "GracefulStop",
    "LoRAConfig",
    "MemoryMonitor",
    "QuantPlugin",
    "TokenThroughput",
    "convert",
    "export_merged",
    "load_pretrained",
    "load_weights",
    "save_quantized",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"lq_plugin.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES, *_SUBPACKAGES]
