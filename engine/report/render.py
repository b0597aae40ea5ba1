"""One self-contained HTML page about one run or several: numbers, curves, galleries, attention maps, speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.config import to_yaml
from engine.console import counted, say
from engine.errors import BrokenFile
from engine.evaluation import neighbours
from engine.files import write_text
from engine.report import charts, numbers, sections
from engine.report.pictures import Thumbnails
from engine.report.run import Run, read
from ppssl.settings import title


def write(folders: Sequence[Path], out: Path, device: torch.device, *, quick: bool = False) -> None:
    """Writes the page about the run ``folders`` to ``out``, whole or not at all. The first run's images are shown; curves,
    numbers and attention maps are those of all. ``quick``: see ``embedding.layout``.

    Raises ``FileNotFoundError`` for a folder that is no run folder, ``ValueError`` for a damaged one, ``OSError`` where ``out``
    cannot be written.
    """
    runs = [read(folder, device, with_features=number == 0) for number, folder in enumerate(folders)]
    runs = [run._replace(name=name) for run, name in zip(runs, _distinct(folders), strict=True)]
    text = render(runs, quick=quick)
    write_text(out, text)
    say(f"report: {out} ({len(text.encode()) / 1e6:.1f} MB)")


def render(runs: Sequence[Run], *, quick: bool = False) -> str:
    """The page about ``runs`` as HTML text that needs nothing but itself."""
    import jinja2

    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    lead = runs[0]
    values = dict(
        runs=runs,
        method=title(lead.config),
        headline=numbers.headline(lead),
        findings=numbers.findings(runs),
        protocols=numbers.protocols(lead),
        curves=sections.curves(runs),
        attention=sections.attention(runs),
        speed=numbers.speed(lead),
        was_continued=numbers.was_continued(lead),
        counted=counted,
        config=to_yaml(lead.config),
        style=(here / "page.css").read_text(encoding="utf-8"),
        made=time.strftime("%Y-%m-%d %H:%M"),
        near_duplicate=sections.NEAR_DUPLICATE,
        same_pixels=sections.SAME_PIXELS,
        swatch=lambda number: charts.mark(number, 6, 6),
        compared=numbers.side_by_side(runs) if len(runs) > 1 else None,
    )
    return environment.get_template("page.html").render(values | _of_images(lead, quick))


def _of_images(run: Run, quick: bool) -> dict[str, object]:
    """The parts that need the run's images and features, or the sentence why there are none."""
    parts = ("gallery", "classes", "map", "duplicates")
    missing = run.images if isinstance(run.images, str) else run.features
    if isinstance(missing, str):
        return dict.fromkeys(parts, missing)
    thumbnail = Thumbnails(run.images)
    try:
        near = neighbours.nearest(run.features, 5)
        return {
            "gallery": sections.gallery(run, near, thumbnail),
            "classes": sections.classes(run, near, thumbnail),
            "map": sections.embedding_map(run, thumbnail, quick=quick),
            "duplicates": sections.duplicates(run, thumbnail),
        }
    except (ValueError, BrokenFile) as error:
        return dict.fromkeys(parts, f"Not shown: {error}.")


def _distinct(folders: Sequence[Path]) -> list[str]:
    """Short names by which the runs can be told apart."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
