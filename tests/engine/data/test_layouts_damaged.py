"""Damaged and hostile lists of the official layouts: read, or refused with file and entry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import MAKERS, make, open_set
from scipy.io import loadmat, savemat

from engine.data import layouts
from engine.data.layouts import matlab


def resave(path: Path, **changes) -> None:
    """A MATLAB file with some variables replaced, or dropped where None."""
    content = {k: v for k, v in loadmat(path).items() if not k.startswith("__")} | changes
    savemat(path, {k: v for k, v in content.items() if v is not None})


def cells(*values) -> np.ndarray:
    array = np.empty((len(values), 1), object)
    array[:, 0] = values
    return array


LEADS_OUT = "leads out of the data folder"


@pytest.mark.parametrize(
    ("name", "file", "new", "match"),
    [
        ("cars", "devkit/cars_meta.mat", b"", "cars_meta.mat: not readable as a MATLAB file"),
        ("cars", "devkit/cars_meta.mat", b"MATLAB 7.3 MAT-file" + bytes(500), "cars_meta.mat: not readable as a MATLAB file"),
        ("cars", "cars_test_annos_withlabels.mat", b"MATLAB 5.0" + bytes(300), "withlabels.mat: not readable as a MATLAB file"),
        ("cars", "devkit/cars_meta.mat", {"class_names": None, "other": 1}, "cars_meta.mat: has no variable class_names"),
        ("cars", "devkit/cars_meta.mat", {"class_names": cells("a")}, "entry 1 of class is 3; expected .* 1..1"),
        ("cars", "devkit/cars_train_annos.mat", {"annotations": [1, 2]}, "annotations has no field fname"),
        ("flowers", "setid.mat", {"trnid": [[1, 99]]}, r"setid.mat: entry 2 of trnid is 99; expected .* 1..15"),
        ("flowers", "setid.mat", {"tstid": [[1.5]]}, "entry 1 of tstid is 1.5"),
        ("flowers", "imagelabels.mat", {"labels": [[0]]}, r"entry 1 of labels is 0; expected .* 1..102"),
        ("dogs", "train_list.mat", {"labels": [[1]]}, "train_list.mat: 6 files but 1 labels"),
        ("dogs", "train_list.mat", {"file_list": cells("a/b.jpg", 7.0)}, "entry 2 of file_list is 7.0; expected text"),
        ("dogs", "train_list.mat", {"file_list": cells("../../x.jpg"), "labels": [[1]]}, LEADS_OUT),
        ("dogs", "test_list.mat", {"file_list": cells("/etc/x.jpg"), "labels": [[1]]}, LEADS_OUT),
        ("butterfly", "Butterfly200_val_release.txt", b"a/b.jpg 1 1\n", r"val_release.txt:1: 'a/b.jpg 1 1' is not"),
        ("butterfly", "Butterfly200_val_release.txt", b"../b.jpg 1 1 1 1\n", LEADS_OUT),
        ("butterfly", "Butterfly200_val_release.txt", b"a\0b.jpg 1 1 1 1\n", "is not the name of a file"),
        ("aircraft", "data/images_variant_test.txt", b"1 Zeppelin\n", "'Zeppelin', which variants.txt does not list"),
        ("aircraft", "data/images_variant_test.txt", b"../1 707-320\n", LEADS_OUT),
        ("nabirds", "images.txt", b"1-2 a.jpg\n12 b.jpg\n", "images.txt:2: id 12 appears twice"),
    ],
)
def test_a_wrong_official_list_is_named(name, file, new, match, tmp_path):
    root = make(name, tmp_path)
    if isinstance(new, bytes):
        (root / file).write_bytes(new)
    else:
        resave(root / file, **new)
    with pytest.raises(ValueError, match=match):
        open_set(name, root)


@pytest.mark.filterwarnings("ignore:.*official split")
def test_a_file_that_is_listed_twice_is_a_warning(tmp_path):
    root = make("dogs", tmp_path)
    names = loadmat(root / "train_list.mat")["file_list"]
    resave(root / "test_list.mat", file_list=names[:2], labels=[[1], [1]])
    with pytest.warns(UserWarning, match="2 files are listed twice, the first is Images/n02085620-Chihuahua/n02085620_0.jpg"):
        open_set("dogs", root)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_no_list_makes_a_reader_fail_in_another_way_or_leave_the_root(lists_root, data):
    """Any text, and any damage to a real list of lines: read as relative paths below the root, or refused as ValueError."""
    name, file = data.draw(st.sampled_from(sorted(lists_root)))
    root = lists_root[name, file]
    whole = (root / f"{file}.whole").read_bytes()
    if data.draw(st.booleans()):
        content = data.draw(st.text("1-0 ./a\n\r\0\u2028é", max_size=40)).encode()
    else:
        content = bytearray(whole)
        for position in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
            content[position] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.integers(0, 2 * len(whole)))]
    (root / file).write_bytes(content)
    try:
        layout = layouts.KNOWN[name].read(root)
    except ValueError as error:
        assert file.rpartition("/")[2] in str(error)
    else:
        for split in (layout.train, layout.test):
            for n in split.names if split else ():
                assert not n.startswith("/") and ".." not in n.split("/") and "\0" not in n
    finally:
        (root / file).write_bytes(whole)


def test_damage_at_any_byte_of_a_matlab_file_is_refused_or_read(tmp_path):
    root = make("dogs", tmp_path, (2, 2))
    path = root / "test_list.mat"
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    for i in range(8):
        damaged = whole[: rng.integers(0, len(whole))].copy() if i % 2 else whole.copy()
        damaged[rng.integers(0, len(damaged), 1 + 2 * i)] = rng.integers(0, 256)
        path.write_bytes(damaged.tobytes())
        try:
            assert all(n.startswith("Images/") for n in layouts.KNOWN["dogs"].read(root).train.names)
        except ValueError as error:
            assert "test_list.mat: " in str(error)


@pytest.mark.parametrize("end", ["kill -SEGV $$", "exec sleep 60"])
def test_a_parser_that_dies_or_hangs_over_a_file_is_an_error_with_its_name(end, tmp_path, monkeypatch):
    """scipy's parser can be crashed by damaged bytes; a stand-in that always crashes after its first answer."""
    root = make("dogs", tmp_path / "dogs", (2, 2))
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh\necho '{{"file_list": [], "labels": []}}'\n{end}\n""")
    python.chmod(0o755)
    monkeypatch.setattr(matlab.sys, "executable", str(python))
    monkeypatch.setattr(matlab, "SECONDS", 1)
    with pytest.raises(ValueError, match="test_list.mat: not readable as a MATLAB file"):
        open_set("dogs", root)


@pytest.fixture(scope="module")
def lists_root(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """(set, list) -> root; beside every list lies a copy, ``.whole``."""
    found = {}
    for name in MAKERS:
        root = make(name, tmp_path_factory.mktemp(name), (2, 2))
        for path in list(root.rglob("*.txt")):
            path.with_name(f"{path.name}.whole").write_bytes(path.read_bytes())
            found[name, path.relative_to(root).as_posix()] = root
    return found
