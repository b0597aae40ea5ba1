"""The engine that runs a method: data, step, checkpoints, evaluation.

``from engine import Trainer, load``: ``Trainer(method, loader, epochs=100).fit()`` trains anybody's ``ppssl.Method``;
``load(RUN).embed(paths)`` maps image files to a trained network's unit features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine import compiler_cache

if TYPE_CHECKING:
    from engine.build import load
    from engine.training.trainer import Trainer

__all__ = ["Trainer", "__version__", "load"]

__version__ = "0.1.0"

compiler_cache.choose()  # importing torchvision chooses for whoever has not


def __getattr__(name: str) -> Any:  # lazily: reading a config needs no torch
    if name == "Trainer":
        from engine.training.trainer import Trainer

        return Trainer
    if name == "load":
        from engine.build import load

        return load
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
