"""View values as tensors: one buffer, one copy, the same values."""

from __future__ import annotations

import torch

from engine.data.loaders.execute import in_one_copy


def test_one_copy_brings_every_tensor_over_as_it_is() -> None:
    given = [
        torch.tensor([True, False, True]),
        torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        torch.arange(6, dtype=torch.int32).view(3, 2).T,
        torch.zeros(0, 5),
        torch.tensor([7], dtype=torch.int64),
    ]
    found = in_one_copy(given, torch.device("cpu"), pin=False)
    for ours, theirs in zip(found, given, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    starts = [tensor.data_ptr() for tensor in found if tensor.numel()]
    assert all(start % 16 == starts[0] % 16 for start in starts)
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1
