"""Recipes: the configuration as YAML text, read with every key and type checked, and written so that it reads back equal."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from engine.config import history
from engine.config.schema import Config, checked, flatten, keys, validate
from engine.errors import ConfigError
from ppssl.settings import replace_keys

MAX_BYTES, MAX_DEPTH = 1 << 16, 20
"""Of a recipe: what is larger or deeper is none, and PyYAML takes ten seconds for a megabyte."""


class YamlLoader(yaml.SafeLoader):
    """Safe YAML with the core schema of YAML 1.2 (PyYAML's 1.1 reads ``off`` as false and ``1e-4`` as text), in which a
    key that is given twice, a tag and an alias are errors: a recipe needs none, and nested aliases can grow beyond any memory."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        where = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{where}: the YAML alias *{event.anchor} is refused; write the value out")
        if (tag := getattr(event, "tag", None)) is not None:
            raise ConfigError(f"{where}: the YAML tag {tag} is refused, a recipe holds plain values only; remove it")
        if self.depth == MAX_DEPTH:
            raise ConfigError(f"{where}: nested more than {MAX_DEPTH} deep; a recipe has sections and lists")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice; keep one")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class YamlDumper(yaml.SafeDumper):
    """Quotes what either schema would misread."""


NUMBER = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
for _tag, _pattern, _first in (
    ("bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("float", NUMBER, list("-+.0123456789")),
    ("null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
):
    YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
YamlDumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def to_yaml(config: Config | Mapping[str, Any]) -> str:
    """The whole configuration, or {dotted key: value} of some keys, as YAML text that ``from_yaml`` reads back."""
    tree: dict[str, Any] = {}
    for key, value in (flatten(config) if isinstance(config, Config) else config).items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = list(value) if isinstance(value, tuple) else value
    return yaml.dump(tree, Dumper=YamlDumper, sort_keys=False, default_flow_style=None, width=120)


def from_yaml(source: str | Path) -> Config:
    """Reads YAML text (``str``) or a YAML file (``Path``); keys that are not given keep their defaults.

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: not YAML, an unknown or a former key, a wrong type or a value out of range.
    """
    origin = str(source) if isinstance(source, Path) else "the YAML text"
    return resolve(read(source, origin), origin)


def from_run(source: str | Path) -> Config:
    """Reads what a run has written down, its config.yaml (``Path``) or the text in a checkpoint (``str``): as ``from_yaml``, but
    former names are translated and the nulls of former runs have the values that they had then."""
    origin = str(source) if isinstance(source, Path) else "the config of the run"
    return resolve(read(source, origin, of_run=True), origin)


def read(source: str | bytes | Path, origin: str, *, of_run: bool = False) -> dict[str, Any]:
    """YAML text or a YAML file as {dotted key: value}, keys checked; ``of_run``: see ``from_run``."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            text: str | bytes = file.read(MAX_BYTES + 1)
    else:
        text = source
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{origin}: more than {MAX_BYTES // 1024} kB, which no recipe has; is it the right file?")
    values = _read(text, origin)
    if of_run:
        try:
            values = history.translate(values)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None
    return _known(values, origin)


def _read(text: str | bytes, origin: str) -> dict[str, Any]:
    """YAML text as {dotted key: value}; whatever is below a section is one key."""
    try:
        tree = yaml.load(text, Loader=YamlLoader)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # beyond PyYAML's own: digits without end, nesting without end
        raise ConfigError(f"{origin}: not readable as YAML: {error}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{origin}: expected a mapping of keys, got {type(tree).__name__}")
    sections = {key.rpartition(".")[0] for key in keys()} - {""}
    values: dict[str, Any] = {}
    for name, value in (tree or {}).items():
        inner = (value or {}).items() if name in sections and (value is None or isinstance(value, dict)) else None
        for key, found in [(name, value)] if inner is None else [(f"{name}.{below}", found) for below, found in inner]:
            if key in values:
                raise ConfigError(f"{origin}: key {key} is given twice; keep one")
            values[key] = found
    return values


def _known(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """``values``. Raises ``ConfigError`` for a key that there is not, and one that has another name now."""
    for key, value in values.items():
        if remedy := history.new_name(key, value):
            raise ConfigError(f"{origin}: {key}: {value!r}: {remedy}")
        if key not in keys():
            raise ConfigError(f"{origin}: unknown key {key}: {value!r}; {nearest(str(key))}")
    return values


def nearest(key: str) -> str:
    """The remedy for an unknown key: the known ones whose last part is most like it, or the section that it names."""
    if section := [known for known in keys() if known.startswith(f"{key}.")]:
        return f"it is a section, set one of its keys: {', '.join(section)}"
    above, _, last = key.rpartition(".")

    def likeness(known: str) -> float:
        known_above, _, known_last = known.rpartition(".")
        same = difflib.SequenceMatcher(None, last, known_last).ratio()
        return same if not above or above == known_above else 0.95 * same

    best = max(keys(), key=likeness)
    alike = [k for k in keys() if likeness(k) == likeness(best) and k.rpartition(".")[2] == best.rpartition(".")[2]]
    alike = alike if "." in best else [best]  # a key without a section is meant where no section is named
    return f"did you mean {' or '.join(alike)}?" if likeness(best) >= 0.6 else "--help lists every key"


def resolve(values: Mapping[str, Any], origin: str) -> Config:
    """Defaults overlaid with ``values``, checked."""
    try:
        config = replace_keys(Config(), {key: checked(key, value) for key, value in values.items()})
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    return config
