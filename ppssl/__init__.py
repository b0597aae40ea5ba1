"""PP-SSL and the methods it is measured against, as plain torch modules.

``from ppssl import queue_infonce`` is the fused contrastive loss for anybody's MoCo. Importing this package loads no torch: what is
taken from it is imported then.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppssl.byol import BYOL
    from ppssl.lcr import LCR
    from ppssl.ldfs import LDFS
    from ppssl.method import METHODS, Batch, Method, Output, StepContext, register
    from ppssl.moco import MoCo
    from ppssl.ops import queue_infonce
    from ppssl.ppssl import PPSSL
    from ppssl.simclr import SimCLR
    from ppssl.teacher import Teacher

_HOME = {
    "BYOL": "byol", "LCR": "lcr", "LDFS": "ldfs", "METHODS": "method", "PPSSL": "ppssl", "Batch": "method", "Method": "method",
    "MoCo": "moco", "Output": "method", "SimCLR": "simclr", "StepContext": "method", "Teacher": "teacher", "queue_infonce": "ops",
    "register": "method",
}  # fmt: skip

__all__ = [
    "BYOL", "LCR", "LDFS", "METHODS", "PPSSL", "Batch", "Method", "MoCo", "Output", "SimCLR", "StepContext", "Teacher",
    "queue_infonce", "register",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ppssl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ppssl.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
