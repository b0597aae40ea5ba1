"""The synthetic dataset: forty bird species in ten genera, drawn into JPEG files in CUB-200-2011's own layout."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from engine.console import say, with_progress
from engine.synthetic.drawing import SIDE, SUPERSAMPLE, Plan, draw_bird, random_pose
from engine.synthetic.scenes import Nuisance, background, finish, random_nuisance, silhouette

VERSION = 2
"""Raised whenever the same seed draws another picture: ``ensure`` moves a world of another version aside and draws it again."""

STAMP = "birds.json"
"""The file that a finished world ends with: its version, seed and counts."""

# fmt: off
PLANS: dict[str, Plan] = {
    "Finch": Plan(
        ("cap", "bars"), body=(0.58, 0.40), tilt=14, head=(0.10, -0.2, 0.26), beak="cone", beak_length=0.22,
        tail="square", tail_length=0.5, legs=0.22, wing=(0.56, 0.22), coat="streaked", accent="cream"),
    "Heron": Plan(
        ("crest", "belly"), body=(0.55, 0.30), tilt=26, head=(0.26, -0.62, 0.17), beak="dagger", beak_length=0.5,
        tail="square", tail_length=0.3, tail_angle=8, legs=0.62, wing=(0.54, 0.16), coat="slanted", accent="cream"),
    "Owl": Plan(
        ("ring", "crest"), body=(0.62, 0.42), tilt=62, head=(-0.02, -0.2, 0.38), beak="hook", beak_length=0.12,
        tail="square", tail_length=0.3, legs=0.12, wing=(0.6, 0.18), coat="barred", accent="gold"),
    "Swallow": Plan(
        ("throat", "patch"), body=(0.62, 0.28), tilt=6, head=(0.08, -0.1, 0.22), beak="thin", beak_length=0.14,
        tail="fork", tail_length=0.85, tail_angle=4, legs=0.1, wing=(0.95, 0.2), coat="saddled", accent="ember"),
    "Kingfisher": Plan(
        ("collar", "tailtip"), body=(0.5, 0.36), tilt=34, head=(0.14, -0.24, 0.32), beak="dagger", beak_length=0.6,
        tail="square", tail_length=0.36, legs=0.12, wing=(0.46, 0.18), coat="chevrons", accent="gold"),
    "Pheasant": Plan(
        ("mask", "tailbars"), body=(0.56, 0.36), tilt=12, head=(0.2, -0.36, 0.19), beak="cone", beak_length=0.16,
        tail="point", tail_length=1.15, tail_angle=10, legs=0.36, wing=(0.44, 0.18), coat="scaled", accent="ember"),
    "Duck": Plan(
        ("collar", "patch"), body=(0.72, 0.35), tilt=6, head=(0.12, -0.36, 0.24), beak="flat", beak_length=0.34,
        tail="square", tail_length=0.24, tail_angle=24, legs=0.1, wing=(0.6, 0.22), coat="pied", accent="cream"),
    "Woodpecker": Plan(
        ("cap", "bars"), body=(0.66, 0.32), tilt=58, head=(0.1, -0.16, 0.24), beak="dagger", beak_length=0.32,
        tail="point", tail_length=0.55, tail_angle=-10, legs=0.12, wing=(0.6, 0.16), coat="checked", accent="ember"),
    "Wren": Plan(
        ("bars", "breastband"), body=(0.52, 0.42), tilt=16, head=(0.04, -0.14, 0.25), beak="curved", beak_length=0.3,
        tail="fan", tail_length=0.5, tail_angle=56, legs=0.24, wing=(0.42, 0.18), coat="spotted", accent="cream"),
    "Parrot": Plan(
        ("crest", "tailtip"), body=(0.62, 0.36), tilt=48, head=(0.08, -0.14, 0.31), beak="hook", beak_length=0.26,
        tail="fan", tail_length=0.8, tail_angle=-4, legs=0.12, wing=(0.62, 0.18), coat="blotched", accent="gold"),
}
# fmt: on
GENERA: tuple[str, ...] = tuple(PLANS)


def _name(genus: str, bits: int) -> str:
    words = [part.capitalize() for i, part in enumerate(PLANS[genus].parts) if bits >> i & 1]
    return "_".join([*(words or ["Plain"]), genus])


SPECIES: tuple[str, ...] = tuple(_name(genus, bits) for genus in GENERA for bits in range(4))
"""Species ``4 g + b``: genus ``g`` with the parts whose bits are set in ``b``."""


def parts_of(species: int) -> frozenset[str]:
    """The parts that mark a species among the four of its genus."""
    return frozenset(part for i, part in enumerate(PLANS[GENERA[species // 4]].parts) if species % 4 >> i & 1)


def nuisance_of(seed: int | Sequence[int]) -> Nuisance:
    """Place, light and occluder of the scene that ``seed`` gives in :func:`draw`."""
    return random_nuisance(_streams(seed)[0])


def _streams(seed: int | Sequence[int]) -> list[np.random.Generator]:
    """Independent generators for what stands behind the bird, for its pose, and for what stands before it."""
    entropy = [seed] if isinstance(seed, int) else list(seed)
    return [np.random.default_rng([*entropy, stream]) for stream in range(3)]


def draw(species: int, seed: int | Sequence[int]) -> Image.Image:
    """One bird of ``species`` (0..39), RGB, ``SIDE`` pixels square.

    Pose, place, light and occluders follow from ``seed`` alone: two species with one seed stand in the same scene.
    """
    scene, empty, nuisance, before = _stage(species, seed)
    return finish(scene, empty, nuisance, before)


def silhouette_of(species: int, seed: int | Sequence[int]) -> Image.Image:
    """Where the bird of ``draw(species, seed)`` is, seen or hidden: mode L, ``SIDE`` pixels square, 255 for a whole pixel."""
    scene, empty, _, _ = _stage(species, seed)
    return silhouette(scene, empty)


def _stage(species: int, seed: int | Sequence[int]) -> tuple[Image.Image, Image.Image, Nuisance, np.random.Generator]:
    """The scene with its bird and without, enlarged, what it is like, and the generator for what comes before the bird."""
    if not 0 <= species < len(SPECIES):
        raise ValueError(f"species {species} is not in 0..{len(SPECIES) - 1}")
    behind, figure, before = _streams(seed)
    nuisance = random_nuisance(behind)
    size = SIDE * SUPERSAMPLE
    scene = background(behind, nuisance.place, size)
    empty = scene.copy()
    draw_bird(scene, PLANS[GENERA[species // 4]], parts_of(species), random_pose(figure, size))
    return scene, empty, nuisance, before


@dataclass(frozen=True)
class _Job:
    root: str
    name: str
    species: int
    seed: tuple[int, ...]


def _write(job: _Job) -> None:
    draw(job.species, job.seed).save(Path(job.root, "images", job.name), quality=92, subsampling=0)


def _jobs(root: Path, seed: int, counts: tuple[int, int]) -> Iterator[tuple[_Job, bool]]:
    """Every image of the world with its "is a training image" flag, species by species."""
    for species, name in enumerate(SPECIES):
        for split, count in enumerate(counts):
            for i in range(count):
                number = i + split * counts[0]
                path = f"{_folder(species)}/{name}_{number:04d}.jpg"
                yield _Job(str(root), path, species, (seed, split, species, i)), split == 0


def silhouettes(root: Path | str, names: Sequence[str]) -> list[Image.Image]:
    """``silhouette_of`` for images of the world at ``root``, by their files relative to it.

    Raises ``ValueError`` where ``root`` is no finished world of this version, or has no such image.
    """
    stamp = _read_stamp(Path(root))
    if stamp is None or stamp.get("version") != VERSION:
        raise ValueError(f"{root} is no synthetic dataset of version {VERSION}: where its birds are is not known")
    jobs = _jobs(Path(root), stamp["seed"], (stamp["train_per_species"], stamp["test_per_species"]))
    by_name = {f"images/{job.name}": job for job, _ in jobs}
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"{root} has no image {unknown[0]!r}")
    return [silhouette_of(by_name[name].species, by_name[name].seed) for name in names]


def _folder(species: int) -> str:
    return f"{species + 1:03d}.{SPECIES[species]}"


def _stamp(seed: int, train_per_species: int, test_per_species: int) -> dict[str, int]:
    return {
        "version": VERSION,
        "seed": seed,
        "train_per_species": train_per_species,
        "test_per_species": test_per_species,
    }


def _is_finished(root: Path, stamp: dict[str, int]) -> bool:
    return _read_stamp(root) == stamp


def generate(
    root: Path | str,
    seed: int = 0,
    train_per_species: int = 40,
    test_per_species: int = 30,
    workers: int = 2,
    progress: bool = True,
) -> Path:
    """Draw the whole world as JPEG files in CUB-200-2011's layout and return its folder.

    The files appear at ``root`` all at once (written beside it and renamed), and nothing is drawn when a finished world with
    the same parameters is already there.

    Raises:
        ValueError: a count below 1, or a negative seed.
        FileExistsError: ``root`` holds something that is not a synthetic dataset; it is left alone.
    """
    if min(train_per_species, test_per_species, workers) < 1 or seed < 0:
        raise ValueError(
            f"train_per_species={train_per_species}, test_per_species={test_per_species} and workers={workers} must be at "
            f"least 1 and seed={seed} at least 0"
        )
    root = Path(root)
    stamp = _stamp(seed, train_per_species, test_per_species)
    if _is_finished(root, stamp):
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())) and not (root / STAMP).is_file():
        raise FileExistsError(f"{root} exists and is not a synthetic dataset; name another folder (data.root) or remove it")
    root.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        _draw_all(fresh, seed, (train_per_species, test_per_species), workers, progress)
        (fresh / STAMP).write_text(json.dumps(stamp))
        fresh.chmod(0o755)
        if root.exists():
            shutil.rmtree(root)
        try:
            fresh.rename(root)
        except OSError:
            # Another process may have finished the same world first; its files are equal to ours.
            if not _is_finished(root, stamp):
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return root


def ensure(root: Path | str, *, seed: int = 0, workers: int = 2, progress: bool = True) -> Path:
    """The synthetic dataset of ``seed`` in its standard size at ``root``, drawn where there is none. One drawn by another
    version is kept beside it under another name, and the log says so."""
    root = Path(root)
    if not is_missing(root):
        return root
    stamp = _read_stamp(root)
    if stamp is not None:
        number = next(n for n in range(1, 10**6) if not root.with_name(f"{root.name}.{n}").exists())
        root.rename(root.with_name(f"{root.name}.{number}"))
        say(
            f"{root} was drawn by version {stamp.get('version')} of the synthetic dataset, this is version {VERSION}: "
            f"moved to {root}.{number}"
        )
    return generate(root, seed, workers=workers, progress=progress)


def is_missing(root: Path | str) -> bool:
    """Whether ``ensure`` would draw: there is no list of images, or another version's. Seed and counts are the user's choice,
    and so is a set in the same layout without our stamp."""
    stamp = _read_stamp(Path(root))
    return not Path(root, "images.txt").is_file() or (stamp is not None and stamp.get("version") != VERSION)


def _read_stamp(root: Path) -> dict[str, int] | None:
    """What a finished world says of itself; None without a stamp that can be read."""
    try:
        stamp = json.loads((root / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def _draw_all(root: Path, seed: int, counts: tuple[int, int], workers: int, progress: bool) -> None:
    for species in range(len(SPECIES)):
        (root / "images" / _folder(species)).mkdir(parents=True)
    jobs = list(_jobs(root, seed, counts))
    rows = [(i, job, train) for i, (job, train) in enumerate(jobs, 1)]
    (root / "images.txt").write_text("".join(f"{i} {job.name}\n" for i, job, _ in rows))
    (root / "image_class_labels.txt").write_text("".join(f"{i} {job.species + 1}\n" for i, job, _ in rows))
    (root / "train_test_split.txt").write_text("".join(f"{i} {int(train)}\n" for i, _, train in rows))
    (root / "classes.txt").write_text("".join(f"{k + 1} {_folder(k)}\n" for k in range(len(SPECIES))))
    with ExitStack() as stack:
        todo = (job for job, _ in jobs)
        if workers == 1:
            done: Iterator[None] = map(_write, todo)
        else:
            # spawn: the caller may already hold threads (torch, DALI), which do not survive a fork.
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            done = pool.map(_write, todo, chunksize=20)
        for _ in with_progress(done, len(jobs), "drawing the synthetic dataset", progress):
            pass
