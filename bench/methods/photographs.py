"""The cells of the comparison on photographs: a network with ImageNet weights goes on learning from unlabeled photos."""

from __future__ import annotations

from typing import Any

from bench.methods.cells import OFF, Cell, Study, moco, plain, ppssl

SEEDS = 5
"""Reported seeds of a study, fixed before any of them was looked at (PLAN.md)."""
RATES = {"moco": 0.001, "ppssl guided": 0.01, "simclr": 0.0003, "byol": 0.001}
"""Chosen by ``choice`` on CUB's validation photos (choice-tuning.md), for both settings. Other methods take MoCo's."""
UNTOUCHED = Cell("no training", {"method.name": "moco"}, kind="untouched")
GUIDED = "ppssl guided"
"""PP-SSL without AIS: the recipe turns it off, since no image-text model is at hand."""


def guided(name: str, **sections: dict[str, Any]) -> Cell:
    return ppssl(name, "guided", **sections)


TEACHER = {
    "teacher.model": "timm/tf_efficientnet_lite0", "teacher.weights": "efficientnet-lite0-57934424.pth", "teacher.image_size": 160,
}  # fmt: skip
"""The network that training starts from, frozen, on larger images."""


def from_teacher(name: str, target: str, weight: float, **ais: Any) -> Cell:
    """PP-SSL, guided, whose AIS distills ``TEACHER``."""
    cell = guided(name, ais={"target": target, "weight": weight} | ais)
    return cell._replace(overrides=cell.overrides | TEACHER)


MAIN = Study(
    "Methods",
    "moco",
    [
        UNTOUCHED,
        moco("moco"),
        plain("lcr", "published"),
        plain("lcr", "guided"),
        plain("ldfs"),
        ppssl("ppssl published", "published"),
        guided(GUIDED),
        plain("simclr"),
        plain("byol"),
    ],
    budget_fraction=1.0,
    seeds=SEEDS,
)
MASKS = Study(
    "Masks: what a box would add, and what the CAM gives",
    GUIDED,
    [
        UNTOUCHED,
        guided(GUIDED),
        guided("guided without IADM", iadm=OFF),
        guided("guided, plain contrast", method={"contrast_mask": False}),
        guided("CAM temperature 0.1", iadm={"cam_temperature": 0.1}),
        guided("CAM temperature 1", iadm={"cam_temperature": 1.0}),
        guided("CAM and mask temperature 1", iadm={"temperature": 1.0}),
        # the recipe's has 6 x 6 cells; one of 12 x 12 takes 0.14 s per image on a core, 24 minutes a cell
        guided("map of 3 x 3", encoder={"arch": "timm/tf_efficientnet_lite0"}),
        moco("moco"),
    ],
    budget_fraction=1.0,
    seeds=SEEDS,
)
TARGET = Study(
    "What is distilled of a frozen image model",
    GUIDED,
    [
        UNTOUCHED,
        guided(GUIDED),
        from_teacher("image embedding, weight 0.1", "image", 0.1),
        from_teacher("image embedding, weight 1", "image", 1.0),
        from_teacher("relations, weight 0.1", "relations", 0.1, temperature=0.1),
        from_teacher("relations, weight 1", "relations", 1.0, temperature=0.1),
        moco("moco"),
    ],
    budget_fraction=1.0,
    seeds=SEEDS,
)
PEERS = Study(
    "The same method in two libraries, after equal images",
    "lightly",
    [
        UNTOUCHED,
        Cell("lightly", {"method.name": "moco"}, kind="lightly"),
        moco("moco"),
    ],
    budget_fraction=1.0,
    seeds=3,
)
# For --tune: the learning rate of each method, by photos that were held out of training. LCR and LDFS take MoCo's.
CHOICE = Study(
    "Learning rates",
    "moco, lr 0.01",
    [
        UNTOUCHED,
        *(
            Cell(f"{label}, lr {rate:g}", {"method.name": name, "method.variant": variant, "optim.lr": rate})
            for label, name, variant, rates in (
                ("moco", "moco", "published", (0.001, 0.003, 0.01, 0.03)),
                ("ppssl guided", "ppssl", "guided", (0.001, 0.003, 0.01)),
                ("simclr", "simclr", "published", (0.0001, 0.0003, 0.001)),
                ("byol", "byol", "published", (0.001, 0.003, 0.01)),
            )
            for rate in rates
        ),
    ],
    budget_fraction=1.0,
    seeds=1,
)


def at_rates(study: Study) -> Study:
    """``study`` with the learning rate of ``RATES`` in every row that trains and names none."""

    def at_rate(cell: Cell) -> Cell:
        method, variant = cell.overrides["method.name"], cell.overrides.get("method.variant")
        rate = RATES.get(f"{method} {variant}", RATES.get(method, RATES["moco"]))
        return cell._replace(overrides={"optim.lr": rate} | cell.overrides) if cell.trains else cell

    return study._replace(cells=[at_rate(cell) for cell in study.cells])


STUDIES = {
    name: at_rates(study)
    for name, study in {
        "main": MAIN, "masks": MASKS, "target": TARGET, "peers": PEERS, "choice": CHOICE,
    }.items()
}  # fmt: skip
STUDIES_WITHOUT_BOXES = {name: study for name, study in STUDIES.items() if name != "masks"}
