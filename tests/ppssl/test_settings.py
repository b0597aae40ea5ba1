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


def test_an_unknown_method_is_named_with_those_that_are_known() -> None:
    for call in (lambda: settings_class("byol9"), lambda: method_settings(Sections(method=MethodConfig(name="byol9")))):
        with pytest.raises(ValueError, match=r"method\.name.*byol9.*byol, lcr, ldfs, moco, ppssl, simclr"):
            call()
