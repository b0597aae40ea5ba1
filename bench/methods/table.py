"""From the records of cells to a table: means, spreads, and paired differences from a reference row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

SCORES = {
    "rank1": "rank-1", "rank5": "rank-5", "mAP": "mAP", "linear_100": "linear 100 %", "linear_50": "linear 50 %",
    "linear_20": "linear 20 %",
}  # fmt: skip
COSTS = {"cpu_seconds_per_epoch": "CPU s/epoch", "peak_memory_mib": "peak MiB"}
MASKS = {
    "plain_rank1": "rank-1 unmasked", "plain_mAP": "mAP unmasked", "mask_gain": "rank-1 the mask adds",
    "silhouette_gain": "rank-1 the silhouette would add",
}  # fmt: skip
RATIOS = {"feature_on_bird": "feature map on the bird", "mask_on_bird": "mask", "cam_on_bird": "CAM"}
"""What a record may hold, and how a table calls it. Scores and masks are in percent (fractions in the
record), the last ones ratios."""
TESTED = {"rank1": "rank-1", "mAP": "mAP", "plain_rank1": "rank-1 unmasked"}


def derived(record: dict[str, Any]) -> dict[str, Any]:
    """The record with what a mask gains over none in the same network: its own mask, and the true silhouette."""
    found = dict(record)
    for gain, measure in {"mask_gain": "rank1", "silhouette_gain": "silhouette_rank1"}.items():
        if measure in record and "plain_rank1" in record and (gain != "mask_gain" or "mask_on_bird" in record):
            found[gain] = record[measure] - record["plain_rank1"]
    return found


def paired(values: dict[int, float], reference: dict[int, float]) -> dict[str, Any]:
    """``values`` minus ``reference``, both by seed, over the seeds that both have: mean ``difference``, in how many seeds it is
    ``higher``, its 95 % ``interval`` and the two-sided ``p`` of Student's paired t test; both None below two seeds or where all
    differences are equal."""
    seeds = sorted(values.keys() & reference.keys())
    differences = [values[seed] - reference[seed] for seed in seeds]
    higher = sum(difference > 0 for difference in differences)
    found: dict[str, Any] = {"seeds": len(seeds), "higher": higher, "difference": None, "interval": None, "p": None}
    if not seeds:
        return found
    found["difference"] = mean = statistics.fmean(differences)
    if len(seeds) > 1 and (spread := statistics.stdev(differences)) > 0:
        half = stats.t.ppf(0.975, len(seeds) - 1) * spread / math.sqrt(len(seeds))
        found["interval"] = [mean - half, mean + half]
        found["p"] = float(stats.ttest_rel([values[s] for s in seeds], [reference[s] for s in seeds]).pvalue)
    return found


def summarize(records: list[dict[str, Any]], order: list[str], reference: str) -> list[dict[str, Any]]:
    """One row per cell, in ``order``, of the cells that have records: per measure mean and sample standard deviation (None with one
    seed), ``against`` the reference, the ``seeds`` that ended and those that ``failed``, with why."""
    by_cell = {name: [derived(r) for r in records if r["cell"] == name] for name in order}

    def values(name: str, measure: str) -> dict[int, float]:
        return {r["seed"]: r[measure] for r in by_cell.get(name, []) if r.get(measure) is not None}

    rows = []
    for name in order:
        if not by_cell[name]:
            continue
        row: dict[str, Any] = {"cell": name, "measures": {}, "against": {}}
        for measure in (*SCORES, *COSTS, *MASKS, *RATIOS):
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
    """The rows as two Markdown tables: what the methods reach and cost, and what their masks contribute."""
    return _table(rows, SCORES | COSTS, reference, ("rank1", "mAP"), counted=True) + "\n" + _table(
        rows, MASKS | RATIOS, reference, ("plain_rank1",)
    )  # fmt: skip


def _table(rows: list[dict[str, Any]], names: dict[str, str], reference: str, tested: Sequence[str], counted: bool = False) -> str:
    """The measures among ``names`` that any row has, and differences from ``reference`` in those ``tested``."""
    measures = [m for m in names if any(m in row["measures"] for row in rows)]
    heads = ["", *(names[m] for m in measures), *(f"{TESTED[m]} against {reference}" for m in tested), *["seeds"] * counted]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["cell"], *(_value(m, row["measures"].get(m)) for m in measures)]
        cells += [_difference(row["against"].get(m)) for m in tested]
        if counted:
            cells.append(f"{len(row['seeds'])}" + (f", {len(row['failed'])} failed" if row["failed"] else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _value(measure: str, value: dict[str, float | None] | None) -> str:
    if value is None:
        return "–"
    factor, digits = (1, 0 if measure == "peak_memory_mib" else 2) if measure in COSTS | RATIOS else (100, 1)
    text = f"{factor * value['mean']:{'+' if measure.endswith('_gain') else ''}.{digits}f}"
    return text if value["deviation"] is None or measure in COSTS else f"{text} ± {factor * value['deviation']:.{digits}f}"


def _difference(found: dict[str, Any] | None) -> str:
    if found is None or found["difference"] is None:
        return "–"
    p = "" if found["p"] is None else f", p {found['p']:.3f}" if found["p"] >= 0.001 else ", p < 0.001"
    return f"{100 * found['difference']:+.1f} ({found['higher']} of {found['seeds']}{p})"
