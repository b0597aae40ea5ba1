"""Recipes: the configuration as YAML text, read with every key and type checked, and written so that it reads back equal."""

from __future__ import annotations

import difflib
import functools
import re
import typing
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

import yaml

from engine.config.schema import Config, expected_type, key_types, union_members, validate
from engine.errors import ConfigError


class YamlLoader(yaml.SafeLoader):
    """Safe YAML with the core schema of YAML 1.2 (PyYAML's 1.1 reads ``off`` as false and ``1e-4`` as text), in which a
    key that is given twice, a tag and an alias are errors: a recipe needs none, and nested aliases can grow beyond any memory."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        where = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{where}: the YAML alias *{event.anchor} is refused; write the value out")
        if (tag := getattr(event, "tag", None)) is not None:
            raise ConfigError(f"{where}: the YAML tag {tag} is refused, a recipe holds plain values only; remove it")
        return super().compose_node(parent, index)

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


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML text that ``from_yaml`` reads back to an equal one."""
    plain = asdict(config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})
    return yaml.dump(plain, Dumper=YamlDumper, sort_keys=False, default_flow_style=None, width=120)


def dump(values: dict[str, Any]) -> str:
    """{dotted key: value} of some keys as YAML text in sections."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = list(value) if isinstance(value, tuple) else value
    return yaml.dump(tree, Dumper=YamlDumper, sort_keys=False, default_flow_style=None, width=120)


def from_yaml(source: str | Path) -> Config:
    """Reads YAML text (``str``) or a YAML file (``Path``); keys that are not given keep their defaults.

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: not YAML, an unknown key, a wrong type or a value out of range.
    """
    origin = str(source) if isinstance(source, Path) else "the YAML text"
    return resolve(read(source.read_bytes() if isinstance(source, Path) else source, origin), origin)


def read(text: str | bytes, origin: str) -> dict[str, Any]:
    """YAML text as {dotted key: value}, keys checked."""
    try:
        tree = yaml.load(text, Loader=YamlLoader)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # beyond PyYAML's own: digits without end, nesting without end
        raise ConfigError(f"{origin}: not readable as YAML: {error}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{origin}: expected a mapping of keys, got {type(tree).__name__}")
    sections = {key.rpartition(".")[0] for key in key_types()} - {""}
    values: dict[str, Any] = {}

    def walk(mapping: dict[Any, Any], prefix: str) -> None:
        for name, value in mapping.items():
            key = f"{prefix}{name}"
            if key in sections and (value is None or isinstance(value, dict)):
                walk(value or {}, f"{key}.")
            elif key not in key_types():
                raise ConfigError(f"{origin}: unknown key {key}: {value!r}; {nearest(key)}")
            elif key in values:
                raise ConfigError(f"{origin}: key {key} is given twice; keep one")
            else:
                values[key] = value

    walk(tree or {}, "")
    return values


def nearest(key: str) -> str:
    """The remedy for an unknown key: the closest known one, compared whole and by its last part."""
    if any(known.startswith(f"{key}.") for known in key_types()):
        section = ", ".join(known for known in key_types() if known.startswith(f"{key}."))
        return f"it is a section, set one of its keys: {section}"

    def likeness(known: str) -> float:
        whole = difflib.SequenceMatcher(None, key, known).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], known.rpartition(".")[2]).ratio()
        return max(whole, 0.95 * last)

    best = max(key_types(), key=likeness)
    return f"did you mean {best}?" if likeness(best) >= 0.6 else "--help lists every key"


@functools.cache
def _parser() -> Any:
    import jsonargparse  # here, because a training process that has its Config needs no parser

    parser = jsonargparse.ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_class_arguments(Config)
    return parser


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    """{dotted key: value} -> nested dict of the whole configuration, converted; raises argparse.ArgumentError."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    tree = _parser().parse_object(nested).as_dict()
    for key, value in values.items():
        if isinstance(value, str) and str in union_members(key_types()[key]):  # text stays text: jsonargparse reads '~' as null
            section, _, name = key.rpartition(".")
            (tree[section] if section else tree)[name] = value
    return tree


def resolve(values: dict[str, Any], origin: str) -> Config:
    """Defaults overlaid with ``values``, checked."""
    from argparse import ArgumentError

    for key, value in values.items():
        if value is None and NoneType not in union_members(key_types()[key]):
            raise ConfigError(f"{origin}: {key}: got null, expected {expected_type(key_types()[key])}")
    try:
        tree = _typed(values)
    except ArgumentError:
        for key, value in values.items():
            try:
                _typed({key: value})
            except ArgumentError as error:
                kind = type(value).__name__
                expected = expected_type(key_types()[key])
                raise ConfigError(f"{origin}: {key}: got {value!r} ({kind}), expected {expected}") from error
        raise
    hints = typing.get_type_hints(Config)
    config = Config(**{
        name: hints[name](**value) if is_dataclass(hints[name]) else value
        for name, value in ((entry.name, tree[entry.name]) for entry in fields(Config))
    })
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    return config
