"""Weights in and out: a run's network, third-party checkpoints, the model card."""

from engine.pretrained import model_card, third_party, weights_file
from engine.pretrained.export_targets import FORMATS, SHORT, export
from engine.pretrained.file_kind import other_kind
from engine.pretrained.frozen_teacher import teacher
from engine.pretrained.model_folder import is_model_folder
from engine.pretrained.run import Run, best_of, load_run, run_config, say_which
from engine.pretrained.weights_file import load_weights, save_weights

__all__ = [
    "FORMATS",
    "export",
    "is_model_folder",
    "Run",
    "SHORT",
    "best_of",
    "load_run",
    "load_weights",
    "model_card",
    "other_kind",
    "run_config",
    "save_weights",
    "say_which",
    "teacher",
    "third_party",
    "weights_file",
]
