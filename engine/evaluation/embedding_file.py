"""An embedding on disk: one row for each photo, and how it was made, as Parquet, NumPy's npz or CSV."""

from __future__ import annotations

import csv
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.console import printable
from engine.files import write_atomically, write_text

COLUMNS = ("path", "label", "split")
"""Beside ``feature``; ``label`` where there are labels, ``split`` where there is more than one."""


class Rows(NamedTuple):
    """Some rows of an embedding."""

    texts: dict[str, list[str]]
    """``COLUMNS`` that are there, by name."""
    features: npt.NDArray[np.floating]
    """[n, D] unit rows, float32 or float16."""


class Embedding(NamedTuple):
    """A file that has been read."""

    path: list[str]
    """Posix paths relative to ``about["root"]``."""
    label: list[str] | None
    split: list[str] | None
    feature: npt.NDArray[np.floating]
    """[N, D] unit rows, float32 or float16 as stored."""
    about: dict[str, Any]
    """How it was made: weights_sha256, arch, mean, std, image_size, dim, root, engine and more."""


def check_name(out: Path) -> None:
    """Raises ``ValueError`` for an ending that names no format, ``ImportError`` where pyarrow is needed and missing."""
    if out.suffix not in _WRITERS:
        raise ValueError(f"--out {printable(str(out))}: the ending names the format; use {', '.join(_WRITERS)}")
    if out.suffix == ".parquet":
        _pyarrow(f"--out {printable(str(out))}", f"; without it: --out {printable(out.stem)}.npz or {printable(out.stem)}.csv")


def write(out: Path, parts: Callable[[], Iterable[Rows]], about: dict[str, Any]) -> None:
    """Writes the rows of ``parts()``, which may be called more than once, atomically to ``out``. One part is held at a time."""
    write_atomically(out, lambda temporary: _WRITERS[out.suffix](temporary, parts, about))
    if out.suffix == ".csv":
        write_text(beside(out), json.dumps(about, indent=1) + "\n")


def beside(out: Path) -> Path:
    """The file that says of a CSV how it was made."""
    return out.with_name(f"{out.name}.json")


def read(path: Path) -> Embedding:
    """The embedding in a ``.parquet`` or ``.npz`` file. Raises ``FileNotFoundError``, ``ImportError`` where pyarrow is needed and
    missing, ``ValueError`` for what was not written here or is damaged."""
    shown = printable(str(path))
    if not path.is_file():
        raise FileNotFoundError(f"{shown} is not there; make it: python -m engine.embed RUN FOLDER --out {shown}")
    if path.suffix not in _READERS:
        raise ValueError(
            f"{shown}: only .parquet and .npz can be searched; make one: python -m engine.embed RUN FOLDER --out "
            f"{printable(str(path.with_suffix('.npz')))}"
        )
    try:
        found = _READERS[path.suffix](path)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # of several libraries
        raise ValueError(
            f"{shown} is not an embedding of engine.embed, or is damaged ({type(error).__name__}: {printable(str(error))[:200]}); "
            f"make it again"
        ) from error
    shape = [len(found.path), found.about.get("dim")]
    if list(found.feature.shape) != shape or any(len(c) != shape[0] for c in (found.label, found.split) if c is not None):
        raise ValueError(f"{shown} is damaged: features {list(found.feature.shape)} for {shape[0]} files of {shape[1]} numbers")
    return found


def text_of(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 are written as Python escapes them."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _pyarrow(what: str, instead: str) -> Any:
    try:
        import pyarrow.parquet  # heavy, and no requirement
    except ImportError as error:
        raise ImportError(f"{what}: Parquet needs pyarrow: pip install pyarrow (or 'ppssl-engine[embed]'){instead}") from error
    return pyarrow


def _write_parquet(temporary: str, parts: Callable[[], Iterable[Rows]], about: dict[str, Any]) -> None:
    pa = _pyarrow("--out", "")
    writer = None
    try:
        for rows in parts():
            kind = pa.list_(pa.from_numpy_dtype(rows.features.dtype), about["dim"])
            if writer is None:
                schema = pa.schema([*((name, pa.string()) for name in rows.texts), ("feature", kind)])
                writer = pa.parquet.ParquetWriter(
                    temporary, schema.with_metadata({key: _plain(value) for key, value in about.items()}),
                    use_dictionary=[name for name in rows.texts if name != "path"], write_statistics=[*rows.texts],
                    compression={name: "zstd" for name in rows.texts} | {"feature.list.element": "none"},
                )  # fmt: skip
            feature = pa.FixedSizeListArray.from_arrays(pa.array(rows.features.reshape(-1)), about["dim"])
            writer.write_table(pa.Table.from_arrays([*map(pa.array, rows.texts.values()), feature], schema=writer.schema))
    finally:
        if writer is not None:
            writer.close()


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _read_parquet(path: Path) -> Embedding:
    pa = _pyarrow(printable(str(path)), "; or embed as .npz")
    table = pa.parquet.read_table(path)
    about = {}
    for key, value in (table.schema.metadata or {}).items():
        text = value.decode()
        try:
            about[key.decode()] = json.loads(text) if key.decode() in _NUMBERS else text
        except json.JSONDecodeError:
            about[key.decode()] = text
    column = table.column("feature").combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False).copy()  # Arrow's memory cannot be written to, which torch warns of
    texts = {name: table.column(name).to_pylist() for name in COLUMNS if name in table.column_names}
    return Embedding(texts["path"], texts.get("label"), texts.get("split"), values.reshape(len(table), -1), about)


_NUMBERS = {"dim", "mean", "std", "image_size", "resize", "batch_size", "photos", "epoch", "step"}
"""Of the metadata, what is no text."""


def _write_npz(temporary: str, parts: Callable[[], Iterable[Rows]], about: dict[str, Any]) -> None:
    """As ``np.savez`` writes it, without holding all features at once."""
    texts: dict[str, list[str]] = {}
    dtype, count = np.dtype(np.float32), 0
    for rows in parts():
        for name, values in rows.texts.items():
            texts.setdefault(name, []).extend(values)
        dtype, count = rows.features.dtype, count + len(rows.features)

    def entry(archive: zipfile.ZipFile, name: str, compression: int) -> IO[bytes]:
        info = zipfile.ZipInfo(f"{name}.npy")
        info.compress_type = compression
        return archive.open(info, "w", force_zip64=True)

    with zipfile.ZipFile(temporary, "w") as archive:
        for name, array in (
            {name: np.array(values) for name, values in texts.items()} | {"about": np.array(json.dumps(about))}
        ).items():
            with entry(archive, name, zipfile.ZIP_DEFLATED) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        with entry(archive, "feature", zipfile.ZIP_STORED) as file:
            shape = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count, about["dim"])}
            np.lib.format.write_array_header_1_0(file, shape)
            for rows in parts():
                file.write(np.ascontiguousarray(rows.features).data)


def _read_npz(path: Path) -> Embedding:
    with np.load(path, allow_pickle=False) as found:
        texts = {name: found[name].tolist() for name in COLUMNS if name in found.files}
        about = json.loads(str(found["about"]))
        return Embedding(texts["path"], texts.get("label"), texts.get("split"), found["feature"], about)


def _write_csv(temporary: str, parts: Callable[[], Iterable[Rows]], about: dict[str, Any]) -> None:
    """Columns f0, f1, ... hold the feature, with the digits that give back every bit."""
    number = "%.9g" if about["dtype"] == "float32" else "%.5g"
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        writer, first = csv.writer(file), True
        for rows in parts():
            if first:
                writer.writerow([*rows.texts, *(f"f{i}" for i in range(about["dim"]))])
                first = False
            for texts, feature in zip(zip(*rows.texts.values(), strict=True), rows.features.tolist(), strict=True):
                writer.writerow([*texts, *(number % value for value in feature)])


_WRITERS = {".parquet": _write_parquet, ".npz": _write_npz, ".csv": _write_csv}
_READERS = {".parquet": _read_parquet, ".npz": _read_npz}
