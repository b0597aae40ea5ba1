"""Names and values that were, so that old run folders still load and old recipes are told what to write.

A run folder written before its nulls were resolved says ``method.form``; what a null meant then stands here, whatever the variants
say today.
"""

from __future__ import annotations

from typing import Any

from engine.errors import ConfigError

KEYS = {"method.form": "method.variant", "queue.mask_own": "queue.exclude_same_image"}
VALUES = {("iadm.image", "orig"): "clean", ("iadm.image_bn", "own"): "separate"}

ABSENT = {"bn.impl": "torch", "eval.validation": 0.0}
"""Keys that older runs do not name, with what they computed."""

_PUBLISHED = {
    "method.minmax": "batch", "iadm.weight": 0.01, "iadm.sign": "plus", "iadm.temperature": 1.0, "iadm.softmax": "rows",
    "iadm.cam_scale": "none", "iadm.cam_loss": "mean", "iadm.reduction": "sum",
}  # fmt: skip
_GUIDED = {
    "method.minmax": "image", "iadm.weight": 1.28, "iadm.sign": "minus", "iadm.temperature": 0.4, "iadm.softmax": "cells",
    "iadm.cam_scale": "max", "iadm.cam_loss": "sum", "iadm.reduction": "mean",
}  # fmt: skip
NULLS: dict[tuple[str, str], dict[str, Any]] = {
    ("ppssl", "published"): _PUBLISHED
    | {
        "method.contrast_mask": False, "method.mask_reach": "trunk", "iadm.pool": "max", "iadm.mask": "image",
        "iadm.image_bn": "shared", "teacher.view": "query",
    },
    ("ppssl", "guided"): _GUIDED
    | {
        "method.contrast_mask": True, "method.mask_reach": "trunk", "iadm.pool": "mean", "iadm.mask": "feature",
        "iadm.image_bn": "separate", "teacher.view": "clean",
    },
    ("lcr", "published"): _PUBLISHED | {"lcr.detach": False, "lcr.updates": "three"},
    ("lcr", "guided"): _GUIDED | {"lcr.detach": True, "lcr.updates": "one"},
}  # fmt: skip
"""What a null meant at commit 637275a, by method and form."""


def new_name(key: str, value: Any) -> str | None:
    """What is written today for a key or value that has another name now; None for all others."""
    if key in KEYS:
        return f"the key is called {KEYS[key]} now"
    if isinstance(value, str) and (key, value) in VALUES:
        return f"the value is called {VALUES[key, value]} now"
    return None


def translate(values: dict[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of a run in today's names; an old run's nulls with the values that they had.

    Raises ``ConfigError`` for a key that is given by both of its names.
    """
    for former, key in KEYS.items():
        if former in values and key in values:
            raise ConfigError(f"key {key} is given twice, once by its former name {former}; keep one")
    values = ABSENT | values
    old = "method.form" in values
    values = {
        KEYS.get(key, key): VALUES.get((key, value), value) if isinstance(value, str) else value for key, value in values.items()
    }
    if old:
        run = (values.get("method.name", "ppssl"), values["method.variant"])  # compared, not looked up: neither is checked yet
        meant = next((nulls for of, nulls in NULLS.items() if of == run), {})
        values |= {key: value for key, value in meant.items() if values.get(key) is None}
    return values
