"""One image file as pixels: what is read, what is refused, and why."""

from engine.data.image_file.formats import signature
from engine.data.image_file.markers import examine
from engine.data.image_file.read import MAX_PIXELS, read_image, upright_rgb
from engine.data.image_file.watch import Verdict, Watch

__all__ = ["MAX_PIXELS", "Verdict", "Watch", "examine", "read_image", "signature", "upright_rgb"]
