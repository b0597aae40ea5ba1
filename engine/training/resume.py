"""Which checkpoint a run continues, and whether it may: what was computed until then must be what is computed from now on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config import ConfigError, flatten, from_run, keys
from engine.console import say
from engine.run_folder import RunFolder
from engine.training import checkpoint


def find_checkpoint(resume: str, out: Path, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """(path, state) of the checkpoint that ``resume`` names for the run folder ``out``; None to start afresh.

    resume: ``auto`` is the folder's newest checkpoint, ``none`` is none, anything else the path of a checkpoint or of a run folder.
    settings: {dotted key: value} of the run that is to continue it.
    Raises ``FileNotFoundError`` where a path holds no checkpoint, ``ConfigError`` naming a key whose value must not change,
    ``ValueError`` for a checkpoint that cannot be read.
    """
    if resume == "none":
        return None
    if resume == "auto":
        found = checkpoint.newest(RunFolder(out).checkpoints, say)
        if found is None:
            return None
    else:
        path = Path(resume)
        if not path.exists():
            raise FileNotFoundError(f"resume: {path} is not there; give a checkpoint, a run folder, auto or none")
        found = checkpoint.newest(RunFolder(path).checkpoints, say) if path.is_dir() else (path, checkpoint.load(path))
        if found is None:
            raise FileNotFoundError(f"resume: {path} holds no checkpoint")
    source, state = found
    refuse_change(recorded_settings(state, source), settings, source)
    return found


def recorded_settings(state: dict[str, Any], source: Path) -> dict[str, Any]:
    """{dotted key: value} that the run of a checkpoint's ``state`` had. Raises ``ValueError`` where they cannot be read."""
    info = state.get("info", {})
    if "config" not in info:  # a run that was built in code
        return info.get("settings", {})
    try:
        return flatten(from_run(str(info["config"])))
    except ConfigError as error:
        raise ValueError(f"resume: {source} was made with a config that this version cannot read: {error}") from error


def refuse_change(then: dict[str, Any], now: dict[str, Any], source: Path) -> None:
    """Compares the settings of a checkpoint with those of the run that continues it (``Key.resume``): says in the log what may
    change and did. Raises ``ConfigError`` naming the first key that must not change and did."""
    for key, value in now.items():
        if key not in then or then[key] == value or keys()[key].resume == "free":
            continue
        if keys()[key].resume == "said":
            say(f"{key}: {value!r} from here on, {then[key]!r} until {source}")
        else:
            raise ConfigError(
                f"{key}: the checkpoint {source} was made with {then[key]!r}, this run has {value!r}; give {key}={then[key]} to "
                f"continue it, or --out DIR (or --resume none) to start afresh"
            )
