"""Result files: the lines that benchmarks leave into one small JSON file per GPU and commit, and those into a table and a plot.

python -m bench.summary collect LINES.jsonl [--out DIR]  -> DIR/<date>_<commit>.json, DIR by default bench/results/<gpu>
python -m bench.summary folder                           that folder of this machine
python -m bench.summary table [RESULT.json ...]          Markdown for the README, newest file of each GPU
python -m bench.summary plot OUT.png [RESULT.json ...]   speed over eager, one bar per provider
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import re
import sys
from pathlib import Path

from bench import timing

RESULTS = Path(__file__).with_name("results")
KEPT = ("cold_ms", "cold_ms_p20", "cold_ms_p80", "replayed_ms", "gb_s", "tflop_s", "percent_of_gb_s",
        "percent_of_tflop_s", "peak_extra_mib", "ratios", "not_captured", "ms", "images_per_s", "peak_mib", "useful_tflop_s",
        "mfu", "of_floor", "teacher")  # fmt: skip
FACTS = ("device", "threads", "torch", "triton", "cuda", "python", "commit")


def folder_of(facts: dict[str, str]) -> Path:
    """Where the results of a device are kept."""
    return RESULTS / re.sub(r"[^A-Za-z0-9]+", "-", facts.get("device", "unknown")).strip("-").lower()


def collect(lines: Path, out: Path | None = None) -> Path:
    """Write or extend the result file of this device and commit; returns its path. Of a name that stands there twice the later
    line counts; a line that was cut off is passed over.

    Raises:
        ValueError: the file holds no benchmark.
    """
    found = []
    for text in lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    if not found:
        raise ValueError(f"{lines}: no benchmark in it; every test failed or was deselected")
    measured = datetime.datetime.fromtimestamp(lines.stat().st_mtime).isoformat(timespec="seconds")
    facts, rows = timing.facts() | {"measured": measured}, {}
    for bench in found:
        info = bench["extra_info"]
        facts |= {name: info[name] for name in FACTS if name in info}
        row = {name: info[name] for name in KEPT if name in info}
        row |= {"outcome": bench["outcome"]} if bench.get("outcome", "passed") != "passed" else {}
        rows[bench["name"]] = {"wall_ms": 1e3 * bench["stats"]["min"]} | row if bench.get("stats") else row
    folder = out or folder_of(facts)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{measured[:10]}_{facts.get('commit', 'unknown')}.json"
    before = json.loads(path.read_text()) if path.exists() else {"facts": {}, "rows": {}}
    merged = {"facts": before["facts"] | facts, "rows": before["rows"] | rows}
    path.write_text(json.dumps(merged, indent=1) + "\n")
    return path


def newest() -> list[Path]:
    """The latest file of each device; two commits of one day are told apart by the hour inside. Method studies are no results."""
    measured: dict[Path, dict[Path, str]] = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        if facts := json.loads(path.read_text()).get("facts"):
            measured.setdefault(path.parent, {})[path] = facts["measured"]
    return [max(files, key=files.__getitem__) for files in measured.values()]


def cases(result: dict) -> dict[str, dict[str, float]]:
    """case -> provider -> milliseconds, for every case that both eager code and ours ran."""
    found: dict[str, dict[str, float]] = {}
    for name, row in result["rows"].items():
        match = re.fullmatch(r"test_(\w+)\[(.+)\]", name)
        parts = match[2].split("-") if match else []
        provider = next((part for part in parts if part in ("eager", "tuned", "compile", "ours")), None)
        if provider and "wall_ms" in row:
            case = " ".join([match[1], *(part for part in parts if part != provider)])
            found.setdefault(case, {})[provider] = row.get("cold_ms") or row["wall_ms"]
    return {case: times for case, times in found.items() if {"eager", "ours"} <= set(times)}


def table(paths: list[Path]) -> str:
    """Markdown, one section per device; a dash where a provider did not run."""
    lines = []
    for path in paths:
        result = json.loads(path.read_text())
        facts = result["facts"]
        versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "commit") if name in facts)
        lines += [f"{facts.get('device', path.parent.name)} ({versions}), ms", ""]
        lines += ["| op | eager | tuned | compiled | ours | over eager |", "|---|---|---|---|---|---|"]
        for case, times in cases(result).items():
            cells = [f"{times[name]:.3g}" if name in times else "–" for name in ("eager", "tuned", "compile", "ours")]
            lines.append(f"| {case} | {' | '.join(cells)} | {times['eager'] / times['ours']:.1f}× |")
        lines.append("")
    return "\n".join(lines)


def plot(out: Path, paths: list[Path]) -> None:
    """Horizontal bars of speed over eager. Whole calls only: a backward pass alone is a scale where the forward did it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = []
    for path in paths:
        result = json.loads(path.read_text())
        halves = ("forward", "backward")
        if found := {case: times for case, times in cases(result).items() if not case.endswith(halves)}:
            panels.append((result, path, found))
    if not panels:
        raise ValueError(f"no case that both eager and ours ran in {', '.join(map(str, paths))}")
    height = sum(1 + 0.35 * len(found) for _, _, found in panels)
    figure, axes = plt.subplots(len(panels), 1, squeeze=False, figsize=(8, height))
    for axis, (result, path, found) in zip(axes[:, 0], panels, strict=True):
        for position, (name, color) in enumerate((("tuned", "#b9c0c8"), ("compile", "#7f8fa3"), ("ours", "#c8553d"))):
            bars = [(row + 0.27 * (1 - position), times["eager"] / times[name])
                    for row, times in enumerate(found.values()) if name in times]  # fmt: skip
            if bars:
                axis.barh(*zip(*bars, strict=True), height=0.25, color=color, label=name)
        axis.set_yticks(range(len(found)), list(found), fontsize=8)
        axis.invert_yaxis()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlabel("times as fast as eager")
        axis.set_title(f"{result['facts'].get('device', path.parent.name)}, {path.stem}", fontsize=9)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("lines", type=Path)
    collecting.add_argument("--out", type=Path, help="the folder of the result file")
    commands.add_parser("folder")
    commands.add_parser("table").add_argument("results", type=Path, nargs="*")
    drawing = commands.add_parser("plot")
    drawing.add_argument("out", type=Path)
    drawing.add_argument("results", type=Path, nargs="*")
    options = parser.parse_args(arguments)
    if options.command == "collect":
        print(collect(options.lines, options.out))
        return 0
    if options.command == "folder":
        print(folder_of(timing.facts()))
        return 0
    paths = options.results or (newest() if RESULTS.exists() else [])
    if not paths:
        parser.error("no result files: run bench/gpu/run_gpu.sh on a GPU, or name files")
    if options.command == "table":
        print(table(paths))
    else:
        plot(options.out, paths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
