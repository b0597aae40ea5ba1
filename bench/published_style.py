"""The published step as it is structured: what the engine's speed is measured against.

``1 + K`` logits are materialized from a copy of the queue, the key network moves parameter by parameter, the teacher
sees the view in every step, the image branch makes its whole [B, 32, H, W] map, ``total.backward()`` differentiates by
everything that is kept (the image a second time), the optimizer is torch's default, the losses are read every step.
tests/bench/test_published_style.py proves that it computes the same losses as PPSSL in variant ``published``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppssl import PPSSL


class PublishedStyle(nn.Module):
    """One PP-SSL network in the published structure, with copies of ``method``'s weights, queue and constants."""

    def __init__(self, method: PPSSL, decay: float = 0.999):
        super().__init__()
        method = copy.deepcopy(method)
        self.trunk_q, self.head_q = method.encoder_q.trunk, method.encoder_q.head
        self.trunk_k, self.head_k = method.encoder_k.trunk, method.encoder_k.head
        self.feature_conv, self.bn = method.mask.conv, method.mask.bn
        self.image_conv, self.to_text = method.image_mask.conv, method.to_text
        self.embed, self.logit_scale = method.embed, method.teacher_logit_scale
        self.register_buffer("text", method.text_features)
        self.register_buffer("queue", method.queue.rows.float().T.contiguous())  # [D, K]
        self.register_buffer("pointer", method.queue.pointer.clone())
        self.decay, self.temperature = decay, method.temperature
        self.alpha, self.beta = method.settings.ais.weight, method.settings.iadm.weight

    @torch.no_grad()
    def move_key_network(self) -> None:
        for online, target in ((self.trunk_q, self.trunk_k), (self.head_q, self.head_k)):
            for q, k in zip(online.parameters(), target.parameters(), strict=True):
                k.data = k.data * self.decay + q.data * (1.0 - self.decay)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        pointer = int(self.pointer)
        self.queue[:, pointer : pointer + len(keys)] = keys.T  # the published queue is a multiple of the batch
        self.pointer[...] = (pointer + len(keys)) % self.queue.shape[1]

    def attention(self, projected: Tensor) -> Tensor:
        """[B, 32, h, w] -> [B, 1, h, w]: the maximum over channels, scaled to [0, 1] over the whole batch."""
        z = F.relu(self.bn(projected)).max(dim=1, keepdim=True)[0]
        z = z - z.min()
        return z / (1e-7 + z.max())

    def forward(self, x_q: Tensor, x_k: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Losses by name (``total`` among them) and the logits [B, 1 + K]; ``x_q`` is a leaf that requires grad."""
        feature = self.trunk_q(x_q)
        q = F.normalize(self.head_q(F.adaptive_avg_pool2d(feature, 1).flatten(1)), dim=1)
        with torch.no_grad():
            self.move_key_network()
            k = F.normalize(self.head_k(F.adaptive_avg_pool2d(self.trunk_k(x_k), 1).flatten(1)), dim=1)
        positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([positive, negative], dim=1) / self.temperature
        contrast = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

        masked = self.attention(self.feature_conv(feature)) * feature
        student = F.normalize(F.adaptive_avg_pool2d(masked, 1).flatten(1), dim=1)
        student = 100.0 * F.normalize(self.to_text(student), dim=1) @ self.text.T
        with torch.no_grad():
            teacher = self.logit_scale * F.normalize(self.embed(x_q), dim=1) @ self.text.T
        ais = F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="sum") / student.numel()

        (gradient,) = torch.autograd.grad(contrast, x_q, retain_graph=True)
        cell = x_q.shape[-1] // feature.shape[-1]
        cam = F.max_pool2d(F.relu((x_q * gradient).sum(dim=1, keepdim=True)), cell).detach()
        image_mask = F.max_pool2d(self.attention(self.image_conv(x_q)), cell)
        iadm = F.kl_div(F.log_softmax(image_mask, dim=-1), F.softmax(cam, dim=-1), reduction="sum")

        self.enqueue(k)
        total = contrast + self.beta * iadm + self.alpha * ais
        return {"contrast": contrast, "iadm": iadm, "ais": ais, "total": total}, logits


def train_step(
    model: PublishedStyle,
    optimizer: torch.optim.Optimizer,
    x_q: Tensor,
    x_k: Tensor,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, float]:
    """Trains on one batch; returns losses and contrastive accuracies, read from the device as published meters do."""
    x_q = x_q.detach().requires_grad_()
    with autocast():
        losses, logits = model(x_q, x_k)
    with torch.no_grad():
        hits = logits.topk(5, dim=1)[1] == 0
    read = {name: loss.item() for name, loss in losses.items()}
    for top in (1, 5):
        read[f"contrast_top{top}"] = hits[:, :top].any(1).float().mean().item()
    optimizer.zero_grad()
    losses["total"].backward()
    optimizer.step()
    return read


def default_sgd(model: PublishedStyle, lr: float = 0.03) -> torch.optim.Optimizer:
    """torch's default SGD over the trained parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr, momentum=0.9, weight_decay=1e-4)
