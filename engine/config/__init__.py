"""The configuration: its schema, its text as YAML, and the command line. Importing it loads no torch."""

from engine.config.command_line import RECIPES, Arguments, find_recipe, parse, recipe_names
from engine.config.paths import FILES, absolute
from engine.config.recipe import YamlLoader, from_run, from_yaml, nearest, read, resolve, to_yaml
from engine.config.schema import Config, DataConfig, EvalConfig, Key, OptimConfig, RunConfig, flatten, keys, keys_per_step, validate
from engine.errors import ConfigError
from ppssl.settings import (
    AisConfig,
    BatchNormConfig,
    ContrastConfig,
    EmaConfig,
    EncoderConfig,
    IadmConfig,
    LcrConfig,
    LdfsConfig,
    MethodConfig,
    QueueConfig,
    TeacherConfig,
)

__all__ = [
    "FILES",
    "AisConfig",
    "Arguments",
    "BatchNormConfig",
    "Config",
    "ConfigError",
    "ContrastConfig",
    "DataConfig",
    "EmaConfig",
    "EncoderConfig",
    "EvalConfig",
    "IadmConfig",
    "Key",
    "LcrConfig",
    "LdfsConfig",
    "MethodConfig",
    "OptimConfig",
    "QueueConfig",
    "RECIPES",
    "RunConfig",
    "TeacherConfig",
    "YamlLoader",
    "absolute",
    "find_recipe",
    "flatten",
    "from_run",
    "from_yaml",
    "keys",
    "keys_per_step",
    "nearest",
    "parse",
    "read",
    "recipe_names",
    "resolve",
    "to_yaml",
    "validate",
]
