"""Every layout, the official ones from miniature copies: lists, labels, splits, order, counts, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import make, open_set, picture
from PIL import Image
from scipy.io import loadmat, savemat

from engine.config import Config, DataConfig, from_yaml
from engine.data import layouts
from engine.data.layouts import matlab
from engine.data.loaders.choose import build_loader
from engine.data.loaders.clean_batches import clean_batches
from engine.errors import ConfigError


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    root = tmp_path / "cub"
    names = ["001.Auk/Auk 1.jpg", "001.Auk/Auk_2.jpg", "002.Bee_eater/b1.jpg", "002.Bee_eater/b2.jpg"]
    for i, name in enumerate(names):
        picture(root / "images" / name, seed=i)
    (root / "images.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(names, 1)))
    (root / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 2\n")
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n4 0\n")
    (root / "classes.txt").write_text("1 001.Auk\n2 002.Bee_eater\n")
    return root


def test_folder_with_classes(folder):
    train, test, bad = open_set("folder", folder)
    assert train.names == ("train/a b/1.jpg", "train/a b/2.png", "train/größe/x.jpeg")
    assert train.classes == test.classes == ("a b", "größe")
    assert train.labels.dtype == np.int64 and train.labels.tolist() == [0, 0, 1] and test.labels.tolist() == [0, 1]
    assert train.sizes.dtype == np.int32 and train.sizes.tolist() == [[14, 20]] * 3
    assert train.path(2) == folder / "train/größe/x.jpeg" and train.path(2).is_file() and len(train) == 3
    assert train.plain.all() and bad == ()


def test_val_is_the_test_split_where_there_is_no_test(folder):
    (folder / "test").rename(folder / "val")
    assert open_set("folder", folder).test.names == ("val/a b/3.jpg", "val/größe/y.JPG")


@pytest.mark.parametrize("below", ["", "train"])
def test_flat_folder_has_no_labels(tmp_path, below):
    for name in ("b.jpg", "a.png", ".hidden.jpg"):
        picture(tmp_path / below / name)
    if not below:
        picture(tmp_path / "deep/er/c.jpg")
    train, test, _ = open_set("folder", tmp_path)
    prefix = f"{below}/" if below else ""
    assert train.names == (f"{prefix}a.png", f"{prefix}b.jpg", *(() if below else ("deep/er/c.jpg",)))
    assert train.labels is None and train.classes == () and test is None


def test_a_linked_folder_is_read_once_and_a_circle_ends(folder, tmp_path):
    picture(tmp_path / "elsewhere/z.jpg")
    (folder / "train/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(tmp_path / "elsewhere")
    train = open_set("folder", folder).train
    assert [n for n in train.names if "linked" in n] == ["train/linked/z.jpg"]


def test_cub(cub, recwarn):
    train, test, bad = open_set("birds", cub)
    assert train.names == ("images/001.Auk/Auk 1.jpg", "images/002.Bee_eater/b1.jpg")
    assert test.names == ("images/001.Auk/Auk_2.jpg", "images/002.Bee_eater/b2.jpg")
    assert train.labels.tolist() == test.labels.tolist() == [0, 1] and train.classes == ("001.Auk", "002.Bee_eater")
    assert bad == () and not recwarn.list
    (cub / "classes.txt").unlink()
    assert open_set("birds", cub).train.classes == ("001.Auk", "002.Bee_eater")


def test_the_folder_inside_the_archive_is_found(cub, tmp_path):
    cub.rename(tmp_path / "CUB_200_2011")
    with pytest.warns(UserWarning, match="official split"):
        assert len(open_set("cub", tmp_path).train) == 2


@pytest.mark.parametrize(
    ("file", "old", "new", "error", "match"),
    [
        ("images.txt", "b1.jpg", "gone.jpg", FileNotFoundError, r"images/002.Bee_eater/gone.jpg is listed but not there \(1 of 4"),
        (
            "images.txt",
            "002.Bee_eater/b1.jpg",
            "../../b1.jpg",
            ValueError,
            r"'../../b1.jpg' leads out of the data folder",
        ),
        (
            "images.txt",
            "002.Bee_eater/b1.jpg",
            "/etc/b1.jpg",
            ValueError,
            r"'/etc/b1.jpg' leads out of the data folder",
        ),
        ("images.txt", "3 002.Bee_eater/b1.jpg", "3", ValueError, r"images.txt:3: '3' is not '<id> <value>'"),
        ("images.txt", "3 ", "2 ", ValueError, r"images.txt:3: id 2 appears twice"),
        (
            "image_class_labels.txt",
            "3 2\n",
            "",
            ValueError,
            r"class_labels.txt: no line for image 3 \(002.Bee_eater/b1",
        ),
        ("image_class_labels.txt", "3 2", "3 two", ValueError, r"image 3 has class 'two'"),
        ("train_test_split.txt", "3 1\n", "", ValueError, r"train_test_split.txt: no line for image 3"),
        ("train_test_split.txt", "3 1", "3 2", ValueError, r"image 3 has '2'; expected 1 \(train\) or 0 \(test\)"),
    ],
)
def test_a_wrong_list_is_named(cub, file, old, new, error, match):
    text = (cub / file).read_text()
    assert old in text
    (cub / file).write_text(text.replace(old, new, 1))
    with pytest.raises(error, match=match):
        open_set("birds", cub)


def test_missing_folders_and_wrong_layouts(cub, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="data.root=.*nowhere is not a folder.*CUB_200_2011.tgz"):
        open_set("cub", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="data.root is not set.*train/<class>"):
        open_set("folder", None)
    with pytest.raises(FileNotFoundError, match="has no images.txt, image_class_labels.txt, train_test_split.txt, images/"):
        open_set("cub", folder)
    (cub / "train_test_split.txt").unlink()
    with pytest.raises(FileNotFoundError, match="has no train_test_split.txt, which data.name=birds needs: remove .* drawn again"):
        open_set("birds", cub)
    with pytest.raises(ValueError, match="data.name=cubs: unknown; known are birds, cub, cars"):
        open_set("cubs", tmp_path)
    (folder / "train").rename(folder / "training")
    with pytest.raises(ValueError, match="has test/ but no train/"):
        open_set("folder", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no training files.*expected your own photos"):
        open_set("folder", tmp_path / "empty")


def test_an_empty_class_of_cub_is_named(cub):
    with (cub / "classes.txt").open("a") as file:
        file.write("3 003.Cuckoo\n")
    (cub / "images/001.Auk/Auk 1.jpg").write_bytes(b"")
    result = open_set("birds", cub)
    assert result.train.classes == ("001.Auk", "002.Bee_eater", "003.Cuckoo") and result.train.labels.tolist() == [1]
    assert [b.name for b in result.bad] == [
        "images/001.Auk/Auk 1.jpg",
        "train: class 001.Auk",
        "train: class 003.Cuckoo",
        "test: class 003.Cuckoo",
    ]


BLACK, SOOTY = "001.Black_footed_Albatross/Black_footed_Albatross", "003.Sooty_Albatross/Sooty_Albatross"
# What every miniature must be read as: training names and labels, test names and labels, class names.
OFFICIAL = {
    "cub": (
        [f"images/{BLACK}_0000.jpg", f"images/{SOOTY}_0001.jpg"],
        [0, 0, 1, 1, 2, 2],
        [f"images/{BLACK}_0002.jpg", f"images/{SOOTY}_0003.jpg"],
        [0, 0, 1, 1, 2, 2],
        ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"),
    ),
    "cars": (
        ["cars_train/00001.jpg", "cars_train/00006.jpg"],
        [2, 2, 1, 1, 0, 0],
        ["cars_test/00001.jpg", "cars_test/00006.jpg"],
        [2, 2, 1, 1, 0, 0],
        ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"),
    ),
    "aircraft": (
        ["data/images/0000000.jpg", "data/images/0002001.jpg"],
        [0, 1, 2, 0, 1, 2],
        ["data/images/0000002.jpg", "data/images/0002003.jpg"],
        [0, 0, 1, 1, 2, 2],
        ("707-320", "Boeing 717", "F-16A/B"),
    ),
    "nabirds": (
        ["images/0817/0000000021dc4d0cbfe1000000000000.jpg", "images/1003/0000000221dc4d0cbfe1000000000001.jpg"],
        [1, 1, 0, 0, 2, 2],
        ["images/0817/0000000021dc4d0cbfe1000000000002.jpg", "images/1003/0000000221dc4d0cbfe1000000000003.jpg"],
        [1, 1, 0, 0, 2, 2],
        ("Common Goldeneye (Adult male)", "Oak Titmouse", "Cactus Wren"),
    ),
    "flowers": (
        ["jpg/image_00006.jpg", "jpg/image_00004.jpg"],
        [101, 76, 0, 101, 0, 76],
        ["jpg/image_00015.jpg", "jpg/image_00011.jpg"],
        [101, 0, 76, 76, 101, 0],
        None,
    ),
    "butterfly": (
        ["images/001.Atrophaneura_horishanus/000.jpg", "images/003.Byasa_alcinous/001.jpg"],
        [0, 1, 2, 0, 1, 2],
        ["images/001.Atrophaneura_horishanus/002.jpg", "images/003.Byasa_alcinous/003.jpg"],
        [0, 1, 2, 0, 1, 2],
        ("001.Atrophaneura_horishanus", "002.Atrophaneura_varuna", "003.Byasa_alcinous"),
    ),
    "dogs": (
        ["Images/n02085620-Chihuahua/n02085620_0.jpg", "Images/n02116738-African_hunting_dog/n02116738_1.jpg"],
        [0, 0, 1, 1, 2, 2],
        ["Images/n02085620-Chihuahua/n02085620_2.jpg", "Images/n02116738-African_hunting_dog/n02116738_3.jpg"],
        [0, 0, 1, 1, 2, 2],
        ("Chihuahua", "wire-haired_fox_terrier", "African_hunting_dog"),
    ),
}


@pytest.mark.filterwarnings("ignore:.*official split")
@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_layout(name, tmp_path):
    train, test, bad = open_set(name, make(name, tmp_path / name))
    ends, labels, test_ends, test_labels, classes = OFFICIAL[name]
    assert [train.names[0], train.names[-1]] == ends and train.labels.tolist() == labels
    assert [test.names[0], test.names[-1]] == test_ends and test.labels.tolist() == test_labels
    assert not set(train.names) & set(test.names) and len(train) == len(test) == 6
    assert train.sizes.tolist() == [[14, 20]] * 6 and all(train.path(i).is_file() for i in range(6))
    if classes is None:
        assert len(train.classes) == 102 and train.classes[::101] == ("pink primrose", "blackberry lily")
        assert {b.reason for b in bad} == {"empty class: no readable image"} and len(bad) == 2 * 99
    else:
        assert train.classes == classes == test.classes and bad == ()


@pytest.mark.parametrize("name", OFFICIAL)
def test_other_counts_than_the_official_ones_are_a_warning_with_both(name, tmp_path, monkeypatch):
    training, test, classes = layouts.KNOWN[name].counts
    root = make(name, tmp_path)
    match = f"official split of .* has {training} training images, {test} test images, {classes} classes; found 6 .* 6 .* 3 classes"
    with pytest.warns(UserWarning, match=match) as said:
        open_set(name, root)
    assert len(said) == 1
    monkeypatch.setitem(layouts.KNOWN, name, layouts.KNOWN[name]._replace(counts=(6, 6, 3)))
    open_set(name, root)


def test_the_official_counts():
    assert {name: known.counts for name, known in layouts.KNOWN.items() if known.counts} == {
        "cub": (5994, 5794, 200),
        "cars": (8144, 8041, 196),
        "aircraft": (6667, 3333, 100),
        "nabirds": (23929, 24633, 555),
        "flowers": (1020, 6149, 102),
        "butterfly": (10270, 15009, 200),
        "dogs": (12000, 8580, 120),
    }


@pytest.mark.parametrize(
    ("name", "missing", "match"),
    [
        ("cub", "images.txt", "unpack CUB_200_2011.tgz: tar -xf CUB_200_2011.tgz -C '{parent}/a set'"),
        ("cars", "devkit/cars_meta.mat", "unpack car_devkit.tgz: tar -xf car_devkit.tgz -C '{parent}/a set'"),
        ("cars", "cars_test_annos_withlabels.mat", "download cars_test_annos_withlabels.mat into {parent}/a set"),
        ("cars", "cars_test", "unpack cars_test.tgz"),
        ("cars", "cars_train/00003.jpg", r"00003.jpg is listed but not there \(1 of 12 files missing\); unpack cars_train.tgz"),
        ("aircraft", "data/variants.txt", "unpack fgvc-aircraft-2013b.tar.gz"),
        ("nabirds", "train_test_split.txt", "unpack nabirds.tar.gz"),
        ("flowers", "setid.mat", "download setid.mat into"),
        ("flowers", "jpg", "unpack 102flowers.tgz"),
        ("flowers", "jpg/image_00011.jpg", "image_00011.jpg is listed but not there .*; unpack 102flowers.tgz"),
        ("butterfly", "Butterfly200_val_release.txt", "download Butterfly200_val_release.txt into"),
        ("butterfly", "images", "has no images/, .* unpack the archive of the images"),
        ("dogs", "test_list.mat", "unpack lists.tar: tar -xf lists.tar"),
        ("dogs", "Images", "unpack images.tar"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*official split")
def test_a_missing_piece_names_its_archive_and_where_to_unpack_it(name, missing, match, tmp_path):
    root = make(name, tmp_path / "a set")
    (root / missing).rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=match.format(parent=tmp_path)):
        open_set(name, root)


def test_an_archive_that_makes_its_own_folder_is_unpacked_beside_it(tmp_path):
    (tmp_path / "nabirds").mkdir()
    with pytest.raises(FileNotFoundError, match=f"tar -xf nabirds.tar.gz -C {tmp_path}$"):
        open_set("nabirds", tmp_path / "nabirds")


@pytest.mark.filterwarnings("ignore:.*official split")
@pytest.mark.parametrize(("name", "folder"), [("aircraft", "fgvc-aircraft-2013b"), ("nabirds", "nabirds"), ("cub", "CUB_200_2011")])
def test_the_root_may_hold_the_archives_own_folder(name, folder, tmp_path):
    make(name, tmp_path / folder)
    assert open_set(name, tmp_path).train.names == open_set(name, tmp_path / folder).train.names


@pytest.mark.filterwarnings("ignore:.*official split")
def test_the_other_places_of_cars_labels_and_butterflies(tmp_path):
    make("cars", tmp_path / "cars", test_annotations="devkit/cars_test_annos_withlabels.mat")
    assert open_set("cars", tmp_path / "cars").test.labels.tolist() == [2, 2, 1, 1, 0, 0]
    make("butterfly", tmp_path / "butterfly")
    (tmp_path / "butterfly/images").rename(tmp_path / "butterfly/images_small")
    assert open_set("butterfly", tmp_path / "butterfly").train.names[0].startswith("images_small/001.")


@pytest.mark.filterwarnings("ignore:.*official split")
def test_nabirds_ids_with_and_without_dashes_are_the_same(tmp_path):
    root = make("nabirds", tmp_path)
    before = open_set("nabirds", root)
    labels = root / "image_class_labels.txt"
    labels.write_text(labels.read_text().replace("-", ""))
    after = open_set("nabirds", root)
    assert after.train.names == before.train.names and after.train.labels.tolist() == before.train.labels.tolist()


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


def test_circles_of_class_folders_end(folder):
    (folder / "train/again").symlink_to(folder)
    (folder / "train/self").symlink_to("self")
    result = open_set("folder", folder)
    assert all("again" not in n for n in result.train.names + result.test.names)
    assert [b.name for b in result.bad] == ["train/again"] and "empty class" in result.bad[0].reason


def test_lists_with_every_separator_but_a_line_feed_in_a_name(cub):
    odd = "002.Bee_eater/it's \u2028 \x0c 'odd' \"größe\".jpg"
    (cub / "images/002.Bee_eater/b1.jpg").rename(cub / "images" / odd)
    text = (cub / "images.txt").read_text().replace("002.Bee_eater/b1.jpg", odd)
    (cub / "images.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert open_set("birds", cub).train.names == ("images/001.Auk/Auk 1.jpg", f"images/{odd}")


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
    for name in OFFICIAL:
        root = make(name, tmp_path_factory.mktemp(name), (2, 2))
        for path in list(root.rglob("*.txt")):
            path.with_name(f"{path.name}.whole").write_bytes(path.read_bytes())
            found[name, path.relative_to(root).as_posix()] = root
    return found


@pytest.fixture(scope="module")
def bannered(tmp_path_factory):
    """(aircraft with its banner to be cut, the same images without one as a folder), training lists in one order."""
    root = make("aircraft", tmp_path_factory.mktemp("aircraft"), (96, 100))
    with pytest.warns(UserWarning, match="official split"):
        train = open_set("aircraft", root).train
    rng = np.random.default_rng(0)
    plain_root = tmp_path_factory.mktemp("plain")
    for i in range(len(train)):
        smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((96 + i, 80 + 3 * i), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth)
        banner = np.broadcast_to(np.uint8((255, 0, 255)), (20, pixels.shape[1], 3))
        mode = "RGB" if i % 2 else "P"  # DALI opens the first kind itself and is handed the pixels of the second
        whole = Image.fromarray(np.concatenate((pixels, banner)))
        whole = whole if mode == "RGB" else whole.quantize(256, dither=Image.Dither.NONE)
        whole.save(train.path(i), "PNG")  # without loss, under the set's own names
        Image.fromarray(np.asarray(whole.convert("RGB"))[:-20]).save(plain_root / f"{i}.png")
    with pytest.warns(UserWarning, match="official split"):  # noqa: PT031  (each of both warns)
        cut = open_set("aircraft", root, crop_banner=True).train
        assert cut.fingerprint != open_set("aircraft", root).train.fingerprint
    return cut, open_set("folder", plain_root).train


def test_a_cut_banner_is_in_no_size_and_no_picture(bannered):
    cut, plain = bannered
    assert cut.cut == 20 and cut.sizes.tolist() == plain.sizes.tolist() and set(cut.plain.tolist()) == {True, False}
    for i in range(len(cut)):
        assert np.array_equal(np.asarray(cut.read(i)), np.asarray(plain.read(i)))


@pytest.mark.parametrize("loader", ["torch", "dali", "resident"])
def test_a_cut_banner_is_in_no_view_of_a_loader(loader, bannered):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")

    def batches(images):
        resident = {"resident": "host"} if loader == "resident" else {"resident": "off", "loader": loader}
        data = DataConfig(name="aircraft", image_size=64, workers=0 if loader == "torch" else 1, **resident)
        made = build_loader(images, Config(batch_size=6, data=data), "cpu", with_clean=True)
        found = list(made.batches(0, 3))
        made.close()
        return found

    for one, other in zip(*map(batches, bannered), strict=True):
        assert one.index.tolist() == other.index.tolist()
        for views in ("x_q", "x_k", "x_clean"):
            assert np.array_equal(getattr(one, views).numpy(), getattr(other, views).numpy()), views


def test_a_cut_banner_is_in_no_clean_batch(bannered):
    one, other = (next(iter(clean_batches(images, resize=73, crop=73, workers=0)))[0] for images in bannered)
    assert np.array_equal(one.numpy(), other.numpy())


@pytest.mark.filterwarnings("ignore:.*official split")
def test_only_aircraft_have_a_banner_and_one_must_be_left(tmp_path):
    with pytest.raises(ValueError, match="data.crop_banner: only images of data.name=aircraft"):
        open_set("cub", tmp_path, crop_banner=True)
    with pytest.raises(ConfigError, match="data.crop_banner: got True, only .* data.name=aircraft"):
        from_yaml("data: {name: dogs, crop_banner: true}")
    assert from_yaml("data: {name: aircraft, crop_banner: true}").data.crop_banner
    root = make("aircraft", tmp_path / "low", (30, 20))
    with pytest.raises(ValueError, match="6 training files, none readable .*only 20 rows high, 20 of which data.crop_banner"):
        open_set("aircraft", root, crop_banner=True)
