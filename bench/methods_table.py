"""From the records of cells to a table: means, spreads, and paired differences from a reference row."""

from __future__ import annotations

import math
import statistics
from typing import Any

from scipy import stats

MEASURES = {
    "rank1": "rank-1", "rank5": "rank-5", "mAP": "mAP", "linear_100": "linear 100 %", "linear_50": "linear 50 %",
    "linear_20": "linear 20 %", "plain_rank1": "rank-1, unmasked",
}  # fmt: skip
"""Percentages, by the name that a record gives them (there as fractions)."""
COSTS = {"cpu_seconds_per_epoch": "CPU s/epoch", "peak_memory_mib": "peak MiB"}
TESTED = ("rank1", "mAP")


def paired(values: dict[int, float], reference: dict[int, float]) -> dict[str, Any]:
    """``values`` minus ``reference``, both by seed, over the seeds that both have: mean ``difference``, its 95 % ``interval`` and
    the two-sided ``p`` of Student's paired t test; both None below two seeds or where all differences are equal."""
    seeds = sorted(values.keys() & reference.keys())
    differences = [values[seed] - reference[seed] for seed in seeds]
    found: dict[str, Any] = {"seeds": len(seeds), "difference": None, "interval": None, "p": None}
    if not seeds:
        return found
    found["difference"] = mean = statistics.fmean(differences)
    if len(seeds) > 1 and (spread := statistics.stdev(differences)) > 0:
        half = stats.t.ppf(0.975, len(seeds) - 1) * spread / math.sqrt(len(seeds))
        found["interval"] = [mean - half, mean + half]
        found["p"] = float(stats.ttest_rel([values[s] for s in seeds], [reference[s] for s in seeds]).pvalue)
    return found


def summarise(records: list[dict[str, Any]], order: list[str], reference: str) -> list[dict[str, Any]]:
    """One row a cell, in ``order``, of the cells that have records: per measure mean and sample standard deviation (None with one
    seed), ``against`` the reference, the ``seeds`` that ended and those that ``failed``, with why."""
    by_cell = {name: [r for r in records if r["cell"] == name] for name in order}

    def values(name: str, measure: str) -> dict[int, float]:
        return {r["seed"]: r[measure] for r in by_cell.get(name, []) if r.get(measure) is not None}

    rows = []
    for name in order:
        if not by_cell[name]:
            continue
        row: dict[str, Any] = {"cell": name, "measures": {}, "against": {}}
        for measure in (*MEASURES, *COSTS):
            found = list(values(name, measure).values())
            if found:
                deviation = statistics.stdev(found) if len(found) > 1 else None
                row["measures"][measure] = {"mean": statistics.fmean(found), "deviation": deviation}
        if name != reference:
            row["against"] = {measure: paired(values(name, measure), values(reference, measure)) for measure in TESTED}
        row["seeds"] = sorted(r["seed"] for r in by_cell[name] if "failed" not in r)
        row["failed"] = {r["seed"]: r["failed"] for r in by_cell[name] if "failed" in r}
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]], reference: str) -> str:
    """The rows as a Markdown table, percentages as mean ± standard deviation over seeds."""
    measures = [m for m in (*MEASURES, *COSTS) if any(m in row["measures"] for row in rows)]
    heads = [(MEASURES | COSTS)[m] for m in measures]
    tested = [f"{MEASURES[m]} against {reference} (p)" for m in TESTED]
    lines = ["| " + " | ".join(["", *heads, *tested, "seeds"]) + " |", "|" + "---|" * (len(measures) + len(TESTED) + 2)]
    for row in rows:
        cells = [row["cell"], *(_value(m, row["measures"].get(m)) for m in measures)]
        cells += [_difference(row["against"].get(m)) for m in TESTED]
        cells.append(f"{len(row['seeds'])}" + (f", {len(row['failed'])} failed" if row["failed"] else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _value(measure: str, value: dict[str, float | None] | None) -> str:
    if value is None:
        return "–"
    factor, digits = (100, 1) if measure in MEASURES else (1, 0 if measure == "peak_memory_mib" else 2)
    text = f"{factor * value['mean']:.{digits}f}"
    return text if value["deviation"] is None or measure in COSTS else f"{text} ± {factor * value['deviation']:.{digits}f}"


def _difference(found: dict[str, Any] | None) -> str:
    if found is None or found["difference"] is None:
        return "–"
    p = "" if found["p"] is None else f" ({found['p']:.3f})" if found["p"] >= 0.001 else " (< 0.001)"
    return f"{100 * found['difference']:+.1f}{p}"
