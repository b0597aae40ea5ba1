"""Which keys may name files, and these names made absolute: a run is continued, evaluated and replayed from other folders too."""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

FILES = ("encoder.weights", "ais.prompts", "teacher.model", "teacher.weights")
"""Keys whose value is a name that is known elsewhere (a tag, a corpus, a model) or the path of a file."""
_TIMM = "timm"


def absolute(key: str, value: Any) -> Any:
    """``value`` of one of ``FILES`` as an absolute path where it names a file, as it is otherwise."""
    return os.path.abspath(os.path.expanduser(value)) if isinstance(value, str) and _names_a_file(key, value) else value


def _names_a_file(key: str, value: str) -> bool:
    """As those decide who read them: by a suffix or a slash, of weights also by what is there."""
    if key == "teacher.model":
        return value.endswith(".json")
    if key == "encoder.weights" and (value in ("none", _TIMM) or value.startswith(f"{_TIMM}:")):
        return False
    named = bool(PurePath(value).suffix) or "/" in value
    return named or key == "encoder.weights" and os.path.isfile(value)
