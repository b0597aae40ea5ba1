"""What --amp becomes on each machine."""

import pytest
import torch

from engine.training import precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_without_amp_everything_is_float32() -> None:
    chosen = precision.resolve(None, CPU)
    assert chosen.dtype is None and not chosen.scales and not torch.is_autocast_enabled("cpu")
    with chosen.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_bf16_on_a_cpu_only_where_it_is_native(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: native)
    chosen = precision.resolve("bf16", CPU)
    assert chosen.dtype == (torch.bfloat16 if native else None)
    assert ("no native bf16" in chosen.note) != native
    with chosen.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if native else torch.float32)
    assert "fp16 needs a GPU" in precision.resolve("fp16", CPU).note or not native


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_without_bf16_gets_fp16_with_scaling(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    chosen = precision.resolve("bf16", CUDA)
    assert (chosen.dtype, chosen.scales) == ((torch.bfloat16, False) if has_bf16 else (torch.float16, True))
    assert precision.resolve("fp16", CUDA).scales


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="amp: 'fp8'"):
        precision.resolve("fp8", CPU)
