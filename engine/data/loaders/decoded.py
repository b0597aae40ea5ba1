"""Every image of a list decoded once: 8-bit pixels in one flat array, kept on disk so that the next start decodes nothing.

The file is a safetensors file with two tensors: ``crc32`` [N] uint32 of each image's pixels, and ``pixels`` [total] uint8: images
of [height, width, 3] in list order. Its name and its metadata hold a key of the files' names, byte sizes and modification times, of
the decoded sizes and of the format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.console import bar, printable, say
from engine.data.catalog import ImageList
from engine.data.machine import cores
from engine.data.views import resized
from engine.files import locked, read_metadata, write_atomically

FORMAT = 2
"""Of the file; another number, and it is regenerated."""
_SPARE_DISK = 1 << 30
"""Bytes that a cache leaves free on its disk."""


class Decoded:
    """The pixels of a list.

    pixels: [total] uint8; backed by the file where there is one. offsets: [N] int64, where each image begins. sizes: [N, 2] int32,
    height and width as they are kept.
    stored: the file that they were read from with its [N] checksums; None for pixels that were decoded by this process.
    """

    def __init__(
        self, images: ImageList, pixels: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int32],
        stored: tuple[Path, npt.NDArray[np.uint32]] | None = None,
    ):  # fmt: skip
        self.pixels, self.offsets, self.sizes = pixels, offsets, sizes
        self._images, self._stored = images, stored
        self._checked = np.full(len(sizes), stored is None)
        self._said = False

    def image(self, i: int) -> npt.NDArray[np.uint8]:
        """[height, width, 3] of image ``i``."""
        height, width = self.sizes[i].tolist()
        return self.pixels[self.offsets[i] : self.offsets[i] + 3 * height * width].reshape(height, width, 3)

    def check(self, i: int) -> None:
        """Before image ``i`` is read: compares its pixels with their checksum, once. One that the file holds wrong is decoded again
        here, and the file is removed, so that the next start makes it anew. Safe in several threads; raises as ``ImageList.read``.
        """
        if self._checked[i]:
            return
        path, sums = self._stored
        if zlib.crc32(self.image(i)) != sums[i]:
            if not self._said:
                self._said = True
                say(f"{path} is damaged; images are decoded anew where it is, and the next start makes it again")
            with contextlib.suppress(OSError):  # removed by another process, or not ours to remove
                path.unlink()
            self.image(i)[:] = _kept(self._images, self.sizes, i)  # the map is private: nobody else sees it
        self._checked[i] = True


def kept_sizes(images: ImageList, short_side: int | None) -> npt.NDArray[np.int32]:
    """[N, 2] height and width of the images when a short side above ``short_side`` is brought down to it; None: as they are."""
    if short_side is None:
        return images.sizes
    sizes = [resized((h, w), short_side) if min(h, w) > short_side else (h, w) for h, w in images.sizes.tolist()]
    return np.array(sizes, np.int32).reshape(-1, 2)


def total_bytes(sizes: npt.NDArray[np.int32]) -> int:
    """Bytes of the decoded images."""
    return int(3 * sizes.astype(np.int64).prod(1).sum())


def decode(
    images: ImageList, *, short_side: int | None = None, cache_dir: Path | None = None, workers: int | None = None
) -> Decoded:
    """The decoded list, from the file that an earlier start left, or by decoding every image and leaving one.

    short_side: larger images are resized (antialiased) to it; None keeps them as they are.
    cache_dir: where files are kept; None, or a disk without room (a line says so), keeps the pixels in memory only.
    workers: decoding threads; None takes the machine's cores.
    Raises BrokenFile naming a file that no longer decodes to what the list says.
    """
    sizes = kept_sizes(images, short_side)
    offsets = np.zeros(len(images), np.int64)
    np.cumsum(3 * sizes[:-1].astype(np.int64).prod(1), out=offsets[1:])
    total = total_bytes(sizes)
    if cache_dir is not None:
        try:
            return _from_file(images, sizes, offsets, total, cache_dir / "decoded", workers)
        except OSError as error:
            say(f"decoded images are kept in memory only: {error}")
    pixels = np.empty(total, np.uint8)

    def keep(i: int, image: npt.NDArray[np.uint8]) -> None:
        pixels[offsets[i] : offsets[i] + image.size] = image.reshape(-1)

    _decode_all(images, sizes, keep, workers)
    return Decoded(images, pixels, offsets, sizes)


def cache_path(images: ImageList, sizes: npt.NDArray[np.int32], folder: Path) -> Path:
    """The file of a list: its place and names tell which list it is, the key after them which state of the files."""
    which = hashlib.sha256(f"{images.root.resolve()}\0{images.names}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return folder / f"{which}-{_key(images, sizes)[:16]}.safetensors"


def _key(images: ImageList, sizes: npt.NDArray[np.int32]) -> str:
    digest = hashlib.sha256(f"{FORMAT}\0{images.fingerprint}\0".encode())
    digest.update(np.ascontiguousarray(images.sizes, np.int32).tobytes())
    digest.update(np.ascontiguousarray(sizes, np.int32).tobytes())
    return digest.hexdigest()


def _from_file(
    images: ImageList, sizes: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], total: int, folder: Path, workers: int | None
) -> Decoded:
    """The pixels as a map of the file, which is made first where it is missing, of another state or damaged."""
    path, key = cache_path(images, sizes, folder), _key(images, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    count = len(images)

    def waits(holder: str) -> None:
        say(f"waiting for {printable(holder)}, which decodes the same images into {path}")

    with locked(path.with_suffix(".lock"), waits):  # of several processes one decodes
        start = _start_of_data(path, key, 4 * count + total)
        if start is None:
            for left in folder.glob(f".{path.name}.*.tmp"):  # of a process that was killed: the lock is ours
                left.unlink(missing_ok=True)
            free = shutil.disk_usage(folder).free
            if free < total + _SPARE_DISK:
                raise OSError(f"{folder} has {free / 1e9:.1f} GB free, {(total + _SPARE_DISK) / 1e9:.1f} GB are needed")
            say(f"decoding {count} images once, {total / 1e9:.2f} GB, into {path}")
            write_atomically(path, lambda temporary: _write(Path(temporary), images, sizes, offsets, total, key, workers))
            for old in folder.glob(f"{path.name.split('-')[0]}-*.safetensors"):
                if old != path:  # the same list when its files were others; who has it mapped keeps it
                    old.unlink(missing_ok=True)
            start = _start_of_data(path, key, 4 * count + total)
            assert start is not None
        with path.open("rb") as file:  # a private map, which may be written: torch wants that, and so does a repair
            pixels = np.memmap(file, np.uint8, "c", offset=start + 4 * count, shape=(total,))
            file.seek(start)
            sums = np.frombuffer(file.read(4 * count), "<u4")
    return Decoded(images, pixels, offsets, sizes, (path, sums))


def _start_of_data(path: Path, key: str, size: int) -> int | None:
    """Bytes before the ``size`` bytes of tensors; None for a file that is missing, damaged, cut off or of another state."""
    if not path.is_file():
        return None
    try:
        metadata = read_metadata(path)
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
    except Exception:  # safetensors raises a type of its own for anything that is not its format
        metadata, start = {}, 0
    if metadata.get("key") != key or path.stat().st_size != start + size:
        say(f"{path} is damaged or was made from other files; decoding anew")
        return None
    return start


def _write(
    path: Path, images: ImageList, sizes: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], total: int, key: str,
    workers: int | None,
) -> None:  # fmt: skip
    table = 4 * len(images)
    tensors = {
        "crc32": {"dtype": "U32", "shape": [len(images)], "data_offsets": [0, table]},
        "pixels": {"dtype": "U8", "shape": [total], "data_offsets": [table, table + total]},
    }
    header = json.dumps({"__metadata__": {"key": key, "format": str(FORMAT)}, **tensors}).encode()
    header += b" " * (-(len(header) + 8 + table) % 4096)  # pixels begin on a page
    sums = np.zeros(len(images), "<u4")
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.flush()
        start = 8 + len(header)

        def put(data: memoryview, place: int) -> None:
            while data:  # a full disk is an error here; through a map it would be the end of the process
                written = os.pwrite(file.fileno(), data, place)
                data, place = data[written:], place + written

        def keep(i: int, image: npt.NDArray[np.uint8]) -> None:
            sums[i] = zlib.crc32(image)
            put(memoryview(image.reshape(-1)), start + table + int(offsets[i]))

        _decode_all(images, sizes, keep, workers)
        put(memoryview(sums).cast("B"), start)


def _kept(images: ImageList, sizes: npt.NDArray[np.int32], i: int) -> npt.NDArray[np.uint8]:
    """[height, width, 3] of image ``i`` as it is kept."""
    image = images.read(i)
    height, width = sizes[i].tolist()
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(image)


def _decode_all(
    images: ImageList, sizes: npt.NDArray[np.int32], keep: Callable[[int, npt.NDArray[np.uint8]], None], workers: int | None
) -> None:
    """Hands every image to ``keep``, from several threads and in any order: PIL decodes without the interpreter's lock."""

    def one(i: int) -> None:
        keep(i, _kept(images, sizes, i))

    with bar() as progress, ThreadPoolExecutor(workers or cores()) as pool:
        task = progress.add_task("decoding every image once", total=len(images))
        try:
            for _ in pool.map(one, range(len(images))):
                progress.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
