"""The cells of the comparison: what each trains and how it differs from the pinned recipe, by study."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

CLASS_NAMES = "bench/class_names.yaml"
"""Relative, so that a record reads the same on every machine: python -m bench.methods runs in the root of the repository."""


class Cell(NamedTuple):
    """One row of a table."""

    name: str
    overrides: dict[str, Any]
    """Config keys beside those of synthetic.yaml."""
    kind: str = "train"
    """train, untrained (the starting network), untouched (the same where its weights are given: no seed changes it), teacher (the
    image-text model's own image features), or lightly (trained by that library)."""
    teacher: str = "true"
    """The cached embeddings that a method gets: true, shuffled (each image has another's), constant (their mean), or species (an
    oracle that knows the labels)."""
    budget: float = 1.0
    """The part of the study's images that a run sees."""

    @property
    def has_seed(self) -> bool:
        """Whether another seed gives another result."""
        return self.kind != "untouched"

    @property
    def trains(self) -> bool:
        """Whether a run sees images."""
        return self.kind in ("train", "lightly")


class Study(NamedTuple):
    """The rows of one table and the row that the others are compared with, seed by seed."""

    title: str
    reference: str
    cells: list[Cell]
    budget_fraction: float = 0.5
    """Of the images that --budget allows a run."""
    seeds: int | None = None
    """How many were fixed before the first was looked at; None where none were."""
    floor: str | None = None
    """The row without training, by which half-trained seeds are counted."""
    shares: tuple[str, ...] = ()
    """Studies with the same cells under names of their own: a record of theirs is taken over instead of being run again."""

    @property
    def is_planned(self) -> bool:
        """Whether it makes claims: its p values are corrected for their number, and mean nothing before all seeds are there."""
        return self.seeds is not None


def dotted(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Overrides of keys that are given by section, as ``queue={"size": 256}``."""
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def ppssl(name: str, variant: str = "guided", *, teacher: str = "true", **sections: dict[str, Any]) -> Cell:
    """PP-SSL with keys by section, as ``ais={"weight": 0}``."""
    return Cell(name, {"method.name": "ppssl", "method.variant": variant} | dotted(sections), teacher=teacher)


def plain(name: str, variant: str | None = None) -> Cell:
    """Another method, in ``variant`` where it has two."""
    return Cell(f"{name} {variant}" if variant else name, {"method.name": name, "method.variant": variant or "published"})


def moco(name: str, *, budget: float = 1.0, **sections: dict[str, Any]) -> Cell:
    """MoCo with keys by section, as ``queue={"size": 256}``."""
    return Cell(name, {"method.name": "moco"} | dotted(sections), budget=budget)


UNTRAINED = Cell("untrained", {"method.name": "moco"}, kind="untrained")
SIMCLR = Cell("simclr", {"method.name": "simclr"})
OFF = {"weight": 0.0}
SOURCES = [("image",), ("layer1",), ("layer2",), ("layer3",), ("layer4",), ("image", "layer4"), ("layer3", "layer4"),
           ("image", "layer1", "layer2", "layer3", "layer4")]  # fmt: skip
ALPHAS, BETAS = (0.0, 0.1, 0.4), (0.0, 0.4, 1.28, 4.0)


def choice(name: str, *, masked: bool, reach: str = "branch", beta: float = 1.28, alpha: float = 0.0) -> Cell:
    """A candidate for the variant ``guided``: every switch in question is set, independent of the defaults of the variant."""
    switches = {"contrast_mask": masked, "mask_reach": reach}
    return ppssl(name, method=switches, iadm={"weight": beta} if beta != 1.28 else {}, ais={"weight": alpha})


STUDIES = {
    "main": Study(
        "Methods",
        "moco",
        [
            UNTRAINED,
            Cell("teacher, no training", {"method.name": "ppssl", "method.variant": "guided"}, kind="teacher"),
            plain("moco"),
            plain("lcr", "published"),
            plain("lcr", "guided"),
            plain("ldfs"),
            ppssl("ppssl published", "published"),
            ppssl("ppssl guided"),
            plain("simclr"),
            # a target network that follows too fast collapses to a constant output
            Cell("byol", {"method.name": "byol", "ema.decay": 0.99}),
        ],
        budget_fraction=1.0,
    ),
    # guided's defaults were chosen by it: to be run with --dataset-seed 2 --first-seed 0, which the other studies do not use
    "choice": Study(
        "Candidates for the variant guided",
        "moco",
        [
            plain("moco"),
            choice("masked contrast, no guidance", masked=True, beta=0.0),
            choice("masked contrast, CAM to the mask", masked=True),
            choice("masked contrast, CAM to the trunk", masked=True, reach="trunk"),
            choice("masked contrast, CAM to the mask, text", masked=True, alpha=0.1),
            choice("masked contrast, CAM to the trunk, text", masked=True, reach="trunk", alpha=0.1),
            choice("masked contrast, CAM to the trunk, less text", masked=True, reach="trunk", alpha=0.03),
            choice("plain contrast, CAM to the mask", masked=False),
            choice("plain contrast, CAM to the trunk", masked=False, reach="trunk"),
            choice("plain contrast, CAM to the trunk, text", masked=False, reach="trunk", alpha=0.1),
        ],
        budget_fraction=1.0,
    ),
    "parts": Study(
        "Parts of PP-SSL",
        "moco",
        [plain("moco")]
        + [
            ppssl(f"{variant} {name}", variant, **parts)
            for variant in ("published", "guided")
            for name, parts in {
                "whole": {},
                "without AIS": {"ais": OFF},
                "without IADM": {"iadm": OFF},
                "without both": {"ais": OFF, "iadm": OFF},
            }.items()
        ]
        + [
            ppssl("guided, plain contrast", method={"contrast_mask": False}),
            ppssl("guided, mask apart from the trunk", method={"mask_reach": "branch"}),
        ],
    ),
    "layers": Study(
        "Where the CAM is taken",
        "image",
        [ppssl("+".join(sources), iadm={"sources": list(sources)}) for sources in SOURCES],
    ),
    "weights": Study(
        "Weights alpha (AIS) and beta (IADM)",
        "alpha 0.1 beta 1.28",
        [
            ppssl(f"alpha {alpha:g} beta {beta:g}", ais={"weight": alpha}, iadm={"weight": beta})
            for alpha, beta in itertools.product(ALPHAS, BETAS)
        ],
    ),
    "prompts": Study(
        "Number and kind of descriptions",
        "8 descriptions",
        [ppssl(f"{count} descriptions", ais={"count": count}) for count in (2, 4, 6, 8, 10)]
        + [ppssl(f"{count} class names", ais={"count": count, "prompts": CLASS_NAMES}) for count in (2, 8)],
    ),
    "teacher": Study(
        "What the teacher knows",
        "true teacher",
        [ppssl(f"{kind} teacher", teacher=kind) for kind in ("true", "shuffled", "constant", "species")]
        # the softmax is certain of the category; a higher temperature lets it say more about the rest
        + [ppssl(f"{kind} teacher, tau 4", teacher=kind, ais={"temperature": 4.0}) for kind in ("true", "species")]
        + [ppssl("no teacher", ais=OFF)],
    ),
    "stability": Study(
        "What leaves a seed half trained",
        "moco",
        [
            UNTRAINED,
            moco("moco"),
            moco("moco, queue starts empty", queue={"start": "empty"}),
            moco("moco, warm-up of 2 epochs", optim={"warmup": 2.0}),
            moco("moco, decay rises to 1", ema={"schedule": "cosine"}),
            moco("moco, decay 0.9", ema={"decay": 0.9}),
            moco("moco, head mlp2", encoder={"head": "mlp2"}),
            moco("moco, batch", contrast={"negatives": "batch"}),
            ppssl("ppssl guided"),
            ppssl("ppssl guided, queue starts empty", queue={"start": "empty"}),
            ppssl("ppssl guided, warm-up of 2 epochs", optim={"warmup": 2.0}),
            SIMCLR,
        ],
        budget_fraction=1.0,
        seeds=16,
        floor="untrained",
        shares=("negatives",),
    ),
    # from MoCo to SimCLR a switch at a time
    "negatives": Study(
        "What is contrasted, at equal images and at equal CPU time",
        "moco",
        [
            UNTRAINED,
            moco("moco"),
            moco("batch", contrast={"negatives": "batch"}),
            moco("queue and batch", contrast={"negatives": "both"}),
            moco("symmetric", contrast={"symmetric": True}),
            moco("symmetric, batch", contrast={"symmetric": True, "negatives": "batch"}),
            moco("symmetric, batch, keys with gradient", contrast={"symmetric": True, "negatives": "batch", "gradient": "both"}),
            # a step that sees each view as query and as key takes about twice as long: these see half of the images
            moco("symmetric, half of the images", contrast={"symmetric": True}, budget=0.5),
            SIMCLR._replace(name="simclr, half of the images", budget=0.5),
            SIMCLR,
            moco("queue of 1024", queue={"size": 1024}),
            Cell("batches of 128", {"method.name": "moco", "batch_size": 128}),
        ],
        budget_fraction=1.0,
        seeds=8,
        floor="untrained",
    ),
}
