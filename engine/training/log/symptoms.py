"""What is wrong with a run, as its own numbers show it: a table of symptoms, each with the test that finds it and what people do.

``found(records, facts)`` reads what metrics.jsonl holds. ``Watch`` does the same while the records come. Both say a symptom once.
engine/training/README.md explains each of them, and what looks alike and is normal, under "Is this normal?".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ppssl.settings import SETTINGS, Sections, method_settings, replace_keys

Record = Mapping[str, Any]

COLLAPSED = 0.01
"""Spread of the features (``ppssl.method.spread``) below which they count as one: their mean cosine is above 0.9999."""
AT_CHANCE = 0.02
"""Relative distance of the contrast from the logarithm of the number of logits that counts as none."""
FALLEN = 0.01
"""Share of its highest level by which a loss must have fallen to count as falling."""
STALE = 5.0
"""Age of the oldest key in time constants of the key network, K / B x (1 - ema.decay). MoCo's default has 0.26; in its paper (He et
al. 2020, table of momentum values) 2.6 costs 1.2 points and 26 costs 3.8."""
EXPLODED = 100.0
"""Gradient norm over the median of the lines before it."""
WAITING = 0.5
"""Share of the time that the loop waits for data."""
SKIPPED = 0.5
"""Share of the steps between two lines that were skipped."""
_STEPS = 300
"""Steps, beside epochs and turns of the queue, before a loss is expected to have moved."""
_SECONDS = 30.0
_BEFORE = 50
"""Lines whose median a gradient norm is compared with."""
_OVERFLOWS = 5
_MANY = 50
"""Logits; among fewer of them the right one is easily found."""


class Facts(NamedTuple):
    """What the tests know of a run beside its records. None and 0 where it is not known: tests that need it find nothing then."""

    batch_size: int | None = None
    """Of the global batch, B."""
    queue: int | None = None
    """Rows of the queue, K; None where there is none."""
    decay: float | None = None
    """``ema.decay``; None without a key network."""
    logits: int | None = None
    """Of the contrast (``Settings.logits``)."""
    steps_per_epoch: int = 0
    total_steps: int = 0
    amp: str | None = None
    keys_per_image: int = 1
    """Keys of an image that enter the queue in a step."""
    begins_empty: bool = False
    """The random rows of a new queue do not count as negatives."""

    @property
    def filled(self) -> float:
        """Steps after which the queue holds keys alone."""
        return self.queue / (self.batch_size * self.keys_per_image) if self.queue and self.batch_size else 0.0


def facts(settings: Mapping[str, Any], *, steps_per_epoch: int = 0, total_steps: int = 0) -> Facts:
    """The facts of a run with the ``settings`` {dotted key: value}; those that are missing are not known."""
    batch, queue, decay = (settings.get(key) for key in ("batch_size", "queue.size", "ema.decay"))
    keys, logits = 1, 1 + queue if queue else None
    if settings.get("method.name") in SETTINGS:
        read = {key: settings[key] for key in settings if key.startswith(("method.", "contrast."))}
        method = method_settings(replace_keys(Sections(), read))
        keys = method.keys_per_image
        queue = queue if keys else None
        logits = method.logits(batch, queue or 0) if batch and (queue or not keys) else None
        decay = None if "ema." in method.idle() else decay
    total = total_steps or steps_per_epoch * settings.get("epochs", 0)
    empty = settings.get("queue.start") == "empty"
    return Facts(batch, queue, decay, logits, steps_per_epoch, total, settings.get("amp"), keys, empty)


class Symptom(NamedTuple):
    """A row of the table."""

    name: str
    number: str
    """Which number of the log shows it, and from where on."""
    test: Callable[[Sequence[Record], Facts], str | None]
    """Of the records of training and evaluation until now, the newest last: what is seen now, in words, or None."""
    advice: str
    """What people do about it."""
    follows: tuple[str, ...] = ()
    """Symptoms that explain this one: it is not told after them."""


class Finding(NamedTuple):
    """A symptom that was found, and when."""

    symptom: Symptom
    step: int
    seen: str

    def __str__(self) -> str:
        return f"{self.symptom.name}: {self.seen}. What people do: {self.symptom.advice}"


class Watch:
    """Finds symptoms as the records come; ``add`` returns what is new."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.findings: dict[str, Finding] = {}

    def add(self, record: Record, facts: Facts) -> list[Finding]:
        """What ``record`` of metrics.jsonl shows for the first time."""
        if record.get("kind") not in ("train", "eval"):
            return []
        self.records.append(record)
        new = []
        for symptom in SYMPTOMS:
            if symptom.name in self.findings or any(cause in self.findings for cause in symptom.follows):
                continue
            if seen := symptom.test(self.records, facts):
                finding = self.findings[symptom.name] = Finding(symptom, int(record["step"]), seen)
                new.append(finding)
        return new


def found(records: Iterable[Record], facts: Facts) -> list[Finding]:
    """The symptoms in ``records`` of metrics.jsonl, each with the step from which it could be told."""
    watch = Watch()
    return [finding for record in records for finding in watch.add(record, facts)]


def is_collapsed(record: Record) -> bool:
    """Whether the features are one in a record."""
    return record.get("spread", 1.0) < COLLAPSED


# Tests: each looks at the newest record first, so that a line of a healthy run costs next to nothing.


def _collapsed(records: Sequence[Record], facts: Facts) -> str | None:
    newest = records[-1]
    if not is_collapsed(newest) or (newest["kind"] == "eval" and not newest["step"]):  # random weights tell little apart
        return None
    of = " of the evaluated images" if newest["kind"] == "eval" else ""
    return f"all images give nearly the same feature, spread {newest['spread']:.2g}{of}, of 1 when they point everywhere"


def _lines(records: Sequence[Record], steps: float) -> list[Record]:
    """The lines of training of at least the last ``steps`` steps; empty where they go back less far."""
    last, taken = records[-1]["step"], []
    for record in reversed(records):
        if record["kind"] != "train":
            continue
        if record["step"] <= last - steps:
            return taken[::-1]
        taken.append(record)
    return taken[::-1] if last >= steps else []


def _is_line(record: Record, *names: str) -> bool:
    return record["kind"] == "train" and all(isinstance(record.get(name), (int, float)) for name in names)


def _before(records: Sequence[Record]) -> Record | None:
    """The line before the newest record."""
    return next((r for r in reversed(records[-_BEFORE - 1 : -1]) if r["kind"] == "train"), None)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _at_chance(records: Sequence[Record], facts: Facts) -> str | None:
    newest = records[-1]
    if not facts.logits or not _is_line(newest, "contrast"):
        return None
    chance = math.log(facts.logits)

    def near(record: Record) -> bool:
        return abs(record.get("contrast", chance) / chance - 1) < AT_CHANCE

    span = max(_STEPS, 2 * facts.steps_per_epoch, facts.filled)
    if not near(newest) or newest["step"] < facts.filled + span:
        return None
    window = [r for r in _lines(records, span) if "contrast" in r]
    if len(window) < 4 or not all(map(near, window)):
        return None
    half = len(window) // 2
    first, last = (_mean(r["contrast"] for r in part) for part in (window[:half], window[half:]))
    if first - last > 0.1 * AT_CHANCE * chance:  # slow, but it falls
        return None
    seen = f"the contrast is {last:.3f} over {window[-1]['step'] - window[0]['step']} steps and does not move"
    return f"{seen}; log({facts.logits:,}) = {chance:.3f} is what guessing among the {facts.logits:,} logits gives"


def _not_falling(records: Sequence[Record], facts: Facts) -> str | None:
    newest, before = records[-1], _before(records)
    name = "contrast" if "contrast" in newest else "loss"
    if not _is_line(newest, name) or not facts.total_steps:
        return None
    if before and 10 * before["step"] // facts.total_steps == 10 * newest["step"] // facts.total_steps:
        return None  # ten times per run
    span = max(_STEPS, 5 * facts.steps_per_epoch, 2 * facts.filled, 0.3 * facts.total_steps)
    lines = [r for r in records if _is_line(r, name) and r["step"] > facts.filled]
    if newest["step"] < facts.filled + span or len(lines) < 10:
        return None
    parts = [_mean(r[name] for r in lines[len(lines) * i // 10 : len(lines) * (i + 1) // 10]) for i in range(10)]
    highest = max(range(5), key=parts.__getitem__)
    lowest = min(parts[highest + 1 :])
    if not all(map(math.isfinite, parts)) or lowest < parts[highest] - FALLEN * abs(parts[highest]):
        return None
    what = "the contrast" if name == "contrast" else "the loss"
    return f"{what} was {parts[0]:.3f} and is {parts[-1]:.3f} after {newest['step'] - lines[0]['step']} steps"


def _too_long(records: Sequence[Record], facts: Facts) -> str | None:
    if facts.begins_empty or not facts.filled or not facts.total_steps or records[-1]["kind"] != "train":
        return None
    if 2 * facts.filled <= facts.total_steps:
        return None
    part = min(1.0, facts.filled / facts.total_steps)
    seen = "until its end" if part == 1 else f"for {100 * part:.0f} % of its steps"
    return (
        f"queue.size={facts.queue} takes {math.ceil(facts.filled):,} steps to fill and the run has {facts.total_steps:,}: the "
        f"contrast is against the random rows that it starts with {seen}"
    )


def _stale(records: Sequence[Record], facts: Facts) -> str | None:
    if not facts.filled or facts.decay is None or records[-1]["kind"] != "train":
        return None
    age = min(facts.filled, facts.total_steps or math.inf)
    memory = 1 / (1 - facts.decay)
    if age <= STALE * memory:
        return None
    epochs = f" ({age / facts.steps_per_epoch:.1f} epochs)" if facts.steps_per_epoch else ""
    return (
        f"its oldest keys are {age:,.0f} steps{epochs} old, and the key network renews itself in {memory:,.0f} "
        f"(ema.decay={facts.decay:g}): keys are told apart by their age, not by their images"
    )


def _all_right_at_once(records: Sequence[Record], facts: Facts) -> str | None:
    newest, before = records[-1], _before(records)
    if (facts.logits or 0) < _MANY or not _is_line(newest, "contrast_top1") or newest["contrast_top1"] < 0.999:
        return None
    begun = before["step"] if before else 0
    if begun < facts.filled or begun > facts.filled + max(facts.steps_per_epoch, 20):
        return None  # against random rows it is normal, and later it may have been learned
    where = "at the first steps" if not facts.queue else "as soon as the queue is full"
    return f"{100 * newest['contrast_top1']:.1f} % of the queries find their key among {facts.logits:,} logits {where}"


def _no_rate(records: Sequence[Record], facts: Facts) -> str | None:
    newest, before = records[-1], _before(records)
    if not _is_line(newest, "lr") or newest["lr"] != 0 or (before is not None and before.get("lr") != 0):
        return None
    if before is None and newest["step"] < facts.total_steps:
        return None
    return "the learning rate is 0: no weight moves"


def _exploding(records: Sequence[Record], facts: Facts) -> str | None:
    newest = records[-1]
    if not _is_line(newest, "grad_norm") or not math.isfinite(newest["grad_norm"]):
        return None
    past = [r["grad_norm"] for r in records[-_BEFORE - 1 : -1] if _is_line(r, "grad_norm") and math.isfinite(r["grad_norm"])]
    if len(past) < 2 or newest["grad_norm"] <= EXPLODED * (usual := statistics.median(past)):
        return None
    return f"the gradient norm is {newest['grad_norm']:.3g}, and was {usual:.3g} in the lines before"


def _waiting(records: Sequence[Record], facts: Facts) -> str | None:
    newest = records[-1]
    if not _is_line(newest, "data_wait", "seconds") or newest["data_wait"] <= WAITING:
        return None
    lines, waited, seconds = 0, 0.0, 0.0
    for i in range(len(records) - 1, -1, -1):
        record = records[i]
        if not _is_line(record, "data_wait", "seconds"):
            continue
        before = next((r for r in reversed(records[max(0, i - 5) : i]) if r["kind"] == "train"), None)
        if before is None or before["step"] < facts.steps_per_epoch:
            break  # the first epoch fills caches and starts workers
        took = record["seconds"] - before["seconds"] if record["seconds"] > before["seconds"] else record["seconds"]
        lines, waited, seconds = lines + 1, waited + took * record["data_wait"], seconds + took
        if lines >= 5 and seconds >= _SECONDS:
            break
    if lines < 5 or seconds < _SECONDS or waited <= WAITING * seconds:
        return None
    return f"{100 * waited / seconds:.0f} % of the last {seconds:.0f} s went by without a batch"


def _skipping(records: Sequence[Record], facts: Facts) -> str | None:
    newest, before = records[-1], _before(records)
    if not _is_line(newest, "skipped") or newest["skipped"] < 2:
        return None
    taken = newest["step"] - (before["step"] if before else 0)
    if "loss" in newest and newest["skipped"] < SKIPPED * taken:
        return None
    many = "all" if "loss" not in newest else f"{newest['skipped']} of {taken}"
    return f"{many} steps since the last line were skipped, as their loss or gradient was not finite: they taught nothing"


def _overflowing(records: Sequence[Record], facts: Facts) -> str | None:
    if facts.amp != "fp16" or not _is_line(records[-1], "grad_norm") or math.isfinite(records[-1]["grad_norm"]):
        return None
    lines = [r for r in records[-2 * _OVERFLOWS :] if _is_line(r, "grad_norm")][-_OVERFLOWS:]
    if len(lines) < _OVERFLOWS or any(math.isfinite(r["grad_norm"]) for r in lines):
        return None
    return f"gradients overflow float16 in each of the last {_OVERFLOWS} lines: the loss scale finds no level that holds"


SYMPTOMS = (
    Symptom(
        "collapsed feature",
        f"`spread` below {COLLAPSED:g}",
        _collapsed,
        "look at the images and at their views, whether they are all alike or empty (python -m engine.check), lower optim.lr, and "
        "with method byol move ema.decay nearer to 1",
    ),
    Symptom(
        "learning rate 0",
        "`lr` of 0",
        _no_rate,
        "set optim.lr (0.03 is the default for a batch of 128)",
    ),
    Symptom(
        "queue longer than the run",
        "`queue.size` over `batch_size` above half of the steps",
        _too_long,
        "set queue.size to at most a tenth of the images that the run shows (epochs x training images), or train longer",
    ),
    Symptom(
        "stale queue",
        f"`queue.size` / `batch_size` x (1 - `ema.decay`) above {STALE:g}",
        _stale,
        "move ema.decay nearer to 1, or lower queue.size",
    ),
    Symptom(
        "contrast solved at once",
        "`contrast_top1` of 100 % with no random rows left",
        _all_right_at_once,
        "compare the two views of an image (python -m engine.check --views views.png): they may be the same picture or lack crops "
        "and color jitter; with one process, bn.groups above 1 keeps batch statistics from telling the pairs",
        follows=("collapsed feature",),
    ),
    Symptom(
        "skipped steps",
        f"`skipped` of at least {100 * SKIPPED:.0f} % of the steps",
        _skipping,
        "lower optim.lr, take amp=bf16 or amp=null (float32), and see what python -m engine.replay says of the bundle in replay/",
    ),
    Symptom(
        "fp16 overflow",
        f"`grad_norm` not finite in {_OVERFLOWS} lines in a row",
        _overflowing,
        "take amp=bf16 where the GPU has it or amp=null (float32), or lower optim.lr",
    ),
    Symptom(
        "exploding gradient",
        f"`grad_norm` above {EXPLODED:g} x its median before",
        _exploding,
        "stop, lower optim.lr to a third or a tenth and continue the last good checkpoint by the same command",
    ),
    Symptom(
        "loss at chance",
        f"`contrast` within {100 * AT_CHANCE:g} % of log(K + 1), SimCLR: log(2B - 1)",
        _at_chance,
        "raise or lower optim.lr by a factor of three, start from pretrained weights (encoder.weights), lower queue.size for a "
        "small data set, and look at the views (python -m engine.check)",
        follows=("collapsed feature", "learning rate 0"),
    ),
    Symptom(
        "loss does not fall",
        f"`contrast` (BYOL: `loss`) never {100 * FALLEN:g} % below its highest level",
        _not_falling,
        "raise or lower optim.lr by a factor of three, and set the weights of guiding terms (iadm.weight, ais.weight, ldfs.*) to "
        "0 to see which one works against the contrast",
        follows=("collapsed feature", "learning rate 0", "loss at chance", "skipped steps"),
    ),
    Symptom(
        "waiting for data",
        f"`data_wait` above {100 * WAITING:g} % after the first epoch",
        _waiting,
        "raise data.workers to the cores that there are, keep the decoded set in memory (data.resident), put the images on a local "
        "disk, make them smaller, or install DALI (python -m engine.doctor names what is missing)",
    ),
)
"""Every symptom; what is found together is told in this order."""
COLLAPSE = f"all images give nearly the same feature. What people do: {SYMPTOMS[0].advice}"
"""For features that are evaluated outside of a run."""
