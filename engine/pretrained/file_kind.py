"""What a file is by its first bytes, not by its name: weights that can be read, or something else that was saved in their place."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

from engine.console import printable
from engine.data import signature

_UNPACKED = 4
"""How many times its own size an archive may unpack to. torch does not compress its files."""
AGAIN = "download it again and compare its size with what the source states"
# First bytes, what such a file is and what helps; images are told by engine.data.
_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for; fetch that: git lfs pull in its repository"),
    (b"\x1f\x8b", "compressed with gzip; unpack it (gzip -d, or tar -xzf where it is a tar archive) and give the file inside"),
    (b"BZh", "compressed with bzip2; unpack it (bzip2 -d) and give the file inside"),
    (b"\xfd7zXZ\0", "compressed with xz; unpack it (xz -d) and give the file inside"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it (zstd -d) and give the file inside"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it and give the file inside"),
    (b"Rar!", "a RAR archive; unpack it and give the file inside"),
    (b"\x89HDF\r\n", "an HDF5 file, as Keras writes; give the PyTorch version of these weights"),
    (b"\x93NUMPY", "a NumPy array; give a file of named tensors, as torch.save(model.state_dict(), FILE) writes"),
    (b"GGUF", "a GGUF file of a language model; give the weights of an image encoder"),
    (b"%PDF", "a PDF; " + AGAIN),
)  # fmt: skip


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as safetensors do: the length of the header, then a JSON object."""
    head = _head(path)
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def other_kind(path: Path) -> str | None:
    """What the file is and what helps, where it is neither safetensors nor of ``torch.save``; None where it is."""
    head = _head(path)
    if head.startswith(b"PK"):
        return _zip_archive(path)
    if not head:
        return f"empty; {AGAIN}"
    for magic, reason in _KINDS:
        if head.startswith(magic):
            return reason
    if kind := signature(head):
        return f"an image ({kind}); give the weights"
    if head[257:262] == b"ustar":
        return _tar_archive(path)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        return (
            "a web page (HTML), which a server sends in place of a file that has moved or needs a login; open its address in a "
            f"browser, then {AGAIN}"
        )
    if head.startswith(b"\x80") or is_safetensors(path):
        return None
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return f'a text that begins with "{printable(text[:40].decode(errors="replace"))}", not a file of tensors; {AGAIN}'
    return f"no weights file that is known here (it begins with {head[:8].hex(' ')}); give a .safetensors file or one of torch.save"


def _zip_archive(path: Path) -> str | None:
    """What is wrong with a zip archive that ought to be one of ``torch.save``; None for nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        return f"cut short or damaged: a file of torch.save without its end ({printable(str(error))}); {AGAIN}"
    names, size = [entry.filename for entry in entries], path.stat().st_size
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > _UNPACKED * size + 2**20:
        return (
            f"an archive of {size:,} bytes that unpacks to {unpacked:,}, as no file of torch.save does: it would fill the memory; "
            f"get the weights elsewhere, or as a .safetensors file"
        )
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "a TorchScript archive, which holds a program; whoever made it can keep its tensors alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
        )
    if any(name.endswith("data.pkl") for name in names):
        return None
    inside = [name for name in names if name.endswith((".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".tar"))]
    shown = ", ".join(printable(name) for name in (inside or names)[:3]) or "nothing"
    return f"a zip archive of {shown}, not a file of torch.save; unpack it and give the weights file inside"


def _tar_archive(path: Path) -> str:
    try:
        with tarfile.open(path, "r:") as archive:
            first = archive.next()
    except tarfile.TarError as error:
        return f"a tar archive that is cut short or damaged ({printable(str(error))}); {AGAIN}"
    if first is not None and first.name in ("sys_info", "pickle", "storages", "tensors"):
        return (
            "a file of PyTorch before 0.2; whoever made it can save it again with a newer one: torch.save(model.state_dict(), FILE)"
        )
    return "a tar archive; unpack it (tar -xf) and give the weights file inside"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)
