"""Fused ops, one per file. The eager definitions in ``reference`` are their specification.

This imports torch only: triton is imported when a kernel first runs, so the package works without CUDA and without triton.
"""

from kernels import reference
from kernels.augment import augment, recolour
from kernels.batch_norm import batch_norm
from kernels.gradcam import gradcam
from kernels.infonce import enqueue, queue_infonce
from kernels.maxout import maxout
from kernels.maxout_image import maxout_image

__all__ = ["augment", "batch_norm", "enqueue", "gradcam", "maxout", "maxout_image", "queue_infonce", "recolour", "reference"]
