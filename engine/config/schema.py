"""The whole configuration as frozen dataclasses: every key with its type, default, range, and whether a resumed run may change it.

Values run one way: the defaults here, then a recipe (``recipe.py``), then the command line (``command_line.py``). Every error is a
``ConfigError`` that names the key (or the file), the value that was found and what is expected. pydantic checks types and ranges.

``null`` means "what the method's variant says" or "not set"; ``auto`` means "choose by what the machine has, and say so in the
log". The list of keys is frozen by a test: add to it on purpose only.
"""

from __future__ import annotations

import functools
import itertools
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from annotated_types import Ge, Gt, Le, Lt, MinLen

from engine.errors import ConfigError
from ppssl.settings import FREE, SAID, SETTINGS, Distinct, Resume, Sections, Settings, get_key, method_settings

Protocol = Literal["retrieval", "knn", "linear"]
Measure = Literal["rank1", "rank5", "mAP", "knn_top1", "linear_top1"]
LoggerName = Literal["tensorboard", "csv", "wandb"]
RECIPES = Path(__file__).parent / "recipes"
"""Folder of the shipped recipes."""


@functools.cache
def layout_names() -> tuple[str, ...]:
    """The layouts of data sets by name: each has a shipped recipe that names it."""
    texts = (path.read_text(encoding="utf-8") for path in RECIPES.glob("*.yaml"))
    return tuple(sorted({match[1] for text in texts if (match := re.search(r"^data: \{name: (\w+)", text, re.M))}))


@dataclass(frozen=True)
class OneOf:
    """Values that are known only where the package is installed."""

    choices: Callable[[], tuple[str, ...]]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    lr: Annotated[float, Ge(0), SAID] = 0.03
    """Peak learning rate for the global batch; never rescaled behind your back."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Of sgd and lars."""
    weight_decay: Annotated[float, Ge(0), SAID] = 1e-4
    """sgd and lars: L2, as published; adamw: decoupled from the gradient. On every parameter unless decay_norms is false."""
    schedule: Annotated[Literal["cosine", "constant"], SAID] = "cosine"
    """cosine: half a period from lr to 0 over the whole run, by step; with a warm-up, over the rest of the run."""
    backend: Annotated[Literal["auto", "torch", "apex"], SAID] = "auto"
    """Of sgd. auto: NVIDIA apex's FusedSGD when it is importable, torch's fused SGD otherwise."""
    name: Literal["sgd", "adamw", "lars"] = "sgd"
    """sgd with momentum, as published; adamw wants a far lower lr, 1e-5 to 1e-3; lars, for large batches, a higher one."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adamw: decay of the two running averages, of the gradient and of its square."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Of adamw: what is added to the root of the second."""
    warmup: Annotated[float, Ge(0)] = 0.0
    """Epochs over which the learning rate rises linearly to lr; may be a fraction of one."""
    decay_norms: bool = True
    """Weight decay on biases and norms too, as published. false leaves them out, and what timm excepts; lars then adapts no rate
    of theirs."""
    layer_decay: Annotated[float, Gt(0), Le(1)] = 1.0
    """Factor on the learning rate from each layer of the trunk to the one before it, by timm's layers; 1 is off."""
    clip: Annotated[Annotated[float, Gt(0)] | None, SAID] = None
    """Longest gradient, the norm over all parameters; a longer one is scaled down to it. null is off."""


@dataclass(frozen=True)
class DataConfig:
    """Images and views."""

    name: Annotated[str, OneOf(layout_names)] = "cub"
    """Layout of the data set; birds is the synthetic dataset, folder and list (CSV files) are anybody's photos."""
    root: Annotated[str | None, FREE] = None
    """Folder of the unpacked data set."""
    train: Annotated[str | None, FREE] = None
    """Folder of the training photos below data.root, found by the usual names if null; with data.name=list, the CSV file."""
    test: Annotated[str | None, FREE] = None
    """The same of the test photos; with data.train set, null means none."""
    loader: Annotated[Literal["auto", "dali", "nvjpeg", "torch"], FREE] = "auto"
    """auto: DALI when it is importable, else torch. nvjpeg: torchvision decodes on the GPU; not measured yet, and never by auto."""
    resident: Annotated[Literal["auto", "device", "host", "off"], FREE] = "auto"
    """Keep the decoded set on the device or in host memory, made smaller if it must be; auto: where it fits as it is, else off."""
    aug: Literal["parity", "dali"] = "parity"
    """Color jitter by torchvision's formulas (parity) or by DALI's own operators (dali)."""
    image_size: Annotated[int, Ge(1)] = 224
    """Side of a view in pixels."""
    crop_banner: bool = False
    """Cut the photographer's banner, 20 rows, off the bottom of FGVC-Aircraft's images; published results mostly keep it."""
    workers: Annotated[Annotated[int, Ge(0)] | None, FREE] = None
    """Loader threads or processes; null takes the machine's cores."""
    allow_change: Annotated[bool, FREE] = False
    """Continue a run although training images were added, removed or changed since its checkpoint; else that is refused."""
    classes: Annotated[tuple[str, ...], Distinct(), FREE] = ()
    """Use these classes only, by name or by pattern (Warbler*); empty is all."""
    fraction: Annotated[float, Gt(0), Le(1), FREE] = 1.0
    """Part of the training photos that is used, drawn from each class by seed."""
    extra_roots: Annotated[tuple[str, ...], Distinct(), FREE] = ()
    """More folders of photos to train on, with class folders or without labels."""


@dataclass(frozen=True)
class RunConfig:
    """How the run is executed."""

    compile: Annotated[Literal["auto", "off", "encoder", "step"], FREE] = "auto"
    """torch.compile: nothing, the encoders, or the whole step."""
    cuda_graph: Annotated[Literal["auto", "on", "off"], FREE] = "auto"
    """Capture the step as a CUDA graph."""
    log_every: Annotated[int, Ge(1), FREE] = 10
    """Steps between log lines (each is one host sync)."""
    save_every_steps: Annotated[Annotated[int, Ge(1)] | None, FREE] = None
    """Steps between checkpoints; null is once per epoch."""
    keep: Annotated[int, Ge(1), FREE] = 2
    """Checkpoints kept."""
    max_bad_steps: Annotated[int, Ge(1), FREE] = 10
    """Steps with a non-finite loss or gradient in a row (each is skipped) that stop the run and write a replay bundle."""
    loggers: Annotated[tuple[LoggerName, ...], Distinct(), FREE] = ("tensorboard",)
    """Where the numbers go beside metrics.jsonl: tensorboard, csv (metrics.csv), wandb (Weights & Biases); [] is nowhere."""
    device: Annotated[str, FREE] = "auto"
    """auto is the first CUDA GPU, else the CPU; cpu, cuda, cuda:N or mps (not tested). Several processes take a GPU each."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the labelled test split, and on a validation part of the training images that chooses the best weights."""

    every: Annotated[Annotated[int, Ge(0)] | Literal["auto"], FREE] = 0
    """Epochs between evaluations during training; 0 is before and after only, auto as often as 2 % of the time allows."""
    batch_size: Annotated[int, Ge(1), FREE] = 128
    """Images per batch; part of the result in the published variant, whose mask is scaled over the batch."""
    protocols: Annotated[tuple[Protocol, ...], MinLen(1), Distinct(), FREE] = ("retrieval",)
    """What is measured; knn and linear need the features of the training images too."""
    keep_best: Annotated[Measure | None, FREE] = None
    """Measure on the validation part (eval.validation) by which best.safetensors is kept; never of the test split."""
    validation: Annotated[float, Ge(0), Le(0.5)] | None = None
    """Part of each class's labelled training images that is held out, drawn by seed; null is 0.1 with eval.keep_best, else 0."""
    patience: Annotated[Annotated[int, Ge(1)] | None, FREE] = None
    """Evaluations without a better eval.keep_best after which the run ends; null never ends it early."""


@dataclass(frozen=True)
class General:
    """What stands in no section."""

    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """One seed for weights, order and views."""
    epochs: Annotated[int, Ge(1), SAID] = 100
    """Passes over the training images; a run may be continued with more of them, or with fewer that are not done yet."""
    batch_size: Annotated[int, Ge(1)] = 128
    """Images per step, over all processes."""
    amp: Annotated[Literal["bf16", "fp16"] | None, SAID] = None
    """Automatic mixed precision."""
    out: Annotated[str | None, FREE] = None
    """Run folder; null is runs/<recipe>."""
    resume: Annotated[str, FREE] = "auto"
    """auto continues the run folder's newest checkpoint, none starts afresh, a path continues that checkpoint."""


@dataclass(frozen=True)
class Config(Sections, General):
    """Everything a run depends on: the general keys, the sections of the methods, and these."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


class Key(NamedTuple):
    """A dotted key of the configuration."""

    annotation: Any
    """Its type with ranges and marks."""
    owner: type
    """The dataclass that it is a field of."""

    @property
    def options(self) -> tuple[Any, ...]:
        """The members of its type where that is a union, or the type alone; without ranges and marks."""
        return tuple(_bare(option) for option in _members(_bare(self.annotation)))

    @property
    def marks(self) -> list[Any]:
        """Ranges and marks, those of the members of a union too."""
        found = [m for option in _members(_bare(self.annotation)) for m in getattr(option, "__metadata__", ())]
        return [*getattr(self.annotation, "__metadata__", ()), *found]

    @property
    def resume(self) -> Literal["free", "said", "refused"]:
        """Whether a run that continues a checkpoint may have another value."""
        return next((mark.policy for mark in self.marks if isinstance(mark, Resume)), "refused")

    @property
    def expected(self) -> str:
        """Its type in the words of a recipe."""
        named = next((mark for mark in self.marks if isinstance(mark, OneOf)), None)
        return expected_type((Literal[named.choices()],) if named else self.options)


def _bare(annotation: Any) -> Any:
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


def _members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) not in (None, Literal, tuple) else (annotation,)


def expected_type(options: tuple[Any, ...]) -> str:
    """The members of a type in the words of a recipe."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    parts = []
    for option in options:
        if typing.get_origin(option) is Literal:
            # numbered choices, as stage1 to stage40, by the first and the last of them
            choices = map(str, typing.get_args(option))
            for _, run in itertools.groupby(choices, key=lambda text: text.rstrip("0123456789") or text):
                first, *rest = run
                parts.append(f"{first} to {rest[-1]}" if len(rest) > 2 else ", ".join([first, *rest]))
        elif option == tuple[float, float]:
            parts.append("a list of two numbers")
        elif typing.get_origin(option) is tuple:
            parts.append(f"a list of {expected_type((typing.get_args(option)[0],))}")
        else:
            parts.append(words[option])
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


@functools.cache
def keys() -> dict[str, Key]:
    """Every dotted key, in the order of the dataclasses."""

    def walk(kind: type, prefix: str) -> Iterator[tuple[str, Key]]:
        hints = typing.get_type_hints(kind, include_extras=True)
        for entry in fields(kind):
            if is_dataclass(hints[entry.name]):
                yield from walk(hints[entry.name], f"{prefix}{entry.name}.")
            else:
                owner = next(base for base in kind.__mro__ if entry.name in base.__dict__.get("__annotations__", {}))
                yield prefix + entry.name, Key(hints[entry.name], owner)

    return dict(walk(Config, ""))


def flatten(config: Config) -> dict[str, Any]:
    """Every dotted key with its value, in the order of the dataclasses."""
    return {key: get_key(config, key) for key in keys()}


@functools.cache
def _adapter(key: str) -> pydantic.TypeAdapter:
    checks = pydantic.ConfigDict(strict=True, allow_inf_nan=False, str_min_length=1)
    return pydantic.TypeAdapter(keys()[key].annotation, config=checks)


def checked(key: str, value: Any) -> Any:
    """``value`` in the type of ``key``. Raises ``ConfigError`` naming key, value and what is expected."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and "${" in text:
            raise ConfigError(f"{key}: the interpolation in {text!r} is refused; write the value out")
    value = tuple(value) if isinstance(value, list) else value
    try:
        found = _adapter(key).validate_python(value)
    except pydantic.ValidationError as error:
        kinds = {problem["type"] for problem in error.errors()}
        if "finite_number" in kinds:
            raise ConfigError(f"{key}: got {value!r}, must be finite") from None
        if kinds & _OUT_OF_RANGE and ("too_short" not in kinds or not value):  # a list of wrong members counts as too short too
            raise ConfigError(f"{key}: got {_plain(value)!r}, must {_range(keys()[key])}") from None
        shown = "null" if value is None else f"{_plain(value)!r} ({type(_plain(value)).__name__})"
        quoted = '; quote what YAML would read otherwise: ["*a", b]' if isinstance(value, str) and value.startswith("[") else ""
        raise ConfigError(f"{key}: got {shown}, expected {keys()[key].expected}{quoted}") from None
    if any(isinstance(mark, OneOf) and found not in mark.choices() for mark in keys()[key].marks):
        raise ConfigError(f"{key}: got {value!r}, expected {keys()[key].expected}")
    if any(isinstance(mark, Distinct) for mark in keys()[key].marks) and len(set(found)) < len(found):
        raise ConfigError(f"{key}: got {list(found)!r}, must name {_member(keys()[key])}, each once")
    return found


_DEVICE = re.compile(r"cpu|cuda(:\d+)?|mps")
_OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short", "string_too_short"}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _member(key: Key) -> str:
    return key.expected.removeprefix("a list of ")


def _range(key: Key) -> str:
    """The range of a key in words that follow "must"."""
    low = next((m for m in key.marks if isinstance(m, (Ge, Gt))), None)
    high = next((m for m in key.marks if isinstance(m, (Le, Lt))), None)
    if low is None:
        return f"name at least one of {_member(key)}" if any(isinstance(m, MinLen) for m in key.marks) else "not be empty"
    least = low.ge if isinstance(low, Ge) else low.gt
    if high is None:
        return f"be at least {least}" if isinstance(low, Ge) else f"be above {least}"
    if isinstance(high, Lt) and high.lt == 2**63:
        return "be at least 0 and below 2**63"
    opening = "[" if isinstance(low, Ge) else "("
    return f"be in {opening}{least}, {high.le}]" if isinstance(high, Le) else f"be in {opening}{least}, {high.lt})"


def keys_per_step(config: Config) -> int:
    """How many keys enter the queue in a step: what its size must hold; 0 where the method keeps none."""
    settings = _settings(config)
    return config.batch_size * settings.keys_per_image if settings else 0


def _settings(config: Config) -> Settings | None:
    """What the method is told; None of one that is not registered, which ``build.resolve`` refuses."""
    return method_settings(config) if config.method.name in SETTINGS else None


def validate(config: Config) -> None:
    """Checks every value and what depends on several; ``null`` passes where it stands for a value that is chosen later.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    for key, value in flatten(config).items():
        checked(key, value)
    for refusals in (_of_data, _of_eval, _of_optim, _of_batch):
        for key, remedy in refusals(config):
            raise ConfigError(f"{key}: got {get_key(config, key)!r}, {remedy}")


def _of_data(config: Config) -> Iterator[tuple[str, str]]:
    """(key, remedy) of each value that does not go with the others."""
    data = config.data
    for key in ("data.train", "data.test"):
        if get_key(config, key) is not None and data.name not in ("folder", "list"):
            yield key, f"data.name={data.name} has a split of its own; it goes with data.name=folder and list"
    if data.crop_banner and data.name != "aircraft":
        yield "data.crop_banner", f"only images of data.name=aircraft have a banner, not those of {data.name}"
    if data.crop_banner and data.extra_roots:
        yield "data.crop_banner", "would cut the photos of data.extra_roots too; use one of them"
    stride = re.search(r"_s(\d+)(?:_|$)", config.encoder.arch)
    cell = int(stride[1]) if stride else 32
    kind = SETTINGS.get(config.method.name)
    known = not config.encoder.arch.startswith("timm/")  # only the model knows its stride: build.check_trunk
    if known and kind and kind.divides_image and (cell == 0 or data.image_size % cell):
        yield "data.image_size", f"must be a multiple of {cell}, the stride of the map of {config.encoder.arch}"


def _of_eval(config: Config) -> Iterator[tuple[str, str]]:
    if not (config.run.device == "auto" or _DEVICE.fullmatch(config.run.device)):
        yield "run.device", "must be auto, cpu, cuda, cuda:N (as cuda:1) or mps"
    if config.eval.keep_best:
        if config.eval.validation == 0:
            yield "eval.keep_best", "needs a validation part of the training images: eval.validation above 0, such as 0.1"
        if config.eval.every == "auto":
            yield "eval.every", "goes by the clock, so that eval.keep_best would differ from run to run; give a number of epochs"
    elif config.eval.patience is not None:
        yield "eval.patience", "needs the measure that is to improve: eval.keep_best=rank1, or another"


def _of_optim(config: Config) -> Iterator[tuple[str, str]]:
    optim, usual = config.optim, OptimConfig()
    for key in ("betas", "eps") if optim.name != "adamw" else ("momentum",):
        if getattr(optim, key) != getattr(usual, key):
            of = "sgd and lars; adamw has optim.betas" if optim.name == "adamw" else "adamw"
            yield f"optim.{key}", f"does nothing with optim.name={optim.name}; it is a key of {of}"
    if optim.backend == "apex" and optim.name != "sgd":
        yield "optim.backend", f"apex is used for sgd only, not with optim.name={optim.name}; use torch"
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield "optim.betas", "both must be in [0, 1)"
    if optim.warmup and optim.warmup >= config.epochs:
        yield "optim.warmup", f"must be below epochs ({config.epochs}), of which it is a part"


def _of_batch(config: Config) -> Iterator[tuple[str, str]]:
    least, settings = keys_per_step(config), _settings(config)
    if config.queue.size != "auto" and config.queue.size < least:
        twice = " x 2 with contrast.symmetric" if least > config.batch_size else ""
        yield "queue.size", f"must be at least batch_size ({config.batch_size}){twice}: the keys of a step must fit"
    if config.ais.target == "relations" and config.batch_size < 3 and settings and settings.uses_teacher:
        yield "batch_size", "must be at least 3 with ais.target=relations: an image is compared with the others"
    if config.bn.sync and config.bn.groups > 1:
        yield "bn.groups", "must be 1 with bn.sync: statistics are shared, or of each part"
    if config.batch_size % config.bn.groups:
        yield "bn.groups", f"must divide batch_size ({config.batch_size})"
