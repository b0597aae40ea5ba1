"""What the network looks at while it learns: maps of the same few images, kept in RUN/maps at least five times per run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from engine.config import Config
from engine.data import Catalog, Normalize, input_view
from engine.evaluation import overlays
from engine.files import read_metadata
from engine.pretrained import weights_file
from engine.run_folder import RunFolder
from engine.training import Trainer, uncompiled
from ppssl.method import Method
from ppssl.timm_trunk import ImageInput, image_input

COUNT = 8
"""Images that are watched, spread evenly over the list so that they are of different classes."""
SIDE = 160
"""Pixels of a side of the kept picture, which shows what the network sees (the center crop), larger where its input is small."""


class Look(NamedTuple):
    """The maps of one moment of a run."""

    step: int
    epoch: int
    maps: dict[str, npt.NDArray[np.float32]]
    """[N, h, w] by name, as the method gave them."""


class Attention(NamedTuple):
    """What RUN/maps holds."""

    pictures: npt.NDArray[np.uint8]
    """[N, SIDE, SIDE, 3] the watched images."""
    names: tuple[str, ...]
    """Their files, relative to ``data.root``."""
    split: str
    looks: list[Look]
    """Oldest first."""


class Watch:
    """Keeps a trainer's maps of COUNT images of the test split (of the training images where there is none) in ``out``/maps.

    Calling it keeps them now. As a hook, ``after_epoch`` keeps them whenever a quarter of the run is done and every ``eval.every``
    epochs; the last epoch is looked at after training. Nothing is done for a method without maps. With ``out`` None the
    maps are made and not kept: the other processes of a run, whose part of a queue the first one needs.
    Raises ``BrokenFile`` naming an image that no longer opens.
    """

    def __init__(self, out: Path | None, cfg: Config, images: Catalog, device: torch.device):
        self.out, self.cfg, self.device = out, cfg, device
        self.split, self.images = ("train", images.train) if images.test is None else ("test", images.test)
        self.chosen = sorted({(2 * i + 1) * len(self.images) // (2 * COUNT) for i in range(COUNT)})
        self.loaded: Tensor | None = None
        self.pictures: npt.NDArray[np.uint8] = np.zeros((0, SIDE, SIDE, 3), np.uint8)

    def __call__(self, trainer: Trainer) -> None:
        if not has_maps(trainer.method):
            return
        if self.loaded is None:
            self.loaded = self._load()
        maps, step = attention(trainer.method, self.loaded), trainer.step.steps_done
        if self.out is None:
            return
        for path in _files(self.out):
            if int(path.stem[5:]) > step:  # of a run that was resumed from before it
                path.unlink()
        about = {"step": str(step), "epoch": str(trainer.epoch)}
        weights_file.save_weights(RunFolder(self.out).maps / f"step_{step:09d}.safetensors", maps, about)
        if trainer.records.takes_pictures:
            values = {name: tensor.cpu().numpy() for name, tensor in maps.items()}
            trainer.records.picture("attention", overlays.sheet(self.pictures, values), step)

    def after_epoch(self, trainer: Trainer) -> None:
        if not trainer.ended and self.is_due(trainer.epoch, trainer.epochs):
            self(trainer)

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Whether to look after ``epoch`` of ``epochs``."""
        every = self.cfg.eval.every
        quarters = {round(epochs * part / 4) for part in (1, 2, 3)}
        return epoch in quarters or (isinstance(every, int) and every > 0 and epoch % every == 0)

    def _load(self) -> Tensor:
        """The watched images as the network gets them; their pictures are kept beside the maps."""
        how = image_input(self.cfg.encoder.arch, self.cfg.encoder.weights)
        read = [self.images.read(i) for i in self.chosen]
        if self.out is not None:
            pictures = torch.stack([_view(image, SIDE, how) for image in read])
            self.pictures = pictures.numpy()
            about = {"names": json.dumps([self.images.names[i] for i in self.chosen]), "split": self.split}
            weights_file.save_weights(RunFolder(self.out).maps / "images.safetensors", {"pictures": pictures}, about)
        pixels = torch.stack([_view(image, self.cfg.data.image_size, how) for image in read])
        return Normalize(how.mean, how.std, self.device, torch.float32)(pixels)


def has_maps(method: Method) -> bool:
    """Whether ``attention`` gives anything: the method has an inference network, or maps of its own."""
    return type(method).network is not Method.network or type(method).attention is not Method.attention


def attention(method: Method, images: Tensor) -> dict[str, Tensor]:
    """Non-negative maps [B, h, w] float32 by name, of [B, 3, S, S] normalized images in float32 and eval mode: ``method.attention``
    and, where there is an inference network, ``feature``, the mean of its feature map over the channels. Leaves the method as it
    was, and compiles nothing."""
    modes = [(module, module.training) for module in method.modules()]
    method.eval()
    try:
        with uncompiled(), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            maps = method.attention(images)
            if type(method).network is not Method.network:
                with torch.no_grad():
                    maps = maps | {"feature": method.network.trunk(images).mean(1).clamp_min(0)}
            return {name: value.detach().float() for name, value in maps.items()}
    finally:
        for module, training in modes:
            module.training = training


def read(out: Path) -> Attention | None:
    """The maps in a run folder; None where there are none. Raises ``ValueError`` naming a file that is damaged."""
    images = RunFolder(out).maps / "images.safetensors"
    if not images.is_file() or not _files(out):
        return None
    pictures = weights_file.load_weights(images)["pictures"].numpy()
    about = read_metadata(images)
    looks = []
    for path in _files(out):
        maps = {name: tensor.numpy() for name, tensor in weights_file.load_weights(path).items()}
        when = read_metadata(path)
        looks.append(Look(int(when["step"]), int(when["epoch"]), maps))
    return Attention(pictures, tuple(json.loads(about["names"])), about["split"], looks)


def _files(out: Path) -> list[Path]:
    return sorted(RunFolder(out).maps.glob("step_*.safetensors"))


def _view(image: Image.Image, side: int, how: ImageInput) -> Tensor:
    """What a network of that input sees of an image: uint8 [side, side, 3]."""
    return torch.from_numpy(np.array(input_view(image, how, side)))
