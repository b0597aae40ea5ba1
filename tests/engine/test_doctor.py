"""``python -m engine.doctor``: what it finds, what it calls broken, and that no machine makes it fall over."""

import importlib.machinery
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engine.training
from engine import doctor
from engine.training import profiling


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "convolution_tflop_s", lambda device, dtype: 0.5)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def test_this_machine_is_ready(quick, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    for word in ("torch ", "open_clip_torch", "apex", "--amp", "run.compile: auto", "JPEG decoder", "cache folder"):
        assert word in printed
    assert torch.__version__.partition("+")[0] in printed
    assert "ready to train" in printed


@pytest.mark.parametrize(("name", "lacks"), [("Windows", "not locked"), ("Darwin", "no CUDA, DALI or Triton")])
def test_another_system_is_not_promised_anything(quick, name: str, lacks: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(doctor.platform, "system", lambda: name)
    monkeypatch.delattr(doctor.os, "sysconf")
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert lacks in " ".join(printed.split()) and "does not say how much memory" in " ".join(printed.split())
    assert printed.splitlines()[-1] == f"ready to train, as far as can be told: {name} is not tested"


def test_what_a_run_cannot_import_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("engine.run", "engine.run_folder"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "engine.run_folder", None)
    assert doctor.main([]) == 1
    assert "broken: engine" in capsys.readouterr().out


def test_it_takes_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--verbose"])
    assert "python -m engine.doctor" in capsys.readouterr().err


def test_the_other_package_named_kernels(quick, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    find = doctor.importlib.util.find_spec
    origin = str(tmp_path / "site-packages" / "kernels" / "__init__.py")
    other = importlib.machinery.ModuleSpec("kernels", None, origin=origin)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: other if name == "kernels" else find(name))
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"kernels": ["hf-kernels"]})
    (finding,) = doctor.names()
    assert finding.state == "broken" and "pip uninstall hf-kernels" in finding.remedy
    assert doctor.main([]) == 1
    assert "broken: kernels" in capsys.readouterr().out


def test_the_other_package_named_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "the module apex that is installed is not NVIDIA's: it has no optimizers.FusedSGD"
    monkeypatch.setattr(engine.training, "apex_missing", lambda: said)
    (finding,) = doctor.apex()
    assert finding.state == "note" and "pip uninstall apex" in finding.remedy
    monkeypatch.setattr(engine.training, "apex_missing", lambda: None)
    assert doctor.apex()[0].state == "ok"


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    have = importlib.metadata.version("numpy")
    monkeypatch.setattr(doctor, "_PACKAGES", {"numpy": ("numpy", "everything", "pip install numpy")})
    monkeypatch.setattr(doctor, "requirements", lambda: {"numpy": "2.0"})
    monkeypatch.setattr(doctor, "tested_versions", lambda: {"numpy": have})
    assert doctor.packages() == [doctor.Finding("numpy", "ok", have)]
    monkeypatch.setattr(doctor, "tested_versions", lambda: {"numpy": "2.0.1"})
    assert doctor.packages()[0].state == "note" and "2.0.1" in doctor.packages()[0].text
    monkeypatch.setattr(doctor, "requirements", lambda: {"numpy": "99.0"})
    assert doctor.packages()[0].state == "broken" and "numpy>=99.0" in doctor.packages()[0].remedy


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"a": ("no_such_module", "teachers", "pip install a"), "b": ("no_such_module", None, "pip install b")}
    monkeypatch.setattr(doctor, "_PACKAGES", absent)
    needed, optional = doctor.packages()
    assert (needed.state, optional.state) == ("broken", "note")
    assert needed.text == "not installed (needed by teachers)" and needed.remedy == "pip install a"


def test_the_tested_set(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("# exact\ntorch==2.11.0\nnumpy==2.3.5  # why\n\n")
    assert doctor.tested_versions(path) == {"torch": "2.11.0", "numpy": "2.3.5"}
    assert doctor.tested_versions(tmp_path / "absent.txt") == {}
    assert doctor.numbers("2.11.0+cu130") == (2, 11, 0) < doctor.numbers("2.12") < doctor.numbers("10.0")


def test_a_driver_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "nvidia_smi", lambda *fields: ["NVIDIA L4", "470.10"])
    (finding,) = doctor.gpu()
    assert finding.state == "broken" and "470.10" in finding.text and finding.remedy
    monkeypatch.setattr(doctor, "nvidia_smi", lambda *fields: None)
    assert doctor.gpu()[0].state == "note"


def test_a_gpu(pretended_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "nvidia_smi", lambda *fields: ["NVIDIA H200", "580.65"])
    (finding,) = doctor.gpu()
    assert finding.state == "ok" and "NVIDIA H200, 140 GiB, sm_90" in finding.text and "driver 580.65" in finding.text
    monkeypatch.setattr(profiling, "convolution_tflop_s", lambda device, dtype: 500.0)
    monkeypatch.setattr(profiling, "copy_tb_s", lambda device: 4.3)
    fast, bottleneck = doctor.speed(torch.device("cuda"))
    assert "4.3" in fast.text and "images/s" in fast.text
    assert bottleneck.state == "note" and "data.loader=dali" in bottleneck.remedy
    auto, ready = doctor.compilers(torch.device("cuda"))
    assert "compile step" in auto.text
    assert ready.state == ("ok" if shutil.which("gcc") or shutil.which("cc") else "broken")


def test_a_gpu_without_a_compiler(pretended_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = doctor.compilers(torch.device("cuda"))[-1]
    assert finding.state == "broken" and "gcc" in finding.remedy


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("0 %", "JPEG engine takes 65 %"),
        ("[N/A]", "no JPEG engine"),
        (None, "if it has one"),
        ("Field is not a valid field", "if it has one"),
    ],
)
def test_jpeg_decoder(pretended_gpu, monkeypatch: pytest.MonkeyPatch, answer: str | None, text: str) -> None:
    monkeypatch.setattr(doctor, "nvidia_smi", lambda *fields: None if answer is None else [answer])
    assert text in doctor.jpeg(torch.device("cuda"))[0].text


def test_nvidia_smi_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    done = subprocess.CompletedProcess([], 0, stdout="NVIDIA H200, 580.65\nNVIDIA H200, 580.65\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: done)
    assert doctor.nvidia_smi("name", "driver_version") == ["NVIDIA H200", "580.65"]

    def fail(*args, **options):
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr(doctor.subprocess, "run", fail)
    assert doctor.nvidia_smi("name") is None


def test_a_cache_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.cache()[0].state == "ok"
    (tmp_path / "file").touch()
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "file" / "cache"))
    (finding,) = doctor.cache()
    assert finding.state == "broken" and "PPSSL_CACHE" in finding.remedy


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 4 * 2**30)
    assert doctor.machine()[0].state == "note"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(total=64 * 2**20))
    assert "--shm-size" in doctor.machine()[-1].remedy


def test_a_check_that_fails_is_a_finding() -> None:
    def surprise() -> list[doctor.Finding]:
        raise RuntimeError("no such register")

    assert doctor._guarded(surprise) == [doctor.Finding("surprise", "broken", "RuntimeError: no such register")]


def test_expectation() -> None:
    images_per_s, limit = doctor.expected_gpu(790.0, 4.3)
    assert limit == "memory traffic" and 3900 < images_per_s < 4100  # 75 % of a floor of 23.8 ms for 128 images
    assert doctor.expected_gpu(20.0, 4.3) == (pytest.approx(0.75 * 20e3 / doctor.IMAGE_GFLOP), "convolutions")


def test_measuring() -> None:
    rate = profiling.convolution_tflop_s(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e-4 < rate < 1e3


def test_the_device_that_is_asked_for_is_the_one_that_is_examined(quick, pretended_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    on_cpu = {finding.what: finding for finding in doctor.examine("cpu")}
    assert "compile off" in on_cpu["run.compile: auto"].text and on_cpu["device"].text == "cpu (cpu)"
    absent = doctor.examine("cuda:3")[-1]
    assert absent.state == "broken" and "cuda:0 (NVIDIA H200)" in absent.text and "speed" not in absent.what
