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
COSTS = {"cpu_seconds_per_epoch": "CPU s/epoch", "cpu_seconds": "CPU s/run", "peak_memory_mib": "peak MiB"}
MASKS = {
    "plain_rank1": "rank-1 unmasked", "plain_mAP": "mAP unmasked", "mask_gain": "rank-1 the mask adds",
    "silhouette_gain": "rank-1 the silhouette would add", "box_gain": "rank-1 the box would add",
}  # fmt: skip
RATIOS = {"feature_on_bird": "feature map on the bird", "mask_on_bird": "mask", "cam_on_bird": "CAM"}
"""What a record may hold, and how a table calls it. Scores and masks are in percent (fractions in the
record), the last ones ratios."""
TESTED = {"rank1": "rank-1", "mAP": "mAP", "plain_rank1": "rank-1 unmasked"}


def derived(record: dict[str, Any]) -> dict[str, Any]:
    """The record with what a mask gains over none in the same network: its own mask, and the true silhouette or box."""
    found = dict(record)
    for gain, measure in {"mask_gain": "rank1", "silhouette_gain": "silhouette_rank1", "box_gain": "box_rank1"}.items():
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


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values adjusted for their number by Holm's step-down procedure (1979, Scandinavian Journal of Statistics 6, 65-70):
    the i-th smallest of n times n - i + 1, at most 1, and not below those of smaller ones."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found, least = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        least = found[i] = max(least, min(1.0, (len(p_values) - place) * p_values[i]))
    return found


def half_trained(values: Sequence[float], floor: float) -> int:
    """How many of ``values`` lie below the middle between ``floor``, which is reached without training, and their median."""
    return sum(value < (floor + statistics.median(values)) / 2 for value in values)


def summarize(records: list[dict[str, Any]], order: list[str], reference: str, floor: str | None = None) -> list[dict[str, Any]]:
    """One row per cell, in ``order``, of the cells that have records: per measure mean and sample standard deviation (None with one
    seed), ``against`` the reference, the ``seeds`` that ended and those that ``failed``, with why. A record whose seed is None is
    compared with every seed of the reference. ``holm`` beside a p is corrected for all rows of that measure. With ``floor``, the
    row without training, ``half_trained`` counts seeds by their rank-1."""
    by_cell = {name: [derived(r) for r in records if r["cell"] == name] for name in order}
    every_seed = {r["seed"] for r in records} - {None}

    def values(name: str, measure: str) -> dict[int, float]:
        found = {r["seed"]: r[measure] for r in by_cell.get(name, []) if r.get(measure) is not None}
        return dict.fromkeys(every_seed, found[None]) if None in found else found

    rows = []
    for name in order:
        if not by_cell[name]:
            continue
        row: dict[str, Any] = {"cell": name, "measures": {}, "against": {}}
        for measure in (*SCORES, *COSTS, *MASKS, *RATIOS):
            found = [r[measure] for r in by_cell[name] if r.get(measure) is not None]
            if found:
                deviation = statistics.stdev(found) if len(found) > 1 else None
                row["measures"][measure] = {"mean": statistics.fmean(found), "deviation": deviation}
        if name != reference:
            row["against"] = {measure: paired(values(name, measure), values(reference, measure)) for measure in TESTED}
        row["seeds"] = sorted(r["seed"] for r in by_cell[name] if "failed" not in r and r["seed"] is not None)
        row["failed"] = {r["seed"]: r["failed"] for r in by_cell[name] if "failed" in r}
        if floor and name != floor and by_cell[floor] and (rank1 := [*values(name, "rank1").values()]):
            row["half_trained"] = half_trained(rank1, statistics.fmean(values(floor, "rank1").values()))
        rows.append(row)
    for measure in TESTED:
        tested = [row["against"][measure] for row in rows if row["against"].get(measure, {}).get("p") is not None]
        for entry, adjusted in zip(tested, holm([entry["p"] for entry in tested]), strict=True):
            entry["holm"] = adjusted
    return rows


def markdown(rows: list[dict[str, Any]], reference: str, corrected: bool = False) -> str:
    """The rows as two Markdown tables: what the methods reach and cost, and what their masks contribute. corrected: with Holm's p,
    and with the cost of a whole run instead of an epoch."""
    left_out = "cpu_seconds_per_epoch" if corrected else "cpu_seconds"
    costs = {measure: name for measure, name in COSTS.items() if measure != left_out}
    looked = _table(rows, MASKS | RATIOS, reference, ("plain_rank1",), corrected=corrected)
    return _table(rows, SCORES | costs, reference, ("rank1", "mAP"), counted=True, corrected=corrected) + "\n" + looked


def _table(
    rows: list[dict[str, Any]],
    names: dict[str, str],
    reference: str,
    tested: Sequence[str],
    counted: bool = False,
    corrected: bool = False,
) -> str:
    """The measures among ``names`` that any row has, and differences from ``reference`` in those ``tested``."""
    measures = [m for m in names if any(m in row["measures"] for row in rows)]
    heads = ["", *(names[m] for m in measures), *(f"{TESTED[m]} against {reference}" for m in tested), *["seeds"] * counted]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["cell"], *(_value(m, row["measures"].get(m)) for m in measures)]
        cells += [_difference(row["against"].get(m), corrected) for m in tested]
        if counted:
            half = f", {row['half_trained']} half trained" if "half_trained" in row else ""
            failed = f", {len(row['failed'])} failed" if row["failed"] else ""
            cells.append(f"{len(row['seeds']) if row['seeds'] or failed else '–'}{failed}{half}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _value(measure: str, value: dict[str, float | None] | None) -> str:
    if value is None:
        return "–"
    factor, digits = (1, 0 if measure in ("peak_memory_mib", "cpu_seconds") else 2) if measure in COSTS | RATIOS else (100, 1)
    text = f"{factor * value['mean']:{'+' if measure.endswith('_gain') else ''}.{digits}f}"
    return text if value["deviation"] is None or measure in COSTS else f"{text} ± {factor * value['deviation']:.{digits}f}"


def _difference(found: dict[str, Any] | None, corrected: bool) -> str:
    if found is None or found["difference"] is None:
        return "–"
    p = "" if found["p"] is None else f", {_p('p', found['p'])}"
    p += f", {_p('Holm', found['holm'])}" if corrected and found.get("holm") is not None else ""
    return f"{100 * found['difference']:+.1f} ({found['higher']} of {found['seeds']}{p})"


def _p(name: str, value: float) -> str:
    return f"{name} {value:.3f}" if value >= 0.001 else f"{name} < 0.001"
