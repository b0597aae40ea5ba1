"""The registry finds every op by its files, and every op has the same five."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from kernels import reference, registry

ROOT = Path(__file__).resolve().parents[2]


def test_no_op_is_overlooked() -> None:
    assert {"augment", "gradcam", "infonce", "maxout", "maxout_image"} <= set(registry.ops())  # a new one need not be added here


@pytest.mark.parametrize("op", registry.ops())
def test_an_op_has_its_five_files(op: str) -> None:
    assert callable(getattr(reference, op))
    for path in (f"kernels/{op}.py", f"kernels/{op}_triton.py", f"tests/kernels/test_{op}.py", f"bench/bench_{op}.py"):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("module", registry.triton_modules(), ids=lambda module: module.__name__)
def test_an_op_declares_variants_of_its_own_and_exceptions_that_match_some(module) -> None:
    names = [variant.name for variant in module.variants("sm_90")]
    op = module.__name__.removeprefix("kernels.").removesuffix("_triton")
    assert names and all(name.split()[0] == op for name in names)
    for pattern, _, _ in getattr(module, "EXCEPTIONS", {}):
        assert any(fnmatch(name, pattern) for name in names), pattern


SCRIPT = """
import json
from kernels import aot, registry
print(json.dumps([registry.ops(), [v.name for v in aot.variants("sm_90")][:1], aot.exceptions()[("aaa *", "*", "loads")]]))
"""


def test_a_new_op_is_found_by_its_file(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kernels" / "aaa_triton.py").write_text(
        "from kernels.configs import Variant\n"
        "EXCEPTIONS = {('aaa *', '*', 'loads'): 'why'}\n"
        "def variants(arch):\n"
        "    return [Variant('aaa one', None, {}, {}, (), 4, 1, 'small')]\n"
    )
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    ops, first, why = json.loads(done.stdout)
    assert (ops[0], first, why) == ("aaa", ["aaa one"], "why")
