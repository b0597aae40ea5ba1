"""The walls of the house: which package may import which, no circle, what stays light, how full a folder may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("check", "doctor", "embed", "evaluate", "export", "replay", "search", "train")
# From the ground up: a module may import what stands in a row below its own, or its own package.
LAYERS = (
    {"files", "console"},
    {"errors"},
    {"run_folder", "config", "compiler_cache"},
    {"data", "synthetic"},
    {"pretrained"},
    {"training"},
    {"build"},
    {"evaluation"},
    {"report"},
    {"run"},
    set(COMMANDS),
)
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}
ROOMS = ("config", "data", "evaluation", "pretrained", "report", "synthetic", "training")


def modules(*packages: str) -> dict[str, Path]:
    """Every module of ``packages`` by its dotted name; a package's is its ``__init__``."""
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


ALL = modules("engine", "ppssl", "kernels", "bench")


def imports(name: str) -> list[tuple[str, str]]:
    """(module, name) of every import of ours in module ``name``, inside functions and for types too."""
    found = []
    for node in ast.walk(ast.parse(ALL[name].read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] in ("engine", "ppssl", "kernels", "bench")
        ):
            found += [(node.module, entry.name) for entry in node.names]
        elif isinstance(node, ast.Import):
            found += [(entry.name, "") for entry in node.names if entry.name in ALL]
    return found


def targets(name: str) -> set[str]:
    """The modules that ``name`` imports; a package's face stands for itself only where something is taken from it."""
    return {f"{module}.{taken}" if f"{module}.{taken}" in ALL else module for module, taken in imports(name)} - {name}


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_no_module_imports_itself_through_others() -> None:
    # a room's face imports its modules, and they one another: the face is left out, as nothing inside may import it
    graph = {name: {t for t in targets(name) if ALL[t].name != "__init__.py"} for name in ALL if ALL[name].name != "__init__.py"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_packages_import_downwards_only() -> None:
    below = {"kernels": {"kernels"}, "ppssl": {"ppssl", "kernels"}, "engine": {"engine", "ppssl", "kernels"}}
    for name in ALL:
        allowed = below.get(name.split(".")[0], {"engine", "ppssl", "kernels", "bench"})
        assert {target.split(".")[0] for target in targets(name)} <= allowed, name


def test_rooms_import_downwards_only_and_nobody_imports_a_command() -> None:
    for name in ALL:
        for target in targets(name):
            if target.startswith("engine."):
                assert part(target) in FLOOR, f"{target} has no floor: add it to LAYERS"
                assert part(target) not in COMMANDS, f"{name} imports the command {target}"
                if name.startswith("engine.") and part(name) != part(target):
                    assert FLOOR[part(target)] < FLOOR[part(name)], f"{name} imports {target}, which does not stand below it"


def test_others_use_only_what_a_room_offers() -> None:
    for name in ALL:
        for module, taken in imports(name):
            if not name.startswith("engine.") or not module.startswith("engine.") or part(module) not in ROOMS:
                continue
            if part(name) != part(module):
                assert module.count(".") == 1, f"{name}: take {taken} from engine.{part(module)}, not from {module}"
                offered = ast.parse(ALL[module].read_text(encoding="utf-8"))
                names = [
                    ast.literal_eval(n.value) for n in offered.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"
                ]
                assert taken in names[0], f"{name}: engine.{part(module)} does not offer {taken}"
            else:
                assert module.count(".") > 1 or f"{module}.{taken}" in ALL, f"{name} imports its own room's face"


@pytest.mark.parametrize("name", ["config", "errors", "files", "run_folder", "console", "compiler_cache"])
def test_what_reads_settings_and_files_loads_no_torch(name: str) -> None:
    code = f"import sys, engine.{name}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("folder", "most"), [("engine", 22), ("ppssl", 18), ("kernels", 24), ("bench", 28)])
def test_a_folder_can_be_taken_in_at_a_glance(folder: str, most: int) -> None:
    def entries(where: Path) -> list[str]:
        tracked = subprocess.run(["git", "ls-files", "--", str(where)], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
        inside = {Path(line).relative_to(where.relative_to(ROOT)).parts[0] for line in tracked if line}
        return sorted(inside - {"README.md", "__init__.py", "py.typed"})

    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone: what is tracked cannot be told")
    assert len(entries(ROOT / folder)) <= most, entries(ROOT / folder)
    for inner in {path.parent for path in (ROOT / folder).rglob("*.py")} - {ROOT / folder}:
        assert len(entries(inner)) <= 14, (inner, entries(inner))


def test_no_module_outgrows_a_sitting() -> None:
    for name, path in ALL.items():
        if not name.endswith("_triton"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, name
