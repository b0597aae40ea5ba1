"""Guidance: the KL between CAM and mask at two temperatures, and the KL between what two networks find alike."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ppssl.guidance import relational_kl, spatial_kl
from ppssl.settings import variant


@pytest.mark.parametrize("name", ["published", "guided"])
def test_the_cam_has_a_temperature_of_its_own(name: str) -> None:
    iadm = replace(variant("ppssl", name).iadm, temperature=0.4)
    cam, mask = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert iadm.cam_temperature is None
    assert torch.equal(spatial_kl(cam, mask, iadm), spatial_kl(cam, mask, replace(iadm, cam_temperature=0.4)))
    cells = name == "guided"
    total = torch.zeros(())
    for c, m in zip(cam, mask, strict=True):
        for c_row, m_row in zip([c.flatten()] if cells else c, [m.flatten()] if cells else m, strict=True):
            p, p_mask = (c_row / 0.2).softmax(0), (m_row / 0.4).softmax(0)
            total = total + (p * (p / p_mask).log()).sum()
    found = spatial_kl(cam, mask, replace(iadm, cam_temperature=0.2))
    torch.testing.assert_close(found, total / 3 if cells else total, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_relations_are_compared_row_by_row_without_the_image_itself(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(6, 9, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        rows = [j for j in range(6) if j != i]
        z_s, z_t = (
            torch.stack([F.cosine_similarity(x[i], x[j], dim=0) for j in rows]) / temperature for x in (student, teacher.detach())
        )
        expected = expected + (z_t.softmax(0) * (z_t.log_softmax(0) - z_s.log_softmax(0))).sum() / 6
    found = relational_kl(student, teacher, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    (mine,), (theirs,) = (torch.autograd.grad(loss, student, retain_graph=True) for loss in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    assert torch.autograd.grad(found, teacher, allow_unused=True) == (None,)
    assert float(relational_kl(teacher.detach() @ torch.eye(4, 7).double(), teacher, temperature)) == pytest.approx(0, abs=1e-12)


def test_relations_need_somebody_to_be_compared_with() -> None:
    with pytest.raises(ValueError, match=r"ais\.target: relations need at least 3 images in a batch, got 2"):
        relational_kl(torch.ones(2, 3), torch.ones(2, 3), 1.0)
