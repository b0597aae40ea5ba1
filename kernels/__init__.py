"""How it is computed fast: one op a file, each with an eager definition in ``reference`` as its specification.

Imports torch only: triton is imported when a kernel first runs, so this works on machines with neither CUDA nor triton.
"""

from kernels import reference
from kernels.augment import augment, recolour
from kernels.gradcam import gradcam
from kernels.infonce import enqueue, queue_infonce
from kernels.maxout import maxout
from kernels.maxout_image import maxout_image

__all__ = ["augment", "enqueue", "gradcam", "maxout", "maxout_image", "queue_infonce", "recolour", "reference"]
