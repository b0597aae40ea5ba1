"""Image data: what a folder holds (catalog, layouts), its order (sampler), its views (views), and the loaders that execute them.

Importing this package loads neither torch nor DALI: what is taken from it is imported then.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.data import catalog, contact_sheet, inspection, sampler, teacher_cache, views_sheet
    from engine.data.catalog import Catalog, ImageList
    from engine.data.image_file import Watch, read_image, signature
    from engine.data.loaders.choose import build_loader, dali_problem
    from engine.data.loaders.clean_batches import clean_batches, decoded_batches
    from engine.data.loaders.execute import ahead
    from engine.data.loaders.interface import IMAGENET_MEAN, IMAGENET_STD, Loader
    from engine.data.loaders.photo_list import PhotoList, list_photos, photo_settings, readable_photos
    from engine.data.loaders.torch_loader import Normalize, clean_view, input_view
    from engine.data.machine import HARDWARE_DECODER_SHARE, cores, keep_freed_memory
    from engine.data.transform import Transform
    from engine.data.views import clean_resize

_HOME = {
    "Catalog": "catalog", "ImageList": "catalog", "read_image": "image_file", "signature": "image_file",
    "build_loader": "loaders.choose",
    "dali_problem": "loaders.choose", "IMAGENET_MEAN": "loaders.interface", "IMAGENET_STD": "loaders.interface",
    "Loader": "loaders.interface", "Normalize": "loaders.torch_loader", "clean_batches": "loaders.clean_batches",
    "decoded_batches": "loaders.clean_batches", "ahead": "loaders.execute",
    "clean_view": "loaders.torch_loader", "input_view": "loaders.torch_loader",
    "HARDWARE_DECODER_SHARE": "machine", "cores": "machine", "keep_freed_memory": "machine", "Transform": "transform",
    "clean_resize": "views", "Watch": "image_file", "PhotoList": "loaders.photo_list",
    "list_photos": "loaders.photo_list", "photo_settings": "loaders.photo_list", "readable_photos": "loaders.photo_list",
}  # fmt: skip

__all__ = [
    "HARDWARE_DECODER_SHARE", "IMAGENET_MEAN", "IMAGENET_STD", "Catalog", "ImageList", "Loader", "Normalize", "PhotoList",
    "Transform", "Watch", "ahead", "build_loader", "catalog", "clean_batches", "clean_resize", "clean_view", "contact_sheet",
    "cores", "dali_problem", "decoded_batches", "input_view", "inspection", "keep_freed_memory", "list_photos", "photo_settings",
    "read_image",
    "readable_photos", "sampler", "signature", "teacher_cache", "views_sheet",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engine.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"engine.data.{_HOME[name]}"), name)
