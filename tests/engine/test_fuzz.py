"""Whatever is in a recipe, on a command line, in a list or in a checkpoint: it is used, or refused in words, in bounded time."""

import contextlib
import hashlib
import io
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import Config, command_line, from_yaml, keys, to_yaml
from engine.data import layouts
from engine.errors import ConfigError
from engine.training import checkpoint

bounded = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

KEYS = sorted({part for key in keys() for part in (key, key.rpartition(".")[0], key.rpartition(".")[2])} - {""})
SCALARS = [
    "1",
    "-1",
    "0",
    "1e400",
    "null",
    "true",
    "~",
    "''",
    "[]",
    "{}",
    ".nan",
    "!!python/name:os.system",
    "&a x",
    "*a",
    "{a: 1}",
    "9" * 5000,
]
LINES = st.builds(
    "{}{}: {}".format, st.sampled_from(["", "  ", "- ", "\t"]), st.sampled_from(KEYS), st.sampled_from(SCALARS) | st.text()
)
RECIPES = st.lists(LINES, max_size=6).map("\n".join) | st.text() | st.sampled_from(["[" * 4000, "{a: " * 4000, "- " * 4000])


@bounded
@given(RECIPES | st.binary())
def test_a_recipe_is_a_config_or_a_config_error(text: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        try:
            config = from_yaml(path)
        except ConfigError as error:
            assert "recipe.yaml" in str(error) and len(str(error)) < 20_000
        else:
            assert isinstance(config, Config) and from_yaml(to_yaml(config)) == config


TOKENS = st.sampled_from(
    [f"{key}=" for key in KEYS] + ["--cfg", "demo", "--amp", "-b", "--", "-", "--resume", "--profile", "=", "--seed"]
)
WORDS = st.builds(str.__add__, TOKENS, st.sampled_from(["", *SCALARS]) | st.text(max_size=8)) | TOKENS | st.text(max_size=8)


@bounded
@given(st.lists(WORDS, max_size=6))
def test_a_command_line_is_understood_or_refused_with_code_2(words: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            found = command_line.parse(["--cfg", "demo", *words])
        except SystemExit as ended:
            assert ended.code in (0, 2) and (ended.code == 0 or said.getvalue().startswith("error: "))
        else:
            assert isinstance(found.config, Config)


ROWS = st.lists(
    st.sampled_from(["1 a/x.jpg", "2 a/y.jpg", "1 1", "2 0", "1", "", "x y z", "1 ../z", "1 /etc/passwd", "\0"]) | st.text(),
    max_size=5,
)
LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")


@pytest.mark.filterwarnings("ignore:.*official split:UserWarning", "ignore:.*listed twice:UserWarning")
@bounded
@given(st.tuples(ROWS, ROWS, ROWS))
def test_lists_are_read_or_refused_by_name(content: tuple[list[str], ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        for name, rows in zip(LISTS, content, strict=True):
            (root / name).write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))
        try:
            layout = layouts.read("cub", root)
        except (ValueError, FileNotFoundError) as error:
            assert str(root) in str(error)
        else:
            for name in layout.train.names + (layout.test.names if layout.test else []):
                assert Path(os.path.normpath(root / name)).is_relative_to(root)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    state = {"step": 3, "info": {"config": "seed: 1"}, "method": {"w": torch.arange(40.0)}, "optimizer": {"state": {}}}
    return checkpoint.save(tmp_path_factory.mktemp("whole"), state, keep=1).read_bytes()


CHANGES = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "drop"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=4,
)


@bounded
@given(CHANGES, st.booleans())
def test_a_changed_checkpoint_is_refused_by_name(whole: bytes, changes: list[tuple[str, float, bytes]], resealed: bool) -> None:
    """resealed: somebody made the checksum anew; then torch's own reader is what refuses, or plain data comes out."""
    end = len(whole) - len(checkpoint._SEAL) - 32
    content = bytearray(whole[:end] if resealed else whole)
    for kind, share, new in changes:
        at = int(share * (len(content) - 1)) if content else 0
        if kind == "flip" and content:
            content[at] ^= new[0] or 1
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = new
        elif kind == "drop":
            del content[at : at + len(new)]
    if resealed:
        content += checkpoint._SEAL + hashlib.sha256(content).digest()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step_000000003.pt"
        path.write_bytes(content)
        try:
            state = checkpoint.load(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert resealed or bytes(content) == whole
            assert isinstance(state["step"], int)
