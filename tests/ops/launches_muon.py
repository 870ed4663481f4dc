"""Launches of Muon's two updates; see launches_optimizer.py."""

import torch
from compile_only import LaunchTable, meta
from lq_kernels.muon_rules import MuonDirection, MuonWeight
from lq_kernels.optimizer_batch import Batch
from lq_kernels.optimizer_facts import NO_CLIPPING, Clipping
from lq_kernels.optimizer_rules import Rule
from lq_kernels.optimizer_state import new_state
from lq_kernels.optimizer_step import Job, launch_step
from lq_kernels.percentile_clipping import new_history


def _launch(rule: Rule, kind: str, clipping: Clipping = NO_CLIPPING, seeds: list[int] | None = None) -> None:
    params = [meta(4096, 4096), meta(83, 331)]
    states = [new_state(param, kind, rule.signs) | new_history(param.device) for param in params]
    launch_step([Job(Batch(params, states, torch.bfloat16), params, [rule], clipping, seeds)])


LAUNCHES: LaunchTable = {
    "Muon's direction, 8-bit state": lambda: _launch(MuonDirection(lr=1e-3, momentum=0.95), "dynamic", Clipping(5)),
    "Muon's direction, e4m3 state": lambda: _launch(MuonDirection(lr=1e-3, momentum=0.95, nesterov=False), "e4m3"),
    "Muon's weight": lambda: _launch(MuonWeight(lr=1e-3, weight_decay=0.1, ratio=2.0), "float32"),
    "Muon's weight, skipping": lambda: _launch(
        MuonWeight(lr=1e-3, weight_decay=0.1, ratio=2.0, skips=True), "float32", seeds=[1]
    ),
}
