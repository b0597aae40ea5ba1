"""The command line of ``python -m engine.train``: a recipe, dotted overrides anywhere, and the spellings people know.

No parser that we know takes bare ``key=value`` anywhere on the line beside options, names the nearest key, and keeps ``--amp
epochs=3`` from swallowing the override; so the line is brought into {key: text} here, and ``recipe.py`` checks it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import typing
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple

import yaml

from engine.config import history
from engine.config.recipe import NUMBER, YamlDumper, YamlLoader, nearest, read, resolve
from engine.config.schema import RECIPES, Config, flatten, keys
from engine.console import say
from engine.errors import ConfigError

# Spellings of MoCo, LCR and timm where they mean the same; hyphens and underscores are equal in all of them.
_ALIASES = {
    "lr": "optim.lr", "wd": "optim.weight_decay", "weight_decay": "optim.weight_decay", "momentum": "optim.momentum",
    "b": "batch_size", "j": "data.workers", "workers": "data.workers", "a": "encoder.arch", "arch": "encoder.arch",
    "moco_k": "queue.size", "moco_m": "ema.decay", "moco_t": "contrast.temperature", "moco_dim": "encoder.dim",
    "c": "cfg", "config": "cfg", "device": "run.device", "opt": "optim.name", "warmup_epochs": "optim.warmup",
    "layer_decay": "optim.layer_decay", "clip_grad": "optim.clip",
}  # fmt: skip
_PRECISION = re.compile(r"(bf|fp|float)\w*$|null$")  # fp32 is taken too, so that the type check refuses it by name
# Options that are no keys of the configuration, with the value they want.
_ASIDE = {"dry_run": "none", "print_config": "none", "cfg": "a YAML file or a recipe's name", "profile": "a number of steps"}
_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=")
_USAGE = """\
usage: python -m engine.train --cfg FILE|RECIPE [--amp [bf16|fp16]] [--resume auto|none|PATH] [--seed N] [--out DIR]
                              [--print-config] [--dry-run] [--profile N] [key.sub=value ...]

--cfg           a YAML file, or a shipped recipe: {recipes}
--amp           mixed precision; alone it means bf16
--resume        auto (default) continues the run folder's newest checkpoint, none starts afresh, PATH continues that one
--print-config  print the resolved configuration as YAML and stop
--dry-run       build everything, run one step, write nothing
--profile       profile N steady steps into the run folder (trace and table), or between the marks that Nsight waits for

Overrides stand anywhere on the line, as key=value, --key=value or --key value; the last one wins. MoCo's and timm's
--lr --wd --weight-decay --momentum --opt --warmup-epochs --layer-decay --clip-grad -b/--batch-size --epochs -a/--arch
-j/--workers --moco-k --moco-m --moco-t --moco-dim work too.

{keys}
"""


class Arguments(NamedTuple):
    """What one command line asks for."""

    config: Config
    cfg_path: Path
    """The recipe's file; its stem names the default run folder."""
    dry_run: bool
    print_config: bool
    profile: int
    """Steady steps to profile; 0 is none."""


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """The command line of ``python -m engine.train`` (``sys.argv[1:]`` by default) as checked values.

    Writes the message to stderr and exits with code 2 when the line, the recipe or a value cannot be used; ``--help``
    prints every key and exits with 0.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        print(_help(), end="")
        raise SystemExit(0)
    try:
        return _parse(argv)
    except ConfigError as error:
        say(f"error: {error}")
        raise SystemExit(2) from error


def _parse(argv: list[str]) -> Arguments:
    switches = {"dry_run": False, "print_config": False}
    cfg: str | None = None
    profile = 0
    overrides: dict[str, Any] = {}
    tokens = [token for token in argv if token != "--"]
    while tokens:
        token = tokens.pop(0)
        key, text = _split(token, tokens)
        if key in switches:
            switches[key] = True
        elif key == "cfg":
            cfg = text
        elif key == "profile":
            if not text.isdecimal():
                raise ConfigError(f"--profile: got {text!r}, expected a number of steps")
            profile = int(text)
        else:
            overrides[key] = _value(key, text)
    if cfg is None:
        raise ConfigError(f"no recipe is named; add --cfg FILE or one of --cfg {', --cfg '.join(recipe_names())}")
    path = find_recipe(cfg)
    recipe = read(path, str(path), of_run=path.name == "config.yaml")
    resolve(recipe, str(path))  # so that an error in the file is reported as the file's
    return Arguments(resolve({**recipe, **overrides}, "command line"), path, profile=profile, **switches)


def _split(token: str, rest: list[str]) -> tuple[str, str]:
    """One option as (key, text); takes its value from ``rest`` when the token has none."""
    if not token.startswith("-"):
        if not _OVERRIDE.match(token):
            raise ConfigError(f"unexpected argument {token!r}; recipes are given as --cfg FILE, overrides as key=value")
        key, _, text = token.partition("=")
        if remedy := history.new_name(key, text):
            raise ConfigError(f"{token}: {remedy}")
        if key not in keys():
            raise ConfigError(f"unknown key {key} in {token!r}; {nearest(key)}")
        return key, text
    short = not token.startswith("--")
    if short and len(token) > 2 and token[2] != "=":  # -b64
        token = f"{token[:2]}={token[2:]}"
    name, given, text = token.lstrip("-").partition("=")
    name = name.replace("-", "_")
    key = name if name in _ASIDE else _ALIASES.get(name, name)
    if remedy := history.new_name(key, text):
        raise ConfigError(f"{token.partition('=')[0]}: {remedy}")
    known = key in keys() or key in _ASIDE
    if not known or short != (len(name) == 1):
        raise ConfigError(f"unknown option {token.partition('=')[0]}; {nearest(key)}")
    if key in ("dry_run", "print_config"):
        if given:
            raise ConfigError(f"--{key.replace('_', '-')} takes no value, got {text!r}")
        return key, ""
    if given:
        return key, text
    follows = rest[0] if rest else None
    if key == "amp":
        return key, rest.pop(0) if follows and _PRECISION.match(follows) else "bf16"
    if key == "resume" and (follows is None or follows.startswith("-") or _OVERRIDE.match(follows)):
        return key, "auto"
    if key in keys() and keys()[key].options == (bool,) and follows not in ("true", "false"):
        return key, "true"
    if follows is None or (follows.startswith("-") and not NUMBER.match(follows)):
        wanted = _ASIDE[key] if key in _ASIDE else keys()[key].expected
        raise ConfigError(f"option {token} needs a value: {wanted}")
    return key, rest.pop(0)


def _value(key: str, text: str) -> Any:
    """The text of an override in the key's own type: words stay words (``off`` is no boolean), ``a,b`` is a list."""
    options = keys()[key].options
    if text in ("null", "~") and NoneType in options:
        return None
    if any(typing.get_origin(option) is tuple for option in options) and not text.startswith("["):
        if any(float in typing.get_args(option) for option in options):
            return _value(key, f"[{text}]")
        return [part.strip() for part in text.split(",") if part.strip()]
    number = NUMBER.match(text) and any(option in (int, float) for option in options)  # eval.every=0, not "auto"
    if not number and any(option is str or typing.get_origin(option) is Literal for option in options):
        return text
    try:
        return yaml.load(text, Loader=YamlLoader)
    except ConfigError as error:
        raise ConfigError(f"{key}: got {text!r}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        return text  # the type check names key and value


def recipe_names() -> list[str]:
    """Shipped recipes, by name."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A file as given, else the shipped recipe of that name, with or without ``.yaml``.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.parent == Path(".") and (shipped := RECIPES / f"{name.removesuffix('.yaml')}.yaml").is_file():
        return shipped
    if (path / "config.yaml").is_file():
        raise ConfigError(f"--cfg {name} is a run folder; use --cfg {path / 'config.yaml'}")
    shipped_names = ", ".join(recipe_names())
    raise ConfigError(f"--cfg {name}: no such file, and no shipped recipe of that name; shipped: {shipped_names}")


def _help() -> str:
    """Usage and every key with its type, default and the line of documentation under it in its dataclass."""
    lines = []
    for key, value in flatten(Config()).items():
        plain = list(value) if isinstance(value, tuple) else value
        shown = yaml.dump(plain, Dumper=YamlDumper, default_flow_style=True)
        kind = keys()[key]
        lines += [
            f"{key}={shown.splitlines()[0]}    ({kind.expected})",
            f"    {_documentation(kind.owner)[key.rpartition('.')[2]]}",
        ]
    return _USAGE.format(recipes=", ".join(recipe_names()), keys="\n".join(lines))


@functools.cache
def _documentation(owner: type) -> dict[str, str]:
    """The text under each field of a dataclass, which Python does not keep."""
    pairs = pairwise(next(n for n in ast.walk(ast.parse(inspect.getsource(owner))) if isinstance(n, ast.ClassDef)).body)
    return {
        ast.unparse(e.target): ast.literal_eval(t.value)
        for e, t in pairs
        if isinstance(e, ast.AnnAssign) and isinstance(t, ast.Expr)
    }
