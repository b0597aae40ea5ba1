"""Batch-norm over parts of a batch, and how images change places between the parts. Over processes: test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ppssl.batch_norm import GroupedBatchNorm, convert, shuffle, unshuffle


def test_grouped_batch_norm_equals_one_batch_norm_per_part() -> None:
    torch.manual_seed(0)
    x, parts = torch.randn(6, 4, 3, 3), []
    grouped = convert(nn.Sequential(nn.BatchNorm2d(4)), GroupedBatchNorm, groups=3)[0]
    assert isinstance(grouped, GroupedBatchNorm)
    means = []
    for part in x.chunk(3):
        alone = nn.BatchNorm2d(4)
        parts.append(alone(part))
        means.append((alone.running_mean, alone.running_var))
    assert torch.allclose(grouped(x), torch.cat(parts), atol=1e-6)
    for own, theirs in zip((grouped.running_mean, grouped.running_var), zip(*means, strict=True), strict=True):
        assert torch.allclose(own, torch.stack(theirs).mean(0), atol=1e-6)
    with pytest.raises(ValueError, match=r"bn\.groups"):
        grouped(x[:5])
    assert torch.allclose(
        grouped.eval()(x), nn.functional.batch_norm(x, *means_of(grouped), grouped.weight, grouped.bias), atol=1e-6
    )


def means_of(bn: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    return bn.running_mean, bn.running_var


@pytest.mark.parametrize(("batch", "groups"), [(6, 2), (8, 4), (6, 6), (12, 3)])
def test_shuffle_deals_the_images_out_and_unshuffle_brings_them_back(batch: int, groups: int) -> None:
    images = torch.arange(batch * 3 * 4.0).view(batch, 3, 2, 2).to(memory_format=torch.channels_last)
    dealt = shuffle(images, groups, "")
    assert dealt.is_contiguous(memory_format=torch.channels_last)
    for part, got in enumerate(dealt.chunk(groups)):
        assert torch.equal(got, images[part::groups])
    assert torch.equal(unshuffle(dealt.flatten(1), groups, ""), images.flatten(1))
