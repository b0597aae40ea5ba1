"""One image file as pixels: what is read, what is refused, and why."""

from engine.data.image_file.formats import signature
from engine.data.image_file.read import MAX_PIXELS, read_image

__all__ = ["MAX_PIXELS", "read_image", "signature"]
