"""What evaluation does to one image, for whoever has images of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.data.image_file import read_image, upright_rgb
from engine.data.loaders.interface import IMAGENET_MEAN, IMAGENET_STD
from engine.data.loaders.torch_loader import Normalize, clean_view
from engine.data.views import clean_resize


@dataclass(frozen=True)
class Transform:
    """What evaluation does to an image: upright RGB, short side 256/224 of ``image_size``, center crop, ImageNet normalization."""

    image_size: int

    def __call__(self, image: Image.Image | str | Path) -> torch.Tensor:
        """A PIL image or an image file -> [3, S, S] float32. Raises ``OSError`` or ``ValueError`` for a file that is no image."""
        upright = upright_rgb(image) if isinstance(image, Image.Image) else read_image(image).image
        view = clean_view(upright, clean_resize(self.image_size), self.image_size, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(view))
        return Normalize(IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"), torch.float32)(pixels[None])[0]
