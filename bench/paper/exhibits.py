"""What the paper's tables and figures consist of (paper.yaml), and the cells that a command line makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from engine.config import Config, command_line, flatten, from_yaml
from ppssl.method import METHODS

HERE = Path(__file__).resolve().parent


# A cell is the same wherever its run lies and however it is executed.
_NOT_IN_A_NAME = ("seed", "out", "resume", "data.root", "data.loader", "data.resident", "data.workers")


@dataclass(frozen=True)
class Row:
    """One line of an exhibit."""

    name: str
    set: dict[str, Any] = field(default_factory=dict)
    """Overrides of the recipe."""
    untouched: str | None = None
    """``initial``: the network before training; ``teacher``: the teacher's image features."""


@dataclass(frozen=True)
class Claim:
    """A published number, in points of percent."""

    row: str
    data: str
    measure: str
    source: str
    value: float | None = None
    gain: float | None = None
    over: tuple[str, ...] = ()
    """Rows whose best the ``gain`` is over."""


@dataclass(frozen=True)
class Exhibit:
    """A table or a figure."""

    key: str
    title: str
    data: tuple[str, ...]
    measures: tuple[str, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()
    picture: str | None = None


def exhibits() -> dict[str, Exhibit]:
    """What bench/paper/paper.yaml holds, by ``table N`` and ``figure N``."""
    found = {}
    for key, entry in yaml.safe_load((HERE / "paper.yaml").read_text(encoding="utf-8")).items():
        lists = {name: tuple(entry.pop(name, ())) for name in ("data", "measures", "notes")}
        claims = tuple(Claim(**c | {"over": tuple(c.get("over", ()))}) for c in entry.pop("claims"))
        found[key] = Exhibit(key, rows=tuple(Row(**r) for r in entry.pop("rows")), claims=claims, **lists, **entry)
    return found


class Plan(NamedTuple):
    """What the command line adds to every cell."""

    data_root: Path
    out: Path
    seeds: int
    overrides: tuple[str, ...]


class Cell(NamedTuple):
    """One run."""

    row: Row
    data: str
    config: Config
    folder: Path


def cells(exhibit: Exhibit, plan: Plan) -> Iterator[Cell]:
    """Every run of an exhibit; rows that train nothing have one seed unless the initial weights are random."""
    for data in exhibit.data:
        recipe = flatten(from_yaml(command_line.find_recipe(data)))
        for row in exhibit.rows:
            words = ["--cfg", data, *(f"{key}={_word(value)}" for key, value in row.set.items()), *plan.overrides]
            words += [f"data.root={plan.data_root / data}"]
            if row.untouched == "initial":
                words += ["method.name=moco"]  # the plain pooled feature
            base = command_line.parse(words).config
            differs = {k: v for k, v in flatten(base).items() if v != recipe[k] and not k.startswith("run.")}
            name = ",".join(f"{k}={_word(v)}" for k, v in differs.items() if k not in _NOT_IN_A_NAME) or "recipe"
            if row.untouched:
                name = f"{row.untouched} {name}"
            if len(name) > 120:  # file systems end at 255
                name = f"{name[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
            once = row.untouched == "teacher" or (row.untouched and base.encoder.weights != "none")
            for seed in range(1 if once else plan.seeds):
                folder = plan.out / data / name.replace("/", "_") / f"seed{seed}"
                yield Cell(row, data, replace(base, seed=seed, out=str(folder)), folder)


def _word(value: Any) -> str:
    """A value in the form of an override; files of bench/ are found from anywhere."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(HERE.parent / value) if str(value).endswith(".yaml") else "null" if value is None else str(value)


def obstacle(cell: Cell) -> str | None:
    """Why a cell cannot be run here, if it cannot."""
    if cell.config.method.name not in METHODS:
        return f"method {cell.config.method.name} is not registered (there are {', '.join(sorted(METHODS))})"
    if not Path(cell.config.data.root).is_dir():
        return f"no data: {cell.config.data.root} is not there"
    return None


class Outcome(NamedTuple):
    """The outcome of one row on one dataset."""

    measures: list[dict[str, float]]
    """One per seed."""
    reason: str | None
    """Why seeds are missing."""
