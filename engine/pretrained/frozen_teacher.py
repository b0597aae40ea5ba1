"""The frozen model that a method listens to: an image-text model of open_clip, or any vision model of timm."""

from __future__ import annotations

import torch

from engine.config import Config
from engine.console import printable, say
from engine.errors import ConfigError
from engine.pretrained import third_party
from engine.synthetic import teacher_files
from ppssl.settings import TeacherConfig, method_settings
from ppssl.teacher import Teacher, load_descriptions
from ppssl.timm_trunk import PREFIX, build_trunk


def teacher(cfg: Config, device: torch.device) -> Teacher | None:
    """The frozen model that the method listens to, where it does."""
    settings = method_settings(cfg, cfg.data.image_size)
    if not settings.uses_teacher:
        return None
    model, files = cfg.teacher.model, cfg.teacher.weights
    descriptions = load_descriptions(cfg.ais.prompts, cfg.ais.count) if settings.uses_text else None
    what = (
        f"target {cfg.ais.target}" if descriptions is None else f"{len(descriptions)} descriptions of {printable(cfg.ais.prompts)}"
    )
    # before it is loaded: a first use downloads it
    say(f"teacher: {model}, weights {files}; {what}")
    if model.startswith(PREFIX):
        return image_teacher(cfg.teacher).to(device)
    if "birds" in (model, files):
        if model != files:
            raise ValueError(f"teacher.model: {model} with teacher.weights: {files}; birds goes with birds only")
        model, files = map(str, teacher_files())
    return Teacher.from_open_clip(model, files, descriptions, cfg.teacher.image_size).to(device)


def image_teacher(asked: TeacherConfig) -> Teacher:
    """The frozen model of timm that ``teacher.*`` names. Raises what loading an encoder's weights does, naming these keys."""
    if asked.weights == "none" or asked.weights == TeacherConfig.weights:
        raise ConfigError(f"teacher.weights: got {asked.weights!r}, a teacher of timm has timm, timm:TAG or the path of a file")
    try:
        trunk = build_trunk(asked.model)
        say(f"teacher: {third_party.initialize(trunk, asked.weights)}")
        return Teacher.from_trunk(trunk, asked.weights, asked.image_size)
    except (ValueError, OSError) as error:
        text = str(error)
        for encoders, teachers in _TEACHERS_WORDS.items():
            text = text.replace(encoders, teachers)
        kind = next(kind for kind in (ConfigError, ValueError, FileNotFoundError, OSError) if isinstance(error, kind))
        raise kind(text) from error


_TEACHERS_WORDS = {
    ", or encoder.weights=none for random weights": "",
    "; or set encoder.weights": "; or set teacher.weights",
    ", or encoder.partial=true to take what fits and leave the rest random": "",
    "encoder.weights": "teacher.weights",
    "encoder.arch": "teacher.model",
    "data.image_size": "teacher.image_size",
    "use none or a file": "use a file",
    "give none, a torchvision tag, or an existing file": "give timm, timm:TAG or an existing file",
    ", none or a file": " or a file",
}
"""What an error about an encoder says of a teacher."""
