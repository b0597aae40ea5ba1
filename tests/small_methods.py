"""Small methods, their step and a batch, for tests of the step."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.config import Config, DataConfig, EncoderConfig, MethodConfig, QueueConfig
from engine.training import optim, precision
from engine.training.step import Step
from ppssl import METHODS, PPSSL, Batch, MoCo
from ppssl.encoder import RESNETS, FeatureNet, MaskBranch, Trunk, projection_head
from ppssl.method import Method
from ppssl.settings import method_settings, variant

DIM, QUEUE = 16, 64
RESNETS["resnet10"] = (RESNETS["resnet18"][0], (1, 1, 1, 1))  # a block a stage: every kind of layer, traced in half the time


def build_ppssl(arch: str, name: str, values: dict | None = None, **options) -> PPSSL:
    """PP-SSL in the variant ``name``, with the ``values`` of some dotted keys."""
    torch.manual_seed(0)
    trunk, settings = Trunk(arch), variant("ppssl", name, values)
    network = FeatureNet(trunk, MaskBranch(trunk.channels, 32, minmax=settings.method.minmax))
    options = {"embed": lambda x: F.normalize(x.detach().float().mean((2, 3)) @ torch.ones(3, 5, device=x.device), dim=1)} | options
    head = projection_head("mlp2", trunk.channels, DIM)
    return PPSSL(network, head, torch.randn(8, 5), settings=settings, dim=DIM, queue_size=QUEUE, **options)


def build_moco(arch: str) -> MoCo:
    torch.manual_seed(0)
    trunk = Trunk(arch)
    return MoCo(FeatureNet(trunk), projection_head("mlp2", trunk.channels, DIM), dim=DIM, queue_size=QUEUE)


def build_by_name(name: str, trunk: torch.nn.Module, side: int = 64) -> Method:
    """A method that needs no teacher, as a config builds it."""
    cfg = Config(
        method=MethodConfig(name=name),
        encoder=EncoderConfig(dim=DIM),
        queue=QueueConfig(size=QUEUE, dtype="float32", exclude_same_image=True),
        data=DataConfig(image_size=side),
    )
    kind = METHODS[name]
    settings = method_settings(cfg, side)
    return kind.from_settings(settings, kind.build_network(settings, trunk))


def step_of(method: Method, **options) -> Step:
    optimizer = optim.sgd(method.train().trained_parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    amp = options.pop("amp", None)
    return Step(
        method, optimizer, lr=lambda s: 0.1 / (s + 1), decay=0.99,
        precision=precision.resolve(amp, torch.device("cpu")), total_steps=10, **options,
    )  # fmt: skip


def batch(size: int = 4, side: int = 64, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, size, 3, side, side, generator=generator)
    teacher = F.normalize(torch.randn(size, 5, generator=generator), dim=1)
    return Batch(x[0], x[1], torch.arange(size), x[2], teacher)
