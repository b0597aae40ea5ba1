"""``python -m bench.gpu.ceilings``: what this GPU can do at most, as one JSON line: copy bandwidth and 16-bit matrix products."""

from __future__ import annotations

import json
import sys

import torch

from bench.timing import CUDA, facts

COPIED = 1 << 30
"""Bytes of the tensor that is copied; far more than any cache holds."""
SIDE = 8192
"""Of the square matrices."""


def ceilings() -> dict[str, float]:
    """``gb_s``: bytes read and written, 1e9 a second; ``tflop_s``: a multiplication and an addition are two. Medians of many calls
    with a cold L2."""
    import triton.testing

    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy_ms = triton.testing.do_bench(lambda: target.copy_(source), quantiles=[0.5])
    product_ms = triton.testing.do_bench(lambda: a @ b, quantiles=[0.5])
    return {"gb_s": 2 * COPIED / copy_ms / 1e6, "tflop_s": 2 * SIDE**3 / product_ms / 1e9}


def main() -> int:
    """Returns the exit code: 2 without a GPU."""
    if not CUDA:
        print("needs a CUDA GPU", file=sys.stderr)
        return 2
    print(json.dumps({"name": "ceilings", "extra_info": facts() | ceilings()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
