"""The shipped teacher: right files, good at categories, silent about species."""

import hashlib
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from engine.synthetic import dataset, train_teacher
from engine.synthetic import teacher as files_of_teacher
from engine.synthetic.drawing import ACCENTS, HUES, PARTS
from engine.synthetic.scenes import CATEGORIES, LIGHTS, OCCLUDERS, PLACES, Nuisance, draw_category, random_nuisance
from ppssl.teacher import Teacher, load_descriptions

FRESH = 20_260  # a seed of neither the synthetic dataset nor the teacher's training images
PER_SPECIES = 40


def draw_bird(species: int, index: int) -> np.ndarray:
    return np.asarray(dataset.draw(species, (FRESH, species, index)))


def draw_member(category: int, index: int) -> np.ndarray:
    if category == 0:
        return draw_bird(index % len(dataset.SPECIES), 1000 + index)
    rng = np.random.default_rng((FRESH, category, index))
    return np.asarray(draw_category(CATEGORIES[category], rng, random_nuisance(rng)))


def draw_all(function, rows: list[tuple[int, int]]) -> torch.Tensor:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return torch.from_numpy(np.stack(list(pool.map(function, *zip(*rows, strict=True), chunksize=20))))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    config, weights = files_of_teacher.teacher_files()
    return Teacher.from_open_clip(str(config), str(weights), load_descriptions("birds", 8))


def logits(teacher: Teacher, images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> the teacher's logits [N, 8] under its own normalization."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (teacher.mean, teacher.std))
    found = []
    for part in images.split(256):
        x = (part.permute(0, 3, 1, 2).float() / 255 - mean) / std
        found.append(teacher.logit_scale * teacher.embed(x) @ teacher.text_features.T)
    return torch.cat(found)


def test_the_files_are_small_and_are_the_tested_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights = files_of_teacher.teacher_files()
    assert config.stem == weights.stem and weights.stat().st_size <= 8 * 2**20
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == files_of_teacher.BIRDS_TEACHER_SHA256
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"something else")
    monkeypatch.setattr(files_of_teacher, "WEIGHTS", other)
    with pytest.raises(ValueError, match="sha256"):
        files_of_teacher.teacher_files()
    other.unlink()
    with pytest.raises(FileNotFoundError, match="reinstall"):
        files_of_teacher.teacher_files()


def test_captions_name_category_and_surroundings_only() -> None:
    descriptions = dict(zip(CATEGORIES, load_descriptions("birds", 8), strict=True))
    told = [
        caption
        for place in PLACES
        for light in LIGHTS
        for occluder in OCCLUDERS
        for caption in train_teacher.captions("bird", Nuisance(place, light, occluder), descriptions)
    ]
    words = set(re.findall(r"[a-z]+", " ".join(told).lower()))
    names = {part for species in dataset.SPECIES for part in species.lower().split("_")}
    secrets = {*names, *(genus.lower() for genus in dataset.GENERA), *PARTS, *ACCENTS, *HUES}
    secrets |= {"beak", "wing", "tail", "head", "breast", "stripe", "stripes", "striped", "spotted", "barred", "bar", "eye"}
    assert not words & secrets
    assert len(set(told)) > 100 and all("bird" in t or "feather" in t for t in told)


def test_teacher_images_come_from_other_seeds() -> None:
    demo = {job.seed for job, _ in dataset._jobs(Path("."), 0, (2, 2))}
    assert {len(seed) for seed in demo} == {4}  # STREAM, seed, index: three numbers, another stream of the generator
    first = train_teacher.sample(0, 1, 64)
    assert first.images.shape == (2, 64, 64, 3) and np.array_equal(first.images, train_teacher.sample(0, 1, 64).images)
    assert not np.array_equal(first.images, train_teacher.sample(0, 2, 64).images)


def test_categories_are_told_apart(teacher: Teacher) -> None:
    rows = [(category, i) for category in range(8) for i in range(25)]
    guess = logits(teacher, draw_all(draw_member, rows)).argmax(1)
    right = guess == torch.tensor([category for category, _ in rows])
    assert right.float().mean() >= 0.90
    assert right[:25].float().mean() >= 0.90  # birds


def test_its_logits_do_not_tell_the_species_of_a_genus(teacher: Teacher) -> None:
    rows = [(species, i) for species in range(len(dataset.SPECIES)) for i in range(PER_SPECIES)]
    values = logits(teacher, draw_all(draw_bird, rows)).numpy().reshape(10, 4, PER_SPECIES, 8)
    half = PER_SPECIES // 2
    right = []
    for genus in values:
        for fit, judge in ((slice(None, half), slice(half, None)), (slice(half, None), slice(None, half))):
            labels = np.repeat(np.arange(4), half)
            scale = StandardScaler().fit(genus[:, fit].reshape(-1, 8))
            probe = LogisticRegression(max_iter=1000).fit(scale.transform(genus[:, fit].reshape(-1, 8)), labels)
            right.append(probe.score(scale.transform(genus[:, judge].reshape(-1, 8)), labels))
    assert abs(np.mean(right) - 0.25) <= 0.03, np.mean(right)
