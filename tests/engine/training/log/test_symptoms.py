"""Symptoms: each is found where it is, once, and none in healthy runs; the table of the README is in step with them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from engine.training.log import symptoms
from engine.training.log.symptoms import SYMPTOMS, Facts, Watch, facts, found

ROOT = Path(__file__).resolve().parents[4]
HEALTHY = json.loads((ROOT / "tests/fixtures/healthy_runs.json").read_text(encoding="utf-8"))
"""Runs of demo.yaml (14 epochs) and of each other method under its settings (4 epochs)."""
MOCO = {"method.name": "moco", "batch_size": 128, "queue.size": 4096, "ema.decay": 0.999, "epochs": 20, "amp": None}
PER_EPOCH = 100


def line(step: int, **values: Any) -> dict[str, Any]:
    """A log line of a healthy run, but for ``values``."""
    contrast = 8.0 - 2 * step / 2000
    usual = {
        "loss": contrast, "contrast": contrast, "contrast_top1": 0.3, "contrast_ties": 0.0, "spread": 0.8, "grad_norm": 1.0,
        "skipped": 0, "lr": 0.03, "data_wait": 0.02, "seconds": float(step),
    }  # fmt: skip
    made = {"kind": "train", "step": step, "epoch": step // PER_EPOCH} | usual | values
    return {name: value for name, value in made.items() if value is not None}


def run(steps: int = 2000, every: int = 10, **values: Any) -> list[dict[str, Any]]:
    """Lines of a run; ``values`` are numbers, or functions of the step."""
    made = range(every, steps + 1, every)
    return [line(s, **{k: v(s) if callable(v) else v for k, v in values.items()}) for s in made]


def names(records: list[dict[str, Any]], about: Facts | None = None, **settings: Any) -> list[str]:
    about = about or facts(MOCO | settings, steps_per_epoch=PER_EPOCH)
    return [finding.symptom.name for finding in found(records, about)]


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("part", [1.0, 0.5, 0.1])
def test_healthy_runs_have_none(name: str, part: float) -> None:
    """Whole, and as they stood while they ran."""
    settings, records = HEALTHY[name]["settings"], HEALTHY[name]["records"]
    about = facts(settings, steps_per_epoch=records[0]["steps_per_epoch"])
    assert about.total_steps in (100, 350) and len(records) >= 15
    assert found(records[: round(part * len(records))], about) == []


@pytest.mark.parametrize("name", ["moco", "simclr", "byol", "ldfs", "somebodys"])
def test_the_same_healthy_lines_are_healthy_for_every_method(name: str) -> None:
    assert names(run(), **{"method.name": name}) == []
    without = run(contrast=None, contrast_top1=None, contrast_ties=None, spread=None)
    assert names(without, **{"method.name": name}) == [] and names(without, about=Facts()) == []


def first_step(records: list[dict[str, Any]], name: str, **settings: Any) -> int:
    (finding,) = [f for f in found(records, facts(MOCO | settings, steps_per_epoch=PER_EPOCH)) if f.symptom.name == name]
    return finding.step


def test_a_collapsed_feature_and_what_follows_from_it() -> None:
    chance = math.log(4097)
    dead = run(spread=lambda s: 0.8 if s < 200 else 0.001, contrast=chance, loss=chance, contrast_top1=0.0)
    assert names(dead) == ["collapsed feature"] and first_step(dead, "collapsed feature") == 200
    evaluated = {"kind": "eval", "step": 0, "epoch": 0, "spread": 0.001}
    assert names([evaluated, *run()]) == []  # random weights tell little apart
    assert names([*run(), evaluated | {"step": 2000}]) == ["collapsed feature"]


@pytest.mark.parametrize(
    ("method", "logits"), [("moco", 4097), ("ppssl", 4097), ("lcr", 4097), ("ldfs", 4097), ("simclr", 255), ("byol", None)]
)
def test_a_loss_that_stays_at_chance(method: str, logits: int | None) -> None:
    if logits is None:
        stuck = run(contrast=None, contrast_top1=None, loss=4.0)
        assert names(stuck, **{"method.name": method}) == ["loss does not fall"]  # chance is no number of BYOL's
        return
    chance = math.log(logits)
    stuck = run(contrast=lambda s: chance * (1 + 0.005 * math.sin(s)), loss=lambda s: chance, contrast_top1=0.001)
    assert names(stuck, **{"method.name": method}) == ["loss at chance"]
    (finding,) = found(stuck, facts(MOCO | {"method.name": method}, steps_per_epoch=PER_EPOCH))
    assert f"log({logits:,}) = {chance:.3f}" in finding.seen and finding.step <= 400
    passing = run(contrast=lambda s: chance * (1 + 0.3 * (1000 - s) / 1000), contrast_top1=0.1)
    assert names(passing, **{"method.name": method}) == []


def test_a_loss_that_does_not_fall() -> None:
    assert names(run(contrast=lambda s: 6 + 0.0002 * s)) == ["loss does not fall"]
    assert names(run(contrast=lambda s: 6.0)) == ["loss does not fall"]
    # first it rises as the queue fills, then it falls: by less than a fifth, and slowly
    assert names(run(contrast=lambda s: 4 + min(s, 300) / 100 - max(0, s - 300) / 1700)) == []
    assert names(run(steps=250, contrast=lambda s: 6 + s / 100)) == []  # too early to tell
    falls_at_once = run(contrast=None, contrast_top1=None, loss=lambda s: 1.5 + 2.5 * math.exp(-s / 60) + s / 4000)
    assert names(falls_at_once, **{"method.name": "byol"}) == []  # and rises slowly afterwards, as BYOL's does


def test_queues() -> None:
    (finding,) = found(run(), facts(MOCO | {"queue.size": 131_072 * 2}, steps_per_epoch=PER_EPOCH))
    assert finding.symptom.name == "queue longer than the run" and "takes 2,048 steps" in finding.seen
    assert names(run(), **{"queue.size": 65536}) == []  # 512 of 2000 steps
    assert "for 51 % of its steps" in found(run(), facts(MOCO | {"queue.size": 131_072}, steps_per_epoch=PER_EPOCH))[0].seen
    (finding,) = found(run(), facts(MOCO | {"queue.size": 65536, "ema.decay": 0.9}, steps_per_epoch=PER_EPOCH))
    assert finding.symptom.name == "stale queue" and "512 steps (5.1 epochs) old" in finding.seen and "in 10 (" in finding.seen
    assert names(run(), **{"ema.decay": 0.0}) == ["stale queue"]
    for settings in ({"ema.decay": 0.0}, {"queue.size": 2**20}):
        for method in ("simclr", "byol"):
            assert names(run(), **settings, **{"method.name": method}) == []


def test_what_is_told_of_the_contrast_and_its_queue_is_of_the_run_s_own() -> None:
    long = {"queue.size": 2**18}
    assert names(run(), **long) == ["queue longer than the run"]
    assert names(run(), **long, **{"contrast.negatives": "batch"}) == []  # the report knows the key's value, no queue is kept
    assert names(run(), **long, **{"contrast.negatives": "batch", "method.name": "ldfs"}) == ["queue longer than the run"]
    assert names(run(), **long, **{"queue.start": "empty"}) == []  # no random row is a negative
    assert facts(MOCO | {"contrast.symmetric": True}).filled == facts(MOCO).filled / 2 == 16
    assert names(run(), **{"ema.decay": 0.0, "contrast.gradient": "both"}) == []  # there is no key network
    (finding,) = found(run(contrast=math.log(128)), facts(MOCO | {"contrast.negatives": "batch"}, steps_per_epoch=PER_EPOCH))
    assert finding.symptom.name == "loss at chance" and "log(128)" in finding.seen
    assert facts(MOCO | {"contrast.negatives": "both"}).logits == 128 + 4096


def test_a_contrast_that_is_solved_at_once() -> None:
    name = "contrast solved at once"
    assert names(run(contrast_top1=1.0)) == [name]
    assert first_step(run(contrast_top1=1.0), name) == 50  # the queue holds 32 batches; the line at 40 began before that
    assert names(run(contrast_top1=lambda s: 1.0 if s <= 32 else 0.4)) == []  # against random rows
    assert names(run(contrast_top1=lambda s: min(1.0, s / 1900))) == []  # learned
    assert first_step(run(contrast_top1=1.0), name, **{"method.name": "simclr"}) == 10
    assert names(run(contrast_top1=1.0), **{"method.name": "simclr", "batch_size": 8}) == []  # of 15 logits
    assert names(run(contrast_top1=1.0), **{"method.name": "byol"}) == []


def test_learning_rates() -> None:
    assert names(run(lr=0.0)) == ["learning rate 0"]
    assert names(run(lr=lambda s: 0.03 if s != 10 else 0.0)) == []  # a warm-up
    assert names(run(lr=lambda s: 0.03 if s != 2000 else 0.0)) == []  # the end of a cosine
    assert names([line(2000, lr=0.0)]) == ["learning rate 0"]  # the only line


def test_gradients() -> None:
    assert names(run(grad_norm=lambda s: 1.0 if s < 700 else 3.0 ** ((s - 690) / 10))) == ["exploding gradient"]
    assert names(run(grad_norm=lambda s: 50.0 if s == 500 else 1.0)) == []
    infinite = run(grad_norm=math.inf)
    assert names(infinite, amp="fp16") == ["fp16 overflow"] and first_step(infinite, "fp16 overflow", amp="fp16") == 50
    assert names(run(grad_norm=lambda s: math.inf if s % 50 == 10 else 1.0), amp="fp16") == []


def test_waiting_for_data() -> None:
    assert names(run(data_wait=0.7)) == ["waiting for data"]
    assert first_step(run(data_wait=0.7), "waiting for data") == 150  # the first epoch does not count
    assert names(run(data_wait=lambda s: 0.9 if s <= PER_EPOCH else 0.1)) == []
    assert names(run(data_wait=lambda s: 0.9 if s % 100 == 0 else 0.1)) == []  # the ends of epochs
    assert names(run(data_wait=0.7, seconds=lambda s: s / 1000)) == []  # two seconds are no trend
    resumed = run(data_wait=0.7, seconds=lambda s: float(s if s < 130 else s - 125))  # the clock of the second process
    assert names(resumed) == ["waiting for data"]


def test_skipped_steps() -> None:
    assert names(run(skipped=lambda s: 10 if s == 500 else 0, loss=lambda s: None if s == 500 else 5.0)) == ["skipped steps"]
    assert names(run(skipped=lambda s: 6 if s == 500 else 0)) == ["skipped steps"]
    assert names(run(skipped=1)) == []
    assert names(run(every=1, steps=500, skipped=lambda s: int(s % 100 == 0))) == []


def test_a_symptom_is_found_once_and_the_rest_of_a_run_finds_the_rest() -> None:
    records = run(lr=0.0, data_wait=0.7)
    about = facts(MOCO, steps_per_epoch=PER_EPOCH)
    whole = found(records, about)
    assert [f.symptom.name for f in whole] == ["learning rate 0", "waiting for data"]
    watch = Watch()
    said = [finding for record in records[:5] for finding in watch.add(record, about)]
    assert said + [finding for record in records[5:] for finding in watch.add(record, about)] == whole


def test_a_line_costs_next_to_nothing() -> None:
    """A healthy run of 20,000 lines: the tests do not read all of it at each of them."""

    class Counting(list):
        read = 0

        def __getitem__(self, i: Any) -> Any:
            Counting.read += len(range(*i.indices(len(self)))) if isinstance(i, slice) else 1
            return super().__getitem__(i)

        def __iter__(self) -> Any:
            Counting.read += len(self)
            return super().__iter__()

    watch = Watch()
    watch.records = Counting()
    about = facts(MOCO | {"epochs": 2000}, steps_per_epoch=PER_EPOCH)
    for record in run(steps=200_000):
        watch.add(record | {"contrast": 5.0 if record["step"] > 9000 else 7.0}, about)
    assert not watch.findings and Counting.read < 400 * 20_000


def test_texts_and_the_table_of_the_readme() -> None:
    """One row per symptom, which names the number as the module does; no row names a symptom that there is not."""
    text = (ROOT / "engine/training/README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Is this normal\?\n(.*?)^## ", text, re.M | re.S)[1]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in section.splitlines() if row.startswith("|")][2:]
    assert all(len(row) == 5 for row in rows) and len(rows) > 20
    told = {row[4].strip("`"): row for row in rows if row[4]}
    assert told.keys() == {symptom.name for symptom in SYMPTOMS} and sum(bool(row[4]) for row in rows) == len(told)
    for symptom in SYMPTOMS:
        assert told[symptom.name][1] == symptom.number, symptom.name
        assert told[symptom.name][3] and not symptom.advice.endswith(".") and "\n" not in symptom.advice
        assert set(symptom.follows) <= told.keys()
    assert symptoms.COLLAPSE.startswith("all images give nearly the same feature")
