"""``python -m engine.synthetic.train_teacher --out FOLDER``: makes the image-text teacher of the synthetic dataset.

It is a small open_clip model trained on drawn images with captions. A caption names the category and the surroundings (place,
light, occluder) and nothing else; a scene with a bird is drawn twice, as two species, and a difference between their embeddings
costs, so that what the teacher says about a bird hardly depends on its species. Its images share no seed with
the synthetic dataset.
"""

from __future__ import annotations

import argparse
import hashlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from engine.synthetic.dataset import SPECIES, draw, nuisance_of
from engine.synthetic.scenes import CATEGORIES, Nuisance, draw_category, random_nuisance
from engine.synthetic.teacher import CONFIG, WEIGHTS
from ppssl.teacher import load_descriptions

STREAM = 0x7EAC4E5
"""First number of every seed of a teacher image; the synthetic dataset's seeds have four numbers, these have three."""

NOUNS: dict[str, tuple[str, ...]] = {
    "bird": ("a bird", "a feathered bird", "a wild bird", "a winged animal with feathers"),
    "dog": ("a dog", "a pet dog", "a furry dog", "a four-legged pet with fur"),
    "bus": ("a bus", "a city bus", "a large passenger bus", "a large vehicle with many seats"),
    "snake": ("a snake", "a scaly snake", "a legless reptile", "a long reptile without legs"),
    "crocodile": ("a crocodile", "a large crocodile", "a reptile with robust jaws", "a large-jawed water reptile"),
    "car": ("a car", "a road car", "a four-wheeled motor vehicle", "an automobile"),
    "flower": ("a flower", "a blooming flower", "a plant with petals", "a petalled plant"),
    "human": ("a person", "a human being", "an upright walking primate", "someone walking"),
}
PLACE_WORDS = {"forest": "in a forest", "meadow": "in a meadow", "shore": "by a shore", "field": "in a field"}
LIGHT_WORDS = {"dim": "in dim light", "overcast": "under an overcast sky", "soft": "in soft light", "bright": "in bright light"}
OCCLUDER_WORDS = {"none": "", "twigs": " behind twigs", "leaves": " behind leaves"}


def captions(category: str, nuisance: Nuisance, descriptions: dict[str, str]) -> list[str]:
    """Every caption an image may carry: category and surroundings, never what tells one bird from another."""
    where = f"{PLACE_WORDS[nuisance.place]} {LIGHT_WORDS[nuisance.light]}{OCCLUDER_WORDS[nuisance.occluder]}"
    named = [f"a picture of {noun} {where}" for noun in NOUNS[category]]
    return [*named, descriptions[category], f"{descriptions[category]}, {where}"]


class Sample(NamedTuple):
    """One scene: for a bird drawn as two species, otherwise the same image twice."""

    category: int
    nuisance: Nuisance
    images: np.ndarray
    """uint8 [2, side, side, 3]"""


def sample(index: int, seed: int, side: int) -> Sample:
    """Scene ``index`` of a stream of teacher images; three in ten are birds."""
    entropy = (STREAM, seed, index)
    rng = np.random.default_rng([*entropy, 9])
    category = 0 if rng.random() < 0.3 else int(rng.integers(1, len(CATEGORIES)))
    if category == 0:
        nuisance = nuisance_of(entropy)
        pair = [draw(int(k), entropy) for k in rng.choice(len(SPECIES), 2, replace=False)]
    else:
        nuisance = random_nuisance(rng)
        pair = [draw_category(CATEGORIES[category], rng, nuisance)] * 2
    small = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in pair]
    return Sample(category, nuisance, np.stack(small))


def draw_samples(count: int, seed: int, side: int, workers: int) -> list[Sample]:
    """Scenes 0 .. count - 1 of stream ``seed``, drawn by ``workers`` processes with a progress bar."""
    indices = range(count)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        drawn = pool.map(sample, indices, [seed] * count, [side] * count, chunksize=50)
        return list(track(drawn, "drawing captioned images", total=count))


def _views(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [B, 3, S, S] -> float in [0, 1]: random crops, mirrors, gray and exposure, as a student's views will be."""
    count, side = images.shape[0], images.shape[-1]
    rand = torch.rand(7, count, generator=generator)
    scale = torch.sqrt(0.35 + 0.65 * rand[0])
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = scale * torch.where(rand[1] < 0.5, 1.0, -1.0)
    theta[:, 1, 1] = scale
    theta[:, 0, 2] = (2 * rand[2] - 1) * (1 - scale)
    theta[:, 1, 2] = (2 * rand[3] - 1) * (1 - scale)
    grid = F.affine_grid(theta, [count, 3, side, side], align_corners=False)
    x = F.grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False)
    gray = x.mean(1, keepdim=True)
    x = torch.lerp(gray, x, torch.where(rand[4] < 0.2, 0.0, 0.6 + 0.8 * rand[5]).view(-1, 1, 1, 1))
    return (x * (0.7 + 0.6 * rand[6]).view(-1, 1, 1, 1)).clamp(0, 1)


def _normalize(x: Tensor) -> Tensor:
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
    return (x - mean) / std


def train(count: int, epochs: int, seed: int, workers: int, twin_weight: float = 20.0) -> torch.nn.Module:
    """A freshly trained model: open_clip's contrastive loss, plus the squared distance of a scene's two birds."""
    torch.manual_seed(seed)
    open_clip.add_model_config(CONFIG)
    model = open_clip.create_model(CONFIG.stem)
    tokenizer = open_clip.get_tokenizer(CONFIG.stem)
    side = open_clip.get_model_config(CONFIG.stem)["vision_cfg"]["image_size"]
    samples = draw_samples(count, seed, side, workers)
    images = torch.from_numpy(np.stack([s.images for s in samples])).permute(0, 1, 4, 2, 3).contiguous()
    sentences = dict(zip(CATEGORIES, load_descriptions("birds", len(CATEGORIES)), strict=True))
    texts = torch.stack([tokenizer(captions(CATEGORIES[s.category], s.nuisance, sentences)) for s in samples])
    generator = torch.Generator().manual_seed(seed)
    batch_size = 128
    steps = epochs * (count // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    contrast = open_clip.ClipLoss()
    order: list[int] = []
    for _ in track(range(steps), "training the teacher"):
        if len(order) < batch_size:
            order = torch.randperm(count, generator=generator).tolist()
        batch, order = torch.tensor(order[:batch_size]), order[batch_size:]
        which = torch.randint(texts.shape[1], (batch_size,), generator=generator)
        # Both birds of a scene get the same crop and colors: whatever then differs is their species.
        state = generator.get_state()
        first = _views(images[batch, 0], generator)
        generator.set_state(state)
        second = _views(images[batch, 1], generator)
        embedded, text, scale = model(_normalize(torch.cat([first, second])), texts[batch, which])
        one, two = embedded[:batch_size], embedded[batch_size:]
        twin = (one - two).square().sum(1).mean()
        loss = (contrast(one, text, scale) + contrast(two, text, scale)) / 2 + twin_weight * twin
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's image-text teacher on freshly drawn, captioned images.")
    parser.add_argument("--out", type=Path, required=True, help="folder for teacher.safetensors")
    parser.add_argument("--images", type=int, default=5000, help="captioned scenes (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    model = train(args.images, args.epochs, args.seed, args.workers)
    state = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / WEIGHTS.name
    save_file(state, path)
    path.chmod(0o644)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
