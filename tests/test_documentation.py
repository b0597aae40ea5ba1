"""The documentation names what is there: links, trees of files, and the size of the front page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [ROOT / name for name in ("engine", "ppssl", "kernels", "bench")]
PAGES = sorted([*ROOT.glob("*.md"), *(page for package in PACKAGES for page in package.rglob("README.md"))])
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def trees(page: Path) -> list[tuple[Path, set[Path]]]:
    """(folder, the entries that are named) of every annotated tree of ``page``: a block whose first line is a folder."""
    found = []
    for block in FENCE.findall(page.read_text(encoding="utf-8")):
        first, *rest = block.splitlines()
        if not re.fullmatch(r"[\w/]+/", first) or not (ROOT / first).is_dir():
            continue
        named, above = set(), [(-1, ROOT / first)]
        for line in rest:
            name = re.match(r"( *)((?:[\w.*-]+/?, )*[\w.*-]+/?)(?=  |$)", line)
            if name is None:
                continue
            depth = len(name[1])
            while above[-1][0] >= depth:
                above.pop()
            entries = [above[-1][1] / entry for entry in name[2].split(", ")]
            named |= set(entries)
            above.append((depth, entries[0]))
        found.append((ROOT / first, named))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_trees_name_every_module_and_nothing_else(page: Path) -> None:
    for folder, named in trees(page):
        assert sorted(str(path) for path in named if not list(path.parent.glob(path.name))) == []
        listed = {path for pattern in named for path in pattern.parent.glob(pattern.name)}
        opened = {path.parent for path in listed}
        missing = {module for where in opened for module in where.glob("*.py")} - listed
        assert sorted(str(path.relative_to(folder)) for path in missing) == []


def test_front_page_fits() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180
    assert [line for line in lines if len(line) > 100] == []
