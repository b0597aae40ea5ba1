"""The official layouts from miniature copies: lists, labels, splits, order, counts, and what is said of a missing piece."""

from __future__ import annotations

import pytest
from miniatures import make, open_set

from engine.data import layouts

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
    train, test, bad, *_ = open_set(name, make(name, tmp_path / name))
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
        ("cars", "cars_train", "has no cars_train/, .* unpack cars_train.tgz"),
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
