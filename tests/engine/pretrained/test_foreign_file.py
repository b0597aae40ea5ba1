"""Files that are no weights, or are made to fill the memory: each is told by its first bytes, whatever its name."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.pretrained import load_weights
from engine.pretrained.foreign_file import containers, read


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(5000.0)}, buffer)
    return buffer.getvalue()


def legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(5000.0)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def tensors() -> bytes:
    from safetensors.torch import save

    return save({"w": torch.arange(5000.0)})


def zipped(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"), io.BytesIO())
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 97890\n"
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "web page": (lambda: b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page .* browser"),
    "web page behind a mark and spaces": (lambda: b"\xef\xbb\xbf \n<HTML>", "a web page"),
    "pointer": (lambda: POINTER, "a Git LFS pointer.*git lfs pull"),
    "nothing": (lambda: b"", "empty; download it again"),
    "text": (lambda: b"404: Not Found \x1b[2J"[:14], 'a text that begins with "404: Not Found"'),
    "zip without its end": (lambda: saved()[:-500], "cut short or damaged.*download it again"),
    "legacy without its end": (lambda: legacy()[:-500], "cut short or damaged.*download it again"),
    "pickle without its end": (lambda: pickle.dumps({"a": 1}, 2)[:-4], "cut short or damaged"),
    "safetensors without its end": (lambda: tensors()[:-500], "cut short or damaged.*download it again"),
    "zip of a file": (lambda: zipped(**{"checkpoints/best.pth": b"x"}), r"a zip archive of checkpoints/best\.pth.*unpack"),
    "program": (
        lambda: zipped(**{"m/data.pkl": b"x", "m/constants.pkl": b"x"}),
        "TorchScript archive.*state_dict",
    ),
    "tar": (tarred, "a tar archive; unpack it"),
    "gzip": (lambda: gzip.compress(saved()), "compressed with gzip"),
    "photo": (lambda: b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(300), r"an image \(JPEG\); give the weights"),
    "photo of another kind": (lambda: b"RIFF\x24\0\0\0WEBPVP8 " + bytes(300), r"an image \(WEBP\); give the weights"),
    "other bytes": (lambda: bytes(range(1, 200)), "no weights file that is known here.*01 02 03"),
    "bomb": (lambda: zipped(**{"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(50_000_000)}), "unpacks to 50,000,004"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pth.tar"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_weights_file_is_named_by_its_content(name: str, suffix: str, tmp_path: Path) -> None:
    make, words = FILES[name]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=rf"(?s)w{suffix} .*{words}") as refused:
        read(path)
    message = str(refused.value)
    assert "weights_only" not in message and message.isprintable() and len(message) < 500


@pytest.mark.parametrize("name", ["pointer", "web page", "nothing", "safetensors without its end"])
def test_weights_of_a_run_are_told_apart_too(name: str, tmp_path: Path) -> None:
    make, words = FILES[name]
    (tmp_path / "weights.safetensors").write_bytes(make())
    with pytest.raises(ValueError, match=rf"weights\.safetensors is not a safetensors file: it is {words}"):
        load_weights(tmp_path / "weights.safetensors")


def test_the_name_does_not_decide_how_a_file_is_read(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "w.pth")
    (tmp_path / "w.safetensors").write_bytes(saved())
    (tmp_path / "weights").write_bytes(legacy())
    for name in ("w.pth", "w.safetensors", "weights"):
        ((path, found),) = containers(read(tmp_path / name).tree)
        assert path == "" and "w" in found


def test_deep_and_circular_dictionaries_are_walked(tmp_path: Path) -> None:
    tree = deep = {"w": torch.ones(1)}
    for _ in range(20_000):
        tree = {"a" * 50: tree}
    tree["again"] = tree
    found = list(containers(tree))
    assert len(found) == 1 and found[0][1].keys() == deep.keys() and len(found[0][0]) < 1000
    while isinstance(tree, dict) and tree:  # taken apart here: deep structures are freed by recursion
        tree.pop("again", None)
        tree = tree.popitem()[1]
