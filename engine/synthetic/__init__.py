"""The synthetic dataset: drawn birds, and the image-text teacher that was trained on drawings."""

from engine.synthetic import dataset
from engine.synthetic.teacher import teacher_files

__all__ = ["dataset", "teacher_files"]
