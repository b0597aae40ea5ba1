"""The prompt corpora: one per data set, the relevant description first, the method's categories before any other."""

from __future__ import annotations

from importlib.resources import files

import pytest
import yaml

from engine.config import from_yaml
from engine.config.command_line import RECIPES, recipe_names
from ppssl.teacher import load_descriptions

CORPORA = ["aircraft", "birds", "butterfly", "cars", "dogs", "flowers", "folder"]
# A word of each of the method's eight categories, in its order.
CATEGORIES = ["feathers", "pet", "mass transport", "absence of legs", "robust jaws", "four wheels", "petals", "primate"]
RELEVANT = {
    "aircraft": "flying machine",
    "birds": "feathers",
    "butterfly": "metamorphosis",
    "cars": "four wheels",
    "dogs": "pet",
    "flowers": "petals",
    "folder": "photograph",
}
REPLACED = {"aircraft": "mass transport", "butterfly": "primate", "folder": "primate"}


def corpus(name: str) -> list[dict[str, object]]:
    return yaml.safe_load((files("ppssl") / "prompts" / f"{name}.yaml").read_text(encoding="utf-8"))["descriptions"]


def test_one_corpus_for_every_recipe():
    shipped = {path.name.removesuffix(".yaml") for path in (files("ppssl") / "prompts").iterdir()}
    assert shipped == set(CORPORA)
    assert {from_yaml(RECIPES / f"{name}.yaml").ais.prompts for name in recipe_names()} == shipped


@pytest.mark.parametrize("name", CORPORA)
def test_corpus(name: str):
    entries = corpus(name)
    assert all(set(entry) == {"text", "relevant"} for entry in entries)
    texts = [entry["text"] for entry in entries]
    assert len(set(texts)) == len(texts) >= 10
    assert [entry["relevant"] for entry in entries] == [True] + [False] * (len(entries) - 1)
    # Beyond CLIP's 77 tokens a text is cut off; a word is rarely more than two.
    assert all(isinstance(text, str) and len(text.split()) < 35 for text in texts)

    assert RELEVANT[name] in texts[0]
    rest = [word for word in CATEGORIES if word != RELEVANT[name] and word != REPLACED.get(name)]
    assert len(rest) == 7
    for word, text in zip(rest, texts[1:8], strict=True):
        assert word in text


@pytest.mark.parametrize("name", CORPORA)
def test_the_methods_eight_are_what_the_teacher_reads(name: str):
    assert load_descriptions(name, 8) == [entry["text"] for entry in corpus(name)[:8]]


def test_the_papers_own_sentence_is_verbatim():
    sentence = "an animal characterized by feathers, wings, and the ability to fly or perch"
    assert corpus("birds")[0] == {"text": sentence, "relevant": True}
