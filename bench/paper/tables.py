"""Outcomes beside the published numbers, as text and as JSON."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from rich.table import Table

from bench.paper.exhibits import Claim, Exhibit, Outcome, Plan
from engine import run_folder
from engine.console import console, say
from engine.files import write_text


def show(exhibit: Exhibit, found: dict[tuple[str, str], Outcome], plan: Plan) -> None:
    """Prints one table per dataset: percent, mean and standard deviation over the seeds, with what was published below a number;
    then the claims in full beside what was found here, and why cells are empty."""
    seeds = "one seed" if plan.seeds == 1 else f"mean ± standard deviation over {plan.seeds} seeds"
    for data in exhibit.data:
        table = Table("", *exhibit.measures, title=f"{exhibit.key}, {data}: {exhibit.title}", title_justify="left")
        for row in exhibit.rows:
            table.add_row(row.name, *("\n".join(_entry(exhibit, found, row.name, data, m)) for m in exhibit.measures))
        console.print(table)
        for claim in exhibit.claims:
            if claim.data == data:
                say(compare(claim, found))
        empty: dict[str, list[str]] = {}
        for row in exhibit.rows:
            if reason := found.get((row.name, data), Outcome([], "not reached")).reason:
                empty.setdefault(reason, []).append(row.name)
        for reason, names in empty.items():
            say(f"{'all rows' if len(names) == len(exhibit.rows) else '; '.join(names)}: {reason}")
    say(f"last epoch, percent, {seeds}")
    for note in exhibit.notes:
        say(f"note: {note}")


def _entry(exhibit: Exhibit, found: dict[tuple[str, str], Outcome], row: str, data: str, measure: str) -> list[str]:
    lines = [spread(_values(found, row, data, measure))]
    for claim in exhibit.claims:
        if (claim.row, claim.data, claim.measure) == (row, data, measure):
            lines.append(f"published {claim.value:.2f}" if claim.gain is None else f"published {claim.gain:+.2f}")
    return lines


def compare(claim: Claim, found: dict[tuple[str, str], Outcome]) -> str:
    """A claim in words, and the same quantity of the runs here where they are complete."""
    values = _values(found, claim.row, claim.data, claim.measure)
    others = [_values(found, other, claim.data, claim.measure) for other in claim.over]
    if claim.gain is None:
        text, here = f"{claim.value:.2f}", f"{statistics.mean(values):.2f}" if values else None
    else:
        better = "the better of " if len(others) > 1 else ""
        text, here = f"{claim.gain:+.2f} over {better}{' and '.join(claim.over)}", None
        if values and all(others):
            here = f"{statistics.mean(values) - max(map(statistics.mean, others)):+.2f}"
    return f"published: {claim.row} {claim.measure} {text} ({claim.source}); here {here or 'not measured'}"


def _values(found: dict[tuple[str, str], Outcome], row: str, data: str, measure: str) -> list[float]:
    outcome = found.get((row, data), Outcome([], None))
    return [100 * m[measure] for m in outcome.measures if measure in m]


def spread(values: list[float]) -> str:
    """``mean ± standard deviation``, or the one value."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def keep(exhibit: Exhibit, found: dict[tuple[str, str], Outcome], plan: Plan) -> Path:
    """Writes the outcomes as JSON; returns the file."""
    rows = [
        {"row": row, "data": data, "seeds": outcome.measures, "reason": outcome.reason} for (row, data), outcome in found.items()
    ]
    claims = [{k: v for k, v in vars(claim).items() if v not in (None, ())} for claim in exhibit.claims]
    facts = {"exhibit": exhibit.key, "title": exhibit.title, "overrides": plan.overrides, "cells": rows, "claims": claims}
    facts |= {"notes": exhibit.notes, "commit": run_folder.commit()}
    path = plan.out / f"{exhibit.key.replace(' ', '')}.json"
    write_text(path, json.dumps(facts, indent=2) + "\n")
    return path
