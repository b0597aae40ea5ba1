"""PP-SSL and the methods it is measured against, as plain torch modules.

``from ppssl import queue_infonce`` is the fused contrastive loss for anybody's MoCo.
"""

from ppssl.byol import BYOL
from ppssl.lcr import LCR
from ppssl.ldfs import LDFS
from ppssl.method import METHODS, Batch, Method, Output, register
from ppssl.moco import MoCo
from ppssl.ops import queue_infonce
from ppssl.ppssl import PPSSL
from ppssl.simclr import SimCLR
from ppssl.teacher import Teacher

__all__ = [
    "BYOL",
    "LCR",
    "LDFS",
    "METHODS",
    "PPSSL",
    "Batch",
    "Method",
    "MoCo",
    "Output",
    "SimCLR",
    "Teacher",
    "queue_infonce",
    "register",
]
