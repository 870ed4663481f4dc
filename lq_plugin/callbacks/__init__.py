"""Callbacks that log what a run costs; they work in any Trainer, with QuantPlugin or without."""

from lq_plugin.callbacks.clip_monitor import ClipMonitor
from lq_plugin.callbacks.graceful_stop import GracefulStop
from lq_plugin.callbacks.memory_monitor import MemoryMonitor
from lq_plugin.callbacks.token_throughput import TokenThroughput

__all__ = ["ClipMonitor", "GracefulStop", "MemoryMonitor", "TokenThroughput"]
