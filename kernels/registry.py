"""The registry of fused ops: every ``<op>_triton.py`` in this folder is one, so a new op is registered by its file.

Each of these modules defines ``variants(arch)``, the compiled variants of its kernels that are shipped. It may define
``EXCEPTIONS``: (variant pattern, architecture pattern, check) -> why the ahead-of-time check lets it through.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from kernels.configs import Variant


def ops() -> tuple[str, ...]:
    """The names of the fused ops."""
    return tuple(sorted(path.stem.removesuffix("_triton") for path in Path(__file__).parent.glob("*_triton.py")))


def triton_modules() -> list[ModuleType]:
    """The modules of the ops' Triton kernels. Raises ``ImportError`` where triton is not installed."""
    return [importlib.import_module(f"kernels.{op}_triton") for op in ops()]


def variants(arch: str) -> list[Variant]:
    """Every variant that is shipped for the architecture ``arch``, such as ``sm_90``, of all ops."""
    return [variant for module in triton_modules() for variant in module.variants(arch)]


def exceptions() -> dict[tuple[str, str, str], str]:
    """The ``EXCEPTIONS`` of all ops."""
    return {key: why for module in triton_modules() for key, why in getattr(module, "EXCEPTIONS", {}).items()}


def table_module(key: str) -> ModuleType:
    """The module of the kernel that ``configs.json`` lists under ``key``, such as ``"maxout project"``: the first word is the op.

    For ``bench/gpu/sweep.py`` it defines ``candidates(key, committed)``, the ``Config`` to try besides the committed one, and
    ``workload(key, operand, width, batch, device)``, a ``Workload`` in the regime of one entry. Raises ``ImportError`` where
    triton is not installed.
    """
    return importlib.import_module(f"kernels.{key.split()[0]}_triton")
