"""Where the files of the synthetic dataset's image-text teacher are; ``train_teacher.py`` made them."""

from __future__ import annotations

import hashlib
from pathlib import Path

BIRDS_TEACHER_SHA256 = "c1886890a1caa1ddcd3176051b3fcc0f4e45bc4fc9b9148f47907608e4612e78"
CONFIG = Path(__file__).with_suffix(".json")
WEIGHTS = Path(__file__).with_suffix(".safetensors")


def teacher_files() -> tuple[Path, Path]:
    """The shipped open_clip model config (its stem is the model's name) and the weights that belong to it.

    Raises:
        FileNotFoundError: a file is missing from the installation.
        ValueError: the weights are not those this version was tested with.
    """
    for path in (CONFIG, WEIGHTS):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; reinstall ppssl-engine, or run python -m engine.synthetic.train_teacher")
    found = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    if found != BIRDS_TEACHER_SHA256:
        raise ValueError(f"{WEIGHTS} has sha256 {found}, expected {BIRDS_TEACHER_SHA256}; reinstall ppssl-engine")
    return CONFIG, WEIGHTS
