"""Everything malformed that somebody may hand to a run, in one table: what is said to it, or that it is passed over."""

import hashlib
import json
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import save_file
from torch import nn

from engine import build, console, run_folder
from engine.config import command_line, flatten, from_yaml
from engine.data import catalog, teacher_cache
from engine.errors import ConfigError
from engine.pretrained import weights_file
from engine.pretrained.run import load_run
from engine.pretrained.third_party import initialize
from engine.replay import replay
from engine.training import checkpoint, find_checkpoint
from engine.training.trainer import Trainer
from ppssl.encoder import FeatureNet, Trunk, projection_head
from ppssl.moco import MoCo
from ppssl.teacher import Teacher, load_descriptions

CPU = torch.device("cpu")


class Malice:
    """Unpickled by anybody, it makes a folder ``executed``."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


class Case(NamedTuple):
    name: str
    run: Callable[[Path], Any]
    """Called with an empty folder, which is the current one."""
    error: type[BaseException] | None
    """What it raises; None where the input is passed over and ``run`` returns what was said."""
    words: tuple[str, ...]


# Images: one good one beside a bad one, which leaves the list with a reason.


def picture(path: Path, size: tuple[int, int] = (20, 16), **options: Any) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)).save(path, **options)
    return path.read_bytes()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def image(name: str, content: bytes | Callable[[Path], object], *words: str) -> Case:
    def run(folder: Path) -> str:
        picture(folder / "good.jpg")
        path = folder / name
        if callable(content):
            content(path)
        else:
            path.write_bytes(content)
        found = catalog.load("folder", folder, workers=1, progress=False)
        assert found.train.names == ("good.jpg",)
        catalog.write_bad_files(found, folder / "bad_files.txt")
        (line,) = (folder / "bad_files.txt").read_text(encoding="utf-8").splitlines()
        assert len(line) < 500
        return line

    return Case(f"image {name!r}", run, None, words)


def cut(path: Path, share: float = 0.5, **options: Any) -> None:
    content = picture(path, (200, 160), **options)
    path.write_bytes(content[: int(share * len(content))])


def flipped_png(path: Path) -> None:
    content = bytearray(picture(path, (200, 160)))
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


IMAGES = [
    image("empty.jpg", b"", "empty.jpg\tempty file"),
    image("text.jpg", b"these are no pixels", "not an image"),
    image("page.jpg", b"<!DOCTYPE html><html>404</html>", "not an image"),
    image("zeros.png", bytes(4096), "not an image"),
    image("start_only.jpg", b"\xff\xd8\xff\xe0", "start_only.jpg\t"),
    image("half.jpg", cut, "truncated"),
    image("half.png", partial(cut, share=0.6), "half.png\t"),
    image("half.webp", partial(cut, share=0.6), "half.webp\t"),
    image("half.gif", partial(cut, share=0.3), "half.gif\t"),
    image("half.bmp", partial(cut, share=0.3), "truncated"),
    image("flipped.png", flipped_png, "flipped.png\t"),
    image("header_only.png", png_header(8, 8), "header_only.png\t"),
    image("no_end.png", png_header(8, 8) + png_chunk(b"IDAT", zlib.compress(bytes(10))), "no_end.png\t"),
    image("bomb.png", png_header(30_000, 30_000) + png_chunk(b"IDAT", b"\0") + png_chunk(b"IEND", b""), "pixels"),
    image("bomb.gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";", "bomb.gif\t"),
    image("bomb.ppm", b"P6 100000 100000 255\n", "pixels"),
    image("no_area.ppm", b"P6 0 0 255\n", "no_area.ppm\t"),
    image("float.tif", lambda p: Image.fromarray(np.full((4, 4), -1, np.float32)).save(p), "floating-point"),
    image("32_bit.tif", lambda p: Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(p), "32-bit"),
    image("notes.txt", b"read me", "not an image file"),
    image("no_suffix", b"\xff\xd8", "no suffix"),
    image("archive.zip", b"PK\x03\x04", "not an image file"),  # never unpacked
    image("gone.jpg", lambda p: p.symlink_to("nowhere.jpg"), "broken link"),
    image("circle.jpg", lambda p: p.symlink_to("circle.jpg"), "broken link"),
    image("pipe.jpg", lambda p: os.mkfifo(p), "not a file"),
    image("new\nline.jpg", b"", "new\\nline.jpg\tempty"),
    image("tab\there.jpg", b"", "tab\\there.jpg\tempty"),
    image("quote'\"`$(rm).jpg", b"", "quote'\"`$(rm).jpg\tempty"),
    image("snow ☃ 鸟.jpg", b"", "snow ☃ 鸟.jpg\tempty"),
    image(os.fsdecode(b"latin-\xe9.jpg"), b"", "latin-", "\tempty"),
]


# Lists: CUB-200-2011's, with one line changed.

CUB = {
    "images.txt": ["1 a/x.jpg", "2 a/y.jpg"],
    "image_class_labels.txt": ["1 1", "2 1"],
    "train_test_split.txt": ["1 1", "2 0"],
}


def cub(name: str, changes: dict[str, list[str] | bytes | None], error: type[BaseException], *words: str) -> Case:
    def run(folder: Path) -> object:
        for file in ("x.jpg", "y.jpg"):
            picture(folder / "images/a" / file)
        for file, lines in (CUB | changes).items():
            if isinstance(lines, bytes):
                (folder / file).write_bytes(lines)
            elif lines is not None:
                (folder / file).write_text("\n".join(lines), encoding="utf-8")
        return catalog.load("birds", folder, workers=1, progress=False)

    return Case(f"list {name}", run, error, words)


def place(name: str, make: Callable[[Path], object], kind: str, error: type[BaseException], *words: str) -> Case:
    """The data root that ``make`` returns (None: the folder itself)."""
    return Case(f"root {name}", lambda f: catalog.load(kind, make(f) or f, workers=1, progress=False), error, words)


LISTS = [
    cub("missing", {"images.txt": None}, FileNotFoundError, "images.txt"),
    cub("empty", {"images.txt": []}, ValueError, "no training files"),
    cub("a line without a value", {"images.txt": ["1 a/x.jpg", "2"]}, ValueError, "images.txt:2", "'2'"),
    cub("an id twice", {"images.txt": ["1 a/x.jpg", "1 a/y.jpg"]}, ValueError, "images.txt:2", "twice"),
    cub("a split of 2", {"train_test_split.txt": ["1 2", "2 0"]}, ValueError, "train_test_split.txt", "'2'"),
    cub("a class in words", {"image_class_labels.txt": ["1 owl", "2 1"]}, ValueError, "image_class_labels.txt", "'owl'"),
    cub("a class below zero", {"image_class_labels.txt": ["1 -1", "2 1"]}, ValueError, "image_class_labels.txt", "'-1'"),
    cub("no class for an image", {"image_class_labels.txt": ["1 1"]}, ValueError, "image_class_labels.txt", "a/y.jpg"),
    cub("no split for an image", {"train_test_split.txt": ["1 1"]}, ValueError, "train_test_split.txt", "a/y.jpg"),
    cub("a file that is not there", {"images.txt": ["1 a/x.jpg", "2 a/z.jpg"]}, FileNotFoundError, "a/z.jpg", "1 of 2"),
    cub("a way out", {"images.txt": ["1 a/x.jpg", "2 ../../etc/passwd"]}, ValueError, "images.txt", "leads out"),
    cub("a way out in the middle", {"images.txt": ["1 a/x.jpg", "2 a/../../y.jpg"]}, ValueError, "leads out"),
    cub("an absolute path", {"images.txt": ["1 a/x.jpg", "2 /etc/passwd"]}, ValueError, "images.txt", "leads out"),
    cub("a NUL", {"images.txt": b"1 a/x.jpg\n2 a\0b.jpg"}, ValueError, "images.txt", "not the name of a file"),
    cub("bytes that are no text", {"images.txt": b"\xff\xfe\x00\x80"}, ValueError, "images.txt"),
    cub("no training image", {"train_test_split.txt": ["1 0", "2 0"]}, ValueError, "no training files"),
    place("that is not there", lambda f: f / "absent", "cub", FileNotFoundError, "absent", "not a folder", "CUB"),
    place("that is a file", lambda f: (f / "x").write_text("") and None or f / "x", "cub", FileNotFoundError, "not a folder"),
    place("of an unknown set", lambda f: f, "unicorns", ValueError, "data.name=unicorns", "cub"),
    place("without an image", lambda f: f, "folder", ValueError, "no training files"),
    place("with a test split only", lambda f: picture(f / "test/a/x.jpg") and None, "folder", ValueError, "no train/"),
    place("with bad images only", lambda f: (f / "x.jpg").write_bytes(b"") or f, "folder", ValueError, "none readable", "x.jpg"),
    place("of cars without cars", lambda f: f, "cars", FileNotFoundError, "cars_train"),
]


# Recipes and command lines.


def recipe(name: str, text: str | bytes, *words: str) -> Case:
    def run(folder: Path) -> object:
        path = folder / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return from_yaml(path)

    return Case(f"recipe {name}", run, ConfigError, ("recipe.yaml", *words))


def line(name: str, *argv: str, words: tuple[str, ...]) -> Case:
    """A command line: one message on stderr, code 2."""

    def run(folder: Path) -> None:
        (folder / "run").mkdir()
        (folder / "run/config.yaml").write_text("seed: 1")
        command_line._parse([*argv] if "--cfg" in argv or name == "without a recipe" else ["--cfg", "demo", *argv])

    return Case(f"command line {name}", run, ConfigError, words)


LAUGHS = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [{', '.join(f'*{chr(ord(c) - 1)}' for _ in range(9))}]\n" for c in "bcdefghi")
RECIPES = [
    recipe("that is no YAML", "a: [", "YAML"),
    recipe("with a tab", "seed:\n\t1", "YAML"),
    recipe("that is a list", "- seed", "mapping"),
    recipe("that is a word", "seed", "mapping"),
    recipe("that is no text", b"\xff\xfe\x81", "YAML"),
    recipe("with a NUL", b"seed: \0", "YAML"),
    recipe("with an unknown key", "sed: 1", "sed", "did you mean seed"),
    recipe("with an unknown key below", "optim: {lrr: 1}", "optim.lrr", "optim.lr"),
    recipe("with a key twice", "seed: 1\nseed: 2", "seed", "twice"),
    recipe("with a section as a number", "optim: 3", "optim"),
    recipe("with text for a number", "epochs: many", "epochs", "'many'", "whole number"),
    recipe("with a boolean for a number", "epochs: true", "epochs", "True"),
    recipe("with half an epoch", "epochs: 1.5", "epochs", "1.5"),
    recipe("with null where there is none", "epochs: null", "epochs", "null"),
    recipe("with no number", "optim: {lr: .nan}", "optim.lr", "finite"),
    recipe("with infinity", "optim: {lr: .inf}", "optim.lr", "finite"),
    recipe("below a range", "batch_size: 0", "batch_size", "at least 1"),
    recipe("above a range", "ema: {decay: 1.0}", "ema.decay", "[0, 1)"),
    recipe("with a seed too large", f"seed: {2**63}", "seed", "2**63"),
    recipe("with digits without end", f"seed: {'9' * 5000}", "YAML"),
    recipe("with a queue below a batch", "queue: {size: 4}", "queue.size", "batch_size"),
    recipe("with an odd image size", "data: {image_size: 65}", "data.image_size", "multiple of 32"),
    recipe("with an unknown precision", "amp: fp8", "amp", "fp8", "bf16"),
    recipe("with no streak", "run: {max_bad_steps: 0}", "run.max_bad_steps", "at least 1"),
    recipe("that calls Python", "seed: !!python/object/apply:os.mkdir [executed]", "python/object", "refused"),
    recipe("that names Python", "seed: !!python/name:os.system", "python/name", "refused"),
    recipe("with a tag of its own", "seed: !include /etc/passwd", "!include", "refused"),
    recipe("with a binary tag", "out: !!binary aGk=", "binary", "refused"),
    recipe("of five megabytes", "seed: 1\n" + "# filler\n" * 600_000, "more than 64 kB", "right file"),
    recipe("nested 21 deep", "seed: " + "[" * 20 + "]" * 20, "line 1", "nested more than 20 deep"),
    recipe("with brackets without end", "seed: " + "[" * 60_000, "nested more than 20 deep"),
    recipe("with an alias", "seed: &s 1\nepochs: *s", "line 2", "*s", "refused"),
    recipe("with a billion laughs", LAUGHS, "refused"),
    line("without a recipe", words=("--cfg",)),
    line("with an unknown recipe", "--cfg", "dmeo", words=("dmeo", "demo")),
    line("with a run folder for a recipe", "--cfg", "run", words=("config.yaml",)),
    line("with an unknown option", "--sed", "1", words=("--sed", "seed")),
    line("with an unknown key", "optim.lrr=1", words=("optim.lrr", "optim.lr")),
    line("with a stray word", "fast", words=("fast",)),
    line("with an option without a value", "--seed", words=("--seed", "whole number")),
    line("with a value for a switch", "--dry-run=yes", words=("--dry-run",)),
    line("with words for a count", "--profile", "all", words=("--profile", "'all'")),
    line("with an unknown precision", "--amp", "fp32", words=("amp", "fp32")),
    line("with Python for a number", "seed=!!python/name:os.system", words=("seed", "python/name")),
    line("with a mapping for a number", "seed={a: 1}", words=("seed",)),
    line("with a number out of range", "optim.momentum=1", words=("optim.momentum", "[0, 1)")),
]


# Checkpoints, weights and run folders.


def state(step: int = 2) -> dict[str, Any]:
    return {"step": step, "info": {"config": ""}, "method": {}, "optimizer": {}, "scaler": {}, "guard": {}, "rng": {}}


def saved(name: str, write: Callable[[Path], object], *words: str, error: type[BaseException] = ValueError) -> Case:
    """A file ``x.pt`` that ``--resume`` is pointed at."""

    def run(folder: Path) -> object:
        path = folder / "x.pt"
        write(path)
        return checkpoint.load(path)

    return Case(f"checkpoint {name}", run, error, ("x.pt", *words))


def changed(path: Path, change: Callable[[bytearray], object]) -> None:
    checkpoint.write(path, state())
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def deflated(path: Path) -> None:
    """A sealed checkpoint of zeros that take a thousandth of their size."""
    checkpoint.write(path, state())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(50_000_000))
    content = path.read_bytes()
    path.write_bytes(content + b"\nPPSSL SHA-256 " + hashlib.sha256(content).digest())


def flip(content: bytearray, at: int) -> None:
    content[at] ^= 1


def resume(name: str, prepare: Callable[[Path], object], error: type[BaseException], *words: str, **keys: str) -> Case:
    """What ``--resume`` makes of the run folder ``run``."""

    def run(folder: Path) -> object:
        prepare(folder / "run/checkpoints")
        cfg = from_yaml(yaml.safe_dump({"resume": "auto"} | keys))
        return find_checkpoint(cfg.resume, folder / "run", flatten(cfg))

    return Case(f"run folder {name}", run, error, words)


def weights(name: str, file: str, write: Callable[[Path], object], *words: str, error: type[BaseException] = ValueError) -> Case:
    """A file that ``encoder.weights`` names."""

    def run(folder: Path) -> object:
        write(folder / file)
        return initialize(Trunk("resnet18_w8"), str(folder / file))

    return Case(f"weights {name}", run, error, (file, *words))


def finished_run(name: str, prepare: Callable[[Path], object], error: type[BaseException], *words: str) -> Case:
    """What ``engine.load`` makes of a folder."""

    def run(folder: Path) -> object:
        prepare(folder)
        return load_run(folder)

    return Case(f"finished run {name}", run, error, words)


def trainer() -> Trainer:
    trunk = Trunk("resnet18_w8")
    method = MoCo(FeatureNet(trunk), projection_head("mlp2", trunk.channels, 4), dim=4, queue_size=8)
    return Trainer(method, SimpleNamespace(steps_per_epoch=1), epochs=1)


RUN = "{method: {name: moco}, encoder: {arch: resnet18_w8, weights: none}}"
CHECKPOINTS = [
    saved("that is not there", lambda p: None, error=FileNotFoundError),
    saved("that is a folder", lambda p: p.mkdir(), error=FileNotFoundError),
    saved("of no bytes", lambda p: p.write_bytes(b""), "cut short"),
    saved("of text", lambda p: p.write_text("step 3"), "not a checkpoint"),
    saved("that is cut", partial(changed, change=lambda c: c.__delitem__(slice(-100, None))), "cut short"),
    saved("with a bit flipped", partial(changed, change=lambda c: flip(c, len(c) // 2)), "checksum"),
    saved("with a bit of its seal flipped", partial(changed, change=lambda c: flip(c, -1)), "checksum"),
    saved("with bytes after it", partial(changed, change=lambda c: c.extend(b"!")), "not a checkpoint"),
    saved("of another program", lambda p: torch.save({"state_dict": {}}, p), "encoder.weights"),
    saved("of a pickle", lambda p: p.write_bytes(pickle.dumps(Malice())), "not a checkpoint"),
    saved("of an archive that would fill the memory", deflated, "unpacks to 50,000,0"),
    saved("with code in it", lambda p: checkpoint.write(p, state() | {"x": Malice()}), "cannot be read"),
    saved("of another format", lambda p: checkpoint.write(p, state() | {"format": 1}), "format 2"),
    saved("without a step", lambda p: checkpoint.write(p, {"info": {}}), "not a checkpoint"),
    saved("with a step in words", lambda p: checkpoint.write(p, state() | {"step": "two"}), "not a checkpoint"),
    saved("with odd info", lambda p: checkpoint.write(p, state() | {"info": [1]}), "not a checkpoint"),
    resume("with damaged checkpoints only", lambda f: f.mkdir(parents=True) or (f / "step_000000001.pt").write_bytes(b"x"),
           ValueError, "none of the 1", "--resume none"),
    resume("without a checkpoint", lambda f: f.mkdir(parents=True), FileNotFoundError, "run holds no checkpoint", resume="run"),
    resume("of another config", lambda f: checkpoint.save(f, state() | {"info": {"config": "seed: 5"}}, keep=1), ValueError,
           "seed", "5", "--resume none"),
    resume("of a config that is none", lambda f: checkpoint.save(f, state() | {"info": {"config": "sed: 5"}}, keep=1), ValueError,
           "step_000000002.pt", "sed"),
    Case("checkpoint of another method", lambda f: trainer().resume(f / "x.pt", state() | {"method": {"x": torch.zeros(1)}}),
         ValueError, ("x.pt", "another method or network")),
    weights("that are not there", "w.pth", lambda p: None, error=FileNotFoundError),
    weights("with code in them", "w.pth", lambda p: torch.save({"state_dict": Malice()}, p), "without running code"),
    weights("of an old pickle", "w.pth.tar", lambda p: p.write_bytes(pickle.dumps({"a": Malice()})), "without running code"),
    weights("of text", "w.pth", lambda p: p.write_text("no"), "a text"),
    weights("of a list", "w.pth", lambda p: torch.save([1], p), "list"),
    weights("of another network", "w.pth", lambda p: torch.save({"q": torch.zeros(2)}, p), "q"),
    weights("of other shapes", "w.pth", lambda p: torch.save({"conv1.weight": torch.zeros(2)}, p), "conv1.weight"),
    weights("that are no safetensors", "w.safetensors", lambda p: p.write_bytes(b"\xff" * 64), "safetensors"),
    weights("with a header without end", "w.safetensors", lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{}"), "safetensors"),
    finished_run("without a config", lambda f: None, FileNotFoundError, "config.yaml"),
    finished_run("without weights", lambda f: (f / "config.yaml").write_text(""), FileNotFoundError, "weights.safetensors"),
    finished_run("with a damaged config", lambda f: (f / "config.yaml").write_text("[1"), ConfigError, "config.yaml"),
    finished_run("with damaged weights", lambda f: (f / "config.yaml").write_text(RUN)
               and (f / "weights.safetensors").write_bytes(b"x"), ValueError, "weights.safetensors"),
    finished_run("with weights of another network", lambda f: (f / "config.yaml").write_text(RUN)
               and weights_file.save_weights(f / "weights.safetensors", {"a": torch.zeros(1)}, {}), ValueError, "does not fit"),
    Case("replay of something else", lambda f: (f / "b.pt").write_bytes(b"bundle") and replay(f / "b.pt"), ValueError,
         ("cannot be read as a replay bundle: it is", "RUN/replay")),
    Case("replay of a checkpoint", lambda f: replay(checkpoint.save(f, state(), keep=1)), ValueError, ("no replay bundle",)),
    Case("replay with code in it", lambda f: checkpoint.write(f / "b.pt", state() | {"replay": Malice()}) or replay(f / "b.pt"),
         ValueError, ("b.pt", "cannot be read")),
]  # fmt: skip


# Caches: only time is lost.


def sealed(text: str) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def image_cache(name: str, change: Callable[[dict], object] | str, words: str = "", *, seal: bool = True) -> Case:
    """seal: what is changed has the digest of what it is now, as if a former version had written it."""

    def run(folder: Path) -> str:
        picture(folder / "data/x.jpg", (20, 16))
        load = partial(catalog.load, "folder", folder / "data", workers=1, cache_dir=folder / "cache", progress=False)
        load()
        (path,) = (folder / "cache").iterdir()
        if isinstance(change, str):
            path.write_text(change)
        else:
            digest, _, text = path.read_text().partition("\n")
            content = json.loads(text)
            change(content)
            text = json.dumps(content)
            path.write_text(sealed(text) if seal else f"{digest}\n{text}")
        with console.console.capture() as said:
            sizes = load().train.sizes.tolist()
        return f"{said.get()} sizes {sizes}"

    return Case(f"cache of images {name}", run, None, (words, "sizes [[16, 20]]"))


def stored_rows(path: Path, rows: np.ndarray) -> None:
    save_file({"rows": rows}, path, {"sha256": hashlib.sha256(rows.tobytes()).hexdigest()})


def teacher_rows(name: str, write: Callable[[Path], object]) -> Case:
    def run(folder: Path) -> str:
        picture(folder / "data/x.jpg")
        images = catalog.load("folder", folder / "data", workers=1, progress=False).train
        visual = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        teacher = Teacher(visual, torch.eye(3), logit_scale=1.0, image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
        look = partial(teacher_cache.embeddings, teacher, images, device=CPU, cache_dir=folder / "cache", workers=0)
        good = look()
        (path,) = (folder / "cache/teacher").iterdir()
        write(path)
        with console.console.capture() as said:
            assert torch.equal(look(), good)
        return said.get()

    return Case(f"cache of the teacher {name}", run, None, (".safetensors is damaged",))


CACHES = [
    image_cache("that is no JSON", sealed("{")),
    image_cache("that is a list", sealed("[]")),
    image_cache("with brackets without end", sealed("[" * 100_000)),
    image_cache("without a digest", "{}", "is damaged"),
    image_cache("with a wrong size", lambda c: c["files"]["x.jpg"].__setitem__(2, 18), "is damaged", seal=False),
    image_cache("of another version", lambda c: c.update(version=0)),
    image_cache("with a row in words", lambda c: c["files"].update({"x.jpg": "wide"})),
    image_cache("with half a row", lambda c: c["files"]["x.jpg"].pop()),
    image_cache("with a size that cannot be", lambda c: c["files"]["x.jpg"].__setitem__(2, -5)),
    teacher_rows("with code in it", lambda p: np.save(p.open("wb"), np.array([Malice()]), allow_pickle=True)),
    teacher_rows("of a pickle", lambda p: p.write_bytes(pickle.dumps(Malice()))),
    teacher_rows("of no bytes", lambda p: p.write_bytes(b"")),
    teacher_rows("with a byte turned", lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1]))),
    teacher_rows("of a former version", lambda p: save_file({"rows": np.zeros((1, 3), np.float16)}, p)),
    teacher_rows("that is cut", lambda p: p.write_bytes(p.read_bytes()[:-2])),
    teacher_rows("of another shape", lambda p: stored_rows(p, np.zeros((2, 3), np.float16))),
    teacher_rows("of another type", lambda p: stored_rows(p, np.zeros((1, 3), np.float64))),
    teacher_rows("with no number", lambda p: stored_rows(p, np.full((1, 3), math.nan, np.float16))),
    teacher_rows("that is an archive", lambda p: np.savez(p.open("wb"), a=np.zeros(1))),
]


# The environment, and text corpora.


def variable(name: str, value: str, *words: str) -> Case:
    def run(folder: Path) -> None:
        (folder / "file").write_text("")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            build.check_environment(writes=True)

    return Case(f"environment {name}={value}", run, ConfigError, (name, *words))


def corpus(name: str, text: str, count: int, *words: str) -> Case:
    def run(folder: Path) -> object:
        (folder / "corpus.yaml").write_text(text)
        return load_descriptions("corpus.yaml", count)

    return Case(f"corpus {name}", run, ValueError, ("corpus.yaml", *words))


OTHERS = [
    variable("WORLD_SIZE", "abc", "'abc'", "whole number"),
    variable("WORLD_SIZE", "0", "at least 1"),
    variable("WORLD_SIZE", "2.0", "'2.0'"),
    variable("RANK", "-1", "at least 0"),
    variable("LOCAL_RANK", "first", "'first'"),
    variable("OMP_NUM_THREADS", "all", "'all'"),
    variable("OMP_NUM_THREADS", "0", "at least 1"),
    variable("OMP_NUM_THREADS", "2,", "'2,'"),
    variable("PPSSL_CACHE", "file/below", "file/below", "cannot be written"),
    variable("PPSSL_CACHE", "/proc/ppssl", "/proc/ppssl", "cannot be written"),
    corpus("of another form", "- a\n- b", 2, "descriptions"),
    corpus("of text", "birds", 2, "descriptions"),
    corpus("that calls Python", "descriptions: !!python/object/apply:os.mkdir [executed]", 2, "descriptions"),
    corpus("with one sentence", "descriptions: [{text: a bird}]", 2, "ais.prompts", "has 1"),
    corpus("with fewer than asked for", "descriptions: [{text: a bird}, {text: a cat}]", 3, "ais.count", "has 2"),
    corpus("of a megabyte", "descriptions:\n" + "- {text: a bird}\n" * 60_000, 1, "corpus.yaml", "at most"),
    corpus("of laughs", "a: &a [b, b]\nc: &c [*a, *a]\ndescriptions: [{text: *c}]", 1, "corpus.yaml", "descriptions: ["),
    corpus("with brackets without end", "descriptions: " + "[" * 20_000, 1, "corpus.yaml", "descriptions: ["),
    Case("corpus that is not there", lambda f: load_descriptions("unicorns", 2), FileNotFoundError, ("unicorns", "birds")),
    Case("teacher with code in it", lambda f: (f / "clip.pt").write_bytes(pickle.dumps(Malice()))
         and Teacher.from_open_clip("ViT-B-32", "clip.pt", ["a"]), ValueError, ("clip.pt", "can run code")),
    Case("log with damaged lines", lambda f: (f / "metrics.jsonl").write_bytes(b'{"step": 1}\n5\n{"st\n\xff\n{"step": "x"}\n')
         and str(run_folder.read_metrics(f)), None, ("[{'step': 1}]",)),
]  # fmt: skip

CASES = [*IMAGES, *LISTS, *RECIPES, *CHECKPOINTS, *CACHES, *OTHERS]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES, ids=[case.name.encode("ascii", "backslashreplace").decode() for case in CASES])
def test_malformed_input_is_answered_as_specified(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    if case.error is None:
        said = str(case.run(folder))
    else:
        with pytest.raises(case.error) as raised:
            case.run(folder)
        said = str(raised.value)
        assert len(said) < 5000
    for word in case.words:
        assert word in said, f"{word!r} is not in {said!r}"
    assert not (folder / "executed").exists()


def test_the_table_is_as_large_as_promised() -> None:
    assert len(CASES) >= 60 and len({case.name for case in CASES}) == len(CASES)
