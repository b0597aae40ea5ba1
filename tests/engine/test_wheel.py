"""What is installed: exactly engine, kernels and ppssl with all their data files, and the demo runs from anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("engine", "kernels", "ppssl")


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Output of a command without this process's import path; the failing command's own words on an error."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def source_files(root: Path) -> set[str]:
    return {
        path.relative_to(root).as_posix()
        for package in PACKAGES
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".md", ".svg")  # for readers of the source
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy (a build leaves files beside its sources), without a network."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "tests", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip, "--wheel-dir", out, source, cwd=source)
    (built,) = out.glob("ppssl_engine-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of a bare environment with the wheel installed. Dependencies are looked up where this interpreter has
    them; a clone that is installed there as editable stays out, since its path file is read in its own folder only."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    interpreter = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, wheel, cwd=folder)
    site = Path(run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
    assert names == source_files(ROOT)


def test_recipes_prompts_and_demo_weights_are_package_data(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"engine/config/recipes/demo.yaml", "ppssl/prompts/birds.yaml", "kernels/configs.json"} <= set(names)
    assert {"engine/synthetic/teacher.safetensors", "engine/synthetic/teacher.json", "engine/report/page.html"} <= set(names)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)


def test_apex_of_pypi_is_never_required(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))).decode()
    required = [line.split(":", 1)[1].strip() for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert any(line.startswith("torch>=") for line in required)
    assert not any(line.lower().startswith(("apex", "nvidia-apex")) for line in required)


def test_the_demo_dry_runs_from_an_empty_folder_and_writes_nothing(python: Path, tmp_path: Path):
    for name in ("empty", "cache", "scratch"):
        (tmp_path / name).mkdir()
    places = "import engine, kernels, ppssl; print(*[m.__file__ for m in (engine, kernels, ppssl)], sep='\\n')"
    for place in run(python, "-c", places, cwd=tmp_path / "empty").split():
        assert Path(place).is_relative_to(python.parents[2])

    said = run(
        *(python, "-m", "engine.train", "--cfg", "demo.yaml", "--dry-run"),
        cwd=tmp_path / "empty",
        PPSSL_CACHE=str(tmp_path / "cache"),
        TMPDIR=str(tmp_path / "scratch"),
        HF_HUB_OFFLINE="1",
    )
    assert "nothing was written" in said
    assert list((tmp_path / "empty").iterdir()) == []
    assert list((tmp_path / "cache").iterdir()) == []
    assert not list((tmp_path / "scratch").rglob("*.jpg"))


def test_an_epoch_and_its_report_from_an_empty_folder(python: Path, tmp_path: Path):
    """Of a miniature of the demo's images, where the demo looks for its own."""
    draw = "from engine.synthetic import dataset; dataset.generate('data/birds', train_per_species=2, test_per_species=2)"
    run(python, "-c", draw, cwd=tmp_path)
    said = run(
        *(python, "-m", "engine.train", "--cfg", "demo.yaml", "epochs=1", "eval.every=0", "run.log_every=100"),
        cwd=tmp_path,
        PPSSL_CACHE=str(tmp_path / "cache"),
        HF_HUB_OFFLINE="1",
    )
    assert "report: runs/demo/report.html" in said
    assert {"config.yaml", "weights.safetensors", "report.html"} <= {path.name for path in (tmp_path / "runs" / "demo").iterdir()}
