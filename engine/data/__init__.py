"""Image data: what a folder holds (catalog, layouts), its order (sampler), its views (views), and the loaders that execute them."""

from engine.data import catalog, contact_sheet, inspection, sampler, teacher_cache, views_sheet
from engine.data.catalog import Catalog, ImageList, read_image
from engine.data.loaders.choose import build_loader, dali_problem
from engine.data.loaders.interface import IMAGENET_MEAN, IMAGENET_STD, Loader
from engine.data.loaders.torch_loader import Normalise, clean_batches, clean_view
from engine.data.machine import HARDWARE_DECODER_SHARE, cores
from engine.data.transform import Transform
from engine.data.views import clean_resize

__all__ = [
    "Catalog",
    "HARDWARE_DECODER_SHARE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ImageList",
    "Loader",
    "Normalise",
    "Transform",
    "build_loader",
    "catalog",
    "clean_batches",
    "clean_resize",
    "clean_view",
    "contact_sheet",
    "cores",
    "dali_problem",
    "inspection",
    "read_image",
    "sampler",
    "teacher_cache",
    "views_sheet",
]
