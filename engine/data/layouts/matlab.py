"""Variables of MATLAB files as plain lists, read in a process of their own: a damaged byte can crash scipy's parser.

The child runs this file alone, with nothing but the standard library, numpy and scipy.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 120
"""After which the parser is taken to hang."""


def read(files: dict[Path, tuple[str, ...]]) -> list[dict[str, list | dict[str, list]]]:
    """For each file its named variables, flattened: arrays and cells as lists, struct arrays as one list a field.

    Raises OSError for a file that cannot be opened, ValueError naming a file that is damaged or lacks a variable.
    """
    for path in files:
        path.open("rb").close()
    job = json.dumps([(str(path), names) for path, names in files.items()])
    try:
        printed = subprocess.run([sys.executable, "-P", __file__], input=job.encode(), capture_output=True, timeout=SECONDS).stdout
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
    answers = [json.loads(line) for line in printed.split(b"\n")[:-1]]  # a last line without its end is cut off
    for i, (path, names) in enumerate(files.items()):
        answer = answers[i] if i < len(answers) else "the parser crashed or hung over it"
        if isinstance(answer, str):
            raise ValueError(f"{path}: not readable as a MATLAB file ({answer}); unpack it again")
        for name in names:
            if name not in answer:
                raise ValueError(f"{path}: has no variable {name}; unpack it again")
    return answers


def _plain(value: Any) -> Any:
    import numpy as np

    if isinstance(value, np.ndarray) and value.dtype.names:
        return {field: _plain(np.atleast_1d(value[field])) for field in value.dtype.names}
    if isinstance(value, np.ndarray):
        return [_plain(entry) for entry in value.ravel().tolist()]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, str | int | float) else {"neither text nor number": repr(value)}


def _child() -> None:
    """Answers a line per file: its variables, or what is wrong with it."""
    import numpy as np
    from scipy.io import loadmat

    for path, names in json.load(sys.stdin):
        try:
            found = loadmat(path, squeeze_me=True, variable_names=names)
            answer: Any = {name: _plain(np.atleast_1d(found[name])) for name in names if name in found}
        except Exception as error:  # the parser raises a dozen kinds
            answer = str(error) or type(error).__name__
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _child()
