"""Settings: no torch needed, the values of the variants, and that a method's settings hold what the configuration says."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from ppssl.settings import (
    SETTINGS,
    IadmConfig,
    LDFSSettings,
    MethodConfig,
    PPSSLSettings,
    Sections,
    get_key,
    idle_keys,
    method_settings,
    replace_keys,
    resolve_variant,
    settings_class,
    variant,
)


def test_settings_and_the_package_itself_load_no_torch() -> None:
    code = "import sys, ppssl, ppssl.settings; dir(ppssl), ppssl.__all__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_settings_class_names_sections_and_nothing_else(name: str) -> None:
    kind = SETTINGS[name]
    sections = {entry.name for entry in fields(Sections)}
    assert kind.name == name and kind.module == f"ppssl.{name}"
    assert {entry.name for entry in fields(kind)} <= sections | {"image_size"}
    for values in kind.variants.values():
        assert {key.partition(".")[0] for key in values} <= {entry.name for entry in fields(kind)}


@pytest.mark.parametrize("name", [name for name, kind in SETTINGS.items() if kind.variants])
def test_a_variant_decides_the_same_keys_as_the_other_and_only_those_that_are_null(name: str) -> None:
    kind = SETTINGS[name]
    assert kind.variants["published"].keys() == kind.variants["guided"].keys()
    for chosen, values in kind.variants.items():
        start = Sections(method=MethodConfig(name=name, variant=chosen))
        assert all(get_key(start, key) is None for key in values)
        resolved = resolve_variant(start)
        assert {key: get_key(resolved, key) for key in values} == values
        assert replace_keys(resolved, dict.fromkeys(values)) == start  # nothing else has moved
    said = replace(Sections(), method=MethodConfig(name=name, variant="guided"), iadm=IadmConfig(weight=0.5))
    assert resolve_variant(said).iadm.weight == 0.5 and resolve_variant(said).iadm.sign == "minus"


def test_a_method_without_variants_is_left_as_it_is() -> None:
    start = Sections(method=MethodConfig(name="moco", variant="guided"))
    assert resolve_variant(start) == start


def test_settings_of_the_chosen_method() -> None:
    settings = method_settings(Sections(method=MethodConfig(name="ldfs")), image_size=96)
    assert isinstance(settings, LDFSSettings) and settings.image_size == 96 and settings.ldfs == Sections().ldfs
    assert not settings.uses_teacher
    guided = variant("ppssl", "guided", {"iadm.weight": 2.0})
    assert isinstance(guided, PPSSLSettings) and guided.iadm.weight == 2.0 and guided.teacher.view == "clean"
    assert guided.uses_teacher and not replace_keys(guided, {"ais.weight": 0.0}).uses_teacher
    with pytest.raises(FrozenInstanceError):
        guided.iadm.weight = 1.0


def idle(name: str, **values) -> dict[str, list[str]]:
    sections = resolve_variant(Sections(method=MethodConfig(name=name)))
    return idle_keys(replace_keys(sections, {key.replace("__", "."): value for key, value in values.items()}))


def test_what_a_method_does_not_use_is_named_with_the_reason() -> None:
    assert all(idle(name) == {} for name in SETTINGS)  # what nobody set is no news
    found = idle("simclr", contrast__symmetric=True, queue__start="empty", ema__schedule="cosine", contrast__temperature=0.1)
    assert sorted(found.values()) == [["contrast.symmetric"], ["ema.schedule"], ["queue.start"]]
    assert any("simclr is symmetric" in why for why in found) and "method simclr has no key network" in found
    assert idle("ldfs", contrast__negatives="batch").popitem()[1] == ["contrast.negatives"]
    assert idle("byol", ema__schedule="cosine", ema__decay=0.9) == {}
    assert idle("moco", contrast__negatives="batch", queue__size=8, queue__start="empty", queue__dtype="float32") == {
        "contrast.negatives=batch keeps no queue": ["queue.size", "queue.start"]
    }
    assert idle("lcr", contrast__gradient="both", ema__decay=0.5) == {
        "with contrast.gradient=both there is no key network": ["ema.decay"]
    }
    assert idle("moco", ais__weight=1.0, iadm__cam_temperature=0.2, teacher__image_size=96) == {
        "method moco does not read it": ["ais.weight", "iadm.cam_temperature", "teacher.image_size"]
    }


def test_what_the_other_settings_of_a_method_leave_without_use_is_named() -> None:
    assert idle("ppssl", ais__target="relations", ais__temperature=0.1, ais__prompts="dogs", ais__scale=20.0) == {
        "ais.target=relations has no descriptions": ["ais.scale", "ais.prompts"]
    }
    assert idle("ppssl", ais__target="image", ais__temperature=0.1) == {"ais.target=image has no softmax": ["ais.temperature"]}
    assert idle("ppssl", ais__weight=0.0, ais__target="image", teacher__weights="birds") == {
        "ais.weight is 0": ["ais.target", "teacher.weights"]
    }
    assert idle("lcr", iadm__weight=0.0, iadm__cam_temperature=0.1) == {"iadm.weight is 0": ["iadm.cam_temperature"]}
    assert idle("ppssl", iadm__cam_temperature=0.1) == {}


def test_keys_of_a_shared_section_that_a_method_leaves_unread_are_named() -> None:
    unread = {"method__contrast_mask": True, "method__mask_reach": "branch", "iadm__sources": ("layer2",), "iadm__image": "clean"}
    names = [key.replace("__", ".") for key in unread]
    for method in ("lcr", "moco"):
        assert idle(method, **unread) == {f"method {method} does not read it": names}
    assert idle("ppssl", **unread) == {} and idle("byol", method__variant="guided") == {
        "method byol does not read it": ["method.variant"]
    }
    assert idle("lcr", method__minmax="image", iadm__sign="minus", method__maxout_width=8) == {}
    guides = {"iadm__image": "clean", "iadm__softmax": "cells", "iadm__sources": ("layer2",)}
    assert idle("ppssl", iadm__weight=0.0, **guides) == {"iadm.weight is 0": ["iadm.image", "iadm.softmax"]}


@pytest.mark.parametrize(
    ("name", "values", "keys", "logits"),
    [
        ("moco", {}, 1, 65),
        ("moco", {"contrast.symmetric": True, "contrast.negatives": "both"}, 2, 68),
        ("ppssl", {"contrast.symmetric": True, "contrast.negatives": "batch"}, 0, 4),
        ("ldfs", {"contrast.symmetric": True, "contrast.negatives": "batch"}, 1, 65),
        ("simclr", {"contrast.symmetric": True}, 0, 7),
        ("byol", {}, 0, None),
    ],
)
def test_what_enters_the_queue_and_how_many_logits_there_are(name: str, values: dict, keys: int, logits: int | None) -> None:
    settings = variant(name, values=values)
    assert settings.keys_per_image == keys and settings.logits(4, 64) == logits


def test_an_unknown_method_is_named_with_those_that_are_known() -> None:
    for call in (lambda: settings_class("byol9"), lambda: method_settings(Sections(method=MethodConfig(name="byol9")))):
        with pytest.raises(ValueError, match=r"method\.name.*byol9.*byol, lcr, ldfs, moco, ppssl, simclr"):
            call()
