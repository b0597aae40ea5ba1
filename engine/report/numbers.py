"""The tables of the page: what was evaluated, several runs beside each other, speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from engine.config import flatten
from engine.console import counted
from engine.pretrained import best_of
from engine.report.run import Run
from engine.training import symptoms

SCORES = {"rank1": "rank-1", "rank5": "rank-5", "mAP": "mAP", "knn_top1": "kNN top-1", "linear_top1": "linear top-1"}
"""Of the lines of the log."""
# Keys that say where a run is, not what it computes
_PLACES = ("out", "resume", "data.root", "data.workers")


class Table(NamedTuple):
    """Rows of text, the first cell of a row its header."""

    head: list[str]
    rows: list[list[str]]


class Change(NamedTuple):
    """A number before and after training; ``before`` is None where it was not measured then."""

    name: str
    before: float | None
    after: float


class Headline(NamedTuple):
    changes: list[Change]
    what: str
    """Protocol, feature, split, epochs."""


def headline(run: Run) -> Headline | str:
    """The first and the last evaluation of the log."""
    evaluated = run.of_kind("eval")
    best = best_line(run)
    if not evaluated:
        return "Nothing was evaluated: the log holds no evaluation, as is the case without a labelled test split." + best
    first, last = evaluated[0], evaluated[-1]
    before = first if len(evaluated) > 1 else {}
    changes = [Change(text, before.get(name), last[name]) for name, text in SCORES.items() if name in last]
    alone = f" ({last['excluded']} alone in their class)" if last.get("excluded") else ""
    parts = [
        last.get("protocol"),
        f"feature {last['feature']}" if "feature" in last else None,
        f"{last['queries']:,} queries{alone} of {counted(last['classes'], 'class', 'classes')} of {run.config.data.name}"
        if "queries" in last and "classes" in last
        else None,
        f"input {run.config.data.image_size} px",
        f"epoch {first['epoch']} → {last['epoch']}" if before else f"epoch {last['epoch']}",
        f"seed {run.config.seed}",
    ]
    return Headline(changes, "; ".join(part for part in parts if part) + "." + best)


class Found(NamedTuple):
    """A symptom of a run."""

    run: str
    finding: symptoms.Finding
    epoch: str
    """When it showed; the step where the log does not tell the epoch."""


def findings(runs: Sequence[Run]) -> list[Found] | str:
    """What the numbers of the runs show to be wrong, by the table that the log is written by."""
    found = []
    for run in runs:
        per_epoch = steps_per_epoch(run)
        about = symptoms.facts(flatten(run.config), steps_per_epoch=per_epoch)
        for one in symptoms.found(run.records, about):
            when = f"epoch {one.step / per_epoch:.3g}" if per_epoch else f"step {one.step}"
            found.append(Found(run.name, one, when))
    if found:
        return found
    lines = sum(len(run.of_kind("train")) for run in runs)
    if not lines:
        return "Nothing was looked for: the log holds no line of training."
    names = ", ".join(symptom.name for symptom in symptoms.SYMPTOMS)
    return f"None. Looked for in {counted(lines, 'training line')}: {names}."


def steps_per_epoch(run: Run) -> int:
    """0 where the log does not tell."""
    return next((int(r["steps_per_epoch"]) for r in run.records if r.get("steps_per_epoch")), 0)


def best_line(run: Run) -> str:
    """Which weights are the best by the validation part, with what they reach on the test split; empty where none were kept.
    It follows another sentence."""
    if (best := best_of(run.folder)) is None:
        return ""
    measure, name = best["measure"], SCORES.get(best["measure"], best["measure"])
    tested = [r[measure] for r in run.of_kind("eval") if str(r["step"]) == best["step"] and measure in r]
    there = f", {100 * tested[-1]:.1f} % on the test split" if tested else ""
    early = any(r.get("ended_early") for r in run.of_kind("summary")[-1:])
    ended = " The run ended early (eval.patience), as no later epoch was better." if early else ""
    return (
        f" Best weights by validation {name}: epoch {best['epoch']}, {100 * float(best['value']):.1f} % on the validation part"
        f"{there}; they are in best.safetensors, and this page shows the last weights.{ended}"
    )


def protocols(run: Run) -> Table | None:
    """Everything that was evaluated, by the newest numbers of each model (the untouched network, the run, the teacher)."""
    newest: dict[str, int] = {}
    for record in run.evaluation:
        model = record.get("model", "run")
        newest[model] = max(newest.get(model, -1), record.get("step") or 0)
    rows = []
    for r in run.evaluation:
        model = r.get("model", "run")
        if (r.get("step") or 0) < newest[model]:
            continue
        name = r.get("protocol", "?")
        if name == "knn" and "k" not in r:
            name = "kNN"
        elif name == "knn":
            name = f"kNN, k {r.get('k', '?')}"
        elif name == "linear" and "solver" in r:
            name = f"linear {r.get('solver', '')}, {r.get('fraction', 100):g} % of the labels"
        shown = {**SCORES, "top1": "top-1", "top5": "top-5"}
        values = [f"{text}\u00a0{100 * r[key]:.1f}\u00a0%" for key, text in shown.items() if isinstance(r.get(key), float)]
        epoch = "" if r.get("epoch") is None else f", epoch\u00a0{r['epoch']}"
        how = f"{r.get('setting', '')}; feature {r.get('feature', '?')}"
        rows.append([f"{model}{epoch}", name, "\n".join(values) or "not applicable", how])
    return Table(["model", "protocol", "result", "how"], rows) if rows else None


def side_by_side(runs: Sequence[Run]) -> tuple[Table, Table]:
    """Numbers of several runs, and the config keys in which they differ."""
    rows = []
    for name, text in SCORES.items():
        if not any(name in r for run in runs for r in run.of_kind("eval")):
            continue
        cells = []
        for run in runs:
            evaluated = [r for r in run.of_kind("eval") if name in r]
            ends = [f"{100 * r[name]:.1f}\u00a0%" for r in (evaluated[:1] if len(evaluated) < 2 else [evaluated[0], evaluated[-1]])]
            cells.append(" → ".join(ends) or "not evaluated")
        rows.append([text, *cells])
    for text, value in _speed_rows().items():
        rows.append([text, *[value(run) for run in runs]])
    flat = [flatten(run.config) for run in runs]
    differing = [k for k in flat[0] if k not in _PLACES and len({str(f[k]) for f in flat}) > 1]
    names = [run.name for run in runs]
    return Table(["", *names], rows), Table(["key", *names], [[k, *[_yaml_word(f[k]) for f in flat]] for k in differing])


def _yaml_word(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value)
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _speed_rows() -> dict[str, Any]:
    def row(text: str, value: Callable[[dict[str, Any]], float]) -> Callable[[Run], str]:
        def cell(run: Run) -> str:
            last = _last_stretch(run)
            try:
                return text.format(value(last)) if last else "–"
            except KeyError:  # of an earlier version
                return "–"

        return cell

    def training(r: dict[str, Any]) -> float:
        return r["seconds"] - sum(r.get(f"{name}_seconds", 0) for name in ("compile", "checkpoint", "hook"))

    return {
        "images per second": row("{:,.0f}", lambda r: r["images_per_s"]),
        "waiting for data": row("{:.0f} %", lambda r: 100 * r["data_wait"]),
        "training": row("{:,.0f} s", training),
        "start until the first step": row("{:,.0f} s", lambda r: r["cold_start_seconds"]),
        "checkpoints": row("{:.1f} s", lambda r: r["checkpoint_seconds"]),
        "evaluation and maps": row("{:.1f} s", lambda r: r["hook_seconds"] + r.get("evaluation_seconds", 0)),
        "compiling": row("{:.0f} s", lambda r: r["compile_seconds"]),
        "everything": row("{:,.0f} s", lambda r: r["total_seconds"]),
    }


def _last_stretch(run: Run) -> dict[str, Any]:
    """The summary of the last process that trained; empty without one."""
    return next((r for r in reversed(run.of_kind("summary")) if r.get("steps")), {})


def speed(run: Run) -> list[tuple[str, str]]:
    """How fast, on what."""
    rows = [(text, value(run)) for text, value in _speed_rows().items()]
    rows = [row for row in rows if row[1] != "–"]
    hidden = {"kind", "step", "steps_per_epoch"}
    for record in run.of_kind("start")[:1]:
        rows += [({"time": "started"}.get(k, k), str(v)) for k, v in record.items() if k not in hidden and v is not None]
    return rows


def was_continued(run: Run) -> bool:
    """Whether the speed is that of the last stretch of a run that was stopped and continued."""
    last = _last_stretch(run)
    return bool(last) and last["steps"] < last["step"]
