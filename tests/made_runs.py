"""Run folders as training leaves them, around tiny networks with random weights, and the photographs of one of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine import run_folder
from engine.config import Config, DataConfig, EncoderConfig, MethodConfig, to_yaml
from engine.evaluation import attention_maps
from engine.pretrained import weights_file
from ppssl.method import METHODS
from ppssl.settings import method_settings
from ppssl.timm_trunk import build_trunk

SIZE = 64
CLASSES = ("001.Red_Kite", "002.Blue_Tit", "003.Green_Finch")


def exported_run(path: Path, *, arch: str, method: str = "ppssl", variant: str = "published") -> Path:
    """A run folder as training leaves it, with random weights and batch statistics."""
    cfg = replace(
        Config(),
        method=MethodConfig(name=method, variant=variant),
        encoder=EncoderConfig(arch=arch, weights="none"),
        data=DataConfig(name="cub", root="/somebody/CUB_200_2011", image_size=SIZE),
    )
    torch.manual_seed(1)
    network = METHODS[method].build_network(method_settings(cfg), build_trunk(arch))
    for name, tensor in network.state_dict().items():
        if name.endswith(("bn.weight", "bn1.weight", "bn2.weight", "bn3.weight", "running_var")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bn.bias")):
            tensor.normal_(std=0.1)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(cfg))
    weights_file.save_weights(path / "weights.safetensors", network.weights(), {"step": "46", "epoch": "1"})
    run_folder.append_metrics(path, {"kind": "start", "step": 0, "commit": "0123456789ab", "torch": "2.11.0"})
    for epoch, rank1 in enumerate((0.25, 0.5)):
        run_folder.append_metrics(
            path, {"kind": "eval", "step": 46 * epoch, "epoch": epoch, "rank1": rank1, "protocol": "leave-one-out"}
        )
    return path


def draw(path: Path, color: int, number: int) -> None:
    """A photograph of that class: one strong channel on a ground of its own."""
    ground = np.random.default_rng(10 * color + number).integers(0, 200, (5, 6, 3), np.uint8)
    pixels = ground.repeat(8, axis=0).repeat(8, axis=1)
    pixels[8:30, 10:40, color] = 230
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def reported_run(path: Path, root: Path, *, maps: bool = True, **change: object) -> Path:
    """A run folder as training leaves it, around a tiny network with random weights."""
    cfg = Config(
        epochs=4,
        batch_size=4,
        method=MethodConfig(name="ppssl", variant="guided"),
        encoder=EncoderConfig(arch="resnet18_w8_s16", weights="none", dim=8),
        data=DataConfig(name="folder", root=str(root), image_size=32, workers=0),
    )
    cfg = replace(cfg, **change)
    torch.manual_seed(0)
    network = METHODS[cfg.method.name].build_network(method_settings(cfg), build_trunk(cfg.encoder.arch))
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(cfg))
    weights_file.save_weights(path / "weights.safetensors", network.weights(), {"step": "12", "epoch": "4"})
    run_folder.append_metrics(path, {"kind": "start", "step": 0, "steps_per_epoch": 3, "torch": "2.11.0"})
    for step in range(0, 13, 3):
        evaluated = {"rank1": 0.2 + step / 40, "rank5": 0.5 + step / 40, "mAP": 0.1 + step / 40}
        about = {"protocol": "retrieval: leave-one-out", "feature": "l2(gap(A * F)), 64-d", "queries": 12, "classes": 3}
        run_folder.append_metrics(path, {"kind": "eval", "step": step, "epoch": step // 3} | evaluated | about)
        terms = {"loss": 6 - step / 12, "contrast": 5 - step / 12, "contrast_top1": step / 20, "lr": 0.06 - step / 250}
        run_folder.append_metrics(
            path, {"kind": "train", "step": step + 1, "epoch": step // 3, "images_per_s": 90.0, "data_wait": 0.03} | terms
        )
    run_folder.append_metrics(
        path, {"kind": "summary", "step": 12, "steps": 12, "seconds": 3.0, "images_per_s": 90.0, "data_wait": 0.03}
    )
    if maps:
        shown = torch.randint(0, 255, (2, attention_maps.SIDE, attention_maps.SIDE, 3), dtype=torch.uint8)
        about = {"names": '["a.png", "b.png"]', "split": "test"}
        weights_file.save_weights(path / "maps/images.safetensors", {"pictures": shown}, about)
        for step in (0, 6, 12):
            values = {name: torch.rand(2, 4, 4) for name in ("mask", "cam")}
            about = {"step": str(step), "epoch": str(step // 3)}
            weights_file.save_weights(path / f"maps/step_{step:09d}.safetensors", values, about)
    return path
