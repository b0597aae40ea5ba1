"""python -m bench.methods: a miniature of two cells, its continuation, what a cell is made of, and the table's arithmetic."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy import stats

import engine
from bench.methods import __main__ as command
from bench.methods import records as tables
from bench.methods import run_cell, settings
from bench.methods import study as studies
from bench.methods.cells import STUDIES
from bench.methods.table import half_trained, holm, markdown, paired, summarize
from engine.config import history
from engine.evaluation import attention_maps
from engine.synthetic import dataset
from ppssl.method import METHODS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "methods"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset.generate(
        tmp_path_factory.mktemp("dataset") / "birds", train_per_species=2, test_per_species=2, workers=1, progress=False
    )


class Inline:
    """Stands for a process: runs here, and remembers which cells ran."""

    ran: list[str] = []

    def __init__(self, target, args):
        self.target, self.args, self.exitcode = target, args, None

    def start(self):
        Inline.ran.append(f"{self.args[0].name}/{self.args[1].seed}")

    def join(self):
        self.target(*self.args)
        self.exitcode = 0


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process, which is quicker."""
    monkeypatch.setattr(studies.multiprocessing, "get_context", lambda kind: type("Context", (), {"Process": Inline}))
    Inline.ran.clear()


@pytest.fixture
def arguments(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return [
        "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--budget", "48", "--amp", "off", "--jobs", "1",
        f"data.root={images}", "data.image_size=32", "data.loader=torch", "data.workers=0", "batch_size=16", "queue.size=32",
        "encoder.arch=resnet18_w8_s16", "encoder.dim=8",
    ]  # fmt: skip


@pytest.mark.usefixtures("inline")
def test_a_miniature_and_its_continuation(arguments: list[str], tmp_path: Path) -> None:
    two = ["--only", "moco", "--only", "lcr guided"]
    assert command.main([*two, "--seeds", "1", *arguments]) == 0
    assert Inline.ran == ["moco/10", "lcr guided/10"]
    assert command.main([*two, "--seeds", "2", *arguments]) == 0
    assert Inline.ran[2:] == ["moco/11", "lcr guided/11"]  # the first seed's cells were there
    table = json.loads((tmp_path / "out" / "main.json").read_text())
    assert table["images"] == [80] and "--seeds 2" in table["command"] and table["reference"] == "moco"
    assert table["common"]["batch_size"] == 16 and "seed" not in table["common"]
    records = {(r["cell"], r["seed"]): r for r in tables.read(tmp_path / "out" / "main.json")}
    assert len(records) == 4
    for (cell, seed), record in records.items():
        assert record["images"] == 80 and record["steps"] == 5  # at least one whole epoch
        assert record["specification"]["seed"] == seed and record["specification"]["world"]["train_per_species"] == 2
        assert record["cpu_seconds_per_epoch"] > 0 and record["peak_memory_mib"] > 10
        assert 0 <= record["rank1"] <= record["rank5"] <= 1 and 0 < record["mAP"] < 1 and 0 <= record["linear_100"] <= 1
        assert ("mask_on_bird" in record) == (cell == "lcr guided") and "linear_20" not in record  # one image per class
        assert cell == "lcr guided" or record["plain_rank1"] == record["rank1"]
        assert str(tmp_path) not in json.dumps(record)
    text = (tmp_path / "out" / "main.md").read_text()
    assert "| moco |" in text and "| lcr guided |" in text and "nothing about photographs" in text
    assert "uncorrected" in text and "planned" not in text and "CPU s/epoch" in text

    Inline.ran.clear()
    shutil.rmtree(tmp_path / "work")  # a fresh clone has the committed table alone
    assert command.main([*two, "--seeds", "3", *arguments]) == 0
    assert Inline.ran == ["moco/12", "lcr guided/12"]
    again = {(r["cell"], r["seed"]): r for r in tables.read(tmp_path / "out" / "main.json")}
    assert len(again) == 6 and all(again[key] == records[key] for key in records)
    Inline.ran.clear()
    assert command.main(["--only", "moco", "--seeds", "1", *arguments]) == 0
    assert Inline.ran == [] and len(tables.read(tmp_path / "out" / "main.json")) == 6  # nothing is lost


@pytest.mark.usefixtures("inline")
def test_cells_that_another_study_has_are_taken_over(arguments: list[str], tmp_path: Path) -> None:
    assert command.main(["--study", "negatives", "--only", "batch", "--seeds", "1", *arguments]) == 0
    shutil.rmtree(tmp_path / "work")
    Inline.ran.clear()
    two = ["--only", "moco", "--only", "moco, batch"]
    assert command.main(["--study", "stability", *two, "--seeds", "2", *arguments]) == 0
    assert sorted(Inline.ran) == ["moco, batch/11", "moco/10", "moco/11"]
    (shared,) = tables.read(tmp_path / "out" / "negatives.json")
    found = {(r["cell"], r["seed"]): r for r in tables.read(tmp_path / "out" / "stability.json")}
    assert len(found) == 4 and found["moco, batch", 10] == shared | {"cell": "moco, batch"}
    text = (tmp_path / "out" / "stability.md").read_text()  # its seeds were fixed before: claims are corrected
    assert "**Incomplete:** 2 of 12 rows, the shortest with 2 of the 16 seeds" in text
    assert "Holm's p" in text and "CPU s/run" in text


@pytest.mark.usefixtures("inline")
def test_another_specification_is_another_table(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--only", "untrained", "--seeds", "1", *arguments]
    assert command.main(one) == 0
    before = (tmp_path / "out" / "main.json").read_bytes()
    assert command.main([*one, "optim.lr=0.01"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "optim.lr 0.06, now 0.01" in said and "--out DIR" in said
    assert (tmp_path / "out" / "main.json").read_bytes() == before and Inline.ran == ["untrained/10"]
    assert command.main([*one, "optim.lr=0.01", "--out", str(tmp_path / "other")]) == 0
    assert Inline.ran == ["untrained/10"] * 2
    (tmp_path / "out" / "main.json").write_text("{}")
    assert command.main(one) == 2


@pytest.mark.usefixtures("inline")
def test_kept_cells_are_run_folders_and_a_picture(arguments: list[str], tmp_path: Path) -> None:
    asked = ["--only", "moco", "--only", "lcr guided", "--seeds", "1", "--keep", *arguments]
    assert command.main(asked) == 0
    folders = sorted(p for p in (tmp_path / "work" / "main").iterdir() if p.is_dir())
    assert [p.name.rsplit("-", 2)[0] for p in folders] == ["lcr_guided", "moco"]
    for folder in folders:
        assert engine.load(folder).trunk.channels == 64 and attention_maps.read(folder).looks[-1].step == 5
    with Image.open(tmp_path / "out" / "main.jpg") as sheet:
        # eight images; the image, the feature map and the CAM of both methods, the mask of one
        assert sheet.width == 6 * (96 + 8) + 8 and sheet.height > 8 * 96


def test_a_cell_is_a_process_of_its_own(arguments: list[str], tmp_path: Path) -> None:
    assert command.main(["--only", "untrained", "--seeds", "1", *arguments]) == 0
    (record,) = tables.read(tmp_path / "out" / "main.json")
    assert record["rank1"] >= 0 and "steps" not in record and record["torch"] == torch.__version__


@pytest.mark.parametrize(("text", "remedy"), [("epochs=2", "--budget"), ("amp=bf16", "--amp"), ("seeed=1", "seed")])
def test_a_key_that_the_study_sets_itself_is_refused(text: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse([text])
    assert remedy in capsys.readouterr().err


def test_every_cell_of_every_study_is_a_config_of_a_known_method(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = command.parse(["--budget", "51200"])
    monkeypatch.setattr(studies, "weights_file", lambda: Path(settings.WEIGHTS))
    monkeypatch.setattr(studies, "weights_sha256", lambda: "of the file")
    everything = [(name, study) for name, setting in settings.SETTINGS.items() for study in setting.studies.values()]
    for args.setting, study in everything:
        names = [cell.name for cell in study.cells]
        assert len(set(names)) == len(names) and study.reference in names
        labels = {name.replace(" ", "_").replace(",", "") for name in names}
        assert len(labels) == len(names)  # each has a file of its own
        configs = [studies.configure(cell, args, 3, images) for cell in study.cells]
        pairs = zip(study.cells, configs, strict=True)
        specs = {(cell.budget, json.dumps(studies.specification(cell, cfg), sort_keys=True)) for cell, cfg in pairs}
        assert len(specs) == len(configs)  # no two cells are the same run
        assert study.floor in (None, *names)
        assert all(cfg.method.name in METHODS and cfg.seed == 3 and cfg.amp == "bf16" for cfg in configs)
    assert {c.overrides["method.name"] for c in STUDIES["main"].cells} == set(METHODS)
    assert len(STUDIES["weights"].cells) == 12 and len(STUDIES["layers"].cells) == 8
    assert studies.epochs_of(51200, 1600, 64) == 32 and studies.epochs_of(0.5 * 51200, 1600, 64) == 16
    assert studies.epochs_of(100, 1600, 64) == 1


COMMITTED = [name for name in STUDIES if (RESULTS / f"{name}.json").is_file()]


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_studies_are_what_the_pinned_recipe_still_means(name: str) -> None:
    table = json.loads((RESULTS / f"{name}.json").read_text())
    argv = shlex.split(table["command"].replace("--world", "--dataset-seed"))  # the option's name when the study was made
    args = command.parse(argv[3:])
    cells = {cell.name: cell for cell in STUDIES[name].cells}
    assert len(table["records"]) >= 14
    for record in tables.whole(table):
        stored = dict(record["specification"])
        drawn = dict(version=dataset.VERSION, seed=args.dataset_seed, train_per_species=40, test_per_species=30)
        assert stored.pop("world") == drawn
        plan = studies.planned(name, cells[record["cell"]], args, record["seed"], Path("not drawn"), 40 * len(dataset.SPECIES))
        for key, value in stored.items():
            key = history.KEYS.get(key, key)
            value = history.VALUES.get((key, value), value) if isinstance(value, str) else value
            assert plan.specification[key] == value, key
        # so that more seeds are added to this very table
        assert [*tables.differences(stored, plan.specification | {"world": None})] == []


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_tables_are_those_of_their_records(name: str) -> None:
    text = (RESULTS / f"{name}.json").read_text()
    table = json.loads(text)
    assert text == tables.one_record_per_line(table) and len(text.splitlines()) < 30 + len(table["records"])
    rows = summarize(table["records"], [cell.name for cell in STUDIES[name].cells], table["reference"], STUDIES[name].floor)
    assert studies.page(table | {"rows": rows}) == studies.page(table) == (RESULTS / f"{name}.md").read_text()


def test_class_names_are_descriptions_that_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppssl.teacher import load_descriptions

    monkeypatch.chdir(settings.ROOT)
    cells = {cell.name: cell.overrides for cell in STUDIES["prompts"].cells}
    assert load_descriptions(cells["8 class names"]["ais.prompts"], 8)[0] == "a bird"
    for count in (2, 4, 6, 8, 10):
        assert len(load_descriptions("birds", cells[f"{count} descriptions"]["ais.count"])) == count


def test_altered_teachers() -> None:
    rows, labels = torch.nn.functional.normalize(torch.randn(50, 16), dim=1).half(), torch.arange(50) % 5
    assert run_cell.altered(rows, "true", 0, labels) is rows
    shuffled = run_cell.altered(rows, "shuffled", 1, labels)
    assert not torch.equal(shuffled, rows) and torch.equal(shuffled.sort(0).values, rows.sort(0).values)
    assert torch.equal(shuffled, run_cell.altered(rows, "shuffled", 1, labels))
    constant = run_cell.altered(rows, "constant", 0, labels)
    assert constant.shape == rows.shape and constant.dtype == rows.dtype and (constant == constant[0]).all()
    assert float(constant[0].float().norm()) == pytest.approx(1.0, abs=1e-3)
    species = run_cell.altered(rows, "species", 0, labels)
    assert species.dtype == rows.dtype and species.float().norm(dim=1).sub(1).abs().max() < 1e-3
    same = labels[:, None] == labels
    cosine = species.float() @ species.float().T
    assert cosine[same].min() > 0.999 > cosine[~same].max()
    assert torch.equal(species, run_cell.altered(rows, "species", 0, labels))
    assert not torch.equal(species, run_cell.altered(rows, "species", 1, labels))


def record(cell: str, seed: int, rank1: float, **more) -> dict:
    return {"cell": cell, "seed": seed, "rank1": rank1, "mAP": rank1 / 2, "cpu_seconds_per_epoch": 2.0, "commit": "c"} | more


def test_paired_differences_are_students_over_common_seeds() -> None:
    ours, theirs = {1: 0.30, 2: 0.34, 3: 0.31, 9: 0.9}, {1: 0.25, 2: 0.33, 3: 0.29, 8: 0.1}
    found = paired(ours, theirs)
    differences = [0.05, 0.01, 0.02]
    assert found["seeds"] == found["higher"] == 3 and found["difference"] == pytest.approx(sum(differences) / 3)
    t, p = stats.ttest_1samp(differences, 0)
    assert found["p"] == pytest.approx(p)
    error = found["difference"] / t
    quantile = 4.302652729911275  # of Student's t with two degrees of freedom, 97.5 %
    assert found["interval"] == pytest.approx([found["difference"] - quantile * error, found["difference"] + quantile * error])
    assert paired({1: 0.5}, {1: 0.25}) == {"seeds": 1, "higher": 1, "difference": 0.25, "interval": None, "p": None}
    assert paired({1: 0.5, 2: 0.5}, {1: 0.5, 2: 0.5})["p"] is None  # equal runs prove nothing
    assert paired({1: 0.5}, {2: 0.5})["difference"] is None


def test_rows_are_means_spreads_and_failures_in_the_studys_order() -> None:
    looks = {"plain_rank1": 0.3, "silhouette_rank1": 0.5, "mask_on_bird": 1.5}
    records = [
        record("b", 1, 0.2), record("b", 2, 0.4), record("a", 1, 0.1), record("a", 2, 0.2, **looks),
        {"cell": "c", "seed": 1, "failed": "step 3: not finite", "commit": "c"},
    ]  # fmt: skip
    rows = summarize(records, ["a", "b", "c", "never run"], reference="a")
    assert [row["cell"] for row in rows] == ["a", "b", "c"]
    a, b, c = rows
    assert a["measures"]["rank1"] == {"mean": pytest.approx(0.15), "deviation": pytest.approx(math.sqrt(0.005))}
    assert a["measures"]["plain_rank1"] == {"mean": 0.3, "deviation": None} and a["against"] == {}
    assert a["measures"]["mask_gain"]["mean"] == pytest.approx(-0.1)
    assert a["measures"]["silhouette_gain"]["mean"] == pytest.approx(0.2)
    assert b["against"]["rank1"]["difference"] == pytest.approx(0.15) and b["seeds"] == [1, 2]
    assert c["seeds"] == [] and c["failed"] == {1: "step 3: not finite"} and c["against"]["rank1"]["difference"] is None
    reached, looked = (part.splitlines() for part in markdown(rows, "a").split("\n\n"))
    for lines in (reached, looked):
        assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "15.0 ± 7.1" in reached[2] and "+15.0 (2 of 2, p " in reached[3] and "1 failed" in reached[4]
    assert "linear" not in reached[0] and "CPU s/epoch" in reached[0]
    assert "| 30.0 | -10.0 | +20.0 | 1.50 | – |" in looked[2] and "CPU" not in looked[0]


def test_holms_p_is_that_of_the_closed_testing_procedure() -> None:
    # the adjusted p of a hypothesis: the largest Bonferroni p of all intersections that it is part of
    for p in ([0.01, 0.02, 0.03, 0.04, 0.05], [0.3, 0.001, 0.02, 0.02, 0.9, 0.004], [0.2], []):
        every = [subset for n in range(1, len(p) + 1) for subset in itertools.combinations(range(len(p)), n)]
        expected = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in every if i in s) for i in range(len(p))]
        assert holm(p) == pytest.approx(expected)
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])  # R: p.adjust(p, "holm")


def test_p_values_are_corrected_over_the_rows_of_a_measure() -> None:
    noise = {1: 0.0, 2: 0.011, 3: -0.004, 4: 0.006}
    records = [record("a", seed, 0.2 + x) for seed, x in noise.items()]
    records += [record("b", seed, 0.25 - x) for seed, x in noise.items()] + [
        record("c", seed, 0.21 - x) for seed, x in noise.items()
    ]
    records.append(record("without", None, 0.1))  # no seed: compared with each seed of the reference
    rows = {row["cell"]: row for row in summarize(records, ["without", "a", "b", "c"], reference="a")}
    against = {name: rows[name]["against"]["rank1"] for name in ("without", "b", "c")}
    assert against["without"]["seeds"] == 4 and against["without"]["difference"] == pytest.approx(-0.1 - sum(noise.values()) / 4)
    assert against["without"]["p"] == pytest.approx(stats.ttest_1samp([0.2 + x for x in noise.values()], 0.1).pvalue)
    assert rows["without"]["measures"]["rank1"] == {"mean": 0.1, "deviation": None} and rows["without"]["seeds"] == []
    p = [found["p"] for found in against.values()]
    assert [found["holm"] for found in against.values()] == pytest.approx(holm(p)) and holm(p) != pytest.approx(p)
    plain, corrected = (markdown([*rows.values()], "a", photographs) for photographs in (False, True))
    assert "Holm" not in plain and f", Holm {against['c']['holm']:.3f})" in corrected


def test_half_trained_seeds_lie_below_the_middle_of_the_floor_and_the_median() -> None:
    assert half_trained([0.5, 0.48, 0.27, 0.52, 0.1], floor=0.1) == 2  # below 0.29
    records = [record("untrained", seed, 0.1) for seed in range(3)]
    records += [record("a", seed, rank1) for seed, rank1 in enumerate((0.5, 0.2, 0.4))]
    rows = summarize(records, ["untrained", "a"], "a", floor="untrained")
    assert "half_trained" not in rows[0] and rows[1]["half_trained"] == 1
    assert "| 3, 1 half trained |" in markdown(rows, "a")


def test_differences_of_specifications() -> None:
    wanted = {
        "optim.lr": 0.1,
        "method.variant": "guided",
        "eval.validation": None,
        "kind": "train",
        "variant": {"iadm.sign": "minus"},
    }
    assert [*tables.differences({"optim.lr": 0.1, "method.form": "guided", "kind": "train"}, wanted)] == []  # a former name
    assert [*tables.differences({"optim.lr": 0.2, "kind": "train"}, wanted)] == [
        "method.variant published, now guided", "optim.lr 0.2, now 0.1",
    ]  # fmt: skip
    assert [*tables.differences(wanted | {"images": {"train": 3}}, wanted)] == ["images {'train': 3}, now None"]
    assert [*tables.differences(wanted | {"variant": {"iadm.sign": "plus"}}, wanted)] != []
    records = [{"cell": "a", "seed": seed, "specification": {"x": 1, "seed": seed}} for seed in (1, 2)]
    assert tables.compact(records)["common"] == {"x": 1} and tables.whole(tables.compact(records)) == records
    assert tables.whole({"records": records}) == records  # of before there was a common part


def test_the_command_that_a_table_states_makes_all_of_it_anywhere() -> None:
    argv = ["--study", "parts", "--only", "guided whole", "--out", "/a", "--work=/b", "--seeds", "3", "optim.lr=0.1"]
    stated = "python -m bench.methods --study parts --seeds 3 optim.lr=0.1"
    assert command.command_of(argv) == stated
    assert command.parse(argv).seeds == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--only", "nothing"], ["--only 'nothing'", "ppssl guided"]),
        (["--seeds", "0"], ["--seeds 0"]),
        (["--world", "2"], ["--world is called --dataset-seed now"]),
        (["--world=2"], ["--world is called --dataset-seed now"]),
        (["optim.lrr=1"], ["optim.lrr=1", "did you mean optim.lr?"]),
        (["--study", "nothing"], ["--study 'nothing'", "synthetic's: main, choice"]),
        (["--setting", "cars-finetune", "--study", "masks"], ["'masks'", "cars-finetune's: main, target"]),
        (["--tune"], ["--tune is for photographs"]),
        (["--data", "/x"], ["--data is for photographs", "cub-finetune"]),
        (["--setting", "cub-finetune", "--first-seed", "3"], ["--first-seed 3", "below 10 are for --tune"]),
        (["--setting", "cub-finetune", "--tune", "--first-seed", "10"], ["--first-seed 10"]),
        (["--setting", "cub-finetune", "--tune", "--seeds", "11"], ["--seeds 11"]),
    ],
)
def test_bad_arguments_are_named(given: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        command.main(given)
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert all(word in shown for word in words)


def test_a_value_out_of_range_ends_with_code_2(arguments: list[str]) -> None:
    assert command.main([*arguments, "optim.lr=-1"]) == 2


@pytest.mark.usefixtures("inline")
def test_a_cell_that_diverges_is_recorded_as_such(arguments: list[str], tmp_path: Path) -> None:
    assert command.main(["--only", "moco", "--seeds", "1", *arguments, "optim.lr=1e30"]) == 0
    (found,) = json.loads((tmp_path / "out" / "main.json").read_text())["records"]
    assert "not finite" in found["failed"] and "rank1" not in found
