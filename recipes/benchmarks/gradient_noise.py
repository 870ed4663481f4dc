"""A callback that makes every step depend on all random generators: a run that loses one of them is another run."""

import random

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer


class GradientNoise(Callback):
    """Multiplies every gradient by 1 + `scale` times a number drawn by Python, NumPy and torch."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                drawn = random.gauss(0, 1) + np.random.standard_normal() + torch.randn(()).item()
                parameter.grad.mul_(1 + self.scale * drawn)
