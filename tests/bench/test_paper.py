"""``python -m bench.paper``: every cell is a valid run, made once, shared and resumed; claims stand beside numbers."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import miniatures
import pytest
from PIL import Image

from bench.paper import __main__ as command
from bench.paper import cells as cells_of
from bench.paper import figures
from bench.paper.__main__ import main
from bench.paper.exhibits import Cell, Claim, Exhibit, Outcome, Plan, Row, cells, exhibits, obstacle
from bench.paper.tables import compare, spread
from engine import run
from engine.config import flatten
from engine.synthetic import dataset
from engine.training import Stopped
from ppssl import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:.*official split")
TINY = [
    "encoder.arch=resnet18_w8_s16",
    "encoder.weights=none",
    "encoder.dim=8",
    "queue.size=20",
    "batch_size=8",
    "epochs=1",
    "data.image_size=32",
    "data.loader=torch",
    "data.workers=0",
    "eval.batch_size=40",
    "teacher.model=birds",
    "teacher.weights=birds",
]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic dataset in the place of CUB, whose layout it has."""
    root = tmp_path_factory.mktemp("data")
    dataset.generate(root / "cub", train_per_species=1, test_per_species=2, workers=1, progress=False)
    return root


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def exhibit(*rows: Row, **changes) -> Exhibit:
    made = Exhibit("table 9", "a title", ("cub",), ("rank1", "mAP"), rows, ())
    return replace(made, **changes)


MOCO = Row("MoCo", {"method.name": "moco"})


@pytest.fixture(scope="module")
def planned() -> dict[str, list[Cell]]:
    """All that is asked for, one seed."""
    return {key: list(cells(entry, Plan(Path("data"), Path("out"), 1, ()))) for key, entry in exhibits().items()}


def test_every_cell_of_every_exhibit_is_a_valid_run(planned: dict[str, list[Cell]]) -> None:
    known = exhibits()
    assert list(known) == [f"table {n}" for n in range(1, 7)] + ["figure 3", "figure 5"]
    for key, entry in known.items():
        found = planned[key]
        assert all(cell.config.method.name in METHODS for cell in found)
        assert len({cell.folder for cell in found}) == len(found) == len(entry.data) * len(entry.rows)
        names = [row.name for row in entry.rows]
        assert len(set(names)) == len(names)
        for claim in entry.claims:
            assert {claim.row, *claim.over} <= set(names) and claim.data in entry.data and claim.measure in entry.measures
            assert (claim.value is None) == (claim.gain is not None) == bool(claim.over)
    (names,) = (cell for cell in planned["table 5"] if cell.row.name == "class names")
    assert Path(names.config.ais.prompts).is_file() and names.folder.parent.name.endswith("class_names.yaml")


def test_the_published_gains_are_the_claims_of_the_tables() -> None:
    known = exhibits()
    gains = {(key, c.data, c.measure): c.gain for key, e in known.items() for c in e.claims if c.gain is not None}
    assert gains == {
        ("table 1", "cub", "rank1"): 8.78, ("table 1", "cars", "rank1"): 4.79, ("table 1", "aircraft", "rank1"): 3.48,
        ("table 4", "cub", "rank1"): 6.28, ("table 4", "cub", "rank5"): 7.21,
    }  # fmt: skip


def test_exhibits_share_the_papers_own_run(planned: dict[str, list[Cell]]) -> None:
    wanted = Path("out/cub/recipe/seed0")
    for key in ("table 1", "table 2", "table 4", "table 5", "table 6", "figure 3", "figure 5"):
        assert wanted in [cell.folder for cell in planned[key]]


def test_overrides_reach_every_run_and_its_name() -> None:
    (cell,) = cells(exhibit(MOCO), Plan(Path("data"), Path("out"), 1, ("epochs=7", "data.workers=3")))
    assert (cell.config.epochs, cell.config.data.workers, cell.config.data.root) == (7, 3, "data/cub")
    assert cell.folder == Path("out/cub/epochs=7,method.name=moco/seed0")
    long = Row("long", {"encoder.weights": 150 * "w", "method.name": "moco"})
    others = [next(cells(exhibit(long), Plan(Path("data"), Path("out"), 1, (word,)))) for word in ("epochs=7", "epochs=8")]
    assert len({c.folder.parent.name for c in others}) == 2 and all(len(c.folder.parent.name) < 130 for c in others)
    seeds = list(cells(exhibit(MOCO), Plan(Path("data"), Path("out"), 3, ())))
    assert [c.config.seed for c in seeds] == [0, 1, 2] and len({c.folder for c in seeds}) == 3
    initial = exhibit(Row("initial", untouched="initial"))
    assert len(list(cells(initial, Plan(Path("data"), Path("out"), 3, ())))) == 1
    assert len(list(cells(initial, Plan(Path("data"), Path("out"), 3, ("encoder.weights=none",))))) == 3


def test_a_table_is_run_once_and_read_afterwards(
    data_root: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched = (Row("initial weights", untouched="initial"), Row("teacher", untouched="teacher"))
    table = exhibit(*untouched, MOCO, Row("absent", {"method.name": "byol9"}))
    monkeypatch.setattr(command, "exhibits", lambda: {"table 9": table})
    argv = ["--table", "9", "--data-root", str(data_root), "--seeds", "2", *TINY]
    assert main(argv) == 0
    first = {c["row"]: c["seeds"] for c in json.loads(Path("runs/paper/table9.json").read_text())["cells"]}
    monkeypatch.setattr(run, "train", lambda *_a, **_k: pytest.fail("trained again"))
    more = replace(table, measures=("rank1", "mAP", "linear 100 %", "linear 20 %"))
    monkeypatch.setattr(command, "exhibits", lambda: {"table 9": more})
    capfd.readouterr()
    assert main(argv) == 0  # another exhibit with these runs: evaluated by more measures, not trained
    said = " ".join(capfd.readouterr().err.split())
    assert "absent: method byol9 is not registered" in said and "± standard deviation over 2 seeds" in said
    kept = json.loads(Path("runs/paper/table9.json").read_text())
    outcomes = {c["row"]: c for c in kept["cells"]}
    assert [len(outcomes[r]["seeds"]) for r in ("initial weights", "teacher", "MoCo", "absent")] == [2, 1, 2, 0]
    for row in ("initial weights", "teacher", "MoCo"):
        for measures, before in zip(outcomes[row]["seeds"], first[row], strict=True):
            assert 0 <= measures["rank1"] <= 1 and 0 < measures["mAP"] <= 1 and before.items() <= measures.items()
            assert 0 <= measures["linear 20 %"] <= 1 and 0 < measures["linear 100 %"] <= 1
    records = json.loads(next(Path("runs/paper").rglob("teacher*/seed0/evaluation.json")).read_text())
    assert [(r["model"], r["protocol"], r.get("solver")) for r in records[-2:]] == [("teacher", "linear", "sgd")] * 2
    assert outcomes["MoCo"]["seeds"][0] != outcomes["MoCo"]["seeds"][1]
    assert len(list(Path("runs/paper").rglob("weights.safetensors"))) == 4

    monkeypatch.setattr(cells_of, "evaluate_features", lambda *_a, **_k: pytest.fail("evaluated again"))
    assert main(argv) == 0
    assert json.loads(Path("runs/paper/table9.json").read_text()) == kept


def test_a_stopped_command_continues(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = exhibit(MOCO)
    monkeypatch.setattr(command, "exhibits", lambda: {"table 9": table})
    argv = ["--table", "9", "--data-root", str(data_root), "--seeds", "2", *TINY]
    trained, train_it = [], run.train

    def stop_at_the_second(config, out, started):
        trained.append(config.seed)
        if trained == [0, 1]:
            raise Stopped(signal.SIGTERM, None)
        return train_it(config, out, started)

    monkeypatch.setattr(run, "train", stop_at_the_second)
    assert main(argv) == 75
    assert main(argv) == 0 and trained == [0, 1, 1]  # the first seed is not trained again


def test_a_failed_cell_leaves_the_others_alone(
    data_root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    table = exhibit(Row("broken", {"encoder.arch": "resnet19"}), MOCO)
    monkeypatch.setattr(command, "exhibits", lambda: {"table 9": table})
    tiny = [word for word in TINY if not word.startswith("encoder.arch")]
    monkeypatch.setattr(run, "train", lambda config, *_: (_ for _ in ()).throw(ValueError(f"arch {config.encoder.arch}")))
    assert main(["--table", "9", "--data-root", str(data_root), "--seeds", "1", *tiny]) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "broken: failed: arch resnet19" in said and "MoCo: failed: arch resnet50" in said


def test_missing_data_is_a_remark_not_an_error(capfd: pytest.CaptureFixture) -> None:
    assert main(["--table", "1", "--seeds", "1"]) == 0
    said = " ".join(capfd.readouterr().err.split())
    for name in ("cub", "cars", "aircraft"):
        assert f"no data: data/{name} is not there" in said
    assert "PP-SSL rank1 +8.78 over the better of LCR and OLDFS (arXiv 2412.00134); here not measured" in said
    assert not list(Path().rglob("weights.safetensors"))


def test_claims_are_compared_with_what_was_found() -> None:
    found = {
        ("LCR", "cub"): Outcome([{"rank1": 0.40}, {"rank1": 0.42}], None),
        ("OLDFS", "cub"): Outcome([{"rank1": 0.30}], None),
        ("PP-SSL", "cub"): Outcome([{"rank1": 0.45}, {"rank1": 0.47}], None),
    }
    gain = Claim("PP-SSL", "cub", "rank1", "somebody", gain=8.78, over=("LCR", "OLDFS"))
    assert compare(gain, found).endswith("+8.78 over the better of LCR and OLDFS (somebody); here +5.00")
    assert compare(Claim("LCR", "cub", "rank1", "somebody", value=71.31), found).endswith("71.31 (somebody); here 41.00")
    del found["OLDFS", "cub"]
    assert compare(gain, found).endswith("here not measured")
    assert (spread([]), spread([41.0]), spread([40.0, 42.0])) == ("–", "41.00", "41.00 ± 1.41")


def test_dry_run_tries_every_cell_and_keeps_nothing(data_root: Path, capfd: pytest.CaptureFixture) -> None:
    before = sorted(Path().rglob("*"))
    assert main(["--figure", "3", "--data-root", str(data_root), "--dry-run", *TINY]) == 0
    assert sorted(Path().rglob("*")) == before
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("one step on 8 images") == 2 and "all rows: one step done" in said


def test_dry_runs_on_miniatures_of_all_seven_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    for name in miniatures.MAKERS:
        miniatures.make(name, tmp_path / "sets" / name)
    table = exhibits()["table 1"]
    everywhere = replace(table, data=tuple(miniatures.MAKERS), rows=(Row("PP-SSL"),), claims=())
    small = ["batch_size=2", "queue.size=4", "encoder.arch=resnet18_w4_s16", "data.image_size=16", "method.maxout_width=4"]
    for chosen, runs in ((everywhere, 7), (replace(table, data=("cub",), rows=table.rows[:-1], claims=()), 2)):
        monkeypatch.setattr(command, "exhibits", lambda chosen=chosen: {"table 1": chosen})
        assert main(["--table", "1", "--data-root", str(tmp_path / "sets"), "--dry-run", *TINY, *small]) == 0
        said = " ".join(capfd.readouterr().err.split())
        assert said.count("one step on 2 images") == runs and "failed" not in said and "no data" not in said
    assert not list(tmp_path.rglob("weights.safetensors"))


def test_the_pictures(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--figure", "3", "--data-root", str(data_root), "--seeds", "1", *TINY]) == 0
    with Image.open("runs/paper/figure3_cub.png") as picture:
        assert picture.width > 3 * 160 and picture.height > figures.IMAGES * 160

    counts = exhibits()["figure 5"]
    found = {(row.name, "cub"): Outcome([{"rank1": 0.4}, {"rank1": 0.5}], None) for row in counts.rows[:4]}
    figures.curve(counts, "cub", found, Path("curve.png"))
    with Image.open("curve.png") as picture:
        assert picture.width > 600


def test_bad_lines_are_refused(capfd: pytest.CaptureFixture) -> None:
    for argv, word in (
        (["--table", "7"], "invalid choice"),
        ([], "required"),
        (["--table", "1", "--seeds", "0"], "--seeds 0"),
        (["--table", "1", "epochz=3"], "epochs"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2 and word in capfd.readouterr().err


def test_obstacles_name_what_is_missing(data_root: Path) -> None:
    (cell,) = cells(exhibit(MOCO), Plan(data_root, Path("out"), 1, ()))
    assert obstacle(cell) is None
    assert set(flatten(cell.config)) >= {"method.name"}
    assert "cars is not there" in obstacle(cell._replace(config=replace(cell.config, data=replace(cell.config.data, root="cars"))))
