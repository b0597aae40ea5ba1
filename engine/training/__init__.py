"""The training loop and one training step: gradients, optimizer, compile, checkpoints, processes."""

from engine.training import checkpoint, distributed, precision, signals, speed
from engine.training.distributed import ALONE, World, gather_rows
from engine.training.log import COLLAPSE, COLLAPSED
from engine.training.optim import apex_missing, describe_optimizer
from engine.training.resume import find_checkpoint, recorded_settings
from engine.training.signals import Stopped
from engine.training.step import choose, uncompiled
from engine.training.trainer import Summary, Trainer

__all__ = [
    "ALONE",
    "COLLAPSE",
    "COLLAPSED",
    "Stopped",
    "Summary",
    "Trainer",
    "World",
    "apex_missing",
    "checkpoint",
    "choose",
    "describe_optimizer",
    "distributed",
    "find_checkpoint",
    "gather_rows",
    "precision",
    "recorded_settings",
    "signals",
    "speed",
    "uncompiled",
]
