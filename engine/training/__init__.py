"""The training loop and one training step: gradients, optimizer, compile, checkpoints, processes."""

from engine.training import checkpoint, distributed, precision, profiling, signals
from engine.training.distributed import ALONE, World, add_device_option, choose_device, gather_rows, option_device
from engine.training.log import Summary, symptoms
from engine.training.log.symptoms import COLLAPSE, COLLAPSED
from engine.training.optim import apex_missing, describe_optimizer
from engine.training.resume import find_checkpoint, recorded_settings
from engine.training.signals import Stopped
from engine.training.step import choose, uncompiled
from engine.training.trainer import Trainer

__all__ = [
    "ALONE",
    "COLLAPSE",
    "COLLAPSED",
    "Stopped",
    "Summary",
    "Trainer",
    "World",
    "add_device_option",
    "apex_missing",
    "checkpoint",
    "choose",
    "choose_device",
    "describe_optimizer",
    "distributed",
    "find_checkpoint",
    "gather_rows",
    "option_device",
    "precision",
    "recorded_settings",
    "signals",
    "profiling",
    "symptoms",
    "uncompiled",
]
