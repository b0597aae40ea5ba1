"""``import kernels`` stands alone: torch and the standard library, and no triton until a kernel runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

FOLDER = Path(kernels.__file__).parent

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import kernels
q = torch.nn.functional.normalize(torch.randn(4, 8), dim=1).requires_grad_()
loss = kernels.queue_infonce(q, q.detach(), torch.randn(9, 8), temperature=0.2)
loss.backward()
try:
    kernels.queue_infonce(q, q, q, temperature=0.2, impl="triton")
except ImportError as error:
    print(error)
"""
LAZY = "import sys, torch, kernels; print('kernels.infonce_triton' in sys.modules)"


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=FOLDER.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_works_without_triton_and_says_so_when_asked_for_it():
    assert "needs the triton package" in run(WITHOUT_TRITON)


def test_kernels_are_imported_when_first_used():
    assert run(LAZY) == "False"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_imports_point_downwards(path):
    allowed = {"torch", "triton", "kernels"} | set(sys.stdlib_module_names)
    tree = ast.parse(path.read_text())
    is_kernel_file = path.stem.endswith("_triton") or path.stem == "aot"
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        assert {name.split(".")[0] for name in names} <= allowed
        if node in tree.body and not is_kernel_file:
            assert not any(name.split(".")[0] == "triton" for name in names)


def test_public_names():
    names = {"augment", "batch_norm", "enqueue", "gradcam", "maxout", "maxout_image", "queue_infonce", "recolour", "reference"}
    assert set(kernels.__all__) == names
    assert all(getattr(kernels, name).__doc__ for name in kernels.__all__)
