"""What evaluation does to one image, for whoever has images of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.data.image_file import read_image, upright_rgb
from engine.data.loaders.torch_loader import Normalize, input_view
from ppssl.timm_trunk import IMAGENET, ImageInput


@dataclass(frozen=True)
class Transform:
    """What evaluation does to an image: upright RGB, short side resized, center crop of ``image_size``, normalization, as ``input``
    says."""

    image_size: int
    input: ImageInput = IMAGENET

    def __call__(self, image: Image.Image | str | Path) -> torch.Tensor:
        """A PIL image or an image file -> [3, S, S] float32. Raises ``OSError`` or ``ValueError`` for a file that is no image."""
        upright = upright_rgb(image) if isinstance(image, Image.Image) else read_image(image).image
        view = input_view(upright, self.input, self.image_size)
        pixels = torch.from_numpy(np.array(view))
        return Normalize(self.input.mean, self.input.std, torch.device("cpu"), torch.float32)(pixels[None])[0]
